# SPDX-License-Identifier: Apache-2.0
"""Early signals, a stopped supervisor, bugs of AppPot, locks, limits, files of odd kinds."""

import contextlib
import functools
import glob
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from nodes import (
    TOP,
    assert_error,
    both_carriers,
    limited,
    require,
    wait_for,
    wait_for_state,
    writable_copy,
)

import apppot_start

# Python runs this before the runner. At the N-th audit event of a name the runner sends itself a
# signal.
SENDER = """
import os, sys
runner, name, count, number = os.getpid(), *os.environ["APPPOT_TEST_SEND"].split()
made = os.open(os.environ["APPPOT_TEST_MADE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
left = int(count)
def hear(event, arguments):
    global left
    if os.getpid() == runner and event == "os.mkdir":
        os.write(made, os.fsencode(arguments[0]) + b"\\n")
    if os.getpid() == runner and event == name:
        left -= 1
        if left == 0:
            os.kill(runner, int(number))
sys.addaudithook(hear)
"""


def run_with_signal(node, moment, number, *options, **more):
    """A run of `true` that gets a signal at a moment; nothing that it made may be left."""
    (node.root / "sitecustomize.py").write_text(SENDER)
    made = node.job / "made"
    environment = {
        "PYTHONPATH": str(node.root),
        "APPPOT_TEST_SEND": f"{moment} {number:d}",
        "APPPOT_TEST_MADE": str(made),
    }
    saved = node.job / "saved.tar.gz"
    result = node.run(
        "--net", "none", "--save-changes", str(saved), *options, "true", env=environment, **more
    )

    directories = made.read_bytes().splitlines()
    assert not [path for path in directories if os.path.exists(path)]
    assert not set(os.listdir(node.job)) - {"made", "saved.tar.gz"}
    return result, directories


# While the three directories are made, one of them in shared memory; the spool in them; the COW
# file, which is the second that is truncated; the supervisor's start.
EARLY = [
    ("os.mkdir 1", signal.SIGTERM),
    ("os.mkdir 1", signal.SIGHUP),
    ("os.mkdir 2", signal.SIGINT),
    ("os.mkdir 3", signal.SIGTERM),
    ("os.mkdir 4", signal.SIGUSR1),
    ("os.truncate 2", signal.SIGINT),
    ("os.fork 1", signal.SIGTERM),
    ("os.fork 1", signal.SIGHUP),
]


@pytest.mark.parametrize("moment, number", EARLY)
def test_a_signal_before_the_guest_starts_leaves_nothing(any_node, moment, number):
    result, directories = run_with_signal(any_node, moment, number)
    assert result.returncode in (128 + number, 125) and len(directories) > 2
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("carrier", ["empty"], indirect=True)
def test_a_signal_while_empty_starts_leaves_nothing(node):
    result, _ = run_with_signal(node, "os.fork 1", signal.SIGTERM)
    assert result.returncode in (128 + signal.SIGTERM, 125)


def test_a_signal_while_a_run_cleans_up_changes_nothing(any_node):
    result, _ = run_with_signal(any_node, "os.rename 1", signal.SIGTERM)
    assert (result.returncode, result.stderr) == (0, b"")
    assert os.path.getsize(any_node.job / "saved.tar.gz")


