#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""AppPot's changes files: what differs from the base image, as a layer of an OCI image.

Usage in the appliance: apppot-snap {base,changes,merge,show,squash,diff,apply} ...
Usage on the host: python3 changes.py {show,squash,diff,apply} ...

A layer is a tar, usually with gzip. From top to bottom this file writes and reads that format,
walks trees, finds and saves what has changed, checks and stacks layers, merges them into a tree,
and has the commands at its end.

Constraint: in the appliance a system call costs 10 us or more and an import up to 80 ms. So this
file has a tar of its own, does nothing twice, works relative to directory descriptors and imports
little. Only the sections on merging write into a tree: a kernel that attaches layers would replace
these alone.
"""
# An older Python reads no further than the number and prints this line, so its comment is for that user.
__requires_python__ = 0x3_06         # This Python is too old. AppPot needs Python 3.6 or newer: try python3
import errno
import os
import re
import stat
import struct
import sys
import time
import zlib
from contextlib import ExitStack, contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)

VERSION = "0.1"
FORMAT = 1  # of changes.json and of the manifest


# --- Messages -------------------------------------------------------------------------------------

class Fatal(Exception):
    """The work cannot be done: `message` says what failed on which object, `hint` what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def printable(path: bytes) -> str:
    """One line of text, whatever the bytes are."""
    text = path.decode("utf-8", "backslashreplace")
    if not text.isprintable():
        text = "".join([
            char if char.isprintable() else char.encode("unicode_escape").decode()
            for char in text])
    return text or "."


def absolute(path: bytes) -> str:
    return "/" + printable(path) if path else "/"


def quote(path: bytes) -> str:
    """The path as a word for a shell."""
    return "'" + printable(path).replace("'", "'\\''") + "'"


def format_size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            digits = 0 if unit == "B" or size >= 10 else 1
            return "{:.{}f} {}".format(size, digits, unit)
        size /= 1024
    return "{:.1f} GiB".format(size)


class Report:
    """Tells the user what happens. The agent has a class of its own, which tells the runner."""

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = 0.0  # when the line of progress was written; 0 if there is none
        self.saved = 0     # files in the layer that was written

    def warn(self, text: str) -> None:
        self.clear()
        print("apppot: warning: " + text, file=sys.stderr, flush=True)

    def say(self, path: bytes) -> None:
        """Name a file that was worked on."""
        if self.verbose:
            print(printable(path), flush=True)

    def progress(
        self, what: str, count: int, size: int, all_count: int = 0, all_size: int = 0
    ) -> None:
        """Show how many files and bytes are done. Callers do so once in a while."""
        if not self._is_terminal or self.verbose:
            return
        now = time.monotonic()
        if not self._shown or now > self._shown + 0.1:
            self._shown = now
            of_count = " of {}".format(all_count) if all_count else ""
            of_size = " of " + format_size(all_size) if all_size else ""
            line = "\r{}: {}{} files, {}{}\033[K".format(what, count, of_count, format_size(size), of_size)
            print(line, end="", file=sys.stderr, flush=True)

    def note_saved(self, count: int, path: bytes) -> None:
        """Tell how many files a layer has that was written."""
        self.saved = count
        if self._is_terminal:
            size = format_size(os.path.getsize(path))
            files = "1 file" if count == 1 else "{} files".format(count)
            print("apppot: saved {}, {} to {}".format(files, size, printable(path)), file=sys.stderr)

    def allow(self, layers: Sequence["Layer"]) -> None:
        """Raise Fatal if these layers, which were found whole, must not change anything."""

    def clear(self) -> None:
        """Remove the line of progress."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._shown = 0.0


# --- Paths: relative to the root, which is b"" ----------------------------------------------------

STATE = b"var/lib/apppot"  # the directory of this program's own files
PATH_LENGTH_MAX = 1 << 16  # trees may be deeper than PATH_MAX, but a longer path is an attack


def split_path(path: bytes) -> Tuple[bytes, bytes]:
    directory, _, name = path.rpartition(b"/")
    return directory, name


def join_path(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def count_levels(before: bytes, directory: bytes) -> int:
    """How many directories have to be opened on the way from one directory to another."""
    if before == directory or not directory:
        return 0

    names = directory.split(b"/")
    shared = 0
    for name, other in zip(names, before.split(b"/")):
        if name != other:
            break
        shared += 1
    return len(names) - shared


# --- Members: the files in a layer or in a tree ---------------------------------------------------

# The kinds as the type flags of tar.
REGULAR, HARD_LINK, SYMLINK, CHARACTER = b"0", b"1", b"2", b"3"
BLOCK_DEVICE, DIRECTORY, FIFO = b"4", b"5", b"6"
DEVICES = (CHARACTER, BLOCK_DEVICE)
KINDS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHARACTER,
    stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFIFO: FIFO,
}
# A whiteout deletes the file whose name it has behind this prefix, from the layers below.
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"   # deletes all that the layers below have in its directory
WHITEOUT_META = b".wh..wh."

PIECE = struct.Struct("<QQ")  # offset and length of a part of a sparse file that is no hole
PIECES_MAX = 1 << 21          # of one file


class Member(NamedTuple):
    """A file of any kind."""
    path: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: Tuple[int, int] = (0, 0)
    link: bytes = b""               # the target of a symbolic link, the other path of a hard link
    xattrs: Tuple[Tuple[str, bytes], ...] = ()
    pieces: Optional[bytes] = None  # of a sparse file: a PIECE for each part that is no hole
    change: bytes = b"C"            # A added, M modified, C one of the two


def by_path(member: Member) -> bytes:
    """A key to sort by: a directory comes right before what is in it."""
    return member.path.replace(b"/", b"\0")


def whiteout_of(path: bytes) -> Member:
    directory, name = split_path(path)
    return Member(join_path(directory, WHITEOUT + name), REGULAR, 0, 0, 0, 0, 0)


def is_whiteout(path: bytes) -> bool:
    return path.startswith(WHITEOUT, path.rfind(b"/") + 1)


def link_of(member: Member, first: Member) -> Member:
    """The member as a hard link to the first name of its inode."""
    return member._replace(kind=HARD_LINK, link=first.path, size=0, pieces=None)


def list_pieces(member: Member) -> Iterable[Tuple[int, int]]:
    """Offset and length of each part of a file's content."""
    if member.pieces is None:
        return ((0, member.size),)
    return PIECE.iter_unpack(member.pieces)


def count_stored(member: Member) -> int:
    """The bytes of content that a tar holds for a member."""
    if member.pieces is None:
        return member.size
    return sum([length for _, length in list_pieces(member)])


# --- The format: pax(1), tar(5), and the OCI image specification's layer.md -----------------------

LABEL = STATE + b"/changes.json"  # the member that says what base a layer is for
BLOCK = 512
HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
XATTR = b"SCHILY.xattr."          # the prefix of records with extended attributes
SPECIAL_MAX = 1 << 20             # bytes of a member's pax headers, as in Go's archive/tar
BUFFER = 1 << 18


def add_bytes(content: bytes) -> int:
    """The sum of the bytes, modulo 65521. This is 30 times as fast as sum()."""
    return zlib.adler32(content, 0) & 0xffff


def pad(size: int) -> bytes:
    """The zeros that follow content of this size, up to the next block."""
    return bytes(-size % BLOCK)


# --- Memory ---------------------------------------------------------------------------------------

MEMORY_MAX = 1 << 30  # bytes for what layers say about paths
INDEX_MAX = 1 << 27   # bytes for the index of a layer, which spares the second pass the headers
MEMBER_COST = 450     # bytes of a member in the index (measured)
NODE_COST = 250       # bytes of a path in a Node (measured)


def spare_memory() -> None:
    """Make the work that follows allocate memory faster.

    After a large block was freed, glibc's malloc keeps what is freed, up to twice that size
    (mallopt(3)). Otherwise the buffers of zlib come from the kernel anew each time, and in the
    guest a page fault costs 70 us. Nothing here is circular, so the garbage collector would look
    at a million tuples in vain.
    """
    import gc

    gc.disable()
    bytes(16 << 20)


def available_memory() -> int:
    """Bytes of memory that can be used. A guest that uses more ends in a panic."""
    try:
        with open("/proc/meminfo", "rb") as file:
            match = re.search(br"MemAvailable:\s+(\d+) kB", file.read())
    except OSError:
        match = None
    return int(match.group(1)) << 10 if match else sys.maxsize


def measure(member: Member) -> int:
    """Bytes of memory that a member takes in the index."""
    size = MEMBER_COST + len(member.path) + len(member.link) + len(member.pieces or b"")
    for name, value in member.xattrs:
        size += 200 + len(name) + len(value)
    return size


# --- Files that are written -----------------------------------------------------------------------

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Content = Union[bytes, memoryview]


def write_all(descriptor: int, content: Content) -> None:
    written = os.write(descriptor, content)
    while written < len(content):
        content = memoryview(content)[written:]
        written = os.write(descriptor, content)


@contextmanager
def new_file(path: bytes) -> Iterator[int]:
    """A descriptor to write to. The file gets its name when all is written, or never."""
    hint = "name a file that can be written"
    if os.path.exists(path) and not os.path.isfile(path):
        # The rename would put a file in the place of a device such as /dev/null.
        raise Fatal("cannot write, not a regular file: " + printable(path), hint)

    directory = os.path.dirname(path) or b"."
    temporary = os.path.join(directory, b".apppot-" + os.urandom(6).hex().encode())
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, 0o666)
    except OSError as error:
        raise Fatal("cannot write, {}: {}".format(error.strerror, printable(path)), hint)

    try:
        yield descriptor
        os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)


def replace_file(path: bytes, content: bytes) -> None:
    with new_file(path) as descriptor:
        write_all(descriptor, content)


# --- Writing a layer ------------------------------------------------------------------------------

OCTAL_MAX = 8 ** 11 - 1    # the largest size or time that a header can hold
LATEST_S = 253402300799    # the end of the year 9999, the last that a date can tell
ID_OCTAL_MAX = 8 ** 7 - 1  # the largest uid or gid
LEVEL = 1                  # of zlib: 2.1 to 3.4 times as fast as 6, 8 to 14 % larger (measured)
STORED_MAX = 65535         # bytes in a block that is not compressed (RFC 1951)


def encode_record(key: bytes, value: bytes) -> bytes:
    """A record of a pax header begins with its own length, which includes these digits."""
    size = len(key) + len(value) + 3
    total = size + len(str(size))
    return b"%d %b=%b\n" % (size + len(str(total)), key, value)


def encode_time(time_ns: int) -> bytes:
    minus = b"-" if time_ns < 0 else b""
    return minus + b"%d.%09d" % divmod(abs(time_ns), 10 ** 9)


def encode_xattr_key(name: str) -> bytes:
    """As GNU tar writes it: a key ends at the first "="."""
    return XATTR + os.fsencode(name).replace(b"%", b"%25").replace(b"=", b"%3D")


