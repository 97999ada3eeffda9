# SPDX-License-Identifier: Apache-2.0
"""A process of the guest has no more memory areas than the host's vm.max_map_count allows."""

import contextlib
import fcntl
import os

import pytest
from nodes import assert_error, read_patches, skip_unless


@contextlib.contextmanager
def locked(how):
    """The setting, which all test runs on this machine share."""
    with open("/proc/sys/vm/max_map_count", "r+" if how == fcntl.LOCK_EX else "r") as file:
        fcntl.flock(file, how)
        yield file


with locked(fcntl.LOCK_SH) as setting:
    LIMIT = int(setting.read())
SCATTER = """\
import mmap, sys, time
count = int(sys.argv[1])
memory = mmap.mmap(-1, count * 8192)
try:
    memory.madvise(15)  # MADV_NOHUGEPAGE
except OSError:  # a kernel without huge pages
    pass
for area in range(count):
    memory[area * 8192] = area % 250 + 1
assert all(memory[area * 8192] == area % 250 + 1 for area in range(count))
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    pass
print(count)
"""


@pytest.mark.parametrize("options", [[], ["--ptrace"]])
def test_a_process_with_more_areas_than_the_host_allows_ends_or_is_slower(node, options):
    count = 3 * LIMIT // 2
    with locked(fcntl.LOCK_SH):
        result = node.run(*options, "--mem", "1000M", "python3", "-c", SCATTER, str(count), "4")
    if "empty-stub" in read_patches(node.kernel):
        assert (result.returncode, result.stdout, result.stderr) == (0, b"%d\n" % count, b"")
        return
    assert result.returncode == 125
    assert_error(result, f"vm.max_map_count of this node allows: {LIMIT}")


@pytest.mark.parametrize("options", [[], ["--ptrace"]])
def test_a_node_that_allows_few_areas_is_named_in_the_end(node, options):
    """Only root may set this, and it holds for the whole machine, so it is for a second."""
    skip_unless(os.getuid() == 0, "an ordinary user may not set vm.max_map_count")
    with locked(fcntl.LOCK_EX) as setting:
        setting.write("1000")
        setting.flush()
        try:
            result = node.run(*options, "python3", "-c", SCATTER, "1500", "0")
        finally:
            setting.seek(0)
            setting.write(str(LIMIT))
            setting.flush()
    if "empty-stub" in read_patches(node.kernel):
        assert (result.returncode, result.stdout, result.stderr) == (0, b"1500\n", b"")
        return
    assert result.returncode == 125
    assert_error(result, "vm.max_map_count of this node allows: 1000")


def test_a_process_that_is_near_that_limit_runs_on(node):
    with locked(fcntl.LOCK_SH):
        result = node.run("--mem", "700M", "python3", "-c", SCATTER, str(LIMIT - 1000), "4")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"%d\n" % (LIMIT - 1000), b"")


@pytest.mark.own_kernel
def test_the_doctor_names_the_limit(node):
    with locked(fcntl.LOCK_SH):
        result = node.run("--doctor")
    assert f"{LIMIT} memory areas of a process (vm.max_map_count)" in result.stdout.decode()
