"""The requests of the kernel's network block device, one after the other.

The other end of the socket pair is our own kernel, so there is no negotiation and nobody to distrust; lengths are
bounded all the same. Source: the NBD protocol document, "Transmission phase".
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Protocol

from jindiskd.jindisk.nbd_protocol import (
    DISCONNECT,
    FLUSH,
    FUA,
    HAS_FLAGS,
    PAYLOAD_LIMIT,
    READ,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    TRIM,
    WRITE,
    error_number,
)

FLAGS = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM


class Volume(Protocol):
    """What a block device is made of. Every failure is an `OSError` whose number the kernel is told."""

    @property
    def size_bytes(self) -> int:
        """Length, a multiple of the block size."""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there."""

    def write(self, offset: int, data: bytes) -> None:
        """Write; durable after the next `flush`."""

    def flush(self) -> None:
        """Make everything written durable."""

    def discard(self, offset: int, length: int) -> None:
        """These bytes are not needed any more."""


class Disconnected(Exception):
    """The kernel let go of the device."""


def receive(stream: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes.

    Raises:
        Disconnected: the stream ended.
    """
    data = bytearray()
    while len(data) < length:
        part = stream.recv(length - len(data))
        if not part:
            raise Disconnected
        data += part
    return bytes(data)


def serve_one(stream: socket.socket, volume: Volume) -> None:
    """Take one request, do it, answer it.

    Raises:
        Disconnected: there are none any more.
    """
    magic, flags, kind, handle, offset, length = REQUEST.unpack(receive(stream, REQUEST.size))
    # A trim brings no data and may be far longer: the kernel sends up to 4 GiB.
    if magic != REQUEST_MAGIC or kind == DISCONNECT or (kind in {READ, WRITE} and length > PAYLOAD_LIMIT):
        raise Disconnected
    data = receive(stream, length) if kind == WRITE else b""
    answer, number = b"", 0
    try:
        if kind in {READ, WRITE, TRIM} and offset + length > volume.size_bytes:
            raise OSError(errno.EINVAL, "beyond the end")
        if kind == READ:
            answer = volume.read(offset, length)
        else:
            _action(volume, kind, flags, offset, length, data)()
    except OSError as exc:
        answer, number = b"", error_number(exc)
    stream.sendall(REPLY.pack(REPLY_MAGIC, number, handle) + answer)


def _action(volume: Volume, kind: int, flags: int, offset: int, length: int, data: bytes) -> Callable[[], None]:
    def write() -> None:
        volume.write(offset, data)
        durable()

    def trim() -> None:
        volume.discard(offset, length)
        durable()

    def durable() -> None:
        if flags & FUA:
            volume.flush()

    def unknown() -> None:
        raise OSError(errno.EINVAL, "unknown request")

    return {WRITE: write, FLUSH: volume.flush, TRIM: trim}.get(kind, unknown)
