# SPDX-License-Identifier: Apache-2.0
"""A guest on one CPU of the host, as long as that has nobody else and the guest needs no second one."""

import contextlib
import os
import pathlib
import subprocess

import pytest
from conftest import both_carriers, kernel_has, require, skip_unless, wait_for

import apppot_start

ALL = os.sched_getaffinity(0)


def guest_of(node):
    """Threads of the guests' kernels, and the processes that stand for the guests' own."""
    tasks = []
    for pid in node.processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.readlink(f"/proc/{pid}/exe") == os.path.realpath(node.root / "linux"):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    children = pathlib.Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
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
    process = node.start_ready("nproc; read line", stdin=subprocess.PIPE, wrap=("taskset", "-c", str(cpu)))
    assert process.stdout.readline() == b"1\n"
    assert places(node) == {frozenset([cpu])}
    assert process.communicate(b"\n") == (b"", b"")


def test_a_guest_gets_a_second_cpu_when_it_computes_on_both(node, kernel):
    require(len(ALL) > 1, "takes two CPUs")
    skip_unless(kernel_has(kernel, "CONFIG_SMP"), "this kernel has one CPU")
    script = "read line; (while :; do :; done) & (while :; do :; done) & read line; kill $(jobs -p); sleep 1000"
    process = node.start_ready(script, "--cpus", "2", stdin=subprocess.PIPE)
    wait_for(lambda: is_on_one(node))
    for is_so in (lambda: places(node) == {frozenset(ALL)}, lambda: is_on_one(node)):
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(is_so)
    process.kill()
    node.finish(process)


# --- What is decided, of readings that no busy machine gives at will -----------------------------------------


class Host:
    """Two CPUs and a guest that runs and waits on them as `ran`, `waited` and `idle` say, by the second."""

    def __init__(self, monkeypatch, ncpus):
        self.now, self.ran, self.waited, self.idle = 0.0, 0.0, 0.0, {0: 0.0, 1: 0.0}
        self.where = {0, 1}
        self._times, self._idle = [1.0, 0.0], {0: 0.0, 1: 0.0}
        monkeypatch.setattr(apppot_start.os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(apppot_start.os, "sched_setaffinity", lambda _, cpus: setattr(self, "where", cpus))
        monkeypatch.setattr(apppot_start.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(apppot_start, "read_processor", lambda _: 0)
        monkeypatch.setattr(apppot_start, "read_times", lambda _: tuple(self._times))
        monkeypatch.setattr(apppot_start, "read_idle_times", lambda: dict(self._idle))
        monkeypatch.setattr(apppot_start, "list_tasks", lambda _: [1])
        self.placement = apppot_start.Placement(1, ncpus)

    def pass_rounds(self, count, ran, waited, idle=(0.0, 0.0)):
        for _ in range(count):
            step = self.placement.interval_s
            self.now += step
            self._times = [self._times[0] + ran * step, self._times[1] + waited * step]
            self._idle = {cpu: self._idle[cpu] + idle[cpu] * step for cpu in (0, 1)}
            self.placement.review()
        return self.where


@pytest.mark.parametrize("ran, waited", [(0, 0), (0.2, 0.1), (0.55, 0.25), (1, 0), (1, 0.45), (1, 0.7)])
@pytest.mark.parametrize("ncpus", [1, 2])
def test_a_guest_that_is_alone_stays(monkeypatch, ncpus, ran, waited):
    assert Host(monkeypatch, ncpus).pass_rounds(100, ran, waited, (0, 1)) == {0}


@pytest.mark.parametrize("ran, waited", [(0.5, 0.55), (0.5, 0.75), (0.5, 1.05), (0.3, 0.6)])
def test_a_guest_goes_where_it_finds_an_idle_cpu(monkeypatch, ran, waited):
    host = Host(monkeypatch, 1)
    assert host.pass_rounds(2, ran, waited, (0, 1)) == {0}  # it knows of no CPU yet how idle it is
    assert host.pass_rounds(100, ran, waited, (0, 1)) == {1}
    assert host.pass_rounds(100, 1, 0.1, (1, 0)) == {1}
    assert host.pass_rounds(100, ran, waited, (1, 0)) == {0}


def test_a_guest_stays_where_all_are_busy(monkeypatch):
    assert Host(monkeypatch, 1).pass_rounds(100, 0.5, 1.0, (0, 0.4)) == {0}


def test_of_two_guests_that_leave_one_may_stay(monkeypatch):
    moves = []
    for _ in range(50):
        host = Host(monkeypatch, 1)
        moves.append(host.pass_rounds(3, 0.5, 0.6, (0, 1)))
    assert {0} in moves and {1} in moves


def test_a_guest_with_two_cpus_is_let_go_when_it_needs_them_and_kept_again_when_not(monkeypatch):
    host = Host(monkeypatch, 2)
    assert host.pass_rounds(10, 1, 0.6) == {0}
    assert host.pass_rounds(1, 1, 1.0) == {0, 1}
    assert host.pass_rounds(100, 1.8, 0.4) == {0, 1}
    assert host.pass_rounds(100, 1, 0.3) == {0, 1}
    assert host.pass_rounds(3, 0.7, 0.1) == {0, 1}
    assert host.pass_rounds(1, 0.7, 0.1) == {0}


def test_a_host_that_does_not_count_decides_itself(monkeypatch):
    read_times = apppot_start.read_times
    assert read_times(os.getpid())[0] > 0 and read_times(2**22 + 1) == (0.0, 0.0)
    monkeypatch.setattr(apppot_start, "read_times", lambda _: (0.0, 0.0))
    set_affinity = []
    monkeypatch.setattr(apppot_start.os, "sched_setaffinity", lambda *words: set_affinity.append(words))
    placement = apppot_start.Placement(os.getpid(), 1)
    placement.review()
    assert set_affinity == []
