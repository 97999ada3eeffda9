# SPDX-License-Identifier: Apache-2.0
"""Jobs of a real Slurm, with AppPot and without: Slurm must not see a difference."""

import os
import re

import pytest
from engines import BYSTANDER, DIES, HANDLES, IGNORES, RUNNER, USER, WORKS, Pair, Slurm
from nodes import require, wait_for

PROCTRACKS = ("linuxproc", "pgid", "cgroup")
MARK = os.urandom(4).hex()

STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.1; done 2> /dev/null"


class Jobs(Pair):
    def submit(self, directory, command, *options):
        # The batch system's own shell comes first, and the command has a closed stdin.
        job = f"#!/bin/sh\nexec {command} 0<&-\n"
        return self.site.submit(
            job, "--output=out", *options, user=self.user, cwd=self.site.inside(directory)
        )

    def wait_ended(self, job, seconds=60):
        return self.site.wait_ended(job, seconds)

    def output(self, number, name="out"):
        return [line for line in super().output(number, name) if not line.startswith("slurmstepd-")]


@pytest.fixture(scope="session")
def clusters(kernel, image):
    """A Slurm for each way to track processes. Jobs that reach their time limit start first."""
    require(os.getuid() == 0, "the daemons of a batch system need root")
    found = {}

    try:
        for proctrack in PROCTRACKS:
            found[proctrack] = slurm = Slurm(kernel, image, proctrack)
            limited = ("--time=1", "--signal=B:USR1@30")
            slurm.limited = [
                Jobs(slurm, "trap 'echo warned' USR1\n" + script, *limited, user=BYSTANDER)
                for script in (HANDLES.format("TERM"), STUBBORN)
            ]
        yield found
    finally:
        for slurm in found.values():
            slurm.close()


@pytest.fixture(params=PROCTRACKS)
def slurm(clusters, request):
    return clusters[request.param]


def with_one(function):
    """With one of the three is enough."""
    return pytest.mark.parametrize("slurm", ["cgroup"], indirect=True)(function)


# --- Ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, state, code",
    [
        ("exit 0", "COMPLETED", "0:0"),
        ("exit 7", "FAILED", "7:0"),
        ("exit 137", "FAILED", "137:0"),
        ("kill -SEGV $$", "FAILED", "0:11"),
    ],
)
def test_a_job_ends_as_its_command_does(slurm, script, state, code):
    assert Jobs(slurm, f"echo {MARK}; {script}").end() == ((state, code), [MARK])


@pytest.mark.parametrize(
    "script, code, output",
    [
        (HANDLES.format("TERM"), "42:0", ["ready", "told"]),
        (IGNORES.format("TERM"), "0:9", ["ready"]),
        (DIES, "0:15", ["ready"]),
    ],
)
def test_scancel_warns_the_command_and_ends_it(slurm, script, code, output):
    jobs = Jobs(slurm, script)
    jobs.wait_for_line("ready")
    jobs.each("scancel", user=USER)
    assert jobs.end() == (("CANCELLED", code), output)


@pytest.mark.parametrize("option", ["--full", "--batch"])
def test_a_signal_of_scancel_reaches_the_command(slurm, option):
    jobs = Jobs(slurm, HANDLES.format("USR1"))
    jobs.wait_for_line("ready")
    jobs.each("scancel", "--signal=USR1", option, user=USER)
    assert jobs.end() == (("FAILED", "42:0"), ["ready", "told"])


@pytest.mark.both_kernels
def test_a_suspended_job_stands_still_and_goes_on_with_its_data_intact(slurm):
    jobs = Jobs(slurm, WORKS)
    jobs.wait_for_line("ready")
    jobs.each("scontrol", "suspend")
    assert [slurm.show(job)["JobState"] for job in jobs.ids] == ["SUSPENDED", "SUSPENDED"]

    wait_for(lambda: not slurm.is_computing())
    jobs.each("scontrol", "resume")
    wait_for(slurm.is_computing)
    for directory in jobs.directories:
        (directory / "go").touch()
    assert jobs.end() == (("FAILED", "3:0"), ["ready", "right"])


def test_a_requeued_job_begins_again(slurm):
    script = (
        "echo run ${SLURM_RESTART_COUNT:-0}; [ ${SLURM_RESTART_COUNT:-0} = 0 ] || exit 5\n" + DIES
    )
    jobs = Jobs(slurm, script, "--requeue", "--open-mode=append")
    jobs.wait_for_line("ready")
    jobs.each("scontrol", "requeue")

    for job in jobs.ids:
        wait_for(lambda job=job: slurm.show(job)["JobState"] == "PENDING")
        # Slurm would have it wait for two minutes; in the second of its end slurmd refuses it.
        slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    assert jobs.end() == (("FAILED", "5:0"), ["run 0", "ready", "run 1"])
    assert [slurm.show(job)["Restarts"] for job in jobs.ids] == ["1", "1"]


def test_output_of_a_job_killed_at_once_is_there_to_the_last_byte(slurm):
    script = "i=0; while :; do i=$((i + 1)); echo line $i; echo $i >> written; done"
    jobs = Jobs(slurm, script)
    jobs.wait_for_line("line 100")
    jobs.each("scancel", "--signal=KILL", "--full", user=USER)
    for job in jobs.ids:
        slurm.wait_ended(job)
    wait_for(lambda: not slurm.processes())

    for number in (0, 1):
        # The last line may be cut.
        *_, last, _ = (jobs.directories[number] / "written").read_text().split("\n")
        assert f"line {last}" in jobs.output(number)


HOG = "echo ready; exec tail /dev/zero"


