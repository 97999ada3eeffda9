# SPDX-License-Identifier: Apache-2.0
"""What users of Docker, Apptainer, Charliecloud, Slurm and of the original AppPot type."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from nodes import TOP, assert_error

import apppot_start

# A line as typed, and the same in AppPot's own words.
TAKEN = [
    # Docker, Podman
    ("--workdir /data ls", "--cwd /data ls"),
    ("--volume /data:/mnt:ro ls", "--bind /data:/mnt:ro ls"),
    ("-it bash", "-t bash"),
    ("-ti bash", "-t bash"),
    ("--tty bash", "-t bash"),
    ("--memory 512m --cpus 2 ./a", "--mem 512m --cpus 2 ./a"),
    ("--name web --publish 8080:80 ./serve", "--id web --publish 8080:80 ./serve"),
    ("-p 8080:80 ./serve", "--publish 8080:80 ./serve"),
    ("--network none ./a", "--net none ./a"),
    ("--env A=b ./a", "--env A=b ./a"),
    # Apptainer, Singularity
    ("--pwd /data ls", "--cwd /data ls"),
    ("--cleanenv env", "--clean-env env"),
    ("--fakeroot id", "--root id"),
    ("--writable --fakeroot apt-get update", "--write --root apt-get update"),
    ("-B /data:/mnt ls", "--bind /data:/mnt ls"),
    # Charliecloud
    ("--cd /data ls", "--cwd /data ls"),
    ("--set-env=A=b env", "--env A=b env"),
    ("--write touch /a", "--write touch /a"),
    # The original AppPot
    ("--apppot my.img ls", "--image my.img ls"),
    ("--merge my.tar.gz ls", "--changes my.tar.gz ls"),
    ("--uml ./linux ls", "--kernel ./linux ls"),
    ("--linux ./linux ls", "--kernel ./linux ls"),
    ("--umid one -X quiet ls", "--id one --extra quiet ls"),
    # What is the command's own
    ("-- exec 5", "-- exec 5"),
    ("./run --rm -it", "./run --rm -it"),
    ("sh -c 'A=b exec run'", "sh -c 'A=b exec run'"),
]
# A line as typed, and what the hint must say.
REFUSED = [
    # Docker, Podman
    ("run --rm -it debian ls", "leave it out"),
    ("--rm ls", "leave it out"),
    ("-i cat", "leave it out: stdin always reaches"),
    ("-w /data ls", "--cwd DIR"),
    ("-e A=b env", "--env NAME=VALUE"),
    ("-u 0 id", "--root"),
    ("--user 1000:1000 id", "--root"),
    ("-v /data:/mnt ls", "write --bind /data:/mnt ls"),
    ("-v $PWD:/work ls", "--bind"),
    ("--mount type=bind,source=/a,target=/b ls", "--bind SRC:DST"),
    ("--entrypoint sh", "after the options"),
    ("-m 1g ./a", "--mem"),
    ("-d ./serve", "`&`"),
    ("--detach ./serve", "`&`"),
    ("--env-file a.env ./a", "--env NAME=VALUE, once"),
    ("--privileged mount", "--root"),
    ("--gpus all nvidia-smi", "no GPU"),
    ("--shm-size 1g ./a", "--mem"),
    ("--hostname box ./a", "host name of its own"),
    ("--read-only ./a", "without --write"),
    ("--network host ./a", "10.0.2.2"),
    ("--network=bridge ./a", "10.0.2.2"),
    ("--device /dev/fuse ./a", "no devices"),
    ("pull debian:12", "make image"),
    ("build -t mine .", "make image"),
    ("inspect mine", "--doctor"),
    ("debian:12 ls", "make image"),
    ("docker://debian ls", "make image"),
    # Apptainer, Singularity
    ("exec my.sif ls -l", "write --image my.sif ls -l"),
    ("shell my.img", "login shell, and write --image my.img"),
    ("my.img ls", "write --image my.img ls"),
    ("my.sif", "write --image my.sif"),
    ("-C ls", "--bind"),
    ("--contain ls", "--bind"),
    ("--nv ./a", "no GPU"),
    ("--no-home ls", "--bind"),
    ("--overlay my.ovl ls", "--image COW:BASE"),
    ("--writable-tmpfs ls", "leave it out"),
    # Charliecloud
    ("-c /data ls", "--cwd DIR"),
    ("--unset-env='*' env", "--clean-env"),
    ("--home ls", '--bind "$HOME"'),
    ("-b /data:/mnt ls", "--bind SRC:DST"),
    # A slip
    ("--sav a.tar.gz ls", "did you mean --save-changes?"),
    ("--imgae my.img ls", "did you mean --image?"),
    ("--mme 1G ls", "did you mean --mem?"),
    ("-mem 1G ls", "did you mean --mem?"),
    ("--binds /data ls", "did you mean --bind?"),
    ("--save_changes a.tar ls", "did you mean --save-changes?"),
    ("--entrypiont sh", "did you mean --entrypoint? write the command after the options"),
    ("\N{EN DASH}mem 1G ls", "write --mem"),
    ("OMP_NUM_THREADS=2 ./a", "--env OMP_NUM_THREADS=2 ./a"),
    ("my.tar.gz ./a", "write --changes my.tar.gz ./a"),
    ("--zzz ls", "`--help all` lists"),
]


def test_the_lines_are_sixty_and_more():
    assert len(TAKEN) + len(REFUSED) >= 60


@pytest.mark.parametrize("typed, own", TAKEN)
def test_a_word_of_another_program_that_has_one_meaning_is_taken(typed, own):
    assert apppot_start.read_words(shlex.split(typed)) == apppot_start.read_words(shlex.split(own))


@pytest.mark.parametrize("typed, word", REFUSED)
def test_another_is_refused_with_the_word_that_does_it_here(typed, word):
    with pytest.raises(apppot_start.Fatal) as caught:
        apppot_start.read_words(shlex.split(typed))
    assert word in caught.value.hint and caught.value.status == 125


@pytest.mark.parametrize("option", apppot_start.FOREIGN_OPTIONS)
def test_a_refused_option_is_none_of_ours_and_its_hint_names_ours(option):
    known = apppot_start.build_parser()._option_string_actions
    words = apppot_start.FOREIGN_OPTIONS[option].replace(":", " ").replace(";", " ").split()
    named = [word.strip(",") for word in words if word.startswith("-") and word.strip(",-")]
    assert option not in known and set(named) <= set(known)


def run(*words, program="apppot_start.py", python=sys.executable, **options):
    return subprocess.run(
        [python, TOP / program, *words], capture_output=True, stdin=subprocess.DEVNULL, **options
    )


def test_a_refused_word_is_told_in_two_lines(tmp_path):
    result = run("exec", "my.img", "ls", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, "exec")


# --- Help -----------------------------------------------------------------------------------------


def test_help_is_one_screen_of_options_and_examples_that_exist():
    shown = run("--help").stdout.decode()
    lines = shown.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 80

    examples = [shlex.split(line)[2:] for line in lines if line.startswith("  python3 ")]
    assert len(examples) == 4
    for words in examples:
        options, command = apppot_start.read_words(words)
        assert command and not options.help

    everything = run("--help", "all").stdout.decode()
    named = set(re.findall(r"(?<= )-[-\w]+", "\n".join(lines[10:])))
    assert len(named) > 10 and all(f" {word}" in everything for word in named)


# --- Old Pythons ----------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["apppot_start.py", "changes.py"])
def test_an_old_python_says_that_it_is_too_old(program):
    """It reads all of a program before it runs any, and so can only show the line that stops it."""
    lines = (TOP / program).read_text().splitlines()
    docstring, stopper = ast.parse("\n".join(lines)).body[:2]
    assert isinstance(docstring.value, ast.Constant)
    assert "0x3_06" in lines[stopper.lineno - 1] and "too old" in lines[stopper.lineno - 1]

    # Few machines still have one.
    pythons = [shutil.which(name, path=os.defpath) for name in ("python2", "python3.5")]
    for python in filter(None, pythons):
        result = run("--help", program=program, python=python)
        assert result.returncode and b"AppPot needs Python 3.6 or newer" in result.stderr
