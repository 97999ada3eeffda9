# SPDX-License-Identifier: Apache-2.0
"""The runner's pure parts, its options, and what it refuses before anything is started."""

import ast
import gzip
import inspect
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tokenize
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodes import TOP, assert_error, kernel_has, read_patches, read_version
from test_init import GUEST, SPEC

import apppot_init
import apppot_start

WORDS = st.lists(st.binary(max_size=20).filter(lambda word: b"\0" not in word).map(os.fsdecode))


# --- Values ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300))), st.data())
def test_frames_survive_any_split(frames, data):
    stream = b"".join(apppot_start.encode_frame(kind, payload) for kind, payload in frames)
    received, decoded = bytearray(), []

    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += stream[:size]
        stream = stream[size:]
        decoded += apppot_start.decode_frames(received)
    assert decoded == frames and not received


def test_a_frame_too_long_is_no_frame():
    with pytest.raises(ValueError):
        apppot_start.decode_frames(bytearray(struct.pack("<BI", 2, apppot_start.FRAME_MAX + 1)))


def test_deadlines_that_are_over_at_once_are_met_once(monkeypatch):
    """As after a long stop: the walltime's SIGTERM is the second, and so kills, as the first's does."""
    clock = [0.0]
    posted = []
    monkeypatch.setattr(apppot_start.time, "monotonic", lambda: clock[0])
    channel = SimpleNamespace(post=lambda kind, payload: posted.append(payload[0]))
    ending = apppot_start.Ending(channel, SPEC._replace(timeout_s=20.0, kill_after_s=10.0))
    ending.note_start()
    ending.forward(signal.SIGTERM)

    clock[0] = 60.0
    ending.review()
    assert posted == [signal.SIGTERM, signal.SIGKILL] and ending.is_time_over


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"arg", b"env", b"cwd"]),
            st.binary().filter(lambda value: b"\0" not in value),
        )
    )
)
def test_fields_survive(fields):
    decoded = apppot_init.decode_fields(apppot_start.encode_fields(fields))
    assert decoded == {
        name: [value for other, value in fields if other == name]
        for name in {name for name, _ in fields}
    }


def read_shared(program):
    """The section of a program that crosses host and guest."""
    text = (TOP / program).read_text()
    return text[text.index("# --- What crosses host and guest") :].partition("\n# --- ")[0]


def test_host_and_guest_speak_the_same():
    shared = read_shared("apppot_start.py")
    assert (
        shared == read_shared("apppot_init.py") and "PROTOCOL = " in shared and "MODES = " in shared
    )
    assert apppot_start.VERSION == apppot_init.VERSION

    for name in ("encode_fields", "decode_fields"):
        assert inspect.getsource(getattr(apppot_start, name)) == inspect.getsource(
            getattr(apppot_init, name)
        )


@given(WORDS)
def test_any_command_survives_the_options(command):
    options, rest = apppot_start.build_parser().split(
        ["-v", "--mem", "1G", "--image=x", "--", *command]
    )
    assert (options, rest) == (["-v", "--mem", "1G", "--image=x"], tuple(command))

    if command and not command[0].startswith("-"):
        assert apppot_start.build_parser().split(["--env", "A", *command]) == (
            ["--env", "A"],
            tuple(command),
        )


@pytest.mark.parametrize(
    "text, mib",
    [("512", 512), ("512M", 512), ("1.5g", 1536), ("2GiB", 2048), ("1T", 1 << 20), ("2048K", 2)],
)
def test_sizes_are_mib(text, mib):
    assert apppot_start.parse_size_mib(text, "--mem") == mib


@pytest.mark.parametrize(
    "text, seconds", [("90", 90), ("1.5", 1.5), ("10m", 600), ("2h", 7200), ("1d", 86400)]
)
def test_times_are_seconds(text, seconds):
    assert apppot_start.parse_seconds(text, "--timeout") == seconds


