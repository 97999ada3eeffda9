# SPDX-License-Identifier: Apache-2.0
"""Layers that other tools made, files that are no layers, and layers made to do harm."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import resource
import shutil
import stat
import subprocess
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nodes import assert_error
from test_changes import (
    QUIET,
    diff,
    dump,
    fresh_place,
    make_layer,
    make_oci_image,
    measure_memory,
    merge,
    needs_root,
    run_tool,
    snap,
    squash,
    unpack_with_umoci,
    write_many,
)

import changes

END = bytes(2 * changes.BLOCK)
XATTR = b"SCHILY.xattr."


@pytest.fixture
def place():
    with fresh_place() as path:
        (path / "root").mkdir()
        yield path


def header(path, kind=b"0", size=0, link=b""):
    return changes.encode_header(changes.Member(path, kind, 0o644, 0, 0, size, 0, (0, 0), link))


def pax(*records, kind=b"x"):
    text = b"".join(changes.encode_record(key, value) for key, value in records)
    return header(b"x", kind, len(text)) + text + changes.pad(len(text))


def named(path, kind=b"0", link=b""):
    return pax((b"path", path), (b"linkpath", link)) + header(b"x", kind)


def sparse(text, realsize, stored=b""):
    content = text + changes.pad(len(text)) + stored
    return pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"s"),
               (b"GNU.sparse.realsize", b"%d" % realsize)) + header(b"s", b"0", len(content)) + content  # fmt: skip


# --- Sparse files ---------------------------------------------------------------------------------

K = os.urandom(4096)
SPARSE = {
    "hole": (1 << 20, []), "hole-data": (1 << 20, [(1 << 20) - 4096]), "data-hole": (1 << 20, [0]),
    "odd": (1000001, [8192]), "many": (8192 * 2000, range(0, 8192 * 2000, 8192)),
    "tera": ((1 << 40) + 13, [1 << 39]), "n" * 200: (1 << 20, [65536]),
}  # fmt: skip


def make_sparse(directory):
    directory.mkdir()
    for name, (size, offsets) in SPARSE.items():
        with open(directory / name, "wb") as file:
            file.truncate(size)
            for offset in offsets:
                file.seek(offset), file.write(K)
    return directory


def look(directory):
    """Sizes, contents where they are written, and whether the holes are."""
    found = {}
    for name, (_, offsets) in SPARSE.items():
        with open(directory / name, "rb") as file:
            status = os.fstat(file.fileno())
            parts = [os.pread(file.fileno(), 4097, offset)[:4096] == K for offset in offsets]
            found[name] = (status.st_size, all(parts), status.st_blocks <= 8 * len(offsets) + 8)
    return found


@pytest.mark.parametrize("how", ["diff", "squash"])
@pytest.mark.parametrize("tool", ["tar", "bsdtar", "ours"])
def test_every_tar_makes_the_same_sparse_files_of_a_layer(place, how, tool):
    (place / "a").mkdir()
    layer = diff(place / "a", make_sparse(place / "b"), place / "l.tar.gz")
    if how == "squash":
        squash(place / "s.tar", layer, layer)
        layer = place / "s.tar"

    if tool == "ours":
        merge(place / "root", layer)
    elif shutil.which(tool) or tool == "tar":  # bsdtar is not part of every set-up
        run_tool(tool, "-x", "-f", layer, "-C", place / "root")
    else:
        return
    wanted = {name: (SPARSE[name][0], True, True) for name in SPARSE}

    assert look(place / "root") == look(place / "b") == wanted


def test_python_and_go_read_a_hole_at_the_end(place):
    (place / "a").mkdir(), (place / "b").mkdir()
    os.truncate(os.open(place / "b/file", os.O_CREAT | os.O_WRONLY), 300000)
    layer = diff(place / "a", place / "b", place / "l.tar.gz")
    with tarfile.open(layer) as tar:
        assert tar.extractfile("file").read() == bytes(300000)
    if os.getuid() == 0:
        make_oci_image(place / "oci", [layer])
        assert (unpack_with_umoci(place, place / "oci") / "file").read_bytes() == bytes(300000)


@pytest.mark.parametrize("version", ["0.0", "0.1", "old"])
def test_a_sparse_file_in_an_old_format_is_named(place, version):
    (place / "b").mkdir()
    os.truncate(os.open(place / "b/file", os.O_CREAT | os.O_WRONLY), 300000)
    how = (
        ["--format=gnu"] if version == "old" else ["--format=posix", "--sparse-version=" + version]
    )
    run_tool("tar", "-c", "-S", *how, "-f", place / "l", "-C", place / "b", ".")
    result = snap("apply", place / "l", place / "root")
    assert result.returncode == 125 and os.listdir(place / "root") == []
    assert_error(result, "old format", "/file")

    as_the_hint_says = ["tar", "-c", "-S", "--format=posix"]
    run_tool(*as_the_hint_says, "-f", place / "l", "-C", place / "b", ".")
    merge(place / "root", place / "l")
    assert (place / "root/file").read_bytes() == bytes(300000)


# --- What is no layer -----------------------------------------------------------------------------


def pack(module, name, content):
    with io.BytesIO() as file:
        with module(file, "w") as archive:
            archive.writestr(name, content)
        return file.getvalue()


NO_LAYERS = {
    "is empty": b"",
    "a zip archive": pack(zipfile.ZipFile, "x", b"x"),
    "a qcow2 image": b"QFI\xfb\0\0\0\3" + bytes(1000),
    "a squashfs image": b"hsqs" + os.urandom(92) + bytes(4000),
    "an ext4 image": bytes(1080) + b"\x53\xef" + bytes(3000),
    "compressed with xz": lzma.compress(bytes(10240)),
    "compressed with zstd": b"\x28\xb5\x2f\xfd\x04\x00\x01\x00\x00" + bytes(600),
    "compressed with bzip2": bz2.compress(bytes(10240)),
    "a web page": b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
    "a text file": "Sehr geehrte Frau Müller,\n".encode() * 30,
    "nothing but zeros": bytes(1 << 20),
}


@pytest.mark.parametrize("what", sorted(NO_LAYERS))
def test_a_file_that_is_no_layer_is_called_by_its_name(place, what):
    (place / "my file").write_bytes(NO_LAYERS[what])
    for verb, *words in (["show"], ["squash", "-o", place / "s"], ["apply", place / "root"]):
        result = snap(verb, place / "my file", *words)
        assert result.returncode == 125 and os.listdir(place / "root") == []
        assert_error(
            result, "changes file is " + what.replace("is empty", "empty"), place / "my file"
        )
        if "xz" in what:
            command = result.stderr.decode().strip().rpartition("unpack it first: ")[2]
            subprocess.run(["sh", "-c", command], cwd=place, check=True)
            assert snap("show", "layer.tar", cwd=place).returncode == 0


def test_a_directory_is_called_one(place):
    assert_error(snap("show", place / "root"), "a directory", place / "root")


@pytest.mark.parametrize("size", [1024, 10240])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_tar_without_members_changes_nothing(place, size, compress):
    (place / "l").write_bytes(compress(bytes(size)))
    before = dump(place / "root")
    assert snap("apply", place / "l", place / "root").returncode == 0
    assert dump(place / "root") == before and snap("show", place / "l").stdout.startswith(
        b"0 added"
    )


def archive_of(layout, tool, path):
    """OCI and docker archives, as skopeo makes them or by tar of a layout in a directory."""
    if tool == "tar":
        run_tool("tar", "-cf", path, "-C", layout, ".")
    elif tool == "docker":
        blobs = list((layout / "blobs/sha256").iterdir())
        config = next(blob for blob in blobs if b'"rootfs"' in blob.read_bytes()[:1000])
        layers = [blob for blob in blobs if blob.read_bytes()[:2] == b"\x1f\x8b"]

        names = ",".join('"%s/layer.tar"' % layer.name for layer in layers)
        manifest = '[{"Config":"%s.json","RepoTags":["a:b"],"Layers":[%s]}]' % (config.name, names)
        members = []
        for layer in layers:
            members.append((layer.name + "/layer.tar", gzip.decompress(layer.read_bytes())))
        members.append((config.name + ".json", config.read_bytes()))
        make_layer(path, [*members, ("manifest.json", manifest.encode())])
    else:
        run_tool("tar", "-czf", path, "-C", layout, "blobs", "index.json", "oci-layout")
    return path


@pytest.mark.parametrize("tool", ["oci", "tar", "docker"])
@pytest.mark.parametrize("count", [1, 2])
def test_an_image_archive_is_refused_with_the_command_that_takes_its_layers_out(place, tool, count):
    names = [f"file{number}" for number in range(count)]
    layers = [make_layer(place / name, [(name, b"x")]) for name in names]
    make_oci_image(place / "oci", layers)
    archive = archive_of(place / "oci", tool, place / "it's an image.tar")
    result = snap("apply", archive, place / "root")
    assert result.returncode == 125 and os.listdir(place / "root") == []
    assert_error(result, "image archive of " + ("one layer" if count == 1 else "2 layers"), archive)

    command = result.stderr.decode().strip().rpartition("take out the layers that you want: ")[2]
    subprocess.run(["sh", "-ec", command], cwd=place, check=True)
    merge(place / "root", *sorted(place.glob("layer?.tar")))
    assert sorted(os.listdir(place / "root")) == names


def test_a_broken_image_archive_is_refused_too(place):
    deep = b'{"Layers":' + b"[" * 100000
    for number, text in enumerate([b'[{"Layers": 3}]', b'"Layers"', deep, b'["Layers"]']):
        make_layer(place / "l", [("manifest.json", text), ("index.json", b"\xff")])
        result = snap("apply", place / "l", place / "root")
        assert result.returncode == 125 and os.listdir(place / "root") == [], number
        assert_error(result, "image archive", place / "l")


# --- Layers of other tools ------------------------------------------------------------------------

DIR = {"type": tarfile.DIRTYPE, "mode": 0o750, "mtime": 77}
LINK = tarfile.LNKTYPE
SYMLINK = tarfile.SYMTYPE
BASE = [("etc/", DIR), ("etc/one", b"one"), ("etc/two", b"two"), ("d/", DIR), ("d/old", b"old"), ("d/sub/", DIR),
        ("d/sub/x", b"x"), ("f", b"f"), ("s", {"type": SYMLINK, "linkname": "etc"})]  # fmt: skip
AS_UMOCI = {
    "kaniko": [("/", DIR), ("/etc/", DIR), ("/etc/new", b"new"), ("/h", {"type": LINK, "linkname": "/etc/new"}),
               ("/etc/.wh.one", b""), ("hb", {"type": LINK, "linkname": "/etc/two"})],
    "root": [("./", DIR), ("./etc/new", b"n")],
    "dots": [("./" * 150, DIR), ("./" * 150 + "q", b"q"), ("a//b/./c", b"1"),
             ("h", {"type": LINK, "linkname": ".//etc/./one"})],
    "whiteout before its file": [("etc/.wh.one", b""), ("etc/one", b"new")],
    "whiteout after its file": [("etc/one", b"new"), ("etc/.wh.one", b"")],
    "whiteout before a child": [(".wh.d", b""), ("d/new", b"1")],
    "whiteouts of nothing": [("etc/.wh.none", b""), ("none/.wh.x", b""), (".wh..wh.plnk", b""), ("/.wh.no", b"")],
    "opaque first": [("d/", DIR), ("d/.wh..wh..opq", b""), ("d/new", b"1")],
    "opaque last": [("d/", DIR), ("d/sub/", DIR), ("d/sub/y", b"y"), ("d/.wh..wh..opq", b"")],
    "opaque of nothing": [("nn/.wh..wh..opq", b"")],
    "file before its directory": [("n/m/file", b"1"), ("n/m/", DIR), ("n/", DIR)],
    "file over directory": [("d", b"file")],
    "directory over file": [("f/", DIR), ("f/x", b"1")],
    "directory over symlink": [("s/", DIR), ("s/x", b"1")],
    "symlink over directory": [("d", {"type": SYMLINK, "linkname": "/etc"})],
    "link to a file of the base": [("h", {"type": LINK, "linkname": "etc/two"}), ("etc/two", b"changed")],
    "link to a symlink": [("h", {"type": LINK, "linkname": "s"})],
    "one name twice": [("x", b"1"), ("y", {"type": LINK, "linkname": "x"}), ("x", b"2")],
    "nothing": [],
}  # fmt: skip


@needs_root
@pytest.mark.parametrize("case", sorted(AS_UMOCI))
def test_a_layer_of_another_tool_is_merged_as_umoci_does(place, case):
    layers = [make_layer(place / "base", BASE), make_layer(place / "l", AS_UMOCI[case])]
    make_oci_image(place / "oci", layers)
    theirs = dump(unpack_with_umoci(place, place / "oci"))
    merge(place / "root", *layers)
    ours = dump(place / "root")

    # umoci gives some directories the time of what it does in them later.
    for tree in (theirs, ours):
        for fields in tree.values():
            if fields[0] == stat.S_IFDIR and case not in ("kaniko", "root"):
                fields[3] = None

    assert ours == theirs


@pytest.mark.parametrize("name", ["../x", "a/../x", "/../x"])
def test_a_name_that_leads_upwards_is_refused(place, name):
    for member in ((name, b"1"), ("h", {"type": LINK, "linkname": name})):
        result = snap("apply", make_layer(place / "l", [("first", b"1"), member]), place / "root")
        assert result.returncode == 125 and os.listdir(place / "root") == []
        assert_error(result, "unsafe name")


# --- Layers made to do harm -----------------------------------------------------------------------
# Each of a few KiB or MiB; the first number is of seconds on a machine that does much else.

DEEP = b"d/" * 2000
BOMBS = {
    "a map without an end": lambda: [sparse(b"1000000\n" + b"1" * (4 << 20), 1 << 30), END],
    "a map of numbers of any length": lambda: [sparse(b"9\n" + b"0" * (4 << 20) + b"1\n", 1 << 30), END],
    "a map longer than its file": lambda: [sparse(b"2000000\n0\n", 1 << 30), END],
    "a map with a negative number": lambda: [sparse(b"1\n-5\n5\n", 1 << 30, b"12345"), END],
    "more content than its map": lambda: [sparse(b"1\n0\n5\n", 1 << 30, b"123456"), END],
    "pieces that overlap": lambda: [sparse(b"2\n0\n3\n2\n3\n", 1 << 30, b"123456"), END],
    "a name of 400,000 levels": lambda: [named(b"a/" * 400000 + b"x"), END],
    "deep names by turns": lambda: [named(b"%d/" % (n % 2) + DEEP + b"%d" % n) for n in range(5000)] + [END],
    "links to deep names by turns": lambda: [
        named(b"%d/" % (n % 2) + DEEP + b"x") for n in range(2)] + [
        named(b"h%d" % n, b"1", b"%d/" % (n % 2) + DEEP + b"x") for n in range(5000)] + [END],
    "a million headers": lambda: [header(b"f") * 1000] * 1000 + [END],
    "whiteouts of one path": lambda: [header(b".wh.usr")] * 100000 + [END],
    "extended headers without end": lambda: [
        pax((b"k%d" % n, bytes(999999))) for n in range(200)] + [header(b"f"), END],
    "global headers without end": lambda: [pax((b"k", bytes(999999)), kind=b"g")] * 400 + [header(b"f"), END],
    "an extended header of 2 MiB": lambda: [pax((b"k", bytes(2 << 20))), header(b"f"), END],
    "large attributes": lambda: [
        pax(*[(XATTR + b"user.%d" % n, bytes(60000)) for n in range(16)]) + header(b"f%d" % m)
        for m in range(100)] + [END],
    "an attribute of 64 KiB and more": lambda: [pax((XATTR + b"user.a", bytes(65537))) + header(b"f"), END],
    "attributes with more names than a file has": lambda: [
        pax(*[(XATTR + b"user.%d" % n, b"") for n in range(20000)]) + header(b"f"), END],
    "a name of an attribute of 256 bytes": lambda: [pax((XATTR + b"user." + b"a" * 251, b"1")) + header(b"f"), END],
}  # fmt: skip


def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (400 << 20, resource.RLIM_INFINITY))


@pytest.mark.parametrize("case", sorted(BOMBS))
def test_a_small_file_takes_neither_hours_nor_gigabytes(place, case):
    with gzip.open(place / "l", "wb", 6) as file:
        for part in BOMBS[case]():
            file.write(part)
    assert (place / "l").stat().st_size < 3 << 20

    result = snap("apply", place / "l", place / "root", preexec_fn=limit_memory)
    assert result.returncode == 125 and os.listdir(place / "root") == [], result.stderr
    assert_error(result, "damaged", place / "l")
    assert len(result.stderr) < 2000


def test_a_name_of_20000_levels_is_no_trouble(place):
    """A tree may be as deep; it is not what other programs can name."""
    (place / "l").write_bytes(named(b"a/" * 20000 + b"x") + END)
    assert snap("apply", place / "l", place / "root", preexec_fn=limit_memory).returncode == 0
    assert snap("squash", place / "l", "-o", place / "s", preexec_fn=limit_memory).returncode == 0
    assert os.listdir(place / "root/a/a/a/a") == ["a"]


def test_memory_that_is_short_is_told_before_anything_is_applied(place, monkeypatch):
    make_layer(place / "l", [("d%d/f" % number, b"") for number in range(2000)])
    monkeypatch.setattr(changes, "available_memory", lambda: 1 << 20)
    with pytest.raises(changes.Fatal) as caught:
        merge(place / "root", place / "l")
    assert "memory" in caught.value.message and "--mem" in caught.value.hint
    assert os.listdir(place / "root") == []

    # Without room for an index the headers are read twice.
    monkeypatch.setattr(changes, "available_memory", lambda: 3 << 20)
    merge(place / "root", place / "l")
    assert len(os.listdir(place / "root")) == 2000


def test_50000_files_are_merged_where_memory_is_that_of_a_guest_of_64_mib(place):
    write_many(place / "l.tar.gz", b"opt/many/%d/file%d", 50000)
    assert measure_memory(27, "apply", place / "l.tar.gz", place / "root") < 27
    assert len(os.listdir(place / "root/opt/many/99")) == 500


def test_attributes_that_cannot_be_kept_are_told_in_a_few_lines(place):
    members = []
    for number in range(100):
        members.append(pax((XATTR + b"no-such.%d" % number, b"1")) + header(b"f%d" % number))
    (place / "l").write_bytes(b"".join(members) + END)
    result = snap("apply", place / "l", place / "root")
    assert result.returncode == 0 and len(os.listdir(place / "root")) == 100
    assert len(result.stderr.splitlines()) == 21 and b"80 more attributes" in result.stderr


# --- Any bytes ------------------------------------------------------------------------------------


def make_samples():
    """Real layers of every kind of member and header, uncompressed."""
    with fresh_place() as place:
        tree = place / "tree"
        make_sparse(tree)

        (tree / ("d" * 150) / "sub").mkdir(parents=True)
        (tree / ("d" * 150) / "sub/file").write_text("x" * 700)
        (tree / "link").symlink_to("t" * 150), os.link(tree / "odd", tree / "hard")
        os.mkfifo(tree / "fifo")
        os.setxattr(tree / "odd", "user.a", b"1\n=")
        (tree / "many").unlink(), (tree / "hole-data").unlink()
        (place / "a/gone").mkdir(parents=True)

        samples = [diff(place / "a", tree, place / "ours.tar").read_bytes()]

        for how in ("--format=gnu", "--format=posix --xattrs", "--format=ustar", "--format=v7",
                    "--format=posix -S --sparse-version=0.0", "--format=gnu -S",
                    "--format=posix -S --sparse-version=0.1", "--format=posix -S"):  # fmt: skip
            options = how.split()
            if "-S" not in options:
                options.append("--exclude=tera")
            command = ["tar", "-c", *options, "-f", place / "l", "-C", tree, "."]
            subprocess.run(command, stderr=subprocess.DEVNULL)
            samples.append((place / "l").read_bytes()[: 1 << 16])
        return samples


SAMPLES = make_samples()
NUMBERS = [b"0", b"-1", b"99999999999", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + bytes(10) + b"\1", b"7" * 12,
           b" 7\0", b"+1", b"1_0", b"\0" * 12]  # fmt: skip
NAMES = [
    b"", b"/", b".", b"./" * 40, b"..", b"/..", b"a/", b".wh.", b".wh..", b".wh..wh..opq", b"a\0b",
    b"\xff" * 100,
]
FIELDS = {
    0: NAMES, 100: NUMBERS, 108: NUMBERS, 116: NUMBERS, 124: NUMBERS, 136: NUMBERS, 157: NAMES,
    329: NUMBERS, 345: NAMES, 156: [bytes([kind]) for kind in b"\x000123456789xgLKSDMNVZ"],
    257: [b"ustar  \0", b"ustar\x0000"],
}
WIDTHS = {
    0: 100, 100: 8, 108: 8, 116: 8, 124: 12, 136: 12, 157: 100, 329: 8, 345: 155, 156: 1, 257: 8,
}
one_field = st.tuples(st.integers(0, 60), st.sampled_from(sorted(FIELDS)), st.integers(0, 30))
changed_fields = st.lists(one_field, max_size=3)
changed_bytes = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=3)


def mutate(content, fields, spots, cut):
    """Some header fields replaced, with right checksums, then some bytes, then the end cut."""
    content = bytearray(content)
    starts = range(0, len(content), 512)
    starts = [start for start in starts if content[start + 257 : start + 262] == b"ustar"]

    for number, offset, choice in fields:
        if starts:
            start = starts[number % len(starts)]
            width = WIDTHS[offset]
            value = FIELDS[offset][choice % len(FIELDS[offset])][:width]
            content[start + offset : start + offset + width] = value.ljust(width, b"\0")
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])

    for offset, value in spots:
        content[offset % len(content)] = value
    return bytes(content[: len(content) - cut])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SAMPLES), changed_fields, changed_bytes, st.sampled_from([0, 0, 0, 1, 512, 5000]),
       st.sampled_from(["plain", "gzip", "two members", "garbage", "cut gzip", "flipped gzip"]))  # fmt: skip
def test_no_layer_however_changed_is_anything_but_merged_or_refused(
    sample, fields, spots, cut, packing
):
    content = mutate(sample, fields, spots, cut)
    if packing != "plain":
        content = gzip.compress(content, 1)
    if packing == "two members":
        content = gzip.compress(mutate(sample, fields, [], 0)[:1024], 1) + content
    content = {"garbage": content + b"\0rubbish", "cut gzip": content[:-9]}.get(packing, content)
    if packing == "flipped gzip":
        content = mutate(content, [], [(0, content[0]), *spots], 0)

    with fresh_place() as place:
        root, outside = place / "root", place / "outside"
        root.mkdir(), outside.mkdir(), (root / "link").symlink_to("../outside")
        (place / "l").write_bytes(content)
        before = dump(root)

        with contextlib.suppress(changes.Fatal):
            changes.check_layer(os.fsencode(place / "l"), QUIET).__exit__()
            squash(place / "s.tar", place / "l")
        try:
            merge(root, place / "l")
        except changes.Fatal as fatal:
            assert "incomplete" in fatal.hint or dump(root) == before
        assert os.listdir(outside) == []


# --- In runs --------------------------------------------------------------------------------------


def test_what_is_no_layer_ends_a_run_with_the_right_words(any_node):
    """And with its name on the host, in what is to be done as well."""
    (any_node.job / "l.xz").write_bytes(lzma.compress(bytes(10240)))
    result = any_node.run("--changes", "l.xz", "sh", "-c", "echo run > ran")
    assert result.returncode == 125 and os.listdir(any_node.job) == ["l.xz"]
    assert_error(result, "compressed with xz", any_node.job / "l.xz")
    assert f"xz -dc '{any_node.job}/l.xz' > layer.tar" in result.stderr.decode()


def test_layers_of_kaniko_and_empty_ones_are_merged_in_a_run(node):
    make_layer(node.job / "kaniko", [("/", {"type": tarfile.DIRTYPE, "mode": 0o755}), ("/opt/x", b"new"),
                                     ("/opt/h", {"type": LINK, "linkname": "/opt/x"})])  # fmt: skip
    (node.job / "empty").write_bytes(bytes(10240))
    result = node.run("--changes", "kaniko", "--changes", "empty", "cat", "/opt/h")
    assert (result.returncode, result.stdout) == (0, b"new")


def test_large_attributes_do_not_take_the_memory_of_a_small_guest(node):
    with gzip.open(node.job / "l", "wb", 6) as file:
        for part in BOMBS["large attributes"]():
            file.write(part)
    result = node.run("--mem", "96", "--changes", "l", "true")
    assert result.returncode == 125
    assert_error(result, "damaged", node.job / "l")
