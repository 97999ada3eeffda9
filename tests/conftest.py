# SPDX-License-Identifier: Apache-2.0
"""Options of pytest, which kernel meets which user, and the fixtures. The tests by their files:

values and files  shape, start, words, init, changes, foreign, frames: they boot little or nothing
a run             boot, run, identity, limits, terminal, placement: what caller and command see
its end           end, kills, faults, areas, mconsole: signals, limits, bugs; nothing is left
its disks         disks, layers, bind, private: images, changes files, directories of the host
files of the host files: each operation as on the host, for several runs and the host at once;
                  shares: the file server's end, and locks that wait
its network       net; in empty the program that may carry the channel
set-up            setup, stage, readme, doctor: what make builds; what reader and admin are told
batch systems     slurm, condor, gridengine, arc, on the sites of engines.py
no tests          nodes.py helps all tests, empty.py stands in for `empty`, bench.py measures;
                  filecases.py and filework.py run in guests and on the host, and are compared
"""

import fcntl
import os
import pathlib
import shutil
import subprocess
import tempfile

import hypothesis
import pytest

pytest.register_assert_rewrite("engines", "nodes")

from nodes import (  # noqa: E402
    DEFAULT_CARRIER,
    EMPTY,
    STAND_IN,
    TOP,
    UNPRIVILEGED,
    make_node,
    require,
)

# An example may take its time on a machine that does much else.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


# --- Which tests run ------------------------------------------------------------------------------

# make check has two kernels: Debian's is 1, our own is 2 and boots twice as fast. Which of them
# does a test boot? The columns are for a test of one user (fixture `node`), for a test of both
# users (`any_node`) as root, and for that test as the ordinary user. With the carrier `empty` the
# two users change places, and one user has our own kernel alone. What the files that are not here
# test is the same with any kernel, so they boot our own.
KERNELS = {
    "test_areas.py": ("12", "1", "2"),
    "test_bind.py": ("12", "1", "2"),
    "test_boot.py": ("12", "1", "2"),
    "test_changes.py": ("12", "1", "2"),
    "test_disks.py": ("12", "2", "1"),
    "test_doctor.py": ("12", "1", "2"),
    "test_end.py": ("12", "1", "2"),
    "test_files.py": ("12", "1", "2"),
    "test_identity.py": ("12", "2", "1"),
    "test_kills.py": ("12", "1", "2"),
    "test_limits.py": ("12", "2", "1"),
    "test_mconsole.py": ("12", "1", "2"),
    "test_net.py": ("12", "2", "1"),
    "test_placement.py": ("12", "1", "2"),
    "test_readme.py": ("12", "1", "2"),
    "test_run.py": ("12", "1", "2"),
    "test_shares.py": ("12", "1", "2"),
    "test_terminal.py": ("12", "2", "1"),
}


def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", metavar="N/M", help="run the Nth of M parts")
    parser.addoption("--kernel", default="1/1", metavar="N/M", help="this is kernel N of M kernels")
    # With -p no:cacheprovider nobody else knows it, and --strict-config makes that an error.
    parser.addini("cache_dir", "where pytest's cache provider keeps what it knows of the last run")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--shard").split("/"))
    kernel, kernels = map(int, config.getoption("--kernel").split("/"))
    found = [item for item in items if kernels == 1 or str(kernel) in find_kernels(item)]
    chosen = found[part - 1 :: parts]

    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def find_kernels(item):
    """The numbers of the kernels that a test meets."""
    if "kernel" not in item.fixturenames:
        return "1"
    if item.get_closest_marker("both_kernels"):
        return "12"
    if item.get_closest_marker("own_kernel"):
        return "2"

    one_user, *both_users = KERNELS.get(item.path.name, ("2", "2", "2"))
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "any_node" not in parameters or os.getuid() != 0:
        return one_user if parameters.get("carrier") != "empty" else "2"

    as_root, as_user = both_users if parameters.get("carrier") != "empty" else reversed(both_users)
    return as_root if parameters["any_node"] == "root" else as_user


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """One test sets vm.max_map_count, which holds for all runs on the machine: it is alone then."""
    alone = item.get_closest_marker("alone")
    with open("/proc/sys/vm/max_map_count") as setting:
        fcntl.flock(setting, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def pytest_report_header():
    what = "the stand-in" if EMPTY == STAND_IN else "the real program"
    return f"empty: {what} {EMPTY}; channel of most tests: {DEFAULT_CARRIER}"


# --- What there is --------------------------------------------------------------------------------


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
    require(
        path and os.path.exists(path), "no UML kernel: apt-get install user-mode-linux, or KERNEL="
    )
    return pathlib.Path(path)


@pytest.fixture(scope="session")
def chroot():
    """The path of the tar of a batch system's Debian, or of another."""

    def find(name):
        require(os.getuid() == 0, "chroot and daemons of a batch system need root")
        path = TOP / "build" / f"{name}.tar"
        require(path.exists(), f"no {path}: make {path.relative_to(TOP)}")
        return path

    return find


@pytest.fixture(scope="session")
def changes(kernel, image, tmp_path_factory):
    """A changes file that brings what the README's job files run."""
    from engines import make_changes_file

    return make_changes_file(kernel, image, tmp_path_factory.mktemp("changes"))


# --- Nodes ----------------------------------------------------------------------------------------


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
