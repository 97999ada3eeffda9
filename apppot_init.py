#!/usr/bin/python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""AppPot's agent in the guest: it runs one command in the appliance for the runner on the host.

Usage: /sbin/apppot-init starts it as PID 1 of the guest; nobody starts it by hand.

Constraint: a system call costs about 20 us here, a new process 4 to 15 ms. So the agent imports
little, starts nothing but the command, and moves bytes in large pieces.

A run is one pass through run_job(), near the end of this file. The sections above it stand in the
order in which it needs them.
"""
import _ctypes
import _thread
import errno
import fcntl
import os
import select
import stat
import struct
import sys
import termios
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import (
        BinaryIO,
        Callable,
        Dict,
        FrozenSet,
        Iterable,
        List,
        NamedTuple,
        NoReturn,
        Optional,
        Sequence,
        Tuple,
        Union,
    )

    import changes
else:
    # The module signal makes enums, which takes a third of the time of all imports.
    import _signal as signal

    class Hint:
        """Stands in for the names of typing, whose import takes a fifth of all imports' time."""

        def __getitem__(self, item):
            return self

    BinaryIO = Callable = Dict = FrozenSet = Iterable = List = NoReturn = Hint()
    Optional = Sequence = Tuple = Union = Hint()

    class NamedTuple:
        """Does what the agent needs of typing.NamedTuple: fields by name."""

        def __init__(self, *values, **named):
            self.__dict__.update(zip(type(self).__annotations__, values), **named)

VERSION = "0.1"

# --- What crosses host and guest (the other program has the same text; a test compares them) ----------------

PROTOCOL = 5
MAGIC = b"\0AppPot\0"                # comes before the first frame: a line may carry noise before the agent owns it
FRAME = struct.Struct("<BI")         # type, length of the payload in bytes
FRAME_MAX = 1 << 20
# Guest to host.
HELLO, STARTED, STDOUT, STDERR, CREDIT, STDIN_CLOSED, RESULT = 1, 2, 3, 4, 5, 6, 7
SCREEN, STOPPED, RECEIVED, TERMINATE, WARNING, SAVING = 8, 9, 10, 11, 12, 13
MOUNT_POINT, PROGRESS = 14, 15
# Host to guest. A type with SPOOLED set carries the name of a spool file that holds the payload.
JOB, STDIN, STDIN_EOF, SIGNAL, ACK, OUTPUT_CLOSED, KEYS, WINDOW, FOREGROUND = 33, 34, 35, 36, 37, 38, 39, 40, 41
NETWORK_LOST, MADE, LOCKS_WAIT = 42, 43, 44
SPOOLED = 0x80
IS_SHELL, HOME_STAYS = 1, 2          # bits of the byte in STARTED: an interactive shell; its home is the host's
OUTPUT_WINDOW = 4 << 20              # bytes of each output stream the host may not have written yet
SCREEN_WINDOW = 64 << 10             # the same of the terminal: what Ctrl-C cannot stop any more
PROGRESS_COUNTS = struct.Struct("<B4Q")   # a number of WORKS; files and bytes; how many in all, 0: not known
WORKS = ("checking", "merging", "looking for changes", "saving")
TERMINAL_MODES = struct.Struct("6I32s")   # iflag, oflag, cflag, lflag, ispeed, ospeed, cc as of tcgetattr(3)

# --- The errors, and the fields that carry them ---------------------------------------------------

class Fatal(Exception):
    """The command cannot be run, or nobody can tell how it ended. `status` is the exit status."""

    def __init__(self, message: str, hint: str = "", status: int = 125) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = status


class DiskFailure(Fatal):
    """A write to the root file system is lost. The runner finds out which file of the host failed."""


def encode_fields(fields: Iterable[Tuple[bytes, bytes]]) -> bytes:
    """NAME=VALUE records, each ended by NUL. A name may come again. A value holds no NUL."""
    return b"".join(name + b"=" + value + b"\0" for name, value in fields)


def decode_fields(payload: bytes) -> Dict[bytes, List[bytes]]:
    fields: Dict[bytes, List[bytes]] = {}
    for record in payload.split(b"\0")[:-1]:
        name, _, value = record.partition(b"=")
        fields.setdefault(name, []).append(value)
    return fields


def encode_failure(fatal: Fatal) -> bytes:
    def clean(text: str) -> bytes:
        return text.replace("\0", "?").encode("utf-8", "backslashreplace")

    fields = [
        (b"error", clean(fatal.message)),
        (b"hint", clean(fatal.hint)),
        (b"status", b"%d" % fatal.status)]
    if isinstance(fatal, DiskFailure):
        fields.append((b"disk", b"1"))
    return encode_fields(fields)


# --- Files and paths ------------------------------------------------------------------------------

# Only the guest's root may enter it: what others put into the spool below it would reach the host.
PLACE = "/run/apppot"


