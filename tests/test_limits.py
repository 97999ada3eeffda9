# SPDX-License-Identifier: Apache-2.0
"""The caller's resource limits are the command's, and strike as on the host."""

import os
import signal
import subprocess
import time

import pytest
from nodes import DEADLINE_S, TOP, assert_error, limited, list_descendants, wait_for

NAMES = ("CPU", "FSIZE", "DATA", "STACK", "CORE", "NOFILE", "MEMLOCK", "AS")
SHOW = (
    "import resource\nfor name in {}: print(name, *resource.getrlimit(getattr(resource, 'RLIMIT_' "
    "+ name)))"
)
XCPU, XFSZ, KILL = (128 + number for number in (signal.SIGXCPU, signal.SIGXFSZ, signal.SIGKILL))
PYTHON = (
    "/usr/bin/python3"  # pyenv's shim is a script, which uses CPU time; and a user may not reach it
)
SPIN = {"sh": ("sh", "-c", "while :; do :; done"), "python": ("python3", "-c", "while True: pass")}


@pytest.mark.parametrize(
    "limits",
    [
        "-S -s unlimited; -S -t 500; -H -t 900; -S -f 600; -S -d 700000; -S -c 0; -S -n 15; "
        "-S -l 32; -S -v 800000",
        "-s 12345; -f 3000000; -n 5000; -l 48; -v 3000000; -d 3000000; -t 1000; -c 7",
    ],
)
def test_the_limits_of_the_caller_are_the_command_s(any_node, limits):
    show = SHOW.format(NAMES)
    expected = subprocess.run(
        [*limited(limits), PYTHON, "-c", show], stdout=subprocess.PIPE, check=True
    ).stdout

    result = any_node.run(
        "--net", "none", "python3", "-c", show, python=PYTHON, wrap=limited(limits)
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, b"")


def test_stack_and_open_files_beyond_the_guest_s_own_are_usable(node):
    script = (
        "import resource, threading\n"
        "files = [open('/dev/null') for _ in range(4500)]\n"
        "def deep(n): return n and 1 + max(map(deep, [n - 1]))\n"
        "import sys; sys.setrecursionlimit(200000); threading.stack_size(0)\n"
        "print(len(files), resource.getrlimit(resource.RLIMIT_STACK)[0])\n"
    )

    result = node.run(
        "--net", "none", "python3", "-c", script, python=PYTHON,
        wrap=limited("-s unlimited; -n 5000"),
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"4500 -1\n", b"")


# --- CPU time -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits, words, status",
    [
        ("-S -t 1", SPIN["sh"], XCPU),
        ("-t 2", SPIN["python"], KILL),
        ("-t 2; -S -t 1", SPIN["python"], XCPU),
    ],
)
def test_a_limit_of_cpu_time_strikes_as_on_the_host(any_node, limits, words, status):
    result = any_node.run("--net", "none", *words, python=PYTHON, wrap=limited(limits))
    assert (result.returncode, result.stdout, result.stderr) == (status, b"", b"")


