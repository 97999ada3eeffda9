# SPDX-License-Identifier: Apache-2.0
"""Changes files: real trees, compared by a dump that shares no code with what it judges."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nodes import TOP, assert_error, caller_is_root, writable_copy

import changes

IS_ROOT = os.getuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="owners, devices and mounts need root")
NAMES = [b"a", b"b", b"c", b"\xff\xfe\x80", b"new\nline", b"n" * 255, " ü".encode(), b"-x", b"{", b"a.b"]
QUIET = changes.Report()
NOTHING = changes.compile_exclude([])


@contextlib.contextmanager
def fresh_place():
    """A directory in memory, where the kernel has user attributes there (6.6), else on the disk."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-", dir="/dev/shm"))

    try:
        os.setxattr(path, "user.a", b"")
        os.removexattr(path, "user.a")
    except OSError:
        path.rmdir()
        path = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-", dir="/var/tmp"))
    try:
        yield path
    finally:
        if os.getuid() != 0:
            subprocess.run(["chmod", "-R", "u+rwx", path], check=True)
        subprocess.run(["rm", "-rf", path], check=True)


@pytest.fixture
def place():
    with fresh_place() as path:
        yield path


def snap(*words, **options):
    """The command itself."""
    command = [sys.executable, TOP / "changes.py", *words]
    return subprocess.run(command, capture_output=True, timeout=120, **options)


# --- Trees: made from a description, and described by a dump --------------------------------------

NO_ID = 2**32 - 1
ACL = struct.pack("<I" + "HHI" * 5, 2, 1, 6, NO_ID, 2, 6, 12345, 4, 4, NO_ID, 16, 6, NO_ID, 32, 4, NO_ID)
CAPABILITY = struct.pack("<5I", 0x02000001, 0x400, 0, 0, 0)  # cap_net_bind_service, linux/capability.h

mtimes = st.one_of(st.integers(-(2**31) * 10**9, 2**33 * 10**9), st.just(10**18), st.just(0))
owners = st.sampled_from([0, 1, 1000, 2097152, 4294967294] if IS_ROOT else [os.getuid()])
modes = st.integers(0, 0o7777) if IS_ROOT else st.integers(0, 0o777).map(lambda mode: mode | 0o700)
contents = st.one_of(st.binary(max_size=30), st.binary(min_size=510, max_size=514), st.just(b"same"))
file_xattrs = st.dictionaries(
    st.sampled_from(["user.a", "user.b b=c", "trusted.t", "system.posix_acl_access", "security.capability"]
                    if IS_ROOT else ["user.a", "user.b b=c"]),
    st.binary(max_size=20), max_size=2)  # fmt: skip
common = {"mode": modes, "uid": owners, "gid": owners, "mtime": mtimes}
nodes = st.recursive(
    st.one_of(
        st.fixed_dictionaries({**common, "kind": st.just("file"), "content": contents, "xattrs": file_xattrs,
                               "holes": st.sampled_from([None, None, (0, 1 << 16), (1 << 17, 0), (1 << 16, 1 << 16)])}),
        st.fixed_dictionaries({**common, "kind": st.just("symlink"),
                               "target": st.sampled_from([b"a", b"/etc", b"..", b"\xff\n", b"x" * 300])}),
        st.fixed_dictionaries({**common, "kind": st.just("fifo")}),
        *([st.fixed_dictionaries({**common, "kind": st.sampled_from(["char", "block"]),
                                  "device": st.sampled_from([(1, 3), (8, 300), (4000, 1000000)])})] if IS_ROOT else []),
    ),
    lambda children: st.fixed_dictionaries({
        **common, "kind": st.just("directory"),
        "children": st.dictionaries(st.sampled_from(NAMES), children, max_size=5),
        "xattrs": st.sampled_from([{}, {}, {"user.a": b"1"}]
                                  + [{"system.posix_acl_default": ACL, "system.posix_acl_access": ACL}] * IS_ROOT)}),
    max_leaves=10,
)  # fmt: skip
roots = st.fixed_dictionaries({
    **common, "kind": st.just("directory"), "xattrs": st.just({}),
    "children": st.dictionaries(st.sampled_from(NAMES), nodes, max_size=5),
    "links": st.lists(st.tuples(st.integers(0, 9), st.sampled_from(NAMES)), max_size=3)})  # fmt: skip


def build(node, name, directory):
    """Make what a description says."""
    where = {"dir_fd": directory}
    path = b"/proc/self/fd/%d/%b" % (directory, name)
    kind = node["kind"]

    if kind == "directory":
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, **where)
        descriptor = os.open(name, os.O_RDONLY, **where)
        for child, below in node["children"].items():
            build(below, child, descriptor)
        make_links(node.get("links", ()), descriptor)
        os.close(descriptor)
    elif kind == "file":
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, **where)
        before, after = node["holes"] or (0, 0)
        os.lseek(descriptor, before, os.SEEK_SET)
        os.write(descriptor, node["content"])
        if after:
            os.truncate(descriptor, before + len(node["content"]) + after)
        os.close(descriptor)
    elif kind == "symlink":
        os.symlink(node["target"], name, **where)
    elif kind == "fifo":
        os.mkfifo(name, **where)
    else:
        file_type = stat.S_IFCHR if kind == "char" else stat.S_IFBLK
        os.mknod(name, file_type, os.makedev(*node["device"]), **where)

    if IS_ROOT:
        os.chown(name, node["uid"], node["gid"], follow_symlinks=False, **where)
    if kind != "symlink":
        os.chmod(name, node["mode"], **where)
    for key, value in node.get("xattrs", {}).items():
        valid = {"system.posix_acl_access": ACL, "security.capability": CAPABILITY}.get(key, value)
        os.setxattr(path, key, valid, follow_symlinks=False)
    os.utime(name, ns=(0, node["mtime"]), follow_symlinks=False, **where)


def make_links(links, descriptor):
    """Hard links from names in the tree's root to any of its files, by number."""
    files = sorted(path for path, fields in dump(descriptor).items() if fields[0] != stat.S_IFDIR)
    for number, name in links:
        if files:
            with contextlib.suppress(FileExistsError):
                os.link(files[number % len(files)], name, src_dir_fd=descriptor, dst_dir_fd=descriptor,
                        follow_symlinks=False)  # fmt: skip


def make(root, description):
    descriptor = os.open(root.parent, os.O_RDONLY)
    build(description, os.fsencode(root.name), descriptor)
    os.close(descriptor)


def find_holes(descriptor, size):
    pieces, end = [], 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        pieces.append((start, end))
    return pieces


def dump(root):
    """Of each file its type, mode, owner, mtime, attributes, names, content and holes."""
    found, inodes = {}, {}

    def visit(directory, path):
        with os.scandir(directory) as entries:
            names = sorted(os.fsencode(entry.name) for entry in entries)
        for name in [b"."] * (path == b"") + names:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            kind = stat.S_IFMT(status.st_mode)
            full = path + name
            via = b"/proc/self/fd/%d/%b" % (directory, name)
            attributes = [(key, os.getxattr(via, key, follow_symlinks=False))
                          for key in sorted(os.listxattr(via, follow_symlinks=False))]  # fmt: skip

            owner = (status.st_uid, status.st_gid) if IS_ROOT else None
            fields = [kind, stat.S_IMODE(status.st_mode), owner, status.st_mtime_ns, attributes]

            if kind == stat.S_IFDIR:
                if name != b".":
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                    descriptor = os.open(name, flags, dir_fd=directory)
                    visit(descriptor, full + b"/")
                    os.close(descriptor)
            else:
                inodes.setdefault(status.st_ino, []).append(full)
                fields.append(inodes[status.st_ino])

            if kind == stat.S_IFREG:
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
                pieces = find_holes(descriptor, status.st_size)
                fields += [status.st_size, pieces,
                           [os.pread(descriptor, end - start, start) for start, end in pieces]]  # fmt: skip
                os.close(descriptor)
            elif kind == stat.S_IFLNK:
                fields.append(os.readlink(name, dir_fd=directory))
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                fields.append(status.st_rdev)

            found[full] = fields

    if isinstance(root, int):
        visit(root, b"")
    else:
        descriptor = os.open(root, os.O_RDONLY)
        visit(descriptor, b"")
        os.close(descriptor)
    return found


