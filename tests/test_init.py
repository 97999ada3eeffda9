# SPDX-License-Identifier: Apache-2.0
"""The agent's pure parts: the job it is told, its account, the program that it finds."""

import os
import pwd
import re
import subprocess
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodes import TOP, pythons

import apppot_init
import apppot_start

VALUES = st.binary(max_size=30).filter(lambda value: b"\0" not in value)
NAMES = VALUES.filter(lambda name: name and b"=" not in name)
JOB = apppot_start.Job(
    command=(), environment={}, directory=b"/j", alias=b"/a", binds=(), cwd=None, home=None,
    as_root=False, umask=0o22, ignored_signals=(), limits=(), terminal=None,
    node=apppot_start.NodeView(), layers=(), force_changes=False, saved_changes=None,
)
ROOT = apppot_start.RootDevice(0, "", 0, 0)
DISK = apppot_start.Disk(image="/i", cow=None, write=False, root=ROOT, size=None)
GUEST = apppot_start.Guest(
    disk=DISK, shares=(), mem_mib=64, cpus=1, network=apppot_start.Network(), name="guest",
    extra=(), scratch="/", ram_directory="/",
)
SPEC = apppot_start.RunSpec(
    job=JOB, guest=GUEST, vmm=apppot_start.Uml("/k", apppot_start.Features(), False, ()),
    carrier=apppot_start.Carrier(), ancestor=None, timeout_s=None, boot_timeout_s=60,
    kill_after_s=1, verbose=False, quiet=False, notes=(), in_job=False, limit_mib=None,
)


def make_spec(**changes):
    """SPEC with other fields of the job, the disk or the guest. The shares are the job's."""
    job, disk, guest = (
        base._replace(**{name: value for name, value in changes.items() if name in base._fields})
        for base in (JOB, DISK, GUEST)
    )
    shares = apppot_start.list_shares(job)
    return SPEC._replace(job=job, guest=guest._replace(disk=disk, shares=shares))


def make_account(home=b"/home/ann"):
    return apppot_init.Account(b"ann", os.getuid(), os.getgid(), (), home, b"/bin/bash")


ACCOUNT = make_account()


def make_job(stdio=b"npp", **changes):
    stdio = apppot_start.Stdio(stdio, None, False)
    return apppot_init.parse_job(apppot_start.build_job(make_spec(**changes), stdio, None, False))


# --- The job --------------------------------------------------------------------------------------


@given(st.lists(VALUES), st.dictionaries(NAMES, VALUES), VALUES)
def test_the_guest_understands_every_job_that_the_host_describes(words, environment, directory):
    command = tuple(map(os.fsdecode, words))
    job = make_job(command=command, environment=environment, directory=directory, cwd=directory)
    assert job.argv == tuple(words) and job.environment == environment
    assert job.job_directory == job.cwd == directory and job.job_alias == b"/a"


def test_the_job_tells_who_the_caller_is_and_how_the_streams_are():
    job = make_job(b"pps", as_root=True, umask=0o27, ignored_signals=(1, 2), write=True)
    name = os.fsencode(pwd.getpwuid(os.getuid()).pw_name)
    assert (job.caller.uid, job.caller.name) == (os.getuid(), name)
    assert {group.gid for group in job.caller.groups} == {os.getgid(), *os.getgroups()}
    assert job.caller.groups[0].gid == os.getgid()
    assert (job.umask, job.ignored_signals) == (0o27, (1, 2))
    assert (job.caller.as_root, job.disk.is_kept, job.stdio.kinds) == (True, True, b"pps")

    job = make_job()
    assert (job.caller.as_root, job.disk.is_kept, job.stdio.kinds) == (False, False, b"npp")
    assert job.stdio.modes == b""
    assert make_job(cow="/c").disk.is_kept


@given(st.lists(st.tuples(VALUES.filter(lambda name: b"/" not in name), VALUES, st.booleans())))
def test_binds_are_told_with_any_name(binds):
    told = make_job(
        binds=tuple(
            apppot_start.Bind(
                apppot_start.Share("bind", b"/dir", name or None, read_only), b"/" + target
            )
            for name, target, read_only in binds
        )
    )

    assert [(bind.only_file, bind.target, bind.read_only) for bind in told.binds] == [
        (name, b"/" + target, read_only) for name, target, read_only in binds
    ]


