#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run a command in a Linux appliance, as an ordinary process: no root, no setuid, no namespaces, no KVM.

Usage: python3 apppot_start.py [option...] [command [argument...]]

Constraint: this one file is copied alone to a node, so it imports the standard library only, Python 3.6 or newer.

Four processes make a run: this runner, which relays bytes and signals; a supervisor forked from it, which owns the
User-Mode Linux kernel and cleans up whatever happens to the runner; the kernel itself; and the server of its files.
"""
# An older Python reads no further than the number and prints this line, so its comment is for that user.
__requires_python__ = 0x3_06         # This Python is too old. AppPot needs Python 3.6 or newer: try python3
import _signal  # type: ignore[import-not-found]

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) == _signal.default_int_handler:
    # Ctrl-C is no traceback, nor during the imports; that of the module signal takes a millisecond itself.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import argparse
import binascii
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
import signal
import stat
import struct
import sys
import termios
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Callable,
    Container,
    Deque,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

if TYPE_CHECKING:
    import socket

VERSION = "0.1"
AnyPath = Union[str, bytes]

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

# --- Errors and messages ------------------------------------------------------------------------------------

EXIT_TIMEOUT = 124
EXIT_FAILED = 125
EXIT_NOT_FOUND = 127
TRACE_MAX = 3000                     # bytes of a supervisor's traceback: a pipe takes 4096 at once
CONTROL_CHARACTERS = r"[^\t\n\r\x20-\x7e\xa0-\U0010ffff]"    # compiled when needed: that takes 8 ms


class Fatal(Exception):
    """AppPot cannot go on: `message` names the fault and the object, `hint` says what to do."""

    def __init__(self, message: str, hint: str, status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = status


class Bug(Exception):
    """The supervisor, or a process that it started, had an exception that nobody foresaw."""

    def __init__(self, trace: bytes) -> None:
        super().__init__(trace)
        self.trace = trace


class Misfit(ValueError):
    """What the guest sent is no message of AppPot, or does not fit now.

    Any program of the guest's root can write to the line.
    """


def one_line(text: str) -> bytes:
    """A text of unknown origin as one line, without control sequences for a terminal."""
    def escape(char: str) -> str:
        return char if char.isprintable() else char.encode("unicode_escape").decode()

    return "".join(map(escape, text)).encode()


def show_console(content: bytes) -> bytes:
    """Lines of the guest's console, without control sequences for a terminal."""
    text = content.decode("utf-8", "replace")
    shown = re.sub(CONTROL_CHARACTERS, lambda found: "\\x{:02x}".format(ord(found.group())), text)
    return shown.encode()


def last_line(said: bytes) -> str:
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "without a word"


def write_stderr(content: bytes) -> None:
    try:
        os.write(2, content)
    except OSError:
        pass                                      # stderr was closed, so nobody listens


def warn(text: str) -> None:
    write_stderr(b"apppot: warning: %s\n" % one_line(text))


def report(fatal: Fatal) -> int:
    write_stderr(b"apppot: error: %s\n" % one_line(fatal.message)
                 + b"apppot: hint: %s\n" % one_line(fatal.hint))
    return fatal.status


def write_stdout(text: str) -> None:
    hint = "is the disk full that it goes to, or its reader gone?"
    with blaming("cannot be written", "standard output", hint):
        print(text, end="", flush=True)


@contextmanager
def blaming(what: str, path: AnyPath, hint: str) -> Iterator[None]:
    """Raise an OSError again as a Fatal: `what` says what cannot be done with `path`."""
    try:
        yield
    except OSError as error:
        raise Fatal("{}, {}: {}".format(what, error.strerror or error, os.fsdecode(path)), hint)


def describe_exception() -> bytes:
    """The traceback of the exception that is being handled; the end of it if it is long."""
    import traceback

    error = sys.exc_info()[1]
    if isinstance(error, Bug):
        return error.trace
    return traceback.format_exc().encode("utf-8", "backslashreplace")[-TRACE_MAX:]


def explain_bug(where: str, trace: bytes) -> Fatal:
    """The error below the traceback of an exception that nobody foresaw."""
    what = trace.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return Fatal("bug in {}: {}".format(where, what), "please report it, with the lines above")


def explain_exception(error: Exception) -> Fatal:
    if isinstance(error, OSError) and error.filename:
        message = "{}: {}".format(error.strerror, os.fsdecode(error.filename))
        return Fatal(message, "look at that file or directory")
    trace = describe_exception()
    write_stderr(trace)
    return explain_bug("the supervisor" if isinstance(error, Bug) else "the runner", trace)


# --- Frames and fields --------------------------------------------------------------------------------------

TEXT_MAX = 4096                      # characters of a text from the guest that are shown
# Payloads of frames.
NOTHING, BYTE, COUNT, STREAM_COUNT = map(struct.Struct, ("", "<B", "<I", "<BI"))
SIGNALS_MAX = 64                     # _NSIG, include/uapi/asm-generic/signal.h


def encode_frame(kind: int, payload: bytes = b"") -> bytes:
    return FRAME.pack(kind, len(payload)) + payload


def decode_frames(received: bytearray) -> List[Tuple[int, bytes]]:
    """Take the complete frames off the front of `received`; Misfit if a frame is too long."""
    frames = []
    start = 0
    while len(received) - start >= FRAME.size:
        kind, length = FRAME.unpack_from(received, start)
        if length > FRAME_MAX:
            raise Misfit("a frame of {} bytes".format(length))

        end = start + FRAME.size + length
        if len(received) < end:
            break
        frames.append((kind, bytes(received[start + FRAME.size:end])))
        start = end
    del received[:start]
    return frames


def encode_fields(fields: Iterable[Tuple[bytes, bytes]]) -> bytes:
    """NAME=VALUE records, each ended by NUL. A name may come again. A value holds no NUL."""
    return b"".join(name + b"=" + value + b"\0" for name, value in fields)


def decode_fields(payload: bytes) -> Dict[bytes, List[bytes]]:
    fields: Dict[bytes, List[bytes]] = {}
    for record in payload.split(b"\0")[:-1]:
        name, _, value = record.partition(b"=")
        fields.setdefault(name, []).append(value)
    return fields


def unpack_exactly(layout: struct.Struct, payload: bytes) -> Tuple[int, ...]:
    if len(payload) != layout.size:
        raise Misfit("{} bytes instead of {}".format(len(payload), layout.size))
    return layout.unpack(payload)


def check_range(number: int, least: int, most: int) -> int:
    if not least <= number <= most:
        raise Misfit("{} is not from {} to {}".format(number, least, most))
    return number


def only_field(fields: Dict[bytes, List[bytes]], name: bytes) -> bytes:
    values = fields.get(name, [])
    if len(values) != 1:
        raise Misfit("{} times the field {}".format(len(values), name.decode()))
    return values[0]


def text_field(fields: Dict[bytes, List[bytes]], name: bytes) -> str:
    return only_field(fields, name)[:TEXT_MAX].decode("utf-8", "replace")


def number_field(fields: Dict[bytes, List[bytes]], name: bytes, least: int, most: int) -> int:
    text = only_field(fields, name)
    # int() also takes blanks, signs and a million digits.
    if not re.fullmatch(br"[0-9]{1,18}", text):
        raise Misfit("no number in the field {}".format(name.decode()))
    return check_range(int(text), least, most)


# --- Sizes, times and names ---------------------------------------------------------------------------------

UNSET_HINT = "is a variable in the script unset? leave the option out, or give a value"


def is_blank(text: str) -> bool:
    return not text.strip()


class Given(NamedTuple):
    """What the user asked for, and how: by an option or by a variable."""
    text: str
    by: str


def find_given(option: Optional[str], name: str) -> Optional[Given]:
    """What --NAME says, or else the variable APPPOT_NAME. An empty variable counts as not set."""
    variable = "APPPOT_" + name.upper()
    text = os.environ.get(variable, "")
    if option is not None:
        return Given(option, "--" + name)
    if not text:
        return None

    if is_blank(text):
        hint = "unset the variable, or give it a value"
        raise Fatal("{} has no value: {!r}".format(variable, text), hint)
    return Given(text, variable)


def parse_size_mib(text: str, what: str) -> int:
    """MiB in "512", "512M", "1.5G" or "2TiB". As with the original AppPot a bare number is MiB."""
    pattern = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(?:i?B)?$"
    match = re.match(pattern, text.strip(), re.IGNORECASE | re.ASCII)
    if not match:
        hint = "give a number of MiB or a size such as 512M or 2G"
        raise Fatal("{} is not a size: {!r}".format(what, text), hint)
    factor = {"K": 1 / 1024.0, "": 1, "M": 1, "G": 1024, "T": 1024 ** 2}[match.group(2).upper()]
    return int(float(match.group(1)) * factor)


def parse_seconds(text: str, what: str, has_none: bool = False) -> float:
    """Seconds in "90", "1.5", "10m", "2h" or "1d", as timeout(1) takes them.

    With `has_none` 0 is allowed.
    """
    match = re.match(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)$", text.strip(), re.ASCII)
    if not match:
        hint = "give seconds, or a number with s, m, h or d"
        raise Fatal("{} is not a time: {!r}".format(what, text), hint)

    factor = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match.group(2)]
    seconds = float(match.group(1)) * factor
    if not seconds and not has_none:
        hint = "leave the option out, or give a time"
        raise Fatal("{} is over at once: {!r}".format(what, text), hint)
    return seconds


def format_mib(mib: float) -> str:
    return "{:.1f} GiB".format(mib / 1024) if mib >= 1024 else "{:.0f} MiB".format(mib)


def is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def unique_name(prefix: str) -> str:
    return "{}{}-{}".format(prefix, os.getuid(), os.urandom(6).hex())


# --- Processes ----------------------------------------------------------------------------------------------

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
FORWARDED_SIGNALS = tuple(getattr(signal, name) for name in (
    "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"))
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
# Programs that leave SIGPIPE to their children as they have it themselves; from /proc/PID/status.
SHELLS = re.compile(r"Name:\t(?:[a-z]*sh\d*|busybox|timeout|time|strace|make|xargs|perl)\n")
# A batch system may signal every process of a job. The kernel would die of these signals, and a
# guest process that gets one makes its tracer panic: SIGCONT, too, is reported to a tracer. So they
# are blocked before exec.
KEPT_FROM_KERNEL = (
    *FORWARDED_SIGNALS, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT, signal.SIGXFSZ)
LOOK_FOR_KILLER = "find out what killed it (the batch system's log, dmesg), then run the job again"
PROCESSES_HINT = "raise the limit of processes (ulimit -u, or pids.max of the cgroup), or of memory"
MORE_CPU_TIME = "ask the batch system for more CPU time, or raise the limit"
# What a process of the guest has as one of the host would. Not the numbers of processes and of
# signals: the host counts all of the caller's.
PASSED_LIMITS = tuple(getattr(resource, "RLIMIT_" + name) for name in (
    "CPU", "FSIZE", "DATA", "STACK", "CORE", "NOFILE", "MEMLOCK", "AS"))
RAISED_LIMITS = tuple(getattr(resource, "RLIMIT_" + name) for name in (
    "AS", "CPU", "DATA", "FSIZE", "NOFILE", "NPROC", "SIGPENDING"))
PIPE_SIZE = 1 << 20                  # F_SETPIPE_SZ: the most an unprivileged process may ask for
F_SETPIPE_SZ = 1031                  # include/uapi/linux/fcntl.h; in Python's fcntl from 3.10 only
HELPER_ANSWER_S = 10.0               # for a helper to start, or to say what it is


class Limit(NamedTuple):
    """A resource limit of the caller."""
    number: int                      # as of setrlimit(2)
    soft: int                        # RLIM_INFINITY is -1
    hard: int


class Ancestor(NamedTuple):
    """A process above the runner."""
    pid: int
    name: str


class ProcessStat(NamedTuple):
    """Of /proc/PID/stat (proc(5)), times in ticks."""
    state: str                       # a letter
    parent: int
    ran: int                         # by itself and in the kernel
    started: int                     # after the boot
    processor: int                   # the CPU that it was on last


NO_PROCESS = ProcessStat("", 0, 0, -1, -1)


@contextmanager
def signals_held() -> Iterator[Set[int]]:
    """Keep signals from ending this process while it has files to remove; yield the mask before.

    Those that come are dealt with at the end of the context, or when Session.run() lets them in.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_FROM_KERNEL)
    handlers = {number: signal.getsignal(number) for number in KEPT_FROM_KERNEL}
    try:
        yield {int(number) for number in mask}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@lru_cache(maxsize=None)
def open_libc() -> Any:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def call_libc(name: str, *arguments: Union[int, bytes, None]) -> int:
    """Call what the standard library does not offer; ImportError if this Python has no ctypes."""
    import ctypes

    libc = open_libc()
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result = int(getattr(libc, name)(*words))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, "{}: {}".format(name, os.strerror(number)))
    return result


def try_libc(name: str, *arguments: Union[int, bytes, None]) -> bool:
    """Call what a run can do without; whether it was possible. Each C library has functions of its own."""
    try:
        call_libc(name, *arguments)
    except (ImportError, AttributeError, OSError):
        return False
    return True


def fork(what: str) -> int:
    try:
        return os.fork()
    except OSError as error:
        what = "process for {} cannot be started: {}".format(what, error.strerror)
        raise Fatal(what, PROCESSES_HINT)


def fork_child(what: str, live: Callable[[], int]) -> int:
    """Fork a process that does nothing but `live`, which returns its exit status; the pid."""
    pid = fork(what)
    if pid == 0:
        status = EXIT_FAILED
        try:
            status = live()
        finally:
            os._exit(status)
    return pid


def try_in_child(attempt: Callable[[], None]) -> str:
    """Why `attempt` fails in a process of its own; empty if it does not."""
    def live() -> int:
        try:
            attempt()
        except OSError as error:
            return error.errno or errno.EPERM
        except Fatal:                             # it starts a process itself
            return errno.EAGAIN
        except ImportError:                       # a Python without ctypes cannot try
            pass
        return 0

    status = os.waitpid(fork_child("a trial", live), 0)[1]
    if os.WIFSIGNALED(status):
        return "signal {}".format(os.WTERMSIG(status))
    return os.strerror(status >> 8) if status else ""


def execute(argv: Sequence[str], keep: Dict[int, int], environment: Dict[str, str]) -> NoReturn:
    """Execute a program in a forked child, with the descriptors `keep` (there to here).

    If that fails, the reason goes to descriptor 2.
    """
    try:
        for there, here in keep.items():
            os.dup2(here, there)
        os.execve(argv[0], list(argv), environment)
    except OSError as error:
        os.write(2, "{}\n".format(error.strerror).encode())
    finally:
        os._exit(EXIT_FAILED)


def ask_program(argv: Sequence[str], **more_environment: str) -> Tuple[int, bytes]:
    """Wait status of a program and what it wrote. (subprocess costs 15 ms to import.)"""
    reader, writer = os.pipe()

    def live() -> int:
        null = os.open(os.devnull, os.O_RDWR)
        environment = dict(os.environ, HOME="/", **more_environment)
        execute(argv, {0: null, 1: writer, 2: writer}, environment)

    pid = fork_child("a look at " + argv[0], live)
    os.close(writer)
    said = b""
    deadline = time.monotonic() + HELPER_ANSWER_S
    while len(said) < FRAME_MAX:
        left_s = max(0, deadline - time.monotonic())
        ready = select.select([reader], [], [], left_s)[0]
        piece = os.read(reader, 65536) if ready else b""
        if not piece:
            break
        said += piece

    os.close(reader)
    os.kill(pid, signal.SIGKILL)  # it has said all, or it hangs, or it does not stop
    return os.waitpid(pid, 0)[1], said


def read_node_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(1 << 20)
    except (OSError, ValueError):                 # ValueError: a NUL in a path of somebody's making
        return ""


def list_children(pid: int, thread: int = 0) -> List[int]:
    """The children of a process that one of its threads has started, by default the first."""
    try:
        with open("/proc/{}/task/{}/children".format(pid, thread or pid)) as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN, or it has ended
        every = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [child for child in every if read_stat(child).parent == pid]


def read_stat(pid: int) -> ProcessStat:
    try:
        with open("/proc/{}/stat".format(pid), "rb") as file:
            words = file.read().rpartition(b")")[2].split()
        numbers = [int(words[index]) for index in (1, 11, 12, 19, 36)]
        parent, user, system, started, processor = numbers
        return ProcessStat(words[0].decode(), parent, user + system, started, processor)
    except (OSError, IndexError):                 # it has ended
        return NO_PROCESS


def read_start(pid: int) -> int:
    """When a process started; -1 if it has ended."""
    process = read_stat(pid)
    return -1 if process.state in ("Z", "X") else process.started


def read_name(pid: int) -> bytes:
    try:
        with open("/proc/{}/comm".format(pid), "rb") as file:
            return file.read()
    except OSError:
        return b""


def is_called(pid: int, name: str) -> bool:
    """Whether a living process runs the program or, as its second word, the script of that name."""
    try:
        with open("/proc/{}/cmdline".format(pid), "rb") as file:
            words = file.read().split(b"\0")[:2]
        return os.fsencode(name) in [os.path.basename(word) for word in words]
    except OSError:
        return False


def find_ancestor(name: str) -> Optional[Ancestor]:
    """The nearest process above this one that is called so, if there is one."""
    pid = os.getppid()
    while pid > 1:
        if is_called(pid, name):
            return Ancestor(pid, name)
        pid = read_stat(pid).parent
    return None


def read_times(task: int) -> Tuple[float, float]:
    """Seconds that a thread has run and has waited for a CPU; 0 if the host does not count."""
    try:
        with open("/proc/{}/schedstat".format(task), "rb") as file:
            ran, waited = file.read().split()[:2]
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(ran) / 1e9, int(waited) / 1e9


def read_idle_times() -> Dict[int, float]:
    """Seconds that each CPU of the host had nothing to run."""
    with open("/proc/stat", "rb") as file:
        lines = [line.split() for line in file if line.startswith(b"cpu")][1:]
    tick = os.sysconf("SC_CLK_TCK")
    return {int(words[0][3:]): (int(words[4]) + int(words[5])) / tick for words in lines}


def list_tasks(kernel: int) -> Iterator[int]:
    """The kernel's threads, and then their child processes: one for each guest process."""
    try:
        threads = [int(name) for name in os.listdir("/proc/{}/task".format(kernel))]
    except OSError:
        return
    yield from threads
    for thread in threads:
        yield from list_children(kernel, thread)


def kill_children(spared: Container[int] = ()) -> None:
    """Kill and reap all children but some.

    We are the subreaper, so their orphans become our children in turn.
    """
    pids = [0]
    while pids:
        pids = [pid for pid in list_children(os.getpid()) if pid not in spared]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def forbid_core() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def tie_to_us(leash: int, owner: int) -> None:
    """Make the host's kernel kill a process, or the process group -owner, when we are gone.

    PR_SET_PDEATHSIG does not reach grandchildren, such as the guest's processes, which go on to
    compute when nobody traces them any more. `leash` is the read end of a pipe: they hold it open,
    too, and we alone have the write end.
    """
    fcntl.fcntl(leash, fcntl.F_SETOWN, owner)
    fcntl.fcntl(leash, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(leash, fcntl.F_SETFL, os.O_ASYNC)
    os.close(leash)


def close_all_but(keep: Set[int]) -> None:
    """Close all others, so that nobody who waits for their end waits for the guest."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                pass


def make_wide_pipe() -> Tuple[int, int]:
    reader, writer = os.pipe()
    widen_pipe(writer)
    return reader, writer


def widen_pipe(descriptor: int) -> None:
    try:
        fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass  # the user's pipe pages are used up: this is slower


def take_limits() -> Tuple[Limit, ...]:
    """Return the caller's limits, for the command, and raise the soft ones for AppPot itself.

    The kernel would die of some. The last second of CPU time is kept, so that SIGXCPU tells the runner
    what comes.
    """
    limits = tuple(Limit(number, *resource.getrlimit(number)) for number in PASSED_LIMITS)

    for which in RAISED_LIMITS:
        hard = resource.getrlimit(which)[1]
        has_rest = which == resource.RLIMIT_CPU and hard > 1
        resource.setrlimit(which, (hard - 1 if has_rest else hard, hard))
    return limits


def count_own_threads() -> int:
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit():
                tasks = os.stat("/proc/{}/task".format(name))
                count += tasks.st_nlink - 2 if tasks.st_uid == os.getuid() else 0
        except OSError:
            pass                                  # it has ended meanwhile
    return count


def blame_cpu_limit(pid: int, who: str) -> Optional[Fatal]:
    """What to say if a process has come near its limit of CPU time.

    One that is dead but not reaped still tells.

    Linux ends a process for the ticks that it has met; on a busy machine it has used far less time.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    used_s = read_stat(pid).ran / os.sysconf("SC_CLK_TCK")
    if soft == resource.RLIM_INFINITY or used_s < soft / 2:
        return None
    what = "{} has ended with {:.1f} s of CPU time used; the limit (ulimit -t) is {} s"
    return Fatal(what.format(who, used_s, hard), MORE_CPU_TIME)


# --- Files --------------------------------------------------------------------------------------------------

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
PROBE_BYTES = 1 << 20                # to see whether a directory has room
# include/uapi/asm-generic/fcntl.h: struct flock; its pid is 0 for a lock of an open file
# description.
F_OFD_SETLK, FLOCK = 37, struct.Struct("@hhqqi4x")
SCRATCH_HINT = "is the directory of --tmpdir full or gone?"
PT_INTERP = 3                                                  # include/uapi/linux/elf.h
FILE_KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"), (stat.S_ISCHR, "a character device"))


def name_kind(path: AnyPath) -> str:
    """What a path leads to if that is no regular file, else nothing."""
    mode = os.stat(path).st_mode
    return next((name for is_kind, name in FILE_KINDS if is_kind(mode)), "")


@contextmanager
def open_regular(path: str, what: str, hint: str) -> Iterator[BinaryIO]:
    """Read what is to be a regular file; to open a FIFO would take until somebody writes to it.

    A file that can be opened can still fail to be read: a stale handle of NFS, a bad block.
    """
    with blaming(what + " cannot be read", path, hint):
        kind = name_kind(path)
        if kind:
            raise Fatal("{} is {}: {}".format(what, kind, path), hint)
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            yield file


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset >= 1 << 62:                         # a damaged table; seek() would raise
        return b""
    try:
        file.seek(offset)
    except OSError:                               # the same, for a file system with smaller files
        return b""
    return file.read(size)


def make_executable(path: str) -> bool:
    if not os.access(path, os.X_OK):
        try:
            os.chmod(path, os.stat(path).st_mode | 0o100)
        except OSError:
            pass
    return os.access(path, os.X_OK)


def read_loader(kernel: str) -> str:
    """The dynamic loader of an executable (elf(5), PT_INTERP); empty if it is linked statically."""
    with open(kernel, "rb") as file:
        header = read_at(file, 0, 64)
        start, = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        for index in range(count):
            entry = read_at(file, start + index * size, 56)
            kind, offset, length = struct.unpack_from("<I4xQ16xQ", entry)
            if kind == PT_INTERP:
                return os.fsdecode(read_at(file, offset, min(length, 4096)).rstrip(b"\0"))
    return ""


def list_libraries(program: str) -> List[str]:
    """The dynamic loader of a program and the files that it opens."""
    loader = read_loader(program)
    if not loader:
        return []                                 # linked statically
    said = ask_program([program], LD_TRACE_LOADED_OBJECTS="1")[1]
    return [loader] + re.findall(r"(/\S.*) \(0x", os.fsdecode(said))


def open_own(name: str, directory: int, uid: Optional[int] = None) -> int:
    """Open a file of `uid`, or of the directory's owner, for reading.

    Somebody may have put something else there that leads away, or waits.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=directory)
    status = os.fstat(descriptor)
    owner = os.fstat(directory).st_uid if uid is None else uid
    if not stat.S_ISREG(status.st_mode) or status.st_uid != owner:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", name)
    return descriptor


def open_fifo(name: str, flags: int, directory: int) -> int:
    """Open what `empty` has made, and nothing that the guest has put in its place."""
    flags |= os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=directory)
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no FIFO", name)
    return descriptor


def remove_entry(name: str, directory: int) -> bool:
    """Remove a file or an empty directory; whether it is gone."""
    for remove in (os.unlink, os.rmdir):
        try:
            remove(name, dir_fd=directory)
            return True
        except FileNotFoundError:
            return True
        except OSError:
            pass
    return False


def open_place(path: bytes) -> int:
    """Go to a directory by its absolute path, in which there is to be no link."""
    place = os.open("/", os.O_PATH | DIRECTORY)
    for name in filter(None, path.split(b"/")):
        place = go_below(name, place)
    return place


def go_below(name: bytes, place: int) -> int:
    """From one directory, which is closed, to one in it."""
    try:
        return os.open(name, os.O_PATH | DIRECTORY, dir_fd=place)
    finally:
        os.close(place)


def spool(directory: int, content: bytes) -> bytes:
    """Write a file for the guest.

    The guest can write that directory, so nobody can foresee the file's name.
    """
    name = os.urandom(8).hex()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=directory), "wb", buffering=0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) or 0:]
    return name.encode()


def lock_directory(directory: int) -> Optional[bool]:
    """Whether the lock is ours now; None if there are none, as on Lustre without `-o flock`."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                               # ENOSYS, ENOLCK, EOPNOTSUPP
        return None
    return True


def free_mib(directory: str) -> float:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize / 1048576


def find_fault_for_files(directory: str) -> int:
    """ENOSPC or EDQUOT where a directory takes no further MiB; 0 if it does, or nobody can tell."""
    path = os.path.join(directory, unique_name(".apppot-probe-"))
    fault = 0
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.unlink(path)
            os.posix_fallocate(descriptor, 0, PROBE_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        fault = error.errno or 0
    if fault in (errno.ENOSPC, errno.EDQUOT):
        return fault
    try:
        return errno.ENOSPC if free_mib(directory) < 1 else 0
    except OSError:
        return 0


def explain_full(what: str, directory: str, hint: str) -> Optional[Fatal]:
    """The error of a directory in which nothing more can be written; None if it has room."""
    fault = find_fault_for_files(directory)
    if not fault:
        return None
    how = "is full" if fault == errno.ENOSPC else "has used up its quota"
    free = format_mib(free_mib(directory))
    return Fatal("{} {}: {}, which has {} free".format(what, how, directory, free), hint)


def explain_full_scratch(directory: str) -> Optional[Fatal]:
    return explain_full("scratch", directory, "it takes what the guest writes to its disk and what waits on stdin; "
                        "--tmpdir names another directory")


def open_nameless(directory: str) -> int:
    """A new file without a name.

    A kill leaves nothing of it, if the file system can make such files.
    """
    try:
        return os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
    path = os.path.join(directory, unique_name(".apppot-probe-"))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return descriptor


def lock_file(descriptor: int, exclusive: bool, what: str, path: str) -> None:
    """Lock a file against runs that write it, or against all others.

    An open file description lock: an exclusive one wants write permission. With flock(2) anybody
    who can read an image could keep everybody from running it.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(descriptor, F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return  # the file system has no locks: there is no promise
        holder = find_lock_holder(os.fstat(descriptor))
        os.close(descriptor)
        raise Fatal("{} is in use by {}: {}".format(what, holder, path),
                    "who writes it wants it alone: wait, or give each run changes of its own, "
                    "--image COW:IMAGE" if exclusive else "a run is writing it: wait, or use a copy")


def find_lock_holder(locked: os.stat_result) -> str:
    """Who holds a lock, by /proc/PID/fdinfo of the same user's processes. /proc/locks names no process.

    All processes of a run hold the lock. The one that started first is the runner, whatever its
    number is.
    """
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    for pid in sorted(pids, key=read_start):
        place = "/proc/{}/fd".format(pid)
        try:
            for name in os.listdir(place):
                if os.path.samestat(os.stat(os.path.join(place, name)), locked) \
                        and "lock:" in read_node_file("{}info/{}".format(place, name)):
                    return "process {}".format(pid)
        except OSError:                           # another user's, or it has ended
            pass
    return "another run"


def user_name(uid: int) -> bytes:
    try:
        return os.fsencode(pwd.getpwuid(uid).pw_name)
    except KeyError:  # batch systems run jobs of accounts that the node lacks
        return b"u%d" % uid


def group_name(gid: int) -> bytes:
    try:
        return os.fsencode(grp.getgrgid(gid).gr_name)
    except KeyError:
        return b"g%d" % gid


# --- Parts of AppPot ----------------------------------------------------------------------------------------

def find_part(option: Optional[str], names: Sequence[str], what: str, on_path: bool) -> str:
    """What the user names, else the first beside this script, in build/ there, here or on PATH."""
    given = find_given(option, what)
    if given:
        return given.text
    for path in list_candidates(names, on_path):
        return path

    script = os.path.basename(__file__)
    hint = "put `{}` beside {}, or name it with --{} or APPPOT_{}"
    hint = hint.format(names[0], script, what, what.upper())
    if what != "empty":
        hint = "`make demo` brings one to AppPot's source directory; or " + hint
    raise Fatal("no {} found".format(what), hint)


def list_candidates(names: Sequence[str], on_path: bool) -> Iterator[str]:
    # The script may be called by a link, as `make install` makes one in bin/.
    beside = [os.path.dirname(follow(__file__)) for follow in (os.path.abspath, os.path.realpath)]
    places = [*beside, os.path.join(beside[1], "build"), os.curdir]
    if on_path:
        places += os.environ.get("PATH", os.defpath).split(os.pathsep)

    for place in places:
        for name in names:
            path = os.path.join(place or ".", name)
            if os.path.isfile(path):
                yield path


# --- Landlock -----------------------------------------------------------------------------------------------

# include/uapi/linux/landlock.h; the numbers of the system calls are the same on every machine.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_CREATE_RULESET_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1
LANDLOCK_ABI_MIN, LANDLOCK_ABI_TRUNCATE = 2, 3  # ABI 1 forbids every rename to another directory
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
READ_ONLY, READ_WRITE = READ_FILE | READ_DIR, (1 << 15) - 1 - EXECUTE
Rule = Tuple[AnyPath, int]           # a file or a directory with all below it, and the rights to it
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the rights that a rule for a file can have


def find_landlock() -> int:
    """The version of this machine's Landlock; 0 if it has none, or a useless one."""
    what = LANDLOCK_CREATE_RULESET_VERSION
    try:
        abi = call_libc("syscall", LANDLOCK_CREATE_RULESET, None, 0, what)
    except (ImportError, OSError):
        return 0
    return abi if abi >= LANDLOCK_ABI_MIN else 0


def is_confined(empty: Optional[str]) -> bool:
    """Whether Landlock confines the kernel.

    If `empty` is a script, its interpreter opens files of any place.
    """
    if empty:
        with open(empty, "rb") as file:
            if file.read(4) != b"\x7fELF":
                return False
    return find_landlock() > 0


def describe_confinement(empty: Optional[str]) -> str:
    by = "Landlock" if is_confined(empty) else "the guest's agent, as there is no Landlock"
    return "kernel is confined by " + by


def list_program_rules(program: str) -> List[Rule]:
    """To execute a program, with its libraries."""
    with blaming("program cannot be read", program, "is it still there?"):
        libraries = list_libraries(program)
    return [(path, READ_FILE | EXECUTE) for path in (program, *libraries)]


def confine(rules: Iterable[Rule]) -> None:
    """Leave to this process, and to what it starts, only the files of `rules` and their rights."""
    known = EXECUTE | READ_WRITE
    if find_landlock() < LANDLOCK_ABI_TRUNCATE:
        known &= ~TRUNCATE
    ruleset = call_libc("syscall", LANDLOCK_CREATE_RULESET, struct.pack("Q", known), 8, 0)
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:                 # then there is nothing to open
            continue

        meant = known if stat.S_ISDIR(os.fstat(descriptor).st_mode) else known & OF_FILES
        # A file of a kind that has no rules stays closed.
        try_libc("syscall", LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH,
                 struct.pack("=Qi", rights & meant, descriptor), 0)
        os.close(descriptor)

    call_libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call_libc("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)


# --- The terminal -------------------------------------------------------------------------------------------

ERASE_TO_END = b"\33[K"              # of the line: ECMA-48, EL
MIB = 1 << 20
LEFT_AFTER_S = 1.0                   # of a work its end can be told
COST_OF_FILE = 32 << 10              # bytes that take as long as to make a file
WINDOW_SIZE = struct.Struct("4H")    # struct winsize: rows, columns, width and height in pixels


class Stdio(NamedTuple):
    """What the command gets as standard descriptors."""
    kinds: bytes                     # of each "n"ull, "p"ipe, "t"erminal or "s"ame as stdout
    terminal: Optional["Terminal"]
    at_once: bool                    # it gets the terminal when it starts, not when it reads


def encode_modes(attributes: List[Any]) -> bytes:
    """Encode what termios.tcgetattr() returns. It returns some of the characters as numbers."""
    *flags, characters = attributes
    return TERMINAL_MODES.pack(
        *flags, b"".join(char if isinstance(char, bytes) else bytes([char]) for char in characters))


def decode_modes(modes: bytes) -> List[Any]:
    *flags, characters = TERMINAL_MODES.unpack(modes)
    return [*flags, [bytes([c]) for c in characters]]


def is_null(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev


class Terminal:
    """The caller's terminal: raw as long as the command has it, and otherwise as it was.

    With -t and without a terminal, stdin and stdout take its place, whatever they are.
    """

    def __init__(self, input_fd: int, output_fd: int, shares_output: bool = False) -> None:
        # In the supervisor the caller's own numbers lead elsewhere.
        self.input = fcntl.fcntl(input_fd, fcntl.F_DUPFD_CLOEXEC, 3)
        self.output = fcntl.fcntl(output_fd, fcntl.F_DUPFD_CLOEXEC, 3)
        self.is_real = os.isatty(input_fd)
        self._shares_output = shares_output       # with other programs of a pipeline
        # Whether the terminal is raw, and its modes before that. The supervisor shares this
        # memory: it puts the terminal in order if the runner is killed.
        self._state = mmap.mmap(-1, 1 + TERMINAL_MODES.size)

    @property
    def is_raw(self) -> bool:
        return self._state[:1] == b"r"

    @property
    def ends_lines(self) -> bool:
        """Whether the terminal itself makes carriage return and line feed of a line feed."""
        return self.is_real and (self._shares_output or not self.is_raw)

    @property
    def modes(self) -> bytes:
        try:
            return encode_modes(termios.tcgetattr(self.input)) if self.is_real else b""
        except termios.error:                     # the terminal was hung up
            return b""

    @property
    def window(self) -> bytes:
        try:
            if self.is_real:
                return fcntl.ioctl(self.input, termios.TIOCGWINSZ, bytes(WINDOW_SIZE.size))
        except OSError:                           # the terminal was hung up
            pass
        return WINDOW_SIZE.pack(24, 80, 0, 0)

    def is_ours(self) -> bool:
        """Whether this process is in the terminal's foreground, or no shell decides about that."""
        try:
            return os.tcgetpgrp(self.input) == os.getpgrp()
        except OSError:
            return True

    def acquire(self) -> None:
        """Make the terminal raw. In the background this stops the process until `fg`."""
        import tty

        if self.is_real:
            if not self.is_raw:
                self._state[1:] = encode_modes(termios.tcgetattr(self.input))
            tty.setraw(self.input, termios.TCSANOW)

            if self._shares_output:
                raw = termios.tcgetattr(self.input)
                raw[1] |= termios.OPOST
                termios.tcsetattr(self.input, termios.TCSANOW, raw)
            self._state[:1] = b"r"

    def release(self) -> None:
        if self.is_raw:
            try:
                termios.tcsetattr(self.input, termios.TCSANOW, decode_modes(self._state[1:]))
            except termios.error:                 # the terminal is gone
                pass
            self._state[:1] = b"-"


def find_open_for(not_only: int, on_terminal: Sequence[bool]) -> int:
    """The first of 0, 1, 2 that is the terminal and can be read or written.

    `> /dev/tty` opens the terminal for writing only.
    """
    for number in (0, 1, 2):
        if on_terminal[number] and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != not_only:
            return number
    with blaming("terminal cannot be opened", "/dev/tty", "-T runs the command without one"):
        return os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)


def find_controlling_terminal() -> Optional[Terminal]:
    """The terminal that a program opens as /dev/tty, say to ask for a password."""
    try:
        descriptor = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return None
    return Terminal(descriptor, descriptor, True)


def find_terminal(choice: Optional[bool], on_terminal: Sequence[bool]) -> Optional[Terminal]:
    if choice:
        return Terminal(0, 1)
    if any(on_terminal):
        readable = find_open_for(os.O_WRONLY, on_terminal)
        writable = find_open_for(os.O_RDONLY, on_terminal)
        return Terminal(readable, writable, not on_terminal[1])
    return None if choice is False else find_controlling_terminal()


@contextmanager
def connect_stdio(choice: Optional[bool]) -> Iterator[Stdio]:
    """Decide what 0, 1 and 2 of the command are; leave the terminal as it was found."""
    on_terminal = [choice is not False and os.isatty(descriptor) for descriptor in (0, 1, 2)]
    terminal = find_terminal(choice, on_terminal)
    kinds = b"ttt" if choice else b"".join(b"t" if yes else b"p" for yes in on_terminal)
    if kinds[:1] == b"p" and is_null(0):
        kinds = b"n" + kinds[1:]
    if kinds[1:] == b"pp" and os.path.sameopenfile(1, 2):
        kinds = kinds[:2] + b"s"

    # If stdout leads elsewhere, another program of the pipeline may want the keyboard: less, say.
    at_once = bool(choice) or (on_terminal[1] and terminal is not None and terminal.is_ours())
    try:
        yield Stdio(kinds, terminal, at_once)
    finally:
        if terminal:
            terminal.release()


class Reporter:
    """Messages to the user on stderr, which may be a terminal that is raw."""

    def __init__(self, terminal: Optional[Terminal], verbose: bool, quiet: bool, started: float) -> None:
        self._terminal = terminal
        self._verbose = verbose
        self._started = started                   # as of time()
        # Nobody watches a batch job, and a line that is written over and over would fill its log.
        self.is_watched = os.isatty(2) and not quiet
        self.shows_progress = self.is_watched and not verbose and os.environ.get("TERM", "dumb") != "dumb"
        self._has_line = False                    # of progress, where the cursor is

    def show(self, content: bytes) -> None:
        self.clear()
        needs_return = self._terminal and self._terminal.is_raw and not self._terminal.ends_lines
        write_stderr(content.replace(b"\n", b"\r\n") if needs_return else content)

    def tell(self, text: str) -> None:
        self.show(b"apppot: " + one_line(text) + b"\n")

    def warn(self, text: str) -> None:
        self.tell("warning: " + text)

    def say(self, text: str) -> None:
        """A step of the run, for -v."""
        if self._verbose:
            self.tell("{:.3f} s: {}".format(time.time() - self._started, text))

    def show_progress(self, text: str) -> None:
        """Write a line over the one before."""
        if not self.shows_progress or not is_foreground(2):
            return
        columns = WINDOW_SIZE.unpack(fcntl.ioctl(2, termios.TIOCGWINSZ, bytes(WINDOW_SIZE.size)))[1] or 80
        line = one_line("apppot: " + text)[:columns - 1]
        write_stderr(b"\r" + line + ERASE_TO_END)
        self._has_line = True

    def clear(self) -> None:
        """Erase the line of progress."""
        if self._has_line:
            write_stderr(b"\r" + ERASE_TO_END)
            self._has_line = False


def is_foreground(descriptor: int) -> bool:
    """Whether what this process writes to a terminal is what its user waits for."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False


class Progress:
    """Makes a line of what the guest says about a long work."""

    def __init__(self) -> None:
        self._work = -1                           # a number of WORKS
        self._began = 0.0                         # as of monotonic()

    def describe(self, work: int, counts: Sequence[int], path: str) -> str:
        """`counts` are files and bytes, and how many there are in all; 0 is not known."""
        now = time.monotonic()
        if work != self._work:
            self._work = work
            self._began = now
        count, size, all_count, all_size = counts
        text = "{} {}: {}".format(WORKS[work], path, count) if path else "{}: {}".format(WORKS[work], count)
        text += " of {} files".format(all_count) if all_count else " files"
        if size or all_size:
            text += ", {:.1f}".format(size / MIB) + (" of {:.1f} MiB".format(all_size / MIB) if all_size else " MiB")

        took_s = now - self._began
        done = size + count * COST_OF_FILE
        all_done = all_size + all_count * COST_OF_FILE
        if all_size and done and took_s > LEFT_AFTER_S:
            text += ", {:.0f} s left".format(took_s * max(all_done - done, 0) / done)
        return text


# --- Images -------------------------------------------------------------------------------------------------

AGENT, AGENT_MODULE = "/sbin/apppot-init", "/usr/lib/apppot/apppot_init.py"
IMAGE_NAMES = ("apppot.img",)
IMAGE_HINT = "--image names a file that is a disk image and that you may read; dd makes one of a device"
EXT_MAGIC, EXT_64BIT = 0xEF53, 0x80                            # fs/ext4/ext4.h
EXT_EXTENTS, EXTENT_MAGIC = 0x80000, 0xF30A
# A journal to replay, meta_bg, inline data, encryption.
EXT_UNREADABLE = 0x4 | 0x10 | 0x8000 | 0x10000
LINUX_TYPE, EXTENDED_TYPES = 0x83, (0x05, 0x0F, 0x85)
# Discoverable Partitions Specification
GPT_ROOT_X86_64 = bytes.fromhex("e3bc684fcde8b14d96e7fbcaf984b709")
MAKE_EXT4 = "AppPot wants ext4: make one with mke2fs -t ext4 -d DIRECTORY"
WHOLE_SYSTEM = (
    "AppPot boots a whole system: `make image PACKAGES=...` builds one, and --changes merges the "
    "layers of a container image into it (see README)")
OTHER_IMAGES = (                     # offset, magic, what it is, what to do
    (0, b"\x7fELF", "a program", "are image and kernel exchanged?"),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it: gunzip FILE"),
    (0, b"\xfd7zXZ", "compressed with xz", "unpack it: unxz FILE"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it: unzstd FILE"),
    (0, b"BZh", "compressed with bzip2", "unpack it: bunzip2 FILE"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it: unlz4 FILE"),
    (0, b"PK\3\4", "a zip archive", "unpack it: unzip FILE"),
    (32, b"SIF_MAGIC", "a SIF of Apptainer", WHOLE_SYSTEM),
    (257, b"ustar", "a tar archive", WHOLE_SYSTEM),
    (0, b"QFI\xfb", "a qcow2 image", "convert it: qemu-img convert -O raw FILE apppot.img"),
    (0, b"KDMV", "a VMDK image", "convert it: qemu-img convert -O raw FILE apppot.img"),
    (0, b"OOOM", "a COW file", "give it with its base image: --image COW:BASE"),
    (0, b"XFSB", "an XFS file system", MAKE_EXT4),
    (0, b"hsqs", "a squashfs file system", MAKE_EXT4),
    (0x10040, b"_BHRfS_M", "a btrfs file system", MAKE_EXT4),
    (32769, b"CD001", "a CD-ROM image", MAKE_EXT4),
)


class RootDevice(NamedTuple):
    """Where an image holds the root file system."""
    partition: int                   # 0: the image is the file system itself
    base_id: str                     # UUID of the file system
    start: int                       # bytes
    length: int


def read_ext_superblock(file: BinaryIO, offset: int) -> Optional[Tuple[str, int]]:
    """UUID and size in bytes of the ext2, 3 or 4 file system at `offset`; None if there is none."""
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
    """The same from an MBR.

    Logical partitions, from number 5 on, are in a chain of extended ones.
    """
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
                first = table_at + start
                own_number = number if table_at else index + 1
                yield own_number, False, first * 512, (first + length) * 512
            if table_at and index == 0:
                number += 1

        if not following:
            return
        table_at = following
        base = base or following


def find_root_device(path: str) -> RootDevice:
    """The root file system of an image, which is that itself or has a partition table."""
    with open_regular(path, "image", IMAGE_HINT) as file:
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
                base_id, length = superblock
                roots.append((says_root, length, RootDevice(number, base_id, start, length)))
        if not roots:
            raise explain_no_root(file, path, bool(partitions))

    root = max(roots)[2]
    if root.start + root.length > size:
        what = "image is truncated: {} has {} of {} bytes".format(path, size, root.start + root.length)
        raise Fatal(what, "was the transfer cut off, or the disk full? Copy it again")
    return root


def explain_no_root(file: BinaryIO, path: str, has_partitions: bool) -> Fatal:
    if has_partitions:
        what = "image has no Linux partition with ext4: "
        return Fatal(what + path, "list its partitions: fdisk -l FILE")
    import shlex

    for offset, magic, what, hint in OTHER_IMAGES:
        if read_at(file, offset, len(magic)) == magic:
            advice = hint.replace("FILE", shlex.quote(path))
            return Fatal("image is {}: {}".format(what, path), advice)
    return Fatal("image holds no ext4 file system and no partition table: " + path,
                 "is it a disk image? `make image` builds one")


class ExtReader:
    """Reads files of an ext2, 3 or 4 file system without mounting it; ValueError if it cannot tell.

    Layout: Documentation/filesystems/ext4. A journal that was not replayed can hold newer
    directories.
    """

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self._offset = file, offset
        block = read_at(file, offset + 1024, 1024)
        self._first, log_size = struct.unpack_from("<II", block, 0x14)
        self._per_group, = struct.unpack_from("<I", block, 0x28)
        self._inode_size, = struct.unpack_from("<H", block, 0x58)
        incompatible, = struct.unpack_from("<I", block, 0x60)
        if log_size > 6 or not self._per_group or incompatible & EXT_UNREADABLE:
            raise ValueError("features {:#x}".format(incompatible))
        self._size = 1024 << log_size
        self._group_size = 32
        if incompatible & EXT_64BIT:
            self._group_size, = struct.unpack_from("<H", block, 0xFE)

    def _block(self, number: int) -> bytes:
        return read_at(self._file, self._offset + number * self._size, self._size)

    def _inode(self, number: int) -> bytes:
        group, index = divmod(number - 1, self._per_group)
        start = self._offset + (self._first + 1) * self._size + group * self._group_size
        descriptor = read_at(self._file, start, self._group_size)
        table, = struct.unpack_from("<I", descriptor, 8)
        if self._group_size >= 64:
            table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
        place = self._offset + table * self._size + index * self._inode_size
        return read_at(self._file, place, self._inode_size)

    def _extents(self, node: bytes, depth: int = 0) -> Iterator[bytes]:
        magic, count, _, height = struct.unpack_from("<HHHH", node)
        if magic != EXTENT_MAGIC or depth > 5:
            raise ValueError("no extents")
        for index in range(count):
            entry = node[12 + 12 * index:24 + 12 * index]
            if height:
                low, high = struct.unpack_from("<IH", entry, 4)
                yield from self._extents(self._block(high << 32 | low), depth + 1)
            else:
                length, high, low = struct.unpack_from("<HHI", entry, 4)
                for block in range(length & 0x7FFF):
                    yield self._block((high << 32 | low) + block)

    def _content(self, inode: bytes) -> bytes:
        """Of a directory, a link or a small file: up to a MiB."""
        size, = struct.unpack_from("<I", inode, 4)
        flags, = struct.unpack_from("<I", inode, 0x20)
        if stat.S_ISLNK(struct.unpack_from("<H", inode)[0]) and size < 60:
            return inode[0x28:0x28 + size]

        if flags & EXT_EXTENTS:
            blocks = self._extents(inode[0x28:0x28 + 60])
        else:                                     # twelve blocks, and a block of further ones
            further, = struct.unpack_from("<I", inode, 0x58)
            pointers = struct.iter_unpack("<I", inode[0x28:0x28 + 48] + self._block(further))
            blocks = (self._block(number) for number, in pointers if number)

        content = b""
        while len(content) < min(size, 1 << 20):
            block = next(blocks, b"")
            if not block:
                raise ValueError("a file with too few blocks")
            content += block
        return content[:size]

    def _entries(self, directory: bytes) -> Iterator[Tuple[bytes, int]]:
        content = self._content(directory)
        start = 0
        while start + 8 <= len(content):
            inode, length, name_length = struct.unpack_from("<IHB", content, start)
            if inode:
                yield content[start + 8:start + 8 + name_length], inode
            start += max(length, 8)

    def read(self, path: bytes) -> Optional[bytes]:
        """The beginning of a file of the image, links followed; None if there is no such file."""
        names = path.split(b"/")
        trail = [2]                               # inode 2 is the root
        for _ in range(200):
            while names and names[0] in (b"", b"."):
                del names[0]
            if not names:
                return self._content(self._inode(trail[-1]))

            name = names.pop(0)
            if name == b"..":
                trail = trail[:-1] or [2]
                continue

            number = dict(self._entries(self._inode(trail[-1]))).get(name)
            if number is None:
                return None
            inode = self._inode(number)
            if stat.S_ISLNK(struct.unpack_from("<H", inode)[0]):
                target = self._content(inode)
                names = target.split(b"/") + names
                trail = [2] if target.startswith(b"/") else trail
            else:
                trail.append(number)
        raise ValueError("too many links")


def find_missing_agent(path: str, offset: int) -> str:
    """The file of the agent that an image lacks; empty if none.

    ValueError if that cannot be seen from outside.
    """
    with open_regular(path, "image", IMAGE_HINT) as file:
        try:
            image = ExtReader(file, offset)
            launcher = image.read(AGENT.encode())
            if launcher is None:
                return AGENT
            interpreter = re.match(br"#!\s*(/\S+)", launcher)
            needs = [interpreter.group(1)] if interpreter else []
            if os.path.dirname(AGENT_MODULE).encode() in launcher:
                needs.append(AGENT_MODULE.encode())
            return next((os.fsdecode(need) for need in needs if image.read(need) is None), "")
        except struct.error as error:
            raise ValueError(str(error))


def no_agent(what: str, image: str) -> Fatal:
    hint = "`make image` builds one with it"
    return Fatal("image has no agent ({}): {}".format(what, image), hint)


def open_image(path: str, exclusive: bool) -> int:
    """Open and lock an image; the descriptor goes to the kernel, so the lock lasts as it does."""
    with blaming("image cannot be opened", path, "check its permissions"):
        descriptor = os.open(path, os.O_RDWR if exclusive else os.O_RDONLY)
    lock_file(descriptor, exclusive, "image", path)
    return descriptor


# --- What the job was granted -------------------------------------------------------------------------------
# Functions of the environment and of a Reader.

DEFAULT_MEM_MIB, SMALL_MEM_MIB = 1024, 256
MEM_MIN_MIB = 64                     # below this Debian's kernel does not reach the agent
ADDRESS_SPACE_EXTRA_MIB = 256        # what the kernel maps beside the guest's memory
# The guest gets 64 MiB and a 32nd less than the job. AppPot uses 40 MiB and a 100th.
OVERHEAD_MIB, OVERHEAD_SHARE = 64, 32
SHARED_MEMORY, ROOM_SHARE = "/dev/shm", 0.9                    # so much of its room a default takes
JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "JOB_ID", "LSB_JOBID")


class Amount(NamedTuple):
    """So much memory (MiB) or so many CPUs, and where that comes from."""
    value: int
    source: str


Amounts = List[Amount]
Reader = Callable[[str], str]        # returns the text of a file; "" if the file cannot be read


class Grants(NamedTuple):
    """What this job may use. The smallest of several amounts is used."""
    systems: Tuple[str, ...]         # the batch systems whose job this is
    mem: Tuple[Amount, ...]          # what they say
    cpus: Tuple[Amount, ...]
    machine: Amount                  # its memory
    mem_limits: Tuple[Amount, ...]   # what the node enforces
    cpu_limits: Tuple[Amount, ...]
    notes: Tuple[str, ...]           # what was ignored


class Statements:
    """What the variables of a job, or the lines of a file, say about it."""

    def __init__(self, values: Mapping[str, str], notes: List[str], owner: str = "") -> None:
        self.values = values
        self.notes = notes                        # for the user: what was ignored
        self._owner = owner

    def read(self, name: str, parse: Callable[[str], int]) -> Amounts:
        """The amount that a value states, as a list of one.

        A value that is no amount is ignored, with a note.
        """
        text = self.values.get(name, "").strip()
        if not text:
            return []

        source = "{}{}={}".format(self._owner, name, text[:60])
        try:
            value = parse(text)
        except (ValueError, OverflowError, Fatal):
            value = 0
        if value < 1:
            self.notes.append(source + " ignored: it is no amount")
            return []
        return [Amount(value, source)]


def parse_mib(text: str) -> int:
    return parse_size_mib(text, "")


def parse_bytes(text: str) -> int:
    """MiB of a bare number of bytes, or of a number with its unit."""
    return int(text) >> 20 if text.isdigit() else parse_size_mib(text, "")


def pick_slurm(text: str, node: int) -> int:
    """The number of one node in Slurm's list for all nodes of the job, such as "16(x2),8"."""
    for word in text.split(","):
        match = re.match(r"(\d+)(?:\(x(\d+)\))?$", word, re.ASCII)
        if not match:
            break
        number = int(match.group(1))
        count = int(match.group(2) or 1)
        if node < count:
            return number
        node -= count
    raise ValueError(text)


def divide(amounts: Amounts, parts: Amounts) -> Amounts:
    return [Amount(max(1, amount.value // part.value), "{} for {}".format(amount.source, part.source))
            for amount in amounts for part in parts if part.value > 1] or amounts


def multiply(amounts: Amounts, factors: Amounts) -> Amounts:
    return [Amount(amount.value * factor.value, "{} times {}".format(amount.source, factor.source))
            for amount in amounts for factor in factors] or amounts


def read_slurm(job: Statements, read: Reader) -> Tuple[Amounts, Amounts]:
    """Memory and CPUs by the OUTPUT ENVIRONMENT VARIABLES of sbatch(1) and srun(1).

    The tasks of one step share what the step has on the node. A batch script has all of it for
    itself.
    """
    number = job.values.get("SLURM_NODEID", "")
    node = int(number) if re.match(r"\d{1,6}$", number, re.ASCII) else 0

    def of_node(text: str) -> int:
        return pick_slurm(text, node)

    tasks = job.read("SLURM_STEP_TASKS_PER_NODE", of_node)
    cpus = job.read("SLURM_CPUS_PER_TASK", int)
    if not cpus:
        on_node = job.read("SLURM_CPUS_ON_NODE", int)
        cpus = divide(on_node or job.read("SLURM_JOB_CPUS_PER_NODE", of_node), tasks)

    mem = divide(job.read("SLURM_MEM_PER_NODE", parse_mib), tasks)
    mem += multiply(job.read("SLURM_MEM_PER_CPU", parse_mib), cpus)
    return mem, cpus


def read_pbs(job: Statements, read: Reader) -> Tuple[Amounts, Amounts]:
    """OpenPBS sets NCPUS, Torque PBS_NUM_PPN, and many sites PBS_NCPUS and PBS_RESC_MEM (bytes)."""
    cpus = job.read("PBS_NUM_PPN", int) or job.read("PBS_NCPUS", int)
    if not cpus and "PBS_JOBID" in job.values:
        cpus = job.read("NCPUS", int)
    return job.read("PBS_RESC_MEM", parse_bytes), cpus


def read_grid_engine(job: Statements, read: Reader) -> Tuple[Amounts, Amounts]:
    """NSLOTS counts the slots of all hosts.

    Few sites export the memory, h_vmem and m_mem_free, which is per slot.
    """
    cpus = divide(job.read("NSLOTS", int), job.read("NHOSTS", int))
    mem = job.read("SGE_HGR_m_mem_free", parse_bytes) or job.read("SGE_HGR_h_vmem", parse_bytes)
    return multiply(mem, cpus), cpus


def read_condor(job: Statements, read: Reader) -> Tuple[Amounts, Amounts]:
    """Cpus and Memory (MiB) of the slot, in the machine ad that HTCondor leaves for the job."""
    path = job.values.get("_CONDOR_MACHINE_AD", "")
    lines = re.findall(r"(?im)^(Cpus|Memory)[ \t]*=(.*)$", read(path) if path else "")
    slot = Statements({name.capitalize(): value for name, value in lines}, job.notes, "HTCondor's ")
    return slot.read("Memory", int), slot.read("Cpus", int)


BATCH_SYSTEMS = (                    # name, variables of which a job has one, what reads the grant
    ("Slurm", ("SLURM_JOB_ID", "SLURM_JOBID"), read_slurm),
    ("PBS", ("PBS_JOBID",), read_pbs),
    ("Grid Engine", ("SGE_TASK_ID",), read_grid_engine),
    ("HTCondor", ("_CONDOR_MACHINE_AD", "_CONDOR_JOB_AD", "_CONDOR_SLOT"), read_condor),
)


def list_cgroups(membership: str, mounts: str, controller: str) -> List[str]:
    """Directories of this process's cgroup and of those above it.

    The controller is one of version 1, or "" for version 2.
    """
    paths: Dict[str, str] = {}
    for line in membership.splitlines():
        names, _, path = line.partition(":")[2].partition(":")
        if path:
            paths.update((name, path) for name in names.split(","))
    if controller not in paths:
        return []

    for line in mounts.splitlines():
        words, _, source = line.partition(" - ")
        root, place = (words.split() + [""] * 5)[3:5]
        if controller:
            is_wanted = source.startswith("cgroup ") and controller in source.split()[-1].split(",")
        else:
            is_wanted = source.startswith("cgroup2 ")
        if is_wanted:
            path = paths[controller]
            below = path[len(root.rstrip("/")):] if is_below(path, root) else ""
            parts = [part for part in below.split("/") if part]
            return [os.path.join(place, *parts[:depth]) for depth in range(len(parts), -1, -1)]
    return []


def read_cgroup_limits(read: Reader, names: Sequence[Tuple[str, str]],
                       parse: Callable[[str, str], int]) -> Amounts:
    """The limits of this cgroup and of all above it.

    For a file without one `parse` raises ValueError.
    """
    membership = read("/proc/self/cgroup")
    mounts = read("/proc/self/mountinfo")
    amounts = []
    for controller, name in names:
        for directory in list_cgroups(membership, mounts, controller):
            try:
                value = parse(read(os.path.join(directory, name)), directory)
            except ValueError:                    # "max", or no such file: the root has none
                continue
            amounts.append(Amount(value, "cgroup's {}".format(name)))
    return amounts


def read_mem_limits(read: Reader, machine_mib: int) -> Amounts:
    """MiB. A limit above the machine's memory, as version 1 has it for none, is none."""
    limits = read_cgroup_limits(
        read, (("", "memory.max"), ("", "memory.high"), ("memory", "memory.limit_in_bytes")),
        lambda text, directory: max(1, int(text) >> 20))
    return [limit for limit in limits if limit.value < machine_mib]


def read_cpu_limits(read: Reader) -> Amounts:
    """Whole CPUs of the quotas."""
    def quota(text: str, directory: str) -> int:
        words = text.split() + read(os.path.join(directory, "cpu.cfs_period_us")).split()
        runtime, period = (int(word) for word in words[:2])
        if runtime <= 0 or period <= 0:
            raise ValueError("no quota")
        return max(1, runtime // period)

    return read_cgroup_limits(read, (("", "cpu.max"), ("cpu", "cpu.cfs_quota_us")), quota)


def read_process_room(read: Reader) -> Amounts:
    """How many more processes and threads the cgroups allow; below zero if there are too many."""
    def room(text: str, directory: str) -> int:
        return int(text) - int(read(os.path.join(directory, "pids.current")))

    return read_cgroup_limits(read, (("", "pids.max"), ("pids", "pids.max")), room)


def total_memory_mib() -> int:
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) // 1024


def find_grants(environment: Mapping[str, str], read: Reader, machine_mib: int) -> Grants:
    job = Statements(environment, [])
    systems = []
    mem = []
    cpus = []
    for name, signs, read_system in BATCH_SYSTEMS:
        its_mem, its_cpus = read_system(job, read)
        if its_mem or its_cpus or any(sign in environment for sign in signs):
            systems.append(name)
        mem += its_mem
        cpus += its_cpus

    return Grants(
        systems=tuple(systems),
        mem=tuple(mem),
        cpus=tuple(cpus),
        machine=Amount(machine_mib, "memory of this machine"),
        mem_limits=tuple(read_mem_limits(read, machine_mib)),
        cpu_limits=tuple(read_cpu_limits(read)),
        notes=tuple(job.notes))


def find_own_grants() -> Grants:
    """What this process was granted.

    Its affinity shows a cpuset; `ulimit -v` is how batch systems limit memory.
    """
    grants = find_grants(os.environ, read_node_file, total_memory_mib())
    affinity = Amount(len(os.sched_getaffinity(0)), "CPU affinity")
    space = resource.getrlimit(resource.RLIMIT_AS)[1]
    if grants.systems and space != resource.RLIM_INFINITY:
        usable_mib = max(1, (space >> 20) - ADDRESS_SPACE_EXTRA_MIB)
        usable = Amount(usable_mib, "ulimit -v less what the kernel maps")
        grants = grants._replace(mem_limits=grants.mem_limits + (usable,))
    return grants._replace(cpu_limits=grants.cpu_limits + (affinity,))


def smallest(amounts: Sequence[Amount]) -> Amount:
    return min(amounts, key=lambda amount: amount.value)       # of equal ones the first


def default_mem(grants: Grants) -> Amount:
    """The guest's memory if nobody asks: the job's less AppPot's own, else 1 GiB or all there is."""
    stated = grants.mem + grants.mem_limits if grants.systems else ()
    plain = Amount(DEFAULT_MEM_MIB, "default")
    least = smallest(grants.mem + grants.mem_limits + (grants.machine,))
    rest = Amount(max(MEM_MIN_MIB, least.value - OVERHEAD_MIB - least.value // OVERHEAD_SHARE),
                  least.source + " less overhead")
    return rest if stated else min(plain, rest)


def check_memory(text: str, name: str) -> int:
    mem_mib = parse_size_mib(text, name)
    total = total_memory_mib()
    if mem_mib < MEM_MIN_MIB:
        hint = "a guest needs at least {} MiB".format(MEM_MIN_MIB)
        raise Fatal("{} is too small: {}".format(name, text), hint)
    if mem_mib > total:
        hint = "it has {}".format(format_mib(total))
        raise Fatal("{} is more than this machine has: {}".format(name, text), hint)
    return mem_mib


def choose_memory(asked: Optional[str], grants: Grants) -> Tuple[Amount, Tuple[int, ...]]:
    """The guest's memory, and to what it may be lowered if there is no room for so much.

    A grant need not be used up: less memory is better than a slower place, and than no run at all.
    """
    given = find_given(asked, "mem")
    if given:
        mem = Amount(check_memory(given.text, given.by), "{}={}".format(given.by, given.text))
        return mem, (mem.value,)
    mem = default_mem(grants)
    floors = (DEFAULT_MEM_MIB, SMALL_MEM_MIB) if grants.systems else (mem.value,)
    return mem, tuple(min(floor, mem.value) for floor in floors)


def find_job_limit(grants: Grants) -> Optional[int]:
    """MiB of the job's own cgroup, which allows what the job was granted; None if there is none."""
    # memory.high slows processes down and kills none.
    limits = [limit for limit in grants.mem_limits
              if limit.source in ("cgroup's memory.max", "cgroup's memory.limit_in_bytes")]
    if not grants.mem or not limits or smallest(limits).value > 1.25 * smallest(grants.mem).value:
        return None
    return smallest(limits).value


def choose_cpus(asked: Optional[str], grants: Grants) -> Amount:
    given = find_given(asked, "cpus")
    if given:
        if not re.match(r"0*[1-9]\d{0,3}$", given.text, re.ASCII):
            what = "{} is not a number of CPUs: {!r}".format(given.by, given.text)
            raise Fatal(what, "give a whole number from 1")
        return Amount(int(given.text), "{}={}".format(given.by, given.text))
    return smallest(grants.cpus + grants.cpu_limits) if grants.cpus else Amount(1, "default")


def decide_cpus(asked: Optional[str], grants: Grants, reason: Optional[str]) -> Tuple[Amount, str]:
    """CPUs of the guest: one if there is a reason. A note says if that is fewer than wanted.

    That is no error, as the guest is only slower.
    """
    cpus = choose_cpus(asked, grants)
    if cpus.value == 1 or reason is None:
        return cpus, ""
    return Amount(1, reason), "{} but the guest gets 1 CPU: {}".format(cpus.source, reason)


def describe_memory(mem: Amount, place: str) -> str:
    return "{} in {}: {}".format(format_mib(mem.value), place, mem.source)


def describe_cpus(cpus: Amount) -> str:
    return "{} CPU{}: {}".format(cpus.value, "s" if cpus.value > 1 else "", cpus.source)


# --- The node -----------------------------------------------------------------------------------------------

SCRATCH_MIN_MIB = 32                 # for the spool and the first blocks of the COW file
DESCRIPTORS_MIN, PROCESSES_MIN = 40, 16
FILE_MAX = (1 << 63) - 1             # loff_t
HOST_NAME_MAX, JOB_ID_MAX = 63, 20   # the former of RFC 1123
HOST_LINE = re.compile(
    br"^[ \t]*(?!127\.|::1[ \t])([0-9a-fA-F:][^\s#\0]*[ \t]+[^\n#\0]+)", re.MULTILINE)
RESOLVER_LINE = re.compile(br"^(?:search|domain|options)[ \t][^\n\0]+", re.MULTILINE)
NODE_FILE_MAX = 4 << 20              # a larger file is not passed on
ZONES = "zoneinfo/"                  # after this a path names a time zone
BATCH_PREFIXES = (
    b"SLURM_", b"SLURMD_", b"PBS_", b"SGE_", b"JOB_", b"_CONDOR_", b"OMP_", b"LSB_", b"LC_")
# The libraries ask their own variable first, and then the first of these, which most others ask,
# too.
THREAD_VARIABLES = (b"OMP_NUM_THREADS", b"OPENBLAS_NUM_THREADS", b"MKL_NUM_THREADS")
BATCH_VARIABLES = THREAD_VARIABLES + (
    b"NSLOTS", b"NHOSTS", b"NQUEUES", b"PE", b"QUEUE", b"RESTARTED",
    b"TERM", b"LANG", b"LANGUAGE", b"TZ")
# How the node reaches the world. Programs know both spellings.
PROXY_VARIABLES = tuple(
    spelled.encode() for name in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
    for spelled in (name, name.upper()))
LOOPBACK_PROXY = re.compile(
    br"((?:\w+://)?(?:[^@/]*@)?)(?:localhost|127(?:\.\d+){3}|\[::1\])(?=[:/]|$)", re.IGNORECASE)
# Debian; Fedora and its kin; SUSE; Alpine.
BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
           "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem")
CERTIFICATE = re.compile(
    br"-----BEGIN CERTIFICATE-----\n[\w+/=\s]+-----END CERTIFICATE-----", re.ASCII)
# They lead a client of the batch system to its configuration, which is no file of the guest.
NODE_VARIABLES = (b"SLURM_CONF", b"PBS_CONF_FILE", b"SGE_ROOT")


class NodeView(NamedTuple):
    """What the guest answers if a program asks about the node."""
    host_names: bytes = b"apppot"    # its own, the last without a domain
    hosts: bytes = b""               # lines of /etc/hosts
    resolver: bytes = b""            # of resolv.conf
    zone: bytes = b""                # /etc/localtime; empty: none
    zone_name: bytes = b""           # empty: not known
    certificates: bytes = b""        # of the authorities that it trusts, as PEM


def scratch_candidates(tmpdir: Optional[str]) -> List[str]:
    given = find_given(tmpdir, "tmpdir")
    if given:
        return [given.text]
    names = ("_CONDOR_SCRATCH_DIR", "SLURM_TMPDIR", "PBS_JOBFS", "TMPDIR")
    return [os.environ[name] for name in names if os.environ.get(name)] + ["/tmp", "/var/tmp"]


def choose_scratch(candidates: Sequence[str]) -> str:
    faults = []
    for directory in candidates:
        if not os.path.isdir(directory):
            faults.append(directory + " is not a directory")
        elif not os.access(directory, os.W_OK | os.X_OK):
            faults.append(directory + " is not writable")
        elif free_mib(directory) < SCRATCH_MIN_MIB:
            faults.append("{} has {} free, {} are needed".format(
                directory, format_mib(free_mib(directory)), format_mib(SCRATCH_MIN_MIB)))
        else:
            return os.path.abspath(directory)
    raise Fatal("no directory for temporary files: " + "; ".join(faults), "name one with --tmpdir")


def read_max_areas() -> int:
    text = read_node_file("/proc/sys/vm/max_map_count").strip()
    return int(text) if text.isdigit() else 65530


def check_processes() -> None:
    """The limits count threads, too. Each process of the guest is one of the host."""
    for room in read_process_room(read_node_file):
        if room.value < PROCESSES_MIN:
            what = "limit of processes ({}) leaves room for {}, {} are needed"
            raise Fatal(what.format(room.source, max(0, room.value), PROCESSES_MIN),
                        "raise the limit, or end other processes of the job")

    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    is_limited = hard != resource.RLIM_INFINITY and os.getuid() != 0
    if is_limited and hard < count_own_threads() + PROCESSES_MIN:
        what = "limit of processes (ulimit -u) is {}, {} are needed beside those that you have"
        raise Fatal(what.format(hard, PROCESSES_MIN),
                    "raise the limit, or end some of your processes")


def is_passed(name: bytes) -> bool:
    """Whether a variable of the caller goes into the guest though nobody asks for it."""
    is_wanted = name in BATCH_VARIABLES or name in PROXY_VARIABLES
    return is_wanted or name.startswith(BATCH_PREFIXES) and name not in NODE_VARIABLES


def select_environment(caller: Dict[bytes, bytes], asked: Sequence[str],
                       clean: bool) -> Dict[bytes, bytes]:
    """The variables for the guest: the batch system's and proxies, unless `clean`, and those of --env."""
    chosen = {name: value for name, value in caller.items() if is_passed(name) and not clean}
    for text in asked:
        name, equals, value = os.fsencode(text).partition(b"=")
        if not name:
            hint = "write --env NAME or --env NAME=VALUE"
            raise Fatal("--env without a name: {!r}".format(text), hint)
        if equals:
            chosen[name] = value
        elif name in caller:
            chosen[name] = caller[name]
    return chosen


def redirect_proxies(environment: Mapping[bytes, bytes], gateway: str) -> Dict[bytes, bytes]:
    """The proxies that listen on the node's loopback, which the guest reaches at its gateway."""
    redirected = {}
    for name in {*environment} & {*PROXY_VARIABLES} - {b"no_proxy", b"NO_PROXY"}:
        match = LOOPBACK_PROXY.match(environment[name])
        if match:
            redirected[name] = match.group(1) + gateway.encode() + environment[name][match.end():]
    return redirected


def limit_threads(environment: Dict[bytes, bytes]) -> Dict[bytes, bytes]:
    """Variables for one thread in each process: threads do not run in parallel, and OpenBLAS's spin.

    Whoever has set the first variable means all libraries. An empty one counts as not set, as it
    does for the libraries: scripts give them $SLURM_CPUS_PER_TASK, which is empty in a job that did
    not ask for CPUs.
    """
    if environment.get(THREAD_VARIABLES[0]):
        return {}
    return {name: b"1" for name in THREAD_VARIABLES if not environment.get(name)}


def find_job_id() -> str:
    """The batch system's name of this job; empty outside of one."""
    return next(filter(None, (os.environ.get(name) for name in JOB_IDS)), "")


def read_short(path: str, notes: List[str]) -> bytes:
    """A file of the node, if there is one that can be read and is not too large to pass on."""
    try:
        with open(path, "rb") as file:
            content = file.read(NODE_FILE_MAX + 1)
    except OSError:
        return b""
    if len(content) > NODE_FILE_MAX:
        note = "{} has more than {} MiB, the guest does without it"
        notes.append(note.format(path, NODE_FILE_MAX >> 20))
        return b""
    return content


def select_hosts(text: bytes) -> bytes:
    """The lines of a hosts file that are true in the guest, too: all but those of the loopback."""
    return b"".join(line.rstrip() + b"\n" for line in HOST_LINE.findall(text))


def select_resolver(text: bytes, host: str) -> bytes:
    """What resolv.conf says besides name servers.

    The host's domain is the search list if there is none.
    """
    lines = [line.strip() for line in RESOLVER_LINE.findall(text)]
    domain = host.partition(".")[2]
    if domain and not any(line.startswith((b"search", b"domain")) for line in lines):
        lines.append(b"search " + os.fsencode(domain))
    return b"".join(line + b"\n" for line in lines)


def name_guest(host: str, job_id: str, mark: str) -> str:
    """The host names of a run: NODE-JOB-MARK, and the same with the node's domain before it.

    Not the node's own: HOST:PID in a lock file would lead others to a process of the node.
    """
    def clean(text: str, length: int) -> str:
        return re.sub("[^A-Za-z0-9]+", "-", text).strip("-")[:length].rstrip("-")

    node, _, domain = host.partition(".")
    job = clean(job_id.partition(".")[0], JOB_ID_MAX)
    tail = job + "-" + mark if job else mark
    name = "{}-{}".format(clean(node, HOST_NAME_MAX - 1 - len(tail)) or "apppot", tail)
    return "{0}.{1} {0}".format(name, domain) if re.fullmatch("[A-Za-z0-9.-]+", domain) else name


def read_certificates(notes: List[str]) -> bytes:
    """The certificates of the node, which may have one of the site's own, as for a proxy that looks inside."""
    paths = [os.environ.get("SSL_CERT_FILE", ""), *BUNDLES]
    path = next(filter(os.path.isfile, paths), "")
    found = CERTIFICATE.findall(read_short(path, notes)) if path else []
    if found:
        notes.append("{} certificates of {}".format(len(found), path))
    return b"".join(certificate + b"\n" for certificate in found)


def view_node(notes: List[str], has_certificates: bool) -> NodeView:
    host = os.uname().nodename
    zone = read_short("/etc/localtime", notes)
    zone_name = os.path.realpath("/etc/localtime").partition(ZONES)[2]
    return NodeView(
        name_guest(host, find_job_id(), os.urandom(3).hex()).encode(),
        select_hosts(read_short("/etc/hosts", notes)),
        select_resolver(read_short("/etc/resolv.conf", notes), host),
        zone if zone.startswith(b"TZif") else b"",
        os.fsencode(zone_name),
        read_certificates(notes) if has_certificates else b"")


# --- Private directories ------------------------------------------------------------------------------------
# A run makes them in places where others can make directories, too, above all in scratch. Their
# names are apppot-UID-RANDOM. A file in each, the mark, says by its name which process made the
# directory. Only a directory with both is removed, and only by descriptors: somebody who renames a
# directory on the way, or a guest that fills one, makes nothing else disappear.

RUN_PREFIX = "apppot-"
MARK = re.compile(r"of-\d+-\d+-\d+-[01]-[0-9a-f]*-[\w.-]*", re.ASCII)
RECORD = ".made"  # ends the name of a run's list of mount points that it made on the host
PRIVATE_TRIES = 20                   # another run may take a new directory for one that was left


class PrivateDirectory(NamedTuple):
    """A directory of a run that no other user can enter."""
    path: str
    fd: int                          # holds the lock, and leads there whatever happens to the path


class Owner(NamedTuple):
    """The process that a private directory is of."""
    pid: int
    started: int                     # ticks after the boot
    namespace: int                   # of pids
    has_lock: int
    boot: str                        # of the node: random, from the host's kernel
    node: str


class Realm(NamedTuple):
    """What the directories of one tree have in common: their owner and their mount."""
    uid: int
    device: int
    mount: bytes                     # its number; bind mounts have one of their own, too


class Level(NamedTuple):
    """A directory that is being emptied."""
    name: str                        # in the one above
    inode: int
    names: List[str]                 # of what is still in it


def find_own_identity(has_lock: int) -> Owner:
    pid = os.getpid()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    boot = read_node_file("/proc/sys/kernel/random/boot_id").strip().replace("-", "")
    node = re.sub(r"[^\w.-]", "_", os.uname().nodename, flags=re.ASCII)
    return Owner(pid, read_start(pid), namespace, has_lock, boot, node)


def mark_directory(directory: int, has_lock: bool) -> None:
    """Make the mark.

    Its name says all: on every file system a file has its name as soon as it exists.
    """
    mark = "of-{}-{}-{}-{}-{}-{}".format(*find_own_identity(int(has_lock)))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    os.close(os.open(mark, flags, 0o600, dir_fd=directory))


def list_marks(directory: int) -> List[str]:
    """The marks in a directory that are of its owner."""
    uid = os.fstat(directory).st_uid
    marks = []
    for name in filter(MARK.fullmatch, os.listdir(directory)):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and status.st_uid == uid:
            marks.append(name)
    return marks


def read_mark(directory: int) -> Optional[Owner]:
    for name in list_marks(directory):
        pid, started, namespace, has_lock, boot, node = name.split("-", 6)[1:]
        return Owner(int(pid), int(started), int(namespace), int(has_lock), boot, node)
    return None


def has_ended(owner: Owner, was_unlocked: bool) -> bool:
    """Whether a run is over; False where this node cannot tell.

    On most network file systems other nodes do not see the lock of a directory, so it counts on its
    node only.
    """
    here = find_own_identity(0)
    if owner.boot != here.boot:
        # It has booted again since; but many nodes may be called localhost.
        return owner.node == here.node and not here.node.startswith("localhost")
    if owner.namespace == here.namespace:
        return read_start(owner.pid) != owner.started
    return was_unlocked and owner.has_lock == 1


def find_realm(directory: int) -> Realm:
    status = os.fstat(directory)
    with open("/proc/self/fdinfo/{}".format(directory), "rb", 0) as file:
        mount = file.read(1024).partition(b"mnt_id:")[2].split(b"\n")[0]  # empty before Linux 3.15
    return Realm(status.st_uid, status.st_dev, mount)


def open_directory(name: str, above: int, realm: Realm) -> int:
    """Open a directory and give its owner all rights to it; OSError if it is not of this realm."""
    place = os.open(name, os.O_PATH | DIRECTORY, dir_fd=above)
    try:
        if find_realm(place) != realm:
            raise OSError(errno.EPERM, "of another user or mount", name)
        if os.fstat(place).st_mode & 0o700 != 0o700:
            os.chmod("/proc/self/fd/{}".format(place), 0o700)
        return os.open(".", DIRECTORY, dir_fd=place)
    finally:
        os.close(place)


def empty_directory(directory: int, marks: Sequence[str]) -> None:
    """Remove all that is in a directory but its marks. What cannot be removed stays.

    This takes one descriptor and no path, however deep the tree is, and does not leave the realm.
    The way up is "..". If that leads to another directory, somebody has moved this one, and the
    rest stays.
    """
    realm = find_realm(directory)
    here = os.open(".", DIRECTORY, dir_fd=directory)
    names = [name for name in os.listdir(here) if name not in marks]
    levels = [Level("", os.fstat(here).st_ino, names)]
    try:
        while True:
            level = levels[-1]
            if level.names:
                name = level.names.pop()
                below = -1 if remove_entry(name, here) else enter(name, here, realm)
                if below >= 0:
                    os.close(here)
                    here = below
                    levels.append(Level(name, os.fstat(here).st_ino, os.listdir(here)))
                continue

            levels.pop()
            if not levels:
                break
            above = os.open("..", DIRECTORY, dir_fd=here)
            os.close(here)
            here = above
            if os.fstat(here).st_ino != levels[-1].inode:
                break
            remove_entry(level.name, here)
    finally:
        os.close(here)


def enter(name: str, above: int, realm: Realm) -> int:
    """The descriptor of a directory to empty; -1 if it is none of ours."""
    try:
        return open_directory(name, above, realm)
    except OSError:
        return -1


def remove_mount_points(record: str, directory: int, uid: int) -> None:
    """Remove what MountPoints made, the last first, unless somebody has put something there."""
    try:
        with os.fdopen(open_own(record, directory, uid), "rb") as file:
            words = file.read().split(b"\0")[:-1]
    except OSError:                               # most runs have none
        return

    # Of one that was killed after it had made the last its inode may be missing.
    inodes = words[1::2] + [b""] * (len(words) % 2)
    for path, inode in reversed(list(zip(words[::2], inodes))):
        try:
            remove_mount_point(path, inode)
        except OSError:                           # it is gone, or no longer empty
            pass
    remove_entry(record, directory)


def remove_mount_point(path: bytes, inode: bytes) -> None:
    name = os.path.basename(path)
    place = open_place(os.path.dirname(path))
    try:
        status = os.stat(name, dir_fd=place, follow_symlinks=False)
        is_same = inode in (b"", b"%d" % status.st_ino)
        if is_same and stat.S_ISDIR(status.st_mode):
            os.rmdir(name, dir_fd=place)
        elif is_same and stat.S_ISREG(status.st_mode) and not status.st_size:
            os.unlink(name, dir_fd=place)
    finally:
        os.close(place)


def remove_private(directory: PrivateDirectory) -> None:
    """Remove a private directory, the mark last: if this is killed, another run goes on.

    If something stays, say so.
    """
    name = os.path.basename(directory.path)
    try:
        os.fchmod(directory.fd, 0o700)
        status = os.fstat(directory.fd)
        parent = os.open("..", os.O_PATH | DIRECTORY, dir_fd=directory.fd)
        try:
            remove_mount_points(name + RECORD, parent, status.st_uid)
            if status.st_nlink:                   # nobody has done it yet
                remove_content(directory.fd)
                if os.path.samestat(os.stat(name, dir_fd=parent, follow_symlinks=False), status):
                    os.rmdir(name, dir_fd=parent)
        finally:
            os.close(parent)
    except FileNotFoundError:                     # somebody does it now
        pass
    except OSError as error:
        warn("directory of a run cannot be removed, {}: {}".format(error.strerror, directory.path))


def remove_content(directory: int) -> None:
    marks = list_marks(directory)
    empty_directory(directory, marks)
    if len(os.listdir(directory)) == len(marks):
        for mark in marks:
            remove_entry(mark, directory)


def remove_if_stale(path: str, above: int) -> None:
    """Remove a directory with the name of a private one if it is one, and its run has ended."""
    name = os.path.basename(path)
    realm = find_realm(above)._replace(uid=os.getuid())
    mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
    directory = open_directory(name, above, realm)

    try:
        unlocked = lock_directory(directory)
        owner = None if unlocked is False else read_mark(directory)
        if owner and has_ended(owner, unlocked is True):
            remove_private(PrivateDirectory(path, directory))
        elif not owner:
            os.fchmod(directory, stat.S_IMODE(mode))
            if unlocked is not False:             # its run was killed before it made the mark
                os.rmdir(name, dir_fd=above)      # this takes an empty directory only
    finally:
        os.close(directory)


def remove_stale_directories(parent: str) -> None:
    """Remove what runs left that were killed with every process they had."""
    own_name = re.compile("{}{}-[0-9a-f]{{12}}".format(RUN_PREFIX, os.getuid()))
    try:
        above = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # writable but not readable: then there is nothing to find
        return

    try:
        for name in filter(own_name.fullmatch, os.listdir(above)):
            try:
                remove_if_stale(os.path.join(parent, name), above)
            except OSError:  # another user's, not AppPot's, no directory, or gone
                pass
    finally:
        os.close(above)


def make_private_directory(parent: str) -> PrivateDirectory:
    for _ in range(PRIVATE_TRIES):
        path = os.path.join(parent, unique_name(RUN_PREFIX))
        os.mkdir(path, 0o700)
        try:
            directory = PrivateDirectory(path, os.open(path, DIRECTORY))
        except FileNotFoundError:                 # another run took it for one that was left
            continue

        try:
            has_lock = lock_directory(directory.fd)
            if has_lock is not False:
                mark_directory(directory.fd, has_lock is True)
                return directory
        except FileNotFoundError:                 # the same
            pass
        except BaseException:
            remove_private(directory)
            os.close(directory.fd)
            raise
        os.close(directory.fd)
    raise Fatal("no private directory can be kept in " + parent,
                "does another program remove it? Name another directory with --tmpdir")


@contextmanager
def private_directory(parent: str) -> Iterator[PrivateDirectory]:
    """A directory of this run; it is removed at the end by whoever lives."""
    remove_stale_directories(parent)
    directory = make_private_directory(parent)
    try:
        yield directory
    finally:
        remove_private(directory)
        os.close(directory.fd)


# --- The network --------------------------------------------------------------------------------------------

SLIRP4NETNS, SLIRP, LAN = "slirp4netns", "slirp", "lan"    # kinds of network that a VMM may have
# By name, the best first.
HELPERS = {"slirp4netns": SLIRP4NETNS, "slirp-fullbolt": SLIRP, "slirp": SLIRP}
# The addresses of slirp and of libslirp, which slirp4netns uses.
GUEST_ADDRESS, GATEWAY, NAMESERVER = "10.0.2.15", "10.0.2.2", "10.0.2.3"
SLIRP4NETNS_MIN = (1, 2)             # the first with --target-type=bess
# 100.64.0.0/10 (RFC 6598). Clusters use 10/8 and 172.16/12, which stay reachable.
LAN_NET = (100 << 24 | 64 << 16, 10)
LAN_GROUP = r"([0-9.]+):([0-9]{1,99})"    # a word with a port too large is no command either


class Port(NamedTuple):
    """A port of the guest that the host shows."""
    protocol: str                    # tcp or udp
    host: str                        # the host's address, IPv4
    host_port: int
    guest_port: int


class Lan(NamedTuple):
    """The guest's place in a network of guests: a multicast group of the host carries it."""
    address: str
    prefix: int
    group: str
    port: int


class NetworkHelper(NamedTuple):
    """A program of the host that connects the guest."""
    kind: str                        # SLIRP4NETNS or SLIRP
    program: str                     # absolute path


class Network(NamedTuple):
    helper: Optional[NetworkHelper] = None     # None: no way out
    published: Tuple[Port, ...] = ()
    lan: Optional[Lan] = None
    note: Optional[str] = None       # for -v: why there is no helper

    @property
    def kind(self) -> Optional[str]:
        return self.helper.kind if self.helper else None


def parse_ipv4(text: str) -> bytes:
    """The four bytes of an address; empty if the text is no address."""
    words = re.fullmatch(r"(0|[1-9][0-9]{0,2})" + r"\.(0|[1-9][0-9]{0,2})" * 3, text)
    numbers = [int(word) for word in words.groups()] if words else [256]
    return bytes(numbers) if max(numbers) < 256 else b""


def parse_port(text: str) -> Port:
    """[HOSTIP:]HOSTPORT:GUESTPORT[/PROTOCOL]"""
    match = re.match(r"(?:(.*):)?(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?$", text, re.ASCII)
    if not match or not all(0 < int(number) < 65536 for number in match.group(2, 3)):
        raise Fatal("--publish is not [HOSTIP:]HOSTPORT:GUESTPORT[/udp]: {!r}".format(text),
                    "--publish 8080:80 shows port 80 of the guest as port 8080 of 127.0.0.1")
    host = "127.0.0.1" if match.group(1) is None else match.group(1)
    if not parse_ipv4(host):
        raise Fatal("--publish for what is no IPv4 address: {!r}".format(host),
                    "no helper forwards IPv6; give an IPv4 address of this host, or 0.0.0.0 for all")
    return Port(match.group(4) or "tcp", host, int(match.group(2)), int(match.group(3)))


def parse_group(text: str) -> Tuple[str, int]:
    """GROUP:PORT of a multicast group"""
    match = re.fullmatch(LAN_GROUP, text)
    address = parse_ipv4(match.group(1)) if match else b""
    port = int(match.group(2)) if match else 0
    if not match or not address or not 224 <= address[0] < 240 or not 0 < port < 65536:
        hint = "such as --lan 239.255.7.7:5000"
        raise Fatal("--lan is not a multicast group and port: {!r}".format(text), hint)
    return match.group(1), port


def choose_group(job_id: str) -> Tuple[str, int]:
    """The multicast group of a batch job and its port."""
    number = binascii.crc32(job_id.encode("utf-8", "surrogateescape"))
    group = "239.255.{}.{}".format(number >> 24, number >> 16 & 255)
    return group, 20000 + number % (1 << 13)


def parse_lan(group: str, address: str, job_id: str) -> Lan:
    """From GROUP:PORT, "" for the batch job's group, and ADDRESS[/PREFIX], "" for a random address."""
    where, port = parse_group(group) if group else choose_group(job_id)
    if not address:
        net, prefix = LAN_NET
        host = 1 + int.from_bytes(os.urandom(8), "big") % ((1 << 32 - prefix) - 2)
        return Lan("{}.{}.{}.{}".format(*struct.pack(">I", net + host)), prefix, where, port)

    own, slash, prefix_text = address.partition("/")
    is_prefix_right = not slash or re.match(r"([89]|[12]\d|30)$", prefix_text, re.ASCII)
    if not parse_ipv4(own) or not is_prefix_right:
        hint = "such as 10.9.0.1 or 10.9.0.1/24"
        raise Fatal("--lan-address is not an IPv4 address: {!r}".format(address), hint)
    return Lan(own, int(prefix_text or 16), where, port)


def describe(network: Network) -> str:
    words = "network by " + network.helper.program if network.helper else str(network.note)
    if network.lan:
        lan = network.lan
        words += ", LAN {} in {}:{}".format(lan.address, lan.group, lan.port)
    return words


def ask_helper(path: str) -> Tuple[str, str]:
    """The kind of a network helper, SLIRP4NETNS or SLIRP, and why it cannot be used; "" if it can."""
    try:
        kind = name_kind(path)
    except OSError as error:
        return "", "cannot be used ({})".format(error.strerror)
    if kind:
        return "", "is " + kind
    if not make_executable(path):
        return "", "is not executable"

    status, said = ask_program([os.path.abspath(path), "--version"])
    version = re.search(br"slirp4netns version (\d+)\.(\d+)", said)
    if version:
        is_new = (int(version.group(1)), int(version.group(2))) >= SLIRP4NETNS_MIN
        return SLIRP4NETNS, "" if is_new else "is too old, {}.{} is needed".format(*SLIRP4NETNS_MIN)
    if b"Slirp v" in said:
        return SLIRP, ""

    how = "status {}".format(status >> 8)
    if os.WIFSIGNALED(status):
        how = "signal {}".format(os.WTERMSIG(status))
    fault = "is neither slirp4netns nor slirp: --version ended with {}, {}"
    return "", fault.format(how, last_line(said))


def check_ports(ports: Sequence[Port]) -> None:
    """Refuse ports that are in use, before the boot.

    All are bound at once, as one may be asked for twice.
    """
    if not ports:
        return
    import socket

    with ExitStack() as stack:
        for port in ports:
            is_tcp = port.protocol == "tcp"
            kind = socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM
            probe = stack.enter_context(socket.socket(socket.AF_INET, kind))
            try:
                if is_tcp:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((port.host, port.host_port))
                if is_tcp:
                    probe.listen(1)
            except OSError as error:
                what = "port cannot be published, {}: {}:{}/{}"
                raise Fatal(what.format(error.strerror, port.host, port.host_port, port.protocol),
                            "choose another HOSTPORT, above 1023, and an address of this host")


def choose_lan(options: argparse.Namespace, kernel: str, has_lan: bool) -> Optional[Lan]:
    if options.lan is None and not options.lan_address:
        return None

    job_id = "/".join([str(os.getuid())] + [os.environ.get(name, "") for name in JOB_IDS])
    lan = parse_lan(options.lan or "", options.lan_address or "", job_id)
    if not has_lan:
        raise Fatal("kernel has no multicast network for --lan: " + kernel,
                    "Debian 12's has it; Debian 13's and all from 6.16 on have none")
    import socket

    member = parse_ipv4(lan.group) + bytes(4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        except OSError as error:
            raise Fatal("host has no network for --lan, {}: {}".format(error.strerror, lan.group),
                        "it needs a route for multicast, such as: ip route add 224.0.0.0/4 dev lo")
    return lan


def find_helper_fault(kind: str, wanted: Sequence[str], driven: Sequence[str],
                      publishes: bool) -> str:
    """Why a network helper of this kind is of no use; empty if it is."""
    if kind not in wanted:
        return "is {}, and --net {} is asked for".format(kind, " or ".join(wanted))
    if kind not in driven:
        return "is {}, and the kernel has no driver for it".format(kind)
    if publishes and kind == SLIRP:
        return "is slirp, which would publish ports on every address of the host"
    return ""


def choose_network(options: argparse.Namespace, kernel: str, kinds: Container[str]) -> Network:
    """Choose the helper: by what the user wants, what the kernel can do, and what is here."""
    published = tuple(parse_port(text) for text in options.publish)
    lan = choose_lan(options, kernel, LAN in kinds)
    if options.net == "none":
        if options.slirp or published:
            other = "--slirp" if options.slirp else "--publish"
            raise Fatal("--net none with " + other, "leave out one of the two")
        return Network(lan=lan, note="no network: --net none")

    given = find_given(options.slirp, "slirp")
    is_asked = given or published or options.net != "auto"
    wanted = [kind for kind in (SLIRP4NETNS, SLIRP) if options.net in ("auto", kind)]
    driven = [kind for kind in wanted if kind in kinds]
    if is_asked and not driven:
        raise Fatal("kernel has no driver for {}: {}".format(" or ".join(wanted), kernel),
                    "kernels from 6.16 on have none for slirp, those before 5.1 none for slirp4netns")

    usable = [kind for kind in driven
              if not find_helper_fault(kind, wanted, driven, bool(published))]
    names = [name for name, kind in HELPERS.items() if kind in usable]
    faults = []
    for path in [given.text] if given else list_candidates(names, True):
        kind, fault = ask_helper(path)
        fault = fault or find_helper_fault(kind, wanted, driven, bool(published))
        if not fault:
            check_ports(published)
            return Network(NetworkHelper(kind, os.path.abspath(path)), published, lan)
        faults.append("{} {}".format(path, fault))

    if is_asked:
        raise explain_no_helper(faults)
    if faults:
        warn("no network: " + "; ".join(faults))
    missing = " or ".join(names) or "driver in the kernel"
    return Network(lan=lan, note="no network: no {} found".format(missing))


def explain_no_helper(faults: Sequence[str]) -> Fatal:
    what = "no network helper found"
    if faults:
        what = "network helper cannot be used: " + "; ".join(faults)
    hint = "install slirp4netns, put it beside {}, or name it with --slirp or APPPOT_SLIRP"
    return Fatal(what, hint.format(os.path.basename(__file__)))


def await_words(source: int, words: bytes, lifeline: int) -> None:
    """Read until the words come; OSError with the last line if the program ends or hangs."""
    said = b""
    deadline = time.monotonic() + HELPER_ANSWER_S
    while words not in said:
        left_s = max(0, deadline - time.monotonic())
        ready = select.select([source, lifeline], [], [], left_s)[0]
        piece = os.read(source, 4096) if source in ready and lifeline not in ready else b""
        if not piece:
            raise OSError(0, last_line(said))
        said += piece


def publish(port: Port) -> None:
    import socket

    request = '{{"execute":"add_hostfwd","arguments":{{"proto":"{}","host_addr":"{}","host_port":{},' \
        '"guest_addr":"{}","guest_port":{}}}}}'.format(*port[:3], GUEST_ADDRESS, port.guest_port)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(HELPER_ANSWER_S)
        client.connect("net-api")
        client.sendall(request.encode())
        if b'"return"' not in client.recv(4096):
            what = "port cannot be published: {}:{}/{}"
            raise OSError(0, what.format(port.host, port.host_port, port.protocol))


def start_slirp4netns(program: str, published: Sequence[Port], lifeline: int) -> Tuple[int, int]:
    """Start it in the current directory; return its pid and the socket that is the guest's end.

    The supervisor connects it, and not the kernel: it answers, and publishes ports, only when it is
    connected.
    """
    import socket

    parent = os.getpid()
    messages, writer = os.pipe()
    ready = os.dup(writer)
    argv = [program, "--target-type=bess", "--api-socket=net-api", "--ready-fd=30", "net"]

    def live() -> int:
        try_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            execute(argv, {2: writer, 30: ready}, dict(os.environ))
        return EXIT_FAILED

    pid = fork_child("the network helper", live)
    os.close(writer)
    os.close(ready)
    guest = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        await_words(messages, b"Waiting for connection", lifeline)
        guest.connect("net")
        await_words(messages, b"\n1", lifeline)   # what it writes to --ready-fd, behind the lines before
        for port in published:
            publish(port)
    except OSError as error:
        raise Fatal("network helper failed, {}: {}".format(error.strerror or error, program),
                    "--net none runs without a network")
    os.close(messages)                            # it ignores SIGPIPE, and it blocks on a full pipe
    return pid, guest.detach()


# --- Shares -------------------------------------------------------------------------------------------------
# A share is what the guest sees of the host. The VMM offers all shares of a run and may open the
# files in them, and the agent mounts each by its tag.

class Share(NamedTuple):
    """A directory of the host, or one file in it."""
    tag: str                         # spool, save, job, layer0, bind0, ...
    directory: bytes                 # absolute path, links resolved
    only_file: Optional[bytes]       # the name of that file; None: all of the directory
    read_only: bool

    @property
    def path(self) -> bytes:
        if self.only_file is None:
            return self.directory
        return os.path.join(self.directory, self.only_file)


class Bind(NamedTuple):
    """A share that the user asked for."""
    share: Share
    target: bytes                    # absolute path in the guest


def describe_share(share: Share) -> str:
    mode = ", read-only" if share.read_only else ""
    return "share {} is {}{}".format(share.tag, os.fsdecode(share.path), mode)


def list_share_rules(shares: Iterable[Share]) -> List[Rule]:
    """The rights of the process that opens the files of the shares."""
    return [(share.path, READ_ONLY if share.read_only else READ_WRITE) for share in shares]


def make_share(tag: str, path: bytes, read_only: bool) -> Share:
    """A VMM shares directories only, so a file is shared with the directory that it is in."""
    if os.path.isdir(path):
        return Share(tag, path, None, read_only)
    return Share(tag, os.path.dirname(path), os.path.basename(path), read_only)


def find_job_directory() -> Tuple[bytes, bytes]:
    """The current directory, links resolved, and its name in $PWD, which the user and scripts know."""
    hint = "cd to another one, or run without a job directory: --no-job-dir"
    with blaming("current directory cannot be used as job directory", ".", hint):
        directory = os.getcwdb()
    if not is_current(directory):                 # the guest opens it by its path
        slashes = [index for index, byte in enumerate(directory) if byte == ord("/")]
        parents = [os.fsdecode(directory[:index] or b"/") for index in slashes]
        closed = [path for path in parents if not os.access(path, os.X_OK)]
        why = ", {} cannot be searched".format(closed[0]) if closed else ""
        raise Fatal("current directory cannot be reached by its path{}: {}".format(
            why, os.fsdecode(directory)), hint)

    alias = os.environb.get(b"PWD", b"")
    known = alias.startswith(b"/") and b".." not in alias.split(b"/") and is_current(alias)
    return directory, os.path.normpath(alias) if known else directory


def is_current(path: bytes) -> bool:
    try:
        return os.path.samefile(path, b".")
    except OSError:
        return False


def parse_bind(text: str, tag: str) -> Bind:
    """SRC[:DST[:ro]]; colons may be part of a name that exists."""
    words = text.split(":")
    for count in range(len(words), 0, -1):
        source = ":".join(words[:count])
        if os.path.lexists(source):
            break
    else:
        raise Fatal("--bind names no file or directory: " + (words[0] or repr(text)),
                    "write --bind SRC[:DST[:ro]], with SRC on this machine")

    target = words[count:]
    mode = target.pop() if target and "/" not in target[-1] else "rw"
    place = os.path.normpath(target[0] if target else os.path.abspath(source))
    is_below_root = place.startswith("/") and place.strip("/")
    if len(target) > 1 or mode not in ("ro", "rw") or not is_below_root:
        raise Fatal("--bind has no such place or mode in the guest: " + text,
                    "write --bind SRC[:DST[:ro]], with DST an absolute path below /")

    check_bound(source)
    share = make_share(tag, os.fsencode(os.path.realpath(source)), mode == "ro")
    return Bind(share, os.fsencode("/" + place.strip("/")))


def check_bound(source: str) -> None:
    with blaming("--bind cannot be used", source, "is it a link that leads nowhere?"):
        kind = name_kind(source)
    if kind not in ("", "a directory"):
        raise Fatal("--bind is {}: {}".format(kind, source),
                    "bind files and directories; it may be in one of these")
    if not os.access(source, os.R_OK | (os.X_OK if os.path.isdir(source) else 0)):
        raise Fatal("--bind cannot be read: " + source, "check its permissions")


def find_home(home: str, binds: Iterable[Bind]) -> Optional[bytes]:
    """A home directory that is bound to its own path, by itself or with what it is in."""
    home = os.path.normpath(home)
    for share, place in binds:
        target = os.fsdecode(place)
        if os.path.isabs(home) and share.only_file is None and is_below(home, target):
            shown = os.path.join(os.fsdecode(share.directory), os.path.relpath(home, target))
            if os.path.realpath(home) == os.path.realpath(shown):
                return os.fsencode(home)
    return None


class MountPoints:
    """Makes mount points of the guest that are in a share, and therefore on the host.

    Only the guest knows where its links lead, so the agent asks. A list names what is made. The last
    process that lives removes all of it. The list lies beside the run directory, in which the guest
    could change it.
    """

    def __init__(self, shares: Iterable[Share], umask: int, run: PrivateDirectory) -> None:
        self._shares = {share.tag.encode(): share for share in shares}
        self._umask = umask                       # of the command
        self._run = run
        self._once = os.O_EXCL                    # when the list is made

    def make(self, request: bytes) -> int:
        """Make the directory (d) or file (f) and what is missing above it; return 0 or the errno.

        The request names the share by its tag, and then the path in it.
        """
        match = re.fullmatch(br"([df])(job|bind\d{1,4})((?:/[^/\0]+)+)", request)
        names = match.group(3).split(b"/")[1:] if match else []
        if not match or {b".", b".."} & set(names):
            raise Misfit("no mount point")
        try:
            self._make_all(self._find_source(match.group(2)), names, match.group(1) == b"d")
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _make_all(self, path: bytes, names: List[bytes], is_directory: bool) -> None:
        place = open_place(path)
        try:
            for name in names[:-1]:
                path = os.path.join(path, name)
                self._make_missing(path, place, True)
                below = os.open(name, os.O_PATH | DIRECTORY, dir_fd=place)
                os.close(place)
                place = below
            self._make_missing(os.path.join(path, names[-1]), place, is_directory)
        finally:
            os.close(place)

    def _find_source(self, tag: bytes) -> bytes:
        """The directory of this share, if the guest may write there."""
        share = self._shares.get(tag)
        if not share or share.only_file is not None:
            raise Misfit("no such share")
        if share.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return share.directory

    def _make_missing(self, path: bytes, place: int, is_directory: bool) -> None:
        name = os.path.basename(path)
        try:
            os.stat(name, dir_fd=place, follow_symlinks=False)
            return
        except FileNotFoundError:
            self._record(path)
        inode = 0                                 # no file has it
        try:
            mode = 0o777 & ~self._umask
            if is_directory:
                os.mkdir(name, dir_fd=place)
                made = os.open(name, DIRECTORY, dir_fd=place)
            else:
                mode &= 0o666
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                made = os.open(name, flags, dir_fd=place)

            inode = os.fstat(made).st_ino
            os.fchmod(made, mode)                 # not less the runner's own umask
            os.close(made)
        finally:
            self._record(b"%d" % inode)

    def _record(self, word: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._run.path + RECORD, flags | self._once, 0o600)
        self._once = 0
        with os.fdopen(descriptor, "ab", 0) as file:
            file.write(word + b"\0")


# --- Virtio-fs: the guest's memory and its queues -----------------------------------------------------------
# A virtqueue (virtio 1.2, section 2.7) is in the guest's memory. All that is read from it may come from a
# hostile kernel, so every number is checked. A wrong one is a Misfit, which ends the run.

REGIONS_MAX = 8                      # of the guest's memory
QUEUE_MAX = 1024                     # descriptors of a queue
DESCRIPTOR = struct.Struct("<QIHH")  # address, length, flags, number of the next one
HAS_NEXT, IS_WRITABLE, IS_TABLE = 1, 2, 4         # flags of a descriptor
NO_INTERRUPT = NO_NOTIFY = 1         # flags of the available ring and of the used one
FLAGS, INDEX = 0, 1                  # numbers of two bytes at the head of a ring
HEAD = struct.Struct("<H")           # in the available ring: number of the first descriptor
USED = struct.Struct("<II")          # head of the chain, bytes that were written
ZEROS = memoryview(bytes(mmap.PAGESIZE))
Views = List[memoryview]


class Region(NamedTuple):
    """A part of the guest's memory."""
    start: int                       # address in the guest
    vmm_start: int                   # address in the VMM, by which the queues are placed
    size: int
    content: memoryview


class GuestMemory:
    def __init__(self) -> None:
        self._regions: List[Region] = []
        self.size = 0

    def clear(self) -> None:
        self._regions = []
        self.size = 0

    def add(self, start: int, vmm_start: int, size: int, descriptor: int, offset: int) -> None:
        if len(self._regions) == REGIONS_MAX or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Misfit("a region of memory that is no file, or one too many")
        before = offset % mmap.PAGESIZE
        rights = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            mapped = mmap.mmap(
                descriptor, size + before, mmap.MAP_SHARED, rights, offset=offset - before)
        except (OSError, OverflowError, ValueError) as error:
            raise Misfit("a region of memory that cannot be mapped: {}".format(error))

        content = memoryview(mapped)[before:]
        self._regions.append(Region(start, vmm_start, size, content))
        self.size += size

    def find(self, address: int, length: int, is_filled: bool = False) -> memoryview:
        for start, _, size, content in self._regions:
            offset = address - start
            if 0 <= offset <= size - length:
                return content[offset:offset + length]
        if is_filled and self._may_be_zeros(address, length):
            return ZEROS[:length]
        raise Misfit("{} bytes at {:#x}, where there is no memory".format(length, address))

    def _may_be_zeros(self, address: int, length: int) -> bool:
        """Whether this is the page of zeros, or in a place where only that is ever sent from.

        A program that writes memory it has never touched sends this page. Linux 7.2 has it in its
        image, which lies before all memory that is shared.
        """
        first = min((region.start for region in self._regions), default=0)
        return address % mmap.PAGESIZE + length <= mmap.PAGESIZE and address + length <= first

    def find_ring(self, address: int, length: int) -> memoryview:
        """By an address in the VMM."""
        for _, start, size, content in self._regions:
            offset = address - start
            if 0 <= offset <= size - length:
                return content[offset:offset + length]
        raise Misfit("a ring at {:#x}, where there is no memory".format(address))


class Chain(NamedTuple):
    """A request: buffers that the guest has filled, and buffers for the answer."""
    head: int
    filled: Views
    empty: Views


class Queue:
    """A split virtqueue, as its device sees it."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._size = 0
        self._descriptors = self._available = self._used = memoryview(b"")
        # The heads of both rings. Both sides use them at once, so a number is to be read or written
        # whole. A memoryview of numbers does that; struct goes byte by byte, and writes zeros before.
        self._offered = self._answered = memoryview(bytes(4)).cast("H")
        self._fence = threading.Lock()
        self._used_index = 0
        self._call = -1              # descriptor: tells the guest that chains were given back
        self.next = 0                # index of the next chain in the available ring
        self.untold = 0              # chains that were given back since the guest was told last

    def resize(self, size: int) -> None:
        if not 0 < size <= QUEUE_MAX or size & (size - 1):
            raise Misfit("a queue of {} descriptors".format(size))
        self._size = size
        self._descriptors = memoryview(b"")

    def place(self, descriptors: int, used: int, available: int) -> None:
        if not self._size:
            raise Misfit("a queue without a size")
        find = self._memory.find_ring
        self._available = find(available, 4 + 2 * self._size)
        self._used = find(used, 4 + 8 * self._size)
        self._offered, self._answered = self._available[:4].cast("H"), self._used[:4].cast("H")
        self._used_index = self._answered[INDEX]
        self._descriptors = find(descriptors, 16 * self._size)

    def want_kicks(self, is_wanted: bool) -> None:
        """Without kicks somebody looks for chains."""
        if self._descriptors:
            self._answered[FLAGS] = 0 if is_wanted else NO_NOTIFY
            self._order()

    def _order(self) -> None:
        """See to it that the guest sees what was written before anything is read of it after this.

        Processors may do it the other way round, and both sides would wait for each other. To take
        a lock orders them.
        """
        with self._fence:
            pass

    def replace_call(self, descriptor: int) -> None:
        if self._call >= 0:
            os.close(self._call)
        self._call = descriptor
        if descriptor >= 0:
            os.set_blocking(descriptor, False)

    def has_chain(self) -> bool:
        if not self._descriptors:
            return False
        return bool(self._offered[INDEX] != self.next)

    def take(self) -> Chain:
        """The next chain, after has_chain()."""
        head, = HEAD.unpack_from(self._available, 4 + 2 * (self.next % self._size))
        self.next = (self.next + 1) & 0xFFFF

        filled: Views = []
        empty: Views = []
        table, number = self._find_table(head)
        count = len(table) // DESCRIPTOR.size
        for _ in range(count):
            if number >= count:
                raise Misfit("a descriptor that its table does not have")
            address, length, flags, following = DESCRIPTOR.unpack_from(
                table, DESCRIPTOR.size * number)
            view = self._memory.find(address, length, not flags & IS_WRITABLE)
            (empty if flags & IS_WRITABLE else filled).append(view)
            if not flags & HAS_NEXT:
                return Chain(head, filled, empty)
            number = following
        raise Misfit("a chain that never ends")

    def _find_table(self, head: int) -> Tuple[memoryview, int]:
        """The table that holds the descriptors of a chain, and the number of the first."""
        if head >= self._size:
            raise Misfit("a chain that its queue does not have")
        address, length, flags, _ = DESCRIPTOR.unpack_from(
            self._descriptors, DESCRIPTOR.size * head)
        if not flags & IS_TABLE:
            return self._descriptors, head
        if length > DESCRIPTOR.size * QUEUE_MAX:
            raise Misfit("a table of {} bytes".format(length))
        return self._memory.find(address, length), 0

    def give_back(self, chain: Chain, written: int) -> None:
        slot = 4 + 8 * (self._used_index % self._size)
        USED.pack_into(self._used, slot, chain.head, written)
        self._used_index = (self._used_index + 1) & 0xFFFF
        self._answered[INDEX] = self._used_index
        self.untold += 1

    def is_many(self, count: int) -> bool:
        """Whether so many chains leave the guest little room for more."""
        return count >= self._size // 4

    def notify(self) -> None:
        """Tell the guest that chains were given back, if it wants to know."""
        self.untold = 0
        if self._call < 0:
            return
        self._order()
        if self._offered[FLAGS] & NO_INTERRUPT:
            return
        try:
            os.write(self._call, b"\1\0\0\0\0\0\0\0")
        except BlockingIOError:                   # it was told often enough
            pass


# --- Virtio-fs: requests ------------------------------------------------------------------------------------
# FUSE 7.38, include/uapi/linux/fuse.h. An operation takes a Request and returns the payload of the answer,
# or raises OSError.

IN_HEADER = struct.Struct("<IIQQIIIHH")           # struct fuse_in_header
OUT_HEADER = struct.Struct("<IiQ")                # length, -errno, unique
BODY_MAX = 128 << 10                 # of a request other than WRITE; a value of an attribute has 64 KiB
DATA_MAX = 1 << 20                   # bytes of one READ or WRITE


class Request(NamedTuple):
    opcode: int
    unique: int                      # number of the request
    node: int
    uid: int
    gid: int
    pid: int                         # in the guest; of the thread
    chain: Chain

    def read_body(self) -> bytes:
        return peek(self.chain.filled, IN_HEADER.size, BODY_MAX)

    def unpack(self, layout: struct.Struct) -> Tuple[Any, ...]:
        """The fixed part of the body."""
        body = peek(self.chain.filled, IN_HEADER.size, layout.size)
        if len(body) < layout.size:
            raise failure(errno.EINVAL)
        return layout.unpack(body)

    def unpack_names(self, layout: struct.Struct, count: int) -> Tuple[Tuple[Any, ...], List[bytes]]:
        """The fixed part of the body and the names behind it."""
        body = self.read_body()
        names = body[layout.size:].split(b"\0")
        if len(body) < layout.size or len(names) <= count:
            raise failure(errno.EINVAL)
        return layout.unpack_from(body), names[:count]


# The payload, or the number of bytes of it that are in the guest's memory already. None: no answer yet.
Payload = Union[bytes, int, None]
Operation = Callable[[Request], Payload]


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def peek(views: Views, start: int, size: int) -> bytes:
    """Up to `size` bytes of the buffers, from `start` on."""
    if len(views) == 2 and len(views[0]) == start and len(views[1]) <= size:
        return bytes(views[1])                    # as Linux fills them
    return b"".join(skip(views, start, size))


def skip(views: Views, start: int, size: int) -> Views:
    """The buffers from `start` on, with `size` bytes at most."""
    parts: Views = []
    for view in views:
        part = view[start:start + size]
        start = max(0, start - len(view))
        size -= len(part)
        if part:
            parts.append(part)
    return parts


def decode_request(chain: Chain) -> Request:
    filled = chain.filled
    is_alone = filled and len(filled[0]) == IN_HEADER.size
    header = filled[0] if is_alone else b"".join(skip(filled, 0, IN_HEADER.size))
    if len(header) < IN_HEADER.size:
        raise Misfit("a request without a header")
    _, opcode, unique, node, uid, gid, pid, _, _ = IN_HEADER.unpack(header)
    return Request(opcode, unique, node, uid, gid, pid, chain)


def encode_answer(request: Request, payload: Union[bytes, int], error: int = 0) -> int:
    """Fill the buffers for the answer; return the number of bytes."""
    views = request.chain.empty
    if not views:                                 # the guest wants none
        return 0
    if isinstance(payload, int):
        length = OUT_HEADER.size + payload
        scatter(memoryview(OUT_HEADER.pack(length, 0, request.unique)), views)
        return length

    length = OUT_HEADER.size + len(payload)
    head = OUT_HEADER.pack(length, -error, request.unique)
    if len(views[0]) == OUT_HEADER.size and len(views) > 1 and len(views[1]) >= len(payload):
        views[0][:] = head
        views[1][:len(payload)] = payload
        return length

    if sum(map(len, views)) < length:
        raise Misfit("an answer of {} bytes has no room".format(length))
    scatter(memoryview(head + payload), views)
    return length


def scatter(content: memoryview, views: Views) -> None:
    for view in views:
        piece = content[:len(view)]
        view[:len(piece)] = piece
        content = content[len(piece):]


# --- Virtio-fs: the files -----------------------------------------------------------------------------------
# A node is a file that the guest's kernel knows by a number, a handle is one that it has open. The server
# uses a single name at a time, from a descriptor of its directory on, and follows no link.

ROOT_NODE, LOCKS_NODE = 1, 2         # FUSE_ROOT_ID, and the file with the locks that wait
PINS_MAX = 4096                      # directories that are kept open
PINS_SHARE = 4                       # the part for them of the files that the server may have open
NODES_MIN = 1 << 16                  # that the guest's kernel may know, whatever its memory
NODE_MEMORY = 1024                   # bytes that a kernel needs at least for a file that it knows
OPENED = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
PATH_ONLY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
WRITES = os.O_WRONLY | os.O_RDWR
LARGEST = (1 << 64) - 1
ANY_FILE = (0, 0)                    # device and inode of a share that is one file, known by its name
ENTRY_HEAD = struct.Struct("<QQQQII")             # struct fuse_entry_out before the attributes
# struct fuse_attr
ATTRIBUTES = struct.Struct("<QQQqqqIIIIIIIIII")
Handles = Dict[int, "Handle"]


class Node:
    __slots__ = ("number", "share", "parent", "name", "file", "lookups", "pin", "handles", "lockers")

    def __init__(self, share: int, parent: Optional["Node"], name: bytes, file: Tuple[int, int]) -> None:
        self.number = 0
        self.share = share           # index
        self.parent = parent         # None: `pin` is open for good
        self.name = name             # by which the node was found last
        self.file = file             # device and inode
        self.lookups = 0             # of the guest's kernel, which forgets them in the end
        self.pin = -1                # descriptor of a directory (O_PATH)
        self.handles: Tuple["Handle", ...] = ()
        self.lockers: Dict[int, int] = NO_LOCKERS  # by owner: descriptor that has its locks


NO_LOCKERS: Dict[int, int] = {}


class Handle:
    __slots__ = ("node", "fd", "flags", "unappended", "owners", "entries")

    def __init__(self, node: Node, fd: int, flags: int) -> None:
        self.node = node
        self.fd = fd                 # -1 of a directory
        self.flags = flags
        self.unappended = -1         # the same without O_APPEND
        self.owners: Set[int] = set()             # whose locks came by this handle
        self.entries: Optional["Entries"] = None  # of a directory

    def close(self) -> None:
        for descriptor in (self.fd, self.unappended):
            if descriptor >= 0:
                os.close(descriptor)
        if self.entries:
            self.entries.close()


class Attributes:
    """What the guest's kernel is told of files."""

    def __init__(self) -> None:
        self._devices: Dict[int, int] = {}        # to their index

    def mix_inode(self, device: int, inode: int) -> int:
        """The guest sees one device, so inodes of several get different numbers."""
        index = self._devices.setdefault(device, len(self._devices))
        return inode ^ (index << 48)

    def encode_entry(self, node: Node, status: os.stat_result) -> bytes:
        """struct fuse_entry_out"""
        return ENTRY_HEAD.pack(
            node.number, 0, 0, 0, 0, self.find_validity(status)) + self.encode(status)

    def find_validity(self, status: os.stat_result) -> int:
        """Nanoseconds, which become a tick of the guest's kernel (10 ms).

        Without them it asks for the attributes of a directory each time that it searches it.
        """
        return 1 if stat.S_ISDIR(status.st_mode) else 0

    def encode(self, status: os.stat_result) -> bytes:
        atime, mtime, ctime = status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns
        second = 10 ** 9
        return ATTRIBUTES.pack(
            self.mix_inode(status.st_dev, status.st_ino) & LARGEST, status.st_size, status.st_blocks,
            atime // second, mtime // second, ctime // second,
            atime % second, mtime % second, ctime % second,
            status.st_mode, status.st_nlink, status.st_uid, status.st_gid,
            encode_device(status.st_rdev), status.st_blksize, 0)


class Files:
    """What the guest's kernel knows of the shares."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = shares
        self.nodes_max = NODES_MIN
        self.attributes = Attributes()
        self.roots: Dict[bytes, Node] = {}
        self.nodes: Dict[int, Node] = {}
        self.handles: Handles = {}
        self._known: Dict[Tuple[int, int, int], Node] = {}    # by share, device and inode
        self._last_number = LOCKS_NODE
        self._last_handle = 0
        # Those in use, the one that was used last at the end.
        self._pinned: "collections.OrderedDict[Node, None]" = collections.OrderedDict()
        self._pins_max = min(PINS_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // PINS_SHARE)

        for index, share in enumerate(shares):
            self.roots[share.tag.encode()] = self._open_root(index, share)

    def _open_root(self, index: int, share: Share) -> Node:
        pin = os.open(share.directory, PATH_ONLY | os.O_DIRECTORY)
        status = os.fstat(pin)
        root = Node(index, None, b"", (status.st_dev, status.st_ino))
        root.pin = pin
        if share.only_file is not None:
            root = Node(index, root, share.only_file, ANY_FILE)
        self._number(root)
        return root

    def _number(self, node: Node) -> None:
        if len(self.nodes) >= self.nodes_max:
            raise failure(errno.ENFILE)
        self._last_number += 1
        node.number = self._last_number
        self.nodes[node.number] = node

    def find(self, number: int) -> Node:
        node = self.nodes.get(number)
        if node is None:
            raise failure(errno.ESTALE)
        return node

    def check_writable(self, node: Node) -> None:
        if self.shares[node.share].read_only:
            raise failure(errno.EROFS)

    def look_up(self, directory: Node, name: bytes) -> Tuple[Node, os.stat_result]:
        status = os.stat(check_name(name), dir_fd=self.pin(directory), follow_symlinks=False)
        return self.know(directory, name, status), status

    def know(self, directory: Node, name: bytes, status: os.stat_result) -> Node:
        """The node of a file that the guest's kernel has come across."""
        file = status.st_dev, status.st_ino
        key = (directory.share, *file)
        node = self._known.get(key)
        if node is None:
            node = Node(directory.share, directory, name, file)
            self._number(node)
            self._known[key] = node
        elif node.parent is not None:
            node.parent = directory
            node.name = name
        node.lookups += 1
        return node

    def forget(self, number: int, lookups: int) -> None:
        node = self.nodes.get(number)
        if node is None:
            return
        node.lookups -= lookups
        is_root = node.parent is None or node.file == ANY_FILE
        if node.lookups > 0 or node.handles or is_root:
            return
        del self.nodes[number]
        self.renounce(node)
        if node.pin >= 0:
            del self._pinned[node]
            os.close(node.pin)
            node.pin = -1

    def renounce(self, node: Node) -> None:
        """Its inode number may come again, of another file."""
        key = (node.share, *node.file)
        if self._known.get(key) is node:
            del self._known[key]

    def find_last_name(self, directory: Node, name: bytes) -> Optional[Node]:
        """The known node that loses its last name with this one."""
        try:
            status = os.stat(name, dir_fd=self.pin(directory), follow_symlinks=False)
        except FileNotFoundError:
            return None
        is_last = status.st_nlink == 1 or stat.S_ISDIR(status.st_mode)
        key = directory.share, status.st_dev, status.st_ino
        return self._known.get(key) if is_last else None

    # Descriptors.

    def pin(self, node: Node) -> int:
        """A descriptor (O_PATH) of a directory. It stays open for some other pins."""
        if node.pin < 0:
            self._open_pins(node)
        elif node.parent is not None:
            self._pinned.move_to_end(node)
        return node.pin

    def pin_parent(self, node: Node) -> int:
        if node.parent is None:                   # a share, which the guest takes for something else
            raise failure(errno.EINVAL)
        return self.pin(node.parent)

    def _open_pins(self, node: Node) -> None:
        missing = [node]
        above = node.parent
        while above is not None and above.pin < 0:
            missing.append(above)
            above = above.parent
            if len(missing) > self.nodes_max:    # others move directories into one another
                raise failure(errno.ESTALE)
        if above is None:
            raise failure(errno.ESTALE)

        for below in reversed(missing):
            below.pin = self._open_same(below, above.pin, PATH_ONLY | os.O_DIRECTORY)
            self._pinned[below] = None
            if len(self._pinned) > max(2, self._pins_max):
                self._unpin()
            above = below

    def _unpin(self) -> None:
        oldest, _ = self._pinned.popitem(last=False)
        os.close(oldest.pin)
        oldest.pin = -1

    def open_file(self, directory: int, name: bytes, flags: int, mode: int = 0) -> int:
        """As os.open(). If this process has too many files open, pins make room."""
        while True:
            try:
                return os.open(name, flags | OPENED, mode, dir_fd=directory)
            except OSError as error:
                if error.errno != errno.EMFILE or len(self._pinned) < 2:
                    raise
                self._unpin()

    def _open_same(self, node: Node, directory: int, flags: int) -> int:
        """Open a node by its name, if it is still that file."""
        fd = self.open_file(directory, node.name, flags)
        try:
            self._check_same(node, os.fstat(fd))
        except OSError:
            os.close(fd)
            raise
        return fd

    def _check_same(self, node: Node, status: os.stat_result) -> None:
        if node.file not in ((status.st_dev, status.st_ino), ANY_FILE):
            raise failure(errno.ESTALE)

    def read_status(self, node: Node) -> os.stat_result:
        if node.pin >= 0:
            return os.fstat(node.pin)
        if node.handles and node.file != ANY_FILE and node.handles[0].fd >= 0:
            return os.fstat(node.handles[0].fd)
        status = os.stat(node.name, dir_fd=self.pin_parent(node), follow_symlinks=False)
        self._check_same(node, status)
        return status

    @contextmanager
    def reach(self, node: Node) -> Iterator[bytes]:
        """A path that leads to this very file, even if that is a link."""
        fds = [handle.fd for handle in node.handles if handle.fd >= 0]
        if node.pin >= 0 or fds:
            yield b"/proc/self/fd/%d" % (node.pin if node.pin >= 0 else fds[0])
            return
        fd = self._open_same(node, self.pin_parent(node), os.O_PATH)
        try:
            yield b"/proc/self/fd/%d" % fd
        finally:
            os.close(fd)

    def open(self, node: Node, flags: int) -> int:
        """Open a regular file."""
        try:
            fd = self._open_same(node, self.pin_parent(node), flags)
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ESTALE)
            fds = [handle.fd for handle in node.handles if handle.fd >= 0]
            if not gone or not fds:
                raise
            fd = os.open(b"/proc/self/fd/%d" % fds[0], flags | os.O_CLOEXEC)
        self.check_regular(fd)
        return fd

    def check_regular(self, fd: int) -> None:
        """The guest's kernel opens what is not regular itself, so something took the file's place."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise failure(errno.ESTALE)

    def add_handle(self, node: Node, fd: int, flags: int) -> int:
        if len(self.handles) >= self.nodes_max:
            raise failure(errno.ENFILE)
        handle = Handle(node, fd, flags)
        node.handles += (handle,)
        self._last_handle += 1
        self.handles[self._last_handle] = handle
        return self._last_handle

    def find_handle(self, number: int) -> Handle:
        handle = self.handles.get(number)
        if handle is None:
            raise failure(errno.EBADF)
        return handle

    def close(self) -> None:
        for handle in self.handles.values():
            handle.close()
        for node in {*self.nodes.values(), *(root.parent or root for root in self.roots.values())}:
            for descriptor in (node.pin, *node.lockers.values()):
                if descriptor >= 0:
                    os.close(descriptor)


def drop_locks(node: Node, owner: int) -> None:
    fd = node.lockers.pop(owner, -1)
    if fd >= 0:
        os.close(fd)


def check_name(name: bytes) -> bytes:
    if not name or name in (b".", b"..") or b"/" in name:
        raise failure(errno.EINVAL)
    return name


def encode_device(device: int) -> int:
    """As new_encode_dev() of the kernel."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF | major << 8 | (minor & ~0xFF) << 12) & 0xFFFFFFFF


def decode_device(number: int) -> int:
    minor = number & 0xFF | number >> 12 & 0xFFF00
    return os.makedev(number >> 8 & 0xFFF, minor)


# --- Virtio-fs: operations on names -------------------------------------------------------------------------

CREATE_IN, OPEN_OUT = struct.Struct("<IIII"), struct.Struct("<QII")
MKNOD_IN, MKDIR_IN = struct.Struct("<IIII"), struct.Struct("<II")
NUMBER, RENAME_IN, NO_FIXED = struct.Struct("<Q"), struct.Struct("<QII"), struct.Struct("")
SYS_RENAMEAT2 = 316                               # of x86-64, where User-Mode Linux runs
O_TMPFILE = getattr(os, "O_TMPFILE", 0o20000000 | os.O_DIRECTORY)
# Flags of the guest's open(2) that the host's gets, too. O_DIRECT would ask for aligned buffers.
PASSED_FLAGS = (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_EXCL | os.O_SYNC | os.O_DSYNC
                | os.O_NOATIME)
FOPEN_DIRECT_IO, FOPEN_NOFLUSH = 1, 1 << 5


def find_open_flags(flags: int) -> int:
    """For the guest's kernel. By way of its cache, Linux 6.1 tears an append where a page ends."""
    return FOPEN_DIRECT_IO if flags & os.O_APPEND else 0


class NameOperations:
    """Operations that find, make, rename and remove names."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._is_root = os.geteuid() == 0
        self.open_flags = 0                       # for the answer to OPEN and CREATE

    def list(self) -> Dict[int, Operation]:
        return {1: self.look_up, 6: self.symlink, 8: self.mknod, 9: self.mkdir, 10: self.unlink,
                11: self.rmdir, 12: self.rename, 13: self.link, 35: self.create, 45: self.rename2,
                51: self.make_nameless}

    def look_up(self, request: Request) -> bytes:
        name = request.read_body().rstrip(b"\0")
        return self._look_up(request, name)

    def _look_up(self, request: Request, name: bytes) -> bytes:
        node, status = self._files.look_up(self._files.find(request.node), name)
        return self._files.attributes.encode_entry(node, status)

    def symlink(self, request: Request) -> bytes:
        _, (name, target) = request.unpack_names(NO_FIXED, 2)
        directory = self._open_directory(request)
        os.symlink(target, check_name(name), dir_fd=directory)
        return self._finish(request, directory, name)

    def mknod(self, request: Request) -> bytes:
        (mode, device, umask, _), (name,) = request.unpack_names(MKNOD_IN, 1)
        directory = self._open_directory(request)
        self._set_umask(umask)
        os.mknod(check_name(name), mode, decode_device(device), dir_fd=directory)
        return self._finish(request, directory, name)

    def mkdir(self, request: Request) -> bytes:
        (mode, umask), (name,) = request.unpack_names(MKDIR_IN, 1)
        directory = self._open_directory(request)
        self._set_umask(umask)
        os.mkdir(check_name(name), mode, dir_fd=directory)
        return self._finish(request, directory, name)

    def unlink(self, request: Request) -> bytes:
        return self._remove(request, os.unlink)

    def rmdir(self, request: Request) -> bytes:
        return self._remove(request, os.rmdir)

    def _remove(self, request: Request, remove: Callable[..., None]) -> bytes:
        name = check_name(request.read_body().rstrip(b"\0"))
        node = self._files.find_last_name(self._files.find(request.node), name)
        remove(name, dir_fd=self._open_directory(request))
        if node:
            self._files.renounce(node)
        return b""

    def link(self, request: Request) -> bytes:
        (number,), (name,) = request.unpack_names(NUMBER, 1)
        node = self._files.find(number)
        directory = self._open_directory(request)
        self._check_one_share(node, self._files.find(request.node))
        with self._files.reach(node) as path:
            os.link(path, check_name(name), dst_dir_fd=directory, follow_symlinks=True)
        return self._look_up(request, name)

    def rename(self, request: Request) -> bytes:
        (number,), names = request.unpack_names(NUMBER, 2)
        return self._rename(request, number, 0, names)

    def rename2(self, request: Request) -> bytes:
        (number, flags, _), names = request.unpack_names(RENAME_IN, 2)
        return self._rename(request, number, flags, names)

    def _rename(self, request: Request, number: int, flags: int, names: List[bytes]) -> bytes:
        files = self._files
        source, target = files.find(request.node), files.find(number)
        old, new = map(check_name, names)
        self._check_one_share(source, target)
        files.check_writable(source)
        replaced = files.find_last_name(target, new)

        # To open the second directory may close the first.
        first = os.dup(files.pin(source))
        try:
            second = files.pin(target)
            if flags:
                call_libc("syscall", SYS_RENAMEAT2, first, old, second, new, flags)
            else:
                os.rename(old, new, src_dir_fd=first, dst_dir_fd=second)
        finally:
            os.close(first)
        if replaced and not flags:
            files.renounce(replaced)
        self._rename_known(target, new)
        if flags:
            self._rename_known(source, old)
        return b""

    def _rename_known(self, directory: Node, name: bytes) -> None:
        """Take a new name of a file into its node."""
        try:
            node, _ = self._files.look_up(directory, name)
        except FileNotFoundError:
            return
        node.lookups -= 1
        self._files.forget(node.number, 0)

    def create(self, request: Request) -> bytes:
        (flags, mode, umask, _), (name,) = request.unpack_names(CREATE_IN, 1)
        directory = self._open_directory(request)
        self._set_umask(umask)
        flags = flags & PASSED_FLAGS | os.O_CREAT
        try:
            fd = self._files.open_file(directory, check_name(name), flags | os.O_EXCL, mode)
            self._give_away(request, directory, fd, mode)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            fd = self._files.open_file(directory, name, flags, mode)
        return self._open_made(request, name, fd, flags)

    def make_nameless(self, request: Request) -> bytes:
        (flags, mode, umask, _), _ = request.unpack_names(CREATE_IN, 0)
        directory = self._open_directory(request)
        self._set_umask(umask)
        flags = flags & PASSED_FLAGS
        path = b"/proc/self/fd/%d" % directory
        fd = os.open(path, flags | O_TMPFILE | os.O_CLOEXEC, mode)
        self._give_away(request, directory, fd, mode)
        return self._open_made(request, b"", fd, flags)

    def _open_made(self, request: Request, name: bytes, fd: int, flags: int) -> bytes:
        self._files.check_regular(fd)
        status = os.fstat(fd)
        node = self._files.know(self._files.find(request.node), name, status)
        number = self._files.add_handle(node, fd, flags)
        return self._files.attributes.encode_entry(node, status) + OPEN_OUT.pack(
            number, self.open_flags | find_open_flags(flags), 0)

    def _open_directory(self, request: Request) -> int:
        """To change it."""
        directory = self._files.find(request.node)
        self._files.check_writable(directory)
        return self._files.pin(directory)

    def _check_one_share(self, one: Node, other: Node) -> None:
        if one.share != other.share:
            raise failure(errno.EXDEV)

    def _set_umask(self, umask: int) -> None:
        """The host applies it, because a default ACL comes before it."""
        if umask != self._umask:
            os.umask(umask)
            self._umask = umask

    def _finish(self, request: Request, directory: int, name: bytes) -> bytes:
        node, status = self._files.look_up(self._files.find(request.node), name)
        if self._has_other_owner(request):
            gid = -1 if os.fstat(directory).st_mode & stat.S_ISGID else request.gid
            os.chown(name, request.uid, gid, dir_fd=directory, follow_symlinks=False)
            status = self._files.read_status(node)
        return self._files.attributes.encode_entry(node, status)

    def _give_away(self, request: Request, directory: int, fd: int, mode: int) -> None:
        if self._has_other_owner(request):
            gid = -1 if os.fstat(directory).st_mode & stat.S_ISGID else request.gid
            os.fchown(fd, request.uid, gid)
            if mode & (stat.S_ISUID | stat.S_ISGID):           # which fchown() has taken
                os.fchmod(fd, mode & ~self._umask)

    def _has_other_owner(self, request: Request) -> bool:
        """Only root of the host can make files of others."""
        return self._is_root and (request.uid, request.gid) != (0, 0)


# --- Virtio-fs: operations on attributes --------------------------------------------------------------------

ATTRIBUTES_HEAD = struct.Struct("<QII")           # struct fuse_attr_out before the attributes
SETATTR_IN = struct.Struct("<I4xQQQqqqIIIIIII4x")
SETXATTR_IN, XATTR_SIZE = struct.Struct("<II"), struct.Struct("<II")
STATFS_OUT = struct.Struct("<QQQQQIII4x24x")
# FATTR_ of include/uapi/linux/fuse.h
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME = 1, 2, 4, 8, 16, 32
SET_BY_HANDLE, SET_ATIME_NOW, SET_MTIME_NOW, DROP_SUID = 64, 128, 256, 2048
TIMES = struct.Struct("@qqqq")                    # two of struct timespec
NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2          # UTIME_NOW, UTIME_OMIT
AT_FDCWD = -100


class AttributeOperations:
    def __init__(self, files: Files) -> None:
        self._files = files

    def list(self) -> Dict[int, Operation]:
        return {3: self.getattr, 4: self.setattr, 5: self.readlink, 17: self.statfs,
                21: self.setxattr, 22: self.getxattr, 23: self.listxattr, 24: self.removexattr}

    def getattr(self, request: Request) -> bytes:
        return self._encode(self._files.read_status(self._files.find(request.node)))

    def setattr(self, request: Request) -> bytes:
        valid, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid = \
            request.unpack(SETATTR_IN)
        node = self._files.find(request.node)
        self._files.check_writable(node)

        if valid & SET_SIZE:
            self._truncate(node, handle if valid & SET_BY_HANDLE else None, size)
        with self._files.reach(node) as path:
            if valid & (SET_UID | SET_GID):
                os.chown(path, uid if valid & SET_UID else -1, gid if valid & SET_GID else -1)
            if valid & SET_MODE:
                os.chmod(path, mode & 0o7777)
            if valid & DROP_SUID and not valid & SET_MODE:
                drop_suid(path)
            if valid & (SET_ATIME | SET_MTIME):
                times = (choose_time(valid & SET_ATIME, valid & SET_ATIME_NOW, atime, atime_ns)
                         + choose_time(valid & SET_MTIME, valid & SET_MTIME_NOW, mtime, mtime_ns))
                set_times(path, times)
        return self._encode(self._files.read_status(node))

    def _truncate(self, node: Node, number: Optional[int], size: int) -> None:
        if number is not None:
            os.ftruncate(self._files.find_handle(number).fd, size)
            return
        fd = self._files.open(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def readlink(self, request: Request) -> bytes:
        node = self._files.find(request.node)
        return os.readlink(node.name, dir_fd=self._files.pin_parent(node))

    def statfs(self, request: Request) -> bytes:
        node = self._files.find(request.node)
        with self._files.reach(node) as path:
            status = os.statvfs(path)
        return STATFS_OUT.pack(
            status.f_blocks, status.f_bfree, status.f_bavail, status.f_files, status.f_ffree,
            status.f_bsize, status.f_namemax, status.f_frsize)

    def setxattr(self, request: Request) -> bytes:
        body = request.read_body()
        size, flags = SETXATTR_IN.unpack_from(body)
        name, _, value = body[SETXATTR_IN.size:].partition(b"\0")
        if len(value) != size:
            raise failure(errno.EINVAL)
        node = self._files.find(request.node)
        self._files.check_writable(node)
        with self._files.reach(node) as path:
            os.setxattr(path, name, value, flags)
        return b""

    def getxattr(self, request: Request) -> bytes:
        (room, _), (name,) = request.unpack_names(XATTR_SIZE, 1)
        with self._files.reach(self._files.find(request.node)) as path:
            return self._fit(os.getxattr(path, name), room)

    def listxattr(self, request: Request) -> bytes:
        room, _ = request.unpack(XATTR_SIZE)
        with self._files.reach(self._files.find(request.node)) as path:
            names = [os.fsencode(name) + b"\0" for name in os.listxattr(path)]
        return self._fit(b"".join(names), room)

    def _fit(self, value: bytes, room: int) -> bytes:
        """Without room only the size is asked for."""
        if not room:
            return XATTR_SIZE.pack(len(value), 0)
        if len(value) > room:
            raise failure(errno.ERANGE)
        return value

    def removexattr(self, request: Request) -> bytes:
        _, (name,) = request.unpack_names(NO_FIXED, 1)
        node = self._files.find(request.node)
        self._files.check_writable(node)
        with self._files.reach(node) as path:
            os.removexattr(path, name)
        return b""

    def _encode(self, status: os.stat_result) -> bytes:
        head = ATTRIBUTES_HEAD.pack(0, self._files.attributes.find_validity(status), 0)
        return head + self._files.attributes.encode(status)


def choose_time(is_set: int, is_now: int, seconds: int, nanoseconds: int) -> Tuple[int, int]:
    if not is_set:
        return 0, OMIT
    return (0, NOW) if is_now else (seconds, nanoseconds)


def set_times(path: bytes, times: Tuple[int, ...]) -> None:
    """As utimensat(2), of which os.utime() cannot leave out one of the times."""
    call_libc("utimensat", AT_FDCWD, path, TIMES.pack(*times), 0)


def drop_suid(path: bytes) -> None:
    """What the kernel does if somebody writes who is not root."""
    mode = os.stat(path).st_mode
    lost = mode & stat.S_ISUID | (mode & stat.S_ISGID if mode & stat.S_IXGRP else 0)
    if lost and stat.S_ISREG(mode):
        os.chmod(path, stat.S_IMODE(mode & ~lost))


# --- Virtio-fs: operations on contents ----------------------------------------------------------------------

OPEN_IN, READ_IN = struct.Struct("<II"), struct.Struct("<QQI")
WRITE_IN, WRITE_OUT = struct.Struct("<QQIIQII"), struct.Struct("<II")
RELEASE_IN, FLUSH_IN = struct.Struct("<QIIQ"), struct.Struct("<QIIQ")
FSYNC_IN, FALLOCATE_IN = struct.Struct("<QII"), struct.Struct("<QQQII")
LSEEK_IN, COPY_IN = struct.Struct("<QQI4x"), struct.Struct("<QQQQQQQ")
DIRENT = struct.Struct("<QQII")
LOOKUP_OPEN = 8192                   # .kernel/16-fuse-lookup-open.patch
FROM_CACHE, WRITE_DROPS_SUID, DATA_ONLY = 1, 4, 1
COPY_MAX = 64 << 20                  # bytes at once, so that the others need not wait long
DT_UNKNOWN, DT_DIR, DT_REG, DT_LNK = 0, 4, 8, 10


class Entries:
    """A stream of a directory's entries. An offset is the number of entries before it."""

    def __init__(self, files: Files, directory: Node) -> None:
        self._files = files
        self._directory = directory
        self._offset = -1
        self._scan: Any = None
        self._next: Optional["os.DirEntry[bytes]"] = None

    def read(self, offset: int, room: int) -> bytes:
        """As many entries as fit, from an offset on."""
        if offset != self._offset:
            self._seek(offset)
        content = bytearray()
        while self._offset < 2 or self._next is not None:
            name, inode, kind = self._describe()
            padding = bytes(-len(name) % 8)
            entry = DIRENT.pack(inode, self._offset + 1, len(name), kind) + name + padding
            if len(content) + len(entry) > room:
                break
            content += entry
            self._advance()
        return bytes(content)

    def close(self) -> None:
        if self._scan is not None:
            self._scan.close()

    def _seek(self, offset: int) -> None:
        self.close()
        self._scan = os.scandir(b"/proc/self/fd/%d" % self._files.pin(self._directory))
        self._offset = 0
        self._next = None
        while self._offset < min(offset, 2) or self._offset < offset and self._next is not None:
            self._advance()

    def _advance(self) -> None:
        self._offset += 1
        if self._offset >= 2:
            self._next = next(self._scan, None)

    def _describe(self) -> Tuple[bytes, int, int]:
        """Name, inode and type of the next entry. The first two are this directory and the one above."""
        device = self._directory.file[0]
        if self._next is None:
            above = self._directory.parent
            is_above = self._offset == 1 and above is not None
            inode = (above if is_above and above else self._directory).file[1]
            return b".." if self._offset else b".", self._files.attributes.mix_inode(device, inode), DT_DIR
        entry = self._next
        return entry.name, self._files.attributes.mix_inode(device, entry.inode()), find_kind(entry)


def find_kind(entry: "os.DirEntry[bytes]") -> int:
    try:
        if entry.is_symlink():
            return DT_LNK
        if entry.is_dir(follow_symlinks=False):
            return DT_DIR
        return DT_REG if entry.is_file(follow_symlinks=False) else DT_UNKNOWN
    except OSError:                               # a file system that does not tell
        return DT_UNKNOWN


class ContentOperations:
    def __init__(self, files: Files, later: Callable[[Request, Callable[[], bytes]], None]) -> None:
        self._files = files
        self._later = later
        self.open_flags = 0

    def list(self) -> Dict[int, Operation]:
        return {14: self.open, 15: self.read, 16: self.write, 18: self.release, 20: self.fsync,
                27: self.opendir, 28: self.readdir, 29: self.release, 30: self.fsyncdir,
                43: self.fallocate, 46: self.lseek, 47: self.copy, LOOKUP_OPEN: self.look_up_and_open}

    def open(self, request: Request) -> bytes:
        flags, _ = request.unpack(OPEN_IN)
        return self._open(self._files.find(request.node), flags)

    def look_up_and_open(self, request: Request) -> bytes:
        """A request of .kernel/16-fuse-lookup-open.patch. To open what is no regular file may take for ever."""
        (flags, _), (name,) = request.unpack_names(OPEN_IN, 1)
        node, status = self._files.look_up(self._files.find(request.node), name)
        try:
            if not stat.S_ISREG(status.st_mode):
                raise failure(errno.EOPNOTSUPP)
            opened = self._open(node, flags)
        except OSError:
            self._files.forget(node.number, 1)
            raise
        return self._files.attributes.encode_entry(node, status) + opened

    def _open(self, node: Node, flags: int) -> bytes:
        if flags & (WRITES | os.O_TRUNC):
            self._files.check_writable(node)
        flags &= PASSED_FLAGS & ~os.O_EXCL
        number = self._files.add_handle(node, self._files.open(node, flags), flags)
        # A close must be told if it takes locks away, or brings an error of writing.
        is_silent = not flags & WRITES and not node.lockers
        how = self.open_flags | find_open_flags(flags) | (FOPEN_NOFLUSH if is_silent else 0)
        return OPEN_OUT.pack(number, how, 0)

    def read(self, request: Request) -> int:
        number, offset, size = request.unpack(READ_IN)
        room = skip(request.chain.empty, OUT_HEADER.size, min(size, DATA_MAX))
        fd = self._files.find_handle(number).fd
        if hasattr(os, "preadv"):
            return os.preadv(fd, room, check_offset(offset))

        content = memoryview(os.pread(fd, sum(map(len, room)), check_offset(offset)))
        scatter(content, room)
        return len(content)

    def write(self, request: Request) -> bytes:
        number, offset, size, how, _, _, _ = request.unpack(WRITE_IN)
        data = skip(request.chain.filled, IN_HEADER.size + WRITE_IN.size, min(size, DATA_MAX))
        handle = self._files.find_handle(number)
        self._files.check_writable(handle.node)
        fd = handle.fd
        if how & FROM_CACHE and handle.flags & os.O_APPEND:
            fd = self._find_unappended(handle)
        if how & WRITE_DROPS_SUID and os.geteuid() == 0:       # of others the host takes it
            drop_suid(b"/proc/self/fd/%d" % fd)

        if hasattr(os, "pwritev"):
            written = os.pwritev(fd, data, check_offset(offset))
        else:
            written = os.pwrite(fd, b"".join(data), check_offset(offset))
        if how & FROM_CACHE and written < size:
            # The guest's kernel would wait for ever for the rest of its pages, or forget them.
            rest = memoryview(b"".join(data))[written:]
            while rest:
                count = os.pwrite(fd, rest, offset + written)
                written += count
                rest = rest[count:]
        return WRITE_OUT.pack(written, 0)

    def _find_unappended(self, handle: Handle) -> int:
        """What was mapped has its place, and any descriptor of the file may bring it back."""
        if handle.unappended < 0:
            flags = handle.flags & ~(os.O_APPEND | os.O_TRUNC | os.O_EXCL | os.O_CREAT)
            path = "/proc/self/fd/{}".format(handle.fd)
            handle.unappended = os.open(path, flags | os.O_CLOEXEC)
        return handle.unappended

    def release(self, request: Request) -> bytes:
        number, _, _, _ = request.unpack(RELEASE_IN)
        handle = self._files.find_handle(number)
        del self._files.handles[number]
        node = handle.node
        node.handles = tuple(other for other in node.handles if other is not handle)
        for owner in handle.owners:
            drop_locks(node, owner)
        handle.close()
        self._files.forget(node.number, 0)
        return b""

    def fsync(self, request: Request) -> None:
        number, how, _ = request.unpack(FSYNC_IN)
        self._sync(request, os.dup(self._files.find_handle(number).fd), how)

    def fsyncdir(self, request: Request) -> None:
        _, how, _ = request.unpack(FSYNC_IN)
        directory = self._files.pin(self._files.find(request.node))
        self._sync(request, os.open(b".", DIRECTORY, dir_fd=directory), how)

    def _sync(self, request: Request, fd: int, how: int) -> None:
        def sync() -> bytes:
            try:
                (os.fdatasync if how & DATA_ONLY else os.fsync)(fd)
            finally:
                os.close(fd)
            return b""

        self._later(request, sync)

    def opendir(self, request: Request) -> bytes:
        node = self._files.find(request.node)
        entries = Entries(self._files, node)
        entries.read(0, 0)                        # this fails if the directory cannot be read
        number = self._files.add_handle(node, -1, 0)
        self._files.handles[number].entries = entries
        return OPEN_OUT.pack(number, 0, 0)

    def readdir(self, request: Request) -> bytes:
        number, offset, room = request.unpack(READ_IN)
        entries = self._files.find_handle(number).entries
        if entries is None:
            raise failure(errno.ENOTDIR)
        return entries.read(offset, min(room, BODY_MAX))

    def fallocate(self, request: Request) -> bytes:
        number, offset, length, mode, _ = request.unpack(FALLOCATE_IN)
        handle = self._files.find_handle(number)
        self._files.check_writable(handle.node)
        call_libc("fallocate", handle.fd, mode, check_offset(offset), check_offset(length))
        return b""

    def lseek(self, request: Request) -> bytes:
        number, offset, whence = request.unpack(LSEEK_IN)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise failure(errno.EINVAL)
        handle = self._files.find_handle(number)
        return NUMBER.pack(os.lseek(handle.fd, check_offset(offset), whence))

    def copy(self, request: Request) -> bytes:
        source, start, _, target, place, length, _ = request.unpack(COPY_IN)
        if not hasattr(os, "copy_file_range"):
            raise failure(errno.EOPNOTSUPP)
        to = self._files.find_handle(target)
        self._files.check_writable(to.node)
        copied = os.copy_file_range(
            self._files.find_handle(source).fd, to.fd, min(length, COPY_MAX),
            check_offset(start), check_offset(place))
        return WRITE_OUT.pack(copied, 0)


def check_offset(number: int) -> int:
    if number > FILE_MAX:
        raise failure(errno.EINVAL)
    return number


# --- Virtio-fs: locks ---------------------------------------------------------------------------------------
# A lock of flock(2) belongs to the descriptor that a handle has. A lock of fcntl(2) belongs to an owner,
# a process of the guest, which gets a descriptor of its own for it in each file (F_OFD_SETLK). So the
# host's kernel keeps all locks, and other runs and the host see them.

LOCK_IN, LOCK_OUT = struct.Struct("<QQQQIIII"), struct.Struct("<QQII")
F_OFD_GETLK, F_OFD_SETLKW = 36, 38                # include/uapi/linux/fcntl.h
OF_FLOCK = 1                                      # FUSE_LK_FLOCK
FLOCK_WORDS = (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)   # by F_RDLCK, F_WRLCK, F_UNLCK
OFFSET_MAX = (1 << 63) - 1
WAITERS_MAX = 192                    # of the 256 requests that UML's queue has room for
WAKE = signal.SIGUSR1                             # to a thread whose lock is no longer wanted
WAITER = struct.Struct("<QII")


class Waiter:
    """A request for a lock that another one has."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.thread = 0
        self.is_cancelled = False


class LockOperations:
    def __init__(self, files: Files, later: Callable[[Request, Callable[[], bytes]], None],
                 tell_waiting: Callable[[], None]) -> None:
        self._files = files
        self._later = later
        self._tell_waiting = tell_waiting
        self.waiters: Dict[int, Waiter] = {}      # by the number of the request
        signal.signal(WAKE, lambda number, frame: None)

    def list(self) -> Dict[int, Operation]:
        return {25: self.flush, 31: self.get, 32: self.set, 33: self.wait}

    def flush(self, request: Request) -> bytes:
        """A descriptor was closed: the process loses all its locks of the file."""
        number, _, _, owner = request.unpack(FLUSH_IN)
        handle = self._files.find_handle(number)
        drop_locks(handle.node, owner)
        if handle.flags & WRITES:                 # a file system of the network tells errors at close(2)
            os.close(os.dup(handle.fd))
        return b""

    def get(self, request: Request) -> bytes:
        number, owner, start, end, kind, _, _, _ = request.unpack(LOCK_IN)
        handle = self._files.find_handle(number)
        lock = encode_lock(kind, start, end)
        found = fcntl.fcntl(self._find_locker(handle, owner), F_OFD_GETLK, lock)
        kind, _, start, length, pid = FLOCK.unpack(found)
        end = start + length - 1 if length else OFFSET_MAX
        return LOCK_OUT.pack(start, end, kind, 0)

    def set(self, request: Request) -> bytes:
        self._prepare(request, True)()
        return b""

    def wait(self, request: Request) -> Optional[bytes]:
        """In a thread of its own, if another one has the lock."""
        try:
            return self.set(request)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if len(self.waiters) >= WAITERS_MAX:
            raise failure(errno.ENOLCK)

        waiter = self.waiters[request.unique] = Waiter(request)
        take = self._prepare(request, False)

        def wait() -> bytes:
            waiter.thread = threading.get_ident()
            while not waiter.is_cancelled:
                try:
                    take()
                    return b""
                except InterruptedError:
                    pass
            raise failure(errno.EINTR)

        self._later(request, wait)
        if len(self.waiters) == 1:
            self._tell_waiting()
        return None

    def _prepare(self, request: Request, is_now: bool) -> Callable[[], object]:
        number, owner, start, end, kind, _, flags, _ = request.unpack(LOCK_IN)
        handle = self._files.find_handle(number)
        if kind >= len(FLOCK_WORDS):
            raise failure(errno.EINVAL)
        if flags & OF_FLOCK:
            word = FLOCK_WORDS[kind]
            return partial(call_libc, "flock", handle.fd, word | fcntl.LOCK_NB if is_now else word)

        lock = encode_lock(kind, start, end)
        if kind == fcntl.F_UNLCK and owner not in handle.node.lockers:
            return int
        locker = self._find_locker(handle, owner)
        command = F_OFD_SETLK if is_now else F_OFD_SETLKW
        return partial(call_libc, "fcntl", locker, command, lock)

    def _find_locker(self, handle: Handle, owner: int) -> int:
        """The descriptor for the locks of this owner, which can take both kinds if that is allowed."""
        node = handle.node
        if owner in node.lockers:
            return node.lockers[owner]
        path = "/proc/self/fd/{}".format(handle.fd)
        mode = handle.flags & os.O_ACCMODE
        try:
            self._files.check_writable(node)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            try:
                fd = os.open(path, mode | os.O_CLOEXEC)
            except PermissionError:
                fd = os.dup(handle.fd)

        if node.lockers is NO_LOCKERS:
            node.lockers = {}
        node.lockers[owner] = fd
        handle.owners.add(owner)
        return fd

    def list_waiting(self) -> bytes:
        return b"".join(WAITER.pack(unique, waiter.request.pid, 0)
                        for unique, waiter in self.waiters.items())

    def cancel(self, unique: int) -> None:
        """The process that waits has got a signal."""
        waiter = self.waiters.get(unique)
        if waiter and waiter.thread:
            waiter.is_cancelled = True
            signal.pthread_kill(waiter.thread, WAKE)


def encode_lock(kind: int, start: int, end: int) -> bytes:
    if not start <= end <= OFFSET_MAX:
        raise failure(errno.EINVAL)
    length = 0 if end == OFFSET_MAX else end - start + 1
    return FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


# --- Virtio-fs: the root ------------------------------------------------------------------------------------
# The device's root directory exists nowhere. It has an entry for each share, and the file `waiting`, for
# Linux's virtio-fs sends no FUSE_INTERRUPT: the guest's agent is told by the channel that locks wait. It
# reads which ones, and writes which of them are no longer wanted.

WAITING = b"waiting"


class RootOperations:
    def __init__(self, files: Files, locks: LockOperations) -> None:
        self._files = files
        self._locks = locks

    def list(self) -> Dict[int, Operation]:
        return {1: self.look_up, 3: self.getattr, 14: self.open, 15: self.read, 16: self.write,
                17: self.statfs, 18: self.release, 25: self.release, 27: self.open, 28: self.readdir,
                29: self.release}

    def look_up(self, request: Request) -> bytes:
        name = request.read_body().rstrip(b"\0")
        root = self._files.roots.get(name)
        if request.node != ROOT_NODE or root is None and name != WAITING:
            raise failure(errno.ENOENT)
        if root is None:
            return ENTRY_HEAD.pack(LOCKS_NODE, 0, 0, 0, 0, 0) + self._describe(LOCKS_NODE)

        status = self._files.read_status(root)
        root.lookups += 1
        return self._files.attributes.encode_entry(root, status)

    def getattr(self, request: Request) -> bytes:
        return ATTRIBUTES_HEAD.pack(0, 0, 0) + self._describe(request.node)

    def _describe(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o500 if node == ROOT_NODE else stat.S_IFREG | 0o600
        links = 2 if node == ROOT_NODE else 1
        return ATTRIBUTES.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)

    def statfs(self, request: Request) -> bytes:
        return STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096)

    def open(self, request: Request) -> bytes:
        return OPEN_OUT.pack(0, FOPEN_DIRECT_IO if request.node == LOCKS_NODE else 0, 0)

    def release(self, request: Request) -> bytes:
        return b""

    def readdir(self, request: Request) -> bytes:
        _, offset, room = request.unpack(READ_IN)
        content = b""
        for index, name in enumerate((b".", b"..", *self._files.roots), 1):
            entry = DIRENT.pack(index, index, len(name), DT_UNKNOWN) + name + bytes(-len(name) % 8)
            if index > offset and len(content) + len(entry) <= room:
                content += entry
        return content

    def read(self, request: Request) -> bytes:
        """The locks that wait. There is no offset: a read brings them as they are now."""
        if request.node != LOCKS_NODE:
            raise failure(errno.EISDIR)
        room = request.unpack(READ_IN)[2]
        return self._locks.list_waiting()[:room - room % WAITER.size]

    def write(self, request: Request) -> bytes:
        body = request.read_body()[WRITE_IN.size:]
        if request.node != LOCKS_NODE or len(body) != NUMBER.size:
            raise failure(errno.EINVAL)
        self._locks.cancel(*NUMBER.unpack(body))
        return WRITE_OUT.pack(len(body), 0)


# --- Virtio-fs: the server ----------------------------------------------------------------------------------

INIT_IN, INIT_OUT = struct.Struct("<IIIII"), struct.Struct("<IIIIHHIIHHII24x")
FUSE_VERSION = 7, 38
FUSE_FLAGS = sum(1 << bit for bit in (
    0,                               # ASYNC_READ
    1,                               # POSIX_LOCKS
    3,                               # ATOMIC_O_TRUNC
    5,                               # BIG_WRITES
    6,                               # DONT_MASK
    10,                              # FLOCK_LOCKS
    12,                              # AUTO_INVAL_DATA
    18,                              # PARALLEL_DIROPS
    20,                              # POSIX_ACL
    22,                              # MAX_PAGES
    28,                              # HANDLE_KILLPRIV_V2
    30,                              # INIT_EXT
    36))                             # DIRECT_IO_ALLOW_MMAP
DIRECT_IO_ALLOW_MMAP = 1 << 36
FORGET, BATCH_FORGET, INIT, DESTROY, SYNCFS = 2, 42, 26, 38, 50
FORGET_ONE, FORGET_MANY = struct.Struct("<QQ"), struct.Struct("<I4x")
ROUND = 256                          # requests until the server looks at other things



class FuseServer:
    """Answers the requests of one guest."""

    def __init__(self, shares: Sequence[Share], tell_waiting: Callable[[], None]) -> None:
        self._files = Files(shares)
        self._names = NameOperations(self._files)
        self._contents = ContentOperations(self._files, self._answer_later)
        self._locks = LockOperations(self._files, self._answer_later, tell_waiting)
        self._root = RootOperations(self._files, self._locks)
        self._of_root = {**self._root.list(), LOOKUP_OPEN: refuse_in_root}
        self._of_files: Dict[int, Operation] = {}
        for operations in (self._names.list(), AttributeOperations(self._files).list(),
                           self._contents.list(), self._locks.list()):
            self._of_files.update(operations)
        for known in (self._of_root, self._of_files):
            known.update({INIT: self._initialise, DESTROY: ignore, SYNCFS: ignore})

        self._queue: Optional[Queue] = None       # that the current request came by
        self._done: Deque[Tuple[Queue, Request, Payload, int]] = collections.deque()
        self.wakeup, self._to_wakeup = os.pipe()  # an answer is in `_done`

    def close(self) -> None:
        """Close all descriptors; a server process leaves that to its end."""
        self._files.close()
        os.close(self.wakeup)
        os.close(self._to_wakeup)

    def limit_nodes(self, memory: int) -> None:
        """A kernel with so many bytes of memory has no room for more nodes."""
        self._files.nodes_max = max(NODES_MIN, memory // NODE_MEMORY)

    def serve(self, queue: Queue) -> int:
        """Answer the requests that wait in a queue, up to a limit. Return how many there were."""
        self._queue = queue
        count = answers = 0
        while count < ROUND and queue.has_chain():
            count += 1
            request = decode_request(queue.take())
            if request.opcode in (FORGET, BATCH_FORGET):
                attempt(partial(self._forget, request))        # it has no answer
                queue.give_back(request.chain, 0)
                continue
            known = self._of_root if request.node <= LOCKS_NODE else self._of_files
            operation = known.get(request.opcode, refuse)
            payload, error = attempt(partial(operation, request))
            if payload is not None:
                queue.give_back(request.chain, encode_answer(request, payload, error))
            answers += 1

        if answers or count and queue.is_many(queue.untold):   # nobody waits for the end of a FORGET
            queue.notify()
        return count

    def _answer_later(self, request: Request, work: Callable[[], bytes]) -> None:
        """Work in a thread, so that other requests do not wait."""
        queue = self._queue
        assert queue

        def live() -> None:
            self._done.append((queue, request, *attempt(work)))
            os.write(self._to_wakeup, b"1")

        try:
            threading.Thread(target=live, daemon=True).start()
        except RuntimeError:                      # no process is left
            raise failure(errno.ENOLCK)

    def finish(self) -> None:
        """Give the answers that threads have found."""
        os.read(self.wakeup, 512)
        while self._done:
            queue, request, payload, error = self._done.popleft()
            self._locks.waiters.pop(request.unique, None)
            if payload is not None:
                queue.give_back(request.chain, encode_answer(request, payload, error))
            queue.notify()

    def _forget(self, request: Request) -> None:
        if request.opcode == FORGET:
            self._files.forget(request.node, *request.unpack(NUMBER))
            return

        body = request.read_body()
        count = min(FORGET_MANY.unpack_from(body)[0], (len(body) - FORGET_MANY.size) // FORGET_ONE.size)
        for index in range(count):
            self._files.forget(*FORGET_ONE.unpack_from(body, FORGET_MANY.size + index * FORGET_ONE.size))

    def _initialise(self, request: Request) -> bytes:
        body = request.read_body().ljust(INIT_IN.size, b"\0")
        _, minor, read_ahead, flags, more_flags = INIT_IN.unpack_from(body)
        flags = (flags | more_flags << 32) & FUSE_FLAGS
        if flags & DIRECT_IO_ALLOW_MMAP:
            self._names.open_flags = self._contents.open_flags = FOPEN_DIRECT_IO
        return INIT_OUT.pack(
            FUSE_VERSION[0], min(minor, FUSE_VERSION[1]), read_ahead, flags & 0xFFFFFFFF, 64, 48,
            DATA_MAX, 1, DATA_MAX // mmap.PAGESIZE, 0, flags >> 32, 0)


def attempt(work: Callable[[], Payload]) -> Tuple[Payload, int]:
    """What it returns, and the errno if it fails."""
    try:
        return work(), 0
    except OSError as error:
        return b"", error.errno or errno.EIO
    except (ValueError, OverflowError, struct.error):         # a request that Linux does not make
        return b"", errno.EINVAL


def ignore(request: Request) -> bytes:
    return b""


def refuse(request: Request) -> bytes:
    raise failure(errno.ENOSYS)


def refuse_in_root(request: Request) -> bytes:
    """To refuse it as unknown would turn it off everywhere."""
    raise failure(errno.EOPNOTSUPP)


# --- Virtio-fs: the device ----------------------------------------------------------------------------------
# The VMM speaks vhost-user with the server, by a socket: it hands over the guest's memory and the queues.
# qemu.org, docs/interop/vhost-user.rst. The VMM is as hostile as the guest's kernel.

DEVICE_TAG = b"apppot"
MESSAGE = struct.Struct("<III")                   # request, flags, bytes of the body
MESSAGE_MAX = 4096
DESCRIPTORS_OF_MESSAGE = 8
VERSION_AND_REPLY = 1 | 4
QUEUES = 2                           # for what has no answer, and for requests
# VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_INDIRECT_DESC. With the last one a
# request takes one place in a queue. Without it those that wait for locks leave no room for a large one.
DEVICE_FEATURES = 1 << 32 | 1 << 30 | 1 << 28
# MQ; BACKEND_REQ, without which Linux 6.1 gets its own interrupts wrong; CONFIG.
PROTOCOL_FEATURES = 1 << 0 | 1 << 5 | 1 << 9
NO_DESCRIPTOR = 1 << 8               # flag of SET_VRING_KICK and SET_VRING_CALL
WORD, PAIR, CONFIG_HEAD = struct.Struct("<Q"), struct.Struct("<II"), struct.Struct("<III")
FORGETS_MS = 50                      # without a request, until FORGETs are looked for and their end is told
LOOK_S = 50e-6                       # for the next request, before the server sleeps
MEMORY_REGION, RING_ADDRESSES = struct.Struct("<QQQQ"), struct.Struct("<IIQQQQ")


class Device:
    """The back end of vhost-user."""

    def __init__(self, connection: "socket.socket", server: FuseServer) -> None:
        self._connection = connection
        self._server = server
        self._memory = GuestMemory()
        self._queues = [Queue(self._memory) for _ in range(QUEUES)]
        self._kicks: Dict[int, Queue] = {}
        self._poll = select.poll()
        self._forgets, self._requests = self._queues
        self._looks_for_forgets = False
        self._has_spare_cpu = len(os.sched_getaffinity(0)) > 1
        self._handlers: Dict[int, Callable[[bytes, List[int]], Optional[bytes]]] = {
            1: lambda body, fds: WORD.pack(DEVICE_FEATURES),
            5: self._set_memory,
            8: self._resize,
            9: self._place,
            10: self._set_next,
            11: self._get_next,
            12: self._set_kick,
            13: self._set_call,
            15: lambda body, fds: WORD.pack(PROTOCOL_FEATURES),
            17: lambda body, fds: WORD.pack(QUEUES),
            21: self._keep_back_channel,
            24: self._get_config,
        }

    def serve(self) -> None:
        """Until the VMM hangs up."""
        wakeup = self._server.wakeup
        for descriptor in (self._connection.fileno(), wakeup):
            self._poll.register(descriptor, select.POLLIN)
        while True:
            is_owing = self._looks_for_forgets or self._forgets.untold or self._forgets.has_chain()
            events = self._poll.poll(FORGETS_MS if is_owing else None)
            if not events:
                self._take_forgets(wants_kicks=True)
                self._forgets.notify()            # an unmount waits until all have ended
            for descriptor, _ in events:
                if descriptor == wakeup:
                    self._server.finish()
                elif descriptor in self._kicks:
                    self._take_kick(descriptor)
                elif not self._receive():
                    return

    def _take_kick(self, descriptor: int) -> None:
        try:
            os.read(descriptor, 8)
        except BlockingIOError:
            pass
        queue = self._kicks[descriptor]
        self._server.serve(queue)
        if self._has_spare_cpu:
            self._look_for_more(queue)
        if queue is self._requests:
            self._take_forgets(wants_kicks=False)
        if queue.has_chain():
            os.write(descriptor, WORD.pack(1))

    def _take_forgets(self, wants_kicks: bool) -> None:
        """A FORGET follows most requests. It is taken with the next one, or a moment later, without a kick."""
        count = self._server.serve(self._forgets)
        self._looks_for_forgets = not wants_kicks and not self._forgets.is_many(count)
        self._forgets.want_kicks(not self._looks_for_forgets)
        self._server.serve(self._forgets)

    def _look_for_more(self, queue: Queue) -> None:
        """A program makes many requests in a row, and to sleep and wake takes as long as to answer one."""
        rounds = ROUND
        queue.want_kicks(False)
        end = time.monotonic() + LOOK_S
        while rounds and time.monotonic() < end:
            if queue.has_chain():
                self._server.serve(queue)
                rounds -= 1
                end = time.monotonic() + LOOK_S
            os.sched_yield()
        queue.want_kicks(True)

    def _receive(self) -> bool:
        """Take one message of the VMM; whether there was one."""
        head, fds = self._read(MESSAGE.size)
        if len(head) < MESSAGE.size:
            return False
        number, _, size = MESSAGE.unpack(head)
        if size > MESSAGE_MAX:
            raise Misfit("a message of {} bytes of the VMM".format(size))
        body, more = self._read(size)
        fds += more

        handler = self._handlers.get(number)
        used = list(fds)
        try:
            answer = handler(body, used) if handler else None
        except struct.error:
            raise Misfit("a message of the VMM of the wrong size")
        for descriptor in used:
            os.close(descriptor)
        if answer is not None:
            self._connection.sendall(MESSAGE.pack(number, VERSION_AND_REPLY, len(answer)) + answer)
        return True

    def _read(self, size: int) -> Tuple[bytes, List[int]]:
        import array
        import socket

        content = b""
        fds = array.array("i")
        while len(content) < size:
            room = socket.CMSG_SPACE(DESCRIPTORS_OF_MESSAGE * fds.itemsize)
            piece, ancillary, _, _ = self._connection.recvmsg(
                size - len(content), room, socket.MSG_CMSG_CLOEXEC)
            for _, kind, data in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(data[:len(data) - len(data) % fds.itemsize])
            if not piece:
                break
            content += piece
        return content, list(fds)

    # Handlers of messages. A descriptor that they keep they take off the list.

    def _set_memory(self, body: bytes, fds: List[int]) -> None:
        count, _ = PAIR.unpack_from(body)
        if count != len(fds) or len(body) < PAIR.size + count * MEMORY_REGION.size:
            raise Misfit("a table of memory that does not fit")
        self._memory.clear()
        for index, descriptor in enumerate(fds):
            start, size, vmm_start, offset = MEMORY_REGION.unpack_from(
                body, PAIR.size + index * MEMORY_REGION.size)
            self._memory.add(start, vmm_start, size, descriptor, offset)
        self._server.limit_nodes(self._memory.size)

    def _find_queue(self, index: int) -> Queue:
        if index >= QUEUES:
            raise Misfit("a queue with the number {}".format(index))
        return self._queues[index]

    def _resize(self, body: bytes, fds: List[int]) -> None:
        index, size = PAIR.unpack(body)
        self._find_queue(index).resize(size)

    def _place(self, body: bytes, fds: List[int]) -> None:
        index, _, descriptors, used, available, _ = RING_ADDRESSES.unpack(body)
        self._find_queue(index).place(descriptors, used, available)

    def _set_next(self, body: bytes, fds: List[int]) -> None:
        index, number = PAIR.unpack(body)
        self._find_queue(index).next = number & 0xFFFF

    def _get_next(self, body: bytes, fds: List[int]) -> bytes:
        """The VMM stops the queue."""
        index, _ = PAIR.unpack(body)
        return PAIR.pack(index, self._find_queue(index).next)

    def _set_kick(self, body: bytes, fds: List[int]) -> None:
        word, = WORD.unpack(body)
        queue = self._find_queue(word & 0xFF)
        for descriptor in [known for known, of in self._kicks.items() if of is queue]:
            self._poll.unregister(descriptor)
            os.close(descriptor)
            del self._kicks[descriptor]
        if fds and not word & NO_DESCRIPTOR:
            descriptor = fds.pop()
            os.set_blocking(descriptor, False)
            self._kicks[descriptor] = queue
            self._poll.register(descriptor, select.POLLIN)

    def _set_call(self, body: bytes, fds: List[int]) -> None:
        word, = WORD.unpack(body)
        queue = self._find_queue(word & 0xFF)
        queue.replace_call(fds.pop() if fds and not word & NO_DESCRIPTOR else -1)

    def _keep_back_channel(self, body: bytes, fds: List[int]) -> None:
        """Nothing is sent by it, but its end would disturb the VMM."""
        fds.clear()

    def _get_config(self, body: bytes, fds: List[int]) -> bytes:
        """struct virtio_fs_config: the tag, and how many queues take requests."""
        start, size, flags = CONFIG_HEAD.unpack_from(body)
        config = DEVICE_TAG.ljust(36, b"\0") + struct.pack("<I", QUEUES - 1)
        content = config[start:start + size]
        return CONFIG_HEAD.pack(start, len(content), flags) + content


def serve_shares(listener: "socket.socket", shares: Sequence[Share],
                 tell_waiting: Callable[[], None]) -> None:
    """Accept one VMM and answer its requests until it hangs up.

    `tell_waiting` is called when a lock waits and none did before.

    Misfit if the VMM or the guest's kernel breaks the protocol, OSError if a share cannot be opened.
    """
    server = FuseServer(shares, tell_waiting)
    connection, _ = listener.accept()
    listener.close()
    Device(connection, server).serve()


# --- A guest ------------------------------------------------------------------------------------------------
# Values that any VMM understands.

SPOOL = "spool"                      # in the run directory: what is too long for the channel
SHARES_SOCKET = "shares"             # in the run directory: where the file server waits for the VMM
GIVEN = "given"                      # in the directory of --save-changes: what the guest gets of it


class Disk(NamedTuple):
    """The disk that the guest boots from."""
    image: str                       # absolute path
    cow: Optional[str]               # of COW:BASE; None: a private one for this run
    write: bool                      # into the image itself
    root: RootDevice
    size: Optional[int]              # bytes of the root file system; None: as many as in the image

    @property
    def is_persistent(self) -> bool:
        return self.write or self.cow is not None

    @property
    def written_file(self) -> Optional[str]:
        """The file of the host that takes the guest's writes; None: a file of this run in scratch."""
        return self.image if self.write else self.cow


class Guest(NamedTuple):
    """What a VMM is told of the guest."""
    disk: Disk
    shares: Tuple[Share, ...]
    mem_mib: int
    cpus: int
    network: Network
    name: str
    extra: Tuple[str, ...]           # of --extra
    scratch: str                     # the run directory is made in it
    ram_directory: str               # the guest's memory is a file in it

    @property
    def disk_directory(self) -> str:
        """The directory that must have room for what the guest writes to its disk."""
        written = self.disk.written_file
        return self.scratch if written is None else os.path.dirname(written)


class Directories(NamedTuple):
    """The private ones of a run."""
    run: PrivateDirectory            # with the files of the VMM
    ram: PrivateDirectory            # for the file that is the guest's memory; may be the same
    save: PrivateDirectory           # for the changes file until it is complete; may be the same
    saved_name: Optional[str] = None  # of the changes file in save/GIVEN; no guest can foresee it

    def list_distinct(self) -> List[PrivateDirectory]:
        every = (self.run, self.ram, self.save)
        return list({directory.fd: directory for directory in every}.values())

    def list_shares(self) -> List[Share]:
        """The shares that every run has, and the one for --save-changes."""
        places = [("spool", os.path.join(self.run.path, SPOOL))]
        if self.saved_name:
            places.append(("save", os.path.join(self.save.path, GIVEN)))
        return [Share(tag, os.fsencode(path), None, False) for tag, path in places]


def find_room(guest: Guest) -> int:
    """Bytes that the guest's disk can take: what is free beside its file and what the file has."""
    status = os.statvfs(guest.disk_directory)
    room = status.f_bavail * status.f_frsize
    written = guest.disk.written_file
    return room if written is None else room + os.stat(written).st_blocks * 512


def explain_memory_lost(guest: Guest) -> Fatal:
    """Why a process got SIGBUS when it used the guest's memory, which is a file."""
    message = "directory for the guest's memory became full: {}, where it may have {}"
    return Fatal(message.format(guest.ram_directory, format_mib(guest.mem_mib)),
                 "other files took its room; --tmpdir names another one")


def explain_disk_failure(guest: Guest, said: bytes) -> Fatal:
    """Why the guest's disk fails, as far as the host can see it; `said` is what the guest's kernel printed."""
    disk = guest.disk
    written = disk.written_file
    if written is None:
        full = explain_full_scratch(guest.scratch)
    else:
        what = "directory of the " + ("image" if disk.write else "COW file")
        hint = "free some; {} is as after a power failure and can be used again".format(written)
        full = explain_full(what, guest.disk_directory, hint)
    if full:
        return full

    if said.startswith(b"EXT4"):
        return Fatal("root file system is damaged: " + (written or disk.image),
                     "run with -v to see the guest's console; `e2fsck -fn` looks at an image")
    message = "disk of the guest had an I/O error, and its files are these: {}, {}"
    return Fatal(message.format(disk.image, written or guest.scratch),
                 "was one of them out of room, or its disk or server at fault?")


# --- The VMM ------------------------------------------------------------------------------------------------
# The seam: the rest of AppPot knows a VMM by these classes only. User-Mode Linux follows in the next
# sections. A second VMM is a class like Uml in sections of its own; find_vmm() chooses one of the two.

# Descriptors of the VMM's process. The first two are the channel.
INPUT_FD = 3
OUTPUT_FD = 4
CONSOLE_FD = 5
NETWORK_FD = 30
LEASH_FDS = 28, 29                   # spawn() uses the numbers from 32 on
CONSOLE_TAIL = 64 << 10              # bytes of the console that are kept to explain a failure
# block/blk-core.c, fs/buffer.c, fs/ext4/{super,page-io}.c and fs/jbd2/journal.c; {0} are the disks of the
# run. The kernel prints ten lines of a place in five seconds, so one place that tells of a lost write is
# not enough: the lines of the others, such as of a disk that cannot write zeros, hide it.
DISK_FAILURE = (r"(?:critical space allocation|I/O) error(?:,| on) dev(?:ice)? (?:{0})|"
                r"EXT4-fs warning \(device (?:{0})\): ext4_end_bio:[0-9]+: I/O error|"
                r"EXT4-fs error \(device (?:{0})|Aborting journal on device (?:{0})")
OUT_OF_MEMORY = b"Out of memory: Killed process"               # mm/oom_kill.c
WATCH_INTERVAL_S = 0.2               # how soon the supervisor sees that the runner was stopped

# What ends a guest.
KERNEL = "kernel"                    # its kernel has ended
HELPER = "helper"                    # a helper process of the kernel was killed
CARRIER = "carrier"                  # the carrier was killed, or does not start the kernel
RUNNER = "runner"                    # the runner has ended
ERROR = "error"                      # the supervisor has met an error
BUG = "bug"                          # the supervisor has a bug


class End(NamedTuple):
    """The supervisor's verdict on a guest that has ended."""
    what: str
    status: int = 0                  # of KERNEL: the wait status
    message: str = ""                # of ERROR and BUG
    hint: str = ""                   # of ERROR


class Finding(NamedTuple):
    """What the doctor says of one thing that a run needs; a Fatal says that a run fails."""
    verdict: str                     # ok, warn or fail
    what: str
    advice: str = ""


class Console:
    """What the guest's kernel prints, and what that tells of the run."""

    def __init__(self, guest: Guest, disks: str) -> None:
        self._guest = guest
        self._disk_failure = DISK_FAILURE.format(disks).encode()
        self._started = time.monotonic()
        self.tail = b""

    def add(self, content: bytes) -> Optional[Fatal]:
        """Take what was printed; return why the run has failed if that tells."""
        self.tail = (self.tail + content)[-CONSOLE_TAIL:]
        news = self.tail[max(0, len(self.tail) - len(content) - 200):]
        disk_failure = re.search(self._disk_failure, news)
        if disk_failure:
            return explain_disk_failure(self._guest, disk_failure.group())
        return self.find_fault()

    @property
    def is_out_of_memory(self) -> bool:
        return OUT_OF_MEMORY in self.tail

    def suspect_limit(self) -> str:
        """The words on CPU time if the host may have killed a process for that.

        The process is reaped already, so its CPU time is not known.
        """
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        is_possible = 0 <= hard <= time.monotonic() - self._started
        words = ", perhaps for its CPU time: the limit (ulimit -t) is {} s"
        return words.format(hard) if is_possible else ""

    # A VMM has its own of these.

    def find_fault(self) -> Optional[Fatal]:
        """What the VMM cannot go on with."""
        raise NotImplementedError

    def explain_killed_process(self) -> Optional[str]:
        """What to say if a process of the guest was killed on the host; None if none was."""
        raise NotImplementedError

    def explain_end(self, status: int, was_up: bool) -> Fatal:
        """Why a kernel ended without a result record, from its wait status and what it printed.

        The guest was up once the agent has answered. A command may end the guest before the agent tells
        that the command has started.
        """
        raise NotImplementedError


class Watch:
    """Looks after a running guest for the supervisor."""

    interval_s = WATCH_INTERVAL_S    # between two reviews

    def review(self, is_suspended: bool) -> Optional[End]:
        """Return an End if the guest is dead though its kernel lives; Fatal if it cannot go on."""
        raise NotImplementedError


class Vmm:
    """What runs a guest. One value describes the VMM of one run, and nothing changes it."""

    program: str                     # absolute path
    interfaces: Dict[str, str]       # each kind of network that a guest can have, and its interface
    line_window: int                 # bytes that may be on their way to the agent
    can_enlarge_disk: bool           # beyond the size of its image
    has_virtio_fs: bool              # it gets the shares from the file server, and opens none itself
    reserved_names: Tuple[str, ...]  # which the VMM uses itself, so that no guest can have them

    # The runner calls these before there is a guest.

    def explain_one_cpu(self) -> Optional[str]:
        """Why a guest cannot have a second CPU; None if it can."""
        raise NotImplementedError

    def place_memory(self, mem: Amount, floors: Sequence[int],
                     candidates: Sequence[str]) -> Tuple[Amount, str]:
        """How much of the memory has room, and the directory of the file that holds it."""
        raise NotImplementedError

    def check(self, disk: Disk, mem_mib: int, cpus: int) -> None:
        """Fatal if this node does not let such a guest run."""
        raise NotImplementedError

    def open_disk(self, disk: Disk) -> List[int]:
        """Open and lock the files of a disk. The VMM gets the descriptors and thereby the locks."""
        raise NotImplementedError

    def prepare(self, guest: Guest, directories: Directories) -> None:
        """Make in the run directory what the VMM needs there."""
        raise NotImplementedError

    def build_argv(self, guest: Guest) -> List[str]:
        raise NotImplementedError

    def describe(self, guest: Guest, directories: Directories) -> str:
        """A line for -v."""
        raise NotImplementedError

    def describe_files(self) -> str:
        """How the shares reach the guest, for -v."""
        raise NotImplementedError

    def open_console(self, guest: Guest) -> Console:
        raise NotImplementedError

    # The supervisor calls these.

    def list_rules(self, guest: Guest) -> List[Rule]:
        """Which files the VMM may open besides those of the guest."""
        raise NotImplementedError

    def build_environment(self, guest: Guest, directories: Directories) -> Dict[str, str]:
        raise NotImplementedError

    def enter_child(self) -> None:
        """Called in the forked process that becomes the VMM."""
        raise NotImplementedError

    def explain_exec_failure(self, number: int) -> Fatal:
        raise NotImplementedError

    def watch(self, kernel: int, guest: Guest) -> Watch:
        raise NotImplementedError

    # Both call these.

    def pause(self, guest: Guest, directory: int) -> None:
        """Stop the guest so that it survives SIGSTOP to any of its processes.

        `directory` is a descriptor of the run directory.
        """
        raise NotImplementedError

    def resume(self, guest: Guest, directory: int, supervisor: int) -> None:
        raise NotImplementedError


class CannotExecute(OSError):
    """A program that spawn() cannot execute."""


class Launch(NamedTuple):
    """How the supervisor starts the VMM, or a carrier that starts the VMM."""
    run: int                         # descriptor of the run directory, which is the current one
    rules: Sequence[Rule]            # of Landlock
    keep: Dict[int, int]             # its descriptors: number there to number here
    environment: Dict[str, str]
    enter_child: Callable[[], None]
    lifeline: int
    helpers: FrozenSet[int]          # other children: the file server and the network helper


def spawn(argv: List[str], launch: Launch) -> int:
    """Fork and execute argv in the current directory."""
    supervisor = os.getpid()
    error_read, error_write = os.pipe()
    pid = fork("the guest")
    if pid == 0:
        try:
            try_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(EXIT_FAILED)
            enter_child(launch)
            try:
                os.execve(argv[0], argv, launch.environment)
            except OSError as error:
                os.write(error_write, b"%d" % (error.errno or 0))
        except BaseException:
            os.write(error_write, describe_exception())
        finally:
            os._exit(EXIT_FAILED)

    os.close(error_write)
    with os.fdopen(error_read, "rb") as file:
        failure = file.read()
    if failure.isdigit():
        raise CannotExecute(int(failure), os.strerror(int(failure)), argv[0])
    if failure:
        raise Bug(failure)
    return pid


def enter_child(launch: Launch) -> None:
    launch.enter_child()
    forbid_core()                                 # of a panic
    os.umask(0)                                   # the guest has its own, and both would apply in shares

    high = {there: fcntl.fcntl(here, fcntl.F_DUPFD, 32) for there, here in launch.keep.items()}
    for there, here in high.items():
        os.dup2(here, there)
        os.close(here)
    if launch.rules:
        confine(launch.rules)


# --- User-Mode Linux: the kernel file -----------------------------------------------------------------------

KERNEL_NAMES = ("linux", "linux.uml")
KERNEL_ANSWER_S = 10.0               # for `linux --version`
# A kernel holds its configuration, for `linux --showconfig`. The linker puts short lines of it before
# this one and long lines behind it: 19 kB before and 83 kB behind in the largest kernel seen.
CONFIG_MARK = b"# Automatically generated file; DO NOT EDIT.\n"
CONFIG_SPAN = 256 << 10
SECCOMP_HELP = b"seccomp=<on/auto/off>"    # of `linux --help`, which stands behind all constants
FEATURE_SETTINGS = (                 # name for the user and setting of each Feature but the last two
    ("SMP", b"CONFIG_SMP=y"),
    ("hostfs", b"CONFIG_HOSTFS=y"),
    ("mconsole", b"CONFIG_MCONSOLE=y"),
    ("vector network", b"CONFIG_UML_NET_VECTOR=y"),
    ("slirp network", b"CONFIG_UML_NET_SLIRP=y"),
    ("multicast network", b"CONFIG_UML_NET_MCAST=y"),
    ("--disk", b"CONFIG_DM_INIT=y"),
    ("virtio devices", b"CONFIG_VIRTIO_UML=y"),
    ("virtio-fs", b"CONFIG_VIRTIO_FS="),           # =y or =m
    ("large pages", b"CONFIG_TRANSPARENT_HUGEPAGE=y"),
    # A patch of AppPot's, which `make kernel` tells in CONFIG_BUILD_SALT.
    ("any number of memory areas", b"-empty-stub"))
CONFIG_VERSION = br"# Linux/um (\d\S*) Kernel Configuration"
# Of virtio-fs where it is no part of the kernel, in the order in which they are loaded.
MODULES = ("fuse", "virtiofs")
MODULE_MAX = 4 << 20
MODULE_PLACE = "/usr/lib/uml/modules/{}/kernel/fs/fuse"        # of Debian's package


class Features(NamedTuple):
    """What a kernel can do."""
    smp: bool = False
    hostfs: bool = False
    mconsole: bool = False
    vector_network: bool = False
    slirp_network: bool = False
    multicast: bool = False
    device_mapper: bool = False      # by the kernel command line
    virtio: bool = False
    virtio_fs: bool = False          # built in or by modules
    large_pages: bool = False
    any_areas: bool = False          # a process may have more than vm.max_map_count allows
    seccomp_mode: bool = False
    needs_modules: Optional[str] = None  # for virtio-fs, made for this version; None: it is built in


def check_kernel(path: str) -> str:
    """Absolute path of a kernel. A grid's stage-in loses the execute bit, so set it."""
    with open_regular(path, "kernel", "--kernel names a User-Mode Linux executable") as file:
        magic = file.read(4)
    if magic != b"\x7fELF":
        raise Fatal("kernel is not an executable program: " + path,
                    "User-Mode Linux is one, the file in /boot is not; Debian's package is user-mode-linux")
    if not make_executable(path):
        hint = "chmod +x it; a file system mounted noexec cannot hold it"
        raise Fatal("kernel is not executable: " + path, hint)
    return os.path.abspath(path)


def read_features(kernel: str) -> Features:
    """Read the features off the kernel file.

    Unlike the kernel's own answer this takes no process, and it works if a library of the kernel is
    missing. A search of the whole file takes 1 ms for a long text and 5 ms for a short one.
    """
    with blaming("kernel cannot be read", kernel, "is it complete?"), open(kernel, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    with content:
        mark = content.find(CONFIG_MARK)
        start = max(0, mark - CONFIG_SPAN)
        end = mark + CONFIG_SPAN if mark >= 0 else len(content)
        settings = content[start:end]
        has_seccomp_mode = content.find(SECCOMP_HELP, start) >= 0
    has = [setting in settings for _, setting in FEATURE_SETTINGS]
    needs_modules = b"CONFIG_VIRTIO_FS=m" in settings
    version = re.search(CONFIG_VERSION, settings) if needs_modules else None
    return Features._make((*has, has_seccomp_mode, version.group(1).decode() if version else None))


def find_modules(kernel: str, version: str) -> Optional[str]:
    """The directory of the modules for virtio-fs: that of the kernel file, or of Debian's package."""
    for place in (os.path.dirname(kernel), MODULE_PLACE.format(version)):
        if all(is_module(os.path.join(place, name + ".ko"), version) for name in MODULES):
            return place
    return None


def is_module(path: str, version: str) -> bool:
    """Whether this is a module of a kernel of that version; another kernel would refuse it."""
    try:
        with open(path, "rb") as file:
            return b"\0vermagic=" + version.encode() + b" " in file.read(MODULE_MAX)
    except OSError:
        return False


def choose_mode(features: Features, ptrace: bool, extra: Sequence[str]) -> Optional[str]:
    """How the kernel traps system calls: "on" is by seccomp, "off" by ptrace; None without a choice."""
    if not features.seccomp_mode:
        return None
    chosen = [word.partition("=")[2] for word in extra if word.startswith("seccomp=")]
    return chosen[-1] if chosen else "off" if ptrace else "auto"


def ask_version(kernel: str) -> str:
    """What the kernel answers to --version, or how it ends instead."""
    import subprocess

    try:
        answer = subprocess.run(
            [kernel, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=KERNEL_ANSWER_S)
    except OSError as error:
        raise explain_exec_failure(error.errno or 0, kernel)
    except subprocess.TimeoutExpired:
        return "nothing within {:g} s".format(KERNEL_ANSWER_S)
    died = "died of signal {}".format(-answer.returncode) if answer.returncode < 0 else ""
    return answer.stdout.decode("utf-8", "replace").strip() + died


def explain_exec_failure(number: int, kernel: str) -> Fatal:
    loader = read_loader(kernel) if number == errno.ENOENT else ""
    if loader and not os.path.exists(loader):
        return no_library(loader, kernel)
    return Fatal("kernel cannot be executed, {}: {}".format(os.strerror(number), kernel),
                 "is it made for this machine, and are its libraries here? `ldd` tells")


def no_library(what: str, kernel: str) -> Fatal:
    return Fatal("kernel lacks a shared library ({}): {}".format(what, kernel),
                 "use a kernel that is linked statically, or one made for this system")


def explain_loader(output: str, kernel: str) -> Optional[Fatal]:
    """What the dynamic loader says of a kernel that it cannot start."""
    missing = re.search(r"error while loading shared libraries: ([^:\n]+)", output)
    version = re.search(r"(?m)(?:^|\s)(\S{1,4096}): (version `[^'\n]{1,200}' not found)", output)
    if missing:
        return no_library(missing.group(1), kernel)
    return no_library("{}: {}".format(*version.groups()), kernel) if version else None


def read_kernel_version(kernel: str) -> str:
    answer = ask_version(kernel)
    if not re.match(r"\d+\.\d+\S*$", answer):
        how = "answers --version with {!r}".format(answer[:60])
        raise explain_loader(answer, kernel) or not_uml(kernel, how)
    return answer


def not_uml(kernel: str, how: str) -> Fatal:
    import shlex

    hint = "is it User-Mode Linux? `{} --version` prints a version; -v shows what it printed"
    return Fatal("kernel {}: {}".format(how, kernel), hint.format(shlex.quote(kernel)))


# --- User-Mode Linux: the disk ------------------------------------------------------------------------------

# arch/um/drivers/cow_user.c, version 3, big-endian: magic, version, mtime and size of the base image,
# bytes of a sector, alignment, format, path of the base. A bitmap of the sectors follows, and then the
# aligned sectors.
COW_MAGIC, COW_HEADER = b"OOOM", struct.Struct(">4sIIQIII4096s")
COW_SECTOR, COW_ALIGNMENT = 512, 4096
COW_RESERVED = 16 << 20              # allocated bytes of header and bitmap: all for an image of 64 GiB


def check_cow(cow: str, base: str) -> None:
    """Refuse a COW file of another base image. The kernel does so, too, but at the boot."""
    hint = "--image COW:BASE names the COW file first; is the order right?"
    try:
        os.lstat(cow)
    except FileNotFoundError:
        if not os.access(os.path.dirname(os.path.abspath(cow)), os.W_OK | os.X_OK):
            raise Fatal("COW file cannot be made: " + cow, "its directory must exist and be writable")
        return
    except OSError as error:
        raise Fatal("COW file cannot be made, {}: {}".format(error.strerror, cow), hint)

    with open_regular(cow, "COW file", hint) as file:
        header = file.read(COW_HEADER.size)
    if not os.access(cow, os.W_OK):
        hint = "check its permissions, or run without a COW file"
        raise Fatal("COW file is not writable: " + cow, hint)
    if not header:                                # open_cow() fills it
        return
    if len(header) < COW_HEADER.size or header[:4] != COW_MAGIC:
        raise Fatal("not a COW file: " + cow, hint)

    version, mtime, size = COW_HEADER.unpack(header)[1:4]
    status = os.stat(base)
    is_same = mtime == int(status.st_mtime) & 0xFFFFFFFF and size == status.st_size
    if version == 3 and not is_same:
        raise Fatal("COW file was made for another base image: {} does not fit {}".format(cow, base),
                    "the base must have its old size and time; copies keep the time with cp -p or rsync -t")


def size_cow_bitmap(size: int) -> int:
    """Bytes of an image's map of written sectors. The guest's memory holds the map, too."""
    return -(-size // (8 * COW_SECTOR))


def check_map(image: str, mem_mib: int) -> None:
    map_mib = size_cow_bitmap(os.path.getsize(image)) >> 20
    if map_mib + MEM_MIN_MIB > mem_mib:
        raise Fatal("image is too large for a guest with {}, {} are needed: {}".format(
            format_mib(mem_mib), format_mib(map_mib + MEM_MIN_MIB), image),
            "the guest keeps a map of the copy-on-write file in memory, a 4096th of the image: "
            "give more with --mem, or make the image smaller")


def start_of_cow(size: int) -> int:
    """Where the sectors begin in the COW file of an image of so many bytes."""
    return -(-(COW_HEADER.size + size_cow_bitmap(size)) // COW_ALIGNMENT) * COW_ALIGNMENT


def open_cow(cow: str, base: str) -> int:
    """Open and lock a COW file. One that is new or empty gets a header and no sector.

    The kernel can make it, too, but cannot make files at any place. The header comes after the lock, as
    another run may want the same file. The bitmap has all its blocks: on a full disk a sector is
    refused, none is lost.
    """
    with blaming("COW file cannot be opened", cow, SCRATCH_HINT):
        descriptor = os.open(cow, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
    lock_file(descriptor, True, "COW file", cow)

    status = os.stat(base)
    with blaming("COW file cannot be made", cow, SCRATCH_HINT):
        if os.fstat(descriptor).st_size == 0:
            path = os.fsencode(os.path.abspath(base))[:4095]
            header = COW_HEADER.pack(COW_MAGIC, 3, int(status.st_mtime) & 0xFFFFFFFF, status.st_size,
                                     COW_SECTOR, COW_ALIGNMENT, 0, path)
            start = start_of_cow(status.st_size)
            try:
                os.posix_fallocate(descriptor, 0, min(start, COW_RESERVED))
                os.write(descriptor, header)
                os.ftruncate(descriptor, start + status.st_size)
            except OSError:
                os.ftruncate(descriptor, 0)       # not a COW file by half
                raise
    return descriptor


def is_mapped(disk: Disk) -> bool:
    """Whether the root file system is on two disks in a row."""
    return disk.size is not None and not disk.write


def enlarge_disk(disk: Disk, size: int, directory: str) -> None:
    """Make the image itself larger, or the second disk behind it; sparse in either case."""
    path = disk.image if disk.write else os.path.join(directory, "disk")
    length = max(size, os.path.getsize(path)) if disk.write else size - disk.root.length
    try:
        with open(path, "ab") as file:
            file.truncate(length)
    except OSError as error:
        raise Fatal("file of --disk cannot be made, {}: {}".format(error.strerror, path),
                    "ask for less, or name another directory with --tmpdir")


def list_disk_files(disk: Disk) -> List[Tuple[str, str]]:
    """The files of a disk that are not the run's own: a name for a link, and the path."""
    if disk.write:
        return [("image", disk.image)]
    return ([("cow", disk.cow)] if disk.cow else []) + [("base", disk.image)]


def is_plain(path: str) -> bool:
    """Whether the kernel takes a path as it is. It would cut others in pieces, so it gets links."""
    return bool(re.match(r"[\w./+@%~-]+$", path, re.ASCII)) and len(path) < 256


# --- User-Mode Linux: what the host must allow --------------------------------------------------------------

SECCOMP_MODES = ("on", "auto")       # of choose_mode(): in these the kernel traces nothing
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
# include/uapi/linux/bpf_common.h, seccomp.h
BPF_RET, SECCOMP_RET_ALLOW = 0x06, 0x7FFF0000
# include/uapi/linux/ptrace.h, the last of arch/x86
PTRACE_TRACEME, PTRACE_SETOPTIONS, PTRACE_O_TRACESYSGOOD, PTRACE_SYSEMU = 0, 0x4200, 1, 31


def try_ptrace() -> None:
    """Trace a process as the kernel traces those of the guest: it stops at each system call."""
    def live() -> int:
        try_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            call_libc("ptrace", PTRACE_TRACEME, 0, None, None)
        except OSError as error:
            return error.errno or errno.EPERM
        os.kill(os.getpid(), signal.SIGSTOP)
        os.getppid()
        return errno.EPERM

    pid = fork_child("a trial", live)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSTOPPED(status):
        raise OSError(status >> 8 or errno.EPERM, "ptrace")
    try:
        call_libc("ptrace", PTRACE_SETOPTIONS, pid, None, PTRACE_O_TRACESYSGOOD)
        call_libc("ptrace", PTRACE_SYSEMU, pid, None, None)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            raise OSError(errno.EPERM, "ptrace")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def try_seccomp() -> None:
    """Install a filter that allows everything. A kernel in its seccomp mode installs filters, too."""
    import array

    allow = array.array("B", struct.pack("=HBBI", BPF_RET, 0, 0, SECCOMP_RET_ALLOW))
    program = struct.pack("@HP", 1, allow.buffer_info()[0])
    call_libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call_libc("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def explain_ptrace(mode: Optional[str]) -> Optional[Fatal]:
    """Who forbids a process to trace its children; None if nobody does, or the kernel does not need it.

    In its seccomp mode a kernel traces nothing. It still calls ptrace(), and a filter may answer with a
    signal.
    """
    in_seccomp_mode = mode in SECCOMP_MODES
    fault = try_in_child(try_ptrace)
    if fault == os.strerror(errno.EAGAIN):
        raise Fatal("process for a trial cannot be started: " + fault, PROCESSES_HINT)
    if not fault:
        return None
    has_seccomp = in_seccomp_mode and not try_in_child(try_seccomp)
    if has_seccomp and not fault.startswith("signal"):
        return None
    scope = read_node_file("/proc/sys/kernel/yama/ptrace_scope").strip()
    filtered = re.search(r"(?m)^Seccomp:\s*2", read_node_file("/proc/self/status"))
    culprit = ("Yama (kernel.yama.ptrace_scope={})".format(scope) if scope in ("2", "3") else
               "a seccomp filter" if filtered else "this node")
    if in_seccomp_mode and not has_seccomp:
        return Fatal("ptrace and seccomp are both forbidden by {}: {}".format(culprit, fault),
                     "AppPot runs programs by one of the two: ask the admin of this node for ptrace, or "
                     "in a container for --cap-add SYS_PTRACE or --security-opt seccomp=unconfined")
    has_choice = mode and not in_seccomp_mode
    return Fatal("ptrace is forbidden by {}: {}".format(culprit, fault),
                 "leave out --ptrace: this kernel has a seccomp mode" if has_choice else
                 "ask for it to be allowed, or use a kernel with a seccomp mode, as `make kernel` builds")


def check_limits(mem_mib: int, disk_bytes: int, cpus: int) -> None:
    """Refuse hard limits that the kernel would die of. take_limits() raises the soft ones to these."""
    space = (mem_mib + ADDRESS_SPACE_EXTRA_MIB) << 20
    less_memory = "raise the limit, or ask for less memory with --mem"
    for which, need, what, hint in (
            (resource.RLIMIT_AS, space, "address space (ulimit -v)", less_memory),
            (resource.RLIMIT_FSIZE, start_of_cow(disk_bytes) + disk_bytes, "file size (ulimit -f)",
             "raise the limit, or take a smaller image: what a run writes goes into a file of its size"),
            (resource.RLIMIT_FSIZE, mem_mib << 20, "file size (ulimit -f)", less_memory)):
        hard = resource.getrlimit(which)[1]
        if hard != resource.RLIM_INFINITY and hard < need:
            raise Fatal("limit of {} is {}, {} are needed".format(
                what, format_mib(hard >> 20), format_mib(need >> 20)), hint)

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = len(os.listdir("/proc/self/fd")) + DESCRIPTORS_MIN
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise Fatal("limit of open files (ulimit -n) is {}, {} are needed with those of the caller"
                    .format(hard, needed), "raise the limit")

    check_processes()
    check_timers(cpus)


def check_timers(cpus: int) -> None:
    """Each CPU of the guest has a timer, which takes one of the user's pending signals."""
    hard = resource.getrlimit(resource.RLIMIT_SIGPENDING)[1]
    queued = re.search(r"(?m)^SigQ:\s*(\d+)/", read_node_file("/proc/self/status"))
    used = int(queued.group(1)) if queued else 0
    if hard != resource.RLIM_INFINITY and hard < used + cpus:
        message = "limit of pending signals (ulimit -i) is {}, {} are needed"
        raise Fatal(message.format(hard, used + cpus),
                    "raise the limit; without them the guest's clock stands still")


def find_fault_for_ram(directory: str, mem_mib: int) -> str:
    """Why the file of the guest's memory cannot be in `directory`; empty if it can.

    The kernel maps that file executable.
    """
    try:
        with signals_held():
            descriptor = open_nameless(directory)
    except OSError as error:
        return "cannot be written ({})".format(error.strerror)

    rights = mmap.PROT_READ | mmap.PROT_EXEC
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED, rights).close()
        room = free_mib(directory)
    except OSError as error:
        if error.errno == errno.EFBIG:
            return "takes no file of a page (ulimit -f)"
        if error.errno == errno.EPERM:
            return "is mounted noexec"
        return "is unusable ({})".format(error.strerror)
    finally:
        os.close(descriptor)

    return "" if room >= mem_mib else "has {} free".format(format_mib(room))


def choose_ram_directory(candidates: Sequence[str], mem_mib: int) -> str:
    faults = []
    for directory in [SHARED_MEMORY] + list(candidates):
        fault = find_fault_for_ram(directory, mem_mib)
        if not fault:
            return os.path.abspath(directory)
        faults.append("{} {}".format(directory, fault))
    what = "no room for the guest's memory of {}: {}".format(format_mib(mem_mib), "; ".join(faults))
    raise Fatal(what, "with --tmpdir name a directory that has it and is not noexec, "
                "or ask for less with --mem")


def place_memory(mem: Amount, floors: Sequence[int],
                 candidates: Sequence[str]) -> Tuple[Amount, str]:
    """The directory of the file with the guest's memory, and how much memory has room there."""
    failure = None
    for floor in floors:
        try:
            directory = choose_ram_directory(candidates, floor)
        except Fatal as fatal:
            failure = failure or fatal
            continue

        room = int(free_mib(directory) * ROOM_SHARE)
        if floor == mem.value or mem.value <= room:
            return mem, directory
        source = "room in {}; {}".format(directory, mem.source)
        return Amount(max(floor, room), source), directory

    assert failure
    raise failure


# --- User-Mode Linux: the kernel command line ---------------------------------------------------------------

# In the run directory. Kernels from 6.12 on want an absolute path.
HOSTFS_ROOT = "hostfs=/proc/self/cwd/hostfs"
# Debian's kernels time every algorithm of RAID 5 and 6 at each boot, for 0.5 s. No guest has an array.
# All kernels count for 0.05 s how many loops make a tick, for drivers that wait so. A guest has none.
SKIPPED_AT_BOOT = ["initcall_blacklist=raid6_select_algo,calibrate_xor_blocks", "lpj=25000000"]
# A page fault of User-Mode Linux costs six times as much as one of the host, almost the same for a
# megabyte as for a page. A process gets large pages for what it uses next to each other.
LARGE_PAGES = ["thp_anon=16K-1M:always;2M:madvise", "thp_shmem=64K:always"]
# Errors of the guest's disk come to the console, even if a program has called `dmesg -n`.
SAYS_ALL = "ignore_loglevel"
VIRTIO_FS_DEVICE = 26                # VIRTIO_ID_FS, include/uapi/linux/virtio_ids.h


def build_kernel_args(kernel: str, mode: Optional[str], features: Features, guest: Guest,
                      share_args: Sequence[str]) -> List[str]:
    """argv of the kernel. Paths are relative to the run directory, so no blank or comma can hurt."""
    return [
        kernel,
        name_disk(guest.disk), *build_root_args(guest.disk), "rw", "mem={}M".format(guest.mem_mib),
        "con=null", "con0=null,fd:1", "ssl0=fd:{},fd:{}".format(INPUT_FD, OUTPUT_FD),
        "uml_dir=.", "umid=" + guest.name, HOSTFS_ROOT, *share_args,
        "init=" + AGENT, SAYS_ALL, *SKIPPED_AT_BOOT,
        *(LARGE_PAGES if features.large_pages else []),
        *build_cpu_args(mode, guest), *build_network_args(guest.network), *guest.extra]


def build_share_args(modules: Sequence[str]) -> List[str]:
    """The device of the file server. The agent finds the second word in its environment.

    It names the modules that the agent is to load before it mounts the shares.
    """
    device = "virtio_uml.device={}:{}".format(SHARES_SOCKET, VIRTIO_FS_DEVICE)
    return [device, "apppot_virtiofs=" + ",".join(modules)]


def name_disk(disk: Disk) -> str:
    """The argument for the first disk. "c" keeps the kernel from taking the lock that we have."""
    files = [path if is_plain(path) else link for link, path in list_disk_files(disk)]
    return "ubd0c=" + ",".join(files if disk.is_persistent else ["cow", *files])


def build_root_args(disk: Disk) -> List[str]:
    """A larger root file system than in the image goes on in a second disk. Device mapper joins them.

    Documentation/admin-guide/device-mapper/dm-init.rst, in sectors. ubd devices have major 98 and 16
    minors each.
    """
    if disk.size is None or disk.write:
        return ["root=/dev/ubda{}".format(disk.root.partition or "")]
    first = disk.root.length // COW_SECTOR
    rest = (disk.size - disk.root.length) // COW_SECTOR
    table = "0 {0} linear 98:{1} 0,{0} {2} linear 98:16 0".format(first, disk.root.partition, rest)
    return ["ubd1c=disk", "root=/dev/dm-0", 'dm-mod.create="root,,,rw,{}"'.format(table)]


def build_cpu_args(mode: Optional[str], guest: Guest) -> List[str]:
    """How system calls are trapped, and how many CPUs there are. Several need the seccomp mode."""
    is_given = any(word.startswith("seccomp=") for word in guest.extra)
    args = [] if is_given or mode is None else ["seccomp=" + mode]
    return args + (["ncpus={}".format(guest.cpus)] if guest.cpus > 1 else [])


def build_network_args(network: Network) -> List[str]:
    """Words of the kernel command line; slirp is a link in the run directory."""
    words = []
    if network.kind == SLIRP4NETNS:
        words = ["vec0:transport=fd,fd={}".format(NETWORK_FD)]
    elif network.kind == SLIRP:
        # "_" is a blank. With any other control address slirp runs programs of the host for the guest.
        words = ["eth0=slirp,,./slirp,control_addr_255.255.255.255"]
    if network.lan:
        # A MAC of our own: kernels of old make the same one in every guest.
        mac = ":".join("{:02x}".format(byte) for byte in b"\2\0" + parse_ipv4(network.lan.address))
        words.append("eth1=mcast,{},{},{}".format(mac, network.lan.group, network.lan.port))
    return words


# --- User-Mode Linux: the management console ----------------------------------------------------------------

# arch/um/drivers/mconsole.h: magic, version, length
MCONSOLE = struct.Struct("=III512s")
MCONSOLE_MAGIC, MCONSOLE_VERSION = 0xCAFEBABE, 2
# What else is in the run directory.
RESERVED_NAMES = (
    ".", "..", "hostfs", SPOOL, SHARES_SOCKET, "cow", "disk", "base", "image", "net", "net-api",
    "slirp")


def ask_mconsole(directory: int, umid: str, command: bytes) -> None:
    """Send a command to the kernel's mconsole in a run directory, and wait a second for the answer.

    The guest may have put anything in its place, so a link is not followed. The path of a socket has at
    most 107 bytes, so the path leads through a descriptor.
    """
    import socket

    opened: List[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        try:
            opened.append(os.open(umid, os.O_PATH | DIRECTORY, dir_fd=directory))
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            opened.append(os.open("mconsole", flags, dir_fd=opened[0]))
            client.bind("")                       # an abstract address by autobind, for the answer
            client.sendto(MCONSOLE.pack(MCONSOLE_MAGIC, MCONSOLE_VERSION, len(command), command),
                          "/proc/self/fd/{}".format(opened[1]))
            client.recv(1024)
        except OSError:
            pass
        finally:
            for descriptor in opened:
                os.close(descriptor)


def resume_guest(supervisor: int, directory: int, umid: str) -> None:
    """Let a suspended guest go on, after a SIGCONT to all its processes.

    A batch system continues one process after the other. A traced process keeps its SIGSTOP pending
    until its own SIGCONT. If it runs before that, its tracer sees the stop and panics.
    """
    pids = [supervisor]
    for pid in pids:
        pids += list_children(pid)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:                # it has ended meanwhile
            pass
    ask_mconsole(directory, umid, b"go")


# --- User-Mode Linux: watching a guest ----------------------------------------------------------------------

KERNEL_HELPERS = 4                   # at most so many threads of its own a kernel has
CORPSE_S = 1.0                       # a thread that is dead for so long is not about to be reaped
# What a guest does: KEEP to the CPU that it is on.
STAY, KEEP, FREE, LEAVE = "stay", "keep", "free", "leave"
QUIET_ROUNDS = 4                     # after so many a guest with several CPUs is kept on one again
AREAS_S = 1.0                        # how often to look how many areas the processes have
AREAS_MARGIN = 8                     # of vm.max_map_count: the kernel needs some areas itself


def find_corpses(kernel: int) -> Set[int]:
    """Dead threads of the kernel's own. The kernel does not notice their death, and the guest hangs.

    These are the first of its children; later ones are the guest's processes. Slirp is a child, too, but
    another program, and the guest can do without it.
    """
    return {child for child in list_children(kernel)[:KERNEL_HELPERS]
            if read_stat(child).state == "Z" and read_name(child) == read_name(kernel)}


class CorpseWatch:
    """Finds a dead thread of the kernel's own that the kernel does not notice."""

    def __init__(self, kernel: int) -> None:
        self._kernel = kernel
        self._corpses: Set[int] = set()
        self._dead_since = time.monotonic()

    def review(self, is_suspended: bool) -> Optional[End]:
        before = self._corpses
        self._corpses = find_corpses(self._kernel)
        if is_suspended or not before & self._corpses:
            self._dead_since = time.monotonic()
            return None

        is_about_to_reap = read_stat(self._kernel).state != "S"
        if time.monotonic() <= self._dead_since + CORPSE_S or is_about_to_reap:
            return None
        for corpse in self._corpses:
            over_limit = blame_cpu_limit(corpse, "a helper process of the kernel")
            if over_limit:
                raise over_limit
        return End(HELPER)


def count_pages(pid: int) -> int:
    """Of the address space of a process; 0 when there is none."""
    try:
        with open("/proc/{}/statm".format(pid), "rb") as file:
            return int(file.read().split()[0])
    except (OSError, IndexError):
        return 0


def count_areas(pid: int) -> int:
    """Of the address space of a process, as vm.max_map_count counts them."""
    try:
        with open("/proc/{}/maps".format(pid), "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def explain_areas() -> Fatal:
    message = "a process of the guest has more separate memory areas than vm.max_map_count of this node allows: {}"
    return Fatal(message.format(read_max_areas()),
                 "ask for a higher vm.max_map_count; a used page with no used one beside it is an area")


class Placement:
    """Decides whether a guest is kept on one CPU of the host: as long as it needs no second one.

    At each system call of the guest two processes wake each other. On one CPU that takes 9 us, between
    two CPUs 50 us. The host would put them on two, as each is woken while the other still runs.
    """

    def __init__(self, ncpus: int) -> None:
        self._ncpus = ncpus
        self._is_kept = True
        self._quiet_rounds = 0                    # since it was let go

    def decide(self, ran: float, waited: float) -> str:
        """STAY, KEEP, FREE or LEAVE, by how long the guest ran and waited for a CPU in a second."""
        if not self._is_kept:
            self._quiet_rounds = self._quiet_rounds + 1 if ran < 0.9 else 0
            self._is_kept = self._quiet_rounds == QUIET_ROUNDS
            return KEEP if self._is_kept else STAY

        # The two wait 0.1 to 0.7 for each other, most in a loop of system calls. A third process that
        # computes makes it 1, and then the CPUs of the guest wait for each other's locks.
        if waited > 0.85 and self._ncpus > 1:
            self._is_kept = False
            self._quiet_rounds = 0
            return FREE
        return LEAVE if ran < 0.8 and waited > 0.3 else STAY


def choose_idle_cpu(idle: Dict[int, float], chance: bytes) -> Optional[int]:
    """One of the CPUs that were idle for most of the last round, or none.

    Chance makes each of several guests go or stay, so that not all of them go to the same CPU.
    """
    cpus = [cpu for cpu, share in idle.items() if share > 0.5]
    return cpus[chance[1] % len(cpus)] if cpus and chance[0] % 2 else None


def can_be_placed(times: Tuple[float, float], cpus: Set[int]) -> bool:
    """Whether there is a choice, and the host counts how long a task waits for others.

    If it does not, the host's scheduler knows better.
    """
    return any(times) and len(cpus) > 1


class Placer:
    """Reads what a guest does, and puts all its tasks on the CPUs that its Placement decides on."""

    def __init__(self, kernel: int, ncpus: int) -> None:
        # With several CPUs it is also the time until work is spread.
        self.interval_s = WATCH_INTERVAL_S if ncpus == 1 else WATCH_INTERVAL_S / 4
        self._kernel = kernel
        self._placement = Placement(ncpus)
        self._times: Dict[int, Tuple[float, float]] = {}       # of each task, at the last round
        self._idle: Dict[int, float] = {}         # of each CPU, if others wanted the guest's
        self._reviewed = time.monotonic()
        self._due = self._reviewed + self.interval_s
        self._is_possible = can_be_placed(read_times(os.getpid()), os.sched_getaffinity(0))
        if self._is_possible:
            self._move_to({read_stat(kernel).processor})            # where the scheduler has put it

    def review(self) -> None:
        """Act at each round of the supervisor."""
        started = time.monotonic()
        if not self._is_possible or started < self._due:
            return
        elapsed = started - self._reviewed
        self._reviewed = started

        decision = self._placement.decide(*self._read_load(elapsed))
        if decision == KEEP:
            self._move_to({read_stat(self._kernel).processor})
        elif decision == FREE:
            self._move_to(os.sched_getaffinity(0))
        if decision == LEAVE:
            self._leave_crowd(elapsed)
        else:
            self._idle = {}

        # Of a guest with hundreds of processes less often: this takes a hundredth of a CPU at most.
        self._due = started + max(0.9 * self.interval_s, 100 * (time.monotonic() - started))

    def _read_load(self, elapsed: float) -> Tuple[float, float]:
        before = self._times
        self._times = {task: read_times(task) for task in list_tasks(self._kernel)}
        pairs = [(before.get(task, now), now) for task, now in self._times.items()]
        ran = sum(now[0] - then[0] for then, now in pairs)
        waited = sum(now[1] - then[1] for then, now in pairs)
        return ran / elapsed, waited / elapsed

    def _leave_crowd(self, elapsed: float) -> None:
        before = self._idle
        self._idle = read_idle_times()
        known = os.sched_getaffinity(0) & set(before) & set(self._idle)
        idle = {cpu: (self._idle[cpu] - before[cpu]) / elapsed for cpu in known}
        cpu = choose_idle_cpu(idle, os.urandom(2))
        if cpu is not None:
            self._move_to({cpu})
            self._idle = {}

    def _move_to(self, cpus: Set[int]) -> None:
        allowed = cpus & os.sched_getaffinity(0)
        for task in list_tasks(self._kernel):
            try:
                os.sched_setaffinity(task, allowed)
            except OSError:                       # it has ended
                pass


class AreaWatch:
    """Finds a process of the guest that has as many separate memory areas as the host allows.

    A kernel in its seccomp mode then tries for ever to map what the process wants to use next, unless
    AppPot's patch makes it forget what the process has used before.
    """

    def __init__(self, kernel: int) -> None:
        self._kernel = kernel
        self._limit = read_max_areas() - AREAS_MARGIN
        self._due = time.monotonic() + AREAS_S
        # By pid the number of pages and the time from which to count again.
        self._later: Dict[int, Tuple[int, float]] = {}
        self._full: Dict[int, float] = {}         # by pid: seconds that it had run

    def review(self) -> None:
        """Act at each round of the supervisor.

        Fatal if a process had no area left in two rounds, and has run between them.
        """
        started = time.monotonic()
        if started < self._due:
            return
        before = self._full
        self._full = {task: read_times(task)[0] for task in list_tasks(self._kernel)
                      if self._may_be_full(task, started) and self._is_full(task, started)}
        if any(ran > before.get(task, ran) + AREAS_S / 10 for task, ran in self._full.items()):
            raise explain_areas()
        self._due = started + max(AREAS_S, 0 if self._full else 10 * (time.monotonic() - started))

    def _may_be_full(self, task: int, now: float) -> bool:
        """An area has a page at least, so that its size tells where nothing needs to be counted."""
        pages, moment = self._later.get(task, (self._limit, 0.0))
        size = count_pages(task)
        return size >= pages or size >= self._limit and now >= moment > 0

    def _is_full(self, task: int, now: float) -> bool:
        areas = count_areas(task)
        cost_s = time.monotonic() - now
        if areas < self._limit:
            self._later[task] = (count_pages(task) + self._limit - areas, now + 100 * cost_s)
        return areas >= self._limit


class UmlWatch(Watch):
    def __init__(self, kernel: int, features: Features, guest: Guest) -> None:
        self._placer = Placer(kernel, guest.cpus)
        self._areas = None if features.any_areas else AreaWatch(kernel)
        self._corpses = CorpseWatch(kernel)
        self.interval_s = self._placer.interval_s

    def review(self, is_suspended: bool) -> Optional[End]:
        self._placer.review()
        if self._areas:
            self._areas.review()
        return self._corpses.review(is_suspended)


# --- User-Mode Linux: what its console tells ----------------------------------------------------------------

MEMORY_LOST = "Kernel mode signal 7"  # SIGBUS: relay_signal() in arch/um/kernel/trap.c
# arch/um/os-Linux/skas/process.c before 6.16: ESRCH, or the wait status after a SIGKILL
KILLED_PROCESS = (br"(userspace - |Failed to get registers|wait_stub_done : ).{0,120}"
                  br"(errno = 3|status = 0x9)\s")
# arch/um/os-Linux/skas/mem.c, and arch/um/kernel/tlb.c before 6.10: an area cannot be mapped on the host
AREAS_LOST = (br"ran out of memory on the host side|Failed to flush page for|"
              br"fix_range_common: failed")
LOST_PROCESS = b"Unexpectedly lost MM child!"    # arch/um/kernel/skas/mmu.c, 6.16 and later


class UmlConsole(Console):
    def __init__(self, guest: Guest, kernel: str, mode: Optional[str]) -> None:
        super().__init__(guest, "(?:ubda|ubdb|dm-0)" if is_mapped(guest.disk) else "ubda")
        self._kernel = kernel
        self._mode = mode

    def find_fault(self) -> Optional[Fatal]:
        if re.search(AREAS_LOST, self.tail) and not re.search(KILLED_PROCESS, self.tail):
            return explain_areas()
        if LOST_PROCESS in self.tail:             # it may be the agent
            limit = self.suspect_limit()
            return Fatal("a process of the guest was killed on the host" + limit,
                         MORE_CPU_TIME if limit else LOOK_FOR_KILLER)
        return None

    def explain_killed_process(self) -> Optional[str]:
        if not re.search(KILLED_PROCESS, self.tail):
            return None
        return "a process of the guest was killed on the host" + self.suspect_limit()

    def explain_end(self, status: int, was_up: bool) -> Fatal:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return Fatal("guest was killed by signal 9",
                         "was the memory that the job asked for used up?")

        console = self.tail.decode("utf-8", "replace")
        panic = re.search(r"Kernel panic - not syncing: (.*)", console)
        no_module = "No module named 'apppot_init'" in console
        no_init = panic is not None and (no_module or "init failed" in panic.group(1))
        if no_init or "No working init" in console:
            return no_agent(AGENT_MODULE if no_module else AGENT, self._guest.disk.image)
        if panic:
            return self._explain_panic(panic.group(1).strip())
        if was_up:
            return Fatal("guest ended before the command did",
                         "it was powered off or rebooted from inside, or its kernel crashed; "
                         "-v shows its console")
        return self._explain_no_boot(status, console)

    def _explain_panic(self, what: str) -> Fatal:
        if MEMORY_LOST in what:
            return explain_memory_lost(self._guest)
        if "mount root" in what:
            return Fatal("guest cannot mount its root file system: " + self._guest.disk.image,
                         "run with -v to see the guest's console; is the image damaged? "
                         "`e2fsck -fn` tells")
        return Fatal("guest panicked: " + what, "run with -v to see the guest's console")

    def _explain_no_boot(self, status: int, console: str) -> Fatal:
        how = "status {}".format(status >> 8)
        if os.WIFSIGNALED(status):
            how = "signal {}".format(os.WTERMSIG(status))
        return (explain_loader(console, self._kernel) or explain_ptrace(self._mode)
                or not_uml(self._kernel, "ended with {} before the guest was up ({})".format(
                    how, last_line(console.encode()))))


# --- User-Mode Linux: the VMM -------------------------------------------------------------------------------

ADDR_NO_RANDOMIZE = 0x0040000                                  # include/uapi/linux/personality.h
HOSTFS_LACKS = ("no lock reaches another run, appends of several runs get lost, times have whole "
                "seconds and touch(1) changes none, no ACLs, no xattrs, no holes")


class Uml(Vmm):
    """User-Mode Linux: a Linux kernel that is a process of the host."""

    # From 3968 bytes on the kernel stops the line for good. The pty of `empty` holds 8 KiB and must
    # not be full: `empty` moves bytes one way at a time, so it and the agent would each wait for the
    # other to read. If its write is interrupted, it forgets the rest.
    line_window = 3072
    reserved_names = RESERVED_NAMES

    def __init__(self, kernel: str, features: Features, ptrace: bool, extra: Sequence[str]) -> None:
        self.program = kernel
        self.features = features
        self.mode = choose_mode(features, ptrace, extra)
        self._ptrace = ptrace
        self.can_enlarge_disk = features.device_mapper
        version = features.needs_modules
        self._module_place = None if version is None else find_modules(kernel, version)
        has_driver = features.virtio and features.virtio_fs
        self.has_virtio_fs = has_driver and (version is None or self._module_place is not None)
        drivers = (
            (features.vector_network, SLIRP4NETNS, "vec0"),
            (features.slirp_network, SLIRP, "eth0"),
            (features.multicast, LAN, "eth1"))
        self.interfaces = {kind: name for is_there, kind, name in drivers if is_there}

    def explain_one_cpu(self) -> Optional[str]:
        if self._ptrace:
            return "--ptrace"
        return None if self.features.smp else "kernel without SMP"

    def place_memory(self, mem: Amount, floors: Sequence[int],
                     candidates: Sequence[str]) -> Tuple[Amount, str]:
        return place_memory(mem, floors, candidates)

    def check(self, disk: Disk, mem_mib: int, cpus: int) -> None:
        if not disk.write:
            check_map(disk.image, mem_mib)
        check_limits(mem_mib, os.path.getsize(disk.image), cpus)

    def open_disk(self, disk: Disk) -> List[int]:
        files = [open_image(disk.image, disk.write)]
        if disk.cow:
            files.append(open_cow(disk.cow, disk.image))
        return files

    def prepare(self, guest: Guest, directories: Directories) -> None:
        """Make the guest's hostfs directory, the files of its disk, and the links for argv."""
        run = directories.run.path
        hostfs = os.path.join(run, "hostfs")
        os.mkdir(hostfs)
        if self._module_place is not None:
            os.symlink(self._module_place, os.path.join(hostfs, "modules"))
        for share in () if self.has_virtio_fs else guest.shares:
            os.symlink(share.directory, os.path.join(os.fsencode(hostfs), share.tag.encode()))

        disk = guest.disk
        for link, path in list_disk_files(disk):
            if not is_plain(path):
                os.symlink(path, os.path.join(run, link))
        if not disk.is_persistent:
            os.close(open_cow(os.path.join(run, "cow"), disk.image))
        if disk.size is not None:
            enlarge_disk(disk, disk.size, run)

        helper = guest.network.helper
        if helper and helper.kind == SLIRP:
            os.symlink(helper.program, os.path.join(run, "slirp"))

    def build_argv(self, guest: Guest) -> List[str]:
        modules = () if self._module_place is None else MODULES
        share_args = build_share_args(modules) if self.has_virtio_fs else []
        return build_kernel_args(self.program, self.mode, self.features, guest, share_args)

    def describe(self, guest: Guest, directories: Directories) -> str:
        path = os.path.join(directories.run.path, guest.name, "mconsole")
        return "management console: uml_mconsole " + path

    def describe_files(self) -> str:
        if self.has_virtio_fs:
            return "files of the host come by virtio-fs and are as on this node"
        return "files of the host come by hostfs, as {}: {}".format(self.explain_hostfs(), HOSTFS_LACKS)

    def explain_hostfs(self) -> str:
        """Why the shares do not come by virtio-fs."""
        version = self.features.needs_modules
        if version is None:
            return "the kernel has no virtio-fs"
        files = " and ".join(name + ".ko" for name in MODULES)
        return "{} of kernel {} are neither beside it nor in {}".format(
            files, version, MODULE_PLACE.format(version))

    def open_console(self, guest: Guest) -> Console:
        return UmlConsole(guest, self.program, self.mode)

    def list_rules(self, guest: Guest) -> List[Rule]:
        rules: List[Rule] = [(path, READ_FILE) for path in ("/etc/ld.so.cache", "/proc/cpuinfo")]
        devices = ("null", "zero", "ptmx", "pts", "tty")
        rules += [("/dev/" + name, READ_FILE | WRITE_FILE) for name in devices]
        rules += list_program_rules(self.program)

        if self._module_place is not None:
            files = (os.path.join(self._module_place, name + ".ko") for name in MODULES)
            rules += [(path, READ_FILE) for path in files]

        helper = guest.network.helper
        if helper and helper.kind == SLIRP:       # the kernel executes it
            rules += list_program_rules(helper.program)
            configuration = ("host.conf", "resolv.conf", "nsswitch.conf", "hosts")
            rules += [("/etc/" + name, READ_FILE) for name in configuration]

        # The user may give a disk or a socket to the kernel.
        words = [word for argument in guest.extra for word in re.split("[=,]", argument)]
        return rules + [(word, READ_WRITE) for word in words if word.startswith("/")]

    def build_environment(self, guest: Guest, directories: Directories) -> Dict[str, str]:
        environment = dict(os.environ, TMPDIR=directories.ram.path)
        # Slirp would run programs for the guest, and read ~/.slirprc.
        if guest.network.kind == SLIRP:
            environment.update(PATH=os.devnull, HOME=".")
        return environment

    def enter_child(self) -> None:
        # A randomised heap is up to 1 GiB off the program. The kernel would fill that gap with memory.
        try_libc("personality", ADDR_NO_RANDOMIZE)

    def explain_exec_failure(self, number: int) -> Fatal:
        return explain_exec_failure(number, self.program)

    def watch(self, kernel: int, guest: Guest) -> Watch:
        return UmlWatch(kernel, self.features, guest)

    def pause(self, guest: Guest, directory: int) -> None:
        ask_mconsole(directory, guest.name, b"stop")

    def resume(self, guest: Guest, directory: int, supervisor: int) -> None:
        resume_guest(supervisor, directory, guest.name)


def find_uml(kernel: Optional[str], ptrace: bool, extra: Sequence[str]) -> Uml:
    path = check_kernel(find_part(kernel, KERNEL_NAMES, "kernel", True))
    return Uml(path, read_features(path), ptrace, extra)


# --- User-Mode Linux: what the doctor says -------------------------------------------------------------------

def examine_kernel(vmm: Uml) -> Finding:
    kernel = vmm.program
    version = read_kernel_version(kernel)
    names = [name for name, _ in FEATURE_SETTINGS] + ["seccomp mode"]
    has = [name for name, is_there in zip(names, vmm.features) if is_there]
    lacks = [name for name in names if name not in has]
    if not vmm.features.hostfs and not vmm.has_virtio_fs:
        raise Fatal("kernel has no virtio-fs and no hostfs: " + kernel,
                    "build it with CONFIG_VIRTIO_FS=y, as `make kernel` does")

    linking = "with its shared libraries" if read_loader(kernel) else "static"
    return Finding("ok", "{} {}, {}, has {}; no {}".format(
        kernel, version, linking, ", ".join(has), ", ".join(lacks) or "lack"))


def examine_files(vmm: Optional[Uml], confinement: str) -> Finding:
    if not vmm:
        return Finding("ok", confinement)
    what = "{}; {}".format(vmm.describe_files(), confinement)
    if vmm.has_virtio_fs:
        return Finding("ok", what)
    return Finding("warn", what, "use a kernel with CONFIG_VIRTIO_FS, as `make kernel` builds one, "
                   "or put its modules beside it")


def examine_ptrace(vmm: Optional[Uml]) -> Finding:
    mode = vmm.mode if vmm else None
    fatal = explain_ptrace(mode)
    if fatal:
        raise fatal
    if mode in SECCOMP_MODES:
        return Finding("ok", "not needed in the kernel's seccomp mode")
    return Finding("ok", "processes can be traced")


def examine_seccomp(vmm: Optional[Uml]) -> Finding:
    fault = try_in_child(try_seccomp)
    if not fault:
        return Finding("ok", "filters can be installed")
    what = "filters cannot be installed: " + fault
    if vmm and not vmm.features.seccomp_mode:
        return Finding("ok", what + "; this kernel needs none")
    return Finding("warn", what, "do not use --extra seccomp=on")


# --- Carriers -----------------------------------------------------------------------------------------------
# A carrier starts the VMM with the channel to the agent. The built-in carrier gives the runner's pipes
# to the VMM. The program `empty` (github.com/mezantrop/empty) starts the VMM on a pty, and moves bytes
# between the pty and two FIFOs.

EMPTY_NAMES = ("empty",)
EMPTY_MARK = b"empty -f"             # in its usage text
# `empty` makes these FIFOs in the run directory. Its program gets a pty as 0, 1 and 2. The shell gives
# the pty the numbers of the channel, sends what the kernel prints to the console, and ignores again the
# signals that `empty` has handlers for.
EMPTY_PID, EMPTY_TO_GUEST, EMPTY_FROM_GUEST = "empty.pid", "to-guest", "from-guest"
EMPTY_ARGS = ["-f", "-i", EMPTY_TO_GUEST, "-o", EMPTY_FROM_GUEST, "-p", EMPTY_PID, "/bin/sh", "-c",
              'trap "" HUP INT QUIT TERM; exec "$0" "$@" {}<&0 {}>&1 </dev/null >&{} 2>&1'.format(
                  INPUT_FD, OUTPUT_FD, CONSOLE_FD)]
EMPTY_TRIES = 3                      # two that start at once may have the key of their semaphore in common
EMPTY_START_S = 10.0
CARRIED = struct.Struct("=i")        # the supervisor's first word: pid of the kernel below `empty`, or 0


class Kernel:
    """The process of a VMM that was started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def find_end(self) -> Optional[End]:
        """How it has ended; None if it lives."""
        if read_stat(self.pid).state != "Z":
            return None
        over_limit = blame_cpu_limit(
            self.pid, "the guest's kernel, which makes the system calls of all its processes,")
        self._adopt()
        status = os.waitpid(self.pid, 0)[1]       # it may have threads that are still to die
        if over_limit and status == signal.SIGKILL:
            raise over_limit
        return End(KERNEL, status)

    def _adopt(self) -> None:
        """Make it a child of ours."""


class CarriedKernel(Kernel):
    """The process of a VMM that `empty` has started."""

    def __init__(self, pid: int, empty: int) -> None:
        super().__init__(pid)
        self._empty = empty

    def find_end(self) -> Optional[End]:
        pid, status = os.waitpid(self._empty, os.WNOHANG)
        if not pid:
            return super().find_end()
        if os.WIFSIGNALED(status):
            return End(CARRIER)
        # `empty` ends by itself when the kernel closes the pty, as a dying kernel does.
        try:
            os.kill(self.pid, signal.SIGKILL)
            return End(KERNEL, os.waitpid(self.pid, 0)[1])
        except (ProcessLookupError, ChildProcessError):
            return End(KERNEL)                    # `empty` has reaped it, and the status is lost

    def _adopt(self) -> None:
        os.kill(self._empty, signal.SIGKILL)
        os.waitpid(self._empty, 0)


class Carrier:
    """The built-in carrier."""

    program: Optional[str] = None    # absolute path of a program that carries

    def build_argv(self, argv: List[str]) -> List[str]:
        """What is started instead of argv, which is the VMM's."""
        return argv

    def list_rules(self) -> List[Rule]:
        return []

    # The supervisor starts, and the runner opens.

    def start(self, argv: List[str], launch: Launch) -> Optional[Kernel]:
        """Start the VMM; None if the carrier does not work. CannotExecute for the VMM's program."""
        leash = os.pipe()[0]                      # our end closes the write end
        pid = spawn(argv, launch._replace(keep={**launch.keep, LEASH_FDS[0]: leash}))
        tie_to_us(leash, -pid)                    # the kernel makes itself the leader of a group
        return Kernel(pid)

    def open_channel(self, directory: int, from_guest: int, to_guest: int) -> Optional[int]:
        """Put the channel in the place of the runner's pipes; the pid to wake, if there is one."""
        return None

    def wake(self, kernel: int) -> None:
        """Tell the kernel that there is room in the channel again."""


class Empty(Carrier):
    def __init__(self, program: str, is_required: bool) -> None:
        self.program: str = program
        self._is_required = is_required           # else the built-in carrier may take its place

    def build_argv(self, argv: List[str]) -> List[str]:
        return [self.program, *EMPTY_ARGS, *argv]

    def list_rules(self) -> List[Rule]:
        return list_program_rules(self.program) + list_program_rules("/bin/sh")

    def start(self, argv: List[str], launch: Launch) -> Optional[Kernel]:
        # `empty` does not tell whether the VMM can be executed, so this does.
        spawn([argv[0], "--version"], launch._replace(keep={}))
        kill_children(launch.helpers)

        started = self._start_carried(argv, launch)
        if started or self._is_required:
            os.write(launch.keep[OUTPUT_FD], CARRIED.pack(started.pid) if started else b"")
            return started
        os.write(launch.keep[OUTPUT_FD], CARRIED.pack(0))
        return super().start(argv, launch)

    def _start_carried(self, argv: List[str], launch: Launch) -> Optional[Kernel]:
        """Start `empty` with the kernel; None if that does not work.

        SIGCHLD is blocked in `empty`, which would otherwise reap the kernel and keep the status to
        itself. So CarriedKernel can reap it.
        """
        deadline = time.monotonic() + EMPTY_START_S
        leashes = [os.pipe()[0], os.pipe()[0]]    # our end closes the write ends
        launch = launch._replace(keep={**launch.keep, **dict(zip(LEASH_FDS, leashes))})
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        try:
            for _ in range(EMPTY_TRIES):
                pids = find_carried_kernel(spawn(self.build_argv(argv), launch), launch, deadline)
                if pids:
                    kernel, empty = pids
                    tie_to_us(leashes[0], -kernel)
                    tie_to_us(leashes[1], empty)
                    return CarriedKernel(kernel, empty)
                kill_children(launch.helpers)
                for name in (EMPTY_PID, EMPTY_TO_GUEST, EMPTY_FROM_GUEST):
                    remove_entry(name, launch.run)
        except CannotExecute:
            pass
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        return None

    def open_channel(self, directory: int, from_guest: int, to_guest: int) -> Optional[int]:
        """Wait until the FIFOs are made. The pid of the kernel; None if `empty` does not work."""
        said = os.read(from_guest, CARRIED.size)
        kernel: int = CARRIED.unpack(said)[0] if said else 0
        if not kernel:
            return None
        try:
            # The second fails unless `empty` reads it. If `empty` lives, the first has a writer and an end.
            reader = open_fifo(EMPTY_FROM_GUEST, os.O_RDONLY, directory)
            writer = open_fifo(EMPTY_TO_GUEST, os.O_WRONLY, directory)
        except OSError:
            return kernel                         # `empty` is dead already, and the report tells

        widen_pipe(reader)
        for fifo, descriptor in ((reader, from_guest), (writer, to_guest)):
            os.dup2(fifo, descriptor, False)
            os.close(fifo)
        return kernel

    def wake(self, kernel: int) -> None:
        """The SIGIO of a full pty's own comes too early."""
        try:
            os.kill(kernel, signal.SIGIO)
        except OSError:
            pass                                  # it is dead


def find_carried_kernel(first: int, launch: Launch, deadline: float) -> Optional[Tuple[int, int]]:
    """Wait until `empty` is a daemon and has a child; None if it ends, takes too long, or nobody waits.

    Two dead processes are left behind: the first, and the first's child, which becomes ours when the
    first has ended.
    """
    is_daemon = False
    while time.monotonic() < deadline and not select.select([launch.lifeline], [], [], 0.005)[0]:
        children: List[int] = []
        try:
            with os.fdopen(open_own(EMPTY_PID, launch.run)) as file:
                empty = int(file.read(20))
            if is_daemon and read_stat(empty).parent == os.getpid():
                children = list_children(empty)
        except (OSError, ValueError):
            pass                                  # not yet

        ours = [pid for pid in list_children(os.getpid()) if pid not in launch.helpers]
        if not ours:
            return None
        dead = [pid for pid in ours if os.waitpid(pid, os.WNOHANG)[0]]
        is_daemon = is_daemon or first in dead
        if children:
            return children[0], empty
    return None


def find_carrier(io: str, option: Optional[str]) -> Carrier:
    """The carrier that was asked for; without a wish an `empty` that lies beside this script."""
    if io == "builtin":
        if option:
            raise Fatal("--empty with --io builtin: " + option, "leave out one of the two")
        return Carrier()
    if io == "empty" or option or find_given(None, "empty"):
        path = find_part(option, EMPTY_NAMES, "empty", True)
        check_is_empty(path)
        return Empty(os.path.abspath(path), True)

    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), EMPTY_NAMES[0])
    try:
        check_is_empty(path)
    except Fatal:                                 # any file may have that name
        return Carrier()
    return Empty(path, False)


def check_is_empty(path: str) -> None:
    hint = "--empty names the program, --io builtin does without it"
    with open_regular(path, "`empty`", hint) as file:
        is_empty = EMPTY_MARK in file.read(1 << 20)
    if not is_empty:
        raise Fatal("not the program `empty`: " + path,
                    "build it from github.com/mezantrop/empty, or use --io builtin")
    if not make_executable(path):
        raise Fatal("`empty` is not executable: " + path,
                    "chmod +x it; a file system mounted noexec cannot hold it")


# --- A run --------------------------------------------------------------------------------------------------

class Job(NamedTuple):
    """What the agent is told: the command and all that it finds in the guest."""
    command: Tuple[str, ...]
    environment: Dict[bytes, bytes]
    directory: Optional[bytes]
    alias: Optional[bytes]           # the name by which the user knows the directory
    binds: Tuple[Bind, ...]
    cwd: Optional[bytes]
    home: Optional[bytes]            # the caller's, if --bind shows it; None: one in the appliance
    as_root: bool
    umask: int
    ignored_signals: Tuple[int, ...]  # by the caller, and therefore by the command
    limits: Tuple[Limit, ...]        # the caller's, for the command
    terminal: Optional[bool]         # whether the command gets one; None: where the caller has one
    node: NodeView
    layers: Tuple[str, ...]          # changes files to merge, in this order
    force_changes: bool              # merge those of another base, too
    saved_changes: Optional[str]     # where to write a changes file after the command


class RunSpec(NamedTuple):
    """One run, decided: nothing below parses options or looks at the environment again."""
    job: Job
    guest: Guest
    vmm: Vmm
    carrier: Carrier
    ancestor: Optional[Ancestor]     # the run ends when this process does
    timeout_s: Optional[float]
    boot_timeout_s: float
    kill_after_s: float
    verbose: bool
    quiet: bool
    notes: Tuple[str, ...]           # for -v: how it was decided
    in_job: bool                     # of a batch system
    limit_mib: Optional[int]         # of the job's cgroup, if that limits the guest's memory


class Machine(NamedTuple):
    """A started guest, as the runner sees it."""
    supervisor: int                  # pid
    from_guest: int                  # the channel: read end
    to_guest: int                    # and write end, non-blocking
    console: int                     # read end: what the kernel prints
    lifeline: int                    # write end: closing it ends the guest
    report: int                      # read end: frames of the supervisor, the last one ENDED
    directories: Directories
    spool: int                       # directory for what is too long for the channel


def list_shares(job: Job) -> Tuple[Share, ...]:
    shares = [Share("job", job.directory, None, False)] if job.directory is not None else []
    shares += [make_share("layer{}".format(number), os.fsencode(layer), True)
               for number, layer in enumerate(job.layers)]
    shares += [bind.share for bind in job.binds]
    return tuple(shares)


def describe_interruption(spec: RunSpec, has_started: bool) -> str:
    """What to tell a user who interrupts AppPot itself: what is lost and what is kept."""
    path = spec.job.saved_changes
    if has_started and path is not None:
        kept = "is as before" if os.path.exists(path) else "was not made"
        return "interrupted: the command had ended, but its changes are lost; {} {}".format(path, kept)
    if spec.guest.disk.is_persistent and spec.job.layers:
        what = spec.guest.disk.cow or spec.guest.disk.image
        return "interrupted before the command started: a part of the changes may be in " + what
    return "interrupted before the command started: nothing was changed"


def describe_keeping(spec: RunSpec, home_stays: bool) -> Tuple[str, str]:
    """What to tell the user of an interactive shell at its start and, unless empty, at its end."""
    places = [os.fsdecode(bind.target) for bind in spec.job.binds if not bind.share.read_only]
    job = os.fsdecode(spec.job.alias or b"")
    if job and not any(is_below(job, place) for place in places):
        places.insert(0, job)

    kept = " and ".join(places)
    home = "" if home_stays else ", in HOME too,"
    rest = ("{} stays; all else{} " if kept else "{}{} ").format(kept, home)
    write = "what you write in " if kept else "what you write"
    if spec.guest.disk.is_persistent:
        disk = spec.guest.disk
        where = "the COW file " + disk.cow if disk.cow else "the image " + disk.image
        return write + rest + "goes into " + where, ""
    if spec.job.saved_changes:
        return write + rest + "goes into {} at the end".format(spec.job.saved_changes), ""
    keep = "(to keep it: --bind DIR, --save-changes FILE, --write)"
    return (write + rest + "is gone at the end " + keep,
            "what you wrote{} is gone".format(" outside of " + kept if kept else ""))


# --- The file server ----------------------------------------------------------------------------------------
# It serves the shares of a run to the guest, in a process of its own, if the VMM has virtio-fs.

# Frames of the supervisor and the file server to the runner. The payload of ENDED is an End in fields.
NETWORK_ENDED, ENDED, LOCK_WAITS = 65, 66, 67
FILE_SERVER = "the file server of the run"
GUEST_AT_FAULT = 1                   # exit status: the guest has broken the protocol
HANG_UP_S = 5.0                      # between the hang-up of a VMM and its end


class ServerProcess:
    """The process that serves the shares, as the supervisor sees it."""

    def __init__(self, pid: int, report: int, guest: Guest) -> None:
        self.pid = pid
        self._report = report                     # read end: why it has failed
        self._guest = guest
        self._hung_up: Optional[float] = None     # when it ended because the VMM hung up

    def check(self) -> None:
        """Raise what the run ends with if the server has ended before the VMM."""
        if self._hung_up is None and read_stat(self.pid).state == "Z":
            self._take_end()
        if self._hung_up is not None and time.monotonic() > self._hung_up + HANG_UP_S:
            raise Fatal("guest's kernel lives, but has hung up on " + FILE_SERVER,
                        "run with -v to see the guest's console")

    def _take_end(self) -> None:
        over_limit = blame_cpu_limit(self.pid, FILE_SERVER)
        status = os.waitpid(self.pid, 0)[1]
        said = os.read(self._report, 4096)
        if status == 0:
            self._hung_up = time.monotonic()
        elif status == signal.SIGBUS:
            raise explain_memory_lost(self._guest)
        elif os.WIFSIGNALED(status):
            raise over_limit or Fatal(FILE_SERVER + " was killed", LOOK_FOR_KILLER)
        elif os.WEXITSTATUS(status) == GUEST_AT_FAULT:
            what = "guest's kernel broke the protocol of its file system: "
            raise Fatal(what + said.decode("utf-8", "replace"),
                        "did root of the guest load code into it? -v shows its console")
        else:
            raise Bug(said)


def start_file_server(guest: Guest, to_runner: int) -> ServerProcess:
    """Fork the server, which waits for the VMM at SHARES_SOCKET in the current directory."""
    import socket

    supervisor = os.getpid()
    report, to_supervisor = os.pipe()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(SHARES_SOCKET)
    listener.listen(1)

    def tell_waiting() -> None:
        if select.select([], [to_runner], [], 0)[1]:           # a stopped runner reads nothing
            os.write(to_runner, encode_frame(LOCK_WAITS))

    def live() -> int:
        try_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            return EXIT_FAILED
        try:
            confine_file_server({listener.fileno(), to_supervisor, to_runner}, guest.shares)
            serve_shares(listener, guest.shares, tell_waiting)
        except ConnectionError:                   # the VMM was killed
            pass
        except Misfit as misfit:
            os.write(to_supervisor, str(misfit).encode("utf-8", "replace")[:TRACE_MAX])
            return GUEST_AT_FAULT
        except BaseException:
            os.write(to_supervisor, describe_exception())
            return EXIT_FAILED
        return 0

    pid = fork_child(FILE_SERVER, live)
    os.close(to_supervisor)
    listener.close()
    return ServerProcess(pid, report, guest)


def confine_file_server(ours: Set[int], shares: Sequence[Share]) -> None:
    """Leave to this process its descriptors and the files of the shares."""
    # With Landlock nothing could be loaded later: these, and what the C library wants at the end of a
    # thread.
    import array  # noqa: F401
    import traceback  # noqa: F401

    try:
        import ctypes

        ctypes.CDLL("libgcc_s.so.1")
    except (ImportError, OSError):
        pass

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # The signals that were blocked are ignored as well, but for the one that wakes a thread.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    close_all_but({0, 1, 2} | ours)
    forbid_core()
    if find_landlock():
        confine(list_share_rules(shares))
    else:
        try_libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


# --- The supervisor -----------------------------------------------------------------------------------------

CLEAN_S = 5.0                        # for the supervisor to end the guest and clean up


def encode_end(end: End) -> bytes:
    def encode(text: str) -> bytes:
        return text.replace("\0", "?").encode("utf-8", "surrogateescape")

    return encode_fields([
        (b"what", end.what.encode()), (b"status", b"%d" % end.status),
        (b"message", encode(end.message)), (b"hint", encode(end.hint))])


def decode_end(payload: bytes) -> End:
    fields = decode_fields(payload)

    def decode(name: bytes) -> str:
        return only_field(fields, name).decode("utf-8", "surrogateescape")

    return End(decode(b"what"), int(decode(b"status")), decode(b"message"), decode(b"hint"))


def list_rules(spec: RunSpec, directories: Directories) -> List[Rule]:
    """Which files of the host the VMM may open: a program of the guest's root can open no others."""
    disk = spec.guest.disk
    rules: List[Rule] = [(directories.run.path, READ_WRITE), (directories.ram.path, READ_WRITE)]
    if not spec.vmm.has_virtio_fs:
        rules += list_share_rules(spec.guest.shares)
    rules.append((disk.image, READ_FILE | (WRITE_FILE if disk.write else 0)))
    if disk.cow:
        rules.append((disk.cow, READ_FILE | WRITE_FILE))
    return rules + spec.vmm.list_rules(spec.guest) + spec.carrier.list_rules()


def start_vmm(spec: RunSpec, launch: Launch) -> Optional[Kernel]:
    try:
        return spec.carrier.start(spec.vmm.build_argv(spec.guest), launch)
    except CannotExecute as error:
        raise spec.vmm.explain_exec_failure(error.errno or 0)


def watch_guest(kernel: Kernel, spec: RunSpec, launch: Launch, wakeup: int,
                check_helpers: Callable[[], None]) -> End:
    """Wait for the guest's end or the runner's. Pause the guest while the runner is stopped.

    A stopped runner means a suspended job. A paused guest runs nothing. A SIGSTOP that follows then
    finds none of its processes in a state that would panic it.
    """
    runner = os.getppid()
    was_suspended = False
    watch = spec.vmm.watch(kernel.pid, spec.guest)
    poll = select.poll()
    poll.register(launch.lifeline, select.POLLIN)
    poll.register(wakeup, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(watch.interval_s * 1000)}
        if launch.lifeline in ready:
            return End(RUNNER)
        if wakeup in ready:
            os.read(wakeup, 512)
        check_helpers()              # a kernel without its file server may panic
        end = kernel.find_end()
        if end:
            return end

        is_suspended = read_stat(runner).state == "T"
        if is_suspended and not was_suspended:
            spec.vmm.pause(spec.guest, launch.run)
        elif was_suspended and not is_suspended:
            spec.vmm.resume(spec.guest, launch.run, os.getpid())
        was_suspended = is_suspended
        end = watch.review(is_suspended)
        if end:
            return end


def supervise(spec: RunSpec, directories: Directories, keep: Dict[int, int], lifeline: int,
              report: int) -> None:
    """The supervisor's life: run the guest, end it when it should end, leave nothing."""
    try:
        end = run_guest(spec, directories, keep, lifeline, report)
    except Fatal as fatal:
        end = End(ERROR, 0, fatal.message, fatal.hint)
    except Exception:
        end = describe_bug()
    kill_children()
    os.chdir("/")
    for directory in directories.list_distinct():
        remove_private(directory)
    try:
        os.write(report, encode_frame(ENDED, encode_end(end)))
    except BrokenPipeError:                       # the runner was killed
        pass


def describe_bug() -> End:
    return End(BUG, 0, describe_exception().decode("utf-8", "surrogateescape"))


def run_guest(spec: RunSpec, directories: Directories, keep: Dict[int, int], lifeline: int,
              report: int) -> End:
    """Start the VMM and what it needs, and wait for its end or the runner's."""
    wakeup, to_wakeup = os.pipe()
    os.set_blocking(to_wakeup, False)
    signal.set_wakeup_fd(to_wakeup)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    helper: Optional[int] = None
    server: Optional[ServerProcess] = None

    def check_helpers() -> None:
        nonlocal helper
        if server:
            server.check()
        if helper and os.waitpid(helper, os.WNOHANG)[0]:
            helper = None
            os.write(report, encode_frame(NETWORK_ENDED))

    with blaming("run directory cannot be used", directories.run.path, SCRATCH_HINT):
        os.fchdir(directories.run.fd)
    network = spec.guest.network
    if network.helper and network.helper.kind == SLIRP4NETNS:
        helper, keep[NETWORK_FD] = start_slirp4netns(
            network.helper.program, network.published, lifeline)

    if spec.vmm.has_virtio_fs:
        server = start_file_server(spec.guest, report)

    helpers = frozenset(([helper] if helper else []) + ([server.pid] if server else []))
    rules = list_rules(spec, directories) if is_confined(spec.carrier.program) else []
    environment = spec.vmm.build_environment(spec.guest, directories)
    launch = Launch(
        directories.run.fd, rules, keep, environment, spec.vmm.enter_child, lifeline, helpers)
    kernel = start_vmm(spec, launch)
    for number in {1, INPUT_FD, OUTPUT_FD, NETWORK_FD} & set(keep):
        os.close(keep[number])                    # so that they end with the VMM
    return watch_guest(kernel, spec, launch, wakeup, check_helpers) if kernel else End(CARRIER)


@contextmanager
def start_machine(spec: RunSpec, terminal: Optional[Terminal], directories: Directories,
                  locks: Sequence[int]) -> Iterator[Machine]:
    """Fork the supervisor, which starts the guest. The end of the context removes both."""
    try_libc("prctl", PR_SET_CHILD_SUBREAPER, 1)              # for what a killed supervisor leaves
    # As long as there is no guest, nobody can put anything else in its place.
    spool = os.open(SPOOL, os.O_PATH | DIRECTORY, dir_fd=directories.run.fd)
    # The guest's tty writes 2 KiB at a time, and a wide pipe holds many of these for one read.
    from_guest, output_end = make_wide_pipe()
    input_end, to_guest = os.pipe()
    os.set_blocking(to_guest, False)
    console, console_end = os.pipe()
    lifeline_end, lifeline = os.pipe()
    report, report_end = os.pipe()

    sys.stderr.flush()
    supervisor = fork("the supervisor")
    if supervisor == 0:                           # signals_held() blocks the runner's signals in it, too
        try:
            null = become_supervisor()
            keep = {0: null, 1: console_end, 2: console_end,
                    INPUT_FD: input_end, OUTPUT_FD: output_end, CONSOLE_FD: console_end}
            keep.update({CONSOLE_FD + 1 + index: lock for index, lock in enumerate(locks)})
            ours = {0, 1, 2, lifeline_end, report_end} | ({terminal.input} if terminal else set())
            close_all_but(set(keep.values()) | ours)
            supervise(spec, directories, keep, lifeline_end, report_end)
            if terminal:
                os.read(lifeline_end, 1)          # until the runner is dead, or has released it
                terminal.release()
        except BaseException:
            os.write(report_end, encode_frame(ENDED, encode_end(describe_bug())))
        finally:
            os._exit(0)

    for descriptor in (input_end, output_end, console_end, lifeline_end, report_end):
        os.close(descriptor)
    try:
        yield Machine(
            supervisor, from_guest, to_guest, console, lifeline, report, directories, spool)
    finally:
        os.close(lifeline)
        end_supervisor(supervisor, report)
        kill_children()
        for descriptor in (from_guest, to_guest, console, report, spool):
            os.close(descriptor)


def become_supervisor() -> int:
    """Leave the caller's session, signals and standard descriptors; return one of /dev/null."""
    # From 6.16 on a thread of the kernel has a mask of its own, so blocking is not enough.
    for number in KEPT_FROM_KERNEL:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    try_libc("prctl", PR_SET_CHILD_SUBREAPER, 1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    return null


def end_supervisor(pid: int, report: int) -> None:
    """Wait until the supervisor has cleaned up. Continue one that was stopped, kill one that hangs."""
    if read_stat(pid).parent != os.getpid():
        return                                    # it was reaped already
    os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + CLEAN_S
    while select.select([report], [], [], max(0, deadline - time.monotonic()))[0]:
        if not os.read(report, 4096):
            break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def explain_end(end: Optional[End], machine: Machine, spec: RunSpec, console: Console,
                was_up: bool) -> Exception:
    """Why a guest ended without a result; without an End the supervisor itself was killed."""
    if end is None:
        who = "the supervisor process of the run"
        over_limit = blame_cpu_limit(machine.supervisor, who)
        return over_limit or Fatal(who + " was killed", LOOK_FOR_KILLER)
    if end.what == KERNEL:
        return console.explain_end(end.status, was_up)
    if end.what == ERROR:
        return Fatal(end.message, end.hint)
    if end.what == BUG:
        return Bug(end.message.encode("utf-8", "surrogateescape"))

    if end.what == CARRIER and not was_up:
        return Fatal("`empty` does not start the kernel: {}".format(spec.carrier.program),
                     "build it from github.com/mezantrop/empty for this machine; "
                     "--io builtin does without it")
    who = "a helper process of the kernel"
    if end.what == CARRIER:
        who = "`empty`, which carried the channel,"
    return Fatal(who + " was killed", LOOK_FOR_KILLER)


# --- The job record -----------------------------------------------------------------------------------------

FIRST_PIDS = range(1000, 4000000)
Fields = List[Tuple[bytes, bytes]]   # as encode_fields() takes them


def build_job(spec: RunSpec, stdio: Stdio, saved_name: Optional[str], tells: bool) -> bytes:
    """`tells`: the agent shall tell how far a long work is."""
    job = spec.job
    fields = [
        (b"arg", os.fsencode(word)) for word in job.command]
    fields += [(b"env", name + b"=" + value) for name, value in job.environment.items()]
    fields += [
        (b"cwd", job.cwd or b""), (b"umask", b"%d" % job.umask), (b"home", job.home or b""),
        (b"pid", b"%d" % choose_first_pid())]
    fields += [(b"ignore", b"%d" % number) for number in job.ignored_signals]
    fields += [(b"limit", b"%d %d %d" % limit) for limit in job.limits]

    fields += describe_caller(job.as_root)
    fields += describe_stdio(stdio)
    fields += describe_node(job.node)
    fields += describe_network(spec.guest.network, spec.vmm.interfaces)
    fields += describe_disk(spec.guest, has_layers=bool(job.layers))

    fields += [
        (b"job", job.directory or b""), (b"alias", job.alias or b""),
        (b"confined", b"%d" % is_confined(spec.carrier.program))]
    # A name holds no slash, and a target begins with one.
    fields += [(b"bind", (b"r" if share.read_only else b"w") + (share.only_file or b"") + target)
               for share, target in job.binds]
    fields += [(b"layer", os.fsencode(layer)) for layer in job.layers]
    fields += [(b"force", b"%d" % job.force_changes), (b"progress", b"%d" % tells)]
    if job.saved_changes is not None and saved_name is not None:
        fields += [(b"save", os.fsencode(job.saved_changes)), (b"save-name", saved_name.encode())]
    return encode_fields(fields)


def describe_caller(as_root: bool) -> Fields:
    """The account that the command runs in, with its groups, the own one first."""
    uid = os.getuid()
    gid = os.getgid()
    groups = [gid] + [group for group in os.getgroups() if group != gid]
    return [
        (b"user", user_name(uid)), (b"uid", b"%d" % uid), (b"root", b"%d" % as_root),
        *[(b"group", b"%d=%s" % (group, group_name(group))) for group in groups]]


def describe_stdio(stdio: Stdio) -> Fields:
    fields = [(b"stdio", stdio.kinds)]
    if stdio.terminal:
        # In hexadecimal, as values hold no NUL.
        fields += [
            (b"modes", stdio.terminal.modes.hex().encode()),
            (b"window", stdio.terminal.window.hex().encode()),
            (b"foreground", b"%d" % stdio.at_once)]
    return fields


def describe_disk(guest: Guest, has_layers: bool) -> Fields:
    disk = guest.disk
    fields = [(b"persistent", b"%d" % disk.is_persistent), (b"disk", b"%d" % (disk.size or 0))]
    if has_layers:                                # the agent looks whether these have room
        fields.append((b"room", b"%d" % find_room(guest)))
        fields.append((b"scratch", os.fsencode(guest.disk_directory)))
    return fields


def describe_node(node: NodeView) -> Fields:
    # The zone in hexadecimal, as values hold no NUL.
    return [(b"name", node.host_names), (b"hosts", node.hosts), (b"resolver", node.resolver),
            (b"zone", node.zone.hex().encode()), (b"zone-name", node.zone_name),
            (b"certificates", node.certificates)]


def choose_first_pid() -> int:
    """The first process number of a guest. Runs differ in it, as names of files may contain it."""
    return FIRST_PIDS.start + int.from_bytes(os.urandom(8), "big") % len(FIRST_PIDS)


def describe_network(network: Network, interfaces: Dict[str, str]) -> Fields:
    """What the agent configures, and what the command finds of it in its environment."""
    fields = []
    if network.kind:
        interface = "{}={}/24".format(interfaces[network.kind], GUEST_ADDRESS)
        fields = [("interface", interface), ("gateway", GATEWAY), ("nameserver", NAMESERVER)]
    if network.lan:
        address = network.lan.address
        interface = "{}={}/{}".format(interfaces[LAN], address, network.lan.prefix)
        fields += [
            ("interface", interface), ("lan", address), ("env", "APPPOT_LAN_ADDRESS=" + address)]
    return [(name.encode(), value.encode()) for name, value in fields]


# --- The channel --------------------------------------------------------------------------------------------

# Longer payloads are spooled: the line carries 1.5 MB/s, a share 300.
INLINE_MAX = 1024


class Channel:
    """The runner's end of the line to the agent.

    Any thread posts frames and thereby wakes the main thread, which sends and receives.
    """

    def __init__(self, from_guest: int, to_guest: int, spool_directory: int, window: int) -> None:
        self.from_guest = from_guest
        self.to_guest = to_guest                  # non-blocking
        self._spool = spool_directory
        self.wakeup, self.to_wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(self.to_wakeup, False)

        self._outbox: Deque[bytes] = collections.deque()
        self._unsent = b""                        # the rest of a frame
        self._window = window                     # bytes that the guest may not have read yet
        self._room = window
        self._lock = threading.Lock()
        self._written: Dict[int, int] = {}        # bytes of each output stream, still to be told

        self.is_open = True
        self.is_greeted = False                   # the agent's first bytes have come
        self.fitting = {HELLO}                    # types of frames that the guest may send now
        self._received = bytearray()

    # Any thread calls these.

    def post(self, kind: int, payload: bytes = b"") -> None:
        if len(payload) > INLINE_MAX:
            kind |= SPOOLED
            payload = spool(self._spool, payload)
        self._outbox.append(encode_frame(kind, payload))
        self.wake()

    def acknowledge(self, kind: int, count: int) -> None:
        """Note what was written. One frame tells all since the last, however slow the guest is."""
        with self._lock:
            self._written[kind] = self._written.get(kind, 0) + count
        self.wake()

    def wake(self) -> None:
        try:
            os.write(self.to_wakeup, b"\0")
        except BlockingIOError:
            pass                                  # a full pipe wakes as well

    # The main thread calls these.

    @property
    def is_idle(self) -> bool:
        return not self._outbox

    @property
    def can_send(self) -> bool:
        return bool(self._room and (self._outbox or self._unsent or self._written))

    def send(self) -> None:
        while self.can_send:
            self._unsent = self._unsent or self._take_unsent()
            try:
                sent = os.write(self.to_guest, self._unsent[:self._room])
            except BlockingIOError:
                return
            except BrokenPipeError:               # the guest has ended: the report tells how
                self._outbox.clear()
                self._unsent = b""
                return
            self._unsent = self._unsent[sent:]
            self._room -= sent

    def _take_unsent(self) -> bytes:
        with self._lock:
            if self._written:
                return encode_frame(ACK, STREAM_COUNT.pack(*self._written.popitem()))
        return self._outbox.popleft()

    def take_credit(self, count: int) -> None:
        """The guest has read so many bytes more."""
        self._room += check_range(count, 1, self._window - self._room)

    def receive(self) -> Iterator[Tuple[int, bytes]]:
        """Read once, and yield the frames; Misfit for one that the guest may not send now."""
        content = os.read(self.from_guest, PIPE_SIZE)
        self.is_open = bool(content)
        self._received += content
        if not self.is_greeted:
            _, magic, rest = self._received.partition(MAGIC)
            self.is_greeted = bool(magic)
            self._received = rest if magic else self._received[-len(MAGIC):]

        for kind, payload in decode_frames(self._received) if self.is_greeted else ():
            if kind not in self.fitting:
                raise Misfit("a frame of type {}, now".format(kind))
            yield kind, payload

    @property
    def is_greeted_again(self) -> bool:
        return MAGIC in self._received


# --- Streams ------------------------------------------------------------------------------------------------

SPOOL_CHUNK = 1 << 20                # bytes of stdin that are read at once
STDIN_WINDOW = 8 << 20               # bytes of stdin that the command has not read yet
ACK_STEP = 512 << 10                 # bytes of output that are written at once


class Worker(threading.Thread):
    """A thread that does its work and then waits for the process to end.

    Up to Python 3.8 a thread ends by pthread_exit(3), which needs a library, libgcc_s.so.1. A node
    may lack it.
    """

    def __init__(self, channel: Channel) -> None:
        super().__init__(daemon=True)
        self._channel = channel
        self.finished = threading.Event()
        self.failure: Optional[Exception] = None

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.failure = error
        self.finished.set()
        self._channel.wake()
        threading.Event().wait()

    def work(self) -> None:
        raise NotImplementedError


class OutputWriter(Worker):
    """Writes one output stream to the caller's descriptor.

    A thread does this, because the descriptor may block, and because it belongs to the caller, who
    would notice if it became non-blocking.
    """

    def __init__(self, channel: Channel, kind: int, descriptor: int, file_limit: int,
                 terminal: Optional[Terminal]) -> None:
        super().__init__(channel)
        self._kind = kind
        self._descriptor = descriptor
        self._file_limit = file_limit             # the command's own; RLIM_INFINITY is -1
        self._terminal = terminal                 # None: what is written is no screen
        self._window = SCREEN_WINDOW if kind == SCREEN else OUTPUT_WINDOW
        self._changed = threading.Condition()
        self._queue = bytearray()
        self._unwritten = 0                       # bytes, those included that are being written
        self._is_complete = False
        self.error: Optional[OSError] = None

    @property
    def is_idle(self) -> bool:
        return not self._unwritten

    @property
    def has_lost_output(self) -> bool:
        """Whether output was not written, for another reason than that its reader is gone."""
        if self.error is None or self.error.errno == errno.EPIPE:
            return False
        return not is_hung_up(self._descriptor, self.error)

    def put(self, content: bytes) -> None:
        """Queue output. Misfit for more than the window, as the queue takes our memory."""
        with self._changed:
            if not content or self._unwritten >= self._window:
                raise Misfit("{} bytes of output behind {} that nobody has read".format(
                    len(content), self._unwritten))

            self._queue += content
            self._unwritten += len(content)
            self._changed.notify()

    def complete(self) -> None:
        with self._changed:
            self._is_complete = True
            self._changed.notify()

    def work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_complete)
                content = bytes(self._queue[:ACK_STEP])
                del self._queue[:ACK_STEP]
            if not content:
                break

            if self.error is None:
                self._write(content)
            with self._changed:
                self._unwritten -= len(content)
            self._channel.acknowledge(self._kind, len(content))

    def _write(self, content: bytes) -> None:
        if self._terminal and self._terminal.ends_lines:
            content = content.replace(b"\r\n", b"\n")
        rest = memoryview(content)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest[:self._find_room(len(rest))]):]
                except BlockingIOError:           # the caller has made it non-blocking
                    select.select([], [self._descriptor], [])
        except OSError as error:
            self.error = error
            self._channel.post(OUTPUT_CLOSED, bytes([self._kind]))

    def _find_room(self, size: int) -> int:
        """How many of `size` bytes the command's own limit allows in this file; EFBIG if none."""
        status = os.fstat(self._descriptor) if self._file_limit >= 0 else None
        if not status or not stat.S_ISREG(status.st_mode):
            return size

        is_appended = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_APPEND
        offset = status.st_size if is_appended else os.lseek(self._descriptor, 0, os.SEEK_CUR)
        room = self._file_limit - offset
        if room <= 0:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return min(size, room)


class InputReader(Worker):
    """Reads the caller's stdin, no further ahead of the command than STDIN_WINDOW bytes."""

    def __init__(self, channel: Channel, scratch: str) -> None:
        super().__init__(channel)
        self._scratch = scratch
        self._room = STDIN_WINDOW
        self.delivered = 0                        # bytes
        self._changed = threading.Condition()
        self._stopped = False
        try:
            self._start_offset: Optional[int] = os.lseek(0, 0, os.SEEK_CUR)
        except OSError:
            self._start_offset = None             # no file, so what is read is gone

    def take_credit(self, count: int) -> None:
        """The command has read so many bytes more."""
        with self._changed:
            self._room += check_range(count, 1, STDIN_WINDOW - self._room)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def close_input(self) -> None:
        """The command reads no more. The writer of a pipe then gets EPIPE, as on the host."""
        self.stop()
        if self._start_offset is None and not os.isatty(0):
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)

    def restore_offset(self, consumed: int) -> None:
        """Leave a file where the command stopped reading, for the next reader of a shell loop."""
        if self._start_offset is not None:
            self.stop()
            self.finished.wait()
            os.lseek(0, self._start_offset + consumed, os.SEEK_SET)

    def work(self) -> None:
        # A read in the background then fails with EIO and does not stop the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTIN])
        try:
            while self._wait_for_room():
                content = self._read()
                if not content:
                    self._channel.post(STDIN_EOF)
                    return

                with self._changed:
                    self._room -= len(content)
                    self.delivered += len(content)
                self._channel.post(STDIN, content)
        except OSError as error:
            raise explain_full_scratch(self._scratch) or Fatal(
                "stdin cannot be passed on: " + str(error.strerror),
                "did a program of the guest's root change /run/apppot/spool?")

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._room >= SPOOL_CHUNK or self._stopped)
            return not self._stopped

    def _read(self) -> bytes:
        """Wait for some bytes, and take those that are there already: large pieces are cheaper."""
        pieces = [self._read_some(SPOOL_CHUNK)]
        size = len(pieces[0])
        ready = select.poll()
        ready.register(0, select.POLLIN)
        while pieces[-1] and size < SPOOL_CHUNK and not os.isatty(0) and ready.poll(0):
            pieces.append(self._read_some(SPOOL_CHUNK - size))
            size += len(pieces[-1])
        return b"".join(pieces)                   # the next round reads the end of input again

    def _read_some(self, size: int) -> bytes:
        while True:
            try:
                return os.read(0, size)
            except OSError as error:
                if error.errno == errno.EAGAIN:   # the caller has made it non-blocking
                    select.select([0], [], [])
                elif error.errno == errno.EIO and os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp():
                    time.sleep(0.5)               # in the background: no event tells when that ends
                elif is_hung_up(0, error):
                    return b""
                else:
                    raise explain_bad_input(error)


class Streams:
    """The command's standard streams and its screen, each with a thread that relays it."""

    def __init__(self, channel: Channel, stdio: Stdio, scratch: str,
                 limits: Iterable[Limit]) -> None:
        soft_limits = {limit.number: limit.soft for limit in limits}
        file_limit = soft_limits.get(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
        self.writers: Dict[int, OutputWriter] = {}
        for kind, number in ((STDOUT, 1), (STDERR, 2)):
            if stdio.kinds[number] == ord("p"):
                self.writers[kind] = OutputWriter(channel, kind, number, file_limit, None)
        if stdio.terminal:
            self.writers[SCREEN] = OutputWriter(
                channel, SCREEN, stdio.terminal.output, file_limit, stdio.terminal)
        self.reader = InputReader(channel, scratch) if stdio.kinds[:1] == b"p" else None

    def start(self) -> None:
        try:
            for worker in self._list_workers():
                worker.start()
        except RuntimeError as error:
            raise Fatal("thread of the runner cannot be started: {}".format(error), PROCESSES_HINT)

    def _list_workers(self) -> List[Worker]:
        return [*self.writers.values(), *([self.reader] if self.reader else [])]

    @property
    def is_idle(self) -> bool:
        return all(writer.is_idle for writer in self.writers.values())

    @property
    def is_finished(self) -> bool:
        """Whether all output is written, or cannot be."""
        return all(writer.finished.is_set() for writer in self.writers.values())

    def complete(self) -> None:
        """The guest sends no more output."""
        for writer in self.writers.values():
            writer.complete()

    def check(self, has_ended: bool) -> None:
        """Raise the failure of a thread. A command that has ended needs no more of its stdin."""
        for worker in self._list_workers():
            if worker.failure and not (has_ended and worker is self.reader):
                raise worker.failure

    def check_written(self) -> bool:
        """Whether all output was written; False if the command's own limit forbids it."""
        errors = [writer.error for writer in self.writers.values() if writer.has_lost_output]
        for error in errors:
            if error and error.errno != errno.EFBIG:
                raise Fatal("output of the command cannot be written: " + str(error.strerror),
                            "is the disk full that its output goes to, or the connection lost?")
        return not errors


def explain_bad_input(error: OSError) -> Fatal:
    return Fatal("stdin cannot be read: {}".format(error.strerror),
                 "the command was ended, as it would have taken this for the end of its input")


def is_hung_up(descriptor: int, error: OSError) -> bool:
    """Whether an error means that a terminal was hung up. isatty(3) does not know it any more."""
    return error.errno == errno.EIO and stat.S_ISCHR(os.fstat(descriptor).st_mode)


# --- The command's terminal ---------------------------------------------------------------------------------

KEYS_WINDOW = 64 << 10               # bytes of keys that the command has not read yet
END_OF_FILE = b"\4"                  # Ctrl-D
TYPED_AHEAD_MAX = 64                 # lines


class TerminalLink:
    """Joins the caller's terminal to the guest's.

    The guest's terminal belongs to a foreground process group, as any terminal does. As long as
    that is the agent's own group, the command is stopped when it reads. That way it asks for the
    caller's terminal.
    """

    def __init__(self, terminal: Terminal, channel: Channel) -> None:
        self._terminal = terminal
        self.keyboard = terminal.input
        self._channel = channel
        self._has_started = False                 # the command
        self._is_given = False                    # to the command
        self.stopped_by = 0                       # the signal that has stopped the command; 0: none
        self._key_room = KEYS_WINDOW
        self._keys_end = False

    @property
    def takes_keys(self) -> bool:
        return self._is_given and self._key_room > 0 and not self._keys_end

    def start(self, at_once: bool) -> None:
        """The command has started."""
        self._has_started = True
        if at_once:
            self._give()

    def _give(self) -> None:
        try:
            if self._terminal.is_real and self._terminal.is_ours():
                self._take_typed_ahead()
            self._terminal.acquire()
        except (termios.error, OSError):          # hung up, or in the background without a shell
            self._send_keys(END_OF_FILE)
        self._is_given = True
        self._channel.post(FOREGROUND, b"\1")

    def _take_typed_ahead(self) -> None:
        """Read what was typed in the caller's modes: a raw terminal knows no end of file."""
        for _ in range(TYPED_AHEAD_MAX):
            if not select.select([self.keyboard], [], [], 0)[0]:
                break
            self._send_keys(os.read(self.keyboard, INLINE_MAX) or END_OF_FILE)

    def take_back(self) -> None:
        """The command has ended: the keys of a user who waits are signals again."""
        self._is_given = False
        self._terminal.release()

    def take_keys(self) -> None:
        try:
            content = os.read(self.keyboard, min(self._key_room, INLINE_MAX))
        except BlockingIOError:
            return
        except OSError as error:
            if not is_hung_up(self.keyboard, error):           # of -t without a terminal
                raise explain_bad_input(error)
            content = b""
        self._keys_end = not content
        self._send_keys(content or END_OF_FILE)

    def _send_keys(self, content: bytes) -> None:
        self._key_room -= len(content)
        self._channel.post(KEYS, content)

    def take_credit(self, count: int) -> None:
        """The command has read so many bytes more."""
        self._key_room += check_range(count, 1, KEYS_WINDOW - self._key_room)

    def note_stop(self, number: int) -> None:
        self.stopped_by = check_range(number, 1, SIGNALS_MAX)

    def follow_stop(self) -> None:
        """The command has stopped: give it the terminal if it wants that, else stop as well."""
        wants_terminal = self.stopped_by in (signal.SIGTTIN, signal.SIGTTOU) and not self._is_given
        self.stopped_by = 0
        if wants_terminal:
            self._give()
        else:
            self._terminal.release()
            # This stops the process group, as Ctrl-Z does, if it has a shell that can continue it.
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            os.kill(0, signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, handler)
            self.resume()
        self._channel.post(SIGNAL, bytes([signal.SIGCONT]))

    def resume(self) -> None:
        """Go on after a stop: with the terminal, or after `bg` without it."""
        if self._is_given and self._terminal.is_ours():
            try:
                self._terminal.acquire()
            except termios.error:                 # hung up, which sends SIGCONT as well
                return
            self.tell_window()
        elif self._is_given:
            self._is_given = False
            self._channel.post(FOREGROUND, b"\0")

    def tell_window(self) -> None:
        if self._has_started:                     # before that, the job tells the window
            self._channel.post(WINDOW, self._terminal.window)


# --- The result ---------------------------------------------------------------------------------------------

USE_UP_S = 60                        # to use up a job's memory


class Result(NamedTuple):
    """How the command ended."""
    status: int
    signal: int = 0                  # the command died of it; 0: of none
    out_of_memory: bool = False      # the guest was out of memory


def killed_by(number: int) -> Result:
    """The status is as a shell shows it."""
    return Result(128 + number, signal=number)


def use_up_memory(limit_mib: int) -> None:
    """Let a process of ours be killed for want of memory, as one of the guest's was.

    The batch system then tells its user that the job was out of memory, and a workflow engine asks
    for more when it runs the job again.
    """
    try:
        pid = os.fork()
    except OSError:                               # the limit of processes is reached as well
        return
    if pid == 0:
        try:
            try_libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(USE_UP_S)
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")                # so that no other process is chosen

            block = b"x" * (64 << 20)
            pieces = []
            for _ in range(0, limit_mib + limit_mib // 4, 64):
                piece = mmap.mmap(-1, len(block), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                piece.write(block)
                pieces.append(piece)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def die_of(number: int) -> None:
    """Die of the command's signal. A batch system tells that from a status of 128 and more.

    Returns if the signal does not kill, as in process 1 of a container.
    """
    try_libc("prctl", PR_SET_DUMPABLE, 0)        # the guest's core is the one that counts
    try:
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    except (OSError, ValueError):                 # the C library keeps some signals for itself
        pass


def place_changes(save: PrivateDirectory, name: str, path: str) -> None:
    """Bring the complete changes file to its disk, and name it. The guest still lives."""
    try:
        given = os.open(GIVEN, DIRECTORY, dir_fd=save.fd)
        try:                                      # before the file is looked at, the guest loses it
            os.rename(name, name, src_dir_fd=given, dst_dir_fd=save.fd)
        finally:
            os.close(given)

        descriptor = open_own(name, save.fd)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(name, path, src_dir_fd=save.fd)
    except FileNotFoundError:
        raise Fatal("changes were not saved, as the run was killed: " + path,
                    "--kill-after gives the command longer")
    except OSError as error:
        raise Fatal("changes were not saved, {}: {}".format(error.strerror, path),
                    "is the directory of the file still there, and did no program of the guest "
                    "touch what it made?")


# --- The session --------------------------------------------------------------------------------------------

POLL_MAX_S = 3600.0                  # poll(2) takes no more than 24 days, and --timeout does
ANCESTOR_S = 1.0                     # how often to look whether the process of --die-with lives
# A batch system's SIGTERM and that of --die-with-parent come at once, and are one.
SAME_SIGNAL_S = 0.1
KILL_GRACE_S = 5.0                   # for the guest to tell how the command died after SIGKILL


class Ending:
    """Forwards signals to the command, and ends what takes too long."""

    def __init__(self, channel: Channel, spec: RunSpec) -> None:
        self._channel = channel
        self._spec = spec
        self._is_running = False                  # the command
        self._is_saving = False                   # after the command
        self.is_interrupted = False               # by a signal that nobody but AppPot gets
        self._terminated: Optional[float] = None  # when one SIGTERM was forwarded
        self.is_time_over = False
        self.result: Optional[Result] = None      # of a run that does not wait for the guest's
        self._deadlines: Dict[Callable[[], None], float] = {
            self._fail_to_boot: time.monotonic() + spec.boot_timeout_s}
        if spec.timeout_s is not None:
            self._deadlines[self._time_out] = time.monotonic() + spec.timeout_s
        if spec.ancestor:                         # no signal tells of its end
            self._deadlines[self._follow_ancestor] = time.monotonic()

    def note_boot(self) -> None:
        """The guest is up."""
        self._deadlines.pop(self._fail_to_boot, None)

    def note_start(self) -> None:
        """The command runs."""
        self.note_boot()
        self._is_running = True

    def note_saving(self) -> None:
        """The command has ended, and what comes now takes its time."""
        self._is_saving = True
        for action in (self._time_out, self._kill, self._give_up):
            self._deadlines.pop(action, None)

    def note_result(self) -> None:
        self._is_running = False

    def forward(self, number: int) -> None:
        if number == signal.SIGXCPU:
            over_limit = blame_cpu_limit(os.getpid(), "the runner")
            if over_limit:
                raise over_limit
        # Without a command AppPot itself dies of it, as any program. Who sends SIGINT does not wait.
        if not self._is_running or self._is_saving and number == signal.SIGINT:
            if number not in self._spec.job.ignored_signals:
                self.is_interrupted = True
                self.result = killed_by(number)
            return
        if number == signal.SIGTERM and self._terminated is not None:
            if time.monotonic() > self._terminated + SAME_SIGNAL_S:
                self._kill()
            return

        self._channel.post(SIGNAL, bytes([number]))
        if number == signal.SIGTERM:
            self._terminated = time.monotonic()
            if self._spec.kill_after_s > 0:
                self._deadlines[self._kill] = time.monotonic() + self._spec.kill_after_s

    @property
    def left_s(self) -> float:
        """The time until the next deadline."""
        now = time.monotonic()
        return max(0.0, min([POLL_MAX_S, *(due - now for due in self._deadlines.values())]))

    def review(self) -> None:
        """Do what each deadline is for that is over."""
        now = time.monotonic()
        for action in [action for action, due in self._deadlines.items() if due <= now]:
            if self._deadlines.pop(action, None) is not None:  # none before has done it
                action()

    def _follow_ancestor(self) -> None:
        if self._spec.ancestor and is_called(*self._spec.ancestor):
            self._deadlines[self._follow_ancestor] = time.monotonic() + ANCESTOR_S
        else:
            self.forward(signal.SIGTERM)

    def _fail_to_boot(self) -> None:
        raise Fatal("guest did not start within {:g} s".format(self._spec.boot_timeout_s),
                    "run with -v to see its console; --boot-timeout gives it longer")

    def _time_out(self) -> None:
        self.is_time_over = True
        if self._is_running:
            self.forward(signal.SIGTERM)
        else:
            self.result = Result(EXIT_TIMEOUT)

    def _kill(self) -> None:
        if self._give_up not in self._deadlines:
            self._deadlines.pop(self._kill, None)
            self._deadlines[self._give_up] = time.monotonic() + KILL_GRACE_S
            self._channel.post(SIGNAL, bytes([signal.SIGKILL]))

    def _give_up(self) -> None:
        self.result = killed_by(signal.SIGKILL)


class Conversation:
    """What the agent and the runner say to each other, from the greeting to the result."""

    def __init__(self, machine: Machine, spec: RunSpec, stdio: Stdio, reporter: Reporter) -> None:
        self._directories = machine.directories
        self._spec = spec
        self._stdio = stdio
        self._reporter = reporter
        self.channel = Channel(machine.from_guest, machine.to_guest, machine.spool, spec.vmm.line_window)
        self.ending = Ending(self.channel, spec)
        self.streams = Streams(self.channel, stdio, spec.guest.scratch, spec.job.limits)
        self.terminal = TerminalLink(stdio.terminal, self.channel) if stdio.terminal else None
        self._mount_points = MountPoints(spec.guest.shares, spec.job.umask, machine.directories.run)
        self._actions = self._list_actions()
        self.has_started = False                  # the command
        self._progress = Progress()
        self.saved_files: Optional[int] = None    # in the changes file
        self.farewell = ""                        # to the user of an interactive shell
        self.told: Union[Result, Fatal, None] = None           # by the agent

    def _list_actions(self) -> Dict[int, Tuple[Optional[struct.Struct], Callable[..., None]]]:
        """For each type of frame the layout of its payload, if that is fixed, and what it does."""
        actions: Dict[int, Tuple[Optional[struct.Struct], Callable[..., None]]] = {
            HELLO: (None, self._greet),
            MOUNT_POINT: (None, self._make_mount_point),
            STARTED: (BYTE, self._begin),
            RECEIVED: (COUNT, self.channel.take_credit),
            CREDIT: (STREAM_COUNT, self._take_credit),
            STDIN_CLOSED: (NOTHING, self._close_stdin),
            WARNING: (None, self._warn),
            # Ctrl-Alt-Del by the management console.
            TERMINATE: (NOTHING, partial(self.ending.forward, signal.SIGTERM)),
            SAVING: (NOTHING, self._note_saving),
            PROGRESS: (PROGRESS_COUNTS, self._show_progress),
            RESULT: (None, self._take_result)}

        if self.terminal:
            actions[STOPPED] = BYTE, self.terminal.note_stop
        for kind, writer in self.streams.writers.items():
            actions[kind] = None, writer.put
        return actions

    def listen(self) -> None:
        """Read once from the channel, and do what the frames say."""
        try:
            for kind, payload in self.channel.receive():
                layout, action = self._actions[kind]
                action(*(unpack_exactly(layout, payload) if layout else (payload,)))
        except Misfit as misfit:
            if self.channel.is_greeted_again:
                raise Fatal("guest rebooted before the command ended",
                            "it ends with the command by itself")
            raise Fatal("guest sent what is no message of AppPot ({})".format(misfit),
                        "did something in the appliance write to /dev/ttyS0?")

    def _greet(self, hello: bytes) -> None:
        # By now the kernel's file in it has no name any more.
        if self._directories.ram != self._directories.run:
            remove_private(self._directories.ram)
        if self._spec.job.layers:                     # merging takes its time
            self.ending.note_boot()

        fields = decode_fields(hello)
        protocol = text_field(fields, b"protocol")
        if protocol != str(PROTOCOL):
            raise Fatal("appliance has an agent of protocol {}, this runner speaks {}".format(
                protocol[:60], PROTOCOL), "use the apppot_start.py that belongs to the image")
        self._reporter.say("agent {} in base {}".format(
            text_field(fields, b"agent"), text_field(fields, b"base") or "without id"))

        self.channel.fitting = {STARTED, RECEIVED, WARNING, RESULT, MOUNT_POINT}
        if self._spec.job.layers and self._reporter.shows_progress:
            self.channel.fitting.add(PROGRESS)
        with blaming("job cannot be passed on", self._directories.run.path, SCRATCH_HINT):
            self.channel.post(JOB, build_job(
                self._spec, self._stdio, self._directories.saved_name, self._reporter.shows_progress))

    def _make_mount_point(self, request: bytes) -> None:
        self.channel.post(MADE, COUNT.pack(self._mount_points.make(request)))

    def _begin(self, what: int) -> None:
        """The command has started: relay its streams."""
        check_range(what, 0, IS_SHELL | HOME_STAYS)
        self._reporter.say("command started")
        self.has_started = True
        self.ending.note_start()
        self._reporter.clear()
        screen = self._stdio.terminal
        if what & IS_SHELL and screen and screen.is_real and self._reporter.is_watched:
            welcome, self.farewell = describe_keeping(self._spec, bool(what & HOME_STAYS))
            image = os.path.basename(self._spec.guest.disk.image)
            self._reporter.tell("a shell in {}, `exit` leaves it; {}".format(image, welcome))

        fitting = {RECEIVED, WARNING, TERMINATE, RESULT, *self.streams.writers}
        if self.streams.reader:
            fitting |= {CREDIT, STDIN_CLOSED}
        if self.terminal:
            fitting |= {CREDIT, STOPPED}
        if self._spec.job.saved_changes:
            fitting.add(SAVING)
        self.channel.fitting = fitting

        self.streams.start()
        if self.terminal:
            self.terminal.start(self._stdio.at_once)

    def _take_credit(self, stream: int, count: int) -> None:
        if stream == STDIN and self.streams.reader:
            self.streams.reader.take_credit(count)
        elif stream == KEYS and self.terminal:
            self.terminal.take_credit(count)
        else:
            raise Misfit("credit for {}".format(stream))

    def _close_stdin(self) -> None:
        self.channel.fitting.remove(STDIN_CLOSED)
        if self.streams.reader:
            self.streams.reader.close_input()

    def _warn(self, text: bytes) -> None:
        self._reporter.warn(text[:TEXT_MAX].decode("utf-8", "replace"))

    def _note_saving(self) -> None:
        self._reporter.say("saving the changes")
        self.channel.fitting = {RECEIVED, WARNING, RESULT}
        if self._reporter.shows_progress:
            self.channel.fitting.add(PROGRESS)
        self.ending.note_saving()
        if self.terminal:                         # for Ctrl-C: the command has ended
            self.terminal.take_back()

    def _show_progress(self, work: int, *counts: int) -> None:
        check_range(work, 0, len(WORKS) - 1)
        # Where the output of the command goes is not known here, so it comes first.
        if self.streams.is_idle:
            saved = self._spec.job.saved_changes
            layers = self._spec.job.layers
            path = saved if self.has_started else layers[0] if len(layers) == 1 else ""
            self._reporter.show_progress(self._progress.describe(work, counts, os.path.basename(path or "")))

    def _take_result(self, record: bytes) -> None:
        fields = decode_fields(record)
        self.told = self._read_failure(fields) if b"error" in fields else self._read_end(fields)
        self._reporter.say("result record: status {}".format(self.told.status))
        self.channel.fitting = set()
        self.ending.note_result()
        self.streams.complete()

    def _read_failure(self, fields: Dict[bytes, List[bytes]]) -> Fatal:
        if b"disk" in fields:
            return explain_disk_failure(self._spec.guest, b"")
        status = number_field(fields, b"status", EXIT_FAILED, EXIT_NOT_FOUND)
        return Fatal(text_field(fields, b"error"), text_field(fields, b"hint"), status)

    def _read_end(self, fields: Dict[bytes, List[bytes]]) -> Result:
        if not self.has_started or (b"exit" in fields) == (b"signal" in fields):
            raise Misfit("no end of a command")
        if b"signal" in fields:
            result = killed_by(number_field(fields, b"signal", 1, SIGNALS_MAX))
        else:
            result = Result(number_field(fields, b"exit", 0, 255))

        if self._spec.job.saved_changes is not None:
            self.saved_files = number_field(fields, b"saved", 0, FILE_MAX)
        reader = self.streams.reader
        consumed = number_field(fields, b"stdin", 0, reader.delivered if reader else 0)
        if reader:
            reader.restore_offset(consumed)
        return result


class Session:
    """The runner's side of one run, from the boot to the result: one event after the other."""

    def __init__(self, machine: Machine, spec: RunSpec, stdio: Stdio, reporter: Reporter) -> None:
        self._machine = machine
        self._spec = spec
        self._stdio = stdio
        self._reporter = reporter

        self._console = spec.vmm.open_console(spec.guest)
        self._conversation = Conversation(machine, spec, stdio, reporter)
        self._channel = self._conversation.channel
        self._ending = self._conversation.ending
        self._carried: Optional[int] = None       # pid of the kernel that is told of room in the channel
        self._exchanged = spec.carrier.program is None         # whether that is known

        self._reported = bytearray()              # by the supervisor
        self._end: Optional[End] = None
        self._is_supervised = True
        self._told: Union[Result, Fatal, None] = None          # by the agent
        self._signals: Deque[int] = collections.deque()
        self._actions = self._list_actions()
        self.result: Optional[Result] = None

    def _list_actions(self) -> Dict[int, Callable[[], None]]:
        """What each signal does when its turn comes: a handler does nothing but queue it."""
        actions: Dict[int, Callable[[], None]] = {
            number: partial(self._ending.forward, number) for number in FORWARDED_SIGNALS}
        actions[signal.SIGTSTP] = self._suspend
        terminal = self._conversation.terminal
        if terminal:
            actions[signal.SIGCONT] = terminal.resume
            actions[signal.SIGWINCH] = terminal.tell_window
        return actions

    def run(self, mask: Iterable[int]) -> Result:
        """Go on until there is a result or a Fatal. `mask` lets in the signals that are held."""
        signal.set_wakeup_fd(self._channel.to_wakeup)
        for number in self._actions:
            signal.signal(number, lambda received, frame: self._signals.append(received))
        for number in {signal.SIGCONT, signal.SIGWINCH} & set(self._actions):
            signal.siginterrupt(number, False)    # tcsetattr() in the background begins again
        held = signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            while self.result is None:
                self.step()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            if self._stdio.terminal:
                self._stdio.terminal.release()

        if self._conversation.farewell:
            self._reporter.tell(self._conversation.farewell)
        return self.result

    @property
    def is_interrupted(self) -> bool:
        return self._ending.is_interrupted and self._conversation.told is None

    @property
    def has_started(self) -> bool:
        return self._conversation.has_started

    @property
    def saved_files(self) -> Optional[int]:
        return self._conversation.saved_files

    def step(self) -> None:
        """Wait for an event, and do what follows from it."""
        ready = self._wait()
        if self._channel.wakeup in ready:
            os.read(self._channel.wakeup, 4096)
        while self._signals:
            self._actions[self._signals.popleft()]()

        if self._machine.console in ready:
            self._take_console()
        if self._channel.from_guest in ready:
            self._listen()
        terminal = self._conversation.terminal
        if terminal:
            self._serve_terminal(terminal, ready)
        if self._channel.to_guest in ready:
            self._channel.send()
        if self._machine.report in ready:
            self._take_report()

        self._ending.review()
        self._finish_if_done()

    def _wait(self) -> Set[int]:
        """Wait until a deadline is over, or return the descriptors that are ready."""
        poll = select.poll()
        poll.register(self._channel.wakeup, select.POLLIN)
        if self._is_supervised:
            poll.register(self._machine.report, select.POLLIN)
            poll.register(self._machine.console, select.POLLIN)

        if self._channel.is_open:
            poll.register(self._channel.from_guest, select.POLLIN)
            if self._channel.can_send:
                poll.register(self._channel.to_guest, select.POLLOUT)
        terminal = self._conversation.terminal
        if terminal and terminal.takes_keys:
            poll.register(terminal.keyboard, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(self._ending.left_s * 1000)}

    def _take_console(self) -> bool:
        content = os.read(self._machine.console, 65536)
        if self._spec.verbose:
            self._reporter.show(show_console(content))
        fault = self._console.add(content)
        if fault and not self._told:
            raise fault
        return bool(content)

    def _listen(self) -> None:
        if not self._exchanged:
            self._exchange_channel()
            return
        self._conversation.listen()
        if self._carried and self._channel.is_open:
            self._spec.carrier.wake(self._carried)
        if self._conversation.told and not self._told:
            while select.select([self._machine.console], [], [], 0)[0] and self._take_console():
                pass                              # perhaps the kernel said that its disk failed
            self._told = self._correct(self._conversation.told)

    def _correct(self, told: Union[Result, Fatal]) -> Union[Result, Fatal]:
        """Add to the command's result what only the kernel saw."""
        if isinstance(told, Fatal):
            return told
        killed_process = self._console.explain_killed_process()
        if killed_process:                        # the command sees a segmentation fault
            self._reporter.warn(killed_process)
            told = killed_by(signal.SIGKILL) if told.signal == signal.SIGSEGV else told
        if self._console.is_out_of_memory:
            self._reporter.warn(
                "guest was out of memory, of which it has {}, and killed a process; ask the batch "
                "system for more, or with --mem".format(format_mib(self._spec.guest.mem_mib)))
        return told._replace(out_of_memory=self._console.is_out_of_memory)

    def _exchange_channel(self) -> None:
        machine = self._machine
        carrier = self._spec.carrier
        self._carried = carrier.open_channel(machine.directories.run.fd, machine.from_guest, machine.to_guest)
        self._exchanged = True
        how = "the channel is carried by {}" if self._carried else "without {}, which does not work"
        self._reporter.say("kernel started, " + how.format(carrier.program))

    def _serve_terminal(self, terminal: TerminalLink, ready: Set[int]) -> None:
        if terminal.keyboard in ready:
            terminal.take_keys()
        if terminal.stopped_by and self._channel.is_idle and self._conversation.streams.is_idle:
            terminal.follow_stop()                # this may stop us, so all must be written

    def _suspend(self) -> None:
        # The default action of SIGTSTP stops no process group without a shell, such as a batch job.
        if self._stdio.terminal:
            self._stdio.terminal.release()
        # The supervisor would do that later. A batch system may send SIGSTOP to all before.
        vmm = self._spec.vmm
        directory = self._machine.directories.run.fd
        vmm.pause(self._spec.guest, directory)
        os.kill(os.getpid(), signal.SIGSTOP)
        vmm.resume(self._spec.guest, directory, self._machine.supervisor)
        if self._conversation.terminal:
            self._conversation.terminal.resume()

    def _take_report(self) -> None:
        content = os.read(self._machine.report, 65536)
        self._reported += content
        for kind, payload in decode_frames(self._reported):
            if kind == NETWORK_ENDED:
                self._lose_network()
            elif kind == LOCK_WAITS:              # of the file server
                self._channel.post(LOCKS_WAIT)
            else:
                self._end = decode_end(payload)
        if content and not self._end:
            return
        self._is_supervised = False
        if not self._end:                         # the supervisor is dead, and its children are ours
            kill_children()
        while self._take_console():               # to its end: nobody is left to write
            pass

    def _lose_network(self) -> None:
        helper = self._spec.guest.network.helper
        assert helper
        if not self._conversation.has_started:
            raise Fatal("network helper was killed: " + helper.program, "--net none runs without a network")
        self._reporter.warn("network helper was killed, the command goes on without a network: " + helper.program)
        self._channel.post(NETWORK_LOST, self._spec.vmm.interfaces[helper.kind].encode())

    def _finish_if_done(self) -> None:
        streams = self._conversation.streams
        streams.check(self._told is not None)
        if not self._is_supervised and not self._channel.is_open and not self._told:
            raise explain_end(self._end, self._machine, self._spec, self._console, self._channel.is_greeted)

        self.result = self._ending.result
        if self._told and (streams.is_finished or not self._conversation.has_started):
            self.result = self._conclude(self._told)
        if self.result and self._ending.is_time_over:
            raise Fatal("walltime of {:g} s is over".format(self._spec.timeout_s or 0),
                        "--timeout sets it", EXIT_TIMEOUT)

    def _conclude(self, told: Union[Result, Fatal]) -> Result:
        """The result of the command, once all that can be written is written."""
        is_written = self._conversation.streams.check_written()
        if isinstance(told, Fatal):
            raise told
        if is_written:
            return told
        self._reporter.warn("output of the command reached the limit of file size (ulimit -f)")
        return killed_by(signal.SIGXFSZ)          # as whoever writes to the file itself


# --- Words of other programs ---------------------------------------------------------------------------------
# What users of Docker, Apptainer, Charliecloud and Slurm type. A word with one meaning here is an
# alias in "Options"; these have none, or two.

INTO_IMAGE = "--write writes into the image; --image COW:BASE and --save-changes FILE keep changes beside it"
ONLY_JOB_DIRECTORY = (
    "leave it out: the guest sees the job directory and what --bind shows; --no-job-dir hides the former")
ROOT_OF_GUEST = "--root runs the command as root of the guest, otherwise it runs as you"
WAYS_TO_IMAGES = (
    "`make image PACKAGES=...` builds one in AppPot's source directory; --changes FILE merges the "
    "layers of a container image (see README)")
FOREIGN_OPTIONS = {
    "-w": "--cwd DIR starts the command in DIR; --write writes into the image",
    "-W": "--tmpdir DIR is for AppPot's temporary files; --cwd DIR starts the command in DIR",
    "-e": "--env NAME=VALUE sets a variable; --clean-env passes none of yours",
    "--env-file": "--env NAME=VALUE, once for each variable",
    "--unset-env": "--clean-env passes only the variables that --env names",
    "-b": "--bind SRC:DST",
    "--mount": "--bind SRC:DST, or --bind SRC:DST:ro",
    "--home": "--bind \"$HOME\" shows your HOME",
    "-H": "--bind \"$HOME\" shows your HOME",
    "--no-home": "leave it out: HOME is the appliance's own unless --bind shows yours",
    "-c": "--cwd DIR starts the command in DIR; it sees only the job directory and what --bind shows",
    "--contain": ONLY_JOB_DIRECTORY,
    "--containall": ONLY_JOB_DIRECTORY,
    "-C": ONLY_JOB_DIRECTORY,
    "--no-mount": ONLY_JOB_DIRECTORY,
    "--user": ROOT_OF_GUEST,
    "-u": ROOT_OF_GUEST,
    "--privileged": ROOT_OF_GUEST,
    "--cap-add": ROOT_OF_GUEST,
    "--uid": ROOT_OF_GUEST,
    "--gid": ROOT_OF_GUEST,
    "--userns": "leave it out: AppPot needs no namespace",
    "--rm": "leave it out: what a run makes is always removed",
    "-i": "leave it out: stdin always reaches the command; -t makes it a terminal",
    "--interactive": "leave it out: stdin always reaches the command; -t makes it a terminal",
    "--init": "leave it out: AppPot's agent is PID 1 and reaps processes",
    "--entrypoint": "write the command after the options",
    "--detach": "put `&` behind the command line, or submit it as a batch job",
    "-d": "put `&` behind the command line, or submit it as a batch job; -v shows the steps",
    "--debug": "-v shows the steps and the guest's console",
    "-s": "-q is quiet",
    "-m": "--mem SIZE",
    "--cpuset-cpus": "--cpus N, and taskset(1) before AppPot",
    "--shm-size": "--mem SIZE: /dev/shm in the guest may take all of its memory",
    "--tmpfs": "leave it out: /tmp in the guest is private to the run",
    "--scratch": "leave it out: /tmp in the guest is private to the run; --tmpdir DIR is for AppPot's files",
    "--ulimit": "set it before AppPot (ulimit): the command has your limits",
    "--stop-timeout": "--kill-after S",
    "--overlay": INTO_IMAGE,
    "--writable-tmpfs": "leave it out: the command can always write, and it is gone at the end of the run",
    "--read-only": "leave it out: a run never writes the image without --write",
    "--gpus": "leave it out: the guest has no GPU of the node",
    "--nv": "leave it out: the guest has no GPU of the node",
    "--rocm": "leave it out: the guest has no GPU of the node",
    "--device": "leave it out: the guest has no devices of the node",
    "--security-opt": "leave it out: a run has no more rights than you have",
    "--hostname": "leave it out: each run has a host name of its own",
    "--dns": "leave it out: names come from the node's name server",
    "--add-host": "with --root the command can write /etc/hosts; it has the names of the node's",
}
# Nothing of Debian is called so. A program of the appliance that is can be run after `--`.
FOREIGN_COMMANDS = {
    "exec": "leave it out",
    "run": "leave it out",
    "shell": "leave it out: without a command there is a login shell",
    "pull": WAYS_TO_IMAGES,
    "build": WAYS_TO_IMAGES,
    "inspect": "--doctor tells what a run needs; debugfs(8) looks into an image",
}
IMAGE_FILE = re.compile(r".*\.(?:img|raw|ext[234]|sif|simg|sqfs|sqsh|squashfs|qcow2|vmdk|vdi|vhdx?)", re.IGNORECASE)
CHANGES_FILE = re.compile(r".*\.(?:tar|tgz|tar\.\w+)", re.IGNORECASE)
REGISTRY = re.compile(r"[a-z][a-z-]*://.*|[a-z0-9][a-z0-9._/-]*:[\w][\w.-]*", re.DOTALL)
BIND_WORD = re.compile(r"[^:=]+:/[^/].*", re.DOTALL)
VARIABLE = re.compile(r"[A-Za-z_]\w*=.*", re.ASCII | re.DOTALL)
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"           # a word processor makes them of - and --


def explain_unknown_option(word: str, known: Iterable[str]) -> Fatal:
    """Name the option that does it here, or the one that is spelled almost so."""
    import difflib

    def spell(option: str) -> str:
        return option.replace("-", "").lower()

    name = word.partition("=")[0]
    what = "AppPot has no option " + name
    if name in FOREIGN_OPTIONS:
        return Fatal(what, FOREIGN_OPTIONS[name])

    hint = "`--help all` lists the options"
    options = {spell(option): option for option in (*FOREIGN_OPTIONS, *known) if option[2:]}
    near = [spelled for spelled in options if name[3:] and spelled.startswith(spell(name))]
    if len(near) != 1:
        near = difflib.get_close_matches(spell(name), options, 1, 0.6) if name[2:] else []
    if not near:
        return Fatal(what, hint)
    option = options[near[0]]
    return Fatal(what, "did you mean {}? {}".format(option, FOREIGN_OPTIONS.get(option, hint)))


def parse_network(text: str) -> str:
    if text not in ("auto", SLIRP4NETNS, SLIRP, "none"):
        raise Fatal("--net cannot be {!r}".format(text),
                    "auto, the default, reaches what the node reaches, which is itself 10.0.2.2; "
                    "slirp4netns and slirp insist on one; none leaves no way out")
    return text


def check_command(command: Sequence[str]) -> None:
    """Refuse what is no command, before a guest boots to say that it is not found."""
    word = command[0] if command else ""
    if word in FOREIGN_COMMANDS:
        hint = FOREIGN_COMMANDS[word]
        if IMAGE_FILE.fullmatch("".join(command[1:2])):
            hint += ", and write " + quote("--image", *command[1:])
        raise Fatal("AppPot has no command word of its own: " + word,
                    "{} (`-- {}` runs a program of that name)".format(hint, word))
    if word[:1] in tuple(DASHES):
        raise Fatal("option begins with a typographic dash: " + word,
                    "write --" + word.lstrip(DASHES + "-"))

    for pattern, what, hint in (
            (IMAGE_FILE, "an image", "write " + quote("--image", *command)),
            (CHANGES_FILE, "an archive", "write " + quote("--changes", *command)),
            (BIND_WORD, "a pair SRC:DST", "write " + quote("--bind", *command) + "; -v is verbose"),
            (REGISTRY, "an image of a registry", WAYS_TO_IMAGES),
            (VARIABLE, "a variable", "write " + quote("--env", *command))):
        if pattern.fullmatch(word):
            raise Fatal("command is {}: {}".format(what, word), hint + " (`--` runs it as a command)")


def quote(*words: str) -> str:
    """A command line for a shell."""
    import shlex

    return " ".join(map(shlex.quote, words))


# --- Options ------------------------------------------------------------------------------------------------

OPTIONAL_VALUES = {"lan": LAN_GROUP, "help": "all"}            # what of the next word is no command


class OptionParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Fatal(message, "`{} --help` lists the options".format(self.prog))

    def split(self, words: Sequence[str]) -> Tuple[List[str], Tuple[str, ...]]:
        """The options, and the command, which begins at the first word that is no option.

        argparse alone would also take the options of the command.
        """
        index = 0
        while index < len(words) and words[index].startswith("-") and words[index] != "-":
            if words[index] == "--":
                return list(words[:index]), tuple(words[index + 1:])

            name, equals, value = words[index].partition("=")
            action = self._option_string_actions.get(name)
            index += 1
            if not action:
                self._check_short(words[index - 1])
                continue
            if action.nargs == 0:
                continue

            if not equals:
                following = words[index:index + 1]
                pattern = OPTIONAL_VALUES.get(action.dest, "")
                is_value = any(is_blank(word) or re.fullmatch(pattern, word) for word in following)
                if action.nargs == "?" and not is_value:
                    continue                      # --lan without a group: the command follows

                value = "".join(following)
                index += 1
            self._check_given(name, value, bool(equals))
        return list(words[:index]), tuple(words[index:])

    def _check_short(self, word: str) -> None:
        """Refuse an unknown option, unless argparse takes it for several letters or one with a value."""
        is_short = word[:2] in self._option_string_actions and not word.startswith("--")
        if not is_short:
            raise explain_unknown_option(word, self._option_string_actions)

    def _check_given(self, name: str, value: str, is_attached: bool) -> None:
        """Refuse an empty value, because it comes from an unset variable of a script."""
        if is_blank(value):
            raise Fatal("{} has no value: {!r}".format(name, value), UNSET_HINT)
        is_option = value.startswith("--") or value in self._option_string_actions
        if is_option and not is_attached:
            raise Fatal("{} has no value, but is followed by {}".format(name, value), UNSET_HINT)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints the value of an option once, behind all of its names, as Python 3.13 does."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = "" if action.nargs == 0 else " " + self._format_args(action, "")
        return ", ".join(action.option_strings) + value


HELP = """\
usage: python3 apppot_start.py [option...] [command [argument...]]

Run a command in a Linux appliance, a disk image, as an ordinary process. What
it writes in the current directory stays; all else is gone at the end. Without
a command you get a login shell. Examples:

  python3 apppot_start.py ./analyse data.csv > result.csv
  python3 apppot_start.py --root --save-changes my.tar.gz apt-get install -y gcc
  python3 apppot_start.py --changes my.tar.gz --mem 4G --cpus 2 make -j 2
  python3 apppot_start.py --bind /data --env SEED=1 ./analyse /data/genomes

  --image FILE           boot this image (default: apppot.img beside the script)
  --bind SRC[:DST[:ro]]  show a file or directory of this machine in the guest
  --env NAME[=VALUE]     set a variable, or pass yours
  --root                 be root of the guest, say to install packages
  --save-changes FILE    write at the end all that differs from the image
  --changes FILE         merge such a file before the command starts
  --write                write into the image itself
  --mem SIZE, --cpus N   resources of the guest (default: what the job has)
  -v, -q                 show the steps on stderr, or not even progress
  --doctor               tell what a run needs and whether it is here
  --help all             list all options, defaults, variables and statuses
"""
DESCRIPTION = """\
Run a command in a Linux appliance, which is a disk image, as an ordinary
process under User-Mode Linux. Options end at the first word that is no option.
Without a command AppPot runs ./apppot-run in the job directory, else
~/apppot-autorun in the appliance, else a login shell.

The current directory is the job directory. What the command writes there and
in directories of --bind stays. All else, also in HOME, is gone at the end of
the run unless --save-changes, --write or COW:BASE keeps it."""
EPILOG = """\
environment of the command:
  The command gets these variables of the caller: of batch systems SLURM_*,
  SLURMD_*, PBS_*, SGE_*, JOB_*, _CONDOR_*, LSB_*, NSLOTS, NHOSTS, NQUEUES, PE,
  QUEUE and RESTARTED; and OMP_*, OPENBLAS_NUM_THREADS, MKL_NUM_THREADS, TERM,
  TZ, LANG, LANGUAGE, LC_*, http_proxy, https_proxy, ftp_proxy, all_proxy and
  no_proxy, also in capitals. Others need --env. HOME, USER, LOGNAME, SHELL,
  PATH and PWD are those of the guest.

  If this machine trusts certificate authorities that the appliance does not,
  SSL_CERT_FILE, CURL_CA_BUNDLE, REQUESTS_CA_BUNDLE and APT_CONFIG lead to a
  file with both. A proxy at localhost is one at 10.0.2.2 in the guest.
  --clean-env keeps out the variables above and the certificates.

  OMP_NUM_THREADS, OPENBLAS_NUM_THREADS and MKL_NUM_THREADS are 1 by default:
  processes run in parallel in the guest, threads of one process do not. If the
  caller sets OMP_NUM_THREADS, that number counts for all three.

defaults from the environment:
  APPPOT_KERNEL, APPPOT_IMAGE, APPPOT_MEM, APPPOT_CPUS, APPPOT_TMPDIR,
  APPPOT_SLIRP, APPPOT_EMPTY and APPPOT_CHANGES (files with colons between). An
  empty variable counts as not set; an option with an empty value is an error.

  If nothing names them, AppPot looks for the kernel (`linux`, `linux.uml`),
  the image (`apppot.img`) and the network helper (`slirp4netns`,
  `slirp-fullbolt`, `slirp`) beside this script, in the directory build/ beside
  it, in the current directory and, except for the image, on PATH.

memory and CPUs:
  In a job of Slurm, PBS, Grid Engine or HTCondor the guest gets what the job
  was granted: the smallest amount that the batch system's variables, the
  cgroups, `ulimit -v` and the CPU affinity name. AppPot keeps 64 MiB and a
  32nd of the memory for itself. Outside of a job the guest gets 1 GiB, or less
  if a cgroup has less, and 1 CPU. -v prints where each amount comes from.

exit status:
  That of the command; 128+N if signal N killed the command; 124 if --timeout
  is over; 125 if AppPot failed; 126 if the command cannot be executed; 127 if
  the command was not found."""


def add_appliance_options(add: Callable[..., Any]) -> None:
    add("--image", "--apppot", metavar="PATH",
        help="Boot this disk image. COW:BASE boots the image BASE and keeps all changes in the "
             "file COW.")
    add("--kernel", "--linux", "--uml", metavar="PATH", help="Boot this User-Mode Linux kernel.")
    add("--write", "--writable", action="store_true",
        help="Write into the image itself. By default a temporary copy-on-write file takes all "
             "changes.")
    add("--disk", metavar="SIZE",
        help="Size of the root file system, not less than in the image (default: as in the image, "
             "or 2G if that is more and the kernel has a device mapper). With --write the image "
             "itself grows.")

    add("--mem", "--memory", metavar="NUM",
        help="Memory of the guest in MiB, or with K, M, G or T (default: see below).")
    add("--cpus", metavar="N",
        help="CPUs of the guest. More than one needs a kernel with SMP (default: see below).")
    add("--ptrace", action="store_true",
        help="Trap system calls by ptrace. Kernels from 6.16 on otherwise use seccomp, which is "
             "faster but does not stop a hostile program (see README).")
    add("--id", "--umid", "--name", dest="umid", metavar="NAME",
        help="Name of the guest in the path of its management console. -v prints that path for "
             "uml_mconsole.")
    add("-X", "--extra", action="append", default=[], metavar="ARG",
        help="Add an argument to the kernel command line. Repeatable.")

    add("--io", choices=("auto", "builtin", "empty"), default="auto", metavar="HOW",
        help="What carries the channel to the guest: builtin, the program empty, or auto "
             "(default), which takes empty only if it lies beside this script or is named.")
    add("--empty", metavar="PATH",
        help="Carry the channel by this program empty (github.com/mezantrop/empty).")

    add("--changes", "--merge", action="append", metavar="FILE",
        help="Merge a changes file into the appliance before the command starts. Repeatable, in "
             "this order.")
    add("--force-changes", action="store_true",
        help="Accept changes files that were made for another base image.")
    add("--save-changes", metavar="FILE",
        help="After the command write a changes file with all that differs from the base image, "
             "merged changes files included.")


def add_command_options(add: Callable[..., Any]) -> None:
    add("--root", "--fakeroot", action="store_true", help="Run the command as root of the guest.")
    add("--env", "--set-env", action="append", default=[], metavar="NAME[=VALUE]",
        help="Set a variable, or without =VALUE pass the caller's. Repeatable.")
    add("--clean-env", "--cleanenv", action="store_true",
        help="Pass only those variables of the caller that --env names.")
    add("-B", "--bind", "--volume", action="append", default=[], metavar="SRC[:DST[:ro]]",
        help="Show a file or directory of this machine in the guest at DST, by default at SRC; :ro "
             "makes it read-only. --bind \"$HOME\" also makes it the HOME of the command. "
             "Repeatable.")

    add("--no-job-dir", dest="job_dir", action="store_false",
        help="Do not show the job directory in the guest. The command starts in its home "
             "directory.")
    add("-t", "-it", "-ti", "--tty", dest="terminal", action="store_true", default=None,
        help="Make stdin, stdout and stderr of the command a terminal (default: those that are a "
             "terminal here).")
    add("-T", dest="terminal", action="store_false", help="Give the command no terminal.")
    add("--cwd", "--pwd", "--workdir", "--cd", metavar="DIR",
        help="Start the command in this directory of the guest (default: the job directory). A "
             "relative DIR is one below the job directory.")


def add_network_options(add: Callable[..., Any]) -> None:
    add("--net", "--network", default="auto", metavar="HOW", type=parse_network,
        help="Connect the guest by this helper program, with the rights of the caller. auto "
             "(default) takes slirp4netns, else slirp, else none. With none the guest has no way "
             "out.")
    add("--slirp", metavar="PATH",
        help="Path of the helper program, which is either slirp4netns or slirp.")
    add("-p", "--publish", action="append", default=[], metavar="[HOSTIP:]HOSTPORT:GUESTPORT[/udp]",
        help="Show a port of the guest on the host, by default at 127.0.0.1. Repeatable; needs "
             "slirp4netns.")
    add("--lan", nargs="?", const="", metavar="GROUP:PORT",
        help="Join a private network (eth1) of all guests with this multicast group, by default "
             "those of one batch job. APPPOT_LAN_ADDRESS is the guest's address there.")
    add("--lan-address", metavar="ADDRESS[/PREFIX]",
        help="Address of the guest in the network of --lan (default: a random one).")


def add_run_options(add: Callable[..., Any]) -> None:
    add("--timeout", metavar="S",
        help="End the command with status 124 after S seconds. S may end in s, m, h or d.")
    add("--boot-timeout", default="120", metavar="S",
        help="End the run if the guest is not up after S seconds (default 120).")
    add("--kill-after", default="10", metavar="S",
        help="Kill a command that lives S seconds after SIGTERM (default 10); 0 never kills it.")
    add("--die-with-parent", action="store_true",
        help="End the run, as by SIGTERM, when the process that started it ends.")
    add("--die-with", metavar="NAME",
        help="End the run, as by SIGTERM, when the nearest ancestor process called NAME ends.")

    add("--tmpdir", metavar="DIR",
        help="Directory for temporary files (default: the batch system's, TMPDIR, /tmp, /var/tmp).")
    add("--dry-run", action="store_true",
        help="Check everything and print the kernel's command line. Start nothing.")


def add_information_options(add: Callable[..., Any]) -> None:
    add("--doctor", action="store_true",
        help="Print, a line each, what a run needs and whether it is here.")
    add("--boot", action="store_true", help="With --doctor: also boot once.")
    add("--json", action="store_true", help="With --doctor: print one line of JSON.")
    add("-v", "--verbose", action="store_true",
        help="Show the steps and the guest's console on stderr.")
    add("-q", "--quiet", action="store_true",
        help="Show no progress and no words of welcome on stderr; errors and warnings remain.")
    add("-V", "--version", action="store_true", help="Print the version.")
    add("-h", "--help", nargs="?", const="most", choices=("most", "all"), metavar="all",
        help="Print what most people need, or with `all` this text.")


def build_parser() -> OptionParser:
    parser = OptionParser(
        prog="apppot_start.py", add_help=False, allow_abbrev=False, description=DESCRIPTION, epilog=EPILOG,
        usage="apppot_start.py [option...] [command [argument...]]",
        formatter_class=HelpFormatter)

    for title, add_options in (
            ("appliance", add_appliance_options), ("command", add_command_options), ("network", add_network_options),
            ("run", add_run_options), ("information", add_information_options)):
        add_options(parser.add_argument_group(title).add_argument)
    return parser


def format_help(which: str) -> str:
    return build_parser().format_help() if which == "all" else HELP


def read_words(argv: Sequence[str]) -> Tuple[argparse.Namespace, Tuple[str, ...]]:
    """The options and the command of a command line."""
    parser = build_parser()
    words, command = parser.split(argv)
    options = parser.parse_args(words)
    is_marked = len(words) + len(command) < len(argv)          # by `--`
    if not is_marked:
        check_command(command)
    return options, command


# --- Deciding a run -----------------------------------------------------------------------------------------

DISK_MIB = 2048                      # of an image that was shrunk, if the VMM can enlarge it


def find_image(options: argparse.Namespace) -> Tuple[str, Optional[str]]:
    return split_image(find_part(options.image, IMAGE_NAMES, "image", False))


def find_vmm(options: argparse.Namespace) -> Uml:
    """The VMM that the kernel file is for: a second VMM is chosen here."""
    return find_uml(options.kernel, options.ptrace, options.extra)


def split_image(text: str) -> Tuple[str, Optional[str]]:
    """Image and, of COW:BASE, the COW file. The original AppPot also took COW,BASE."""
    separator = re.search("[:,]", text)
    if not separator or os.path.exists(text):
        return text, None
    cow, _, base = text.partition(separator.group())
    if not cow or not base:
        raise Fatal("--image is neither a file nor COW:BASE: {!r}".format(text),
                    "name the image file")
    return base, os.path.abspath(cow)


def choose_image(options: argparse.Namespace) -> Tuple[str, Optional[str], RootDevice]:
    """The image, its COW file if one is given by name, and the root file system in it."""
    image, cow = find_image(options)
    if cow and options.write:
        raise Fatal("--write with a COW file: " + cow,
                    "leave out one of the two: a COW file given by name is kept")
    root = find_root_device(image)
    if cow:
        check_cow(cow, image)
    if options.write and not os.access(image, os.W_OK):
        raise Fatal("image is not writable: " + image, "without --write nothing is written")
    return image, cow, root


def choose_name(options: argparse.Namespace, vmm: Vmm) -> str:
    """The name of the guest. This checks all words of the user on the kernel command line."""
    umid = options.umid or "guest"
    if not re.match(r"[\w.-]{1,60}$", umid, re.ASCII) or umid in vmm.reserved_names:
        raise Fatal("--id is not a name: {!r}".format(umid), "use up to 60 letters, digits and -_.")
    for word in options.extra:
        if not word or re.search(r"\s", word):
            raise Fatal("--extra is not one word: {!r}".format(word),
                        "give --extra once for each argument")
    return umid


def check_layer_file(path: str) -> str:
    hint = "--changes and APPPOT_CHANGES name files that --save-changes or apppot-snap wrote"
    with open_regular(path, "changes file", hint):
        return os.path.realpath(path)


def check_saved_changes(path: str) -> str:
    """Where the changes file goes. A link is followed, as any program that writes a file does."""
    hint = "name a file, new or not, in a directory that you can write"
    try:
        kind = name_kind(path)
    except FileNotFoundError:
        kind = "" if os.path.basename(path) else "a directory"
    except OSError as error:
        raise Fatal("--save-changes cannot be written, {}: {}".format(error.strerror, path), hint)
    if kind:
        raise Fatal("--save-changes is {}: {}".format(kind, path), hint)

    path = os.path.realpath(path)
    if not os.access(os.path.dirname(path), os.W_OK | os.X_OK):
        raise Fatal("--save-changes cannot be written: " + path,
                    "its directory must exist and be writable")
    return path


def decide_memory(options: argparse.Namespace, grants: Grants, vmm: Vmm) -> Tuple[Amount, str]:
    """The guest's memory and the directory of the file that holds it."""
    mem, floors = choose_memory(options.mem, grants)
    return vmm.place_memory(mem, floors, scratch_candidates(options.tmpdir))


def choose_disk_size(options: argparse.Namespace, root: RootDevice, cow: Optional[str],
                     vmm: Vmm) -> Optional[int]:
    """Bytes that the root file system gets; None: what it has in the image."""
    if options.disk is None:
        is_small = root.length < DISK_MIB << 20
        is_private = not cow and not options.write
        return DISK_MIB << 20 if is_small and is_private and vmm.can_enlarge_disk else None

    wanted = parse_size_mib(options.disk, "--disk") << 20
    if wanted > FILE_MAX:
        raise Fatal("--disk is more than a file can have: " + options.disk,
                    "give a size such as 20G")
    if wanted < root.length:
        raise Fatal("--disk is less than the image has, {}: {}".format(
            format_mib(root.length >> 20), options.disk),
            "a file system in use cannot shrink")
    if cow or options.write and root.partition:
        what = "a COW file given by name: " + cow if cow else "--write of a partition"
        raise Fatal("--disk with " + what, "a throw-away run or --write of an image without "
                    "partitions can have a larger disk")
    if not options.write and not vmm.can_enlarge_disk:
        raise Fatal("kernel has no device mapper for --disk: " + vmm.program,
                    "`make kernel` builds one that has it; or `make image IMAGE_SIZE={}`"
                    .format(options.disk))
    return None if wanted == root.length else wanted


def choose_layers(options: argparse.Namespace) -> Tuple[str, ...]:
    given = find_given(None, "changes")
    paths = options.changes or (given.text.split(":") if given else [])
    return tuple(check_layer_file(path) for path in paths if path)


def choose_environment(options: argparse.Namespace, notes: List[str]) -> Dict[bytes, bytes]:
    environment = select_environment(dict(os.environb), options.env, options.clean_env)
    redirected = redirect_proxies(environment, GATEWAY)
    environment.update(redirected)
    proxies = sorted(name.decode() for name in {*environment} & {*PROXY_VARIABLES})
    if proxies:                                   # not their values: a password may be in them
        where = ", on the loopback: {} instead".format(GATEWAY) if redirected else ""
        notes.append("proxies of the node: {}{}".format(" ".join(proxies), where))

    threads = limit_threads(environment)
    environment.update(threads)
    if threads:
        notes.append("threads of a process do not run in parallel: {}".format(
            " ".join(name.decode() + "=1" for name in threads)))
    return environment


def decide_job(options: argparse.Namespace, command: Tuple[str, ...], ignored: Tuple[int, ...],
               limits: Tuple[Limit, ...], notes: List[str]) -> Job:
    directory, alias = find_job_directory() if options.job_dir else (None, None)
    tags = ("bind{}".format(number) for number in range(len(options.bind)))
    binds = tuple(map(parse_bind, options.bind, tags))
    is_other_home = options.root and os.getuid() != 0
    saved = options.save_changes

    return Job(
        command=command,
        environment=choose_environment(options, notes),
        directory=directory,
        alias=alias,
        binds=binds,
        cwd=None if options.cwd is None else os.fsencode(options.cwd),
        home=None if is_other_home else find_home(os.environ.get("HOME", ""), binds),
        as_root=options.root,
        umask=os.umask(0o077),                    # what the runner makes is nobody else's
        ignored_signals=ignored,
        limits=limits,
        terminal=options.terminal,
        node=view_node(notes, not options.clean_env),
        layers=choose_layers(options),
        force_changes=options.force_changes,
        saved_changes=None if saved is None else check_saved_changes(saved))


def build_spec(options: argparse.Namespace, command: Tuple[str, ...],
               ignored: Tuple[int, ...] = ()) -> RunSpec:
    """Decide everything and check all that can be checked before anything is started."""
    ancestor = None if options.die_with is None else find_ancestor(options.die_with)
    job_notes: List[str] = []
    job = decide_job(options, command, ignored, take_limits(), job_notes)
    image, cow, root = choose_image(options)
    vmm = find_vmm(options)
    grants = find_own_grants()

    mem, ram_directory = decide_memory(options, grants, vmm)
    cpus, cpu_note = decide_cpus(options.cpus, grants, vmm.explain_one_cpu())
    if cpu_note and find_given(options.cpus, "cpus"):
        warn("{}: {}".format(cpu_note, vmm.program))
    disk_size = choose_disk_size(options, root, cow, vmm)
    disk = Disk(os.path.abspath(image), cow, options.write, root, disk_size)
    vmm.check(disk, mem.value, cpus.value)

    guest = Guest(
        disk=disk,
        shares=list_shares(job),
        mem_mib=mem.value,
        cpus=cpus.value,
        name=choose_name(options, vmm),
        network=choose_network(options, vmm.program, vmm.interfaces),
        extra=tuple(options.extra),
        scratch=choose_scratch(scratch_candidates(options.tmpdir)),
        ram_directory=ram_directory)
    return RunSpec(
        job=job,
        guest=guest,
        vmm=vmm,
        carrier=find_carrier(options.io, options.empty),
        ancestor=ancestor,
        timeout_s=None if options.timeout is None else parse_seconds(options.timeout, "--timeout"),
        boot_timeout_s=parse_seconds(options.boot_timeout, "--boot-timeout"),
        kill_after_s=parse_seconds(options.kill_after, "--kill-after", True),
        verbose=options.verbose,
        quiet=options.quiet,
        notes=(*grants.notes, *job_notes, "memory " + describe_memory(mem, ram_directory),
               cpu_note or describe_cpus(cpus)),
        in_job=bool(grants.systems),
        limit_mib=None if find_given(options.mem, "mem") else find_job_limit(grants))


# --- Running ------------------------------------------------------------------------------------------------

def make_directories(spec: RunSpec, stack: ExitStack) -> Directories:
    """Make the private directories of a run."""
    def make(parent: str) -> PrivateDirectory:
        with blaming("private directory cannot be made", parent, SCRATCH_HINT):
            return stack.enter_context(private_directory(parent))

    run = make(spec.guest.scratch)
    directories = Directories(run, run, run)
    if spec.guest.ram_directory != spec.guest.scratch:
        directories = directories._replace(ram=make(spec.guest.ram_directory))
    if spec.job.saved_changes is not None:
        suffix = ".tar" if spec.job.saved_changes.endswith(".tar") else ".tar.gz"
        directories = directories._replace(
            save=make(os.path.dirname(spec.job.saved_changes)),
            saved_name=os.urandom(8).hex() + suffix)
    return directories


def fill_directories(spec: RunSpec, directories: Directories) -> None:
    with blaming("run directory cannot be filled", directories.run.path, SCRATCH_HINT):
        os.mkdir(SPOOL, 0o700, dir_fd=directories.run.fd)
        if directories.saved_name:
            os.mkdir(GIVEN, 0o700, dir_fd=directories.save.fd)
        spec.vmm.prepare(spec.guest, directories)


def run(spec: RunSpec, started: float) -> Result:
    with ExitStack() as stack:
        mask = stack.enter_context(signals_held())
        stdio = stack.enter_context(connect_stdio(spec.job.terminal))
        reporter = Reporter(stdio.terminal, spec.verbose, spec.quiet, started)
        stack.callback(reporter.clear)
        stack.callback(reporter.say, "nothing left")
        locks = spec.vmm.open_disk(spec.guest.disk)
        directories = make_directories(spec, stack)
        shares = (*directories.list_shares(), *spec.guest.shares)
        spec = spec._replace(guest=spec.guest._replace(shares=shares))
        fill_directories(spec, directories)
        locks += [directory.fd for directory in directories.list_distinct()]

        reporter.say("run directory " + directories.run.path)
        for note in (*spec.notes, *map(describe_share, shares)):
            reporter.say(note)
        reporter.say(describe(spec.guest.network))
        reporter.say(spec.vmm.describe_files())
        reporter.say(describe_confinement(spec.carrier.program))
        reporter.say(spec.vmm.describe(spec.guest, directories))

        machine = stack.enter_context(start_machine(spec, stdio.terminal, directories, locks))
        if spec.carrier.program is None:
            reporter.say("kernel started")
        session = Session(machine, spec, stdio, reporter)
        result = session.run(mask)
        keep_changes(session, spec, directories, reporter)
    return result


def keep_changes(session: Session, spec: RunSpec, directories: Directories, reporter: Reporter) -> None:
    """Put the changes file in its place, and tell what a user who waits wants to know."""
    path = spec.job.saved_changes
    if session.is_interrupted and reporter.is_watched:
        reporter.tell(describe_interruption(spec, session.has_started))
    if path is None or not directories.saved_name or session.is_interrupted:
        return

    place_changes(directories.save, directories.saved_name, path)
    if reporter.is_watched:
        reporter.tell("saved {} file{}, {:.1f} MiB to {}".format(
            session.saved_files, "" if session.saved_files == 1 else "s", os.path.getsize(path) / MIB, path))


# --- The doctor ---------------------------------------------------------------------------------------------
# Each check takes steps of a run. It returns what it found, or raises the Fatal with which the run
# ends.

class Basis(NamedTuple):
    """What several checks look at."""
    options: argparse.Namespace
    grants: Grants
    vmm: Optional[Uml]               # if there is one


def find_basis(options: argparse.Namespace) -> Basis:
    try:
        vmm: Optional[Uml] = find_vmm(options)
    except Fatal:                                 # check_vmm() tells
        vmm = None
    return Basis(options, find_own_grants(), vmm)


def check_python(basis: Basis) -> Finding:
    what = "{} {}".format(sys.executable, sys.version.split()[0])
    try:
        import ctypes  # noqa: F401
    except ImportError:
        what += " without ctypes: a killed run may leave processes"
        return Finding("warn", what, "use a complete Python")
    return Finding("ok", what)


def check_vmm(basis: Basis) -> Finding:
    return examine_kernel(find_vmm(basis.options))


def check_ram(basis: Basis) -> Finding:
    mem, floors = choose_memory(basis.options.mem, basis.grants)
    mem, directory = place_memory(mem, floors, scratch_candidates(basis.options.tmpdir))
    free = format_mib(free_mib(directory))
    what = "{}; {} free there".format(describe_memory(mem, directory), free)
    if directory == SHARED_MEMORY:
        return Finding("ok", what)

    fault = find_fault_for_ram(SHARED_MEMORY, mem.value)
    return Finding("warn", "{}; {} {}".format(what, SHARED_MEMORY, fault),
                   "a file on a disk is slow: ask for a {} with room".format(SHARED_MEMORY))


def check_cpus(basis: Basis) -> Finding:
    reason = basis.vmm.explain_one_cpu() if basis.vmm else None
    cpus, note = decide_cpus(basis.options.cpus, basis.grants, reason)
    if note:
        cure = "leave out --ptrace" if basis.options.ptrace else "use a kernel with CONFIG_SMP"
        return Finding("warn", note, "run several appliances at once, or " + cure)
    return Finding("ok", describe_cpus(cpus))


def check_scratch(basis: Basis) -> Finding:
    directory = choose_scratch(scratch_candidates(basis.options.tmpdir))
    return Finding("ok", "{}, {} free".format(directory, format_mib(free_mib(directory))))


def check_image(basis: Basis) -> Finding:
    image, cow, root = choose_image(basis.options)
    kind = "partition {} of a disk".format(root.partition) if root.partition else "a file system"
    what = "{}, {}, base id {}".format(image, kind, root.base_id)
    return Finding("ok", what + (", COW file " + cow if cow else ""))


def check_agent(basis: Basis) -> Finding:
    image, cow = find_image(basis.options)
    root = find_root_device(image)
    try:
        missing = find_missing_agent(image, root.start)
    except ValueError as error:
        what = "cannot be seen from outside ({})".format(error)
        return Finding("warn", what, "--doctor --boot looks inside")

    if missing and cow:
        what = "{} is not in the base image; in the COW file?".format(missing)
        return Finding("warn", what, "--doctor --boot tells")
    if missing:
        raise no_agent(missing, image)
    return Finding("ok", AGENT + " is in the image")


def check_files(basis: Basis) -> Finding:
    empty = find_carrier(basis.options.io, basis.options.empty).program
    return examine_files(basis.vmm, describe_confinement(empty))


def check_network(basis: Basis) -> Finding:
    if not basis.vmm:
        return Finding("warn", "not looked for without a kernel", "name one with --kernel")
    network = choose_network(basis.options, basis.vmm.program, basis.vmm.interfaces)
    if network.kind or basis.options.net == "none":
        return Finding("ok", describe(network))
    return Finding("warn", describe(network), "install slirp4netns, or put it beside the script")


def check_empty(basis: Basis) -> Finding:
    empty = find_carrier(basis.options.io, basis.options.empty).program
    return Finding("ok", empty or "not here and not needed: the built-in carrier does its work")


def check_node_limits(basis: Basis) -> Finding:
    try:
        disk_bytes = os.path.getsize(find_image(basis.options)[0])
    except (Fatal, OSError):
        disk_bytes = 0
    mem = choose_memory(basis.options.mem, basis.grants)[0]
    check_limits(mem.value, disk_bytes, choose_cpus(basis.options.cpus, basis.grants).value)

    found = []
    for which, what in (
            (resource.RLIMIT_NOFILE, "open files"), (resource.RLIMIT_NPROC, "processes"),
            (resource.RLIMIT_SIGPENDING, "pending signals")):
        hard = resource.getrlimit(which)[1]
        number = "any number of" if hard == resource.RLIM_INFINITY else str(hard)
        found.append(number + " " + what)
    found.append("{} memory areas of a process (vm.max_map_count)".format(read_max_areas()))
    for room in read_process_room(read_node_file):
        found.append("room for {} more by {}".format(room.value, room.source))
    return Finding("ok", ", ".join(found))


def check_batch(basis: Basis) -> Finding:
    grants = basis.grants
    limits = ["{} ({})".format(format_mib(mem.value), mem.source)
              for mem in grants.mem + grants.mem_limits]
    limits += ["{} CPUs ({})".format(cpus.value, cpus.source)
               for cpus in grants.cpus + grants.cpu_limits]
    systems = " and ".join(grants.systems) or "no job of a batch system"
    what = "{}; limits: {}".format(systems, ", ".join(limits))

    if grants.notes:
        hint = "correct these variables, or give --mem and --cpus"
        return Finding("warn", "; ".join((what, *grants.notes)), hint)
    return Finding("ok", what)


def check_boot(basis: Basis) -> Finding:
    started = time.time()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)                              # the caller's input is none of ours
    result = run(build_spec(basis.options, ("true",)), started)
    if result.status:
        what = "`true` in the appliance ended with status {}".format(result.status)
        raise Fatal(what, "is the image damaged?")
    took_s = time.time() - started
    return Finding("ok", "ran `true` in the appliance, {:.1f} s from start to end".format(took_s))


CHECKS: Tuple[Tuple[str, Callable[[Basis], Finding]], ...] = (
    ("python", check_python),
    ("kernel", check_vmm),
    ("ptrace", lambda basis: examine_ptrace(basis.vmm)),
    ("seccomp", lambda basis: examine_seccomp(basis.vmm)),
    ("memory", check_ram),
    ("cpus", check_cpus),
    ("scratch", check_scratch),
    ("image", check_image),
    ("agent", check_agent),
    ("files", check_files),
    ("network", check_network),
    ("empty", check_empty),
    ("limits", check_node_limits),
    ("batch", check_batch))


def run_check(check: Callable[[Basis], Finding], basis: Basis) -> Finding:
    try:
        return check(basis)
    except Fatal as fatal:
        return Finding("fail", fatal.message, fatal.hint)
    except (OSError, struct.error) as error:
        return Finding("fail", str(error), "look at that file or directory")


VERDICTS = {"fail": "31", "warn": "33", "ok": "32"}      # the worst first; colours of ECMA-48, SGR


def show_findings(findings: Sequence[Tuple[str, Finding]]) -> None:
    """A line each."""
    is_coloured = os.isatty(1) and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    for name, finding in findings:
        advice = "; do: " + finding.advice if finding.advice else ""
        verdict = "{:5}".format(finding.verdict)
        if is_coloured:
            verdict = "\33[{}m{}\33[0m".format(VERDICTS[finding.verdict], verdict)
        what = one_line("{:8} {}{}".format(name, finding.what, advice)).decode()
        write_stdout("{} {}\n".format(verdict, what))


def encode_findings(findings: Sequence[Tuple[str, Finding]], verdict: str) -> str:
    """One line of JSON for one node, so that those of many nodes can be put together."""
    import json

    return json.dumps({
        "node": os.uname().nodename, "apppot": VERSION, "verdict": verdict,
        "findings": [dict(need=name, **finding._asdict()) for name, finding in findings]})


def examine(options: argparse.Namespace, command: Tuple[str, ...]) -> int:
    """Print what each check has found; 0 if none failed."""
    hint = "`--doctor` looks at this node, `--doctor --boot` boots once, too"
    if command:
        raise Fatal("--doctor, --boot and --json run no command: " + " ".join(command), hint)
    if not options.doctor:
        raise Fatal("{} without --doctor".format("--boot" if options.boot else "--json"), hint)

    take_limits()                                 # as a run does
    basis = find_basis(options)
    checks = CHECKS + ((("boot", check_boot),) if options.boot else ())
    findings = [(name, run_check(check, basis)) for name, check in checks]
    findings.sort(key=lambda found: list(VERDICTS).index(found[1].verdict))
    worst = findings[0][1].verdict

    if options.json:
        write_stdout(encode_findings(findings, worst) + "\n")
    else:
        show_findings(findings)
    return EXIT_FAILED if worst == "fail" else 0


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
    sys.stdout = sys.stdout or open(1, "w", closefd=False)     # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)     # noqa: SIM115


def find_ignored_signals(parent: int) -> Tuple[int, ...]:
    """The signals that the caller ignores. The command ignores them as well.

    Python itself ignores two signals. A parent that is a shell shows whether the caller does, too.
    SIGTTIN and SIGTTOU are left out, as by these the command asks for the terminal.
    """
    numbers = [*range(1, 32), *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)]
    ignored = {number for number in numbers if signal.getsignal(number) == signal.SIG_IGN}
    ignored -= {*IGNORED_BY_PYTHON, signal.SIGTTIN, signal.SIGTTOU}
    status = read_node_file("/proc/{}/status".format(parent))
    if SHELLS.match(status):
        mask = int(status.partition("SigIgn:")[2].split()[0], 16)
        ignored |= {number for number in IGNORED_BY_PYTHON if mask >> number - 1 & 1}
    return tuple(sorted(map(int, ignored)))


def is_written_as_then(options: argparse.Namespace) -> bool:
    """Whether the original's name was used, by which a run writes into an image that its caller may write."""
    if os.path.basename(sys.argv[0]) not in ("apppot-start", "apppot-start.sh") or options.save_changes:
        return False
    image, cow = find_image(options)
    return cow is None and os.access(image, os.W_OK)


def follow_parent(parent: int) -> None:
    if not try_libc("prctl", PR_SET_PDEATHSIG, signal.SIGTERM):
        raise Fatal("--die-with-parent does not work: this Python has no ctypes", "leave it out")
    if os.getppid() != parent:                    # it ended meanwhile
        os.kill(os.getpid(), signal.SIGTERM)


def start(argv: List[str], started: float, parent: int, ignored: Tuple[int, ...]) -> int:
    options, command = read_words(argv)
    if options.help or options.version:
        write_stdout(format_help(options.help) if options.help else "AppPot {}\n".format(VERSION))
        return 0
    if options.doctor or options.boot or options.json:
        return examine(options, command)

    options.write = options.write or is_written_as_then(options)
    if options.die_with_parent:
        follow_parent(parent)
    spec = build_spec(options, command, ignored)
    if options.dry_run:
        write_stdout(quote(*spec.carrier.build_argv(spec.vmm.build_argv(spec.guest))) + "\n")
        return 0

    result = run(spec, started)
    if result.out_of_memory and spec.limit_mib:
        use_up_memory(spec.limit_mib)
    if result.signal and spec.in_job:
        die_of(result.signal)
    return result.status


def main(argv: List[str]) -> int:
    started = time.time()
    parent = os.getppid()
    open_standard_descriptors()
    ignored = find_ignored_signals(parent)
    # A caller may ignore it, and then nobody can wait for a child.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        return start(argv, started, parent, ignored)
    except Fatal as fatal:
        return report(fatal)
    except Exception as error:
        return report(explain_exception(error))


def work(*_ended: object) -> None:
    try_libc("malloc_trim", 0)
    os._exit(main(sys.argv[1:]))                  # Python would wait for a thread that reads stdin


class ScriptEnded(Exception):
    """Nothing failed."""


if __name__ == "__main__":
    # CPython keeps the syntax tree of a script in memory until the script has ended, 17 MiB for this one: 64 runs
    # on a node would take 1 GiB for nothing. It ends by an exception, and the work is done by what shows those.
    if sys._getframe().f_back:                    # a debugger runs it
        work()
    sys.excepthook = work
    raise ScriptEnded