def diff(one, other, output):
    plan = changes.compare_trees(os.fsencode(one), os.fsencode(other), NOTHING, QUIET)
    changes.write_layer(os.fsencode(other), plan, os.fsencode(output), QUIET)
    return output


def merge(root, *layers, force=False):
    paths = [os.fsencode(layer) for layer in layers]
    changes.run_apply(paths, os.fsencode(root), False, force, QUIET)


def squash(output, *layers):
    paths = [os.fsencode(layer) for layer in layers]
    changes.run_squash(paths, os.fsencode(output), False, QUIET)


def names_in(layer):
    with tarfile.open(layer) as tar:
        return [member.name for member in tar]


many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


# --- Any two trees --------------------------------------------------------------------------------


@many
@given(roots, roots)
def test_applying_the_difference_makes_one_tree_of_the_other(old, new):
    with fresh_place() as place:
        a, b = place / "a", place / "b"
        make(a, old), make(b, new)
        diff(a, b, place / "ab.tar.gz")
        assert diff(a, b, place / "again.tar.gz").read_bytes() == (place / "ab.tar.gz").read_bytes()
        wanted = dump(b)
        merge(a, place / "ab.tar.gz")
        assert dump(a) == wanted
        assert names_in(diff(a, b, place / "none.tar.gz")) == ["var/lib/apppot/changes.json"]


@many
@given(roots, roots)
def test_what_differs_from_the_recorded_base_makes_the_same_tree_elsewhere(old, new):
    """One tree changes and is compared with its manifest; another like it gets the changes."""
    with fresh_place() as place:
        here, there, target, state = (place / name for name in ("here", "there", "target", "state"))
        make(here, old), make(there, old), make(target, new)

        (here / "var/lib/apppot").mkdir(parents=True)
        shutil.move(here / "var", state)
        base = changes.compare_trees(os.fsencode(here), os.fsencode(target), NOTHING, QUIET)
        os.utime(here, ns=(0, old["mtime"]))
        (state / "lib/apppot").mkdir(parents=True, exist_ok=True)

        manifest = record(here, place)
        changes.write_layer(os.fsencode(target), base, os.fsencode(place / "edit.tar"), QUIET)
        merge(here, place / "edit.tar")

        plan = changes.find_changes(os.fsencode(here), manifest, NOTHING, QUIET)
        changes.write_layer(os.fsencode(here), plan, os.fsencode(place / "saved.tar.gz"), QUIET)
        merge(there, place / "saved.tar.gz")
        assert dump(there) == dump(here) == dump(target)


def record(root, place):
    """The manifest of a tree, kept outside of it."""
    changes.record_base(os.fsencode(root), NOTHING, QUIET, os.fsencode(place / "manifest"))
    return changes.read_manifest(os.fsencode(root), os.fsencode(place / "manifest"))


@many
@given(roots, roots, roots)
def test_layers_squashed_into_one_do_what_they_do_one_by_one(first, second, third):
    with fresh_place() as place:
        a, b, c, other = (place / name for name in "abcd")
        make(a, first), make(b, second), make(c, third), make(other, first)
        layers = [diff(a, b, place / "ab.tar.gz"), diff(b, c, place / "bc.tar.gz")]
        squash(place / "ac.tar.gz", *layers)
        merge(other, place / "ac.tar.gz")
        assert dump(other) == dump(c)
        merge(a, *layers)
        assert dump(a) == dump(c)


