# SPDX-License-Identifier: Apache-2.0
"""The private directories of runs: what is removed, what stays, and who may lead out of them."""

import contextlib
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import traceback

import pytest
from nodes import TOP, UNPRIVILEGED, assert_told, make_node, mounted, require

import apppot_start

NONCE = os.urandom(8).hex()
DEEP = 20000

# Runs its arguments where flock(2), number 73, fails with an errno: a file system without locks.
WITHOUT_LOCKS = """
import ctypes, os, struct, sys
fail = 0x00050000 + int(sys.argv[1])
steps = (0x20, 0, 0, 0), (0x15, 0, 1, 73), (0x06, 0, 0, fail), (0x06, 0, 0, 0x7fff0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HP", len(steps), ctypes.addressof(code))) == 0
os.execvp(sys.argv[2], sys.argv[2:])
"""


def without_locks(number):
    return (sys.executable, "-c", WITHOUT_LOCKS, str(number))


class Owner:
    """Who makes and removes directories, in a place that others may use, too."""

    def __init__(self, uid):
        self.uid = uid
        # A disk would take a minute for 100,000 files.
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-", dir=shared))
        self.place.chmod(0o1777)
        self.outside = self.place / "outside"
        self.call(lambda: (self.outside.mkdir(), (self.outside / "file").write_text(NONCE)))

    def call(self, work, uid=None, words=""):
        """Do it in a process of the owner; what that says on stderr has the words."""
        reader, writer = os.pipe()
        pid = os.fork()

        if pid == 0:
            try:
                os.dup2(writer, 2)
                if os.getuid() == 0 and (self.uid if uid is None else uid):
                    os.setgroups([])
                    os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
                    os.setresuid(*[self.uid if uid is None else uid] * 3)
                work()
                os._exit(0)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(1)

        os.close(writer)
        with os.fdopen(reader) as file:
            said = file.read()
        assert (os.waitpid(pid, 0)[1], bool(said)) == (0, bool(words)) and words in said, said

    def leave(self, fill, uid=None):
        """A directory as a run leaves it that is killed; `fill` is called in it."""

        def work():
            directory = apppot_start.make_private_directory(str(self.place))
            os.fchdir(directory.fd)
            fill()

        before = set(self.list_private())
        self.call(work, uid)
        (path,) = set(self.list_private()) - before
        return path

    def list_private(self):
        return [path for path in self.place.iterdir() if path.name.startswith("apppot-")]

    def remove(self, words=""):
        self.call(lambda: apppot_start.remove_stale_directories(str(self.place)), words=words)

    def close(self):
        assert (self.outside / "file").read_text() == NONCE
        shutil.rmtree(self.place)


@pytest.fixture(params=["root", "user"] if os.getuid() == 0 else ["user"])
def owner(request):
    owner = Owner(UNPRIVILEGED if request.param == "user" and os.getuid() == 0 else os.getuid())
    yield owner
    owner.close()


@pytest.fixture
def root():
    require(os.getuid() == 0, "mounts and other users' files need root")
    owner = Owner(0)
    yield owner
    owner.close()


# --- What is removed ------------------------------------------------------------------------------


def make_levels():
    here = os.open(".", os.O_RDONLY)
    for _ in range(DEEP):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below


def make_many():
    for number in range(100000):
        os.close(os.open(str(number), os.O_CREAT, 0o600))
    for number in range(5000):
        os.makedirs(f"d/{number}/e")


def make_closed():
    for mode in (0, 0o200, 0o400, 0o500):
        os.makedirs(f"{mode}/in/in")
        pathlib.Path(f"{mode}/in/file").touch()
        os.chmod(f"{mode}/in", mode)
        os.chmod(f"{mode}", mode)
    os.chmod(".", 0)


def make_kinds():
    os.symlink("../outside", "link")
    os.symlink("../outside/file", "file")
    os.symlink("..", "above")
    os.link("../outside/file", "hard")
    os.mkfifo("fifo")
    socket.socket(socket.AF_UNIX).bind("socket")
    for number in set(range(1, 256)) - {ord("/")}:
        os.makedirs(b"n\xff" + bytes([number]) * 100)
    os.mkdir(b"\xfe\n")


