#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run a command in a Linux appliance, as an ordinary process: no root, no setuid, no namespaces, no KVM.

Usage: python3 apppot_start.py [option...] [command [argument...]]

Constraint: this one file is copied alone to a node, so it imports the standard library only, Python 3.6 or newer.

Three processes make a run: this runner, which relays bytes and signals; a supervisor forked from it, which owns the
User-Mode Linux kernel and cleans up whatever happens to the runner; and the kernel itself.
"""
import argparse
import collections
import errno
import fcntl
import grp
import mmap
import os
import pwd
import re
import resource
import select
import shlex
import signal
import socket
import stat
import struct
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import (
    BinaryIO,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
)

VERSION = "0.1"

# --- What crosses host and guest (apppot_init.py has the same; a test compares them) -------------------------

PROTOCOL = 1
MAGIC = b"\0AppPot\0"                # comes before the first frame: a line may carry noise before the agent owns it
FRAME = struct.Struct("<BI")         # type, length of the payload in bytes
FRAME_MAX = 1 << 20
# Guest to host.
HELLO, STARTED, STDOUT, STDERR, CREDIT, STDIN_CLOSED, RESULT = 1, 2, 3, 4, 5, 6, 7
# Host to guest. A type with SPOOLED set carries the name of a spool file that holds the payload.
JOB, STDIN, STDIN_EOF, SIGNAL, ACK, OUTPUT_CLOSED = 33, 34, 35, 36, 37, 38
SPOOLED = 0x80
OUTPUT_WINDOW = 4 << 20              # bytes of each output stream the host may not have written yet

# --- The runner's own constants -----------------------------------------------------------------------------

EXIT_TIMEOUT, EXIT_FAILED = 124, 125
AGENT = "/sbin/apppot-init"
KERNEL_NAMES = ("linux", "linux.uml")
IMAGE_NAMES = ("apppot.img",)
EMPTY_NAMES = ("empty",)
DEFAULT_MEM = "1G"
MEM_MIN_MIB = 64                     # below this Debian's kernel does not reach the agent
ADDRESS_SPACE_EXTRA_MIB = 256        # what UML maps beside the guest's memory
SCRATCH_MIN_MIB = 32                 # for the spool and the first blocks of the COW file
SCRATCH_PATH_MAX = 200               # absolutize() in arch/um/drivers/cow_user.c has 256 bytes for its directory
DESCRIPTORS_MIN = 40
INLINE_MAX = 1024                    # longer payloads are spooled: the line brings 1.5 MB/s, hostfs 300
# Bytes of stdin frames on their way. A pty holds 8 KiB and must not be full: `empty` moves bytes one way at a time,
# so it and the agent would each wait for the other to read; and of a write that it is stopped in it forgets the rest.
LINE_WINDOW = 4 << 10
SPOOL_CHUNK = 1 << 20
STDIN_WINDOW = 8 << 20
ACK_STEP = 512 << 10
WATCH_INTERVAL_S = 0.2               # how soon the supervisor sees that the runner was stopped
HOSTFS_ROOT = "hostfs=/proc/self/cwd/hostfs"                   # in the run directory; 6.12 and later want it absolute
KERNEL_HELPERS = 4                   # at most so many threads of its own a kernel has
KILL_GRACE_S = 5.0                   # for the guest to tell how the command died after SIGKILL
CONSOLE_TAIL = 64 << 10              # bytes of the guest's console that are kept to explain a failure
KERNEL_INPUT_FD, KERNEL_OUTPUT_FD, KERNEL_CONSOLE_FD = 3, 4, 5
PIPE_SIZE = 1 << 20                  # F_SETPIPE_SZ: the most an unprivileged process may ask for
F_SETPIPE_SZ = 1031                  # include/uapi/linux/fcntl.h; in Python's fcntl from 3.10 only
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36               # include/uapi/linux/prctl.h
ADDR_NO_RANDOMIZE = 0x0040000                                  # include/uapi/linux/personality.h
MCONSOLE = struct.Struct("=III512s")                           # arch/um/drivers/mconsole.h: magic, version, length
MCONSOLE_MAGIC, MCONSOLE_VERSION = 0xCAFEBABE, 2

# `empty` (github.com/mezantrop/empty) makes these FIFOs in the run directory. Its program gets a pty as 0, 1 and 2; the
# shell puts that where the kernel has the channel, and has what the kernel prints go to the console as ever.
EMPTY_MARK = b"empty -f"             # in its usage text
EMPTY_PID, EMPTY_TO_GUEST, EMPTY_FROM_GUEST = "empty.pid", "to-guest", "from-guest"
EMPTY_ARGS = ["-f", "-i", EMPTY_TO_GUEST, "-o", EMPTY_FROM_GUEST, "-p", EMPTY_PID, "/bin/sh", "-c",
              'exec "$0" "$@" {}<&0 {}>&1 </dev/null >&{} 2>&1'.format(
                  KERNEL_INPUT_FD, KERNEL_OUTPUT_FD, KERNEL_CONSOLE_FD)]
EMPTY_TRIES = 3                      # its semaphore's key has 8 bits of a pid: two that start at once may meet there
EMPTY_START_S = 10.0
CARRIED = struct.Struct("=i")        # what the supervisor says first: pid of the kernel that `empty` runs, 0 if none

FORWARDED_SIGNALS = tuple(getattr(signal, name) for name in (
    "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"))
# A batch system may signal every process of a job. Blocked at exec these reach neither the kernel, which would die
# of them, nor the guest's processes, whose tracer would panic: SIGCONT, too, is reported to a tracer unless blocked.
KEPT_FROM_KERNEL = FORWARDED_SIGNALS + (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT, signal.SIGXFSZ)

BATCH_VARIABLES = re.compile(
    br"(SLURM_|SLURMD_|PBS_|SGE_|JOB_|_CONDOR_|OMP_|LSB_|LC_).*|"
    br"NSLOTS|NHOSTS|NQUEUES|PE|QUEUE|RESTARTED|TERM|LANG|LANGUAGE|TZ")

EXT_MAGIC, EXT_64BIT = 0xEF53, 0x80                            # fs/ext4/ext4.h
LINUX_TYPE, EXTENDED_TYPES, GPT_TYPE = 0x83, (0x05, 0x0F, 0x85), 0xEE
GPT_ROOT_X86_64 = bytes.fromhex("e3bc684fcde8b14d96e7fbcaf984b709")   # Discoverable Partitions Specification
COW_MAGIC, COW_HEADER = b"OOOM", struct.Struct(">4sIIQIII")    # arch/um/drivers/cow_user.c, version 3, big-endian
OTHER_IMAGES = (                     # offset, magic, what it is, what to do
    (0, b"\x7fELF", "a program", "are image and kernel exchanged?"),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it: gunzip FILE"),
    (0, b"\xfd7zXZ", "compressed with xz", "unpack it: unxz FILE"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it: unzstd FILE"),
    (0, b"BZh", "compressed with bzip2", "unpack it: bunzip2 FILE"),
    (0, b"QFI\xfb", "a qcow2 image", "convert it: qemu-img convert -O raw FILE apppot.img"),
    (0, b"KDMV", "a VMDK image", "convert it: qemu-img convert -O raw FILE apppot.img"),
    (0, COW_MAGIC, "a COW file", "give it with its base image: --image COW:BASE"),
    (0, b"XFSB", "an XFS file system", "AppPot wants ext4: make one with mke2fs -t ext4 -d DIRECTORY"),
    (0, b"hsqs", "a squashfs file system", "AppPot wants ext4: make one with mke2fs -t ext4 -d DIRECTORY"),
    (0x10040, b"_BHRfS_M", "a btrfs file system", "AppPot wants ext4: make one with mke2fs -t ext4 -d DIRECTORY"),
    (32769, b"CD001", "a CD-ROM image", "AppPot wants ext4: make one with mke2fs -t ext4 -d DIRECTORY"),
)


class Fatal(Exception):
    """AppPot cannot go on: `message` says what, and of which object; `hint` what to do about it."""

    def __init__(self, message: str, hint: str, status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message, self.hint, self.status = message, hint, status


class RootDevice(NamedTuple):
    """Where an image holds the root file system."""
    partition: int                   # 0: the image is the file system itself
    base_id: str                     # UUID of the file system


class RunSpec(NamedTuple):
    """One run, decided: nothing below parses options or looks at the environment again."""
    command: Tuple[str, ...]
    kernel: str
    image: str
    cow: Optional[str]               # of COW:BASE; None: a private one for this run
    write: bool
    root: RootDevice
    mem_mib: int
    ram_directory: str
    scratch: str                     # the run directory is made in it
    umid: str
    extra: Tuple[str, ...]
    empty: Optional[str]             # this program is to carry the channel
    empty_asked: bool                # and without it there is to be no run
    environment: Dict[bytes, bytes]
    job_directory: bytes
    job_alias: bytes
    cwd: bytes
    as_root: bool
    umask: int
    ignored_signals: Tuple[int, ...]  # of the caller's, as under nohup: the command ignores them, too
    timeout_s: Optional[float]
    boot_timeout_s: float
    kill_after_s: float
    verbose: bool

    @property
    def persistent(self) -> bool:
        return self.write or self.cow is not None


class Machine(NamedTuple):
    """A started guest, as the runner sees it."""
    supervisor: int                  # pid
    from_guest: int                  # the channel: read end
    to_guest: int                    # and write end, non-blocking
    console: int                     # read end: what the kernel prints
    lifeline: int                    # write end: closing it ends the guest
    report: int                      # read end: "exec ERRNO", "ended STATUS" or "helper" when the guest is gone
    directory: str
    carried: int                     # pid of the kernel if `empty` carries the channel, else 0


# --- Pure functions -----------------------------------------------------------------------------------------

def encode_frame(kind: int, payload: bytes = b"") -> bytes:
    return FRAME.pack(kind, len(payload)) + payload


def decode_frames(received: bytearray) -> List[Tuple[int, bytes]]:
    """Take the complete frames off the front of `received`; ValueError when it cannot be a frame."""
    frames = []
    start = 0
    while len(received) - start >= FRAME.size:
        kind, length = FRAME.unpack_from(received, start)
        if length > FRAME_MAX:
            raise ValueError("a frame of {} bytes".format(length))
        end = start + FRAME.size + length
        if len(received) < end:
            break
        frames.append((kind, bytes(received[start + FRAME.size:end])))
        start = end
    del received[:start]
    return frames


def encode_fields(fields: Iterable[Tuple[bytes, bytes]]) -> bytes:
    """NAME=VALUE records, each ended by NUL; a name may come again. Values hold no NUL (nothing in exec does)."""
    return b"".join(name + b"=" + value + b"\0" for name, value in fields)


def decode_fields(payload: bytes) -> Dict[bytes, List[bytes]]:
    fields: Dict[bytes, List[bytes]] = {}
    for record in payload.split(b"\0")[:-1]:
        name, _, value = record.partition(b"=")
        fields.setdefault(name, []).append(value)
    return fields


def parse_size_mib(text: str, what: str) -> int:
    """MiB in "512", "512M", "1.5G", "2TiB"; a bare number is MiB, as original AppPot's users write it."""
    match = re.match(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$", text.strip(), re.IGNORECASE | re.ASCII)
    if not match:
        raise Fatal("{} is not a size: {!r}".format(what, text), "give a number of MiB or a size such as 512M or 2G")
    factor = {"K": 1 / 1024.0, "": 1, "M": 1, "G": 1024, "T": 1024 ** 2}[match.group(2).upper()]
    return int(float(match.group(1)) * factor)


def parse_seconds(text: str, what: str) -> float:
    """Seconds in "90", "1.5", "10m", "2h", "1d", as timeout(1) takes them."""
    match = re.match(r"(\d+(?:\.\d+)?)([smhd]?)$", text.strip(), re.ASCII)
    if not match:
        raise Fatal("{} is not a time: {!r}".format(what, text), "give seconds, or a number with s, m, h or d")
    return float(match.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match.group(2)]


def format_mib(mib: float) -> str:
    return "{:.1f} GiB".format(mib / 1024) if mib >= 1024 else "{:.0f} MiB".format(mib)


def select_environment(caller: Dict[bytes, bytes], asked: Sequence[str], clean: bool) -> Dict[bytes, bytes]:
    """What of the caller's environment goes into the guest: the batch system's variables and what --env names."""
    chosen = {} if clean else {name: value for name, value in caller.items() if BATCH_VARIABLES.fullmatch(name)}
    for text in asked:
        name, equals, value = os.fsencode(text).partition(b"=")
        if not name:
            raise Fatal("--env without a name: {!r}".format(text), "write --env NAME or --env NAME=VALUE")
        if equals:
            chosen[name] = value
        elif name in caller:
            chosen[name] = caller[name]
    return chosen


def build_kernel_args(spec: RunSpec, disk: str) -> List[str]:
    """argv of the kernel. Paths are relative to the run directory: no length, blank or comma of a path can hurt."""
    return [
        spec.kernel, disk, "root=/dev/ubda{}".format(spec.root.partition or ""), "rw", "mem={}M".format(spec.mem_mib),
        "con=null", "con0=null,fd:1", "ssl0=fd:{},fd:{}".format(KERNEL_INPUT_FD, KERNEL_OUTPUT_FD),
        "uml_dir=.", "umid=" + spec.umid, HOSTFS_ROOT, "init=" + AGENT] + list(spec.extra)


def build_command_line(spec: RunSpec, disk: str) -> List[str]:
    """What is started: the kernel, or `empty` with the kernel."""
    return ([spec.empty] + EMPTY_ARGS if spec.empty else []) + build_kernel_args(spec, disk)


def build_job(spec: RunSpec, stdin_is_null: bool, one_output: bool) -> bytes:
    uid, gid = os.getuid(), os.getgid()
    fields = [
        (b"job", spec.job_directory), (b"alias", spec.job_alias), (b"cwd", spec.cwd), (b"user", user_name(uid)),
        (b"uid", b"%d" % uid), (b"root", b"%d" % spec.as_root), (b"umask", b"%d" % spec.umask),
        (b"stdin", b"null" if stdin_is_null else b"pipe"), (b"output", b"one" if one_output else b"two"),
        (b"persistent", b"%d" % spec.persistent)]
    fields += [(b"group", b"%d=%s" % (group, group_name(group)))
               for group in [gid] + [group for group in os.getgroups() if group != gid]]
    fields += [(b"ignore", b"%d" % number) for number in spec.ignored_signals]
    fields += [(b"env", name + b"=" + value) for name, value in spec.environment.items()]
    fields += [(b"arg", os.fsencode(word)) for word in spec.command]
    return encode_fields(fields)


def user_name(uid: int) -> bytes:
    try:
        return os.fsencode(pwd.getpwuid(uid).pw_name)
    except KeyError:                              # a node without the account: batch systems do run such jobs
        return b"u%d" % uid


def group_name(gid: int) -> bytes:
    try:
        return os.fsencode(grp.getgrgid(gid).gr_name)
    except KeyError:
        return b"g%d" % gid


# --- Images -------------------------------------------------------------------------------------------------

def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset >= 1 << 62:                         # a damaged table; seek() would raise
        return b""
    file.seek(offset)
    return file.read(size)


def read_ext_superblock(file: BinaryIO, offset: int) -> Optional[Tuple[str, int]]:
    """UUID and size in bytes of the ext2, 3 or 4 file system at `offset`; None where there is none."""
    block = read_at(file, offset + 1024, 1024)
    if len(block) < 1024 or struct.unpack_from("<H", block, 0x38)[0] != EXT_MAGIC:
        return None
    blocks: int = struct.unpack_from("<I", block, 0x04)[0]
    if struct.unpack_from("<I", block, 0x60)[0] & EXT_64BIT:
        blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
    digits = block[0x68:0x78].hex()
    uuid = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    return uuid, blocks * (1024 << min(struct.unpack_from("<I", block, 0x18)[0], 20))


def read_gpt(file: BinaryIO) -> Iterator[Tuple[int, bool, int, int]]:
    """Number, whether it says to be a root file system, first and last byte of each partition."""
    header = read_at(file, 512, 92)
    if header[:8] != b"EFI PART":
        return
    first, count, size = struct.unpack_from("<QII", header, 72)
    table = read_at(file, first * 512, min(count, 128) * min(size, 512))
    for index in range(len(table) // size if size >= 128 else 0):
        entry = table[index * size:]
        start, end = struct.unpack_from("<QQ", entry, 32)
        if start:
            yield index + 1, entry[:16] == GPT_ROOT_X86_64, start * 512, (end + 1) * 512


def read_mbr(file: BinaryIO) -> Iterator[Tuple[int, bool, int, int]]:
    """The same from an MBR; logical partitions, numbered from 5, are found along the chain of extended ones."""
    base = table_at = 0
    number = 5
    for _ in range(64):                           # a damaged chain may be a circle
        sector = read_at(file, table_at * 512, 512)
        if len(sector) < 512 or sector[510:] != b"\x55\xaa":
            return
        following = 0
        for index in range(4):
            kind, start, length = struct.unpack_from("<4xB3xII", sector, 446 + 16 * index)
            if kind in EXTENDED_TYPES:
                following = base + start
            elif kind == LINUX_TYPE:
                yield index + 1 if not table_at else number, False, (table_at + start) * 512, \
                    (table_at + start + length) * 512
            if table_at and index == 0:
                number += 1
        if not following:
            return
        base, table_at = base or following, following


def find_root_device(path: str) -> RootDevice:
    """Find the root file system in a partition image or, by its partition table, in a whole-disk image."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                raise Fatal("image is empty: " + path, "was the transfer cut off? Copy it again")
            whole = read_ext_superblock(file, 0)
            partitions = [] if whole else list(read_gpt(file)) or list(read_mbr(file))
            found = [(0, False, 0, size)] if whole else partitions
            roots = []
            for number, says_root, start, _ in found:
                superblock = read_ext_superblock(file, start)
                if superblock:
                    roots.append((says_root, superblock[1], RootDevice(number, superblock[0]), start + superblock[1]))
            if not roots:
                raise explain_no_root(file, path, bool(partitions))
    except OSError as error:
        raise Fatal("image cannot be read, {}: {}".format(error.strerror, path),
                    "--image names a disk image file" if error.errno in (errno.ENOENT, errno.EISDIR) else
                    "check its permissions")
    _, _, root, end = max(roots)
    if end > size:
        raise Fatal("image is truncated: {} has {} of {} bytes".format(path, size, end),
                    "was the transfer cut off? Copy it again")
    return root


def explain_no_root(file: BinaryIO, path: str, has_partitions: bool) -> Fatal:
    if has_partitions:
        return Fatal("image has no Linux partition with ext4: " + path, "list its partitions: fdisk -l FILE")
    for offset, magic, what, hint in OTHER_IMAGES:
        if read_at(file, offset, len(magic)) == magic:
            return Fatal("image is {}: {}".format(what, path), hint.replace("FILE", shlex.quote(path)))
    return Fatal("image holds no ext4 file system and no partition table: " + path,
                 "is it a disk image? `make image` builds one")


def check_cow(cow: str, base: str) -> None:
    """Refuse a COW file that was made for another base image, as the kernel would, but before the boot."""
    try:
        with open(cow, "rb") as file:
            header = file.read(COW_HEADER.size)
    except FileNotFoundError:
        if not os.access(os.path.dirname(os.path.abspath(cow)), os.W_OK):
            raise Fatal("COW file cannot be made: " + cow, "its directory must exist and be writable")
        return
    except OSError as error:
        raise Fatal("COW file cannot be read, {}: {}".format(error.strerror, cow), "check its permissions")
    if not os.access(cow, os.W_OK):
        raise Fatal("COW file is not writable: " + cow, "check its permissions, or run without a COW file")
    if len(header) < COW_HEADER.size or header[:4] != COW_MAGIC:
        raise Fatal("not a COW file: " + cow, "--image COW:BASE names the COW file first; is the order right?")
    _, version, mtime, size, _, _, _ = COW_HEADER.unpack(header)
    status = os.stat(base)
    if version == 3 and (mtime != int(status.st_mtime) & 0xFFFFFFFF or size != status.st_size):
        raise Fatal("COW file was made for another base image: {} does not fit {}".format(cow, base),
                    "the base must have the size and time it had then; copies keep the time with cp -p or rsync -t")


def lock_image(path: str, exclusive: bool) -> int:
    """Lock an image against others that write it; the descriptor goes to the kernel, so the lock lasts as it does."""
    descriptor = os.open(path, os.O_RDWR if exclusive else os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Fatal("image is in use by {}: {}".format(find_lock_holder(path), path),
                    "--write and a COW file given by name want it for themselves: wait, or use a copy" if exclusive
                    else "a run is writing it: wait, or use a copy")
    except OSError:
        pass                                      # a file system without locks: nothing can be promised there
    return descriptor


def find_lock_holder(path: str) -> str:
    inode = str(os.stat(path).st_ino)
    try:
        with open("/proc/locks") as file:
            for line in file:
                words = line.split()
                if words[1] == "FLOCK" and words[5].split(":")[-1] == inode:
                    return "process " + words[4]
    except (OSError, IndexError):
        pass
    return "a process on another node"


# --- The node -----------------------------------------------------------------------------------------------

def find_part(option: Optional[str], variable: str, names: Sequence[str], what: str, on_path: bool) -> str:
    """Explicit option, environment, beside this script, current directory, PATH: the first that is there."""
    given = option or os.environ.get(variable)
    if given:
        return given
    beside = os.path.dirname(os.path.abspath(__file__))
    places = [beside, os.getcwd()] + (os.environ.get("PATH", os.defpath).split(os.pathsep) if on_path else [])
    for place in places:
        for name in names:
            path = os.path.join(place or ".", name)
            if os.path.isfile(path):
                return path
    raise Fatal("no {} found".format(what),
                "put `{}` beside {}, or name it with --{} or {}".format(names[0], os.path.basename(__file__), what,
                                                                        variable))


def check_kernel(path: str) -> str:
    """Absolute path of a kernel that can be executed. A grid's stage-in loses the execute bit: set it again."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise Fatal("kernel cannot be read, {}: {}".format(error.strerror, path),
                    "--kernel names a User-Mode Linux executable")
    if magic != b"\x7fELF":
        raise Fatal("kernel is not an executable program: " + path,
                    "User-Mode Linux is one; the file in /boot is not. Debian has it in the package user-mode-linux")
    if not make_executable(path):
        raise Fatal("kernel is not executable: " + path, "chmod +x it; a file system mounted noexec cannot hold it")
    return os.path.abspath(path)


def make_executable(path: str) -> bool:
    if not os.access(path, os.X_OK):
        try:
            os.chmod(path, os.stat(path).st_mode | 0o100)
        except OSError:
            pass
    return os.access(path, os.X_OK)


def find_empty(io: str, option: Optional[str]) -> Tuple[Optional[str], bool]:
    """The `empty` that is to carry the channel, if any, and whether it was asked for, not just found beside us."""
    asked = bool(io == "empty" or option or os.environ.get("APPPOT_EMPTY"))
    if io == "builtin":
        if option:
            raise Fatal("--empty with --io builtin: " + option, "leave out one of the two")
        return None, False
    if asked:
        path = find_part(option, "APPPOT_EMPTY", EMPTY_NAMES, "empty", True)
        check_empty(path)
    else:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), EMPTY_NAMES[0])
        try:
            check_empty(path)
        except Fatal:                             # any file may have that name
            return None, False
    return os.path.abspath(path), asked


