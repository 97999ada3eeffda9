# SPDX-License-Identifier: Apache-2.0
"""How runs end: by signals, suspended on the way, killed, failed. Nothing is left of any."""

import os
import pathlib
import signal
import subprocess
import time

import pytest
from nodes import (
    DEADLINE_S,
    assert_error,
    assert_told,
    both_carriers,
    change_image,
    is_alive,
    limited,
    list_descendants,
    make_node,
    mounted,
    needs_root,
    pythons,
    read_cpu_time,
    replace_agent,
    require,
    wait_for,
    wait_for_state,
    writable_copy,
)

FORWARDED = ["TERM", "INT", "HUP", "USR1", "USR2", "QUIT", "XCPU"]


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORWARDED)
def test_a_signal_to_the_runner_reaches_the_whole_process_group(node, name):
    # Both shells trap the signal: the group gets it, not only its leader, which acts when its child
    # has ended.
    process = node.start_ready(
        f"trap 'echo leader; exit 33' {name}\n"
        f"bash -c 'trap \"echo child; exit\" {name}; echo up; while :; do sleep 0.05; done'\n"
        "while :; do sleep 0.05; done"
    )
    assert process.stdout.readline() == b"up\n"

    process.send_signal(getattr(signal, "SIG" + name))
    assert node.finish(process)[:2] == (33, b"child\nleader\n")


@both_carriers
def test_an_untrapped_signal_ends_the_command_with_its_number(any_node):
    process = any_node.start_ready("exec sleep 100")
    process.send_signal(signal.SIGUSR2)
    assert any_node.finish(process) == (128 + signal.SIGUSR2, b"", b"")


def test_signals_ignored_by_the_caller_are_ignored_by_the_command(node):
    process = node.start_ready("sleep 1; echo alive", wrap=("nohup",))
    process.send_signal(signal.SIGHUP)
    assert node.finish(process)[:2] == (0, b"alive\n")


def test_a_command_that_ignores_sigterm_is_ended(node):
    stubborn = "trap '' TERM; echo deaf; while :; do sleep 0.1; done"
    for options, terms in ((("--kill-after", "0.5"), 1), (("--kill-after", "0"), 2)):
        process = node.start_ready(stubborn, *options)
        assert process.stdout.readline() == b"deaf\n"
        for _ in range(terms):
            process.terminate()
            time.sleep(0.2)  # two signals in one moment are one
        assert node.finish(process) == (128 + signal.SIGKILL, b"", b"")


def test_two_sigterms_of_one_moment_are_one(node):
    # As of a batch system and, at once, of --die-with-parent.
    process = node.start_ready(
        "trap 'sleep 0.5; echo told; exit 3' TERM; echo set; while :; do sleep 0.1; done"
    )
    assert process.stdout.readline() == b"set\n"

    process.terminate()
    time.sleep(0.01)  # else the host's kernel makes one of them
    process.terminate()
    assert node.finish(process)[:2] == (3, b"told\n")


def test_a_signal_during_the_boot_ends_it_at_once(node):
    process = node.start("-v", "sleep", "100")
    while b"Linux version" not in process.stderr.readline():
        pass
    process.terminate()
    assert node.finish(process)[:2] == (128 + signal.SIGTERM, b"")


@both_carriers
def test_a_timeout_ends_the_command_with_124(node):
    result = node.run(
        "--timeout", "6s", "sh", "-c",
        "trap 'echo warned; exit 0' TERM; while :; do sleep 0.1; done 2> /dev/null",
    )
    assert (result.returncode, result.stdout) == (124, b"warned\n")

    result.stderr = result.stderr.replace(b"Terminated\n", b"")  # the guest's shell, of its sleep
    assert_error(result, "walltime")


@both_carriers
# README's limits say why USR1 is not among them.
@pytest.mark.parametrize("name", [name for name in FORWARDED if name != "USR1"])
def test_a_signal_to_every_process_of_a_run_reaches_only_the_command(node, name):
    process = node.start_ready(
        f"trap 'echo told; exit 9' {name}; echo trapped; while :; do sleep 0.1; done"
    )
    assert process.stdout.readline() == b"trapped\n"
    node.signal_all(getattr(signal, "SIG" + name))
    assert node.finish(process)[:2] == (9, b"told\n")


