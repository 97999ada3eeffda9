# SPDX-License-Identifier: Apache-2.0
"""Callers and nodes as they come: descriptors, terminals, users, options, and crashes."""

import os
import pathlib
import pty
import signal
import subprocess
import termios
import threading

import pytest
from nodes import (
    DEADLINE_S,
    UNPRIVILEGED,
    Node,
    assert_error,
    assert_told,
    make_node,
    mounted,
    needs_root,
    wait_for,
    wait_for_state,
    writable_copy,
)

import apppot_start

NONCE = os.urandom(8).hex()


def redirected(redirection):
    return ("bash", "-c", f'exec "$@" {redirection}', "-")


# --- Descriptors of the caller --------------------------------------------------------------------


@pytest.mark.own_kernel
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_descriptor_is_no_matter(node, closed):
    script = f"cat; echo {NONCE}; echo {NONCE} >&2; : > ran; exit 3"
    status, stdout, stderr = node.finish(node.start("sh", "-c", script, wrap=redirected(closed)))
    said = NONCE.encode() + b"\n"
    expected = [b"" if end in closed.split() else said for end in (">&-", "2>&-")]
    assert [status, stdout, stderr] == [3, *expected]
    assert (node.job / "ran").exists() and os.listdir(node.job) == ["ran"]


@pytest.mark.own_kernel
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_an_error_with_a_closed_descriptor_is_125_and_no_traceback(node, closed):
    status, stdout, stderr = node.finish(
        node.start("--image", "/no/such", "true", wrap=redirected(closed))
    )
    assert (status, stdout) == (125, b"")
    if "2>&-" not in closed:
        assert_told(stderr, "/no/such")


def test_output_that_cannot_be_written_is_a_failure(node):
    result = node.run("echo", "x", wrap=redirected("> /dev/full"))
    assert result.returncode == 125
    assert_error(result, "No space left on device")


def test_a_non_blocking_stdin_is_read_to_its_end_and_stays_so(node):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    process = node.start("sh", "-c", "echo ready; cat", stdin=reader)
    assert process.stdout.readline() == b"ready\n"

    os.write(writer, NONCE.encode())
    os.close(writer)
    assert node.finish(process) == (0, NONCE.encode(), b"")
    assert not os.get_blocking(reader)
    os.close(reader)


def test_a_non_blocking_stdout_gets_every_byte_and_stays_so(node):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = node.start("sh", "-c", "head -c 1000000 /dev/zero; echo written >&2", stdout=writer)
    assert process.stderr.readline() == b"written\n"  # so the pipe of 64 KiB was full meanwhile
    assert not os.get_blocking(writer)

    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert len(file.read()) == 1000000
    assert process.wait(DEADLINE_S) == 0


def test_input_that_the_command_does_not_read_holds_no_signal_back(node):
    endless = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    process = node.start(
        "bash", "-c", "trap 'echo told; exit 4' TERM; echo ready; while :; do sleep 0.1; done",
        stdin=endless.stdout,
    )
    endless.stdout.close()
    assert process.stdout.readline() == b"ready\n"

    written = pathlib.Path(f"/proc/{endless.pid}/io")
    wait_for(
        lambda: (
            int(written.read_text().split("wchar: ")[1].split()[0]) > apppot_start.STDIN_WINDOW // 2
        )
    )
    process.terminate()
    assert node.finish(process)[:2] == (4, b"told\n")
    endless.kill(), endless.wait()


def test_what_a_command_leaves_running_does_not_hold_its_end_back(node):
    result = node.run("sh", "-c", f"setsid sleep 1000 & sleep 1000 & echo {NONCE}")
    assert (result.returncode, result.stdout, result.stderr) == (0, NONCE.encode() + b"\n", b"")


