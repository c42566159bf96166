"""An image as a stream of bytes, to be taken to another machine without its key (docs/formats/image-stream.md).

Everything in an image but the key is either public or encrypted; the stream adds digests, so that damage on the way is
found, and says nothing about who made it. Integers are little-endian.

::

    8    "JDIMAGE1"
    4    u32: length of the header, 1 MiB at most
    n    the header: a JSON document, `Header`
    32   SHA-256 of the header
         for each part, in the order of the header:
             records: u8 1, u64 offset, u32 length (1 to 1 MiB), bytes; offsets ascend, what is left out is zeros
             u8 0, 32 bytes: SHA-256 of all records of the part, their heads included
    8    "JDIMGEND"

It is not compressed: whoever wants that pipes it through a program that does.
"""

from __future__ import annotations

import hashlib
import os
import select
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jindiskd.base import document
from jindiskd.errors import EXIT_INTEGRITY, JindiskError
from jindiskd.image.manifest import Manifest
from jindiskd.image.sparse import data_ranges

MAGIC, END = b"JDIMAGE1", b"JDIMGEND"
SCHEMA = 1
HEADER_LIMIT = 1 << 20
RECORD_LIMIT = 1 << 20
DATA, LAST = 1, 0
WHAT = "the header of the image stream"
_LENGTH = struct.Struct("<I")
_RECORD = struct.Struct("<BQI")
_DIGEST_BYTES = 32


class StreamDamaged(JindiskError, code="StreamDamaged", exit_code=EXIT_INTEGRITY):
    """An image stream is not what it should be."""

    def __init__(self, problem: str) -> None:
        """`problem` completes "the image stream ..."."""
        super().__init__(f"the image stream {problem}: export the image again, and have the whole of it sent")


class StreamNotWritten(JindiskError, code="StreamNotWritten"):
    """Whoever an image stream is written to does not take it."""

    def __init__(self, problem: str) -> None:
        """`problem` is the system's word for it."""
        super().__init__(f"the image stream could not be written ({problem}): what was written of it is of no use")


class StreamSilent(JindiskError, code="StreamSilent"):
    """Whoever sends an image stream sends nothing more."""

    def __init__(self, seconds: float) -> None:
        """Nothing came for so long."""
        text = "have it sent again, or allow for longer pauses (images.stream_idle_s)"
        super().__init__(f"the image stream has been silent for {seconds:g} s: {text}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file of the image."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What is in the stream."""

    schema: int
    manifest: Manifest
    parts: tuple[Part, ...]


class Writer:
    """Writes a stream to a descriptor; `digest` is that of all that was written."""

    def __init__(self, fd: int) -> None:
        """The descriptor stays the caller's."""
        self._fd, self._all = fd, hashlib.sha256()

    @property
    def digest(self) -> bytes:
        """SHA-256 of everything so far."""
        return self._all.digest()

    def header(self, header: Header) -> None:
        """Begin."""
        data = document.dump(header)
        assert len(data) <= HEADER_LIMIT
        self._write(MAGIC + _LENGTH.pack(len(data)) + data + hashlib.sha256(data).digest())

    def part(self, fd: int, size_bytes: int, wrote: Callable[[int], None]) -> None:
        """One part: the first `size_bytes` bytes of a file, without its holes; `wrote` is told of data as it goes.

        Raises:
            StreamDamaged: the file is shorter. StreamNotWritten: writing failed. OSError: reading failed.
        """
        digest = hashlib.sha256()
        for start, length in data_ranges(fd, 0, size_bytes):
            at, end = start, start + length
            while at < end:
                data = os.pread(fd, min(RECORD_LIMIT, end - at), at)
                if not data:
                    raise StreamDamaged("cannot be written: a file of the image became shorter meanwhile")
                record = _RECORD.pack(DATA, at, len(data)) + data
                digest.update(record)
                self._write(record)
                at += len(data)
                wrote(len(data))
        self._write(bytes([LAST]) + digest.digest())

    def end(self) -> None:
        """Finish."""
        self._write(END)

    def _write(self, data: bytes) -> None:
        self._all.update(data)
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                _wait(self._fd, select.POLLOUT)
            except OSError as exc:
                raise StreamNotWritten(exc.strerror or str(exc)) from exc


class Reader:
    """Reads a stream from a descriptor, believing nothing. Call `header`, `part` for each part, and `end`."""

    def __init__(self, fd: int, *, idle_s: float | None = None) -> None:
        """The descriptor stays the caller's. With `idle_s`, reading raises `StreamSilent` after a pause as long."""
        self._fd, self._idle_s = fd, idle_s

    def header(self) -> Header:
        """The header, of which the form alone is checked.

        Raises:
            StreamDamaged: it is no stream, of another version, or cut off. MalformedDocument: the header is none.
        """
        magic = self._some(len(MAGIC))
        if magic != MAGIC:
            raise StreamDamaged(f"is none that this program knows (it does not begin with {MAGIC.decode()})")
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > HEADER_LIMIT:
            raise StreamDamaged(f"has a header of {length} bytes")
        data = self._exactly(length)
        if hashlib.sha256(data).digest() != self._exactly(_DIGEST_BYTES):
            raise StreamDamaged("has a header that does not fit its digest")
        found = document.load(Header, data, document=WHAT, limit_bytes=HEADER_LIMIT)
        if found.schema != SCHEMA:
            raise StreamDamaged(f"has schema {found.schema} instead of {SCHEMA}")
        return found

    def part(self, part: Part) -> Iterator[tuple[int, bytes]]:
        """The records of a part as offset and bytes; all of it is as it was sent once the iteration has ended.

        Raises:
            StreamDamaged: a record lies outside, goes back, or is cut off; or the digest does not fit.
        """
        digest, at = hashlib.sha256(), 0
        while (kind := self._exactly(1)[0]) == DATA:
            head = self._exactly(_RECORD.size - 1)
            _, offset, length = _RECORD.unpack(bytes([DATA]) + head)
            if not 1 <= length <= RECORD_LIMIT or offset < at or offset + length > part.size_bytes:
                text = f"has {length} bytes at {offset} in {part.name}, which has {part.size_bytes}"
                raise StreamDamaged(text)
            data = self._exactly(length)
            digest.update(bytes([DATA]) + head + data)
            at = offset + length
            yield offset, data
        if kind != LAST:
            raise StreamDamaged(f"has an unknown record in {part.name}")
        if self._exactly(_DIGEST_BYTES) != digest.digest():
            raise StreamDamaged(f"has a {part.name} that does not fit its digest")

    def end(self) -> None:
        """Raises `StreamDamaged` unless the stream ends here."""
        if self._exactly(len(END)) != END:
            raise StreamDamaged("does not end where it should")

    def _exactly(self, length: int) -> bytes:
        data = self._some(length)
        if len(data) != length:
            raise StreamDamaged("is cut off")
        return data

    def _some(self, length: int) -> bytes:
        """`length` bytes, or fewer at the end."""
        parts, left = [], length
        while left:
            if not _wait(self._fd, select.POLLIN, self._idle_s):
                raise StreamSilent(self._idle_s or 0)
            try:
                data = os.read(self._fd, min(left, RECORD_LIMIT))
            except BlockingIOError:  # somebody else has read it
                continue
            if not data:
                break
            parts.append(data)
            left -= len(data)
        return b"".join(parts)


def _wait(fd: int, event: int, seconds: float | None = None) -> bool:
    """Wait until a descriptor is ready, for so long; whether it is."""
    ready = select.poll()
    ready.register(fd, event)
    return bool(ready.poll(None if seconds is None else seconds * 1000))
