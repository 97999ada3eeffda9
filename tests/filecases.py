# SPDX-License-Identifier: Apache-2.0
"""Small cases of what files do. A test runs this on the host and in a guest and compares the output.

Usage: python3 filecases.py DIRECTORY [CASE]...

Each case works in a new directory below DIRECTORY and returns what it saw: values that are the same
on every machine, such as contents, names of errors, and which times have changed. The output has a
line for each case: its name, a tab, and that value.
"""

import ast
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import sys
import time
import traceback

LIBC = ctypes.CDLL(None, use_errno=True)
MIB = 1 << 20
GIB = 1 << 30
# Files of a large directory.
COUNT = int(os.environ.get("APPPOT_TEST_FILES", "2000"))
CREATE = os.O_CREAT | os.O_RDWR
CASE_S = 60
CASES = []

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
O_TMPFILE = os.O_TMPFILE


class TooLong(BaseException):
    """A case that waits for what does not come."""


def stop_case(*_):
    raise TooLong


def case(function):
    CASES.append(function)
    return function


def attempt(call, *words, **options):
    """What a call returns, or the name of its error."""
    try:
        return call(*words, **options)
    except OSError as error:
        return errno.errorcode[error.errno]


def call_libc(name, *words):
    """A function of the C library by name; integers may have 64 bits."""
    longs = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
    result = getattr(LIBC, name)(*longs)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


def rename_by(flags, old, new):
    return call_libc("renameat2", AT_FDCWD, old.encode(), AT_FDCWD, new.encode(), flags)


def link_open(number, name):
    """Give an open file a name. os.link does not follow symlinks, whatever it is told."""
    place = f"/proc/self/fd/{number}".encode()
    return call_libc("linkat", AT_FDCWD, place, AT_FDCWD, name.encode(), AT_SYMLINK_FOLLOW)


def set_times(path, atime, mtime, flags=0):
    times = struct.pack("4q", *atime, *mtime)
    return call_libc("utimensat", AT_FDCWD, path.encode(), times, flags)


def write(path, content=b"", flags=CREATE, mode=0o666):
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        file.write(content)


