# SPDX-License-Identifier: Apache-2.0
"""Jobs of a real HTCondor, with AppPot and without: HTCondor must not see a difference."""

import contextlib

import pytest
from engines import CONDOR_SUBMIT, DIES, HANDLES, IGNORES, USER, WORKS, Condor, Pair
from nodes import skip_unless, wait_for

pytestmark = pytest.mark.grid
EXECUTE = "/var/lib/condor/execute"


@pytest.fixture(scope="module")
def condor(kernel, image, chroot):
    site = Condor(kernel, image, chroot("condor"))
    yield site
    site.close()


class Jobs(Pair):
    def submit(self, directory, command):
        (directory / "input").write_text("from the user\n")
        program, _, rest = command.partition(" ")
        is_plain = program == "./command"
        words = (program, rest, True) if is_plain else ("/usr/bin/" + program, rest, False)
        (directory / "job").write_text(CONDOR_SUBMIT.format(*words))
        return self.site.submit(directory, "job")

    def wait_ended(self, job):
        return self.site.wait_ended(job)

    def wait_for_status(self, status):
        for job in self.ids:
            wait_for(lambda job=job: self.site.query(job, "JobStatus") == [status])

    def tell(self, name):
        """Make a file in the directory where each of the two runs."""
        for directory in self.site.path(EXECUTE).glob("dir_*"):
            (directory / name).touch()

    def end(self):
        result = super().end()
        assert not list(self.site.path(EXECUTE).glob("dir_*"))
        return result


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
        (IGNORES.format("TERM"), ["3", "true", "undefined", "9"], ["ready"]),
        (DIES, ["3", "true", "undefined", "15"], ["ready"]),
    ],
)
def test_condor_rm_warns_the_command_and_ends_it(condor, script, end, output):
    jobs = Jobs(condor, script)
    jobs.wait_for_line("ready")
    jobs.each("condor_rm", user=USER)
    assert jobs.end() == (end, output)


def test_a_held_job_is_ended_and_begins_again_when_released(condor):
    jobs = Jobs(
        condor, "trap 'exit 42' TERM; echo ready; until [ -e go ]; do sleep 0.1; done; exit 3"
    )
    jobs.wait_for_line("ready")
    jobs.each("condor_hold", user=USER)
    jobs.wait_for_status("5")
    wait_for(lambda: not condor.processes())
    condor.assert_nothing_left()

    for directory in jobs.directories:
        (directory / "out").unlink()
    jobs.each("condor_release", user=USER)
    jobs.wait_for_line("ready")
    jobs.tell("go")
    assert jobs.end() == (["4", "false", "3", "undefined"], ["ready"])


def test_a_suspended_job_stands_still_and_goes_on_with_its_data_intact(condor, kernel):
    has_seccomp_mode = b"seccomp=<on" in kernel.read_bytes()
    skip_unless(
        has_seccomp_mode,
        "HTCondor without cgroups stops every process at once: see the README's limits",
    )
    jobs = Jobs(condor, WORKS)
    jobs.wait_for_line("ready")
    jobs.each("condor_suspend", user=USER)
    jobs.wait_for_status("7")
    wait_for(lambda: not condor.is_computing())
    jobs.each("condor_continue", user=USER)
    wait_for(condor.is_computing)
    jobs.tell("go")
    assert jobs.end() == (["4", "false", "3", "undefined"], ["ready", "right"])


def run_recipe(site, changes, is_deployed):
    directory = site.fill_job_directory(changes, "job.condor", is_deployed)
    cluster = site.submit(directory, "job.condor").partition(".")[0]

    for number in range(4):
        assert site.wait_ended(f"{cluster}.{number}") == ["4", "false", "0", "undefined"]
        assert (
            directory / f"log.{number}"
        ).read_text() == f"{number} squared is {number * number}\n"

    assert (directory / "result").exists()
    site.assert_nothing_left()


def test_the_recipe_of_the_readme(condor, changes):
    run_recipe(condor, changes, True)


def test_the_recipe_of_the_readme_where_nothing_is_deployed(kernel, image, chroot, changes):
    with contextlib.closing(Condor(kernel, image, chroot("condor"))) as site:
        run_recipe(site, changes, False)