@pytest.mark.parametrize("fill", [make_levels, make_many, make_closed, make_kinds])
def test_what_a_killed_run_left_goes_whatever_it_is(owner, fill):
    owner.leave(fill)
    owner.remove()
    assert owner.list_private() == []


@pytest.mark.parametrize("fill", [make_closed, make_kinds])
def test_a_run_s_own_end_removes_the_same(owner, fill):
    def work():
        with apppot_start.private_directory(str(owner.place)) as directory:
            os.fchdir(directory.fd)
            fill()

    owner.call(work)
    assert owner.list_private() == []


def test_a_removal_that_is_killed_is_ended_by_the_next_run(owner, monkeypatch):
    """Whatever it has removed until then."""
    for count in range(12):
        owner.leave(lambda: (os.makedirs("a/b"), os.makedirs("c"), pathlib.Path("d").touch()))
        left = count

        def remove_until_killed(name, directory, remove=apppot_start.remove_entry):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(0)
            return remove(name, directory)

        monkeypatch.setattr(apppot_start, "remove_entry", remove_until_killed)
        owner.remove()
        monkeypatch.undo()
        owner.remove()
        assert owner.list_private() == []


def test_one_that_was_killed_before_it_had_a_mark_goes(owner):
    path = owner.place / f"apppot-{owner.uid}-0123456789ab"
    owner.call(path.mkdir)
    owner.remove()
    assert not path.exists()


# --- What is not ----------------------------------------------------------------------------------


def test_directories_of_the_user_s_own_stay(owner):
    names = ["results", "x", "0123456789ab", "0123456789abc", "0123456789AB"]
    paths = [owner.place / f"apppot-{owner.uid}-{name}" for name in names]

    def make():
        for path in paths:
            path.mkdir()
            (path / "data").write_text(NONCE)
            path.chmod(0o500)
        (owner.place / f"apppot-{owner.uid}-ba9876543210").symlink_to(paths[0])

    owner.call(make)
    owner.remove()
    assert [(path / "data").read_text() for path in paths] == [NONCE] * len(paths)
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o500}
    assert len(owner.list_private()) == len(paths) + 1
    for path in paths:
        path.chmod(0o700)                         # else an ordinary user cannot remove what is in it


def test_a_run_that_lives_keeps_its_directory(owner):
    def work():
        place = str(owner.place)
        with apppot_start.private_directory(place) as first, apppot_start.private_directory(place):
            assert os.path.samestat(os.stat(first.path), os.fstat(first.fd))

    owner.call(work)
    assert owner.list_private() == []


def test_one_without_a_lock_is_kept_where_others_have_locks(owner, monkeypatch):
    """As on a node that ran out of locks for a while."""

    def work():
        with monkeypatch.context() as patch:
            patch.setattr(apppot_start, "lock_directory", lambda directory: None)
            first = apppot_start.make_private_directory(str(owner.place))
        apppot_start.remove_stale_directories(str(owner.place))
        assert os.listdir(first.path)
        apppot_start.remove_private(first)

    owner.call(work)
    assert owner.list_private() == []


def test_what_another_user_made_stays_and_nobody_is_told(root):
    path = root.leave(lambda: os.mkdir("d"), uid=UNPRIVILEGED)
    named_as_ours = path.with_name("apppot-0-0123456789ab")
    path.rename(named_as_ours)
    root.remove()
    assert (named_as_ours / "d").is_dir()


def test_a_mark_that_another_user_made_is_none(root):
    path = root.leave(lambda: os.mkdir("d"))
    (mark,) = path.glob("of-*")
    os.chown(mark, UNPRIVILEGED, -1)
    root.remove()
    assert (path / "d").is_dir()


def test_a_directory_of_another_user_is_not_entered(root):
    path = root.leave(lambda: (os.makedirs("theirs/d"), os.makedirs("ours/d")))
    os.chown(path / "theirs", UNPRIVILEGED, -1)
    root.remove(
        f"apppot: warning: directory of a run cannot be removed, Directory not empty: {path}\n"
    )
    assert (path / "theirs" / "d").is_dir() and not (path / "ours").exists()


