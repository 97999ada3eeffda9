#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a run costs, as ratios measured in one go: the machines are noisy, so A and B take turns.

Usage: python3 tests/bench.py [--repeat N] [--only NAME]...

It writes a Markdown table to stdout and build/bench.md, and three plots: build/bench-start.svg,
build/bench-others.svg and build/bench-merge.svg.
"""

import argparse
import glob
import http.server
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

TOP = pathlib.Path(__file__).resolve().parent.parent
BUILD = TOP / "build"
IMAGE = os.environ.get("APPPOT_IMAGE") or str(BUILD / "apppot.img")
DEBIANS = shutil.which("linux.uml") or ""
KERNEL = os.environ.get("APPPOT_KERNEL") or str(BUILD / "linux")
RUNNER = [sys.executable, str(TOP / "apppot_start.py"), "--image", IMAGE, "--kernel"]
SCIENCE = str(BUILD / "science.img")  # with numpy and gcc
MARKS = ("", "kernel started", "agent ", "command started", "result record", "nothing left", "exit")
PHASES = (
    "Python, and the runner", "guest kernel, Python of the agent", "agent",
    "the command, and flushing", "end of the guest", "end of the runner",
)
MIB = 1 << 20
Rows = List[List[str]]


def run(kernel: str, *words: str) -> None:
    subprocess.run([*RUNNER, kernel, *words], stdin=subprocess.DEVNULL, check=True)


def seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def take_turns(repeat: int, actions: Dict[str, Callable[[], object]]) -> Dict[str, List[float]]:
    """Seconds of each action in each round."""
    times: Dict[str, List[float]] = {name: [] for name in actions}
    for _ in range(repeat):
        for name, action in actions.items():
            times[name].append(seconds(action))
    return times


def show(values: Sequence[float], unit: str = "s") -> str:
    return "{:.2f} {} ({:.2f} to {:.2f})".format(
        statistics.median(values), unit, min(values), max(values)
    )


def judge(ratio: float, of: str, goal: Optional[float], at_most: bool = True) -> str:
    if goal is None:
        return "{:.2f} {}".format(ratio, of)
    is_met = ratio <= goal if at_most else ratio >= goal
    return "{:.2f} {}; goal {} {:g}: {}".format(
        ratio, of, "at most" if at_most else "at least", goal, "met" if is_met else "missed"
    )


def verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def divide(ours: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(ours) / statistics.median(others)


# --- The start ------------------------------------------------------------------------------------


def boot_bare(kernel: str, *wrap: str) -> None:
    """The floor: the same kernel and image, init a shell that powers off."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [
                *wrap,
                kernel,
                "ubd0={}/cow,{}".format(directory, IMAGE),
                "root=/dev/ubda",
                "rw",
                "mem=1G",
                "con=null",
                "con0=null,fd:1",
                "uml_dir=" + directory,
                "init=/bin/sh",
                "--",
                "-c",
                # The kernel cuts its command line at blanks outside quotes.
                '"mount -n -t proc proc /proc; echo o > /proc/sysrq-trigger; sleep 60"',
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )


