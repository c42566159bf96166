"""The server's side of the NBD handshake: fixed newstyle, one export, no encryption.

A client is believed nothing: lengths are bounded before anything is read, options are counted, and the whole handshake
has a time limit, so that a client can hold a place for so long only.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from jindiskd.jindisk import nbd_protocol as nbd

OPTION_LIMIT = 64
"""Options of one client."""
OPTION_DATA_LIMIT = 16384
"""Bytes of an option; two strings of the protocol's greatest length fit."""
NAME_LIMIT = 4096
QUERY_LIMIT = 64
CLIENT_KNOWN = nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES
CONTEXT_ID = 1
PREFERRED_BYTES = 4096
DESCRIPTION = b"JinDisk volume"


class Gone(Exception):
    """The connection is over: the client left, broke the protocol, or took too long. Nothing more is sent."""

    def __init__(self, why: str, *, left: bool = False) -> None:
        """`left`: it only went away, which programs that look around do."""
        super().__init__(why)
        self.left = left


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInfo:
    """What a client is told of the export."""

    name: str
    """The export answers to it, and to the empty name."""
    size_bytes: int
    flags: int
    """Transmission flags, without `SEND_DF`."""
    block_bytes: int
    """What requests should be multiples of; smaller ones are served, at the price of reading before writing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What was negotiated."""

    structured: bool
    allocation: bool
    """Whether `base:allocation` may be asked for; its context id is `CONTEXT_ID`."""


class Reader:
    """Reads exact lengths from a stream until a moment."""

    def __init__(self, stream: socket.socket, deadline: float) -> None:
        """`deadline` as of `time.monotonic`."""
        self._stream, self._deadline = stream, deadline

    def __call__(self, length: int) -> bytes:
        """Exactly `length` bytes. Raises `Gone`."""
        data = bytearray()
        while len(data) < length:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise Gone("the handshake took too long")
            self._stream.settimeout(left)
            try:
                part = self._stream.recv(length - len(data))
            except OSError as exc:
                raise Gone(f"the handshake ended: {exc.strerror or 'time limit'}") from exc
            if not part:
                raise Gone("the client left during the handshake", left=True)
            data += part
        return bytes(data)


class _Invalid(Exception):
    """An option's data do not follow the protocol."""


