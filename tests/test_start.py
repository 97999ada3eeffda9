# SPDX-License-Identifier: Apache-2.0
"""The runner's pure parts as values, its options, and what it refuses before anything is started."""

import ast
import gzip
import inspect
import os
import pathlib
import re
import struct
import subprocess
import sys

import apppot_init
import apppot_start
import pytest
from conftest import TOP, assert_error
from hypothesis import given
from hypothesis import strategies as st

WORDS = st.lists(st.binary(max_size=20).filter(lambda word: b"\0" not in word).map(os.fsdecode))


# --- Values -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300))), st.data())
def test_frames_survive_any_split(frames, data):
    stream = b"".join(apppot_start.encode_frame(kind, payload) for kind, payload in frames)
    received, decoded = bytearray(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += stream[:size]
        stream = stream[size:]
        decoded += apppot_start.decode_frames(received)
    assert decoded == frames and not received


def test_a_frame_too_long_is_no_frame():
    with pytest.raises(ValueError):
        apppot_start.decode_frames(bytearray(struct.pack("<BI", 2, apppot_start.FRAME_MAX + 1)))


@given(
    st.lists(st.tuples(st.sampled_from([b"arg", b"env", b"cwd"]), st.binary().filter(lambda value: b"\0" not in value)))
)
def test_fields_survive(fields):
    decoded = apppot_init.decode_fields(apppot_start.encode_fields(fields))
    assert decoded == {
        name: [value for other, value in fields if other == name] for name in {name for name, _ in fields}
    }


def test_host_and_guest_speak_the_same():
    names = (
        "VERSION PROTOCOL MAGIC FRAME_MAX HELLO STARTED STDOUT STDERR CREDIT STDIN_CLOSED RESULT JOB STDIN STDIN_EOF "
        "SIGNAL ACK OUTPUT_CLOSED NETWORK_LOST SPOOLED OUTPUT_WINDOW"
    ).split()
    assert [getattr(apppot_start, name) for name in names] == [getattr(apppot_init, name) for name in names]
    assert apppot_start.FRAME.format == apppot_init.FRAME.format
    for name in ("encode_fields", "decode_fields"):
        assert inspect.getsource(getattr(apppot_start, name)) == inspect.getsource(getattr(apppot_init, name))


@given(WORDS)
def test_any_command_survives_the_options(command):
    options, rest = apppot_start.build_parser().split(["-v", "--mem", "1G", "--image=x", "--", *command])
    assert (options, rest) == (["-v", "--mem", "1G", "--image=x"], tuple(command))
    if command and not command[0].startswith("-"):
        assert apppot_start.build_parser().split(["--env", "A", *command]) == (["--env", "A"], tuple(command))


@pytest.mark.parametrize(
    "text, mib", [("512", 512), ("512M", 512), ("1.5g", 1536), ("2GiB", 2048), ("1T", 1 << 20), ("2048K", 2)]
)
def test_sizes_are_mib(text, mib):
    assert apppot_start.parse_size_mib(text, "--mem") == mib


@pytest.mark.parametrize("text, seconds", [("90", 90), ("1.5", 1.5), ("10m", 600), ("2h", 7200), ("1d", 86400)])
def test_times_are_seconds(text, seconds):
    assert apppot_start.parse_seconds(text, "--timeout") == seconds


def test_the_batch_system_s_variables_pass_and_others_do_not():
    passed = "SLURM_JOB_ID PBS_JOBID SGE_TASK_ID JOB_ID _CONDOR_SLOT OMP_NUM_THREADS TERM LANG LC_ALL TZ NSLOTS".split()
    kept = "PATH HOME LD_LIBRARY_PATH PYTHONPATH SSH_AUTH_SOCK XSLURM_A TERMINAL".split()
    caller = {name.encode(): b"v" for name in passed + kept}
    assert apppot_start.select_environment(caller, [], False) == {name.encode(): b"v" for name in passed}
    assert apppot_start.select_environment(caller, ["HOME", "A=b=c", "NONE"], True) == {b"HOME": b"v", b"A": b"b=c"}


def test_an_account_is_found_by_name_and_number():
    table = b"root:x:0:0::/root:/bin/sh\nold:x:7:7::/:/bin/sh\nnew:x:9:9::/:/bin/sh\n"
    changed = apppot_init.put_account(table, b"new", 7, b"new:*:7:7::/home/new:/bin/sh")
    assert changed == b"root:x:0:0::/root:/bin/sh\nnew:*:7:7::/home/new:/bin/sh\nold:x:7:7::/:/bin/sh\n"
    assert apppot_init.find_account(changed, b"new")[5] == b"/home/new"
    assert apppot_init.find_account(changed, b"none") is None


@pytest.mark.parametrize(
    "entry, name, job, home",
    [
        (None, b"ann", b"/scratch/1", b"/home/ann"),
        (None, b"ann", b"/home/ann", b"/var/lib/apppot/home/ann"),
        (None, b"ann", b"/home", b"/var/lib/apppot/home/ann"),
        (None, b"ann", b"/home/ann/job", b"/home/ann"),
        (None, b"root", b"/root", b"/var/lib/apppot/home/root"),
        (b"/nonexistent", b"nobody", b"/j", b"/home/nobody"),
    ],
)
def test_the_home_directory_is_never_the_job_directory(entry, name, job, home):
    fields = None if entry is None else [name, b"*", b"1", b"1", b"", entry, b"/bin/sh"]
    assert apppot_init.choose_home(fields, name, job) == home


# --- Images -------------------------------------------------------------------------------------------------


@pytest.fixture
def ext4(tmp_path):
    path = tmp_path / "small.img"
    subprocess.run(
        ["/sbin/mke2fs", "-q", "-t", "ext4", "-U", "12345678-1234-1234-1234-123456789abc", path, "4M"], check=True
    )
    return path


def test_a_partition_image_is_its_own_root(ext4):
    assert apppot_start.find_root_device(str(ext4)) == (0, "12345678-1234-1234-1234-123456789abc")


@pytest.mark.parametrize(
    "table, number",
    [
        ("label: dos\nstart=2048,size=4096,type=c\nstart=8192,size=8192,type=83", 2),
        ("label: dos\nstart=2048,size=4096,type=83\nstart=6144,size=12288,type=5\nstart=8192,size=8192,type=83", 5),
        ("label: dos\nstart=2048,size=16384,type=f\nstart=4096,size=1024,type=83\nstart=8192,size=8192,type=83", 6),
        ("label: gpt\nstart=2048,size=4096,type=uefi\nstart=8192,size=8192,type=linux", 2),
        ("label: gpt\nstart=8192,size=8192,type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", 1),
    ],
)
def test_the_linux_partition_of_a_disk_is_found(tmp_path, ext4, table, number):
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"")
    os.truncate(disk, 12 << 20)
    subprocess.run(["/sbin/sfdisk", "-q", disk], input=table.encode(), check=True)
    with open(disk, "r+b") as file:
        file.seek(8192 * 512)
        file.write(ext4.read_bytes())
    assert apppot_start.find_root_device(str(disk)).partition == number


