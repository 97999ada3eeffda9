# SPDX-License-Identifier: Apache-2.0
"""--doctor names the culprit on nodes that are really broken, and a run there says the same."""

import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys

import pytest
from nodes import (
    EMPTY,
    TOP,
    assert_error,
    change_image,
    kernel_has,
    limited,
    mounted,
    needs_root,
    pythons,
    replace_agent,
    require,
    writable_copy,
)

import apppot_start

LINE = re.compile(r"(ok|warn|fail) +([a-z]+) +(\S.*)")
NEEDS = "python kernel ptrace seccomp memory cpus scratch image agent files network empty limits batch".split()


def read_findings(result):
    """Verdict and text by name. Every line of stdout is one; stderr is empty; the status fits."""
    assert result.stderr == b""
    lines = [LINE.fullmatch(line) for line in result.stdout.decode().splitlines()]
    assert all(lines), result.stdout
    assert len({line.start(3) for line in lines}) == 1, "columns are aligned"

    findings = {line[2]: (line[1], line[3]) for line in lines}
    assert result.returncode == (
        125 if "fail" in {verdict for verdict, _ in findings.values()} else 0
    )
    assert all("; do: " in text for verdict, text in findings.values() if verdict != "ok"), findings
    return findings


def examine(node, *options, **more):
    return read_findings(node.run("--doctor", *options, **more))


def assert_culprit(node, name, *words, options=(), **more):
    """The doctor fails this need and no other, and a run fails with the same words."""
    findings = examine(node, *options, **more)
    assert {other for other, (verdict, _) in findings.items() if verdict == "fail"} == {name}, (
        findings
    )

    result = node.run(*options, "true", **more)
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, *words)

    for word in words:
        assert str(word) in findings[name][1]
    return findings


def test_a_good_node_is_ok_in_every_line(any_node, kernel, image):
    findings = examine(any_node)
    verdicts = [verdict for verdict, _ in findings.values()]
    assert sorted(findings) == sorted(NEEDS) and verdicts == sorted(verdicts, reverse=True)
    assert {name for name, (verdict, _) in findings.items() if verdict != "ok"} <= {"network", "files"}

    version = (
        subprocess.run([kernel, "--version"], stdout=subprocess.PIPE, check=True)
        .stdout.decode()
        .strip()
    )
    assert (
        version in findings["kernel"][1] and "hostfs" in findings["kernel"][1].partition("; no ")[0]
    )
    assert str(image) in findings["image"][1]
    assert apppot_start.find_root_device(str(image)).base_id in findings["image"][1]
    assert str(any_node.scratch) in findings["scratch"][1]


def test_it_boots_once_if_asked_and_leaves_stdin_alone(any_node):
    findings = read_findings(
        any_node.run("--doctor", "--boot", env={"HOME": None}, input=b"unread\n")
    )
    assert sorted(findings) == sorted([*NEEDS, "boot"])
    assert findings["boot"][0] == "ok" and re.search(r"\d\.\d s", findings["boot"][1])


def test_it_runs_without_image_and_kernel_and_with_all_closed(tmp_path):
    lonely = tmp_path / "apppot_start.py"
    lonely.write_bytes((TOP / "apppot_start.py").read_bytes())
    words = [sys.executable, lonely, "--doctor", "--boot"]
    result = subprocess.run(words, cwd=tmp_path, env={"PATH": "/nowhere"}, capture_output=True)
    findings = read_findings(result)
    assert set(list(findings)[:4]) == {"kernel", "image", "agent", "boot"}, "the worst comes first"
    assert sorted(findings) == sorted([*NEEDS, "boot"])
    assert [verdict for verdict, _ in findings.values()].count("fail") == 4

    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "-"]
    assert subprocess.run(closed + words, cwd=tmp_path, env={}).returncode == 125


