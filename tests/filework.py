# SPDX-License-Identifier: Apache-2.0
"""What processes of several runs and of the host do with the same files at the same time.

Usage: python3 filework.py

Each line of stdin is a Python expression, most often a call of a function below. The answer is a
line: a pair of True and the value, or of False and a traceback.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import random
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import traceback

from filecases import (
    AT_FDCWD,
    CREATE,
    F_OFD_SETLK,
    F_OFD_SETLKW,
    RENAME_EXCHANGE,
    attempt,
    call_libc,
    opened,
    read,
    rename_by,
    shape,
    write,
)

# --- Several at once ------------------------------------------------------------------------------

WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
LOCKS = {
    "flock": lambda number, wait=True: call_libc(
        "flock", number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    ),
    "fcntl": lambda number, wait=True: call_libc(
        "fcntl", number, fcntl.F_SETLKW if wait else fcntl.F_SETLK, WHOLE_FILE
    ),
    "ofd": lambda number, wait=True: call_libc(
        "fcntl", number, F_OFD_SETLKW if wait else F_OFD_SETLK, WHOLE_FILE
    ),
}
HELD = {}


def count_under(kind, path, rounds):
    """Add one to the number in a file, again and again, each time under a lock."""
    for _ in range(rounds):
        with opened(path) as number:
            LOCKS[kind](number)
            value = int(os.pread(number, 20, 0) or b"0")
            os.pwrite(number, b"%d" % (value + 1), 0)


def win_names(count):
    """How many of so many names this process is the first to make."""
    won = 0
    for number in range(count):
        made = attempt(os.open, f"name{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        if isinstance(made, int):
            os.close(made)
            won += 1
    return won


def build_line(who, number):
    length = 5000 if number % 50 == 0 else number * 7 % 300
    return b"%d %d %s\n" % (who, number, b"x" * length)


def append_lines(path, who, count):
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
    for start in range(0, count, 10):
        with opened(path, flags) as number:
            for line in range(start, start + 10):
                os.write(number, build_line(who, line))


def are_lines_whole(path, whos, count):
    expected = [build_line(who, number) for who in range(whos) for number in range(count)]
    with open(path, "rb") as file:
        return sorted(file) == sorted(expected)


def insert_rows(path, who, count):
    """One transaction for each row, which also counts it."""
    with contextlib.closing(sqlite3.connect(path, timeout=120, isolation_level=None)) as database:
        for number in range(count):
            database.execute("begin immediate")
            database.execute("update counts set value = value + 1")
            database.execute("insert into rows values (?, ?)", (who, number))
            database.execute("commit")


def make_database(path, journal):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        made = database.execute(f"pragma journal_mode={journal}").fetchone()[0]
        database.execute("create table counts (value integer)")
        database.execute("insert into counts values (0)")
        database.execute("create table rows (who integer, number integer)")
    return made


def judge_database(path):
    queries = (
        "select value from counts",
        "select count(*) from rows",
        "select count(*) from (select distinct * from rows)",
        "pragma integrity_check",
    )
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [database.execute(query).fetchone()[0] for query in queries]


def take(kind, path, wait=True):
    """Get a lock and keep it until release()."""
    HELD[kind] = os.open(path, CREATE)
    result = attempt(LOCKS[kind], HELD[kind], wait)
    if result:
        os.close(HELD.pop(kind))
    return result or None


def release(kind):
    os.close(HELD.pop(kind))


def take_under_alarm(kind, path, restart):
    """What becomes of a lock that waits when a signal is handled: the result, the number of signals."""
    beats = []
    signal.signal(signal.SIGALRM, lambda *_: beats.append(1))
    signal.siginterrupt(signal.SIGALRM, not restart)
    signal.setitimer(signal.ITIMER_REAL, 0.3)

    with opened(path) as number:
        result = attempt(LOCKS[kind], number)
    return result or None, len(beats)


def kill_waiting(kind, path):
    """The status of a process that is killed while it waits for a lock."""
    begun, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        with opened(path) as number:
            os.write(begin, b"x")
            LOCKS[kind](number)
        os._exit(0)

    os.read(begun, 1)
    while read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0] == b"R":
        pass
    os.kill(pid, signal.SIGKILL)
    os.close(begun)
    os.close(begin)
    return os.waitpid(pid, 0)[1]


# --- Seen at once ---------------------------------------------------------------------------------

OLD = b"old text " * 1000


def lay_out():
    """What watch() watches and one of CHANGES changes."""
    os.makedirs("sub/below")
    os.makedirs("other")
    write("f", OLD)
    write("sub/x", b"in sub")
    write("other/x", b"in other")
    write("fresh", b"fresh")
    os.symlink("f", "link")
    os.utime("f", ns=(10**18, 10**18))


def change_mapped():
    with opened("f", os.O_RDWR) as number, mmap.mmap(number, 0) as mapped:
        mapped[:3] = mapped[-3:] = b"MAP"
        mapped.flush()


def rewrite_in_secret():
    """The same size and the same mtime."""
    write("f", b"new text " * 1000, os.O_WRONLY)
    os.utime("f", ns=(10**18, 10**18))


def write_and_keep_open(content, flags):
    HELD["file"] = os.open("f", os.O_WRONLY | flags)
    os.write(HELD["file"], content)


def punch():
    with opened("f", os.O_RDWR) as number:
        call_libc("fallocate", number, 3, 0, 4096)


def replace_link():
    os.symlink("fresh", "link2")
    os.rename("link2", "link")


CHANGES = {
    "append": lambda: write("f", b"more", os.O_WRONLY | os.O_APPEND),
    "append and keep it open": lambda: write_and_keep_open(b"more", os.O_APPEND),
    "rewrite": lambda: write("f", b"new text " * 1000, os.O_WRONLY),
    "rewrite and keep it open": lambda: write_and_keep_open(b"new", 0),
    "rewrite in secret": rewrite_in_secret,
    "rewrite shorter": lambda: write("f", b"short", os.O_WRONLY | os.O_TRUNC),
    "rewrite longer": lambda: write("f", b"long" * 9999, os.O_WRONLY | os.O_TRUNC),
    "rewrite by a mapping": change_mapped,
    "truncate": lambda: os.truncate("f", 3),
    "truncate to nothing": lambda: os.truncate("f", 0),
    "extend": lambda: os.truncate("f", 50000),
    "punch a hole": punch,
    "rename over": lambda: os.rename("fresh", "f"),
    "rename away": lambda: os.rename("f", "g"),
    "delete": lambda: os.unlink("f"),
    "delete and make again": lambda: (os.unlink("f"), write("f", b"again")),
    "make": lambda: write("new", b"new"),
    "make a directory": lambda: os.makedirs("new/x"),
    "remove a directory": lambda: os.rmdir("sub/below"),
    "remove a tree": lambda: shutil.rmtree("sub"),
    "exchange directories": lambda: rename_by(RENAME_EXCHANGE, "sub", "other"),
    "a file where a directory was": lambda: (shutil.rmtree("sub"), write("sub", b"file")),
    "a directory where a file was": lambda: (os.unlink("f"), os.makedirs("f/x")),
    "move a directory": lambda: os.rename("sub", "other/new"),
    "change the mode": lambda: os.chmod("f", 0o640),
    "change the times": lambda: os.utime("f", ns=(5, 6)),
    "link": lambda: os.link("f", "new"),
    "retarget a symlink": replace_link,
    "an attribute": lambda: os.setxattr("f", "user.new", b"value"),
}


def change(name):
    CHANGES[name]()


def settle():
    """Close what a change has kept open."""
    if "file" in HELD:
        os.close(HELD.pop("file"))


def watch():
    """Open, map, list and cache everything."""
    number = os.open("f", os.O_RDONLY)
    mapped = mmap.mmap(number, 0, access=mmap.ACCESS_READ)
    directory = os.open("sub", os.O_RDONLY)
    HELD["watched"] = (number, mapped, directory)
    look()


def look():
    """All that can be seen of it; what is mapped comes last, and only as far as the file goes."""
    number, mapped, directory = HELD["watched"]
    status = os.fstat(number)
    content = os.pread(number, 1 << 20, 0)
    seen = [(status.st_size, status.st_nlink, oct(status.st_mode), status.st_mtime_ns == 10**18)]
    seen += [len(content), hash_of(content), os.lseek(number, 0, 2)]

    for name in ("f", "new", "new/x", "sub", "sub/x", "sub/below", "other/x", "other/new/x", "link", "g"):
        seen.append((name, attempt(shape, name), attempt(lambda n=name: hash_of(read(n)))))
        seen.append(attempt(lambda n=name: sorted(os.listdir(n))))
    seen += [attempt(os.lstat, "none"), sorted(os.listdir(".")), attempt(os.listdir, directory)]
    seen += [attempt(os.readlink, "link"), attempt(os.getxattr, "f", "user.new")]
    seen += [attempt(os.stat, "x", dir_fd=directory) == "ENOENT", attempt(os.stat, "f") == "ENOENT"]

    length = min(os.fstat(number).st_size, len(mapped))
    return [*seen, hash_of(mapped[:length])]


def hash_of(content):
    return hashlib.sha256(content).hexdigest()[:8]


def forget():
    number, mapped, directory = HELD.pop("watched")
    mapped.close()
    os.close(number)
    os.close(directory)


def keep_open(path):
    HELD[path] = os.open(path, CREATE)


def build_content(seed):
    chance = random.Random(seed)
    return chance.randbytes(chance.randrange(1, 20000))


def put(path, seed, way):
    """Replace the content of a file that keep_open() has opened."""
    content = build_content(seed)
    if way == 0:
        os.pwrite(HELD[path], content, 0)
        os.ftruncate(HELD[path], len(content))
    elif way == 1:
        write(path, content, os.O_WRONLY | os.O_TRUNC)
    elif way == 2:
        os.ftruncate(HELD[path], 0)
        write(path, content, os.O_WRONLY | os.O_APPEND)
    else:
        with opened(path, os.O_RDWR) as number:
            os.ftruncate(number, len(content))
            with mmap.mmap(number, 0) as mapped:
                mapped[:] = content
                mapped.flush()


def has(path, seed):
    """Is this the content, by all ways? If not, what it is."""
    content = build_content(seed)
    seen = [
        os.fstat(HELD[path]).st_size == len(content),
        os.pread(HELD[path], 1 << 20, 0) == content,
        os.stat(path).st_size == len(content),
        read(path) == content,
    ]
    return all(seen) or seen


# --- Many, and much -------------------------------------------------------------------------------


def use_many(count, depth, at_once):
    """Files made, opened and seen by a walk, levels of a deep tree, files open at once."""
    os.mkdir("many")
    for number in range(count):
        write(f"many/{number}", b"%d" % number)
    right = sum(read(f"many/{number}") == b"%d" % number for number in range(count))
    seen = sum(entry.stat().st_size > 0 for entry in os.scandir("many"))
    walked = sum(len(names) for *_, names in os.walk("many"))

    top = os.open(".", os.O_RDONLY)
    for level in range(depth):
        os.mkdir("d")
        os.chdir("d")
        write("f", b"%d" % level)
    for _ in range(depth):
        os.chdir("..")
    levels = sum(len(names) for *_, names in os.walk("d"))
    os.fchdir(top)

    numbers = [os.open(f"many/{number}", os.O_RDONLY) for number in range(at_once)]
    is_right = all(os.pread(number, 9, 0) == b"%d" % index for index, number in enumerate(numbers))
    return [right, seen, walked, levels, is_right * len(numbers)]


def fill(how, size_mib):
    """The error of a disk without room, and the MiB that fitted."""
    error = None
    with opened("f") as number:
        if how == "mapped":
            os.ftruncate(number, size_mib << 20)
            with mmap.mmap(number, 0) as mapped:
                mapped[:] = b"x" * (size_mib << 20)
                error = attempt(mapped.flush)
        else:
            block = b"x" * (1 << 20)
            while not error:
                result = attempt(os.write, number, block)
                error = result if isinstance(result, str) else None
    return [error, os.stat("f").st_blocks * 512 >> 20]


# --- One file against a model ---------------------------------------------------------------------


def exercise(path, seed, count, limit=200000):
    """Random operations on a file and on a model in memory; None, or the first that differs.

    As fsx does: reads, writes, mappings, truncation, holes, copies, and fresh descriptors.
    """
    chance = random.Random(seed)
    model = bytearray()
    number = os.open(path, CREATE | os.O_TRUNC)
    log = []

    for _ in range(count):
        name = chance.choice(list(EXERCISES))
        start = chance.randrange(limit)
        length = chance.randrange(1, min(limit - start, 70000) + 1)
        log.append((name, start, length))
        wrong = EXERCISES[name](number, model, start, length, chance)

        if name == "reopen":
            os.close(number)
            number = os.open(path, os.O_RDWR)
        if wrong or os.fstat(number).st_size != len(model):
            return f"seed {seed}: {log[-8:]}: {wrong}, {os.fstat(number).st_size} {len(model)}"

    return None if os.pread(number, limit, 0) == model else f"seed {seed}: {log[-8:]}: the end"


def resize(model, length):
    del model[length:]
    model.extend(bytes(length - len(model)))


def exercise_write(number, model, start, length, chance):
    content = chance.randbytes(length)
    resize(model, max(len(model), start + length))
    model[start : start + length] = content
    os.pwrite(number, content, start)


def exercise_read(number, model, start, length, chance):
    if os.pread(number, length, start) != model[start : start + length]:
        return "another content"
    return None


def exercise_truncate(number, model, start, length, chance):
    resize(model, start)
    os.ftruncate(number, start)


def exercise_mapped_write(number, model, start, length, chance):
    if start + length > len(model):
        resize(model, start + length)
        os.ftruncate(number, start + length)
    content = chance.randbytes(length)
    with mmap.mmap(number, start + length) as mapped:
        mapped[start:] = content
        mapped.flush()
    model[start : start + length] = content


def exercise_mapped_read(number, model, start, length, chance):
    end = min(start + length, len(model))
    if start >= end:
        return None
    with mmap.mmap(number, end, access=mmap.ACCESS_READ) as mapped:
        return None if mapped[start:] == model[start:end] else "another content in a mapping"


def exercise_punch(number, model, start, length, chance):
    call_libc("fallocate", number, 3, start, length)
    end = min(start + length, len(model))
    if start < end:
        model[start:end] = bytes(end - start)


def exercise_zero(number, model, start, length, chance):
    call_libc("fallocate", number, 0x10, start, length)
    resize(model, max(len(model), start + length))
    model[start : start + length] = bytes(length)


def exercise_allocate(number, model, start, length, chance):
    call_libc("fallocate", number, 0, start, length)
    resize(model, max(len(model), start + length))


def exercise_copy(number, model, start, length, chance):
    target = chance.randrange(200000 - length + 1)
    if abs(start - target) < length:
        return None  # the parts overlap, which is an error
    copied = os.copy_file_range(number, number, length, start, target)
    content = model[start : start + length]
    if copied != len(content):
        return f"{copied} bytes copied instead of {len(content)}"
    if content:
        resize(model, max(len(model), target + copied))
        model[target : target + copied] = content
    return None


def exercise_sync(number, model, start, length, chance):
    os.fsync(number)


EXERCISES = {
    "write": exercise_write,
    "read": exercise_read,
    "truncate": exercise_truncate,
    "mapped write": exercise_mapped_write,
    "mapped read": exercise_mapped_read,
    "punch": exercise_punch,
    "zero": exercise_zero,
    "allocate": exercise_allocate,
    "copy": exercise_copy,
    "sync": exercise_sync,
    "reopen": exercise_read,
}


# --- A hostile root -------------------------------------------------------------------------------

PAIRS = [("d", "l"), ("e", "m")]


def swap():
    """Exchange directories and links until there is a file called stop."""
    while not os.path.lexists("stop"):
        for pair in PAIRS:
            attempt(rename_by, RENAME_EXCHANGE, *pair)


def read_below(directory):
    """By a descriptor of the directory."""
    with opened(directory, os.O_RDONLY) as number:
        names = os.listdir(number)
        with os.fdopen(os.open("f", os.O_RDONLY, dir_fd=number), "rb") as file:
            return names, file.read()


def walk(count, secret, swaps):
    """Use names that somebody exchanges. What has the secret, and how many calls there were."""
    if swaps and os.fork() == 0:
        swap()
        os._exit(0)

    leaks = []
    calls = [
        words
        for d in "dlem"
        for words in (
            (read, f"{d}/f"), (read, f"{d}/sub/f"), (os.listdir, d), (write, f"{d}/new", b"new"),
            (os.unlink, f"{d}/victim"), (os.truncate, f"{d}/f", 0), (os.chmod, f"{d}/f", 0o777),
            (os.setxattr, f"{d}/f", "user.a", b"x"), (os.link, f"{d}/victim", f"got{d}"), (read_below, d),
            (os.rename, f"{d}/victim", f"got{d}"), (os.mkdir, f"{d}/made"), (os.symlink, "x", f"{d}/link"),
            (os.mkfifo, f"{d}/fifo"), (os.utime, f"{d}/f"), (os.chmod, d, 0o700), (read, f"got{d}"),
            (os.rmdir, f"{d}/made"), (os.unlink, f"{d}/link"), (os.unlink, f"{d}/new"), (os.unlink, f"{d}/fifo"),
        )
    ]
    for _ in range(count):
        for function, *words in calls:
            result = repr(attempt(function, *words))
            if secret in result:
                leaks.append((function.__name__, *words))
    write("stop")
    return leaks, count * len(calls)


def find_secret(top, secret):
    """Regular files below a directory that hold it."""
    found = []
    for place, _, names in os.walk(top):
        for name in names:
            path = os.path.join(place, name)
            if stat.S_ISREG(os.lstat(path).st_mode) and secret.encode() in read(path):
                found.append(path)
    return found


def try_handles(top, secret):
    """Open what the server knows by made-up handles; what has the secret, and how many opened."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    mount = ctypes.c_int()
    error = attempt(call_libc, "name_to_handle_at", AT_FDCWD, top.encode(), handle, ctypes.byref(mount), 0)
    if error:
        return [], error

    size, kind = struct.unpack_from("Ii", handle)
    leaks, count = [], 0
    with opened(top, os.O_RDONLY) as number:
        for node in range(1, 3000):
            if node == 2:
                continue  # the file that tells the agent of locks that wait, so reading it waits
            struct.pack_into("I", handle, 8 + 4, node)
            forged = struct.pack("Ii", size, kind) + struct.pack("II", node >> 32, node) + handle.raw[16 : 8 + size]
            made = attempt(call_libc, "open_by_handle_at", number, forged, os.O_RDONLY)
            if isinstance(made, int):
                count += 1
                names = attempt(os.listdir, made)
                content = attempt(os.pread, made, 9999, 0)
                if secret in repr((names, content)):
                    leaks.append((node, names))
                os.close(made)
    return leaks, count