def is_below(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")


def show_path(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def read_file(path: str) -> bytes:
    """The content of a file; nothing if there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def write_file(path: str, content: bytes) -> None:
    """Replace a file of the appliance and keep its mode."""
    mode = os.stat(path).st_mode & 0o7777 if os.path.exists(path) else 0o644
    temporary = path + ".apppot"
    with open(temporary, "wb") as file:
        file.write(content)
    os.chmod(temporary, mode)
    os.rename(temporary, path)


def write_setting(name: str, value: str) -> None:
    """Tell the kernel something: write to one of its files below /proc."""
    with open("/proc/" + name, "w") as file:
        file.write(value)


def chown_tree(path: bytes, uid: int, gid: int) -> None:
    os.chown(path, uid, gid, follow_symlinks=False)
    if os.path.isdir(path) and not os.path.islink(path):
        for name in os.listdir(path):
            chown_tree(os.path.join(path, name), uid, gid)


def copy_tree(source: bytes, target: bytes) -> None:
    """Copy links, files and directories below `source`; files keep their modes."""
    for name in os.listdir(source):
        old = os.path.join(source, name)
        new = os.path.join(target, name)
        if os.path.islink(old):
            os.symlink(os.readlink(old), new)
        elif os.path.isdir(old):
            os.mkdir(new)
            copy_tree(old, new)
        else:
            with open(old, "rb") as reader, open(new, "wb") as writer:
                writer.write(reader.read())
            os.chmod(new, os.stat(old).st_mode & 0o7777)


# --- The kernel, called directly: Python has no mount() -------------------------------------------

# include/uapi/linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MNT_DETACH = 2


# The module ctypes makes types for all of C, which takes a sixth of all imports' time. These will do.
class Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = Int


LIBC = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]


def call_libc(name: str, *arguments: Union[int, bytes]) -> int:
    """The result of a function of the C library; OSError if it fails. Bytes are passed as a pointer."""
    function = Function(_ctypes.dlsym(LIBC, name))
    result: int = function(*[Long(each) if isinstance(each, int) else each for each in arguments])
    if result < 0:
        number = _ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def mount(source: bytes, target: bytes, kind: bytes, flags: int = 0, options: bytes = b"") -> None:
    call_libc("mount", source, target, kind, flags, options)


def unmount(target: bytes) -> None:
    call_libc("umount2", target, MNT_DETACH)


# --- The devices of the VMM -----------------------------------------------------------------------
# Only this section knows that the VMM is User-Mode Linux. A second VMM gets its channel and shares here.
#
# UML's hostfs passes on at once what write(2) brings. It keeps what programs change through mmap(2)
# until somebody synchronises the file; by itself, that of Linux 6.1 writes it only when they have ended.

CHANNEL = "/dev/ttyS0"               # ssl0 of UML's command line
# Flags of mount(2) that remount, bind, move or propagate. With one of them it makes no new mount.
MS_SHAPE = MS_REMOUNT | MS_BIND | 8192 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20
SYS_MOUNT, SYS_FSOPEN, AUDIT_ARCH_X86_64 = 165, 430, 0xC000003E
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2       # include/uapi/linux/prctl.h, seccomp.h
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
# 32-bit words; include/uapi/linux/bpf_common.h
BPF_LOAD, BPF_EQUAL, BPF_ANY_BIT, BPF_RETURN = 0x20, 0x15, 0x45, 0x06
CAP_SYS_ADMIN = 21
VIRTIO_FS = "apppot_virtiofs"        # on the kernel command line: which modules virtio-fs needs
VIRTIO_FS_TAG = b"apppot"
MODULES = "/run/apppot-modules"
SYS_FINIT_MODULE = 313


def open_channel() -> int:
    """The line to the runner, 8-bit clean and without echo."""
    line = os.open(CHANNEL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    _, _, _, _, *speeds, characters = termios.tcgetattr(line)
    characters[termios.VMIN] = 1
    characters[termios.VTIME] = 0

    iflag = oflag = lflag = 0
    cflag = termios.CS8 | termios.CREAD | termios.CLOCAL
    # TCSAFLUSH hangs on a line that a pty carries.
    termios.tcsetattr(line, termios.TCSANOW, [iflag, oflag, cflag, lflag, *speeds, characters])
    return line


def mount_hostfs(tag: bytes, place: bytes, flags: int) -> None:
    """Mount a directory for which the host has this name."""
    try:
        os.mkdir(place, 0o700)
        mount(b"none", place, b"hostfs", MS_NOSUID | MS_NODEV | flags, tag)
    except OSError as error:
        raise Fatal(
            "directory of the host ({}) cannot be mounted: {}".format(tag.decode(), error.strerror),
            "is it still there, and may you search it? The kernel needs hostfs: see --doctor")


def has_file_server() -> bool:
    """Whether the shares come by virtio-fs. The kernel makes such words of its command line ours."""
    return VIRTIO_FS in os.environ


def load_modules(names: Iterable[str]) -> None:
    """Load modules of the kernel that the host has."""
    place = MODULES.encode()
    mount_hostfs(b"modules", place, MS_RDONLY)
    for name in names:
        try:
            file = os.open("{}/{}.ko".format(MODULES, name), os.O_RDONLY | os.O_CLOEXEC)
            call_libc("syscall", SYS_FINIT_MODULE, file, b"", 0)
            os.close(file)
        except OSError as error:
            raise Fatal(
                "module {} of the kernel cannot be loaded: {}".format(name, error.strerror),
                "is it of this kernel? -v shows the guest's console")
    unmount(place)
    os.rmdir(place)


def mount_shares() -> None:
    """Mount the one file system that has all shares, if the host has a file server."""
    if not has_file_server():
        return
    load = os.environ[VIRTIO_FS]
    if load:
        load_modules(load.split(","))
    try:
        mount(VIRTIO_FS_TAG, PLACE.encode(), b"virtiofs", MS_NOSUID | MS_NODEV)
    except OSError as error:
        raise Fatal(
            "files of the host cannot be mounted: {}".format(error.strerror),
            "-v shows the guest's console; please report it")


def reach_share(tag: bytes, only_file: bytes, flags: int = 0) -> bytes:
    """The path of a share for root alone: of a directory, or of the only file in it that is shared."""
    place = os.path.join(PLACE.encode(), tag)
    if has_file_server():
        return place
    mount_hostfs(tag, place, flags)
    return os.path.join(place, only_file) if only_file else place


def leave_share(tag: bytes) -> None:
    if not has_file_server():
        unmount(os.path.join(PLACE.encode(), tag))


def await_end_without_files() -> None:
    """Return if the shares are still served.

    If the file server is dead, the host ends the guest and knows why better than the agent. What the
    command has made of its errors is no result.
    """
    try:
        os.statvfs(PLACE)            # this asks the server
    except FileNotFoundError:        # the agent has failed before it made the place
        pass
    except OSError:
        while True:
            time.sleep(3600)


def forbid_mounts() -> None:
    """Take new mounts from every process, this one included. Bind mounts and remounts stay.

    If the host cannot confine the kernel, the guest's root can mount any directory of it as hostfs.
    """
    import ctypes

    refuse = SECCOMP_RET_ERRNO | errno.EPERM
    # Code, jump if true, jump if false, operand; loads are from struct seccomp_data.
    program = (
        (BPF_LOAD, 0, 0, 4),
        (BPF_EQUAL, 0, 6, AUDIT_ARCH_X86_64),
        (BPF_LOAD, 0, 0, 0),
        (BPF_EQUAL, 4, 0, SYS_FSOPEN),
        (BPF_EQUAL, 0, 2, SYS_MOUNT),
        (BPF_LOAD, 0, 0, 16 + 8 * 3),
        (BPF_ANY_BIT, 0, 1, MS_SHAPE),
        (BPF_RETURN, 0, 0, SECCOMP_RET_ALLOW),
        (BPF_RETURN, 0, 0, refuse))

    steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    sock_fprog = struct.pack("HP", len(program), ctypes.addressof(steps))
    call_libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, sock_fprog)

    # Helpers that the kernel starts itself, to take a core dump for example, do not inherit the filter.
    with open("/proc/sys/kernel/usermodehelper/bset", "r+") as file:
        low, high = (int(word) for word in file.read().split())
        file.seek(0)
        file.write("{} {}".format(low & ~(1 << CAP_SYS_ADMIN), high))


# --- The channel ----------------------------------------------------------------------------------

SPOOL = PLACE + "/spool"
READ_SIZE = 1 << 18
BASE_ID = "/var/lib/apppot/base-id"


def take_spool_file(name: bytes) -> bytes:
    """A payload that is too long for the slow line. It comes as a file, which the reader removes."""
    path = os.path.join(SPOOL.encode(), name)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb", 0) as file:
        content = file.read()
    os.unlink(path)
    return content


class Channel:
    """Frames over the line to the runner. A write may block, as the runner never stops reading."""

    def __init__(self, line: int) -> None:
        self.fd = line
        self._received = bytearray()

    def send(self, kind: int, payload: bytes = b"") -> None:
        header = FRAME.pack(kind, len(payload))
        written = os.writev(self.fd, [header, payload])
        if written < len(header) + len(payload):
            rest = memoryview(header + payload)[written:]
            while rest:
                rest = rest[os.write(self.fd, rest):]

    def receive(self) -> List[Tuple[int, bytes]]:
        """Read what is there, at least one byte, and return the frames that it completes."""
        piece = os.read(self.fd, READ_SIZE)
        if not piece:
            raise Fatal("the channel to the host is closed")
        self.send(RECEIVED, struct.pack("<I", len(piece)))
        self._received += piece
        return self._take_frames()

    def _take_frames(self) -> List[Tuple[int, bytes]]:
        frames = []
        start = 0
        while len(self._received) - start >= FRAME.size:
            kind, length = FRAME.unpack_from(self._received, start)
            if length > FRAME_MAX:
                raise Fatal("a frame of {} bytes came from the host".format(length))
            end = start + FRAME.size + length
            if len(self._received) < end:
                break

            payload = bytes(self._received[start + FRAME.size:end])
            if kind & SPOOLED:
                payload = take_spool_file(payload)
            frames.append((kind & ~SPOOLED, payload))
            start = end
        del self._received[:start]
        return frames


def receive_only(channel: Channel, wanted: int) -> bytes:
    """Wait for a frame of this type; no other may come now."""
    frames: List[Tuple[int, bytes]] = []
    while not frames:
        frames = channel.receive()
    kind, payload = frames[0]
    if kind != wanted or len(frames) > 1:
        raise Fatal("expected a frame of type {} from the host, got {}".format(wanted, kind))
    return payload


def greet(channel: Channel) -> None:
    os.write(channel.fd, MAGIC)
    channel.send(HELLO, encode_fields((
        (b"protocol", b"%d" % PROTOCOL),
        (b"base", read_file(BASE_ID).strip()),
        (b"agent", VERSION.encode()))))


# --- The job --------------------------------------------------------------------------------------

class Group(NamedTuple):
    gid: int
    name: bytes


class Caller(NamedTuple):
    """Who runs the job on the host."""
    name: bytes
    uid: int
    groups: Tuple[Group, ...]        # the first is the primary one
    home: bytes                      # if the guest sees it; else empty
    as_root: bool                    # the command runs as the guest's root

    @property
    def is_root(self) -> bool:
        return self.as_root or self.uid == 0


class Share(NamedTuple):
    """A directory of the host, or one file of it, and its place in the guest."""
    tag: bytes                       # what the VMM knows the directory by
    only_file: bytes                 # name of the file; empty: the directory itself
    target: bytes
    read_only: bool


class Stdio(NamedTuple):
    """What the command's stdin, stdout and stderr are on the host."""
    kinds: bytes                     # of each "n"ull, "p"ipe or "t"erminal; "s": stderr is stdout
    modes: bytes                     # of the caller's terminal; empty: those of the guest's kernel
    window: bytes                    # struct winsize; empty: no terminal
    foreground: bool                 # the command has the terminal from its start


class Disk(NamedTuple):
    """The disk of the root file system, as the host has it."""
    is_kept: bool                    # what is written to it outlives the run
    size: int                        # bytes that the root file system grows to; 0: it stays as it is
    room: int                        # bytes that the sparse file behind the disk can still take
    scratch: bytes                   # the directory of that file on the host


class Changes(NamedTuple):
    """The changes files, by their paths on the host."""
    layers: Tuple[bytes, ...]        # those to merge before the command
    force: bool                      # merge those of another base, too
    saved: bytes                     # the one to write after the command; empty: none
    saved_name: bytes                # its name in the share
    tells: bool                      # the runner wants to know how far it is


class Node(NamedTuple):
    """What the guest takes over from the node."""
    host_names: bytes                # made for the guest
    hosts: bytes                     # lines of /etc/hosts
    resolver: bytes                  # lines of resolv.conf
    zone: bytes                      # /etc/localtime; empty: none
    zone_name: bytes                 # empty: not known
    certificates: bytes              # of the authorities that it trusts, as PEM


class Interface(NamedTuple):
    name: bytes
    address: bytes                   # IPv4, as 4 bytes
    netmask: bytes


class Network(NamedTuple):
    interfaces: Tuple[Interface, ...]
    gateway: bytes                   # empty: no way out
    nameserver: bytes
    lan_address: bytes               # empty: no LAN


class Job(NamedTuple):
    """What the runner asks for. Paths and strings are bytes, as the kernel has them."""
    argv: Tuple[bytes, ...]          # empty: apppot-run, apppot-autorun or a login shell
    environment: Dict[bytes, bytes]
    cwd: bytes                       # empty: the job directory
    job_directory: bytes             # absolute path on the host, links resolved; empty: none
    job_alias: bytes                 # the same directory as the caller's $PWD names it
    binds: Tuple[Share, ...]
    confined: bool                   # the host makes sure that shares lead nowhere else
    caller: Caller
    stdio: Stdio
    umask: int
    ignored_signals: Tuple[int, ...]
    limits: Tuple[Tuple[int, ...], ...]           # of setrlimit(2): number, soft, hard; -1: infinity
    first_pid: int                   # the process numbers begin near it
    disk: Disk
    changes: Changes
    node: Node
    network: Network


def parse_pairs(values: Iterable[bytes]) -> Iterable[Tuple[bytes, bytes]]:
    for value in values:
        left, _, right = value.partition(b"=")
        yield left, right


def parse_bind(number: int, value: bytes) -> Share:
    only_file, _, target = value[1:].partition(b"/")
    return Share(b"bind%d" % number, only_file, b"/" + target, value[:1] == b"r")


def parse_address(text: bytes) -> bytes:
    return bytes(int(part) for part in text.split(b".") if part)


def parse_interface(name: bytes, text: bytes) -> Interface:
    address, _, prefix = text.partition(b"/")
    netmask = (1 << 32) - (1 << 32 - int(prefix))
    return Interface(name, parse_address(address), struct.pack(">I", netmask))


def parse_job(payload: bytes) -> Job:
    fields = decode_fields(payload)

    def get_all(name: bytes) -> List[bytes]:
        return fields.get(name, [])

    def get(name: bytes) -> bytes:
        return fields.get(name, [b""])[0]

    def get_number(name: bytes) -> int:
        return int(get(name) or b"0")

    def get_bool(name: bytes) -> bool:
        return get(name) == b"1"

    def get_binary(name: bytes) -> bytes:
        return bytes.fromhex(get(name).decode())

    return Job(
        argv=tuple(get_all(b"arg")),
        environment=dict(parse_pairs(get_all(b"env"))),
        cwd=get(b"cwd"),
        job_directory=get(b"job"),
        job_alias=get(b"alias"),
        binds=tuple(parse_bind(number, value) for number, value in enumerate(get_all(b"bind"))),
        confined=get_bool(b"confined"),
        caller=Caller(
            get(b"user"), int(get(b"uid")),
            tuple(Group(int(gid), name) for gid, name in parse_pairs(get_all(b"group"))),
            get(b"home"), get_bool(b"root")),
        stdio=Stdio(
            get(b"stdio"), get_binary(b"modes"), get_binary(b"window"), get_bool(b"foreground")),
        umask=int(get(b"umask")),
        ignored_signals=tuple(map(int, get_all(b"ignore"))),
        limits=tuple(tuple(map(int, value.split())) for value in get_all(b"limit")),
        first_pid=int(get(b"pid")),
        disk=Disk(
            get_bool(b"persistent"), get_number(b"disk"), get_number(b"room"), get(b"scratch")),
        changes=Changes(
            tuple(get_all(b"layer")), get_bool(b"force"), get(b"save"), get(b"save-name"),
            get_bool(b"progress")),
        node=Node(
            get(b"name"), get(b"hosts"), get(b"resolver"), get_binary(b"zone"), get(b"zone-name"),
            get(b"certificates")),
        network=Network(
            tuple(parse_interface(name, value) for name, value in parse_pairs(get_all(b"interface"))),
            parse_address(get(b"gateway")), get(b"nameserver"), get(b"lan")))


# --- Processes ------------------------------------------------------------------------------------

PR_SET_CHILD_SUBREAPER = 36          # include/uapi/linux/prctl.h
SYS_CLONE3 = 435
# include/uapi/linux/sched.h
CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND, CLONE_PIDFD = 0x100, 0x200, 0x400, 0x800, 0x1000
NOWHERE = 8                          # an address that no process has
PID_MAX = 1 << 22                    # PID_MAX_LIMIT of include/linux/threads.h, as on 64-bit hosts
PIDS_SKIPPED = 256                   # at 30 us each


def clone(flags: int = 0, pidfd: int = 0, number: int = 0) -> int:
    """clone3(2): the child's pid, which is `number` if that is not 0; in the child 0."""
    numbers = Int(number)
    set_tid = (_ctypes.addressof(numbers), 1) if number else (0, 0)
    child_tid = parent_tid = stack = stack_size = tls = cgroup = 0
    arguments = struct.pack(
        "11Q", flags, pidfd, child_tid, parent_tid, signal.SIGCHLD,
        stack, stack_size, tls, *set_tid, cgroup)
    return call_libc("syscall", SYS_CLONE3, arguments, len(arguments))


def use_up_number() -> None:
    """Take a process number for no process: clone(2) has one when it fails to store the pidfd."""
    try:
        clone(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_PIDFD, pidfd=NOWHERE)
    except OSError:
        pass


def choose_number(first: int) -> int:
    """Let process numbers begin at `first`, so that `tmp.$$` names another file in another run.

    Returns the number to fork the command with; 0: any. A kernel without ns_last_pid gives one
    process the number that it is told, but then counts on from where it was.
    """
    write_setting("sys/kernel/pid_max", "%d" % PID_MAX)
    try:
        write_setting("sys/kernel/ns_last_pid", "%d" % first)
        return 0
    except FileNotFoundError:
        for _ in range(first % PIDS_SKIPPED):
            use_up_number()
        return first


def fork_as(number: int) -> int:
    """fork(2) a process with this number if the kernel can, else with any; 0: any."""
    if number:
        try:
            return clone(number=number)
        except OSError:              # the number is in use, or the kernel is older than 5.5
            pass
    return os.fork()


def prefer_command() -> None:
    """Let the command run on when it writes: its pipe fills and is moved in large pieces."""
    os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))


