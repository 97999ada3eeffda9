# SPDX-License-Identifier: Apache-2.0
"""Directories and files of the host in the guest: those that were asked for, and no others."""

import os
import pwd
import shlex
import subprocess
import sys

import pytest
from conftest import assert_error, make_node, needs_root

import apppot_start

NONCE = os.urandom(8).hex()

# Runs its arguments on a machine without Landlock: a seccomp filter answers ENOSYS (38) to landlock_create_ruleset.
WITHOUT_LANDLOCK = """
import ctypes, os, struct, sys
steps = (0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050026), (0x06, 0, 0, 0x7fff0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HP", len(steps), ctypes.addressof(code))) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(params=["host", "guest"])
def confined_by(request):
    """What keeps hostfs to what was asked for: Landlock, or where a machine has none, the guest's agent."""
    if request.param == "guest":
        return (sys.executable, "-c", WITHOUT_LANDLOCK)
    return ()


def make_tree(node, *names):
    for name in names:
        path = node.root / name
        path.mkdir(parents=True)
        os.chown(path, node.uid, -1)
        (path / "file").write_text(NONCE)
        os.chown(path / "file", node.uid, -1)
    return [node.root / name for name in names]


def test_a_bound_directory_is_the_host_s(any_node):
    (here,) = make_tree(any_node, "here")
    script = f"cat {here}/file; echo new > {here}/new; mkdir {here}/d; mv {here}/new {here}/d; stat -c %u {here}/d"
    result = any_node.run("--bind", str(here), "sh", "-c", script)
    assert (result.returncode, result.stdout.decode()) == (0, f"{NONCE}{any_node.uid}\n")
    assert (here / "d" / "new").read_text() == "new\n" and (here / "d").stat().st_uid == any_node.uid
    result = any_node.run("-B", f"{here}:/data/in", "-B", f"{here}:/data/out", "sh", "-c", "ls /data; cat /data/*/file")
    assert result.stdout.decode() == "in\nout\n" + NONCE * 2


def test_a_read_only_bind_refuses_writes_even_to_root(node, confined_by):
    (here,) = make_tree(node, "here")
    script = "echo x > /d/new; echo x > /d/file; rm /d/file; mkdir /d/dir; cat /d/file"
    result = node.run("--root", "--bind", f"{here}:/d:ro", "sh", "-c", script, wrap=confined_by)
    assert result.stdout.decode() == NONCE and result.stderr.count(b"Read-only file system") == 4
    if not confined_by:
        node.run(
            "--root", "--bind", f"{here}:/d:ro", "sh", "-c", "mount -o remount,rw /d; : > /d/file; echo x > /d/new"
        )
    assert os.listdir(here) == ["file"] and (here / "file").read_text() == NONCE