def encode_header(member: Member) -> bytes:
    """The header proper, of a member whose numbers fit."""
    header = HEADER.pack(
        member.path[:100],
        b"%07o" % member.mode,
        b"%07o" % member.uid,
        b"%07o" % member.gid,
        b"%011o" % member.size,
        b"%011o" % (member.mtime_ns // 10 ** 9),
        b" " * 8,  # counts as the checksum while that is computed
        member.kind,
        member.link[:100],
        b"ustar\00000",
        b"",
        b"",
        b"%07o" % member.device[0],
        b"%07o" % member.device[1],
        b"")
    return header[:148] + b"%06o\0 " % add_bytes(header) + header[156:]


def encode_extended(path: bytes, records: List[Tuple[bytes, bytes]], time_ns: int) -> bytes:
    """The extended header that comes before a member's own, with what that cannot hold."""
    content = b"".join([encode_record(key, value) for key, value in records])
    name = b"PaxHeaders.0/" + path[-80:]
    header = encode_header(Member(name, b"x", 0o644, 0, 0, len(content), time_ns))
    return header + content + pad(len(content))


def encode_pieces(member: Member) -> bytes:
    """The map of a sparse file, in GNU's format 1.0 for pax.

    GNU tar makes a hole at the end only if an empty piece follows it.
    """
    pieces = list(list_pieces(member))
    if not pieces or sum(pieces[-1]) < member.size:
        pieces.append((member.size, 0))

    text = b"%d\n" % len(pieces) + b"".join([b"%d\n%d\n" % piece for piece in pieces])
    return text + pad(len(text))


def encode_member(member: Member) -> bytes:
    """All that comes before the content of a member."""
    if len(member.path) >= PATH_LENGTH_MAX:
        start = absolute(member.path[:99])
        raise Fatal(
            "a path of more than {} bytes cannot be saved: {}...".format(PATH_LENGTH_MAX, start),
            "remove these directories, or leave them out by --exclude")

    path, kind, mode, uid, gid, size, time_ns, device, link, xattrs, pieces, change = member
    name = (path or b".") + b"/" if kind == DIRECTORY else path
    if kind != REGULAR:
        size = 0
    records: List[Tuple[bytes, bytes]] = []

    sparse_map = b""
    if pieces is not None:
        records.append((b"GNU.sparse.major", b"1"))
        records.append((b"GNU.sparse.minor", b"0"))
        records.append((b"GNU.sparse.name", name))
        records.append((b"GNU.sparse.realsize", b"%d" % size))
        sparse_map = encode_pieces(member)
        name = b"GNUSparseFile.0/" + path[-80:]
        size = len(sparse_map) + count_stored(member)

    if uid > ID_OCTAL_MAX:
        records.append((b"uid", b"%d" % uid))
        uid = 0
    if gid > ID_OCTAL_MAX:
        records.append((b"gid", b"%d" % gid))
        gid = 0
    if size > OCTAL_MAX:
        records.append((b"size", b"%d" % size))
        size = 0
    if time_ns % 10 ** 9 or not 0 <= time_ns < OCTAL_MAX * 10 ** 9:
        records.append((b"mtime", encode_time(time_ns)))
        time_ns = min(max(time_ns, 0), OCTAL_MAX * 10 ** 9)

    if len(name) > 100:
        records.append((b"path", name))
    if len(link) > 100:
        records.append((b"linkpath", link))
    if xattrs:
        records += [(encode_xattr_key(key), value) for key, value in xattrs]
    if change == b"M":
        records.append((b"comment", b"modified"))  # pax readers ignore this keyword alone

    header = encode_header(Member(name, kind, mode, uid, gid, size, time_ns, device, link))
    if records:
        header = encode_extended(path, records, time_ns) + header
    return header + sparse_map


class Sink:
    """Takes the blocks of a tar, each from `buffer`, and writes them as they are."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.buffer = memoryview(bytearray(BUFFER))

    def put(self, size: int) -> None:
        """Write the first bytes of the buffer."""
        write_all(self._descriptor, self.buffer[:size])

    def finish(self) -> None:
        """Write what comes after the last block."""


class Deflater(Sink):
    """Writes the blocks as gzip (RFC 1952)."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -15)
        self._size = 0
        self._crc = 0
        write_all(descriptor, b"\x1f\x8b\x08\0\0\0\0\0\0\xff")  # without time and name

    def put(self, size: int) -> None:
        content = self.buffer[:size]
        self._crc = zlib.crc32(content, self._crc)
        self._size += size
        if is_compressible(content):
            write_all(self._descriptor, self._compressor.compress(content))
        else:
            self._store(content)

    def _store(self, content: memoryview) -> None:
        """Write blocks that are not compressed.

        The compressor is flushed first and forgets what it has seen, as it does not see these.
        """
        parts: List[Content] = [self._compressor.flush(zlib.Z_FULL_FLUSH)]
        for start in range(0, len(content), STORED_MAX):
            part = content[start:start + STORED_MAX]
            parts.append(struct.pack("<BHH", 0, len(part), len(part) ^ 0xffff))
            parts.append(part)
        write_all(self._descriptor, b"".join(parts))

    def finish(self) -> None:
        end = struct.pack("<II", self._crc, self._size & 0xffffffff)
        write_all(self._descriptor, self._compressor.flush() + end)


def is_compressible(content: memoryview) -> bool:
    """Decide by samples.

    Most large files are compressed already, and deflate takes as long for them as for others.
    """
    starts = range(0, len(content), BUFFER // 4)
    samples = b"".join([content[start:start + 2048] for start in starts])
    return len(zlib.compress(samples, 1)) < 0.95 * len(samples)


class LayerWriter:
    """Puts members and their content one behind the other, in blocks of BUFFER bytes."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._fill = 0  # bytes in the buffer
        self._crc = 0   # of all blocks before
        self.size = 0   # of all blocks before
        self.tell: Callable[[int], None] = lambda size: None  # called with it at each block
        self._newest_ns = 0

    def add(self, member: Member) -> None:
        self._newest_ns = max(self._newest_ns, member.mtime_ns)
        self.write(encode_member(member))

    def write(self, content: Content) -> None:
        while content:
            end = min(self._fill + len(content), BUFFER)
            count = end - self._fill
            self._sink.buffer[self._fill:end] = content[:count]
            self._advance(count)
            content = content[count:]

    def copy(self, descriptor: int, size: int) -> bool:
        """Read from a file straight into the buffer.

        If the file ends early, zeros take the place of the rest, and the answer is False.
        """
        while size:
            end = min(self._fill + size, BUFFER)
            count = os.readv(descriptor, [self._sink.buffer[self._fill:end]])
            if count == 0:
                for start in range(0, size, BUFFER):
                    self.write(bytes(min(size - start, BUFFER)))
                return False

            self._advance(count)
            size -= count
        return True

    def _advance(self, count: int) -> None:
        self._fill += count
        if self._fill == BUFFER:
            self._flush()

    def _flush(self) -> None:
        self.size += self._fill
        self.tell(self.size)
        self._crc = zlib.crc32(self._sink.buffer[:self._fill], self._crc)
        self._sink.put(self._fill)
        self._fill = 0

    def finish(self, base: str) -> None:
        """Write the label and the end.

        The label closes with a checksum of all before it, as a plain tar has none of content. Its
        time is that of the newest member, and never the present, so that the same tree gives the
        same bytes.
        """
        newest_s = min(self._newest_ns // 10 ** 9, LATEST_S)
        created_s = int(os.environ.get("SOURCE_DATE_EPOCH") or newest_s)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created_s))
        template = (
            '{{\n"format": {},\n"base": "{}",\n"created": "{}",\n'
            '"tool": "AppPot {}",\n"crc32": "')
        text = template.format(FORMAT, base, created, VERSION).encode()
        size = len(text) + 12  # with the checksum and what closes the label

        label = Member(LABEL, REGULAR, 0o644, 0, 0, size, created_s * 10 ** 9)
        self.write(encode_member(label) + text)
        crc = zlib.crc32(self._sink.buffer[:self._fill], self._crc)
        self.write(b'%08x"\n}\n' % crc)
        self.write(pad(size) + bytes(2 * BLOCK))
        if self._fill:
            self._flush()


# --- Reading a layer: its bytes -------------------------------------------------------------------

PACKED = 1 << 16  # bytes that are read from the file at once


class Damaged(Exception):
    """The bytes are not those of a layer."""


class Stream:
    """The tar in a file, plain or with gzip.

    It is unpacked piece by piece, so that memory is bounded whatever the sizes are.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.lseek(descriptor, 0, os.SEEK_SET)
        self._packed = os.read(descriptor, PACKED)
        self.is_gzip = self._packed.startswith(b"\x1f\x8b")
        self._inflate = zlib.decompressobj(31)
        self._chunk = b""
        self._position = 0  # in the chunk
        self._crc = 0       # of a plain tar, up to the chunk

    def _refill(self) -> bool:
        """Get the next chunk. False means the end."""
        if self.is_gzip:
            self._chunk = self._unpack()
        else:
            self._crc = zlib.crc32(self._chunk, self._crc)
            self._chunk = self._packed or os.read(self._descriptor, PACKED)
            self._packed = b""
        self._position = 0
        return len(self._chunk) > 0

    def _unpack(self) -> bytes:
        while True:
            if self._inflate.eof:
                # Another gzip member may follow.
                self._packed = self._inflate.unused_data or os.read(self._descriptor, PACKED)
                if not self._packed:
                    return b""
                self._inflate = zlib.decompressobj(31)

            self._packed = self._packed or os.read(self._descriptor, PACKED)
            if not self._packed:
                raise Damaged("the gzip data end early")
            try:
                content = self._inflate.decompress(self._packed, BUFFER)
            except zlib.error as error:
                raise Damaged("the gzip data are wrong: {}".format(error))
            self._packed = self._inflate.unconsumed_tail
            if content:
                return content

    def take(self, limit: int) -> memoryview:
        """Between 1 and `limit` bytes, as many as are at hand."""
        if self._position == len(self._chunk) and not self._refill():
            raise Damaged("it ends early")
        content = memoryview(self._chunk)[self._position:self._position + limit]
        self._position += len(content)
        return content

    def read(self, size: int) -> bytes:
        end = self._position + size
        content = self._chunk[self._position:end]
        if end <= len(self._chunk):
            self._position = end
            return content

        self._position = len(self._chunk)
        parts = [content]
        rest = size - len(content)
        while rest:
            part = self.take(rest)
            parts.append(bytes(part))
            rest -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.take(size))

    def crc(self) -> int:
        """The checksum of all that was read, if the tar is plain."""
        return zlib.crc32(self._chunk[:self._position], self._crc)

    def expect_whole(self) -> None:
        """Read to the end, so that zlib compares the checksum of gzip."""
        while self._refill():
            pass

    def expect_end(self) -> None:
        """Read to the end, where nothing but zeros may stand: tar fills its last record so."""
        while self._position < len(self._chunk) or self._refill():
            if self._chunk[self._position:].strip(b"\0"):
                raise Damaged("something follows its end")
            self._position = len(self._chunk)


# --- Reading a layer: the fields of its headers ---------------------------------------------------

# include/uapi/linux/limits.h; SIZE_MAX is of a file of ext4.
NAME_MAX = 255
SYMLINK_MAX = 4095
XATTR_NAME_MAX = 255
XATTR_SIZE_MAX = 1 << 16
XATTR_LIST_MAX = 1 << 16
OLD_SPARSE = b"S"  # the kind of a sparse file in GNU's old format
KNOWN_KINDS = {*KINDS.values(), HARD_LINK, OLD_SPARSE}
ID_MAX = (1 << 32) - 2  # -1 tells chown(2) to change nothing
SIZE_MAX = (1 << 44) - 4096
TIME_MAX_NS = (1 << 40) * 10 ** 9


class Label(NamedTuple):
    """What the member changes.json says about its layer."""
    base: str
    created: str
    tool: str


def clean_path(name: bytes) -> bytes:
    """A path in the one spelling that is used here.

    As with other tools, /a is below the root of the tree that a layer is unpacked to.
    """
    if len(name) > PATH_LENGTH_MAX:
        raise Damaged("a name of more than {} bytes: {}".format(PATH_LENGTH_MAX, printable(name)))
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts or b"\0" in name:
        raise Damaged("unsafe name " + printable(name))

    if len(name) > NAME_MAX:
        for part in parts:
            length = len(part) - (len(WHITEOUT) if part.startswith(WHITEOUT) else 0)
            if length > NAME_MAX:
                raise Damaged("a name of more than {} bytes: {}".format(NAME_MAX, printable(name)))
    return b"/".join(parts)


def parse_number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's base 256
        half = 1 << 8 * len(field) - 1
        number = int.from_bytes(field, "big") - half
        return number - half if field[0] & 0x40 else number

    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise Damaged("a header field is no number: {!r}".format(field))


def parse_decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise Damaged("no number: {!r}".format(text[:40]))
    return int(text)


def parse_time(text: bytes) -> int:
    seconds, _, fraction = text.partition(b".")
    whole_ns = parse_decimal(seconds.lstrip(b"-")) * 10 ** 9
    time_ns = whole_ns + parse_decimal(fraction[:9].ljust(9, b"0"))
    return -time_ns if seconds.startswith(b"-") else time_ns


def parse_records(content: bytes) -> Dict[bytes, bytes]:
    """The records of an extended header by their keys."""
    records = {}
    start = 0
    while start < len(content):
        blank = content.find(b" ", start, start + 20)
        end = start + parse_decimal(content[start:blank]) if blank > start else 0
        key, equals, value = content[blank + 1:end - 1].partition(b"=")
        if not blank < end <= len(content) or content[end - 1:end] != b"\n" or not equals:
            raise Damaged("an extended header is wrong")

        if value or key.startswith(XATTR):
            records[key] = value
        else:
            records.pop(key, None)  # pax(1): the header's own field is valid again
        start = end
    return records


def parse_label(content: bytes) -> Optional[Label]:
    """Parse changes.json, which has a field on each line: the json module costs 50 ms to import.

    A field that a terminal would not print as it is does not count.
    """
    text = content.decode("ascii", "replace")
    fields = dict(re.findall(r'^"(\w+)": "?([ !#-~]{0,99}?)"?,?$', text, re.MULTILINE))
    version = fields.get("format", "")
    if not version.isdigit():
        return None
    if int(version) > FORMAT:
        message = "changes file has format {}: this AppPot knows up to {}".format(version, FORMAT)
        hint = "use the AppPot that made it, or a newer one: " + fields.get("tool", "?")
        raise Fatal(message, hint)
    return Label(fields.get("base", ""), fields.get("created", ""), fields.get("tool", ""))


def decode_xattrs(records: Dict[bytes, bytes]) -> Tuple[Tuple[str, bytes], ...]:
    xattrs = []
    for key, value in records.items():
        if key.startswith(XATTR):
            name = key[len(XATTR):].replace(b"%3D", b"=").replace(b"%25", b"%")
            xattrs.append((os.fsdecode(name), value))
    return tuple(xattrs)


def are_possible(xattrs: Tuple[Tuple[str, bytes], ...]) -> bool:
    """Whether a kernel takes such extended attributes (xattr(7))."""
    names = 0
    for name, value in xattrs:
        length = len(os.fsencode(name))
        names += length + 1
        if not 0 < length <= XATTR_NAME_MAX or len(value) > XATTR_SIZE_MAX or "\0" in name:
            return False
    return names <= XATTR_LIST_MAX


def check_member(member: Member) -> None:
    """Raise Damaged if no file can be as the header says."""
    path, kind, _, uid, gid, size, mtime_ns, (major, minor), link, xattrs, _, _ = member
    flaw = None
    if kind not in KNOWN_KINDS:
        flaw = "a member of unknown type {!r}".format(kind)
    elif not (0 <= uid <= ID_MAX and 0 <= gid <= ID_MAX and 0 <= size <= SIZE_MAX):
        flaw = "an impossible owner or size"
    elif abs(mtime_ns) > TIME_MAX_NS:
        flaw = "an impossible time"
    elif not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        flaw = "an impossible device number"
    elif kind == SYMLINK and (not 0 < len(link) <= SYMLINK_MAX or b"\0" in link):
        flaw = "an impossible symbolic link"
    elif kind == HARD_LINK and (not link or link == path):
        flaw = "an impossible hard link"
    elif not path and kind != DIRECTORY:
        flaw = "a root that is no directory"
    elif xattrs and not are_possible(xattrs):
        flaw = "impossible extended attributes"

    if flaw:
        raise Damaged("{}: {}".format(flaw, printable(path)))


# --- Reading a layer: its members -----------------------------------------------------------------

NAME_A_LAYER = (
    "name a file that --save-changes or `apppot-snap changes` wrote, or a layer of an OCI image")

# Gzip packs zeros a thousandfold, and the headers of empty files with names in a row a
# hundredfold. The headers of a layer may be this many times as large as its file and a fixed
# amount more, which bounds time and memory.
HEADERS_RATIO = 128
HEADERS_MAX = 16 << 20

# Of each member: the member, the bytes between the content before and its own, those of its own.
Index = List[Tuple[Member, int, int]]


class Foreign(Damaged):
    """The file may be whole, but is no layer: `what` says what it is.

    {} in `hint` stands for its name in a shell.
    """

    def __init__(self, what: str, hint: str = NAME_A_LAYER) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class LayerReader:
    """Iterates over the members of a layer; content() gives what the present one holds.

    The first pass makes an index, if that takes no more than `index_max` bytes of memory. The
    second pass gets it as `known` and does not decode the headers again.
    """

    def __init__(
        self, descriptor: int, known: Optional[Index] = None, index_max: int = 0
    ) -> None:
        self._stream = Stream(descriptor)
        self.is_gzip = self._stream.is_gzip
        self._before = 0  # bytes since the end of the last content
        self._left = 0    # bytes of content that were not read yet

        self._known = known
        self.index: Optional[Index] = []
        self._index_max = index_max
        self.measured = 0  # bytes of memory that all members take

        self._headers_left = HEADERS_MAX + HEADERS_RATIO * os.fstat(descriptor).st_size
        self.levels = 0  # directories to be opened on the way from member to member
        self._member_directory = b""
        self._link_directory = b""

    def __iter__(self) -> Iterator[Member]:
        if self._known is None:
            for member in self._scan():
                yield member
                self._stream.skip(self._left)
                self._left = 0
            return

        for member, before, size in self._known:
            self._stream.skip(before)
            self._left = size
            yield member
            self._stream.skip(self._left)
            self._left = 0
        self._stream.expect_whole()

    def _scan(self) -> Iterator[Member]:
        padding = 0
        while True:
            self._stream.skip(padding)
            self._before = padding
            header = self._read_header()
            if header is None:
                return

            member, self._left = self._decode(*header)
            padding = -self._left % BLOCK
            if member.pieces is not None:
                member = self._read_pieces(member)
            self._count_ways(member)
            self._keep(member)
            yield member

    def _keep(self, member: Member) -> None:
        self.measured += measure(member)
        if self.measured > self._index_max:
            self.index = None
        if self.index is not None:
            self.index.append((member, self._before, self._left))

    def _read(self, size: int) -> bytes:
        """Read what is no content."""
        self._before += size
        self._spend(size)
        return self._stream.read(size)

    def _spend(self, size: int) -> None:
        """A file of a few KiB may unpack to headers that would take hours and all memory."""
        self._headers_left -= size
        if self._headers_left < 0:
            raise Damaged("it is all headers, as no tree of files has them")

    def _count_ways(self, member: Member) -> None:
        directory = split_path(member.path)[0]
        if directory != self._member_directory:
            self._count_way(self._member_directory, directory)
            self._member_directory = directory
        if member.kind == HARD_LINK:
            directory = split_path(member.link)[0]
            self._count_way(self._link_directory, directory)
            self._link_directory = directory

    def _count_way(self, before: bytes, directory: bytes) -> None:
        """To open a directory takes as long as to read a header."""
        levels = count_levels(before, directory)
        self.levels += levels
        self._spend(levels * BLOCK)

    def content(self) -> Iterator[memoryview]:
        while self._left:
            piece = self._stream.take(self._left)
            self._left -= len(piece)
            yield piece

    def read(self) -> bytes:
        """The whole content of a member that is known to be small."""
        return b"".join(self.content())

    def crc(self) -> int:
        return self._stream.crc()

    def _read_header(self) -> Optional[Tuple[bytes, Dict[bytes, bytes]]]:
        """The header proper, and the records of the extended ones before it; None at the end."""
        records: Dict[bytes, bytes] = {}
        left = SPECIAL_MAX
        while True:
            header = self._read(BLOCK)
            if not header.strip(b"\0"):
                if records or self._stream.read(BLOCK).strip(b"\0"):
                    raise Damaged("a block of zeros is not its end")
                self._stream.expect_end()
                return None

            checksum = header[148:156]
            wanted = add_bytes(header) - add_bytes(checksum) + add_bytes(b" " * 8)
            if (parse_number(checksum) - wanted) % 65521:
                raise Damaged("a header has a wrong checksum, or it is no tar")
            kind = header[156:157]
            if kind not in b"xgLK":
                return header, records

            size = parse_number(header[124:136])
            if not 0 <= size <= left:
                raise Damaged("extended headers of more than {} bytes".format(SPECIAL_MAX))
            content = self._read(size + -size % BLOCK)[:size]
            if kind == b"g":
                continue  # of all members that follow; umoci and docker ignore it, too
            left -= size
            if kind == b"x":
                records.update(parse_records(content))
            else:  # GNU's long names
                records[b"path" if kind == b"L" else b"linkpath"] = content.rstrip(b"\0")

    def _decode(self, header: bytes, records: Dict[bytes, bytes]) -> Tuple[Member, int]:
        """The member, and how many bytes of content follow."""
        (name, mode, uid_field, gid_field, size_field, mtime_s, _, kind,
         link, magic, _, _, major, minor, prefix) = HEADER.unpack(header)
        name = name.partition(b"\0")[0]
        link = link.partition(b"\0")[0]
        if prefix[0] and magic == b"ustar\00000":
            name = prefix.partition(b"\0")[0] + b"/" + name

        if records:
            name = records.get(b"GNU.sparse.name", records.get(b"path", name))
            link = records.get(b"linkpath", link)
        uid = parse_decimal(records[b"uid"]) if b"uid" in records else parse_number(uid_field)
        gid = parse_decimal(records[b"gid"]) if b"gid" in records else parse_number(gid_field)
        mtime_ns = (
            parse_time(records[b"mtime"]) if b"mtime" in records
            else parse_number(mtime_s) * 10 ** 9)

        if kind in b"\0" + b"7":  # a file of old tars, and one that asks to be contiguous
            kind = REGULAR
        size = 0
        if kind == REGULAR:
            has_record = b"size" in records
            size = parse_decimal(records[b"size"]) if has_record else parse_number(size_field)
            if name.endswith(b"/"):
                kind = DIRECTORY
        if kind == HARD_LINK:
            link = clean_path(link)
        elif kind != SYMLINK:
            link = b""

        device = (parse_number(major), parse_number(minor)) if kind in DEVICES else (0, 0)
        change = b"M" if records.get(b"comment") == b"modified" else b"C"
        member = Member(
            clean_path(name), kind, parse_number(mode) & 0o7777, uid, gid, size, mtime_ns,
            device, link, decode_xattrs(records), None, change)
        check_member(member)
        if kind == OLD_SPARSE or b"GNU.sparse" in b"".join(records):
            member = self._decode_sparse(member, records)
        return member, size

    @staticmethod
    def _decode_sparse(member: Member, records: Dict[bytes, bytes]) -> Member:
        version = (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor"))
        if version != (b"1", b"0"):
            what = "a tar with a sparse file in an old format, " + absolute(member.path)
            raise Foreign(what, "make it again with: tar --format=posix")

        size = parse_decimal(records.get(b"GNU.sparse.realsize", b""))
        member = member._replace(size=size, pieces=b"")
        check_member(member)
        return member

    def _read_pieces(self, member: Member) -> Member:
        """Read the map before a sparse file's content: a count, and as many pairs of numbers."""
        numbers = self._read_numbers()
        count = next(numbers)
        pieces = bytearray()
        end = 0
        size = 0
        is_right = count <= PIECES_MAX
        for _ in range(count if is_right else 0):
            offset = next(numbers)
            length = next(numbers)
            if offset < end or offset + length > member.size:
                is_right = False
                break
            end = offset + length
            if length:
                pieces += PIECE.pack(offset, length)
                size += length

        if not is_right or size != self._left:
            raise Damaged("a wrong map of a sparse file: " + printable(member.path))
        return member._replace(pieces=bytes(pieces))

    def _read_numbers(self) -> Iterator[int]:
        """Decimal numbers, each on a line, in blocks that count as content."""
        rest = b""
        while True:
            if self._left < BLOCK:
                raise Damaged("a map of a sparse file is longer than its content")
            self._left -= BLOCK
            *lines, rest = (rest + self._read(BLOCK)).split(b"\n")
            for line in lines:
                yield parse_decimal(line)
            parse_decimal(rest or b"0")  # must not be longer than one number


# --- Trees ----------------------------------------------------------------------------------------

DESCRIPTORS = 200  # how many directories are kept open on the way to a path

T = TypeVar("T", bound="Tree")


class Mounted(Exception):
    """Something is mounted on the path that this names: what is there belongs to no layer."""

    def __init__(self, path: bytes) -> None:
        super().__init__(path)
        self.path = path


def find_mounts(root: bytes) -> Set[bytes]:
    """The mount points below a root, relative to it.

    stat() does not tell about bind mounts of the same file system, so proc(5) has to.
    """
    top = os.path.realpath(root).rstrip(b"/") + b"/"
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            points = [line.split(b" ", 5)[4] for line in file]
    except FileNotFoundError:
        return set()

    def unescape(point: bytes) -> bytes:
        return re.sub(br"\\(\d{3})", lambda match: bytes([int(match.group(1), 8)]), point)

    plain = [unescape(point) for point in points]
    return {point[len(top):] for point in plain if point.startswith(top) and point != top}


class Level:
    """An open directory on the way down, and what has to be done when it is left."""
    __slots__ = ("name", "descriptor", "status", "inherits", "is_touched", "is_new", "member")

    def __init__(self, name: bytes, descriptor: int, status: os.stat_result) -> None:
        self.name = name
        self.descriptor = descriptor  # -1 if it was closed, as many below it are open
        self.status = status
        self.inherits: Optional[bool] = None  # whether new files get its group or its ACL
        self.is_touched = False  # whether something was made or removed in it
        self.is_new = False
        self.member: Optional[Member] = None  # the metadata that it gets


class Tree:
    """Opens the directories of a tree, never through a symlink or into another file system.

    Walks and layers go from neighbour to neighbour, so most of the way is open already. A path may
    be longer than the kernel takes.
    """
    FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

    def __init__(self, root: bytes) -> None:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.levels = [Level(b"", descriptor, os.fstat(descriptor))]
        self.device = self.levels[0].status.st_dev
        self.mounts = find_mounts(root)
        self._path = b""  # of the last level

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        for level in self.levels:
            if level.descriptor >= 0:
                os.close(level.descriptor)

    def open(self, path: bytes) -> int:
        """The descriptor of a directory. It is valid until the next call."""
        while self._path and path != self._path and not path.startswith(self._path + b"/"):
            self.leave()
        if path != self._path:
            for name in path[len(self._path):].lstrip(b"/").split(b"/"):
                self._enter(name)
        return self.levels[-1].descriptor

    def lstat(self, path: bytes) -> os.stat_result:
        directory, name = split_path(path)
        return os.stat(name or b".", dir_fd=self.open(directory), follow_symlinks=False)

    def _enter(self, name: bytes) -> None:
        path = join_path(self._path, name)
        descriptor = os.open(name, self.FLAGS, dir_fd=self.levels[-1].descriptor)
        status = os.fstat(descriptor)
        if status.st_dev != self.device or path in self.mounts:
            os.close(descriptor)
            raise Mounted(path)

        self.levels.append(Level(name, descriptor, status))
        self._path = path
        if len(self.levels) > DESCRIPTORS + 1:
            far = self.levels[-DESCRIPTORS]
            os.close(far.descriptor)
            far.descriptor = -1

    def leave(self) -> None:
        """Go back to the parent directory."""
        level = self.levels[-1]
        parent = self.levels[-2]
        if parent.descriptor < 0:
            parent.descriptor = os.open("..", self.FLAGS, dir_fd=level.descriptor)
            if not os.path.samestat(os.fstat(parent.descriptor), parent.status):
                message = "directory was moved meanwhile: " + printable(level.name)
                raise Fatal(message, "let nothing else work in there")

        self.finish(level, parent)
        self.levels.pop()
        os.close(level.descriptor)
        self._path = split_path(self._path)[0]

    def finish(self, level: Level, parent: Level) -> None:
        """Do what has to be done before a directory is left."""


def unreadable(path: bytes, error: OSError) -> Fatal:
    message = "cannot be read, {}: {}".format(error.strerror, absolute(path))
    return Fatal(message, "it takes root; in the appliance: sudo apppot-snap")


def scan(
    tree: Tree, exclude: "re.Pattern[bytes]", skipped: Dict[bytes, str]
) -> Iterator[Tuple[bytes, os.stat_result]]:
    """Every path with its lstat, a directory before what is in it, names in order of their bytes.

    What is left out goes into `skipped`, with the reason.
    """
    pending = [(b"", tree.levels[0].status)]
    while pending:
        path, status = pending.pop()
        yield path, status
        if not stat.S_ISDIR(status.st_mode):
            continue

        try:
            found = scan_directory(tree, path, exclude, skipped)
        except (FileNotFoundError, NotADirectoryError, Mounted):
            continue  # it was replaced meanwhile
        except PermissionError as error:
            raise unreadable(path, error)
        found.sort(reverse=True)
        pending += found


def scan_directory(
    tree: Tree, path: bytes, exclude: "re.Pattern[bytes]", skipped: Dict[bytes, str]
) -> List[Tuple[bytes, os.stat_result]]:
    descriptor = tree.open(path)
    found = []
    # scandir() takes no descriptor in Python 3.6.
    for name in map(os.fsencode, os.listdir(descriptor)):
        child = join_path(path, name)
        if exclude.fullmatch(b"/" + child):
            skipped[child] = "excluded"
            continue
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError:
            continue  # it was removed meanwhile

        if status.st_dev != tree.device or child in tree.mounts:
            skipped[child] = "a mount point"
        elif name.startswith(WHITEOUT):
            skipped[child] = "a name with a meaning of its own in layers"
        else:
            found.append((child, status))
    return found


# --- The files of a tree --------------------------------------------------------------------------

# These belong to the security policy of a machine, not to the file.
FOREIGN_XATTRS = ("security.selinux", "security.ima", "security.evm")

File = Union[int, bytes]  # a descriptor, or a path; a symlink at its end is not followed


def member_of(path: bytes, status: os.stat_result, change: bytes = b"C") -> Member:
    """What lstat tells; KeyError for a socket. A file that may have holes has `pieces`."""
    kind = KINDS[stat.S_IFMT(status.st_mode)]
    device = (0, 0)
    if kind in DEVICES:
        device = (os.major(status.st_rdev), os.minor(status.st_rdev))

    size = 0
    pieces = None
    if kind == REGULAR:
        size = status.st_size
        pieces = b"" if status.st_blocks * BLOCK < size else None
    return Member(
        path, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, size,
        status.st_mtime_ns, device, pieces=pieces, change=change)


def proc_path(directory: int, name: bytes) -> bytes:
    """A path for the calls on extended attributes, which have no *at() form."""
    return b"/proc/self/fd/%d/%b" % (directory, name)


def read_xattrs(target: File) -> Tuple[Tuple[str, bytes], ...]:
    follow = isinstance(target, int)
    try:
        names = os.listxattr(target, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOENT):
            return ()
        raise
    return tuple([
        (name, os.getxattr(target, name, follow_symlinks=follow))
        for name in sorted(names) if name not in FOREIGN_XATTRS])


def find_pieces(descriptor: int, size: int) -> Optional[bytes]:
    """Where a sparse file has data; None if it has no holes."""
    pieces = bytearray()
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:
            break  # ENXIO: a hole to the end
        if start >= size:
            break  # the file has grown meanwhile
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        pieces += PIECE.pack(start, end - start)

    os.lseek(descriptor, 0, os.SEEK_SET)
    if pieces == PIECE.pack(0, size):
        return None
    if len(pieces) >= PIECES_MAX * PIECE.size:
        return None  # no reader takes such a map, so the file is saved without holes
    return bytes(pieces)


@contextmanager
def open_member(tree: Tree, member: Member) -> Iterator[Tuple[Member, int]]:
    """The member with what lstat does not tell, and a descriptor; -1 if it is no regular file."""
    directory, name = split_path(member.path)
    descriptor = -1
    try:
        if member.kind == DIRECTORY:
            member = member._replace(xattrs=read_xattrs(tree.open(member.path)))
        elif member.kind == REGULAR:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=tree.open(directory))
            pieces = None
            if member.pieces is not None:
                pieces = find_pieces(descriptor, member.size)
            member = member._replace(xattrs=read_xattrs(descriptor), pieces=pieces)
        elif member.kind != HARD_LINK:
            parent = tree.open(directory)
            link = os.readlink(name, dir_fd=parent) if member.kind == SYMLINK else b""
            member = member._replace(link=link, xattrs=read_xattrs(proc_path(parent, name)))

        yield member, descriptor
    except PermissionError as error:
        raise unreadable(member.path, error)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


# --- What stays out of changes files --------------------------------------------------------------

EXCLUDE_FILE = b"etc/apppot/exclude"
# What is no part of a system at rest, what can be made again, and what is AppPot's own.
EXCLUDE = (
    "/dev", "/proc", "/sys", "/run", "/tmp", "/var/tmp", "/lost+found",
    "/var/cache", "/var/lib/apt/lists", "/root/.cache", "/home/*/.cache",
    "/" + STATE.decode(), "/root/job", "/home/*/job")


def compile_exclude(patterns: Iterable[str]) -> "re.Pattern[bytes]":
    """An expression for absolute paths.

    `*` and `?` match within a name. A pattern that does not begin with / matches at any depth.
    """
    expressions = []
    for pattern in patterns:
        glob = re.escape(os.fsencode(pattern.rstrip("/")))
        glob = glob.replace(br"\*", b"[^/]*").replace(br"\?", b"[^/]")
        expressions.append(glob if pattern.startswith("/") else b"(?:.*/)?" + glob)
    never = b"(?!)"
    return re.compile(b"(?s)(?:" + b"|".join(expressions or [never]) + b")")


def choose_exclude(
    root: bytes, asked: Iterable[str], output: Optional[bytes] = None
) -> "re.Pattern[bytes]":
    """The usual patterns, the appliance's own, those asked for, and the changes file itself."""
    try:
        with open(os.path.join(root, EXCLUDE_FILE), errors="surrogateescape") as file:
            lines = [line for line in file if not line.startswith("#")]
    except FileNotFoundError:
        lines = []
    patterns = [*EXCLUDE, *(line.strip() for line in lines if line.strip()), *asked]

    if output is not None:
        top = os.path.realpath(root).rstrip(b"/") + b"/"
        directory = os.path.realpath(os.path.dirname(output) or b".")
        place = os.path.join(directory, os.path.basename(output))
        if place.startswith(top):
            patterns.append(os.fsdecode(place[len(top) - 1:]))
    return compile_exclude(patterns)


# --- The recorded base ----------------------------------------------------------------------------

BASE_ID = STATE + b"/base-id"
MANIFEST = STATE + b"/manifest"
SIGNATURE = struct.Struct("<QQQQI")  # inode, size, mtime, ctime, mode
TICK_NS = 20 * 10 ** 6  # a time stamp may be this old when a file gets it, as HZ is 100 or more


def read_base_id(root: bytes) -> str:
    """The id of a tree's base; empty for a tree that is no appliance."""
    try:
        with open(os.path.join(root, BASE_ID), "rb") as file:
            return printable(file.read(100).strip())
    except OSError:
        return ""


def sign(status: os.stat_result) -> bytes:
    """Every change of a file changes this: at least its ctime becomes the present."""
    return SIGNATURE.pack(
        status.st_ino, status.st_size, status.st_mtime_ns % 2 ** 64, status.st_ctime_ns % 2 ** 64,
        status.st_mode)


def encode_manifest(signatures: Dict[bytes, bytes]) -> bytes:
    head = b"AppPot manifest %d %d\n" % (FORMAT, len(signatures))
    return head + b"".join(signatures.values()) + b"\0".join(signatures)


def decode_manifest(content: bytes) -> Dict[bytes, bytes]:
    """The signatures by their paths, with a few calls of C for any number of files."""
    head, _, rest = content.partition(b"\n")
    words = head.split()
    if words[:3] != [b"AppPot", b"manifest", b"%d" % FORMAT] or len(words) != 4:
        raise Damaged("not a manifest")

    size = SIGNATURE.size
    count = int(words[3])
    paths = rest[size * count:].split(b"\0")
    if len(paths) != count:
        raise Damaged("a manifest of {} instead of {} files".format(len(paths), count))
    return dict(zip(paths, [rest[start:start + size] for start in range(0, size * count, size)]))


def now_ns() -> int:
    return int(time.time() * 1e9)


def record_base(
    root: bytes, exclude: "re.Pattern[bytes]", report: Report, place: Optional[bytes] = None
) -> None:
    """Write the manifest that find_changes() compares with, usually into the tree itself."""
    signatures = {}
    unsettled = []
    with Tree(root) as tree:
        started_ns = now_ns()
        for path, status in scan(tree, exclude, {}):
            signatures[path] = sign(status)
            if status.st_ctime_ns > started_ns - TICK_NS:
                unsettled.append(path)
        settle(tree, signatures, unsettled)

    for path in signatures:
        report.say(path)
    replace_file(place or os.path.join(root, MANIFEST), encode_manifest(signatures))


def settle(tree: Tree, signatures: Dict[bytes, bytes], unsettled: List[bytes]) -> None:
    """Sign files again whose ctime was the present.

    Until the clock has ticked, such a file can change again without a trace in its time stamps.
    """
    for _ in range(10):
        if not unsettled:
            return
        time.sleep(2 * TICK_NS / 1e9)
        started_ns = now_ns()
        checked = unsettled
        unsettled = []
        for path in checked:
            status = tree.lstat(path)
            signatures[path] = sign(status)
            if started_ns - TICK_NS < status.st_ctime_ns <= started_ns:
                unsettled.append(path)

    for path in unsettled:
        signatures[path] = bytes(SIGNATURE.size)  # it never rests, so it counts as changed


def read_manifest(root: bytes, place: Optional[bytes] = None) -> Dict[bytes, bytes]:
    path = place or os.path.join(root, MANIFEST)
    hint = "`apppot-snap base` records the present state"
    try:
        with open(path, "rb", buffering=0) as file:
            return decode_manifest(file.read())
    except FileNotFoundError:
        raise Fatal("no base is recorded: " + printable(path), hint)
    except Damaged as error:
        raise Fatal("manifest is damaged, {}: {}".format(error, printable(path)), hint)


# --- What has changed -----------------------------------------------------------------------------

class Found(NamedTuple):
    """What a look at a tree found, by paths."""
    changed: Dict[bytes, Member]
    groups: Iterable[List[Member]]  # the names of each inode
    directories: Dict[bytes, Member]
    gone: Iterable[bytes]
    skipped: Dict[bytes, str]       # with the reason


class Plan(NamedTuple):
    """What a layer will hold.

    Members of one inode stand one behind the other, all but the first as hard links.
    """
    members: List[Member]
    whiteouts: List[bytes]

    def entries(self) -> List[Member]:
        """All members with the whiteouts, a directory before what is in it."""
        return sorted(self.members + [whiteout_of(path) for path in self.whiteouts], key=by_path)


def find_changes(
    root: bytes, old: Dict[bytes, bytes], exclude: "re.Pattern[bytes]", report: Report
) -> Plan:
    """Compare a tree with a manifest, by one lstat for each file."""
    changed: Dict[bytes, Member] = {}
    directories: Dict[bytes, Member] = {}
    groups: Dict[int, List[Member]] = {}
    skipped: Dict[bytes, str] = {}
    gone = set(old)
    with Tree(root) as tree:
        for count, (path, status) in enumerate(scan(tree, exclude, skipped)):
            if count % 500 == 0:
                report.progress("looking for changes", count, 0)
            known = old.get(path)
            is_changed = known != sign(status)
            if stat.S_ISSOCK(status.st_mode):
                if is_changed:
                    warn_of_socket(path, report)
                continue

            gone.discard(path)
            is_directory = stat.S_ISDIR(status.st_mode)
            if is_changed or is_directory or status.st_nlink > 1:
                member = member_of(path, status, b"M" if known else b"A")
                if is_directory:
                    directories[path] = member
                elif status.st_nlink > 1:
                    groups.setdefault(status.st_ino, []).append(member)
                if is_changed:
                    changed[path] = member

    gone = {path for path in gone if not exclude.fullmatch(b"/" + path)}
    return make_plan(Found(changed, groups.values(), directories, gone, skipped), report)


def warn_of_socket(path: bytes, report: Report) -> None:
    report.warn("left out, a socket: /" + printable(path))


def compare_trees(
    old_root: bytes, new_root: bytes, exclude: "re.Pattern[bytes]", report: Report
) -> Plan:
    """Compare two trees. Without a manifest only all metadata and all content can tell."""
    changed: Dict[bytes, Member] = {}
    directories: Dict[bytes, Member] = {}
    skipped: Dict[bytes, str] = {}
    groups: List[List[Member]] = []
    with Tree(old_root) as old_tree, Tree(new_root) as new_tree:
        old = dict(describe(old_tree, exclude, {}, []))
        gone = set(old)
        for path, (member, first) in describe(new_tree, exclude, skipped, groups, report):
            gone.discard(path)
            is_same = old.get(path) == (member, first)
            if is_same and member.kind == REGULAR and path == first:
                is_same = is_same_content(old_tree, new_tree, member)
            if not is_same:
                changed[path] = member._replace(change=b"M" if path in old else b"A")
            if member.kind == DIRECTORY:
                directories[path] = changed.get(path, member)

    return make_plan(Found(changed, groups, directories, gone, skipped), report)


def describe(
    tree: Tree, exclude: "re.Pattern[bytes]", skipped: Dict[bytes, str],
    groups: List[List[Member]], report: Optional[Report] = None
) -> Iterator[Tuple[bytes, Tuple[Member, bytes]]]:
    """Each path with all about it but the content, and with the first name of its inode.

    The names of each inode that has several go into `groups`.
    """
    inodes: Dict[int, List[Member]] = {}
    for path, status in scan(tree, exclude, skipped):
        if stat.S_ISSOCK(status.st_mode):
            if report:
                warn_of_socket(path, report)
            continue
        with open_member(tree, member_of(path, status)) as (member, _):
            pass

        first = path
        if status.st_nlink > 1 and member.kind != DIRECTORY:
            group = inodes.setdefault(status.st_ino, [])
            group.append(member)
            first = group[0].path
            if len(group) == 2:
                groups.append(group)
        yield path, (member, first)


def is_same_content(one: Tree, other: Tree, member: Member) -> bool:
    with open_member(one, member) as (_, left), open_member(other, member) as (_, right):
        for start, length in list_pieces(member):
            for offset in range(start, start + length, BUFFER):
                size = min(BUFFER, start + length - offset)
                content = os.pread(left, size, offset)
                if len(content) < size or content != os.pread(right, size, offset):
                    return False
    return True


def make_plan(found: Found, report: Report) -> Plan:
    """Complete what has changed, so that a layer of it makes the same tree elsewhere."""
    changed = found.changed
    for group in found.groups:
        if any(member.path in changed for member in group):
            add_group(changed, group)

    whiteouts = []
    for path in sorted(found.gone):
        if path not in found.skipped and split_path(path)[0] in found.directories:
            whiteouts.append(path)
    altered = [
        path for path, member in changed.items()
        if member.kind != DIRECTORY or member.change == b"A"]
    for path in altered + whiteouts:
        # To unpack something into a directory alters its mtime.
        parent = split_path(path)[0]
        if path and parent not in changed:
            changed[parent] = found.directories[parent]._replace(change=b"M")

    for path, reason in found.skipped.items():
        if reason == "a mount point":
            drop_mount_point(changed, split_path(path)[0])
        elif reason != "excluded" and split_path(path)[0] in found.directories:
            report.warn("left out, {}: /{}".format(reason, printable(path)))
    return Plan(list(changed.values()), whiteouts)


def add_group(changed: Dict[bytes, Member], group: List[Member]) -> None:
    """Put all names of an inode into a layer, all but the first as hard links."""
    for member in group:
        if member.path not in changed:
            changed[member.path] = member._replace(change=b"M")
    for member in group[1:]:
        changed[member.path] = link_of(changed[member.path], group[0])


def drop_mount_point(changed: Dict[bytes, Member], directory: bytes) -> None:
    """Forget new directories that only lead to a mount, such as the job directory's."""
    while directory in changed and changed[directory].change == b"A":
        if any(path.startswith(directory + b"/") for path in changed):
            return
        del changed[directory]
        directory = split_path(directory)[0]


# --- Saving ---------------------------------------------------------------------------------------

@contextmanager
def new_layer(path: bytes, size: int) -> Iterator[LayerWriter]:
    """A layer of at most `size` bytes of content, which gets its name when it is complete."""
    try:
        with new_file(path) as descriptor:
            sink = Sink(descriptor) if path.endswith(b".tar") else Deflater(descriptor)
            yield LayerWriter(sink)
            sink.finish()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        status = os.statvfs(os.path.dirname(path) or b".")
        free = format_size(status.f_bavail * status.f_frsize)
        raise Fatal(
            "cannot write, {}, {} free, up to {} needed: {}".format(
                error.strerror, free, format_size(size), printable(path)),
            "free some, or write the changes file elsewhere")


def write_layer(root: bytes, plan: Plan, output: bytes, report: Report) -> None:
    """Write the layer that makes of the base what is in `root`."""
    size = sum(member.size for member in plan.members)
    entries = [member for member in plan.entries() if member.path != LABEL]
    moved: Dict[bytes, bytes] = {}
    count = 0
    try:
        with new_layer(output, size) as writer, Tree(root) as tree:
            if entries and all(member.path != STATE for member in entries):
                add_state(writer, tree)
            writer.tell = lambda written: report.progress(
                "saving", count, min(written, size), len(entries), size)
            for count, member in enumerate(entries):
                if count % 100 == 0:
                    writer.tell(writer.size)
                save_member(writer, tree, member, moved, report)
            writer.finish(read_base_id(root))
    finally:
        report.clear()
    report.note_saved(sum(member.kind != DIRECTORY for member in entries), output)


def add_state(writer: LayerWriter, tree: Tree) -> None:
    """Add the label's directory, so that no tool that unpacks the label alters it."""
    try:
        status = os.fstat(tree.open(STATE))
    except OSError:
        return
    writer.add(member_of(STATE, status))


def save_member(
    writer: LayerWriter, tree: Tree, member: Member, moved: Dict[bytes, bytes], report: Report
) -> None:
    """Add one member with its content.

    If the first name of an inode is gone by now, another name takes over. `moved` has these first
    names, each with the name that took over, or with b"" if there is none yet.
    """
    if is_whiteout(member.path):
        writer.add(member)
        return

    try:
        if member.link in moved:
            heir = moved[member.link]
            if heir:
                member = member._replace(link=heir)
            else:
                status = tree.lstat(member.path)
                moved[member.link] = member.path
                member = member_of(member.path, status, member.change)
        with open_member(tree, member) as (complete, descriptor):
            writer.add(complete)
            if descriptor >= 0:
                save_content(writer, complete, descriptor, report)
    except (FileNotFoundError, NotADirectoryError):
        moved[member.path] = b""
        report.warn("left out, removed while it was saved: /" + printable(member.path))
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EINVAL):
            raise
        moved[member.path] = b""
        report.warn("left out, replaced while it was saved: /" + printable(member.path))