def kill_everything() -> None:
    """Kill every process of the guest but this one."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass


def reap_everything() -> None:
    """Wait for the end of all processes: only then is written what they changed through mmap(2)."""
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass


# --- The network ----------------------------------------------------------------------------------

NETWORK_GRACE_S = 2.0                # for the last bytes of the command's connections
AF_INET, SOCK_STREAM, SOCK_CLOEXEC = 2, 1, os.O_CLOEXEC
# include/uapi/linux/sockios.h
SIOCADDRT, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C
IFF_UP, IFF_RUNNING = 0x1, 0x40      # include/uapi/linux/if.h
RTF_UP, RTF_GATEWAY = 0x1, 0x2       # include/uapi/linux/route.h


def open_control() -> BinaryIO:
    """A socket for the ioctls of netdevice(7). The import of the module socket takes 20 ms."""
    return open(call_libc("socket", AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "rb", 0)


def pack_address(address: bytes) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("=HH4s8x", AF_INET, 0, address)


def set_flags(control: BinaryIO, name: bytes, flags: int) -> None:
    fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name, flags))


def raise_loopback() -> None:
    """Bring `lo` up; the kernel itself gives it 127.0.0.1. A kernel without INET does without."""
    try:
        control = open_control()
    except OSError:
        return
    with control:
        set_flags(control, b"lo", IFF_UP | IFF_RUNNING)


def raise_interface(control: BinaryIO, interface: Interface) -> None:
    name = interface.name
    address = struct.pack("16s16s8x", name, pack_address(interface.address))
    netmask = struct.pack("16s16s8x", name, pack_address(interface.netmask))
    try:
        fcntl.ioctl(control, SIOCSIFADDR, address)
        fcntl.ioctl(control, SIOCSIFNETMASK, netmask)
        set_flags(control, name, IFF_UP | IFF_RUNNING)
    except OSError as error:
        raise Fatal(
            "network interface {} cannot be brought up: {}".format(name.decode(), error.strerror),
            "run with -v to see what the guest's kernel says; --net none runs without")


def raise_network(network: Network) -> None:
    """Give the interfaces their addresses, bring them up, and set the route to a gateway."""
    if not network.interfaces:
        return

    with open_control() as control:
        for interface in network.interfaces:
            raise_interface(control, interface)

        if network.gateway:
            everywhere = pack_address(bytes(4))
            gateway = pack_address(network.gateway)
            # struct rtentry: destination, gateway, netmask, flags.
            route = struct.pack(
                "8x16s16s16sH62x", everywhere, gateway, everywhere, RTF_UP | RTF_GATEWAY)
            fcntl.ioctl(control, SIOCADDRT, route)


def lower_interface(name: bytes) -> None:
    """Take down an interface whose helper is dead: the kernel would read its end over and over."""
    with open_control() as control:
        try:
            set_flags(control, name, 0)
        except OSError:              # the command has removed the interface
            pass


def has_unsent_bytes() -> bool:
    """Whether a TCP connection has bytes that the other end has not acknowledged."""
    for line in (read_file("/proc/net/tcp") + read_file("/proc/net/tcp6")).splitlines():
        # The fifth field is tx_queue:rx_queue, in hexadecimal. In the headings it has no colon.
        sent, colon, _ = line.split()[4].partition(b":")
        if colon and int(sent, 16):
            return True
    return False


def send_rest() -> None:
    """Wait until what the command wrote is sent: on a host the kernel sends it after the command's end."""
    deadline = time.monotonic() + NETWORK_GRACE_S
    while has_unsent_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)


# --- The system -----------------------------------------------------------------------------------

MOUNTS = (                           # source, target, type, flags, options
    ("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755"),
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=100%"),
    ("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"),
    ("tmpfs", "/run/lock", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777"),
)
DEV_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("fd/0", "/dev/stdin"),
    ("fd/1", "/dev/stdout"),
    ("fd/2", "/dev/stderr"),
)


def mount_system(mounts: Iterable[Tuple[str, str, str, int, str]]) -> None:
    for source, target, kind, flags, options in mounts:
        os.makedirs(target, exist_ok=True)
        try:
            mount(source.encode(), target.encode(), kind.encode(), flags, options.encode())
        except OSError as error:
            if error.errno == errno.EBUSY:        # the kernel has mounted /dev itself
                continue
            raise Fatal(
                "cannot mount {} on {}: {}".format(kind, target, error.strerror),
                "the kernel has no {}, or the appliance no such directory".format(kind))


