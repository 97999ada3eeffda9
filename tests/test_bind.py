# SPDX-License-Identifier: Apache-2.0
"""Directories and files of the host in the guest: those that were asked for, and no others."""

import errno
import os
import pathlib
import pwd
import shlex
import subprocess

import pytest
from nodes import assert_error, make_node, needs_root, wait_for, without_landlock

import apppot_start

NONCE = os.urandom(8).hex()


@pytest.fixture(params=["host", "guest"])
def confined_by(request):
    """What keeps hostfs to what was asked for: Landlock or, without it, the guest's agent."""
    if request.param == "guest":
        return without_landlock
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
    script = (
        f"cat {here}/file; echo new > {here}/new; mkdir {here}/d; mv {here}/new {here}/d; "
        f"stat -c %u {here}/d"
    )
    result = any_node.run("--bind", str(here), "sh", "-c", script)
    assert (result.returncode, result.stdout.decode(), result.stderr) == (
        0, f"{NONCE}{any_node.uid}\n", b"",
    )
    assert (here / "d" / "new").read_text() == "new\n" and (
        here / "d"
    ).stat().st_uid == any_node.uid

    result = any_node.run(
        "-B", f"{here}:/data/in", "-B", f"{here}:/data/out", "sh", "-c",
        "ls /data; cat /data/*/file",
    )
    assert result.stdout.decode() == "in\nout\n" + NONCE * 2


def test_a_read_only_bind_refuses_writes_even_to_root(node, confined_by):
    (here,) = make_tree(node, "here")
    script = "echo x > /d/new; echo x > /d/file; rm /d/file; mkdir /d/dir; cat /d/file"
    result = node.run("--root", "--bind", f"{here}:/d:ro", "sh", "-c", script, wrap=confined_by)
    assert result.stdout.decode() == NONCE and result.stderr.count(b"Read-only file system") == 4

    if not confined_by:
        node.run(
            "--root", "--bind", f"{here}:/d:ro", "sh", "-c",
            "mount -o remount,rw /d; : > /d/file; echo x > /d/new",
        )
    assert os.listdir(here) == ["file"] and (here / "file").read_text() == NONCE


NAMES = [
    "a b",
    "a,b=c",
    "a\nb",
    "a:b",
    "-x",
    "\u00e9",
    os.fsdecode(b"\xff\xfe"),
    "'\"$x`",
    "a" * 255,
    "#%\\",
]


@pytest.mark.own_kernel
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


@pytest.mark.own_kernel
def test_a_bound_file_is_written_in_place(node):
    file = node.job / "settings"
    file.write_text("old")
    result = node.run(
        "--bind", f"{file}:/etc/settings", "sh", "-c",
        "cat /etc/settings; printf new > /etc/settings",
    )
    assert (result.returncode, result.stdout, file.read_text()) == (0, b"old", "new")


def test_binds_lie_below_others_in_any_order(any_node):
    outer, inner, other = make_tree(any_node, "outer", "inner", "other")
    (outer / "there").mkdir()
    os.chown(outer / "there", any_node.uid, -1)
    words = [
        "--bind", f"{inner}:/d/there/new", "--bind", f"{other}:{any_node.job}/below", "--bind",
        f"{outer}:/d",
    ]

    result = any_node.run(*words, "sh", "-c", f"ls /d /d/there/new; cat {any_node.job}/below/file")
    assert result.stdout.decode() == f"/d:\nfile\nthere\n\n/d/there/new:\nfile\n{NONCE}"
    # What was made on the host for that is gone again.
    assert os.listdir(outer / "there") == [] and os.listdir(any_node.job) == []


def test_the_job_directory_may_lie_in_a_bind(any_node):
    make_tree(any_node, "near")
    result = any_node.run(
        "--bind", str(any_node.root), "sh", "-c", f"pwd; cat ../near/file; echo {NONCE} > made"
    )
    assert result.stdout.decode() == f"{any_node.job}\n{NONCE}"
    assert (any_node.job / "made").read_text() == NONCE + "\n"


