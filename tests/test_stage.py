# SPDX-License-Identifier: Apache-2.0
"""The bundle for stage-in: three files that run on a bare node, and a disk that grows there."""

import glob
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
from nodes import (
    TOP,
    UNPRIVILEGED,
    assert_error,
    caller_is_root,
    kernel_has,
    needs_root,
    pythons,
    read_version,
    require,
    skip_unless,
    wait_for,
    writable_copy,
)

import apppot_start

STAGE = TOP / "build" / "stage"
FILES = ["apppot_start.py", "linux", "apppot.img"]


@pytest.fixture(scope="module")
def bundle():
    """The three files, where every user reaches them."""
    require(STAGE.exists(), f"no bundle {STAGE}: make stage")
    place = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-"))
    subprocess.run(["tar", "xf", STAGE / "apppot-stage.tar", "-C", place], check=True)
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def staged_node(node, bundle):
    """A node with the bundle's kernel and image."""
    (node.root / "linux").unlink()
    (node.root / "linux").symlink_to(bundle / "linux")
    node.image = bundle / "apppot.img"
    return node


def test_the_bundle_is_three_files_with_their_checksums_and_a_tar_that_keeps_their_holes(bundle):
    assert sorted(os.listdir(STAGE)) == sorted([*FILES, "SHA256SUMS", "apppot-stage.tar"])
    assert sorted(os.listdir(bundle)) == sorted([*FILES, "SHA256SUMS"])

    for line in (bundle / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest

    image, tar = (bundle / "apppot.img").stat(), (STAGE / "apppot-stage.tar").stat()
    assert image.st_blocks * 512 < image.st_size < apppot_start.DISK_MIB << 20
    assert tar.st_size < image.st_blocks * 512 + (bundle / "linux").stat().st_size + (2 << 20)


def test_the_kernel_is_static_and_was_built_nowhere_in_particular(bundle):
    assert apppot_start.read_loader(str(bundle / "linux")) == ""
    assert read_version(bundle / "linux") >= (7, 2)
    assert b"(apppot@apppot)" in (bundle / "linux").read_bytes()


def test_on_a_terminal_make_shows_how_far_it_is_and_wipes_that(tmp_path):
    (tmp_path / "build").mkdir()
    names = ("Makefile", "apppot_start.py", "apppot_init.py", "changes.py", ".kernel", "build/apppot.img",
             "build/apppot.img.key", "build/linux", "build/linux.key")
    for name in names:
        subprocess.run(["cp", "-a", "--sparse=always", TOP / name, tmp_path / name], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment.update(TERM="xterm")
    environment.pop("APPPOT_KERNEL", None)
    words = ["script", "-qec", "make stage", "/dev/null"]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert re.search(rb"\rmake: copying to build/stage: \d+ of about \d+ MiB\x1b\[K", result.stdout)
    assert b"make: " not in result.stdout.rpartition(b"\r\x1b[K")[2]


# --- Nodes with nothing on them -------------------------------------------------------------------


def copy_with_libraries(program, root):
    """A program or shared object and what the dynamic loader would load for it."""
    listed = subprocess.run(
        ["ldd", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout.decode()

    for path in [str(program), *re.findall(r"(/\S+)", listed)]:
        target = root / os.path.realpath(os.path.dirname(path)).lstrip("/") / os.path.basename(path)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def install_python(python, root):
    """Python and its library, and nothing that is not needed to run it."""
    ask = "import sys, os; print(os.path.realpath(sys.executable), os.path.realpath(os.__file__))"
    said = subprocess.run([python, "-ISc", ask], stdout=subprocess.PIPE, check=True).stdout.decode()
    program, module = map(pathlib.Path, said.split())
    library = module.parent
    copy_with_libraries(program, root)
    needless = shutil.ignore_patterns(
        "test", "site-packages", "dist-packages", "__pycache__", "idlelib", "tkinter", "config-*"
    )
    shutil.copytree(library, root / str(library).lstrip("/"), symlinks=True, ignore=needless)
    for extension in (library / "lib-dynload").glob("*.so"):
        copy_with_libraries(extension, root)

    for loader in glob.glob("/lib*/ld-linux*"):
        target = root / loader.lstrip("/")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(os.path.realpath(loader), target)
    return program


def choose_pythons():
    """The oldest, the newest and this one. test_end.py boots with every Python."""
    by_age = sorted(pythons().items(), key=lambda item: int(item[0].partition(".")[2]))
    return {"oldest": by_age[0][1], "newest": by_age[-1][1], "this": sys.executable}


@needs_root
@pytest.mark.parametrize("python", choose_pythons().values(), ids=choose_pythons())
def test_the_bundle_runs_in_a_root_directory_with_a_python_alone(tmp_path_factory, bundle, python):
    root = tmp_path_factory.mktemp("root")
    root.chmod(0o755), root.parent.chmod(0o755)
    program = install_python(python, root)
    for name in ("proc", "dev", "tmp", "job"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    for name in FILES:
        subprocess.run(["cp", "--sparse=always", bundle / name, root / "job"], check=True)
    script = f"""
        mount -t proc proc {root}/proc; mount --rbind /dev {root}/dev
        exec env -i unshare --root={root} --wd=/job --setgid={UNPRIVILEGED} --setuid={UNPRIVILEGED} "$@" """
    command = [
        program, "apppot_start.py", "sh", "-c",
        "echo $((6*7)); id -u; touch x 2> /dev/null; df -m / | tail -1",
    ]

    result = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "-", *command], capture_output=True
    )
    assert result.returncode == 0, result.stderr

    lines = result.stdout.decode().splitlines()
    assert lines[:2] == ["42", str(UNPRIVILEGED)] and not (root / "job" / "x").exists()
    assert int(lines[2].split()[3]) > 1000, "free MiB of the root file system"

    wait_for(lambda: not os.listdir(root / "tmp"))
    shutil.rmtree(root)


@needs_root
@pytest.mark.parametrize("name", ["debian-11", "debian-13"])
def test_the_bundle_runs_on_an_older_and_a_newer_debian(tmp_path, bundle, chroot, name):
    subprocess.run(["tar", "-C", tmp_path, "-xpf", chroot(name), "--exclude=./dev/*"], check=True)
    for part in FILES:
        subprocess.run(["cp", "--sparse=always", bundle / part, tmp_path / "root"], check=True)
    script = f"""
        mount -t proc proc {tmp_path}/proc; mount --rbind /dev {tmp_path}/dev
        exec chroot {tmp_path} env -i python3 /root/apppot_start.py "$@" """
    command = ["sh", "-c", "echo $((6*7)); grep VERSION_ID /etc/os-release"]

    result = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "-", *command], capture_output=True
    )
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout.startswith(b"42\n"), (
        result
    )


# --- The disk -------------------------------------------------------------------------------------


@caller_is_root
def test_a_shrunk_image_has_room_in_a_run_and_nothing_counts_as_changed(staged_node):
    before = staged_node.image.read_bytes()[: 1 << 20], staged_node.image.stat().st_mtime_ns
    result = staged_node.run(
        "--root", "sh", "-ec", "df -m / | tail -1; cd /; apppot-snap changes -n"
    )
    line, *listing = result.stdout.decode().splitlines()
    assert int(line.split()[1]) > 1900 and int(line.split()[3]) > 1000

    # The job directory is mounted in these.
    changed = [entry for entry in listing[:-1] if not entry.endswith((" /", " /root"))]
    assert (result.returncode, changed) == (0, [])
    assert (
        staged_node.image.read_bytes()[: 1 << 20],
        staged_node.image.stat().st_mtime_ns,
    ) == before


def test_disk_makes_the_root_file_system_larger(staged_node):
    script = (
        "df -m / | tail -1; dd if=/dev/zero of=/big bs=1M count=1 seek=30000 status=none; "
        "tail -c 1 /big"
    )
    result = staged_node.run("--root", "--disk", "40G", "sh", "-ec", script)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[1]) > 39000