def mount_cgroups() -> None:
    try:
        mount(b"cgroup2", b"/sys/fs/cgroup", b"cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:                  # a kernel without control groups
        pass


def prepare_system() -> None:
    mount_system(MOUNTS[1:])
    os.mkdir(PLACE, 0o700)
    mount_shares()
    reach_share(b"spool", b"", MS_NOEXEC)
    mount_cgroups()
    for link_target, link in DEV_LINKS:
        if not os.path.lexists(link):
            os.symlink(link_target, link)

    # The guest's out-of-memory killer takes this process last; run_command() resets it for the command.
    write_setting("self/oom_score_adj", "-1000")
    prefer_command()
    raise_loopback()
    # Ctrl-Alt-Del sends PID 1 a SIGINT, instead of a reboot at once.
    write_setting("sys/kernel/ctrl-alt-del", "0")


# --- The disk -------------------------------------------------------------------------------------

SPARE_ROOM = 64 << 20                # bytes of scratch for what else the guest writes
EXT4_IOC_RESIZE_FS = 0x40086610      # fs/ext4/ext4.h: _IOW('f', 16, __u64), the number of blocks


def grow_root(size: int) -> None:
    """Let the root file system, which is mounted, have `size` bytes of its device."""
    root = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    blocks = size // os.statvfs("/").f_frsize
    try:
        fcntl.ioctl(root, EXT4_IOC_RESIZE_FS, struct.pack("Q", blocks))
    except OSError as error:
        raise Fatal(
            "root file system cannot grow to {} MiB: {}".format(size >> 20, error.strerror),
            "run without --disk, or make a larger image: make image IMAGE_SIZE=")
    finally:
        os.close(root)


class RootDisk:
    """Tells whether the disk took what was written to the root file system.

    The disk is a file of the host, whose file system may be full.
    """

    def __init__(self) -> None:
        # syncfs(2) tells of the errors since this.
        self._root = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
        self._errors = self._count_errors()

    def _count_errors(self) -> bytes:
        """The number in ext4's superblock, of all times; nothing for another file system."""
        device = os.stat("/").st_dev
        link = os.readlink("/sys/dev/block/{}:{}".format(os.major(device), os.minor(device)))
        return read_file("/sys/fs/ext4/{}/errors_count".format(os.path.basename(link)))

    def check(self, is_kept: bool) -> None:
        """Raise Fatal if a write is lost, or may still get lost as it waits in memory.

        To write what waits takes time. It may stay in memory if the disk is of this run only and the
        host has room for all that the memory can hold.
        """
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        scratch = os.statvfs(SPOOL)
        has_room = scratch.f_bavail * scratch.f_frsize >= memory + SPARE_ROOM
        if is_kept or not has_room:
            try:
                call_libc("syncfs", self._root)
            except OSError as error:
                raise self._explain(error.strerror)
        if self._count_errors() != self._errors:
            raise self._explain("ext4 has found errors")

    def _explain(self, reason: Optional[str]) -> Fatal:
        return DiskFailure(
            "root file system cannot be written: {}".format(reason),
            "run with -v to see the guest's console")


# --- What the node says ---------------------------------------------------------------------------

HOSTS = "/etc/hosts"
RESOLV_CONF = "/etc/resolv.conf"
LOCALTIME = "/etc/localtime"
TIMEZONE = "/etc/timezone"
ZONES = "/usr/share/zoneinfo"        # the appliance's time zones
NODE_ZONES = "/run/zoneinfo"         # for one of the node's
NODE_FILES = "/run/apppot-node"
OWN_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
NODE_BUNDLE = NODE_FILES + "/ca-certificates.crt"
NODE_APT_CONF = NODE_FILES + "/apt.conf"
BEGIN_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
# OpenSSL and Python; curl and git; requests and pip.
BUNDLE_VARIABLES = (b"SSL_CERT_FILE", b"CURL_CA_BUNDLE", b"REQUESTS_CA_BUNDLE")


def choose_nameserver(text: bytes, nameserver: bytes) -> bytes:
    """A resolv.conf that names this server, if one is given: an image may name one of its origin."""
    servers = [line.split()[1:2] for line in text.splitlines() if line.startswith(b"nameserver")]
    if not nameserver or servers[:1] == [[nameserver]]:
        return text
    return b"nameserver " + nameserver + b"\n"


def offer_certificates(theirs: bytes) -> None:
    """Write a file with the appliance's certificates and the node's, if the node has more.

    The command's environment leads to it. It is not mounted over the appliance's own, because
    update-ca-certificates renames that.
    """
    own = read_file(OWN_BUNDLE)
    known = {block.strip() for block in own.split(BEGIN_CERTIFICATE)}
    added = [block for block in theirs.split(BEGIN_CERTIFICATE) if block.strip() not in known]
    if any(map(bytes.strip, added)):
        write_file(NODE_BUNDLE, own + b"".join(BEGIN_CERTIFICATE + block for block in added if block))
        write_file(NODE_APT_CONF, b'Acquire::https::CaInfo "%s";\n' % NODE_BUNDLE.encode())


class Lent(NamedTuple):
    """A file that is mounted over one of the appliance's for the run."""
    path: str                        # the path of the appliance's file
    is_new: bool                     # the appliance has none; an empty one was made to mount on
    text: bytes
    lines: FrozenSet[bytes]          # the lines of the text that are the node's


class NodeFiles:
    """Files in which the guest says what the node says: names of hosts, search list, time zone.

    They are mounted over the appliance's own files, which do not change. So nothing of the node is
    left in an image that --write boots or in a changes file, not even if the run is killed.
    """

    def __init__(self, node: Node, nameserver: bytes) -> None:
        self._lent: List[Lent] = []
        os.mkdir(NODE_FILES, 0o755)

        names = b"127.0.1.1 %s\n" % node.host_names if node.host_names else b""
        self._lend_lines(HOSTS, read_file(HOSTS), names + node.hosts)
        own = choose_nameserver(read_file(RESOLV_CONF), nameserver)
        self._lend_lines(RESOLV_CONF, own, node.resolver)
        if node.zone and node.zone != read_file(LOCALTIME):
            self._lend_zone(node.zone, node.zone_name)
        offer_certificates(node.certificates)

    def _lend_lines(self, path: str, own: bytes, lines: bytes) -> None:
        """Lend the lines `own` and then those of `lines` that are not among them."""
        path = os.path.realpath(path)             # it may lead to a file of a service in /run
        own = own.rstrip(b"\n") + b"\n" if own else b""
        known = set(own.splitlines(True))
        added = [line for line in lines.splitlines(True) if line not in known]

        text = own + b"".join(added)
        if text and text != read_file(path):
            source = os.path.join(NODE_FILES, os.path.basename(path))
            with open(source, "wb") as file:
                file.write(text)
            self._lend(source, path, text, added)

    def _lend_zone(self, zone: bytes, name: bytes) -> None:
        """Lend a link to the zone, as programs read the zone's name from the link."""
        name_in_path = os.fsdecode(name) or "localtime"
        target = os.path.join(ZONES, name_in_path)
        if read_file(target) != zone:             # another edition of the time zones, or none
            target = os.path.join(NODE_ZONES, name_in_path)
            os.makedirs(os.path.dirname(target))
            with open(target, "wb") as file:
                file.write(zone)

        link = os.path.join(NODE_FILES, "localtime")
        os.symlink(target, link)
        self._lend(link, LOCALTIME)
        if name and read_file(TIMEZONE):
            self._lend_lines(TIMEZONE, b"", name + b"\n")

    def _lend(self, source: str, path: str, text: bytes = b"", lines: Iterable[bytes] = ()) -> None:
        is_new = not os.path.lexists(path)
        if is_new:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "wb").close()

        # By descriptors, as mount(2) follows the links that a path names.
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        ours = os.open(source, flags)
        theirs = os.open(path, flags)
        mount(b"/proc/self/fd/%d" % ours, b"/proc/self/fd/%d" % theirs, b"", MS_BIND)
        os.close(ours)
        os.close(theirs)
        self._lent.append(Lent(path, is_new, text, frozenset(lines)))

    def take_back(self) -> None:
        """Leave the appliance's own files, with what the command has written into ours."""
        for lent in self._lent:
            text = read_file(lent.path)
            try:
                unmount(lent.path.encode())
            except OSError:          # the command has unmounted it
                continue

            if lent.text and text != lent.text:
                kept = [line for line in text.splitlines(True) if line not in lent.lines]
                write_file(lent.path, b"".join(kept))
            elif lent.is_new:
                os.unlink(lent.path)


# --- The account ----------------------------------------------------------------------------------

PASSWD = "/etc/passwd"
GROUP = "/etc/group"
MOVED_HOMES = b"/var/lib/apppot/home"             # for a home that the job directory would cover
# Directories that the job directory may cover although they are not empty.
PLACES_FOR_JOBS = (b"/tmp", b"/var/tmp", b"/home", b"/mnt", b"/media", b"/srv")


class Account(NamedTuple):
    """What the command runs as."""
    name: bytes
    uid: int
    gid: int
    groups: Tuple[int, ...]
    home: bytes
    shell: bytes


def find_account(table: bytes, name: bytes) -> Optional[List[bytes]]:
    """The fields of the line of a passwd file that has this name."""
    for entry in table.split(b"\n"):
        fields = entry.split(b":")
        if fields[0] == name and len(fields) >= 7:
            return fields
    return None


def is_account(entry: bytes, name: bytes, number: int) -> bool:
    """Whether a lookup of this name, or of this number, finds this line of a passwd file."""
    fields = entry.split(b":")
    return fields[0] == name or fields[2:3] == [b"%d" % number]


def put_account(table: bytes, name: bytes, number: int, line: bytes) -> bytes:
    """A passwd file in which both the name and the number find `line`. All other lines stay."""
    lines = [entry for entry in table.split(b"\n") if entry]
    same = [index for index, entry in enumerate(lines) if is_account(entry, name, number)]
    lines.insert(same[0] if same else len(lines), line)
    return b"\n".join(lines) + b"\n"


def clean_name(name: bytes) -> bytes:
    """A name as the files passwd and group can hold it."""
    return name.replace(b":", b"_").replace(b"\n", b"_")


def choose_name(caller: Caller, passwd: bytes) -> bytes:
    """The caller's name, unless it is root's in the guest or no home directory can be called so."""
    entry = find_account(passwd, caller.name)
    is_taken = bool(entry and entry[2] == b"0")
    if is_taken or caller.name in (b"", b".", b".."):
        return b"u%d" % caller.uid
    return clean_name(caller.name)


def choose_shell(entry: Optional[List[bytes]]) -> bytes:
    shell = entry[6] if entry else b""
    if os.access(shell, os.X_OK) and os.path.basename(shell) not in (b"nologin", b"false"):
        return shell
    return b"/bin/bash" if os.access(b"/bin/bash", os.X_OK) else b"/bin/sh"


def is_own_home(home: bytes, uid: int) -> bool:
    """Whether a user may have this home: the account `daemon` has /usr/sbin, for example."""
    if is_below(home, b"/home"):
        return home != b"/home"
    return os.path.isdir(home) and os.stat(home).st_uid == uid


def choose_home(job: Job, passwd: bytes) -> bytes:
    """The caller's home if the guest sees it, else that of the account here, else /home/NAME.

    A home here moves if the job directory would cover it, or if the way to the job directory would
    go through ~/job, which is a link.
    """
    if job.caller.home:
        return job.caller.home

    if job.caller.is_root:
        entry = find_account(passwd, b"root")
        home = entry[5] if entry and entry[5].strip(b"/") else b"/root"
    else:
        name = choose_name(job.caller, passwd)
        entry = find_account(passwd, name)
        home = os.path.normpath(entry[5]) if entry else b""
        if not is_own_home(home, job.caller.uid):
            home = b"/home/" + name.replace(b"/", b"_")

    directory = job.job_directory
    is_covered = directory == home or (directory in PLACES_FOR_JOBS and is_below(home, directory))
    link = os.path.join(home, b"job/")
    is_on_the_way = directory.startswith(link) or job.job_alias.startswith(link)
    if is_covered or is_on_the_way:
        return os.path.join(MOVED_HOMES, os.path.basename(home))
    return home


def make_home(home: bytes, uid: int, gid: int) -> None:
    is_new = not os.path.isdir(home)
    if is_new:
        os.makedirs(os.path.dirname(home), exist_ok=True)
        os.mkdir(home, 0o755)
        if os.path.isdir(b"/etc/skel"):
            copy_tree(b"/etc/skel", home)

    is_ours = is_new or is_below(home, b"/home") or is_below(home, MOVED_HOMES)
    if is_ours and os.stat(home).st_uid != uid:
        chown_tree(home, uid, gid)