# --- Mount points on the host ---------------------------------------------------------------------


def list_binds_below(node):
    """Binds whose mount points must be made on the host, and these, the last one a file."""
    inner, outer = make_tree(node, "inner", "outer")
    (node.job / "real").mkdir()
    (node.job / "link").symlink_to("real")
    os.chown(node.job / "real", node.uid, -1)
    places = [node.job / "a/b", node.job / "link/c", outer / "d", node.job / "a/file"]
    targets = [*places[:2], "/outer/d"]
    words = ["--bind", f"{outer}:/outer", "--bind", f"{inner / 'file'}:{places[3]}"]
    for target in targets:
        words += ["--bind", f"{inner}:{target}"]
    script = f"cat {' '.join(f'{target}/file' for target in targets)} {places[3]}"
    return words, places, script


def assert_no_mount_points(node, places):
    assert not any(map(os.path.lexists, places)) and not (node.job / "a").exists()
    assert sorted(os.listdir(node.job)) == ["link", "real"] and os.listdir(node.job / "real") == []


@pytest.mark.parametrize("killed", ["none", "runner", "all"])
def test_mount_points_made_on_the_host_do_not_stay(any_node, killed):
    words, places, script = list_binds_below(any_node)
    process = any_node.start_ready(f"{script}; echo; read line", *words, stdin=subprocess.PIPE)
    assert process.stdout.readline().decode() == NONCE * 4 + "\n"
    assert all(map(os.path.exists, places)) and {path.stat().st_uid for path in places} == {
        any_node.uid
    }

    if killed == "all":
        any_node.kill_at_once()
    elif killed == "runner":
        process.kill()

    any_node.finish(process)
    any_node.wait_until_gone(10)
    if killed == "all":
        assert all(map(os.path.exists, places))
        assert any_node.run("--no-job-dir", "true").returncode == 0

    wait_for(lambda: not os.listdir(any_node.scratch))
    assert_no_mount_points(any_node, places)


def test_what_the_command_puts_beside_a_mount_point_stays(any_node):
    (inner,) = make_tree(any_node, "inner")
    result = any_node.run(
        "--bind", f"{inner}:{any_node.job}/a/b", "sh", "-c", f"echo {NONCE} > a/mine"
    )

    assert (result.returncode, result.stderr) == (0, b"")
    assert (
        os.listdir(any_node.job / "a") == ["mine"]
        and (any_node.job / "a").stat().st_uid == any_node.uid
    )


def test_a_mount_point_below_the_name_of_the_job_directory_that_the_user_knows_goes(any_node):
    (inner,) = make_tree(any_node, "inner")
    alias = any_node.root / "alias"
    alias.symlink_to(any_node.job)
    result = any_node.run(
        "--bind", f"{inner}:{alias}/below", "cat", "below/file", cwd=alias, env={"PWD": str(alias)}
    )
    assert (result.returncode, result.stdout.decode(), os.listdir(any_node.job)) == (0, NONCE, [])


@pytest.fixture
def mount_points(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "job/link").symlink_to(tmp_path / "outside")
    job, outside = (os.fsencode(tmp_path / name) for name in ("job", "outside"))
    shares = (
        apppot_start.Share("job", job, None, False),
        apppot_start.Share("bind0", outside, None, True),
        apppot_start.Share("bind1", outside, b"f", False),
        apppot_start.Share("save", outside, None, False),
    )
    with apppot_start.private_directory(str(tmp_path)) as run:
        yield apppot_start.MountPoints(shares, 0o22, run)
    assert (
        sorted(os.listdir(tmp_path)) == ["job", "outside"]
        and os.listdir(tmp_path / "outside") == []
    )


NO_PATHS = ["", "d", "djob", "djob/", "djob//x", "djob/../x", "djob/x/..", "djob/./x", "djob/x\0y"]
NO_SOURCES = [
    "job/x", "xjob/x", "d/job/x", "dbind9/x", "dbind1/x", "dbind/x", "dhostfs/x", "dsave/x",
]