def read(path):
    with open(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def opened(path, flags=CREATE, mode=0o666):
    number = os.open(path, flags, mode)
    try:
        yield number
    finally:
        with contextlib.suppress(OSError):  # the case has closed it
            os.close(number)


def in_child(action):
    """What an action returns in a child process, or how the child died."""
    reader, writer = os.pipe()
    pid = os.fork()

    if pid == 0:
        with contextlib.suppress(BaseException):
            os.write(writer, repr(attempt(action)).encode())
            os._exit(0)
        os._exit(9)

    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitpid(pid, 0)[1]
    return ast.literal_eval(text) if text else ("died", status)


def shape(path, follow=True):
    """What stat tells of a file that is the same everywhere."""
    status = os.stat(path, follow_symlinks=follow)
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return (oct(status.st_mode), status.st_nlink, size, status.st_uid, status.st_gid)


def wait_for_tick():
    """Return when the clock of the file system has moved on."""
    write("tick")
    before = os.stat("tick").st_ctime_ns
    deadline = time.monotonic() + 1
    while os.stat("tick").st_ctime_ns == before and time.monotonic() < deadline:
        os.utime("tick")
    os.unlink("tick")


# --- Times ----------------------------------------------------------------------------------------


@case
def times_have_nanoseconds():
    write("f")
    seen = []
    for atime, mtime in ((123456789_123456789, 1987654321_987654321), (1, 0), (-1500000000_1, -1)):
        os.utime("f", ns=(atime, mtime))
        status = os.stat("f")
        seen.append((status.st_atime_ns, status.st_mtime_ns))

    os.mkdir("d")
    os.utime("d", ns=(5, 6))
    os.symlink("nowhere", "l")
    os.utime("l", ns=(7, 8), follow_symlinks=False)
    with opened("f") as number:
        os.utime(number, ns=(9, 10))
    return seen, [
        (os.lstat(name).st_atime_ns, os.lstat(name).st_mtime_ns) for name in ("d", "l", "f")
    ]


@case
def touch_sets_now():
    write("f")
    os.utime("f", ns=(1, 1))
    os.utime("f")
    status = os.stat("f")
    return abs(time.time() - status.st_mtime) < 5, status.st_atime_ns == status.st_mtime_ns


@case
def times_are_set_one_by_one():
    write("f")
    os.utime("f", ns=(111, 222))
    omit, now = (0, UTIME_OMIT), (0, UTIME_NOW)
    seen = []

    for atime, mtime in ((omit, (3, 3)), ((4, 4), omit), (omit, omit), (now, omit), (omit, now)):
        set_times("f", atime, mtime)
        status = os.stat("f")
        seen += [
            "now" if value > 10**18 else value for value in (status.st_atime_ns, status.st_mtime_ns)
        ]
    return seen, attempt(set_times, "f", (0, 10**9), omit)


@case
def what_changes_times():
    os.mkdir("d")
    os.mkdir("e")
    write("d/f", b"text")
    write("d/other")
    os.symlink("f", "d/l")
    numbers = [os.open("d/f", os.O_RDWR), os.open("d/f", os.O_RDWR | os.O_APPEND)]

    actions = [
        lambda: os.write(numbers[0], b"x"),
        lambda: os.write(numbers[1], b"x"),
        lambda: os.write(numbers[0], b""),
        lambda: os.pread(numbers[0], 2, 0),
        lambda: os.truncate("d/f", 2),
        lambda: os.truncate("d/f", 2),
        lambda: os.ftruncate(numbers[0], 2),
        lambda: os.ftruncate(numbers[0], 9),
        lambda: os.close(os.open("d/f", os.O_RDWR | os.O_TRUNC)),
        lambda: os.close(os.open("d/f", os.O_RDWR | os.O_TRUNC)),
        lambda: os.posix_fallocate(numbers[0], 0, 100),
        lambda: os.chmod("d/f", 0o640),
        lambda: os.chmod("d/f", 0o640),
        lambda: os.chown("d/f", os.getuid(), os.getgid()),
        lambda: os.utime("d/f", ns=(1, 1)),
        lambda: os.link("d/f", "e/hard"),
        lambda: os.unlink("e/hard"),
        lambda: os.setxattr("d/f", "user.a", b"1"),
        lambda: os.removexattr("d/f", "user.a"),
        lambda: os.rename("d/f", "d/g"),
        lambda: os.rename("d/g", "e/g"),
        lambda: os.rename("e/g", "d/f"),
        lambda: os.rename("d/other", "d/f"),
        lambda: os.mkdir("d/sub"),
        lambda: os.rmdir("d/sub"),
        lambda: os.readlink("d/l"),
        lambda: os.mkfifo("d/fifo"),
        lambda: os.listdir("d"),
    ]

    def times_of_all():
        places = [*numbers, "d", "e"]
        return [
            (status.st_mtime_ns, status.st_ctime_ns)
            for status in (os.fstat(p) if isinstance(p, int) else os.stat(p) for p in places)
        ]

    seen = []
    for action in actions:
        before = times_of_all()
        wait_for_tick()
        result = attempt(action)
        pairs = zip(before, times_of_all())
        changes = ["".join("mc"[i] for i in (0, 1) if old[i] != new[i]) for old, new in pairs]
        seen.append((result if isinstance(result, str) else "", *changes))
    return seen


@case
def atime_of_a_read():
    write("f", b"x" * 10)
    os.utime("f", ns=(1, 2))
    read("f")
    first = os.stat("f").st_atime_ns > 2
    os.utime("f", ns=(1, 2))
    with opened("f", os.O_RDONLY | os.O_NOATIME) as number:
        os.read(number, 5)
    return first, os.stat("f").st_atime_ns


@case
def mtime_after_mapped_writes():
    write("f", bytes(8192))
    os.utime("f", ns=(1, 1))
    with opened("f") as number, mmap.mmap(number, 8192) as mapped:
        mapped[5] = 1
        mapped.flush()
    return os.stat("f").st_mtime_ns > 1


# --- Opening --------------------------------------------------------------------------------------


@case
def flags_of_open():
    write("f", b"12345")
    os.mkdir("d")
    os.symlink("f", "l")
    os.symlink("new", "dangling")
    os.symlink("newer", "dangling2")
    os.symlink("loop", "loop")
    os.mkfifo("fifo")
    flags = {
        "excl": os.O_CREAT | os.O_EXCL | os.O_WRONLY,
        "creat": os.O_CREAT | os.O_WRONLY,
        "rd": os.O_RDONLY,
        "wr": os.O_WRONLY,
        "dir": os.O_DIRECTORY,
        "nofollow": os.O_NOFOLLOW,
        "path": os.O_PATH,
        "path nofollow": os.O_PATH | os.O_NOFOLLOW,
        "path dir": os.O_PATH | os.O_DIRECTORY,
        "excl alone": os.O_EXCL,
        "trunc": os.O_RDWR | os.O_TRUNC,
        "sync": os.O_RDWR | os.O_SYNC,
        "dsync": os.O_RDWR | os.O_DSYNC,
        "noatime": os.O_NOATIME,
        "async": os.O_ASYNC,
        "nonblock": os.O_RDWR | os.O_NONBLOCK,
    }
    names = ["f", "d", "l", "dangling", "none", "f/", "d/", "l/", "f/x", "d/.", "d/..", "loop", ""]
    seen = []

    for name in names:
        for word, number in flags.items():
            made = attempt(os.open, name, number)
            if isinstance(made, int):
                status = os.fstat(made)
                os.close(made)
                made = (stat.S_IFMT(status.st_mode), os.path.lexists("new"))
            seen.append((name, word, made))
            with contextlib.suppress(OSError):
                os.unlink("none" if name == "none" else "new")
            write("f", b"12345")

    wrong = os.O_WRONLY | os.O_NONBLOCK
    return seen, attempt(os.open, "fifo", wrong), attempt(os.open, "none/x", os.O_CREAT)


@case
def a_file_made_read_only_is_written():
    seen = []
    for mode in (0o444, 0o200, 0o000):
        name = f"f{mode}"
        with opened(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode) as number:
            seen += [os.write(number, b"text"), os.pread(number, 9, 0), shape(name)]
    return seen


@case
def opening_truncates():
    write("f", b"12345")
    with opened("f", os.O_RDONLY) as reader:
        os.close(os.open("f", os.O_WRONLY | os.O_TRUNC))
        seen = [os.fstat(reader).st_size, os.pread(reader, 9, 0)]
        write("f", b"ab", os.O_WRONLY)
        os.close(os.open("f", os.O_CREAT | os.O_TRUNC | os.O_WRONLY))
        return [*seen, os.pread(reader, 9, 0), os.stat("f").st_size]


@case
def appending():
    flags = os.O_CREAT | os.O_RDWR | os.O_APPEND
    with opened("f", flags) as one, opened("f", flags) as two, opened("f") as plain:
        for number, text in ((one, b"a"), (two, b"b"), (plain, b"C"), (one, b"c"), (two, b"d" * 5000)):
            os.write(number, text)
        os.lseek(one, 0, 0)
        os.write(one, b"end")
        os.pwrite(one, b"also at the end", 0)
        content = os.pread(plain, 9999, 0)

        fcntl.fcntl(plain, fcntl.F_SETFL, os.O_APPEND)
        os.write(plain, b"!")
        fcntl.fcntl(plain, fcntl.F_SETFL, 0)
        os.lseek(plain, 1, 0)
        os.write(plain, b"?")
        os.ftruncate(two, 1)
        os.write(two, b"2")
        return content[:9], content[-20:], len(content), read("f"), os.lseek(one, 0, 1)


@case
def nameless_files():
    seen = []
    with opened(".", O_TMPFILE | os.O_RDWR, 0o640) as number:
        os.write(number, b"text")
        status = os.fstat(number)
        seen += [status.st_nlink, oct(status.st_mode), os.listdir(".")]
        link_open(number, "named")
        seen += [read("named"), os.fstat(number).st_nlink, shape("named")]
        os.write(number, b" more")
        seen += [read("named")]

    with opened(".", O_TMPFILE | os.O_WRONLY | os.O_EXCL) as number:
        seen += [attempt(link_open, number, "other")]
    return seen, attempt(os.open, ".", O_TMPFILE | os.O_RDONLY), os.listdir(".")


@case
def open_files_that_were_removed():
    write("f", b"text")
    write("g", b"other")
    os.mkdir("d")
    with opened("f") as one, opened("g") as two, opened("d", os.O_RDONLY) as directory:
        os.unlink("f")
        seen = [os.pread(one, 9, 0), os.pwrite(one, b"T", 0), os.fstat(one).st_nlink]
        os.ftruncate(one, 2)
        os.fchmod(one, 0o600)
        os.utime(one, ns=(1, 2))
        os.posix_fallocate(one, 0, 20)
        status = os.fstat(one)
        seen += [status.st_size, oct(status.st_mode), status.st_atime_ns, os.pread(one, 9, 0)]
        seen += [attempt(os.stat, "f"), os.readlink(f"/proc/self/fd/{one}").endswith("f (deleted)")]
        with opened(f"/proc/self/fd/{one}", os.O_RDWR) as again:
            seen += [os.write(again, b"again"), os.pread(one, 5, 0)]
        os.setxattr(one, "user.a", b"b")
        seen += [os.getxattr(one, "user.a"), os.listxattr(one)]
        seen += [attempt(link_open, one, "f")]

        write("h", b"new")
        os.rename("h", "g")
        seen += [os.pread(two, 9, 0), os.fstat(two).st_nlink, read("g")]

        os.rmdir("d")
        seen += [os.listdir(directory), attempt(os.open, "x", CREATE, dir_fd=directory)]
        seen += [attempt(os.mkdir, "x", dir_fd=directory), os.fstat(directory).st_nlink]
    return seen


@case
def a_removed_working_directory():
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    return (
        attempt(os.getcwd),
        attempt(os.mkdir, "x"),
        attempt(os.open, "x", CREATE),
        attempt(os.stat, "x"),
    )


# --- Space ----------------------------------------------------------------------------------------


@case
def modes_of_fallocate():
    seen = []
    # keep size; punch hole; collapse, which FUSE does not have; zero range
    for mode in (0, 1, 2, 3, 0x10, 0x11):
        write("f", b"x" * 20000)
        with opened("f") as number:
            seen.append(attempt(call_libc, "fallocate", number, mode, 4096, 8192))
            seen.append(attempt(call_libc, "fallocate", number, mode, 16384, 16384))
            content = read("f")
            seen += [len(content), content.count(b"x"), content.find(b"\0"), content.rfind(b"\0")]
            seen += [os.fstat(number).st_blocks]
        os.unlink("f")

    with opened("f") as number, opened("f", os.O_RDONLY) as reader, opened(".", os.O_RDONLY) as here:
        for words in ((number, 0, 0, 0), (number, 0, -1, 5), (reader, 0, 0, 5), (here, 0, 0, 5)):
            seen.append(attempt(call_libc, "fallocate", *words))
        seen.append(attempt(call_libc, "fallocate", number, 0, 0, 1 << 62))
        seen.append(attempt(call_libc, "fallocate", number, 2, 0, 4096))
    return seen


@case
def data_and_holes():
    with opened("f") as number:
        os.pwrite(number, b"a" * 4096, MIB)
        os.pwrite(number, b"b" * 4096, 3 * MIB)
        os.ftruncate(number, 5 * MIB)
        os.fsync(number)
        places = [0, 100, MIB, MIB + 1, MIB + 4096, 3 * MIB, 4 * MIB, 5 * MIB, 9 * MIB]
        seen = [
            attempt(os.lseek, number, place, way)
            for place in places
            for way in (os.SEEK_DATA, os.SEEK_HOLE)
        ]
        blocks = os.fstat(number).st_blocks
        seen += [attempt(os.lseek, number, -1, way) for way in range(3)]
    os.truncate("f", MIB)
    return seen, blocks, os.stat("f").st_blocks


@case
def tails_are_zero():
    write("f", b"x" * 10000)
    os.truncate("f", 5000)
    os.truncate("f", 12000)
    content = read("f")
    with opened("f") as number:
        os.pwrite(number, b"end", 30000)
    return content.count(b"x"), content[5000:] == bytes(7000), read("f")[12000:30000] == bytes(18000)


@case
def copying_ranges():
    content = bytes(range(256)) * 1000
    write("f", content)
    os.mkdir("d")
    seen = []

    with opened("f", os.O_RDONLY) as source, opened("d/g") as target:
        for words in ((256000,), (1000, 300, 256000), (9999, 255000, 0), (10, 999999, 0), (0, 0, 0)):
            seen.append(attempt(os.copy_file_range, source, target, *words))
        seen.append(read("d/g") == content[255000:256000] + content[1000:] + content[300:1300])
        seen.append(attempt(os.copy_file_range, target, source, 10))
        seen.append(attempt(os.sendfile, target, source, 0, 5000))

    with opened("f") as number:
        seen.append(attempt(os.copy_file_range, number, number, 100, 0, 50))
        seen.append(attempt(os.copy_file_range, number, number, 100, 0, 100))
        seen.append(read("f")[:300] == content[:100] * 2 + content[200:300])
    with opened(".", os.O_RDONLY) as here, opened("f") as number:
        seen.append(attempt(os.copy_file_range, here, number, 5, 0, 0))
    return seen


@case
def files_over_4_gib():
    with opened("f") as number:
        os.ftruncate(number, 6 * GIB)
        os.pwrite(number, b"high", 5 * GIB + 3)
        os.lseek(number, 4 * GIB + 1, 0)
        os.write(number, b"middle")
        seen = [os.lseek(number, 0, 1), os.fstat(number).st_size, os.pread(number, 8, 5 * GIB + 2)]
        seen += [os.lseek(number, 0, os.SEEK_DATA), os.lseek(number, 5 * GIB, os.SEEK_DATA)]

        with mmap.mmap(number, 8192, offset=5 * GIB) as mapped:
            seen.append(mapped[:8])
            mapped[4096:4100] = b"page"
            mapped.flush()
        seen += [os.pread(number, 4, 5 * GIB + 4096), os.pread(number, 4, GIB + 4096)]
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5 * GIB)
        seen += [in_child(lambda: try_fcntl("f", fcntl.F_WRLCK, 5 * GIB, 1))]
        seen += [in_child(lambda: try_fcntl("f", fcntl.F_WRLCK, GIB, 1))]
        os.ftruncate(number, 4 * GIB + 3)
        return seen, os.stat("f").st_size, os.pread(number, 99, 4 * GIB), os.lseek(number, 0, 2)


