#!/usr/bin/python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""AppPot's guest agent: runs one command in the appliance for the runner on the host.

Usage: it is started by /sbin/apppot-init as PID 1 of a User-Mode Linux guest, never by hand.

Constraint: a system call costs about 20 us here and starting a process 4 to 15 ms, so the agent imports
little, starts nothing but the command, and moves bytes in large pieces.
"""
import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import sys
import termios
import time
from typing import Dict, Iterable, List, NamedTuple, NoReturn, Optional, Tuple

VERSION = "0.1"

# --- What crosses host and guest (apppot_start.py has the same; a test compares them) -----------------------

PROTOCOL = 1
MAGIC = b"\0AppPot\0"                # comes before the first frame: a line may carry noise before the agent owns it
FRAME = struct.Struct("<BI")         # type, length of the payload in bytes
FRAME_MAX = 1 << 20
# Guest to host.
HELLO, STARTED, STDOUT, STDERR, CREDIT, STDIN_CLOSED, RESULT = 1, 2, 3, 4, 5, 6, 7
# Host to guest. A type with SPOOLED set carries the name of a spool file that holds the payload.
JOB, STDIN, STDIN_EOF, SIGNAL, ACK, OUTPUT_CLOSED = 33, 34, 35, 36, 37, 38
NETWORK_LOST = 47
SPOOLED = 0x80
OUTPUT_WINDOW = 4 << 20              # bytes of each output stream the host may not have written yet

# --- The guest's own constants ------------------------------------------------------------------------------

CHANNEL = "/dev/ttyS0"
SPOOL = "/run/apppot/spool"
BASE_ID = "/var/lib/apppot/base-id"
MOVED_HOMES = "/var/lib/apppot/home"  # for a home directory that the job directory would cover
READ_SIZE = 1 << 18
PIPE_SIZE = 1 << 20                  # F_SETPIPE_SZ: the most an unprivileged process may ask for
F_SETPIPE_SZ = 1031                  # include/uapi/linux/fcntl.h; in Python's fcntl from 3.10 only
FIONREAD = termios.FIONREAD

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096   # include/uapi/linux/mount.h
SIOCADDRT, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C  # include/uapi/linux/sockios.h
IFF_UP, IFF_RUNNING = 0x1, 0x40                                # include/uapi/linux/if.h
RTF_UP, RTF_GATEWAY = 0x1, 0x2                                 # include/uapi/linux/route.h
RESOLV_CONF = "/etc/resolv.conf"
MOUNTS = (                           # source, target, type, flags, options
    ("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755"),
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"),
    ("tmpfs", "/run/lock", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777"),
    ("none", SPOOL, "hostfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "spool"),
)
DEV_LINKS = (("/proc/self/fd", "/dev/fd"), ("fd/0", "/dev/stdin"), ("fd/1", "/dev/stdout"), ("fd/2", "/dev/stderr"))
# Directories that may be covered by the job directory although they are not empty.
PLACES_FOR_JOBS = (b"/tmp", b"/var/tmp", b"/home", b"/mnt", b"/media", b"/srv")
PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Fatal(Exception):
    """The command cannot be run, or its end not be told: `status` is the exit status that says so."""

    def __init__(self, message: str, hint: str = "", status: int = 125) -> None:
        super().__init__(message)
        self.message, self.hint, self.status = message, hint, status


class Group(NamedTuple):
    gid: int
    name: bytes


class Interface(NamedTuple):
    name: bytes
    address: bytes                   # IPv4, as 4 bytes
    netmask: bytes


class Job(NamedTuple):
    """What the runner asks for. Paths and strings are bytes, as the kernel has them."""
    argv: Tuple[bytes, ...]          # empty: apppot-run, apppot-autorun or a login shell
    environment: Dict[bytes, bytes]
    job_directory: bytes             # absolute path on the host, links resolved
    job_alias: bytes                 # the same as the caller's $PWD names it
    cwd: bytes                       # empty: the job directory
    user: bytes
    uid: int
    groups: Tuple[Group, ...]        # the first is the primary one
    as_root: bool
    umask: int
    ignored_signals: Tuple[int, ...]
    stdin_is_null: bool
    one_output: bool                 # stdout and stderr are one file on the host: keep their order
    persistent: bool                 # the root file system outlives the run
    interfaces: Tuple[Interface, ...] = ()
    gateway: bytes = b""             # empty: no way out
    nameserver: bytes = b""
    lan_address: bytes = b""         # empty: no LAN


class Account(NamedTuple):
    name: bytes
    uid: int
    gid: int
    groups: Tuple[int, ...]
    home: bytes
    shell: bytes


# --- Pure functions -----------------------------------------------------------------------------------------

def encode_fields(fields: Iterable[Tuple[bytes, bytes]]) -> bytes:
    """NAME=VALUE records, each ended by NUL; a name may come again. Values hold no NUL (nothing in exec does)."""
    return b"".join(name + b"=" + value + b"\0" for name, value in fields)


def decode_fields(payload: bytes) -> Dict[bytes, List[bytes]]:
    fields: Dict[bytes, List[bytes]] = {}
    for record in payload.split(b"\0")[:-1]:
        name, _, value = record.partition(b"=")
        fields.setdefault(name, []).append(value)
    return fields


def parse_address(text: bytes) -> bytes:
    return bytes(int(part) for part in text.split(b".") if part)


def parse_interface(name: bytes, text: bytes) -> Interface:
    address, _, prefix = text.partition(b"/")
    return Interface(name, parse_address(address), struct.pack(">I", (1 << 32) - (1 << 32 - int(prefix))))


def parse_job(payload: bytes) -> Job:
    fields = decode_fields(payload)

    def one(name: bytes) -> bytes:
        return fields.get(name, [b""])[0]

    def pairs(name: bytes) -> Iterable[Tuple[bytes, bytes]]:
        for value in fields.get(name, []):
            left, _, right = value.partition(b"=")
            yield left, right

    return Job(
        argv=tuple(fields.get(b"arg", [])), environment=dict(pairs(b"env")),
        job_directory=one(b"job"), job_alias=one(b"alias"), cwd=one(b"cwd"), user=one(b"user"), uid=int(one(b"uid")),
        groups=tuple(Group(int(gid), name) for gid, name in pairs(b"group")), as_root=one(b"root") == b"1",
        umask=int(one(b"umask")), ignored_signals=tuple(int(number) for number in fields.get(b"ignore", [])),
        stdin_is_null=one(b"stdin") == b"null", one_output=one(b"output") == b"one",
        persistent=one(b"persistent") == b"1",
        interfaces=tuple(parse_interface(name, value) for name, value in pairs(b"interface")),
        gateway=parse_address(one(b"gateway")), nameserver=one(b"nameserver"), lan_address=one(b"lan"))


def put_account(table: bytes, name: bytes, number: int, line: bytes) -> bytes:
    """A passwd or group file in which `line` is what both the name and the number look up.

    Other lines with the name go (they would be another account); other lines with the number stay behind ours,
    so that files of that number keep an owner that exists.
    """
    lines = table.split(b"\n")
    kept = [entry for entry in lines if entry and entry.split(b":")[0] != name]
    same = [index for index, entry in enumerate(kept) if entry.split(b":")[2:3] == [b"%d" % number]]
    kept.insert(same[0] if same else len(kept), line)
    return b"\n".join(kept) + b"\n"


def find_account(table: bytes, name: bytes) -> Optional[List[bytes]]:
    for entry in table.split(b"\n"):
        fields = entry.split(b":")
        if fields[0] == name and len(fields) >= 7:
            return fields
    return None


def is_below(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory.rstrip(b"/") + b"/")


# --- The kernel, called directly: Python has no mount() -----------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    result: int = getattr(libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, "{}: {}".format(name, os.strerror(number)))
    return result


def mount(source: bytes, target: bytes, kind: bytes, flags: int = 0, options: bytes = b"") -> None:
    call("mount", source, target, kind, ctypes.c_ulong(flags), options)


def mount_system(mounts: Iterable[Tuple[str, str, str, int, str]]) -> None:
    for source, target, kind, flags, options in mounts:
        os.makedirs(target, exist_ok=True)
        try:
            mount(source.encode(), target.encode(), kind.encode(), flags, options.encode())
        except OSError as error:
            if error.errno != errno.EBUSY:        # the kernel has mounted /dev itself
                raise Fatal("cannot mount {} on {}: {}".format(kind, target, error.strerror),
                            "the kernel has no {}, or the appliance no such directory".format(kind))


def prepare_system() -> None:
    mount_system(MOUNTS[1:])
    for link_target, link in DEV_LINKS:
        if not os.path.lexists(link):
            os.symlink(link_target, link)
    # The last that the guest's out-of-memory killer takes; start_command() makes the command no exception.
    write_score("-1000")
    # Not to preempt a command at its every write: its pipe fills and is moved in large pieces.
    os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    set_hostname(read_file("/etc/hostname").decode("utf-8", "replace").strip() or "apppot")
    raise_loopback()


def set_hostname(name: str) -> None:
    with open("/proc/sys/kernel/hostname", "w") as file:
        file.write(name)


def raise_loopback() -> None:
    """Bring `lo` up; the kernel gives it 127.0.0.1 by itself. A kernel without INET goes without."""
    try:
        probe = call("socket", 2, 1, 0)           # AF_INET, SOCK_STREAM; the socket module costs 20 ms to import
    except OSError:
        return
    try:
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING))
    finally:
        os.close(probe)


# --- The network --------------------------------------------------------------------------------------------

def pack_address(address: bytes) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("=HH4s8x", 2, 0, address)


def raise_network(job: Job) -> None:
    """Give the interfaces their addresses and bring them up; the way out and its name server if there is one."""
    if not job.interfaces:
        return
    control = call("socket", 2, 1, 0)             # as in raise_loopback()
    try:
        for interface in job.interfaces:
            raise_interface(control, interface)
        if job.gateway:
            nowhere = pack_address(bytes(4))
            # struct rtentry: destination, gateway, netmask, flags.
            fcntl.ioctl(control, SIOCADDRT, struct.pack(
                "8x16s16s16sH62x", nowhere, pack_address(job.gateway), nowhere, RTF_UP | RTF_GATEWAY))
    finally:
        os.close(control)
    if job.nameserver:
        write_resolv_conf(job.nameserver)
    if job.lan_address:                           # a name of its own, for MPI, and one that resolves on every guest
        set_hostname(job.lan_address.decode())


def raise_interface(control: int, interface: Interface) -> None:
    name = interface.name
    try:
        fcntl.ioctl(control, SIOCSIFADDR, struct.pack("16s16s8x", name, pack_address(interface.address)))
        fcntl.ioctl(control, SIOCSIFNETMASK, struct.pack("16s16s8x", name, pack_address(interface.netmask)))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name, IFF_UP | IFF_RUNNING))
    except OSError as error:
        raise Fatal("network interface {} cannot be brought up: {}".format(name.decode(), error.strerror),
                    "run with -v to see what the guest's kernel says; --net none runs without")


def lower_interface(name: bytes) -> None:
    """Its helper is dead, and the kernel would be busy reading that end over and over."""
    control = call("socket", 2, 1, 0)
    try:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16s24x", name))
    except OSError:
        pass                                      # the command has removed it
    finally:
        os.close(control)


def write_resolv_conf(nameserver: bytes) -> None:
    """Images of other origin name a server of theirs, or have a link to what a service would write in /run."""
    path = os.path.realpath(RESOLV_CONF)
    servers = [line.split()[1:2] for line in read_file(path).splitlines() if line.startswith(b"nameserver")]
    if servers[:1] != [[nameserver]]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_file(path, b"nameserver " + nameserver + b"\n")


# --- The channel --------------------------------------------------------------------------------------------

class Channel:
    """Frames over a serial line. Writing blocks, which is safe: the runner never stops reading."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        attributes = termios.tcgetattr(self.fd)
        attributes[0] = attributes[1] = attributes[3] = 0      # iflag, oflag, lflag: 8-bit clean, no echo
        attributes[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
        attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self.fd, termios.TCSANOW, attributes)  # TCSAFLUSH hangs on a line carried by a pty
        self._received = bytearray()

    def send(self, kind: int, payload: bytes = b"") -> None:
        pieces = [FRAME.pack(kind, len(payload)), payload]
        written = os.writev(self.fd, pieces)
        rest = memoryview(b"".join(pieces))[written:] if written < FRAME.size + len(payload) else memoryview(b"")
        while rest:
            rest = rest[os.write(self.fd, rest):]

    def receive(self) -> List[Tuple[int, bytes]]:
        """Read what is there, at least one byte, and return the frames it completes."""
        piece = os.read(self.fd, READ_SIZE)
        if not piece:
            raise Fatal("the channel to the host is closed")
        self._received += piece
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
            frames.append((kind & ~SPOOLED, take_spool_file(payload) if kind & SPOOLED else payload))
            start = end
        del self._received[:start]
        return frames


