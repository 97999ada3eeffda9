# SPDX-License-Identifier: Apache-2.0
"""The guest is hostile: whatever it sends over the channel ends in a result, or the run goes on."""

import contextlib
import os
import re
import select
import struct
import time
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nodes import DEADLINE_S, assert_error, wait_for
from test_init import SPEC, make_spec

import apppot_start
from apppot_start import (
    CREDIT,
    FRAME,
    FRAME_MAX,
    HELLO,
    KEYS,
    MAGIC,
    PROTOCOL,
    RECEIVED,
    RESULT,
    SAVING,
    SCREEN,
    STARTED,
    STDERR,
    STDIN,
    STDIN_CLOSED,
    STDOUT,
    STOPPED,
    TERMINATE,
    WARNING,
    encode_fields,
    encode_frame,
)

STDIN_SIZE = 100


def follow_stop(link):
    """As that of TerminalLink, but this process does not stop."""
    link.stopped_by = 0
    link._channel.post(apppot_start.SIGNAL, bytes([18]))


class Guest:
    """A session whose guest is the test. Nothing of it writes but to /dev/null, or to nobody."""

    def __init__(self, directory, kinds=b"ppp", with_terminal=False, saves=False, is_read=True):
        self.shown = []
        self.failure = None
        self._ours = []
        from_guest, self.channel = self._pipe()
        self.heard, to_guest = self._pipe()
        os.set_blocking(to_guest, False)
        console, console_end = self._pipe()
        report, report_end = self._pipe()
        end = apppot_start.End(apppot_start.KERNEL)  # what it ends of when nothing else comes
        os.write(report_end, encode_frame(apppot_start.ENDED, apppot_start.encode_end(end)))
        self._close(console_end)
        terminal = apppot_start.Terminal(0, 1) if with_terminal else None
        if terminal:
            self._ours += [terminal.input, terminal.output]
        self._reader_end = None
        if not is_read:
            self._reader_end, blocked = self._pipe()
            os.dup2(blocked, 1)

        self._from_guest = from_guest
        place = os.open(directory, os.O_RDONLY)
        self._ours.append(place)
        directories = apppot_start.Directories(
            *[apppot_start.PrivateDirectory(str(directory), place)] * 3
        )
        self.session = apppot_start.Session(
            apppot_start.Machine(1, from_guest, to_guest, console, -1, report, directories, place),
            make_spec(saved_changes=str(directory / "saved") if saves else None),
            apppot_start.Stdio(kinds, terminal, False),
            apppot_start.Reporter(terminal, False, True, 0),
        )
        self.conversation = self.session._conversation
        self._ours += [self.conversation.channel.wakeup, self.conversation.channel.to_wakeup]

    def _pipe(self):
        ends = apppot_start.make_wide_pipe()
        self._ours += ends
        return ends

    def _close(self, descriptor):
        self._ours.remove(descriptor)
        os.close(descriptor)

    def say(self, content):
        """Let the session take this; what it has taken may be the end."""
        while content and not self._is_over:
            content = content[os.write(self.channel, content[: 1 << 20]) :]
            while not self._is_over and select.select([self._from_guest], [], [], 0)[0]:
                self._step()

    @property
    def _is_over(self):
        return self.failure or self.session.result

    def _step(self):
        try:
            self.session.step()
        except apppot_start.Fatal as fatal:
            self.failure = fatal

    def end(self):
        """Close the channel; return the result, or the error that the run ends with."""
        self._close(self.channel)
        deadline = time.monotonic() + DEADLINE_S
        while not self._is_over:
            assert time.monotonic() < deadline
            self._step()
        return self._is_over

    def close(self):
        if self._reader_end is not None:  # who is blocked in a write gets an error now
            self._close(self._reader_end)
        streams = self.conversation.streams
        streams.complete()
        if streams.reader:
            streams.reader.stop()

        for worker in streams._list_workers():
            if worker.ident is not None:
                worker.join(DEADLINE_S)
                assert not worker.is_alive()

        for descriptor in self._ours:
            os.close(descriptor)