def test_disk_with_write_makes_the_image_itself_larger(staged_node):
    own = writable_copy(staged_node, staged_node.image)
    result = staged_node.run("--root", "--write", "--disk", "3G", "df", "-m", "/", image=own)
    assert result.returncode == 0 and int(result.stdout.splitlines()[1].split()[1]) > 2900, (
        result.stderr
    )
    assert own.stat().st_size == 3 << 30
    subprocess.run(["/sbin/e2fsck", "-fn", own], check=True, capture_output=True)


@pytest.mark.parametrize(
    "options, said",
    [
        (("--disk", "10M"), "less than the image has"),
        (("--disk", "much"), "not a size"),
        (("--disk", "4G", "--image", "{cow}:{image}"), "with a COW file"),
    ],
)
def test_a_disk_that_cannot_be_is_refused(staged_node, options, said):
    places = {"cow": staged_node.job / "cow", "image": staged_node.image}
    result = staged_node.run(*(option.format(**places) for option in options), "true")
    assert result.returncode == 125
    assert_error(result, said)


def test_a_kernel_that_cannot_make_the_disk_larger_is_told(node, kernel):
    skip_unless(not kernel_has(kernel, "CONFIG_DM_INIT"), "this kernel can")
    result = node.run("--disk", "40G", "true")
    assert result.returncode == 125
    assert_error(result, "device mapper", node.root / "linux")