@case
def sizes_beyond_all():
    with opened("f") as number:
        return (
            attempt(os.ftruncate, number, 1 << 62),
            attempt(os.ftruncate, number, -1),
            attempt(os.pwrite, number, b"x", 1 << 62),
            attempt(os.pwrite, number, b"x", -1),
            attempt(os.pread, number, 5, 1 << 62),
            attempt(os.lseek, number, -1, 0),
            os.fstat(number).st_size,
        )


@case
def limits_of_the_file_size():
    def write_beyond():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with opened("f") as number:
            seen = [attempt(os.write, number, b"x" * 9000), attempt(os.write, number, b"y")]
            seen += [attempt(os.ftruncate, number, 5001), attempt(os.posix_fallocate, number, 0, 9000)]
            return [*seen, os.fstat(number).st_size]

    def die():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with opened("g") as number:
            return os.pwrite(number, b"x", 9000)

    return in_child(write_beyond), in_child(die)


@case
def state_of_the_file_system():
    state = os.statvfs(".")
    with opened("f") as number:
        same = os.fstatvfs(number)
    return (
        (state.f_namemax, state.f_blocks, state.f_frsize, state.f_bsize, state.f_files),
        abs(state.f_bavail - same.f_bavail) < 100000,
        0 < state.f_bavail <= state.f_bfree <= state.f_blocks,
        state.f_flag & 1,
    )


# --- Names ----------------------------------------------------------------------------------------


@case
def renaming():
    os.makedirs("d/sub")
    os.makedirs("full/x")
    os.mkdir("empty")
    for name in ("f", "g", "d/f"):
        write(name, name.encode())
    os.link("f", "hard")
    pairs = [
        ("f", "hard"), ("f", "empty"), ("empty", "f"), ("d", "full"), ("d", "d/sub/x"),
        ("d", "d"), ("none", "f"), (".", "x"), ("d", "."), ("..", "x"), ("f", "x/"), ("f/", "x"),
        ("d/", "dd"), ("dd", "e/"), ("e", "empty"), ("empty", "d"), ("g", "d/f"), ("d/f/x", "y"),
        ("d/f", "/dev/shm/x"), ("f", "n" * 256), ("f", ""), ("full/x", "full"), ("full", "full/x"),
    ]
    seen = [(pair, attempt(os.rename, *pair)) for pair in pairs]
    return seen, sorted(os.listdir(".")), sorted(os.listdir("d")), read("d/f")


@case
def renaming_with_flags():
    os.makedirs("d/sub")
    write("f", b"f")
    write("g", b"g")
    triples = [
        (RENAME_NOREPLACE, "f", "g"), (RENAME_NOREPLACE, "f", "new"), (RENAME_NOREPLACE, "d", "g"),
        (RENAME_EXCHANGE, "new", "g"), (RENAME_EXCHANGE, "new", "d"), (RENAME_EXCHANGE, "g", "none"),
        (RENAME_EXCHANGE, "new", "new/sub"), (3, "f", "g"), (RENAME_NOREPLACE, "none", "x"),
        (RENAME_NOREPLACE, "g", "g"), (64, "g", "h"),
    ]
    seen = [(triple, attempt(rename_by, *triple)) for triple in triples]
    return seen, sorted(os.listdir(".")), read("g"), read("d"), os.listdir("new")


@case
def renamed_files_stay_open():
    os.makedirs("d/e")
    write("d/f", b"1")
    with opened("d/f") as number, opened("d/e", os.O_RDONLY) as below:
        os.rename("d/f", "g")
        os.rename("d", "moved")
        os.write(number, b"2")
        seen = [read("g"), os.readlink(f"/proc/self/fd/{number}")[-2:]]
        os.mkdir("x", dir_fd=below)
        os.chdir("moved/e")
        os.rename("../../moved", "../../again")
        return seen, os.getcwd()[-8:], os.listdir("."), os.listdir("../..") == ["again", "g"] or sorted(
            os.listdir("../..")
        )


@case
def hard_links():
    write("f", b"text")
    os.mkdir("d")
    os.link("f", "d/g")
    same = os.stat("f").st_ino == os.stat("d/g").st_ino
    write("d/g", b"TEXT", os.O_WRONLY)
    seen = [same, shape("f"), read("f"), os.path.samefile("f", "d/g")]
    os.chmod("d/g", 0o600)
    os.utime("f", ns=(5, 6))
    seen += [shape("f"), os.stat("d/g").st_mtime_ns]
    os.unlink("f")
    seen += [shape("d/g"), os.listdir(".")]

    os.symlink("d/g", "l")
    os.link("l", "l2", follow_symlinks=False)
    call_libc("linkat", AT_FDCWD, b"l", AT_FDCWD, b"g2", AT_SYMLINK_FOLLOW)
    seen += [os.readlink("l2"), shape("l2", follow=False)[1], shape("g2")]
    for pair in (("d", "d2"), ("d/g", "l"), ("none", "x"), ("d/g", "/dev/shm/x"), ("d/g", "d/g/x")):
        seen.append(attempt(os.link, *pair))
    return seen, [os.stat(name).st_nlink for name in (".", "d")]


@case
def links_of_directories():
    counts = [os.stat(".").st_nlink]
    for name in ("a", "b", "a/c"):
        os.mkdir(name)
        counts += [os.stat(".").st_nlink, os.stat("a").st_nlink]
    os.rename("a/c", "b/c")
    counts += [os.stat("a").st_nlink, os.stat("b").st_nlink]
    os.rmdir("b/c")
    return counts, os.stat("b").st_nlink, os.stat("b/..").st_ino == os.stat(".").st_ino


@case
def symlinks():
    targets = {
        "plain": "f", "long": "x/" * 2000 + "y" * 95, "absolute": "/no/such", "dots": "../../../..",
        "odd": os.fsdecode(b"\xff\n*"), "self": "self",
    }
    for name, target in targets.items():
        os.symlink(target, name)
    seen = [os.readlink(name) == target for name, target in targets.items()]
    seen += [os.lstat(name).st_size for name in targets]
    seen += [attempt(os.path.exists, name) for name in targets]
    seen += [attempt(os.open, name, os.O_RDONLY) for name in ("plain", "self", "absolute")]
    seen += [attempt(os.symlink, "x" * 4096, "y"), attempt(os.symlink, "", "y")]
    seen += [attempt(os.symlink, "x", "plain"), attempt(os.symlink, "x", "none/y")]
    seen += [attempt(os.readlink, "."), attempt(os.readlink, "none"), shape("plain", follow=False)]

    write("f", b"text")
    previous = "f"
    for number in range(42):
        os.symlink(previous, f"chain{number}")
        previous = f"chain{number}"
    seen += [attempt(read, "chain39"), attempt(read, "chain40")]

    with opened("plain", os.O_PATH | os.O_NOFOLLOW) as number:
        seen += [os.readlink("", dir_fd=number), attempt(os.read, number, 1)]
    os.chown("plain", os.getuid(), os.getgid(), follow_symlinks=False)
    write("plain", b"through", os.O_WRONLY | os.O_TRUNC)
    os.unlink("plain")
    return seen, read("f"), attempt(os.rmdir, "dots"), attempt(os.open, "self", CREATE)