def check_empty(path: str) -> None:
    try:
        with open(path, "rb") as file:
            is_empty = EMPTY_MARK in file.read(1 << 20)
    except OSError as error:
        raise Fatal("`empty` cannot be read, {}: {}".format(error.strerror, path),
                    "--empty names the program, --io builtin does without it")
    if not is_empty:
        raise Fatal("not the program `empty`: " + path, "build it from github.com/mezantrop/empty, or use --io builtin")
    if not make_executable(path):
        raise Fatal("`empty` is not executable: " + path, "chmod +x it; a file system mounted noexec cannot hold it")


def free_mib(directory: str) -> float:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize / 1048576


def unique_name(prefix: str) -> str:
    return "{}{}-{}".format(prefix, os.getuid(), os.urandom(6).hex())


def find_fault_for_ram(directory: str, mem_mib: int) -> str:
    """Why the guest's memory cannot be a file in `directory`; empty if it can. UML maps that file executable."""
    path = os.path.join(directory, unique_name(".apppot-probe-"))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return "cannot be written ({})".format(error.strerror)
    try:
        os.unlink(path)
        os.ftruncate(descriptor, mmap.PAGESIZE)
        mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC).close()
        room = free_mib(directory)
    except OSError as error:
        return "is mounted noexec" if error.errno == errno.EPERM else "is unusable ({})".format(error.strerror)
    finally:
        os.close(descriptor)
    return "" if room >= mem_mib else "has {} free".format(format_mib(room))


