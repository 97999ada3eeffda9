# SPDX-License-Identifier: Apache-2.0
"""The management console, by the uml_mconsole that people have: where it finds a guest, and what its commands do."""

import contextlib
import os
import re
import signal
import subprocess

import pytest
from conftest import assert_error, wait_for


@pytest.fixture
def home(any_node):
    path = any_node.root / "home"
    path.mkdir()
    os.chown(path, any_node.uid, -1)
    any_node.environment["HOME"] = str(path)
    any_node.home = path
    yield path
    links = path / ".uml"
    assert not links.exists() or not os.listdir(links)


def ask(node, guest, *command):
    """What uml_mconsole says, as the user of the run."""
    return subprocess.run(
        ["timeout", "5", "uml_mconsole", str(guest), *command],
        preexec_fn=node.become,
        env=node.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout.decode()


def test_a_guest_is_found_by_its_name(any_node, home):
    process = any_node.start_ready("sleep 100", "--id", "frodo")
    assert re.match(r"OK Linux \S+-\w+ \d+\.\d+\.\d+", ask(any_node, "frodo", "version"))
    assert "HELP" in ask(any_node, "frodo", "sysrq", "h")
    process.terminate()
    assert any_node.finish(process) == (143, b"", b"")


@pytest.mark.parametrize("home", [None, "/no/such", "/proc", "relative"])
def test_without_a_home_it_is_found_by_the_path_that_v_tells(any_node, home):
    process = any_node.start_ready("sleep 100", "-v", "--id", "frodo", env={"HOME": home})
    path = b""
    while not path.startswith(b"apppot: ") or b"uml_mconsole" not in path:
        path = process.stderr.readline()
    path = path.decode().split()[-1]
    assert path.startswith(str(any_node.scratch)) and path.endswith("/frodo/mconsole")
    assert "OK Linux" in ask(any_node, path, "version")
    process.terminate()
    assert any_node.finish(process)[0] == 143


def test_without_a_name_no_link_is_made(any_node, home):
    process = any_node.start_ready("sleep 100")
    assert not (home / ".uml").exists()
    process.terminate()
    any_node.finish(process)


def test_a_name_in_use_is_refused(any_node, home):
    process = any_node.start_ready("read line; echo still $line", "--id", "frodo", stdin=subprocess.PIPE)
    result = any_node.run("--id", "frodo", "true")
    assert result.returncode == 125
    assert_error(result, "--id is in use", any_node.scratch, "frodo")
    assert any_node.run("--id", "sam", "true").returncode == 0
    assert "OK" in ask(any_node, "frodo", "version")
    process.stdin.write(b"here\n")
    assert any_node.finish(process) == (0, b"still here\n", b"")


def test_a_directory_of_that_name_is_left_alone(any_node, home):
    (home / ".uml/frodo").mkdir(parents=True)
    (home / ".uml/frodo/pid").write_text("1\n")
    os.chown(home / ".uml", any_node.uid, -1)
    result = any_node.run("--id", "frodo", "true")
    assert result.returncode == 125
    assert_error(result, "--id is in use", home / ".uml/frodo")
    (home / ".uml/frodo/pid").unlink()
    (home / ".uml/frodo").rmdir()


def test_the_name_of_a_run_that_was_killed_is_free_again(any_node, home):
    process = any_node.start_ready("sleep 100", "--id", "frodo")
    process.kill()
    any_node.finish(process)
    wait_for(lambda: not os.listdir(any_node.scratch))
    assert not os.listdir(home / ".uml"), "the supervisor has removed it"

    process = any_node.start_ready("sleep 100", "--id", "frodo")
    pids = any_node.processes()
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, so that none has time to clean
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # of the guest's start, it has ended meanwhile
                os.kill(pid, number)
    any_node.finish(process)
    any_node.wait_until_gone()
    assert os.listdir(home / ".uml") == ["frodo"]
    assert any_node.run("--id", "frodo", "true").returncode == 0


# --- Commands -----------------------------------------------------------------------------------------------


def test_cad_ends_the_command_as_sigterm_does(any_node, home):
    process = any_node.start_ready(
        "trap 'echo told; exit 9' TERM; echo trapped; while :; do sleep 0.1; done", "--id", "frodo"
    )
    assert process.stdout.readline() == b"trapped\n"
    assert "OK" in ask(any_node, "frodo", "cad")
    assert any_node.finish(process)[:2] == (9, b"told\n")


def test_a_command_that_ignores_cad_is_killed_after_its_time(any_node, home):
    stubborn = "trap '' TERM; echo deaf; while :; do sleep 0.1; done"
    process = any_node.start_ready(stubborn, "--id", "frodo", "--kill-after", "0.5")
    assert process.stdout.readline() == b"deaf\n"
    ask(any_node, "frodo", "cad")
    assert any_node.finish(process) == (137, b"", b"")


@pytest.mark.parametrize("command, words", [("halt", "ended before the command"), ("reboot", "before the command")])
def test_a_guest_that_is_halted_is_a_failure(any_node, home, command, words):
    process = any_node.start_ready("sleep 100", "--id", "frodo")
    ask(any_node, "frodo", command)
    status, stdout, stderr = any_node.finish(process)
    assert (status, stdout) == (125, b"")
    assert_error(subprocess.CompletedProcess((), status, stdout, stderr), words)


def test_a_stopped_guest_goes_on(any_node, home):
    process = any_node.start_ready("read line; echo got $line", "--id", "frodo", stdin=subprocess.PIPE)
    assert "OK" in ask(any_node, "frodo", "stop")
    process.stdin.write(b"it\n")
    process.stdin.flush()
    assert "OK" in ask(any_node, "frodo", "go")
    assert any_node.finish(process) == (0, b"got it\n", b"")