def take_spool_file(name: bytes) -> bytes:
    """What is too long for the slow way down the line comes as a file, which the reader deletes."""
    path = os.path.join(SPOOL.encode(), name)
    with open(path, "rb", buffering=0) as file:
        content = file.read()
    os.unlink(path)
    return content


# --- The caller's account and directories -------------------------------------------------------------------

def write_file(path: str, content: bytes) -> None:
    """Replace a file of the appliance and keep its mode."""
    mode = os.stat(path).st_mode & 0o7777 if os.path.exists(path) else 0o644
    temporary = path + ".apppot"
    with open(temporary, "wb") as file:
        file.write(content)
    os.chmod(temporary, mode)
    os.rename(temporary, path)


def read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def own_tree(path: bytes, uid: int, gid: int) -> None:
    os.chown(path, uid, gid, follow_symlinks=False)
    if os.path.isdir(path) and not os.path.islink(path):
        for name in os.listdir(path):
            own_tree(os.path.join(path, name), uid, gid)


def copy_tree(source: bytes, target: bytes) -> None:
    """Copy the contents of /etc/skel: links, files and directories with their modes."""
    for name in os.listdir(source):
        old, new = os.path.join(source, name), os.path.join(target, name)
        if os.path.islink(old):
            os.symlink(os.readlink(old), new)
        elif os.path.isdir(old):
            os.mkdir(new)
            copy_tree(old, new)
        else:
            with open(old, "rb") as reader, open(new, "wb") as writer:
                writer.write(reader.read())
            os.chmod(new, os.stat(old).st_mode & 0o7777)