@pytest.fixture
def guests(tmp_path, monkeypatch):
    """Makes guests. 0 is a file, 1 and 2 are nothing, and threads end with their work."""

    def work(worker):
        try:
            worker.work()
        except Exception as error:
            worker.failure = error
        worker.finished.set()
        worker._channel.wake()

    monkeypatch.setattr(apppot_start.Worker, "run", work)
    monkeypatch.setattr(apppot_start.TerminalLink, "follow_stop", follow_stop)
    (tmp_path / "hostfs" / "spool").mkdir(parents=True)
    (tmp_path / "in").write_bytes(bytes(STDIN_SIZE))
    saved = {number: os.dup(number) for number in (0, 1, 2)}
    null = os.open(os.devnull, os.O_WRONLY)

    @contextlib.contextmanager
    def start(**options):
        source = os.open(tmp_path / "in", os.O_RDONLY)
        for number, descriptor in ((0, source), (1, null), (2, null)):
            os.dup2(descriptor, number)
        os.close(source)
        guest = Guest(tmp_path, **options)
        monkeypatch.setattr(apppot_start, "write_stderr", guest.shown.append)

        try:
            yield guest
        finally:
            guest.close()

    yield start
    for number, descriptor in saved.items():
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.close(null)


def fields(*pairs):
    return encode_fields([(name.encode(), value if isinstance(value, bytes) else value.encode())
                          for name, value in pairs])  # fmt: skip


GREETING = fields(("protocol", str(PROTOCOL)), ("base", "x"), ("agent", "1"))
HELLO_FRAME, STARTED_FRAME = encode_frame(HELLO, GREETING), encode_frame(STARTED, b"\0")
UP = MAGIC + HELLO_FRAME + STARTED_FRAME


def result_frame(how="exit", status="0", stdin="0"):
    return encode_frame(RESULT, fields((how, status), ("stdin", stdin)))


def test_a_guest_that_keeps_to_the_rules_is_heard(guests):
    with guests() as guest:
        guest.say(
            b"noise" + MAGIC[:4] + UP + encode_frame(STDOUT, b"out") + encode_frame(STDERR, b"err")
        )
        guest.say(
            encode_frame(WARNING, b"of it") + encode_frame(STDIN_CLOSED) + result_frame("exit", "7")
        )

        assert guest.end() == apppot_start.Result(7)
        assert guest.shown == [b"apppot: warning: of it\n"]


