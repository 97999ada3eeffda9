# SPDX-License-Identifier: Apache-2.0
"""A guest stays on one CPU of the host while it has that CPU alone and needs no second one."""

import contextlib
import os
import pathlib
import subprocess

import pytest
from nodes import both_carriers, kernel_has, require, skip_unless, wait_for

import apppot_start

ALL = os.sched_getaffinity(0)


def guest_of(node):
    """Threads of the guests' kernels, and the processes that stand for the guests' own."""
    tasks = []
    for pid in node.processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.readlink(f"/proc/{pid}/exe") == os.path.realpath(node.root / "linux"):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    children = (
                        pathlib.Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
                    )
                    tasks += [int(thread), *map(int, children)]
    return tasks


def places(node):
    """The sets of CPUs that they may run on."""
    found = set()
    for pid in guest_of(node):
        with contextlib.suppress(OSError):
            found.add(frozenset(os.sched_getaffinity(pid)))
    return found


def is_on_one(node):
    return [len(cpus) for cpus in places(node)] == [1]


@both_carriers
def test_all_of_a_guest_is_on_one_cpu_and_the_runner_is_not(any_node):
    require(len(ALL) > 1, "takes two CPUs")
    process = any_node.start_ready("(sleep 1000) & sleep 1000", "--cpus", "1")
    wait_for(lambda: is_on_one(any_node))
    assert os.sched_getaffinity(process.pid) == ALL
    process.terminate()
    any_node.finish(process)


def test_one_that_may_use_one_cpu_alone_stays_there(node):
    cpu = max(ALL)
    process = node.start_ready(
        "nproc; read line", stdin=subprocess.PIPE, wrap=("taskset", "-c", str(cpu))
    )
    assert process.stdout.readline() == b"1\n"
    assert places(node) == {frozenset([cpu])}
    assert process.communicate(b"\n") == (b"", b"")


def test_a_guest_gets_a_second_cpu_when_it_computes_on_both(node, kernel):
    require(len(ALL) > 1, "takes two CPUs")
    skip_unless(kernel_has(kernel, "CONFIG_SMP"), "this kernel has one CPU")
    script = (
        "read line; (while :; do :; done) & (while :; do :; done) & read line; kill $(jobs -p); "
        "sleep 1000"
    )
    process = node.start_ready(script, "--cpus", "2", stdin=subprocess.PIPE)
    wait_for(lambda: is_on_one(node))

    for is_so in (lambda: places(node) == {frozenset(ALL)}, lambda: is_on_one(node)):
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(is_so)

    process.kill()
    node.finish(process)


# --- What is decided, of readings that no busy machine gives at will ------------------------------


def decide(placement, count, ran, waited):
    return {placement.decide(ran, waited) for _ in range(count)}


@pytest.mark.parametrize(
    "ran, waited", [(0, 0), (0.2, 0.1), (0.55, 0.25), (1, 0), (1, 0.45), (1, 0.7)]
)
@pytest.mark.parametrize("ncpus", [1, 2])
def test_a_guest_that_is_alone_stays(ncpus, ran, waited):
    assert decide(apppot_start.Placement(ncpus), 100, ran, waited) == {"stay"}


@pytest.mark.parametrize("ran, waited", [(0.5, 0.55), (0.5, 0.75), (0.5, 1.05), (0.3, 0.6)])
def test_a_guest_leaves_a_cpu_that_others_want(ran, waited):
    placement = apppot_start.Placement(1)
    assert decide(placement, 100, ran, waited) == {"leave"}
    assert decide(placement, 100, 1, 0.1) == {"stay"}
    assert decide(placement, 100, ran, waited) == {"leave"}


def test_a_guest_that_leaves_goes_to_an_idle_cpu_or_stays_as_chance_has_it():
    idle = {0: 0.1, 1: 0.9, 2: 0.6}
    assert {apppot_start.choose_idle_cpu(idle, os.urandom(2)) for _ in range(200)} == {None, 1, 2}


@pytest.mark.parametrize("idle", [{}, {0: 0.0, 1: 0.4}])
def test_a_guest_stays_where_all_are_busy_or_none_is_known(idle):
    assert {apppot_start.choose_idle_cpu(idle, os.urandom(2)) for _ in range(100)} == {None}


def test_a_guest_with_two_cpus_is_let_go_when_it_needs_them_and_kept_again_when_not():
    placement = apppot_start.Placement(2)
    assert decide(placement, 10, 1, 0.6) == {"stay"}
    assert decide(placement, 1, 1, 1.0) == {"free"}
    assert decide(placement, 100, 1.8, 0.4) == {"stay"}
    assert decide(placement, 100, 1, 0.3) == {"stay"}
    assert decide(placement, 3, 0.7, 0.1) == {"stay"}
    assert decide(placement, 1, 0.7, 0.1) == {"keep"}
    assert decide(placement, 100, 1, 0.3) == {"stay"}


def test_a_host_that_does_not_count_or_has_one_cpu_decides_itself():
    own = apppot_start.read_times(os.getpid())
    assert own[0] > 0 and apppot_start.read_times(2**22 + 1) == (0.0, 0.0)
    assert apppot_start.can_be_placed(own, {0, 1})
    assert not apppot_start.can_be_placed(own, {3})
    assert not apppot_start.can_be_placed((0.0, 0.0), {0, 1})