def save_content(
    writer: LayerWriter, member: Member, descriptor: int, report: Report
) -> None:
    """Add as many bytes as the header says, even if the file changes meanwhile."""
    is_complete = True
    size = 0
    for start, length in list_pieces(member):
        if member.pieces is not None:
            os.lseek(descriptor, start, os.SEEK_SET)
        is_complete = writer.copy(descriptor, length) and is_complete
        size += length
    writer.write(pad(size))

    status = os.fstat(descriptor)
    if not is_complete or (status.st_size, status.st_mtime_ns) != (member.size, member.mtime_ns):
        report.warn("changed while it was saved: /" + printable(member.path))


# --- Layers that have been read -------------------------------------------------------------------

class Layer:
    """A file that holds a layer, and what was found when it was read to its end."""

    def __init__(self, path: bytes) -> None:
        self.path = path
        try:
            # Without O_NONBLOCK this would wait for a pipe of that name.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            message = "changes file cannot be read, {}: {}".format(error.strerror, printable(path))
            raise Fatal(message, NAME_A_LAYER)

        self.label: Optional[Label] = None
        self.whiteouts: List[bytes] = []
        self.opaques: List[bytes] = []  # directories that lose all that lower layers put there
        self.count = 0    # members
        self.size = 0     # bytes that they take when unpacked
        self.memory = 0   # bytes of memory to know by its path of what kind each is
        self.details = 0  # and to know all else of them
        self.index: Optional[Index] = None

    def __enter__(self) -> "Layer":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def reader(self, index_max: int = 0) -> LayerReader:
        return LayerReader(self.descriptor, self.index, index_max)

    def members(self) -> Iterable[Member]:
        """The members without their content."""
        return self.reader() if self.index is None else [member for member, _, _ in self.index]


