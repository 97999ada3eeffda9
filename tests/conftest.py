# SPDX-License-Identifier: Apache-2.0
"""Real boots, each on a node of its own: a job directory, a scratch directory, and a look at what is left."""

import contextlib
import glob
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib

import hypothesis
import pytest

pytest.register_assert_rewrite("engines")
TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
UNPRIVILEGED = 65534  # nobody
# An example may take its time on a machine that does much else.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
# A boot takes 2 s; this is for a machine that does much else.
DEADLINE_S = float(os.environ.get("APPPOT_TEST_DEADLINE", "90"))
STAND_IN = TOP / "tests" / "empty.py"
EMPTY = pathlib.Path(os.environ.pop("APPPOT_EMPTY", None) or shutil.which("empty") or STAND_IN).resolve()
# For the tests that have no carrier of their own: APPPOT_TEST_IO=empty runs them all with `empty`.
DEFAULT_CARRIER = os.environ.get("APPPOT_TEST_IO", "builtin")
both_carriers = pytest.mark.parametrize("carrier", ["builtin", "empty"], indirect=True)

# See the README on apppot-snap: what these tests compare has no account of the caller's in it.
caller_is_root = pytest.mark.skipif(os.getuid() != 0, reason="the account made for the caller counts as a change")


def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", metavar="N/M", help="run the Nth of M parts")
    parser.addoption("--kernel", default="1/1", metavar="N/M", help="this is the Nth of M kernels that check runs with")
    # With -p no:cacheprovider nobody else knows it, and --strict-config makes that an error.
    parser.addini("cache_dir", "where pytest's cache provider keeps what it knows of the last run")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--shard").split("/"))
    kernel, kernels = map(int, config.getoption("--kernel").split("/"))
    chosen = [item for item in items if is_for(item, kernel, kernels)][part - 1 :: parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def is_for(item, kernel, kernels):
    """With several kernels: what does not boot is for the first, what is marked so for the last, which is the faster.

    Of the two users, and of the four pairs of a user and a carrier, each kernel gets half; of the two alone by chance.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if item.get_closest_marker("last_kernel") and not item.get_closest_marker("every_kernel"):
        return kernel == kernels
    if kernels > 1 and os.getuid() == 0 and "any_node" in parameters:
        carrier = parameters.get("carrier") or ("builtin", "empty")[zlib.crc32(item.originalname.encode()) % 2]
        return ((parameters["any_node"] == "root") == (carrier == "builtin")) == (kernel == 1)
    return kernel == 1 or "kernel" in item.fixturenames


def pytest_report_header():
    what = "the stand-in" if EMPTY == STAND_IN else "the real program"
    return f"empty: {what} {EMPTY}; channel of most tests: {DEFAULT_CARRIER}"


def require(condition, reason):
    """Skip what this machine cannot do; in CI it has to."""
    if not condition:
        (pytest.fail if os.environ.get("APPPOT_REQUIRE_BOOT") == "1" else pytest.skip)(reason)


def skip_unless(exists, reason):
    """Leave out a case that does not exist for this user or kernel: they are asked, not AppPot, which may be wrong."""
    if not exists:
        pytest.skip(reason)


def kernel_has(kernel, setting):
    return f"{setting}=y" in subprocess.run([kernel, "--showconfig"], stdout=subprocess.PIPE, text=True).stdout.split()


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts, other users and cgroups need root")


@pytest.fixture(scope="session")
def image():
    path = pathlib.Path(os.environ.get("APPPOT_IMAGE") or TOP / "build" / "apppot.img")
    require(path.exists(), f"no image {path}: make image")
    # A place that the unprivileged tests reach, too; the clone may be in root's home.
    place = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-"))
    place.chmod(0o755)
    copy = place / "apppot.img"
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", path, copy], check=True)
    copy.chmod(0o444)
    yield copy
    shutil.rmtree(place)


@pytest.fixture(scope="session")
def kernel():
    path = os.environ.get("APPPOT_KERNEL") or shutil.which("linux.uml")
    require(path and os.path.exists(path), "no UML kernel: apt-get install user-mode-linux, or KERNEL=")
    return pathlib.Path(path)


def find_processes(mark):
    """pids of all that carry this mark in their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = pathlib.Path("/proc", name, "environ").read_bytes()
            state = pathlib.Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"APPPOT_TEST={mark}".encode() in environment.split(b"\0") and state not in "ZX":
            found.append(int(name))
    return sorted(found)


class Node:
    """A place where jobs run, and what they leave there."""

    def __init__(self, kernel, image, uid, carrier=DEFAULT_CARRIER):
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-"))
        self.kernel, self.image, self.uid, self.carrier = kernel, image, uid, carrier
        self.job, self.scratch = self.root / "job", self.root / "scratch"
        self.mark = os.urandom(8).hex()
        self.started = []
        self.root.chmod(0o755)
        for directory in (self.job, self.scratch):
            directory.mkdir()
            os.chown(directory, uid, -1)
        shutil.copy(TOP / "apppot_start.py", self.root)
        (self.root / "linux").symlink_to(kernel)
        self.environment = {"PATH": os.environ["PATH"], "APPPOT_TMPDIR": str(self.scratch), "APPPOT_TEST": self.mark}
        if carrier == "empty":
            self.environment["APPPOT_EMPTY"] = str(self.copy_empty("a-copy-of-empty"))

    def copy_empty(self, name):
        """The program where every user reaches it."""
        shutil.copyfile(EMPTY, self.root / name)
        (self.root / name).chmod(0o755)
        return self.root / name

    def argv(self, *words, python=sys.executable, image=None):
        return [python, str(self.root / "apppot_start.py"), "--image", str(image or self.image), *words]

    def start(self, *words, python=sys.executable, image=None, env=(), wrap=(), **options):
        """Popen of a run; `env` changes the environment (None removes), `wrap` is a command to run it under."""
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
        stdout, stderr = process.communicate(input, timeout=DEADLINE_S)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    def start_ready(self, script, *options, **more):
        """Start a shell script in the guest and return when it has said `ready`."""
        process = self.start(*options, "bash", "-c", "echo ready\n" + script, **more)
        assert process.stdout.readline() == b"ready\n", process.stderr.read()
        return process

    def finish(self, process):
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
        return process.returncode, stdout, stderr

    def processes(self):
        return find_processes(self.mark)

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
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):  # it may end meanwhile
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)


