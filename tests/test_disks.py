# SPDX-License-Identifier: Apache-2.0
"""Disks of the host that become full, and others that fail: nothing is lost without a word."""

import contextlib
import hashlib
import os
import re
import socket
import struct
import subprocess
import tarfile

import pytest
from nodes import assert_error, assert_told, needs_root, read_version, writable_copy
from test_faults import inject

import apppot_start

FILL = "head -c {} /dev/zero | tee {} | sha256sum"


@pytest.fixture
def small():
    """Makes a directory a disk of so many MiB."""
    with contextlib.ExitStack() as stack:

        def make(place, mib):
            owner = os.stat(place)
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", place], check=True
            )
            stack.callback(subprocess.run, ["umount", "-l", place], check=True)
            os.chown(place, owner.st_uid, -1)
            return place

        yield make


def make_layer(path, mib):
    """A changes file that brings a file of so many MiB."""
    with tarfile.open(path, "w") as layer:
        member = tarfile.TarInfo(f"opt/{path.name}")
        member.size = mib << 20
        with open("/dev/urandom", "rb") as content:
            layer.addfile(member, content)
    path.chmod(0o644)
    return path


@needs_root
def test_a_scratch_that_becomes_full_is_no_changes_file(any_node, small):
    small(any_node.scratch, 60)
    script = f"dmesg -n 1; {FILL.format(100000000, '/root/data')}; sync; echo $?"
    result = any_node.run("--root", "--mem", "256M", "--save-changes", "c.tar", "sh", "-c", script)
    assert result.returncode == 125
    assert_error(result, f"scratch is full: {any_node.scratch}, which has 0 MiB free")
    assert os.listdir(any_node.job) == []


@needs_root
def test_what_a_full_scratch_lost_is_not_read_back(node, small):
    small(node.scratch, 60)
    has_mapper = b"CONFIG_DM_INIT=y" in node.kernel.read_bytes()
    script = FILL.format(200000000, "/var/tmp/x") + "; sha256sum < /var/tmp/x; touch read"

    result = node.run(
        "--mem", "128M", *(["--disk", "3G"] if has_mapper else []), "sh", "-c", script
    )
    assert result.returncode == 125
    assert_error(result, "scratch is full", node.scratch)


# Each is printed ten times in five seconds at most, so a run may show any of them alone.
@pytest.mark.parametrize(
    "line",
    [
        "critical space allocation error, dev ubda, sector 531072 op 0x1:(WRITE) flags 0x4000",
        "I/O error, dev ubdb, sector 8 op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 2",
        "EXT4-fs warning (device dm-0): ext4_end_bio:368: I/O error 3 writing to inode 5698",
        "Buffer I/O error on device dm-0, logical block 65536",
        "Buffer I/O error on dev ubda, logical block 9, lost async page write",
        "Aborting journal on device dm-0-8.",
        "EXT4-fs error (device ubda): ext4_journal_check_start:86: comm sh: Detected aborted journal",
    ],
)
def test_each_line_of_the_kernel_that_tells_of_a_lost_write_ends_the_run(line):
    failure = apppot_start.DISK_FAILURE.format("(?:ubda|ubdb|dm-0)")
    assert re.search(failure, line)
    assert not re.search(failure, re.sub("ubda|ubdb|dm-0", "loop0", line))


def test_a_disk_that_cannot_write_zeros_does_not_end_the_run():
    line = "operation not supported error, dev ubdb, sector 128 op 0x9:(WRITE_ZEROES) flags 0x0"
    assert not re.search(apppot_start.DISK_FAILURE.format("(?:ubda|ubdb|dm-0)"), line)


@needs_root
def test_a_command_that_ends_before_its_files_are_on_a_full_scratch_does_not_save_them(node, small):
    small(node.scratch, 60)
    words = ["--save-changes", "c.tar", "sh", "-c", "head -c 70M /dev/zero > /root/z"]
    result = node.run("--root", "--mem", "512M", *words)
    assert result.returncode == 125
    assert_error(result, "scratch is full", node.scratch)
    assert os.listdir(node.job) == []


@needs_root
def test_a_layer_that_scratch_has_no_room_for_is_refused_before_it_is_merged(any_node, small):
    small(any_node.scratch, 60)
    layer = make_layer(any_node.root / "a.tar", 70)
    result = any_node.run("--changes", str(layer), "touch", "started")
    assert result.returncode == 125
    assert_error(result, f"{any_node.scratch} has 59 MiB", "70 MiB are needed", layer)
    assert os.listdir(any_node.job) == []