def test_a_terminal_is_told_with_its_modes_and_size():
    keyboard, screen = os.openpty()
    os.write(keyboard, b"")
    terminal = apppot_start.Terminal(screen, screen)
    assert apppot_start.decode_modes(terminal.modes) == termios.tcgetattr(screen)
    stdio = apppot_start.Stdio(b"ttt", terminal, True)
    told = apppot_init.parse_job(apppot_start.build_job(SPEC, stdio, None, False)).stdio
    assert (told.modes, told.window, told.foreground) == (terminal.modes, terminal.window, True)

    before = termios.tcgetattr(screen)
    terminal.acquire()
    assert terminal.is_raw and termios.tcgetattr(screen) != before
    terminal.release()
    assert not terminal.is_raw and termios.tcgetattr(screen) == before
    for descriptor in (keyboard, screen, terminal.input, terminal.output):
        os.close(descriptor)


# --- The account ----------------------------------------------------------------------------------

ENTRIES = st.tuples(st.sampled_from([b"root", b"ann", b"bob"]), st.integers(0, 3))
LINES = st.lists(ENTRIES.map(lambda entry: b"%s:x:%d:0::/:/bin/sh" % entry))


@given(LINES, st.sampled_from([b"ann", b"eve"]), st.integers(0, 5))
def test_name_and_number_look_up_the_account_that_was_put_and_others_stay(lines, name, number):
    line = b"%s:*:%d:9::/home/x:/bin/sh" % (name, number)
    table = b"".join(entry + b"\n" for entry in lines)
    changed = apppot_init.put_account(table, name, number, line)
    entries = changed.splitlines()
    assert changed.endswith(b"\n") and b"" not in entries
    assert apppot_init.find_account(changed, name) == line.split(b":")
    assert next(entry for entry in entries if entry.split(b":")[2] == b"%d" % number) == line

    entries.remove(line)
    assert entries == lines


@pytest.mark.parametrize(
    "path, directory, below",
    [
        (b"/home", b"/home", True), (b"/home/a", b"/home", True), (b"/homes", b"/home", False),
        (b"/a", b"/", True), (b"/home/a", b"/home/", True), (b"/", b"/home", False),
    ],
)
def test_a_path_is_below_a_directory_by_its_parts(path, directory, below):
    assert apppot_init.is_below(path, directory) is below


def test_a_directory_of_the_system_is_not_covered_by_the_job_directory(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()

    def covers(path):
        return apppot_init.covers_system(os.fsencode(path))

    names = ("full", "full/file", "full/file/below", "empty", "new", "new/er")
    assert [name for name in names if covers(tmp_path / name)] == list(names[:3])
    paths = ("/", "/usr", "/proc/x", "/sys/x/y", "/tmp")
    assert [path for path in paths if covers(path)] == list(paths[:4])


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path):
    modes = {"run": 0o755, "plain": 0o644, "first/both": 0o644, "second/both": 0o755}
    for name, mode in modes.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh -e\n")
        path.chmod(mode)
    return os.fsencode(tmp_path)


def test_a_program_is_found_as_a_shell_finds_it(programs, monkeypatch):
    path = programs + b"/first:" + programs + b"/second"
    assert apppot_init.find_program(b"both", path) == programs + b"/second/both"
    assert apppot_init.find_program(programs + b"/run", b"") == programs + b"/run"
    monkeypatch.chdir(os.fsdecode(programs))
    # An empty entry is the current directory.
    assert apppot_init.find_program(b"run", b"/none:") == b"./run"


@pytest.mark.parametrize(
    "word, status",
    [
        (b"none", 127), (b"./none", 127), (b"", 127), (b"first", 127), (b"./run/x", 127),
        (b"\xff\n", 127), (b"./first", 126), (b"./plain", 126), (b"plain", 126),
    ],
)
def test_what_is_no_program_ends_with_127_or_126_and_its_name(programs, monkeypatch, word, status):
    monkeypatch.chdir(os.fsdecode(programs))
    with pytest.raises(apppot_init.Fatal) as caught:
        apppot_init.find_program(word, b"/none:.")
    assert caught.value.status == status and caught.value.hint
    assert repr(os.fsdecode(word)) in caught.value.message


def test_command_then_apppot_run_then_autorun_then_a_login_shell(tmp_path):
    home, directory = tmp_path / "home", tmp_path / "job"
    home.mkdir()
    directory.mkdir()
    account = make_account(os.fsencode(home))

    def chosen(*command):
        job = make_job(command=command)
        return apppot_init.choose_command(job, account, os.fsencode(directory))

    assert chosen() == ([b"-bash"], b"/bin/bash")
    for path in (home / "apppot-autorun", directory / "apppot-run"):
        path.write_text("#!/usr/bin/env  python3 -u\n")
        path.chmod(0o755)
        assert chosen() == ([os.fsencode(path)], os.fsencode(path))
        path.chmod(0o644)
        if os.getuid() != 0 or not os.access(path, os.X_OK):
            assert chosen() == (
                [b"/usr/bin/env", b"python3 -u", os.fsencode(path)],
                b"/usr/bin/env",
            )
    assert chosen("ls", "-l") == ([b"ls", b"-l"], b"ls")