MISFITS = {
    "no frame before hello": STARTED_FRAME,
    "unknown type": UP + encode_frame(99),
    "type of the host": UP + encode_frame(apppot_start.JOB),
    "spooled": UP + encode_frame(STDOUT | apppot_start.SPOOLED, b"../../etc/passwd"),
    "too long": UP + FRAME.pack(STDOUT, FRAME_MAX + 1),
    "hello again": UP + HELLO_FRAME,
    "started again": UP + STARTED_FRAME,
    "started with nothing": MAGIC + HELLO_FRAME + encode_frame(STARTED),
    "started with unknown bits": MAGIC + HELLO_FRAME + encode_frame(STARTED, b"\4"),
    "started with more": MAGIC + HELLO_FRAME + encode_frame(STARTED, b"x" * 999),
    "output before the start": MAGIC + HELLO_FRAME + encode_frame(STDOUT, b"x"),
    "no output": UP + encode_frame(STDOUT),
    "screen without terminal": UP + encode_frame(SCREEN, b"x"),
    "stopped without terminal": UP + encode_frame(STOPPED, b"\x13"),
    "saving nothing": UP + encode_frame(SAVING),
    "progress that nobody asked for": UP + encode_frame(apppot_start.PROGRESS, bytes(33)),
    "stdin closed twice": UP + 2 * encode_frame(STDIN_CLOSED),
    "terminated before the start": MAGIC + HELLO_FRAME + encode_frame(TERMINATE),
    "credit too short": UP + encode_frame(CREDIT, b""),
    "credit for what was not sent": UP + encode_frame(CREDIT, struct.pack("<BI", STDIN, 1 << 30)),
    "credit of nothing": UP + encode_frame(CREDIT, struct.pack("<BI", STDIN, 0)),
    "credit for keys without terminal": UP + encode_frame(CREDIT, struct.pack("<BI", KEYS, 1)),
    "credit for a stranger": UP + encode_frame(CREDIT, struct.pack("<BI", 77, 1)),
    "received what was not sent": MAGIC + HELLO_FRAME + encode_frame(RECEIVED, struct.pack("<I", 2000)),
    "received too long": UP + encode_frame(RECEIVED, b"12345"),
    "result of nothing": UP + encode_frame(RESULT),
    "result without offset": UP + encode_frame(RESULT, fields(("exit", "0"))),
    "result of both kinds": UP + encode_frame(RESULT, fields(("exit", "0"), ("signal", "9"), ("stdin", "0"))),
    "result twice the same": UP + encode_frame(RESULT, fields(("exit", "0"), ("exit", "1"), ("stdin", "0"))),
    "result before the start": MAGIC + HELLO_FRAME + result_frame(),
    "error of status 0": MAGIC + HELLO_FRAME + encode_frame(
        RESULT, fields(("error", "e"), ("hint", "h"), ("status", "0"))),
    "error without hint": MAGIC + HELLO_FRAME + encode_frame(RESULT, fields(("error", "e"), ("status", "125"))),
    "hello without protocol": MAGIC + encode_frame(HELLO, b""),
    "hello without base": MAGIC + encode_frame(HELLO, fields(("protocol", str(PROTOCOL)), ("agent", "1"))),
    **{f"status {text}": UP + result_frame("exit", text) for text in ("256", "-1", "", "0x1", " 1", "1\n", "٣",
                                                                      "9" * 20, "9" * 100000)},
    **{f"signal {text}": UP + result_frame("signal", text) for text in ("0", "65", "-9", "1" * 30)},
    **{f"offset {text}": UP + result_frame("exit", "0", text) for text in ("-1", "101", "9" * 18, "9" * 400, "1e1")},
}  # fmt: skip


@pytest.mark.parametrize("stream", MISFITS.values(), ids=[name[:40] for name in MISFITS])
def test_what_does_not_fit_is_no_message_of_apppot(guests, stream):
    with guests() as guest:
        guest.say(stream[: len(UP)])
        guest.say(stream[len(UP) :])
        result = guest.end()

        # Without a hello it is noise, and the kernel's end is what is told.
        expected = (
            "guest sent what is no message of AppPot ("
            if stream.startswith(MAGIC)
            else "ended with status 0"
        )
        assert result is guest.failure and result.status == 125 and expected in result.message
        assert os.lseek(0, 0, os.SEEK_CUR) <= STDIN_SIZE


def test_nothing_fits_behind_a_result(guests):
    for late in (
        result_frame("exit", "1"), encode_frame(STDOUT, b"x"), encode_frame(WARNING, b"w"),
    ):
        with guests() as guest:
            guest.say(UP + result_frame() + late)
            assert guest.end().status == 125


def test_a_failure_is_not_made_good_by_a_result(guests):
    with guests() as guest:
        guest.say(MAGIC + encode_frame(HELLO, fields(("protocol", "99"), ("base", ""), ("agent", "")))
                  + STARTED_FRAME + result_frame())  # fmt: skip
        assert guest.end().status == 125