@needs_root
def test_a_command_does_not_start_on_a_disk_that_did_not_take_all_layers(any_node, small):
    small(any_node.scratch, 60)
    layers = [make_layer(any_node.root / name, 40) for name in ("a.tar", "b.tar")]
    options = [word for layer in layers for word in ("--changes", str(layer))]
    result = any_node.run("--mem", "512M", *options, "touch", "started")
    assert result.returncode == 125
    assert_error(result, f"scratch is full: {any_node.scratch}")
    assert os.listdir(any_node.job) == []


@needs_root
@pytest.mark.parametrize("kind", ["cow", "image"])
def test_an_image_on_a_full_disk_is_as_after_a_power_failure(node, image, small, kind):
    """What was there before the disk became full is there when it has room again."""
    disk = node.root / "disk"
    disk.mkdir()
    small(disk, 60 if kind == "cow" else (os.stat(image).st_blocks * 512 >> 20) + 60)

    if kind == "cow":
        target, options = disk / "cow", []
        name = f"{target}:{image}"
    else:
        target, options = writable_copy(node, image, "disk/own.img"), ["--write"]
        name = target

    kept = node.run("--root", *options, "sh", "-c", FILL.format(10000000, "/root/kept"), image=name)
    assert kept.returncode == 0, kept.stderr

    result = node.run(
        "--root", *options, "sh", "-c", FILL.format(90000000, "/root/data") + "; sync", image=name
    )
    assert result.returncode == 125
    assert_error(
        result,
        "directory of the {} is full: {}".format("image" if kind == "image" else "COW file", disk),
    )

    subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
    again = node.run("--root", *options, "sh", "-c", "cat /root/kept", image=name)
    assert (again.returncode, again.stderr) == (0, b"")
    assert hashlib.sha256(again.stdout).hexdigest() == kept.stdout.decode().split()[0]

    if kind == "image":
        check = subprocess.run(["/sbin/e2fsck", "-fn", target], capture_output=True)
        assert check.returncode == 0, check.stdout


