# SPDX-License-Identifier: Apache-2.0
"""What the patches in .kernel/ change. A kernel without one of them skips its tests.

The campaign of random memory operations is short. This is a longer one:
APPPOT_TEST_STEPS=100000 APPPOT_TEST_SEED=7 pytest tests/test_patches.py -k campaign
"""

import os
import signal
import subprocess

import pytest
from nodes import DEADLINE_S, is_idle, list_children, read_patches, send, skip_unless, wait_for

pytestmark = pytest.mark.own_kernel
MODES = [[], ["--ptrace"]]
STEPS = os.environ.get("APPPOT_TEST_STEPS", "300")
SEED = os.environ.get("APPPOT_TEST_SEED", "1")

# Memory as a program sees it, by the calls of the C library: Python's mmap lacks some.
MEMORY = """\
import ctypes, mmap, os, random, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
for call in (libc.madvise, libc.mprotect):
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE, HUGE, FIXED = 4096, 2 << 20, 0x10
NONE, READ, WRITE = 0, 1, 3
DONTNEED, HUGEPAGE, NOHUGEPAGE, PAGEOUT, COLLAPSE = 4, 14, 15, 21, 25

def check(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def get(size, address=None):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (FIXED if address else 0)
    return libc.mmap(address, size, WRITE, flags, -1, 0)

def get_aligned(size):
    return (get(size + HUGE) + HUGE - 1) // HUGE * HUGE

def move(source, size, target):
    return libc.mremap(source, size, size, 3, target)

def read(address, size=PAGE):
    return ctypes.string_at(address, size)

def write(address, content):
    ctypes.memmove(address, content, len(content))
"""
# Makes so many MiB of swap, as root of the guest.
SWAP = """\
dd if=/dev/zero of=/swap bs=1M count={} status=none
chmod 600 /swap
mkswap -q /swap
swapon /swap
"""


@pytest.fixture
def patched(kernel):
    """Skip a test whose patch the kernel does not have."""

    def needs(name):
        skip_unless(name in read_patches(kernel), f"kernel without .kernel/*-{name}.patch")

    return needs


def run_python(node, script, *options, arguments=()):
    result = node.run(*options, "python3", "-c", MEMORY + script, *arguments)
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout.decode()


def test_the_kernel_has_what_programs_and_clusters_ask_for(node):
    said = node.run("cat", "/proc/filesystems").stdout.decode().split()
    assert {"nfs", "nfs4", "virtiofs"} <= set(said)


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODES)
def test_of_memory_that_was_replaced_nothing_can_be_read(node, patched, options):
    patched("page-tables")
    script = """
start = get(8 << 20) + HUGE & -HUGE
full, sparse = start, start + 2 * HUGE
for area in (full, sparse):
    libc.madvise(area, HUGE, NOHUGEPAGE)
libc.munmap(start + HUGE, HUGE)
write(full, b"x" * HUGE)
write(sparse + 5 * PAGE, b"y")
assert move(sparse, HUGE, full) == full
print({read(full + page * PAGE, 1) for page in range(512) if page != 5}, read(full + 5 * PAGE, 1))
"""
    assert run_python(node, script, *options) == "{b'\\x00'} b'y'\n"


@pytest.mark.parametrize("options", MODES)
def test_a_system_call_may_access_what_its_process_may(node, patched, options):
    patched("user-access")
    script = """
area = get(2 * PAGE)
ends = os.pipe()
write(area, b"a" * PAGE)
for protection in (WRITE, READ, NONE):
    check(libc.mprotect(ctypes.c_void_p(area), PAGE, protection))
    said = libc.write(ends[1], ctypes.c_void_p(area), 9)
    os.write(ends[1], b"b" * 9)
    print(said, libc.read(ends[0], ctypes.c_void_p(area), 9), end="; ")
"""
    assert run_python(node, script, *options) == "9 9; 9 -1; -1 -1; "