def scratch_candidates(tmpdir: Optional[str]) -> List[str]:
    given = tmpdir or os.environ.get("APPPOT_TMPDIR")
    if given:
        return [given]
    named = [os.environ.get(name) for name in ("_CONDOR_SCRATCH_DIR", "TMPDIR")]
    return [path for path in named if path] + ["/tmp", "/var/tmp"]


def choose_ram_directory(spec_kernel: str, candidates: Sequence[str], mem_mib: int) -> str:
    faults = []
    for directory in ["/dev/shm"] + list(candidates):
        fault = find_fault_for_ram(directory, mem_mib)
        if not fault:
            return os.path.abspath(directory)
        faults.append("{} {}".format(directory, fault))
    if uses_memfd(spec_kernel):
        return "/"
    raise Fatal("no room for the guest's memory of {}: {}".format(format_mib(mem_mib), "; ".join(faults)),
                "name a directory that has it and is not noexec with --tmpdir, or ask for less with --mem")


def uses_memfd(kernel: str) -> bool:
    """Whether the kernel needs no directory for its memory: so from 6.16 on, by its own message when that fails."""
    with open(kernel, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"create executable memfd") >= 0


def choose_scratch(candidates: Sequence[str]) -> str:
    faults = []
    for directory in candidates:
        if not os.path.isdir(directory):
            faults.append(directory + " is not a directory")
        elif len(os.fsencode(os.path.abspath(directory))) > SCRATCH_PATH_MAX:
            faults.append("{}... is a path of more than {} bytes".format(directory[:30], SCRATCH_PATH_MAX))
        elif not os.access(directory, os.W_OK | os.X_OK):
            faults.append(directory + " is not writable")
        elif free_mib(directory) < SCRATCH_MIN_MIB:
            faults.append("{} has {} free, {} are needed".format(
                directory, format_mib(free_mib(directory)), format_mib(SCRATCH_MIN_MIB)))
        else:
            return os.path.abspath(directory)
    raise Fatal("no directory for temporary files: " + "; ".join(faults), "name one with --tmpdir")


