"""The file server by itself: requests and rings that a hostile kernel of the guest could make."""

import errno
import mmap
import os
import select
import socket
import struct
import tempfile
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import DEADLINE_S

import apppot_start
from apppot_start import (
    IN_HEADER,
    MESSAGE,
    NO_NOTIFY,
    OUT_HEADER,
    Device,
    FuseServer,
    GuestMemory,
    Misfit,
    Queue,
    Share,
)

MEMORY = 1 << 20
DESCRIPTORS, AVAILABLE, USED, BUFFERS = 0, 4096, 8192, 16384
LOOKUP, GETATTR, SETATTR, MKDIR, LINK, OPEN, READ, WRITE, RELEASE = 1, 3, 4, 9, 13, 14, 15, 16, 18
INIT, READDIR, CREATE, IOCTL, RENAME2, LOOKUP_OPEN = 26, 28, 35, 39, 45, 8192
OPCODES = [*range(1, 54), 4096, LOOKUP_OPEN]
HAS_NEXT, WRITABLE = 1, 2
SECRET = b"nobody sees this"


@pytest.fixture(autouse=True, scope="module")
def keep_umask():
    """A server gives its process the umask of whoever makes a file."""
    umask = os.umask(0)
    os.umask(umask)
    yield
    os.umask(umask)


class FakeGuest:
    """A kernel that makes one request at a time, without a VMM."""

    def __init__(self, *shares):
        self.memory = GuestMemory()
        with tempfile.TemporaryFile() as file:
            file.truncate(MEMORY)
            self.bytes = mmap.mmap(file.fileno(), MEMORY)
            self.memory.add(0, 0, MEMORY, file.fileno(), 0)
        self.queue = Queue(self.memory)
        self.queue.resize(64)
        self.queue.place(DESCRIPTORS, USED, AVAILABLE)
        self.server = FuseServer(shares, lambda: None)
        self.ask(INIT, 0, struct.pack("<IIIII", 7, 38, 1 << 17, 0xFFFFFFFF, 0xFF) + bytes(44))

    def describe(self, number, address, length, flags, following):
        struct.pack_into("<QIHH", self.bytes, DESCRIPTORS + 16 * number, address, length, flags, following)

    def submit(self, head):
        index = struct.unpack_from("<H", self.bytes, AVAILABLE + 2)[0]
        struct.pack_into("<H", self.bytes, AVAILABLE + 4 + 2 * (index % 64), head)
        struct.pack_into("<H", self.bytes, AVAILABLE + 2, (index + 1) & 0xFFFF)
        self.server.serve(self.queue)

    def ask(self, opcode, node, body=b"", room=4096, uid=0):
        """The errno and the payload of the answer."""
        header = IN_HEADER.pack(40 + len(body), opcode, 1, node, uid, uid, 1, 0, 0)
        self.bytes[BUFFERS:BUFFERS + 40] = header
        self.bytes[BUFFERS + 64:BUFFERS + 64 + len(body)] = body
        answer = BUFFERS + (256 << 10)
        self.describe(0, BUFFERS, 40, HAS_NEXT, 1)
        self.describe(1, BUFFERS + 64, len(body), HAS_NEXT, 2)
        self.describe(2, answer, 16, WRITABLE | HAS_NEXT, 3)
        self.describe(3, answer + 64, room, WRITABLE, 0)
        self.submit(0)
        length, error, _ = OUT_HEADER.unpack_from(self.bytes, answer)
        return -error, self.bytes[answer + 64:answer + 64 + length - 16]

    def look_up(self, node, *names):
        for name in names:
            error, payload = self.ask(LOOKUP, node, name + b"\0")
            assert not error, os.strerror(error)
            node = struct.unpack_from("<Q", payload)[0]
        return node


@pytest.fixture
def place(tmp_path):
    """A directory to share, with a secret beside it and ways that seem to lead there."""
    shared = tmp_path / "shared"
    (shared / "below").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(SECRET)
    (shared / "file").write_bytes(b"0123456789")
    (shared / "way").symlink_to(tmp_path / "secret")
    (shared / "up").symlink_to("..")
    os.mkfifo(shared / "fifo")
    return tmp_path


def make_guest(place, read_only=False):
    shared = os.fsencode(str(place / "shared"))
    return FakeGuest(Share("job", shared, None, read_only), Share("one", shared, b"file", False))


