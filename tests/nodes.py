# SPDX-License-Identifier: Apache-2.0
"""What the tests share: a Node, where jobs run, and helpers that start, watch and judge runs."""

import contextlib
import glob
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent
UNPRIVILEGED = 65534  # nobody
# A boot takes 2 s; the rest is for a machine that does much else.
DEADLINE_S = float(os.environ.get("APPPOT_TEST_DEADLINE", "90"))

STAND_IN = TOP / "tests" / "empty.py"
EMPTY = pathlib.Path(
    os.environ.pop("APPPOT_EMPTY", None) or shutil.which("empty") or STAND_IN
).resolve()
# For the tests that have no carrier of their own: APPPOT_TEST_IO=empty runs them all with `empty`.
DEFAULT_CARRIER = os.environ.get("APPPOT_TEST_IO", "builtin")

both_carriers = pytest.mark.parametrize("carrier", ["builtin", "empty"], indirect=True)
needs_root = pytest.mark.skipif(
    os.getuid() != 0, reason="mounts, other users and cgroups need root"
)
# See the README on apppot-snap: what these tests compare has no account of the caller's in it.
caller_is_root = pytest.mark.skipif(
    os.getuid() != 0,
    reason="the account made for the caller counts as a change",
)


def require(condition, reason):
    """Skip what this machine cannot do; CI's has to."""
    if not condition:
        (pytest.fail if os.environ.get("APPPOT_REQUIRE_BOOT") == "1" else pytest.skip)(reason)


def skip_unless(exists, reason):
    """Leave out a case that this user or kernel does not have. They are asked, not AppPot."""
    if not exists:
        pytest.skip(reason)


def kernel_has(kernel, setting, values="y"):
    settings = subprocess.run([kernel, "--showconfig"], stdout=subprocess.PIPE, text=True).stdout
    return any(f"{setting}={value}" in settings.split() for value in values)


def read_patches(kernel):
    """Names of the patches that `make kernel` applied, without their numbers."""
    settings = subprocess.run([kernel, "--showconfig"], stdout=subprocess.PIPE, text=True).stdout
    salt = re.search(r'^CONFIG_BUILD_SALT="(.*)"$', settings, re.MULTILINE)
    return {name.partition("-")[2] for name in salt.group(1).split()} if salt else set()


