#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""AppPot's changes files: what differs from the base image, as an OCI image layer (a tar, usually gzipped).

Usage: apppot-snap {base,changes,merge,show,squash,diff,apply} ... in the appliance, python3 changes.py ... on the host

Constraint: in the appliance a system call costs 10 us or more, an import up to 80 ms, so this has a tar of its own that
does nothing twice, works relative to directory descriptors, and imports little. Reading a layer, checking it and
applying it are apart: a kernel that attaches layers would replace the last alone.
"""
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
FORMAT = 1                           # of changes.json and of the manifest


# --- Messages -------------------------------------------------------------------------------------

class Fatal(Exception):
    """It cannot be done: `message` says what, and of which object; `hint` what to do about it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def printable(path: bytes) -> str:
    """One line, whatever the bytes."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text) or "."


def absolute(path: bytes) -> str:
    return "/" + printable(path) if path else "/"


def quote(path: bytes) -> str:
    """For a shell."""
    return "'" + printable(path).replace("'", "'\\''") + "'"


def format_size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return "{:.{}f} {}".format(size, 0 if unit == "B" or size >= 10 else 1, unit)
        size /= 1024
    return "{:.1f} GiB".format(size)


class Report:
    """Where news goes; the agent may have a class of its own."""

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = 0.0

    def warn(self, text: str) -> None:
        self.clear()
        print("apppot: warning: " + text, file=sys.stderr, flush=True)

    def say(self, path: bytes) -> None:
        if self.verbose:
            print(printable(path), flush=True)

    def progress(self, what: str, count: int, size: int) -> None:
        """To be called once in a while; size in bytes."""
        if self._is_terminal and not self.verbose and time.monotonic() > self._shown + 0.1:
            self._shown = time.monotonic()
            print("\r{}: {} files, {}\033[K".format(what, count, format_size(size)), end="", file=sys.stderr,
                  flush=True)

    def allow(self, layers: Sequence["Layer"]) -> None:
        """To be called with layers found whole before they change anything; raises Fatal where they may not."""

    def clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self._shown = 0.0


# --- Paths: relative to the root, which is b"" ----------------------------------------------------

STATE = b"var/lib/apppot"            # the tool's own state
PATH_LENGTH_MAX = 1 << 16            # trees may be deeper than PATH_MAX, but what takes hours is no tree


def split_path(path: bytes) -> Tuple[bytes, bytes]:
    directory, _, name = path.rpartition(b"/")
    return directory, name


def join_path(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def count_levels(before: bytes, directory: bytes) -> int:
    """Directories to be entered on the way from one to the next."""
    if before == directory or not directory:
        return 0
    way = directory.split(b"/")
    shared = 0
    for name, other in zip(way, before.split(b"/")):
        if name != other:
            break
        shared += 1
    return len(way) - shared


# --- Members: the files in a layer or in a tree ---------------------------------------------------

REGULAR, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = (b"%d" % number for number in range(7))
KINDS = {stat.S_IFREG: REGULAR, stat.S_IFLNK: SYMLINK, stat.S_IFCHR: CHARACTER, stat.S_IFBLK: BLOCK_DEVICE,
         stat.S_IFDIR: DIRECTORY, stat.S_IFIFO: FIFO}
DEVICES = (CHARACTER, BLOCK_DEVICE)
WHITEOUT, OPAQUE, WHITEOUT_META = b".wh.", b".wh..wh..opq", b".wh..wh."
PIECE = struct.Struct("<QQ")         # offset and length of what of a sparse file is no hole
PIECES_MAX = 1 << 21                 # of a sparse file


class Member(NamedTuple):
    """A file in a layer or in a tree."""
    path: bytes                      # relative to the root, which is b""
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: Tuple[int, int] = (0, 0)
    link: bytes = b""
    xattrs: Tuple[Tuple[str, bytes], ...] = ()
    pieces: Optional[bytes] = None   # of a sparse file: a PIECE for each part that is no hole
    change: bytes = b"C"             # A added, M modified, C one of the two


def by_path(member: Member) -> bytes:
    return member.path.replace(b"/", b"\0")


def whiteout_of(path: bytes) -> Member:
    directory, name = split_path(path)
    return Member(join_path(directory, WHITEOUT + name), REGULAR, 0, 0, 0, 0, 0)


def is_whiteout(path: bytes) -> bool:
    return path.startswith(WHITEOUT, path.rfind(b"/") + 1)


def link_of(member: Member, first: Member) -> Member:
    return member._replace(kind=HARD_LINK, link=first.path, size=0, pieces=None)


def list_pieces(member: Member) -> Iterable[Tuple[int, int]]:
    """Offset and length of each part of a file's content."""
    if member.pieces is None:
        return ((0, member.size),)
    return PIECE.iter_unpack(member.pieces)


def count_stored(member: Member) -> int:
    """Bytes of content that a tar has of a member."""
    return member.size if member.pieces is None else sum([length for _, length in list_pieces(member)])


# --- The format: pax(1), tar(5), and the OCI image specification's layer.md -----------------------

LABEL = STATE + b"/changes.json"
BLOCK = 512
HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
XATTR = b"SCHILY.xattr."
SPECIAL_MAX = 1 << 20                # bytes of a member's pax headers; archive/tar of Go has the same
BUFFER = 1 << 18


def add_bytes(content: bytes) -> int:
    """The sum of the bytes, modulo 65521; 30 times as fast as sum()."""
    return zlib.adler32(content, 0) & 0xffff


def pad(size: int) -> bytes:
    return bytes(-size % BLOCK)


# --- Memory ---------------------------------------------------------------------------------------

MEMORY_MAX = 1 << 30                 # bytes for what layers say about paths
INDEX_MAX = 1 << 27                  # bytes for what spares the second pass the headers
MEMBER_COST, NODE_COST = 450, 250    # bytes of memory for a member in the index, and for a path in a Node (measured)


def spare_memory() -> None:
    """To be called once, before the work.

    glibc's malloc then keeps what is freed, up to twice the largest block that was mapped and freed (mallopt(3)): else
    the buffers of zlib come from the kernel anew each time, and in the guest a page fault costs 70 us. And nothing here
    is circular, while there may be a million tuples for the collector to look at.
    """
    import gc

    gc.disable()
    bytes(16 << 20)


def available_memory() -> int:
    """Bytes; a guest that needs more ends in a panic."""
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
    """A descriptor to write to; the file appears under its name when all is written, or not at all."""
    directory = os.path.dirname(path) or b"."
    temporary = os.path.join(directory, b".apppot-" + os.urandom(6).hex().encode())
    if os.path.exists(path) and not os.path.isfile(path):      # it would take the place of a device such as /dev/null
        raise Fatal("cannot write, not a regular file: " + printable(path), "name a file that can be written")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise Fatal("cannot write, {}: {}".format(error.strerror, printable(path)), "name a file that can be written")
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

OCTAL_MAX, ID_OCTAL_MAX = 8 ** 11 - 1, 8 ** 7 - 1
LEVEL = 1                            # of zlib: 2.1 to 3.4 times as fast as 6, 8 to 14 % larger (measured)
STORED_MAX = 65535                   # RFC 1951: bytes in a block that is not compressed


def encode_record(key: bytes, value: bytes) -> bytes:
    """A record of a pax header begins with its own length, these digits included."""
    size = len(key) + len(value) + 3
    total = size + len(str(size))
    return b"%d %b=%b\n" % (size + len(str(total)), key, value)


def encode_time(time_ns: int) -> bytes:
    seconds, fraction = divmod(abs(time_ns), 10 ** 9)
    return b"-" * (time_ns < 0) + b"%d.%09d" % (seconds, fraction)


def encode_header(member: Member) -> bytes:
    """The numbers have to fit."""
    header = HEADER.pack(
        member.path[:100], b"%07o" % member.mode, b"%07o" % member.uid, b"%07o" % member.gid, b"%011o" % member.size,
        b"%011o" % (member.mtime_ns // 10 ** 9), b" " * 8, member.kind, member.link[:100], b"ustar\00000", b"", b"",
        b"%07o" % member.device[0], b"%07o" % member.device[1], b"")
    return header[:148] + b"%06o\0 " % add_bytes(header) + header[156:]


def encode_pieces(member: Member) -> bytes:
    """The map of GNU's sparse format 1.0 for pax.

    A hole at the end is followed by a piece of no bytes: else GNU tar makes a file without that hole.
    """
    pieces = list(list_pieces(member))
    if not pieces or sum(pieces[-1]) < member.size:
        pieces.append((member.size, 0))
    text = b"%d\n" % len(pieces) + b"".join([b"%d\n%d\n" % piece for piece in pieces])
    return text + pad(len(text))


def encode_member(member: Member) -> bytes:
    """All that comes before the content."""
    if len(member.path) >= PATH_LENGTH_MAX:
        start = absolute(member.path[:99])
        raise Fatal("a path of more than {} bytes cannot be saved: {}...".format(PATH_LENGTH_MAX, start),
                    "remove these directories, or leave them out by --exclude")
    name = (member.path or b".") + b"/" if member.kind == DIRECTORY else member.path
    size = member.size if member.kind == REGULAR else 0
    uid, gid, time_ns = member.uid, member.gid, member.mtime_ns
    records = []
    sparse_map = b""
    if member.pieces is not None:
        sparse_map = encode_pieces(member)
        records += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", name),
                    (b"GNU.sparse.realsize", b"%d" % size)]
        name = b"GNUSparseFile.0/" + member.path[-80:]
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
    records += [(key, value) for key, value in ((b"path", name), (b"linkpath", member.link)) if len(value) > 100]
    # As GNU tar has it: a key ends at the first "=".
    records += [(XATTR + os.fsencode(key).replace(b"%", b"%25").replace(b"=", b"%3D"), value)
                for key, value in member.xattrs]
    if member.change == b"M":
        records.append((b"comment", b"modified"))              # the one keyword of pax that readers pass over
    header = encode_header(Member(name, member.kind, member.mode, uid, gid, size, time_ns, member.device, member.link))
    if not records:
        return header + sparse_map
    extended = b"".join(encode_record(key, value) for key, value in records)
    name = b"PaxHeaders.0/" + member.path[-80:]
    return (encode_header(Member(name, b"x", 0o644, 0, 0, len(extended), time_ns))
            + extended + pad(len(extended)) + header + sparse_map)