def seen_outside(place):
    return sorted(os.listdir(place)), (place / "secret").read_bytes()


@pytest.mark.parametrize("name", [b"..", b".", b"", b"below/..", b"/etc/passwd", b"up/secret", b"a\0b"])
@pytest.mark.parametrize("opcode", [LOOKUP, MKDIR, CREATE, RENAME2, LOOKUP_OPEN])
def test_only_single_names_are_taken(place, name, opcode):
    guest = make_guest(place)
    job = guest.look_up(1, b"job")
    fixed = {LOOKUP: b"", MKDIR: struct.pack("<II", 0o755, 0), CREATE: struct.pack("<IIII", 2, 0o644, 0, 0),
             RENAME2: struct.pack("<QII", job, 0, 0) + b"file\0", LOOKUP_OPEN: bytes(8)}
    error, _ = guest.ask(opcode, job, fixed[opcode] + name + b"\0")
    assert error or name == b"a\0b"
    assert seen_outside(place) == (["secret", "shared"], SECRET)


def test_a_link_is_not_followed(place):
    guest = make_guest(place)
    link = guest.look_up(1, b"job", b"way")
    assert guest.ask(OPEN, link, struct.pack("<II", os.O_RDONLY, 0))[0]
    assert guest.ask(SETATTR, link, struct.pack("<I4xQQQqqqIIIIIII4x", 8, 0, *[0] * 12))[0]
    up = guest.look_up(1, b"job", b"up")
    assert guest.ask(LOOKUP, up, b"secret\0")[0]
    assert (place / "secret").read_bytes() == SECRET


def test_a_fifo_is_not_opened(place):
    guest = make_guest(place)
    fifo = guest.look_up(1, b"job", b"fifo")
    assert guest.ask(OPEN, fifo, struct.pack("<II", os.O_RDONLY, 0))[0]


def test_a_regular_file_is_looked_up_and_opened_in_one_request(place):
    guest = make_guest(place)
    job = guest.look_up(1, b"job")
    error, payload = guest.ask(LOOKUP_OPEN, job, bytes(8) + b"file\0")
    node, handle = struct.unpack_from("<Q", payload)[0], struct.unpack_from("<Q", payload, 128)[0]
    assert (error, node) == (0, guest.look_up(job, b"file"))
    assert guest.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 100, 0, 0, 0, 0)) == (0, b"0123456789")

    known = guest.server._files.nodes.copy()
    for name, number in ((b"fifo", errno.EOPNOTSUPP), (b"way", errno.EOPNOTSUPP), (b"below", errno.EOPNOTSUPP),
                         (b"nothing", errno.ENOENT)):
        assert guest.ask(LOOKUP_OPEN, job, bytes(8) + name + b"\0")[0] == number
    assert guest.server._files.nodes == known


def test_what_is_unknown_everywhere_is_told_from_what_the_root_lacks(place):
    """Linux asks never again for what is unknown."""
    guest = make_guest(place)
    assert guest.ask(IOCTL, guest.look_up(1, b"job", b"file"), bytes(32))[0] == errno.ENOSYS
    assert guest.ask(LOOKUP_OPEN, 1, bytes(8) + b"waiting\0")[0] == errno.EOPNOTSUPP


def test_nobody_is_told_of_the_end_of_a_forget_until_there_are_many(place):
    guest = make_guest(place)
    file = guest.look_up(1, b"job", b"file")
    told, call = os.pipe()
    os.set_blocking(told, False)
    guest.queue.replace_call(call)
    for _ in range(15):
        guest.ask(2, file, struct.pack("<Q", 0))
    with pytest.raises(BlockingIOError):
        os.read(told, 8)
    guest.ask(2, file, struct.pack("<Q", 0))
    assert os.read(told, 8)
    os.close(told)


def test_the_end_of_the_last_forget_is_told_though_nothing_else_comes(place):
    """The guest's kernel waits for it when the last mount goes."""
    guest = make_guest(place)
    file = guest.look_up(1, b"job", b"file")
    told, call = os.pipe()
    guest.queue.replace_call(call)
    guest.ask(2, file, struct.pack("<Q", 0))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        device = Device(ours, guest.server)
        device._forgets = guest.queue
        thread = threading.Thread(target=device.serve)
        thread.start()
        is_told = select.select([told], [], [], DEADLINE_S)[0]
        theirs.shutdown(socket.SHUT_WR)
        thread.join()
    os.close(told)
    assert is_told


