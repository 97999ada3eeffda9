# SPDX-License-Identifier: Apache-2.0
"""Files of the job directory: the same in the guest as on the host, for all runs at once."""

import ast
import contextlib
import importlib.util
import os
import pathlib
import select
import shutil
import signal
import stat
import subprocess
import sys

import pytest
from nodes import (
    DEADLINE_S,
    TOP,
    UNPRIVILEGED,
    assert_error,
    limited,
    list_descendants,
    make_node,
    mounted,
    needs_root,
    read_version,
    send,
    skip_unless,
    without_landlock,
)

# Runs its words in the guest with the programs of the host: the root directory is the host's, which
# --bind shows, so that both sides run the same programs and libraries.
ENTER = """
for place in /dev /proc "$PWD"; do mount --rbind "$place" "/host$place" || exit; done
exec chroot --userspec "$1" --groups "" /host sh -c 'cd "$0" && exec "$@"' "$PWD" "${@:2}"
"""
# The locks of filework.py.
KINDS = ["flock", "fcntl", "ofd"]


def with_programs_of_host(node, *words):
    """Options and command of a run that has them."""
    account = f"{node.uid}:{node.uid}"
    enter = ["sudo", "unshare", "-m", "bash", "-c", ENTER, "-", account]
    return ["--bind", "/:/host:ro", *enter, *words]


def run_on_host(node, *words):
    return subprocess.run(
        words, cwd=node.job, preexec_fn=node.become, capture_output=True, stdin=subprocess.DEVNULL
    )


def share_programs(node):
    """The programs of these tests where every user reaches them."""
    place = node.root / "tools"
    place.mkdir(exist_ok=True)
    for name in ("filecases.py", "filework.py"):
        shutil.copy(TOP / "tests" / name, place)
    return place


# --- The same as on the host ----------------------------------------------------------------------


def read_cases(output):
    return dict(line.split("\t", 1) for line in output.decode().splitlines())


@pytest.mark.both_kernels
def test_every_case_is_as_on_the_host(any_node):
    command = [sys.executable, str(share_programs(any_node) / "filecases.py")]
    result = any_node.run(*with_programs_of_host(any_node, *command, str(any_node.job / "guest")))
    host = run_on_host(any_node, *command, str(any_node.job / "host"))
    assert (result.returncode, result.stderr, host.returncode) == (0, b"", 0)

    here, there = read_cases(host.stdout), read_cases(result.stdout)
    differing = [name for name in here if here[name] != there.get(name)]
    for name in differing:
        print(f"{name}\n   host  {here[name]}\n   guest {there.get(name)}")
    assert differing == []


# --- Several runs and the host at once ------------------------------------------------------------


class Talker:
    """A process that runs filework.py, in a guest or on the host."""

    def __init__(self, process):
        self.process = process

    def ask(self, name, *words):
        line = f"{name}({', '.join(map(repr, words))})\n"
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()

    def answer(self):
        assert select.select([self.process.stdout], [], [], DEADLINE_S)[0]
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        is_value, value = ast.literal_eval(line.decode())
        assert is_value, value
        return value

    def __call__(self, name, *words):
        self.ask(name, *words)
        return self.answer()

    def is_waiting(self, seconds=0.15):
        """Has it given no answer, and gives none for so long?"""
        return not select.select([self.process.stdout], [], [], seconds)[0]

    def kill(self):
        """All processes of the run at once, so that none can clean up."""
        pids = [self.process.pid, *list_descendants(self.process.pid)]
        send(pids, signal.SIGSTOP)
        send(pids, signal.SIGKILL)
        self.process.wait(DEADLINE_S)


def in_guest(node, *options):
    """Options and command of a run that talks."""
    tools = f"{share_programs(node)}:/opt/tools:ro"
    return [*options, "--bind", tools, "--net", "none", "python3", "/opt/tools/filework.py"]