def check_limits(mem_mib: int, disk_bytes: int) -> None:
    """Hard limits of the node that the kernel would die of; the soft ones are raised to them later."""
    needs = (
        (resource.RLIMIT_AS, (mem_mib + ADDRESS_SPACE_EXTRA_MIB) << 20, "address space (ulimit -v)"),
        (resource.RLIMIT_FSIZE, max(mem_mib << 20, disk_bytes), "file size (ulimit -f)"),
    )
    for which, need, what in needs:
        hard = resource.getrlimit(which)[1]
        if hard != resource.RLIM_INFINITY and hard < need:
            raise Fatal("limit of {} is {}, {} are needed".format(what, format_mib(hard >> 20), format_mib(need >> 20)),
                        "raise the limit, or ask for less memory with --mem")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS_MIN:
        raise Fatal("limit of open files (ulimit -n) is {}, {} are needed".format(hard, DESCRIPTORS_MIN),
                    "raise the limit")


def total_memory_mib() -> int:
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) // 1024


def find_job_directory() -> Tuple[bytes, bytes]:
    """The current directory, links resolved, and as $PWD names it: scripts use the name that the user knows."""
    try:
        directory = os.getcwdb()
        alias = os.environb.get(b"PWD", b"")
        known = alias.startswith(b"/") and os.path.samefile(alias, b".") and b".." not in alias.split(b"/")
    except OSError as error:
        if error.filename:                        # a stale $PWD is no harm
            return directory, directory
        raise Fatal("current directory cannot be used as job directory: " + str(error.strerror), "cd to another one")
    return directory, os.path.normpath(alias) if known else directory


# --- Processes ----------------------------------------------------------------------------------------------

def call_libc(name: str, *arguments: int) -> None:
    """What the standard library does not offer; best effort, as a Python without ctypes costs comfort only."""
    try:
        import ctypes
        getattr(ctypes.CDLL(None), name)(*arguments)
    except (ImportError, OSError):
        pass


def list_children(pid: int) -> List[int]:
    try:
        with open("/proc/{0}/task/{0}/children".format(pid)) as file:
            return [int(word) for word in file.read().split()]
    except FileNotFoundError:                     # a kernel without CONFIG_PROC_CHILDREN
        every = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [child for child in every if read_process(child)[1] == pid]