def test_a_directory_that_becomes_a_link_is_no_way_out(place):
    guest = make_guest(place)
    below = guest.look_up(1, b"job", b"below")
    (place / "shared/below").rmdir()
    (place / "shared/below").symlink_to("..")
    assert guest.ask(LOOKUP, below, b"secret\0")[0] in (errno.ESTALE, errno.ENOTDIR, errno.ELOOP)


@pytest.mark.parametrize("opcode, body", [
    (MKDIR, struct.pack("<II", 0o755, 0) + b"new\0"),
    (CREATE, struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + b"new\0"),
    (10, b"file\0"), (11, b"below\0"), (6, b"new\0target\0"),
    (RENAME2, struct.pack("<QII", 3, 0, 0) + b"file\0new\0"),
    (51, struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + b"\0"),
])
def test_a_read_only_share_refuses_by_itself(place, opcode, body):
    guest = make_guest(place, read_only=True)
    before = sorted(os.listdir(place / "shared"))
    assert guest.ask(opcode, guest.look_up(1, b"job"), body)[0] == errno.EROFS
    assert sorted(os.listdir(place / "shared")) == before


def test_a_read_only_file_is_not_opened_for_writing(place):
    guest = make_guest(place, read_only=True)
    file = guest.look_up(1, b"job", b"file")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        assert guest.ask(OPEN, file, struct.pack("<II", flags, 0))[0] == errno.EROFS
    assert guest.ask(21, file, struct.pack("<II", 1, 0) + b"user.a\0x")[0] == errno.EROFS
    assert guest.ask(SETATTR, file, struct.pack("<I4xQQQqqqIIIIIII4x", 1, *[0] * 13))[0] == errno.EROFS


def test_a_share_of_one_file_gives_that_file_only(place):
    guest = make_guest(place)
    one = guest.look_up(1, b"one")
    assert guest.ask(LOOKUP, one, b"below\0")[0]
    assert guest.ask(LOOKUP, one, b"file\0")[0]
    error, opened = guest.ask(OPEN, one, struct.pack("<II", os.O_RDONLY, 0))
    assert not error
    handle = struct.unpack_from("<Q", opened)[0]
    body = struct.pack("<QQIIQII", handle, 0, 100, 0, 0, 0, 0)
    assert guest.ask(READ, one, body) == (0, b"0123456789")


def test_files_of_two_shares_are_not_linked_or_renamed(place):
    (place / "other").mkdir()
    shared, other = (os.fsencode(str(place / name)) for name in ("shared", "other"))
    guest = FakeGuest(Share("job", shared, None, False), Share("bind0", other, None, True))
    job, bind = guest.look_up(1, b"job"), guest.look_up(1, b"bind0")
    file = guest.look_up(job, b"file")
    assert guest.ask(LINK, bind, struct.pack("<Q", file) + b"new\0")[0] in (errno.EROFS, errno.EXDEV)
    assert guest.ask(RENAME2, job, struct.pack("<QII", bind, 0, 0) + b"file\0new\0")[0] == errno.EXDEV
    assert os.listdir(place / "other") == []


NODES = st.integers(0, 12) | st.integers(0, (1 << 64) - 1)
BODIES = (
    st.binary(max_size=200)
    | st.builds(lambda words, names: struct.pack("<%dQ" % len(words), *words) + names,
                st.lists(st.integers(0, 9) | st.integers(0, (1 << 64) - 1), max_size=9),
                st.sampled_from([b"", b"file\0", b"new\0", b"below\0new\0", b"..\0", b"way\0", b"user.a\0x"])))
REQUESTS = st.lists(st.tuples(st.sampled_from(OPCODES), NODES, BODIES), max_size=30)