def test_deep_paths_and_long_names_survive(place):
    for name, parts in (("long", [b"n" * 255] * 20), ("many", [b"d"] * 2500)):
        a, b = place / (name + "-a"), place / (name + "-b")
        a.mkdir(), b.mkdir()

        descriptor = os.open(b, os.O_RDONLY)
        for part in parts:
            os.mkdir(part, dir_fd=descriptor)
            below = os.open(part, os.O_RDONLY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        os.close(os.open(b"bottom", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
        os.close(descriptor)

        layer = diff(a, b, place / "deep.tar.gz")
        merge(a, layer)
        assert names_in(diff(a, b, place / "none.tar.gz")) == ["var/lib/apppot/changes.json"]
        assert len(names_in(layer)) == len(parts) + 3

        (place / "empty").mkdir(exist_ok=True)
        merge(b, diff(b, place / "empty", place / "gone.tar.gz"))
        assert os.listdir(b) == []


def test_sockets_are_left_out_with_a_warning(place):
    (place / "a").mkdir(), (place / "b").mkdir()
    (place / "a" / "was a file").write_text("x")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(place / "b")
        listener.bind("was a file")
        os.chdir(TOP)
        result = snap("diff", place / "a", place / "b", "-o", place / "l.tar.gz")
    assert result.returncode == 0 and b"warning: left out, a socket: /was a file" in result.stderr
    merge(place / "a", place / "l.tar.gz")
    assert os.listdir(place / "a") == []


def test_files_over_8_gib_keep_their_size_and_their_holes(place):
    (place / "a").mkdir(), (place / "b").mkdir()
    with open(place / "b" / "big", "wb") as file:
        file.truncate(9 << 30)
        file.seek(8 << 30)
        file.write(b"far")
    layer = diff(place / "a", place / "b", place / "l.tar")
    assert layer.stat().st_size < 1 << 20
    merge(place / "a", layer)
    assert (place / "a" / "big").stat().st_size == 9 << 30
    assert (place / "a" / "big").stat().st_blocks * 512 < 1 << 20
    assert dump(place / "a") == dump(place / "b")
    listing = subprocess.run(["tar", "tvf", layer], capture_output=True, check=True).stdout
    assert b"9663676416" in listing


# --- What is seen as changed ----------------------------------------------------------------------


def appliance(place, name="system"):
    root = place / name
    for directory in ("etc", "usr/bin", "var/lib/apppot", "tmp", "root"):
        (root / directory).mkdir(parents=True)
    (root / "var/lib/apppot/base-id").write_text("11111111-2222-3333-4444-555555555555\n")
    for file in ("etc/one", "etc/two", "usr/bin/tool", "etc/three"):
        (root / file).write_text(file)
    os.link(root / "etc/three", root / "usr/three")
    return root


def saved(root, place, *options):
    result = snap("changes", "--root", root, place / "c.tar.gz", *options)
    assert result.returncode == 0, result.stderr
    return [name for name in names_in(place / "c.tar.gz") if not name.startswith("var/lib/apppot")]


def test_nothing_is_changed_right_after_the_base_was_recorded(place):
    root = appliance(place)
    assert snap("base", "--root", root).returncode == 0
    assert saved(root, place) == []


def test_a_change_in_the_same_tick_with_size_and_mtime_kept_is_seen(place):
    root = appliance(place)
    (root / "etc/last").write_text("1")
    assert snap("base", "--root", root).returncode == 0
    for path in (root / "etc/one", root / "etc/last"):
        before = path.stat()
        path.write_text("!" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert saved(root, place) == ["etc", "etc/last", "etc/one"]


def test_directories_that_change_places_are_seen(place):
    root = appliance(place)
    for name in "xy":
        (root / "etc" / name).mkdir()
        (root / "etc" / name / "VERSION").write_text(name)
        os.utime(root / "etc" / name / "VERSION", ns=(0, 0))
    assert snap("base", "--root", root).returncode == 0
    os.rename(root / "etc/x", root / "etc/z"), os.rename(root / "etc/y", root / "etc/x")
    os.rename(root / "etc/z", root / "etc/y")
    assert saved(root, place) == ["etc", "etc/x", "etc/x/VERSION", "etc/y", "etc/y/VERSION"]


def test_what_is_excluded_is_neither_saved_nor_deleted(place):
    root = appliance(place)
    (root / "tmp/was").write_text("x"), (root / "etc/a.log").write_text("x")
    (root / "etc/apppot").mkdir()
    (root / "etc/apppot/exclude").write_text("# comment\n/usr/b?n\n")
    assert snap("base", "--root", root).returncode == 0
    for name in ("tmp/was", "etc/a.log", "usr/bin/tool"):
        (root / name).unlink()
    for name in ("tmp/new", "usr/bin/new", "var/lib/apppot/new", "etc/b.log"):
        (root / name).write_text("x")
    assert saved(root, place, "-x", "*.log") == ["etc"]
    assert saved(root, place) == ["etc", "etc/.wh.a.log", "etc/b.log"]


def test_the_changes_file_does_not_contain_itself(place):
    root = appliance(place)
    assert snap("base", "--root", root).returncode == 0
    assert snap("changes", "--root", root, "c.tar.gz", cwd=root / "etc").returncode == 0
    assert snap("changes", "--root", root, "c.tar.gz", cwd=root / "etc").returncode == 0
    names = names_in(root / "etc/c.tar.gz")
    assert not [name for name in names if "c.tar" in name or ".apppot" in name]


@needs_root
def test_mounts_are_neither_saved_nor_deleted_nor_entered(place):
    root = appliance(place)
    assert snap("base", "--root", root).returncode == 0

    script = f"""
        mkdir -p {root}/task/job
        mount -t tmpfs none {root}/task/job; mount -t tmpfs none {root}/etc
        echo mine > {root}/etc/one; echo mine > {root}/task/job/file
        {sys.executable} {TOP}/changes.py changes --root {root} {place}/c.tar.gz
        {sys.executable} {TOP}/changes.py apply {place}/evil.tar.gz {root}
        cat {root}/etc/one; ls {root}/etc {root}/task/job"""

    make_layer(place / "evil.tar.gz", [("etc/one", b"theirs"), ("etc/new", b""), ("task/.wh.job", b""),
                                       (".wh.etc", b""), ("task/job/x", b""), ("usr/x", b"1")])  # fmt: skip

    result = subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, check=True)

    assert [name for name in names_in(place / "c.tar.gz") if "apppot" not in name] == ["."]
    shown = ["mine", f"{root}/etc:", "one", f"{root}/task/job:", "file"]
    assert result.stdout.decode().split() == shown
    assert result.stderr.count(b"warning: ") == 5 and (root / "usr/x").read_text() == "1"


def test_a_new_base_has_an_id_of_its_own_and_the_first_keeps_that_of_the_image(place):
    root = appliance(place)
    identity = root / "var/lib/apppot/base-id"
    before = identity.read_text()
    assert snap("base", "--root", root).returncode == 0 and identity.read_text() == before
    assert snap("base", "--root", root).returncode == 0 and identity.read_text() == before
    (root / "etc/one").write_text("changed")
    assert snap("base", "--root", root).returncode == 0 and identity.read_text() != before


# --- The format -----------------------------------------------------------------------------------


def make_layer(path, members, **options):
    """By Python's tarfile: (name, content), or (name, dict of TarInfo's fields)."""
    mode = options.pop("mode", "w:gz")
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT, **options) as tar:
        for name, what in members:
            info = tarfile.TarInfo(name)
            content = what if isinstance(what, bytes) else b""
            info.size = len(content)
            for key, value in what.items() if isinstance(what, dict) else ():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_the_label_says_what_it_is(place):
    root = appliance(place)
    snap("base", "--root", root)
    (root / "etc/one").write_text("new")
    saved(root, place)
    with tarfile.open(place / "c.tar.gz") as tar:
        label = json.load(tar.extractfile("var/lib/apppot/changes.json"))
        info = tar.getmember("etc/one")
    assert label["format"] == 1 and label["base"] == "11111111-2222-3333-4444-555555555555"
    assert label["tool"].startswith("AppPot ") and label["created"].endswith("Z")
    assert (info.uname, info.gname) == ("", "")
    assert info.mtime == pytest.approx((root / "etc/one").stat().st_mtime, abs=1e-6)


def test_a_tree_with_times_in_the_future_gives_the_same_bytes_at_any_moment(place, monkeypatch):
    (place / "old").mkdir(), (place / "new").mkdir()
    (place / "new/file").touch()
    os.utime(place / "new/file", ns=(0, 2**33 * 10**9))
    first = diff(place / "old", place / "new", place / "first.tar.gz").read_bytes()
    monkeypatch.setattr(changes.time, "time", lambda: 10**9)
    assert diff(place / "old", place / "new", place / "second.tar.gz").read_bytes() == first


@pytest.mark.parametrize("text", [b"\x1b[2J", b"\xc2\x9b2J", b"9" * 5000, b'"'])
def test_a_label_writes_nothing_to_a_terminal_but_text(place, text):
    fields = b"".join(b'"%b": "%b",\n' % (key, text) for key in (b"base", b"created", b"tool"))
    label = b'{\n"format": 1,\n%b"crc32": ""\n}\n' % fields
    name = "var/lib/apppot/changes.json"
    make_layer(place / "fields", [(name, label)])
    make_layer(place / "format", [(name, label.replace(b": 1", b": " + text))])
    for name in ("fields", "format"):
        result = snap("show", place / name)
        assert result.returncode == 0 and result.stderr == b""
        assert text not in result.stdout and result.stdout.startswith(b"0 added, ")


def test_show_lists_what_was_added_modified_and_deleted(place):
    root = appliance(place)
    snap("base", "--root", root)
    (root / "etc/one").write_text("new"), (root / "etc/new\n").write_text("12345")
    (root / "etc/two").unlink()
    saved(root, place)
    lines = snap("show", place / "c.tar.gz").stdout.decode().splitlines()
    assert [line.split() for line in lines[:-2]] == [
        ["M", "directory", "/etc"], ["D", "/etc/two"],
        ["A", "5", "/etc/new\\n"], ["M", "3", "/etc/one"]]  # fmt: skip
    assert lines[-2] == "1 added, 2 modified, 1 deleted, 8 B" and "base 11111111-" in lines[-1]
    printed = snap("changes", "--root", root, "-n").stdout.decode().splitlines()
    assert printed == lines[:-1]


@pytest.mark.parametrize("name", ["l.tar.gz", "l.tar"])
def test_a_damaged_layer_is_refused_or_makes_the_right_tree(place, name):
    root, other = appliance(place), appliance(place, "other")
    snap("base", "--root", root)
    (root / "etc/one").write_text("new"), (root / "etc/two").unlink()
    os.truncate(root / "usr/bin/tool", 5000)
    snap("changes", "--root", root, place / name)

    whole = (place / name).read_bytes()
    before = dump(other)
    merge(other, place / name)
    right = dump(other)
    assert right != before
    shutil.rmtree(other), make_appliance_again(other, place)

    damaged = place / ("damaged-" + name)
    accepted = []
    variants = [whole + b"\0", whole + b"x", whole + whole]
    variants += [whole[:length] for length in range(len(whole))]

    step = 1 if name.endswith("gz") else 7
    for position in range(0, len(whole), step):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        variants.append(bytes(changed))

    for variant in variants:
        damaged.write_bytes(variant)
        try:
            changes.check_layer(os.fsencode(damaged), QUIET).__exit__()
            accepted.append(variant)
        except changes.Fatal as fatal:
            assert re.search("damaged|format|is empty|a text file", fatal.message)

    for number, variant in enumerate(accepted):
        damaged.write_bytes(variant)
        root = appliance(place, f"again{number}")
        merge(root, damaged, force=True)
        assert strip_times(dump(root)) == strip_times(right)

    assert len(accepted) < len(whole) // 5


def make_appliance_again(root, place):
    assert appliance(place, root.name) == root


def strip_times(tree):
    """Without the times of what each copy of the appliance made itself."""
    return {path: fields[:3] + fields[4:] for path, fields in tree.items()}


@pytest.mark.parametrize(
    "content", [b"\0x", b"no\0tar" * 1000, b"\x1f\x8b", zlib.compress(b"x" * 512), bytes(512)]
)
def test_what_is_no_layer_is_refused(place, content):
    (place / "l").write_bytes(content), (place / "root").mkdir()
    result = snap("apply", place / "l", place / "root")
    assert result.returncode == 125 and result.stdout == b""
    assert_error(result, "damaged", place / "l")


def test_a_pipe_a_directory_and_a_missing_file_are_refused(place):
    os.mkfifo(place / "pipe")
    for name in ("pipe", "no-such", "."):
        result = snap("show", place / name)
        assert result.returncode == 125
        assert_error(result, place / name)


def test_a_layer_for_another_base_is_refused_with_both_ids_unless_forced(place):
    root, other = appliance(place), appliance(place, "other")
    (other / "var/lib/apppot/base-id").write_text("66666666\n")
    snap("base", "--root", root)
    (root / "etc/one").write_text("new")
    saved(root, place)
    result = snap("merge", "--root", other, place / "c.tar.gz")
    assert result.returncode == 125
    assert_error(result, "66666666", "11111111-2222-3333-4444-555555555555", place / "c.tar.gz")
    assert (other / "etc/one").read_text() == "etc/one"
    assert snap("merge", "--force-changes", "--root", other, place / "c.tar.gz").returncode == 0
    assert (other / "etc/one").read_text() == "new"


def test_of_several_layers_none_is_applied_if_one_is_damaged(place):
    (place / "root").mkdir()
    make_layer(place / "good", [("file", b"1")])
    (place / "bad").write_bytes((place / "good").read_bytes()[:-1])
    result = snap("merge", "--root", place / "root", place / "good", place / "bad")
    assert result.returncode == 125 and os.listdir(place / "root") == []


SYMLINK, LINK = {"type": tarfile.SYMTYPE, "linkname": "etc"}, tarfile.LNKTYPE
UNFIT = {
    "below a symlink of the tree": [[("first", b"1"), ("link/x", b"evil")]],
    "below a file of the tree": [[("first", b"1"), ("etc/one/deep/x", b"evil")]],
    "a directory's whiteout below a symlink": [[("first", b"1"), ("link/.wh.two", b"")]],
    "below a symlink of the layer before": [[("first", b"1"), ("new", SYMLINK)], [("new/x", b"evil")]],
    "below what the layer made a file": [[("first", b"1"), (".wh.etc", b""), ("etc", b"file"), ("etc/x", b"")]],
    "a hard link to nothing": [[("first", b"1"), ("h", {"type": LINK, "linkname": "etc/no-such"})]],
    "a hard link to what comes later": [[("first", b"1"), ("h", {"type": LINK, "linkname": "z"}), ("z", b"1")]],
    "a hard link to what was deleted": [[("first", b"1"), ("etc/.wh.one", b""),
                                         ("h", {"type": LINK, "linkname": "etc/one"})]],
    "a hard link to a directory": [[("first", b"1"), ("h", {"type": LINK, "linkname": "etc"})]],
    "a hard link to a directory of the layer": [[("d", {"type": tarfile.DIRTYPE}),
                                                 ("h", {"type": LINK, "linkname": "d"})]],
    "a hard link through a symlink": [[("first", b"1"), ("h", {"type": LINK, "linkname": "link/one"})]],
    "a file larger than any": [[("first", b"1"), ("s", {"pax_headers": {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s", "GNU.sparse.realsize": "9" * 20}})]],
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(UNFIT))
def test_what_the_tree_cannot_take_is_refused_before_anything_of_it_is_applied(place, case):
    root = appliance(place)
    (root / "link").symlink_to("etc")
    layers = []
    for number, members in enumerate(UNFIT[case]):
        layers.append(make_layer(place / str(number), members))
    before = dump(root)
    result = snap("merge", "--root", root, *layers)
    assert result.returncode == 125 and dump(root) == before
    assert_error(result, place)


def test_what_a_layer_clears_out_of_its_way_is_not_in_its_way(place):
    root = appliance(place)
    for name in ("one", "two", "three"):
        (root / name).symlink_to("etc")

    layers = [
        make_layer(place / "1", [(".wh.one", b""), ("one/x", b"1"),
                                 ("two", {"type": tarfile.DIRTYPE, "mode": 0o755}),
                                 ("two/deep/x", b"2"), ("etc", SYMLINK)]),
        make_layer(place / "2", [("one/y", b"1"), ("two/y", b"2"), ("three", b"now a file"),
                                 ("hard", {"type": LINK, "linkname": "usr/bin/tool"})]),
        make_layer(place / "3", [(".wh.three", b""), ("three/x", b"3"), (".wh.etc", b""),
                                 ("etc/one", b"4"), ("h", {"type": LINK, "linkname": "hard"})]),
    ]  # fmt: skip

    merge(root, *layers)
    texts = ["one/x", "one/y", "two/deep/x", "two/y", "three/x", "etc/one"]
    assert [(root / name).read_text() for name in texts] == ["1", "1", "2", "2", "3", "4"]
    assert os.listdir(root / "etc") == ["one"] and (root / "h").stat().st_nlink == 3


@needs_root
def test_a_tree_without_permission_or_room_is_left_as_it_is(place):
    root = appliance(place)
    (root / "usr/bin").chmod(0o555), (root / "etc/device").write_text("mine")
    run_tool("chown", "-R", "65534:65534", root), place.chmod(0o755)
    before = dump(root)

    script = shutil.copy(TOP / "changes.py", place)
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    unprivileged = [*become, sys.executable, script]

    layer = make_layer(place / "l", [("etc/one", b"new"), ("usr/bin/new", b"new")])
    result = subprocess.run([*unprivileged, "apply", layer, root], capture_output=True)
    assert result.returncode == 125 and dump(root) == before
    assert_error(result, "/usr/bin")

    device = {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}
    link = {"type": LINK, "linkname": "etc/device"}
    layer = make_layer(place / "l", [("etc/device", device), ("h", link)])
    result = subprocess.run([*unprivileged, "apply", layer, root], capture_output=True)
    assert result.returncode == 0 and result.stderr.count(b"warning: left out") == 1
    assert (root / "etc/device").read_text() == (root / "h").read_text() == "mine"


@needs_root
def test_room_that_comes_free_counts_and_what_never_fits_is_refused(place):
    """1 MiB is free, and each of the three files has 3 MiB."""
    large = os.urandom(3 << 20)
    make_layer(place / "more", [("old", b"small"), ("new", large), ("more", large)])
    make_layer(place / "late", [("old", b"small"), ("new", large)])
    make_layer(place / "whiteout", [(".wh.d", b""), ("more", large)])
    make_layer(place / "early", [("newer", large), ("new", b"small")])
    (place / "root").mkdir()
    script = f"""
        mount -t tmpfs -o size=8m none {place}/root; cd {place}/root
        mkdir d; truncate -s 1M d/rest; head -c 3M /dev/zero > d/file
        cp d/file old; head -c 1M /dev/zero > rest
        merge() {{ {sys.executable} {TOP}/changes.py apply {place}/$1 .; }}
        merge more || echo $?; stat -c %s old
        merge late; ls; merge whiteout; ls; merge early || echo $?"""
    result = subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, check=True)

    whole, late, whiteout, early = b"125 3145728", b"d new old rest", b"more new old rest", b"125"
    assert result.stdout.split() == b" ".join([whole, late, whiteout, early]).split()
    hints = [line for line in result.stderr.decode().splitlines() if "hint:" in line]
    assert len(hints) == 2 and "nothing was applied" in hints[0] and "is incomplete" in hints[1]
    assert result.stderr.count(b"no space left") == 2 and b"6.0 MiB" in result.stderr


@needs_root
@pytest.mark.parametrize("what", ["directory", "file"])
def test_bind_mounts_of_the_same_file_system_are_neither_saved_nor_changed(place, what):
    """stat() tells nothing of them."""
    root, outside = appliance(place), place / "out side"
    outside.mkdir(), (outside / "kept").write_text("kept")
    assert snap("base", "--root", root).returncode == 0

    point = root / "etc/mount \n point"
    point.mkdir() if what == "directory" else point.write_text("")
    if what == "file":
        link = {"type": LINK, "linkname": "etc/mount \n point"}

        members = [("etc/mount \n point", b"evil"), ("h", link), (".wh.etc", b"")]
    else:
        members = [("etc/.wh.mount \n point", b""), ("etc/mount \n point/kept", b"evil"),
                   ("etc/.wh..wh..opq", b"")]  # fmt: skip
    make_layer(place / "l", [*members, ("first", b"1")])

    source = outside if what == "directory" else outside / "kept"
    script = """
        mount --bind "$1" "$2"; shift 2
        "$1" "$2" changes --root "$3" "$4"; "$1" "$2" merge --root "$3" "$5\""""
    words = [source, point, sys.executable, TOP / "changes.py", root, place / "c.tar.gz", place / "l"]
    command = ["unshare", "-m", "sh", "-ec", script, "sh", *words]

    result = subprocess.run(command, capture_output=True)

    assert result.returncode == 0, result.stderr
    assert [name for name in names_in(place / "c.tar.gz") if "apppot" not in name] == ["etc"]
    assert os.listdir(outside) == ["kept"] and (outside / "kept").read_text() == "kept"
    assert (root / "first").exists() and (root / "etc/one").exists() and not (root / "h").exists()
    assert result.stderr.count(b"as something is mounted on /etc/mount") == 3


# --- Layers of others -----------------------------------------------------------------------------


def test_layers_of_gnu_tar_and_of_tarfile_are_understood(place):
    tree = place / "tree"
    (tree / ("d" * 200) / ("e" * 100)).mkdir(parents=True)
    (tree / ("d" * 200) / ("e" * 100) / "file").write_text("x" * 3000)
    (tree / "link").symlink_to("t" * 150)
    os.link(tree / ("d" * 200) / ("e" * 100) / "file", tree / "hard")

    with open(tree / "sparse", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")

    if IS_ROOT:
        os.chown(tree / "hard", 3000000, 5000000)

    for options in (["--format=gnu"], ["--format=pax", "--sparse"], ["--format=pax", "--xattrs"]):
        root = place / "-".join(options)
        root.mkdir()
        run_tool("tar", "czf", place / "l", "--numeric-owner", *options, "-C", tree, ".")
        merge(root, place / "l")
        plain = [{path: (fields[0:3], fields[3] // 10**9 if "gnu" in options[0] else fields[3])
                  for path, fields in dump(one).items()} for one in (root, tree)]  # fmt: skip
        assert plain[0] == plain[1]
        assert (root / "hard").read_text() == "x" * 3000 and (root / "hard").stat().st_nlink == 2


def test_opaque_directories_lose_what_lower_layers_put_there(place):
    root = place / "root"
    (root / "d/old").mkdir(parents=True), (root / "d/file").write_text("x"), (root / "e").mkdir()
    make_layer(place / "l", [("d/new", b"1"), ("d/.wh..wh..opq", b""), ("d/.wh..wh.plnk", b""),
                             (".wh.e", b""), ("e/again", b"2"), ("no/.wh.such", b"")])  # fmt: skip
    merge(root, place / "l")
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    assert left == ["d", "d/new", "e", "e/again"]


HOSTILE = {
    "a parent": [("../outside/x", b"evil")],
    "a parent inside": [("d/../../outside/x", b"evil")],
    "an absolute name": [("{outside}/x", b"evil")],
    "below a symlink": [("s", {"type": tarfile.SYMTYPE, "linkname": "{outside}"}), ("s/x", b"evil")],
    "below a symlink made again": [("d/", {"type": tarfile.DIRTYPE}), ("d/y", b"1"),
                                   ("d", {"type": tarfile.SYMTYPE, "linkname": "{outside}"}), ("d/x", b"evil")],
    "below a symlink of the tree": [("out/x", b"evil")],
    "below a symlink of the tree, deeper": [("out/dir/x", b"evil")],
    "a directory in place of a symlink": [("out", {"type": tarfile.DIRTYPE, "mode": 0o777}), ("out/x", b"fine")],
    "hard link to outside": [("h", {"type": tarfile.LNKTYPE, "linkname": "../outside/kept"}), ("h", b"evil")],
    "hard link to outside, absolute": [("h", {"type": tarfile.LNKTYPE, "linkname": "{outside}/kept"})],
    "hard link through a symlink": [("h", {"type": tarfile.LNKTYPE, "linkname": "out/kept"})],
    "hard link to a symlink, written": [("h", {"type": tarfile.LNKTYPE, "linkname": "out"}), ("h/x", b"evil")],
    "hard link to itself": [("h", {"type": tarfile.LNKTYPE, "linkname": "h"})],
    "write through a file symlink": [("outfile", b"evil")],
    "mode through a symlink": [("outfile", {"type": tarfile.FIFOTYPE, "mode": 0o7777})],
    "whiteout of the parent": [(".wh...", b"")],
    "whiteout of itself": [(".wh..", b"")],
    "whiteout of nothing": [("d/.wh.", b"")],
    "whiteout through a symlink": [("out/.wh.kept", b"")],
    "opaque through a symlink": [("out/.wh..wh..opq", b"")],
    "opaque through a symlink of its own": [("s", {"type": tarfile.SYMTYPE, "linkname": "{outside}"}),
                                            ("s/.wh..wh..opq", b"")],
    "a name with NUL": [("a", {"pax_headers": {"path": "a\0/../../outside/x"}})],
    "a long name": [("n" * 300, b"")],
    "an impossible owner": [("a", {"pax_headers": {"uid": "4294967295"}})],
    "a negative owner": [("a", {"pax_headers": {"uid": "-1"}})],
    "a huge size": [("a", {"pax_headers": {"size": str(1 << 62)}})],
    "a huge time": [("a", {"pax_headers": {"mtime": "9" * 20}})],
    "a huge sparse file": [("a", {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                                  "GNU.sparse.name": "../x", "GNU.sparse.realsize": str(1 << 62)}})],
    "a root that is a symlink": [("./", {"type": tarfile.SYMTYPE, "linkname": "{outside}"})],
    "an empty symlink": [("a", {"type": tarfile.SYMTYPE, "linkname": ""})],
    "an unknown type": [("a", {"type": b"Z"})],
    "many of one name": [("d", b"1"), ("d", {"type": tarfile.DIRTYPE}), ("d/x", b"2"), ("d", b"3")],
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_hostile_layer_reaches_nothing_outside(place, case):
    outside, root = place / "outside", place / "root"
    (outside / "dir").mkdir(parents=True), root.mkdir()
    (outside / "kept").write_text("kept"), (root / "out").symlink_to(outside)
    (root / "outfile").symlink_to(outside / "kept")

    def fill(what):
        if isinstance(what, dict):
            return {key: fill(value) for key, value in what.items()}
        return what.format(outside=outside) if isinstance(what, str) else what

    before = dump(outside)
    make_layer(place / "l", [(fill(name), fill(what)) for name, what in HOSTILE[case]])

    result = snap("apply", place / "l", root)
    assert b"Traceback" not in result.stderr and result.returncode in (0, 125)
    assert dump(outside) == before
    if result.returncode:
        assert_error(result)


parts = st.sampled_from(
    ["a", "b", "out", "..", ".", "", ".wh.a", ".wh.out", ".wh..", ".wh..wh..opq", "c\n"]
)
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
hostile_members = st.lists(st.one_of(
    st.tuples(paths, st.binary(max_size=9)),
    st.tuples(paths, st.fixed_dictionaries({
        "type": st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE,
                                 tarfile.FIFOTYPE, tarfile.CHRTYPE]),
        "linkname": st.one_of(paths, st.just("../outside"), st.just("../outside/kept")),
        "mode": st.integers(0, 0o7777)})),
), min_size=1, max_size=8)  # fmt: skip


@many
@given(hostile_members)
def test_no_layer_reaches_anything_outside(members):
    with fresh_place() as place:
        outside, root = place / "outside", place / "root"
        outside.mkdir(), (root / "a").mkdir(parents=True)
        (outside / "kept").write_text("kept"), (root / "out").symlink_to(outside)
        (root / "a/b").write_text("b")
        (root / "b").symlink_to("../outside/kept")
        before = dump(outside)
        with contextlib.suppress(changes.Fatal):
            merge(root, make_layer(place / "l", members))
        assert dump(outside) == before
        assert sorted(os.listdir(place)) == ["l", "outside", "root"]


@many
@given(st.binary(max_size=2000), st.integers(0, 3))
def test_any_bytes_are_refused_without_a_traceback(noise, how):
    with fresh_place() as place:
        header = changes.encode_header(changes.Member(b"a", b"x", 0o644, 0, 0, len(noise), 0))
        member = header + noise + bytes(-len(noise) % 512)
        (place / "l").write_bytes([noise, member, zlib.compress(noise), bytes(1 << 20)][how])
        with pytest.raises(changes.Fatal):
            changes.check_layer(os.fsencode(place / "l"), QUIET)


@needs_root
def test_devices_are_made_by_root_alone(place):
    device = {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}
    make_layer(place / "l", [("null", device), ("file", b"1")])
    (place / "mine").mkdir(), (place / "theirs").mkdir()
    os.chown(place / "theirs", 65534, 65534), place.chmod(0o755)
    assert snap("apply", place / "l", place / "mine").returncode == 0
    assert stat.S_ISCHR((place / "mine/null").stat().st_mode)
    script = shutil.copy(TOP / "changes.py", place)
    become = ["setpriv", "--reuid=65534", "--clear-groups"]
    command = [*become, sys.executable, script, "apply", place / "l", place / "theirs"]
    result = subprocess.run(command, capture_output=True)
    assert result.returncode == 0
    assert b"warning: left out, only root makes devices: /null" in result.stderr
    assert os.listdir(place / "theirs") == ["file"]


# --- Full disks, files that change, many files ----------------------------------------------------


@needs_root
def test_a_file_system_with_too_few_inodes_is_left_as_it_is_but_those_that_come_free_count(place):
    (place / "small").mkdir()
    members = [("new/%d" % number, b"") for number in range(40)]
    make_layer(place / "many", members)
    make_layer(place / "other", [("old/.wh..wh..opq", b""), *members])
    script = f"""
        mount -t tmpfs -o size=1m,nr_inodes=60 none {place}/small; cd {place}/small
        mkdir old; touch old/$(seq -s ' old/' 30)
        {sys.executable} {TOP}/changes.py apply {place}/many . || echo $?
        ls -A | xargs
        {sys.executable} {TOP}/changes.py apply {place}/other .
        ls -A old; ls new | wc -l; {sys.executable} {TOP}/changes.py apply {place}/many ."""
    result = subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, check=True)
    assert result.stdout.decode().split() == ["125", "old", "40"]
    assert_error(result, "no space left", "40 files needed", place / "many")


@needs_root
def test_a_full_disk_is_an_error_with_the_size_and_leaves_no_part(place):
    (place / "a").mkdir(), (place / "b").mkdir(), (place / "small").mkdir()
    (place / "b/file").write_bytes(os.urandom(4 << 20))
    make_layer(place / "l", [("file", bytes(os.urandom(4 << 20)))])
    script = f"""
        mount -t tmpfs -o size=1m none {place}/small
        {sys.executable} {TOP}/changes.py diff {place}/a {place}/b -o {place}/small/l.tar.gz || echo $?
        ls -A {place}/small
        {sys.executable} {TOP}/changes.py apply {place}/l {place}/small || echo $?
        ls -A {place}/small"""
    result = subprocess.run(["unshare", "-m", "sh", "-ec", script], capture_output=True, check=True)
    assert result.stdout.split() == [b"125", b"125"]
    errors = [line for line in result.stderr.decode().splitlines() if "error" in line]
    assert len(errors) == 2 and all("o space left" in line and "4.0 MiB" in line for line in errors)


def test_a_file_that_changes_while_it_is_saved_is_told_and_the_layer_is_valid(place):
    """Between the look at the tree and the reading of its files there is time for all of it."""
    (place / "a").mkdir()
    root = place / "b"
    root.mkdir()
    for name in ("grows", "shrinks", "goes", "turns"):
        (root / name).write_bytes(b"x" * 100000)
    os.link(root / "goes", root / "goes too")

    plan = changes.compare_trees(os.fsencode(place / "a"), os.fsencode(root), NOTHING, QUIET)

    with open(root / "grows", "ab") as file:
        file.write(b"more")
    os.truncate(root / "shrinks", 10)
    (root / "goes").unlink(), (root / "turns").unlink()
    (root / "turns").symlink_to("grows")

    told = []
    report = changes.Report()
    report.warn = told.append
    changes.write_layer(os.fsencode(root), plan, os.fsencode(place / "l.tar.gz"), report)

    assert len(told) == 4 and "changed while it was saved: /grows" in told
    merge(place / "a", place / "l.tar.gz")
    assert (place / "a/grows").read_bytes() == b"x" * 100000
    assert (place / "a/shrinks").read_bytes() == b"x" * 10 + bytes(99990)
    assert sorted(os.listdir(place / "a")) == ["goes too", "grows", "shrinks"]


def write_many(layer, name, count):
    """A layer of empty files, 500 in each directory, as `name` makes their paths of two numbers."""
    with open(layer, "wb") as file:
        sink = changes.Deflater(file.fileno())
        writer = changes.LayerWriter(sink)
        uid, gid = os.getuid(), os.getgid()
        for number in range(count):
            path = name % (number // 500, number)
            writer.add(changes.Member(path, changes.REGULAR, 0o644, uid, gid, 0, 10**18 + number))
        writer.finish("")
        sink.finish()


# Not ru_maxrss, which begins with what this process has at the fork.
MEASURE_MEMORY = r"""
import re, sys
sys.path.insert(0, sys.argv[1])
import changes

def read_peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) >> 10

available = int(sys.argv[2]) << 20
if available:
    changes.available_memory = lambda: available
before = read_peak() if available else 0
status = changes.main(sys.argv[3:])
print(read_peak() - before)
sys.exit(status)
"""


def measure_memory(available_mib, *words):
    """The peak in MiB; if the available memory is given, of the work alone."""
    command = [sys.executable, "-c", MEASURE_MEMORY, TOP, str(available_mib), *words]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def test_200000_files_need_less_than_300_mib(place):
    write_many(place / "l.tar.gz", b"some/directory/of/many/%d/file%d", 200000)
    (place / "root").mkdir()
    for words in (["apply", place / "l.tar.gz", place / "root"],
                  ["base", "--root", place / "root"],
                  ["squash", place / "l.tar.gz", "-o", place / "s.tar.gz"]):  # fmt: skip
        assert measure_memory(0, *words) < 300, words
    assert len(os.listdir(place / "root/some/directory/of/many/399")) == 500


def test_only_a_file_is_replaced_by_a_layer(place):
    """A user who is root writes to /dev/null as to any name."""
    (place / "a").mkdir(), os.mkfifo(place / "fifo"), (place / "link").symlink_to("fifo")
    for name in ("fifo", "link", "a"):
        result = snap("diff", place / "a", place / "a", "-o", place / name)
        assert result.returncode == 125
        assert_error(result, "not a regular file", place / name)
    assert sorted(os.listdir(place)) == ["a", "fifo", "link"]
    assert stat.S_ISFIFO(os.lstat(place / "fifo").st_mode)


def test_interrupted_saving_leaves_no_temporary_file(place):
    (place / "a").mkdir(), (place / "b").mkdir(), (place / "out").mkdir()
    (place / "b/file").write_bytes(os.urandom(64 << 20))
    words = ["diff", place / "a", place / "b", "-o", place / "out/l.tar.gz"]
    command = [sys.executable, TOP / "changes.py", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not os.listdir(place / "out"):
        assert process.poll() is None
    process.terminate()
    assert process.communicate()[1] == b"" and process.returncode == 143
    assert os.listdir(place / "out") == []


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["no-such"],
        ["diff", "a"],
        ["diff", "/", "/", "-o", ""],
        ["changes", "--no-such"],
        ["changes", ""],
        ["squash", "x"],
        ["base", "--root", "/no/such"],
    ],
)
def test_wrong_usage_is_an_error_and_a_hint(words):
    result = snap(*words)
    assert result.returncode == 125 and result.stdout == b""
    assert_error(result)


@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams_are_no_traceback(place, closed):
    make_layer(place / "l", [("file", b"1")])
    for name, code in (("l", 0), ("none", 125)):
        command = [sys.executable, TOP / "changes.py", "show", place / name]
        close = ["sh", "-c", f'exec "$@" {closed}>&-', "-"]
        result = subprocess.run([*close, *command], capture_output=True)
        assert result.returncode == code and b"Traceback" not in result.stdout + result.stderr


def test_what_may_not_be_read_is_named_with_its_whole_path(place):
    (place / "a").mkdir(), (place / "b/sub").mkdir(parents=True)
    (place / "b/sub/file").write_text("secret")
    for path in (place, place / "a", place / "b"):
        path.chmod(0o777)
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if IS_ROOT else []
    for path, name in ((place / "b/sub/file", "/sub/file"), (place / "b/sub", "/sub")):
        path.chmod(0)
        words = [*become, sys.executable, TOP / "changes.py", "diff", "a", "b", "-o", "l.tar.gz"]
        result = subprocess.run(words, cwd=place, capture_output=True)
        assert result.returncode == 125
        assert_error(result, "cannot be read, Permission denied: " + name)


def test_changes_without_a_base_say_so(place):
    result = snap("changes", "--root", place, place / "l.tar.gz")
    assert result.returncode == 125
    assert_error(result, "no base is recorded", place)


# --- Programs that no one here wrote --------------------------------------------------------------


def make_oci_image(layout, layers):
    """An OCI image of these layers, in a directory (image-layout.md of the specification)."""
    def put(content):
        digest = hashlib.sha256(content).hexdigest()
        (layout / "blobs/sha256" / digest).write_bytes(content)
        return {"digest": "sha256:" + digest, "size": len(content)}

    (layout / "blobs/sha256").mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    kind = "application/vnd.oci.image."

    descriptors, plain = [], []
    for layer in layers:
        content = layer.read_bytes()
        descriptors.append({"mediaType": kind + "layer.v1.tar+gzip", **put(content)})
        plain.append("sha256:" + hashlib.sha256(gzip.decompress(content)).hexdigest())

    config = {"architecture": "amd64", "os": "linux", "config": {},
              "rootfs": {"type": "layers", "diff_ids": plain},
              "history": [{"created_by": "test"}] * len(plain)}  # fmt: skip
    manifest = {"schemaVersion": 2, "mediaType": kind + "manifest.v1+json",
                "config": {"mediaType": kind + "config.v1+json", **put(json.dumps(config).encode())},
                "layers": descriptors}  # fmt: skip

    index = {"schemaVersion": 2, "manifests": [
        {"mediaType": kind + "manifest.v1+json", **put(json.dumps(manifest).encode()),
         "annotations": {"org.opencontainers.image.ref.name": "tag"}}]}  # fmt: skip
    (layout / "index.json").write_text(json.dumps(index))


def run_tool(*words, **options):
    command = [str(word) for word in words]
    result = subprocess.run(command, capture_output=True, timeout=120, **options)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


def unpack_with_umoci(place, layout):
    run_tool("umoci", "unpack", "--image", f"{layout}:tag", place / "bundle")
    return place / "bundle/rootfs"


def unpack_with_buildah(place, layout):
    """Copy buildah's rootfs out of its store, so that its mounts there are gone at the end."""
    buildah = ["buildah", "--storage-driver", "vfs"]
    buildah += ["--root", place / "store", "--runroot", place / "run"]

    # The name is relative, as buildah makes a reference of it, which cannot have every character.
    name = run_tool(*buildah, "from", f"oci:{layout.name}:tag", cwd=layout.parent).decode().strip()
    try:
        tree = run_tool(*buildah, "mount", name).decode().strip()
        run_tool("cp", "-a", tree, place / "buildah-rootfs")
        run_tool(*buildah, "umount", name)
    finally:
        run_tool(*buildah, "rm", "--all")
    return place / "buildah-rootfs"


def without_holes(tree):
    """The files with their content in one piece: those tools write zeros in the place of holes."""
    flat = {}
    for path, fields in tree.items():
        flat[path] = fields
        if fields[0] == stat.S_IFREG:
            *same, pieces, parts = fields
            content = bytearray(same[-1])
            for (start, end), part in zip(pieces, parts):
                content[start:end] = part
            flat[path] = [*same, bytes(content)]
    return flat


def make_two_trees(place):
    """A base and what became of it, with every kind of file and of change."""
    a = appliance(place, "a")
    for name in ("to-file", "to-link", "stays", "gone", "again"):
        (a / "dir" / name / "sub").mkdir(parents=True)
        (a / "dir" / name / "sub" / "file").write_text(name)

    (a / "link").symlink_to("dir"), os.mkfifo(a / "fifo")
    (a / "file-to-dir").write_text("1"), (a / "odd \udcff\n").write_text("2")

    for path in sorted(a.rglob("*"), reverse=True):
        os.utime(path, ns=(0, 1234567890 * 10**9 + 123456789), follow_symlinks=False)

    b = place / "b"
    run_tool("cp", "-a", a, b)
    for name in ("to-file", "to-link", "gone", "again"):
        shutil.rmtree(b / "dir" / name)

    (b / "dir/to-file").write_text("now a file"), (b / "dir/to-link").symlink_to("no such")
    (b / "dir/again").mkdir(), (b / "dir/again/new").write_text("x")
    (b / "file-to-dir").unlink(), (b / "file-to-dir").mkdir(0o2775)
    (b / "file-to-dir/x").write_text("x")

    (b / "link").unlink(), (b / "link").mkdir()
    (b / "etc/one").unlink(), (b / "odd \udcff\n").unlink()
    (b / ("n" * 255)).write_text("long"), (b / "\udcfe\n").write_text("odd")

    os.link(b / "etc/two", b / "two"), (b / "setuid").write_text("s"), (b / "caps").write_text("c")
    os.chown(b / "setuid", 3000000, 4000000), (b / "setuid").chmod(0o6755)
    os.chmod(b / "etc/three", 0o600)
    os.setxattr(b / "caps", "security.capability", CAPABILITY)
    os.setxattr(b / "caps", "user.a", b"1\0\n=")
    os.setxattr(b / "dir/stays", "system.posix_acl_default", ACL)
    os.mknod(b / "device", stat.S_IFCHR | 0o620, os.makedev(1, 3))

    with open(b / "sparse", "wb") as file:
        file.truncate(1 << 20), file.seek(1 << 19), file.write(b"x")
    return a, b


@needs_root
@pytest.mark.parametrize("unpack", [unpack_with_umoci, unpack_with_buildah])
def test_other_tools_unpack_base_and_layer_to_the_same_tree(place, unpack):
    a, b = make_two_trees(place)
    (place / "empty").mkdir()
    layers = [diff(place / "empty", a, place / "base.tar.gz"), diff(a, b, place / "layer.tar.gz")]
    make_oci_image(place / "oci", layers)
    theirs = unpack(place, place / "oci")
    (place / "ours").mkdir()
    merge(place / "ours", *layers)
    theirs, ours = without_holes(dump(theirs)), without_holes(dump(place / "ours"))
    if unpack == unpack_with_buildah:
        # Its vfs store copies trees without default ACLs and without the time of their root.
        for tree in (theirs, ours):
            tree[b"."][3], tree[b"dir/stays"][4] = None, None
    assert theirs == ours


@needs_root
def test_a_layer_of_umoci_repack_merges_to_the_same_tree(place):
    a, b = make_two_trees(place)
    (place / "empty").mkdir()
    make_oci_image(place / "oci", [diff(place / "empty", a, place / "base.tar.gz")])

    rootfs = unpack_with_umoci(place, place / "oci")
    merge(rootfs, diff(a, b, place / "layer.tar.gz"))
    run_tool("umoci", "repack", "--image", f"{place}/oci:tag", place / "bundle")

    index = json.loads((place / "oci/index.json").read_text())

    def locate(descriptor):
        return place / "oci/blobs" / descriptor["digest"].replace(":", "/")

    manifest = json.loads(locate(index["manifests"][0]).read_text())
    layers = [locate(layer) for layer in manifest["layers"]]
    assert len(layers) == 2

    (place / "ours").mkdir()
    merge(place / "ours", *layers)
    shutil.rmtree(place / "bundle")
    theirs = unpack_with_umoci(place, place / "oci")
    assert without_holes(dump(place / "ours")) == without_holes(dump(theirs))


# --- In an appliance ------------------------------------------------------------------------------

CHANGE_EVERYTHING = """
set -e
rm /etc/issue; echo new > /etc/motd; chmod 600 /etc/hostname; chown 3000000:4000000 /etc/issue.net
mkdir -p /opt/new/deep; echo x > /opt/new/deep/file; ln /opt/new/deep/file /opt/hard; ln -s nowhere /opt/link
mkfifo /opt/fifo; mknod /opt/null c 1 3; truncate -s 9G /opt/sparse; echo end >> /opt/sparse
rm -r /usr/share/doc/bash; ln -s /etc /usr/share/doc/bash
rm /usr/bin/clear; mkdir /usr/bin/clear; mv /usr/share/common-licenses /usr/share/licenses
ln /usr/bin/cat /usr/bin/cat2; cp -p /usr/bin/tac /usr/bin/tac2; mv /usr/bin/tac2 /usr/bin/tac
printf 'X' | dd of=/usr/bin/rev bs=1 seek=100 conv=notrunc status=none; touch -r /usr/bin/cut /usr/bin/rev
python3 -c "
import os, struct
os.setxattr('/opt/hard', 'user.a', b'1')
os.setxattr('/usr/bin/wc', 'security.capability', struct.pack('<5I', 0x02000001, 1024, 0, 0, 0))
os.chmod('/opt/new', 0o6775); open(b'/opt/\\xff\\n' + b'n' * 253, 'w')
os.utime('/opt/link', ns=(0, 1234567890123456789), follow_symlinks=False)"
echo excluded > /var/cache/x; echo excluded > /tmp/x
"""
# Without what is mounted: the files in which the guest says what the node says, too.
DESCRIBE = r"""
cd /; find . -xdev \( -path ./tmp -o -path ./var/tmp -o -path ./var/cache -o -path ./var/lib/apppot -o -path ./run \
    -o -path ./root/job -o -path ./var/lib/apt/lists -o -path ./lost+found -o -path ./root \
    -o -path ./dev -o -path ./proc -o -path ./sys \
    -o -path ./etc/hosts -o -path ./etc/resolv.conf -o -path ./etc/localtime -o -path ./etc/timezone \) -prune \
    -o ! -type d -printf '%P %y %m %U %G %T@ %l %n %s\n' -o -printf '%P %y %m %U %G %T@\n' | LC_ALL=C sort
find . -xdev -type f -size -100M \( -path './opt/*' -o -path './usr/bin/*' -o -path './etc/*' \) \
    ! -path ./etc/hosts ! -path ./etc/resolv.conf ! -path ./etc/localtime ! -path ./etc/timezone -print0 |
    LC_ALL=C sort -z | xargs -0 md5sum
python3 -c "import os; print(os.getxattr('/opt/hard', 'user.a'), os.getxattr('/usr/bin/wc', 'security.capability'))"
du -k opt/sparse
"""


def in_guest(node, script, *options, **more):
    result = node.run("--root", *options, "bash", "-c", script, **more)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


@caller_is_root
def test_changes_of_one_run_merge_into_a_fresh_boot_as_if_the_image_had_been_written(node, image):
    copy = writable_copy(node, image)
    in_guest(node, CHANGE_EVERYTHING + "sync; apppot-snap changes c.tar.gz", "--write", image=copy)
    written = in_guest(node, DESCRIBE, image=copy)

    again = "apppot-snap merge c.tar.gz; apppot-snap changes again.tar.gz\n"
    merged = in_guest(node, "set -e\n" + again + "cmp c.tar.gz again.tar.gz\n" + DESCRIBE)
    assert written.splitlines() == merged.splitlines() and len(merged) > 100000
    assert b"opt/link l 777 0 0 1234567890.1234567890 nowhere 1 7" in merged

    listing = snap("show", node.job / "c.tar.gz").stdout.decode()
    assert "D              /etc/issue\n" in listing and "/usr/bin/rev\n" in listing
    assert not [word for word in ("excluded", "/usr/bin/cut", "/var/cache") if word in listing]


@caller_is_root
def test_nothing_has_changed_in_a_fresh_boot(node):
    script = "apppot-snap changes -n; apppot-snap changes; ls ~/job/"
    listing = in_guest(node, script).decode().splitlines()
    assert listing[-2].startswith("0 added, ") and " 0 deleted, 0 B" in listing[-2]
    assert re.match(r"apppot\.\d{4}-\d\d-\d\d\.changes\.tar\.gz$", listing[-1])


@caller_is_root
def test_a_damaged_or_foreign_layer_leaves_a_live_system_as_it_was(node):
    script = """
        echo new > /etc/motd; apppot-snap changes c.tar.gz
        rm -f /etc/issue; apppot-snap changes d.tar.gz"""
    in_guest(node, script)

    content = (node.job / "d.tar.gz").read_bytes()
    (node.job / "d.tar.gz").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    members = [("etc/motd", b"new"), ("etc/.wh.issue", b""), ("bin/new", b"new")]
    make_layer(node.job / "unfit", members)
    script = """
        apppot-snap merge c.tar.gz d.tar.gz; echo $?; apppot-snap merge unfit; echo $?
        cat /etc/motd; ls /etc/issue; apppot-snap changes -n | tail -1"""

    lines = in_guest(node, script).decode().splitlines()
    assert lines[:2] == ["125", "125"] and "new" not in lines and "/etc/issue" in lines
    assert "0 added, 1 modified" in lines[-1]