# --- A site ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(bundle, tmp_path_factory):
    """What `make install` puts below PREFIX; it has the files of the bundle."""
    place = tmp_path_factory.mktemp("site")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment.pop("APPPOT_KERNEL", None)
    words = ["make", "-C", TOP, "--no-print-directory", "install", f"DESTDIR={place}", "PREFIX=/opt"]
    subprocess.run(words, check=True, capture_output=True, env=environment)
    return place / "opt"


def run_installed(site, *words, **options):
    result = subprocess.run(
        [site / "bin" / words[0], *words[1:]], capture_output=True, stdin=subprocess.DEVNULL, timeout=90, **options
    )
    assert (result.returncode, result.stderr) == (0, b""), result
    return result.stdout.decode()


def test_an_installed_apppot_finds_its_files_and_has_a_man_page(site, tmp_path):
    assert run_installed(site, "apppot", "sh", "-c", "echo $((6*7)) $PWD", cwd=tmp_path) == f"42 {tmp_path}\n"
    page = (site / "share/man/man1/apppot.1").read_text().replace("\\-", "-")
    for action in apppot_start.build_parser()._actions:
        assert all(option in page for option in action.option_strings)


def test_a_job_script_of_the_original_runs_by_its_name_with_all_its_options(site, tmp_path):
    """Those of AppPot 0.27. What such a job writes outside of its directory is in the COW file or the image."""
    files = site / "lib/apppot"
    line = ["apppot-start", "--apppot", f"own.cow,{files / 'apppot.img'}", "--mem", "256M", "--id", "one", "--umid",
            "two", "--extra", "quiet", "-X", "nosmp", "--uml", files / "linux", "--linux", files / "linux"]
    assert run_installed(site, *line, "sh", "-c", "echo kept > ~/kept; echo done", cwd=tmp_path) == "done\n"
    assert run_installed(site, *line, "sh", "-c", "cat ~/kept", cwd=tmp_path) == "kept\n"

    subprocess.run(["cp", "--sparse=always", files / "apppot.img", tmp_path / "own.img"], check=True)
    line[2] = "own.img"
    assert run_installed(site, *line, "sh", "-c", "echo in the image > ~/kept", cwd=tmp_path) == ""
    words = ["apppot", "--image", "own.img", "sh", "-c", "cat ~/kept"]
    assert run_installed(site, *words, cwd=tmp_path) == "in the image\n"
    assert run_installed(site, "apppot-start", "-V") == f"AppPot {apppot_start.VERSION}\n"