def test_an_interrupt_during_the_imports_is_no_traceback(node):
    (node.root / "argparse.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    result = node.run("true")
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


def test_an_interrupt_that_the_caller_ignores_is_ignored_from_the_start(node):
    ignore = ("sh", "-c", "trap '' INT; exec \"$@\"", "-")
    result, _ = run_with_signal(node, "os.mkdir 1", signal.SIGINT, wrap=ignore)
    assert (result.returncode, result.stderr) == (0, b"")


@both_carriers
def test_a_stopped_supervisor_makes_nobody_deaf(any_node):
    process = any_node.start_ready("exec sleep 100", "--net", "none")
    supervisor = any_node.list_parts(process)["supervisor"]
    os.kill(supervisor, signal.SIGSTOP)
    wait_for_state([supervisor], "T")
    started = time.monotonic()
    process.terminate()

    assert any_node.finish(process) == (128 + signal.SIGTERM, b"", b"")
    assert time.monotonic() - started < apppot_start.CLEAN_S  # it went on, and was not killed


def test_a_supervisor_that_hangs_is_killed_and_its_work_done(node):
    inject(node, "def supervise(*_): time.sleep(1000)")
    process = node.start("-v", "--net", "none", "true")
    while b"kernel started" not in process.stderr.readline():
        pass
    process.terminate()
    assert node.finish(process)[0] == 128 + signal.SIGTERM


# --- Bugs -----------------------------------------------------------------------------------------

BUGS = {
    "the supervisor starts": ("supervise", "def list_rules(*_): raise OSError('injected')"),
    "the kernel is executed": (
        "supervise",
        "real = call_libc\ndef call_libc(name, *arguments):\n"
        "    if name == 'personality': raise ValueError('injected')\n"
        "    return real(name, *arguments)",
    ),
    "the supervisor watches": ("supervise", "def find_corpses(*_): raise KeyError('injected')"),
    "the supervisor begins": (
        "supervise",
        "def close_all_but(*_): raise ZeroDivisionError('injected')",
    ),
    "output is written": (
        "run",
        "def fail(*_): raise KeyError('injected')\nOutputWriter._write = fail",
    ),
    "input is read": ("run", "def fail(*_): raise KeyError('injected')\nInputReader._read = fail"),
    "a frame is obeyed": (
        "run",
        "def fail(*_): raise TypeError('injected')\nConversation._begin = fail",
    ),
    "the run is prepared": ("run", "def find_landlock(*_): raise TypeError('injected')"),
}


def inject(node, text):
    """Change the runner of a node by definitions after its own."""
    path = node.root / "apppot_start.py"
    before, guard, rest = path.read_text().rpartition('if __name__ == "__main__":')
    path.write_text(f"{before}{text}\n\n\n{guard}{rest}")


@pytest.mark.parametrize("moment", BUGS)
def test_a_bug_is_told_with_its_traceback(node, moment):
    where, injected = BUGS[moment]
    inject(node, injected)
    result = node.run("--net", "none", "sh", "-c", "echo out; cat; sleep 5", input=b"in\n")

    lines = result.stderr.decode().splitlines()
    assert result.returncode == 125
    assert (
        lines[0] == "Traceback (most recent call last):" and result.stderr.count(b"Traceback") == 1
    )

    who = {"supervise": "the supervisor", "run": "the runner"}[where]
    assert lines[-2].startswith(f"apppot: error: bug in {who}: ") and "injected" in lines[-2]
    assert lines[-1].startswith("apppot: hint: ")


# --- Locks ----------------------------------------------------------------------------------------

LOCKERS = {
    "flock": "fcntl.flock(file, fcntl.LOCK_EX)",
    "lockf": "fcntl.lockf(file, fcntl.LOCK_SH)",
    "open file description": (
        "fcntl.fcntl(file, 37, struct.pack('@hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0))"
    ),
}


def start_locker(path, lock, uid):
    """Another user who can read a file, and locks it as well as a reader can, until stdin ends."""
    script = (
        f"os.setuid({uid}); file = open({str(path)!r}, 'rb'); {lock}; print(flush=True); "
        "sys.stdin.read()"
    )
    locker = subprocess.Popen(
        ["/usr/bin/python3", "-c", "import fcntl, os, struct, sys; " + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    assert locker.stdout.readline() == b"\n"
    return locker


@pytest.mark.parametrize("how", LOCKERS)
def test_who_can_read_an_image_can_keep_nobody_from_running_it(any_node, image, how):
    with start_locker(image, LOCKERS[how], 12345 if os.getuid() == 0 else os.getuid()) as locker:
        result = any_node.run("echo", "up")
        assert (result.stdout, result.stderr) == (b"up\n", b"")
        locker.stdin.close()


def test_a_run_that_reads_an_image_keeps_others_from_writing_it(any_node, image):
    own = writable_copy(any_node, image)
    process = any_node.start_ready("read line", stdin=subprocess.PIPE, image=own)

    for option, path in (("--write", own), ("--image", f"{any_node.job}/cow:{own}")):
        result = any_node.run(*((option,) if option == "--write" else ()), "true", image=path)
        if option == "--write":
            assert result.returncode == 125
            assert_error(result, f"image is in use by process {process.pid}:", own)
        else:
            assert result.returncode == 0
    assert any_node.finish(process)[0] == 1


@both_carriers
def test_a_cow_file_is_for_one_run_at_a_time_from_its_first_on(any_node, image):
    cow = any_node.job / "cow"
    for _ in ("new", "known"):
        process = any_node.start_ready("read line", stdin=subprocess.PIPE, image=f"{cow}:{image}")
        result = any_node.run("true", image=f"{cow}:{image}")
        assert result.returncode == 125
        assert_error(result, f"COW file is in use by process {process.pid}:", cow)
        assert any_node.finish(process)[0] == 1


def test_an_empty_cow_file_is_filled(node, image):
    cow = node.job / "cow"
    cow.touch()
    assert (
        node.run("--root", "sh", "-c", "echo kept > /root/kept", image=f"{cow}:{image}").returncode
        == 0
    )
    assert node.run("--root", "cat", "/root/kept", image=f"{cow}:{image}").stdout == b"kept\n"


# --- Limits ---------------------------------------------------------------------------------------


def is_deserted(group):
    return not (group / "cgroup.procs").read_text()


@pytest.fixture
def pids_cgroup():
    """A cgroup of version 1 or 2 with a limit of processes."""
    for parent in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup"):
        group = pathlib.Path(parent, f"apppot-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / "pids.max").exists():
            yield group
            wait_for(functools.partial(is_deserted, group))
            group.rmdir()
            return
        group.rmdir()
    require(False, "no cgroup with a limit of processes can be made here")


@pytest.mark.parametrize("limit", [2, 4, 7, 8, 100])
def test_a_cgroup_s_limit_of_processes_is_named_before_the_boot(any_node, pids_cgroup, limit):
    (pids_cgroup / "pids.max").write_text(str(limit))
    # The shell enters it as root, and the rest goes on as the user.
    wrap = ("/usr/bin/python3", "-c", INTO, str(pids_cgroup / "cgroup.procs"), str(any_node.uid))
    with root_of(any_node):
        result = any_node.run("echo", "up", wrap=wrap, python="/usr/bin/python3")
        doctor = any_node.run("--doctor", wrap=wrap, python="/usr/bin/python3").stdout.decode()

    if limit == 100:
        assert result.stdout == b"up\n" and "room for 99 more by cgroup's pids.max" in doctor
    else:
        assert result.returncode == 125
        assert_error(result, f"pids.max) leaves room for {limit - 1}, 16 are needed")
        assert re.search(r"(?m)^fail +limits +limit of processes \(cgroup's pids.max\)", doctor)


INTO = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
if int(sys.argv[2]) != os.getuid():
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def root_of(node):
    """Let what is run at a user's node start as root."""
    become, node.become = node.become, lambda: None
    try:
        yield
    finally:
        node.become = become


def test_limits_of_processes_of_all_cgroups_above_are_found():
    files = {
        "/proc/self/cgroup": "0::/job/step\n3:pids:/batch\n",
        "/proc/self/mountinfo": (
            "1 0 0:1 / /two rw - cgroup2 none rw\n2 0 0:2 / /one rw - cgroup none rw,pids\n"
        ),
        "/two/job/step/pids.max": "max\n",
        "/two/job/step/pids.current": "3\n",
        "/two/job/pids.max": "20\n",
        "/two/job/pids.current": "13\n",
        "/one/batch/pids.max": "4\n",
        "/one/batch/pids.current": "6\n",
    }

    assert [
        room.value for room in apppot_start.read_process_room(lambda path: files.get(path, ""))
    ] == [7, -2]


def test_pending_signals_are_enough_for_the_guest_s_timers(any_node):
    script = ("sh", "-c", "sleep 0.1; echo over")
    assert any_node.run(*script, wrap=limited("-S -i 0")).stdout == b"over\n"
    result = any_node.run(*script, wrap=limited("-i 0"))
    assert result.returncode == 125
    assert_error(result, "pending signals (ulimit -i) is 0,")
    doctor = any_node.run("--doctor", wrap=limited("-i 5000")).stdout.decode()
    assert re.search(r"(?m)^ok +limits .* 5000 pending signals", doctor)


def test_a_soft_limit_of_file_size_is_for_the_command_alone(any_node):
    wrap = limited("-S -f 1")
    result = any_node.run("wc", "-c", input=bytes(3 << 20), wrap=wrap)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, b"3145728", b"")
    doctor = any_node.run("--doctor", wrap=wrap).stdout.decode()
    assert re.search(r"(?m)^ok +memory .* in /dev/shm", doctor)


# --- Files of odd kinds ---------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path, request):
    """Files that are none, by what they are."""
    (tmp_path / "a directory").mkdir()
    os.mkfifo(tmp_path / "a FIFO")
    server = socket.socket(socket.AF_UNIX)
    directory = os.open(tmp_path, os.O_RDONLY)
    server.bind(f"/proc/self/fd/{directory}/a socket")
    request.addfinalizer(server.close)
    os.close(directory)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    kinds = {name: tmp_path / name for name in ("a directory", "a FIFO", "a socket")}

    # Of most, the kind is told; of a path that leads nowhere, the reason.
    kinds["a character device"] = pathlib.Path("/dev/full")
    kinds["Too many levels of symbolic links"] = tmp_path / "loop"
    kinds["File name too long"] = tmp_path / ("x" * 300)
    kinds["No such file or directory"] = tmp_path / "dangling"
    return kinds


OPTIONS = {
    "image": ["--image", "{}"],
    "COW file": ["--image", "{}:{image}"],
    "kernel": ["--kernel", "{}"],
    "`empty`": ["--empty", "{}"],
    "changes file": ["--changes", "{}"],
    "--bind": ["--bind", "{}:/mnt"],
    "--save-changes": ["--save-changes", "{}"],
    "network helper": ["--slirp", "{}"],
}


@pytest.mark.parametrize("what", OPTIONS)
def test_what_is_no_file_is_told_by_its_kind_and_option_and_hangs_nothing(image, kernel, odd, what):
    for kind, path in odd.items():
        words = [
            "--image", image, "--kernel", kernel,
            *(word.format(path, image=image) for word in OPTIONS[what]),
        ]
        result = subprocess.run(
            [sys.executable, TOP / "apppot_start.py", "--dry-run", *words, "true"],
            capture_output=True,
            timeout=20,
        )

        if (what, kind) in (
            ("--bind", "a directory"),
            ("--save-changes", "No such file or directory"),
        ):
            assert result.returncode == 0
            continue
        assert (result.returncode, result.stdout) == (125, b""), (kind, result)

        missing = what == "--bind" and kind in (
            "File name too long",
            "Too many levels of symbolic links",
        )
        assert_error(result, *([what, path] if missing else [what, kind, path]))


@pytest.mark.parametrize("what", ["COW file", "kernel", "`empty`"])
def test_a_file_that_can_be_opened_and_not_read_is_told(image, kernel, what):
    """Page 0 of a process's memory cannot be read: EIO, as of a file on a disk that fails."""
    path = "/proc/self/mem"
    words = [
        "--image", image, "--kernel", kernel,
        *(word.format(path, image=image) for word in OPTIONS[what]),
    ]
    command = [sys.executable, TOP / "apppot_start.py", "--dry-run", *words, "true"]

    result = subprocess.run(command, capture_output=True, timeout=20)
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, what + " cannot be read, Input/output error", path)


def test_a_limit_of_file_size_below_a_page_is_named(image, kernel):
    words = [
        sys.executable, TOP / "apppot_start.py", "--dry-run", "--image", image, "--kernel", kernel,
        "true",
    ]
    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *words]

    result = subprocess.run(limited, capture_output=True, timeout=20)
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, "ulimit -f")


