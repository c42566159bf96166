"""The kernel's network block device over a socket pair: attaching it by netlink, and the requests it sends.

The other end of the pair is our own kernel, so there is no negotiation and nobody to distrust; lengths are bounded all
the same. Sources: linux/nbd-netlink.h, linux/nbd.h, linux/genetlink.h; the NBD protocol document, "Transmission phase".
"""

from __future__ import annotations

import errno
import os
import socket
import struct
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

NETLINK_GENERIC = 16  # linux/netlink.h
NLMSG_ERROR = 2
NLM_F_REQUEST = 1
NLM_F_ACK = 4
GENL_ID_CTRL = 16  # linux/genetlink.h
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2

NBD_CMD_CONNECT = 1  # linux/nbd-netlink.h
NBD_GENL_VERSION = 1
NBD_ATTR_INDEX = 1
NBD_ATTR_SIZE_BYTES = 2
NBD_ATTR_BLOCK_SIZE_BYTES = 3
NBD_ATTR_SERVER_FLAGS = 5
NBD_ATTR_SOCKETS = 7
NBD_SOCK_ITEM = 1
NBD_SOCK_FD = 1
NLA_F_NESTED = 1 << 15

FLAGS = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM

_MESSAGE = struct.Struct("=IHHII")  # struct nlmsghdr
_GENERIC = struct.Struct("=BBH")  # struct genlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_NUMBER = struct.Struct("=i")


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


def attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute, padded to four bytes."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def connect_message(family: int, descriptor: int, size_bytes: int, block_bytes: int, index: int = 0) -> bytes:
    """The message that attaches a socket to `/dev/nbd<index>`."""
    item = attribute(NBD_SOCK_ITEM | NLA_F_NESTED, attribute(NBD_SOCK_FD, struct.pack("=I", descriptor)))
    return _message(
        family,
        NBD_CMD_CONNECT,
        NBD_GENL_VERSION,
        attribute(NBD_ATTR_INDEX, struct.pack("=I", index))
        + attribute(NBD_ATTR_SIZE_BYTES, struct.pack("=Q", size_bytes))
        + attribute(NBD_ATTR_BLOCK_SIZE_BYTES, struct.pack("=Q", block_bytes))
        + attribute(NBD_ATTR_SERVER_FLAGS, struct.pack("=Q", FLAGS))
        + attribute(NBD_ATTR_SOCKETS | NLA_F_NESTED, item),
    )


def _message(kind: int, command: int, version: int, attributes: bytes) -> bytes:
    body = _GENERIC.pack(command, version, 0) + attributes
    return _MESSAGE.pack(_MESSAGE.size + len(body), kind, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body


def attach(descriptor: int, size_bytes: int, block_bytes: int, index: int = 0) -> None:
    """Make `/dev/nbd<index>` the device whose requests arrive at the other end of the socket `descriptor`.

    The kernel keeps the socket; the descriptor may be closed.

    Raises:
        OSError: the kernel has no nbd module, or refuses.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as netlink:
        netlink.settimeout(10)
        name = attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0")
        netlink.send(_message(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, name))
        family = None
        for attributes in _answers(netlink):
            family = family or _family(attributes)
        if family is None:
            raise OSError(errno.ENOENT, "the kernel has no nbd")
        netlink.send(connect_message(family, descriptor, size_bytes, block_bytes, index))
        for _ in _answers(netlink):
            pass


def _answers(netlink: socket.socket) -> list[bytes]:
    """The attributes of each message up to the acknowledgement. Raises what the kernel answered."""
    found: list[bytes] = []
    while True:
        data = netlink.recv(65536)
        while len(data) >= _MESSAGE.size:
            length, kind, *_ = _MESSAGE.unpack_from(data)
            body, data = data[_MESSAGE.size : length], data[max(length + -length % 4, _MESSAGE.size) :]
            if kind == NLMSG_ERROR:
                number = -_NUMBER.unpack_from(body)[0]
                if number:
                    raise OSError(number, os.strerror(number))
                return found
            found.append(body[_GENERIC.size :])


def _family(attributes: bytes) -> int | None:
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == CTRL_ATTR_FAMILY_ID:
            return int.from_bytes(attributes[_ATTRIBUTE.size : _ATTRIBUTE.size + 2], "little")
        attributes = attributes[max(length + -length % 4, _ATTRIBUTE.size) :]
    return None


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
        if flags & FUA:
            volume.flush()

    def unknown() -> None:
        raise OSError(errno.EINVAL, "unknown request")

    return {WRITE: write, FLUSH: volume.flush, TRIM: lambda: volume.discard(offset, length)}.get(kind, unknown)