@case
def fifos():
    os.mkfifo("p", 0o620)

    def say():
        with opened("p", os.O_WRONLY) as number:
            return os.write(number, b"through the pipe")

    pid = os.fork()
    if pid == 0:
        say()
        os._exit(0)
    text = read("p")
    os.waitpid(pid, 0)

    with opened("p", os.O_RDONLY | os.O_NONBLOCK) as reader:
        nothing = os.read(reader, 5)
        with opened("p", os.O_WRONLY | os.O_NONBLOCK) as writer:
            os.write(writer, b"x")
            return text, nothing, os.read(reader, 5), attempt(os.read, reader, 5), shape("p")


@case
def sockets():
    server = socket.socket(socket.AF_UNIX)
    server.bind("s")
    with socket.socket(socket.AF_UNIX) as early:
        refused = attempt(early.connect, "s")
    server.listen(1)

    with socket.socket(socket.AF_UNIX) as client:
        client.connect("s")
        other = server.accept()[0]
        other.sendall(b"hello")
        text = client.recv(9)
        other.close()

    again = socket.socket(socket.AF_UNIX)
    write("f")
    seen = [attempt(again.bind, "s"), attempt(again.connect, "f"), attempt(os.open, "s", os.O_RDONLY)]
    os.rename("s", "t")
    seen.append(attempt(again.connect, "t"))
    again.close()
    server.close()
    return refused, text, seen, shape("t"), os.unlink("t")


@case
def other_nodes():
    os.mknod("f", 0o640 | stat.S_IFREG)
    os.mknod("p", 0o606 | stat.S_IFIFO)
    os.mknod("s", 0o644 | stat.S_IFSOCK)
    seen = [shape(name) for name in "fps"]
    seen += [attempt(os.mknod, "d", 0o700 | stat.S_IFDIR), attempt(os.mknod, "f", stat.S_IFREG)]
    if os.getuid() != 0:
        seen += [attempt(os.mknod, "c", 0o600 | stat.S_IFCHR, os.makedev(1, 3))]
        seen += [attempt(os.mknod, "b", 0o600 | stat.S_IFBLK, os.makedev(7, 0))]
    return seen


@case
def names_of_all_bytes():
    names = {bytes([65, byte]) for byte in range(1, 256) if byte != ord("/")}
    names |= {b"...", b" ", b"a" * 255, b"\xff" * 255, b"\xc3\xa9", b"e\xcc\x81", b"..x", b"-", b"\n"}
    for name in names:
        write(name, name)
    seen = [set(os.listdir(b".")) == names, all(read(name) == name for name in names)]
    seen += [attempt(call, b"a" * 256) for call in (os.stat, os.mkdir, os.unlink, os.readlink)]
    seen += [attempt(os.open, "a" * 256, CREATE), attempt(os.symlink, "x", "a" * 256)]
    seen += [attempt(os.stat, "a/" * 2048), attempt(os.stat, "./" * 2047 + "A"), attempt(os.stat, "")]
    for name in names:
        os.unlink(name)
    return seen, os.listdir(".")


@case
def paths_over_4095_bytes():
    top = os.open(".", os.O_RDONLY)
    for _ in range(30):
        os.mkdir("n" * 200)
        os.chdir("n" * 200)
    write("f", b"deep")
    seen = [read("f"), os.listdir("."), shape("f")]
    length = attempt(os.getcwd)
    # What comes above the directory of the case has other names.
    seen += [length if length in errno.errorcode.values() else len(length) > 6000]
    os.rename("f", "../f")
    seen += [read("../f")]
    os.fchdir(top)
    seen += [sum(len(names) for *_, names, _ in os.fwalk("."))]
    shutil.rmtree("n" * 200)
    return seen, os.listdir(".")


@case
def upper_and_lower_case():
    for name in "aA":
        write(name, name.encode())
    os.rename("a", "b")
    return sorted(os.listdir(".")), read("A"), attempt(os.stat, "a")


# --- Directories ----------------------------------------------------------------------------------


@case
def a_listing_while_files_come_and_go():
    for number in range(COUNT):
        write(f"{number:05}")
    stay = {f"{number:05}" for number in range(0, COUNT, 2)}
    seen = []

    with os.scandir(".") as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count % 10 == 0 and count < COUNT:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{count + 1:05}")
                write(f"new{count}")

    again = os.listdir(".")
    found = [name for name in seen if name in stay]
    return (
        set(found) == stay,
        len(found) == len(stay),
        len(set(seen)) == len(seen),
        len(again),
        len(set(again)),
    )