@both_carriers
def test_a_run_ends_with_its_parent_where_asked_to(any_node):
    # The shell is killed, as by a batch system that knows no other process of the job.
    wrap = ("bash", "-c", '"$@" & wait', "-")
    script = "trap 'echo told; exit' TERM; echo ready; while :; do sleep 0.1; done 2> /dev/null"
    process = any_node.start("--die-with-parent", "bash", "-c", script, wrap=wrap)
    assert process.stdout.readline() == b"ready\n"

    process.kill()
    assert process.stdout.read() == b"told\n"
    any_node.wait_until_gone(5)


def test_a_run_ends_with_the_process_above_that_it_is_to_end_with(node):
    (node.job / "wrapper").write_text(
        '#!/bin/bash\n(bash -c \'"$@"; exit\' - "$@"; exit) & echo $!; wait\n'
    )
    (node.job / "wrapper").chmod(0o755)
    script = "trap 'echo told; exit' TERM; echo ready; while :; do sleep 0.1; done 2> /dev/null"
    process = node.start("--die-with", "wrapper", "bash", "-c", script, wrap=("./wrapper",))

    wrapper = int(process.stdout.readline())  # the nearest of two
    assert process.stdout.readline() == b"ready\n"

    os.kill(wrapper, signal.SIGKILL)
    assert process.stdout.read() == b"told\n"
    node.wait_until_gone(5)


ABOVE = [["--die-with-parent"], ["--die-with", "no-such-process"], ["--die-with", "pytest"]]


@pytest.mark.own_kernel
@pytest.mark.parametrize("options", ABOVE)
def test_a_process_above_that_lives_or_is_not_there_is_no_matter(node, options):
    assert node.run(*options, "sh", "-c", "sleep 2; exit 3").returncode == 3


def test_a_guest_that_runs_out_of_memory_says_so(node):
    result = node.run("--mem", "128M", "tail", "/dev/zero")
    assert result.returncode == 128 + signal.SIGKILL
    assert result.stderr.startswith(
        b"apppot: warning: guest was out of memory, of which it has 128 MiB"
    )


@pytest.mark.own_kernel
def test_a_walltime_longer_than_poll_can_wait_is_kept(node):
    for time_s in ("30d", "999999999d"):
        result = node.run(
            "--timeout", time_s, "--kill-after", time_s, "sh", "-c", "sleep 0.2; echo over"
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, b"over\n", b"")


# --- Suspend and resume ---------------------------------------------------------------------------

WORK = "for i in 1 2 3 4 5 6 7 8; do sha256sum data || exit; done | sort | uniq -c | wc -l"


def start_work(node, **options):
    (node.job / "data").write_bytes(os.urandom(20 << 20))
    return node.start_ready(WORK, **options)


@both_carriers
def test_sigtstp_then_sigstop_of_everything_then_sigcont_as_slurm_does(any_node):
    process = start_work(any_node)
    process.send_signal(signal.SIGTSTP)
    time.sleep(1)  # what Slurm does; there is no event to wait for
    any_node.signal_all(signal.SIGSTOP)
    wait_for_state([process.pid], "T")
    time.sleep(0.5)
    any_node.signal_all(signal.SIGCONT)
    assert any_node.finish(process) == (0, b"1\n", b"")


@both_carriers
def test_the_runner_s_continuation_continues_what_was_stopped_with_it(any_node):
    """Else its own SIGSTOP would stop a process of the guest: with ptrace that is a panic."""
    process = start_work(any_node)
    process.send_signal(signal.SIGTSTP)
    wait_for_state([process.pid], "T")
    any_node.signal_all(signal.SIGSTOP)
    wait_for_state(any_node.processes(), "Tt")
    process.send_signal(signal.SIGCONT)
    assert any_node.finish(process) == (0, b"1\n", b"")


