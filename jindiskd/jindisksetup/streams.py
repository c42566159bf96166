"""Content that comes from a pipe, and content that goes into one: in order, once."""

from __future__ import annotations

import errno
from typing import BinaryIO

from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.extents import Extent
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.served import Served
from jindiskd.jindisksetup.progress import Progress

PIECE_BYTES = 1 << 20


class Stream:
    """A pipe as what a volume is filled from: read once, from the beginning to the end."""

    def __init__(self, stream: BinaryIO, size_bytes: int) -> None:
        """The content is `size_bytes` long; what the stream lacks of it is zeros."""
        self._stream, self.size_bytes = stream, size_bytes
        self._at = 0
        self.given_bytes = 0
        """What the stream had of it so far."""

    def read(self, offset: int, length: int) -> bytes:
        """The next bytes.

        Raises:
            OSError: they are not the next ones, or reading fails.
            InvalidArgument: they are the last ones, and the stream has more.
        """
        if offset != self._at:
            raise OSError(errno.ESPIPE, "a stream is read in order")
        data = bytearray()
        while len(data) < length and (part := self._stream.read(length - len(data))):
            data += part
        self._at += length
        self.given_bytes += len(data)
        if self._at == self.size_bytes and self._stream.read(1):
            raise InvalidArgument("standard input", f"of more than {self.size_bytes} bytes", "say a greater --size")
        return bytes(data.ljust(length, b"\0"))

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Nothing is known before it is read."""
        del offset
        return [(length, True)]


def pour(volume: Served, stream: BinaryIO, progress: Progress) -> int:
    """Write the whole content of a volume into a stream, zeros where it has holes; returns the bytes of data.

    Raises:
        OSError: a block cannot be read; what was written before is right, and it is not all.
    """
    at, data_bytes, total = 0, 0, volume.size_bytes
    zeros = bytes(PIECE_BYTES)
    while at < total:
        for length, mapped in volume.extents(at, total - at):
            end = at + length
            while at < end:
                size = min(PIECE_BYTES - at % PIECE_BYTES, end - at)
                stream.write(volume.read(at, size) if mapped else zeros[:size])
                at, data_bytes = at + size, data_bytes + size * mapped
                progress(at, total)
    stream.flush()
    return data_bytes


def check_size(size_bytes: int | None) -> int:
    """The size that a stream needs to be given. Raises `InvalidArgument`."""
    if size_bytes is None:
        raise InvalidArgument("standard input", "-", "say with --size how large the volume is")
    if size_bytes % BLOCK:
        raise InvalidArgument("a size of", f"{size_bytes} bytes", "it is a multiple of 4096")
    return size_bytes