# --- Terminals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("until, status", [(b"Linux version", 130), (b"ready", 33)])
def test_ctrl_c_on_a_terminal_reaches_the_command_or_ends_the_boot(any_node, until, status):
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    os.fchown(follower, any_node.uid, -1)
    script = "trap 'echo told; exit 33' INT; echo ready; while :; do sleep 0.1; done"
    process = any_node.start(
        "-v", "bash", "-c", script, wrap=("setsid", "-c"), start_new_session=False,
        **dict.fromkeys(("stdin", "stdout", "stderr"), follower),
    )
    shown = b""
    while until not in shown:
        shown += os.read(leader, 4096)
    os.write(leader, b"\x03")

    assert process.wait(DEADLINE_S) == status
    assert termios.tcgetattr(follower) == before and os.get_blocking(follower)
    os.close(leader), os.close(follower)


# --- Users and nodes ------------------------------------------------------------------------------


@needs_root
def test_a_user_without_an_account_on_the_node_has_one_in_the_guest(kernel, image):
    for node in make_node(kernel, image, 4242):
        result = node.run(
            "sh", "-c", "id -u; id -g; sudo -n id -u; touch mine ~/mine; [ -O mine ] && id -un"
        )
        assert result.stdout.split() == [b"4242", b"4242", b"0", b"u4242"] and result.stderr == b""
        assert (node.job / "mine").stat().st_uid == 4242


@needs_root
def test_an_image_and_a_kernel_and_all_else_on_read_only_file_systems_are_enough(node, image):
    scratch = f"/tmp/.apppot-{node.mark}"
    places = (image.parent, node.root)
    binds = "".join(
        f"; mount --bind {place} {place}; mount -o remount,bind,ro {place}" for place in places
    )
    look = f'"$@"; status=$?; ls -A {scratch}; exit $status'
    pathlib.Path(scratch).mkdir()
    wrap = (*mounted(f"mount -t tmpfs none {scratch}{binds}"), "sh", "-c", look, "-")
    process = node.start(
        "sh", "-c", f"touch f || echo {NONCE}", wrap=wrap, env={"APPPOT_TMPDIR": scratch}
    )
    status, stdout, stderr = node.finish(process)
    os.rmdir(scratch)

    assert (
        (status, stdout) == (0, NONCE.encode() + b"\n")
        and b"Read-only" in stderr
        and b"apppot" not in stderr
    )


@needs_root
def test_what_an_unprivileged_caller_may_not_read_or_write_is_named(kernel, image):
    for node in make_node(kernel, image, UNPRIVILEGED):
        secret = node.root / "secret"
        secret.write_bytes(b"x")
        secret.chmod(0)
        os.chown(image, 0, -1)

        for words, name in (
            (["--image", str(secret)], secret), (["--kernel", str(secret)], secret),
            (["--write"], image), (["--tmpdir", "/root"], "/root"),
            (["--image", f"{node.root}/new:{image}"], "new"),
        ):
            result = node.run(*words, "true")
            assert (result.returncode, result.stdout) == (125, b"")
            assert_error(result, name)


@needs_root
def test_a_small_scratch_directory_is_enough_for_much_input(node):
    process = node.start(
        "sh", "-c", "sleep 1; cat | wc -c", stdin=subprocess.PIPE,
        wrap=mounted(f"mount -t tmpfs -o size=40m none {node.scratch}"),
    )
    threading.Thread(
        target=lambda: (process.stdin.write(bytes(200 << 20)), process.stdin.close())
    ).start()

    assert process.wait(DEADLINE_S) == 0
    assert (process.stdout.read(), process.stderr.read()) == (b"209715200\n", b"")


# --- Options --------------------------------------------------------------------------------------


def test_the_original_s_options_reach_the_guest_and_its_management_console(node, image, kernel):
    options = (
        "--apppot", str(image), "--uml", str(kernel), "--umid", "me", "--mem", "200", "-X",
        "nonce=" + NONCE,
    )

    process = node.start_ready(
        "cat /proc/cmdline; head -1 /proc/meminfo; read line", *options, stdin=subprocess.PIPE
    )
    assert f"nonce={NONCE}" in process.stdout.readline().decode().split()
    assert 150 << 10 < int(process.stdout.readline().split()[1]) < 200 << 10
    assert list(node.scratch.glob("apppot-*/me/mconsole"))

    process.stdin.close()
    assert process.wait(DEADLINE_S) == 1


