# SPDX-License-Identifier: Apache-2.0
"""Disks of the host that become full, and others that fail: nothing is lost without a word."""

import contextlib
import hashlib
import os
import subprocess
import tarfile

import pytest
from conftest import assert_error, wait_for, writable_copy

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts need root")
FILL = "head -c {} /dev/zero | tee {} | sha256sum"


@pytest.fixture
def small():
    """Makes a directory a disk of so many MiB."""
    with contextlib.ExitStack() as stack:

        def make(place, mib):
            owner = os.stat(place)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", place], check=True)
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
@pytest.mark.parametrize("silence", ["true", "dmesg -n 1"])
def test_a_scratch_that_becomes_full_is_no_changes_file(any_node, small, silence):
    small(any_node.scratch, 60)
    words = ["--save-changes", "c.tar", "sh", "-c", f"{silence}; {FILL.format(150000000, '/root/data')}; sync; echo $?"]
    result = any_node.run("--root", "--mem", "256M", *words)
    assert result.returncode == 125
    assert_error(result, f"scratch is full: {any_node.scratch}, which has 0 MiB free")
    assert os.listdir(any_node.job) == []


@needs_root
def test_what_a_full_scratch_lost_is_not_read_back(any_node, small):
    small(any_node.scratch, 60)
    script = FILL.format(200000000, "/var/tmp/x") + "; sha256sum < /var/tmp/x; touch read"
    result = any_node.run("--mem", "128M", "--disk", "3G", "sh", "-c", script)
    assert result.returncode == 125
    assert_error(result, "scratch is full", any_node.scratch)


@needs_root
def test_a_command_that_ends_before_its_files_are_on_a_full_scratch_does_not_save_them(node, small):
    small(node.scratch, 60)
    result = node.run("--root", "--mem", "512M", "--save-changes", "c.tar", "sh", "-c", "head -c 70M /dev/zero > /root/z")
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
    used = sum(os.stat(path).st_blocks for path in [image]) * 512 >> 20
    small(disk, 60 if kind == "cow" else used + 60)
    if kind == "cow":
        target, options = disk / "cow", []
        name = f"{target}:{image}"
    else:
        target, options = writable_copy(node, image, "disk/own.img"), ["--write"]
        name = target
    kept = node.run("--root", *options, "sh", "-c", FILL.format(10000000, "/root/kept"), image=name)
    assert kept.returncode == 0, kept.stderr
    result = node.run("--root", *options, "sh", "-c", FILL.format(90000000, "/root/data") + "; sync", image=name)
    assert result.returncode == 125
    assert_error(result, "directory of the {} is full: {}".format("image" if kind == "image" else "COW file", disk))
    subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
    again = node.run("--root", *options, "sh", "-c", "cat /root/kept", image=name)
    assert (again.returncode, again.stderr) == (0, b"")
    assert hashlib.sha256(again.stdout).hexdigest() == kept.stdout.decode().split()[0]
    if kind == "image":
        check = subprocess.run(["/sbin/e2fsck", "-fn", target], capture_output=True)
        assert check.returncode == 0, check.stdout
    assert node.run("--root", *options, "dd", "if=/dev/zero", "of=/root/more", "bs=1M", "count=90", image=name).returncode == 0


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
    assert_error(subprocess.CompletedProcess((), status, b"", stderr), f"scratch is full: {any_node.scratch}")


@needs_root
def test_a_changes_file_that_does_not_fit_is_125_and_leaves_no_part(any_node, small):
    place = any_node.root / "saved"
    place.mkdir()
    os.chown(place, any_node.uid, -1)
    small(place, 10)
    result = any_node.run("--root", "--save-changes", f"{place}/c.tar", "sh", "-c", FILL.format(20000000, "/root/data"))
    assert result.returncode == 125
    assert_error(result, f"{place}/c.tar", "No space left")
    assert os.listdir(place) == []
