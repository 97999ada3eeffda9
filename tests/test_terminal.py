# SPDX-License-Identifier: Apache-2.0
"""The command's terminal, seen from the caller's: a pseudo-terminal and a shell of the host."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from nodes import DEADLINE_S, TOP, UNPRIVILEGED, make_node, needs_root, wait_for, writable_copy

NONCE = os.urandom(8).hex()


class Screen:
    """A terminal, the leader of its session, and what appeared on it and was not read yet."""

    def __init__(self, node, *leader):
        self.node = node
        self.keyboard, self.tty = os.openpty()
        self.resize(24, 80)
        self.seen = b""
        self.process = subprocess.Popen(
            ["setsid", "-c", *leader],
            stdin=self.tty,
            stdout=self.tty,
            stderr=self.tty,
            cwd=node.job,
            preexec_fn=node.become,  # noqa: PLW1509
            env={**node.environment, "PS1": "host> ", "TERM": "xterm"},
        )
        node.started.append(self.process)

    def resize(self, rows, columns):
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def modes(self):
        return termios.tcgetattr(self.tty)

    def type(self, text):
        rest = text if isinstance(text, bytes) else text.encode()
        deadline = time.monotonic() + DEADLINE_S

        while rest:
            assert time.monotonic() < deadline, self.seen
            readable, writable, _ = select.select([self.keyboard], [self.keyboard], [], 1)
            if readable:
                self.seen += os.read(self.keyboard, 65536)
            if writable:
                rest = rest[os.write(self.keyboard, rest[:1024]) :]

    def expect(self, pattern):
        """Wait for a text (a regular expression); return the match and forget all up to its end."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            match = re.search(pattern.encode(), self.seen)
            if match:
                self.seen = self.seen[match.end() :]
                return match
            assert select.select([self.keyboard], [], [], max(0, deadline - time.monotonic()))[0], (
                self.seen
            )
            self.seen += os.read(self.keyboard, 65536)

    def stty(self):
        """The modes, from a shell's prompt; the shell has others while it reads a line."""
        self.type("stty -g\n")
        modes = self.expect(r"[\r\n]([0-9a-f:]{30,})\r\n").group(1)
        self.expect("host> ")
        return modes

    def close(self):
        os.close(self.tty)
        os.close(self.keyboard)


def command_line(node, *words):
    return shlex.join(node.argv(*words))


@pytest.fixture
def shell(any_node):
    """A terminal with an interactive shell of the host, at its prompt."""
    screen = Screen(any_node, "bash", "--norc", "--noprofile", "-b")  # -b: tell of jobs at once
    screen.expect("host> ")
    yield screen
    screen.close()
    screen.process.wait(DEADLINE_S)


@pytest.fixture
def screen(node):
    """start(WORDS): the command on a terminal, without a shell that sets its modes right."""
    screens = []

    def start(*words):
        screens.append(
            Screen(
                node, "sh", "-c", '"$@"; echo "ended with $?"; read line', "-", *node.argv(*words)
            )
        )
        return screens[-1]

    yield start
    for screen in screens:
        screen.close()
        screen.process.wait(DEADLINE_S)


# --- What a user does -----------------------------------------------------------------------------


def test_a_login_shell_has_the_terminal_and_its_status_comes_back(shell):
    before = shell.stty()
    shell.type(command_line(shell.node) + "\n")
    shell.expect(r"\w@[\w-]+:.*[$#] ")

    shell.type("tty; stty size; shopt login_shell; exit 7\n")
    shell.expect(r"/dev/pts/\d+\r\n24 80\r\nlogin_shell\s+on\r\n")
    shell.expect("host> ")

    shell.type("echo status=$?\n")
    shell.expect("status=7\r\n")
    shell.expect("host> ")
    assert shell.stty() == before


