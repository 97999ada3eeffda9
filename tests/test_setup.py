# SPDX-License-Identifier: Apache-2.0
"""The Makefile: what it builds with, what it says, how it ends, and what it needs: see README."""

import contextlib
import fcntl
import os
import pathlib
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
from nodes import DEADLINE_S, TOP, UNPRIVILEGED, find_processes, mounted, needs_root, send, wait_for


class Checkout:
    """A clone of an ordinary user, with its own cache, and the processes that make leaves."""

    def __init__(self):
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-"))
        self.cache = self.place / "cache"
        self.mark = os.urandom(8).hex()
        self.uid = os.getuid() or UNPRIVILEGED
        (self.place / "bin").mkdir()
        for name in ("Makefile", "apppot_start.py", "apppot_init.py", "changes.py"):
            shutil.copy(TOP / name, self.place)
        os.chown(self.place, self.uid, -1)
        self.place.chmod(0o755)
        self.started = []

    def stand_in(self, name, script):
        (self.place / "bin" / name).write_text("#!/bin/sh\n" + script + "\n")
        (self.place / "bin" / name).chmod(0o755)

    def become(self):
        for number in (signal.SIGHUP, signal.SIGINT):  # make may run under nohup
            signal.signal(number, signal.SIG_DFL)
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(self.uid)
            os.setuid(self.uid)

    def start(self, *words, wrap=()):
        """Popen of make in a session of its own. A wrap becomes the ordinary user itself."""
        environment = {
            "PATH": f"{self.place}/bin:/usr/bin:/bin",
            "HOME": str(self.place),
            "APPPOT_TEST": self.mark,
        }

        process = subprocess.Popen(
            [*wrap, "make", f"CACHE={self.cache}", *words],
            cwd=self.place,
            env=environment,
            start_new_session=True,
            preexec_fn=None if wrap else self.become,  # noqa: PLW1509
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def run(self, *words, wrap=()):
        """Exit status and stderr of a make that fails, and leaves nothing."""
        process = self.start(*words, wrap=wrap)
        _, stderr = process.communicate(timeout=DEADLINE_S)
        self.assert_nothing_left()
        return process.returncode, stderr

    def assert_nothing_left(self):
        wait_for(lambda: not find_processes(self.mark), 20)
        assert [path.name for path in self.cache.glob("tmp-*")] == []

    def assert_lock_is_free(self, kind):
        with open(self.cache / f"lock-{kind}") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self):
        send(find_processes(self.mark), signal.SIGKILL)
        for process in self.started:
            process.communicate()
        shutil.rmtree(self.place)


@pytest.fixture
def checkout():
    checkout = Checkout()
    yield checkout
    checkout.close()


# --- What cannot be built -------------------------------------------------------------------------