def test_the_batch_system_s_variables_pass_and_others_do_not():
    passed = "SLURM_JOB_ID PBS_JOBID SGE_TASK_ID JOB_ID _CONDOR_SLOT OMP_NUM_THREADS TERM LANG LC_ALL TZ NSLOTS".split()
    passed += ["OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
    kept = "PATH HOME LD_LIBRARY_PATH PYTHONPATH SSH_AUTH_SOCK XSLURM_A TERMINAL".split()

    caller = {name.encode(): b"v" for name in passed + kept}
    assert apppot_start.select_environment(caller, [], False) == {
        name.encode(): b"v" for name in passed
    }
    assert apppot_start.select_environment(caller, ["HOME", "A=b=c", "NONE"], True) == {
        b"HOME": b"v",
        b"A": b"b=c",
    }


def test_an_account_is_found_by_name_and_number():
    table = b"root:x:0:0::/root:/bin/sh\nold:x:7:7::/:/bin/sh\nnew:x:9:9::/:/bin/sh\n"
    changed = apppot_init.put_account(table, b"new", 7, b"new:*:7:7::/home/new:/bin/sh")
    lines = table.splitlines(True)
    assert changed.splitlines(True) == [lines[0], b"new:*:7:7::/home/new:/bin/sh\n", *lines[1:]]
    assert apppot_init.find_account(changed, b"new")[5] == b"/home/new"
    assert apppot_init.find_account(changed, b"none") is None


@pytest.mark.parametrize(
    "entry, name, job, alias, home",
    [
        (None, b"ann", b"/scratch/1", b"", b"/home/ann"),
        (None, b"ann", b"/home/ann", b"", b"/var/lib/apppot/home/ann"),
        (None, b"ann", b"/home", b"", b"/var/lib/apppot/home/ann"),
        (None, b"ann", b"/home/ann/job", b"", b"/home/ann"),
        (None, b"ann", b"/home/ann/job/sub", b"", b"/var/lib/apppot/home/ann"),
        (None, b"ann", b"/scratch/1", b"/home/ann/job/1", b"/var/lib/apppot/home/ann"),
        (None, b"ann", b"/home/ann/jobs/sub", b"/home/ann/job", b"/home/ann"),
        (None, b"root", b"/root", b"", b"/var/lib/apppot/home/root"),
        (b"/nonexistent", b"nobody", b"/j", b"", b"/home/nobody"),
        (b"/home/team/ann", b"ann", b"/j", b"", b"/home/team/ann"),
        (b"/home", b"ann", b"/j", b"", b"/home/ann"),
        (b"/home/../usr/sbin", b"ann", b"/j", b"", b"/home/ann"),
    ],
)
def test_the_home_directory_is_never_the_job_directory_nor_another_s(entry, name, job, alias, home):
    table = b"" if entry is None else b"%s:*:4242:1::%s:/bin/sh\n" % (name, entry)
    caller = apppot_init.Caller(name, 0 if name == b"root" else 4242, (), b"", False)
    asked = SimpleNamespace(caller=caller, job_directory=job, job_alias=alias or job)
    assert apppot_init.choose_home(asked, table) == home


# --- What the job was granted ---------------------------------------------------------------------

CGROUP_1 = {
    "/proc/self/cgroup": (
        "9:name=systemd:/\n4:memory:/slurm/job_7/step_0\n1:cpu,cpuacct:/slurm/job_7\n0::/\n"
    ),
    "/proc/self/mountinfo": (
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    ),
    "/sys/fs/cgroup/memory/slurm/job_7/step_0/memory.limit_in_bytes": "9223372036854771712\n",
    "/sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "4294967296\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "/sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs_quota_us": "350000\n",
    "/sys/fs/cgroup/cpu/slurm/job_7/cpu.cfs_period_us": "100000\n",
    "/sys/fs/cgroup/cpu/slurm/cpu.cfs_quota_us": "-1\n",
    "/sys/fs/cgroup/cpu/slurm/cpu.cfs_period_us": "100000\n",
}
CGROUP_2 = {
    "/proc/self/cgroup": "0::/user.slice/job.scope\n",
    "/proc/self/mountinfo": (
        "24 23 0:25 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    ),
    "/sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
    "/sys/fs/cgroup/user.slice/job.scope/memory.high": "2147483648\n",
    "/sys/fs/cgroup/user.slice/memory.max": "3221225472\n",
    "/sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
    "/sys/fs/cgroup/user.slice/cpu.max": "50000 100000\n",
}
CONTAINER = {
    "/proc/self/cgroup": "0::/docker/abc\n",
    "/proc/self/mountinfo": "24 23 0:25 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup ro\n",
    "/sys/fs/cgroup/memory.max": "536870912\n",
}
WORDS_OF_UML = ("uml", "hostfs", "ubd", "mconsole", "ptrace", "seccomp")
MACHINE_AD = 'Name = "slot1_1@vm"\nTotalMemory = 99999\nMemory = 2048\nCpus = 3\nTotalCpus = 9.0\n'


def find_grants(environment, files, machine_mib=65536):
    return apppot_start.find_grants(environment, lambda path: files.get(path, ""), machine_mib)


@pytest.mark.parametrize(
    "variables, limit, wanted",
    [
        ({"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "200"}, 200, 200),
        (
            {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "200"},
            220,
            220,
        ),  # as AllowedRAMSpace=110 has it
        ({"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "200"}, 4000, None),  # that of others, too
        ({"SLURM_JOB_ID": "1"}, 200, None),
        ({}, 200, None),
    ],
)
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_the_limit_of_a_job_is_told_from_others(variables, limit, wanted, name):
    files = {"/proc/self/cgroup": "0::/a\n", "/proc/self/mountinfo": "1 1 0:1 / /c rw - cgroup2 none rw\n",
             "/c/a/" + name: str(limit << 20)}  # fmt: skip
    assert apppot_start.find_job_limit(find_grants(variables, files)) == (
        wanted if name == "memory.max" else None
    )


@pytest.mark.parametrize(
    "environment, system, mem, cpus",
    [
        ({"SLURM_JOB_ID": "1"}, "Slurm", [], []),
        ({"SLURM_MEM_PER_NODE": "4096", "SLURM_CPUS_ON_NODE": "4"}, "Slurm", [4096], [4]),
        ({"SLURM_MEM_PER_NODE": "4G"}, "Slurm", [4096], []),
        (
            {"SLURM_MEM_PER_CPU": "1000", "SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "8"},
            "Slurm", [2000], [2],
        ),
        # A variable that does not count is not complained about.
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "many"}, "Slurm", [], [2]),
        (
            {"SLURM_MEM_PER_CPU": "1000", "SLURM_JOB_CPUS_PER_NODE": "16(x2),8"}, "Slurm", [16000],
            [16],
        ),
        ({"SLURM_JOB_CPUS_PER_NODE": "16(x2),8", "SLURM_NODEID": "2"}, "Slurm", [], [8]),
        (
            {
                "SLURM_MEM_PER_NODE": "4096",
                "SLURM_CPUS_ON_NODE": "6",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
                "SLURM_NODEID": "1",
            },
            "Slurm",
            [2048],
            [3],
        ),
        ({"PBS_JOBID": "1.vm", "NCPUS": "4"}, "PBS", [], [4]),
        ({"NCPUS": "4"}, "", [], []),
        ({"PBS_NUM_PPN": "2", "PBS_RESC_MEM": "8589934592"}, "PBS", [8192], [2]),
        ({"PBS_NCPUS": "2", "PBS_RESC_MEM": "8gb"}, "PBS", [8192], [2]),
        ({"NSLOTS": "8", "NHOSTS": "2"}, "Grid Engine", [], [4]),
        (
            {"SGE_TASK_ID": "undefined", "NSLOTS": "2", "SGE_HGR_m_mem_free": "1.500G"},
            "Grid Engine", [3072], [2],
        ),
        ({"_CONDOR_MACHINE_AD": "/scratch/.machine.ad"}, "HTCondor", [2048], [3]),
        ({"_CONDOR_SLOT": "slot1"}, "HTCondor", [], []),
        ({"SLURM_CONF": "/etc/slurm.conf", "SGE_ROOT": "/sge", "HOME": "/"}, "", [], []),
    ],
)
def test_what_a_batch_system_grants_is_read(environment, system, mem, cpus):
    grants = find_grants(environment, {"/scratch/.machine.ad": MACHINE_AD})
    assert " ".join(grants.systems) == system and not grants.notes
    assert [amount.value for amount in grants.mem] == mem
    assert [amount.value for amount in grants.cpus] == cpus
    assert all("=" in amount.source for amount in grants.mem + grants.cpus)


def test_the_least_of_nested_grants_counts():
    environment = {
        "SLURM_MEM_PER_NODE": "64000", "SLURM_CPUS_ON_NODE": "32", "_CONDOR_MACHINE_AD": "ad",
    }

    grants = find_grants(environment, {"ad": MACHINE_AD, **CGROUP_2})
    assert grants.systems == ("Slurm", "HTCondor")
    assert apppot_start.default_mem(grants) == (
        2048 - 64 - 64,
        "HTCondor's Memory=2048 less overhead",
    )
    assert apppot_start.choose_cpus(None, grants) == (1, "cgroup's cpu.max")


@pytest.mark.parametrize(
    "files, mem, cpus",
    [(CGROUP_1, [4096], [3]), (CGROUP_2, [3072, 2048], [1]), (CONTAINER, [512], []), ({}, [], [])],
)
def test_cgroup_limits_are_found_up_to_the_root(files, mem, cpus):
    grants = find_grants({}, files)
    assert [amount.value for amount in grants.mem_limits] == mem
    assert [amount.value for amount in grants.cpu_limits] == cpus


@pytest.mark.parametrize(
    "environment, files, machine_mib, mem",
    [
        ({}, {}, 65536, 1024),
        ({}, CGROUP_1, 65536, 1024),  # nobody granted it to a job
        ({"PBS_JOBID": "1"}, CGROUP_1, 65536, 4096 - 64 - 128),
        ({"PBS_JOBID": "1"}, {}, 65536, 1024),
        ({}, CONTAINER, 65536, 512 - 64 - 16),
        ({}, {}, 800, 800 - 64 - 25),
        ({"SLURM_MEM_PER_NODE": "512"}, {}, 65536, 512 - 64 - 16),
        ({"SLURM_MEM_PER_NODE": "8192"}, CGROUP_1, 65536, 4096 - 64 - 128),
        ({"SLURM_MEM_PER_NODE": "999999"}, {}, 65536, 65536 - 64 - 2048),
        ({"SLURM_MEM_PER_NODE": "70"}, {}, 65536, 64),
    ],
)
def test_the_guest_s_memory_leaves_room_in_the_least_limit(environment, files, machine_mib, mem):
    assert apppot_start.default_mem(find_grants(environment, files, machine_mib)).value == mem


def test_nothing_but_its_own_sections_knows_user_mode_linux():
    """A second VMM then has one place: what the seam and the choice of a VMM name is all that others know."""
    known = set()
    section = ""
    with open(TOP / "apppot_start.py", "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.string.startswith("# --- "):
                section = token.string
            elif token.type == tokenize.NAME and "User-Mode Linux" not in section:
                known |= {token.string for word in WORDS_OF_UML if word in token.string.lower()}
    assert known == {
        "Uml", "find_uml", "ptrace", "examine_ptrace", "examine_seccomp",
    }


def test_the_seam_is_all_that_a_vmm_must_have():
    for seam, uml in (("Vmm", "Uml"), ("Console", "UmlConsole"), ("Watch", "UmlWatch")):
        methods = inspect.getmembers(getattr(apppot_start, seam), inspect.isfunction)
        missing = [name for name, method in methods if "NotImplementedError" in inspect.getsource(method)]
        assert missing and set(missing) <= set(vars(getattr(apppot_start, uml)))


def test_how_system_calls_are_trapped_is_chosen_and_extra_overrides():
    def build(mode, cpus, *extra):
        return apppot_start.build_cpu_args(mode, GUEST._replace(cpus=cpus, extra=extra))

    assert build("auto", 2) == ["seccomp=auto", "ncpus=2"] and build("off", 1) == ["seccomp=off"]
    assert build("auto", 2, "seccomp=on") == ["ncpus=2"] and build(None, 1) == []


def test_a_kernel_file_says_what_the_kernel_does(kernel):
    *has, any_areas, has_seccomp_mode, needs_modules = apppot_start.read_features(str(kernel))
    assert any_areas == ("empty-stub" in read_patches(kernel))
    settings = [setting.decode().partition("=")[0] for _, setting in apppot_start.FEATURE_SETTINGS[:-1]]
    values = ["ym" if setting == "CONFIG_VIRTIO_FS" else "y" for setting in settings]
    assert has == [kernel_has(kernel, *pair) for pair in zip(settings, values)]
    version = "{}.{}.".format(*read_version(kernel))
    assert (needs_modules is not None) == kernel_has(kernel, "CONFIG_VIRTIO_FS", "m")
    assert needs_modules is None or needs_modules.startswith(version)
    helped = subprocess.run([kernel, "--help"], stdout=subprocess.PIPE, text=True).stdout
    assert has_seccomp_mode == ("seccomp=<" in helped)


@pytest.mark.parametrize("mark", [apppot_start.CONFIG_MARK, b""])
@pytest.mark.parametrize("is_behind", [True, False])
def test_a_feature_is_found_wherever_the_configuration_stands(tmp_path, mark, is_behind):
    settings = b"\0".join(setting for _, setting in apppot_start.FEATURE_SETTINGS)
    parts = [mark + bytes(8), settings] if is_behind else [settings + bytes(8), mark]
    path = tmp_path / "linux"
    path.write_bytes(bytes(1 << 20) + b"".join(parts) + bytes(1 << 20) + apppot_start.SECCOMP_HELP)
    assert all(apppot_start.read_features(str(path))[:-1])
    path.write_bytes(bytes(1 << 20) + mark)
    assert not any(apppot_start.read_features(str(path)))


VARIABLES = (
    "SLURM_JOB_ID SLURM_NODEID SLURM_MEM_PER_NODE SLURM_MEM_PER_CPU SLURM_CPUS_PER_TASK "
    "SLURM_CPUS_ON_NODE NCPUS "
    "SLURM_JOB_CPUS_PER_NODE SLURM_STEP_TASKS_PER_NODE PBS_JOBID PBS_NUM_PPN PBS_NCPUS "
    "PBS_RESC_MEM NSLOTS NHOSTS "
    "SGE_HGR_m_mem_free SGE_HGR_h_vmem _CONDOR_MACHINE_AD"
).split()
TEXTS = (
    st.text()
    | st.sampled_from(
        ["0", "-1", "1e3", "٣", "²", "9" * 5000, "4(x0)", "(x2)", "16(x2),8", "4096", "2G", "1.5.2"]
    )
    | st.integers(0, 99999).map(str)
)


@given(
    st.dictionaries(st.sampled_from(VARIABLES), TEXTS),
    st.dictionaries(st.sampled_from([*CGROUP_1, *CGROUP_2]), TEXTS),
    TEXTS,
)
def test_no_value_of_a_variable_or_a_file_is_an_error(environment, files, machine_ad):
    files = {**CGROUP_1, **files, environment.get("_CONDOR_MACHINE_AD"): "Memory = " + machine_ad}
    grants = find_grants(environment, files)
    mem = apppot_start.default_mem(grants)
    assert 64 <= mem.value <= 65536 and mem.source
    assert apppot_start.choose_cpus(None, grants).value >= 1


# --- Images ---------------------------------------------------------------------------------------


@pytest.fixture
def ext4(tmp_path):
    path = tmp_path / "small.img"
    subprocess.run(
        [
            "/sbin/mke2fs", "-q", "-t", "ext4", "-U", "12345678-1234-1234-1234-123456789abc", path,
            "4M",
        ],
        check=True,
    )
    return path


def test_a_partition_image_is_its_own_root(ext4):
    root = apppot_start.find_root_device(str(ext4))
    assert root == (0, "12345678-1234-1234-1234-123456789abc", 0, ext4.stat().st_size)


@pytest.mark.parametrize(
    "table, number",
    [
        ("label: dos\nstart=2048,size=4096,type=c\nstart=8192,size=8192,type=83", 2),
        (
            "label: dos\nstart=2048,size=4096,type=83\nstart=6144,size=12288,type=5\nstart=8192,size=8192,type=83",
            5,
        ),
        (
            "label: dos\nstart=2048,size=16384,type=f\nstart=4096,size=1024,type=83\nstart=8192,size=8192,type=83",
            6,
        ),
        ("label: gpt\nstart=2048,size=4096,type=uefi\nstart=8192,size=8192,type=linux", 2),
        ("label: gpt\nstart=8192,size=8192,type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", 1),
    ],
)
def test_the_linux_partition_of_a_disk_is_found(tmp_path, ext4, table, number):
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"")
    os.truncate(disk, 12 << 20)
    subprocess.run(["/sbin/sfdisk", "-q", disk], input=table.encode(), check=True)
    with open(disk, "r+b") as file:
        file.seek(8192 * 512)
        file.write(ext4.read_bytes())
    assert apppot_start.find_root_device(str(disk)).partition == number


def bad_images(directory, ext4):
    """Name, content and a word of the error."""
    whole = ext4.read_bytes()
    yield "empty", b"", "empty"
    yield "truncated", whole[: 1 << 20], "truncated"
    yield "zeros", bytes(1 << 20), "no ext4"
    yield "text", b"hello\n", "no ext4"
    yield "gzipped", gzip.compress(whole), "gzip"
    yield "qcow2", b"QFI\xfb" + bytes(5000), "qcow2"
    yield "sif", b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0" + bytes(5000), "Apptainer"
    yield "tar", bytes(257) + b"ustar" + bytes(5000), "tar archive"
    yield "lz4", b"\x04\x22\x4d\x18" + bytes(5000), "lz4"
    yield "program", pathlib.Path(sys.executable).resolve().read_bytes()[:5000], "program"
    yield (
        "disk",
        bytes(446)
        + b"\0\0\0\0\x83\0\0\0"
        + struct.pack("<II", 1, 9)
        + bytes(48)
        + b"\x55\xaa"
        + bytes(9000),
        "partition",
    )
    yield (
        "circle",
        bytes(446)
        + b"\0\0\0\0\x05\0\0\0"
        + struct.pack("<II", 0, 9)
        + bytes(48)
        + b"\x55\xaa"
        + bytes(9000),
        "ext4",
    )
    yield "gpt", bytes(512) + b"EFI PART" + b"\xff" * 9000, "ext4"


def run_runner(*words, **options):
    return subprocess.run(
        [sys.executable, TOP / "apppot_start.py", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60,
        **options,
    )


def test_an_image_that_is_none_is_refused_by_name(tmp_path, ext4):
    for name, content, word in bad_images(tmp_path, ext4):
        path = tmp_path / name
        path.write_bytes(content)
        result = run_runner("--image", path, "true")
        assert result.returncode == 125, name
        assert_error(result, word, path)

    for path in (tmp_path / "missing", tmp_path):
        result = run_runner("--image", path, "true")
        assert result.returncode == 125
        assert_error(result, path)


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    """Small images of every kind with a real file system in them, as bytes."""
    place = tmp_path_factory.mktemp("disks")
    (place / "fs").touch(), (place / "table").touch()
    subprocess.run(
        ["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", place / "fs", "512k"], check=True
    )
    found = [(place / "fs").read_bytes()]

    for table in (
        "label: dos\nstart=256,type=5\nstart=512,size=1100,type=83",
        "label: gpt\nstart=512,size=1100",
    ):
        os.truncate(place / "table", 0)
        os.truncate(place / "table", 1 << 20)
        subprocess.run(["/sbin/sfdisk", "-q", place / "table"], input=table.encode(), check=True)
        content = bytearray((place / "table").read_bytes())
        content[512 * 512 : 512 * 512 + len(found[0])] = found[0]
        found.append(bytes(content))
    return found


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from([0, 446, 512, 1024, 256 * 512 + 446, 512 * 512 + 1024]),
        st.integers(0, 200),
        st.sampled_from([b"\xff", b"\0", b"\x80", b"\x01"]) | st.binary(min_size=1, max_size=1),
        st.integers(1, 8),
    ),
    max_size=6,
)


@given(st.integers(0, 2), DAMAGE, st.integers(0, 1 << 19))
def test_a_damaged_image_is_read_or_refused_and_nothing_else(
    disks, tmp_path_factory, kind, damage, cut
):
    content = bytearray(disks[kind])
    assert (
        apppot_start.find_root_device(write_image(tmp_path_factory, content)).partition
        == (0, 5, 1)[kind]
    )

    for place, offset, byte, count in damage:
        content[place + offset : place + offset + count] = byte * count

    try:
        apppot_start.find_root_device(write_image(tmp_path_factory, content[: len(content) - cut]))
    except apppot_start.Fatal as fatal:
        assert "damaged.img" in fatal.message and fatal.hint and fatal.status == 125


def agent_tree(place):
    for directory in ("usr/sbin", "usr/bin", "usr/lib/apppot"):
        (place / directory).mkdir(parents=True)
    for number in range(700):
        (place / "usr/sbin" / ("x" * 60 + str(number))).touch()
    (place / "sbin").symlink_to("usr/sbin")
    (place / "usr/sbin/apppot-init").write_text("#!/bin/python3 -IS\n'/usr/lib/apppot'")
    (place / "bin").symlink_to("/usr/bin")
    (place / "usr/bin/python3").symlink_to("../../bin/" + "./" * 60 + "python3.11")
    (place / "usr/bin/python3.11").touch()
    (place / "usr/lib/apppot/apppot_init.py").touch()
    return place


@pytest.fixture(scope="module")
def appliances(tmp_path_factory):
    """Images with an agent: extents, 1 KiB blocks, block maps, no 64 bit, small inodes."""
    tree = agent_tree(tmp_path_factory.mktemp("tree"))
    kinds = (
        ["ext4"], ["ext4", "-b", "1024"], ["ext2", "-b", "4096"], ["ext4", "-O", "^64bit"],
        ["ext4", "-I", "128"],
    )
    images = []

    for number, options in enumerate(kinds):
        images.append(tmp_path_factory.getbasetemp() / f"agent{number}.img")
        subprocess.run(
            ["/sbin/mke2fs", "-q", "-F", "-d", tree, "-t", *options, images[-1], "12M"], check=True
        )
    return images


@pytest.mark.parametrize("number", range(5))
def test_the_agent_is_seen_in_an_image_from_outside(appliances, number):
    image = appliances[number]
    assert apppot_start.find_missing_agent(str(image), 0) == ""

    shifted = image.with_suffix(".shifted")
    shifted.write_bytes(bytes(12345) + image.read_bytes())
    assert apppot_start.find_missing_agent(str(shifted), 12345) == ""

    for path, named in (
        ("/usr/bin/python3.11", "/bin/python3"),
        ("/usr/lib/apppot/apppot_init.py", "/usr/lib/apppot/apppot_init.py"),
        ("/usr/sbin/apppot-init", "/sbin/apppot-init"),
    ):
        copy = image.with_suffix(".copy")
        copy.write_bytes(image.read_bytes())
        subprocess.run(
            ["/sbin/debugfs", "-w", "-R", f"rm {path}", copy], check=True, capture_output=True
        )
        assert apppot_start.find_missing_agent(str(copy), 0) == named


@given(st.lists(st.tuples(st.integers(0, 1 << 17), st.binary(min_size=1, max_size=8)), max_size=8))
def test_a_damaged_directory_is_read_or_cannot_be_told(appliances, tmp_path_factory, damage):
    content = bytearray(appliances[1].read_bytes()[: 1 << 20])
    for place, piece in damage:
        content[place : place + len(piece)] = piece
    try:
        apppot_start.find_missing_agent(write_image(tmp_path_factory, content), 0)
    except ValueError:
        pass


def write_image(factory, content):
    path = factory.getbasetemp() / "damaged.img"
    path.write_bytes(content)
    return str(path)


# --- Options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--mem", "0"], "0"),
        (["--mem", "1M"], "1M"),
        (["--mem", "10T"], "10T"),
        (["--mem", "abc"], "abc"),
        (["--mem", "-1"], "--mem"),
        (["--mem"], "--mem"),
        (["--no-such"], "--no-such"),
        (["-Z"], "-Z"),
        (["--timeout", "soon"], "soon"),
        (["--boot-timeout", ""], "--boot-timeout"),
        (["--kill-after", "x"], "x"),
        (["--env", "=x"], "=x"),
        (["--id", "a/b"], "a/b"),
        (["--extra", "two words"], "two words"),
        (["--tmpdir", "/no/such"], "/no/such"),
        (["--write=1"], "--write"),
        (["--image", "no:such"], "such"),
        (["--image", ":x"], ":x"),
        (["--write", "--image", "cow:{}"], "cow"),
        (["--save-changes", ""], "--save-changes"),
        (["--timeout="], "--timeout"),
        (["-B", " "], "-B"),
        (["-X="], "-X"),
        (["--lan", ""], "--lan"),
        (["--save-changes", "--root"], "--root"),
        (["--mem", "--"], "--mem"),
        (["--bind", ":"], ":"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "1e400"], "1e400"),
        (["--timeout", "9" * 400], "--timeout"),
        (["--boot-timeout", "0.0"], "--boot-timeout"),
        (["--mem", "9" * 400], "--mem"),
        (["--mem", "99999999999999999999T"], "--mem"),
        (["--mem", "999999999999999T"], "--mem"),
        (["--disk", "99999999T"], "--disk"),
        (["--cpus", "0"], "--cpus"),
        (["--cpus", "99999"], "--cpus"),
    ],
)
def test_a_wrong_option_is_refused_by_name(image, words, said):
    result = run_runner(
        "--image", image, *[word.format(image) for word in words],
        *(["true"] if len(words) > 1 else []),
    )
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, said)