@pytest.mark.parametrize("where", ["", "/d/e", "/f"])
@pytest.mark.parametrize("what", ["bind", "tmpfs"])
def test_what_is_mounted_there_stays(root, where, what):
    path = root.leave(lambda: (os.makedirs("d/e"), pathlib.Path("f").touch()))
    source = root.outside / "file" if where == "/f" else root.outside
    mount = (
        f"mount --bind {source} {path}{where}"
        if what == "bind" or where == "/f"
        else (f"mount -t tmpfs none {path}{where} && cp -p {root.outside}/file {path}{where}")
    )
    look = f"cat {path}{where}{'' if where == '/f' else '/file'}"
    code = "import apppot_start, sys; apppot_start.remove_stale_directories(sys.argv[1])"
    argv = [*mounted(f'{mount}; {sys.executable} -c "{code}" {root.place}'), "sh", "-c", look]

    result = subprocess.run(argv, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (result.returncode, result.stdout.decode()) == (0, NONCE), result.stderr
    # With a mount over it the directory is none of ours at all.
    assert (str(path) in result.stderr.decode()) == bool(where)

    root.remove()
    assert root.list_private() == []


def swap_for_link(name, above, outside):
    os.rename(name, "gone", src_dir_fd=above, dst_dir_fd=above)
    os.symlink(outside, name, dir_fd=above)


def move_away(name, above, outside):
    os.rename(name, os.path.join(outside, "moved"), src_dir_fd=above)


@pytest.mark.parametrize("change", [swap_for_link, move_away])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_others_move_meanwhile_leads_nowhere(owner, monkeypatch, change, when):
    """Somebody renames a directory just before it is opened, or just after."""
    path = owner.leave(lambda: (os.makedirs("a/b/c"), pathlib.Path("a/b/file").touch()))
    open_directory = apppot_start.open_directory

    def open_changed(name, above, realm):
        if name == "b" and when == "before":
            change(name, above, str(owner.outside))
        directory = open_directory(name, above, realm)
        if name == "b" and when == "after":
            change(name, above, str(owner.outside))
        return directory

    monkeypatch.setattr(apppot_start, "open_directory", open_changed)
    is_missed = (change, when) == (move_away, "before")
    owner.remove("" if is_missed else str(path))
    monkeypatch.undo()
    # What was moved away before it was opened is no longer a run's; what was open is emptied
    # wherever it is.
    moved = owner.outside / "moved"
    assert moved.exists() == (change == move_away)
    assert not moved.exists() or sorted(os.listdir(moved)) == (["c", "file"] if is_missed else [])
    owner.remove()
    assert owner.list_private() == []


# --- Whose it is ----------------------------------------------------------------------------------

HERE = apppot_start.find_own_identity(1)


@pytest.mark.parametrize(
    "change, unlocked, locks_unknown",
    [
        ({}, False, False),  # this process lives
        ({"started": 1}, True, True),
        ({"pid": 1 << 22}, True, True),
        ({"namespace": 1, "pid": 1 << 22}, True, False),
        ({"namespace": 1, "pid": 1 << 22, "has_lock": 0}, False, False),
        ({"boot": "0" * 32, "node": "another"}, False, False),
        ({"boot": "0" * 32}, True, True),  # this node, booted again
        ({"node": "another", "namespace": 1}, True, False),  # a container of this node
    ],
)
def test_a_run_has_ended_if_this_node_can_tell(change, unlocked, locks_unknown):
    owner = HERE._replace(**change)
    assert (apppot_start.has_ended(owner, True), apppot_start.has_ended(owner, False)) == (
        unlocked,
        locks_unknown,
    )


def test_the_directory_of_a_run_on_another_node_stays(owner):
    def rename_mark():
        (mark,) = pathlib.Path().glob("of-*")
        mark.rename(str(mark).replace(HERE.boot, "0" * 32).replace(HERE.node, "another"))

    path = owner.leave(rename_mark)
    owner.remove()
    assert path.is_dir()


def test_a_directory_that_others_remove_again_and_again_is_given_up(owner, monkeypatch):
    made = []

    def mkdir(path, mode):
        made.append(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(apppot_start.Fatal):
        apppot_start.make_private_directory(str(owner.place))
    monkeypatch.undo()
    assert 1 < len(made) < 100


@pytest.mark.parametrize("number", [37, 38])  # ENOLCK, ENOSYS
def test_a_file_system_without_locks_will_do(any_node, number):
    other = any_node.start_ready(
        "read line; echo still $line", wrap=without_locks(number), stdin=subprocess.PIPE
    )
    result = any_node.run("--save-changes", "c.tar.gz", "true", wrap=without_locks(number))
    assert (result.returncode, result.stderr, os.listdir(any_node.job)) == (0, b"", ["c.tar.gz"])
    other.stdin.write(b"here\n")
    assert any_node.finish(other) == (0, b"still here\n", b"")


def test_without_locks_what_a_killed_run_left_goes_too(any_node):
    wrap = without_locks(38)
    process = any_node.start_ready("exec sleep 100", "--save-changes", "c.tar.gz", wrap=wrap)
    any_node.kill_at_once()
    any_node.finish(process)
    any_node.wait_until_gone()

    assert os.listdir(any_node.scratch) and os.listdir(any_node.job)
    assert any_node.run("--save-changes", "d.tar.gz", "true", wrap=wrap).returncode == 0
    assert os.listdir(any_node.job) == ["d.tar.gz"]


def test_a_run_leaves_directories_of_the_user_s_own_alone(any_node):
    names = {f"apppot-{any_node.uid}-results", f"apppot-{any_node.uid}-0123456789ab"}
    for name in names:
        (any_node.job / name).mkdir()
        (any_node.job / name / "data").touch()
        os.chown(any_node.job / name, any_node.uid, -1)

    assert (
        any_node.run(
            "--save-changes", "c.tar.gz", "true", env={"APPPOT_TMPDIR": str(any_node.job)}
        ).returncode
        == 0
    )
    assert set(os.listdir(any_node.job)) == names | {"c.tar.gz"}
    assert all((any_node.job / name / "data").exists() for name in names)


def test_a_probe_that_is_killed_leaves_nothing(owner, monkeypatch):
    def die(*words, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", die)
    with contextlib.suppress(KeyboardInterrupt):
        apppot_start.find_fault_for_ram(str(owner.place), 1)
    monkeypatch.undo()
    assert os.listdir(owner.place) == ["outside"]


# --- What the guest puts there --------------------------------------------------------------------

PLANT = """
import os
os.chdir("/run/apppot/spool")
for name in ("in1", "in2", "in3"):
    {make}
os.makedirs("closed/in/in")
for path in ("closed/in", "closed"):
    os.chmod(path, 0)
for _ in range({depth}):
    os.mkdir("d")
    os.chdir("d")
"""
PLANTED = [("os.symlink({victim!r}, name)", 0), ("os.mkfifo(name)", 1100), ("os.mkdir(name)", 0)]


@pytest.mark.parametrize("make, depth", PLANTED)
def test_what_root_of_the_guest_puts_into_the_spool_changes_nothing(any_node, make, depth):
    victim = any_node.root / "victim"
    victim.write_text(NONCE)
    os.chown(victim, any_node.uid, -1)
    (any_node.job / "plant").write_text(
        PLANT.format(make=make.format(victim=str(victim)), depth=depth)
    )
    content = os.urandom(5 << 19)

    process = any_node.start_ready(
        "python3 plant; echo planted; exec cat", "--root", stdin=subprocess.PIPE
    )
    assert process.stdout.readline() == b"planted\n"

    stdout, stderr = process.communicate(content, timeout=60)
    assert (process.returncode, stdout == content, stderr) == (0, True, b"")
    assert victim.read_text() == NONCE


def test_an_ordinary_user_of_the_guest_does_not_reach_the_spool(kernel, image):
    uid = UNPRIVILEGED if os.getuid() == 0 else os.getuid()
    for node in make_node(kernel, image, uid):
        result = node.run(
            "sh", "-c", "ls /run/apppot; ls /run/apppot/spool; touch /run/apppot/spool/in1"
        )
        assert result.stdout == b"" and result.stderr.count(b"Permission denied") == 3


def test_a_spool_that_root_of_the_guest_has_removed_is_named(node):
    process = node.start_ready("exec cat", stdin=subprocess.PIPE)
    shutil.rmtree(next(node.scratch.glob("apppot-*/spool")))
    _, stderr = process.communicate(bytes(100000), timeout=60)
    assert process.returncode == 125
    assert_told(stderr, "stdin cannot be passed on")
    assert b"/run/apppot/spool" in stderr


def test_what_root_of_the_guest_puts_beside_the_changes_file_changes_nothing(any_node):
    script = """
        cd /run/apppot/save
        ln -s /etc/passwd c.tar.gz; mkfifo apppot fifo; mkdir -p closed/in; chmod 0 closed
    """

    result = any_node.run("--root", "--save-changes", "c.tar.gz", "sh", "-ec", script)
    assert (result.returncode, result.stderr, os.listdir(any_node.job)) == (0, b"", ["c.tar.gz"])
    assert stat.S_ISREG((any_node.job / "c.tar.gz").lstat().st_mode)


def make_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("/etc/passwd"), lambda path: path.symlink_to("nowhere"),
        os.mkfifo, make_socket, lambda path: path.mkdir(),
    ],
)
def test_a_saved_file_that_is_none_is_refused(owner, make):
    def work():
        with apppot_start.private_directory(str(owner.place)) as save:
            given = pathlib.Path(save.path, apppot_start.GIVEN)
            given.mkdir()
            make(given / "name")
            with pytest.raises(apppot_start.Fatal) as caught:
                apppot_start.place_changes(save, "name", str(owner.place / "c.tar.gz"))
            assert (
                "changes were not saved" in caught.value.message
                and "killed" not in caught.value.message
            )

    owner.call(work)
    assert sorted(os.listdir(owner.place)) == ["outside"]


def test_a_saved_directory_that_was_swapped_for_a_link_is_refused(owner):
    def work():
        with apppot_start.private_directory(str(owner.place)) as save:
            os.symlink(owner.outside, apppot_start.GIVEN, dir_fd=save.fd)
            with pytest.raises(apppot_start.Fatal):
                apppot_start.place_changes(save, "file", str(owner.place / "c.tar.gz"))

    owner.call(work)
    assert sorted(os.listdir(owner.place)) == ["outside"]


@pytest.mark.parametrize("link", ["", "mconsole", "guest"])
def test_a_console_that_is_a_link_is_not_written_to(tmp_path, link):
    (tmp_path / "run/guest").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    place = tmp_path / ("other" if link else "run/guest")

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(place / "mconsole"))
        receiver.setblocking(False)
        if link == "mconsole":
            (tmp_path / "run/guest/mconsole").symlink_to(place / "mconsole")
        elif link == "guest":
            (tmp_path / "run/guest").rmdir()
            (tmp_path / "run/guest").symlink_to(place)
        directory = os.open(tmp_path / "run", os.O_RDONLY)
        apppot_start.ask_mconsole(directory, "guest", b"stop")
        os.close(directory)
        try:
            received = receiver.recv(1024)
        except BlockingIOError:
            received = b""
    assert (b"stop" in received) == (link == "")


def test_what_the_guest_puts_in_the_place_of_the_files_of_empty_is_not_opened(tmp_path):
    (tmp_path / "file").write_text("1")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "pid").symlink_to("file")
    directory = os.open(tmp_path, os.O_RDONLY)
    for name in ("file", "link", "none"):
        with pytest.raises(OSError):
            apppot_start.open_fifo(name, os.O_RDONLY, directory)

    for name in ("fifo", "link", "pid", "none"):
        with pytest.raises(OSError):
            apppot_start.open_own(name, directory)

    os.close(apppot_start.open_fifo("fifo", os.O_RDONLY, directory))
    os.close(apppot_start.open_own("file", directory))
    os.close(directory)