def time_phases(kernel: str) -> List[float]:
    """Seconds of each of PHASES, by when the lines of -v appear."""
    start = time.monotonic()
    process = subprocess.Popen(
        [*RUNNER, kernel, "-v", "true"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None

    ends = [start] + [0.0] * len(PHASES)
    for line in process.stderr:
        match = re.match(rb"apppot: [\d.]+ s: (.*)", line)
        for index, mark in enumerate(MARKS):
            if match and mark and match.group(1).decode().startswith(mark):
                ends[index] = time.monotonic()

    process.wait()
    ends[-1] = time.monotonic()
    return [end - before for before, end in zip(ends, ends[1:])]


def measure_start(repeat: int) -> Rows:
    kernels = {describe_kernel(kernel): kernel for kernel in (KERNEL, DEBIANS)}
    actions: Dict[str, Callable[[], object]] = {}
    phases: Dict[str, List[List[float]]] = {name: [] for name in kernels}

    for name, kernel in kernels.items():
        actions["floor " + name] = lambda kernel=kernel: boot_bare(kernel)  # type: ignore[misc]
        one_cpu = ("taskset", "-c", str(max(os.sched_getaffinity(0))))
        actions["one CPU " + name] = lambda kernel=kernel, wrap=one_cpu: boot_bare(kernel, *wrap)  # type: ignore[misc]
        actions[name] = lambda kernel=kernel: run(kernel, "true")  # type: ignore[misc]
        actions["phases " + name] = lambda name=name, kernel=kernel: phases[name].append(
            time_phases(kernel)
        )  # type: ignore[misc]

    times = take_turns(repeat, actions)
    rows = []

    for name in kernels:
        floor = times["floor " + name]
        goal = judge(
            divide(times[name], floor),
            "of the floor",
            2.2 if name == describe_kernel(KERNEL) else 1.35,
        )
        rows.append([name + ": bare boot, shell to power-off, the floor", show(floor), ""])
        rows.append(
            [name + ": the same, on one CPU of the host", show(times["one CPU " + name]), ""]
        )
        rows.append([name + ": `apppot_start.py true`, whole process", show(times[name]), goal])

    ours, debians = kernels
    rows[2][2] += "; " + judge(
        divide(times[debians], times[ours]), "times as fast as with Debian's", 4, False
    )
    medians = {
        name: [statistics.median(column) for column in zip(*phases[name])] for name in kernels
    }
    rows += [
        [
            "– " + phase,
            "{:.3f} s".format(medians[ours][index]),
            "{:.3f} s with Debian's".format(medians[debians][index]),
        ]
        for index, phase in enumerate(PHASES)
    ]
    plot_phases(medians)
    return rows


def measure_memory_sizes(repeat: int) -> Rows:
    sizes = ("256M", "1G", "2G", "16G")
    times = take_turns(
        repeat, {size: lambda size=size: run(KERNEL, "--mem", size, "true") for size in sizes}
    )  # type: ignore[misc]
    base = statistics.median(times["256M"])
    return [
        [
            "`true` with --mem " + size,
            show(times[size]),
            "{:+.2f} s".format(statistics.median(times[size]) - base),
        ]
        for size in sizes
    ]


def measure_cpus(repeat: int) -> Rows:
    """One and two CPU-bound processes on two CPUs, timed in the guest."""
    work = "i=0; while [ $i -lt 3000000 ]; do i=$((i+1)); done"
    script = "time sh -c '{0}'; time (sh -c '{0}' & sh -c '{0}'; wait)".format(work)
    one, two = [], []

    for _ in range(repeat):
        said = subprocess.run(
            [*RUNNER, KERNEL, "--cpus", "2", "bash", "-c", "TIMEFORMAT=%R; " + script],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True,
        ).stderr.split()
        one.append(float(said[0]))
        two.append(float(said[1]))

    return [
        ["--cpus 2: one process that computes", show(one), ""],
        ["--cpus 2: two of them at once", show(two), judge(divide(two, one), "of one", 1.15)],
    ]


# Each line of its output is a name and what one operation of that name takes, in microseconds.
PAGES_SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MIB = 1 << 20 };

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void *get(size_t size)
{
    return mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* Leaves no two free pages next to 63 others. */
static void fragment(size_t size)
{
    char *memory = get(size);

    madvise(memory, size, 15);
    for (size_t at = 0; at < size; at += PAGE)
        memory[at] = 1;
    for (size_t at = 0; at < size; at += 64 * PAGE)
        madvise(memory + at, 63 * PAGE, MADV_DONTNEED);
}

static double touch(size_t size, int is_random)
{
    char *memory = get(size);
    size_t pages = size / PAGE;
    double start = now();

    for (size_t page = 0; page < pages; page++)
        memory[(is_random ? page * 2654435761u % pages : page) * PAGE] = 1;
    return now() - start;
}

static void measure_areas(void)
{
    double start, faults = 0, unmaps = 0;

    for (int round = 0; round < 10; round++) {
        char *memory = get(32 * MIB);

        start = now();
        for (size_t at = 0; at < 32 * MIB; at += PAGE)
            memory[at] = 1;
        faults += now() - start;

        start = now();
        munmap(memory, 32 * MIB);
        unmaps += now() - start;
    }
    printf("fault %f\nmunmap %f\n", faults / 10 / (32 * MIB / PAGE), unmaps / 10);
}

static void measure_stream(void)
{
    size_t count = 128 * MIB / sizeof(double);
    double *a = get(128 * MIB), *b = get(128 * MIB), *c = get(128 * MIB), start = now();

    for (size_t i = 0; i < count; i++) {
        a[i] = 1;
        b[i] = 2;
        c[i] = 0;
    }
    for (int round = 0; round < 10; round++)
        for (size_t i = 0; i < count; i++)
            c[i] = a[i] + round * b[i];
    printf("stream %f\n", now() - start);
}

static void measure_processes(void)
{
    double start = now();

    for (int round = 0; round < 1000; round++) {
        pid_t pid = fork();

        if (pid == 0)
            _exit(0);
        waitpid(pid, 0, 0);
    }
    printf("fork %f\n", (now() - start) / 1000);

    start = now();
    for (int round = 0; round < 100000; round++)
        syscall(SYS_getppid);
    printf("call %f\n", (now() - start) / 100000);
}

int main(int argc, char **argv)
{
    if (argc > 1) {
        if (argv[1][0] == 'f')
            fragment(2240ul * MIB);
        printf("touch %f\n", touch(2048ul * MIB, argv[1][0] == 'r'));
        return 0;
    }
    measure_processes();
    measure_areas();
    measure_stream();
    return 0;
}
"""
PROGRAMS_SCRIPT = """
import subprocess, time

def measure(name, action):
    start = time.monotonic()
    action()
    print(name, (time.monotonic() - start) * 1e6)

def make_temporaries():
    a = numpy.ones(1 << 20)
    for _ in range(200):
        b = a + 1.0

for _ in range(2):                               # the second time files are in the page cache
    start = time.monotonic()
    subprocess.run(["python3", "-c", "import numpy"], check=True)
    print("numpy", (time.monotonic() - start) * 1e6)
    measure("gcc", lambda: subprocess.run(["gcc", "-c", "-o", "/tmp/a.o", "/bench/pages.c"], check=True))
import numpy
measure("temporaries", make_temporaries)
"""


def measure_pages(repeat: int) -> Rows:
    """Page faults, process starts and programs of science, beside the node with the same files."""
    goals: Dict[str, Tuple[str, Optional[float]]] = {
        "call": ("a system call", None),
        "fault": ("a page fault of fresh memory", 2.5),
        "munmap": ("munmap of 32 MiB", 2),
        "stream": ("first touch of 384 MiB, then 10 times c = a + k b", 1.5),
        "fork": ("fork and exit of a static program", None),
        "temporaries": ("200 temporaries of numpy of 8 MB", 2),
        "numpy": ("`python3 -c 'import numpy'`", None),
        "gcc": ("`gcc -c`", None),
        "order": ("2 GiB touched page by page, in order", 4),
        "random": ("2 GiB touched page by page, in random order", 4),
        "fragmented": ("2 GiB touched in order, memory in pieces", 4),
    }
    found: Dict[str, Dict[str, List[float]]] = {name: {} for name in goals}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = pathlib.Path(name)
        (directory / "tree").mkdir()
        subprocess.run(
            ["debugfs", "-R", "rdump / {}/tree".format(name), SCIENCE], stderr=subprocess.DEVNULL, check=True
        )
        (directory / "pages.c").write_text(PAGES_SOURCE)
        (directory / "programs.py").write_text(PROGRAMS_SCRIPT)
        subprocess.run(
            ["gcc", "-O1", "-static", "-o", directory / "pages", directory / "pages.c"], check=True
        )

        tree = ["bwrap", "--bind", str(directory / "tree"), "/", "--dev", "/dev", "--proc", "/proc"]
        ours = [*RUNNER[:2], "--image", SCIENCE, "--kernel", KERNEL, "--mem", "2560M", "--root"]
        prefixes = {
            "host": [*tree, "--bind", name, "/bench"],
            "ours": [*ours, "--bind", name + ":/bench"],
        }
        # The short ones are repeated more: memory is what others on the machine slow down most.
        commands = [["/bench/pages"]] * 3 + [["python3", "/bench/programs.py"]] * 2
        commands += [["/bench/pages", how] for how in ("order", "random", "fragmented")]
        for _ in range(repeat):
            for command in commands:
                for where, prefix in prefixes.items():
                    output = subprocess.run(
                        [*prefix, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True
                    ).stdout.decode()
                    last = dict(line.split() for line in output.splitlines())
                    for what, microseconds in last.items():
                        name_of = command[1] if what == "touch" else what
                        found[name_of].setdefault(where, []).append(float(microseconds))

    return [
        [
            goals[name][0] + "; on the node",
            "{}; {}".format(*(show_microseconds(times[where]) for where in ("ours", "host"))),
            judge(divide(times["ours"], times["host"]), "of the node", goals[name][1]),
        ]
        for name, times in found.items()
    ]


FILES_SCRIPT = """
import os, subprocess, sys, time

COUNT, SIZE = 1000, 256 << 20
block = bytes(1 << 20)

def write_big():
    with open("big", "wb", buffering=0) as file:
        for _ in range(SIZE // len(block)):
            file.write(block)

def read_big():
    with open("big", "rb", buffering=0) as file:
        while file.read(len(block)):
            pass

def create():
    for name in names:
        with open(name, "w") as file:
            file.write("text")

def read():
    for name in names:
        with open(name) as file:
            file.read()

def stat():
    for name in names:
        os.stat(name)

def unlink():
    for name in names:
        os.unlink(name)

def measure(name, action):
    start = time.monotonic()
    action()
    print(where, name, (time.monotonic() - start) * 1e6)

def drop_caches():
    subprocess.run(["sync"])
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")

names = ["file%d" % number for number in range(COUNT)]
os.mkdir("/mnt/hostfs")
here = "hostfs=" + "../" * 16 + os.path.realpath(".")  # below the run's directory
subprocess.run(["mount", "-t", "hostfs", "-o", here, "none", "/mnt/hostfs"], check=True)
for _ in range(int(sys.argv[1])):
    for where, directory in (("ours", "."), ("hostfs", "/mnt/hostfs")):
        os.mkdir(os.path.join(directory, where))
        home = os.getcwd()
        os.chdir(os.path.join(directory, where))
        measure("write", write_big)
        drop_caches()
        measure("first", read_big)
        measure("again", read_big)
        os.unlink("big")
        for name, action in (("create", create), ("open", read), ("stat", stat), ("unlink", unlink)):
            measure(name, action)
        os.chdir(home)
        os.rmdir(os.path.join(directory, where))
"""


def measure_files(repeat: int) -> Rows:
    """The job directory by virtio-fs and, in the same guest, by the kernel's own hostfs.

    A path in an argument of the kernel is one that Landlock lets it open.
    """
    goals = {
        "write": ("write 256 MiB", 1 / 1.3),
        "first": ("read them", 1 / 0.9),
        "again": ("read them again", 1 / 0.9),
        "create": ("create 1,000 files", 1.6),
        "open": ("open and read 1,000 files", 1.6),
        "unlink": ("unlink 1,000 files", 1.3),
        "stat": ("stat of 1,000 files", 1.0),
    }
    found: Dict[str, Dict[str, List[float]]] = {name: {} for name in goals}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        output = subprocess.run(
            [*RUNNER, KERNEL, "--mem", "1G", "--root", "-X", "bench=" + directory,
             "/usr/bin/python3", "-c", FILES_SCRIPT, str(repeat)],
            cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True,
        ).stdout.decode()  # fmt: skip
    for line in output.splitlines():
        where, name, microseconds = line.split()
        found[name].setdefault(where, []).append(float(microseconds))

    return [
        [
            "job directory: {}; by hostfs".format(goals[name][0]),
            "{}; {}".format(*(show_microseconds(times[where]) for where in ("ours", "hostfs"))),
            judge(divide(times["ours"], times["hostfs"]), "of hostfs", goals[name][1]),
        ]
        for name, times in found.items()
    ]


def show_microseconds(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if middle >= size / 10:
            return "{:.2f} {}".format(middle / size, unit)
    return "{:.2f} µs".format(middle)


def sum_pss(parent: int) -> int:
    """KiB of memory, shared parts divided among their users, of a process and all below it."""
    total = 0
    try:
        total = int(
            re.findall(
                r"Pss:\s+(\d+)", pathlib.Path("/proc/{}/smaps_rollup".format(parent)).read_text()
            )[0]
        )
        for children in glob.glob("/proc/{}/task/*/children".format(parent)):
            total += sum(sum_pss(int(pid)) for pid in pathlib.Path(children).read_text().split())
    except (OSError, IndexError):
        pass  # it has ended
    return total


def measure_many(count: int) -> Rows:
    """Many runs at once from one image: do all end well, and what memory does each take?"""
    with tempfile.TemporaryDirectory() as directory:
        go = os.path.join(directory, "go")
        script = "sleep 5; while [ ! -e {} ]; do sleep 1; done".format(go)
        command = [*RUNNER, KERNEL, "--mem", "256M", "sh", "-c", script]
        start = time.monotonic()
        runs = [
            subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=directory) for _ in range(count)
        ]
        deadline = time.monotonic() + 60
        per_run = 0.0
        while time.monotonic() < deadline:  # until it grows no more: all have booted
            time.sleep(3)
            before, per_run = per_run, sum(sum_pss(process.pid) for process in runs) / 1024 / count
            if per_run < before * 1.01:
                break
        pathlib.Path(go).touch()
        failed = sum(process.wait() != 0 for process in runs)
        elapsed = time.monotonic() - start

    return [
        [
            "{} runs of `sleep 5` at once, {} of them failed: memory of each".format(count, failed),
            "{:.0f} MiB".format(per_run),
            "goal under 60; all ended after {:.0f} s".format(elapsed),
        ]
    ]


def measure_rate(count: int) -> Rows:
    def run_all() -> None:
        for process in [
            subprocess.Popen([*RUNNER, KERNEL, "--mem", "256", "true"]) for _ in range(count)
        ]:
            process.wait()

    return [
        [
            "{} runs of `true` at once, per run".format(count),
            "{:.2f} s".format(seconds(run_all) / count),
            "",
        ]
    ]


# --- Beside other tools ---------------------------------------------------------------------------
# The same command on the same tree: the image's files, unpacked for those that run on the node's
# own kernel.

QEMU_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for name in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    /bin/busybox insmod /$name.ko
done
for try in $(/bin/busybox seq 100); do [ -e /dev/vda ] || /bin/busybox usleep 10000; done
/bin/busybox mount -t ext4 -o ro /dev/vda /root
/bin/busybox chroot /root {} && echo the command has ended well
/bin/busybox poweroff -f
"""


def unpack_cloud_kernel(directory: pathlib.Path) -> None:
    """Debian's kernel for clouds; nothing is installed."""
    depends = subprocess.run(
        ["apt-cache", "depends", "linux-image-cloud-amd64"], stdout=subprocess.PIPE, check=True
    )
    package = re.findall(r"Depends: (linux-image-\S+)", depends.stdout.decode())[0]
    subprocess.run(
        ["apt-get", "-qq", "download", package], cwd=directory, stderr=subprocess.DEVNULL,
        check=True,
    )
    downloaded = glob.glob(str(directory / "linux-image-*.deb"))[0]
    subprocess.run(["dpkg-deb", "-x", downloaded, directory / "kernel"], check=True)


def build_qemu_command(directory: pathlib.Path, command: str) -> List[str]:
    """With an initrd that holds the modules for the image, runs the command in it, and powers off."""
    initrd = directory / "initrd"
    shutil.rmtree(initrd, ignore_errors=True)
    for name in ("dev", "root", "bin"):
        (initrd / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "busybox", initrd / "bin")
    for module in glob.glob(str(directory / "kernel/lib/modules/*/kernel/drivers/*/virtio*.ko")):
        shutil.copy(module, initrd)
    (initrd / "init").write_text(QEMU_INIT.format(command))
    (initrd / "init").chmod(0o755)
    subprocess.run(
        "find . | cpio -o -H newc --quiet > ../initrd.cpio", shell=True, cwd=initrd, check=True
    )
    kernel = glob.glob(str(directory / "kernel/boot/vmlinuz-*"))[0]
    return [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        "1G",
        "-nographic",
        "-no-reboot",
        "-nic",
        "none",
        "-kernel",
        kernel,
        "-initrd",
        str(directory / "initrd.cpio"),
        "-append",
        "console=ttyS0 quiet panic=-1",
        "-drive",
        "file={},format=raw,if=virtio,snapshot=on".format(IMAGE),
    ]


def list_tools(directory: pathlib.Path, command: str) -> Dict[str, Tuple[str, List[str]]]:
    """What each needs on the node, and its command line."""
    words, tree = ["/bin/sh", "-c", command], str(directory / "tree")
    return {
        "the node itself": ("", words),
        "AppPot": ("nothing", [*RUNNER, KERNEL, *words]),
        "AppPot, Debian's kernel": ("nothing", [*RUNNER, DEBIANS, *words]),
        "proot": ("ptrace", ["proot", "-r", tree, *words]),
        "bwrap": (
            "user namespaces or setuid",
            ["bwrap", "--ro-bind", tree, "/", "--dev", "/dev", *words],
        ),
        "Charliecloud": ("user namespaces", ["ch-run", tree, "--", *words]),
        "QEMU without KVM": (
            "nothing",
            build_qemu_command(directory, "/bin/sh -c '{}'".format(command)),
        ),
    }


def run_tool(words: Sequence[str]) -> None:
    environment = {"USER": "root", **os.environ}  # which ch-run asks for
    shown = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        check=True, env=environment,
    ).stdout
    assert b"ended well" in shown or not words[0].startswith("qemu"), shown


KINDS_OF_WORK = {
    "`true`": "true",
    "500 processes": "for i in $(seq 500); do /bin/true; done",
    "a loop that computes": "i=0; while [ $i -lt 2000000 ]; do i=$((i+1)); done",
}


def measure_others(repeat: int) -> Rows:
    rows = []
    costs: Dict[str, List[float]] = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = pathlib.Path(name)
        (directory / "tree").mkdir()
        subprocess.run(
            ["debugfs", "-R", "rdump / {}/tree".format(name), IMAGE],
            stderr=subprocess.DEVNULL,
            check=True,
        )
        unpack_cloud_kernel(directory)
        for what, command in KINDS_OF_WORK.items():
            tools = list_tools(directory, command)
            times = take_turns(
                repeat,
                {name: lambda words=words: run_tool(words) for name, (_, words) in tools.items()},
            )  # type: ignore[misc]
            rows += [
                ["{}: {}".format(what, name), show(times[name]), "needs " + needs if needs else ""]
                for name, (needs, _) in tools.items()
            ]
            for tool in tools:
                costs.setdefault(tool, []).append(statistics.median(times[tool]))
    plot_others(costs)
    return rows


def measure_slurm(count: int) -> Rows:
    """Tasks of an array job of a real Slurm, on two CPUs."""
    import engines
    import nodes

    script = "#!/bin/sh\nexec {} true\n"
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        image = os.path.join(name, "apppot.img")
        subprocess.run(["cp", "--sparse=always", IMAGE, image], check=True)
        slurm = engines.Slurm(pathlib.Path(KERNEL), pathlib.Path(image), "linuxproc")
        try:

            def run_array(prefix: str) -> None:
                words = [
                    "--array=0-{}".format(count - 1), "--cpus-per-task=8", "--output=/dev/null",
                ]
                job = slurm.submit(script.format(prefix), *words)
                nodes.wait_for(lambda: not slurm.run("squeue", "-h", "-j", job).strip(), 600)

            times = take_turns(
                2,
                {
                    prefix: lambda prefix=prefix: run_array(prefix)  # type: ignore[misc]
                    for prefix in ("", "python3 /opt/apppot/apppot_start.py")
                },
            )
        finally:
            slurm.close()
    plain, ours = ([seconds / count for seconds in times[prefix]] for prefix in times)
    return [
        ["a task of {} of `true` on Slurm, two at once".format(count), show(plain), ""],
        [
            "the same with AppPot",
            show(ours),
            "{:+.2f} s a task".format(statistics.median(ours) - statistics.median(plain)),
        ],
    ]


# --- Streams and the network ----------------------------------------------------------------------


def mib_per_second(consumer: "subprocess.Popen[bytes]", count_mib: int, feed: bool) -> float:
    """Speed between the first and the last piece, so that boots do not count."""
    block = bytes(MIB)
    if feed:
        assert consumer.stdin is not None and consumer.stdout is not None
        consumer.stdout.readline()  # ready
        start = time.monotonic()
        for _ in range(count_mib):
            consumer.stdin.write(block)
        consumer.stdin.close()
        consumer.stdout.read()
    else:
        assert consumer.stdout is not None
        consumer.stdout.read(1)
        start = time.monotonic()
        while consumer.stdout.read(MIB):
            pass

    elapsed = time.monotonic() - start
    consumer.wait()
    return count_mib / elapsed


def measure_streams(repeat: int) -> Rows:
    runner = [*RUNNER, KERNEL]
    produce = "dd if=/dev/zero bs=1M count={} status=none"
    consume = ["sh", "-c", "echo ready; cat > /dev/null"]
    host, out, into = [], [], []

    for _ in range(repeat):
        host.append(
            mib_per_second(
                subprocess.Popen(
                    ["sh", "-c", produce.format(2000) + " | cat"], stdout=subprocess.PIPE
                ),
                2000,
                False,
            )
        )
        out.append(
            mib_per_second(
                subprocess.Popen(
                    [*runner, "sh", "-c", produce.format(1000)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                ),
                1000,
                False,
            )
        )
        into.append(
            mib_per_second(
                subprocess.Popen(runner + consume, stdin=subprocess.PIPE, stdout=subprocess.PIPE),
                1000,
                True,
            )
        )

    return [
        ["`dd \\| cat` through a pipe of the host", show(host, "MiB/s"), ""],
        [
            "stdout of the guest into a pipe",
            show(out, "MiB/s"),
            "goal 100 MB/s: " + verdict(statistics.median(out) >= 96),
        ],
        [
            "stdin from a pipe into the guest",
            show(into, "MiB/s"),
            "goal 60 MB/s: " + verdict(statistics.median(into) >= 58),
        ],
    ]


class WebServer(http.server.BaseHTTPRequestHandler):
    """64 MiB for whoever asks."""

    content = bytes(64 * MIB)

    def do_GET(self) -> None:  # noqa: N802
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *words: object) -> None:
        pass


def curl(prefix: Sequence[str], host: str, port: int) -> float:
    """MiB/s of a download, by curl's own measure."""
    words = [
        "curl", "-sS", "-o", "/dev/null", "-w", "%{speed_download}",
        "http://{}:{}/".format(host, port),
    ]
    return float(subprocess.run([*prefix, *words], stdout=subprocess.PIPE, check=True).stdout) / MIB


def measure_network(repeat: int) -> Rows:
    ways = {
        "host": ([], "127.0.0.1", "curl of the host, 64 MiB over its loopback"),
        "slirp4netns": (
            [*RUNNER, KERNEL, "--net", "slirp4netns"],
            "10.0.2.2",
            "curl of the guest, by slirp4netns",
        ),
        "slirp": (
            [*RUNNER, DEBIANS, "--net", "slirp"], "10.0.2.2",
            "curl of the guest, by slirp-fullbolt",
        ),
    }
    speeds: Dict[str, List[float]] = {name: [] for name in ways}

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), WebServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for _ in range(repeat):
            for name, (prefix, host, _) in ways.items():
                try:
                    speeds[name].append(curl(prefix, host, server.server_port))
                except subprocess.CalledProcessError:
                    pass  # without this helper, or with a kernel that has no driver for it
        server.shutdown()

    return [
        [text, show(speeds[name], "MiB/s") if speeds[name] else "–", ""]
        for name, (_, _, text) in ways.items()
    ]


# --- Changes files --------------------------------------------------------------------------------

# In the guest: a tree of COUNT files and MIB MiB, three quarters text, is saved and merged by both
# ways. By turns, each goes first in every other round, and each finds what it reads in memory and
# nothing left to be written.
CHANGES_SCRIPT = r"""
import os, random, subprocess, sys, time
count, size, repeat = int(sys.argv[1]), int(sys.argv[2]) << 20, int(sys.argv[3])
SAVE = "tar -C / --one-file-system --exclude=./proc --exclude=./sys --exclude=./dev --exclude=./run --exclude=./tmp \
    --exclude=./var/cache --exclude=./var/lib/apppot --listed-incremental=/run/%s -c%sf %s . 2>/dev/null || true"
OURS, THEIRS = "/var/cache/ours.tar.gz", "/var/cache/theirs.tar.gz"
WAYS = [  # what, how, what comes before, command
    ("save", "apppot-snap", "rm -f " + OURS, "apppot-snap changes " + OURS),
    ("save", "GNU tar", "rm -f %s; cp /run/state /run/state2" % THEIRS, SAVE % ("state2", "z", THEIRS)),
    ("merge", "apppot-snap", "rm -rf /data; cat %s > /dev/null" % OURS, "apppot-snap merge " + OURS),
    # Of /data alone: incremental extraction removes what the archive does not list, in host directories, too.
    ("merge", "GNU tar", "rm -rf /data; cat %s > /dev/null" % THEIRS,
     "tar -C / --listed-incremental=/dev/null -xzf %s ./data" % THEIRS)]
def sh(command):
    subprocess.run(command, shell=True, check=True)
sh(SAVE % ("state", "", "/dev/null"))
sh("apppot-snap base")
chance = random.Random(1)
words = [b"%x" % chance.getrandbits(40) for _ in range(4000)]
text, noise = b" ".join(chance.choice(words) for _ in range(300000)), os.urandom(1 << 20)
for number in range(count):
    directory = "/data/%d" % (number // 100)
    os.makedirs(directory, exist_ok=True)
    length = chance.randrange(size // count // 2, size // count * 3 // 2)
    start = chance.randrange(len(text) - length)
    with open(directory + "/%d" % number, "wb") as file:
        file.write(text[start:start + length * 3 // 4] + noise[:length // 4])
for pair in WAYS[:2], WAYS[2:]:
    for turn in range(repeat):
        for what, how, before, command in pair[::-1 if turn % 2 else 1]:
            sh(before)
            os.sync()
            start = time.monotonic()
            sh(command)
            print(what, time.monotonic() - start, how, sep="\t", flush=True)
"""


def measure_changes(kernel: str, cpus: str, count: int, size_mib: int, repeat: int) -> Rows:
    """Saving and merging, beside GNU tar as the original used it, in the same appliance and run."""
    options = [kernel, "--cpus", cpus, "--root", "--mem", "3G", "python3", "-c", CHANGES_SCRIPT]
    with (
        tempfile.TemporaryDirectory()
    ) as directory:  # for the guest to find nothing else of the host
        output = subprocess.run(
            RUNNER + options + [str(number) for number in (count, size_mib, repeat)],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout.decode()

    lines = [line.split("\t") for line in output.splitlines()]
    rows = []

    for name, goal in (("save", 0.7), ("merge", 1.0)):
        ours, theirs = (
            [float(value) for what, value, how in lines if (what, how) == (name, way)]
            for way in ("apppot-snap", "GNU tar")
        )
        ratios = [one / other for one, other in zip(ours, theirs)]
        met = verdict(statistics.median(ratios) <= goal)
        what = "{} {} files, {} MiB, {}".format(name, count, size_mib, describe_guest(kernel, cpus))
        rows.append([what + ": GNU tar", show(theirs), ""])
        rows.append(
            [
                what + ": apppot-snap",
                show(ours),
                "{}; goal {}: {}".format(show(ratios, "of tar"), goal, met),
            ]
        )
    return rows


def describe_guest(kernel: str, cpus: str) -> str:
    return "{}, {} CPU{}".format(describe_kernel(kernel), cpus, "s" if cpus != "1" else "")


def measure_all_changes(repeat: int) -> Rows:
    """With both kernels; with a second CPU where the kernel has more than one."""
    rows = []
    for kernel in (KERNEL, DEBIANS):
        config = subprocess.run([kernel, "--showconfig"], stdout=subprocess.PIPE).stdout
        for cpus in ("1", "2") if b"CONFIG_SMP=y" in config else ("1",):
            rows += measure_changes(kernel, cpus, 5000, 100, repeat)
            rows += measure_changes(kernel, cpus, 50000, 500, max(2, repeat // 2))
    return rows


def measure_merge_at_boot(repeat: int) -> Rows:
    """`true` behind a changes file of so many files of 4 KiB each."""
    counts = (0, 1000, 5000, 20000)
    with tempfile.TemporaryDirectory() as directory:
        (pathlib.Path(directory) / "old").mkdir()
        options: Dict[int, List[str]] = {}
        for count in counts:
            tree = pathlib.Path(directory) / str(count) / "data"
            tree.mkdir(parents=True)
            for number in range(count):
                (tree / str(number)).write_bytes(os.urandom(1024) + bytes(3072))
            layer = "{}/{}.tar.gz".format(directory, count)
            words = ["diff", directory + "/old", tree.parent, "-o", layer]
            subprocess.run([sys.executable, TOP / "changes.py", *words], check=True)
            options[count] = ["--changes", layer] if count else []
        times = take_turns(
            repeat,
            {
                str(count): lambda count=count: run(KERNEL, *options[count], "true")
                for count in counts
            },
        )  # type: ignore[misc]

    base = statistics.median(times["0"])
    plot_merge([(count, statistics.median(times[str(count)])) for count in counts])
    return [
        [
            "`true` behind a changes file of {} files".format(count),
            show(times[str(count)]),
            "{:+.2f} s".format(statistics.median(times[str(count)]) - base),
        ]
        for count in counts
    ]


# --- Output ---------------------------------------------------------------------------------------


def plot(name: str, script: str) -> None:
    if shutil.which("gnuplot"):
        head = "set terminal svg size 720,360 background 'white'; set output '{}'\n".format(
            BUILD / name
        )
        subprocess.run(["gnuplot"], input=(head + script).encode(), check=True)


def plot_phases(medians: Dict[str, List[float]]) -> None:
    table = "\n".join(
        '"{}" {}'.format(name, " ".join(map(str, values))) for name, values in medians.items()
    )
    columns = ", ".join(
        "$d using {} title '{}'".format("2:xtic(1)" if index == 0 else index + 2, phase)
        for index, phase in enumerate(PHASES)
    )
    plot(
        "bench-start.svg",
        "$d << EOD\n{}\nEOD\nset title 'apppot\\_start.py true, by phase'; set ylabel 'seconds'; set grid ytics\n"
        "set style data histogram; set style histogram rowstacked; set style fill solid; "
        "set boxwidth 0.5\n"
        "set key outside; set yrange [0:*]\nplot {}\n".format(table, columns),
    )


def plot_others(costs: Dict[str, List[float]]) -> None:
    """Seconds of each kind of work, one group of bars for each tool. The axis is logarithmic."""
    table = "\n".join(
        '"{}" {}'.format(name.replace("_", "\\\\_"), " ".join("{:.4f}".format(max(value, 1e-3)) for value in values))
        for name, values in costs.items()
    )
    columns = ", ".join(
        "$d using {} title '{}'".format("2:xtic(1)" if index == 0 else index + 2, what.strip("`"))
        for index, what in enumerate(KINDS_OF_WORK)
    )
    plot(
        "bench-others.svg",
        "$d << EOD\n{}\nEOD\nset title 'the same commands with other tools'\n"
        "set ylabel 'seconds'; set logscale y; set yrange [0.001:*]; set format y '%g'; set grid ytics\n"
        "set style data histogram; set style histogram clustered gap 1; set style fill solid\n"
        "set xtics rotate by -20; set key outside below\nplot {}\n".format(table, columns),
    )


def plot_merge(points: Sequence[Tuple[int, float]]) -> None:
    table = "\n".join("{} {}".format(*point) for point in points)
    plot(
        "bench-merge.svg",
        "$d << EOD\n{}\nEOD\nset title 'start with a changes file'; set xlabel 'files in it'\n"
        "set ylabel 'seconds'; set yrange [0:*]; unset key\nplot $d with linespoints pointtype 7\n".format(
            table
        ),
    )


def describe_kernel(kernel: str) -> str:
    version = subprocess.run([kernel, "--version"], stdout=subprocess.PIPE).stdout.decode().strip()
    return ("Debian's " if kernel == DEBIANS else "kernel ") + version


def describe_machine() -> str:
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    return "{}, {} cores, Linux {}; Python {}".format(
        model.group(1) if model else platform.machine(), os.cpu_count(), platform.release(),
        platform.python_version(),
    )


def main(argv: List[str]) -> int:
    measures: Dict[str, Callable[[int], Rows]] = {
        "start": measure_start,
        "memory": measure_memory_sizes,
        "cpus": measure_cpus,
        "pages": measure_pages,
        "files": measure_files,
        "streams": measure_streams,
        "network": measure_network,
        "rate": lambda repeat: measure_rate(16),
        "many": lambda repeat: measure_many(64),
        "slurm": lambda repeat: measure_slurm(50),
        "others": measure_others,
        "merge": measure_merge_at_boot,
        "changes": measure_all_changes,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeat", type=int, default=7,
        help="measurements of the start; half as many of the rest (7)",
    )
    parser.add_argument("--only", action="append", choices=sorted(measures), help="repeatable")
    options = parser.parse_args(argv)

    if not DEBIANS or not os.path.exists(KERNEL) or not os.path.exists(IMAGE):
        print(
            "bench: error: a kernel or the image is missing; `make bench` sees to them",
            file=sys.stderr,
        )
        return 2

    few = max(1, options.repeat // 2)
    rows = []
    for name, measure in measures.items():
        if not options.only or name in options.only:
            rows += measure(options.repeat if name == "start" else few)

    table = "\n".join(
        ["| what | median (range) | |", "|---|---|---|"]
        + ["| " + " | ".join(row) + " |" for row in rows]
    )
    text = "{}\n\n{}\n".format(describe_machine(), table)
    print(text, end="")
    BUILD.mkdir(exist_ok=True)
    (BUILD / "bench.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
