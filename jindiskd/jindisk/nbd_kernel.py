"""The kernel's network block device: attaching and detaching it by netlink.

The kernel is given connected sockets whose other ends are in the transmission phase already: there is no handshake.
Sources: linux/nbd-netlink.h, linux/nbd.h, linux/genetlink.h. Standard library only: the guest's storage process has it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence

NETLINK_GENERIC = 16  # linux/netlink.h
NLMSG_ERROR = 2
NLM_F_REQUEST = 1
NLM_F_ACK = 4
GENL_ID_CTRL = 16  # linux/genetlink.h
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2

NBD_CMD_CONNECT = 1  # linux/nbd-netlink.h
NBD_CMD_DISCONNECT = 2
NBD_GENL_VERSION = 1
NBD_ATTR_INDEX = 1
NBD_ATTR_SIZE_BYTES = 2
NBD_ATTR_BLOCK_SIZE_BYTES = 3
NBD_ATTR_SERVER_FLAGS = 5
NBD_ATTR_SOCKETS = 7
NBD_ATTR_BACKEND_IDENTIFIER = 10
NBD_SOCK_ITEM = 1
NBD_SOCK_FD = 1
NLA_F_NESTED = 1 << 15
ANSWER_S = 10.0

_MESSAGE = struct.Struct("=IHHII")  # struct nlmsghdr
_GENERIC = struct.Struct("=BBH")  # struct genlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_NUMBER = struct.Struct("=i")


def attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute, padded to four bytes."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def connect_message(
    family: int,
    descriptors: Sequence[int],
    size_bytes: int,
    block_bytes: int,
    flags: int,
    index: int | None,
    backend: str = "",
) -> bytes:
    """The message that attaches sockets to `/dev/nbd<index>`, or to one that the kernel chooses."""
    sockets = b"".join(
        attribute(NBD_SOCK_ITEM | NLA_F_NESTED, attribute(NBD_SOCK_FD, struct.pack("=I", descriptor)))
        for descriptor in descriptors
    )
    return _message(
        family,
        NBD_CMD_CONNECT,
        NBD_GENL_VERSION,
        (b"" if index is None else attribute(NBD_ATTR_INDEX, struct.pack("=I", index)))
        + attribute(NBD_ATTR_SIZE_BYTES, struct.pack("=Q", size_bytes))
        + attribute(NBD_ATTR_BLOCK_SIZE_BYTES, struct.pack("=Q", block_bytes))
        + attribute(NBD_ATTR_SERVER_FLAGS, struct.pack("=Q", flags))
        + attribute(NBD_ATTR_SOCKETS | NLA_F_NESTED, sockets)
        + (attribute(NBD_ATTR_BACKEND_IDENTIFIER, backend.encode() + b"\0") if backend else b""),
    )


def _message(kind: int, command: int, version: int, attributes: bytes) -> bytes:
    body = _GENERIC.pack(command, version, 0) + attributes
    return _MESSAGE.pack(_MESSAGE.size + len(body), kind, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body


def attach(
    descriptors: Sequence[int],
    size_bytes: int,
    block_bytes: int,
    flags: int,
    *,
    index: int | None = None,
    backend: str = "",
) -> int:
    """Make a block device whose requests arrive at the other ends of connected sockets; returns its number.

    Args:
        descriptors: the kernel keeps the sockets; the descriptors may be closed.
        size_bytes: length of the device, a multiple of `block_bytes`.
        block_bytes: logical block size, 512 to 4096.
        flags: the protocol's transmission flags.
        index: number of the device; None for any that is free, where the kernel makes a new one if need be.
        backend: shown in the device's file `backend` of sysfs, by kernels from 5.14 on.

    Raises:
        OSError: the kernel has no nbd module, or refuses.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as netlink:
        netlink.settimeout(ANSWER_S)
        family = _find_family(netlink)
        netlink.send(connect_message(family, descriptors, size_bytes, block_bytes, flags, index, backend))
        numbers = [_number(attributes, NBD_ATTR_INDEX, 4) for attributes in _answers(netlink)]
    found = next((number for number in numbers if number is not None), index)
    if found is None:
        raise OSError(errno.EPROTO, "the kernel does not say which device it made")
    return found


def detach(index: int) -> None:
    """Have the kernel let go of `/dev/nbd<index>`. What was written to it must have been synced before.

    Raises:
        OSError: there is no such device, or the kernel refuses.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as netlink:
        netlink.settimeout(ANSWER_S)
        number = attribute(NBD_ATTR_INDEX, struct.pack("=I", index))
        netlink.send(_message(_find_family(netlink), NBD_CMD_DISCONNECT, NBD_GENL_VERSION, number))
        _answers(netlink)


def _find_family(netlink: socket.socket) -> int:
    name = attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0")
    netlink.send(_message(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, name))
    for attributes in _answers(netlink):
        family = _number(attributes, CTRL_ATTR_FAMILY_ID, 2)
        if family is not None:
            return family
    raise OSError(errno.ENOENT, "the kernel has no nbd")


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


def _number(attributes: bytes, wanted: int, size: int) -> int | None:
    """The number of `size` bytes in the attribute `wanted`; None if there is none."""
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == wanted:
            return int.from_bytes(attributes[_ATTRIBUTE.size : _ATTRIBUTE.size + size], sys.byteorder)
        attributes = attributes[max(length + -length % 4, _ATTRIBUTE.size) :]
    return None