VALUED = [action for action in apppot_start.build_parser()._actions if action.nargs != 0]


@pytest.mark.parametrize("name", [name for action in VALUED for name in action.option_strings])
def test_an_option_with_an_empty_value_is_named_and_never_counts_as_not_given(name):
    for words in (
        [name, ""], [name + "="], [name, " "], [name + "=\t\n"], ["-v", name, "", "true"],
    ):
        with pytest.raises(apppot_start.Fatal) as caught:
            apppot_start.build_parser().split(words)
        assert caught.value.message.startswith(name + " ") and caught.value.hint
    assert apppot_start.build_parser().split([name + "=239.1.1.1:5", "", "x"])[1] == ("", "x")


@pytest.mark.parametrize("variable", re.findall(r"APPPOT_[A-Z]+", apppot_start.EPILOG))
def test_a_variable_that_is_blank_is_named_and_one_that_is_empty_is_not_set(
    image, kernel, variable
):
    env = {"APPPOT_KERNEL": str(kernel), "APPPOT_IMAGE": str(image)}
    result = run_runner("--dry-run", "true", env={**env, variable: " \t"})
    assert result.returncode == 125
    assert_error(result, variable)
    given = ["--kernel", kernel, "--image", image]
    assert run_runner(*given, "--dry-run", "true", env={variable: ""}).returncode == 0