def test_a_block_device_is_no_image(image, kernel, tmp_path):
    device = tmp_path / "disk"
    try:
        os.mknod(device, 0o600 | stat.S_IFBLK, os.makedev(7, 99))
    except PermissionError:
        device = next(
            path for path in map(pathlib.Path, glob.glob("/dev/*")) if path.is_block_device()
        )

    result = subprocess.run(
        [sys.executable, TOP / "apppot_start.py", "--image", device, "--kernel", kernel, "true"],
        capture_output=True,
    )
    assert result.returncode == 125
    assert_error(result, f"image is a block device: {device}")
    assert b"dd makes" in result.stderr


def test_a_changes_file_is_saved_where_a_link_leads(node):
    (node.job / "there").mkdir()
    (node.job / "link").symlink_to("there/saved.tar.gz")
    assert node.run("--save-changes", "link", "true").returncode == 0
    assert (node.job / "link").is_symlink() and os.path.getsize(node.job / "there/saved.tar.gz")


def test_an_image_of_a_tebibyte_boots_or_is_told_to_want_memory(node, image):
    own = writable_copy(node, image)
    os.truncate(own, 1 << 40)
    result = node.run("--mem", "256M", "echo", "up", image=own)
    assert result.returncode == 125
    assert_error(result, "image is too large for a guest with 256 MiB, 320 MiB are needed:", own)
    assert node.run("--mem", "320M", "echo", "up", image=own).stdout == b"up\n"


