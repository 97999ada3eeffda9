# SPDX-License-Identifier: Apache-2.0
"""The management console, by uml_mconsole: where it finds a guest, and what it does."""

import os
import subprocess

import pytest
from nodes import assert_told


def ask(node, name, *command):
    """What uml_mconsole says to the user of the run, who names the socket in the run directory."""
    (socket,) = node.scratch.glob(f"apppot-*/{name}/mconsole")
    return subprocess.run(
        ["timeout", "5", "uml_mconsole", str(socket), *command],
        preexec_fn=node.become,
        env=node.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout.decode()


@pytest.mark.parametrize("options, name", [((), "guest"), (("--id", "frodo"), "frodo")])
def test_v_tells_the_path_for_uml_mconsole(any_node, options, name):
    process = any_node.start_ready("sleep 100", "-v", *options)
    line = b""
    while b"uml_mconsole" not in line:
        line = process.stderr.readline()
    path = line.decode().split()[-1]
    assert (
        path.startswith(str(any_node.scratch))
        and path.endswith(f"/{name}/mconsole")
        and os.path.exists(path)
    )
    assert "OK Linux" in ask(any_node, name, "version")
    assert "HELP" in ask(any_node, name, "sysrq", "h")

    process.terminate()
    assert any_node.finish(process)[0] == 143


def test_two_runs_may_have_the_same_name(any_node):
    process = any_node.start_ready(
        "read line; echo got $line", "--id", "frodo", stdin=subprocess.PIPE
    )
    result = any_node.run("--id", "frodo", "echo", "here, too")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"here, too\n", b"")
    process.stdin.write(b"it\n")
    assert any_node.finish(process) == (0, b"got it\n", b"")


# --- Commands -------------------------------------------------------------------------------------


def test_cad_ends_the_command_as_sigterm_does(any_node):
    process = any_node.start_ready(
        "trap 'echo told; exit 9' TERM; echo trapped; while :; do sleep 0.1; done", "--id", "frodo"
    )
    assert process.stdout.readline() == b"trapped\n"
    assert "OK" in ask(any_node, "frodo", "cad")
    assert any_node.finish(process)[:2] == (9, b"told\n")


def test_a_command_that_ignores_cad_is_killed_after_its_time(any_node):
    stubborn = "trap '' TERM; echo deaf; while :; do sleep 0.1; done"
    process = any_node.start_ready(stubborn, "--id", "frodo", "--kill-after", "0.5")
    assert process.stdout.readline() == b"deaf\n"
    ask(any_node, "frodo", "cad")
    assert any_node.finish(process) == (137, b"", b"")


@pytest.mark.parametrize(
    "command, words", [("halt", "ended before the command"), ("reboot", "before the command")]
)
def test_a_guest_that_is_halted_is_a_failure(any_node, command, words):
    process = any_node.start_ready("sleep 100", "--id", "frodo")
    ask(any_node, "frodo", command)
    status, stdout, stderr = any_node.finish(process)
    assert (status, stdout) == (125, b"")
    assert_told(stderr, words)


def test_a_stopped_guest_goes_on(any_node):
    process = any_node.start_ready(
        "read line; echo got $line", "--id", "frodo", stdin=subprocess.PIPE
    )
    assert "OK" in ask(any_node, "frodo", "stop")

    process.stdin.write(b"it\n")
    process.stdin.flush()
    assert "OK" in ask(any_node, "frodo", "go")
    assert any_node.finish(process) == (0, b"got it\n", b"")