@settings(max_examples=100)
@given(requests=REQUESTS)
def test_random_requests_are_answered_or_refused(requests):
    with tempfile.TemporaryDirectory(prefix="apppot-test-") as place:
        shared = os.path.join(place, "shared")
        os.makedirs(os.path.join(shared, "below"))
        for name in ("shared/file", "secret"):
            with open(os.path.join(place, name), "wb") as file:
                file.write(SECRET)
        os.symlink("../secret", os.path.join(shared, "way"))
        guest = FakeGuest(Share("job", os.fsencode(shared), None, False))
        guest.look_up(guest.look_up(1, b"job"), b"below")
        for opcode, node, body in requests:
            if opcode in (20, 30, 33):            # these answer later, in a thread
                continue
            try:
                guest.ask(opcode, node, body)
            except Misfit:
                pass
        assert sorted(os.listdir(place)) == ["secret", "shared"]
        with open(os.path.join(place, "secret"), "rb") as file:
            assert file.read() == SECRET
        guest.server.close()


DESCRIPTOR = st.tuples(
    st.integers(0, MEMORY + 100) | st.integers(0, (1 << 64) - 1),
    st.integers(0, 5000) | st.integers(0, (1 << 32) - 1), st.integers(0, 7), st.integers(0, 70))


@settings(max_examples=100)
@given(chain=st.lists(DESCRIPTOR, min_size=1, max_size=64), head=st.integers(0, 0xFFFF))
def test_random_chains_are_answered_or_a_misfit(chain, head):
    with tempfile.TemporaryDirectory(prefix="apppot-test-") as place:
        guest = FakeGuest(Share("job", os.fsencode(place), None, False))
        for number, (address, length, flags, following) in enumerate(chain):
            guest.describe(number, address, length, flags, following)
        try:
            guest.submit(head)
        except Misfit:
            pass
        guest.server.close()


def test_a_chain_that_never_ends_is_a_misfit(tmp_path):
    guest = FakeGuest(Share("job", os.fsencode(str(tmp_path)), None, False))
    guest.describe(0, BUFFERS, 40, HAS_NEXT, 0)
    with pytest.raises(Misfit, match="never ends"):
        guest.submit(0)


def test_a_page_before_all_memory_is_the_page_of_zeros_and_only_to_be_read(tmp_path):
    memory = GuestMemory()
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 16)
        memory.add(1 << 16, 0, 1 << 16, file.fileno(), 0)
    assert memory.find(0x3000, 4096, True) == bytes(4096) and memory.find(0x3FFF, 1, True) == b"\0"
    for address, length in ((0x3FFF, 2), (0x3000, 4097), (0x20000, 1), (0xFFFF, 2)):
        with pytest.raises(Misfit, match="no memory"):
            memory.find(address, length, True)
    with pytest.raises(Misfit, match="no memory"):
        memory.find(0x3000, 4096)


@settings(max_examples=100)
@given(messages=st.lists(st.tuples(st.integers(0, 45), st.binary(max_size=60)), max_size=12))
def test_random_messages_of_the_vmm_are_taken_or_a_misfit(messages):
    with tempfile.TemporaryDirectory(prefix="apppot-test-") as place:
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull, "rb") as file:
            for number, body in messages:
                fds = struct.pack("i", file.fileno())
                theirs.sendmsg([MESSAGE.pack(number, 1, len(body)) + body],
                               [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            theirs.shutdown(socket.SHUT_WR)
            server = FuseServer(
                [Share("job", os.fsencode(place), None, False)], lambda: None
            )
            try:
                Device(ours, server).serve()
            except Misfit:
                pass
            server.close()


def test_a_guest_that_does_not_want_kicks_is_told_so(tmp_path):
    guest = FakeGuest(Share("job", os.fsencode(str(tmp_path)), None, False))
    guest.queue.want_kicks(False)
    assert struct.unpack_from("<H", guest.bytes, USED)[0] == NO_NOTIFY
    guest.queue.want_kicks(True)
    assert struct.unpack_from("<H", guest.bytes, USED)[0] == 0


def test_more_nodes_than_a_guest_can_know_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(apppot_start, "NODES_MIN", 20)
    for number in range(40):
        (tmp_path / str(number)).write_bytes(b"")
    guest = FakeGuest(Share("job", os.fsencode(str(tmp_path)), None, False))
    guest.server.limit_nodes(0)
    job = guest.look_up(1, b"job")
    answers = [guest.ask(LOOKUP, job, b"%d\0" % number)[0] for number in range(40)]
    assert errno.ENFILE in answers and 0 in answers