@both_carriers
def test_sigstop_and_sigcont_of_the_runner_s_group_as_grid_engine_does(any_node):
    process = start_work(any_node)
    os.killpg(process.pid, signal.SIGSTOP)
    wait_for_state([process.pid], "T")
    time.sleep(1)
    used = read_cpu_time(any_node.processes())
    time.sleep(0.5)
    assert read_cpu_time(any_node.processes()) - used < 0.1, "a suspended guest computes"

    os.killpg(process.pid, signal.SIGCONT)
    assert any_node.finish(process) == (0, b"1\n", b"")


@pytest.fixture
def freezer():
    """A freezer cgroup of version 1 or 2: a directory, its control file, and that file's words."""
    places = (
        ("/sys/fs/cgroup/freezer", "freezer.state", "FROZEN", "THAWED"),
        ("/sys/fs/cgroup", "cgroup.freeze", "1", "0"),
    )

    for parent, name, freeze, thaw in places:
        group = pathlib.Path(parent, f"apppot-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        yield group, group / name, freeze, thaw
        wait_for(lambda members=group / "cgroup.procs": not members.read_text())
        group.rmdir()
        return
    require(False, "no freezer cgroup can be made here")


@both_carriers
def test_a_frozen_cgroup_goes_on(node, freezer):
    group, control, freeze, thaw = freezer
    process = start_work(node, wrap=("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "-"))
    control.write_text(freeze)
    time.sleep(1)
    control.write_text(thaw)
    assert node.finish(process) == (0, b"1\n", b"")


# --- Killed ---------------------------------------------------------------------------------------


@both_carriers
@pytest.mark.parametrize(
    "victim, words",
    [
        ("runner", None),
        ("supervisor", "supervisor"),
        ("file server", "the file server of the run was killed"),
        ("kernel", "guest was killed"),
        ("first child", ""),
        ("second child", ""),
    ],
)
def test_after_sigkill_of_any_part_nothing_is_left(any_node, victim, words):
    kill_and_look(any_node, victim, words)


@pytest.mark.parametrize("carrier", ["empty"], indirect=True)
def test_after_sigkill_of_empty_nothing_is_left(any_node):
    kill_and_look(any_node, "empty", "`empty`, which carried the channel, was killed")


def kill_and_look(any_node, victim, words):
    # Command and agent work: a kernel in seccomp mode tells that a process is lost when that should
    # run.
    # The network's helpers are killed in test_net.py.
    process = any_node.start_ready("while echo; do sleep 0.1; done", "--net", "none")
    os.kill(any_node.list_parts(process)[victim], signal.SIGKILL)
    any_node.wait_until_gone(2)
    status, _, stderr = any_node.finish(process)

    if words is None:
        assert status == -signal.SIGKILL
    else:
        assert status == 125 and words in stderr.decode()
        assert_told(stderr)
    wait_for(lambda: not os.listdir(any_node.scratch))


@both_carriers
def test_a_guest_ends_with_runner_and_supervisor_killed_at_once(node):
    process = node.start_ready("while :; do :; done", "--net", "none")
    parts = node.list_parts(process)
    all_parts = list_descendants(process.pid)
    for name in ("runner", "supervisor"):
        os.kill(parts[name], signal.SIGSTOP)  # so that neither acts on the other's end
    for name in ("supervisor", "runner"):
        os.kill(parts[name], signal.SIGKILL)
    process.wait(DEADLINE_S)
    wait_for(lambda: not any(map(is_alive, all_parts)))  # nobody need be there to reap them
    node.wait_until_gone()
    assert node.run("true").returncode == 0  # removes what was left of the other


def test_what_a_kill_of_everything_left_the_next_run_removes(node):
    process = node.start_ready("exec sleep 100")
    node.kill_at_once()
    node.finish(process)
    node.wait_until_gone()
    assert os.listdir(node.scratch)
    assert node.run("true").returncode == 0  # the fixture looks that nothing is left


@needs_root
def test_a_kill_of_everything_leaves_nothing_in_shared_memory(node):
    # Many batch systems remove the job's scratch directory, but not what is there.
    look = '"$@" & read line; ls -A /dev/shm; kill -9 $!; wait'
    wrap = (*mounted("mount -t tmpfs none /dev/shm"), "bash", "-c", look, "-")
    process = node.start_ready("exec sleep 100", wrap=wrap, stdin=subprocess.PIPE)
    process.stdin.write(b"look\n")
    assert node.finish(process)[1] == b""


def test_a_run_does_not_remove_the_directory_of_another(node):
    first = node.start_ready("read line; echo still $line", stdin=subprocess.PIPE)
    assert node.run("true").returncode == 0
    first.stdin.write(b"here\n")
    assert node.finish(first) == (0, b"still here\n", b"")


# --- Failed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, words",
    [
        ("echo c > /proc/sysrq-trigger", "panic"),
        ("echo o > /proc/sysrq-trigger; sleep 60", "ended before the command"),
        ("echo b > /proc/sysrq-trigger; sleep 60", "before the command"),
    ],
)
@both_carriers
def test_a_guest_that_goes_away_is_a_failure(any_node, script, words):
    result = any_node.run("--root", "sh", "-c", "echo written; " + script)
    assert result.returncode == 125
    assert_error(result, words)


@pytest.mark.own_kernel
@pytest.mark.parametrize("letter", ["o", "b"])
def test_a_guest_that_goes_away_does_not_wait_for_a_lock(node, letter):
    """Nobody gives the lock back, and the kernel must not wait for the answer."""
    script = f"""
        touch lock
        exec 9< lock
        flock 9
        flock lock true 2> /dev/null &
        asleep=0
        until [ $asleep = 100 ]; do
            [ "$(cut -d ' ' -f 3 /proc/$!/stat)" = S ] && asleep=$((asleep + 1)) || asleep=0
        done
        echo {letter} > /proc/sysrq-trigger
        sleep 60
    """
    result = node.run("--root", "sh", "-c", script)
    assert result.returncode == 125
    assert_error(result, "before the command")


@pytest.mark.own_kernel
def test_an_agent_that_fails_says_so(node, image):
    own = writable_copy(node, image)
    launcher = (
        "#!/usr/bin/python3 -IS\nimport sys; sys.path.insert(0, '/usr/lib/apppot')\n"
        "import apppot_init\n{}\napppot_init.main()\n"
    )
    replace_agent(node, own, launcher.format("apppot_init.make_account = None"))

    result = node.run("true", image=own)
    assert result.returncode == 125
    assert_error(result, "agent", "TypeError")
    assert b"Traceback" in node.run("-v", "true", image=own).stderr

    replace_agent(node, own, launcher.format("raise SystemExit(3)"))
    result = node.run("true", image=own)
    assert result.returncode == 125
    assert_error(result, "panic")


@pytest.mark.own_kernel
def test_an_image_without_the_agent_is_named(node, image):
    own = writable_copy(node, image)
    change_image(own, "rm /usr/sbin/apppot-init\n")
    result = node.run("true", image=own)
    assert result.returncode == 125
    assert_error(result, "no agent", own)


def test_a_boot_that_hangs_is_given_up(node, image):
    own = writable_copy(node, image)
    replace_agent(node, own, "#!/bin/sh\nsleep 100\n")
    result = node.run("--boot-timeout", "3", "true", image=own)
    assert result.returncode == 125
    assert_error(result, "did not start within 3 s")


@pytest.mark.own_kernel
@pytest.mark.parametrize("kernel_of", ["/bin/true", "/bin/cat", "text", "missing", "directory"])
def test_a_kernel_that_is_not_uml_is_named(node, kernel_of):
    (node.root / "text").write_text("#!/bin/sh\nexit 0\n")
    (node.root / "directory").mkdir()
    path = kernel_of if kernel_of.startswith("/") else str(node.root / kernel_of)
    result = node.run("--kernel", path, "true")
    assert result.returncode == 125 and result.stdout == b""
    assert_error(result, path)


def test_a_kernel_that_lost_its_execute_bit_is_used(node, kernel):
    copy = node.root / "staged"
    copy.write_bytes(kernel.read_bytes())
    assert node.run("--kernel", str(copy), "echo", "up").stdout == b"up\n"


# --- Odd nodes ------------------------------------------------------------------------------------


@pytest.mark.own_kernel
@pytest.mark.parametrize("python", pythons())
def test_every_python_here_runs_it_with_an_empty_environment(kernel, image, python):
    # The node is root's, as other users cannot reach every Python.
    for node in make_node(kernel, image, os.getuid()):
        result = node.run(
            "sh", "-c", "cat; exit 5", input=b"in\n", python=pythons()[python], env={"PATH": None}
        )
        assert (result.returncode, result.stdout, result.stderr) == (5, b"in\n", b"")


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": None},
        {"HOME": "/no/such"},
        {"HOME": "/proc"},
        {"TMPDIR": "/no/such"},
        {"TMPDIR": "/proc"},
        {"TMPDIR": "/tmp/" + "x/" * 400},
    ],
)
def test_directories_of_the_environment_that_are_no_use_are_passed_over(any_node, environment):
    result = any_node.run("echo", "up", env={**environment, "APPPOT_TMPDIR": None})
    assert (result.returncode, result.stdout, result.stderr) == (0, b"up\n", b"")