def test_what_a_system_call_wrote_into_memory_is_not_lost_in_swap(node, patched):
    patched("user-access")
    script = """
size = 8 << 20
area = get(size)
libc.madvise(area, size, NOHUGEPAGE)
write(area, b"a" * size)
for round in (b"b", b"c"):
    check(libc.madvise(area, size, PAGEOUT))
    assert {read(area + page, 1) for page in range(0, size, PAGE)} <= {b"a", b"b"}
    ends = os.pipe()
    for page in range(0, size, PAGE):
        os.write(ends[1], round * PAGE)
        assert libc.read(ends[0], ctypes.c_void_p(area + page), PAGE) == PAGE
    check(libc.madvise(area, size, PAGEOUT))
    assert read(area, size) == round * size
swapped = int(open("/proc/swaps").read().split()[8])
print("swap was used" if swapped > 1000 else swapped)
"""
    (node.job / "script.py").write_text(MEMORY + script)
    result = node.run("--root", "sh", "-ec", SWAP.format(32) + "python3 script.py")
    assert (result.returncode, result.stdout) == (0, b"swap was used\n"), result.stderr


@pytest.mark.parametrize("options", MODES)
def test_a_program_that_asks_for_huge_pages_gets_them(node, patched, options):
    patched("huge-pages")
    script = """
area = get_aligned(4 * HUGE)
check(libc.madvise(area, 4 * HUGE, HUGEPAGE))
write(area, b"x" * 4 * HUGE)
assert read(area, 4 * HUGE) == b"x" * 4 * HUGE
print([line.split()[1] for line in open("/proc/self/smaps") if line.startswith("AnonHuge") and " 0 kB" not in line])
"""
    assert run_python(node, script, *options) == "['8192']\n"


CAMPAIGN = """
steps, pages = int(sys.argv[1]), int(sys.argv[3])
chance = random.Random(sys.argv[2])
area = get_aligned(2 * pages * PAGE)
other = area + pages * PAGE
expected, access = [bytes(PAGE)] * pages, [WRITE] * pages
ends = os.pipe()

def protect(first, count, how):
    check(libc.mprotect(area + first * PAGE, count * PAGE, how))
    access[first : first + count] = [how] * count

def forget(first, count, how):
    expected[first : first + count] = [bytes(PAGE)] * count
    access[first : first + count] = [how] * count if how else access[first : first + count]

def verify(first, count):
    for page in range(first, first + count):
        if access[page] and read(area + page * PAGE) != expected[page]:
            sys.exit("page {} is wrong after {}".format(page, action))

def fill(first, count):
    for page in range(first, first + count):
        if access[page] == WRITE:
            expected[page] = chance.getrandbits(64).to_bytes(8, "little") * (PAGE // 8)
            write(area + page * PAGE, expected[page])

def fork(first, count):
    pid = os.fork()
    fill(first, min(count, 100))
    if pid == 0:
        verify(0, pages)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        sys.exit("the child is wrong")

def receive(first, count):
    content = os.urandom(8) * (PAGE // 8)
    os.write(ends[1], content)
    if libc.read(ends[0], ctypes.c_void_p(area + first * PAGE), PAGE) == PAGE:
        assert access[first] == WRITE
        expected[first] = content
    else:
        assert access[first] != WRITE
        os.read(ends[0], PAGE)

def swap_halves(first, count):
    protect(0, pages, WRITE)
    half = pages // 2 * PAGE
    move(area, half, other)
    move(area + half, half, area)
    move(other, half, area + half)
    get(half, other)
    expected[:] = expected[pages // 2 :] + expected[: pages // 2]

def advise(first, count):
    how = chance.choice([HUGEPAGE, NOHUGEPAGE, PAGEOUT, COLLAPSE])
    libc.madvise(area + first // 512 * 512 * PAGE, max(count, 512) // 512 * 512 * PAGE, how)

def drop(first, count):
    check(libc.madvise(area + first * PAGE, count * PAGE, DONTNEED))
    forget(first, count, None)

def replace(first, count):
    get(count * PAGE, area + first * PAGE)
    forget(first, count, WRITE)

actions = [
    fill, fill, verify, receive, advise, advise, drop, replace, fork, swap_halves,
    lambda first, count: protect(first, count, chance.choice([NONE, READ, WRITE])),
    lambda first, count: protect(0, pages, WRITE)]
for step in range(steps):
    first = chance.randrange(pages)
    count = min(chance.choice([1, 8, 100, 512, 1500]), pages - first)
    action = chance.choice(actions)
    action(first, count)
    verify(first, count)
protect(0, pages, WRITE)
verify(0, pages)
print("right")
"""


