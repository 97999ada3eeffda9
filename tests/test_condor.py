# SPDX-License-Identifier: Apache-2.0
"""Jobs of a real HTCondor. Each is sent twice, with AppPot and without: HTCondor must not see a difference."""

import contextlib

import pytest
from conftest import wait_for
from engines import USER, Condor

pytestmark = pytest.mark.grid

HANDLES = "trap 'echo told; exit 42' {0}; echo ready; while :; do sleep 0.1; done 2> /dev/null"
IGNORES = "trap '' TERM; echo ready; exec sleep 1000"
DIES = "echo ready; exec sleep 1000"
SUBMIT = """\
executable = {}
arguments = {}
transfer_executable = {}
transfer_input_files = command, input
should_transfer_files = YES
when_to_transfer_output = ON_EXIT
stream_output = True
output = out
error = err
log = events
request_memory = 400
queue
"""


@pytest.fixture(scope="module")
def condor(kernel, image, chroot):
    site = Condor(kernel, image, chroot("condor"))
    yield site
    site.close()


class Jobs:
    """The same command as two jobs."""

    def __init__(self, condor, script):
        self.condor = condor
        self.ids, self.directories = [], []
        runner = "/opt/apppot/apppot_start.py --kill-after 2 ./command"
        for words in (("command", "", "True"), ("/usr/bin/python3", runner, "False")):
            directory = condor.new_directory()
            (directory / "command").write_text(f"#!/bin/bash\n{script}\n")
            (directory / "command").chmod(0o755)
            (directory / "input").write_text("from the user\n")
            (directory / "job").write_text(SUBMIT.format(*words))
            self.directories.append(directory)
            self.ids.append(condor.submit(directory, "job"))

    def each(self, *words):
        for job in self.ids:
            self.condor.run(*words, job, user=USER)

    def output(self, number, name="out"):
        path = self.directories[number] / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_line(self, line):
        for number in (0, 1):
            wait_for(lambda number=number: line in self.output(number))

    def wait_for_status(self, status):
        for job in self.ids:
            wait_for(lambda job=job: self.condor.query(job, "JobStatus") == [status])

    def tell(self, name):
        """Make a file in the directory where each of the two runs."""
        for directory in self.condor.path("/var/lib/condor/execute").glob("dir_*"):
            (directory / name).touch()

    def end(self):
        """How the two ended, which must be the same, and nothing may be left on the node."""
        plain, ours = (self.condor.wait_ended(job) for job in self.ids)
        assert ours == plain, [self.output(number, name) for number in (0, 1) for name in ("out", "err")]
        assert self.output(1) == self.output(0)
        self.condor.assert_nothing_left()
        assert not list(self.condor.path("/var/lib/condor/execute").glob("dir_*"))
        return ours, self.output(1)


@pytest.mark.parametrize(
    "script, end",
    [
        ("exit 0", ["4", "false", "0", "undefined"]),
        ("exit 7", ["4", "false", "7", "undefined"]),
        ("kill -SEGV $$", ["4", "true", "undefined", "11"]),
    ],
)
def test_a_job_ends_as_its_command_does_and_files_travel_both_ways(condor, script, end):
    jobs = Jobs(condor, "cat input; echo made > result; " + script)
    assert jobs.end() == (end, ["from the user"])
    assert [jobs.output(number, "result") for number in (0, 1)] == [["made"]] * 2


@pytest.mark.parametrize(
    "script, end, output",
    [
        (HANDLES.format("TERM"), ["3", "false", "42", "undefined"], ["ready", "told"]),
        (IGNORES, ["3", "true", "undefined", "9"], ["ready"]),
        (DIES, ["3", "true", "undefined", "15"], ["ready"]),
    ],
)
def test_condor_rm_warns_the_command_and_ends_it(condor, script, end, output):
    jobs = Jobs(condor, script)
    jobs.wait_for_line("ready")
    jobs.each("condor_rm")
    assert jobs.end() == (end, output)


def test_a_held_job_is_ended_and_begins_again_when_released(condor):
    jobs = Jobs(condor, "trap 'exit 42' TERM; echo ready; until [ -e go ]; do sleep 0.1; done; exit 3")
    jobs.wait_for_line("ready")
    jobs.each("condor_hold")
    jobs.wait_for_status("5")
    wait_for(lambda: not condor.processes())
    condor.assert_nothing_left()
    for directory in jobs.directories:
        (directory / "out").unlink()
    jobs.each("condor_release")
    jobs.wait_for_line("ready")
    jobs.tell("go")
    assert jobs.end() == (["4", "false", "3", "undefined"], ["ready"])


def test_a_suspended_job_stands_still_and_goes_on_with_its_data_intact(condor, kernel):
    if b"seccomp=<on" not in kernel.read_bytes():
        pytest.skip("HTCondor without cgroups stops every process at once: see the README's limits for such a kernel")
    work = (
        "head -c 20000000 /dev/urandom > data; sum=$(sha256sum data); echo ready\n"
        'until [ -e go ]; do [ "$(sha256sum data)" = "$sum" ] || exit 9; done; rm data; echo right; exit 3'
    )
    jobs = Jobs(condor, work)
    jobs.wait_for_line("ready")
    jobs.each("condor_suspend")
    jobs.wait_for_status("7")
    wait_for(lambda: not condor.is_computing())
    jobs.each("condor_continue")
    wait_for(condor.is_computing)
    jobs.tell("go")
    assert jobs.end() == (["4", "false", "3", "undefined"], ["ready", "right"])


def run_recipe(site, changes, is_deployed):
    directory = site.fill_job_directory(changes, "job.condor", is_deployed)
    cluster = site.submit(directory, "job.condor").partition(".")[0]
    for number in range(4):
        assert site.wait_ended(f"{cluster}.{number}") == ["4", "false", "0", "undefined"]
        assert (directory / f"log.{number}").read_text() == f"{number} squared is {number * number}\n"
    assert (directory / "result").exists()
    site.assert_nothing_left()


def test_the_recipe_of_the_readme(condor, changes):
    run_recipe(condor, changes, True)


def test_the_recipe_of_the_readme_where_nothing_is_deployed(kernel, image, chroot, changes):
    with contextlib.closing(Condor(kernel, image, chroot("condor"))) as site:
        run_recipe(site, changes, False)