def test_an_offset_within_what_was_delivered_is_where_the_next_reader_goes_on(guests):
    with guests() as guest:
        guest.say(UP)
        guest.conversation.streams.reader.finished.wait(DEADLINE_S)
        guest.say(result_frame("exit", "0", "60"))
        assert guest.end().status == 0 and os.lseek(0, 0, os.SEEK_CUR) == 60


@pytest.mark.parametrize(
    "text", [b"\x1b]0;owned\x07", b"a\nb", b"\xc2\x9b31m", b"\xff\xfe", b"\xe2\x80\xaetxt"]
)
def test_a_text_of_the_guest_moves_no_terminal(guests, text):
    with guests() as guest:
        guest.say(MAGIC + HELLO_FRAME + encode_frame(WARNING, text))
        guest.say(encode_frame(RESULT, fields(("error", text), ("hint", text), ("status", "126"))))
        guest.end()
        failure = guest.failure
        assert guest.shown[0].endswith(b"\n")
        for shown in (
            guest.shown[0][:-1],
            *map(apppot_start.one_line, (failure.message, failure.hint)),
        ):
            assert shown.decode().isprintable()

    assert re.fullmatch(
        r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*", apppot_start.show_console(text).decode()
    )


def test_a_console_s_words_are_searched_in_linear_time():
    started = time.process_time()
    for piece in ("a", "a: ", "a:", "x: version `", "Kernel panic - not syncing: "):
        text = piece * (65536 // len(piece))
        apppot_start.explain_loader(text, "/k")
        console = SPEC.vmm.open_console(SPEC.guest)
        console.add(text.encode())
        console.explain_end(256, True)
    assert time.process_time() - started < 3

    fatal = apppot_start.explain_loader(
        "./linux: /lib/libc.so.6: version `GLIBC_2.38' not found (by ./linux)\n", "/k"
    )
    assert "/lib/libc.so.6: version `GLIBC_2.38' not found" in fatal.message


@given(st.sampled_from(["error", "bug"]), st.integers(0, 1 << 16), st.text(), st.text())
def test_a_verdict_of_the_supervisor_is_read_as_it_was_written(what, status, message, hint):
    end = apppot_start.End(what, status, message, hint)
    read = apppot_start.decode_end(apppot_start.encode_end(end))
    assert read == end._replace(message=message.replace("\0", "?"), hint=hint.replace("\0", "?"))


# --- Floods ---------------------------------------------------------------------------------------

FLOODS = {
    "noise": (b"", b"\0AppPo" * 100000),
    "output": (UP, encode_frame(STDOUT, b"xx") * 20000),
    "long output": (UP, encode_frame(STDOUT, bytes(FRAME_MAX - 10))),
    "terminated": (UP, encode_frame(TERMINATE) * 20000),
    "warnings": (UP, encode_frame(WARNING, b"x" * 200) * 1000),
    "stops": (UP, encode_frame(STOPPED, b"\x13") * 1000),
    "a frame that never ends": (UP + FRAME.pack(STDOUT, FRAME_MAX), bytes(1000)),
}


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_takes_little_memory_and_time(guests, name, is_read):
    """Of the guest's frames, in a guest that does not read what it is sent."""
    before, flood = FLOODS[name]
    with guests(with_terminal=True, is_read=is_read) as guest:
        guest.say(before)
        tracemalloc.start()
        started = time.process_time()
        for _ in range(5):
            guest.say(flood)
            guest.shown.clear()
        # The runner may be reading at this moment. The buffer of a read, 1 MiB, is not kept.
        limit = 16 << 20 if "long" in name else 1 << 20
        wait_for(lambda: tracemalloc.get_traced_memory()[0] < limit)
        tracemalloc.stop()
        assert time.process_time() - started < 30
        # On a busy machine the time that a command has after a second SIGTERM may be over before
        # the channel ends.
        assert guest.end().status in ((125, 128 + 9) if name == "terminated" else (125,))


def test_noise_before_the_greeting_is_searched_once(guests):
    with guests() as guest:
        started = time.process_time()
        for _ in range(4000):
            guest.say(bytes(4096))
        guest.say(MAGIC[:3])
        guest.say(MAGIC[3:] + UP[len(MAGIC) :] + result_frame("exit", "3"))
        assert guest.end().status == 3
        assert time.process_time() - started < 10


# --- Anything -------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(
    [0, 1, 2, 60, 100, 101, 1000, 3072, 65536, 65537, 4 << 20, 8 << 20, 1 << 31, (1 << 32) - 1]
)
STREAMS = st.sampled_from([STDIN, KEYS, STDOUT, 0, 255])
TEXTS = st.sampled_from(
    [
        b"", b"0", b"1", b"9", b"60", b"64", b"65", b"101", b"125", b"255", b"256", b"-1",
        b"9" * 30, b"\xff", b"x",
    ]
)
FIELD_NAMES = st.sampled_from(b"exit signal stdin error hint status protocol base agent".split())
FIELDS = st.lists(st.tuples(FIELD_NAMES, TEXTS), max_size=5).map(encode_fields)
KINDS = st.integers(0, 45) | st.integers(0, 255)
PLAIN = st.tuples(st.sampled_from([STDOUT, WARNING]), st.binary(min_size=1)).map(
    lambda pair: encode_frame(*pair)
) | st.just(encode_frame(TERMINATE))
GOOD = (
    st.sampled_from([STDIN_CLOSED, SAVING]).map(encode_frame)
    | st.tuples(st.sampled_from([STDERR, SCREEN]), st.binary(max_size=40)).map(
        lambda pair: encode_frame(*pair)
    )
    | st.tuples(STREAMS, NUMBERS).map(lambda pair: encode_frame(CREDIT, struct.pack("<BI", *pair)))
    | NUMBERS.map(lambda count: encode_frame(RECEIVED, struct.pack("<I", count)))
    | st.integers(0, 70).map(lambda number: encode_frame(STOPPED, bytes([number])))
)
ODD = (
    st.tuples(KINDS, st.binary(max_size=12) | FIELDS).map(lambda pair: encode_frame(*pair))
    | st.tuples(KINDS, NUMBERS).map(lambda pair: FRAME.pack(*pair))
    | FIELDS.map(lambda payload: encode_frame(RESULT, payload))
    | st.sampled_from([MAGIC, HELLO_FRAME, STARTED_FRAME])
    | st.binary(max_size=9)
)
ENDS = st.builds(
    result_frame, st.sampled_from(["exit", "signal"]), st.integers(0, 300).map(str),
    NUMBERS.map(str),
)