@pytest.mark.own_kernel
def test_json_has_the_same_in_one_line(node):
    result = node.run("--doctor", "--json", "--mem", "64000G")
    assert (result.returncode, result.stderr, result.stdout.count(b"\n")) == (125, b"", 1)
    told = json.loads(result.stdout)
    assert told["verdict"] == "fail" and told["node"] == os.uname().nodename
    shown = read_findings(node.run("--doctor", "--mem", "64000G"))
    assert [finding["need"] for finding in told["findings"]] == list(shown)
    assert all(finding["what"] in shown[finding["need"]][1] for finding in told["findings"][:2])


@pytest.mark.own_kernel
def test_a_terminal_has_colours_unless_they_are_not_wanted(node):
    for wanted, line in ((None, b"\33[32mok   \33[0m python"), ("1", b"ok    python ")):
        keyboard, tty = os.openpty()
        node.run("--doctor", stdout=tty, env={"TERM": "xterm", "NO_COLOR": wanted})
        assert line in os.read(keyboard, 65536)
        os.close(tty)
        os.close(keyboard)


@pytest.mark.own_kernel
@needs_root  # other users cannot reach every Python
@pytest.mark.parametrize("python", pythons())
def test_every_python_here_runs_it(node, python):
    examine(node, python=pythons()[python])


@pytest.mark.own_kernel
@pytest.mark.parametrize("words", [["--boot"], ["--boot", "true"], ["--doctor", "true"]])
def test_it_takes_no_command(node, words):
    result = node.run(*words)
    assert result.returncode == 125
    assert_error(result, "--boot")


# --- Culprits -------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(
    "options, words", [("noexec", "is mounted noexec"), ("size=90m", "has 90 MiB free")]
)
def test_a_memory_directory_that_is_no_use_is_named(node, kernel, options, words):
    place = f"/tmp/.apppot-{node.mark}"
    env = {"APPPOT_TMPDIR": place}
    wrap = mounted(
        f"for d in /dev/shm {place}; do mkdir -p $d; mount -t tmpfs -o {options} none $d; done"
    )

    try:
        assert_culprit(node, "memory", f"/dev/shm {words}", f"{place} {words}", wrap=wrap, env=env)
        only = mounted(f"mount -t tmpfs -o {options} none /dev/shm")
        verdict, text = examine(node, wrap=only)["memory"]
        assert verdict == "warn" and f"/dev/shm {words}" in text and str(node.scratch) in text
    finally:
        os.rmdir(place)


@needs_root
def test_a_scratch_directory_that_is_full_is_named(node):
    wrap = mounted(f"mount -t tmpfs -o size=1m none {node.scratch}")
    assert_culprit(node, "scratch", f"{node.scratch} has 1 MiB free", wrap=wrap)


def broken_kernel(node, kernel, old, new):
    """A kernel that asks for another file of the same length of name."""
    content = kernel.read_bytes()
    if b"/ld-linux" not in content[:8192]:  # it is linked statically
        dynamic = shutil.which("linux.uml")
        require(dynamic, "no kernel with shared libraries: apt-get install user-mode-linux")
        content = pathlib.Path(dynamic).read_bytes()

    path = node.root / "broken"
    path.write_bytes(content.replace(old, new))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "old, new, named",
    [
        (b"\0libc.so.6\0", b"\0libq.so.6\0", "libq.so.6"),
        (
            b"/lib64/ld-linux-x86-64.so.2\0",
            b"/lib64/ld-absent-x86-64.so.2\0"[:27] + b"\0",
            "/lib64/ld-absent",
        ),
        (b"\0GLIBC_2.2.5\0", b"\0GLIBC_9.9.9\0", "GLIBC_9.9.9"),
    ],
)
def test_a_kernel_with_a_missing_shared_library_is_named(any_node, kernel, old, new, named):
    path = broken_kernel(any_node, kernel, old, new)
    # The loader compares versions by their hash (elf_gnu_hash in glibc's dl-hash.h).
    if b"GLIBC" in old:
        content = path.read_bytes()
        path.write_bytes(content.replace(elf_hash(b"GLIBC_2.2.5"), elf_hash(b"GLIBC_9.9.9")))

    assert_culprit(
        any_node, "kernel", "shared library", named, path, options=["--kernel", str(path)]
    )


def elf_hash(name):
    value = 0
    for byte in name:
        value = (value << 4) + byte
        value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
    return struct.pack("<I", value)