def change_below(place, elsewhere):
    """All ways to change what is in a directory with a file f and a directory d."""
    file, directory = f"{place}/f", f"{place}/d"
    return [
        (os.open, file, os.O_WRONLY), (os.open, file, os.O_RDWR), (os.open, file, os.O_RDONLY | os.O_TRUNC),
        (os.open, f"{place}/new", CREATE), (os.open, place, os.O_TMPFILE | os.O_RDWR), (os.truncate, file, 0),
        (os.chmod, file, 0o777), (os.chmod, place, 0o777), (os.chown, file, 0, 0), (os.utime, file, (1, 1)),
        (os.setxattr, file, "user.a", b"x"), (os.removexattr, file, "user.there"), (os.unlink, file),
        (os.rmdir, directory), (os.mkdir, f"{place}/new"), (os.mkfifo, f"{place}/new"),
        (os.symlink, "x", f"{place}/new"), (os.link, file, f"{place}/new"), (os.link, file, f"{elsewhere}/new"),
        (os.link, f"{elsewhere}/mine", f"{place}/new"), (os.rename, file, f"{place}/new"),
        (os.rename, file, f"{elsewhere}/new"), (os.rename, f"{elsewhere}/mine", f"{place}/new"),
        (os.rename, f"{elsewhere}/mine", file), (rename_by, RENAME_EXCHANGE, file, f"{elsewhere}/mine"),
        (os.mknod, f"{place}/new", 0o100666), (os.rename, directory, f"{elsewhere}/newdir"),
    ]


