# SPDX-License-Identifier: Apache-2.0
"""The README's transcripts and examples, run as they stand; and that what it names exists."""

import hashlib
import os
import pathlib
import pty
import re
import select
import shlex
import shutil
import subprocess

import pytest
from nodes import DEADLINE_S

import apppot_start
import changes

TOP = pathlib.Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text()
TRANSCRIPTS = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
# Commands without what they print. The two of `make` are run by test_setup.py.
EXAMPLES = re.findall(r"^((?:    python3 .*\n)+)", README, re.MULTILINE)
VERSION = "9.8.7"


# --- What it names --------------------------------------------------------------------------------


def test_it_is_short_and_fits_the_window():
    lines = README.splitlines()
    assert len(lines) <= 400
    assert [line for line in lines if len(line) > 125] == []


def test_its_contents_name_each_section():
    sections = re.findall(r"^## (.*)$", README, re.MULTILINE)
    contents = README.partition("\nContents: ")[2].partition("\n\n")[0]
    links = re.findall(r"\[([^]]+)\]\(#([a-z-]+)\)", contents)
    assert links == [(name, name.lower().replace(" ", "-")) for name in sections]


def list_options(parser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from list_options(command)


def test_each_option_in_it_is_one_of_the_programs():
    parsers = [apppot_start.build_parser(), changes.build_parser()]
    known = {option for parser in parsers for option in list_options(parser)}
    # The other words are options of batch systems.
    text = re.sub(r"```sh\n.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))
    assert len(named) > 25 and named - {"--sparse"} <= known  # that is one of cp


def test_each_variable_in_it_is_in_the_help_of_the_runner():
    texts = README, apppot_start.build_parser().format_help()
    named, helped = (set(re.findall(r"APPPOT_[A-Z_]+", text)) for text in texts)
    assert len(named) > 5 and named <= helped


def test_each_target_and_variable_of_make_in_it_is_in_the_help_of_make():
    text = subprocess.run(
        ["make", "-C", TOP, "help"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    targets = set(re.findall(r"\bmake ([a-z-]+)", " ".join(re.findall(r"`(make [^`]*)`", README))))

    variables = set(re.findall(r"(?<=[` ])([A-Z_]+)=(?=[`\w\"])", README)) - {
        "APPPOT_CHANGES",
        "SLURM_MEM_PER_NODE",
    }
    assert targets >= {"demo", "kernel", "stage"} and all(
        f"\n  make {target} " in text for target in targets
    )
    assert "PACKAGES" in variables and all(f"\n  {name} " in text for name in variables)


def test_each_section_in_it_is_a_section_of_a_program():
    text = README.partition("## Where things are in the source\n")[2]
    programs = {
        name: (TOP / name).read_text()
        for name in ("apppot_start.py", "apppot_init.py", "changes.py")
    }
    banners = re.findall(r"^# --- (.*?)(?: \(.*)? -+$", "\n".join(programs.values()), re.MULTILINE)

    named = set(re.findall(r'"([^"]+)"', text))
    assert len(named) > 5 and named <= set(banners)

    # A word of code there, other than the names of files.
    words = set(re.findall(r"`(\w+)`", text))
    assert words and all(
        re.search(rf"^(class |def )?{word}\b", programs["apppot_start.py"], re.MULTILINE)
        for word in words
    )


# --- What it runs ---------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path, image, kernel):
    """What a reader's clone holds after `make demo` and `make stage`."""
    for name in ("apppot_start.py", "apppot_init.py"):
        shutil.copy(TOP / name, tmp_path)
    (tmp_path / "build").mkdir()
    own = tmp_path / "build" / "apppot.img"
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, own], check=True)
    own.chmod(0o644)
    (tmp_path / "build" / "stage").symlink_to(TOP / "build" / "stage")
    (tmp_path / "build" / "linux").symlink_to(kernel)
    (tmp_path / "scratch").mkdir()
    yield tmp_path
    assert not os.listdir(tmp_path / "scratch")


def environ(clone, **more):
    return {
        "PATH": os.environ["PATH"], "APPPOT_TMPDIR": str(clone / "scratch"),
        "HOME": str(clone / "home"), **more,
    }


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=range(len(TRANSCRIPTS)))
def test_a_transcript_of_the_readme_is_what_a_reader_sees(transcript, clone):
    commands = [line[2:] for line in transcript.splitlines() if line.startswith("$ ")]
    script = "exec 2>&1\n" + "\n".join(
        f"status=$?; printf '%s\\n' {shlex.quote('$ ' + command)}; (exit $status)\n{command}"
        for command in commands
    )

    shown = subprocess.run(
        ["bash", "-c", script],
        cwd=clone,
        env=environ(clone),
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=120,
    ).stdout
    assert shown == transcript


def run_example(lines, clone, **more):
    script = "set -e\n" + lines.replace("/data/genomes", f"{clone}/data/genomes")
    result = subprocess.run(
        ["bash", "-c", script], cwd=clone, env=environ(clone, **more), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=DEADLINE_S,
    )
    assert result.returncode == 0, (script, result.stdout, result.stderr)
    return result.stdout


def make_repository(clone):
    """A changes file by which apt in the guest knows a package `python3-numpy`, and no network."""
    package = clone / "package"
    module = package / "usr/lib/python3/dist-packages/numpy"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(f"__version__ = '{VERSION}'\n")
    (package / "DEBIAN").mkdir()
    control = (
        f"Package: python3-numpy\nVersion: {VERSION}\nArchitecture: all\nMaintainer: "
        "a\nDescription: a\n"
    )
    (package / "DEBIAN/control").write_text(control)
    deb = clone / "a.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", package, deb], check=True, capture_output=True
    )
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    (clone / "Packages").write_text(
        f"{control}Filename: ./a.deb\nSize: {deb.stat().st_size}\nSHA256: {digest}\n"
    )
    script = """
        mkdir -p /opt/lists/partial
        install -D -t /opt/repository -m 644 a.deb Packages
        rm -rf /etc/apt/sources.list*
        echo 'deb [trusted=yes] file:/opt/repository ./' > /etc/apt/sources.list
        # Where a changes file leaves them out they would be gone.
        echo 'Dir::State::lists "/opt/lists";' > /etc/apt/apt.conf.d/lists
        apt-get update"""
    runner = "python3 apppot_start.py --net none --root --save-changes apt.tar.gz"
    run_example(f"{runner} sh -ec {shlex.quote(script)}", clone)
    return clone / "apt.tar.gz"