@pytest.mark.parametrize("words", [*NO_PATHS, *NO_SOURCES])
def test_a_request_that_is_no_mount_point_is_none(mount_points, words):
    with pytest.raises(apppot_start.Misfit):
        mount_points.make(words.encode())


def test_a_mount_point_is_made_where_the_guest_may_write_and_nowhere_else(mount_points, tmp_path):
    assert mount_points.make(b"dbind0/x") == errno.EROFS
    assert mount_points.make(b"djob/link/x") in (errno.ENOTDIR, errno.ELOOP)
    assert (
        mount_points.make(b"djob/a\xff/b")
        == mount_points.make(b"fjob/f")
        == mount_points.make(b"djob/a\xff/b")
        == 0
    )
    assert sorted(os.listdir(os.fsencode(tmp_path / "job"))) == [b"a\xff", b"f", b"link"]


@pytest.mark.parametrize("change", ["kept", "replaced", "filled", "torn"])
def test_what_is_no_longer_what_was_made_stays(tmp_path, change):
    job = tmp_path / "job"
    job.mkdir()

    with apppot_start.private_directory(str(tmp_path)) as run:
        share = apppot_start.Share("job", os.fsencode(job), None, False)
        points = apppot_start.MountPoints([share], 0o22, run)
        assert points.make(b"djob/a/b") == points.make(b"fjob/f") == 0
        if change == "replaced":
            for name in ("a/b", "f"):
                (job / name).rename(job / "a" / "other")  # so that its inode is not used again
                (job / name).mkdir()
                (job / "a" / "other").rename(tmp_path / f"other-{name[0]}")
        elif change == "filled":
            (job / "a/b/c").touch()
            (job / "f").write_text("x")
        elif change == "torn":  # killed before the inode of the last was written
            record = pathlib.Path(run.path + apppot_start.RECORD)
            record.write_bytes(record.read_bytes()[:-2])

    left = sorted(str(path.relative_to(job)) for path in job.rglob("*"))
    assert (
        left
        == {
            "kept": [], "replaced": ["a", "a/b", "f"], "filled": ["a", "a/b", "a/b/c", "f"],
            "torn": [],
        }[change]
    )


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
    assert (result.returncode, result.stderr, (node.job / "made").read_text()) == (
        0, b"", NONCE + "\n",
    )


def test_no_job_dir_shows_nothing_of_it(any_node):
    (any_node.job / "apppot-run").write_text("echo wrong\n")
    result = any_node.run(
        "--no-job-dir", "sh", "-c", f"pwd; echo ~; ls -A ~/job {any_node.job}; mount -t hostfs"
    )
    home = home_of(any_node)
    assert result.stdout.decode().split("\n")[:2] == [home, home]
    assert result.stderr.count(b"No such file") == 2 and b" /tmp" not in result.stdout


@pytest.mark.own_kernel
@pytest.mark.parametrize(
    "bind",
    ["/no/such", "", ":/x", "/etc:relative", "/etc:/", "/etc:/..", "/dev/null", "/etc:/mnt:rx"],
)
def test_a_bind_that_cannot_be_is_an_error_before_the_boot(node, bind):
    result = node.run("--bind", bind, "true")
    assert result.returncode == 125 and result.stdout == b""
    assert_error(result, "--bind")


@pytest.mark.own_kernel
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


# --- Nothing else of the host ---------------------------------------------------------------------

# Kernels from 6.12 on know the directory as the option hostfs=, older ones as the whole text of the
# options.
ESCAPES = """
try() {{
    mkdir -p /mnt/x
    for words in "hostfs=$1" "$1"; do
        mount -t hostfs none /mnt/x -o "$words" && cat /mnt/x/{secret} /mnt/x/secret; umount /mnt/x
    done
}}
try job && echo mounted
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
for words in hostfs=job/link job/link; do
    echo "|/bin/sh -c 'mkdir -p /mnt/z; mount -t hostfs none /mnt/z -o $words && cat /mnt/z/secret > {job}/found'" \\
        > /proc/sys/kernel/core_pattern
    ulimit -c unlimited; sh -c 'kill -SEGV $$'; sleep 0.5
done
echo tried
"""


