# SPDX-License-Identifier: Apache-2.0
"""Jobs of a real ARC compute element, by its own client."""

import contextlib
import os
import signal

import pytest
from engines import HANDLES, Arc, Pair
from nodes import wait_for

pytestmark = pytest.mark.grid
DESCRIPTION = """\
&(executable = {})(arguments = {})(inputFiles = ("command" ""))(outputFiles = ("result" ""))
 (executables = "command")(stdout = "out")(stderr = "err")(memory = 400)
"""


@pytest.fixture(scope="module")
def arc(kernel, image, chroot):
    with contextlib.closing(Arc(kernel, image, chroot("arc"))) as site:
        yield site


class Jobs(Pair):
    def submit(self, directory, command):
        program, *arguments = command.split()
        executable = "command" if program == "./command" else "/usr/bin/" + program
        quoted = [f'"{word}"' for word in [executable, *arguments]]
        (directory / "job").write_text(DESCRIPTION.format(quoted[0], " ".join(quoted[1:]) or '""'))
        return self.site.submit(directory, "job")

    def wait_ended(self, job):
        return self.site.wait_ended(job)

    def output(self, number, name="out"):
        path = self.site.session(self.ids[number]) / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("script, status", [("exit 0", 0), ("exit 7", 7), ("kill -SEGV $$", 139)])
def test_a_job_ends_as_its_command_does(arc, script, status):
    failure = (
        f"LRMS error: ({status}) Job finished with wrong exit code - {status} != 0"
        if status
        else ""
    )

    jobs = Jobs(
        arc, f"echo here; echo made > result; {script}", options="--die-with submit-fork-job"
    )
    assert jobs.end() == ((failure, str(status)), ["here"])


def test_arckill_of_the_wrapper_alone_ends_the_command(arc):
    # The back end kills its wrapper and nothing else: without AppPot the command would go on.
    jobs = Jobs(arc, HANDLES.format("TERM"), options="--die-with submit-fork-job")
    jobs.wait_for_line("ready")
    arc.client("arckill", "-k", jobs.ids[1])
    wait_for(lambda: not any("apppot" in command for command in arc.processes().values()))
    assert jobs.output(1) == ["ready", "told"]
    assert arc.scratch_files() == []

    # Let the other one end, of which ARC will not rid the node.
    for pid in arc.processes():
        os.kill(pid, signal.SIGKILL)


def run_recipe(site, changes, is_deployed):
    directory = site.fill_job_directory(changes, "job.xrsl", is_deployed)
    job = site.submit(directory, "job.xrsl")
    assert site.wait_ended(job) == ("", "0")

    # The client learns of the end when A-REX has gathered what it publishes.
    fetch = ["arcget", "-D", site.inside(directory), job]
    wait_for(lambda: "successfully retrieved: 1" in site.client(*fetch, check=False))

    (got,) = [path for path in directory.iterdir() if path.is_dir()]
    assert [(got / name).read_text() for name in ("out", "result", "err")] == [
        "1 squared is 1\n"
    ] * 2 + [""]
    site.assert_nothing_left()


def test_the_recipe_of_the_readme(arc, changes):
    run_recipe(arc, changes, True)


def test_the_recipe_of_the_readme_where_nothing_is_deployed(kernel, image, chroot, changes):
    with contextlib.closing(Arc(kernel, image, chroot("arc"))) as site:
        run_recipe(site, changes, False)