def test_job_control_in_the_guest(shell):
    shell.type(
        command_line(shell.node, "--env", "PS1=guest> ", "bash", "--norc", "--noprofile") + "\n"
    )
    shell.expect("guest> ")

    job = "sh -c 'trap \"echo back\" CONT; echo up; read line; read line'\n"
    shell.type(job)
    shell.expect(r"up\r\n")

    shell.type("\x03")
    shell.expect(r"\^C\r\n")
    shell.expect("guest> ")

    shell.type(job)
    shell.expect(r"up\r\n")

    shell.type("\x1a")
    shell.expect("Stopped")
    shell.expect("guest> ")

    shell.type("fg\n")
    shell.expect(r"back\r\n")

    shell.type("\x1c")
    shell.expect("Quit")
    shell.expect("guest> ")

    shell.type("exit\n")
    shell.expect("host> ")


def test_ctrl_z_stops_the_run_and_fg_continues_it(shell):
    before = shell.stty()
    shell.type(command_line(shell.node, "bash", "-c", "echo up; read line; echo got $line") + "\n")
    shell.expect(r"up\r\n")

    shell.type("\x1a")
    shell.expect("Stopped")
    shell.expect("host> ")
    assert shell.stty() == before

    shell.type("fg\n")
    shell.expect("echo got ")

    shell.type(f"{NONCE}\n")
    shell.expect(f"got {NONCE}\r\n")
    shell.expect("host> ")


def test_a_background_run_that_reads_waits_for_the_foreground(shell):
    command = command_line(
        shell.node, "bash", "-c", "echo up; read line; echo got $line; tty; exit 3"
    )
    shell.type(command + " &\n")
    shell.expect(r"up\r\n")
    shell.expect("Stopped")

    shell.type("fg\n")
    shell.expect("exit 3'\r\n")

    shell.type(f"{NONCE}\n")
    shell.expect(f"got {NONCE}\r\n/dev/pts/")
    shell.expect("host> ")

    shell.type("echo status=$?\n")
    shell.expect("status=3\r\n")


def test_bg_lets_a_stopped_run_go_on_without_the_terminal(shell):
    script = "echo up; until [ -e go ]; do sleep 0.1; done; echo done; read line; echo got $line"
    shell.type(command_line(shell.node, "bash", "-c", script) + "\n")
    shell.expect(r"up\r\n")

    shell.type("\x1a")
    shell.expect("Stopped")

    shell.type("bg\n")
    shell.expect("&\r\n")

    shell.type("touch go\n")
    shell.expect("done\r\n")
    # The run wants the terminal. Until the shell has seen that, fg has nothing to continue.
    shell.expect("Stopped")

    shell.type("fg\n")
    shell.expect("got \\$line'\r\n")

    shell.type(f"{NONCE}\n")
    shell.expect(f"got {NONCE}\r\n")


def test_ctrl_c_reaches_the_command(shell):
    script = "trap 'echo interrupted; exit 9' INT; echo up; while :; do sleep 0.1; done"
    shell.type(command_line(shell.node, "bash", "-c", script) + "; echo status=$?\n")
    shell.expect(r"up\r\n")
    shell.type("\x03")
    shell.expect("interrupted\r\n")
    shell.expect("status=9\r\n")


def test_an_editor_and_a_pager_work(shell):
    shell.type(command_line(shell.node, "vi", "file") + "\n")
    shell.expect('"file"')

    shell.type(f"i{NONCE}\x1b:wq\n")
    shell.expect("host> ")
    assert (shell.node.job / "file").read_text() == NONCE + "\n"

    shell.type("seq 1000 | " + command_line(shell.node, "less") + "\n")
    shell.expect(r"\b20\r\n")

    shell.type("G")
    shell.expect(r"\b1000\r\n")

    shell.type("q")
    shell.expect("host> ")


def test_a_change_of_the_window_is_seen(shell):
    script = "trap 'stty size; exit' WINCH; echo up; while :; do sleep 0.1; done"
    shell.type(command_line(shell.node, "bash", "-c", script) + "\n")
    shell.expect(r"up\r\n")
    shell.resize(50, 132)
    shell.expect("50 132\r\n")


@pytest.mark.parametrize("modes", ["raw -echo", "-echo"])
def test_a_paste_of_100_kb_arrives(shell, modes):
    text = b"".join(b"%d: a line that is pasted \xc3\xa9\n" % number for number in range(3600))
    script = f"stty {modes}; echo up; head -c {len(text)} | sha256sum; stty sane"
    shell.type(command_line(shell.node, "sh", "-c", script) + "\n")
    shell.expect(r"up\r?\n")
    shell.type(text)
    shell.expect(hashlib.sha256(text).hexdigest())
    shell.expect("host> ")