@contextlib.contextmanager
def gather(node, hosts, runs, *options, wrap=()):
    """So many talkers on the host, then those in runs."""
    on_host = (sys.executable, str(share_programs(node) / "filework.py"), "-")
    starts = [(["true"], on_host)] * hosts + [(in_guest(node, *options), wrap)] * runs
    talkers = [
        Talker(node.start(*words, wrap=start, stdin=subprocess.PIPE)) for words, start in starts
    ]

    try:
        yield talkers
    finally:
        for talker in talkers:
            talker.process.stdin.close()
    for talker in talkers:
        talker.process.wait(DEADLINE_S)


def ask_all(talkers, name, *words):
    """Their answers to one question that they get at the same time; WHO is the number of each."""
    for who, talker in enumerate(talkers):
        talker.ask(name, *(who if word == "WHO" else word for word in words))
    return [talker.answer() for talker in talkers]


def test_three_runs_and_the_host_exclude_each_other(any_node):
    with gather(any_node, 1, 3) as talkers:
        for turn in range(int(os.environ.get("APPPOT_TEST_ROUNDS", "1"))):
            host = talkers[0]
            host("os.mkdir", f"{turn}")
            ask_all(talkers, "os.chdir", f"{any_node.job}/{turn}")
            place = any_node.job / f"{turn}"

            for kind in KINDS:
                ask_all(talkers, "count_under", kind, kind, 200)
                assert (kind, (place / kind).read_text()) == (kind, "800")
            won = ask_all(talkers, "win_names", 3000)
            assert sum(won) == 3000, won

            ask_all(talkers, "append_lines", "log", "WHO", 2000)
            assert host("are_lines_whole", "log", 4, 2000)
            host("make_database", "database", "delete")
            ask_all(talkers, "insert_rows", "database", "WHO", 25)
            assert ask_all(talkers, "judge_database", "database") == [[100, 100, 100, "ok"]] * 4


def test_a_lock_that_waits_wakes_and_is_interrupted(any_node):
    with gather(any_node, 1, 2) as (host, first, second):
        for kind in KINDS:
            for holder, waiter in ((host, first), (first, second), (second, host)):
                assert holder("take", kind, "lock") is None
                assert waiter("take", kind, "lock", False) == "EAGAIN"
                waiter.ask("take", kind, "lock")
                assert waiter.is_waiting()
                holder("release", kind)
                assert waiter.answer() is None

                assert holder("take", kind, "lock", False) == "EAGAIN"
                waiter("release", kind)
                assert holder("take", kind, "lock", False) is None

                # With a handler the call ends, or goes on after it; SIGKILL ends it at once.
                assert waiter("take_under_alarm", kind, "lock", False) == ("EINTR", 1)
                assert waiter("kill_waiting", kind, "lock") == signal.SIGKILL
                waiter.ask("take_under_alarm", kind, "lock", True)
                assert waiter.is_waiting(0.4)
                holder("release", kind)
                assert waiter.answer() == (None, 1)
                # None of those that gave up has it.
                assert holder("take", kind, "lock", False) is None
                holder("release", kind)


def test_locks_and_those_who_wait_for_them_die_with_their_run(any_node):
    with gather(any_node, 1, 3) as (host, first, second, third):
        for kind in KINDS:
            assert first("take", kind, f"lock-{kind}") is None
        for talker, kind in zip((host, second, third), KINDS):
            talker.ask("take", kind, f"lock-{kind}")
        assert all(talker.is_waiting() for talker in (host, second, third))
        first.kill()
        assert [talker.answer() for talker in (host, second, third)] == [None] * 3

        second.ask("take", "flock", "lock-flock")
        third.ask("take", "flock", "lock-flock")
        assert second.is_waiting() and third.is_waiting()
        third.kill()
        assert second.is_waiting(0)
        host("release", "flock")
        assert second.answer() is None
        second.kill()
        for kind in KINDS:
            assert host("take", kind, f"lock-{kind}") is None
    any_node.wait_until_gone(10)
    assert any_node.run("--no-job-dir", "true").returncode == 0  # it cleans up after the killed runs


# --- Seen at once ---------------------------------------------------------------------------------

CHANGES = [
    "append", "append and keep it open", "rewrite", "rewrite and keep it open", "rewrite in secret",
    "rewrite shorter", "rewrite longer", "rewrite by a mapping", "truncate", "truncate to nothing",
    "extend", "punch a hole", "rename over", "rename away", "delete", "delete and make again", "make",
    "make a directory", "remove a directory", "remove a tree", "exchange directories",
    "a file where a directory was", "a directory where a file was", "move a directory",
    "change the mode", "change the times", "link", "retarget a symlink", "an attribute",
]