def add_groups(wanted: Iterable[Group]) -> None:
    """Give a name to each group that the appliance does not know."""
    table = read_file(GROUP)
    lines = [entry.split(b":") for entry in table.split(b"\n")]
    names = {fields[0] for fields in lines} | {b""}
    known = {fields[2] for fields in lines if len(fields) > 3}

    added = b""
    for group in wanted:
        if b"%d" % group.gid not in known:
            name = clean_name(group.name)
            name = b"g%d" % group.gid if name in names else name
            added += name + b":x:%d:\n" % group.gid
            names.add(name)
    if added:
        write_file(GROUP, table.rstrip(b"\n") + b"\n" + added)


def make_account(job: Job) -> Account:
    """Let the guest know the caller; return the account that the command runs under.

    With --root the accounts of the appliance stay as they are, as the command may want to change them.
    """
    caller = job.caller
    passwd = read_file(PASSWD)
    name = choose_name(caller, passwd)
    home = choose_home(job, passwd)
    shell = choose_shell(find_account(passwd, b"root" if caller.is_root else name))
    gid = caller.groups[0].gid

    is_known = any(is_account(entry, name, caller.uid) for entry in passwd.split(b"\n"))
    if caller.uid != 0 and not (caller.as_root and is_known):
        # "*" instead of "x": so PAM does not look into the shadow file, and sudo takes the account.
        caller_home = b"/nonexistent" if caller.as_root else home
        line = b":".join((name, b"*", b"%d" % caller.uid, b"%d" % gid, b"", caller_home, shell))
        write_file(PASSWD, put_account(passwd, name, caller.uid, line))
    if caller.uid != 0:
        add_groups(caller.groups)

    if caller.is_root:
        make_home(home, 0, 0)
        return Account(b"root", 0, 0, (), home, shell)
    make_home(home, caller.uid, gid)
    return Account(name, caller.uid, gid, tuple(group.gid for group in caller.groups), home, shell)


# --- The shares -----------------------------------------------------------------------------------