@with_one
@pytest.mark.parametrize("options", ["", "--mem 200"])
def test_a_job_is_out_of_memory_as_without_apppot(slurm, options):
    # By default the guest is first, as it has less than the job; a guest as large as the job is
    # killed as a whole.
    jobs = Jobs(slurm, HOG, "--mem=200", options=options)
    plain, ours = (slurm.wait_ended(job) for job in jobs.ids)
    assert plain == ours == ("OUT_OF_MEMORY", "0:125")

    said = (
        "was the memory that the job asked for used up?" if options else "guest was out of memory"
    )
    assert said in "\n".join(jobs.output(1))
    slurm.assert_nothing_left()


@with_one
def test_a_job_is_out_of_memory_also_when_its_command_copes(slurm):
    jobs = Jobs(slurm, "echo ready; tail /dev/zero; exit 3", "--mem=200")
    plain, ours = (slurm.wait_ended(job) for job in jobs.ids)
    assert plain == ours == ("OUT_OF_MEMORY", "0:125")
    slurm.assert_nothing_left()


@with_one
def test_a_guest_smaller_than_its_job_is_out_of_memory_alone(slurm):
    jobs = Jobs(slurm, HOG, "--mem=300", options="--mem 128M")
    assert slurm.wait_ended(jobs.ids[1]) == ("FAILED", "0:9")
    assert "guest was out of memory" in "\n".join(jobs.output(1))


def test_a_job_at_its_time_limit_is_warned_and_ended(slurm):
    handles, ignores = slurm.limited
    for jobs, code, output in (
        (handles, "42:0", ["ready", "warned", "told"]),
        (ignores, "0:9", ["ready", "warned"]),
    ):
        for job in jobs.ids:
            slurm.wait_ended(job, 200)
        assert jobs.end() == (("TIMEOUT", code), output)


def test_a_run_whose_batch_shell_was_ended_alone_ends_where_asked_to(slurm):
    # The shell dies of SIGTERM at once, since it did not exec; then Slurm may look no further.
    directory = slurm.new_directory()
    words = "--kill-after 20 --die-with-parent "
    words += "sh -c 'trap \"echo told; exit\" TERM; echo ready; while :; do sleep 0.1; done'"
    job = slurm.submit(
        f"#!/bin/sh\n{RUNNER} {words} > out 2> err\nexit\n", cwd=slurm.inside(directory)
    )
    out = directory / "out"
    wait_for(lambda: out.exists() and out.read_text() == "ready\n")
    slurm.run("scancel", job, user=USER)
    assert slurm.wait_ended(job) == ("CANCELLED", "0:15")

    wait_for(lambda: not slurm.processes(), 10)
    if slurm.proctrack == "linuxproc":
        assert out.read_text() == "ready\ntold\n"
        slurm.assert_nothing_left()


# --- What a job is granted and told ---------------------------------------------------------------


@with_one
def test_memory_cpus_scratch_and_variables_are_the_job_s(slurm):
    directory = slurm.new_directory()
    job = slurm.submit(
        f"#!/bin/sh\nexec {RUNNER} -v sh -c 'grep MemTotal /proc/meminfo; env' > out 2> err\n",
        "--array=3",
        "--mem=600",
        user=USER,
        cwd=slurm.inside(directory),
        env={"OMP_NUM_THREADS": "2", "OTHER": "x"},
    )
    assert slurm.wait_ended(job) == ("COMPLETED", "0:0")

    output, said = (directory / "out").read_text(), (directory / "err").read_text()
    total_mib = int(re.search(r"MemTotal: *(\d+)", output).group(1)) / 1024
    assert 400 < total_mib < 600 and "SLURM_MEM_PER_NODE=600" in said
    assert f"SLURM_ARRAY_JOB_ID={job}\n" in output and "SLURM_ARRAY_TASK_ID=3\n" in output
    assert "OMP_NUM_THREADS=2\n" in output and "OTHER=" not in output
    assert "run directory /tmp/" in said


# --- The README's recipe --------------------------------------------------------------------------


@with_one
def test_a_study_of_a_hundred_tasks_from_one_image_and_one_changes_file(slurm, changes):
    directory = slurm.fill_job_directory(changes, "job.slurm", True)
    job = slurm.run(
        "sbatch", "--parsable", "job.slurm", user=USER, cwd=slurm.inside(directory)
    ).strip()
    wait_for(lambda: not slurm.run("squeue", "-h", "-j", job).strip(), 300)
    shown = slurm.run("scontrol", "-o", "show", "job", job).splitlines()

    ends = {
        int(re.search(r"ArrayTaskId=(\d+)", line).group(1)): re.search(
            r"JobState=(\w+).* ExitCode=(\S+)", line
        ).groups()
        for line in shown
    }
    assert ends == {
        task: ("FAILED", "9:0") if task == 41 else ("COMPLETED", "0:0") for task in range(100)
    }

    logs = {task: (directory / f"log.{task}").read_text() for task in range(100)}
    assert logs == {task: f"{task} squared is {task * task}\n" for task in range(100)}
    slurm.assert_nothing_left()


def test_a_job_that_brings_everything_needs_nothing_on_the_node(kernel, image, changes):
    require(os.getuid() == 0, "the daemons of a batch system need root")
    slurm = Slurm(kernel, image, "linuxproc")

    try:
        directory = slurm.fill_job_directory(changes, "job.slurm", False)
        words = ["sbatch", "--parsable", "--array=41", "job.slurm"]
        job = slurm.run(*words, user=USER, cwd=slurm.inside(directory)).strip()
        assert slurm.wait_ended(job) == ("FAILED", "9:0")
        assert (directory / "log.41").read_text() == "41 squared is 1681\n"
        slurm.assert_nothing_left()
    finally:
        slurm.close()