@case
def a_listing_while_all_is_removed():
    for number in range(COUNT // 2):
        write(f"{number}")
    rounds = 0
    while rounds < 50:
        rounds += 1
        names = 0
        with os.scandir(".") as entries:
            for entry in entries:
                names += 1
                os.unlink(entry.name)
        if names == 0:
            break
    return rounds, os.listdir(".")


class Dirent(ctypes.Structure):
    _fields_ = [
        ("ino", ctypes.c_uint64),
        ("off", ctypes.c_int64),
        ("reclen", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    ]


@case
def places_in_a_directory():
    for number in range(500):
        write(f"f{number}")
    LIBC.opendir.restype = LIBC.readdir.restype = ctypes.c_void_p
    LIBC.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(LIBC.opendir(b"."))

    def next_name():
        entry = LIBC.readdir(stream)
        return Dirent.from_address(entry).name if entry else None

    places, names = [], []
    while True:
        places.append(LIBC.telldir(stream))
        names.append(next_name())
        if names[-1] is None:
            break

    seen = [len(names), len(set(names)), len(set(places)), {b".", b".."} < set(names)]
    chance = random.Random(1)
    wrong = 0
    for index in chance.sample(range(len(names)), 100):
        LIBC.seekdir(stream, ctypes.c_long(places[index]))
        wrong += next_name() != names[index]

    write("late")
    os.unlink("f7")
    LIBC.rewinddir(stream)
    again = set(iter(next_name, None))
    LIBC.closedir(stream)
    return seen, wrong, len(again), b"late" in again, b"f7" in again


@case
def listings_after_changes():
    """One open directory, read again after each change."""
    with opened(".", os.O_RDONLY) as here:
        seen = [os.listdir(here)]
        write("f")
        seen.append(os.listdir(here))
        os.mkdir("d")
        seen.append(sorted(os.listdir(here)))
        os.rename("f", "g")
        seen.append(sorted(os.listdir(here)))
        os.unlink("g")
        seen.append(sorted(os.listdir(here)))
    return seen


@case
def kinds_and_numbers_in_a_listing():
    """The kind may be left open, but not that of files, directories and symlinks."""
    write("f")
    os.mkdir("d")
    os.symlink("f", "l")
    os.mkfifo("p")
    os.mknod("s", stat.S_IFSOCK)
    LIBC.opendir.restype = LIBC.readdir.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(LIBC.opendir(b"."))
    seen = []

    while True:
        address = LIBC.readdir(stream)
        if not address:
            break
        entry = Dirent.from_address(address)
        number = os.lstat(entry.name).st_ino
        kind = entry.type if entry.name in (b".", b"..", b"d", b"f", b"l") else None
        seen.append((entry.name, kind, entry.ino == number))
    LIBC.closedir(stream)
    return sorted(seen)


# --- Ways to read and write -----------------------------------------------------------------------


@case
def past_the_cache():
    page = mmap.mmap(-1, 3 * 4096)
    page[:] = b"x" * 4096 + b"y" * 4096 + b"z" * 4096
    with opened("f", CREATE | os.O_DIRECT) as number, opened("f") as plain:
        seen = [os.pwritev(number, [page], 0), os.pread(plain, 9999999, 0).count(b"y")]
        os.pwrite(plain, b"plain", 4096)
        with mmap.mmap(-1, 4096) as target:
            seen += [os.preadv(number, [target], 4096), target[:6]]
            seen += [os.preadv(number, [target], 3 * 4096), os.preadv(number, [target], 8 * 4096)]
        seen += [os.fstat(number).st_size, attempt(os.ftruncate, number, 5000)]
        with mmap.mmap(-1, 8192) as target:
            seen += [os.preadv(number, [target], 0), target[4990:5010]]
    return seen, len(read("f"))


@case
def past_the_cache_with_other_descriptors():
    """Blocks by O_DIRECT, bytes by the page cache, in turns."""
    page = mmap.mmap(-1, 4096)
    wrong = 0
    with opened("f", CREATE | os.O_DIRECT) as number, opened("f") as plain:
        for turn in range(100):
            page[:] = bytes([turn]) * 4096
            os.pwritev(number, [page], turn % 3 * 4096)
            wrong += os.pread(plain, 4096, turn % 3 * 4096) != page[:]
            os.pwrite(plain, b"?" * 10, turn % 3 * 4096 + 5)
            os.preadv(number, [page], turn % 3 * 4096)
            wrong += page[:20] != bytes([turn]) * 5 + b"?" * 10 + bytes([turn]) * 5
    return wrong


@case
def parts_of_reads_and_writes():
    with opened("f") as number:
        seen = [os.writev(number, [b"ab", b"", b"cde" * 3000]), os.pwritev(number, [b"X", b"YZ"], 4)]
        parts = [bytearray(3), bytearray(5)]
        seen += [os.preadv(number, parts, 2), parts, os.read(number, 5), os.pread(number, 0, 0)]
        seen += [os.write(number, b""), os.pread(number, 100, 9000), os.pread(number, 100, 99999)]
        seen += [os.pwrite(number, b"!", 20000), os.pread(number, 5, 19998), os.fstat(number).st_size]
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.fsync(number)
        os.fdatasync(number)
        seen += [os.pread(number, 3, 2)]
    reader, writer = os.pipe()
    with opened("f", os.O_RDONLY) as number:
        seen += [attempt(os.splice, number, writer, 100, 4), os.read(reader, 100)] if hasattr(os, "splice") else []
        seen += [os.sendfile(writer, number, 2, 50), os.read(reader, 100)]
    with opened("g") as number:
        os.write(writer, b"piped")
        seen += [os.splice(reader, number, 100), read("g")] if hasattr(os, "splice") else []
    os.sync()
    return seen


@case
def large_pieces():
    content = os.urandom(1000) * 9000
    write("f", content)
    with opened("f") as number:
        same = os.pread(number, 9000000, 0) == content
        os.pwrite(number, content[5:], 1234567)
        tail = os.pread(number, 9000000, 1234567) == content[5:]
    return same, tail, os.stat("f").st_size


@case
def misused_descriptors():
    write("f", b"text")
    with opened("f", os.O_RDONLY) as reader, opened("f", os.O_WRONLY) as writer, opened(
        ".", os.O_RDONLY
    ) as here, opened("f", os.O_PATH) as name:
        calls = [
            (os.write, reader, b"x"), (os.read, writer, 1), (os.ftruncate, reader, 1), (os.read, here, 1),
            (os.write, here, b"x"), (os.ftruncate, here, 0), (os.read, name, 1), (os.fchmod, name, 0o600),
            (os.ftruncate, name, 0), (os.fsync, name), (os.fsync, here), (os.fsync, reader),
            (os.lseek, here, 0, 0), (os.lseek, name, 0, 0), (os.pread, reader, 1, -5), (os.fchdir, reader),
            (os.listdir, reader), (os.fstat, name), (os.fchdir, here), (os.getxattr, name, "user.a"),
        ]
        results = [attempt(*words) for words in calls]
    return [result if isinstance(result, (str, bytes, int)) else "ok" for result in results]


@case
def misused_names():
    write("f")
    os.makedirs("d/full")
    os.symlink("d", "l")
    calls = [
        (os.unlink, "d"), (os.unlink, "none"), (os.unlink, "f/x"), (os.unlink, "f/"), (os.unlink, "l/"),
        (os.rmdir, "f"), (os.rmdir, "d"), (os.rmdir, "d/full/."), (os.rmdir, "d/full/.."), (os.rmdir, "l"),
        (os.rmdir, "none"), (os.rmdir, "l/"), (os.mkdir, "f"), (os.mkdir, "d"), (os.mkdir, "d/"),
        (os.mkdir, "none/x"), (os.mkdir, "f/x"), (os.mkdir, "l"), (os.mkdir, "."), (os.mkdir, ""),
        (os.truncate, "d", 0), (os.truncate, "none", 0), (os.truncate, "f", -1), (os.truncate, "f/", 0),
        (os.mkfifo, "f"), (os.mkfifo, "d/x/y"), (os.chmod, "none", 0), (os.chdir, "f"), (os.chdir, "none"),
        (os.listdir, "f"), (os.listdir, "none"), (os.listdir, "f/"), (os.readlink, "f"), (os.stat, "f/."),
        (os.stat, "f/.."), (os.stat, "l/full/../full/x"), (os.utime, "none"), (os.chown, "none", -1, -1),
        (os.statvfs, "none"), (os.statvfs, "f/x"), (os.access, "none", 0), (os.getxattr, "none", "user.a"),
        (os.symlink, "x", "d"), (os.symlink, "x", "f/x"), (os.symlink, "x", "x/"), (os.link, "f", "x/"),
        (os.rename, "d", "l"), (os.rename, "l", "d/full/l"), (os.mkdir, "new/"), (os.rmdir, "new/"),
    ]
    return [(words[0].__name__, words[1:], attempt(*words)) for words in calls]


# --- Mappings -------------------------------------------------------------------------------------


@case
def shared_mappings():
    write("f", bytes(3 * 4096))
    with opened("f") as number, mmap.mmap(number, 0) as one, mmap.mmap(number, 0) as two:
        one[4000:4200] = b"m" * 200
        seen = [two[3999:4203], os.pread(number, 204, 3999), read("f")[3999:4203] == two[3999:4203]]
        os.pwrite(number, b"written", 100)
        seen += [one[99:108]]
        seen += [in_child(lambda: one[:].count(b"m")), in_child(lambda: one.write(b"child"))]
        seen += [two[:6]]
        one.flush()
        os.ftruncate(number, 4 * 4096)
        one.resize(4 * 4096)
        one[-1:] = b"e"
        seen += [os.pread(number, 2, 4 * 4096 - 2)]
        os.unlink("f")
        one[:3] = b"abc"
        return [*seen, os.pread(number, 3, 0), len(one)]


@case
def private_mappings():
    write("f", b"a" * 8192)
    with opened("f", os.O_RDONLY) as number:
        with mmap.mmap(number, 0, access=mmap.ACCESS_COPY) as mapped:
            mapped[:3] = b"xyz"
            write("f", b"BBB", os.O_WRONLY)
            seen = [mapped[:5], read("f")[:5]]
        seen += [attempt(mmap.mmap, number, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)]
        seen += [attempt(mmap.mmap, number, 4096, mmap.MAP_SHARED, mmap.PROT_READ) is not None]
    with opened("f", os.O_WRONLY) as number:
        seen += [attempt(mmap.mmap, number, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)]
    with opened(".", os.O_RDONLY) as here:
        seen += [attempt(mmap.mmap, here, 4096, mmap.MAP_SHARED, mmap.PROT_READ)]
    return seen


@case
def mappings_beyond_the_end():
    write("f", b"x" * 5000)

    def touch(place):
        with opened("f") as number, mmap.mmap(number, 5000) as mapped:
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            if place < 0:
                os.ftruncate(number, 10)
            return ctypes.string_at(address + abs(place), 4)

    def grow():
        with opened("f") as number, mmap.mmap(number, 5000) as mapped:
            os.ftruncate(number, 100)
            os.ftruncate(number, 5000)
            return mapped[:].count(b"x")

    return in_child(lambda: touch(4998)), in_child(lambda: touch(-4096)), in_child(grow)


@case
def programs_run():
    shutil.copy(shutil.which("true"), "true")
    write("script", b"#!/bin/sh\necho $1 > out\n")
    seen = []

    for mode in (0o755, 0o644, 0o555):
        os.chmod("true", mode)
        seen.append(in_child(lambda: os.execv("./true", ["true"])))
    os.chmod("script", 0o755)
    pid = os.fork()
    if pid == 0:
        os.execv("./script", ["script", "said"])
    seen += [os.waitpid(pid, 0)[1], read("out")]

    with opened("script") as number:
        seen.append(in_child(lambda: os.execv("./script", ["script"])))
        os.fsync(number)
    return seen


# --- Attributes and access ------------------------------------------------------------------------


@case
def extended_attributes():
    write("f")
    os.mkdir("d")
    os.symlink("f", "l")
    os.mkfifo("p")
    seen = []
    for name in ("f", "d", "l", "p"):
        for key, value in (("user.a", b"1"), ("user.empty", b""), ("user.\xe9", bytes(range(256)))):
            seen.append(attempt(os.setxattr, name, key, value))
            seen.append(attempt(os.getxattr, name, key))
        seen.append(sorted(key for key in os.listxattr(name) if key.startswith("user.")))
    seen.append(attempt(os.setxattr, "l", "user.a", b"x", follow_symlinks=False))

    calls = [
        (os.setxattr, "f", "user.a", b"2", os.XATTR_CREATE), (os.setxattr, "f", "user.b", b"2", os.XATTR_REPLACE),
        (os.setxattr, "f", "user.a", b"2", os.XATTR_REPLACE), (os.getxattr, "f", "user.a"),
        (os.getxattr, "f", "user.none"), (os.removexattr, "f", "user.none"), (os.removexattr, "f", "user.a"),
        (os.setxattr, "f", "user." + "n" * 250, b"x"), (os.setxattr, "f", "user." + "n" * 251, b"x"),
        (os.setxattr, "f", "user.big", b"x" * 3000), (os.setxattr, "f", "user.big", b"x" * 65537),
        (os.setxattr, "f", "user.", b"x"), (os.setxattr, "f", "none.a", b"x"), (os.setxattr, "f", "a", b"x"),
        (os.getxattr, "f", "none.a"), (os.setxattr, "f", "system.none", b"x"),
    ]
    seen += [attempt(*words) for words in calls]
    if os.getuid() != 0:
        seen += [attempt(os.setxattr, "f", key, b"x") for key in ("trusted.a", "security.a")]
        seen += [attempt(os.getxattr, "f", "trusted.a")]

    os.link("f", "hard")
    seen += [len(os.getxattr("hard", "user.big"))]
    with opened("f") as number:
        os.setxattr(number, "user.z", b"by number")
    short = ctypes.create_string_buffer(3)
    seen += [attempt(call_libc, "getxattr", b"f", b"user.big", short, 3)]
    seen += [attempt(call_libc, "getxattr", b"f", b"user.big", None, 0)]
    seen += [attempt(call_libc, "listxattr", b"f", short, 3), os.getxattr("f", "user.z")]
    os.chmod("f", 0)
    return seen, attempt(os.getxattr, "f", "user.z"), attempt(os.setxattr, "f", "user.z", b"")


def build_acl(*entries):
    """An ACL as its attribute has it, of pairs (kind, permissions) or triples with an id."""
    kinds = {"user": 1, "a user": 2, "group": 4, "a group": 8, "mask": 16, "other": 32}
    packed = [
        struct.pack("<HHI", kinds[kind], bits, number[0] if number else 0xFFFFFFFF)
        for kind, bits, *number in entries
    ]
    return struct.pack("<I", 2) + b"".join(packed)


@case
def access_control_lists():
    write("f")
    os.chmod("f", 0o640)
    acl = build_acl(("user", 6), ("a user", 7, 1234), ("group", 4), ("mask", 5), ("other", 0))
    seen = [attempt(os.getxattr, "f", "system.posix_acl_access")]
    seen += [attempt(os.setxattr, "f", "system.posix_acl_access", acl), shape("f")[0]]
    seen += [attempt(os.getxattr, "f", "system.posix_acl_access") == acl, os.listxattr("f")]
    os.chmod("f", 0o662)
    seen += [shape("f")[0], attempt(os.getxattr, "f", "system.posix_acl_access"), shape("f")[0]]
    os.chmod("f", 0o604)
    seen += [attempt(os.getxattr, "f", "system.posix_acl_access")]
    seen += [attempt(os.removexattr, "f", "system.posix_acl_access"), shape("f")[0]]
    seen += [attempt(os.getxattr, "f", "system.posix_acl_access")]

    minimal = build_acl(("user", 7), ("group", 0), ("other", 1))
    seen += [attempt(os.setxattr, "f", "system.posix_acl_access", minimal), shape("f")[0]]
    seen += [os.listxattr("f"), attempt(os.setxattr, "f", "system.posix_acl_default", minimal)]
    wrong = [b"xx", acl[:-3], acl[:-8], build_acl(("user", 7)), struct.pack("<I", 1) + acl[4:]]
    seen += [attempt(os.setxattr, "f", "system.posix_acl_access", value) for value in wrong]
    return seen, shape("f")[0]


@case
def default_access_control_lists():
    os.mkdir("d")
    acl = build_acl(("user", 7), ("a user", 6, 1234), ("group", 5), ("mask", 7), ("other", 1))
    os.setxattr("d", "system.posix_acl_default", acl)
    os.umask(0o077)
    write("d/f")
    write("d/narrow", mode=0o640)
    os.mkdir("d/sub")
    os.mkdir("d/narrow-sub", 0o700)
    os.mkfifo("d/p")
    os.mknod("d/n", 0o666 | stat.S_IFREG)
    os.symlink("f", "d/l")
    made = attempt(os.open, "d", O_TMPFILE | os.O_RDWR, 0o666)
    if isinstance(made, int):
        link_open(made, "d/nameless")
        os.close(made)

    seen = []
    for name in sorted(os.listdir("d")):
        path = f"d/{name}"
        if name in ("l", "nameless"):
            continue
        seen += [(name, shape(path)[0], attempt(os.getxattr, path, "system.posix_acl_access"))]
        seen += [attempt(os.getxattr, path, "system.posix_acl_default")]
    os.removexattr("d", "system.posix_acl_default")
    write("d/after")
    return seen, shape("d/after")[0], attempt(os.getxattr, "d", "system.posix_acl_default")


@case
def masks():
    seen = []
    for mask in (0, 0o022, 0o027, 0o777):
        os.umask(mask)
        write(f"f{mask}")
        write(f"x{mask}", mode=0o777)
        os.mkdir(f"d{mask}")
        os.mkfifo(f"p{mask}")
        os.mknod(f"n{mask}", stat.S_IFREG | 0o666)
        os.symlink("x", f"l{mask}")
        seen += [shape(f"{letter}{mask}", follow=False)[0] for letter in "fxdpnl"]
    os.umask(0)
    os.mkdir("t", 0o7777)
    write("s", mode=0o7777)
    return seen, shape("t")[0], shape("s")[0]


@case
def inherited_groups():
    os.mkdir("d")
    seen = [attempt(os.chmod, "d", 0o2775)]
    os.mkdir("d/sub")
    write("d/f")
    os.mkdir("d/sub/below", 0o700)
    seen += [shape(name)[0] for name in ("d", "d/sub", "d/f", "d/sub/below")]
    seen += [os.stat(name).st_gid == os.getgid() for name in ("d/sub", "d/f")]
    if os.getuid() == 0:
        os.chown("d", -1, 1234)
        os.chmod("d", 0o2775)
        os.mkdir("d/s2")
        write("d/f2")
        write("d/f3", mode=0o2775)
        os.mknod("d/n", stat.S_IFREG | 0o644)
        os.symlink("x", "d/l")
        seen += [shape(name, follow=False) for name in ("d/s2", "d/f2", "d/f3", "d/n", "d/l")]
    return seen


@case
def special_bits_go():
    """setuid and setgid end where a file is changed by somebody who is not root."""
    actions = {
        "write": lambda: write("f", b"new", os.O_WRONLY),
        "truncate": lambda: os.truncate("f", 1),
        "open": lambda: write("f", b"", os.O_WRONLY | os.O_TRUNC),
        "chown": lambda: os.chown("f", os.getuid(), os.getgid()),
        "fallocate": lambda: fallocate_one("f"),
        "utime": lambda: os.utime("f"),
        "append": lambda: write("f", b"x", os.O_WRONLY | os.O_APPEND),
    }
    seen = []
    for name, action in actions.items():
        for mode in (0o6755, 0o2745, 0o4644):
            write("f", b"text")
            os.chmod("f", mode)
            action()
            seen.append((name, oct(mode), shape("f")[0]))
            os.unlink("f")
    return seen


def fallocate_one(path):
    with opened(path) as number:
        os.posix_fallocate(number, 0, 5000)


@case
def modes_of_own_files():
    """What the owner may do; every mode is tried in every way."""
    seen = []
    for mode in (0o000, 0o100, 0o200, 0o300, 0o400, 0o500, 0o600, 0o077, 0o4755, 0o1644):
        write("f", b"text")
        os.chmod("f", mode)
        row = [os.access("f", way) for way in (os.R_OK, os.W_OK, os.X_OK, os.F_OK)]
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_PATH):
            made = attempt(os.open, "f", flags)
            row.append(made if isinstance(made, str) else os.close(made))
        row += [attempt(os.truncate, "f", 3), attempt(os.utime, "f"), attempt(os.link, "f", "g")]
        row += [attempt(os.setxattr, "f", "user.a", b""), attempt(os.getxattr, "f", "user.a")]
        row += [attempt(os.unlink, "g"), shape("f")[0]]
        seen.append((oct(mode), row))
        os.unlink("f")
    return seen


@case
def a_write_only_file_is_written():
    write("f", b"a" * 6000)
    os.chmod("f", 0o200)
    with opened("f", os.O_WRONLY) as number:
        seen = [os.pwrite(number, b"new", 4094), os.pwrite(number, b"end", 5999)]
        os.fsync(number)
    with opened("f", os.O_WRONLY | os.O_APPEND) as number:
        seen += [os.write(number, b"more")]
    os.chmod("f", 0o600)
    return seen, read("f")[4090:4100], read("f")[-8:]


@case
def what_is_open_stays_open():
    write("f", b"text")
    os.mkdir("d")
    write("d/g", b"inside")
    with opened("f") as number, opened("d", os.O_RDONLY) as directory, opened("d/g") as inside:
        os.chmod("f", 0)
        os.chmod("d", 0)
        seen = [os.pread(number, 9, 0), os.pwrite(number, b"more", 4), os.pread(number, 9, 0)]
        os.ftruncate(number, 6)
        seen += [os.fstat(number).st_size, attempt(os.open, "f", os.O_RDONLY) == "EACCES"]
        seen += [os.listdir(directory), os.pread(inside, 9, 0), attempt(os.stat, "d/g") == "EACCES"]
        seen += [attempt(os.stat, "g", dir_fd=directory) == "EACCES", os.pwrite(inside, b"I", 0)]
    os.chmod("d", 0o700)
    return seen, read("d/g")


@case
def modes_of_own_directories():
    seen = []
    for mode in (0o000, 0o100, 0o200, 0o300, 0o400, 0o500, 0o600, 0o700):
        os.makedirs("d/sub")
        write("d/f", b"text")
        write("d/old")
        os.chmod("d", mode)
        calls = [
            (os.listdir, "d"), (read, "d/f"), (os.stat, "d/none"), (os.mkdir, "d/new"), (os.unlink, "d/old"),
            (os.rename, "d/f", "d/g"), (os.chdir, "d"),
        ]
        row = []
        for words in calls:
            result = attempt(*words)
            if words[0] is os.chdir and result is None:
                os.chdir("..")
            row.append(sorted(result) if isinstance(result, list) else result)
        seen.append((oct(mode), row))
        os.chmod("d", 0o700)
        shutil.rmtree("d")
    return seen


@case
def owners():
    write("f")
    mine = (os.getuid(), os.getgid())
    seen = [os.stat("f").st_uid == mine[0], os.stat("f").st_gid == mine[1]]
    seen += [attempt(os.chown, "f", *mine), attempt(os.chown, "f", -1, mine[1])]
    if os.getuid() != 0:
        seen += [attempt(os.chown, "f", 0, -1), attempt(os.chown, "f", -1, 0)]
    return seen


@case
def other_owners():
    """Root gives files away, and the new owners use them."""
    if os.getuid() != 0:
        return None
    os.chmod(".", 0o777)
    os.mkdir("sticky")
    os.chmod("sticky", 0o1777)
    for name, owner in (("f", 1234), ("g", 4321), ("sticky/f", 1234), ("sticky/g", 4321)):
        write(name, b"text")
        os.chown(name, owner, owner)
        os.chmod(name, 0o640)
    acl = build_acl(("user", 6), ("a user", 4, 1234), ("group", 0), ("mask", 6), ("other", 0))
    os.setxattr("g", "system.posix_acl_access", acl)

    def use():
        os.setgroups([])
        os.setgid(1234)
        os.setuid(1234)
        write("mine", b"x")
        os.mkdir("my")
        calls = [
            (read, "f"), (read, "g"), (write, "g", b"no"), (os.utime, "f"), (os.utime, "g"), (os.chmod, "g", 0),
            (os.unlink, "sticky/g"), (os.rename, "sticky/g", "sticky/h"), (os.chown, "f", 4321, -1),
            (os.unlink, "sticky/f"), (os.access, "f", 6), (os.access, "g", 6), (os.access, "g", 4),
            (os.link, "f", "hard"), (os.chmod, "f", 0o4711), (os.utime, "sticky/g", (1, 1)),
        ]
        return [attempt(*words) for words in calls]

    seen = in_child(use)
    return seen, [shape(name) for name in ("mine", "my", "f", "g")]


# --- Locks ----------------------------------------------------------------------------------------


def try_flock(path, way, flags=os.O_RDWR):
    with opened(path, flags) as number:
        return attempt(fcntl.flock, number, way | fcntl.LOCK_NB)


def lock_fcntl(number, command, kind, start, length):
    """fcntl by an explicit struct flock; what the kernel put into it."""
    request = struct.pack("hhqqi4x", kind, 0, start, length, 0)
    return struct.unpack("hhqqi4x", fcntl.fcntl(number, command, request))


def try_fcntl(path, kind, start, length, command=fcntl.F_SETLK):
    flags = os.O_RDONLY if kind == fcntl.F_RDLCK else os.O_RDWR
    with opened(path, flags) as number:
        result = attempt(lock_fcntl, number, command, kind, start, length)
        return result if isinstance(result, str) else "got"


@case
def whole_file_locks():
    write("f")
    os.mkdir("d")
    EX, SH, UN = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN  # noqa: N806
    with opened("f") as one, opened("f") as two:
        seen = [attempt(fcntl.flock, one, EX | fcntl.LOCK_NB), try_flock("f", SH), try_flock("f", EX)]
        seen += [attempt(fcntl.flock, two, SH | fcntl.LOCK_NB), in_child(lambda: try_flock("f", EX))]
        fcntl.flock(one, SH)
        seen += [try_flock("f", SH), try_flock("f", EX), attempt(fcntl.flock, two, SH | fcntl.LOCK_NB)]
        seen += [attempt(fcntl.flock, one, EX | fcntl.LOCK_NB), try_flock("f", SH, os.O_RDONLY)]
        fcntl.flock(two, UN)
        # An upgrade that fails may have lost the lock that was there.
        seen += [attempt(fcntl.flock, one, EX | fcntl.LOCK_NB), try_flock("f", SH)]

        copy = os.dup(one)
        os.close(one)
        seen += [try_flock("f", SH)]
        fcntl.flock(copy, UN)
        seen += [try_flock("f", EX)]
        fcntl.flock(copy, EX)
        seen += [in_child(lambda: attempt(fcntl.flock, copy, SH | fcntl.LOCK_NB)), try_flock("f", SH)]
        seen += [in_child(lambda: attempt(fcntl.flock, copy, UN)), try_flock("f", EX)]
        fcntl.flock(copy, EX)
        os.close(copy)
        seen += [try_flock("f", EX)]

    with opened("d", os.O_RDONLY) as directory:
        seen += [attempt(fcntl.flock, directory, EX | fcntl.LOCK_NB), try_flock("d", SH, os.O_RDONLY)]
    with opened("f", os.O_RDONLY) as reader:
        seen += [attempt(fcntl.flock, reader, EX | fcntl.LOCK_NB), try_flock("f", SH)]
    with opened("f", os.O_PATH) as name:
        seen += [attempt(fcntl.flock, name, EX)]
    return seen


@case
def inherited_whole_file_locks():
    """A lock lives as long as the last process that has the file open."""
    write("f")
    number = os.open("f", os.O_RDWR)
    fcntl.flock(number, fcntl.LOCK_EX)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)

    os.close(number)
    seen = [try_flock("f", fcntl.LOCK_SH)]
    os.close(writer)
    os.close(reader)
    os.waitpid(pid, 0)
    return seen, try_flock("f", fcntl.LOCK_EX)