def test_a_current_directory_that_its_path_does_not_lead_to_is_told(node, tmp_path):
    closed = node.root / "closed"
    (closed / "job").mkdir(parents=True)
    script = (
        f"import os, sys; os.chdir({str(closed / 'job')!r}); os.chmod({str(closed)!r}, 0o600); "
        f"{AS_NOBODY}"
    )

    if os.getuid() == 0:
        result = node.run("true", wrap=("/usr/bin/python3", "-c", script))
        assert result.returncode == 125
        assert_error(result, "current directory", f"{closed} cannot be searched: {closed}/job")

    moved = (
        f"mkdir -p {node.job}/a/b; cd {node.job}/a/b; mv {node.job}/a {node.job}/c; "
        f"mkdir -p {node.job}/a/b"
    )
    assert (
        node.run("pwd", wrap=("sh", "-c", f'{moved}; exec "$@"', "-")).stdout.decode()
        == f"{node.job}/c/b\n"
    )

    hidden = (
        "unshare", "-m", "sh", "-ec", f'cd {node.job}; mount -t tmpfs none {node.job}; exec "$@"',
        "-",
    )

    if os.getuid() == 0:
        result = node.run("true", wrap=hidden)
        assert result.returncode == 125
        assert_error(result, "current directory cannot be reached by its path", node.job)


AS_NOBODY = (
    "os.setgroups([]); os.setgid(65534); os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
)


def test_a_directory_as_command_is_no_program(node):
    (node.job / "sub").mkdir()
    os.mkfifo(node.job / "fifo")
    (node.job / "text").write_text("")
    (node.job / "closed").mkdir(mode=0)
    script = 'for c in /tmp ./sub ./fifo ./text ./none; do "$@" $c; echo "$c $?"; done'
    result = node.run("--net", "none", wrap=("sh", "-c", script, "-"))
    assert result.stdout == b"/tmp 126\n./sub 126\n./fifo 126\n./text 126\n./none 127\n"

    errors = [
        line for line in result.stderr.decode().splitlines() if line.startswith("apppot: error: ")
    ]

    for line, words in zip(
        errors,
        (
            "is a directory: '/tmp'", "is a directory: './sub'", "is no file: './fifo'",
            "permission denied: './text'", "not found: './none'",
        ),
    ):
        assert line.endswith(words)
    assert result.stderr.count(b"chmod +x") == 1 and len(errors) == 5