def make_mount_point(path: bytes, account: Account, is_directory: bool = True) -> None:
    """Make what is missing of a path, for the account, which can make neighbours as on the host."""
    missing: List[bytes] = []
    while not os.path.lexists(path):
        missing.insert(0, path)
        path = os.path.dirname(path)

    for directory in missing if is_directory else missing[:-1]:
        os.mkdir(directory, 0o755)
    if missing and not is_directory:
        os.close(os.open(missing[-1], os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    for path in missing:
        os.chown(path, account.uid, account.gid)


def covers_system(path: bytes) -> bool:
    """Whether a mount on `path` would hide something of the appliance, or is impossible."""
    if path in PLACES_FOR_JOBS or is_below(path, b"/home"):
        return os.path.lexists(path) and not os.path.isdir(path)
    if os.path.lexists(path):
        return not os.path.isdir(path) or bool(os.listdir(path))

    while not os.path.lexists(path):
        path = os.path.dirname(path)
    # In the first ancestor that exists a directory must be made.
    return not os.path.isdir(path) or is_below(path, b"/proc") or is_below(path, b"/sys")


def is_full(path: bytes) -> bool:
    try:
        return os.statvfs(path).f_bavail == 0
    except OSError:
        return False


class MountedShares:
    """The directories and files of the host that the guest sees at their places."""

    def __init__(self, job: Job, account: Account, channel: Channel) -> None:
        self._account = account
        self._channel = channel
        self._mounted: Dict[bytes, bytes] = {}    # place to tag
        self._has_unread = False                  # something is mounted that cannot be opened
        # By a descriptor of a file system the paths of its shares for root, and their places.
        self._roots: Dict[int, Dict[bytes, bytes]] = {}

        # Those that hold the job directory come before it: later they would hide it.
        binds = sorted(job.binds, key=lambda bind: bind.target.count(b"/"))
        early = [bind for bind in binds if is_below(job.job_directory, bind.target)]
        for bind in early:
            self._mount(bind)
        self.job_directory = self._mount_job_directory(job) if job.job_directory else account.home
        for bind in binds:
            if bind not in early:
                self._mount(bind)

    def is_on_host(self, path: bytes) -> bool:
        return any(is_below(path, place) for place in self._mounted)

    def _make_place(self, path: bytes, is_directory: bool = True) -> None:
        """Make what is missing of a path. In a share the host makes it and removes it at the end."""
        holders = [place for place in self._mounted if is_below(path, place)]
        if os.path.lexists(path) or not holders:
            make_mount_point(path, self._account, is_directory)
            return

        holder = max(holders, key=len)
        kind = b"d" if is_directory else b"f"
        self._channel.send(MOUNT_POINT, kind + self._mounted[holder] + path[len(holder):])
        number, = struct.unpack("<I", receive_only(self._channel, MADE))
        if number:
            raise OSError(number, os.strerror(number))

    def _mount(self, share: Share) -> None:
        target = os.path.realpath(share.target)   # mount(2) follows links, too
        flags = MS_RDONLY if share.read_only else 0
        try:
            self._make_place(target, not share.only_file)
            source = reach_share(share.tag, share.only_file, flags)
            self._open(source, target)
            mount(source, target, b"", MS_BIND)
            if flags:
                mount(b"", target, b"", MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | flags)
        except OSError as error:
            raise Fatal(
                "cannot bind to {!r}: {}".format(os.fsdecode(share.target), error.strerror),
                "DST must be free or of the same kind as SRC, and what it is in, writable")
        leave_share(share.tag)
        self._mounted[target] = share.tag

    def _open(self, path: bytes, place: bytes) -> None:
        """Keep a descriptor for syncfs(2), which then tells of all errors since now.

        It leads to a mount that nothing hides and that is in nobody's way.
        """
        if has_file_server() and self._roots:     # the shares are one file system
            for places in self._roots.values():
                places[path] = place
            return
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._roots[descriptor] = {path: place}
        except OSError:              # nobody may read it: find_losses() does without
            self._has_unread = True

    def _mount_job_directory(self, job: Job) -> bytes:
        """Mount it at its path on the host and let ~/job lead to it; return its path here."""
        directory = job.job_directory
        home = self._account.home
        link = os.path.join(home, b"job")
        home_is_ours = not self.is_on_host(link)
        if home_is_ours and os.path.islink(link):
            os.unlink(link)

        made_way = is_below(home, MOVED_HOMES)
        if covers_system(directory) and not made_way and not self.is_on_host(directory):
            self._mount(Share(b"job", b"", link, False))
            return link
        self._mount(Share(b"job", b"", directory, False))
        if home_is_ours and not os.path.lexists(link):
            os.symlink(directory, link)

        if job.job_alias == directory or os.path.lexists(job.job_alias):
            return directory
        alias = os.path.realpath(job.job_alias)
        self._make_place(alias)
        mount(directory, alias, b"", MS_BIND)
        self._mounted[alias] = b"job"
        return job.job_alias

    def find_losses(self) -> List[Tuple[str, int]]:
        """Write what programs changed through mmap(2); return where that fails, with the errno."""
        losses = []
        if self._has_unread:
            call_libc("sync")        # it tells of no error
        for descriptor, places in self._roots.items():
            try:
                call_libc("syncfs", descriptor)
            except OSError as error:
                full = [place for path, place in places.items() if is_full(path)]
                blamed = full or places.values()
                losses.append((" or ".join(map(show_path, blamed)), error.errno or errno.EIO))
        return losses


# --- The changes files ----------------------------------------------------------------------------
# The import of `changes`, which lies beside this module, takes 0.1 s. Only who needs it imports it.

PROGRESS_S = 0.2                     # between two frames about it

def make_report(job: Job, channel: Channel) -> "changes.Report":
    import changes
    disk = job.disk

    class ChannelReport(changes.Report):
        def warn(self, text: str) -> None:
            channel.send(WARNING, text.encode("utf-8", "backslashreplace"))

        def progress(
            self, what: str, count: int, size: int, all_count: int = 0, all_size: int = 0
        ) -> None:
            now = time.monotonic()            # since the boot: the first may come at 0.1
            if job.changes.tells and (not self._shown or now > self._shown + PROGRESS_S):
                self._shown = now
                counts = PROGRESS_COUNTS.pack(WORKS.index(what), count, size, all_count, all_size)
                channel.send(PROGRESS, counts)

        def clear(self) -> None:
            self._shown = 0.0

        def note_saved(self, count: int, path: bytes) -> None:
            self.saved = count

        def allow(self, layers: Sequence["changes.Layer"]) -> None:
            # One layer may take the place of another: nobody knows how much several need together.
            largest = max(layers, key=lambda layer: layer.size)
            if largest.size <= disk.room:
                return
            raise changes.Fatal(
                "no room to merge, {} has {} for the guest's disk and {} are needed: {}".format(
                    show_path(disk.scratch), changes.format_size(disk.room),
                    changes.format_size(largest.size), show_path(largest.path)),
                "nothing was applied; free some, or name another directory with --tmpdir")

    return ChannelReport()


def blame_host_paths(fatal: "changes.Fatal", paths: Iterable[Tuple[bytes, bytes]]) -> Fatal:
    """The failure with the host's paths of changes files in place of the guest's."""
    message = fatal.message
    hint = fatal.hint
    for ours, theirs in paths:
        message = message.replace(show_path(ours), show_path(theirs))
        hint = hint.replace(show_path(ours), show_path(theirs))
    return Fatal(message, hint)


def merge_layers(job: Job, channel: Channel) -> None:
    """Apply the layers. Nothing else of the host is mounted yet, and the layers only until then."""
    import changes

    changes.spare_memory()
    layers = job.changes.layers
    tags = [b"layer%d" % number for number in range(len(layers))]
    paths = [reach_share(tag, os.path.basename(layer), MS_RDONLY) for tag, layer in zip(tags, layers)]
    try:
        report = make_report(job, channel)
        changes.run_apply(paths, b"/", False, job.changes.force, report)
    except changes.Fatal as fatal:
        raise blame_host_paths(fatal, zip(paths, layers))
    finally:
        for tag in tags:
            leave_share(tag)


class OwnFiles:
    """What the agent itself changes in the appliance. It is not saved unless the command changes it."""

    def __init__(self, job: Job) -> None:
        import changes

        self._sign = changes.sign
        self._base = changes.read_manifest(b"/")
        self._unchanged: List[bytes] = []         # until now; paths without the leading slash

        self._expect([PASSWD.encode(), GROUP.encode()])
        self._expect(os.path.dirname(os.path.realpath(path)).encode() for path in (HOSTS, RESOLV_CONF))
        self._expect([choose_home(job, read_file(PASSWD)), job.job_directory, job.job_alias])
        self._expect(bind.target for bind in job.binds)

    def _signature(self, path: bytes) -> Optional[bytes]:
        try:
            return self._sign(os.lstat(b"/" + path))
        except FileNotFoundError:
            return None

    def _expect(self, paths: Iterable[bytes]) -> None:
        """The agent may change these paths, what is above them, and what is below new ones."""
        for path in paths:
            parts = path.strip(b"/").split(b"/")
            for above in (b"/".join(parts[:count]) for count in range(len(parts) + 1)):
                if above not in self._unchanged and self._signature(above) == self._base.get(above):
                    self._unchanged.append(above)

    def list_changed(self) -> Dict[bytes, bytes]:
        """Signatures of what the agent has changed; to be called before the command starts."""
        known = {}
        for path in self._unchanged:
            signature = self._signature(path)
            if not signature or signature == self._base.get(path):
                continue

            known[path] = signature
            full = b"/" + path
            if path not in self._base and os.path.isdir(full) and not os.path.islink(full):
                self._unchanged += [os.path.join(path, name) for name in os.listdir(full)]
        return known


def save_layer(job: Job, known: Dict[bytes, bytes], channel: Channel) -> int:
    """Write the changes file; return the number of files in it."""
    import changes

    channel.send(SAVING)
    changes.spare_memory()
    path = os.path.join(reach_share(b"save", b""), job.changes.saved_name)
    report = make_report(job, channel)
    try:
        changes.save_changes(b"/", path, [], report, known)
    except changes.Fatal as fatal:
        raise blame_host_paths(fatal, [(path, job.changes.saved)])
    finally:
        leave_share(b"save")
    return report.saved


# --- The command ----------------------------------------------------------------------------------

SHELLS = (b"ash", b"bash", b"csh", b"dash", b"fish", b"ksh", b"mksh", b"sh", b"tcsh", b"zsh")
# The options of shells that take a value.
SHELL_OPTIONS = (b"--rcfile", b"--init-file", b"-o", b"+o", b"-O", b"+O")
PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def choose_command(job: Job, account: Account, directory: bytes) -> Tuple[List[bytes], bytes]:
    """argv, and the program: the command line, ./apppot-run, ~/apppot-autorun, or a login shell."""
    if job.argv:
        return list(job.argv), job.argv[0]

    run = os.path.join(directory, b"apppot-run")
    autorun = os.path.join(account.home, b"apppot-autorun")
    for path in (run, autorun):
        if not os.path.isfile(path):
            continue
        if os.access(path, os.X_OK):
            return [path], path
        # Stage-in of grid jobs loses the execute bit: start what the first line names.
        with open(path, "rb") as file:
            first = file.readline(4096)
        interpreter = first[2:].split(None, 1) if first.startswith(b"#!") else [b"/bin/sh"]
        return [word.strip() for word in interpreter] + [path], interpreter[0].strip()

    return [b"-" + os.path.basename(account.shell)], account.shell


def is_interactive_shell(argv: Sequence[bytes]) -> bool:
    """Whether a command line starts a shell with neither a script nor a command to run."""
    words = list(argv[1:])
    while words:
        word = words.pop(0)
        if word in SHELL_OPTIONS:
            words = words[1:]
            continue

        is_option = word[:1] in (b"-", b"+")
        is_long = word[:2] == b"--"
        ends_at_once = word in (b"--command", b"--help", b"--version")
        if not is_option or ends_at_once or not is_long and b"c" in word:
            return False
    return os.path.basename(argv[0]).lstrip(b"-") in SHELLS


def describe_start(job: Job, account: Account, shares: MountedShares) -> int:
    """The bits of STARTED."""
    argv, _ = choose_command(job, account, shares.job_directory)
    kinds = job.stdio.kinds
    has_terminal = kinds[:1] == b"t" and kinds[2:] == b"t"
    is_shell = has_terminal and is_interactive_shell(argv)
    home_stays = shares.is_on_host(account.home)
    return (IS_SHELL if is_shell else 0) | (HOME_STAYS if home_stays else 0)


def build_environment(job: Job, account: Account, directory: bytes) -> Dict[bytes, bytes]:
    environment = {
        b"PATH": PATH,
        b"HOME": account.home,
        b"USER": account.name,
        b"LOGNAME": account.name,
        b"SHELL": account.shell,
        b"PWD": directory,
    }
    if os.path.exists(NODE_BUNDLE):
        environment.update(dict.fromkeys(BUNDLE_VARIABLES, NODE_BUNDLE.encode()))
        environment[b"APT_CONFIG"] = NODE_APT_CONF.encode()
    environment.update(job.environment)
    return environment


def explain_no_program(program: bytes, reason: str) -> Fatal:
    name = repr(os.fsdecode(program))
    if reason == "permission denied":
        hint = "chmod +x makes a script executable"
    elif reason:
        hint = "name a program; --cwd names the directory in which it starts"
    elif b"/" in program:
        hint = "it must be in the appliance or in the job directory"
    else:
        hint = "is it installed in the appliance? A program in the job directory is called ./NAME"

    if reason:
        return Fatal("command cannot be executed, {}: {}".format(reason, name), hint, 126)
    return Fatal("command not found: " + name, hint, 127)


def find_program(program: bytes, path: bytes) -> bytes:
    """The file that a shell would execute; Fatal with 127 or 126 as a shell exits."""
    is_path = b"/" in program
    directories = [b""] if is_path else [directory or b"." for directory in path.split(b":")]
    reason = ""
    for place in [os.path.join(directory, program) for directory in directories if program]:
        try:
            mode = os.stat(place).st_mode
        except PermissionError:      # a directory on the way
            reason = "permission denied" if is_path else reason
            continue
        except OSError:
            continue

        if stat.S_ISREG(mode) and os.access(place, os.X_OK):
            return place
        if stat.S_ISREG(mode):
            reason = "permission denied"
        elif is_path:
            reason = "is a directory" if stat.S_ISDIR(mode) else "is no file"
    raise explain_no_program(program, reason)


# --- The terminal ---------------------------------------------------------------------------------

TERMINAL_SIGNALS = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


class Terminal(NamedTuple):
    """A pseudo-terminal. It controls the agent's session, in which the command is a job."""
    master: int
    slave: int                       # kept open, so that the master has no end before the command's


def leave_pid_1() -> None:
    """Go on as a child of PID 1: Ctrl-Z does not stop PID 1's own children, they have no job control."""
    agent = os.fork()
    while agent:
        if os.wait()[0] == agent:
            os._exit(1)              # the kernel panics, as always when PID 1 ends

    # Orphans come to this process, as they do to PID 1 otherwise.
    call_libc("prctl", PR_SET_CHILD_SUBREAPER, 1)
    prefer_command()


def open_terminal(stdio: Stdio, account: Account) -> Terminal:
    leave_pid_1()
    master, slave = os.openpty()
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)     # they are for the command

    fcntl.ioctl(master, termios.TIOCSWINSZ, stdio.window)
    if stdio.modes:
        *flags, characters = TERMINAL_MODES.unpack(stdio.modes)
        termios.tcsetattr(slave, termios.TCSANOW, [*flags, [bytes([c]) for c in characters]])
    os.fchown(slave, account.uid, -1)
    return Terminal(master, slave)


# --- The start ------------------------------------------------------------------------------------

PIPE_SIZE = 1 << 20                  # the most that an unprivileged process may have
F_SETPIPE_SZ = 1031                  # include/uapi/linux/fcntl.h; in Python's fcntl from 3.10 on
RLIMIT_DATA, RLIMIT_NOFILE, RLIMIT_AS = 2, 7, 9                # include/uapi/asm-generic/resource.h
NR_OPEN = 1 << 20                    # linux/fs.h: the most that the limit of files may be at first

# Executes a program with argv and environment: execve(2), or posix_spawn(3), which returns a pid.
Start = Callable[[bytes, List[bytes], Dict[bytes, bytes]], int]


class Streams(NamedTuple):
    """Both ends of the command's streams, as descriptors."""
    theirs: List[int]                # the command's 0, 1 and 2
    inputs: Dict[int, int]           # by frame type: STDIN, KEYS
    outputs: Dict[int, int]          # by frame type: STDOUT, STDERR, SCREEN
    terminal: Optional[Terminal]


def make_pipe(account: Account) -> Tuple[int, int]:
    """A pipe that the command may open again, as /dev/stderr."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, PIPE_SIZE)
    os.fchown(writer, account.uid, account.gid)
    return reader, writer


def connect_stdio(stdio: Stdio, account: Account) -> Streams:
    theirs: List[int] = []
    inputs: Dict[int, int] = {}
    outputs: Dict[int, int] = {}
    terminal = None
    if stdio.window:
        terminal = open_terminal(stdio, account)
        inputs[KEYS] = terminal.master
        outputs[SCREEN] = terminal.master

    for number, kind in enumerate(stdio.kinds.decode()):
        if kind == "t" and terminal:
            theirs.append(terminal.slave)
        elif kind == "s":
            theirs.append(theirs[1])
        elif kind == "n":
            theirs.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        elif number == 0:
            reader, inputs[STDIN] = make_pipe(account)
            theirs.append(reader)
        else:
            outputs[STDOUT if number == 1 else STDERR], writer = make_pipe(account)
            theirs.append(writer)
    return Streams(theirs, inputs, outputs, terminal)


def set_limit(number: int, soft: int, hard: int) -> None:
    call_libc("setrlimit", number, struct.pack("2q", soft, hard))   # struct rlimit


def allow_limits(limits: Iterable[Tuple[int, ...]]) -> None:
    """Set the caller's hard limits. Only root can raise a limit above the guest's own."""
    for number, _, hard in limits:
        if number == RLIMIT_NOFILE and hard > NR_OPEN:
            write_setting("sys/fs/nr_open", str(hard))
        set_limit(number, hard, hard)


def become(account: Account) -> None:
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)


def execute(
        start: Start, program: bytes, path: bytes,
        argv: List[bytes], environment: Dict[bytes, bytes]) -> int:
    """Start the file `path`, which was found for `program`."""
    try:
        return start(path, argv, environment)
    except OSError as error:
        if error.errno == errno.ENOEXEC:
            with open(path, "rb") as file:
                is_text = b"\0" not in file.read(256)
            if is_text:              # a script without "#!" is the shell's, as for execvp(3)
                return start(b"/bin/sh", [b"/bin/sh", path] + argv[1:], environment)

        raise Fatal(
            "command cannot be executed, {}: {!r}".format(error.strerror, os.fsdecode(program)),
            "is its interpreter in the appliance, and is it made for this machine?",
            127 if error.errno == errno.ENOENT else 126)


def lead_job(stdio: Stdio, theirs: Sequence[int]) -> Start:
    """Become a job of the terminal as an interactive shell makes it: the command leads its group."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpgid(0, 0)
    if stdio.foreground:
        os.tcsetpgrp(theirs[stdio.kinds.index(b"t")], os.getpid())
    return os.execve


def lead_group(job: Job, number: int) -> Start:
    """Lead a session and process group that the command is in; return what starts the command.

    The command of a batch script is no leader either. If it was one, setsid(1) would fork, and its end
    would count as the end of what it started. The leader ends before the command begins, as nothing
    preempts a SCHED_FIFO process: the command is a child of PID 1 from its start.
    """
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    os.setsid()

    # posix_spawn(3) costs a tenth of fork(2). It needs SIGCHLD and memory, and knows no number.
    is_waited_for = signal.SIGCHLD not in job.ignored_signals
    of_memory = [soft for which, soft, _ in job.limits if which in (RLIMIT_DATA, RLIMIT_AS)]
    has_memory = all(soft == -1 for soft in of_memory)
    if hasattr(os, "posix_spawn") and is_waited_for and has_memory and not number:
        return os.posix_spawn

    leader = os.getpid()
    if fork_as(number):
        os._exit(0)
    while os.getppid() == leader:
        os.sched_yield()
    return os.execve


def run_command(
        job: Job, account: Account, directory: bytes, theirs: Sequence[int], start: Start) -> int:
    """In the forked child: start the command as execute() does, or raise Fatal."""
    for target, source in enumerate(theirs):
        os.dup2(source, target)
    write_setting("self/oom_score_adj", "0")
    # Python ignores the first two, open_terminal() the others.
    for number in (signal.SIGPIPE, signal.SIGXFSZ, *TERMINAL_SIGNALS):
        signal.signal(number, signal.SIG_DFL)
    for ignored in job.ignored_signals:
        signal.signal(ignored, signal.SIG_IGN)

    allow_limits(job.limits)
    become(account)
    os.umask(job.umask)
    place = os.path.join(directory, job.cwd) if job.cwd else directory
    try:
        os.chdir(place)
    except OSError as error:
        raise Fatal(
            "cannot start in directory {!r}: {}".format(os.fsdecode(place), error.strerror),
            "--cwd names a directory as the guest sees it")

    argv, program = choose_command(job, account, directory)
    environment = build_environment(job, account, place)
    path = find_program(program, environment.get(b"PATH", PATH))
    # The soft limits come last, as Python itself may need more.
    for limit in job.limits:
        set_limit(*limit)
    return execute(start, program, path, argv, environment)


def encode_pid(pid: int) -> bytes:
    return encode_fields([(b"pid", b"%d" % pid)])


def read_pid(report: int) -> int:
    """The command's pid from the child's report, which ends when the command runs; or its Fatal."""
    with os.fdopen(report, "rb") as file:
        fields = decode_fields(file.read())
    if b"error" in fields:
        error, hint, status = (fields[name][0].decode() for name in (b"error", b"hint", b"status"))
        raise Fatal(error, hint, int(status))
    return int(fields[b"pid"][0])


def start_command(job: Job, account: Account, directory: bytes, streams: Streams) -> int:
    """Fork and execute; return the command's pid, or raise the Fatal that its start ended with."""
    has_terminal = streams.terminal is not None
    report, to_agent = os.pipe()
    number = choose_number(job.first_pid)
    if fork_as(number if has_terminal else 0) == 0:
        try:
            start = lead_job(job.stdio, streams.theirs) if has_terminal else lead_group(job, number)
            if start is os.execve:
                os.write(to_agent, encode_pid(os.getpid()))
            pid = run_command(job, account, directory, streams.theirs, start)
            os.write(to_agent, encode_pid(pid))
        except Fatal as fatal:
            os.write(to_agent, encode_failure(fatal))
        except BaseException as error:            # nothing may escape into the agent's code below
            failure = Fatal("cannot start the command: {!r}".format(error))
            os.write(to_agent, encode_failure(failure))
        finally:
            os._exit(125)

    kept = {streams.terminal.slave} if streams.terminal else set()
    for descriptor in {to_agent, *streams.theirs} - kept:
        os.close(descriptor)
    for descriptor in (*streams.inputs.values(), *streams.outputs.values()):
        os.set_blocking(descriptor, False)
    return read_pid(report)


# --- What waits to be written ---------------------------------------------------------------------
# A share may not write what programs change through mmap(2) before they end. A program that must wait
# until less of that is in memory would wait for ever.

CHECK_S = 2.0                        # how often to look


def find_mapped_files() -> Iterable[str]:
    """Names of the files that programs can change through mmap(2)."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        for line in read_file("/proc/{}/maps".format(name)).splitlines():
            if b" rw-s " in line:
                start, end = (int(word, 16) for word in line.split()[0].split(b"-"))
                yield "/proc/{}/map_files/{:x}-{:x}".format(name, start, end)


def fork_to_sync() -> int:
    """Start a process that writes what waits. It ends with 1 if something is lost."""
    pid = os.fork()
    if pid:
        return pid

    status = 0
    try:
        for path in find_mapped_files():
            try:
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            except OSError as error:
                # With another errno the program has ended, or the file has nothing to write.
                status |= error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT)
    finally:
        os._exit(status)


def must_programs_wait() -> bool:
    """Whether who changes more has to wait: balance_dirty_pages() of mm/page-writeback.c."""
    counts = dict(line.split() for line in read_file("/proc/vmstat").splitlines())
    changed, begin, limit = (int(counts.get(name, 0)) for name in (
        b"nr_dirty", b"nr_dirty_background_threshold", b"nr_dirty_threshold"))
    return changed > (begin + limit) // 2


# --- Locks that wait ------------------------------------------------------------------------------
# The file server does not hear that a signal has come for a process that waits for a lock: Linux's
# virtio-fs cannot tell. So a thread looks, as long as locks wait.

WAITING = PLACE + "/waiting"         # of the file server: which locks wait
WAITER = struct.Struct("<QII")       # the number of the request, pid of the thread that waits, 0
WAITERS_SIZE = 4096                  # more than they have together
LOOK_S = 0.02


class LockWatch:
    """Has the server interrupt those locks for whose thread a signal has come."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._asked = 0                           # how often start() was called
        self._runs = False

    def start(self) -> None:
        """Look until no lock waits any more."""
        with self._lock:
            self._asked += 1
            if not self._runs:
                self._runs = True
                _thread.start_new_thread(self._look, ())

    def _look(self) -> None:
        numbers = [*range(1, 32), *range(34, signal.NSIG)]     # the C library keeps the others
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)      # they are for the main thread
        try:
            waiting = os.open(WAITING, os.O_RDWR | os.O_CLOEXEC)
            while True:
                asked = self._asked
                records = os.pread(waiting, WAITERS_SIZE, 0)
                for unique, pid, _ in WAITER.iter_unpack(records):
                    if has_signal(pid):
                        os.write(waiting, struct.pack("<Q", unique))
                time.sleep(LOOK_S)
                # Whoever asks later starts another thread.
                with self._lock:
                    if not records and asked == self._asked:
                        self._runs = False
                        break
            os.close(waiting)
        except OSError:              # the server is dead, and with it the run
            pass


