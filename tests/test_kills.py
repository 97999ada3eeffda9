# SPDX-License-Identifier: Apache-2.0
"""A campaign of kills: any process of a run, at any time, by any signal that kills.

Each `make check` has a few. This is a longer campaign:
APPPOT_TEST_KILLS=300 APPPOT_TEST_SEED=7 pytest tests/test_kills.py
"""

import contextlib
import os
import random
import signal
import subprocess
import time

from nodes import DEADLINE_S, list_descendants, send

KILLS = int(os.environ.get("APPPOT_TEST_KILLS", "12"))
SEED = os.environ.get("APPPOT_TEST_SEED", "1")
SCRIPT = "cat; for i in 1 2 3 4 5 6; do seq 1000; sleep 0.03; done; echo $1"
OUTPUT = b"in\n" + 6 * b"".join(b"%d\n" % number for number in range(1, 1001))


def start(node, nonce):
    process = node.start("--net", "none", "sh", "-c", SCRIPT, "-", nonce, stdin=subprocess.PIPE)
    process.stdin.write(b"in\n")
    process.stdin.close()
    process.stdin = None  # communicate() would close it again
    return process


def is_leader(pid):
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False


def kill_some(chance, process):
    """Kill some processes of a run. Return which, how, and whether one is left to clean up."""
    parts = [process.pid, *list_descendants(process.pid)]
    # The runner and, if there is one yet, its supervisor.
    owners = [
        process.pid,
        *filter(is_leader, parts[1:2]),
    ]
    count = chance.choice([1, 1, 1, 2, 3, len(parts)])
    victims = set(chance.sample(parts, min(count, len(parts))))
    if chance.random() < 0.2:
        victims |= set(owners)
    how = chance.choice(["KILL", "TERM", "STOP and KILL"])
    if how == "STOP and KILL":
        send(victims, signal.SIGSTOP)
    send(victims, signal.SIGTERM if how == "TERM" else signal.SIGKILL)
    return [parts.index(pid) for pid in victims], how, how == "TERM" or not victims >= set(owners)


def test_whatever_is_killed_nothing_is_left_and_status_0_means_that_all_is_written(any_node):
    chance = random.Random(f"{SEED} {any_node.uid}")
    started = time.monotonic()
    process = start(any_node, "undisturbed")
    assert any_node.finish(process) == (0, OUTPUT + b"undisturbed\n", b"")
    duration = time.monotonic() - started

    for number in range(KILLS // 2):  # the other half is for the other user
        before = set(os.listdir(any_node.scratch))  # left by a run that was killed as a whole
        process = start(any_node, f"nonce-{number}")
        time.sleep(chance.random() * duration)  # any moment will do
        victims, how, is_owned = kill_some(chance, process)
        status, stdout, stderr = any_node.finish(process)
        told = (SEED, number, how, victims, status, stderr)

        complete = OUTPUT + b"nonce-%d\n" % number
        assert status != 0 or stdout == complete, told
        assert stdout == complete[: len(stdout)], told
        assert b"Traceback" not in stderr and stderr.count(b"apppot: error:") <= 1, told
        any_node.wait_until_gone(DEADLINE_S / 3)
        deadline = time.monotonic() + DEADLINE_S / 3
        while is_owned and set(os.listdir(any_node.scratch)) - before:
            assert time.monotonic() < deadline, told
            time.sleep(0.01)

    assert any_node.run("true").returncode == 0  # removes what nobody was left to remove