def read_process(pid: int) -> Tuple[str, int]:
    """State letter and parent of a process; ("", 0) when there is none."""
    try:
        with open("/proc/{}/stat".format(pid), "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
    except (OSError, ValueError):
        return "", 0
    return state.decode(), int(parent)


def kill_children() -> None:
    """Kill and reap until no child is left; orphans of those killed come to us, the subreaper, in turn."""
    while True:
        for pid in list_children(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def remove_tree(path: str) -> None:
    """Remove a directory and what is below; what cannot be removed stays. (shutil costs 15 ms to import.)"""
    try:
        if os.path.isdir(path) and not os.path.islink(path):
            for name in os.listdir(path):
                remove_tree(os.path.join(path, name))
            os.rmdir(path)
        else:
            os.unlink(path)
    except OSError:
        pass


# --- The run directory --------------------------------------------------------------------------------------

RUN_PREFIX = "apppot-"


def try_lock(directory: str) -> Optional[int]:
    """A locked descriptor of a run directory; None if it is in use, or gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink and os.path.exists(directory):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def remove_stale_directories(scratch: str) -> None:
    """Remove what runs left that were killed with every process they had: nobody locks it any more."""
    prefix = "{}{}-".format(RUN_PREFIX, os.getuid())
    try:
        names = os.listdir(scratch)
    except PermissionError:                       # writable but not readable: nothing to find, then
        return
    for name in names:
        if name.startswith(prefix):
            path = os.path.join(scratch, name)
            descriptor = try_lock(path)
            if descriptor is not None:
                remove_tree(path)
                os.close(descriptor)


@contextmanager
def run_directory(spec: RunSpec) -> Iterator[Tuple[str, int]]:
    """A private directory, and the descriptor that locks it; it is removed at the end by whoever lives."""
    remove_stale_directories(spec.scratch)
    lock = None
    while lock is None:                           # another run may take a new one for stale before it is locked
        path = os.path.join(spec.scratch, unique_name(RUN_PREFIX))
        os.mkdir(path, 0o700)
        lock = try_lock(path)
    try:
        os.makedirs(os.path.join(path, "hostfs/spool"))
        os.symlink(spec.job_directory, os.path.join(os.fsencode(path), b"hostfs/job"))
        yield path, lock
    finally:
        remove_tree(path)
        os.close(lock)


def name_disk(spec: RunSpec, directory: Optional[str]) -> str:
    """The kernel's ubd argument. A path that the kernel would cut in pieces is given as a link in the run directory."""
    def kernel_path(link: str, path: str) -> str:
        path = os.path.abspath(path)
        if re.match(r"[\w./+@%~-]+$", path, re.ASCII) and len(path) < 256:
            return path
        if directory:
            os.symlink(path, os.path.join(directory, link))
        return link

    if spec.write:
        return "ubd0c=" + kernel_path("image", spec.image)     # c: no lock of the kernel's own, we have one
    cow = kernel_path("cow", spec.cow) if spec.cow else "cow"
    return "ubd0={},{}".format(cow, kernel_path("base", spec.image))


# --- The supervisor -----------------------------------------------------------------------------------------

def spawn_kernel(spec: RunSpec, argv: List[str], keep: Dict[int, int]) -> int:
    """Fork and execute argv in the current directory as a kernel is, with the descriptors `keep` (there to here)."""
    supervisor = os.getpid()
    error_read, error_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            call_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
            # A randomised heap is up to 1 GiB off the program, and UML fills that gap with memory to manage.
            call_libc("personality", ADDR_NO_RANDOMIZE)
            if os.getppid() != supervisor:
                os._exit(EXIT_FAILED)
            raise_limits()
            os.umask(0)                           # the guest has its own; this one would come on top of it on hostfs
            high = {there: fcntl.fcntl(here, fcntl.F_DUPFD, 32) for there, here in keep.items()}
            for there, here in high.items():
                os.dup2(here, there)
                os.close(here)
            environment = dict(os.environ, TMPDIR=spec.ram_directory)
            os.execve(argv[0], argv, environment)
        except OSError as error:
            os.write(error_write, b"%d" % (error.errno or 0))
        finally:
            os._exit(EXIT_FAILED)
    os.close(error_write)
    with os.fdopen(error_read, "rb") as file:
        failure = file.read()
    if failure:
        raise OSError(int(failure), os.strerror(int(failure)))
    return pid


def raise_limits() -> None:
    """Raise the soft limits: they were meant for the command, and the kernel dies of some. No core of a panic, too."""
    for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE,
                  resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def ask_mconsole(umid: str, command: bytes) -> None:
    """Send a command to the kernel's mconsole, in the current directory; no answer within a second is no matter."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        try:
            client.bind("")                       # an abstract address by autobind, for the answer
            client.sendto(MCONSOLE.pack(MCONSOLE_MAGIC, MCONSOLE_VERSION, len(command), command),
                          "./{}/mconsole".format(umid))
            client.recv(1024)
        except OSError:
            pass


def start_by_empty(spec: RunSpec, argv: List[str], keep: Dict[int, int], lifeline: int) -> Optional[Tuple[int, int]]:
    """Start `empty` with the kernel; pids of the kernel and of `empty`, None if that cannot be had.

    SIGCHLD is blocked in `empty`: it would reap the kernel and keep the status to itself. This way the dead kernel
    is left for us; see find_end().
    """
    deadline = time.monotonic() + EMPTY_START_S
    leashes = [os.pipe()[0], os.pipe()[0]]        # the write ends stay open until we end, however that be
    keep = {**keep, **{max(keep) + 1 + index: leash for index, leash in enumerate(leashes)}}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    try:
        for _ in range(EMPTY_TRIES):
            first = spawn_kernel(spec, argv, keep)
            pids = find_carried_kernel(first, lifeline, deadline)
            if pids:
                for leash, pid in zip(leashes, pids):
                    tie_to_us(leash, pid)
                return pids
            kill_children()
            for name in (EMPTY_PID, EMPTY_TO_GUEST, EMPTY_FROM_GUEST):
                remove_tree(name)
    except OSError:
        kill_children()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    return None


def find_carried_kernel(first: int, lifeline: int, deadline: float) -> Optional[Tuple[int, int]]:
    """Wait for `empty` to be a daemon and have a child; None if it ends, takes too long, or nobody waits.

    It leaves two dead processes behind: the first, and the first's child, which becomes ours when the first has ended.
    """
    is_daemon = False
    while time.monotonic() < deadline and not select.select([lifeline], [], [], 0.005)[0]:
        children = []
        try:
            with open(EMPTY_PID) as file:
                empty = int(file.read())
            if is_daemon and read_process(empty)[1] == os.getpid():
                children = list_children(empty)
        except (OSError, ValueError):
            pass                                  # not yet
        try:
            pid = os.waitpid(-1, os.WNOHANG)[0]
            while pid:
                is_daemon = is_daemon or pid == first
                pid = os.waitpid(-1, os.WNOHANG)[0]
        except ChildProcessError:
            return None
        if children:
            return children[0], empty
    return None


def tie_to_us(leash: int, pid: int) -> None:
    """Have the host's kernel kill `pid` when we are gone: for a grandchild, whom PR_SET_PDEATHSIG cannot reach.

    `leash` is the read end of a pipe that `pid` holds open, too, and nobody but us has the write end of.
    """
    fcntl.fcntl(leash, fcntl.F_SETOWN, pid)
    fcntl.fcntl(leash, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(leash, fcntl.F_SETFL, os.O_ASYNC)
    os.close(leash)


def start_kernel(spec: RunSpec, directory: str, keep: Dict[int, int], lifeline: int) -> Optional[Tuple[int, int]]:
    """Start the kernel; its pid and that of the `empty` around it, 0 without; None if there is to be one and cannot."""
    disk = name_disk(spec, directory)
    if spec.empty:
        # `empty` does not tell whether the kernel can be executed, so this does.
        os.kill(spawn_kernel(spec, [spec.kernel, "--version"], {}), signal.SIGKILL)
        kill_children()
        pids = start_by_empty(spec, build_command_line(spec, disk), keep, lifeline)
        if pids or spec.empty_asked:
            os.write(keep[KERNEL_OUTPUT_FD], CARRIED.pack(pids[0]) if pids else b"")
            return pids
        os.write(keep[KERNEL_OUTPUT_FD], CARRIED.pack(0))
    return spawn_kernel(spec, build_kernel_args(spec, disk), keep), 0


def find_end(kernel: int, empty: int) -> str:
    """What to report of a kernel, or of the `empty` around it, that has ended; nothing if none has."""
    if empty:
        if os.waitpid(empty, os.WNOHANG)[0]:
            return "empty"
        if read_process(kernel)[0] != "Z":
            return ""
        os.kill(empty, signal.SIGKILL)
        os.waitpid(empty, 0)                      # the kernel is our child now
    pid, status = os.waitpid(kernel, os.WNOHANG)
    return "ended {}".format(status) if pid else ""


def watch_kernel(kernel: int, empty: int, umid: str, lifeline: int, wakeup: int) -> str:
    """Wait for the kernel's end or the runner's; return what to report. Stop the guest while the runner is stopped.

    A stopped runner means a suspended job. The guest is stopped by its mconsole: it then runs nothing, and none of
    its processes is caught by a SIGSTOP that may follow in a state that would panic it.
    """
    runner = os.getppid()
    suspended = False
    rounds_with_corpse = 0
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(wakeup, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(WATCH_INTERVAL_S * 1000)}
        if lifeline in ready:
            return ""
        if wakeup in ready:
            os.read(wakeup, 512)
        end = find_end(kernel, empty)
        if end:
            return end
        if (read_process(runner)[0] == "T") != suspended:
            suspended = not suspended
            ask_mconsole(umid, b"stop" if suspended else b"go")
        rounds_with_corpse = rounds_with_corpse + 1 if has_dead_helper(kernel) else 0
        if rounds_with_corpse * WATCH_INTERVAL_S >= 1:
            return "helper"


def has_dead_helper(kernel: int) -> bool:
    """Whether a thread that the kernel started for its own use is dead: it does not notice, and the guest hangs.

    These are the first of its children; later ones are the guest's processes. A kernel that runs may be about to
    reap its child, one that sleeps is not.
    """
    return read_process(kernel)[0] == "S" and any(
        read_process(child)[0] == "Z" for child in list_children(kernel)[:KERNEL_HELPERS])


def supervise(spec: RunSpec, directory: str, keep: Dict[int, int], lifeline: int, report: int) -> None:
    """The supervisor's life: run the kernel, end it when it should end, leave nothing."""
    wakeup, to_wakeup = os.pipe()
    os.set_blocking(to_wakeup, False)
    signal.set_wakeup_fd(to_wakeup)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    os.chdir(directory)
    message = "empty"
    try:
        pids = start_kernel(spec, directory, keep, lifeline)
        for number in (1, KERNEL_INPUT_FD, KERNEL_OUTPUT_FD):     # so that they end with the kernel
            os.close(keep[number])
        if pids:
            message = watch_kernel(pids[0], pids[1], spec.umid, lifeline, wakeup)
    except OSError as error:
        message = "exec {}".format(error.errno)
    kill_children()
    os.chdir("/")
    remove_tree(directory)
    os.write(report, message.encode())


@contextmanager
def start_machine(spec: RunSpec, directory: str, locks: Sequence[int]) -> Iterator[Machine]:
    """Fork the supervisor, which starts the kernel; at the end of the context nothing of them is left."""
    call_libc("prctl", PR_SET_CHILD_SUBREAPER, 1)              # for what a killed supervisor leaves
    # Pipes: the guest's tty writes 2 KiB at a time, and a wide pipe holds many of these for one read.
    from_guest, output_end = make_wide_pipe()
    input_end, to_guest = os.pipe()
    os.set_blocking(to_guest, False)
    console, console_end = os.pipe()
    lifeline_end, lifeline = os.pipe()
    report, report_end = os.pipe()
    sys.stderr.flush()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_FROM_KERNEL)
            os.setsid()
            call_libc("prctl", PR_SET_CHILD_SUBREAPER, 1)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            keep = {0: null, 1: console_end, 2: console_end,
                    KERNEL_INPUT_FD: input_end, KERNEL_OUTPUT_FD: output_end, KERNEL_CONSOLE_FD: console_end}
            keep.update({KERNEL_CONSOLE_FD + 1 + index: lock for index, lock in enumerate(locks)})
            close_all_but(set(keep.values()) | {0, 1, 2, lifeline_end, report_end})
            supervise(spec, directory, keep, lifeline_end, report_end)
        finally:
            os._exit(0)
    for descriptor in (input_end, output_end, console_end, lifeline_end, report_end):
        os.close(descriptor)
    try:
        carried = exchange_channel(directory, from_guest, to_guest) if spec.empty else 0
        yield Machine(supervisor, from_guest, to_guest, console, lifeline, report, directory, carried)
    finally:
        os.close(lifeline)
        if read_process(supervisor)[1] == os.getpid():
            os.waitpid(supervisor, 0)
        kill_children()
        for descriptor in (from_guest, to_guest, console, report):
            os.close(descriptor)


def exchange_channel(directory: str, from_guest: int, to_guest: int) -> int:
    """Put the FIFOs of `empty` in the place of the pipes once they are made; pid of its kernel, 0 if it is no use."""
    said = os.read(from_guest, CARRIED.size)
    kernel: int = CARRIED.unpack(said)[0] if said else 0
    if not kernel:
        return 0
    try:
        # The second fails unless it has a reader: `empty` lives, so the first has a writer and will have an end.
        fifos = [os.open(os.path.join(directory, name), flags | os.O_NONBLOCK)
                 for name, flags in ((EMPTY_FROM_GUEST, os.O_RDONLY), (EMPTY_TO_GUEST, os.O_WRONLY))]
    except OSError:
        return kernel                             # `empty` is dead already, and the report tells
    widen_pipe(fifos[0])
    for fifo, descriptor in zip(fifos, (from_guest, to_guest)):
        os.dup2(fifo, descriptor, False)
        os.close(fifo)
    return kernel


def make_wide_pipe() -> Tuple[int, int]:
    reader, writer = os.pipe()
    widen_pipe(writer)
    return reader, writer


def widen_pipe(descriptor: int) -> None:
    try:
        fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass                                      # the user's share of pipe pages is used up: slower, no worse


def close_all_but(keep: Set[int]) -> None:
    """Close the rest, the caller's own descriptors too: who waits for their end must not wait for the guest."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                pass


# --- Relaying -----------------------------------------------------------------------------------------------

class OutputWriter(threading.Thread):
    """Writes one output stream to the caller's descriptor, which may block as long as it likes.

    A thread, because a descriptor that belongs to the caller must not be made non-blocking.
    """

    def __init__(self, session: "Session", kind: int, descriptor: int) -> None:
        super().__init__(daemon=True)
        self._session, self._kind, self._descriptor = session, kind, descriptor
        self._queue: Deque[Optional[bytes]] = collections.deque()
        self._filled = threading.Semaphore(0)
        self.error: Optional[OSError] = None
        self.finished = False

    def put(self, content: Optional[bytes]) -> None:
        self._queue.append(content)
        self._filled.release()

    def run(self) -> None:
        written = 0
        while True:
            self._filled.acquire()
            content = self._queue.popleft()
            if content is None:
                break
            if self.error is None:
                self._write(content)
            written += len(content)
            if written >= ACK_STEP or not self._queue:
                self._session.post(encode_frame(ACK, struct.pack("<BI", self._kind, written)))
                written = 0
        self.finished = True
        self._session.wake()

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest):]
                except BlockingIOError:           # the caller's descriptor is non-blocking, and stays so
                    select.select([], [self._descriptor], [])
        except OSError as error:
            self.error = error
            self._session.post(encode_frame(OUTPUT_CLOSED, bytes([self._kind])))


class InputReader(threading.Thread):
    """Reads the caller's stdin, no further ahead of the command than STDIN_WINDOW bytes."""

    def __init__(self, session: "Session", spool: str) -> None:
        super().__init__(daemon=True)
        self._session, self._spool = session, spool
        self._room = STDIN_WINDOW
        # Of each frame on its way: the bytes of stdin sent with it and before, and its length.
        self._on_line: Deque[Tuple[int, int]] = collections.deque()
        self._line_room = LINE_WINDOW
        self._sent = self._credited = 0
        self._changed = threading.Condition()
        self._stopped = False
        self._names = 0
        self.failure: Optional[Fatal] = None
        try:
            self._start_offset: Optional[int] = os.lseek(0, 0, os.SEEK_CUR)
        except OSError:
            self._start_offset = None             # not a file: what is read is gone

    def credit(self, count: int) -> None:
        with self._changed:
            self._room += count
            self._credited += count
            while self._on_line and self._on_line[0][0] <= self._credited:
                self._line_room += self._on_line.popleft()[1]
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def close_input(self) -> None:
        """The command reads no more: let the writer of a pipe know, as it would on the host."""
        self.stop()
        if self._start_offset is None and not os.isatty(0):
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)

    def restore_offset(self, consumed: int) -> None:
        """Leave a file where the command stopped reading, so that the next reader of a shell loop goes on there."""
        if self._start_offset is not None and self.ident is not None:
            self.stop()
            self.join()
            os.lseek(0, self._start_offset + consumed, os.SEEK_SET)

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTIN])     # a background read then fails with EIO
        try:
            while self._wait_for_room():
                content = self._read()
                if not content:
                    self._session.post(encode_frame(STDIN_EOF))
                    return
                self._send(content)
        except OSError as error:
            self.failure = Fatal("stdin cannot be passed on: " + str(error.strerror),
                                 "is the directory of --tmpdir full?")
            self._session.wake()

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._room >= SPOOL_CHUNK and self._line_room > INLINE_MAX or self._stopped)
            return not self._stopped

    def _read(self) -> bytes:
        """Some bytes, and as many more as are there already: large pieces are cheaper to hand over."""
        pieces = [self._read_some(SPOOL_CHUNK)]
        size = len(pieces[0])
        ready = select.poll()
        ready.register(0, select.POLLIN)
        while pieces[-1] and size < SPOOL_CHUNK and not os.isatty(0) and ready.poll(0):
            pieces.append(self._read_some(SPOOL_CHUNK - size))
            size += len(pieces[-1])
        return b"".join(pieces)                   # an end behind them is read again in the next round

    def _read_some(self, size: int) -> bytes:
        while True:
            try:
                return os.read(0, size)
            except OSError as error:
                if error.errno == errno.EAGAIN:   # the caller's descriptor is non-blocking, and stays so
                    select.select([0], [], [])
                elif error.errno == errno.EIO and os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp():
                    time.sleep(0.5)               # in the background of a terminal; nothing tells when that ends
                else:
                    return b""

    def _send(self, content: bytes) -> None:
        if len(content) <= INLINE_MAX:
            frame = encode_frame(STDIN, content)
        else:
            self._names += 1
            frame = encode_frame(STDIN | SPOOLED, spool(self._spool, "in{}".format(self._names), content))
        with self._changed:
            self._room -= len(content)
            self._line_room -= len(frame)
            self._sent += len(content)
            self._on_line.append((self._sent, len(frame)))
        self._session.post(frame)


