# SPDX-License-Identifier: Apache-2.0
"""How shares reach the guest: the file server's life and death, Debian's modules, or hostfs."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import time

import pytest
from nodes import (
    DEADLINE_S,
    assert_told,
    is_alive,
    kernel_has,
    limited,
    skip_unless,
    wait_for,
    wait_for_state,
)
from test_faults import inject
from test_init import GUEST, SPEC

import apppot_start

SERVER = "the file server of the run"
PACKAGE = "/usr/lib/uml/modules"
WITHOUT_PACKAGE = 'MODULE_PLACE = "/nowhere/{}"'
BY_VIRTIO_FS = "files of the host come by virtio-fs"
BY_HOSTFS = "files of the host come by hostfs, as "
# A command with work for the server at all times.
BUSY = "while :; do echo line > busy; cat busy; done"


def start_busy(node, *options, **more):
    process = node.start_ready(BUSY, "--net", "none", *options, **more)
    return process, node.list_parts(process)["file server"]


def read_kernel(node):
    """The version of a kernel with modules; other kernels are none of the test's."""
    skip_unless(kernel_has(node.kernel, "CONFIG_VIRTIO_FS", "m"), "virtio-fs is in the kernel")
    words = [node.kernel, "--version"]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def say_files(node, **more):
    """What -v says of the files."""
    result = node.run("-v", "--net", "none", "true", **more)
    assert result.returncode == 0, result.stderr
    return re.search("files of the host come by .*", result.stderr.decode()).group()


# --- The server's end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, words",
    [
        (signal.SIGKILL, f"{SERVER} was killed"),
        (signal.SIGSEGV, f"{SERVER} was killed"),
        (signal.SIGBUS, "directory for the guest's memory became full: /"),
    ],
)
def test_the_death_of_the_file_server_ends_the_run_and_tells_why(any_node, number, words):
    process, server = start_busy(any_node)
    os.kill(server, number)
    status, _, stderr = any_node.finish(process)
    assert status == 125
    assert_told(stderr, words)


def test_a_command_that_ends_of_the_server_s_death_has_no_status(node):
    """The errors of the command's files come before the supervisor has acted."""
    inject(node, "def watch_guest(*words, real=watch_guest): return slow(real, *words)\n"
                 "def slow(real, kernel, spec, launch, wakeup, check):\n"
                 "    return real(kernel, spec, launch, wakeup, lambda: time.sleep(0.5) or check())")
    process = node.start_ready("while : > busy; do :; done; exit 0", "--net", "none")
    os.kill(node.list_parts(process)["file server"], signal.SIGKILL)
    status, _, stderr = node.finish(process)
    assert status == 125
    # The shell may tell of its errors before.
    assert_told(b"".join(stderr.splitlines(True)[-2:]), f"{SERVER} was killed")


def test_the_limit_of_cpu_time_that_the_server_has_used_up_is_named(any_node):
    inject(any_node, "def serve_shares(*_):\n    while True: pass")
    process = any_node.start("--net", "none", "true", wrap=limited("-t 2"))
    status, _, stderr = any_node.finish(process)
    assert status == 125
    assert_told(stderr, f"{SERVER} has ended with", "the limit (ulimit -t) is 2 s")


def test_a_guest_that_breaks_the_protocol_is_named(node):
    inject(node, "def serve_shares(*_): raise Misfit('a chain without end')")
    status, _, stderr = node.finish(node.start("--net", "none", "true"))
    assert status == 125
    assert_told(stderr, "guest's kernel broke the protocol of its file system: a chain without end")


def test_a_bug_of_the_server_is_told_with_its_traceback(node):
    inject(node, "def serve_shares(*_): raise KeyError('injected')")
    status, _, stderr = node.finish(node.start("--net", "none", "true"))
    lines = stderr.decode().splitlines()
    assert status == 125 and lines[0] == "Traceback (most recent call last):"
    assert "in serve_shares" in stderr.decode() and "injected" in lines[-2]
    assert lines[-2].startswith("apppot: error: bug in the supervisor: ")


def test_a_guest_that_hangs_up_on_the_server_and_lives_is_ended(node):
    end = "signal.signal(signal.SIGWINCH, lambda *_: os._exit(0))"
    inject(node, f"def serve_shares(*words, real=serve_shares): {end}; real(*words)")
    process, server = start_busy(node)
    os.kill(server, signal.SIGWINCH)
    status, _, stderr = node.finish(process)
    assert status == 125
    # Until the end the command may say what it misses.
    said = [line for line in stderr.splitlines(True) if line.startswith(b"apppot: ")]
    assert_told(b"".join(said), "has hung up on the file server")