@pytest.mark.own_kernel
@pytest.mark.parametrize("lines", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_readme_works_after_make_demo(lines, clone):
    # What the examples take for granted: data, settings, a program in the job directory.
    for directory in ("data/genomes", "home/settings"):
        (clone / directory).mkdir(parents=True)

    (clone / "data/genomes/one").write_text("gattaca\n")
    (clone / "home/settings/colour").write_text("blue\n")
    settings = "/etc/mytool/colour" if "mytool" in lines else ""
    (clone / "analyse").write_text(f"#!/bin/sh\ncat {clone}/data/genomes/one {settings}\n")
    (clone / "analyse").chmod(0o755)
    network = {"APPPOT_CHANGES": str(make_repository(clone))} if "apt-get install" in lines else {}
    shown = run_example(lines, clone, **network)
    if "import numpy" in lines:
        assert shown.endswith(f"\n{VERSION}\n")
    if "mytool" in lines:
        assert shown.endswith("gattaca\nblue\n")
    if "v1.tar.gz" in lines:
        assert shown == "gattaca\n2\n"


def test_without_a_command_a_reader_has_a_shell(clone):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(clone)
        os.execvpe("python3", ["python3", "apppot_start.py"], environ(clone, TERM="dumb"))

    seen = b""
    for expected, keys in ((rb"[$#] $", b"echo $((6*7)); exit 5\n"), (rb"\n42\r", b"")):
        while not re.search(expected, seen):
            assert select.select([terminal], [], [], DEADLINE_S)[0], seen
            seen += os.read(terminal, 4096)
        os.write(terminal, keys)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    os.close(terminal)