def test_the_command_s_environment_is_the_account_s_and_what_the_job_asks_for():
    job = make_job(environment={b"PATH": b"/x", b"A": b"1"})
    assert apppot_init.build_environment(job, ACCOUNT, b"/d") == {
        b"PATH": b"/x", b"A": b"1", b"HOME": b"/home/ann", b"USER": b"ann", b"LOGNAME": b"ann",
        b"SHELL": b"/bin/bash", b"PWD": b"/d",
    }  # fmt: skip


def test_a_failure_crosses_the_channel_whatever_it_says():
    fatal = apppot_init.Fatal("no \0 \udcff é\n", "hint", 126)
    fields = apppot_start.decode_fields(apppot_init.encode_failure(fatal))
    assert fields[b"status"] == [b"126"] and fields[b"hint"] == [b"hint"]
    assert fields[b"error"][0].decode() == "no ? \\udcff é\n"


# --- The file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", pythons())
def test_every_python_here_imports_the_agent_and_the_runner_alone(python):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import apppot_init as a, apppot_start; "
        "print(a.PROTOCOL)"
    )
    words = [pythons()[python], "-BIS", "-W", "error", "-c", script, TOP]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.stdout == b"%d\n" % apppot_start.PROTOCOL


@pytest.mark.parametrize(
    "line, is_shell",
    [
        ("-bash", True),
        ("/bin/sh", True),
        ("bash -l", True),
        ("bash --norc --noprofile -i", True),
        ("zsh", True),
        ("bash --rcfile file", True),
        ("bash +O extglob -o vi", True),
        ("sh -", True),
        ("sh -c :", False),
        ("bash -lc :", False),
        ("bash script", False),
        ("bash --rcfile file script", False),
        ("bash --version", False),
        ("fish --command :", False),
        ("python3", False),
        ("vi", False),
        ("env bash", False),
        ("bash -e +x file", False),
    ],
)
def test_a_shell_without_script_and_command_is_interactive(line, is_shell):
    assert apppot_init.is_interactive_shell(line.encode().split()) == is_shell


def test_one_section_of_the_agent_knows_the_vmm():
    sections = re.split("^# --- ", (TOP / "apppot_init.py").read_text(), flags=re.MULTILINE)
    words = re.compile(r"hostfs|ttyS|seccomp|\buml\b|user-mode linux", re.IGNORECASE)
    knowing = [section.split(" ---")[0] for section in sections if words.search(section)]
    assert knowing == ["The devices of the VMM"]


@pytest.mark.parametrize(
    "changed, home_stays, begin, end",
    [
        (
            {}, False, "what you write in /a stays; all else, in HOME too, is gone at the end (",
            "outside of /a",
        ),
        (
            {"alias": None}, False, "what you write, in HOME too, is gone at the end",
            "what you wrote is",
        ),
        (
            {"write": True}, False, "in /a stays; all else, in HOME too, goes into the image /i",
            None,
        ),
        (
            {"cow": "/cow"}, False,
            "in /a stays; all else, in HOME too, goes into the COW file /cow", None,
        ),
        (
            {"saved_changes": "/saved"}, False,
            "all else, in HOME too, goes into /saved at the end", None,
        ),
        (
            {"binds": "/data /ro:ro /home"}, True,
            "in /a and /data and /home stays; all else is gone", "of /a and",
        ),
        ({"binds": "/a/data"}, False, "in /a and /a/data stays", "outside of"),
        ({"binds": "/"}, False, "what you write in / stays", "outside of /"),
    ],
)
def test_a_shell_s_user_is_told_what_stays(changed, home_stays, begin, end):
    def bind(text):
        place, _, mode = text.partition(":")
        return apppot_start.Bind(
            apppot_start.Share("bind", b"/", None, mode == "ro"), place.encode()
        )

    changed = dict(changed, binds=tuple(bind(text) for text in changed.get("binds", "").split()))
    told = apppot_start.describe_keeping(make_spec(**changed), home_stays)
    assert begin in told[0] and (end in told[1] if end else not told[1])