def make_node(kernel, image, uid, carrier=DEFAULT_CARRIER):
    node = Node(kernel, image, uid, carrier)
    try:
        yield node
        for process in node.started:
            process.wait(DEADLINE_S)
        node.assert_nothing_left()
    finally:
        node.close()


@pytest.fixture
def carrier(request):
    """What carries the channel: "builtin" or "empty"; both_carriers asks for both."""
    return getattr(request, "param", DEFAULT_CARRIER)


@pytest.fixture
def node(kernel, image, carrier):
    yield from make_node(kernel, image, os.getuid(), carrier)


@pytest.fixture(params=["root", "user"] if os.getuid() == 0 else ["user"])
def any_node(request, kernel, image, carrier):
    """The same as root and as an unprivileged user, where the tests run as root."""
    uid = UNPRIVILEGED if request.param == "user" and os.getuid() == 0 else os.getuid()
    yield from make_node(kernel, image, uid, carrier)


@pytest.fixture
def user_node(kernel, image, carrier):
    """As an unprivileged user only."""
    yield from make_node(kernel, image, os.getuid() or UNPRIVILEGED, carrier)


def assert_error(result, *words):
    """One error line with these words, one hint line, no traceback."""
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 2 and lines[0].startswith("apppot: error: ") and lines[1].startswith("apppot: hint: "), lines
    for word in words:
        assert str(word) in lines[0], lines


@pytest.fixture(scope="session")
def changes(kernel, image, tmp_path_factory):
    """A changes file that brings what the README's job files run."""
    from engines import make_changes_file

    return make_changes_file(kernel, image, tmp_path_factory.mktemp("changes"))


@pytest.fixture(scope="session")
def chroot():
    """The path of the tar of a batch system's Debian, or of another."""
    def find(name):
        require(os.getuid() == 0, "chroot and daemons of a batch system need root")
        path = TOP / "build" / f"{name}.tar"
        require(path.exists(), f"no {path}: make {path.relative_to(TOP)}")
        return path

    return find


def mounted(commands):
    """A wrap that runs the run in a mount namespace changed by `commands`."""
    return ("unshare", "-m", "sh", "-ec", f'{commands}; exec "$@"', "-")


def pythons():
    """Name and path of every Python 3 in PATH and of pyenv's, which stand behind its shims."""
    places = [*os.environ["PATH"].split(":"), *glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin"))]
    paths = [path for place in places for path in sorted(glob.glob(f"{place}/python3.*[0-9]")) if "/shims/" not in path]
    return {os.path.basename(path): path for path in paths if os.access(path, os.X_OK)}


def wait_for(condition, seconds=DEADLINE_S):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def writable_copy(node, image, name="own.img"):
    copy = node.root / name
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, copy], check=True)
    os.chown(copy, node.uid, -1)
    copy.chmod(0o644)
    return copy


def write_into(image, source, target):
    """Put a program into an ext4 image."""
    subprocess.run(
        ["/sbin/debugfs", "-w", "-f", "-", image],
        check=True,
        capture_output=True,
        input=(f"rm {target}\nwrite {source} {target}\nsif {target} mode 0100755\n").encode(),
    )


def replace_agent(node, image, text):
    (node.root / "agent").write_text(text)
    write_into(image, node.root / "agent", "/usr/sbin/apppot-init")