def test_a_command_may_live_from_its_soft_to_its_hard_limit(node):
    script = (
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: print('warned', "
        "flush=True))\nwhile True: pass"
    )
    result = node.run(
        "--net", "none", "python3", "-c", script, python=PYTHON, wrap=limited("-t 3; -S -t 2")
    )
    assert (result.returncode, result.stdout, result.stderr) == (KILL, b"warned\n", b"")


def test_a_limit_of_cpu_time_is_for_each_process(node):
    spin = "import time\nwhile time.process_time() < 0.4: pass"
    script = (
        f"for i in 1 2 3 4; do python3 -c '{spin}' || exit; done; python3 -c 'while True: pass'; "
        "echo $?"
    )
    result = node.run("--net", "none", "sh", "-c", script, python=PYTHON, wrap=limited("-S -t 1"))
    assert (result.returncode, result.stdout.decode()) == (0, f"{XCPU}\n")


def test_in_a_batch_job_the_runner_dies_of_the_limit_as_the_command(node):
    result = node.run(
        "--net", "none", *SPIN["sh"], python=PYTHON, wrap=limited("-S -t 1"),
        env={"SLURM_JOB_ID": "1"},
    )
    assert (result.returncode, result.stderr) == (-signal.SIGXCPU, b"")


def test_the_limit_that_the_kernel_has_used_up_for_all_processes_is_named(any_node):
    # None of these processes lives long.
    script = "while :; do sh -c 'for i in $(seq 50); do /bin/true; done'; done"
    result = any_node.run("--net", "none", "sh", "-c", script, python=PYTHON, wrap=limited("-t 2"))
    assert result.returncode == 125
    assert_error(result, "the guest's kernel", "of CPU time used; the limit (ulimit -t) is 2 s")


def test_a_process_that_the_host_kills_late_is_not_somebody_s_victim_for_sure(any_node):
    words = (
        "python3",
        "-c",
        "import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)",
    )
    process = any_node.start("--net", "none", *words, python=PYTHON, wrap=limited("-t 3"))
    assert process.stdout.readline() == b"ready\n"

    started = time.monotonic()
    wait_for(lambda: time.monotonic() > started + 3)  # so much CPU time can have been used now
    # The youngest is the command, which its pid does not tell: pids begin again at 300.
    os.kill(list_descendants(any_node.list_parts(process)["kernel"])[-1], signal.SIGKILL)
    status, _, stderr = any_node.finish(process)
    assert status in (125, KILL)  # 6.16 and newer end the run, older kernels the process
    assert b"killed on the host, perhaps for its CPU time: the limit (ulimit -t) is 3 s" in stderr


# --- File size ------------------------------------------------------------------------------------


def test_a_limit_of_file_size_strikes_as_on_the_host(any_node):
    def run(command, mode=None):
        with open(any_node.job / "out", mode or "wb") as out:
            words = ("--net", "none", "sh", "-c", command)
            result = any_node.run(*words, python=PYTHON, wrap=limited("-S -f 20"), stdout=out)
        return result.returncode, (any_node.job / "out").stat().st_size, result.stderr

    warning = b"apppot: warning: output of the command reached the limit of file size (ulimit -f)\n"
    assert run("head -c 30000 /dev/zero > file") == (XFSZ, 0, b"File size limit exceeded\n")
    assert (any_node.job / "file").stat().st_size == 20480
    assert run("exec yes") == (XFSZ, 20480, warning)
    assert run("echo more", "ab") == (XFSZ, 20480, warning)


def test_a_limit_of_file_size_is_not_for_pipes_nor_for_what_apppot_writes(node):
    content = os.urandom(3 << 20)
    result = node.run("--net", "none", "cat", input=content, python=PYTHON, wrap=limited("-S -f 1"))
    assert (result.returncode, result.stdout, result.stderr) == (0, content, b"")


# --- Shared memory --------------------------------------------------------------------------------


def test_shared_memory_is_as_large_as_the_guest_s_memory(node):
    script = (
        "df --output=size /dev/shm | tail -1; grep MemTotal /proc/meminfo; "
        "head -c 80M /dev/zero > /dev/shm/x"
    )
    result = node.run("--net", "none", "--mem", "128M", "sh", "-c", script)
    size, _, total, _ = result.stdout.split()
    assert (result.returncode, result.stderr) == (0, b"") and int(size) >= 0.95 * int(total)


def test_a_process_knows_what_it_has_used_of_its_limit():
    script = (
        "import os, resource, sys; sys.path.insert(0, sys.argv[1]); import apppot_start as runner\n"
        "print(runner.blame_cpu_limit(os.getpid(), 'nobody'))\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\n"
        "limits = runner.take_limits()\n"
        "print(runner.Limit(resource.RLIMIT_CPU, 1, 2) in limits, "
        "resource.getrlimit(resource.RLIMIT_CPU))\n"
        "while not runner.blame_cpu_limit(os.getpid(), 'it'): pass\n"
        "print(runner.blame_cpu_limit(os.getpid(), 'it').message)\n"
    )
    result = subprocess.run(
        [PYTHON, "-c", script, str(TOP)], stdout=subprocess.PIPE, check=True, timeout=DEADLINE_S
    )

    last = b"it has ended with 0.5 s of CPU time used; the limit (ulimit -t) is 2 s\n"
    assert result.stdout == b"None\nTrue (1, 2)\n" + last