def spool(directory: str, name: str, content: bytes) -> bytes:
    with open(os.path.join(directory, name), "wb", buffering=0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) or 0:]
    return name.encode()


class Result(NamedTuple):
    status: int
    failure: Optional[Fatal] = None


class Session:
    """The runner's side of one run: drives the channel from boot to result, one event at a time."""

    def __init__(self, machine: Machine, spec: RunSpec, say: Callable[[str], None]) -> None:
        self._machine, self._spec, self._say = machine, spec, say
        self._received = bytearray()
        self._greeted = self._running = False
        self._outbox: Deque[bytes] = collections.deque()
        self._unsent = b""
        self._console = b""
        self._wakeup, self._to_wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(self._to_wakeup, False)
        self._signals: Deque[int] = collections.deque()
        self._deadlines: Dict[str, float] = {"boot": time.monotonic() + spec.boot_timeout_s}
        if spec.timeout_s is not None:
            self._deadlines["wall"] = time.monotonic() + spec.timeout_s
        self._timed_out = False
        self._report: Optional[str] = None        # the supervisor's, of the kernel's end
        self._channel_open = True
        self._terminating = False                 # one SIGTERM was forwarded
        self._told: Optional[Result] = None       # by the guest; the writers may still be at work
        self._result: Optional[Result] = None
        self._one_output = is_same_file(1, 2)
        self._writers = {kind: OutputWriter(self, kind, descriptor) for kind, descriptor in ((STDOUT, 1), (STDERR, 2))}
        self._reader = InputReader(self, os.path.join(machine.directory, "hostfs/spool"))

    # Called from other threads.

    def post(self, frame: bytes) -> None:
        self._outbox.append(frame)
        self.wake()

    def wake(self) -> None:
        try:
            os.write(self._to_wakeup, b"\0")
        except BlockingIOError:
            pass                                  # it is full, so it wakes

    # The main thread.

    def run(self) -> Result:
        signal.set_wakeup_fd(self._to_wakeup)
        for number in FORWARDED_SIGNALS:
            signal.signal(number, lambda received, frame: self._signals.append(received))
        # By default SIGTSTP does nothing to a process group without a shell, as a batch job's is.
        signal.signal(signal.SIGTSTP, lambda received, frame: os.kill(os.getpid(), signal.SIGSTOP))
        while self._result is None:
            self._step()
        return self._result

    def _step(self) -> None:
        poll = select.poll()
        from_guest, to_guest = self._machine.from_guest, self._machine.to_guest
        poll.register(self._wakeup, select.POLLIN)
        if self._report is None:
            poll.register(self._machine.report, select.POLLIN)
            poll.register(self._machine.console, select.POLLIN)
        if self._channel_open:
            poll.register(from_guest, select.POLLIN)
            if self._outbox or self._unsent:
                poll.register(to_guest, select.POLLOUT)
        left = min(self._deadlines.values(), default=time.monotonic() + 3600) - time.monotonic()
        ready = dict(poll.poll(max(0, left) * 1000))
        if self._wakeup in ready:
            os.read(self._wakeup, 4096)
        while self._signals:
            self._forward_signal(self._signals.popleft())
        if self._machine.console in ready:
            self._take_console()
        if from_guest in ready:
            self._take_frames()
        if to_guest in ready:
            self._send()
        if self._machine.report in ready:
            self._take_report()
        for name in [name for name, due in self._deadlines.items() if due <= time.monotonic()]:
            del self._deadlines[name]
            self._expire(name)
        self._finish_if_done()

    def _send(self) -> None:
        while self._outbox or self._unsent:
            self._unsent = self._unsent or self._outbox.popleft()
            try:
                sent = os.write(self._machine.to_guest, self._unsent)
            except BlockingIOError:
                return
            except BrokenPipeError:               # the guest is gone; the report tells how
                self._outbox.clear()
                self._unsent = b""
                return
            self._unsent = self._unsent[sent:]

    def _take_console(self) -> bool:
        content = os.read(self._machine.console, 65536)
        self._console = (self._console + content)[-CONSOLE_TAIL:]
        if self._spec.verbose:
            write_stderr(content)
        return bool(content)

    def _take_frames(self) -> None:
        content = os.read(self._machine.from_guest, PIPE_SIZE)
        if self._machine.carried and content:
            self._wake_writer()
        self._channel_open = bool(content)
        self._received += content
        if not self._greeted:
            _, magic, rest = self._received.partition(MAGIC)
            if not magic:
                return
            self._greeted = True
            self._received = bytearray(rest)
        try:
            for kind, payload in decode_frames(self._received):
                self._obey(kind, payload)
        except (ValueError, KeyError, struct.error) as error:
            if MAGIC in self._received:
                self._fail("guest rebooted before the command ended", "it ends with the command by itself")
            else:
                self._fail("guest sent what is no message of AppPot ({})".format(error),
                           "did something in the appliance write to /dev/ttyS0?")

    def _wake_writer(self) -> None:
        """Have User-Mode Linux look whether its full pty has room again: the SIGIO of the pty's own comes too early."""
        try:
            os.kill(self._machine.carried, signal.SIGIO)
        except OSError:
            pass                                  # it is dead

    def _obey(self, kind: int, payload: bytes) -> None:
        if kind in (STDOUT, STDERR):
            self._writers[kind].put(payload)
        elif kind == CREDIT:
            self._reader.credit(struct.unpack("<I", payload)[0])
        elif kind == STDIN_CLOSED:
            self._reader.close_input()
        elif kind == HELLO:
            self._greet(decode_fields(payload))
        elif kind == STARTED:
            self._say("command started")
            self._running = True
            self._deadlines.pop("boot", None)
            for writer in self._writers.values():
                writer.start()
            if not is_null(0):
                self._reader.start()
        elif kind == RESULT:
            self._told = self._read_result(decode_fields(payload))
            self._say("result record: status {}".format(self._told.status))
            for writer in self._writers.values():
                writer.put(None)

    def _greet(self, hello: Dict[bytes, List[bytes]]) -> None:
        self._say("agent {} in base {}".format(hello[b"agent"][0].decode(), hello[b"base"][0].decode() or "without id"))
        if hello[b"protocol"] != [b"%d" % PROTOCOL]:
            self._fail("appliance has an agent of protocol {}, this runner speaks {}".format(
                hello[b"protocol"][0].decode(), PROTOCOL), "use the apppot_start.py that belongs to the image")
            return
        job = build_job(self._spec, is_null(0), self._one_output)
        directory = os.path.join(self._machine.directory, "hostfs/spool")
        self.post(encode_frame(JOB | SPOOLED, spool(directory, "job", job)) if len(job) > INLINE_MAX
                  else encode_frame(JOB, job))

    def _read_result(self, fields: Dict[bytes, List[bytes]]) -> Result:
        if b"error" in fields:
            return Result(int(fields[b"status"][0]), Fatal(fields[b"error"][0].decode(), fields[b"hint"][0].decode()))
        self._reader.restore_offset(int(fields[b"stdin"][0]))
        if b"signal" in fields:
            return Result(128 + int(fields[b"signal"][0]))
        return Result(int(fields[b"exit"][0]))

    def _take_report(self) -> None:
        self._report = os.read(self._machine.report, 4096).decode()
        if not self._report:                      # the supervisor is dead: what it would have ended is ours now
            kill_children()
        while self._take_console():               # to its end: nobody is left to write
            pass

    def _explain_end(self) -> Fatal:
        what, _, number = (self._report or "").partition(" ")
        console = self._console.decode("utf-8", "replace")
        if what == "exec":
            return Fatal("kernel cannot be executed, {}: {}".format(os.strerror(int(number)), self._spec.kernel),
                         "is it made for this machine, and are its libraries here? `ldd` tells")
        if what == "empty" and self._greeted:
            return Fatal("`empty`, which carried the channel, was killed", "look for who did, then run the job again")
        if what == "empty":
            return Fatal("`empty` does not start the kernel: {}".format(self._spec.empty),
                         "build it from github.com/mezantrop/empty for this machine; --io builtin does without it")
        if what == "helper":
            return Fatal("a helper process of the kernel was killed", "look for who did, then run the job again")
        if what != "ended":
            return Fatal("the supervisor process of the run was killed", "look for who did, then run the job again")
        return explain_kernel_end(int(number), console, self._spec, self._running)

    def _forward_signal(self, number: int) -> None:
        if not self._running or self._told:       # nothing to forward to: die of it, as any program would
            if number not in self._spec.ignored_signals:
                self._result = Result(128 + number)
            return
        if number == signal.SIGTERM and self._terminating:
            self._expire("kill")
            return
        self.post(encode_frame(SIGNAL, bytes([number])))
        if number == signal.SIGTERM:
            self._terminating = True
            if self._spec.kill_after_s > 0:
                self._deadlines["kill"] = time.monotonic() + self._spec.kill_after_s

    def _expire(self, name: str) -> None:
        if name == "boot":
            self._fail("guest did not start within {:g} s".format(self._spec.boot_timeout_s),
                       "run with -v to see its console; --boot-timeout gives it longer")
        elif name == "wall":
            self._timed_out = True
            if self._running and not self._told:
                self._forward_signal(signal.SIGTERM)
            else:
                self._result = Result(EXIT_TIMEOUT)
        elif name == "kill":
            self._deadlines.pop("kill", None)
            self._deadlines["end"] = time.monotonic() + KILL_GRACE_S
            self.post(encode_frame(SIGNAL, bytes([signal.SIGKILL])))
        elif name == "end":
            self._result = Result(128 + signal.SIGKILL)

    def _fail(self, message: str, hint: str) -> None:
        self._result = Result(EXIT_FAILED, Fatal(message, hint))

    def _finish_if_done(self) -> None:
        if self._report is not None and not self._channel_open and not self._told:
            self._result = Result(EXIT_FAILED, self._explain_end())
        if self._reader.failure:
            self._result = Result(EXIT_FAILED, self._reader.failure)
        if self._told and (not self._running or all(writer.finished for writer in self._writers.values())):
            self._result = self._told
            for writer in self._writers.values():
                if writer.error and writer.error.errno != errno.EPIPE:
                    self._fail("output of the command cannot be written: " + str(writer.error.strerror),
                               "is the disk full that its output goes to?")
        if self._result and self._timed_out and not self._result.failure:
            self._result = Result(EXIT_TIMEOUT, Fatal(
                "walltime of {:g} s is over".format(self._spec.timeout_s or 0), "--timeout sets it"))