# Run as root by Python: a command of an ordinary user who has subordinate ids, and no user
# namespace to use them in.
REFUSED = f"""
import ctypes, os, sys
told, go = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    assert ctypes.CDLL(None).unshare(0x10000000) == 0   # CLONE_NEWUSER
    os.write(told[1], b"x")
    os.read(go[0], 1)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    os.setgroups([])
    os.setgid({UNPRIVILEGED})
    os.setuid({UNPRIVILEGED})
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(told[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{{pid}}/{{name}}", "w") as file:
        file.write("0 0 65536")
os.write(go[1], b"x")
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def refuse_namespaces(checkout):
    ids = checkout.place / "ids"
    ids.write_text(f"{pwd.getpwuid(UNPRIVILEGED).pw_name}:100000:65536\n")
    wrap = mounted(f"mount --bind {ids} /etc/subuid; mount --bind {ids} /etc/subgid")
    return (*wrap, sys.executable, "-c", REFUSED)


@pytest.mark.parametrize("how", [pytest.param("by the kernel", marks=needs_root), "by a stand-in"])
def test_where_user_namespaces_are_refused_make_says_so_each_time(checkout, how):
    wrap = refuse_namespaces(checkout) if how == "by the kernel" else ()
    if not wrap:
        # As the one of util-linux 2.38: its child waits for ever for what has failed.
        checkout.stand_in("unshare", "sleep 1000 & exit 1")

    for _ in range(2):
        status, stderr = checkout.run("image", wrap=wrap)
        assert (status, stderr.count("make: error: ")) == (2, 1)
        assert "no user namespace to build in\nmake: hint: run 'sudo make image'" in stderr
        checkout.assert_lock_is_free("image")


@pytest.mark.parametrize(
    "variable, said",
    [
        ("IMAGE_SIZE=2X", "not a size: IMAGE_SIZE=2X"),
        ("IMAGE_SIZE=", "not a size: IMAGE_SIZE="),
        ("IMAGE_SIZE=2000000000", "not a size: IMAGE_SIZE=2000000000"),
        ("MIRROR=file:{0}", "cannot get the lists of Debian sid from file:{0}"),
        ("MIRROR=nonsense", "cannot get the lists of Debian sid from nonsense"),
    ],
)
def test_a_variable_that_cannot_be_is_named_before_anything_is_built(checkout, variable, said):
    checkout.stand_in("unshare", "exit 0")
    checkout.stand_in("mmdebstrap", "touch built")
    status, stderr = checkout.run("image", "SUITE=sid", variable.format(checkout.place))
    assert status == 2 and f"make: error: {said.format(checkout.place)}\nmake: hint: " in stderr
    assert not (checkout.place / "built").exists()


@needs_root
def test_where_there_is_no_space_make_says_so_before_it_downloads(checkout):
    wrap = mounted(f"mkdir -p {checkout.cache}; mount -t tmpfs -o size=100m tmpfs {checkout.cache}")
    status, stderr = checkout.run("image", "MIRROR=file:/nowhere", wrap=wrap)
    said = f"make: error: no space for build/apppot.img: {checkout.cache} has 100 MiB left, and it takes 300\n"
    assert status == 2 and stderr.startswith(said + "make: hint: another CACHE, or ")


# --- Ends -----------------------------------------------------------------------------------------


def start_to_build(checkout):
    process = checkout.start("image", "MIRROR=file:/nowhere")
    wait_until_building(checkout)
    return process


def wait_until_building(checkout):
    wait_for((checkout.place / "started").exists)
    (checkout.place / "started").unlink()


@pytest.fixture
def building(checkout):
    """A make image that does nothing but wait in its longest step."""
    checkout.stand_in("apt-get", "exit 0")
    checkout.stand_in("unshare", "exit 0")
    checkout.stand_in("mmdebstrap", "sleep 1000 & touch started; wait")
    return start_to_build(checkout)


PATCH = """\
SPDX-License-Identifier: GPL-2.0
Subject: [PATCH] a text

---
Lost: the text is {text}
Options: TEXT_{text}