class _Fields:
    """Takes fields from an option's data."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, length: int) -> bytes:
        """The next bytes. Raises `_Invalid`."""
        part = self._data[self._at : self._at + length]
        if len(part) < length:
            raise _Invalid
        self._at += length
        return part

    def number(self, size: int) -> int:
        """The next unsigned number of so many bytes."""
        return int.from_bytes(self.take(size), "big")

    def string(self) -> bytes:
        """A string behind its length of 32 bits, UTF-8 without NUL."""
        text = self.take(min(self.number(4), OPTION_DATA_LIMIT + 1))
        if len(text) > NAME_LIMIT or b"\0" in text:
            raise _Invalid
        try:
            text.decode()
        except UnicodeDecodeError:
            raise _Invalid from None
        return text

    def end(self) -> None:
        """There is no more. Raises `_Invalid`."""
        if self._at != len(self._data):
            raise _Invalid


class Handshake:
    """One client's handshake."""

    def __init__(self, stream: socket.socket, export: ExportInfo, *, timeout_s: float) -> None:
        """Nothing is sent yet; `timeout_s` is for all of it."""
        self._stream, self._export = stream, export
        self._read = Reader(stream, time.monotonic() + timeout_s)
        self._names = {b"", export.name.encode()}
        self._structured = False
        self._allocation: bytes | None = None  # the name that the context was selected for
        self._no_zeroes = False

    def run(self) -> Agreed | None:
        """Negotiate; None if the client only asked and left in good order.

        Raises:
            Gone: see there.
        """
        self._send(nbd.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, CLIENT_KNOWN))
        (flags,) = nbd.CLIENT_FLAGS.unpack(self._read(nbd.CLIENT_FLAGS.size))
        if flags & ~CLIENT_KNOWN:
            raise Gone(f"the client has unknown flags {flags:#x}")
        self._no_zeroes = bool(flags & nbd.NO_ZEROES)
        for _ in range(OPTION_LIMIT):
            magic, option, length = nbd.OPTION.unpack(self._read(nbd.OPTION.size))
            if magic != nbd.OPTION_MAGIC:
                raise Gone("the client's option has a wrong magic number")
            if length > OPTION_DATA_LIMIT:
                raise Gone(f"the client's option has {length} bytes")
            data = self._read(length)
            if option == nbd.OPT_EXPORT_NAME:
                return self._by_export_name(data)
            if not flags & nbd.FIXED_NEWSTYLE:
                raise Gone("the client uses options without having agreed to")
            if option == nbd.OPT_ABORT:
                self._reply(option, nbd.REP_ACK)
                return None
            if self._option(option, data):
                return self._agreed()
        raise Gone("the client tries too many options")

    def _agreed(self) -> Agreed:
        return Agreed(structured=self._structured, allocation=self._allocation is not None)

    def _send(self, data: bytes) -> None:
        try:
            self._stream.sendall(data)
        except OSError as exc:
            raise Gone("the client does not take answers", left=True) from exc

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._send(nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    @property
    def _flags(self) -> int:
        return self._export.flags | (nbd.SEND_DF if self._structured else 0)

    def _by_export_name(self, name: bytes) -> Agreed:
        if name not in self._names:
            raise Gone("the client asks for an export that is not here")
        if self._allocation != name:
            self._allocation = None
        padding = b"" if self._no_zeroes else bytes(nbd.EXPORT_NAME_PADDING)
        self._send(nbd.EXPORT_NAME_REPLY.pack(self._export.size_bytes, self._flags) + padding)
        return self._agreed()

    def _option(self, option: int, data: bytes) -> bool:
        """Answer an option; whether transmission begins."""
        try:
            match option:
                case nbd.OPT_LIST:
                    self._list(data)
                case nbd.OPT_INFO | nbd.OPT_GO:
                    return self._info(option, data)
                case nbd.OPT_STRUCTURED_REPLY:
                    _Fields(data).end()
                    self._structured = True
                    self._reply(option, nbd.REP_ACK)
                case nbd.OPT_LIST_META_CONTEXT | nbd.OPT_SET_META_CONTEXT:
                    self._contexts(option, data)
                case _:
                    self._reply(option, nbd.REP_ERR_UNSUP)
        except _Invalid:
            if option == nbd.OPT_SET_META_CONTEXT:
                self._allocation = None
            self._reply(option, nbd.REP_ERR_INVALID)
        return False

    def _list(self, data: bytes) -> None:
        _Fields(data).end()
        name = self._export.name.encode()
        self._reply(nbd.OPT_LIST, nbd.REP_SERVER, nbd.U32.pack(len(name)) + name + DESCRIPTION)
        self._reply(nbd.OPT_LIST, nbd.REP_ACK)

    def _info(self, option: int, data: bytes) -> bool:
        fields = _Fields(data)
        name = fields.string()
        wanted = {fields.number(2) for _ in range(fields.number(2))}
        fields.end()
        if name not in self._names:
            self._reply(option, nbd.REP_ERR_UNKNOWN)
            return False
        export = self._export
        infos = [nbd.INFO_EXPORT_DATA.pack(nbd.INFO_EXPORT, export.size_bytes, self._flags)]
        sizes = (export.block_bytes, max(export.block_bytes, PREFERRED_BYTES), nbd.PAYLOAD_LIMIT)
        infos.append(nbd.INFO_BLOCK_SIZE_DATA.pack(nbd.INFO_BLOCK_SIZE, *sizes))
        if nbd.INFO_NAME in wanted:
            infos.append(nbd.U16.pack(nbd.INFO_NAME) + export.name.encode())
        if nbd.INFO_DESCRIPTION in wanted:
            infos.append(nbd.U16.pack(nbd.INFO_DESCRIPTION) + DESCRIPTION)
        for info in infos:
            self._reply(option, nbd.REP_INFO, info)
        if option == nbd.OPT_GO and self._allocation != name:
            self._allocation = None  # it was selected for another name, or not at all
        self._reply(option, nbd.REP_ACK)
        return option == nbd.OPT_GO

    def _contexts(self, option: int, data: bytes) -> None:
        if not self._structured:
            raise _Invalid
        selecting = option == nbd.OPT_SET_META_CONTEXT
        if selecting:
            self._allocation = None
        fields = _Fields(data)
        name = fields.string()
        count = fields.number(4)
        if count > QUERY_LIMIT:
            self._reply(option, nbd.REP_ERR_TOO_BIG)
            return
        queries = [fields.string() for _ in range(count)]
        fields.end()
        if name not in self._names:
            self._reply(option, nbd.REP_ERR_UNKNOWN)
            return
        if any(_matches(queries, selecting=selecting)):
            if selecting:
                self._allocation = name
            context = nbd.U32.pack(CONTEXT_ID if selecting else 0) + nbd.ALLOCATION
            self._reply(option, nbd.REP_META_CONTEXT, context)
        self._reply(option, nbd.REP_ACK)


def _matches(queries: list[bytes], *, selecting: bool) -> Iterator[bool]:
    """For each query, whether it means the one context there is. Listing knows `base:`, and all by no query."""
    if not selecting and not queries:
        yield True
    for query in queries:
        if b":" not in query:
            raise _Invalid
        yield query == nbd.ALLOCATION or (not selecting and query == b"base:")