def read_version(kernel):
    """Its first two numbers."""
    text = subprocess.run(
        [kernel, "--version"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def pythons():
    """Name and path of every Python 3 in PATH and of pyenv's, which stand behind its shims."""
    places = os.environ["PATH"].split(":")
    places += glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin"))
    paths = [path for place in places for path in sorted(glob.glob(f"{place}/python3.*[0-9]"))]

    return {
        os.path.basename(path): path
        for path in paths
        if "/shims/" not in path and os.access(path, os.X_OK)
    }


def wait_for(condition, seconds=DEADLINE_S):
    deadline = time.monotonic() + seconds

    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- Processes ------------------------------------------------------------------------------------


def read_stat(pid):
    """The fields of /proc/PID/stat behind the name; none if the process has ended."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def read_state(pid):
    """The letter of a process's state: "X" if there is none."""
    return (read_stat(pid) or ["X"])[0]


def is_alive(pid):
    return read_state(pid) not in "ZX"


def wait_for_state(pids, states):
    wait_for(lambda: all(read_state(pid) in states for pid in pids))


def read_cpu_time(pids):
    """Seconds that these processes have used so far."""
    stats = [stat for stat in map(read_stat, pids) if stat]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def find_processes(mark):
    """pids of all that carry this mark in their environment."""
    found = []

    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = pathlib.Path("/proc", name, "environ").read_bytes()
        except OSError:
            continue
        if f"APPPOT_TEST={mark}".encode() in environment.split(b"\0") and is_alive(name):
            found.append(int(name))

    return sorted(found)


def list_children(pid):
    children = []

    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in os.listdir(f"/proc/{pid}/task"):
            text = pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text()
            children += map(int, text.split())

    return children


def list_descendants(pid):
    return [below for child in list_children(pid) for below in [child, *list_descendants(child)]]


def count_areas(pid):
    with contextlib.suppress(OSError):  # it has ended meanwhile
        areas = pathlib.Path("/proc", str(pid), "maps").read_text().splitlines()
        return sum("[vsyscall]" not in area for area in areas)
    return 0


def is_idle(pid):
    """Whether a child of the kernel waits for a new process: it has no memory but the kernel's."""
    return count_areas(pid) == 2


def send(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, number)


# --- Wraps: commands that runs are run under ------------------------------------------------------


def mounted(commands):
    """A wrap that runs the run in a mount namespace changed by `commands`."""
    return ("unshare", "-m", "sh", "-ec", f'{commands}; exec "$@"', "-")


def limited(limits):
    """A wrap that runs the run under limits, as words of `ulimit` with semicolons between."""
    commands = "".join(f"ulimit {words} || exit;" for words in limits.split(";"))
    return ("bash", "-c", commands + 'exec "$@"', "-")


# Answers ENOSYS (38) to landlock_create_ruleset.
HIDE_LANDLOCK = """
import ctypes, os, struct, sys
steps = (0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050026), (0x06, 0, 0, 0x7fff0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HP", len(steps), ctypes.addressof(code))) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
# A wrap that runs the run as on a machine without Landlock: a seccomp filter hides it.
without_landlock = (sys.executable, "-c", HIDE_LANDLOCK)


# --- Nodes ----------------------------------------------------------------------------------------


class Node:
    """A place where jobs run, and what they leave there."""

    def __init__(self, kernel, image, uid, carrier=DEFAULT_CARRIER):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-"))
        self.kernel = kernel
        self.image = image
        self.uid = uid
        self.carrier = carrier
        self.job = self.root / "job"
        self.scratch = self.root / "scratch"
        self.mark = os.urandom(8).hex()
        self.started = []

        self.root.chmod(0o755)
        for directory in (self.job, self.scratch):
            directory.mkdir()
            os.chown(directory, uid, -1)

        shutil.copy(TOP / "apppot_start.py", self.root)
        (self.root / "linux").symlink_to(kernel)

        self.environment = {
            "PATH": os.environ["PATH"],
            "APPPOT_TMPDIR": str(self.scratch),
            "APPPOT_TEST": self.mark,
        }
        if carrier == "empty":
            self.environment["APPPOT_EMPTY"] = str(self.copy_empty("a-copy-of-empty"))

    def copy_empty(self, name):
        """The program where every user reaches it."""
        shutil.copyfile(EMPTY, self.root / name)
        (self.root / name).chmod(0o755)
        return self.root / name

    # --- Runs -------------------------------------------------------------------------------------

    def argv(self, *words, python=sys.executable, image=None):
        return [
            python, str(self.root / "apppot_start.py"), "--image", str(image or self.image), *words,
        ]

    def start(self, *words, python=sys.executable, image=None, env=(), wrap=(), **options):
        """Popen of a run. `env` changes the environment (None removes), `wrap` runs the run."""
        environment = {**self.environment, **dict(env)}
        options = {
            "cwd": self.job,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "stdin": subprocess.DEVNULL,
            "start_new_session": True,
            **options,
        }

        process = subprocess.Popen(
            [*wrap, *self.argv(*words, python=python, image=image)],
            preexec_fn=self.become,  # noqa: PLW1509
            env={name: value for name, value in environment.items() if value is not None},
            **options,
        )
        self.started.append(process)
        return process

    def become(self):
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):  # make may run under nohup
            signal.signal(number, signal.SIG_DFL)

        if os.getuid() == 0 and self.uid != 0:
            os.setgroups([])
            os.setgid(self.uid)
            os.setuid(self.uid)

    def run(self, *words, input=None, **options):
        """A whole run; the result has returncode, stdout and stderr in bytes."""
        if input is not None:
            options["stdin"] = subprocess.PIPE

        process = self.start(*words, **options)
        return subprocess.CompletedProcess(words, *self.finish(process, input))

    def start_ready(self, script, *options, **more):
        """Start a shell script in the guest and return when it has said `ready`."""
        process = self.start(*options, "bash", "-c", "echo ready\n" + script, **more)
        assert process.stdout.readline() == b"ready\n", process.stderr.read()
        return process

    def finish(self, process, input=None):
        stdout, stderr = process.communicate(input, timeout=DEADLINE_S)
        if stderr:  # pytest shows it of a test that failed
            print(process.returncode, stderr[-2000:].decode(errors="replace"))
        return process.returncode, stdout, stderr

    # --- What they leave --------------------------------------------------------------------------

    def processes(self):
        return find_processes(self.mark)

    def signal_all(self, number):
        send(self.processes(), number)

    def kill_at_once(self):
        """Kill all that runs here so that none has time to clean up after another."""
        self.signal_all(signal.SIGSTOP)
        self.signal_all(signal.SIGKILL)

    def list_parts(self, process):
        """Of a run without a network: runner, supervisor, file server, `empty`, kernel, its children."""
        names = ["runner", "supervisor", "file server", "kernel", "first child", "second child"]
        if self.carrier == "empty":
            names.insert(3, "empty")
        parts = [process.pid, *list_descendants(process.pid)]

        # That kernel uses children again, in any order. The agent is the largest, then the command.
        if "stub-pool" in read_patches(self.kernel):
            first = names.index("first child")
            parts[first:] = sorted(parts[first:], key=count_areas, reverse=True)
        return dict(zip(names, parts))

    def wait_until_gone(self, seconds=2):
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)

        assert not self.processes(), [
            pathlib.Path("/proc", str(pid), "cmdline").read_bytes() for pid in self.processes()
        ]

    def assert_nothing_left(self):
        self.wait_until_gone()
        assert sorted(os.listdir(self.scratch)) == []

    def close(self):
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()

        send(self.processes(), signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)


def make_node(kernel, image, uid, carrier=DEFAULT_CARRIER):
    """Yield a node, on which nothing may be left in the end."""
    node = Node(kernel, image, uid, carrier)
    try:
        yield node
        for process in node.started:
            process.wait(DEADLINE_S)
        node.assert_nothing_left()
    finally:
        node.close()


def assert_told(stderr, *words):
    """One error line with these words, one hint line, no traceback."""
    lines = stderr.decode().splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("apppot: error: ") and lines[1].startswith("apppot: hint: "), lines

    for word in words:
        assert str(word) in lines[0], lines


def assert_error(result, *words):
    assert_told(result.stderr, *words)


# --- Images ---------------------------------------------------------------------------------------


def writable_copy(node, image, name="own.img"):
    copy = node.root / name
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, copy], check=True)
    os.chown(copy, node.uid, -1)
    copy.chmod(0o644)
    return copy


def change_image(image, commands):
    """Run commands of debugfs on an ext4 image."""
    debugfs = ["/sbin/debugfs", "-w", "-f", "-", image]
    subprocess.run(debugfs, input=commands.encode(), check=True, capture_output=True)


def write_into(image, source, target):
    """Put a program into an ext4 image."""
    change_image(image, f"rm {target}\nwrite {source} {target}\nsif {target} mode 0100755\n")


def replace_agent(node, image, text):
    (node.root / "agent").write_text(text)
    write_into(image, node.root / "agent", "/usr/sbin/apppot-init")
