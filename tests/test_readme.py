# SPDX-License-Identifier: Apache-2.0
"""The README's transcripts, run as they stand."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

TOP = pathlib.Path(__file__).resolve().parent.parent
TRANSCRIPTS = re.findall(r"^```console\n(.*?)^```", (TOP / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def clone(tmp_path, image, kernel):
    """What a reader's clone holds after `make image` and `make stage`, and the kernel on PATH as Debian has it."""
    for name in ("apppot_start.py", "apppot_init.py"):
        shutil.copy(TOP / name, tmp_path)
    (tmp_path / "build").mkdir()
    own = tmp_path / "build" / "apppot.img"
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", image, own], check=True)
    own.chmod(0o644)
    (tmp_path / "build" / "stage").symlink_to(TOP / "build" / "stage")
    (tmp_path / "linux").symlink_to(kernel)
    return tmp_path


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=range(len(TRANSCRIPTS)))
def test_a_transcript_of_the_readme_is_what_a_reader_sees(transcript, clone):
    commands = [line[2:] for line in transcript.splitlines() if line.startswith("$ ")]
    script = "exec 2>&1\n" + "\n".join(
        f"status=$?; printf '%s\\n' {quote('$ ' + command)}; (exit $status)\n{command}" for command in commands
    )
    scratch = clone / "scratch"
    scratch.mkdir()
    shown = subprocess.run(
        ["bash", "-c", script],
        cwd=clone,
        env={"PATH": os.environ["PATH"], "APPPOT_TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=120,
    ).stdout
    assert shown == transcript
    assert not os.listdir(scratch)


def quote(text):
    return "'" + text.replace("'", "'\\''") + "'"