def choose_home(entry: Optional[List[bytes]], name: bytes, job: bytes) -> bytes:
    """The account's home in the image if it has a usable one, else /home/NAME, and never below the job directory."""
    home = entry[5] if entry else b""
    if name == b"root":
        home = home or b"/root"
    elif not is_below(home, b"/home") and not (os.path.isdir(home) and home.count(b"/") > 1):
        home = b"/home/" + name.replace(b"/", b"_")
    covered = job == home or (job in PLACES_FOR_JOBS and is_below(home, job))
    return os.path.join(MOVED_HOMES.encode(), os.path.basename(home)) if covered else home


def make_home(home: bytes, uid: int, gid: int) -> None:
    if not os.path.isdir(home):
        os.makedirs(os.path.dirname(home), exist_ok=True)
        os.mkdir(home, 0o755)
        if os.path.isdir(b"/etc/skel"):
            copy_tree(b"/etc/skel", home)
    if os.stat(home).st_uid != uid:
        own_tree(home, uid, gid)


def make_account(job: Job) -> Account:
    """Give the caller's uid, gid and names to the guest; return the account that the command runs under."""
    passwd, groups = read_file("/etc/passwd"), read_file("/etc/group")
    caller_is_root = job.uid == 0
    name, uid, gid = job.user, job.uid, job.groups[0].gid
    if job.as_root or caller_is_root:
        root = find_account(passwd, b"root")
        name, uid, gid = b"root", 0, 0
        home, shell = choose_home(root, name, job.job_directory), root[6] if root else b""
    else:
        entry = find_account(passwd, name)
        home, shell = choose_home(entry, name, job.job_directory), entry[6] if entry else b""
    if not os.access(shell, os.X_OK) or os.path.basename(shell) in (b"nologin", b"false"):
        shell = b"/bin/bash" if os.access(b"/bin/bash", os.X_OK) else b"/bin/sh"

    if not caller_is_root:
        # "*" and not "x": PAM then asks no shadow file, so that sudo accepts the account.
        caller_home = b"/nonexistent" if job.as_root else home
        line = b":".join((job.user, b"*", b"%d" % job.uid, b"%d" % job.groups[0].gid, b"", caller_home, shell))
        write_file("/etc/passwd", put_account(passwd, job.user, job.uid, line))
        known = {entry.split(b":")[2] for entry in groups.split(b"\n") if entry.count(b":") >= 3}
        names = {entry.split(b":")[0] for entry in groups.split(b"\n")}
        for group in job.groups:
            if b"%d" % group.gid not in known:
                group_name = group.name if group.name not in names else b"g%d" % group.gid
                groups += group_name + b":x:%d:\n" % group.gid
        write_file("/etc/group", groups)
    make_home(home, uid, gid)
    extra = () if uid == 0 else tuple(group.gid for group in job.groups)
    return Account(name, uid, gid, extra, home, shell)