def has_signal(pid: int) -> bool:
    """Whether a signal has woken a thread that waits for the server.

    It then goes on to wait, but uninterruptibly: request_wait_answer() of fs/fuse/dev.c.
    """
    try:
        words = read_file("/proc/{}/stat".format(pid)).rpartition(b")")[2].split()
    except OSError:                  # it has ended
        return False
    return words[:1] == [b"D"]


# --- Relaying -------------------------------------------------------------------------------------

class Feed:
    """What the host has sent for the command's stdin or terminal and what had no room there yet."""

    def __init__(self, descriptor: int) -> None:
        self.fd: Optional[int] = descriptor
        self.pending: List[memoryview] = []
        self.ends = False
        self.delivered = 0                        # bytes
        self._leftover: Optional[int] = None

    def write(self) -> int:
        """Write what there is room for, return how much; BrokenPipeError: nobody reads any more."""
        before = self.delivered
        try:
            while self.pending and self.fd is not None:
                count = os.write(self.fd, self.pending[0])
                # Counted at once: the next write may find that nobody reads any more.
                self.delivered += count
                self.pending[0] = self.pending[0][count:]
                if not self.pending[0]:
                    del self.pending[0]
        except BlockingIOError:
            pass
        return self.delivered - before

    def close_pipe(self) -> None:
        if self.fd is None:
            return
        # A reader of our own, to count what the command leaves unread. It hurts nobody: no writer is left.
        path = "/proc/self/fd/{}".format(self.fd)
        self._leftover = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.close(self.fd)
        self.fd = None
        self.pending = []

    @property
    def consumed(self) -> int:
        """How many of the delivered bytes the command has read; to be asked after its end."""
        if self._leftover is None:
            return self.delivered
        answer = fcntl.ioctl(self._leftover, termios.FIONREAD, b"\0" * 4)
        unread: int = struct.unpack("i", answer)[0]
        return self.delivered - unread