diff --git a/text b/text
--- a/text
+++ b/text
@@ -1 +1 @@
-{before}
+{text}
"""
# A source tree whose configuration tool prints what it is told, and that has nothing to compile.
TREE = {
    "arch/um/drivers/Kconfig": "",
    "text": "one\n",
    "scripts/config": '#!/bin/sh\n[ "$1" != --set-str ] || echo "patches: $3"\n'
                      'case $2 in TEXT_*) echo "option: $2";; esac\necho "CONFIG_$2=y" >> .config\n',
    "Makefile": "allnoconfig olddefconfig:\nlinux:\n\tfalse\n",
}  # fmt: skip


def test_a_patch_that_does_not_apply_is_left_out_and_what_is_lost_is_told(tmp_path):
    """A newer kernel may have another text in the place that a patch changes."""
    tree, patches = tmp_path / "tree/linux", tmp_path / "patches"
    for name, text in TREE.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / "scripts/config").chmod(0o755)
    patches.mkdir()
    (patches / "01-fits.patch").write_text(PATCH.format(before="one", text="two"))
    (patches / "02-misfit.patch").write_text(PATCH.format(before="other", text="three"))
    (patches / "03-fits.patch").write_text(PATCH.format(before="two", text="four"))
    source = tmp_path / "source.tar.xz"
    subprocess.run(["tar", "-cJf", source, "-C", tree.parent, "linux"], check=True)
    (tmp_path / "only").write_text('only:\n\t@bash -euo pipefail -c "$$BUILD_KERNEL"\n')

    environment = {**os.environ, "source": source, "patches": patches, "version": "9.9", "tmp": tmp_path}
    result = subprocess.run(
        ["make", "-s", "-f", "Makefile", "-f", tmp_path / "only", "only", "KERNEL_OPTIONS=BLOCK"],
        cwd=TOP, env=environment, capture_output=True, timeout=DEADLINE_S,
    )  # fmt: skip
    warning = b"make: warning: Linux 9.9 gets no .kernel/02-misfit.patch, which does not apply to it\n"
    assert warning + b"make: hint: this kernel lacks: the text is three\n" in result.stderr
    assert result.stderr.count(b"warning") == 1
    assert b"patches: 01-fits 03-fits\n" in result.stdout
    assert [line for line in result.stdout.split(b"\n") if b"option" in line] == [
        b"option: TEXT_two", b"option: TEXT_four"
    ]  # fmt: skip
    assert (tmp_path / "source/text").read_text() == "four\n"


@pytest.mark.parametrize(
    "send, number",
    [
        (os.kill, signal.SIGTERM), (os.kill, signal.SIGKILL), (os.killpg, signal.SIGINT),
        (os.killpg, signal.SIGHUP),
    ],
)
def test_however_make_is_ended_nothing_of_it_is_left_and_the_next_one_works(
    checkout, building, send, number
):
    send(building.pid, number)
    building.communicate(timeout=DEADLINE_S)
    assert building.returncode != 0
    checkout.assert_nothing_left()
    checkout.assert_lock_is_free("image")
    os.kill(start_to_build(checkout).pid, signal.SIGTERM)
    checkout.assert_nothing_left()


def test_one_that_waits_for_another_make_can_be_ended_and_goes_on_when_that_has(checkout, building):
    waiting = [checkout.start("image", "MIRROR=file:/nowhere") for _ in range(2)]
    for process in waiting:
        assert process.stdout.readline() == "make: waiting for another make\n"
    os.kill(waiting[0].pid, signal.SIGTERM)
    waiting[0].communicate(timeout=DEADLINE_S)
    assert building.poll() is None

    os.kill(building.pid, signal.SIGTERM)
    wait_until_building(checkout)
    os.kill(waiting[1].pid, signal.SIGTERM)
    checkout.assert_nothing_left()


# --- Machines with nothing on them ----------------------------------------------------------------

# Runs a command in the machine at $1 with the network of this one; when it ends, so does all that
# it started.
ENTER = """
    root=$1
    shift
    hostname node
    mount --bind $root $root
    mount -t proc none $root/proc
    mount -t sysfs none $root/sys
    mount -t tmpfs none $root/dev
    for name in null zero full random urandom tty; do
        touch $root/dev/$name
        mount --bind /dev/$name $root/dev/$name
    done
    mkdir $root/dev/shm $root/dev/pts
    mount -t tmpfs none $root/dev/shm
    mount -t devpts -o newinstance,ptmxmode=666 none $root/dev/pts
    ln -s pts/ptmx $root/dev/ptmx
    ln -s /proc/self/fd $root/dev/fd
    exec chroot $root env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin APPPOT_REQUIRE_BOOT=1 "$@"