def make_mount_point(path: bytes, account: Account) -> None:
    """mkdir -p; what it makes belongs to the account, which may then make neighbours as it could on the host."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        os.mkdir(directory, 0o755)
        os.chown(directory, account.uid, account.gid)


def covers_system(path: bytes) -> bool:
    """Whether a mount on `path` would hide something of the appliance, or cannot be made."""
    if path in PLACES_FOR_JOBS or is_below(path, b"/home"):
        return os.path.lexists(path) and not os.path.isdir(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
        if os.path.lexists(path):                 # the first ancestor there is: can a directory be made in it?
            return not os.path.isdir(path) or is_below(path, b"/proc") or is_below(path, b"/sys")
    return not os.path.isdir(path) or bool(os.listdir(path))


def mount_job_directory(job: Job, account: Account) -> bytes:
    """Mount the job directory at its path on the host, link ~/job to it; return its path in the guest."""
    link = os.path.join(account.home, b"job")
    if os.path.islink(link):
        os.unlink(link)
    made_way = is_below(account.home, MOVED_HOMES.encode())
    if covers_system(job.job_directory) and not made_way:
        make_mount_point(link, account)
        mount(b"none", link, b"hostfs", MS_NOSUID | MS_NODEV, b"job")
        return link
    make_mount_point(job.job_directory, account)
    mount(b"none", job.job_directory, b"hostfs", MS_NOSUID | MS_NODEV, b"job")
    if not os.path.lexists(link):
        os.symlink(job.job_directory, link)
    if job.job_alias != job.job_directory and not os.path.lexists(job.job_alias):
        make_mount_point(job.job_alias, account)
        mount(job.job_directory, job.job_alias, b"", MS_BIND)
        return job.job_alias
    return job.job_directory


# --- The command --------------------------------------------------------------------------------------------

def choose_command(job: Job, account: Account, directory: bytes) -> Tuple[List[bytes], bytes]:
    """argv, and what to execute: the command line, ./apppot-run, ~/apppot-autorun, or a login shell."""
    if job.argv:
        return list(job.argv), job.argv[0]
    for path in (os.path.join(directory, b"apppot-run"), os.path.join(account.home, b"apppot-autorun")):
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return [path], path
            # Stage-in of grid jobs loses the execute bit: start what its first line names.
            with open(path, "rb") as file:
                first = file.readline(4096)
            interpreter = first[2:].split(None, 1) if first.startswith(b"#!") else [b"/bin/sh"]
            return [word.strip() for word in interpreter] + [path], interpreter[0].strip()
    return [b"-" + os.path.basename(account.shell)], account.shell


def build_environment(job: Job, account: Account, directory: bytes) -> Dict[bytes, bytes]:
    environment = {
        b"PATH": PATH, b"HOME": account.home, b"USER": account.name, b"LOGNAME": account.name,
        b"SHELL": account.shell, b"PWD": directory}
    environment.update(job.environment)
    return environment


def find_program(program: bytes, path: bytes) -> bytes:
    """What a shell would execute; Fatal with 127 or 126 as a shell exits."""
    name = repr(os.fsdecode(program))
    if b"/" in program:
        found = [program] if os.path.exists(program) else []
    else:
        found = [os.path.join(directory or b".", program) for directory in path.split(b":")]
        found = [candidate for candidate in found if program and os.path.isfile(candidate)]
    for candidate in found:
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    if not found:
        hint = ("it must be in the appliance or in the job directory" if b"/" in program else
                "is it installed in the appliance? A program in the job directory is called ./NAME")
        raise Fatal("command not found: " + name, hint, 127)
    what = "is a directory" if os.path.isdir(found[0]) else "permission denied"
    raise Fatal("command cannot be executed, {}: {}".format(what, name), "chmod +x makes a script executable", 126)


def execute(program: bytes, argv: List[bytes], environment: Dict[bytes, bytes]) -> NoReturn:
    path = find_program(program, environment.get(b"PATH", PATH))
    try:
        os.execve(path, argv, environment)
    except OSError as error:
        if error.errno == errno.ENOEXEC:
            with open(path, "rb") as file:
                is_text = b"\0" not in file.read(256)
            if is_text:                           # a script without "#!" is the shell's, as execvp(3) has it
                os.execve(b"/bin/sh", [b"/bin/sh", path] + argv[1:], environment)
        raise Fatal("command cannot be executed, {}: {!r}".format(error.strerror, os.fsdecode(program)),
                    "is its interpreter in the appliance, and is it made for this machine?",
                    127 if error.errno == errno.ENOENT else 126)


def become(account: Account) -> None:
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)


class Command(NamedTuple):
    pid: int
    stdin: int                       # the agent's ends of the command's pipes
    outputs: Dict[int, int]          # frame type (STDOUT, STDERR) to descriptor


def make_pipe() -> Tuple[int, int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, PIPE_SIZE)
    return reader, writer


def run_command(job: Job, account: Account, directory: bytes, stdio: Tuple[int, int, int]) -> NoReturn:
    """In the forked child: become the command, or raise Fatal."""
    os.setsid()
    for target, source in enumerate(stdio):
        os.dup2(source, target)
    write_score("0")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):            # Python ignores these
        signal.signal(number, signal.SIG_DFL)
    for ignored in job.ignored_signals:
        signal.signal(ignored, signal.SIG_IGN)
    become(account)
    os.umask(job.umask)
    start = os.path.join(directory, job.cwd) if job.cwd else directory
    try:
        os.chdir(start)
    except OSError as error:
        raise Fatal("cannot start in directory {!r}: {}".format(os.fsdecode(start), error.strerror),
                    "--cwd names a directory as the guest sees it")
    argv, program = choose_command(job, account, directory)
    execute(program, argv, build_environment(job, account, start))


def start_command(job: Job, account: Account, directory: bytes) -> Command:
    """Fork and execute; return when the command runs, or raise the Fatal that its start ended with."""
    stdin, to_stdin = make_pipe()
    from_stdout, stdout = make_pipe()
    from_stderr, stderr = make_pipe()
    if job.stdin_is_null:
        os.close(stdin)
        stdin = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    report, to_agent = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run_command(job, account, directory, (stdin, stdout, stdout if job.one_output else stderr))
        except Fatal as fatal:
            os.write(to_agent, encode_failure(fatal))
        except BaseException as error:            # nothing may escape into the agent's own code below
            os.write(to_agent, encode_failure(Fatal("cannot start the command: {!r}".format(error))))
        finally:
            os._exit(125)
    for descriptor in (stdin, stdout, stderr, to_agent):
        os.close(descriptor)
    with os.fdopen(report, "rb") as file:         # empty: the close-on-exec end went with a successful exec
        failure = file.read()
    if failure:
        os.waitpid(pid, 0)
        fields = decode_fields(failure)
        raise Fatal(fields[b"error"][0].decode(), fields[b"hint"][0].decode(), int(fields[b"status"][0]))
    for descriptor in (to_stdin, from_stdout, from_stderr):
        os.set_blocking(descriptor, False)
    return Command(pid, to_stdin, {STDOUT: from_stdout, STDERR: from_stderr})


def encode_failure(fatal: Fatal) -> bytes:
    def clean(text: str) -> bytes:
        return text.replace("\0", "?").encode("utf-8", "backslashreplace")
    return encode_fields(((b"error", clean(fatal.message)), (b"hint", clean(fatal.hint)),
                          (b"status", b"%d" % fatal.status)))


def write_score(score: str) -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(score)


# --- Relaying -----------------------------------------------------------------------------------------------

class Relay:
    """Moves bytes between the channel and the command until the command has ended and all it wrote is sent."""

    def __init__(self, channel: Channel, command: Command, wakeup: int) -> None:
        self._channel, self._pid, self._wakeup = channel, command.pid, wakeup
        self._stdin: Optional[int] = command.stdin
        self._outputs = dict(command.outputs)
        self._window = dict.fromkeys(self._outputs, OUTPUT_WINDOW)
        self._pending: List[memoryview] = []      # stdin that the command's pipe has no room for yet
        self._stdin_ends = False
        self._delivered = 0                       # bytes of stdin put into the command's pipe
        self._leftover: Optional[int] = None
        self.status: Optional[int] = None         # as from waitpid()

    def run(self) -> None:
        while self.status is None or self._outputs:
            self._poll()

    def _poll(self) -> None:
        poll = select.poll()
        poll.register(self._channel.fd, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        for kind, descriptor in self._outputs.items():
            if self._window[kind] > 0:
                poll.register(descriptor, select.POLLIN)
        if self._stdin is not None:
            poll.register(self._stdin, select.POLLOUT if self._pending else 0)
        ready = {descriptor for descriptor, _ in poll.poll()}
        for kind in [kind for kind in self._outputs if self._outputs[kind] in ready]:
            self._forward_output(kind)
        if self._stdin in ready:
            self._feed()
        if self._channel.fd in ready:
            for kind, payload in self._channel.receive():
                self._obey(kind, payload)
        if self._wakeup in ready:
            os.read(self._wakeup, 512)
            self._reap()

    def _forward_output(self, kind: int) -> None:
        content = os.read(self._outputs[kind], READ_SIZE)
        if content:
            self._window[kind] -= len(content)
            self._channel.send(kind, content)
        else:
            self._close_output(kind)

    def _close_output(self, kind: int) -> None:
        if kind in self._outputs:
            os.close(self._outputs.pop(kind))

    def _feed(self) -> None:
        written = 0
        try:
            while self._pending:
                count = os.write(self._stdin, self._pending[0])     # type: ignore[arg-type]
                written += count
                if count < len(self._pending[0]):
                    self._pending[0] = self._pending[0][count:]
                    break
                del self._pending[0]
            else:
                if written == 0:                  # ready with nothing to write: the command has closed its stdin
                    raise BrokenPipeError
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._close_stdin()
            self._channel.send(STDIN_CLOSED)
        if written:
            self._delivered += written
            self._channel.send(CREDIT, struct.pack("<I", written))
        if self._stdin_ends and not self._pending:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            # A reader of our own, for what the command leaves unread at its end; without a writer it hurts nobody.
            self._leftover = os.open("/proc/self/fd/{}".format(self._stdin), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.close(self._stdin)
            self._stdin = None
            self._pending = []

    @property
    def consumed(self) -> int:
        """Of the delivered bytes, what the command has read; to be asked after its end."""
        if self._leftover is None:
            return self._delivered
        unread: int = struct.unpack("i", fcntl.ioctl(self._leftover, FIONREAD, b"\0" * 4))[0]
        return self._delivered - unread

    def _obey(self, kind: int, payload: bytes) -> None:
        if kind == STDIN and self._stdin is not None:
            self._pending.append(memoryview(payload))
        elif kind == STDIN_EOF:
            self._stdin_ends = True
            if not self._pending:
                self._close_stdin()
        elif kind == SIGNAL:
            self._signal(payload[0])
        elif kind == ACK:
            stream, count = struct.unpack("<BI", payload)
            if stream in self._window:
                self._window[stream] += count
        elif kind == OUTPUT_CLOSED:
            self._close_output(payload[0])        # the command's next write gets it SIGPIPE, as on the host
        elif kind == NETWORK_LOST:
            lower_interface(payload)

    def _signal(self, number: int) -> None:
        if self.status is not None:
            return
        try:
            if number == signal.SIGKILL:
                os.kill(-1, signal.SIGKILL)       # every process of the guest but this one
            else:
                os.killpg(self._pid, number)
        except ProcessLookupError:
            pass

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self.status = status
                self._close_stdin()
                kill_everything()                 # so that the outputs reach their end: no writer is left


def kill_everything() -> None:
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass


# --- The end ------------------------------------------------------------------------------------------------

def flush_mounts(job_directory: bytes, persistent: bool) -> None:
    """Leave nothing in the guest that the host would miss when it ends this kernel the moment it hears of the end.

    write(2) on hostfs goes through at once, but pages that a program changed through mmap(2) do not.
    """
    kill_everything()
    descriptor = os.open(job_directory, os.O_RDONLY)
    call("syncfs", descriptor)
    os.close(descriptor)
    if persistent:
        call("sync")
        mount(b"none", b"/", b"", MS_REMOUNT | MS_RDONLY)


def encode_result(relay: Relay) -> bytes:
    status = relay.status or 0
    how = (b"signal", b"%d" % os.WTERMSIG(status)) if os.WIFSIGNALED(status) else (b"exit", b"%d" % (status >> 8))
    return encode_fields((how, (b"stdin", b"%d" % relay.consumed)))


def greet(channel: Channel) -> None:
    os.write(channel.fd, MAGIC)
    channel.send(HELLO, encode_fields(((b"protocol", b"%d" % PROTOCOL), (b"base", read_file(BASE_ID).strip()),
                                       (b"agent", VERSION.encode()))))


def wait_for_job(channel: Channel) -> Job:
    frames: List[Tuple[int, bytes]] = []
    while not frames:
        frames = channel.receive()
    kind, payload = frames[0]
    if kind != JOB or len(frames) > 1:
        raise Fatal("expected a job from the host, got frame type {}".format(kind))
    return parse_job(payload)


def run_job(channel: Channel, wakeup: int) -> None:
    try:
        greet(channel)
        prepare_system()
        job = wait_for_job(channel)
        raise_network(job)
        account = make_account(job)
        directory = mount_job_directory(job, account)
        command = start_command(job, account, directory)
        channel.send(STARTED)
        relay = Relay(channel, command, wakeup)
        relay.run()
        flush_mounts(directory, job.persistent)
        channel.send(RESULT, encode_result(relay))
    except Fatal as fatal:
        channel.send(RESULT, encode_failure(fatal))
    except Exception as error:
        sys.excepthook(*sys.exc_info())           # to the console
        channel.send(RESULT, encode_failure(Fatal(
            "the agent in the appliance failed: {}: {}".format(type(error).__name__, error),
            "run again with -v for the guest's console; please report it")))


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the kernel spares PID 1 what has no handler
    mount_system(MOUNTS[:1])                      # /dev, for the channel: from then on failures can be told
    while os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) < 3:       # without a console 0 to 2 are free to be mistaken
        pass
    wakeup, to_wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(to_wakeup, False)
    signal.set_wakeup_fd(to_wakeup)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    run_job(Channel(CHANNEL), wakeup)
    while True:                                   # PID 1 must not end; the host ends the machine now
        time.sleep(3600)


if __name__ == "__main__":
    main()
