# SPDX-License-Identifier: Apache-2.0
"""Which carrier the channel gets: `empty` or the built-in one.

What both carriers must do is in other files, in the tests with both_carriers.
"""

import os
import subprocess
import threading

import pytest
from nodes import DEADLINE_S, EMPTY, STAND_IN, assert_error, both_carriers

NONCE = os.urandom(8).hex()
CARRIED = "the channel is carried by "


def run_v(node, *options, **more):
    result = node.run("-v", *options, "echo", NONCE, **more)
    assert (result.returncode, result.stdout.decode()) == (0, NONCE + "\n"), result.stderr
    return result.stderr.decode(errors="replace")


@pytest.fixture
def carrier(request):
    return getattr(request, "param", "builtin")  # most tests here choose it by options


@pytest.mark.parametrize("mode", [0o755, 0o644])  # a grid's stage-in loses the execute bit
def test_one_staged_in_beside_the_runner_is_used(any_node, mode):
    path = any_node.copy_empty("empty")
    path.chmod(mode)
    os.chown(path, any_node.uid, -1)
    assert CARRIED + str(path) in run_v(any_node)
    assert CARRIED not in run_v(any_node, "--io", "builtin")


def test_it_is_used_when_named_and_found_on_path_when_asked_for(node):
    (node.root / "bin").mkdir()
    path = node.copy_empty("bin/empty")

    on_path = {"PATH": f"{os.environ['PATH']}:{path.parent}"}
    assert CARRIED + str(path) in run_v(node, "--empty", str(path))
    assert CARRIED + str(path) in run_v(node, env={"APPPOT_EMPTY": str(path)})
    assert CARRIED in run_v(node, "--io", "empty", env=on_path)
    assert CARRIED not in run_v(node, env=on_path)
    assert CARRIED not in run_v(node, "--io", "builtin", env={"APPPOT_EMPTY": str(path)})


def test_the_stand_in_carries_a_run(node):
    (node.root / "stand-in").write_bytes(STAND_IN.read_bytes())
    assert CARRIED in run_v(node, "--empty", str(node.root / "stand-in"))


def make_broken(node, kind):
    """Programs of which none is an `empty` that works."""
    path = node.root / "empty"
    contents = {
        "another program": b"#!/bin/sh\ntouch ran\n",
        "an empty file": b"",
        "ends at once": b"#!/bin/sh\n# usage: empty -f\nexit 0\n",
        "fails": b"#!/bin/sh\n# usage: empty -f\nexit 255\n",
        "for another machine": b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + b"\x02\x00\xf3\x00"
        + bytes(60)
        + b"empty -f",
        "lies about its pid": b"#!/bin/sh\n# usage: empty -f\necho 1 > empty.pid\n",
        "leaves its files": b"#!/bin/sh\n# usage: empty -f\nmkfifo to-guest from-guest; exit 255\n",
    }
    path.write_bytes(contents[kind])
    path.chmod(0o755)
    return path


BROKEN = [
    "another program", "an empty file", "ends at once", "fails", "for another machine",
    "lies about its pid",
]


@pytest.mark.parametrize("kind", [*BROKEN, "leaves its files"])
def test_one_beside_the_runner_that_does_not_work_is_done_without(node, kind):
    path = make_broken(node, kind)
    stderr = run_v(node)
    assert CARRIED not in stderr and not (node.job / "ran").exists()
    assert (f"without {path}" in stderr) == (kind not in BROKEN[:2])


@pytest.mark.parametrize("kind", BROKEN)
def test_one_asked_for_that_does_not_work_is_named(any_node, kind):
    path = make_broken(any_node, kind)
    result = any_node.run("--empty", str(path), "true")
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, "`empty`", path)


@pytest.mark.parametrize(
    "words", [["--empty", "/no/such"], ["--empty", "/etc"], ["--io", "empty"], ["--io", "other"]]
)
def test_one_asked_for_that_is_not_there_is_named(node, words):
    result = node.run(*words, "true", env={"PATH": "/usr/bin:/bin"})
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, words[1])


def test_contradicting_options_are_refused(node):
    result = node.run("--io", "builtin", "--empty", str(EMPTY), "true")
    assert result.returncode == 125
    assert_error(result, "--empty with --io builtin")


def test_a_dry_run_shows_the_whole_command_line(node):
    path = node.copy_empty("empty")
    shown = node.run("--dry-run", "true").stdout.decode()
    assert shown.startswith(f"{path} -f -i ") and f" {node.root}/linux ubd0c=" in shown


def test_a_kernel_that_cannot_be_executed_is_told_as_without_it(node):
    broken = node.root / "kernel"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    said = [node.run("--kernel", str(broken), "--io", "builtin", "true").stderr]
    said.append(
        node.run("--kernel", str(broken), "--empty", str(node.copy_empty("e")), "true").stderr
    )
    assert said[0] == said[1] and b"cannot be executed, Exec format error" in said[0]


@both_carriers
def test_small_pieces_in_and_much_out_at_once_come_through(node):
    """A carrier that moves bytes one way at a time must not be given more than it holds."""
    process = node.start(
        "sh", "-c", "head -c 20000000 /dev/zero >&2 & cat; wait", stdin=subprocess.PIPE, bufsize=0
    )
    lines = [b"line %d %s\n" % (number, b"x" * (number % 900)) for number in range(5000)]

    def feed():
        for line in lines:
            process.stdin.write(line)
        process.stdin.close()

    errors = []
    threads = [
        threading.Thread(target=feed),
        threading.Thread(target=lambda: errors.append(process.stderr.read())),
    ]
    for thread in threads:
        thread.start()
    assert process.stdout.read() == b"".join(lines)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert errors == [bytes(20000000)] and process.wait(DEADLINE_S) == 0
