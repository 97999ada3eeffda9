# SPDX-License-Identifier: Apache-2.0
"""What comes at a bad moment: signals before and after the guest, a stopped supervisor, bugs of AppPot's own."""

import os
import signal
import time

import pytest
from conftest import both_carriers
from test_end import list_parts, wait_for_state

# Python runs this before the runner. At the N-th audit event of a name the runner sends itself a signal.
SENDER = """
import os, sys
runner, name, count, number = os.getpid(), *os.environ["APPPOT_TEST_SEND"].split()
made = os.open(os.environ["APPPOT_TEST_MADE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
left = int(count)
def hear(event, arguments):
    global left
    if os.getpid() == runner and event == "os.mkdir":
        os.write(made, os.fsencode(arguments[0]) + b"\\n")
    if os.getpid() == runner and event == name:
        left -= 1
        if left == 0:
            os.kill(runner, int(number))
sys.addaudithook(hear)
"""


def run_with_signal(node, moment, number, *options, **more):
    """A run of `true` that gets a signal at a moment; nothing that it made may be left."""
    (node.root / "sitecustomize.py").write_text(SENDER)
    made = node.job / "made"
    environment = {
        "PYTHONPATH": str(node.root),
        "APPPOT_TEST_SEND": f"{moment} {number:d}",
        "APPPOT_TEST_MADE": str(made),
        "HOME": str(node.job),
    }
    saved = node.job / "saved.tar.gz"
    result = node.run(
        "--net", "none", "--id", "early", "--save-changes", str(saved), *options, "true", env=environment, **more
    )
    directories = made.read_bytes().splitlines()
    assert not [path for path in directories if os.path.exists(path) and not path.endswith(b".uml")]
    assert not set(os.listdir(node.job)) - {"made", "saved.tar.gz", ".uml"}
    assert not (node.job / ".uml").exists() or not os.listdir(node.job / ".uml")
    return result, directories


# While the three directories are made, one of them in shared memory; the links in them; the COW file, which is the
# second that is truncated; the supervisor's start.
EARLY = [
    ("os.mkdir 1", signal.SIGTERM),
    ("os.mkdir 1", signal.SIGHUP),
    ("os.mkdir 2", signal.SIGINT),
    ("os.mkdir 3", signal.SIGTERM),
    ("os.symlink 1", signal.SIGUSR1),
    ("os.truncate 2", signal.SIGINT),
    ("os.fork 1", signal.SIGTERM),
    ("os.fork 1", signal.SIGHUP),
]


@pytest.mark.parametrize("moment, number", EARLY)
def test_a_signal_before_the_guest_starts_leaves_nothing(any_node, moment, number):
    result, directories = run_with_signal(any_node, moment, number)
    assert result.returncode in (128 + number, 125) and len(directories) > 2
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("carrier", ["empty"], indirect=True)
def test_a_signal_while_empty_starts_leaves_nothing(node):
    result, _ = run_with_signal(node, "os.fork 1", signal.SIGTERM)
    assert result.returncode in (128 + signal.SIGTERM, 125)


def test_a_signal_while_a_run_cleans_up_changes_nothing(any_node):
    result, _ = run_with_signal(any_node, "os.rename 1", signal.SIGTERM)
    assert (result.returncode, result.stderr) == (0, b"")
    assert os.path.getsize(any_node.job / "saved.tar.gz")


def test_an_interrupt_during_the_imports_is_no_traceback(node):
    (node.root / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    result = node.run("true")
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


def test_an_interrupt_that_the_caller_ignores_is_ignored_from_the_start(node):
    ignore = ("sh", "-c", "trap '' INT; exec \"$@\"", "-")
    result, _ = run_with_signal(node, "os.mkdir 1", signal.SIGINT, wrap=ignore)
    assert (result.returncode, result.stderr) == (0, b"")


@both_carriers
def test_a_stopped_supervisor_makes_nobody_deaf(any_node):
    process = any_node.start_ready("exec sleep 100", "--net", "none")
    supervisor = list_parts(any_node, process)["supervisor"]
    os.kill(supervisor, signal.SIGSTOP)
    wait_for_state([supervisor], "T")
    started = time.monotonic()
    process.terminate()
    assert any_node.finish(process) == (128 + signal.SIGTERM, b"", b"")
    assert time.monotonic() - started < 4


# --- Bugs ---------------------------------------------------------------------------------------------------

BUGS = {
    "the supervisor starts": ("supervise", "def list_rules(*_): raise OSError('injected')"),
    "the kernel is executed": ("supervise", "def raise_limits(*_): raise ValueError('injected')"),
    "the supervisor watches": ("supervise", "def find_corpses(*_): raise KeyError('injected')"),
    "the supervisor begins": ("supervise", "def close_all_but(*_): raise ZeroDivisionError('injected')"),
    "output is written": ("run", "def fail(*_): raise KeyError('injected')\nOutputWriter._write = fail"),
    "input is read": ("run", "def fail(*_): raise KeyError('injected')\nInputReader._read = fail"),
    "a frame is obeyed": ("run", "def fail(*_): raise TypeError('injected')\nSession._begin_relay = fail"),
    "the run is prepared": ("run", "def find_landlock(*_): raise TypeError('injected')"),
}


@pytest.mark.parametrize("moment", BUGS)
def test_a_bug_is_told_with_its_traceback(node, moment):
    where, injected = BUGS[moment]
    path = node.root / "apppot_start.py"
    text, guard, rest = path.read_text().rpartition('if __name__ == "__main__":')
    path.write_text(f"{text}{injected}\n\n\n{guard}{rest}")
    result = node.run("--net", "none", "sh", "-c", "echo out; cat; sleep 5", input=b"in\n")
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 125
    assert lines[0] == "Traceback (most recent call last):" and result.stderr.count(b"Traceback") == 1
    who = {"supervise": "the supervisor", "run": "the runner"}[where]
    assert lines[-2].startswith(f"apppot: error: bug in {who}: ") and "injected" in lines[-2]
    assert lines[-1].startswith("apppot: hint: ")