def bad_images(directory, ext4):
    """Name, content and a word of the error."""
    whole = ext4.read_bytes()
    yield "empty", b"", "empty"
    yield "truncated", whole[: 1 << 20], "truncated"
    yield "zeros", bytes(1 << 20), "no ext4"
    yield "text", b"hello\n", "no ext4"
    yield "gzipped", gzip.compress(whole), "gzip"
    yield "qcow2", b"QFI\xfb" + bytes(5000), "qcow2"
    yield "program", pathlib.Path(sys.executable).resolve().read_bytes()[:5000], "program"
    yield (
        "disk",
        bytes(446) + b"\0\0\0\0\x83\0\0\0" + struct.pack("<II", 1, 9) + bytes(48) + b"\x55\xaa" + bytes(9000),
        "partition",
    )
    yield (
        "circle",
        bytes(446) + b"\0\0\0\0\x05\0\0\0" + struct.pack("<II", 0, 9) + bytes(48) + b"\x55\xaa" + bytes(9000),
        "ext4",
    )
    yield "gpt", bytes(512) + b"EFI PART" + b"\xff" * 9000, "ext4"


def run_runner(*words, **options):
    return subprocess.run(
        [sys.executable, TOP / "apppot_start.py", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60,
        **options,
    )


def test_an_image_that_is_none_is_refused_by_name(tmp_path, ext4):
    for name, content, word in bad_images(tmp_path, ext4):
        path = tmp_path / name
        path.write_bytes(content)
        result = run_runner("--image", path, "true")
        assert result.returncode == 125, name
        assert_error(result, word, path)
    for path in (tmp_path / "missing", tmp_path):
        result = run_runner("--image", path, "true")
        assert result.returncode == 125
        assert_error(result, path)


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    """Small images of every kind with a real file system in them, as bytes."""
    place = tmp_path_factory.mktemp("disks")
    (place / "fs").touch(), (place / "table").touch()
    subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", place / "fs", "512k"], check=True)
    found = [(place / "fs").read_bytes()]
    for table in ("label: dos\nstart=256,type=5\nstart=512,size=1100,type=83", "label: gpt\nstart=512,size=1100"):
        os.truncate(place / "table", 0)
        os.truncate(place / "table", 1 << 20)
        subprocess.run(["/sbin/sfdisk", "-q", place / "table"], input=table.encode(), check=True)
        content = bytearray((place / "table").read_bytes())
        content[512 * 512 : 512 * 512 + len(found[0])] = found[0]
        found.append(bytes(content))
    return found


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from([0, 446, 512, 1024, 256 * 512 + 446, 512 * 512 + 1024]),
        st.integers(0, 200),
        st.sampled_from([b"\xff", b"\0", b"\x80", b"\x01"]) | st.binary(min_size=1, max_size=1),
        st.integers(1, 8),
    ),
    max_size=6,
)