NAMES = ["a b", "a,b=c", "a\nb", "a:b", "-x", "\u00e9", os.fsdecode(b"\xff\xfe"), "'\"$x`", "a" * 255, "#%\\"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_paths_of_every_kind_can_be_bound(node, kind):
    words, places = [], []
    for number, name in enumerate(NAMES):
        path = node.root / name
        if kind == "directory":
            path.mkdir()
        (path / "file" if kind == "directory" else path).write_text(f"{NONCE}{number}\n")
        words += ["--bind", str(path), "--bind", f"{path}:/mnt/{number}:ro"]
        places += [str(path), f"/mnt/{number}"]
    files = [f"{place}/file" if kind == "directory" else place for place in places]
    result = node.run(*words, "cat", *files)
    expected = [f"{NONCE}{number}\n" * 2 for number in range(len(NAMES))]
    assert (result.stderr, result.stdout.decode()) == (b"", "".join(expected))


def test_a_bound_file_is_written_in_place(node):
    file = node.job / "settings"
    file.write_text("old")
    result = node.run("--bind", f"{file}:/etc/settings", "sh", "-c", "cat /etc/settings; printf new > /etc/settings")
    assert (result.returncode, result.stdout, file.read_text()) == (0, b"old", "new")


def test_binds_lie_below_others_in_any_order(any_node):
    outer, inner, other = make_tree(any_node, "outer", "inner", "other")
    (outer / "there").mkdir()
    os.chown(outer / "there", any_node.uid, -1)
    words = ["--bind", f"{inner}:/d/there/new", "--bind", f"{other}:{any_node.job}/below", "--bind", f"{outer}:/d"]
    result = any_node.run(*words, "sh", "-c", f"ls /d /d/there/new; cat {any_node.job}/below/file")
    assert result.stdout.decode() == f"/d:\nfile\nthere\n\n/d/there/new:\nfile\n{NONCE}"
    # What was made on the host for that is gone again.
    assert os.listdir(outer / "there") == [] and os.listdir(any_node.job) == []


def test_the_job_directory_may_lie_in_a_bind(any_node):
    make_tree(any_node, "near")
    result = any_node.run("--bind", str(any_node.root), "sh", "-c", f"pwd; cat ../near/file; echo {NONCE} > made")
    assert result.stdout.decode() == f"{any_node.job}\n{NONCE}"
    assert (any_node.job / "made").read_text() == NONCE + "\n"


def home_of(node):
    return "/root" if node.uid == 0 else "/home/" + pwd.getpwuid(node.uid).pw_name


def test_a_home_may_be_bound_and_keeps_no_link(any_node):
    (home,) = make_tree(any_node, "home")
    target = home_of(any_node)
    result = any_node.run("--bind", f"{home}:{target}", "sh", "-c", "cat ~/file; pwd")
    assert result.stdout.decode() == f"{NONCE}{any_node.job}\n"
    assert os.listdir(home) == ["file"]


def test_a_mount_over_the_job_directory_is_no_failure(node):
    result = node.run("--root", "sh", "-c", f"echo {NONCE} > made; mount --bind /mnt {node.root}")
    assert (result.returncode, result.stderr, (node.job / "made").read_text()) == (0, b"", NONCE + "\n")


def test_no_job_dir_shows_nothing_of_it(any_node):
    (any_node.job / "apppot-run").write_text("echo wrong\n")
    result = any_node.run("--no-job-dir", "sh", "-c", f"pwd; echo ~; ls -A ~/job {any_node.job}; mount -t hostfs")
    home = home_of(any_node)
    assert result.stdout.decode().split("\n")[:2] == [home, home]
    assert result.stderr.count(b"No such file") == 2 and b" /tmp" not in result.stdout


@pytest.mark.parametrize(
    "bind",
    ["/no/such", "", ":/x", "/etc:relative", "/etc:/", "/etc:/..", "/dev/null", "/etc:/mnt:rx"],
)
def test_a_bind_that_cannot_be_is_an_error_before_the_boot(node, bind):
    result = node.run("--bind", bind, "true")
    assert result.returncode == 125 and result.stdout == b""
    assert_error(result, "--bind")


def test_a_bind_without_a_place_is_an_error(node):
    (here,) = make_tree(node, "here")
    for target in ("/etc/passwd", "/proc/new", f"{here}/new"):
        words = ["--bind", f"{here}:{here}:ro", "--bind", f"{here}:{target}"]
        result = node.run(*words, "true")
        assert result.returncode == 125
        assert_error(result, "cannot bind", target)


@needs_root
def test_unreadable_is_an_error(kernel, image):
    for node in make_node(kernel, image, 65534):
        (node.root / "closed").mkdir(mode=0o700)
        result = node.run("--bind", str(node.root / "closed"), "true")
        assert result.returncode == 125
        assert_error(result, "closed")


# --- Nothing else of the host -------------------------------------------------------------------------------

ESCAPES = """
try() {{ mkdir -p /mnt/x; mount -t hostfs none /mnt/x -o "$1" && cat /mnt/x/{secret} /mnt/x/secret; umount /mnt/x; }}
ln -s {place} link; mkdir -p deep; ln -s / deep/root
spool=/run/apppot/spool; ln -s {place} $spool/link
for up in .. ../.. ../../.. ../../../.. ../../../../../../../../..; do
    try $up; try $up/{place}; try job/$up; try spool/$up
done
try job/link; try job/deep/root; try spool/link; try bind0/..; try /{place}; try job; try ""
cat $spool/../secret {place}/secret
python3 - <<'END'
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.makedirs("/mnt/y", exist_ok=True)
print("mount", libc.mount(b"none", b"/mnt/y", b"hostfs", 0, b"job/link"), ctypes.get_errno())
fd = libc.syscall(430, b"hostfs", 0)
print("fsopen", fd)
if fd >= 0:
    print(libc.syscall(431, fd, 1, b"hostfs", b"../../../..{place}", 0), libc.syscall(431, fd, 6, None, None, 0))
    mounted = libc.syscall(432, fd, 0, 0)
    if mounted >= 0:
        try: print(open("/proc/self/fd/%d/secret" % mounted).read())
        except OSError as error: print(error)
END
echo '|/bin/sh -c "mkdir -p /mnt/z; mount -t hostfs none /mnt/z -o job/link && cat /mnt/z/secret > {job}/found"' \\
    > /proc/sys/kernel/core_pattern
ulimit -c unlimited; sh -c 'kill -SEGV $$'; sleep 0.5
echo tried
"""


def test_root_of_the_guest_cannot_mount_the_rest_of_the_host(any_node, confined_by):
    (place, inside) = make_tree(any_node, "outside", "inside")
    secret = os.urandom(16).hex()
    (place / "secret").write_text(secret)
    os.chown(place / "secret", any_node.uid, -1)
    script = ESCAPES.format(place=place, job=any_node.job, secret=str(place / "secret").lstrip("/"))
    result = any_node.run("--root", "--bind", f"{inside}:/d", "bash", "-c", script, wrap=confined_by)
    assert result.stdout.endswith(b"tried\n") and secret.encode() not in result.stdout
    assert not (any_node.job / "found").exists()
    # The secret is where the script looked, and the bind works.
    again = any_node.run("--bind", f"{place}:/d", "cat", "/d/secret", wrap=confined_by)
    assert again.stdout.decode() == secret


def test_what_is_confined_works_as_before(any_node, confined_by):
    script = """
        mkdir a b; echo text > a/file; mv a/file b/other; ln b/other a/hard; mv b c; ln -s c/other soft
        cat soft; rm -r a; truncate -s 1M big; mkfifo fifo; chmod 600 soft
        sudo mount --bind c /mnt; cat /mnt/other; sudo umount /mnt; sudo mount -o remount,nodev /run
    """
    result = any_node.run("sh", "-ec", script, wrap=confined_by)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"text\ntext\n", b"")
    assert sorted(os.listdir(any_node.job)) == ["big", "c", "fifo", "soft"]