def test_root_of_the_guest_cannot_mount_the_rest_of_the_host(any_node, confined_by):
    (place, inside) = make_tree(any_node, "outside", "inside")
    secret = os.urandom(16).hex()
    (place / "secret").write_text(secret)
    os.chown(place / "secret", any_node.uid, -1)
    script = ESCAPES.format(place=place, job=any_node.job, secret=str(place / "secret").lstrip("/"))

    result = any_node.run(
        "--root", "--bind", f"{inside}:/d", "bash", "-c", script, wrap=confined_by
    )
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
        share = apppot_start.Share("bind0", os.fsencode(path), None, read_only)
        bind = apppot_start.parse_bind(text.format(path), "bind0")
        assert bind == (share, os.fsencode(target.format(path))), shlex.quote(text)


def test_a_cow_file_made_here_is_what_a_kernel_makes(node):
    """The runner makes COW files itself; the kernel's own is the measure."""
    ours, theirs = node.root / "ours", node.root / "theirs"
    os.close(apppot_start.open_cow(str(ours), str(node.image)))
    kernel = [
        node.kernel, f"ubd0={theirs},{node.image}", "root=/dev/ubda", "mem=64M", "con=null",
        "con0=null,fd:1",
    ]

    panic = subprocess.run(
        [*kernel, f"uml_dir={node.root}", "init=/none"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert b"Kernel panic" in panic.stdout

    path_end = ours.read_bytes()[:4128].rstrip(b"\0")
    assert (
        theirs.read_bytes()[:4128].startswith(path_end + b"\0")
        and ours.stat().st_size == theirs.stat().st_size
    )


# --- The caller's home ----------------------------------------------------------------------------


@pytest.mark.own_kernel
@pytest.mark.parametrize("job", ["home/project", "elsewhere", "home"])
@pytest.mark.parametrize("bound", ["home", "."])
def test_home_is_the_caller_s_where_bind_shows_it(any_node, job, bound):
    home, job = any_node.root / "shown/home", any_node.root / "shown" / job
    for path in (home, job):
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, any_node.uid, -1)

    (home / ".settings").write_text("mine\n")
    script = (
        "echo $HOME; echo ~; pwd; cat ~/.settings; echo new > ~/kept; echo here > made; ls -A ~; "
        "id -nu"
    )
    words = ("--net", "none", "--bind", str((home.parent / bound).resolve()), "sh", "-c", script)
    result = any_node.run(*words, cwd=job, env={"HOME": str(home), "PWD": None})

    lines = result.stdout.decode().splitlines()
    assert (result.returncode, result.stderr) == (0, b"") and lines[:4] == [
        str(home), str(home), str(job), "mine",
    ]
    assert (home / "kept").read_text() == "new\n" and (job / "made").read_text() == "here\n"

    expected = {".settings", "kept"}
    # No link ~/job is made there.
    expected |= {"made"} if job == home else {"project"} if job.parent == home else set()
    assert set(os.listdir(home)) == expected == set(lines[4:-1])
    assert all(path.stat().st_uid == any_node.uid for path in (home / "kept", job / "made"))


def test_home_is_the_appliance_s_where_bind_shows_it_elsewhere_or_root_is_asked_for(any_node):
    home = any_node.root / "home"
    home.mkdir()
    script = 'echo $HOME; ls -Ad "$1"'
    # If the caller is root, --root asks for nothing else than the caller's own account.
    roots = str(home) if any_node.uid == 0 else "/root"
    cases = (
        (["--bind", f"{home}:/mine"], home_of(any_node), "/mine"),
        (["--root", "--bind", str(home)], roots, str(home)),
    )

    for options, own, shown in cases:
        result = any_node.run(
            "--net", "none", *options, "sh", "-c", script, "-", shown, env={"HOME": str(home)}
        )
        assert result.stdout.decode().splitlines() == [own, shown]
    assert os.listdir(home) == []