@given(st.integers(0, 2), DAMAGE, st.integers(0, 1 << 19))
def test_a_damaged_image_is_read_or_refused_and_nothing_else(disks, tmp_path_factory, kind, damage, cut):
    content = bytearray(disks[kind])
    assert apppot_start.find_root_device(write_image(tmp_path_factory, content)).partition == (0, 5, 1)[kind]
    for place, offset, byte, count in damage:
        content[place + offset : place + offset + count] = byte * count
    try:
        apppot_start.find_root_device(write_image(tmp_path_factory, content[: len(content) - cut]))
    except apppot_start.Fatal as fatal:
        assert "damaged.img" in fatal.message and fatal.hint and fatal.status == 125


def write_image(factory, content):
    path = factory.getbasetemp() / "damaged.img"
    path.write_bytes(content)
    return str(path)


# --- Options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--mem", "0"], "0"),
        (["--mem", "1M"], "1M"),
        (["--mem", "10T"], "10T"),
        (["--mem", "abc"], "abc"),
        (["--mem", "-1"], "--mem"),
        (["--mem"], "--mem"),
        (["--no-such"], "--no-such"),
        (["-Z"], "-Z"),
        (["--timeout", "soon"], "soon"),
        (["--boot-timeout", ""], "--boot-timeout"),
        (["--kill-after", "x"], "x"),
        (["--env", "=x"], "=x"),
        (["--id", "a/b"], "a/b"),
        (["--extra", "two words"], "two words"),
        (["--tmpdir", "/no/such"], "/no/such"),
        (["--write=1"], "--write"),
        (["--image", "no:such"], "such"),
        (["--image", ":x"], ":x"),
        (["--write", "--image", "cow:{}"], "cow"),
    ],
)
def test_a_wrong_option_is_refused_by_name(image, words, said):
    result = run_runner(
        "--image", image, *[word.format(image) for word in words], *(["true"] if len(words) > 1 else [])
    )
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, said)


def test_no_kernel_and_no_image_are_told(tmp_path, image):
    lonely = tmp_path / "apppot_start.py"
    lonely.write_bytes((TOP / "apppot_start.py").read_bytes())
    for words, said in ((["--image", image], "kernel"), ([], "image")):
        result = subprocess.run(
            [sys.executable, lonely, *words, "true"], cwd=tmp_path, env={"PATH": "/nowhere"}, capture_output=True
        )
        assert result.returncode == 125
        assert_error(result, "no " + said)


def test_a_cow_file_of_another_base_is_refused(tmp_path, image):
    cow = tmp_path / "my.cow"
    for content, said in (
        (b"MOOO nonsense", "not a COW file"),
        (struct.pack(">4sIIQIII", b"OOOM", 3, 1, 2, 512, 4096, 0) + bytes(4096), "another base"),
    ):
        cow.write_bytes(content)
        result = run_runner("--image", f"{cow}:{image}", "true")
        assert result.returncode == 125
        assert_error(result, said, cow)


def test_help_and_version_and_dry_run(image, kernel):
    text = run_runner("--help").stdout.decode()
    for action in apppot_start.build_parser()._actions:
        assert all(option in text for option in action.option_strings)
    assert all(group in text for group in ("\nappliance:", "\ncommand:", "\nrun:", "\ninformation:", "\nexit status:"))
    assert "SLURM_" in text and max(map(len, text.splitlines())) <= 130
    assert run_runner("-V").stdout.decode() == f"AppPot {apppot_start.VERSION}\n"
    line = run_runner(
        "--dry-run", "--image", image, "--kernel", kernel, "--mem", "300", "--id", "me", "-X", "quiet", "true"
    ).stdout.decode()
    assert re.match(rf"{re.escape(str(kernel))} ubd0=cow,\S+ root=/dev/ubda rw mem=300M ", line)
    assert " umid=me " in line and line.endswith(" quiet\n")


# --- The files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["apppot_start.py", "apppot_init.py"])
def test_a_file_is_python_3_6_and_needs_the_standard_library_only(name):
    tree = ast.parse((TOP / name).read_text(), feature_version=(3, 6))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} <= set(sys.stdlib_module_names)


def test_a_current_directory_that_is_gone_is_told(tmp_path, image):
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    result = subprocess.run(
        ["sh", "-c", script, "-", sys.executable, TOP / "apppot_start.py", "--image", image, "true"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert result.returncode == 125
    assert_error(result, "current directory")