@pytest.mark.own_kernel
def test_the_parts_are_found_in_the_environment_or_beside_the_script(node, image):
    def run(**environment):
        return node.run(
            "sh", "-c", f"echo {NONCE}; head -1 /proc/meminfo", env=environment
        ).stdout.split()

    node.argv = lambda *words, python, image: [python, str(node.root / "apppot_start.py"), *words]
    found = run(APPPOT_IMAGE=str(image), APPPOT_MEM="200")
    assert found[0].decode() == NONCE and int(found[2]) < 200 << 10
    (node.root / "apppot.img").symlink_to(image)
    found = run()
    assert found[0].decode() == NONCE and 900 << 10 < int(found[2]) < 1024 << 10


def test_a_timeout_during_the_boot_is_124_and_a_wrong_word_is_no_option(node):
    result = node.run("--timeout", "0.01", "true")
    assert result.returncode == 124
    assert_error(result, "walltime of 0.01 s")
    result = node.run("-")
    assert result.returncode == 127
    assert_error(result, "'-'")


def test_a_failure_shows_the_guest_s_last_words_under_v(node):
    result = node.run("-v", "--root", "sh", "-c", "echo c > /proc/sysrq-trigger")
    lines = result.stderr.decode(errors="replace").splitlines()
    assert result.returncode == 125 and any("Kernel panic" in line for line in lines)
    assert lines[-2].startswith("apppot: error: ") and lines[-1].startswith("apppot: hint: ")


# --- Crashes --------------------------------------------------------------------------------------


def test_a_suspended_run_can_be_ended(any_node):
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        process = any_node.start_ready("exec sleep 100")
        os.killpg(process.pid, signal.SIGSTOP)
        wait_for_state([process.pid], "T")
        process.send_signal(number)
        os.killpg(process.pid, signal.SIGCONT)
        assert any_node.finish(process)[0] == status

        any_node.wait_until_gone()
        wait_for(lambda: not os.listdir(any_node.scratch))


@pytest.mark.parametrize("kind", ["--write", "cow"])
def test_what_was_synced_survives_a_kill_while_writing(node, image, kind):
    own = writable_copy(node, image)
    place = f"{node.root}/kept.cow:{own}" if kind == "cow" else own
    options = ("--write",) if kind == "--write" else ()
    script = (
        f"echo {NONCE} > /root/kept; sync; echo synced; while :; do cat /bin/bash > /root/b; "
        "rm /root/b; done"
    )
    process = node.start_ready(script, "--root", *options, image=place)
    assert process.stdout.readline() == b"synced\n"

    process.kill()
    node.wait_until_gone()
    result = node.run("--root", "cat", "/root/kept", image=place)
    assert (result.returncode, result.stdout.decode(), result.stderr) == (0, NONCE + "\n", b"")


# --- The harness itself ---------------------------------------------------------------------------


def test_the_look_at_what_is_left_sees_a_process_and_a_file(kernel, image):
    node = Node(kernel, image, os.getuid())
    stray = subprocess.Popen(
        ["sleep", "100"], start_new_session=True,
        env={"PATH": os.environ["PATH"], "APPPOT_TEST": node.mark},
    )

    try:
        # While it executes a program, a process shows no environment.
        wait_for(lambda: node.processes() == [stray.pid])
        with pytest.raises(AssertionError):
            node.wait_until_gone(0.3)
        stray.kill(), stray.wait()
        (node.scratch / "left").touch()
        with pytest.raises(AssertionError):
            node.assert_nothing_left()
    finally:
        stray.kill(), stray.wait()
        node.close()
