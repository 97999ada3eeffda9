# SPDX-License-Identifier: Apache-2.0
"""A process of the guest has no more memory areas than the host's vm.max_map_count allows."""

import pytest
from nodes import assert_error, read_patches

with open("/proc/sys/vm/max_map_count") as setting:
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
    result = node.run(*options, "--mem", "1000M", "python3", "-c", SCATTER, str(count), "4")
    if "empty-stub" in read_patches(node.kernel):
        assert (result.returncode, result.stdout, result.stderr) == (0, b"%d\n" % count, b"")
        return
    assert result.returncode == 125
    assert_error(result, f"vm.max_map_count of this node allows: {LIMIT}")


def test_a_process_that_is_near_that_limit_runs_on(node):
    result = node.run("--mem", "700M", "python3", "-c", SCATTER, str(LIMIT - 1000), "4")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"%d\n" % (LIMIT - 1000), b"")


@pytest.mark.own_kernel
def test_the_doctor_names_the_limit(node):
    result = node.run("--doctor")
    assert f"{LIMIT} memory areas of a process (vm.max_map_count)" in result.stdout.decode()