# --- Which descriptors are a terminal -------------------------------------------------------------

REDIRECTIONS = [
    "",
    "> out",
    "2> err",
    "< in",
    "> out 2> err",
    "< in > out",
    "< in 2> err",
    "< in > out 2> err",
    "| cat",
]


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_what_is_redirected_is_no_terminal_and_the_rest_is(shell, redirection):
    (shell.node.job / "in").write_text("input\n")
    script = (
        "for n in 0 1 2; do [ -t $n ] && echo yes $n >> {0}; done; : < /dev/tty && echo tty >> {0}"
    )

    for place, words in (("here", ["sh"]), ("guest", None)):
        text = script.format(place)
        line = (
            shlex.join([*words, "-c", text])
            if words
            else command_line(shell.node, "sh", "-c", text)
        )
        shell.type(f"{line} {redirection}\n")
        shell.expect("host> ")

    seen = [(shell.node.job / place).read_text() for place in ("here", "guest")]
    assert seen[0] == seen[1] and "tty" in seen[0]


def test_a_command_in_a_pipeline_gets_the_keyboard_when_it_reads_it(shell):
    shell.type(
        command_line(shell.node, "sh", "-c", "echo up >&2; read line; echo got $line")
        + " | tr a-z A-Z\n"
    )
    shell.expect(r"up\r\n")
    shell.type("word\n")
    shell.expect("GOT WORD\r\n")


def test_a_command_in_a_pipeline_leaves_the_keyboard_to_others(shell):
    reader = (
        "cat; echo up; stty -echo -icanon < /dev/tty; head -c 1 < /dev/tty | od -c; "
        "stty sane < /dev/tty"
    )
    shell.type(
        command_line(shell.node, "sh", "-c", f"echo {NONCE}; sleep 0.2")
        + " | sh -c "
        + shlex.quote(reader)
        + "\n"
    )
    shell.expect(NONCE + "\r\nup\r\n")

    shell.type("k")
    shell.expect("0000000   k")


def test_t_and_big_t_force_it(any_node):
    result = any_node.run("-t", "sh", input=b"tty; stty size; exit 3\n")
    assert result.returncode == 3 and re.search(rb"/dev/pts/\d+\r\n24 80\r\n", result.stdout)
    # The line comes back, and so does its echo.
    assert any_node.run("-t", "cat", "-", input=b"a line\n").stdout.count(b"a line\r\n") == 2

    screen = Screen(
        any_node,
        *any_node.argv(
            "-T", "sh", "-c", "[ -t 0 ] || [ -t 1 ] || echo none; read line; echo $line"
        ),
    )
    screen.expect("none\r\n")

    screen.type(f"{NONCE}\n")
    screen.expect(f"{NONCE}\r\n{NONCE}\r\n")
    assert screen.process.wait(DEADLINE_S) == 0
    screen.close()


def test_sudo_asks_for_no_password(any_node):
    assert any_node.run("sudo", "id", "-u").stdout == b"0\n"
    assert any_node.run("-t", "sudo", "id", "-u").stdout.endswith(b"0\r\n")
    assert any_node.run("--root", "sh", "-c", "id -u; echo $HOME").stdout == b"0\n/root\n"


# --- The caller's terminal afterwards -------------------------------------------------------------


def run_processes(node):
    """The runner's, the supervisor's and the kernel's pid."""
    found = {}
    for pid in node.processes():
        process = pathlib.Path("/proc", str(pid))
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        found[pid] = ((process / "cmdline").read_bytes().split(b"\0"), parent)

    runners = [pid for pid, (words, _) in found.items() if b"apppot_start.py" in words[1]]
    supervisor = next(pid for pid in runners if found[pid][1] in runners)
    kernel = next(
        pid
        for pid, (words, parent) in found.items()
        if parent == supervisor and b"mem=" in b" ".join(words)
    )
    return {"runner": found[supervisor][1], "supervisor": supervisor, "kernel": kernel}


