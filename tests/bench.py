#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a run costs, as ratios measured in one go: the machines are noisy, so A and B take turns.

Usage: python3 tests/bench.py [--repeat N]; prints a Markdown table and writes it to build/bench.md.
"""

import argparse
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
from typing import Callable, Dict, List, Sequence

TOP = pathlib.Path(__file__).resolve().parent.parent
IMAGE = os.environ.get("APPPOT_IMAGE") or str(TOP / "build" / "apppot.img")
KERNEL = os.environ.get("APPPOT_KERNEL") or shutil.which("linux.uml") or ""
RUNNER = [sys.executable, str(TOP / "apppot_start.py"), "--kernel", KERNEL, "--image", IMAGE]
PHASES = ("kernel started", "agent ", "command started", "result record", "nothing left")
MIB = 1 << 20


def seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def show(values: Sequence[float], unit: str = "s") -> str:
    return "{:.2f} {} ({:.2f} to {:.2f})".format(statistics.median(values), unit, min(values), max(values))


def verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def boot_bare(directory: str) -> None:
    """The floor: the same kernel and image, init a shell that powers off."""
    cow = os.path.join(directory, "cow")
    subprocess.run(
        [
            KERNEL,
            "ubd0={},{}".format(cow, IMAGE),
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
    os.unlink(cow)


def time_phases() -> Dict[str, float]:
    """Seconds from the start of the process to each phase's end, by when its line of -v appears."""
    start = time.monotonic()
    process = subprocess.Popen(RUNNER + ["-v", "true"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    ends = {}
    for line in process.stderr:
        match = re.match(rb"apppot: [\d.]+ s: (.*)", line)
        for phase in PHASES:
            if match and match.group(1).decode().startswith(phase):
                ends[phase] = time.monotonic() - start
    process.wait()
    ends["exit"] = time.monotonic() - start
    return ends


def measure_start(repeat: int) -> List[List[str]]:
    floors, runs, phases = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(repeat):
            floors.append(seconds(lambda: boot_bare(directory)))
            runs.append(seconds(lambda: subprocess.run(RUNNER + ["true"], check=True)))
            phases.append(time_phases())
    ratio = statistics.median(runs) / statistics.median(floors)
    rows = [
        ["bare boot of kernel and image, the floor", show(floors), ""],
        [
            "`apppot_start.py true`, whole process",
            show(runs),
            "{:.2f} of the floor; goal 1.35: {}".format(ratio, verdict(ratio <= 1.35)),
        ],
    ]
    names = (
        "runner: start to kernel",
        "kernel, and start of the agent",
        "agent to command",
        "`true`, and flushing",
        "end of the guest",
        "end of the runner",
    )
    marks = PHASES + ("exit",)
    for index, name in enumerate(names):
        before = [phase[marks[index - 1]] if index else 0.0 for phase in phases]
        rows.append(["– " + name, show([phase[marks[index]] - start for phase, start in zip(phases, before)]), ""])
    return rows


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


def measure_streams(repeat: int) -> List[List[str]]:
    produce = "dd if=/dev/zero bs=1M count={} status=none"
    consume = ["sh", "-c", "echo ready; cat > /dev/null"]
    host, out, into = [], [], []
    for _ in range(repeat):
        host.append(
            mib_per_second(
                subprocess.Popen(["sh", "-c", produce.format(2000) + " | cat"], stdout=subprocess.PIPE), 2000, False
            )
        )
        out.append(
            mib_per_second(
                subprocess.Popen(
                    RUNNER + ["sh", "-c", produce.format(1000)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
                ),
                1000,
                False,
            )
        )
        into.append(
            mib_per_second(
                subprocess.Popen(RUNNER + consume, stdin=subprocess.PIPE, stdout=subprocess.PIPE), 1000, True
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
    words = ["curl", "-sS", "-o", "/dev/null", "-w", "%{speed_download}", "http://{}:{}/".format(host, port)]
    return float(subprocess.run([*prefix, *words], stdout=subprocess.PIPE, check=True).stdout) / MIB


def measure_network(repeat: int) -> List[List[str]]:
    ways = {
        "host": ([], "127.0.0.1", "curl of the host, 64 MiB over its loopback"),
        "slirp4netns": (RUNNER + ["--net", "slirp4netns"], "10.0.2.2", "curl of the guest, by slirp4netns"),
        "slirp": (RUNNER + ["--net", "slirp"], "10.0.2.2", "curl of the guest, by slirp-fullbolt"),
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
    return [[text, show(speeds[name], "MiB/s") if speeds[name] else "–", ""] for name, (_, _, text) in ways.items()]


def measure_many(count: int) -> List[List[str]]:
    def run_all() -> None:
        for process in [subprocess.Popen(RUNNER + ["--mem", "256", "true"]) for _ in range(count)]:
            process.wait()

    return [["{} runs of `true` at once, per run".format(count), "{:.2f} s".format(seconds(run_all) / count), ""]]


# In the guest: a tree of COUNT files and MIB MiB, three quarters text, is saved and merged by both ways. By turns,
# each goes first in every other round, and each finds what it reads in memory and nothing left to be written.
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


def measure_changes(kernel: str, cpus: str, count: int, size_mib: int, repeat: int) -> List[List[str]]:
    """Saving and merging, beside GNU tar as the original used it, in the same appliance and run."""
    options = ["--kernel", kernel, "--cpus", cpus, "--root", "--mem", "3G", "python3", "-c", CHANGES_SCRIPT]
    with tempfile.TemporaryDirectory() as directory:           # for the guest to find nothing else of the host
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
        rows.append([what + ": apppot-snap", show(ours), "{}; goal {}: {}".format(show(ratios, "of tar"), goal, met)])
    return rows


def describe_guest(kernel: str, cpus: str) -> str:
    version = subprocess.run([kernel, "--version"], stdout=subprocess.PIPE).stdout.decode().strip()
    return "{}, {} CPU{}".format(version, cpus, "s" if cpus != "1" else "")


def measure_all_changes(repeat: int) -> List[List[str]]:
    """With the kernel chosen and with Debian's; with a second CPU where the kernel has more than one."""
    rows = []
    for kernel in sorted({KERNEL, shutil.which("linux.uml") or KERNEL}):
        config = subprocess.run([kernel, "--showconfig"], stdout=subprocess.PIPE).stdout
        for cpus in ("1", "2") if b"CONFIG_SMP=y" in config else ("1",):
            rows += measure_changes(kernel, cpus, 5000, 100, repeat)
            rows += measure_changes(kernel, cpus, 50000, 500, max(2, repeat // 2))
    return rows


def describe_machine() -> str:
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    version = subprocess.run([KERNEL, "--version"], stdout=subprocess.PIPE).stdout.decode().strip()
    return "{}, {} cores, Linux {}; guest kernel {}; Python {}".format(
        model.group(1) if model else platform.machine(),
        os.cpu_count(),
        platform.release(),
        version,
        platform.python_version(),
    )


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7, help="measurements of each kind (default 7)")
    options = parser.parse_args(argv)
    if not KERNEL or not os.path.exists(IMAGE):
        print("bench: error: no kernel or no image; `make bench` sees to both", file=sys.stderr)
        return 2
    few = max(1, options.repeat // 2)
    rows = measure_start(options.repeat) + measure_streams(few) + measure_network(few) + measure_many(16)
    rows += measure_all_changes(options.repeat)
    table = "\n".join(
        ["| what | median (range) | |", "|---|---|---|"] + ["| " + " | ".join(row) + " |" for row in rows]
    )
    text = "{}\n\n{}\n".format(describe_machine(), table)
    print(text, end="")
    (TOP / "build").mkdir(exist_ok=True)
    (TOP / "build" / "bench.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