@pytest.mark.parametrize("limits", ["-n 64", "-v 2000000", "-t 600", "-s unlimited", "-u 2000"])
def test_limits_that_leave_room_are_no_matter(node, limits):
    result = node.run("echo", "up", wrap=limited(limits))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"up\n", b"")


@pytest.mark.parametrize(
    "limits, words",
    [("-v 900000", "address space"), ("-f 500000", "file size"), ("-n 20", "open files")],
)
def test_limits_that_leave_no_room_are_named(node, limits, words):
    result = node.run("true", wrap=limited(limits))
    assert result.returncode == 125
    assert_error(result, words)


@needs_root
@pytest.mark.parametrize("options", ["noexec", "size=1m", "ro"])
def test_a_shared_memory_directory_that_is_no_use_is_passed_over(node, options):
    wrap = mounted(f"mount -t tmpfs -o {options} none /dev/shm")
    assert node.finish(node.start("echo", "up", wrap=wrap)) == (0, b"up\n", b"")


@needs_root
@pytest.mark.parametrize(
    "options, words",
    [("noexec", "noexec"), ("size=100m", "100 MiB free"), ("ro", "cannot be written")],
)
def test_no_place_for_the_memory_is_told_with_directory_and_need(node, options, words):
    wrap = mounted(
        f"for d in /dev/shm /tmp/.apppot-{node.mark}; do mkdir -p $d; "
        f"mount -t tmpfs -o {options} none $d; done"
    )
    process = node.start("true", wrap=wrap, env={"APPPOT_TMPDIR": f"/tmp/.apppot-{node.mark}"})
    status, _, stderr = node.finish(process)
    os.rmdir(f"/tmp/.apppot-{node.mark}")

    assert status == 125
    assert_told(stderr, "/dev/shm", "1.0 GiB", words)


@needs_root
def test_a_scratch_directory_that_fills_up_is_left_empty(node):
    # Only the run sees this mount, so a shell in the same namespace lists it.
    look = f'"$@"; status=$?; ls -A {node.scratch}; exit $status'
    wrap = (*mounted(f"mount -t tmpfs -o size=60m none {node.scratch}"), "sh", "-c", look, "-")
    script = "dd if=/dev/zero of=/root/big bs=1M count=200 status=none && sync"

    result = node.run("--root", "sh", "-c", script, wrap=wrap)
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, "scratch is full", node.scratch)


def test_a_read_only_current_directory_and_image_are_enough(any_node, image):
    any_node.job.chmod(0o555)
    assert any_node.run("sh", "-c", "pwd").stdout.decode() == f"{any_node.job}\n"
    require(
        not os.access(image, os.W_OK) or os.getuid() == 0,
        "the image should be read-only for this test",
    )
    any_node.job.chmod(0o755)


def test_a_stuck_reader_does_not_outlive_a_kill(node):
    process = node.start_ready("cat /dev/zero")
    process.terminate()
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
