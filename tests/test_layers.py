# SPDX-License-Identifier: Apache-2.0
"""Changes files in runs: merged before the command, written after it."""

import os
import signal
import subprocess
import sys

import pytest
from nodes import TOP, assert_error, needs_root, wait_for

import apppot_start

NONCE = os.urandom(8).hex()


def save(node, script, *options, name="c.tar.gz"):
    result = node.run("--root", "--save-changes", name, *options, "sh", "-ec", script)
    assert (result.returncode, result.stderr) == (0, b"")
    return node.job / name


def show(path):
    command = [sys.executable, TOP / "changes.py", "show", path]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().splitlines()


def test_what_one_run_changes_the_next_one_has(any_node):
    script = f"""
        echo {NONCE} > /etc/motd; rm /etc/issue; echo h > ~/h
        mkdir -p /opt/tool; cp /bin/true /opt/tool"""
    save(any_node, script)

    script = """
        cat /etc/motd; /opt/tool/true && ls /etc/issue
        stat -c %u:%a /opt/tool/true; sudo cat /root/h"""
    result = any_node.run("--changes", "c.tar.gz", "sh", "-c", script)
    assert result.stdout.decode() == f"{NONCE}\n0:755\nh\n" and b"/etc/issue" in result.stderr
    result = any_node.run("--merge", "c.tar.gz", "--no-job-dir", "cat", "/etc/motd")
    assert result.stdout.decode() == NONCE + "\n"


def test_nothing_but_the_command_s_own_changes_is_saved(any_node):
    any_node.run("--save-changes", "none.tar.gz", "--bind", f"{any_node.job}:/data/below", "true")
    assert show(any_node.job / "none.tar.gz")[0].startswith("0 added, 0 modified, 0 deleted")
    any_node.run("--save-changes", "home.tar.gz", "sh", "-c", "echo mine > ~/mine; chmod 700 ~")
    listing = show(any_node.job / "home.tar.gz")
    assert any(line.endswith("/mine") for line in listing) and listing[-2].startswith("1 added")
    assert any_node.run("--changes", "home.tar.gz", "sh", "-c", "cat ~/mine").stdout == b"mine\n"


def test_layers_are_merged_in_order_and_saved_as_one(node):
    first = save(node, "echo 1 > /opt/a; echo 1 > /opt/b", name="first.tar.gz")
    second = save(node, "echo 2 > /opt/b; rm /opt/a", "--changes", str(first), name="second.tar.gz")

    def read(*options, **more):
        return node.run(*options, "sh", "-c", "cat /opt/*", **more).stdout

    assert read("--changes", first, "--changes", second) == b"1\n2\n"
    assert read("--changes", second) == b"2\n"  # it holds the first, too
    assert read("--changes", second, "--changes", first) == b"1\n1\n"

    assert read(env={"APPPOT_CHANGES": f"{second}:{first}"}) == b"1\n1\n"
    assert read("--changes", second, env={"APPPOT_CHANGES": "/none"}) == b"2\n"


def test_the_command_s_status_stays_and_its_changes_are_saved(any_node):
    script = "echo late > ~/f; kill -USR1 $$"
    result = any_node.run("--save-changes", "c.tar.gz", "bash", "-c", script)
    assert result.returncode == 128 + signal.SIGUSR1
    assert any_node.run("--changes", "c.tar.gz", "sh", "-c", "cat ~/f").stdout == b"late\n"


def test_a_file_that_was_there_stays_until_the_new_one_is_complete(any_node):
    target = any_node.job / "c.tar.gz"
    target.write_bytes(b"old")
    os.chown(target, any_node.uid, -1)

    process = any_node.start_ready("sleep 100", "--save-changes", "c.tar.gz")
    os.kill(process.pid, signal.SIGKILL)
    assert any_node.finish(process)[0] == -signal.SIGKILL
    any_node.wait_until_gone()
    wait_for(lambda: os.listdir(any_node.job) == ["c.tar.gz"])
    assert target.read_bytes() == b"old"

    any_node.run("--save-changes", "c.tar.gz", "true")
    assert show(target) and os.listdir(any_node.job) == ["c.tar.gz"]
    assert target.stat().st_uid == any_node.uid


def test_a_layer_of_another_base_is_refused_with_both_ids_unless_forced(node):
    base = apppot_start.find_root_device(str(node.image)).base_id
    other = "12345678-1234-1234-1234-123456789abc"
    save(node, f"echo {other} > /var/lib/apppot/base-id; echo x > /etc/motd")
    result = node.run("--changes", "c.tar.gz", "cat", "/etc/motd")
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, base, other, "c.tar.gz")
    assert node.run("--changes", "c.tar.gz", "--force-changes", "cat", "/etc/motd").stdout == b"x\n"


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "longer"])
def test_a_damaged_layer_ends_the_run_before_the_command(node, damage):
    layer = save(node, "head -c 100000 /dev/urandom > /opt/data")
    content = layer.read_bytes()
    middle = len(content) // 2

    variants = {
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "text": b"no layer at all\n" * 100,
        "longer": content + b"rubbish",
    }
    layer.write_bytes(variants[damage])

    result = node.run("--changes", "c.tar.gz", "sh", "-c", "echo run > ran")
    assert (result.returncode, result.stdout) == (125, b"") and os.listdir(node.job) == ["c.tar.gz"]
    assert_error(result, layer)


@pytest.mark.parametrize(
    "words",
    [
        ["--changes", "/no/such"],
        ["--changes", "."],
        ["--changes", "fifo"],
        ["--save-changes", "."],
        ["--save-changes", "/no/such/file"],
        ["--save-changes", "/proc/new"],
    ],
)
def test_what_cannot_be_is_refused_before_the_boot(node, words):
    os.mkfifo(node.job / "fifo")
    result = node.run("-v", *words, "true")
    assert result.returncode == 125 and b"Linux version" not in result.stderr


@needs_root
def test_a_full_disk_leaves_the_old_file_and_says_what_is_needed(node):
    out = node.root / "out"
    out.mkdir()
    around = f"""
        mount -t tmpfs -o size=1m tmpfs {out}; echo old > {out}/c
        "$@" || code=$?; cat {out}/*; exit $code"""
    script = "head -c 3000000 /dev/urandom > /opt/data"
    words = ("--root", "--save-changes", f"{out}/c", "sh", "-c", script)
    result = node.run(*words, wrap=("unshare", "-m", "sh", "-ec", around, "-"))
    assert (result.returncode, result.stdout) == (125, b"old\n")
    assert_error(result, "/c", "M")


def test_the_base_s_boot_does_not_import_what_merging_needs(node):
    script = """if True:
        import sys
        print([name for name in sys.modules if name in ('changes', 'zlib', 'tarfile')])"""
    source = (TOP / "apppot_init.py").read_text()
    before = source[: source.index("# --- The changes files")]
    assert "\nimport changes" not in before and "\nimport zlib" not in source
    assert node.run("python3", "-IS", "-c", script).stdout == b"[]\n"