class Sink:
    """Where a tar goes, plain: block by block what has been put into `buffer`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.buffer = memoryview(bytearray(BUFFER))

    def put(self, size: int) -> None:
        write_all(self._descriptor, self.buffer[:size])

    def finish(self) -> None:
        """All was put."""


def is_compressible(content: memoryview) -> bool:
    """By samples; deflate takes as long for what it cannot compress, and most large data are compressed already."""
    samples = b"".join([content[start:start + 2048] for start in range(0, len(content), BUFFER // 4)])
    return len(zlib.compress(samples, 1)) < 0.95 * len(samples)


class Deflater(Sink):
    """Writes gzip."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self._compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -15)
        self._size = self._crc = 0
        write_all(descriptor, b"\x1f\x8b\x08\0\0\0\0\0\0\xff")             # RFC 1952: no time, no name

    def put(self, size: int) -> None:
        content = self.buffer[:size]
        self._crc = zlib.crc32(content, self._crc)
        self._size += size
        if is_compressible(content):
            write_all(self._descriptor, self._compressor.compress(content))
            return
        # It forgets what it has seen, so that these blocks may come in between.
        pieces: List[Content] = [self._compressor.flush(zlib.Z_FULL_FLUSH)]
        for start in range(0, size, STORED_MAX):
            piece = content[start:start + STORED_MAX]
            pieces += [struct.pack("<BHH", 0, len(piece), len(piece) ^ 0xffff), piece]
        write_all(self._descriptor, b"".join(pieces))

    def finish(self) -> None:
        write_all(self._descriptor, self._compressor.flush() + struct.pack("<II", self._crc, self._size & 0xffffffff))


class LayerWriter:
    """Puts members and their content one behind the other, in blocks of BUFFER bytes."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._fill = self._crc = 0
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
        """Read straight into the buffer; when the file ends early, zeros take the place of the rest: False."""
        while size:
            count = os.readv(descriptor, [self._sink.buffer[self._fill:min(self._fill + size, BUFFER)]])
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
        self._crc = zlib.crc32(self._sink.buffer[:self._fill], self._crc)
        self._sink.put(self._fill)
        self._fill = 0

    def finish(self, base: str) -> None:
        """Label and end. The label closes with a checksum of all before it: a plain tar has no other of content."""
        newest_s = min(self._newest_ns // 10 ** 9, int(time.time()))
        created_s = int(os.environ.get("SOURCE_DATE_EPOCH") or newest_s)       # the same tree gives the same bytes
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created_s))
        text = '{{\n"format": {},\n"base": "{}",\n"created": "{}",\n"tool": "AppPot {}",\n"crc32": "'.format(
            FORMAT, base, created, VERSION).encode()
        self.write(encode_member(Member(LABEL, REGULAR, 0o644, 0, 0, len(text) + 12, created_s * 10 ** 9)) + text)
        self.write(b'%08x"\n}\n' % zlib.crc32(self._sink.buffer[:self._fill], self._crc))
        self.write(pad(len(text) + 12) + bytes(2 * BLOCK))
        if self._fill:
            self._flush()


# --- Reading a layer: its bytes -------------------------------------------------------------------

PACKED = 1 << 16


class Damaged(Exception):
    """The bytes are not those of a layer."""


class Stream:
    """The tar in a file: unpacked piece by piece, so that memory is bounded whatever the sizes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.lseek(descriptor, 0, os.SEEK_SET)
        self._packed = os.read(descriptor, PACKED)
        self.is_gzip = self._packed.startswith(b"\x1f\x8b")
        self._inflate = zlib.decompressobj(31)
        self._chunk = b""
        self._position = 0
        self._crc = 0                             # of a plain tar, up to the chunk

    def _refill(self) -> bool:
        """The next chunk; False at the end."""
        if not self.is_gzip:
            self._crc = zlib.crc32(self._chunk, self._crc)
            self._chunk = self._packed or os.read(self._descriptor, PACKED)
            self._packed = b""
        else:
            self._chunk = self._unpack()
        self._position = 0
        return len(self._chunk) > 0

    def _unpack(self) -> bytes:
        while True:
            if self._inflate.eof:
                self._packed = self._inflate.unused_data or os.read(self._descriptor, PACKED)
                if not self._packed:
                    return b""
                self._inflate = zlib.decompressobj(31)         # the next of several gzip members
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
        """Up to `limit` bytes, as many as are at hand but at least one."""
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
        pieces = [content]
        rest = size - len(content)
        while rest:
            piece = self.take(rest)
            pieces.append(bytes(piece))
            rest -= len(piece)
        return b"".join(pieces)

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.take(size))

    def crc(self) -> int:
        return zlib.crc32(self._chunk[:self._position], self._crc)

    def expect_whole(self) -> None:
        """To the end, for the checksum of gzip."""
        while self._refill():
            pass

    def expect_end(self) -> None:
        """Nothing but zeros to the end: tar fills its last record with them."""
        while self._position < len(self._chunk) or self._refill():
            if self._chunk[self._position:].strip(b"\0"):
                raise Damaged("something follows its end")
            self._position = len(self._chunk)


# --- Reading a layer: fields of its headers -------------------------------------------------------

NAME_MAX = 255                       # include/uapi/linux/limits.h, as the next line
XATTR_NAME_MAX, XATTR_SIZE_MAX, XATTR_LIST_MAX = 255, 1 << 16, 1 << 16


class Label(NamedTuple):
    """changes.json"""
    base: str
    created: str
    tool: str


def clean_path(name: bytes) -> bytes:
    """A path relative to the root, in one spelling. As for other tools, /a is below the root that is unpacked to."""
    if len(name) > PATH_LENGTH_MAX:
        raise Damaged("a name of more than {} bytes: {}".format(PATH_LENGTH_MAX, printable(name)))
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts or b"\0" in name:
        raise Damaged("unsafe name " + printable(name))
    if len(name) > NAME_MAX:
        for part in parts:
            if len(part) - len(WHITEOUT) * part.startswith(WHITEOUT) > NAME_MAX:
                raise Damaged("a name of more than {} bytes: {}".format(NAME_MAX, printable(name)))
    return b"/".join(parts)


def parse_number(field: bytes) -> int:
    if field[0] & 0x80:                           # GNU's base 256
        half = 1 << 8 * len(field) - 1
        return int.from_bytes(field, "big") - half - (half if field[0] & 0x40 else 0)
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
    time_ns = parse_decimal(seconds.lstrip(b"-")) * 10 ** 9 + parse_decimal(fraction[:9].ljust(9, b"0"))
    return -time_ns if seconds.startswith(b"-") else time_ns


def parse_records(content: bytes) -> Dict[bytes, bytes]:
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
            records.pop(key, None)                # as pax(1) has it: the header's own field is meant
        start = end
    return records


def parse_label(content: bytes) -> Optional[Label]:
    """changes.json as finish() writes it, a field per line: the json module costs 50 ms to import.

    What a terminal would not print as it is, is no field.
    """
    fields = dict(re.findall(r'^"(\w+)": "?([ !#-~]{0,99}?)"?,?$', content.decode("ascii", "replace"), re.MULTILINE))
    if not fields.get("format", "").isdigit():
        return None
    if int(fields["format"]) > FORMAT:
        raise Fatal("changes file has format {}: this AppPot knows up to {}".format(fields["format"], FORMAT),
                    "use the AppPot that made it, or a newer one: " + fields.get("tool", "?"))
    return Label(fields.get("base", ""), fields.get("created", ""), fields.get("tool", ""))


def decode_xattrs(records: Dict[bytes, bytes]) -> Tuple[Tuple[str, bytes], ...]:
    return tuple([(os.fsdecode(key[len(XATTR):].replace(b"%3D", b"=").replace(b"%25", b"%")), value)
                  for key, value in records.items() if key.startswith(XATTR)])


def are_possible(xattrs: Tuple[Tuple[str, bytes], ...]) -> bool:
    """Whether a kernel takes such extended attributes (xattr(7))."""
    names = 0
    for name, value in xattrs:
        length = len(os.fsencode(name))
        names += length + 1
        if not 0 < length <= XATTR_NAME_MAX or len(value) > XATTR_SIZE_MAX or "\0" in name:
            return False
    return names <= XATTR_LIST_MAX


# --- Reading a layer: its members -----------------------------------------------------------------

NAME_A_LAYER = "name a file that --save-changes or `apppot-snap changes` wrote, or a layer of an OCI image"
SYMLINK_MAX = 4095                   # include/uapi/linux/limits.h
ID_MAX = (1 << 32) - 2               # chown(2) takes -1 for "leave it"
SIZE_MAX = (1 << 44) - 4096          # of a file of ext4
TIME_MAX_NS = (1 << 40) * 10 ** 9
# Gzip packs zeros a thousandfold, headers of empty files with names in a row hundredfold. So the size of a file bounds
# that of its headers, and these bound time and memory.
HEADERS_MAX, HEADERS_RATIO = 16 << 20, 128
Index = List[Tuple[Member, int, int]]              # member, bytes up to its content from the end of the last, its bytes