@st.composite
def conversations(draw):
    """What a guest says, piece by piece: a good run with a few changes, or anything."""
    frames = [MAGIC, HELLO_FRAME, STARTED_FRAME, *draw(st.lists(PLAIN, max_size=6)), draw(ENDS)]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(frames) - 1))
        how = draw(st.sampled_from(["drop", "again", "insert", "cut", "flip", "move"]))
        frame = frames[place]
        frames[place : place + 1] = {
            "drop": [], "again": [frame, frame], "insert": [draw(GOOD | ODD), frame], "cut": [frame[: len(frame) // 2]],
            "flip": [bytes([frame[0] ^ draw(st.integers(1, 255))]) + frame[1:] if frame else b""],
            "move": [],
        }[how]  # fmt: skip
        if how == "move":
            frames.insert(draw(st.integers(0, len(frames))), frame)
        frames = frames or [b""]

    if draw(st.integers(0, 4)) == 0:
        frames = draw(st.lists(ODD | GOOD | PLAIN, max_size=8))
    return frames


def test_any_conversation_ends_in_a_result_or_goes_on(guests):
    ends = set()
    good_run = [MAGIC, HELLO_FRAME, STARTED_FRAME, result_frame("exit", "3")]

    # Few of the generated conversations go well, and by chance none of them does: one that must is
    # always among them.
    @example(good_run, b"ppp", False, False)
    @settings(max_examples=int(os.environ.get("APPPOT_TEST_EXAMPLES", "150")))
    @given(conversations(), st.sampled_from([b"ppp", b"npp", b"pps"]), st.booleans(), st.booleans())
    def converse(frames, kinds, with_terminal, saves):
        descriptors = set(os.listdir("/proc/self/fd"))
        with guests(kinds=kinds, with_terminal=with_terminal, saves=saves) as guest:
            for frame in frames:
                guest.say(frame)
            result = guest.end()
            ends.add(result.status)
            assert 0 <= result.status <= 255
            assert result.status or b"exit=0\0" in b"".join(frames)
            assert os.lseek(0, 0, os.SEEK_CUR) <= STDIN_SIZE
            if guest.failure:
                assert 125 <= result.status <= 127 and result.message and result.hint
                assert apppot_start.one_line(result.message).decode().isprintable()
            else:
                assert isinstance(result, apppot_start.Result)
            for text in guest.shown:
                assert text[:-1].decode().isprintable() and text.endswith(b"\n")
        assert set(os.listdir("/proc/self/fd")) == descriptors

    converse()
    assert {3, 125} <= ends


# --- Real guests ----------------------------------------------------------------------------------


def say_as_root(frame):
    digits = "".join(f"\\{byte:03o}" for byte in frame)
    return [
        "--root", "--mem", "128M", "--net", "none", "sh", "-c",
        f"printf '{digits}' > /dev/ttyS0; sleep 60",
    ]


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(STOPPED),
        STARTED_FRAME,
        encode_frame(CREDIT, struct.pack("<BI", STDIN, (1 << 32) - 1)),
        result_frame("exit", "0", "9" * 30),
        result_frame("exit", "99999"),
        encode_frame(
            RESULT, fields(("error", "\x1b[31mred"), ("hint", "\x1b[0m"), ("status", "0"))
        ),
    ],
    ids=["stopped", "started", "credit", "offset", "status", "error"],
)
def test_a_frame_of_the_guest_s_root_that_does_not_fit_is_an_error(any_node, frame):
    result = any_node.run(*say_as_root(frame))
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, "guest sent what is no message of AppPot (")