@case
def ranges_of_locks():
    write("f", bytes(100))
    RD, WR, UN = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK  # noqa: N806

    def look(*kinds_and_places):
        return [in_child(lambda w=words: try_fcntl("f", *w)) for words in kinds_and_places]

    with opened("f") as one, opened("f") as two:
        for words in ((WR, 10, 10), (RD, 30, 10), (WR, 12, 2)):
            lock_fcntl(one, fcntl.F_SETLK, *words)
        seen = look((WR, 0, 10), (WR, 0, 11), (RD, 19, 1), (WR, 20, 10), (RD, 30, 5), (WR, 39, 1), (WR, 40, 0))
        # The same process has no conflict with itself.
        seen += [lock_fcntl(two, fcntl.F_SETLK, WR, 10, 10)[0]]
        lock_fcntl(one, fcntl.F_SETLK, UN, 13, 3)
        lock_fcntl(one, fcntl.F_SETLK, RD, 18, 2)
        lock_fcntl(one, fcntl.F_SETLK, WR, 35, 1)
        seen += look((WR, 12, 1), (WR, 13, 3), (WR, 16, 1), (RD, 18, 2), (RD, 35, 1), (RD, 34, 1), (RD, 36, 4))
        lock_fcntl(one, fcntl.F_SETLK, WR, 50, 0)
        seen += look((RD, 1 << 40, 1), (WR, 49, 1), (RD, 0, 0))
        seen += [attempt(lock_fcntl, one, fcntl.F_SETLK, WR, -5, 5)]
        seen += [attempt(lock_fcntl, one, fcntl.F_SETLK, WR, 60, -10)]
        lock_fcntl(one, fcntl.F_SETLK, UN, 0, 0)
        seen += look((WR, 0, 0))

    with opened("f", os.O_RDONLY) as reader, opened("f", os.O_WRONLY) as writer:
        seen += [attempt(lock_fcntl, reader, fcntl.F_SETLK, WR, 0, 1)]
        seen += [attempt(lock_fcntl, writer, fcntl.F_SETLK, RD, 0, 1)]
        seen += [attempt(fcntl.lockf, writer, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 95, os.SEEK_SET)]
        os.lseek(writer, 50, 0)
        seen += [attempt(fcntl.lockf, writer, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, -3, os.SEEK_CUR)]
        seen += [attempt(fcntl.lockf, writer, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, -100, os.SEEK_END)]
        seen += look((WR, 47, 1), (WR, 46, 1), (WR, 52, 1), (WR, 0, 1), (WR, 94, 1), (WR, 95, 1))
    return seen