def needed_space(member: Member) -> int:
    """Bytes on a disk with blocks of 4 KiB."""
    if member.kind == DIRECTORY:
        return 4096
    if member.kind != REGULAR:
        return 0
    size = count_stored(member)
    return size + -size % 4096


def list_paths(layers: Iterable[Layer]) -> str:
    return ", ".join([printable(layer.path) for layer in layers])


def expect_memory(needed: int, free: int, layers: Sequence[Layer]) -> None:
    if needed > free:
        raise Fatal(
            "too little memory, {} free, at least {} needed: {}".format(
                format_size(free), format_size(needed), list_paths(layers)),
            "nothing was applied; give more memory, in a run by --mem")


# --- Files that are no layer ----------------------------------------------------------------------

COMPRESSIONS = (
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
)
# What users take for a layer by mistake: what it is, the offset of its magic number, the number.
OTHER_FORMATS = (
    ("a zip archive", 0, b"PK\x03\x04"),
    ("a 7z archive", 0, b"7z\xbc\xaf\x27\x1c"),
    ("a cpio archive", 0, b"07070"),
    ("a squashfs image", 0, b"hsqs"),
    ("an EROFS image", 1024, b"\xe2\xe1\xf5\xe0"),
    ("a CD image", 32769, b"CD001"),
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a VMDK image", 0, b"KDMV"),
    ("an ext4 image", 1080, b"\x53\xef"),
    ("a disk image", 510, b"\x55\xaa"),
    ("a Debian package", 0, b"!<arch>\ndebian"),
    ("an RPM package", 0, b"\xed\xab\xee\xdb"),
    ("a program", 0, b"\x7fELF"),
    ("a PDF document", 0, b"%PDF-"),
)
# A tar with such a member, which contains these bytes, is an image with layers in it (OCI's
# image-layout.md, docker save).
IMAGE_MARKS = {b"oci-layout": b'"imageLayoutVersion"', b"manifest.json": b'"Layers"'}