def test_no_kernel_and_no_image_are_told(tmp_path, image):
    lonely = tmp_path / "apppot_start.py"
    lonely.write_bytes((TOP / "apppot_start.py").read_bytes())

    for words, said in ((["--image", image], "kernel"), ([], "image")):
        result = subprocess.run(
            [sys.executable, lonely, *words, "true"], cwd=tmp_path, env={"PATH": "/nowhere"},
            capture_output=True,
        )
        assert result.returncode == 125
        assert_error(result, "no " + said)
        assert b"`make demo`" in result.stderr


@pytest.mark.parametrize("what, name", [("kernel", "linux"), ("image", "apppot.img")])
def test_kernel_and_image_are_looked_for_in_the_order_that_the_help_gives(
    tmp_path, monkeypatch, what, name
):
    places = ["option", "environment", "script", "script/build", "current", "path"]
    for place in places:
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_bytes(b"\x7fELF")
        (tmp_path / place / name).chmod(0o755)
    variable = f"APPPOT_{what.upper()}"
    monkeypatch.setattr(apppot_start, "__file__", str(tmp_path / "script/apppot_start.py"))
    monkeypatch.setenv(variable, str(tmp_path / "environment" / name))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.chdir(tmp_path / "current")

    def found_in(option=None):
        if what == "kernel":
            found = apppot_start.find_uml(option, False, []).program
        else:
            found = apppot_start.find_image(SimpleNamespace(image=option))[0]
        path = pathlib.Path(found).resolve()
        path.unlink()
        return str(path.parent.relative_to(tmp_path))

    assert [found_in(str(tmp_path / "option" / name)), found_in()] == places[:2]
    monkeypatch.delenv(variable)
    on_path = ["path"] if what == "kernel" else []
    assert [found_in() for _ in ["script", "build", "current", *on_path]] == [
        *places[2:5],
        *on_path,
    ]
    with pytest.raises(apppot_start.Fatal, match=f"no {what} found"):
        found_in()