def test_v_says_what_confines(node, confined_by):
    stderr = node.run("-v", "true", wrap=confined_by).stderr.decode()
    assert ("is confined by the guest" if confined_by else "is confined by Landlock") in stderr


def test_colons_and_modes_are_told_apart(tmp_path):
    (tmp_path / "a:b").mkdir()
    for text, target, read_only in (
        ("{}", "{}", False),
        ("{}:ro", "{}", True),
        ("{}:/x:rw", "/x", False),
        ("{}:/x:ro", "/x", True),
        ("{}://x//y/", "/x/y", False),
    ):
        path = str(tmp_path / "a:b")
        bind = apppot_start.parse_bind(text.format(path))
        assert bind == (os.fsencode(path), os.fsencode(target.format(path)), read_only, True), shlex.quote(text)


def test_a_cow_file_made_here_is_what_a_kernel_makes(node):
    """The runner makes COW files itself; the kernel's own is the measure."""
    ours, theirs = node.root / "ours", node.root / "theirs"
    os.close(apppot_start.open_cow(str(ours), str(node.image)))
    kernel = [node.kernel, f"ubd0={theirs},{node.image}", "root=/dev/ubda", "mem=64M", "con=null", "con0=null,fd:1"]
    panic = subprocess.run(
        [*kernel, f"uml_dir={node.root}", "init=/none"], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert b"Kernel panic" in panic.stdout
    path_end = ours.read_bytes()[:4128].rstrip(b"\0")
    assert theirs.read_bytes()[:4128].startswith(path_end + b"\0") and ours.stat().st_size == theirs.stat().st_size


# --- The caller's home --------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["home/project", "elsewhere", "home"])
@pytest.mark.parametrize("bound", ["home", "."])
def test_home_is_the_caller_s_where_bind_shows_it(any_node, job, bound):
    home, job = any_node.root / "shown/home", any_node.root / "shown" / job
    for path in (home, job):
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, any_node.uid, -1)
    (home / ".settings").write_text("mine\n")
    script = 'echo $HOME; echo ~; pwd; cat ~/.settings; echo new > ~/kept; echo here > made; ls -A ~; id -nu'
    result = any_node.run("--net", "none", "--bind", str((home.parent / bound).resolve()), "sh", "-c", script,
                          cwd=job, env={"HOME": str(home), "PWD": None})  # fmt: skip
    lines = result.stdout.decode().splitlines()
    assert (result.returncode, result.stderr) == (0, b"") and lines[:4] == [str(home), str(home), str(job), "mine"]
    assert (home / "kept").read_text() == "new\n" and (job / "made").read_text() == "here\n"
    expected = {".settings", "kept"}
    expected |= {"made"} if job == home else {"project"} if job.parent == home else set()      # and no link ~/job
    assert set(os.listdir(home)) == expected == set(lines[4:-1])
    assert all(path.stat().st_uid == any_node.uid for path in (home / "kept", job / "made"))


def test_home_is_the_appliance_s_where_bind_shows_it_elsewhere_or_root_is_asked_for(any_node):
    home = any_node.root / "home"
    home.mkdir()
    script = 'echo $HOME; ls -Ad "$1"'
    for options, shown in ((["--bind", f"{home}:/mine"], "/mine"), (["--root", "--bind", str(home)], str(home))):
        result = any_node.run("--net", "none", *options, "sh", "-c", script, "-", shown, env={"HOME": str(home)})
        own, there = result.stdout.decode().splitlines()
        as_root = "--root" in options and any_node.uid != 0
        assert (own == "/root" if as_root else own != str(home) or "--root" in options) and there == shown
    assert os.listdir(home) == []