def expect_file(descriptor: int) -> None:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise Foreign("a directory")
    if not stat.S_ISREG(status.st_mode):
        raise Foreign("no regular file")
    if not status.st_size:
        raise Foreign("empty")


def identify(descriptor: int) -> None:
    """Raise Foreign if the file is known to be something else than a layer."""
    content = os.pread(descriptor, PACKED, 0)
    if content.startswith(b"\x1f\x8b"):
        return  # gzip: it may be a layer that is damaged
    for magic, name in COMPRESSIONS:
        if content.startswith(magic):
            raise Foreign(
                "compressed with {}, not with gzip".format(name),
                "unpack it first: {} -dc {{}} > layer.tar".format(name))
    for name, offset, magic in OTHER_FORMATS:
        if content.startswith(magic, offset):
            raise Foreign(name + ", not a layer")

    if re.match(br"\s*<(!doctype|html|\?xml)", content, re.IGNORECASE):
        hint = "did a download end in an error page or a login?"
        raise Foreign("a web page, not a layer", hint)
    control_characters = br"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]"
    if not re.search(control_characters, content):
        raise Foreign("a text file, not a layer")


def list_image_layers(layer: Layer) -> List[str]:
    """The names of the layers in an image archive; none if it does not name them as it should."""
    import json  # costs much, and layers do without it

    def load(path: str) -> Any:
        reader = layer.reader()
        for member in reader:
            if member.path == os.fsencode(path) and member.size < SPECIAL_MAX:
                return json.loads(reader.read().decode())
        raise LookupError(path)

    def locate(descriptor: Any) -> str:
        return "blobs/" + str(descriptor["digest"]).replace(":", "/")

    try:
        try:
            return [str(name) for name in load("manifest.json")[0]["Layers"]]
        except LookupError:
            manifest = load("index.json")
        for _ in range(2):  # an index may list indexes
            if "manifests" in manifest:
                manifest = load(locate(manifest["manifests"][0]))
        return [locate(descriptor) for descriptor in manifest["layers"]]
    except (LookupError, TypeError, ValueError, RecursionError):
        return []