@pytest.mark.parametrize("end", ["exit", "TERM", "runner", "supervisor", "kernel", "panic"])
def test_the_terminal_is_as_before(screen, end):
    there = screen(
        "--root", "sh", "-c", "stty raw -echo; echo up; read line; echo c > /proc/sysrq-trigger"
    )
    before = there.modes()
    there.expect(r"up\n")
    assert there.modes() != before

    if end == "exit":
        there.type("\x03\x04")

    if end in ("exit", "panic"):
        there.type("\n")
    elif end == "TERM":
        os.kill(run_processes(there.node)["runner"], signal.SIGTERM)
    else:
        os.kill(run_processes(there.node)[end], signal.SIGKILL)

    there.expect(r"ended with \d+\r?\n")
    wait_for(lambda: there.modes() == before)


def test_a_terminal_that_is_closed_ends_the_run(node):
    screen = Screen(node, *node.argv("sh", "-c", "echo up; read line"))
    screen.expect(r"up\r\n")
    screen.close()
    assert screen.process.wait(DEADLINE_S) == 128 + signal.SIGHUP


def test_v_writes_whole_lines_on_a_raw_terminal(screen):
    there = screen("-v", "sh", "-c", "echo up")
    match = there.expect(r"ended with 0\r\n")
    assert b"up\r\n" in match.string and not re.search(rb"(?<!\r)\n", match.string[: match.end()])


# --- What stays and what goes ---------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["bash", "--norc", "--rcfile", "/dev/null", "-o", "vi"]])
def test_an_interactive_shell_says_what_stays_and_what_goes(shell, words):
    job = re.escape(str(shell.node.job))
    shell.type(command_line(shell.node, "--net", "none", *words) + "\n")

    begin = shell.expect(
        rf"apppot: a shell in \S+, `exit` leaves it; "
        rf"what you write in {job} stays; all else, in HOME too, is gone at the end [^\n]*\n"
    )
    assert (
        b"--bind" in begin.group()
        and begin.group().endswith(b"\r\n")
        and b"\n" not in begin.group()[:-1]
    )
    shell.expect(r"[$#] ")

    shell.type("exit\n")
    shell.expect(rf"\napppot: what you wrote outside of {job} is gone\r\n")
    shell.expect("host> ")


@pytest.mark.parametrize(
    "options, end",
    [
        (["sh", "-c", "read line"], ""),
        (["cat"], ""),
        (["bash"], "2> err"),
        (["bash"], "< in"),
        (["-T", "bash"], ""),
    ],
)
def test_what_is_no_interactive_shell_says_nothing(shell, options, end):
    (shell.node.job / "in").write_text("exit\n")
    shell.type(command_line(shell.node, "--net", "none", *options) + f" {end}; echo over $?\n")
    shell.type("exit\n\x04")
    seen = shell.expect("over 0\r\n").string
    said = (shell.node.job / "err").read_bytes() if "err" in end else seen
    assert b"apppot: " not in seen + said


def test_a_shell_says_that_its_home_stays_with_bind(shell):
    home = shell.node.job
    line = shlex.join(
        ["env", f"HOME={home}", *shell.node.argv("--net", "none", "--bind", str(home), "sh")]
    )
    shell.type(line + "\n")
    shell.expect(
        rf"apppot: a shell in \S+, `exit` leaves it; "
        rf"what you write in {re.escape(str(home))} stays; all else is gone at the end "
    )
    shell.expect(r"[$#] ")

    shell.type("exit\n")
    shell.expect("host> ")


def test_a_shell_by_the_name_of_the_original_writes_into_an_image_of_the_user(node, image):
    own = writable_copy(node, image)
    (node.root / "apppot-start").symlink_to("apppot_start.py")
    words = [sys.executable, node.root / "apppot-start", "--net", "none", "--apppot", own]
    screen = Screen(node, "sh", "-c", '"$@"; echo "ended with $?"; read line', "-", *words)
    screen.expect(rf"a shell in own.img, `exit` leaves it; .* goes into the image {re.escape(str(own))}\r\n")
    screen.expect(r"[$#] ")
    screen.type("exit\n")
    screen.expect("ended with 0\r\n")
    screen.type("\n")
    screen.process.wait(DEADLINE_S)
    screen.close()