"""
COMMANDS = re.findall(r"^    (make \w+) +#", (TOP / "README.md").read_text(), re.MULTILINE)
# Of every kind one that needs little time: values, the bundle, chroots, real boots with either
# kernel.
SOME_TESTS = (
    "in_the_order_that_the_help_gives or bundle_is_three_files or newer_debian or a_reader_sees "
    "or umoci"
)


class Machine:
    """A Debian with what README asks for and nothing else, and a clone."""

    def __init__(self, tree):
        self.cache = tree.resolve().parent
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-"))
        self.root = self.place / "root"
        self.root.mkdir()
        subprocess.run(["tar", "-C", self.root, "-xpf", tree, "--exclude=./dev/*"], check=True)
        self.packages = self.cache / f"packages-{tree.stem}"
        self.packages.mkdir(exist_ok=True)
        self.archives = self.root / "var/cache/apt/archives"

        for path in self.packages.glob("*.deb"):
            # keep_packages() of another test may remove an old version meanwhile.
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(path, self.archives)

        (self.root / "etc/dpkg/dpkg.cfg.d/fast").write_text("force-unsafe-io\n")
        # The network is this machine's: its name servers, and whom it trusts, among them perhaps a
        # proxy.
        for name in ("resolv.conf", "ssl/certs/ca-certificates.crt"):
            shutil.copy(f"/etc/{name}", self.root / "etc" / name)

        self.clone = self.root / "home/clone"
        shutil.copytree(TOP, self.clone, ignore=shutil.ignore_patterns("build", ".git"))
        subprocess.run(["chown", "-R", "1000:1000", self.clone], check=True)

    def command(self, *words, user=0):
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        # With this process, as that ends, everything in the machine ends.
        unshare = [
            "setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount",
            "--uts",
        ]
        inside = [
            *become, "env", "-C", "/home/clone", f"HOME={'/tmp' if user else '/root'}", *words,
        ]
        return [*unshare, "--propagation=private", "sh", "-euc", ENTER, "-", self.root, *inside]

    def run(self, *words, user=0):
        """Exit status and what was written."""
        result = subprocess.run(
            self.command(*words, user=user), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        return result.returncode, result.stdout

    def check(self, *words):
        status, shown = self.run(*words)
        assert status == 0, (words, shown[-20000:])
        return shown

    def give(self, *patterns):
        """What this machine's cache holds."""
        target = self.root / "root/.cache/apppot"
        target.mkdir(parents=True, exist_ok=True)
        for path in [path for pattern in patterns for path in self.cache.glob(pattern)]:
            subprocess.run(["cp", "-r", "--sparse=always", "-p", path, target], check=True)

    def keep(self, pattern):
        """This machine's cache gets what is new in that of the other."""
        for path in (self.root / "root/.cache/apppot").glob(pattern):
            new = self.cache / f"new-{os.getpid()}-{path.name}"
            if not (self.cache / path.name).exists():
                shutil.copytree(path, new)
                new.rename(self.cache / path.name)

    def close(self):
        shutil.rmtree(self.place)

    def keep_packages(self):
        """The cache gets those that this Debian still has."""
        self.check("apt-get", "autoclean")
        kept = {path.name for path in self.archives.glob("*.deb")}

        for name in kept - set(os.listdir(self.packages)):
            new = self.packages / f"{name}.{os.getpid()}"
            shutil.copy(self.archives / name, new)
            new.rename(self.packages / name)

        for path in self.packages.glob("*.deb"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


@pytest.fixture
def machine(request, chroot):
    with contextlib.closing(Machine(chroot(request.param))) as machine:
        yield machine


def install_what_make_tells(machine):
    """An ordinary user is told what to install. After that only the right to build is missing."""
    status, shown = machine.run("make", "demo", user=1000)
    command = re.search(
        r"^make: hint: (sudo apt-get update; sudo apt-get install .*)$", shown, re.MULTILINE
    ).group(1)
    assert status == 2 and all(
        name in command for name in ("mmdebstrap", "mount", "uidmap", "user-mode-linux")
    )

    machine.check("sh", "-ec", command.replace("sudo ", "DEBIAN_FRONTEND=noninteractive "))
    _, shown = machine.run("make", "demo", user=1000)
    assert "not installed" not in shown and "no user namespace to build in" in shown


@pytest.mark.grid
@needs_root
@pytest.mark.parametrize(
    "machine, packages",
    [("debian-12", ""), ("debian-13", "systemd-resolved")],
    indirect=["machine"],
)
def test_the_commands_of_the_readme_work_on_a_bare_machine(machine, packages):
    """Only time is left out: the kernel of this machine replaces the one that make would build."""
    demo, check = COMMANDS
    if packages:
        install_what_make_tells(machine)
    else:
        machine.give("rootfs-*")
    *_, shown, told, shell, _, _ = machine.check(*demo.split(), f"PACKAGES={packages}").splitlines()
    assert "Debian GNU/Linux" in shown and told == "make: it works; try next:"
    machine.check(*shell.partition("#")[0].split())
    # systemd-resolved makes the one a link; the other is where Java's packages have links made.
    look = (
        "test -f /etc/resolv.conf -a ! -L /etc/resolv.conf -a -d /usr/share/man/man1 && echo right"
    )
    assert machine.check("python3", "apppot_start.py", "sh", "-c", look) == "right\n"

    status, shown = machine.run(
        "make", "image", "IMAGE=build/other.img", "PACKAGES=gcc no-such-package,nor-this"
    )
    assert (
        status == 2
        and "make: error: no package no-such-package nor-this in Debian stable\nmake: hint: "
        in shown
    )

    machine.check("make", "deps-check")
    machine.keep_packages()
    machine.give("lint-*")
    machine.check("make", "lint")
    machine.keep("lint-*")
    machine.check(
        "sh", "-ec", "echo 'int main(void) { return 0; }' > a.c; gcc -static a.c; ./a.out"
    )
    for name in ("linux", "linux.key"):
        shutil.copy(TOP / "build" / name, machine.clone / "build")
    machine.give("rootfs-*", "chroot-debian-*")
    shown = machine.check(
        *check.split(), "-o", "build/linux", "JOBS=2", f"PYTESTARGS=-k '{SOME_TESTS}'"
    )
    passed = re.findall(r"^=+ [1-9]\d* passed, \d+ deselected", shown, re.MULTILINE)
    assert len(passed) == 4, "two parts with each kernel: " + shown[-20000:]