def refuse_image(layer: Layer) -> NoReturn:
    """Say how to get the layers out. Merging would put them as files below the root."""
    names = list_image_layers(layer)
    source = "{} layers".format(len(names))
    if not names:
        source = "docker save or the like"
    elif len(names) == 1:
        source = "one layer"

    prefix = "./" if Stream(layer.descriptor).read(2) == b"./" else ""
    commands = []
    for number, name in enumerate(names[:9], 1):
        word = quote(os.fsencode(prefix + name))
        commands.append("tar -xOf {{}} {} > layer{}.tar".format(word, number))
    command = "; ".join(commands) or "skopeo copy docker-archive:{} oci:DIRECTORY:TAG"
    raise Foreign(
        "an image archive of {}, not a layer".format(source),
        "take out the layers that you want: " + command)


# --- Checking a layer -----------------------------------------------------------------------------

EMPTY_TAR_MAX = 1 << 16  # the longest file of zeros that is a tar: a record has up to 128 blocks


@contextmanager
def refusal(path: bytes) -> Iterator[None]:
    """Turn what is wrong with a layer into an error for the user."""
    try:
        yield
    except Foreign as foreign:
        message = "changes file is {}: {}".format(foreign.what, printable(path))
        raise Fatal(message, foreign.hint.replace("{}", quote(path)))
    except Damaged as error:
        reason = str(error)
        if len(reason) > 300:
            reason = reason[:300] + "..."
        raise Fatal(
            "changes file is damaged, {}: {}".format(reason, printable(path)),
            "nothing of it was applied; copy it again, or make it again with `apppot-snap changes`")


def check_layer(path: bytes, report: Report) -> Layer:
    """Open a layer and read all of it, so that every flaw is known before anything is applied."""
    layer = Layer(path)
    try:
        with refusal(path):
            expect_file(layer.descriptor)
            try:
                read_layer(layer, report)
            except Damaged:
                if not layer.count:
                    identify(layer.descriptor)
                raise
    except BaseException:
        os.close(layer.descriptor)
        raise
    finally:
        report.clear()
    return layer