@pytest.mark.parametrize("program", ["/bin/true", "/bin/cat"])
def test_a_kernel_that_is_none_is_named(node, program):
    verdict, text = examine(node, "--kernel", program)["kernel"]
    assert verdict == "fail" and program in text and "User-Mode Linux" in text


@pytest.mark.own_kernel
@pytest.mark.parametrize("missing", ["/usr/sbin/apppot-init", apppot_start.AGENT_MODULE])
def test_an_image_without_the_agent_is_named(node, image, missing):
    own = writable_copy(node, image)
    change_image(own, f"rm {missing}\n")
    name = "/sbin/apppot-init" if "sbin" in missing else missing
    findings = assert_culprit(node, "agent", f"no agent ({name})", own, image=own)
    assert own.name in findings["image"][1]
    booted = examine(node, "--boot", image=own)["boot"]
    assert booted[0] == "fail" and f"no agent ({name})" in booted[1]


@pytest.mark.own_kernel
def test_an_image_without_the_agent_s_python_is_named(node, image):
    own = writable_copy(node, image)
    replace_agent(node, own, "#!/opt/python3 -IS\n")
    verdict, text = examine(node, image=own)["agent"]
    assert verdict == "fail" and "/opt/python3" in text and str(own) in text


DENY = r"""
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
words = [(0x20, 0, 0, 0), (0x15, 0, 1, 101), (0x06, 0, 0, int(sys.argv[1], 16)), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *word) for word in words))
program = ctypes.create_string_buffer(struct.pack("@HP", len(words), ctypes.addressof(code)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
os.execv(sys.argv[2], sys.argv[2:])
"""  # ptrace is system call 101; PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP


@pytest.mark.parametrize(
    "action", ["00050001", "80000000", "00030000"], ids=["errno", "kill", "trap"]
)
def test_ptrace_forbidden_by_a_seccomp_filter_is_named(any_node, kernel, action):
    wrap = (
        sys.executable if any_node.uid == os.getuid() else "/usr/bin/python3", "-c", DENY, action,
    )
    more = {"wrap": wrap, "python": "/usr/bin/python3"}
    findings = assert_culprit(
        any_node, "ptrace", "ptrace", "seccomp filter", options=["--ptrace"], **more
    )

    has_seccomp_mode = apppot_start.read_features(str(kernel)).seccomp_mode
    assert ("leave out --ptrace" in findings["ptrace"][1]) == has_seccomp_mode

    if has_seccomp_mode and action == "00050001":
        assert examine(any_node, **more)["ptrace"][0] == "ok"
        assert any_node.run("true", **more).returncode == 0


@pytest.mark.own_kernel
def test_a_node_that_forbids_ptrace_and_seccomp_is_told_of_both(node):
    """The filter also refuses seccomp(2) and prctl(PR_SET_SECCOMP)."""
    both = "(0x15, 4, 0, 101), (0x15, 3, 0, 317), (0x15, 0, 3, 157), (0x20, 0, 0, 16), (0x15, 0, 1, 22)"
    wrap = (sys.executable, "-c", DENY.replace("(0x15, 0, 1, 101)", both), "00050001")
    assert_culprit(node, "ptrace", "ptrace and seccomp are both forbidden by a seccomp filter", wrap=wrap)


def test_ptrace_forbidden_by_yama_is_named(monkeypatch):
    """A stand-in for the file of a kernel with Yama, which this kernel may lack. ptrace is refused."""
    files = {"/proc/sys/kernel/yama/ptrace_scope": "3\n"}
    monkeypatch.setattr(apppot_start, "read_node_file", lambda path: files.get(path, ""))
    monkeypatch.setattr(apppot_start, "try_ptrace", lambda: os.kill(1 << 30, 0))  # ESRCH
    assert "Yama (kernel.yama.ptrace_scope=3)" in apppot_start.explain_ptrace(None).message