@needs_root
def test_the_cycle_of_the_readme_goes_from_a_shell_of_one_user_to_a_job_of_another_elsewhere(node, kernel, image):
    """The other has the image and the changes file, and makes the next version."""
    text = (TOP / "README.md").read_text()
    lines = re.findall(r"^    (python3 .*changes v[12]\S*.*?)(?:  +#.*)?$", text, re.MULTILINE)
    first, *others = [shlex.split(line)[2:] for line in lines]
    with contextlib.contextmanager(make_node)(kernel, image, UNPRIVILEGED) as there:
        screen = Screen(node, *node.argv(*first))
        screen.expect(r"# ")
        screen.type("echo 1 > /etc/version; exit\n")
        screen.expect(r"saved \d+ files?, .*v1.tar.gz")
        assert screen.process.wait(DEADLINE_S) == 0
        screen.close()

        (node.job / "v1.tar.gz").rename(there.job / "v1.tar.gz")
        (there.job / "analyse").write_text("#!/bin/sh\ncat /etc/version\n")
        (there.job / "analyse").chmod(0o755)
        said = [there.run(*words) for words in others]
        assert [(one.returncode, one.stdout, one.stderr) for one in said] == [
            (0, out, b"") for out in (b"1\n", b"", b"2\n")
        ]


# --- Progress -------------------------------------------------------------------------------------


def test_merging_and_saving_show_how_far_they_are_and_leave_one_line(shell):
    shell.type(command_line(shell.node, "--save-changes", "a.tar.gz", "sh", "-c", "echo 'o''ut'; echo > ~/a") + "\n")
    shell.expect(r"out\r\n")
    shell.expect(r"\rapppot: looking for changes a.tar.gz: 0 files\x1b\[K\r")
    shell.expect(r"\r\x1b\[Kapppot: saved 1 file, 0\.0 MiB to \S+/a.tar.gz\r\n")
    shell.expect("host> ")

    shell.type(command_line(shell.node, "--changes", "a.tar.gz", "sh", "-c", "echo 'o''ut'") + "\n")
    line = r"\rapppot: merging a.tar.gz: {} of \d+ files, 0.\d of 0.\d MiB[^\r]*\x1b\[K"
    shell.expect(line.format("0") + "(" + line.format(r"\d+") + r")*\r\x1b\[Kout\r\n")
    shell.expect("host> ")

    words = ["--changes", "a.tar.gz", "--save-changes", "b.tar.gz", "echo", "out"]
    for line in (command_line(shell.node, "-q", *words), command_line(shell.node, *words) + " 2>&1 | cat"):
        shell.type(line + "\n")
        assert b"apppot: " not in shell.expect(r"\rout\r\n(?s:.*)host> ").group()


BIG = "dd if=/dev/urandom of=$HOME/big bs=1M count=128 2> /dev/null"


def test_ctrl_c_while_saving_ends_the_run_at_once_and_says_what_is_lost(shell):
    shell.type(command_line(shell.node, "--save-changes", "a.tar.gz", "sh", "-c", BIG) + "\n")
    shell.expect(r"\rapppot: saving a.tar.gz: ")
    shell.type(b"\3")
    shell.expect(r"\r\x1b\[Kapppot: interrupted: .* its changes are lost; \S+/a.tar.gz was not made\r\n")
    shell.expect("host> ")
    shell.type("echo $?\n")
    shell.expect(r"\r130\r\n")


def test_ctrl_c_while_merging_ends_the_run_before_the_command(shell):
    made = shell.node.run("--save-changes", "a.tar.gz", "sh", "-c", BIG)
    assert (made.returncode, made.stderr) == (0, b"")
    shell.type(command_line(shell.node, "--changes", "a.tar.gz", "echo", "out") + "\n")
    shell.expect(r"\rapppot: merging a.tar.gz: ")
    shell.type(b"\3")
    shell.expect(r"\r\x1b\[Kapppot: interrupted before the command started: nothing was changed\r\n")
    shell.expect("host> ")
    shell.type("echo $?\n")
    shell.expect(r"\r130\r\n")