def refused(calls):
    """Those of the calls that had success, and the errors of the others."""
    results = [(function.__name__, *words, attempt(function, *words)) for function, *words in calls]
    errors = {result[-1] for result in results if isinstance(result[-1], str)}
    return [result for result in results if not isinstance(result[-1], str)], sorted(errors)


def refused_below(place, elsewhere):
    return refused(change_below(place, elsewhere))


def attempt_to_read(path):
    return attempt(read, path)


def seize(secret):
    """What root of the guest reaches where all shares are seen at once: a mount of its own.

    If the agent has taken the right to mount from it, it is the agent's mount.
    """
    top = "/mnt/x"
    os.mkdir(top)
    if subprocess.run(["mount", "-t", "virtiofs", "apppot", top], stderr=subprocess.DEVNULL).returncode:
        os.rmdir(top)
        os.symlink("/run/apppot", top)
    names = sorted(os.listdir(top))
    found = find_secret(top, secret)
    shares = [(os.unlink, "bind1"), (os.rmdir, "job"), (os.rename, "job", "x"), (os.open, "new", CREATE)]
    shares += [(os.mkdir, "new"), (os.symlink, "x", "new"), (os.link, "bind1", "new"), (os.chmod, ".", 0)]
    shares += [(os.rename, "job", "bind0/x"), (os.link, "bind1", "job/x"), (os.rename, "bind1", "job/x")]
    os.chdir(top)
    return names, found, try_handles(top, secret), refused(shares)


# --- The program ----------------------------------------------------------------------------------


def main():
    for line in sys.stdin:
        try:
            answer = (True, eval(line))
        except Exception:
            answer = (False, traceback.format_exc())
        print(repr(answer), flush=True)


if __name__ == "__main__":
    main()