@needs_root
def test_stdin_that_does_not_fit_on_scratch_is_125(any_node, small):
    small(any_node.scratch, 33)
    ballast = any_node.scratch / "ballast"
    process = any_node.start_ready("read x; sleep 60", stdin=subprocess.PIPE)

    with open(ballast, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()

    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(bytes(64 << 20))
    status, _, stderr = any_node.finish(process)
    ballast.unlink()
    assert status == 125
    assert_told(stderr, f"scratch is full: {any_node.scratch}")


@needs_root
def test_a_changes_file_that_does_not_fit_is_125_and_leaves_no_part(any_node, small):
    place = any_node.root / "saved"
    place.mkdir()
    os.chown(place, any_node.uid, -1)
    small(place, 10)

    result = any_node.run(
        "--root", "--save-changes", f"{place}/c.tar", "sh", "-c",
        FILL.format(20000000, "/root/data"),
    )
    assert result.returncode == 125
    assert_error(result, f"{place}/c.tar", "No space left")
    assert os.listdir(place) == []


MAPPED = """\
import mmap, os, sys
name, size = sys.argv[1], int(sys.argv[2]) << 20
file = os.open(name, os.O_RDWR | os.O_CREAT)
os.ftruncate(file, size)
memory = mmap.mmap(file, size)
for page in range(0, size, 4096):
    memory[page] = 1
"""


@needs_root
def test_mapped_pages_that_a_full_job_directory_does_not_take_are_125(any_node, small):
    small(any_node.job, 5)
    result = any_node.run("python3", "-c", MAPPED + "sys.exit(3)", "m", "10")
    assert result.returncode == 125
    assert_error(
        result, f"files in {any_node.job} could not be written", "No space left",
        "ended with status 3",
    )


@needs_root
def test_mapped_pages_of_a_bind_are_missed_though_something_hides_it(node, small):
    place = node.root / "data"
    place.mkdir()
    small(place, 5)
    script = f"python3 -c '{MAPPED}' /data/m 10; mount -t tmpfs none /data"

    result = node.run("--root", "--bind", f"{place}:/data", "sh", "-c", script)
    assert result.returncode == 125
    assert_error(
        result, "files in /data could not be written", "No space left", "ended with status 0"
    )


@needs_root
def test_a_command_that_is_told_of_a_full_disk_by_write_has_its_own_status(node, small):
    small(node.job, 5)
    result = node.run("sh", "-c", "head -c 10M /dev/zero > big; rm big; exit 4")
    assert result.returncode == 4
    assert result.stderr == b"head: error writing 'standard output': No space left on device\n"


@needs_root
def test_more_mapped_pages_than_may_wait_in_memory_are_written(node, small):
    """Linux 6.1 lets a program wait for ever that has changed a fifth of the memory."""
    small(node.job, 5)
    result = node.run("--mem", "64M", "python3", "-c", MAPPED, "m", "30")
    assert result.returncode == 125
    assert_error(result, f"files in {node.job} could not be written", "No space left")

    subprocess.run(["mount", "-o", "remount,size=40m", node.job], check=True)
    result = node.run("--mem", "64M", "python3", "-c", MAPPED, "m", "30")
    assert (result.returncode, result.stderr) == (0, b"")

    content = (node.job / "m").read_bytes()
    assert content[::4096] == b"\1" * (30 << 8)


@needs_root
def test_a_command_that_was_ended_for_lost_pages_has_no_status(node, small):
    """The agent does not know what root of the guest mounts. Linux 6.1 waits for ever here."""
    small(node.job, 5)
    inject(node, "Uml.has_virtio_fs = property(lambda self: False, lambda self, value: None)")
    mount = "import ctypes; ctypes.CDLL(None).mount(b'none', b'/mnt', b'hostfs', 0, b'job')\n"
    script = mount + MAPPED + "sys.exit(7)"
    result = node.run("--root", "--mem", "64M", "python3", "-c", script, "/mnt/m", "30")

    # Somewhere between these versions Linux began to let the command go on.
    version = read_version(node.kernel)
    assert result.returncode in [125] * (version < (7, 0)) + [7] * (version > (6, 1))
    if result.returncode == 125:
        assert_error(result, "changed through mmap could not be written", "the command was ended")


def test_a_file_that_cannot_be_read_is_no_end_of_stdin(any_node):
    with open("/proc/self/mem", "rb") as broken:  # its address 0 is EIO
        result = any_node.run("sh", "-c", "cat; touch seen", stdin=broken)
    assert result.returncode == 125
    assert_error(result, "stdin cannot be read: Input/output error")
    assert os.listdir(any_node.job) == []


def test_a_connection_that_is_reset_is_no_end_of_stdin(any_node):
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs = server.accept()[0]

    ours.sendall(b"line\n")
    with theirs:
        process = any_node.start_ready("read line; echo $line; cat; touch seen", stdin=theirs)
    assert process.stdout.readline() == b"line\n"

    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.close()
    status, _, stderr = any_node.finish(process)
    assert status == 125
    assert_told(stderr, "stdin cannot be read: Connection reset by peer")
    assert os.listdir(any_node.job) == []


def test_keys_that_cannot_be_read_are_125(node):
    with open("/proc/self/mem", "rb") as broken:
        result = node.run("-t", "cat", stdin=broken)
    assert result.returncode == 125
    assert_error(result, "stdin cannot be read: Input/output error")


@pytest.mark.parametrize("options", [[], ["-t"]])
def test_output_that_a_file_does_not_take_is_125(node, options):
    with open("/proc/self/mem", "r+b") as broken:
        result = node.run(*options, "echo", "hello", stdout=broken)
    assert result.returncode == 125
    assert_error(result, "output of the command cannot be written: Input/output error")


@needs_root
def test_memory_of_the_guest_that_a_full_directory_does_not_give_is_told_as_such(node, small):
    small(node.scratch, 100)
    wrap = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm; exec "$@"', "-")
    process = node.start_ready(
        "read x; head -c 60M /dev/zero | tail -c 50M | wc -c", "--mem", "80M",
        stdin=subprocess.PIPE, wrap=wrap,
    )
    with open(node.scratch / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))

    process.stdin.write(b"go\n")
    process.stdin.flush()
    status, _, stderr = node.finish(process)
    (node.scratch / "ballast").unlink()
    assert status == 125
    assert_told(stderr, " full: ", node.scratch)