def test_a_change_is_seen_at_once(any_node):
    """By host and guests, which have what is changed open, mapped, listed and in their caches."""
    wrong = []
    with gather(any_node, 2, 2) as (host, watcher, first, second):
        for name in CHANGES:
            for actor in (host, first):
                place = any_node.job / f"{name} {actor is host}"
                host("os.mkdir", str(place))
                ask_all((host, watcher, first, second), "os.chdir", str(place))
                host("lay_out")

                ask_all((watcher, first, second), "watch")
                actor("change", name)
                expected, *seen = ask_all((watcher, first, second), "look")
                actor("settle")
                for who, found in zip(("first", "second"), seen):
                    differing = [pair for pair in zip(expected, found) if pair[0] != pair[1]]
                    if name == "rewrite in secret" and read_version(any_node.kernel) < (6, 6):
                        differing = differing[:-1]  # the mapping, whose size and mtime are the same
                    if differing:
                        actor_name = "host" if actor is host else "first"
                        wrong.append((name, actor_name, who, differing))
                ask_all((watcher, first, second), "forget")

    for words in wrong:
        print(*words)
    assert wrong == []


def test_host_and_guests_write_one_file_in_turns(any_node):
    with gather(any_node, 1, 2) as talkers:
        ask_all(talkers, "keep_open", "f")
        for turn in range(200):
            talkers[turn % 3]("put", "f", turn, turn // 3 % 4)
            assert (turn, ask_all(talkers, "has", "f", turn)) == (turn, [True] * 3)


# --- Who may do what ------------------------------------------------------------------------------

USE_LISTS = """
cat allowed; echo more >> allowed; cat only-read; echo x >> only-read; cat hidden; ls closed; cat open/f
for way in r w x; do for f in allowed only-read hidden open closed; do test -$way $f; echo $?; done; done
echo new > open/new; mkdir open/sub; getfacl -cn open/new open/sub; stat -c %A open/new open/sub
"""


@needs_root
def test_access_control_lists_of_the_host_hold_for_the_caller(kernel, image):
    for node in make_node(kernel, image, UNPRIVILEGED):
        for place in ("guest", "host"):
            script = f"""
                mkdir -p {place}/open {place}/closed; cd {place}
                for f in allowed only-read hidden open/f; do echo "$f" > $f; chmod 640 $f; done
                chmod 750 open closed
                setfacl -m u:{node.uid}:rw allowed; setfacl -m u:{node.uid}:r only-read
                setfacl -m u:{node.uid}:rw,m::- hidden; setfacl -m u:{node.uid}:rwx open
                setfacl -m u:{node.uid}:r open/f; setfacl -d -m u:{node.uid}:rwx,u:1234:r,g::-,o::- open
            """
            subprocess.run(["bash", "-ec", script], cwd=node.job, check=True)

        words = ["sh", "-c", f"cd $1; {USE_LISTS}", "sh"]
        host = run_on_host(node, *words, "host")
        guest = node.run(*with_programs_of_host(node, *words, "guest"))
        assert b"allowed" in host.stdout and b"user:1234:r--" in host.stdout
        assert (guest.stdout.decode(), guest.stderr) == (host.stdout.decode(), host.stderr)


def test_what_root_of_the_guest_makes_is_the_caller_s(user_node):
    script = "sudo sh -c 'echo > f; mkdir d; ln -s x l; mkfifo p; chmod 4755 f; chown 1:1 f'; stat -c %u *"
    result = user_node.run("sh", "-c", script)
    assert result.stdout.decode().split() == [str(user_node.uid)] * 4
    assert {path.lstat().st_uid for path in user_node.job.iterdir()} == {user_node.uid}


# --- A hostile guest ------------------------------------------------------------------------------

SECRET = os.urandom(16).hex()
REFUSALS = {"EROFS", "EXDEV", "ENOENT", "EPERM", "EINVAL"}


def list_tree(top):
    """Everything that is below a directory, to see whether it has changed."""
    tree = {}
    for place, directories, files in os.walk(top):
        for name in [*directories, *files, "."]:
            path = os.path.join(place, name)
            status = os.lstat(path)
            content = pathlib.Path(path).read_bytes() if stat.S_ISREG(status.st_mode) else b""
            attributes = os.listxattr(path, follow_symlinks=False)
            tree[path] = (status.st_mode, status.st_mtime_ns, status.st_ino, content, attributes)
    return tree


def make_outside(node):
    """A directory beside the job directory that nobody shows to the guest."""
    outside = node.root / "outside"
    (outside / "sub").mkdir(parents=True)
    for name in ("f", "sub/f", "victim"):
        (outside / name).write_text(SECRET)
        os.chown(outside / name, node.uid, -1)
    for place in (outside, outside / "sub"):
        os.chown(place, node.uid, -1)
    return outside


@pytest.fixture(params=["Landlock", "the server"])
def kept_in_by(request):
    """What keeps the guest in its shares; a wrap."""
    return without_landlock if request.param == "the server" else ()


def test_swaps_of_directories_and_links_lead_nowhere(any_node, kept_in_by):
    """The host exchanges a directory and a link that leads out, while root of the guest walks there."""
    outside = make_outside(any_node)
    before = list_tree(outside)
    for name in ("d", "e"):
        (any_node.job / name / "sub").mkdir(parents=True)
    (any_node.job / "l").symlink_to("../outside")
    (any_node.job / "m").symlink_to(outside / "sub")
    for path in any_node.job.rglob("*"):
        os.chown(path, any_node.uid, -1, follow_symlinks=False)

    with gather(any_node, 1, 1, "--root", wrap=kept_in_by) as (host, guest):
        for actor in (host, guest):
            # In the second round the guest makes the exchanges itself.
            if actor is host:
                host.ask("swap")
            leaks, tries = guest("walk", 60, SECRET, actor is guest)
            assert leaks == [] and tries > 1000
            if actor is host:
                host.answer()
            (any_node.job / "stop").unlink()
    assert list_tree(outside) == before


def test_root_of_the_guest_gets_what_is_shared_and_no_more(any_node, kept_in_by):
    """Where all shares are seen at once, and nothing but the server keeps it from anything."""
    outside = make_outside(any_node)
    closed = any_node.job / "closed"
    for path in (closed / "d", any_node.job / "free"):
        path.mkdir(parents=True)
    for path in (closed / "f", any_node.job / "mine", any_node.root / "only", any_node.root / "sibling"):
        path.write_text(SECRET if path.name == "sibling" else "text")
    os.setxattr(closed / "f", "user.there", b"x")
    for path in (*any_node.job.rglob("*"), any_node.root / "only", any_node.root / "sibling"):
        os.chown(path, any_node.uid, -1)
    before = [list_tree(outside), list_tree(closed)]
    binds = ["--bind", f"{closed}:/closed:ro", "--bind", f"{any_node.root}/only:/etc/only"]

    with gather(any_node, 0, 1, "--root", *binds, wrap=kept_in_by) as (guest,):
        names, found, handles, shares = guest("seize", SECRET)
        assert {"job", "bind0", "bind1", "bind2"} <= set(names)
        assert (found, handles[0], shares[0]) == ([], [], [])

        # The closed share lies in the job directory, where the same files can be written.
        assert guest("read", "/mnt/x/job/closed/f") == b"text"
        for place, elsewhere in (("bind0", "job"), ("bind0", "bind0/d"), ("job/../bind0", "job")):
            done, errors = guest("refused_below", f"/mnt/x/{place}", f"/mnt/x/{elsewhere}")
            assert done == [] and set(errors) <= REFUSALS, (done, errors)
        assert guest("read", "/mnt/x/bind1") == b"text"
        for path in ("bind1/sibling", "bind1/../sibling", "bind0/../../sibling", "bind0/.."):
            assert guest("attempt_to_read", f"/mnt/x/{path}") in ("ENOENT", "ENOTDIR", "EISDIR")
    assert [list_tree(outside), list_tree(closed)] == before


# --- Limits of the host ---------------------------------------------------------------------------


def test_few_descriptors_on_the_host_are_enough(any_node):
    """More files, directories and levels than the server may have open."""
    with gather(any_node, 0, 1, wrap=limited("-n 256")) as (guest,):
        assert guest("use_many", 1500, 60, 100) == [1500, 1500, 1500, 60, 100]


@needs_root
@pytest.mark.parametrize("what", ["write", "mapped"])
def test_a_full_job_directory_is_told(node, what):
    """To the program at once. What was mapped and is lost also makes the run fail."""
    mount = f"mount -t tmpfs -o size=8m none {node.job}; cd {node.job}"
    request = f"fill('{what}', 20)\n".encode()
    result = node.run(*in_guest(node), wrap=mounted(mount), input=request)
    assert result.stdout == b"(True, ['ENOSPC', 8])\n"
    if what == "write":
        assert (result.returncode, result.stderr) == (0, b"")
    else:
        assert result.returncode == 125
        assert_error(result, node.job, "No space left on device")


def test_memory_that_a_program_has_never_touched_is_written_as_zeros(node):
    """The guest's kernel sends its page of zeros."""
    script = "open('f', 'wb', buffering=0).write(__import__('mmap').mmap(-1, 1 << 20))"
    result = node.run("/usr/bin/python3", "-c", script)
    assert (result.returncode, result.stderr) == (0, b"")
    assert (node.job / "f").read_bytes() == bytes(1 << 20)


def test_a_soft_limit_of_the_file_size_is_the_command_s(any_node):
    script = "head -c 300000 /dev/zero > f; echo $?; stat -c %s f; head -c 3000 /dev/zero >> g; echo $?"
    result = any_node.run("sh", "-c", script, wrap=limited("-S -f 100"))
    assert result.stdout == b"153\n102400\n0\n"


# --- Programs that people use ---------------------------------------------------------------------


def test_a_file_is_what_a_model_in_memory_says(any_node):
    """As xfstests' fsx does; with APPPOT_TEST_ROUNDS many times."""
    with gather(any_node, 0, 1) as (guest,):
        for seed in range(2 * int(os.environ.get("APPPOT_TEST_ROUNDS", "1"))):
            assert guest("exercise", "f", seed, 1500) is None
            assert guest("exercise", "f", seed, 1500, 9000) is None


USE_TOOLS = r"""
export HOME=$PWD TMPDIR=$PWD GIT_PROGRESS_DELAY=999 GIT_AUTHOR_DATE=@1700000000+0000 GIT_COMMITTER_DATE=@1700000000+0000
umask 022
unset MAKEFLAGS MAKELEVEL MFLAGS MAKEOVERRIDES
git init -q -b main repo && cd repo && git config user.email a@b && git config user.name n || exit
for i in $(seq 6); do
    mkdir -p d$i; for j in $(seq 20); do echo "$i $j" > d$i/f$j; done
    echo $i >> log; git add . && git commit -q -m $i || exit
done
git rm -q -r d1; git mv d2 moved; git commit -q -m moved; git status --short; git rev-parse HEAD
git gc -q; git fsck --full --strict; cd ..
git clone -q --no-local repo clone; git -C clone log --oneline | wc -l; git -C clone status --short
git clone -q repo shared; cd shared; git checkout -q -b other HEAD~5; git merge -q main; git rev-parse HEAD
cd ..; rm -rf shared; ls

mkdir -p src/sub && cd src
head -c 100000 /dev/zero > plain; ln plain hard; ln -s plain soft; mkfifo pipe; echo x > "odd
name"; truncate -s 5M sparse; echo end >> sparse
touch -h -d '2020-01-02 03:04:05.678901234' *; setfattr -n user.a -v b plain
setfacl -m u:1234:r plain
setfacl -d -m g:1234:rx sub; echo x > sub/f; chmod 4711 sub/f; touch -d '2001-02-03 04:05:06.123456789' sub/f sub; cd ..
rsync -aHAX --sparse src/ dst/; echo "rsync $?"; echo second; rsync -aHAX --sparse --itemize-changes src/ dst/
rsync -aHAX --checksum --itemize-changes src/ dst/; rsync -aHAX --delete --itemize-changes --exclude=pipe src/ dst/
cp -p src/sub/f copy; cp -a src tree; cp -al src linked; diff -r --no-dereference src tree 2>&1 | grep -v fifo
stat -c '%n %a %Y %y %h %s %F' copy src/sub/f dst/sub/f tree/sub tree/soft linked/hard dst/sparse
getfacl -cnR dst tree; getfattr -d dst/plain tree/plain; test dst/plain -ef dst/hard; echo $?

tar --acls --xattrs -C src -cSf a.tar .; stat -c %s a.tar | cut -c 1-3; mkdir untar
tar --acls --xattrs -C untar -xSf a.tar; stat -c '%n %a %h %s' untar/*; test $(stat -c %b untar/sparse) -lt 100; echo $?
tar -C src -df a.tar; echo "tar $?"

mkdir m && cd m && printf 'all: b c
b: a
	cp a b
c: b
	cat b b > c
' > Makefile
echo one > a; make; make; touch a; make -q; echo $?; make; touch -d '1 hour ago' c; make; make; cat c
"""


def test_tools_work_as_on_the_host(any_node):
    for tool in ("git", "rsync", "setfacl", "setfattr", "make"):
        skip_unless(shutil.which(tool), f"no {tool}")
    results = []
    for place in ("host", "guest"):
        words = ["bash", "-c", f"mkdir {place} && cd {place} && {USE_TOOLS}"]
        if place == "host":
            results.append(run_on_host(any_node, *words))
        else:
            results.append(any_node.run(*with_programs_of_host(any_node, *words)))

    host, guest = results
    assert host.stdout.count(b"rsync 0\nsecond\n") == 1 and host.stdout.endswith(b"one\none\n")
    assert (guest.stdout.decode(), guest.stderr.decode()) == (host.stdout.decode(), host.stderr.decode())


# Runs test suites of CPython and prints the outcome of each test.
SUITES = """
import os, sys, unittest
class Outcomes(unittest.TextTestResult):
    def add(self, test, outcome):
        print(test.id().split(" ")[0], outcome, sep="\\t", file=report, flush=True)
    def addSuccess(self, test): self.add(test, "ok")
    def addError(self, test, error): self.add(test, "error"); super().addError(test, error)
    def addFailure(self, test, error): self.add(test, "failure"); super().addFailure(test, error)
    def addSkip(self, test, reason): self.add(test, "skipped")
    def addSubTest(self, test, part, error):
        if error: self.add(test, "part"); super().addSubTest(test, part, error)
report = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
suite = unittest.defaultTestLoader.loadTestsFromNames(["test." + name for name in sys.argv[1:]])
result = unittest.TextTestRunner(resultclass=Outcomes, verbosity=0).run(suite)
"""
SHORT_SUITES = ["test_filecmp", "test_fcntl", "test_mmap"]
LONG_SUITES = [
    "test_os", "test_pathlib", "test_compileall", "test_tarfile", "test_shutil", "test_sqlite3",
    "test_tempfile", "test_fileio", "test_glob",
]


def compare_suites(node, suites):
    skip_unless(importlib.util.find_spec("test.test_os"), "no tests of Python itself")
    results = []
    for place in ("host", "guest"):
        script = f'mkdir {place} && cd {place} && exec env -u APPPOT_TEST TMPDIR="$PWD" HOME="$PWD" "$@"'
        words = ["sh", "-c", script, "-", sys.executable, "-c", SUITES, *suites]
        if place == "host":
            results.append(run_on_host(node, *words))
        else:
            results.append(node.run(*with_programs_of_host(node, *words)))

    host, guest = results
    here, there = read_cases(host.stdout), read_cases(guest.stdout)
    assert len(here) > 20, host.stderr
    assert there == here, guest.stderr.decode()


def test_suites_of_cpython_end_as_on_the_host(any_node):
    compare_suites(any_node, SHORT_SUITES)


@pytest.mark.grid
def test_long_suites_of_cpython_end_as_on_the_host(any_node):
    compare_suites(any_node, LONG_SUITES)