def explain_kernel_end(status: int, console: str, spec: RunSpec, running: bool) -> Fatal:
    """Why a kernel ended without a result record, from its wait status and what it printed."""
    panic = re.search(r"Kernel panic - not syncing: (.*)", console)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return Fatal("guest was killed by signal 9", "was the memory that the job asked for used up?")
    if panic and "init failed" in panic.group(1) or "No working init" in console:
        return Fatal("image has no agent ({}): {}".format(AGENT, spec.image), "`make image` builds one with it")
    if panic and "mount root" in panic.group(1):
        return Fatal("guest cannot mount its root file system: " + spec.image,
                     "run with -v to see the guest's console; is the image damaged? `e2fsck -fn` tells")
    if panic:
        return Fatal("guest panicked: " + panic.group(1).strip(), "run with -v to see the guest's console")
    if running:
        return Fatal("guest ended before the command did",
                     "it was powered off or rebooted from inside, or its kernel crashed; -v shows its console")
    how = "signal {}".format(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else "status {}".format(status >> 8)
    return Fatal("kernel ended with {} before the guest was up: {}".format(how, spec.kernel),
                 "is it User-Mode Linux? `{} --version` prints a version; -v shows what it printed".format(
                     shlex.quote(spec.kernel)))


def write_stderr(content: bytes) -> None:
    try:
        os.write(2, content)
    except OSError:
        pass                                      # nobody listens


def is_same_file(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


def is_null(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev


# --- Options ------------------------------------------------------------------------------------------------

class OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Fatal(message, "`{} --help` lists the options".format(self.prog))

    def split(self, words: Sequence[str]) -> Tuple[List[str], Tuple[str, ...]]:
        """The options, and the command from the first word that is none; argparse would read options behind it too."""
        index = 0
        while index < len(words) and words[index].startswith("-") and words[index] != "-":
            if words[index] == "--":
                return list(words[:index]), tuple(words[index + 1:])
            action = self._option_string_actions.get(words[index])
            index += 2 if action and action.nargs != 0 else 1
        return list(words[:index]), tuple(words[index:])


def build_parser() -> OptionParser:
    parser = OptionParser(
        prog="apppot_start.py", add_help=False, allow_abbrev=False,
        usage="apppot_start.py [option...] [command [argument...]]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a command in a Linux appliance (a disk image) under User-Mode Linux, as an ordinary process.\n"
                    "Options end at the first word that is not one. Without a command: ./apppot-run in the job\n"
                    "directory, else ~/apppot-autorun in the appliance, else a login shell.",
        epilog="""\
environment of the command:
  The guest gets the caller's batch-system variables (SLURM_*, SLURMD_*, PBS_*, SGE_*, JOB_*, _CONDOR_*, LSB_*,
  NSLOTS, NHOSTS, NQUEUES, PE, QUEUE, RESTARTED) and OMP_*, TERM, TZ, LANG, LANGUAGE, LC_*; nothing else unless
  --env names it. HOME, USER, LOGNAME, SHELL, PATH and PWD are the guest's.

defaults from the environment:
  APPPOT_KERNEL, APPPOT_IMAGE, APPPOT_EMPTY, APPPOT_MEM, APPPOT_TMPDIR; kernel and image are then looked for beside
  this script (`linux`, `apppot.img`), in the current directory, and the kernel on PATH (`linux`, `linux.uml`).

exit status:
  that of the command, 128+N if signal N killed it; 124 --timeout is over, 125 AppPot failed,
  126 the command cannot be executed, 127 it was not found.""")
    add = parser.add_argument_group("appliance").add_argument
    add("--image", "--apppot", metavar="PATH", help="disk image, or COW:BASE to keep the changes in the file COW")
    add("--kernel", "--linux", "--uml", metavar="PATH", help="User-Mode Linux kernel")
    add("--write", action="store_true", help="boot the image itself read-write instead of a throw-away copy-on-write")
    add("--mem", metavar="NUM", help="memory of the guest in MiB, or with K, M, G, T (default {})".format(DEFAULT_MEM))
    add("--id", "--umid", dest="umid", metavar="NAME", help="name of the guest for the management console (mconsole)")
    add("-X", "--extra", action="append", default=[], metavar="ARG",
        help="one more argument for the kernel command line; repeatable")
    add("--io", choices=("auto", "builtin", "empty"), default="auto", metavar="HOW",
        help="what carries the channel to the guest: builtin, the program empty, or auto (default): that program if\n"
             "it lies beside this script or is named, else builtin")
    add("--empty", metavar="PATH", help="the program empty, which runs another on a pseudo-terminal")
    add = parser.add_argument_group("command").add_argument
    add("--root", action="store_true", help="run the command as the guest's root")
    add("--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="set a variable, or pass the caller's; repeatable")
    add("--clean-env", action="store_true", help="pass no variable but those of --env")
    add("--cwd", metavar="DIR", help="start in DIR of the guest; relative to the job directory (default: that itself)")
    add = parser.add_argument_group("run").add_argument
    add("--timeout", metavar="S", help="end the command after S seconds (s, m, h, d may follow) with status 124")
    add("--boot-timeout", default="120", metavar="S", help="give up a guest that does not start (default 120)")
    add("--kill-after", default="10", metavar="S",
        help="kill a command that lives S seconds after SIGTERM; 0: never (default 10)")
    add("--tmpdir", metavar="DIR", help="temporary files (default: the batch system's, TMPDIR, /tmp, /var/tmp)")
    add("--dry-run", action="store_true", help="check everything, print the kernel's command line, start nothing")
    add = parser.add_argument_group("information").add_argument
    add("-v", "--verbose", action="store_true", help="show the steps and the guest's console on stderr")
    add("-V", "--version", action="store_true", help="print the version")
    add("-h", "--help", action="store_true", help="print this text")
    return parser


def build_spec(options: argparse.Namespace, command: Tuple[str, ...]) -> RunSpec:
    """Decide everything and check all that can be checked before anything is started."""
    directory, alias = find_job_directory()
    image, cow = split_image(find_part(options.image, "APPPOT_IMAGE", IMAGE_NAMES, "image", False))
    if cow and options.write:
        raise Fatal("--write with a COW file: " + cow, "leave out one of the two: a COW file given by name is kept")
    root = find_root_device(image)
    if cow:
        check_cow(cow, image)
    if options.write and not os.access(image, os.W_OK):
        raise Fatal("image is not writable: " + image, "without --write nothing is written")
    kernel = check_kernel(find_part(options.kernel, "APPPOT_KERNEL", KERNEL_NAMES, "kernel", True))
    mem_mib = check_memory(options.mem or os.environ.get("APPPOT_MEM") or DEFAULT_MEM)
    check_limits(mem_mib, os.path.getsize(image))
    candidates = scratch_candidates(options.tmpdir)
    umid = options.umid or "guest"
    if not re.match(r"[\w.-]{1,60}$", umid, re.ASCII) or umid in (".", "..", "hostfs", "cow", "base", "image"):
        raise Fatal("--id is not a name: {!r}".format(umid), "use up to 60 letters, digits and -_.")
    for word in options.extra:
        if not word or re.search(r"\s", word):
            raise Fatal("--extra is not one word: {!r}".format(word), "give --extra once for each argument")
    timeout_s = parse_seconds(options.timeout, "--timeout") if options.timeout else None
    empty, empty_asked = find_empty(options.io, options.empty)
    return RunSpec(
        command=command, kernel=kernel, image=os.path.abspath(image), cow=cow, write=options.write, root=root,
        mem_mib=mem_mib, ram_directory=choose_ram_directory(kernel, candidates, mem_mib),
        scratch=choose_scratch(candidates), umid=umid, extra=tuple(options.extra), empty=empty, empty_asked=empty_asked,
        environment=select_environment(dict(os.environb), options.env, options.clean_env),
        job_directory=directory, job_alias=alias, cwd=os.fsencode(options.cwd or ""), as_root=options.root,
        umask=os.umask(0o077),                    # what the runner makes is nobody else's
        ignored_signals=tuple(n for n in FORWARDED_SIGNALS if signal.getsignal(n) == signal.SIG_IGN),
        timeout_s=timeout_s, boot_timeout_s=parse_seconds(options.boot_timeout, "--boot-timeout"),
        kill_after_s=parse_seconds(options.kill_after, "--kill-after"), verbose=options.verbose)


def split_image(text: str) -> Tuple[str, Optional[str]]:
    """Image and, of COW:BASE, the COW file."""
    if ":" not in text or os.path.exists(text):
        return text, None
    cow, _, base = text.partition(":")
    if not cow or not base:
        raise Fatal("--image is neither a file nor COW:BASE: {!r}".format(text), "name the image file")
    return base, os.path.abspath(cow)


def check_memory(text: str) -> int:
    mem_mib = parse_size_mib(text, "--mem")
    total = total_memory_mib()
    if mem_mib < MEM_MIN_MIB:
        raise Fatal("--mem is too small: " + text, "a guest needs at least {} MiB".format(MEM_MIN_MIB))
    if mem_mib > total:
        raise Fatal("--mem is more than this machine has: {}".format(text), "it has {}".format(format_mib(total)))
    return mem_mib


# --- Main ---------------------------------------------------------------------------------------------------

def open_standard_descriptors() -> None:
    """Put /dev/null where 0, 1 or 2 is closed, before another file takes its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
    # Python has None for a stream that was closed.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def report(fatal: Fatal) -> int:
    def one_line(text: str) -> bytes:
        return text.replace("\n", "\\n").encode("utf-8", "backslashreplace")
    write_stderr(b"apppot: error: %s\napppot: hint: %s\n" % (one_line(fatal.message), one_line(fatal.hint)))
    return fatal.status


def run(spec: RunSpec, started: float) -> Result:
    def say(text: str) -> None:
        if spec.verbose:
            write_stderr("apppot: {:.3f} s: {}\n".format(time.time() - started, text).encode())

    try:
        with ExitStack() as stack:
            locks = [lock_image(spec.image, spec.write)]
            if spec.cow and os.path.exists(spec.cow):          # one that the kernel makes, it locks itself
                locks.append(lock_image(spec.cow, True))
            directory, lock = stack.enter_context(run_directory(spec))
            say("run directory {}, memory {} in {}".format(directory, format_mib(spec.mem_mib), spec.ram_directory))
            machine = stack.enter_context(start_machine(spec, directory, locks + [lock]))
            say("kernel started, the channel is carried by " + (spec.empty or "") if machine.carried else
                "kernel started" + (", without {}, which does not work".format(spec.empty) if spec.empty else ""))
            result = Session(machine, spec, say).run()
        say("nothing left")
        return result
    except OSError as error:
        raise Fatal("{}: {}".format(error.strerror, error.filename or "run directory in " + spec.scratch),
                    "is the directory of --tmpdir full or gone?")


def main(argv: List[str]) -> int:
    started = time.time()
    open_standard_descriptors()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)           # Ctrl-C is no traceback
    try:
        parser = build_parser()
        words, command = parser.split(argv)
        options = parser.parse_args(words)
        if options.help:
            print(parser.format_help(), end="", flush=True)
            return 0
        if options.version:
            print("AppPot " + VERSION, flush=True)
            return 0
        spec = build_spec(options, command)
        if options.dry_run:
            print(" ".join(shlex.quote(word) for word in build_command_line(spec, name_disk(spec, None))), flush=True)
            return 0
        result = run(spec, started)
        if result.failure:
            report(result.failure)
        return result.status
    except Fatal as fatal:
        return report(fatal)
    except OSError as error:
        return report(Fatal("{}: {}".format(error.strerror, error.filename or "standard output"),
                            "look at that file or directory"))


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    os._exit(exit_status)                         # a thread may be blocked in read(0); Python would wait for it
