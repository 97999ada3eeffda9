# SPDX-License-Identifier: Apache-2.0
"""A process of the guest has no more memory areas than the host's vm.max_map_count allows."""

import os
import pathlib

import pytest
from nodes import assert_error, read_patches, skip_unless

SETTING = pathlib.Path("/proc/sys/vm/max_map_count")
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


@pytest.fixture
def limit():
    return int(SETTING.read_text())


@pytest.mark.parametrize("options", [[], ["--ptrace"]])
def test_a_process_with_more_areas_than_the_host_allows_ends_or_is_slower(node, limit, options):
    count = 3 * limit // 2
    result = node.run(*options, "--mem", "1000M", "python3", "-c", SCATTER, str(count), "4")
    if "empty-stub" in read_patches(node.kernel):
        assert (result.returncode, result.stdout, result.stderr) == (0, b"%d\n" % count, b"")
        return
    assert result.returncode == 125
    assert_error(result, f"vm.max_map_count of this node allows: {limit}")


@pytest.mark.alone
def test_a_node_that_allows_few_areas_is_named_in_the_end(node, limit):
    skip_unless(os.getuid() == 0, "an ordinary user may not set vm.max_map_count")
    ends = []
    try:
        SETTING.write_text("1000")
        for options in ([], ["--ptrace"]):
            ends.append(node.run(*options, "python3", "-c", SCATTER, "1500", "0"))
    finally:
        SETTING.write_text(str(limit))
    for result in ends:
        if "empty-stub" in read_patches(node.kernel):
            assert (result.returncode, result.stdout, result.stderr) == (0, b"1500\n", b"")
        else:
            assert result.returncode == 125
            assert_error(result, "vm.max_map_count of this node allows: 1000")


def test_a_process_that_is_near_that_limit_runs_on(node, limit):
    result = node.run("--mem", "700M", "python3", "-c", SCATTER, str(limit - 1000), "4")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"%d\n" % (limit - 1000), b"")


@pytest.mark.own_kernel
def test_the_doctor_names_the_limit(node, limit):
    result = node.run("--doctor")
    assert f"{limit} memory areas of a process (vm.max_map_count)" in result.stdout.decode()
