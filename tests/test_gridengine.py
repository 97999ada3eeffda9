# SPDX-License-Identifier: Apache-2.0
"""Jobs of a real Grid Engine, with AppPot and without: it must not see a difference."""

import contextlib
import re

import pytest
from engines import DIES, HANDLES, IGNORES, USER, WORKS, GridEngine, Pair
from nodes import DEADLINE_S, wait_for

pytestmark = pytest.mark.grid


@pytest.fixture(scope="module")
def engine(kernel, image, chroot):
    with contextlib.closing(GridEngine(kernel, image, chroot("gridengine"))) as site:
        yield site


class Jobs(Pair):
    """Each is the `qsub -sync y` that waits for it."""

    def submit(self, directory, command, *options):
        (directory / "job").write_text(f"#!/bin/sh\nexec {command} 0<&-\n")
        words = ["-cwd", "-N", directory.name, "-o", "out", "-e", "err", *options, "job"]
        return directory.name, self.site.submit(directory, *words)

    def wait_ended(self, job):
        """Status of qsub, what it says of the end, `failed` and `exit_status` of the accounting."""
        name, process = job
        said, _ = process.communicate(timeout=DEADLINE_S)
        told = [
            re.sub(r"\d+", "N", line, count=1)
            for line in said.splitlines()
            if not line.startswith("Your job")
        ]
        wait_for(lambda: "exit_status" in self.site.run("qacct", "-j", name, check=False))
        account = self.site.run("qacct", "-j", name)
        fields = [
            re.search(rf"^{field} +(\d+)", account, re.MULTILINE).group(1)
            for field in ("failed", "exit_status")
        ]
        return (process.returncode, *told, *fields)

    def each(self, *words):
        for directory in self.directories:
            self.site.run(*words, directory.name, user=USER)


@pytest.mark.parametrize(
    "script, end",
    [
        ("exit 0", (0, "Job N exited with exit code 0.", "0", "0")),
        ("exit 7", (7, "Job N exited with exit code 7.", "0", "7")),
        ("kill -SEGV $$", (1, "Job N exited because of signal SIGSEGV", "100", "139")),
    ],
)
def test_a_job_ends_as_its_command_does(engine, script, end):
    assert Jobs(engine, f"echo here; {script}").end() == (end, ["here"])


DELETED = (0, "Unable to run job N")


@pytest.mark.parametrize("script", [HANDLES.format("TERM"), DIES])
def test_qdel_kills_at_once(engine, script):
    jobs = Jobs(engine, script)
    jobs.wait_for_line("ready")
    jobs.each("qdel")
    assert jobs.end() == ((*DELETED, "100", "137"), ["ready"])


@pytest.mark.parametrize(
    "script, end, output",
    [
        (HANDLES.format("USR2"), ("0", "42"), ["ready", "told"]),
        (IGNORES.format("USR2"), ("100", "137"), ["ready"]),
        (DIES, ("100", "140"), ["ready"]),
    ],
)
def test_qdel_with_notify_warns_the_command_and_ends_it(engine, script, end, output):
    jobs = Jobs(engine, script, "-notify")
    jobs.wait_for_line("ready")
    jobs.each("qdel")
    assert jobs.end() == ((*DELETED, *end), output)


def test_a_suspended_job_stands_still_and_goes_on_with_its_data_intact(engine):
    jobs = Jobs(engine, WORKS)
    jobs.wait_for_line("ready")
    jobs.each("qmod", "-sj")
    wait_for(lambda: not engine.is_computing())
    jobs.each("qmod", "-usj")
    wait_for(engine.is_computing)
    for directory in jobs.directories:
        (directory / "go").touch()
    assert jobs.end() == ((3, "Job N exited with exit code 3.", "0", "3"), ["ready", "right"])


def run_recipe(site, changes, is_deployed):
    directory = site.fill_job_directory(changes, "job.sge", is_deployed)
    process = site.submit(directory, "-o", "log.$TASK_ID", "-e", "err", "job.sge")
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said
    logs = [(directory / f"log.{task}").read_text() for task in range(1, 5)]
    assert logs == [f"{task} squared is {task * task}\n" for task in range(1, 5)]
    site.assert_nothing_left()


def test_the_recipe_of_the_readme(engine, changes):
    run_recipe(engine, changes, True)


def test_the_recipe_of_the_readme_where_nothing_is_deployed(kernel, image, chroot, changes):
    with contextlib.closing(GridEngine(kernel, image, chroot("gridengine"))) as site:
        run_recipe(site, changes, False)
