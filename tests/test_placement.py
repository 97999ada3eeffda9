# SPDX-License-Identifier: Apache-2.0
"""A guest on one CPU of the host, as long as that has nobody else and the guest needs no second one."""

import os
import pathlib
import subprocess

import pytest
from conftest import DEADLINE_S, both_carriers, require, wait_for

ALL = os.sched_getaffinity(0)


def guest_of(node):
    """Threads of the guests' kernels, and the processes that stand for the guests' own."""
    tasks = []
    for pid in node.processes():
        if os.readlink(f"/proc/{pid}/exe") == os.path.realpath(node.root / "linux"):
            for thread in os.listdir(f"/proc/{pid}/task"):
                children = pathlib.Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
                tasks += [int(thread), *map(int, children)]
    return tasks


def places(node):
    """The sets of CPUs that they may run on."""
    found = set()
    for pid in guest_of(node):
        try:
            found.add(frozenset(os.sched_getaffinity(pid)))
        except ProcessLookupError:  # it ended meanwhile
            pass
    return found


def is_on_one(node):
    return [len(cpus) for cpus in places(node)] == [1]


@pytest.fixture(autouse=True)
def several_cpus():
    require(len(ALL) > 1, "takes two CPUs")


@both_carriers
def test_all_of_a_guest_is_on_one_cpu_and_the_runner_is_not(any_node):
    process = any_node.start_ready("(sleep 1000) & sleep 1000", "--cpus", "1")
    wait_for(lambda: is_on_one(any_node))
    assert os.sched_getaffinity(process.pid) == ALL
    process.terminate()
    any_node.finish(process)


def test_one_that_may_use_one_cpu_alone_stays_there(node):
    cpu = max(ALL)
    process = node.start_ready("nproc; read line", stdin=subprocess.PIPE, wrap=("taskset", "-c", str(cpu)))
    assert process.stdout.readline() == b"1\n"
    assert places(node) == {frozenset([cpu])}
    assert process.communicate(b"\n") == (b"", b"")


def test_a_guest_leaves_a_cpu_that_others_compute_on(node):
    process = node.start_ready("while :; do :; done", "--cpus", "1")
    wait_for(lambda: is_on_one(node))
    for _ in range(3):
        (cpus,) = places(node)
        words = ["taskset", "-c", str(*cpus), "timeout", str(2 * DEADLINE_S), "sh", "-c", "while :; do :; done"]
        with subprocess.Popen(words) as hog:
            wait_for(lambda cpus=cpus: is_on_one(node) and places(node) != {cpus})
            hog.terminate()
    process.kill()
    node.finish(process)


def test_guests_that_start_at_once_spread(node):
    runs = [node.start_ready("while :; do :; done", "--cpus", "1") for _ in range(2)]
    wait_for(lambda: len(places(node)) == 2 and all(len(cpus) == 1 for cpus in places(node)))
    for process in runs:
        process.kill()
        node.finish(process)


def test_a_guest_gets_a_second_cpu_when_it_computes_on_both(node, kernel):
    config = subprocess.run([kernel, "--showconfig"], stdout=subprocess.PIPE, check=True).stdout
    if b"CONFIG_SMP=y" not in config:
        pytest.skip("this kernel has one CPU")
    script = "read line; (while :; do :; done) & (while :; do :; done) & read line; kill $(jobs -p); sleep 1000"
    process = node.start_ready(script, "--cpus", "2", stdin=subprocess.PIPE)
    wait_for(lambda: is_on_one(node))
    for is_so in (lambda: places(node) == {frozenset(ALL)}, lambda: is_on_one(node)):
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(is_so)
    process.kill()
    node.finish(process)