def test_a_cow_file_of_another_base_is_refused(tmp_path, image):
    cow = tmp_path / "my.cow"
    for content, said in (
        (b"MOOO nonsense", "not a COW file"),
        (struct.pack(">4sIIQIII", b"OOOM", 3, 1, 2, 512, 4096, 0) + bytes(4096), "another base"),
    ):
        cow.write_bytes(content)
        result = run_runner("--image", f"{cow}:{image}", "true")
        assert result.returncode == 125
        assert_error(result, said, cow)


def test_help_and_version_and_dry_run(image, kernel):
    text = run_runner("--help", "all", env={**os.environ, "COLUMNS": "80"}).stdout.decode()
    for action in apppot_start.build_parser()._actions:
        assert all(option in text for option in action.option_strings)
    assert all(
        group in text
        for group in ("\nappliance:", "\ncommand:", "\nrun:", "\ninformation:", "\nexit status:")
    )
    assert "SLURM_" in text and max(map(len, text.splitlines())) <= 80
    assert run_runner("-V").stdout.decode() == f"AppPot {apppot_start.VERSION}\n"

    line = run_runner(
        "--dry-run", "--image", image, "--kernel", kernel, "--mem", "300", "--id", "me", "-X",
        "quiet", "true",
    ).stdout.decode()
    assert re.match(rf"{re.escape(str(kernel))} ubd0c=cow,\S+ root=/dev/ubda rw mem=300M ", line)
    assert " umid=me " in line and line.endswith(" quiet\n")


# --- The files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["apppot_start.py", "apppot_init.py", "changes.py"])
def test_a_file_is_python_3_6_and_needs_the_standard_library_only(name):
    tree = ast.parse((TOP / name).read_text(), feature_version=(3, 6))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

    own = {"changes"} if name == "apppot_init.py" else set()  # in the image they are neighbours
    assert {module.split(".")[0] for module in imported} - own <= set(sys.stdlib_module_names)


def test_a_current_directory_that_is_gone_is_told(tmp_path, image):
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    result = subprocess.run(
        [
            "sh", "-c", script, "-", sys.executable, TOP / "apppot_start.py", "--image", image,
            "true",
        ],
        cwd=tmp_path,
        capture_output=True,
    )

    assert result.returncode == 125
    assert_error(result, "current directory")