def test_a_stopped_server_makes_nobody_deaf(any_node):
    process, server = start_busy(any_node, "--kill-after", "1")
    os.kill(server, signal.SIGSTOP)
    wait_for_state([server], "T")
    started = time.monotonic()
    process.terminate()
    status, _, _ = any_node.finish(process)
    assert status in (128 + signal.SIGTERM, 128 + signal.SIGKILL)
    limit_s = 1 + apppot_start.KILL_GRACE_S + apppot_start.CLEAN_S
    assert time.monotonic() - started < limit_s


def test_what_was_stopped_as_a_whole_goes_on(any_node):
    script = "for i in 1 2 3 4 5 6; do echo $i >> lines; sleep 0.1; done; cat lines"
    process = any_node.start_ready(script, "--net", "none")
    os.killpg(process.pid, signal.SIGTSTP)
    wait_for_state([process.pid], "T")
    server = any_node.list_parts(process)["file server"]
    os.kill(server, signal.SIGSTOP)
    wait_for_state([server], "T")
    os.killpg(process.pid, signal.SIGCONT)
    assert any_node.finish(process) == (0, b"1\n2\n3\n4\n5\n6\n", b"")


def read_descriptors(pid):
    links = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):   # closed meanwhile
            links[entry.name] = os.readlink(entry.path)
    return links


def test_the_server_has_its_own_descriptors_and_no_privileges(any_node):
    process, server = start_busy(any_node)
    status = pathlib.Path(f"/proc/{server}/status").read_text()
    assert re.search(r"(?m)^NoNewPrivs:\s*1$", status)
    links = read_descriptors(server)
    assert not [link for link in links.values() if any_node.image.name in link or "/spool/" in link]
    # The runner's channel, console and report are pipes. The server may write the last of them.
    runner = read_descriptors(process.pid).values()
    shared = [name for name, link in links.items() if link in runner and "pipe:" in link]
    assert len(shared) == 1
    info = pathlib.Path(f"/proc/{server}/fdinfo/{shared[0]}").read_text()
    assert int(re.search(r"flags:\s*(\d+)", info).group(1), 8) & os.O_ACCMODE == os.O_WRONLY
    process.terminate()
    any_node.finish(process)


def test_the_kernel_may_open_no_share():
    share = apppot_start.Share("job", b"/job", None, False)
    closed = apppot_start.Share("bind0", b"/data", b"file", True)
    guest = GUEST._replace(shares=(share, closed))
    rules = apppot_start.list_share_rules(guest.shares)
    assert rules == [(b"/job", apppot_start.READ_WRITE), (b"/data/file", apppot_start.READ_ONLY)]

    for has_virtio_fs in (False, True):
        spec = SPEC._replace(guest=guest, vmm=make_vmm(has_virtio_fs))
        directory = apppot_start.PrivateDirectory("/run", -1)
        directories = apppot_start.Directories(directory, directory, directory)
        allowed = apppot_start.list_rules(spec, directories)
        assert set(rules) & set(allowed) == (set() if has_virtio_fs else set(rules))


def make_vmm(has_virtio_fs):
    features = apppot_start.Features(virtio=True, virtio_fs=has_virtio_fs)
    vmm = apppot_start.Uml("/bin/true", features, False, ())
    assert vmm.has_virtio_fs == has_virtio_fs
    return vmm


# --- Locks ----------------------------------------------------------------------------------------

WAIT = """
import fcntl, os, signal, sys, time
how = sys.argv[1]
file = open("lock", "a")
def lock():
    {"flock": fcntl.flock, "fcntl": fcntl.lockf}[how](file, fcntl.LOCK_EX)
if sys.argv[2] == "handled":
    def handle(number, frame): raise InterruptedError
    signal.signal(signal.SIGUSR1, handle)
print("waits", flush=True)
try:
    lock()
    print("has it", flush=True)
except InterruptedError:
    print("interrupted", flush=True)
"""


@contextlib.contextmanager
def locked(node, how):
    """A process of the host has the lock."""
    script = (
        "import fcntl, sys; file = open('lock', 'a'); "
        f"fcntl.{'flock' if how == 'flock' else 'lockf'}(file, fcntl.LOCK_EX); print(flush=True); "
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        ["/usr/bin/python3", "-c", script],
        cwd=node.job, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=node.become,  # noqa: PLW1509
    )
    with holder:
        assert holder.stdout.readline() == b"\n"
        yield
        holder.stdin.close()