@case
def closing_any_descriptor_releases():
    write("f")
    with opened("f") as number:
        lock_fcntl(number, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 0)
        seen = [in_child(lambda: try_fcntl("f", fcntl.F_WRLCK, 0, 0))]
        os.close(os.open("f", os.O_RDONLY))
        seen += [in_child(lambda: try_fcntl("f", fcntl.F_WRLCK, 0, 0))]

        lock_fcntl(number, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 0)
        # A child does not inherit the lock, and its closing releases nothing.
        seen += [in_child(lambda: attempt(lock_fcntl, number, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 0))]
        seen += [in_child(lambda: os.close(number)), in_child(lambda: try_fcntl("f", fcntl.F_RDLCK, 0, 0))]
        os.close(os.dup(number))
        return seen, in_child(lambda: try_fcntl("f", fcntl.F_WRLCK, 0, 0))


@case
def which_lock_is_in_the_way():
    write("f")
    RD, WR = fcntl.F_RDLCK, fcntl.F_WRLCK  # noqa: N806
    reader, writer = os.pipe()
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        with opened("f") as number:
            lock_fcntl(number, fcntl.F_SETLK, WR, 10, 5)
            lock_fcntl(number, fcntl.F_SETLK, RD, 20, 0)
            os.write(told, b"x")
            os.read(reader, 1)
        os._exit(0)

    os.read(ready, 1)
    seen = []
    with opened("f") as number:
        for words in ((WR, 0, 0), (RD, 12, 1), (RD, 20, 1), (WR, 30, 1), (WR, 15, 5), (RD, 0, 12)):
            # The last field is the holder's pid, which a guest does not tell.
            seen.append(lock_fcntl(number, fcntl.F_GETLK, *words)[:-1])
    os.close(writer)
    os.waitpid(pid, 0)
    return seen