def test_escape_sequences_of_the_guest_s_root_are_shown_and_not_obeyed(node):
    frame = encode_frame(WARNING, b"\x1b]0;owned\x07") + encode_frame(99)
    result = node.run("-v", *say_as_root(frame))
    assert (
        b"apppot: warning: \\x1b]0;owned\\x07\n" in result.stderr and b"\x1b" not in result.stderr
    )

    panic = (
        "printf '\\033[31m\\n' > /dev/kmsg; printf '\\033[31m' > /dev/console; "
        "echo c > /proc/sysrq-trigger"
    )
    result = node.run("-v", "--root", "sh", "-c", panic)
    assert result.returncode == 125 and b"panic" in result.stderr and b"\x1b" not in result.stderr


FLOODING = """\
import os, struct
channel = os.open("/dev/ttyS0", os.O_WRONLY)
frame = struct.pack("<BI", {}, {}) + bytes({})
while True:
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(channel, rest):]
"""


@pytest.mark.parametrize("kind, size", [(STDOUT, 1 << 18), (TERMINATE, 0)])
def test_a_guest_that_ignores_the_output_window_takes_little_of_the_host_s_memory(node, kind, size):
    """Nobody reads what it writes."""
    process = node.start("--root", "--mem", "128M", "--timeout", "20", "--kill-after", "1",
                         "/usr/bin/python3", "-c", FLOODING.format(kind, size, size))  # fmt: skip
    wait_for(lambda: os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert usage.ru_maxrss < 250 << 10  # KiB, of the kernel, too
    assert process.returncode in ((125,) if size else (128 + 9, 128 + 15, 125))