class Relay:
    """Moves bytes between channel and command until the command has ended and its output is sent."""

    def __init__(self, channel: Channel, pid: int, streams: Streams, wakeup: int) -> None:
        self._lock_watch = LockWatch()
        self._channel = channel
        self._pid = pid
        self._wakeup = wakeup
        self._feeds = {kind: Feed(descriptor) for kind, descriptor in streams.inputs.items()}
        self._outputs = dict(streams.outputs)
        self._window = {
            kind: SCREEN_WINDOW if kind == SCREEN else OUTPUT_WINDOW for kind in self._outputs}
        self._terminal = streams.terminal
        self._front = pid                         # the terminal's foreground, while the agent has that
        self._due = time.monotonic() + CHECK_S    # when to look at what waits to be written
        self._helper = 0                          # pid of the process that writes it
        self._has_losses = False                  # it could not
        self.status: Optional[int] = None         # as from waitpid()

    @property
    def stdin_consumed(self) -> int:
        return self._feeds[STDIN].consumed if STDIN in self._feeds else 0

    def run(self) -> None:
        while (self.status is None or self._outputs) and not self._has_losses:
            self._serve(self._wait())
            if time.monotonic() > self._due:
                self._due = time.monotonic() + CHECK_S
                if not self._helper and must_programs_wait():
                    self._helper = fork_to_sync()

    def _wait(self) -> Dict[int, int]:
        """Wait for something to do; return the events of poll(2) by descriptor."""
        wanted = {self._channel.fd: select.POLLIN, self._wakeup: select.POLLIN}
        for kind, descriptor in self._outputs.items():
            if self._window[kind] > 0:
                wanted[descriptor] = select.POLLIN
        for kind, feed in self._feeds.items():
            # Without an event stdin's pipe is watched, too: for the command closing its end.
            if feed.fd is not None and (feed.pending or kind == STDIN):
                events = select.POLLOUT if feed.pending else 0
                wanted[feed.fd] = wanted.get(feed.fd, 0) | events

        poll = select.poll()
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        return dict(poll.poll(max(0, self._due - time.monotonic()) * 1000))

    def _serve(self, ready: Dict[int, int]) -> None:
        # A terminal is one descriptor for both ways.
        outputs = [kind for kind, descriptor in self._outputs.items()
                   if ready.get(descriptor, 0) & ~select.POLLOUT]
        for kind in outputs:
            self._forward_output(kind)
        for kind, feed in self._feeds.items():
            if feed.fd is not None and ready.get(feed.fd, 0) & ~select.POLLIN:
                self._feed(kind, feed)

        if self._channel.fd in ready:
            for kind, payload in self._channel.receive():
                self._obey(kind, payload)
        if self._wakeup in ready:
            # Ctrl-Alt-Del is a SIGINT: the runner ends the guest as for a SIGTERM of its own.
            if signal.SIGINT in os.read(self._wakeup, 512):
                self._channel.send(TERMINATE)
            self._reap()

    def _forward_output(self, kind: int) -> None:
        try:
            content = os.read(self._outputs[kind], READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:          # the terminal has no slave any more
                raise
            content = b""

        if content:
            self._window[kind] -= len(content)
            self._channel.send(kind, content)
        else:
            self._close_output(kind)

    def _close_output(self, kind: int) -> None:
        if kind in self._outputs:
            os.close(self._outputs.pop(kind))
            if kind == SCREEN:
                del self._feeds[KEYS]
                self._terminal = None

    def _feed(self, kind: int, feed: Feed) -> None:
        try:
            if kind == STDIN and not feed.pending:
                # Ready although nothing waits to be written: the command has closed its stdin.
                raise BrokenPipeError
            written = feed.write()
            if written:
                self._channel.send(CREDIT, struct.pack("<BI", kind, written))
        except BrokenPipeError:
            feed.close_pipe()
            self._channel.send(STDIN_CLOSED)
        if feed.ends and not feed.pending:
            feed.close_pipe()

    def _obey(self, kind: int, payload: bytes) -> None:
        if kind in (STDIN, KEYS):
            if kind in self._feeds:
                self._feeds[kind].pending.append(memoryview(payload))
        elif kind == STDIN_EOF:
            feed = self._feeds[STDIN]
            feed.ends = True
            if not feed.pending:
                feed.close_pipe()
        elif kind == SIGNAL:
            self._signal(payload[0])
        elif kind == ACK:
            stream, count = struct.unpack("<BI", payload)
            self._window[stream] += count
        elif kind == OUTPUT_CLOSED:
            # The command's next write gets it SIGPIPE, as on the host.
            self._close_output(payload[0])
        elif kind == NETWORK_LOST:
            lower_interface(payload)
        elif kind == LOCKS_WAIT:
            self._lock_watch.start()
        elif kind == WINDOW and self._terminal:
            fcntl.ioctl(self._terminal.master, termios.TIOCSWINSZ, payload)
        elif kind == FOREGROUND and self._terminal:
            self._set_foreground(self._terminal.master, payload == b"\1")

    def _set_foreground(self, master: int, to_command: bool) -> None:
        """Give the terminal to the command, or to the agent: then a read stops the command."""
        front = os.tcgetpgrp(master)
        is_ours = front == os.getpgrp()
        if not to_command and not is_ours:
            self._front = front                   # it may be a job of the guest's shell
        if to_command != is_ours:
            return

        try:
            os.tcsetpgrp(master, self._front if to_command else os.getpgrp())
        except OSError:              # that group has ended
            os.tcsetpgrp(master, self._pid)

    def _signal(self, number: int) -> None:
        if self.status is not None:
            return
        if number == signal.SIGKILL:
            kill_everything()
            return
        try:
            os.killpg(os.getpgid(self._pid), number)           # setsid(1) gives it another group
        except ProcessLookupError:
            pass

    def _reap(self) -> None:
        # A command with a terminal may be stopped from it, and the host's shell wants to know.
        flags = os.WNOHANG | (os.WUNTRACED if self._terminal else 0)
        while True:
            try:
                pid, status = os.waitpid(-1, flags)
            except ChildProcessError:
                return
            if pid == 0:
                return

            if pid == self._helper:
                self._helper = 0
                self._has_losses = status != 0 and self.status is None
            elif pid == self._pid and os.WIFSTOPPED(status):
                # Without a terminal it is stopped as it has asked to be traced.
                if self._terminal:
                    self._channel.send(STOPPED, bytes([os.WSTOPSIG(status)]))
            elif pid == self._pid:
                self.status = status
                self._release_command()

    def _release_command(self) -> None:
        """Let the outputs end, as no writer is left, and keep what the command has not read for counting."""
        if STDIN in self._feeds:
            self._feeds[STDIN].close_pipe()
        kill_everything()
        if self._terminal:
            os.close(self._terminal.slave)


# --- The end --------------------------------------------------------------------------------------

def describe_end(status: Optional[int]) -> str:
    if status is None:
        return "the command was ended"
    if os.WIFSIGNALED(status):
        return "the command had ended by signal {}".format(os.WTERMSIG(status))
    return "the command had ended with status {}".format(os.WEXITSTATUS(status))


def flush_mounts(shares: MountedShares, disk: RootDisk, job: Job, status: Optional[int]) -> None:
    """Write what the host would miss, as it ends this kernel when it hears of the command's end."""
    kill_everything()
    reap_everything()
    for places, number in shares.find_losses():
        raise Fatal(
            "files in {} could not be written, {}; {}".format(
                places, os.strerror(number), describe_end(status)),
            "what was changed there through mmap is lost: is the disk full, or the quota used up?")

    if job.disk.is_kept or job.changes.saved or status is None:
        disk.check(job.disk.is_kept or status is None)
    if status is None:               # in a file system that the guest's root has mounted
        raise Fatal(
            "what a program changed through mmap could not be written; " + describe_end(status),
            "is a disk full, or a quota used up, that root of the guest has mounted?")

    if job.disk.is_kept:
        mount(b"none", b"/", b"", MS_REMOUNT | MS_RDONLY)
        disk.check(True)


def encode_result(relay: Relay, saved: int) -> bytes:
    status = relay.status or 0
    if os.WIFSIGNALED(status):
        how = (b"signal", b"%d" % os.WTERMSIG(status))
    else:
        how = (b"exit", b"%d" % os.WEXITSTATUS(status))
    return encode_fields((how, (b"stdin", b"%d" % relay.stdin_consumed), (b"saved", b"%d" % saved)))


# --- Main -----------------------------------------------------------------------------------------

def run_job(channel: Channel, wakeup: int) -> bytes:
    """Run the job that the runner sends; return the payload of RESULT."""
    greet(channel)
    prepare_system()
    job = parse_job(receive_only(channel, JOB))

    if job.disk.size:
        grow_root(job.disk.size)
    disk = RootDisk()
    if job.changes.layers:
        merge_layers(job, channel)
        disk.check(job.disk.is_kept)

    own_files = OwnFiles(job) if job.changes.saved else None
    raise_network(job.network)
    host_name = job.network.lan_address or job.node.host_names.split()[-1]
    write_setting("sys/kernel/hostname", host_name.decode())
    node_files = NodeFiles(job.node, job.network.nameserver)
    account = make_account(job)
    shares = MountedShares(job, account, channel)
    known = own_files.list_changed() if own_files else {}
    if not job.confined:
        forbid_mounts()

    streams = connect_stdio(job.stdio, account)
    pid = start_command(job, account, shares.job_directory, streams)
    channel.send(STARTED, bytes([describe_start(job, account, shares)]))
    relay = Relay(channel, pid, streams, wakeup)
    relay.run()

    if job.network.interfaces:
        send_rest()
    if job.disk.is_kept or job.changes.saved:
        kill_everything()
        node_files.take_back()
    flush_mounts(shares, disk, job, relay.status)
    saved = 0
    if job.changes.saved:
        saved = save_layer(job, known, channel)
        disk.check(job.disk.is_kept)
    return encode_result(relay, saved)


def serve(channel: Channel, wakeup: int) -> None:
    """Run the job and tell the runner how it ended."""
    try:
        result = run_job(channel, wakeup)
    except Fatal as fatal:
        result = encode_failure(fatal)
    except Exception as error:
        sys.excepthook(*sys.exc_info())           # to the console
        result = encode_failure(Fatal(
            "the agent in the appliance failed: {}: {}".format(type(error).__name__, error),
            "run again with -v for the guest's console; please report it"))
    await_end_without_files()
    channel.send(RESULT, result)


def main() -> NoReturn:
    mount_system(MOUNTS[:1])         # /dev, for the channel: from then on failures can be told
    # Without a console 0 to 2 are free, and a file with such a number would pass for stdin or stdout.
    while os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) < 3:
        pass

    wakeup, to_wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(to_wakeup, False)
    signal.set_wakeup_fd(to_wakeup)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, lambda received, frame: None)

    serve(Channel(open_channel()), wakeup)
    while True:                      # PID 1 must not end; the host ends the machine now
        time.sleep(3600)


if __name__ == "__main__":
    main()