class Foreign(Damaged):
    """The file is whole, perhaps, and something else: `what` it is, and `hint`, with {} for its name in a shell."""

    def __init__(self, what: str, hint: str = NAME_A_LAYER) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


class LayerReader:
    """Iterates over the members of a layer; content() gives what the present one holds.

    The first pass through a layer makes an index, which spares the second the headers, if it takes no more memory than
    `index_max`.
    """

    def __init__(self, descriptor: int, known: Optional[Index] = None, index_max: int = 0) -> None:
        self._stream = Stream(descriptor)
        self._known = known
        self.index: Optional[Index] = []
        self._index_max = index_max
        self.measured = 0                         # bytes of memory that all members take
        self._headers_left = HEADERS_MAX + HEADERS_RATIO * os.fstat(descriptor).st_size
        self._before = 0                          # bytes from the end of the last content
        self._left = 0                            # bytes of content not read yet
        self.is_gzip = self._stream.is_gzip
        self.levels = 0                           # directories to be entered on the way from member to member
        self._ways = [b"", b""]                   # the last directory of members, and of what hard links lead to

    def __iter__(self) -> Iterator[Member]:
        for member, before, size in self._scan() if self._known is None else self._known:
            if self._known is not None:
                self._stream.skip(before)
                self._left = size
            yield member
            self._stream.skip(self._left)
            self._left = 0
        if self._known is not None:
            self._stream.expect_whole()

    def _scan(self) -> Iterator[Tuple[Member, int, int]]:
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
            self._count_way(0, member.path)
            if member.kind == HARD_LINK:
                self._count_way(1, member.link)
            entry = member, self._before, self._left
            self._keep(entry)
            yield entry

    def _keep(self, entry: Tuple[Member, int, int]) -> None:
        self.measured += measure(entry[0])
        if self.measured > self._index_max:
            self.index = None
        if self.index is not None:
            self.index.append(entry)

    def _read(self, size: int) -> bytes:
        """What is no content. A file of a few KiB may inflate to headers that would take hours and all memory."""
        self._before += size
        self._spend(size)
        return self._stream.read(size)

    def _spend(self, size: int) -> None:
        self._headers_left -= size
        if self._headers_left < 0:
            raise Damaged("it is all headers, as no tree of files has them")

    def _count_way(self, number: int, path: bytes) -> None:
        """A directory on the way takes as long as a header."""
        directory = split_path(path)[0]
        if directory != self._ways[number]:
            levels = count_levels(self._ways[number], directory)
            self.levels += levels
            self._spend(levels * BLOCK)
            self._ways[number] = directory

    def content(self) -> Iterator[memoryview]:
        while self._left:
            piece = self._stream.take(self._left)
            self._left -= len(piece)
            yield piece

    def read(self) -> bytes:
        return b"".join(self.content())

    def crc(self) -> int:
        return self._stream.crc()

    def _read_header(self) -> Optional[Tuple[bytes, Dict[bytes, bytes]]]:
        """The header proper, and what extended headers say about it; None at the end."""
        records: Dict[bytes, bytes] = {}
        left = SPECIAL_MAX
        while True:
            header = self._read(BLOCK)
            if not header.strip(b"\0"):
                if records or self._stream.read(BLOCK).strip(b"\0"):
                    raise Damaged("a block of zeros is not its end")
                self._stream.expect_end()
                return None
            wanted = add_bytes(header) - add_bytes(header[148:156]) + add_bytes(b" " * 8)
            if (parse_number(header[148:156]) - wanted) % 65521:
                raise Damaged("a header has a wrong checksum, or it is no tar")
            kind = header[156:157]
            if kind not in b"xgLK":
                return header, records
            size = parse_number(header[124:136])
            if not 0 <= size <= left:
                raise Damaged("extended headers of more than {} bytes".format(SPECIAL_MAX))
            content = self._read(size + -size % BLOCK)[:size]
            if kind == b"g":                      # of all members that follow; umoci and docker pass over it, too
                continue
            left -= size
            if kind == b"x":
                records.update(parse_records(content))
            else:                                 # GNU's long names
                records[b"path" if kind == b"L" else b"linkpath"] = content.rstrip(b"\0")

    def _decode(self, header: bytes, records: Dict[bytes, bytes]) -> Tuple[Member, int]:
        (name, mode, uid, gid, size, mtime, _, kind, link, magic, _, _, major, minor, prefix) = HEADER.unpack(header)
        name, link = name.partition(b"\0")[0], link.partition(b"\0")[0]
        if prefix[0] and magic == b"ustar\00000":
            name = prefix.partition(b"\0")[0] + b"/" + name
        if records:
            name = records.get(b"GNU.sparse.name", records.get(b"path", name))
            link = records.get(b"linkpath", link)
        kind = REGULAR if kind in b"\0" + b"7" else kind
        stored = 0
        if kind == REGULAR:
            stored = parse_decimal(records[b"size"]) if b"size" in records else parse_number(size)
        kind = DIRECTORY if kind == REGULAR and name.endswith(b"/") else kind
        time_ns = parse_time(records[b"mtime"]) if b"mtime" in records else parse_number(mtime) * 10 ** 9
        member = Member(
            clean_path(name), kind, parse_number(mode) & 0o7777,
            parse_decimal(records[b"uid"]) if b"uid" in records else parse_number(uid),
            parse_decimal(records[b"gid"]) if b"gid" in records else parse_number(gid), stored, time_ns,
            (parse_number(major), parse_number(minor)) if kind in b"34" else (0, 0),
            clean_path(link) if kind == HARD_LINK else link if kind == SYMLINK else b"",
            decode_xattrs(records), None, b"M" if records.get(b"comment") == b"modified" else b"C")
        self._check(member)
        if kind == b"S" or b"GNU.sparse" in b"".join(records):
            if (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                raise Foreign("a tar with a sparse file in an old format, {}".format(absolute(member.path)),
                              "make it again with: tar --format=posix")
            member = member._replace(size=parse_decimal(records.get(b"GNU.sparse.realsize", b"")), pieces=b"")
            self._check(member)
        return member, stored

    @staticmethod
    def _check(member: Member) -> None:
        what = None
        if member.kind not in KINDS.values() and member.kind not in (HARD_LINK, b"S"):
            what = "a member of unknown type {!r}".format(member.kind)
        elif not (0 <= member.uid <= ID_MAX and 0 <= member.gid <= ID_MAX and 0 <= member.size <= SIZE_MAX):
            what = "an impossible owner or size"
        elif abs(member.mtime_ns) > TIME_MAX_NS:
            what = "an impossible time"
        elif not (0 <= member.device[0] < 1 << 12 and 0 <= member.device[1] < 1 << 20):
            what = "an impossible device number"
        elif member.kind == SYMLINK and (not 0 < len(member.link) <= SYMLINK_MAX or b"\0" in member.link):
            what = "an impossible symbolic link"
        elif member.kind == HARD_LINK and (not member.link or member.link == member.path):
            what = "an impossible hard link"
        elif not member.path and member.kind != DIRECTORY:
            what = "a root that is no directory"
        elif member.xattrs and not are_possible(member.xattrs):
            what = "impossible extended attributes"
        if what:
            raise Damaged("{}: {}".format(what, printable(member.path)))

    def _read_pieces(self, member: Member) -> Member:
        """The map before a sparse file's content: how many pairs follow, and these, filled up to whole blocks."""
        numbers = self._read_numbers()
        count = next(numbers)
        pieces = bytearray()
        end = size = 0
        for _ in range(min(count, PIECES_MAX + 1)):
            offset = next(numbers)
            length = next(numbers)
            if offset < end or offset + length > member.size:
                raise Damaged("a wrong map of a sparse file: " + printable(member.path))
            end = offset + length
            if length:
                pieces += PIECE.pack(offset, length)
                size += length

        if size != self._left or count > PIECES_MAX:
            raise Damaged("a wrong map of a sparse file: " + printable(member.path))
        return member._replace(pieces=bytes(pieces))

    def _read_numbers(self) -> Iterator[int]:
        """Decimal numbers, each on a line."""
        rest = b""
        while True:
            if self._left < BLOCK:
                raise Damaged("a map of a sparse file is longer than its content")
            self._left -= BLOCK
            *lines, rest = (rest + self._read(BLOCK)).split(b"\n")
            for line in lines:
                yield parse_decimal(line)
            parse_decimal(rest or b"0")           # and not longer than one


# --- Trees ----------------------------------------------------------------------------------------

DESCRIPTORS = 200                    # directories kept open on the way down
T = TypeVar("T", bound="Tree")


class Mounted(Exception):
    """The path leads to what is mounted there, or has it below."""


def find_mounts(root: bytes) -> Set[bytes]:
    """Mount points below a root, relative to it; for bind mounts of the same file system no stat() tells (proc(5))."""
    top = os.path.realpath(root).rstrip(b"/") + b"/"
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            points = [line.split(b" ", 5)[4] for line in file]
    except FileNotFoundError:
        return set()
    plain = [re.sub(br"\\(\d{3})", lambda match: bytes([int(match.group(1), 8)]), point) for point in points]
    return {point[len(top):] for point in plain if point.startswith(top) and point != top}


class Level:
    """An open directory on the way down, and what is to be done when it is left."""
    __slots__ = ("name", "descriptor", "status", "inherits", "is_touched", "is_new", "member")

    def __init__(self, name: bytes, descriptor: int, status: os.stat_result) -> None:
        self.name, self.descriptor, self.status = name, descriptor, status
        self.inherits: Optional[bool] = None      # whether what is made in it gets a group or an ACL from it
        self.is_touched = self.is_new = False
        self.member: Optional[Member] = None


class Tree:
    """Descriptors of the directories on the way to a path: never through a symlink or into another file system.

    Walks and layers go from neighbour to neighbour, so most of the way is open already; and a path may be longer than
    the kernel takes.
    """
    FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

    def __init__(self, root: bytes) -> None:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.levels = [Level(b"", descriptor, os.fstat(descriptor))]
        self.device = self.levels[0].status.st_dev
        self.mounts = find_mounts(root)
        self._path = b""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        for level in self.levels:
            if level.descriptor >= 0:
                os.close(level.descriptor)

    def open(self, path: bytes) -> int:
        """The descriptor of a directory; valid until the next call."""
        while self._path and path != self._path and not path.startswith(self._path + b"/"):
            self.leave()
        if path != self._path:
            for name in path[len(self._path):].lstrip(b"/").split(b"/"):
                self._enter(name)
        return self.levels[-1].descriptor

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

    def lstat(self, path: bytes) -> os.stat_result:
        directory, name = split_path(path)
        return os.stat(name or b".", dir_fd=self.open(directory), follow_symlinks=False)

    def leave(self) -> None:
        level, parent = self.levels[-1], self.levels[-2]
        if parent.descriptor < 0:
            parent.descriptor = os.open("..", self.FLAGS, dir_fd=level.descriptor)
            if not os.path.samestat(os.fstat(parent.descriptor), parent.status):
                raise Fatal("directory was moved meanwhile: " + printable(level.name), "let nothing else work in there")
        self.finish(level, parent)
        self.levels.pop()
        os.close(level.descriptor)
        self._path = split_path(self._path)[0]

    def finish(self, level: Level, parent: Level) -> None:
        """What is to be done before a directory is left."""


def unreadable(path: bytes, error: OSError) -> Fatal:
    return Fatal("cannot be read, {}: {}".format(error.strerror, absolute(path)),
                 "it takes root; in the appliance: sudo apppot-snap")


def scan(tree: Tree, exclude: "re.Pattern[bytes]", skipped: Dict[bytes, str]
         ) -> Iterator[Tuple[bytes, os.stat_result]]:
    """Every path with its lstat, a directory before what is in it, names in order of their bytes.

    What is not looked into comes into `skipped`, with the reason.
    """
    pending = [(b"", tree.levels[0].status)]
    while pending:
        path, status = pending.pop()
        yield path, status
        if not stat.S_ISDIR(status.st_mode):
            continue
        found = []
        try:
            directory = tree.open(path)
            for name in map(os.fsencode, os.listdir(directory)):               # scandir() of 3.6 takes no descriptor
                child = join_path(path, name)
                if exclude.fullmatch(b"/" + child):
                    skipped[child] = "excluded"
                    continue
                try:
                    child_status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                except FileNotFoundError:
                    continue                      # removed meanwhile
                if child_status.st_dev != tree.device or child in tree.mounts:
                    skipped[child] = "a mount point"
                elif name.startswith(WHITEOUT):
                    skipped[child] = "a name with a meaning of its own in layers"
                else:
                    found.append((child, child_status))
        except (FileNotFoundError, NotADirectoryError, Mounted):
            continue
        except PermissionError as error:
            raise unreadable(path, error)
        found.sort(reverse=True)
        pending += found


# --- The files of a tree --------------------------------------------------------------------------

# What belongs to a machine's security policy, not to the file.
FOREIGN_XATTRS = ("security.selinux", "security.ima", "security.evm")
File = Union[int, bytes]             # a descriptor, or a path of which a symlink at the end is meant itself


def member_of(path: bytes, status: os.stat_result, change: bytes = b"C") -> Member:
    """What lstat tells; KeyError for a socket. A file that may have holes has `pieces`."""
    kind = KINDS[stat.S_IFMT(status.st_mode)]
    is_file = kind == REGULAR
    return Member(path, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid,
                  status.st_size if is_file else 0, status.st_mtime_ns,
                  (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in b"34" else (0, 0),
                  pieces=b"" if is_file and status.st_blocks * BLOCK < status.st_size else None, change=change)


def proc_path(directory: int, name: bytes) -> bytes:
    """For the calls on extended attributes, which have no *at() form."""
    return b"/proc/self/fd/%d/%b" % (directory, name)


def read_xattrs(target: File) -> Tuple[Tuple[str, bytes], ...]:
    follow = isinstance(target, int)
    try:
        names = os.listxattr(target, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOENT):
            return ()
        raise
    return tuple([(name, os.getxattr(target, name, follow_symlinks=follow))
                  for name in sorted(names) if name not in FOREIGN_XATTRS])


def find_pieces(descriptor: int, size: int) -> Optional[bytes]:
    """Where a sparse file has data; None if it has no holes."""
    pieces = bytearray()
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:                           # ENXIO: a hole to the end
            break
        if start >= size:                         # the file has grown meanwhile
            break
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        pieces += PIECE.pack(start, end - start)
    os.lseek(descriptor, 0, os.SEEK_SET)
    if len(pieces) >= PIECES_MAX * PIECE.size:
        return None                               # it comes without holes: no reader takes such a map
    return None if pieces == PIECE.pack(0, size) else bytes(pieces)


@contextmanager
def open_member(tree: Tree, member: Member) -> Iterator[Tuple[Member, int]]:
    """The member with what lstat did not tell, and for a regular file its descriptor, else -1."""
    directory, name = split_path(member.path)
    descriptor = -1
    try:
        if member.kind == DIRECTORY:
            member = member._replace(xattrs=read_xattrs(tree.open(member.path)))
        elif member.kind == REGULAR:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                                 dir_fd=tree.open(directory))
            pieces = find_pieces(descriptor, member.size) if member.pieces is not None else None
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


# --- What stays out of changes --------------------------------------------------------------------

EXCLUDE_FILE = b"etc/apppot/exclude"
EXCLUDE = (
    "/dev", "/proc", "/sys", "/run", "/tmp", "/var/tmp", "/lost+found",         # not part of a system at rest
    "/var/cache", "/var/lib/apt/lists", "/root/.cache", "/home/*/.cache",
    "/" + STATE.decode(), "/root/job", "/home/*/job")


def compile_exclude(patterns: Iterable[str]) -> "re.Pattern[bytes]":
    """`*` and `?` match within a name; a pattern that does not begin with / matches at any depth."""
    expressions = []
    for pattern in patterns:
        glob = re.escape(os.fsencode(pattern.rstrip("/"))).replace(br"\*", b"[^/]*").replace(br"\?", b"[^/]")
        expressions.append(glob if pattern.startswith("/") else b"(?:.*/)?" + glob)
    return re.compile(b"(?s)(?:" + b"|".join(expressions or [b"(?!)"]) + b")")


def choose_exclude(root: bytes, asked: Iterable[str], output: Optional[bytes] = None) -> "re.Pattern[bytes]":
    """The usual patterns, those of the appliance's own list, those asked for, and the changes file itself."""
    try:
        with open(os.path.join(root, EXCLUDE_FILE), errors="surrogateescape") as file:
            listed = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    except FileNotFoundError:
        listed = []
    top = os.path.realpath(root).rstrip(b"/") + b"/"
    own = []
    if output is not None:
        place = os.path.join(os.path.realpath(os.path.dirname(output) or b"."), os.path.basename(output))
        own = [os.fsdecode(place[len(top) - 1:])] if place.startswith(top) else []
    return compile_exclude([*EXCLUDE, *listed, *asked, *own])


# --- The recorded base ----------------------------------------------------------------------------

BASE_ID = STATE + b"/base-id"
MANIFEST = STATE + b"/manifest"
TICK_NS = 20 * 10 ** 6               # a time stamp may be that old when it is given: HZ is 100 or more
SIGNATURE = struct.Struct("<QQQQI")  # inode, size, mtime, ctime, mode


def read_base_id(root: bytes) -> str:
    """Empty for a tree that is no appliance."""
    try:
        with open(os.path.join(root, BASE_ID), "rb") as file:
            return printable(file.read(100).strip())
    except OSError:
        return ""


def sign(status: os.stat_result) -> bytes:
    """What no change of a file leaves as it is: at the least its ctime becomes the present."""
    return SIGNATURE.pack(status.st_ino, status.st_size, status.st_mtime_ns % 2 ** 64, status.st_ctime_ns % 2 ** 64,
                          status.st_mode)


def encode_manifest(signatures: Dict[bytes, bytes]) -> bytes:
    paths = b"\0".join(signatures)
    return b"AppPot manifest %d %d\n" % (FORMAT, len(signatures)) + b"".join(signatures.values()) + paths


def decode_manifest(content: bytes) -> Dict[bytes, bytes]:
    """A few calls of C, whatever the number of files."""
    head, _, rest = content.partition(b"\n")
    words = head.split()
    if words[:3] != [b"AppPot", b"manifest", b"%d" % FORMAT] or len(words) != 4:
        raise Damaged("not a manifest")
    size, count = SIGNATURE.size, int(words[3])
    paths = rest[size * count:].split(b"\0")
    if len(paths) != count:
        raise Damaged("a manifest of {} instead of {} files".format(len(paths), count))
    return dict(zip(paths, [rest[start:start + size] for start in range(0, size * count, size)]))


def time_ns() -> int:
    return int(time.time() * 1e9)


def record_base(root: bytes, exclude: "re.Pattern[bytes]", report: Report, place: Optional[bytes] = None) -> None:
    """Write the manifest that find_changes() compares with, usually into the tree itself.

    A file whose ctime is the present could be changed again without a trace in its time stamps, until the clock has
    ticked: such files are looked at again.
    """
    signatures = {}
    with Tree(root) as tree:
        started = time_ns()
        unsettled = []
        for path, status in scan(tree, exclude, {}):
            signatures[path] = sign(status)
            if status.st_ctime_ns > started - TICK_NS:
                unsettled.append(path)
        for _ in range(10):
            if not unsettled:
                break
            time.sleep(2 * TICK_NS / 1e9)
            started = time_ns()
            checked, unsettled = unsettled, []
            for path in checked:
                status = tree.lstat(path)
                signatures[path] = sign(status)
                if started - TICK_NS < status.st_ctime_ns <= started:
                    unsettled.append(path)
        for path in unsettled:                    # it never rests: it counts as changed whatever it is
            signatures[path] = bytes(SIGNATURE.size)
    for path in signatures:
        report.say(path)
    replace_file(place or os.path.join(root, MANIFEST), encode_manifest(signatures))


def read_manifest(root: bytes, place: Optional[bytes] = None) -> Dict[bytes, bytes]:
    path = place or os.path.join(root, MANIFEST)
    try:
        with open(path, "rb", buffering=0) as file:
            return decode_manifest(file.read())
    except FileNotFoundError:
        raise Fatal("no base is recorded: " + printable(path), "`apppot-snap base` records the present state")
    except Damaged as error:
        raise Fatal("manifest is damaged, {}: {}".format(error, printable(path)),
                    "`apppot-snap base` records the present state")


# --- What has changed -----------------------------------------------------------------------------

class Found(NamedTuple):
    """What a look at a tree brought to light, by paths."""
    changed: Dict[bytes, Member]
    groups: Iterable[List[Member]]   # the names of an inode
    directories: Dict[bytes, Member]
    gone: Iterable[bytes]
    skipped: Dict[bytes, str]        # with the reason


class Plan(NamedTuple):
    """What a layer is to hold. Members of one inode stand one behind the other, all but the first as hard links."""
    members: List[Member]
    whiteouts: List[bytes]

    def entries(self) -> List[Member]:
        """Whiteouts as members; each directory before what is in it, as NUL comes before every other byte."""
        return sorted(self.members + [whiteout_of(path) for path in self.whiteouts], key=by_path)


def find_changes(root: bytes, old: Dict[bytes, bytes], exclude: "re.Pattern[bytes]", report: Report) -> Plan:
    """What differs from a manifest, by one lstat a file."""
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
                    report.warn("left out, a socket: /" + printable(path))
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


def describe(tree: Tree, exclude: "re.Pattern[bytes]", skipped: Dict[bytes, str], groups: List[List[Member]],
             report: Optional[Report] = None) -> Iterator[Tuple[bytes, Tuple[Member, bytes]]]:
    """Each path, all that is to know of it but the content, and the first name of its inode."""
    inodes: Dict[int, List[Member]] = {}
    for path, status in scan(tree, exclude, skipped):
        if stat.S_ISSOCK(status.st_mode):
            if report:
                report.warn("left out, a socket: /" + printable(path))
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


def compare_trees(old_root: bytes, new_root: bytes, exclude: "re.Pattern[bytes]", report: Report) -> Plan:
    """What differs between two trees, where nothing but all metadata and all content tells."""
    with Tree(old_root) as old_tree, Tree(new_root) as new_tree:
        old = dict(describe(old_tree, exclude, {}, []))
        changed: Dict[bytes, Member] = {}
        directories: Dict[bytes, Member] = {}
        skipped: Dict[bytes, str] = {}
        groups: List[List[Member]] = []
        gone = set(old)
        for path, (member, first) in describe(new_tree, exclude, skipped, groups, report):
            gone.discard(path)
            known = old.get(path)
            if known is None:
                changed[path] = member._replace(change=b"A")
            elif known != (member, first) or (
                    member.kind == REGULAR and path == first and not is_same_content(old_tree, new_tree, member)):
                changed[path] = member._replace(change=b"M")
            if member.kind == DIRECTORY:
                directories[path] = changed.get(path, member)
        return make_plan(Found(changed, groups, directories, gone, skipped), report)


def make_plan(found: Found, report: Report) -> Plan:
    """Complete what has changed: the other names of an inode, and directories, as unpacking alters their mtime."""
    changed, groups, directories, gone, skipped = found
    for group in groups:
        if any(member.path in changed for member in group):
            first = group[0]
            for member in group:
                changed[member.path] = changed.get(member.path, member._replace(change=b"M"))
            for member in group[1:]:
                changed[member.path] = link_of(changed[member.path], first)
    whiteouts = sorted(path for path in gone if path not in skipped and split_path(path)[0] in directories)
    altered = [path for path, member in changed.items() if member.kind != DIRECTORY or member.change == b"A"]
    for path in altered + whiteouts:
        parent = split_path(path)[0]
        if path and parent not in changed:
            changed[parent] = directories[parent]._replace(change=b"M")
    for path, reason in skipped.items():
        if reason == "a mount point":
            drop_mount_point(changed, split_path(path)[0])
        elif reason != "excluded" and split_path(path)[0] in directories:
            report.warn("left out, {}: /{}".format(reason, printable(path)))
    return Plan(list(changed.values()), whiteouts)


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
    """Of at most `size` bytes of content."""
    try:
        with new_file(path) as descriptor:
            sink = Sink(descriptor) if path.endswith(b".tar") else Deflater(descriptor)
            yield LayerWriter(sink)
            sink.finish()
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        status = os.statvfs(os.path.dirname(path) or b".")
        raise Fatal("cannot write, {}, {} free, up to {} needed: {}".format(
            error.strerror, format_size(status.f_bavail * status.f_frsize), format_size(size), printable(path)),
            "free some, or write the changes file elsewhere")


def write_layer(root: bytes, plan: Plan, output: bytes, report: Report) -> None:
    """Write the layer that makes of the base what is in `root`; never a part of it under the final name."""
    size = sum(member.size for member in plan.members)
    entries = [member for member in plan.entries() if member.path != LABEL]
    try:
        with new_layer(output, size) as writer, Tree(root) as tree:
            if entries and all(member.path != STATE for member in entries):
                add_state(writer, tree)
            moved: Dict[bytes, bytes] = {}
            done = 0
            for count, member in enumerate(entries):
                if count % 100 == 0 or member.size > BUFFER:
                    report.progress("saving", count, done)
                save_member(writer, tree, member, moved, report)
                done += member.size
            writer.finish(read_base_id(root))
    finally:
        report.clear()


def add_state(writer: LayerWriter, tree: Tree) -> None:
    """The label's directory, so that every tool that unpacks the label leaves it as it is."""
    try:
        status = os.fstat(tree.open(STATE))
    except OSError:
        return
    writer.add(member_of(STATE, status))


def save_member(writer: LayerWriter, tree: Tree, member: Member, moved: Dict[bytes, bytes], report: Report) -> None:
    """Add one member with its content. `moved` has the first names of inodes that were gone, and what took over."""
    if is_whiteout(member.path):
        writer.add(member)
        return
    try:
        if member.link in moved and moved[member.link]:
            member = member._replace(link=moved[member.link])
        elif member.link in moved:
            first = member.link
            member = member_of(member.path, tree.lstat(member.path), member.change)
            moved[first] = member.path
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


def save_content(writer: LayerWriter, member: Member, descriptor: int, report: Report) -> None:
    """As many bytes as lstat told, whatever becomes of the file meanwhile: else it would be no layer."""
    complete = True
    size = 0
    for start, length in list_pieces(member):
        if member.pieces is not None:
            os.lseek(descriptor, start, os.SEEK_SET)
        complete = writer.copy(descriptor, length) and complete
        size += length
    writer.write(pad(size))
    status = os.fstat(descriptor)
    if not complete or (status.st_size, status.st_mtime_ns) != (member.size, member.mtime_ns):
        report.warn("changed while it was saved: /" + printable(member.path))


# --- Layers that have been read -------------------------------------------------------------------

class Layer:
    """A layer that has been read once, to its end, and found whole."""

    def __init__(self, path: bytes) -> None:
        self.path = path
        try:
            # A pipe in its place would be waited for.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise Fatal("changes file cannot be read, {}: {}".format(error.strerror, printable(path)), NAME_A_LAYER)
        self.label: Optional[Label] = None
        self.whiteouts: List[bytes] = []
        self.opaques: List[bytes] = []            # directories of which nothing in lower layers stays
        self.count = self.size = 0                # members, and bytes that they take when unpacked
        self.memory = self.details = 0            # bytes to know all kinds of files by their paths, and all members
        self.index: Optional[Index] = None

    def __enter__(self) -> "Layer":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def reader(self, index_max: int = 0) -> LayerReader:
        return LayerReader(self.descriptor, self.index, index_max)

    def members(self) -> Iterable[Member]:
        """Without their content."""
        return self.reader() if self.index is None else [member for member, _, _ in self.index]


def needed_space(member: Member) -> int:
    """Bytes on a disk with blocks of 4 KiB."""
    if member.kind != REGULAR:
        return 4096 * (member.kind == DIRECTORY)
    size = count_stored(member)
    return size + -size % 4096


def expect_memory(needed: int, free: int, layers: Sequence[Layer]) -> None:
    if needed > free:
        raise Fatal("too little memory, {} free, at least {} needed: {}".format(
            format_size(free), format_size(needed), ", ".join(printable(layer.path) for layer in layers)),
            "nothing was applied; give more memory, in a run by --mem")


# --- Files that are no layer ----------------------------------------------------------------------

COMPRESSIONS = ((b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\x04\x22\x4d\x18", "lz4"))
# What is taken for a layer by mistake: what it is, the offset of its magic number, the number.
OTHER_FORMATS = (
    ("a zip archive", 0, b"PK\x03\x04"), ("a 7z archive", 0, b"7z\xbc\xaf\x27\x1c"), ("a cpio archive", 0, b"07070"),
    ("a squashfs image", 0, b"hsqs"), ("an EROFS image", 1024, b"\xe2\xe1\xf5\xe0"), ("a CD image", 32769, b"CD001"),
    ("a qcow2 image", 0, b"QFI\xfb"), ("a VMDK image", 0, b"KDMV"), ("an ext4 image", 1080, b"\x53\xef"),
    ("a disk image", 510, b"\x55\xaa"), ("a Debian package", 0, b"!<arch>\ndebian"),
    ("an RPM package", 0, b"\xed\xab\xee\xdb"), ("a program", 0, b"\x7fELF"), ("a PDF document", 0, b"%PDF-"))
# Members that show that a tar is an image with layers in it, and what is in them (OCI's image-layout.md, docker save).
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
    """Raise Foreign for what is known to be something else than a layer."""
    content = os.pread(descriptor, PACKED, 0)
    if content.startswith(b"\x1f\x8b"):
        return                                    # gzip: as it should be, and still damaged
    for magic, name in COMPRESSIONS:
        if content.startswith(magic):
            raise Foreign("compressed with {}, not with gzip".format(name),
                          "unpack it first: {} -dc {{}} > layer.tar".format(name))
    for name, offset, magic in OTHER_FORMATS:
        if content.startswith(magic, offset):
            raise Foreign(name + ", not a layer")
    if re.match(br"\s*<(!doctype|html|\?xml)", content, re.IGNORECASE):
        raise Foreign("a web page, not a layer", "did a download end in an error page or a login?")
    if not re.search(br"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]", content):
        raise Foreign("a text file, not a layer")


def list_image_layers(layer: Layer) -> List[str]:
    """The names of the members of an image archive that are layers; none where it is not as it should be."""
    import json  # not for layers

    def load(path: str) -> Any:
        reader = layer.reader()
        for member in reader:
            if member.path == os.fsencode(path) and member.size < SPECIAL_MAX:
                return json.loads(reader.read().decode())
        raise LookupError(path)

    def place(descriptor: Any) -> str:
        return "blobs/" + str(descriptor["digest"]).replace(":", "/")

    try:
        try:
            return [str(name) for name in load("manifest.json")[0]["Layers"]]
        except LookupError:
            manifest = load("index.json")
        for _ in range(2):                        # an index may be of indexes
            if "manifests" in manifest:
                manifest = load(place(manifest["manifests"][0]))
        return [place(one) for one in manifest["layers"]]
    except (LookupError, TypeError, ValueError, RecursionError):
        return []


def refuse_image(layer: Layer) -> NoReturn:
    """Its layers are members of it; merged, it would put them as files below the root."""
    names = list_image_layers(layer)
    prefix = "./" if Stream(layer.descriptor).read(2) == b"./" else ""
    commands = ["tar -xOf {{}} {} > layer{}.tar".format(quote(os.fsencode(prefix + name)), number)
                for number, name in enumerate(names[:9], 1)]
    raise Foreign("an image archive of {}, not a layer".format(
        "docker save or the like" if not names else "one layer" if len(names) == 1 else "{} layers".format(len(names))),
        "take out what is wanted: " + ("; ".join(commands) or "skopeo copy docker-archive:{} oci:DIRECTORY:TAG"))


# --- Checking a layer -----------------------------------------------------------------------------

EMPTY_TAR_MAX = 1 << 16              # bytes of zeros that are a tar without members: 128 blocks are a long record


@contextmanager
def refusal(path: bytes) -> Iterator[None]:
    try:
        yield
    except Foreign as foreign:
        raise Fatal("changes file is {}: {}".format(foreign.what, printable(path)),
                    foreign.hint.replace("{}", quote(path)))
    except Damaged as error:
        reason = str(error)
        if len(reason) > 300:
            reason = reason[:300] + "..."
        raise Fatal("changes file is damaged, {}: {}".format(reason, printable(path)),
                    "nothing of it was applied; copy it again, or make it again with `apppot-snap changes`")


def check_layer(path: bytes, report: Report) -> Layer:
    """Open a layer and read all of it: what is wrong with it must be known before any of it is applied."""
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
    checksums = None                              # of a label: as it says, and as it is

    for member in reader:
        layer.count += 1
        layer.memory += NODE_COST + len(member.path) + MEMBER_COST * (member.kind == HARD_LINK)
        if layer.count % 500 == 0:
            report.progress("checking", layer.count, layer.size)
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
    if not layer.count and not reader.is_gzip and os.fstat(layer.descriptor).st_size > EMPTY_TAR_MAX:
        raise Foreign("nothing but zeros")
    if checksums and not reader.is_gzip and checksums[0] != checksums[1]:
        raise Damaged("its checksum is wrong")
    if is_image:
        refuse_image(layer)


def note_whiteout(layer: Layer, path: bytes) -> None:
    directory, name = split_path(path)
    if name == OPAQUE:
        layer.opaques.append(directory)
    elif not name.startswith(WHITEOUT_META):      # of which there are others, that nobody knows any more
        hidden = name[len(WHITEOUT):]
        if not hidden or clean_path(hidden) != hidden:
            raise Damaged("a whiteout of nothing: " + printable(path))
        layer.whiteouts.append(join_path(directory, hidden))


def read_label(layer: Layer, reader: LayerReader) -> Tuple[bytes, bytes]:
    """The checksum that it has of all before it, and the right one, each with what closes the label."""
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
    NO_CHILDREN: "Dict[bytes, Node]" = {}         # one for all, as most paths are files

    def __init__(self, is_new: bool = False) -> None:
        self.children = self.NO_CHILDREN
        self.member: Optional[Member] = None
        self.origin = NO_ORIGIN                   # layer and number of the member with the content
        self.is_gone = self.is_opaque = False     # nothing of lower layers is left: at the path, below it
        self.is_new = is_new                      # nor has anything of the tree been left for these layers

    def descend(self, path: bytes) -> "Node":
        node = self
        names = path.split(b"/") if path else []
        for depth, name in enumerate(names):
            if node.member and node.member.kind != DIRECTORY:
                raise Damaged("{} is below {}, which is no directory".format(
                    printable(path), printable(b"/".join(names[:depth]))))
            child = node.children.get(name)
            if child is None:
                if not node.children:
                    node.children = {}
                child = node.children[name] = Node(node.is_new or node.is_gone or node.is_opaque)
            node = child
        return node

    def remove(self) -> None:
        self.__init__(self.is_new)  # type: ignore[misc]
        self.is_gone = True

    def put(self, member: Member, origin: Tuple[int, int]) -> None:
        before = self.member
        change = before.change if before else b"M" if self.is_gone else member.change
        if member.kind != DIRECTORY:
            self.children = self.NO_CHILDREN
            self.is_opaque = False
        elif self.is_gone or before and before.kind != DIRECTORY:
            self.is_opaque = True
        self.is_gone = False
        self.member, self.origin = member._replace(change=change) if change != member.change else member, origin

    def link(self, source: "Node", member: Member, origin: Tuple[int, int]) -> None:
        """A name more of the source's inode; it stays a hard link if that is not of these layers."""
        first = source.member
        if first and first.kind != DIRECTORY:
            self.put(first._replace(path=member.path, change=member.change), source.origin)
        elif first or source.is_gone or source.is_new:
            raise Damaged("a hard link to what is no file: " + printable(member.path))
        else:
            self.put(member, origin)

    def walk(self) -> "Iterator[Tuple[bytes, Node]]":
        pending = [(b"", self)]
        while pending:
            path, node = pending.pop()
            yield path, node
            pending += [(join_path(path, name), node.children[name]) for name in sorted(node.children, reverse=True)]


def stack_layers(layers: Sequence[Layer], just_kinds: bool = False) -> Node:
    """What all the layers say together, the later ones having the last word; of members that take memory the kind."""
    needed = 0
    for layer in layers:
        needed += layer.memory if just_kinds else layer.memory + layer.details
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
    bases = {layer.label.base: layer for layer in layers if layer.label and layer.label.base}
    if len(bases) > 1:
        raise Fatal("changes files are for different bases: " + ", ".join(
            "{} ({})".format(printable(layer.path), base) for base, layer in bases.items()),
            "squash those of one base")
    with new_layer(output, sum(layer.size for layer in layers)) as writer:
        wanted = write_skeleton(writer, stack_layers(layers), report)
        for index, layer in enumerate(layers):
            reader = layer.reader()
            for number, _ in enumerate(reader):
                names = wanted.get((index, number), [])
                for member in names[:1]:
                    writer.add(member)
                    size = 0
                    for piece in reader.content():
                        writer.write(piece)
                        size += len(piece)
                    writer.write(pad(size))
                for member in names[1:]:
                    writer.add(link_of(member, names[0]))
        writer.finish(next(iter(bases), ""))


def write_skeleton(writer: LayerWriter, root: Node, report: Report) -> Dict[Tuple[int, int], List[Member]]:
    """Write whiteouts and directories; return the names of all else by where its content is."""
    wanted: Dict[Tuple[int, int], List[Member]] = {}
    for path, node in root.walk():
        if node.is_opaque:
            writer.add(whiteout_of(join_path(path, OPAQUE[len(WHITEOUT):])))
        if node.is_gone:
            writer.add(whiteout_of(path))
        if node.is_gone or node.member:
            report.say(path)
        if node.member and node.member.kind == HARD_LINK:
            raise Fatal("a hard link to a file of the base cannot be squashed: " + printable(path),
                        "merge the changes files one by one, and save their sum with `apppot-snap changes`")
        if node.member and node.member.kind == DIRECTORY:
            writer.add(node.member)
        elif node.member:
            wanted.setdefault(node.origin, []).append(node.member)
    return wanted


# --- Whether a tree can take layers ---------------------------------------------------------------

def check_base(layer: Layer, base_id: str, force: bool) -> None:
    """A layer of another tool says nothing about its base, a plain tree nothing about itself."""
    wanted = layer.label.base if layer.label else ""
    if wanted and base_id and wanted != base_id and not force:
        raise Fatal("changes file is for base {}, this is base {}: {}".format(wanted, base_id, printable(layer.path)),
                    "use the image it was made with; --force-changes merges it all the same")


def raise_no_space(layer: Layer, root: bytes, state: str) -> NoReturn:
    status = os.statvfs(root)
    raise Fatal("no space left in the tree, {} and {} files free, up to {} and {} files needed: {}".format(
        format_size(status.f_bavail * status.f_frsize), status.f_favail, format_size(layer.size), layer.count,
        printable(layer.path)), state + "make the image larger: make image IMAGE_SIZE=")


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

    size = files = 0
    way = b"/"  # of what is cleared now, as the start of all paths below it
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
    """Fatal where a tree cannot take the layers, one upon the other, since something else is in their way."""
    def refuse(what: str, path: bytes, hint: str = "was the changes file made for another base?") -> NoReturn:
        raise Fatal("{}, {}: {}".format(what, absolute(path), ", ".join(printable(layer.path) for layer in layers)),
                    "nothing was applied; " + hint)

    with Tree(root) as tree, Tree(root) as sources:
        for path, node in stack_layers(layers, True).walk():
            if node.member and node.member.kind == HARD_LINK and not is_file(sources, node.member.link):
                refuse("a hard link leads to what is no file", node.member.link)
            is_new = node.is_new or node.is_gone
            if node.children and not is_new:
                try:
                    if not os.access(b".", os.W_OK | os.X_OK, dir_fd=tree.open(path), effective_ids=True):
                        refuse("a directory cannot be written to", path,
                               "merging into a system takes root: sudo apppot-snap")
                except (FileNotFoundError, Mounted):
                    is_new = True
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                        raise
                    is_new = node.member is not None
                    if not is_new:
                        refuse("a symbolic link or a file is in the place of a directory", path)
            for child in node.children.values() if is_new else ():
                child.is_new = True


def is_file(tree: Tree, path: bytes) -> bool:
    """Or what is below a mount point: nobody links to that."""
    try:
        return not stat.S_ISDIR(tree.lstat(path).st_mode)
    except Mounted:
        return True
    except OSError:
        return False


# --- Unpacking a layer into a tree ----------------------------------------------------------------

WARNINGS_MAX = 20                    # of one kind: a layer labelled for SELinux has an attribute for each file
INHERITED_XATTRS = ("system.posix_acl_access", "system.posix_acl_default")


class Target(Tree):
    """A tree that a layer is unpacked into. A directory gets its metadata when it is left."""

    def __init__(self, root: bytes, report: Report) -> None:
        super().__init__(root)
        self.root = root
        self.at = b""                             # the path that is worked on
        self._report = report
        self._ids = (os.geteuid(), os.getegid())
        self._is_root = os.geteuid() == 0
        self.left_out: Set[bytes] = set()
        self._lost_xattrs = 0
        self._sources = Tree(root)                # the way to what hard links are made to
        self.levels[0].inherits = self._inherits(self.levels[0])

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._sources.__exit__()

    def close(self) -> None:
        self.open(b"")
        self.finish(self.levels[0], self.levels[0])
        if self._lost_xattrs > WARNINGS_MAX:
            self._report.warn("left out, {} more attributes".format(self._lost_xattrs - WARNINGS_MAX))

    @staticmethod
    def _inherits(level: Level) -> bool:
        """Whether what is made in a directory gets its group, or its default ACL."""
        if level.status.st_mode & stat.S_ISGID:
            return True
        try:
            os.getxattr(level.descriptor, "system.posix_acl_default")
        except OSError:
            return False
        return True

    def open_parent(self, path: bytes) -> Tuple[int, bytes]:
        """The directory to make something in; missing ones are made, as other tools do."""
        directory, name = split_path(path)
        try:
            parent = self.open(directory)
        except FileNotFoundError:
            for missing in directory[len(self._path):].lstrip(b"/").split(b"/"):       # it got as far as self._path
                os.mkdir(missing, 0o755, dir_fd=self.levels[-1].descriptor)
                self.levels[-1].is_touched = True
                self._enter(missing)
            parent = self.levels[-1].descriptor
        level = self.levels[-1]
        if level.inherits is None:
            level.inherits = self._inherits(level)
        return parent, name

    def put(self, member: Member, content: Iterable[memoryview]) -> None:
        """Put a member in the place of whatever is there."""
        parent, name = self.open_parent(member.path)
        self.levels[-1].is_touched = True
        try:
            descriptor = self._make(member, parent, name)
        except FileExistsError:
            if member.kind in DEVICES and not self._is_root:
                raise PermissionError(errno.EPERM, "mknod")    # while what it would replace is there
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
        if member.kind == REGULAR:
            return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                           member.mode & 0o777, dir_fd=parent)
        if member.kind == SYMLINK:
            os.symlink(member.link, name, dir_fd=parent)
        elif member.kind == HARD_LINK:
            if member.link in self.mounts:
                raise Mounted(member.link)
            directory, source = split_path(member.link)
            os.link(source, name, src_dir_fd=self._sources.open(directory), dst_dir_fd=parent, follow_symlinks=False)
        elif member.kind == FIFO:
            os.mkfifo(name, member.mode, dir_fd=parent)
        else:
            kind = stat.S_IFCHR if member.kind == CHARACTER else stat.S_IFBLK
            os.mknod(name, kind | member.mode, os.makedev(*member.device), dir_fd=parent)
        return -1

    def _set_metadata(self, member: Member, target: File, named: File, where: Dict[str, Any]) -> None:
        """Of a file just made; only what it has not got by being made."""
        inherits = self.levels[-1].inherits
        is_link = member.kind == SYMLINK
        if self._is_root and (inherits or (member.uid, member.gid) != self._ids):
            os.chown(target, member.uid, member.gid, follow_symlinks=not where, **where)
        if inherits and not is_link:
            self._remove_xattrs(named, INHERITED_XATTRS)
        if not is_link and (inherits or member.mode & 0o7000):  # chown() takes the setuid bit away
            os.chmod(target, member.mode, **where)
        if member.xattrs:
            self._set_xattrs(member, named)
        os.utime(target, ns=(member.mtime_ns, member.mtime_ns), follow_symlinks=not where, **where)

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
            except OSError as error:              # of many kinds: a file system knows what it can keep
                self._lost_xattrs += 1
                if self._lost_xattrs <= WARNINGS_MAX:
                    self._report.warn("left out, attribute {} of /{}: {}".format(
                        printable(os.fsencode(name)), printable(member.path), error.strerror))

    def put_directory(self, member: Member) -> None:
        if member.path:
            parent, name = self.open_parent(member.path)
            try:
                os.mkdir(name, member.mode & 0o777 | (0 if self._is_root else 0o700), dir_fd=parent)
                self.levels[-1].is_touched = True
                inherits = self.levels[-1].inherits
                self.open(member.path)
                self.levels[-1].inherits = inherits
                self.levels[-1].is_new = not inherits
            except FileExistsError:
                try:
                    self.open(member.path)
                except NotADirectoryError:
                    self.remove(member.path)
                    self.put_directory(member)
                    return
        else:
            self.open(b"")
        self.levels[-1].member = member

    def finish(self, level: Level, parent: Level) -> None:
        member, status, descriptor = level.member, level.status, level.descriptor
        if member:
            if not level.is_new:
                present = os.listxattr(descriptor)
                self._remove_xattrs(descriptor, set(present) - {name for name, _ in member.xattrs}
                                    - set(FOREIGN_XATTRS))
            if self._is_root and (member.uid, member.gid) != (status.st_uid, status.st_gid):
                os.chown(descriptor, member.uid, member.gid)
            if member.mode != stat.S_IMODE(status.st_mode) or not level.is_new:
                os.chmod(descriptor, member.mode)
            self._set_xattrs(member, descriptor)
        if member or level.is_touched:
            time_ns = member.mtime_ns if member else status.st_mtime_ns
            os.utime(descriptor, ns=(time_ns, time_ns))

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
            self._sources.open(b"")               # its descriptors may be those of directories removed

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


def write_content(descriptor: int, member: Member, content: Iterable[memoryview]) -> None:
    if member.pieces is None:
        for piece in content:
            write_all(descriptor, piece)
        return
    pieces = iter(list_pieces(member))
    left = 0
    for piece in content:
        done = 0
        while done < len(piece):
            while left == 0:
                start, left = next(pieces)
                os.lseek(descriptor, start, os.SEEK_SET)
            part = piece[done:done + left]
            write_all(descriptor, part)
            left -= len(part)
            done += len(part)
    os.truncate(descriptor, member.size)


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
        raise Fatal("changes file was altered while it was read, {}: {}".format(error, printable(layer.path)),
                    "what is below {} is incomplete".format(printable(root)))
    finally:
        os.umask(umask)
        report.clear()


def clear_way(target: Target, layer: Layer, report: Report) -> None:
    for path in layer.opaques:
        target.at = path
        skip_missing(target.clear, path, report)
    for path in layer.whiteouts:
        target.at = path
        skip_missing(target.remove, path, report)


def unpack(target: Target, layer: Layer, report: Report) -> None:
    has_state = os.path.isdir(os.path.join(target.root, STATE))
    reader = layer.reader()
    for number, member in enumerate(reader):
        target.at = member.path
        if number % 100 == 0:
            report.progress("merging", number, 0)
        if is_whiteout(member.path) or member.path == LABEL and not has_state:
            continue
        report.say(member.path)
        put_member(target, member, reader, report)


def skip_missing(action: Callable[[bytes], None], path: bytes, report: Report) -> None:
    try:
        action(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Mounted as mounted:
        report.warn("kept, as something is mounted on /{}: /{}".format(
            printable(mounted.args[0]), printable(path)))


def put_member(target: Target, member: Member, reader: LayerReader, report: Report) -> None:
    try:
        if member.kind == DIRECTORY:
            target.put_directory(member)
        else:
            target.put(member, reader.content())
        return
    except Mounted as mounted:
        reason = "as something is mounted on /" + printable(mounted.args[0])
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
    if error.errno in NO_SPACE:
        raise_no_space(layer, root, "the tree is incomplete; ")
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        raise Fatal("/{} is below a symbolic link or a file: {}".format(printable(path), printable(layer.path)),
                    "the tree is incomplete; was the changes file made for another base?")
    raise Fatal("cannot merge /{}, {}: {}".format(printable(path), error.strerror, printable(layer.path)),
                    "the tree is incomplete; merging into a system takes root: sudo apppot-snap")


# --- Commands -------------------------------------------------------------------------------------

def show_member(member: Member) -> Tuple[str, str]:
    """Letter and line."""
    directory, name = split_path(member.path)
    if name == OPAQUE:
        return "D", "D {:>12} /{}".format("", printable(join_path(directory, b"*")))
    if name.startswith(WHITEOUT):
        return "D", "D {:>12} /{}".format("", printable(join_path(directory, name[len(WHITEOUT):])))
    letter = member.change.decode()
    size = str(member.size) if member.kind == REGULAR else {
        DIRECTORY: "directory", SYMLINK: "symlink", HARD_LINK: "hard link", FIFO: "fifo"}.get(member.kind, "device")
    arrow = " -> " + printable(member.link) if member.kind in (SYMLINK, HARD_LINK) else ""
    return letter, "{} {:>12} {}{}".format(letter, size, absolute(member.path), arrow)


def show_members(members: Iterable[Member], is_ours: bool = True) -> str:
    """Print a line for each, and return a summary. A layer of our own tells apart what is added and modified."""
    counts = dict.fromkeys("AMCD", 0)
    size = 0
    for member in members:
        if member.path in (LABEL, STATE):
            continue
        letter, line = show_member(member._replace(change=b"A") if is_ours and member.change == b"C" else member)
        print(line)
        counts[letter] += 1
        size += member.size
    names = ("added", "modified", "added or modified", "deleted")
    parts = ["{} {}".format(counts[letter], name) for letter, name in zip("AMCD", names)
             if letter != "C" or counts["C"]]
    return ", ".join(parts + [format_size(size)])


def run_show(path: bytes, report: Report) -> None:
    with check_layer(path, report) as layer:
        stack_layers([layer], True)
        print(show_members(layer.members(), layer.label is not None))
        if layer.label:
            print("{}, {}, for {}".format(layer.label.tool, layer.label.created,
                                          "base " + layer.label.base if layer.label.base else "any base"))


def run_base(root: bytes, exclude: Sequence[str], just_print: bool, report: Report) -> None:
    """Record the base. One that differs from that recorded before is another base."""
    path = os.path.join(root, BASE_ID)
    os.listdir(root)                              # the next line would make it
    os.makedirs(os.path.dirname(path), exist_ok=True)
    patterns = choose_exclude(root, exclude)
    is_new = not read_base_id(root)
    if os.path.exists(os.path.join(root, MANIFEST)):
        plan = find_changes(root, read_manifest(root), patterns, report)
        is_new = is_new or bool(plan.members or plan.whiteouts)
        if just_print:
            print(show_members(plan.entries()))
    if not just_print:
        if is_new:
            with open("/proc/sys/kernel/random/uuid", "rb") as file:
                replace_file(path, file.read())
        record_base(root, patterns, report)


def run_squash(paths: Sequence[bytes], output: bytes, just_print: bool, report: Report) -> None:
    with ExitStack() as stack:
        layers = [stack.enter_context(check_layer(path, report)) for path in paths]
        if just_print:
            print(show_members(node.member for _, node in stack_layers(layers).walk() if node.member))
        else:
            squash_layers(layers, output, report)


def run_save(root: bytes, plan: Plan, output: Optional[bytes], report: Report) -> None:
    if output is None:
        print(show_members(plan.entries()))
        return
    write_layer(root, plan, output, report)
    for member in plan.members:
        report.say(member.path)


def save_changes(root: bytes, output: Optional[bytes], exclude: Sequence[str], report: Report,
                 known: Optional[Dict[bytes, bytes]] = None) -> None:
    """What `apppot-snap changes` does; without an output it prints what it would write.

    `known` has signatures of files that count as unchanged, such as the agent's.
    """
    manifest = read_manifest(root)
    manifest.update(known or {})
    plan = find_changes(root, manifest, choose_exclude(root, exclude, output), report)
    run_save(root, plan, output, report)


def run_apply(paths: Sequence[bytes], root: bytes, just_print: bool, force: bool, report: Report) -> None:
    """Check all, then apply them in their order."""
    with ExitStack() as stack:
        layers = [stack.enter_context(check_layer(path, report)) for path in paths]
        for layer in layers:
            check_base(layer, read_base_id(root), force)
        check_space(layers, root)
        report.allow(layers)
        check_tree(layers, root)
        for layer in layers:
            if just_print:
                print(show_members(layer.members(), layer.label is not None))
            else:
                apply_layer(layer, root, report)


# --- The command line -----------------------------------------------------------------------------

def parse_path(text: str) -> bytes:
    if not text:
        raise Fatal("a file name is empty", "`apppot-snap --help` tells the usage")
    return os.fsencode(text)


def default_output() -> bytes:
    home = os.path.expanduser("~" + os.environ.get("SUDO_USER", ""))
    directory = os.path.join(home, "job")
    if not os.path.isdir(directory):
        raise Fatal("no job directory to write to: " + directory, "name a file: apppot-snap changes FILE")
    return os.fsencode(os.path.join(directory, time.strftime("apppot.%Y-%m-%d.changes.tar.gz")))


def build_parser() -> Any:
    import argparse  # not for the agent


    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise Fatal(message, "`{} --help` tells the usage".format(self.prog))

    common = Parser(add_help=False)
    common.add_argument("-n", "--just-print", action="store_true", help="change nothing, print what would be done")
    common.add_argument("-v", "--verbose", action="store_true", help="print each file")
    system = Parser(add_help=False)
    system.add_argument("--root", type=parse_path, default=b"/", metavar="DIR",
                        help="the system's root directory (default /)")
    chosen = Parser(add_help=False)
    chosen.add_argument("-x", "--exclude", action="append", default=[], metavar="PATTERN",
                        help="leave out; /a/* or, at any depth, *.o; repeatable")
    forced = Parser(add_help=False)
    forced.add_argument("--force-changes", action="store_true", help="merge what was made for another base")
    result = Parser(add_help=False)
    result.add_argument("-o", "--output", type=parse_path, required=True, metavar="FILE", help="changes file to write")
    parser = Parser(
        prog="apppot-snap", description="Make, look at and merge changes files: what differs from the base image.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A changes file is an OCI image layer: a tar with gzip, or without where its name ends in .tar.\n\n"
               "`base` and `changes` leave out what is mounted, sockets, the patterns in /{}\nand {}.".format(
                   EXCLUDE_FILE.decode(), " ".join(EXCLUDE)))
    # Without `prog` it would look for the terminal's width, by modules that take long to import.
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", prog=parser.prog)
    commands.required = True

    def add(name: str, parents: Sequence[Parser], arguments: str, text: str) -> None:
        command = commands.add_parser(name, parents=[common, *parents], help=text)
        for argument in arguments.split():
            nargs = {"+": "+", "?": "?"}.get(argument[-1])
            command.add_argument(argument.rstrip("+?"), type=parse_path, nargs=nargs,
                                 metavar=argument.rstrip("+?").upper())

    add("base", (system, chosen), "", "record the present state, which `changes` compares with")
    add("changes", (system, chosen), "file?", "write what differs from the base "
        "(default: ~/job/apppot.YYYY-MM-DD.changes.tar.gz)")
    add("merge", (system, forced), "file+", "apply changes files to this system, in their order")
    add("show", (), "file", "check a changes file and list what is in it")
    add("squash", (result,), "file+", "make one changes file of several")
    add("diff", (chosen, result), "dir_a dir_b", "write what makes DIR_B of DIR_A")
    add("apply", (forced,), "file dir", "apply a changes file to a plain tree")
    return parser


def run_command(options: Any) -> None:
    report = Report(options.verbose)
    just_print: bool = options.just_print
    if options.command == "base":
        run_base(options.root, options.exclude, just_print, report)
    elif options.command == "changes":
        save_changes(options.root, None if just_print else options.file or default_output(), options.exclude, report)
    elif options.command == "merge":
        run_apply(options.file, options.root, just_print, options.force_changes, report)
    elif options.command == "show":
        run_show(options.file, report)
    elif options.command == "squash":
        run_squash(options.file, options.output, just_print, report)
    elif options.command == "diff":
        plan = compare_trees(options.dir_a, options.dir_b, compile_exclude(options.exclude), report)
        run_save(options.dir_b, plan, None if just_print else options.output, report)
    elif options.command == "apply":
        run_apply([options.file], options.dir, just_print, options.force_changes, report)


def main(argv: Sequence[str]) -> int:
    import signal

    spare_memory()
    for number in (signal.SIGTERM, signal.SIGHUP):             # so that no temporary file stays
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        run_command(build_parser().parse_args(argv))
        if sys.stdout:                            # None if it was closed before
            sys.stdout.flush()
        return 0
    except Fatal as fatal:
        message, hint = fatal.message, fatal.hint
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
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