def test_a_probe_that_works_leaves_no_child():
    assert apppot_start.explain_ptrace(None) is None
    assert apppot_start.try_in_child(apppot_start.try_seccomp) == ""
    assert apppot_start.try_in_child(lambda: os.stat("/nothing")) == "No such file or directory"
    assert apppot_start.try_in_child(lambda: os.kill(os.getpid(), 31)) == "signal 31"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize(
    "limits, words",
    [("-n 20", "open files"), ("-v 900000", "address space"), ("-f 500000", "file size")],
)
def test_limits_that_leave_no_room_are_named(any_node, limits, words):
    wrap = limited(limits)
    assert_culprit(any_node, "limits", words, wrap=wrap, python="/usr/bin/python3")


def test_a_soft_limit_of_open_files_is_raised(node):
    wrap = limited("-Sn 12")
    assert node.run("echo", "up", wrap=wrap, python="/usr/bin/python3").stdout == b"up\n"


def test_too_few_processes_are_named(user_node):
    wrap = limited("-u 3")
    result = user_node.run("true", wrap=wrap, python="/usr/bin/python3")
    assert result.returncode == 125
    assert_error(result, "ulimit -u")


def test_a_caller_that_ignores_the_end_of_children_is_no_matter(node):
    ignore = (
        "import os, signal, sys; signal.signal(17, signal.SIG_IGN); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    result = node.run("--doctor", "--boot", wrap=(sys.executable, "-c", ignore))
    assert "fail" not in {verdict for verdict, _ in read_findings(result).values()}


@pytest.mark.own_kernel
def test_helpers_are_found_beside_the_runner(node):
    (node.root / "slirp4netns").symlink_to(shutil.which("slirp4netns"))
    (node.root / "empty").symlink_to(EMPTY)
    findings = examine(node)
    assert findings["network"] == ("ok", "network by " + str(node.root / "slirp4netns"))
    assert findings["empty"] == ("ok", str(node.root / "empty"))


# --- Grants ---------------------------------------------------------------------------------------


def guest_mib(result):
    """What the guest calls its memory; the kernel keeps some MiB for itself."""
    return int(re.search(rb"MemTotal:\s+(\d+)", result.stdout)[1]) / 1024


def test_a_batch_system_s_memory_is_the_guest_s(any_node):
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "300", "SLURM_CPUS_ON_NODE": "2",
        "SLURM_NODEID": "what",
    }
    result = any_node.run("-v", "cat", "/proc/meminfo", env=slurm)
    expected = 600 - 64 - 600 // 32
    assert expected - 32 < guest_mib(result) <= expected

    said = result.stderr.decode()
    assert f"memory {expected} MiB in " in said
    assert "SLURM_MEM_PER_CPU=300 times SLURM_CPUS_ON_NODE=2 less overhead" in said

    findings = examine(any_node, env=slurm)
    assert (
        f"{expected} MiB" in findings["memory"][1]
        and "SLURM_MEM_PER_CPU=300" in findings["batch"][1]
    )

    for options, env in ((["--mem", "200"], slurm), ([], {**slurm, "APPPOT_MEM": "200"})):
        assert 150 < guest_mib(any_node.run(*options, "cat", "/proc/meminfo", env=env)) <= 200


def test_a_malformed_grant_is_ignored_and_told(node):
    env = {
        "SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "lots\n", "SLURM_CPUS_PER_TASK": "0",
        "NSLOTS": "-4",
    }
    result = node.run("-v", "cat", "/proc/meminfo", env=env)
    assert 900 < guest_mib(result) <= 1024
    assert b"SLURM_MEM_PER_NODE=lots ignored" in result.stderr

    verdict, text = examine(node, env=env)["batch"]
    assert verdict == "warn" and "Slurm" in text and "NSLOTS=-4 ignored" in text


@needs_root
@pytest.mark.parametrize("size, least, most", [(1400, 1200, 1400), (400, 330, 400)])
def test_a_grant_larger_than_the_memory_directory_is_not_used_up(node, kernel, size, least, most):
    wrap = mounted(
        f"for d in /dev/shm {node.scratch}; do mount -t tmpfs -o size={size}m none $d; done"
    )

    result = node.run("-v", "cat", "/proc/meminfo", env={"SLURM_MEM_PER_NODE": "4096"}, wrap=wrap)
    assert least - 32 < guest_mib(result) <= most and b"room in /dev/shm" in result.stderr
    assert (
        "room in /dev/shm"
        in examine(node, env={"SLURM_MEM_PER_NODE": "4096"}, wrap=wrap)["memory"][1]
    )