def read_layer(layer: Layer, report: Report) -> None:
    free = min(available_memory(), 2 * MEMORY_MAX)
    reader = layer.reader(min(INDEX_MAX, free // 4))
    is_image = False
    checksums = None  # if the last member is the label: what it says, and what is right

    for member in reader:
        layer.count += 1
        is_link = member.kind == HARD_LINK
        layer.memory += NODE_COST + len(member.path) + (MEMBER_COST if is_link else 0)
        if layer.count % 500 == 0 or member.size > BUFFER:
            report.progress("checking", layer.count, layer.size)
        if layer.count % 500 == 0:
            expect_memory(layer.memory + NODE_COST * reader.levels, free // 2, [layer])

        checksums = None
        if is_whiteout(member.path):
            note_whiteout(layer, member.path)
        elif member.path == LABEL and member.kind == REGULAR and member.size < SPECIAL_MAX:
            checksums = read_label(layer, reader)
        else:
            layer.size += needed_space(member)
            if member.path in IMAGE_MARKS and member.size < SPECIAL_MAX:
                is_image = is_image or IMAGE_MARKS[member.path] in reader.read()

    layer.memory += NODE_COST * reader.levels
    layer.details = reader.measured
    layer.index = reader.index
    expect_memory(layer.memory, free // 2, [layer])

    is_plain = not reader.is_gzip
    if not layer.count and is_plain and os.fstat(layer.descriptor).st_size > EMPTY_TAR_MAX:
        raise Foreign("nothing but zeros")
    if checksums and is_plain and checksums[0] != checksums[1]:
        raise Damaged("its checksum is wrong")
    if is_image:
        refuse_image(layer)


def note_whiteout(layer: Layer, path: bytes) -> None:
    directory, name = split_path(path)
    if name == OPAQUE:
        layer.opaques.append(directory)
    elif not name.startswith(WHITEOUT_META):  # old tools wrote others, whose meaning is lost
        hidden = name[len(WHITEOUT):]
        if not hidden or clean_path(hidden) != hidden:
            raise Damaged("a whiteout of nothing: " + printable(path))
        layer.whiteouts.append(join_path(directory, hidden))


def read_label(layer: Layer, reader: LayerReader) -> Tuple[bytes, bytes]:
    """Two ends of the label, with the checksum that it has of all before it and the right one."""
    before = reader.crc()
    content = reader.read()
    layer.label = parse_label(content)
    head, key, tail = content.rpartition(b'"crc32": "')
    return tail, b'%08x"\n}\n' % zlib.crc32(head + key, before)


# --- Several layers as one ------------------------------------------------------------------------

NO_ORIGIN = (0, 0)
ANY_OF_KIND = {kind: Member(b"", kind, 0, 0, 0, 0, 0) for kind in KINDS.values()}


class Node:
    """What the layers so far say about a path."""
    __slots__ = ("children", "member", "origin", "is_gone", "is_opaque", "is_new")
    NO_CHILDREN: "Dict[bytes, Node]" = {}  # one for all, as most paths are files

    def __init__(self, is_new: bool = False) -> None:
        self.children = self.NO_CHILDREN
        self.member: Optional[Member] = None
        self.origin = NO_ORIGIN  # the numbers of the layer and the member that hold the content
        self.is_gone = False     # the path is deleted from lower layers
        self.is_opaque = False   # all below it is deleted from lower layers
        self.is_new = is_new     # nothing of a tree can be here: it goes, or is not there

    def descend(self, path: bytes) -> "Node":
        """The node of a path below, which is made if it is missing."""
        node = self
        names = path.split(b"/") if path else []
        for depth, name in enumerate(names):
            if node.member and node.member.kind != DIRECTORY:
                above = b"/".join(names[:depth])
                raise Damaged("{} is below {}, which is no directory".format(
                    printable(path), printable(above)))
            child = node.children.get(name)
            if child is None:
                if not node.children:
                    node.children = {}
                child = Node(node.is_new or node.is_gone or node.is_opaque)
                node.children[name] = child
            node = child
        return node

    def remove(self) -> None:
        self.children = self.NO_CHILDREN
        self.member = None
        self.origin = NO_ORIGIN
        self.is_gone = True
        self.is_opaque = False

    def put(self, member: Member, origin: Tuple[int, int]) -> None:
        """Put a member in the place of what was there; a directory keeps what is in it."""
        before = self.member
        change = member.change
        if before:
            change = before.change
        elif self.is_gone:
            change = b"M"

        if member.kind != DIRECTORY:
            self.children = self.NO_CHILDREN
            self.is_opaque = False
        elif self.is_gone or before and before.kind != DIRECTORY:
            self.is_opaque = True
        self.is_gone = False
        self.member = member._replace(change=change) if change != member.change else member
        self.origin = origin

    def link(self, source: "Node", member: Member, origin: Tuple[int, int]) -> None:
        """Give the source's inode another name.

        The member stays a hard link if these layers do not hold its inode.
        """
        first = source.member
        if first and first.kind != DIRECTORY:
            self.put(first._replace(path=member.path, change=member.change), source.origin)
        elif first or source.is_gone or source.is_new:
            raise Damaged("a hard link to what is no file: " + printable(member.path))
        else:
            self.put(member, origin)

    def walk(self) -> "Iterator[Tuple[bytes, Node]]":
        """All paths with their nodes, a directory before what is in it."""
        pending = [(b"", self)]
        while pending:
            path, node = pending.pop()
            yield path, node
            for name in sorted(node.children, reverse=True):
                pending.append((join_path(path, name), node.children[name]))


def stack_layers(layers: Sequence[Layer], just_kinds: bool = False) -> Node:
    """What all the layers say together; a later layer replaces what an earlier one says.

    With `just_kinds` only the kinds of the members are kept, which takes less memory.
    """
    needed = sum(layer.memory for layer in layers)
    if not just_kinds:
        needed += sum(layer.details for layer in layers)
    expect_memory(needed, min(available_memory() // 4 * 3, MEMORY_MAX), layers)

    root = Node()
    for index, layer in enumerate(layers):
        with refusal(layer.path):
            stack_layer(root, index, layer, just_kinds)
    return root


def stack_layer(root: Node, index: int, layer: Layer, just_kinds: bool) -> None:
    for path in layer.opaques:
        node = root.descend(path)
        node.children = Node.NO_CHILDREN
        node.is_opaque = True
    for path in layer.whiteouts:
        root.descend(path).remove()

    for number, member in enumerate(layer.members()):
        if is_whiteout(member.path) or member.path == LABEL:
            continue
        node = root.descend(member.path)
        if member.kind == HARD_LINK:
            node.link(root.descend(member.link), member, (index, number))
        elif just_kinds:
            node.put(ANY_OF_KIND[member.kind], NO_ORIGIN)
        else:
            node.put(member, (index, number))


# --- Squashing ------------------------------------------------------------------------------------

def squash_layers(layers: Sequence[Layer], output: bytes, report: Report) -> None:
    """Write one layer that does what these do one after the other."""
    bases = {layer.label.base: layer for layer in layers if layer.label and layer.label.base}
    if len(bases) > 1:
        named = ["{} ({})".format(printable(bases[base].path), base) for base in bases]
        message = "changes files are for different bases: " + ", ".join(named)
        raise Fatal(message, "squash those of one base")

    with new_layer(output, sum(layer.size for layer in layers)) as writer:
        wanted = write_skeleton(writer, stack_layers(layers), report)
        for index, layer in enumerate(layers):
            reader = layer.reader()
            for number, _ in enumerate(reader):
                names = wanted.get((index, number))
                if names:
                    squash_member(writer, names, reader)
        writer.finish(next(iter(bases), ""))


def write_skeleton(
    writer: LayerWriter, root: Node, report: Report
) -> Dict[Tuple[int, int], List[Member]]:
    """Write whiteouts and directories.

    Returns the names of all else, by the numbers of the layer and the member with the content.
    """
    wanted: Dict[Tuple[int, int], List[Member]] = {}
    for path, node in root.walk():
        member = node.member
        if member and member.kind == HARD_LINK:
            message = "a hard link to a file of the base cannot be squashed: " + printable(path)
            hint = ("merge the changes files one by one, "
                    "and save their sum with `apppot-snap changes`")
            raise Fatal(message, hint)

        if node.is_opaque:
            writer.add(whiteout_of(join_path(path, OPAQUE[len(WHITEOUT):])))
        if node.is_gone:
            writer.add(whiteout_of(path))
        if node.is_gone or member:
            report.say(path)
        if member and member.kind == DIRECTORY:
            writer.add(member)
        elif member:
            wanted.setdefault(node.origin, []).append(member)
    return wanted


def squash_member(writer: LayerWriter, names: List[Member], reader: LayerReader) -> None:
    """Add the content at which the reader stands, under all its names."""
    first = names[0]
    writer.add(first)
    size = 0
    for piece in reader.content():
        writer.write(piece)
        size += len(piece)
    writer.write(pad(size))
    for member in names[1:]:
        writer.add(link_of(member, first))


# --- Whether a tree can take layers ---------------------------------------------------------------

def check_base(layer: Layer, base_id: str, force: bool) -> None:
    """Fatal if a layer is for another base.

    A layer of another tool says nothing about its base, and a plain tree nothing about itself.
    """
    wanted = layer.label.base if layer.label else ""
    if wanted and base_id and wanted != base_id and not force:
        raise Fatal(
            "changes file is for base {}, this is base {}: {}".format(
                wanted, base_id, printable(layer.path)),
            "use the image it was made with; --force-changes merges it all the same")


def raise_no_space(layer: Layer, root: bytes, state: str) -> NoReturn:
    status = os.statvfs(root)
    free = format_size(status.f_bavail * status.f_frsize)
    raise Fatal(
        "no space left in the tree, {} and {} files free, up to {} and {} files needed: {}".format(
            free, status.f_favail, format_size(layer.size), layer.count, printable(layer.path)),
        state + "make the image larger: make image IMAGE_SIZE=")


def check_space(layers: Sequence[Layer], root: bytes) -> None:
    """Fatal if the file system has too few bytes or inodes, even with those that come free.

    A layer may still need its room before it comes free: this ends as on any full disk.
    """
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    free_files = status.f_favail if status.f_files else sys.maxsize  # btrfs knows no limit

    for layer in layers:
        if layer.size > free or layer.count > free_files:
            size, files = count_replaced(layer, root)
            free += size
            free_files += files
            if layer.size > free or layer.count > free_files:
                raise_no_space(layer, root, "nothing was applied; ")

        free -= layer.size
        free_files -= layer.count


def count_replaced(layer: Layer, root: bytes) -> Tuple[int, int]:
    """Bytes and inodes of what a layer deletes from a tree, or brings again."""
    brought: Set[bytes] = set()
    cleared = set(layer.whiteouts + layer.opaques)
    for member in layer.members():
        if member.kind == DIRECTORY:
            brought.add(member.path)
        else:
            cleared.add(member.path)

    size = 0
    files = 0
    way = b"/"  # how the paths below the last cleared path begin
    with Tree(root) as tree:
        for path, status in scan(tree, compile_exclude([]), {}):
            is_below = path.startswith(way)
            if path in cleared and not is_below:
                way = join_path(path, b"")

            is_replaced = is_below or path in cleared or path in brought
            if is_replaced and (stat.S_ISDIR(status.st_mode) or status.st_nlink == 1):
                size += status.st_blocks * BLOCK
                files += 1
    return size, files


def check_tree(layers: Sequence[Layer], root: bytes) -> None:
    """Fatal if something in a tree is in the way of the layers, merged one after the other."""
    with Tree(root) as tree, Tree(root) as sources:
        for path, node in stack_layers(layers, True).walk():
            member = node.member
            if member and member.kind == HARD_LINK and not is_file(sources, member.link):
                refuse_layers(layers, "a hard link leads to what is no file", member.link)

            is_new = node.is_new or node.is_gone
            if node.children and not is_new:
                is_new = not has_directory(tree, path, node, layers)
            if is_new:
                for child in node.children.values():
                    child.is_new = True


def is_file(tree: Tree, path: bytes) -> bool:
    try:
        return not stat.S_ISDIR(tree.lstat(path).st_mode)
    except Mounted:
        return True  # the link will be left out, whatever is mounted there
    except OSError:
        return False


def has_directory(tree: Tree, path: bytes, node: Node, layers: Sequence[Layer]) -> bool:
    """Whether a tree has the directory in which layers change something.

    False means that it will be made. Fatal if layers can neither use nor make it.
    """
    try:
        descriptor = tree.open(path)
        is_ours = os.access(b".", os.W_OK | os.X_OK, dir_fd=descriptor, effective_ids=True)
    except (FileNotFoundError, Mounted):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        if node.member is None:
            what = "a symbolic link or a file is in the place of a directory"
            refuse_layers(layers, what, path)
        return False

    if not is_ours:
        hint = "merging into a system takes root: sudo apppot-snap"
        refuse_layers(layers, "a directory cannot be written to", path, hint)
    return True


def refuse_layers(
    layers: Sequence[Layer], what: str, path: bytes,
    hint: str = "was the changes file made for another base?"
) -> NoReturn:
    message = "{}, {}: {}".format(what, absolute(path), list_paths(layers))
    raise Fatal(message, "nothing was applied; " + hint)


# --- Unpacking members into a tree ----------------------------------------------------------------

WARNINGS_MAX = 20  # a layer labelled for SELinux has an attribute for each file
INHERITED_XATTRS = ("system.posix_acl_access", "system.posix_acl_default")


def write_content(descriptor: int, member: Member, content: Iterable[memoryview]) -> None:
    if member.pieces is None:
        for chunk in content:
            write_all(descriptor, chunk)
        return

    pieces = iter(list_pieces(member))
    left = 0  # bytes of the present piece that have not come yet
    for chunk in content:
        done = 0
        while done < len(chunk):
            while left == 0:
                start, left = next(pieces)
                os.lseek(descriptor, start, os.SEEK_SET)
            part = chunk[done:done + left]
            write_all(descriptor, part)
            left -= len(part)
            done += len(part)
    os.truncate(descriptor, member.size)


class Target(Tree):
    """A tree that a layer is unpacked into. A directory gets its metadata when it is left."""

    def __init__(self, root: bytes, report: Report) -> None:
        super().__init__(root)
        self.root = root
        self.at = b""  # the path that is worked on
        self.left_out: Set[bytes] = set()
        self._report = report
        self._ids = (os.geteuid(), os.getegid())
        self._is_root = os.geteuid() == 0
        self._lost_xattrs = 0
        self._sources = Tree(root)  # opens the directories that hard links lead to
        self.levels[0].inherits = self._inherits(self.levels[0])

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._sources.__exit__()

    def close(self) -> None:
        """Give the directories on the way their metadata, when all else is done."""
        self.open(b"")
        self.finish(self.levels[0], self.levels[0])
        if self._lost_xattrs > WARNINGS_MAX:
            more = self._lost_xattrs - WARNINGS_MAX
            self._report.warn("left out, {} more attributes".format(more))

    @staticmethod
    def _inherits(level: Level) -> bool:
        """Whether a new file in a directory gets its group, or its default ACL."""
        if level.status.st_mode & stat.S_ISGID:
            return True
        try:
            os.getxattr(level.descriptor, "system.posix_acl_default")
        except OSError:
            return False
        return True

    def open_parent(self, path: bytes) -> Tuple[int, bytes]:
        """The directory to make something in, and its name there.

        Directories that are missing are made, as other tools make them.
        """
        directory, name = split_path(path)
        try:
            self.open(directory)
        except FileNotFoundError:
            # The way is open up to self._path.
            for missing in directory[len(self._path):].lstrip(b"/").split(b"/"):
                os.mkdir(missing, 0o755, dir_fd=self.levels[-1].descriptor)
                self.levels[-1].is_touched = True
                self._enter(missing)

        level = self.levels[-1]
        if level.inherits is None:
            level.inherits = self._inherits(level)
        return level.descriptor, name

    def put(self, member: Member, content: Iterable[memoryview]) -> None:
        """Put a member, which is no directory, in the place of whatever is there."""
        parent, name = self.open_parent(member.path)
        self.levels[-1].is_touched = True
        try:
            descriptor = self._make(member, parent, name)
        except FileExistsError:
            if member.kind in DEVICES and not self._is_root:
                # This must fail before what is there is removed.
                raise PermissionError(errno.EPERM, "mknod")
            self.remove(member.path)
            parent = self.open(split_path(member.path)[0])
            descriptor = self._make(member, parent, name)

        if member.kind == REGULAR:
            try:
                write_content(descriptor, member, content)
                self._set_metadata(member, descriptor, descriptor, {})
            finally:
                os.close(descriptor)
        elif member.kind != HARD_LINK:
            self._set_metadata(member, name, proc_path(parent, name), {"dir_fd": parent})

    def _make(self, member: Member, parent: int, name: bytes) -> int:
        """Make an empty file. Returns a descriptor of it, or -1 if it is no regular file."""
        if member.kind == REGULAR:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(name, flags, member.mode & 0o777, dir_fd=parent)

        if member.kind == SYMLINK:
            os.symlink(member.link, name, dir_fd=parent)
        elif member.kind == HARD_LINK:
            if member.link in self.mounts:
                raise Mounted(member.link)
            directory, source = split_path(member.link)
            os.link(
                source, name, src_dir_fd=self._sources.open(directory), dst_dir_fd=parent,
                follow_symlinks=False)
        elif member.kind == FIFO:
            os.mkfifo(name, member.mode, dir_fd=parent)
        else:
            kind = stat.S_IFCHR if member.kind == CHARACTER else stat.S_IFBLK
            os.mknod(name, kind | member.mode, os.makedev(*member.device), dir_fd=parent)
        return -1

    def _set_metadata(
        self, member: Member, target: File, named: File, where: Dict[str, Any]
    ) -> None:
        """Set what a new file has not got by being made. `named` is the file for xattr calls."""
        inherits = self.levels[-1].inherits
        is_link = member.kind == SYMLINK
        if self._is_root and (inherits or (member.uid, member.gid) != self._ids):
            os.chown(target, member.uid, member.gid, follow_symlinks=not where, **where)
        if inherits and not is_link:
            self._remove_xattrs(named, INHERITED_XATTRS)
        if not is_link and (inherits or member.mode & 0o7000):
            os.chmod(target, member.mode, **where)  # chown() has removed the setuid bit
        if member.xattrs:
            self._set_xattrs(member, named)

        times_ns = (member.mtime_ns, member.mtime_ns)
        os.utime(target, ns=times_ns, follow_symlinks=not where, **where)

    @staticmethod
    def _remove_xattrs(target: File, names: Iterable[str]) -> None:
        for name in names:
            try:
                os.removexattr(target, name, follow_symlinks=isinstance(target, int))
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.ENOTSUP, errno.EPERM):
                    raise

    def _set_xattrs(self, member: Member, target: File) -> None:
        for name, value in member.xattrs:
            try:
                os.setxattr(target, name, value, follow_symlinks=isinstance(target, int))
            except OSError as error:  # of many kinds: each file system keeps what it can
                self._lost_xattrs += 1
                if self._lost_xattrs <= WARNINGS_MAX:
                    self._report.warn("left out, attribute {} of /{}: {}".format(
                        printable(os.fsencode(name)), printable(member.path), error.strerror))

    def put_directory(self, member: Member) -> None:
        """Make a directory, or keep the one that is there, with this metadata."""
        if member.path:
            self._make_directory(member)
        else:
            self.open(b"")
        self.levels[-1].member = member

    def _make_directory(self, member: Member) -> None:
        parent, name = self.open_parent(member.path)
        mode = member.mode & 0o777
        if not self._is_root:
            mode |= 0o700  # so that we can work in it
        try:
            os.mkdir(name, mode, dir_fd=parent)
        except FileExistsError:
            try:
                self.open(member.path)
            except NotADirectoryError:
                self.remove(member.path)
                self._make_directory(member)
            return

        self.levels[-1].is_touched = True
        inherits = self.levels[-1].inherits
        self.open(member.path)
        self.levels[-1].inherits = inherits
        self.levels[-1].is_new = not inherits

    def finish(self, level: Level, parent: Level) -> None:
        """Give a directory its metadata; without a member it keeps its old mtime."""
        member = level.member
        status = level.status
        if member:
            if not level.is_new:
                kept = {name for name, _ in member.xattrs}
                kept.update(FOREIGN_XATTRS)
                present = set(os.listxattr(level.descriptor))
                self._remove_xattrs(level.descriptor, present - kept)
            if self._is_root and (member.uid, member.gid) != (status.st_uid, status.st_gid):
                os.chown(level.descriptor, member.uid, member.gid)
            if member.mode != stat.S_IMODE(status.st_mode) or not level.is_new:
                os.chmod(level.descriptor, member.mode)
            self._set_xattrs(member, level.descriptor)

        if member or level.is_touched:
            mtime_ns = member.mtime_ns if member else status.st_mtime_ns
            os.utime(level.descriptor, ns=(mtime_ns, mtime_ns))

    def remove(self, path: bytes) -> None:
        """Remove what is there, if anything, with all below it."""
        self._expect_no_mount(path)
        directory, name = split_path(path)
        try:
            parent = self.open(directory)
            self.levels[-1].is_touched = True
            os.unlink(name, dir_fd=parent)
        except (FileNotFoundError, NotADirectoryError):
            return
        except IsADirectoryError:
            self.clear(path)
            os.rmdir(name, dir_fd=self.open(directory))
            self._sources.open(b"")  # its descriptors may be those of directories just removed

    def _expect_no_mount(self, path: bytes) -> None:
        for mount in self.mounts:
            if mount == path or mount.startswith(join_path(path, b"")):
                raise Mounted(mount)

    def clear(self, path: bytes) -> None:
        """Remove all that is in a directory."""
        self._expect_no_mount(path)
        pending = [path]
        while pending:
            path = pending[-1]
            descriptor = self.open(path)
            self.levels[-1].is_touched = len(pending) == 1
            below = []
            for name in map(os.fsencode, os.listdir(descriptor)):
                try:
                    os.unlink(name, dir_fd=descriptor)
                except IsADirectoryError:
                    below.append(join_path(path, name))

            pending += below
            if not below:
                pending.pop()
                if pending:
                    directory, name = split_path(path)
                    os.rmdir(name, dir_fd=self.open(directory))


# --- Merging a layer ------------------------------------------------------------------------------

def apply_layer(layer: Layer, root: bytes, report: Report) -> None:
    """Merge a checked layer into a tree."""
    umask = os.umask(0)
    try:
        with Target(root, report) as target:
            try:
                clear_way(target, layer, report)
                unpack(target, layer, report)
                target.close()
            except OSError as error:
                explain_failure(error, layer, root, target.at)
    except Damaged as error:
        raise Fatal(
            "changes file was altered while it was read, {}: {}".format(
                error, printable(layer.path)),
            "what is below {} is incomplete".format(printable(root)))
    finally:
        os.umask(umask)
        report.clear()


def clear_way(target: Target, layer: Layer, report: Report) -> None:
    """Delete what the layer's whiteouts name."""
    for path in layer.opaques:
        target.at = path
        skip_missing(target.clear, path, report)
    for path in layer.whiteouts:
        target.at = path
        skip_missing(target.remove, path, report)


def skip_missing(action: Callable[[bytes], None], path: bytes, report: Report) -> None:
    try:
        action(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Mounted as mounted:
        report.warn("kept, as something is mounted on /{}: /{}".format(
            printable(mounted.path), printable(path)))


def unpack(target: Target, layer: Layer, report: Report) -> None:
    has_state = os.path.isdir(os.path.join(target.root, STATE))
    reader = layer.reader()
    done = 0
    number = 0

    def tell(size: int) -> None:
        report.progress("merging", number, size, layer.count, layer.size)

    for number, member in enumerate(reader):
        target.at = member.path
        if number % 100 == 0:
            tell(done)
        is_label = member.path == LABEL and not has_state
        if is_label or is_whiteout(member.path):
            continue
        report.say(member.path)
        put_member(target, member, watch(reader.content(), done, tell), report)
        done += needed_space(member)


def watch(
    content: Iterator[memoryview], done: int, tell: Callable[[int], None]
) -> Iterator[memoryview]:
    """Tell how many bytes are done before each piece but the first: most files have only one."""
    start = done
    for piece in content:
        if done > start:
            tell(done)
        done += len(piece)
        yield piece


def put_member(
    target: Target, member: Member, content: Iterator[memoryview], report: Report
) -> None:
    """Put a member into the tree, or leave it out with a warning."""
    try:
        if member.kind == DIRECTORY:
            target.put_directory(member)
        else:
            target.put(member, content)
        return
    except Mounted as mounted:
        reason = "as something is mounted on /" + printable(mounted.path)
    except PermissionError:
        if member.kind not in DEVICES:
            raise
        reason = "only root makes devices"
    except FileNotFoundError:
        if member.link not in target.left_out:
            raise
        reason = "as is its other name, /" + printable(member.link)

    target.left_out.add(member.path)
    report.warn("left out, {}: /{}".format(reason, printable(member.path)))


def explain_failure(error: OSError, layer: Layer, root: bytes, path: bytes) -> NoReturn:
    state = "the tree is incomplete; "
    if error.errno in NO_SPACE:
        raise_no_space(layer, root, state)
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        raise Fatal(
            "/{} is below a symbolic link or a file: {}".format(
                printable(path), printable(layer.path)),
            state + "was the changes file made for another base?")
    raise Fatal(
        "cannot merge /{}, {}: {}".format(
            printable(path), error.strerror, printable(layer.path)),
        state + "merging into a system takes root: sudo apppot-snap")


# --- Commands -------------------------------------------------------------------------------------

KIND_NAMES = {
    HARD_LINK: "hard link",
    SYMLINK: "symlink",
    CHARACTER: "device",
    BLOCK_DEVICE: "device",
    DIRECTORY: "directory",
    FIFO: "fifo",
}


def show_member(member: Member) -> Tuple[str, str]:
    """A member's letter, and the line of a listing with it."""
    directory, name = split_path(member.path)
    if name.startswith(WHITEOUT):
        deleted = b"*" if name == OPAQUE else name[len(WHITEOUT):]
        line = "D {:>12} /{}".format("", printable(join_path(directory, deleted)))
        return "D", line

    letter = member.change.decode()
    size = str(member.size) if member.kind == REGULAR else KIND_NAMES[member.kind]
    line = "{} {:>12} {}".format(letter, size, absolute(member.path))
    if member.kind in (SYMLINK, HARD_LINK):
        line += " -> " + printable(member.link)
    return letter, line


def show_members(members: Iterable[Member], is_ours: bool = True) -> str:
    """Print a line for each member, and return a summary.

    Only a layer of our own tells apart what was added and what was modified.
    """
    counts = dict.fromkeys("AMCD", 0)
    size = 0
    for member in members:
        if member.path in (LABEL, STATE):
            continue
        is_added = is_ours and member.change == b"C"
        letter, line = show_member(member._replace(change=b"A") if is_added else member)
        print(line)
        counts[letter] += 1
        size += member.size

    parts = []
    names = ("added", "modified", "added or modified", "deleted")
    for letter, name in zip("AMCD", names):
        if letter != "C" or counts["C"]:
            parts.append("{} {}".format(counts[letter], name))
    return ", ".join([*parts, format_size(size)])


def show_layer(layer: Layer) -> str:
    return show_members(layer.members(), layer.label is not None)


def run_show(path: bytes, report: Report) -> None:
    with check_layer(path, report) as layer:
        stack_layers([layer], True)  # tells whether the members fit together
        print(show_layer(layer))
        if layer.label:
            base = "base " + layer.label.base if layer.label.base else "any base"
            print("{}, {}, for {}".format(layer.label.tool, layer.label.created, base))


def run_base(root: bytes, exclude: Sequence[str], just_print: bool, report: Report) -> None:
    """Record the base. If it differs from the one recorded before, it gets an id of its own."""
    os.listdir(root)  # fails if the root is missing; the next line would make it
    os.makedirs(os.path.dirname(os.path.join(root, BASE_ID)), exist_ok=True)
    patterns = choose_exclude(root, exclude)
    is_new = not read_base_id(root)
    if os.path.exists(os.path.join(root, MANIFEST)):
        plan = find_changes(root, read_manifest(root), patterns, report)
        is_new = is_new or bool(plan.members or plan.whiteouts)
        if just_print:
            print(show_members(plan.entries()))

    if just_print:
        return
    if is_new:
        with open("/proc/sys/kernel/random/uuid", "rb") as file:
            replace_file(os.path.join(root, BASE_ID), file.read())
    record_base(root, patterns, report)


def run_squash(paths: Sequence[bytes], output: bytes, just_print: bool, report: Report) -> None:
    with ExitStack() as stack:
        layers = [stack.enter_context(check_layer(path, report)) for path in paths]
        if just_print:
            nodes = [node for _, node in stack_layers(layers).walk()]
            print(show_members(node.member for node in nodes if node.member))
        else:
            squash_layers(layers, output, report)


def run_save(root: bytes, plan: Plan, output: Optional[bytes], report: Report) -> None:
    """Write a layer; without an output print what it would hold."""
    if output is None:
        print(show_members(plan.entries()))
        return
    write_layer(root, plan, output, report)
    for member in plan.members:
        report.say(member.path)


def save_changes(
    root: bytes, output: Optional[bytes], exclude: Sequence[str], report: Report,
    known: Optional[Dict[bytes, bytes]] = None
) -> None:
    """Do what `apppot-snap changes` does; without an output print what it would write.

    `known` has signatures of files that count as unchanged. The agent passes those of its own.
    """
    manifest = read_manifest(root)
    manifest.update(known or {})
    plan = find_changes(root, manifest, choose_exclude(root, exclude, output), report)
    run_save(root, plan, output, report)


def run_apply(
    paths: Sequence[bytes], root: bytes, just_print: bool, force: bool, report: Report
) -> None:
    """Check all layers, then apply them in their order."""
    with ExitStack() as stack:
        layers = [stack.enter_context(check_layer(path, report)) for path in paths]
        for layer in layers:
            check_base(layer, read_base_id(root), force)
        check_space(layers, root)
        report.allow(layers)
        check_tree(layers, root)

        for layer in layers:
            if just_print:
                print(show_layer(layer))
            else:
                apply_layer(layer, root, report)


# --- The command line -----------------------------------------------------------------------------

EPILOG = """\
A changes file is an OCI image layer: a tar with gzip, or a plain tar if its name ends in .tar.

`base` and `changes` leave out what is mounted, sockets, and what matches a pattern of the file
/{} or one of these:
{}"""


def parse_path(text: str) -> bytes:
    if not text:
        raise Fatal("a file name is empty", "`apppot-snap --help` tells the usage")
    return os.fsencode(text)


def default_output() -> bytes:
    home = os.path.expanduser("~" + os.environ.get("SUDO_USER", ""))
    directory = os.path.join(home, "job")
    if not os.path.isdir(directory):
        message = "no job directory to write to: " + directory
        raise Fatal(message, "name a file: apppot-snap changes FILE")
    name = time.strftime("apppot.%Y-%m-%d.changes.tar.gz")
    return os.fsencode(os.path.join(directory, name))


def build_parser() -> Any:
    import argparse  # costs much, and the agent does without it

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise Fatal(message, "`{} --help` tells the usage".format(self.prog))

    parser = Parser(
        prog="apppot-snap",
        description="Make, look at and merge changes files: what differs from the base image.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.format(EXCLUDE_FILE.decode(), " ".join(EXCLUDE)))
    # Without `prog` it would look for the terminal's width, by modules that take long to import.
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", prog=parser.prog)
    commands.required = True
    add_commands(commands, Parser)
    return parser


def add_commands(commands: Any, new_parser: Callable[..., Any]) -> None:
    """Add the commands to their parser; each has the options of several others."""
    common = new_parser(add_help=False)
    common.add_argument(
        "-n", "--just-print", action="store_true",
        help="change nothing, print what would be done")
    common.add_argument("-v", "--verbose", action="store_true", help="print the name of each file")
    system = new_parser(add_help=False)
    system.add_argument(
        "--root", type=parse_path, default=b"/", metavar="DIR",
        help="the system's root directory (default /)")
    chosen = new_parser(add_help=False)
    chosen.add_argument(
        "-x", "--exclude", action="append", default=[], metavar="PATTERN",
        help="leave out what matches, such as /a/* or, at any depth, *.o; repeatable")
    forced = new_parser(add_help=False)
    forced.add_argument(
        "--force-changes", action="store_true",
        help="merge a changes file even if it was made for another base")
    result = new_parser(add_help=False)
    result.add_argument(
        "-o", "--output", type=parse_path, required=True, metavar="FILE",
        help="the changes file to write")

    def add(name: str, parents: Sequence[Any], text: str, **arguments: Optional[str]) -> None:
        """`arguments` has the nargs of each."""
        command = commands.add_parser(name, parents=[common, *parents], help=text)
        for argument, nargs in arguments.items():
            command.add_argument(
                argument, type=parse_path, nargs=nargs, metavar=argument.upper())

    add("base", (system, chosen), "record the present state, with which `changes` compares")
    add("changes", (system, chosen), "write what differs from the base "
        "(default: ~/job/apppot.YYYY-MM-DD.changes.tar.gz)", file="?")
    add("merge", (system, forced), "apply changes files to this system, in their order", file="+")
    add("show", (), "check a changes file and list what is in it", file=None)
    add("squash", (result,), "make one changes file of several", file="+")
    add("diff", (chosen, result), "write what makes DIR_B of DIR_A", dir_a=None, dir_b=None)
    add("apply", (forced,), "apply a changes file to a plain tree", file=None, dir=None)


def run_command(options: Any) -> None:
    report = Report(options.verbose)
    just_print: bool = options.just_print
    if options.command == "base":
        run_base(options.root, options.exclude, just_print, report)
    elif options.command == "changes":
        output = None if just_print else options.file or default_output()
        save_changes(options.root, output, options.exclude, report)
    elif options.command == "merge":
        run_apply(options.file, options.root, just_print, options.force_changes, report)

    elif options.command == "show":
        run_show(options.file, report)
    elif options.command == "squash":
        run_squash(options.file, options.output, just_print, report)
    elif options.command == "diff":
        exclude = compile_exclude(options.exclude)
        plan = compare_trees(options.dir_a, options.dir_b, exclude, report)
        run_save(options.dir_b, plan, None if just_print else options.output, report)
    elif options.command == "apply":
        run_apply([options.file], options.dir, just_print, options.force_changes, report)


def main(argv: Sequence[str]) -> int:
    import signal

    spare_memory()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            # The exception makes new_file() remove its temporary file.
            signal.signal(number, lambda number, frame: sys.exit(128 + number))

    try:
        run_command(build_parser().parse_args(argv))
        if sys.stdout:  # None if the caller has closed it
            sys.stdout.flush()
        return 0
    except Fatal as fatal:
        message = fatal.message
        hint = fatal.hint
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout at its end
        return 128 + signal.SIGPIPE
    except MemoryError:
        message = "too little memory"
        hint = "give more memory, in a run by --mem"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        is_named = isinstance(error.filename, (str, bytes))
        name = os.fsencode(error.filename) if is_named else b"changes file"
        message = "{}: {}".format(error.strerror, printable(name))
        hint = "look at that file or directory"

    print("apppot: error: {}\napppot: hint: {}".format(message, hint), file=sys.stderr)
    return 125


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