@pytest.mark.parametrize("options", [[], ["--cpus", "2"], ["--ptrace"]])
def test_a_campaign_of_memory_operations_leaves_what_it_should(node, patched, options):
    for name in ("page-tables", "user-access"):
        patched(name)
    assert run_python(node, CAMPAIGN, *options, arguments=(STEPS, SEED, "4096")) == "right\n"


def test_processes_on_two_cpus_lose_nothing_in_swap(node, patched):
    for name in ("user-access", "smp-flush"):
        patched(name)
    (node.job / "campaign.py").write_text(MEMORY + CAMPAIGN)
    campaign = f"python3 campaign.py {int(STEPS) // 8} {SEED}$number 12288"
    script = SWAP.format(300) + f"for number in 1 2 3; do {campaign} & done; wait -n; wait -n; wait -n"
    result = node.run("--root", "--cpus", "2", "--mem", "192M", "bash", "-ec", script)
    assert (result.returncode, result.stdout, result.stderr) == (0, 3 * b"right\n", b"")


# --- Time and debuggers ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--cpus", "2"], ["--ptrace"]])
def test_a_program_that_computes_takes_user_time(node, patched, options):
    patched("user-time")
    script = """
import signal, time
signal.signal(signal.SIGVTALRM, lambda number, frame: print("alarm"))
signal.setitimer(signal.ITIMER_VIRTUAL, 0.2)
end = time.monotonic() + 0.6
while time.monotonic() < end:
    sum(range(100000))
print(os.times().user > 4 * os.times().system)
"""
    assert run_python(node, script, *options) == "alarm\nTrue\n"


@pytest.mark.parametrize("options", MODES)
def test_a_debugger_reads_and_writes_the_registers_of_the_fpu(node, patched, options):
    patched("xstate")
    script = """
import signal, struct
GETREGSET, SETREGSET, CONT, XSTATE = 0x4204, 0x4205, 7, 0x202
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

class Area(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]

pid = os.fork()
if pid == 0:
    libc.ptrace(0, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(7 if 0.1 + 0.2 > 0.3 else 8)
os.waitpid(pid, 0)
state = ctypes.create_string_buffer(16384)
area = Area(ctypes.addressof(state), len(state))

def access(how):
    return libc.ptrace(how, pid, XSTATE, ctypes.addressof(area))

assert access(GETREGSET) == 0 and area.size > 576
features, used = (struct.unpack_from("=Q", state, offset)[0] for offset in (464, 512))
assert features & 3 == 3 and not used & ~features, (features, used)
state[300:308] = b"register"                     # in xmm8
struct.pack_into("=Q", state, 512, used | 3)
assert access(SETREGSET) == 0
state[300:308] = bytes(8)
assert access(GETREGSET) == 0 and state[300:308] == b"register"
struct.pack_into("=L", state, 24, 0xffffffff)    # mxcsr
assert access(SETREGSET) == -1
libc.ptrace(CONT, pid, None, None)
print(os.waitpid(pid, 0)[1] >> 8)
"""
    assert run_python(node, script, *options) == "7\n"


# --- Processes of the host ------------------------------------------------------------------------


def find_idle(kernel):
    return list(filter(is_idle, list_children(kernel)))


def test_processes_of_the_host_are_used_again_and_a_dead_one_is_not(node, patched):
    patched("stub-pool")
    script = "for i in 1 2 3 4 5 6 7 8 9; do /bin/true | /bin/true | cat; done; echo once; read line; "
    script += "/bin/true | /bin/true | cat; echo twice; read line; exit 3"
    process = node.start("--net", "none", "bash", "-c", script, stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"once\n"

    kernel = node.list_parts(process)["kernel"]
    wait_for(lambda: find_idle(kernel))
    idle = find_idle(kernel)
    assert 0 < len(idle) <= 8
    send(idle, signal.SIGKILL)
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"twice\n"

    wait_for(lambda: find_idle(kernel))
    assert not set(find_idle(kernel)) & set(idle)
    assert process.communicate(b"\n", timeout=DEADLINE_S) == (b"", b"")
    assert process.returncode == 3