@pytest.fixture
def memory_cgroup():
    """A memory cgroup of version 1 or 2: a directory and its file for the limit."""
    places = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))
    for parent, name in places:
        group = pathlib.Path(parent, f"apppot-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / name).exists():
            yield group, group / name
            group.rmdir()
            return
        group.rmdir()
    require(False, "no memory cgroup can be made here")


def into(group):
    return ("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "-")


FILL = """
import os
free = [int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable")][0]
with open("/dev/shm/fill", "wb") as file:
    for _ in range(max(free - 8192, 0) >> 10):
        file.write(bytes(1 << 20))
print(open("/proc/meminfo").read())
"""


@pytest.mark.parametrize("limit_mib", [300, 800])
def test_a_cgroup_s_limit_lowers_the_default_and_the_guest_can_use_all_it_gets(
    node, memory_cgroup, limit_mib
):
    group, limit = memory_cgroup
    limit.write_text(str(limit_mib << 20))
    expected = limit_mib - 64 - limit_mib // 32
    script = f"mount -o remount,size=100% /dev/shm; exec python3 -c '{FILL}'"

    result = node.run("-v", "--root", "sh", "-c", script, wrap=into(group))
    assert result.returncode == 0, result.stderr
    assert expected - 32 < guest_mib(result) <= expected
    assert f"cgroup's {limit.name} less overhead".encode() in result.stderr

    peak = group / "memory.max_usage_in_bytes"
    if peak.exists():
        assert expected - 40 < int(peak.read_text()) >> 20 <= limit_mib


def test_a_cgroup_s_limit_above_the_default_changes_nothing_outside_of_a_job(node, memory_cgroup):
    group, limit = memory_cgroup
    limit.write_text(str(3000 << 20))
    assert "1.0 GiB" in examine(node, wrap=into(group))["memory"][1]
    assert "2.8 GiB" in examine(node, wrap=into(group), env={"PBS_JOBID": "1"})["memory"][1]


def test_cpus_that_the_kernel_cannot_have_are_a_warning(node, kernel):
    lacking, reason = (
        (["--ptrace"], b"--ptrace") if kernel_has(kernel, "CONFIG_SMP") else ([], b"SMP")
    )

    for options, env in ((["--cpus", "4"], {}), ([], {"APPPOT_CPUS": "4"})):
        result = node.run(*options, *lacking, "nproc", env=env)
        assert (result.returncode, result.stdout) == (0, b"1\n")
        assert re.fullmatch(rb"apppot: warning: [^\n]*=4 [^\n]*%s[^\n]*\n" % reason, result.stderr)

    verdict, said = examine(node, "--cpus", "4", *lacking)["cpus"]
    cure = "leave out --ptrace" if lacking else "use a kernel with CONFIG_SMP"
    assert verdict == "warn" and said.endswith(cure)

    quiet = node.run(*lacking, "nproc", env={"SLURM_CPUS_PER_TASK": "2"})
    assert (quiet.stdout, quiet.stderr) == (b"1\n", b"")

    pinned = ("taskset", "-c", "0-1")
    told = node.run(*lacking, "-v", "true", env={"SLURM_CPUS_PER_TASK": "2"}, wrap=pinned).stderr
    assert b"SLURM_CPUS_PER_TASK=2" in told


@pytest.mark.own_kernel
@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", " ", "10000"])
def test_a_wrong_number_of_cpus_is_refused(node, number):
    by_option = node.run("--cpus=" + number, "true")
    by_variable = node.run("true", env={"APPPOT_CPUS": number})

    for result, name in ((by_option, "--cpus"), (by_variable, "APPPOT_CPUS")):
        assert (result.returncode, result.stdout) == (125, b"")
        assert_error(result, name, number)
