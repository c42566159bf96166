"""Messages from the bus, one by one, out of the stream: framed first and parsed afterwards."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable
from typing import Any

from jindiskd.base.logger import Logger
from jindiskd.bus.lib import (
    HeaderField,
    InvalidMessageError,
    MarshallerStreamEndError,
    Message,
    MessageFlag,
    MessageType,
    SignatureTree,
    Unmarshaller,
)

log = Logger(__name__)

KINDS = frozenset(kind.value for kind in MessageType)
REPLIES = frozenset((MessageType.METHOD_RETURN.value, MessageType.ERROR.value))
HEADER_FIELDS = SignatureTree._get("a(yv)").types[0]  # noqa: SLF001 (the library has no public parser of signatures)
MAX_REQUEST_BYTES = 256 * 1024
"""Body of an incoming call or signal."""
MAX_REPLY_BYTES = 16 * 1024 * 1024
"""Body of an answer to a call of ours."""
MAX_FDS = 253
"""SCM_MAX_FD of the kernel: descriptors one datagram can carry."""
DROPPED = "dropped a message from the bus"


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)


class _Closed:
    """Stands in for the socket while a message is parsed: parsing never reads on."""

    @staticmethod
    def recvmsg(*_: object) -> None:
        raise InvalidMessageError("the body is shorter than its signature says")


class Incoming(Unmarshaller):  # type: ignore[misc]  # the library has no types
    """Frames first and parses afterwards, so what is wrong with a message concerns that message alone.

    Unknown types and header fields are passed over, oversized bodies are read past.
    """

    sock: Any
    unix_fds: list[int]

    def __init__(self, stream: Any, sock: socket.socket) -> None:
        super().__init__(stream, sock)
        self._skip: int | None = None
        self._serial = self._body_at = 0
        self._oversized = self._has_body = False

    def read(self, n: int, prefetch: bool = False) -> int:  # noqa: FBT001, FBT002, RUF100 (the library's signature)
        """Have `n` bytes in the buffer; returns where they begin."""
        missing = n - (len(self.buf) - self.offset)
        while missing > 0:
            data = self._receive(missing)
            self.buf.extend(data)
            missing -= len(data)
        at = self.offset
        if not prefetch:
            self.offset += n
        return int(at)

    def _receive(self, length: int) -> bytes:
        room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        try:
            data, ancillary, *_ = self.sock.recvmsg(length, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise MarshallerStreamEndError from None
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self.unix_fds.extend(fds)
        if not data:
            raise EOFError("the bus closed the connection")
        return bytes(data)

    def unmarshall(self) -> bool:
        """True once a message is through; `message` is None if it had to be dropped."""
        try:
            self._frame()
        except MarshallerStreamEndError:
            return False
        try:
            self.message = self._parse()
        except Exception as exc:  # noqa: BLE001 (the parser's faults on hostile input are of any kind)
            log.warning(DROPPED, problem=type(exc).__name__)
        if self.message is None:
            self.close_fds()
        return True

    def close_fds(self) -> None:
        """Close the descriptors of a message that is not handed on."""
        close_all(self.unix_fds)
        self.unix_fds = []

    def _frame(self) -> None:
        self.offset = 0
        self.read(16, prefetch=True)
        self.endian = self.buf[0]
        if self.endian not in b"lB" or self.buf[3] != 1:
            raise InvalidMessageError("lost the thread of the stream")
        order = "<III" if self.endian == ord("l") else ">III"
        body, self._serial, header = struct.unpack_from(order, self.buf, 4)
        if header > MAX_REQUEST_BYTES:
            raise InvalidMessageError("the header is larger than any real one")
        self._body_at = 16 + header + (-header & 7)
        self._oversized = body > (MAX_REPLY_BYTES if self.buf[1] in REPLIES else MAX_REQUEST_BYTES)
        self._has_body = bool(body) and not self._oversized
        self.read(self._body_at + (body if self._has_body else 0), prefetch=True)
        if self._oversized:
            self._skip = body if self._skip is None else self._skip
            while self._skip:
                self._skip -= len(self._receive(min(self._skip, 65536)))

    def _parse(self) -> Any:
        kind = self.buf[1]
        if kind not in KINDS or (self._oversized and kind != MessageType.METHOD_CALL.value):
            return None
        self.sock = _Closed
        self.offset = 12
        fields = {code: variant.value for code, variant in self.read_argument(HEADER_FIELDS)}
        signature = fields.get(HeaderField.SIGNATURE.value, "") if self._has_body else ""
        tree = SignatureTree._get(signature)  # noqa: SLF001 (the library has no public parser of signatures)
        self.offset = self._body_at
        message = Message(
            message_type=MessageType(kind),
            flags=MessageFlag(self.buf[2] & 7),
            serial=self._serial,
            path=fields.get(HeaderField.PATH.value),
            interface=fields.get(HeaderField.INTERFACE.value),
            member=fields.get(HeaderField.MEMBER.value),
            error_name=fields.get(HeaderField.ERROR_NAME.value),
            reply_serial=fields.get(HeaderField.REPLY_SERIAL.value),
            sender=fields.get(HeaderField.SENDER.value),
            destination=fields.get(HeaderField.DESTINATION.value),
            unix_fds=self.unix_fds,
            signature=tree,
            body=[self.read_argument(argument) for argument in tree.types],
        )
        message.oversized = self._oversized
        return message