@pytest.mark.parametrize("how", ["flock", "fcntl"])
@pytest.mark.parametrize("action", ["default", "handled", "kill", "stop"])
def test_a_signal_interrupts_a_lock_that_waits(any_node, how, action):
    (any_node.job / "wait.py").write_text(WAIT)
    number = {"default": "USR1", "handled": "USR1", "kill": "KILL", "stop": "STOP"}[action]
    # The state of the process that waits is asked of the guest's kernel, which a sleep would not.
    script = f"""
        python3 wait.py {how} {action} & pid=$!
        until [ -e go ]; do sleep 0.05; done
        kill -{number} $pid
        if [ {action} = stop ]; then
            until grep -q '^State:.T' /proc/$pid/status; do sleep 0.05; done
            echo stopped; kill -CONT $pid; : > continued
        fi
        wait $pid; echo status $?
    """
    with locked(any_node, how):
        process = any_node.start("--net", "none", "bash", "-c", script)
        assert process.stdout.readline() == b"waits\n"
        wait_for(lambda: is_waiting(any_node, process))
        (any_node.job / "go").touch()
        if action == "stop":
            wait_for((any_node.job / "continued").exists)
            wait_for(lambda: is_waiting(any_node, process))
        else:
            stdout = any_node.finish(process)[1]
    if action == "stop":
        stdout = any_node.finish(process)[1]
    expected = {
        "default": b"status 138\n", "handled": b"interrupted\nstatus 0\n", "kill": b"status 137\n",
        "stop": b"stopped\nhas it\nstatus 0\n",
    }
    assert stdout == expected[action]


def is_waiting(node, process):
    """Whether a lock of the run waits, by the host's kernel."""
    server = node.list_parts(process)["file server"]
    waiting = [line for line in pathlib.Path("/proc/locks").read_text().splitlines() if "->" in line]
    inode = (node.job / "lock").stat().st_ino
    return any(f":{inode} " in line for line in waiting) and is_alive(server)


@pytest.mark.parametrize("how", ["flock", "fcntl"])
def test_a_lock_that_waits_ends_with_the_command(any_node, how):
    (any_node.job / "wait.py").write_text(WAIT)
    with locked(any_node, how):
        process = any_node.start(
            "--net", "none", "bash", "-c", f"python3 wait.py {how} default & read line",
            stdin=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"waits\n"
        wait_for(lambda: is_waiting(any_node, process))
        process.stdin.write(b"end\n")
        process.stdin.close()
        process.stdin = None
        started = time.monotonic()
        assert any_node.finish(process)[0] == 0
        assert time.monotonic() - started < DEADLINE_S / 2


# --- Modules, or hostfs ---------------------------------------------------------------------------


def test_files_come_by_virtio_fs(any_node):
    assert say_files(any_node).startswith(BY_VIRTIO_FS)
    result = any_node.run("stat", "-f", "-c", "%T", ".")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"fuse\n", b"")


def test_without_modules_files_come_by_hostfs_and_v_and_doctor_say_so(any_node):
    version = read_kernel(any_node)
    inject(any_node, WITHOUT_PACKAGE)
    said = say_files(any_node)
    words = f"fuse.ko and virtiofs.ko of kernel {version} are neither beside it nor in /nowhere/"
    assert said.startswith(BY_HOSTFS + words) and "no lock reaches another run" in said

    doctor = any_node.run("--doctor").stdout.decode()
    assert re.search(r"(?m)^warn +files +" + BY_HOSTFS, doctor)
    result = any_node.run("sh", "-c", "stat -f -c %t .; echo new > new")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"c0ffee\n", b"")
    assert (any_node.job / "new").read_text() == "new\n"


@pytest.mark.parametrize("fits", [True, False])
def test_modules_beside_the_kernel_are_taken_if_they_are_its_own(any_node, fits):
    version = read_kernel(any_node)
    for name in ("fuse.ko", "virtiofs.ko"):
        content = pathlib.Path(PACKAGE, version, "kernel/fs/fuse", name).read_bytes()
        if not fits:
            content = content.replace(f"vermagic={version} ".encode(), b"vermagic=4.19.1 ")
        (any_node.root / name).write_bytes(content)

    assert say_files(any_node).startswith(BY_VIRTIO_FS)
    inject(any_node, WITHOUT_PACKAGE)
    assert say_files(any_node).startswith(BY_VIRTIO_FS if fits else BY_HOSTFS)


def test_a_module_that_the_kernel_refuses_is_named(node):
    version = read_kernel(node)
    for name in ("fuse.ko", "virtiofs.ko"):
        (node.root / name).write_bytes(b"\0vermagic=" + version.encode() + b" \0")
    result = node.run("--net", "none", "true")
    assert result.returncode == 125
    assert_told(result.stderr, "module fuse of the kernel cannot be loaded: ")


def test_doctor_says_how_files_come(node):
    doctor = node.run("--doctor").stdout.decode()
    assert re.search(rf"(?m)^ok +files +{BY_VIRTIO_FS}.*confined by ", doctor)