@case
def locks_of_open_files():
    write("f")
    RD, WR, UN = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK  # noqa: N806
    with opened("f") as one, opened("f") as two:

        def ask(number, kind, start, length, command=F_OFD_SETLK):
            result = attempt(lock_fcntl, number, command, kind, start, length)
            return result if isinstance(result, str) or command == F_OFD_GETLK else "got"

        seen = [ask(one, WR, 0, 10), ask(two, WR, 5, 1), ask(two, RD, 10, 1), ask(two, RD, 0, 1)]
        seen += [ask(two, WR, 0, 1, F_OFD_GETLK), ask(one, WR, 10, 1)]
        # Locks of a process and of an open file exclude each other.
        seen += [ask(one, WR, 3, 1, fcntl.F_SETLK), ask(one, WR, 50, 5, fcntl.F_SETLK), ask(one, WR, 52, 1)]
        seen += [in_child(lambda: ask(one, WR, 0, 10)), in_child(lambda: ask(one, UN, 0, 5)), ask(two, WR, 0, 5)]
        copy = os.dup(one)
        os.close(one)
        seen += [ask(two, WR, 7, 1)]
        os.close(copy)
        seen += [ask(two, WR, 7, 1)]
    return seen, try_fcntl("f", WR, 0, 0)


@case
def both_kinds_of_locks():
    """flock and fcntl do not see each other."""
    write("f")
    with opened("f") as one:
        fcntl.flock(one, fcntl.LOCK_EX)
        seen = [in_child(lambda: try_fcntl("f", fcntl.F_WRLCK, 0, 0))]
        lock_fcntl(one, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 0)
        fcntl.flock(one, fcntl.LOCK_UN)
        return seen, in_child(lambda: try_flock("f", fcntl.LOCK_EX))


def wait_for_lock(take, release):
    """The order in which two processes have a lock, if the second waits for the first."""
    ready, told = os.pipe()
    release_read, release_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(release_write)
        with opened("f") as number:
            take(number)
            os.write(told, b"1")
            os.read(release_read, 1)
            os.write(told, b"2")
            release(number)
        os._exit(0)

    order = [os.read(ready, 1)]
    begun, begin = os.pipe()
    waiter = os.fork()
    if waiter == 0:
        os.close(release_write)
        with opened("f") as number:
            os.write(begin, b"x")
            take(number)
            os.write(told, b"3")
        os._exit(0)

    os.read(begun, 1)
    while read(f"/proc/{waiter}/stat").rpartition(b")")[2].split()[0] == b"R":
        pass
    os.close(release_write)
    os.close(release_read)
    os.waitpid(pid, 0)
    os.waitpid(waiter, 0)
    return [*order, os.read(ready, 9)]


@case
def locks_that_wait():
    write("f")
    WR, UN = fcntl.F_WRLCK, fcntl.F_UNLCK  # noqa: N806
    return (
        wait_for_lock(lambda n: fcntl.flock(n, fcntl.LOCK_EX), lambda n: fcntl.flock(n, fcntl.LOCK_UN)),
        wait_for_lock(lambda n: fcntl.flock(n, fcntl.LOCK_EX), os.close),
        wait_for_lock(
            lambda n: lock_fcntl(n, fcntl.F_SETLKW, WR, 0, 5), lambda n: lock_fcntl(n, fcntl.F_SETLK, UN, 0, 0)
        ),
        wait_for_lock(lambda n: lock_fcntl(n, fcntl.F_SETLKW, WR, 0, 5), os.close),
        wait_for_lock(lambda n: lock_fcntl(n, F_OFD_SETLKW, WR, 0, 5), lambda n: os._exit(0)),
    )


# --- Databases ------------------------------------------------------------------------------------


def count_in_database(mode):
    """Four processes count in one SQLite database."""
    with contextlib.closing(sqlite3.connect("db", isolation_level=None)) as database:
        journal = database.execute(f"pragma journal_mode={mode}").fetchone()
        database.execute("create table counts (value integer)")
        database.execute("insert into counts values (0)")
        database.execute("create table rows (who integer, number integer)")

    def count(who):
        with contextlib.closing(sqlite3.connect("db", timeout=60, isolation_level=None)) as mine:
            for number in range(25):
                mine.execute("begin immediate")
                mine.execute("update counts set value = value + 1")
                mine.execute("insert into rows values (?, ?)", (who, number))
                mine.execute("commit")

    pids = []
    for who in range(4):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                count(who)
                os._exit(0)
            os._exit(1)
        pids.append(pid)

    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    with contextlib.closing(sqlite3.connect("db")) as database:
        return (
            journal,
            statuses,
            database.execute("select value from counts").fetchone(),
            database.execute("select count(*) from rows").fetchone(),
            database.execute("pragma integrity_check").fetchone(),
        )


@case
def a_database_with_a_rollback_journal():
    return count_in_database("delete")


@case
def a_database_with_a_write_ahead_log():
    return count_in_database("wal")


# --- The program ----------------------------------------------------------------------------------


def main(argv):
    directory, *wanted = argv
    os.makedirs(directory, exist_ok=True)
    for function in CASES:
        if wanted and function.__name__ not in wanted:
            continue

        place = os.path.join(directory, function.__name__)
        os.mkdir(place)
        os.chdir(place)
        os.umask(0o022)
        signal.signal(signal.SIGALRM, stop_case)
        signal.alarm(CASE_S)
        try:
            result = function()
        except (Exception, TooLong):
            result = traceback.format_exc()

        signal.alarm(0)
        os.umask(0o022)
        os.chdir(directory)
        print(function.__name__, repr(result), sep="\t", flush=True)

    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
