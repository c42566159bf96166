"""A small NBD client for tests, written from the protocol document; it can also say what no client should."""

import itertools
import socket
import struct
from pathlib import Path
from typing import Self


class Refused(Exception):
    """An option was answered with an error: its number without bit 31."""


class Client:
    """One connection."""

    def __init__(self, path: Path) -> None:
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.settimeout(30)
        self.stream.connect(str(path))
        self.cookies = itertools.count(1)
        self.structured = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stream.close()

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.stream.recv(length - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return data

    def closed(self) -> bool:
        """Whether the server lets go of us; whatever it sends before is dropped."""
        try:
            while self.stream.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def greet(self, flags: int = 3) -> None:
        assert struct.unpack(">QQH", self.receive(18)) == (0x4E42444D41474943, 0x49484156454F5054, 3)
        self.stream.sendall(struct.pack(">I", flags))

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """The replies before the acknowledgement. Raises `Refused`."""
        self.stream.sendall(struct.pack(">QII", 0x49484156454F5054, number, len(data)) + data)
        found = []
        while True:
            magic, same, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, same) == (0x3E889045565A9, number)
            body = self.receive(length)
            if kind >> 31:
                raise Refused(kind & 0x7FFFFFFF)
            if kind == 1:
                return found
            found.append((kind, body))

    def go(self, *, structured: bool = False, status: bool = False, name: bytes = b"") -> dict[int, bytes]:
        """Greet and begin transmission; returns the information by type."""
        self.greet()
        text = struct.pack(">I", len(name)) + name
        if structured:
            assert self.option(8) == []
            self.structured = True
        if status:
            query = b"base:allocation"
            replies = self.option(10, text + struct.pack(">II", 1, len(query)) + query)
            assert replies == [(4, b"\0\0\0\1" + query)]
        infos = self.option(7, text + struct.pack(">H", 0))
        return {int.from_bytes(body[:2], "big"): body[2:] for kind, body in infos if kind == 3}

    def send(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", *, flags: int = 0) -> int:
        """Send a request; returns its cookie."""
        cookie = next(self.cookies)
        self.stream.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length) + data)
        return cookie

    def reply(self) -> tuple[int, int]:
        """Cookie and error of a simple reply without data."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return cookie, error

    def chunk(self) -> tuple[int, int, int, bytes]:
        """Cookie, flags, type and payload of a structured reply's chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert magic == 0x668E33EF
        return cookie, flags, kind, self.receive(length)

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", *, flags: int = 0) -> int:
        """A request that brings nothing back; its error."""
        cookie = self.send(kind, offset, length, data, flags=flags)
        found, error = self.reply()
        assert found == cookie
        return error

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        return self.ask(1, offset, len(data), data, flags=flags)

    def read(self, offset: int, length: int, *, flags: int = 0) -> bytes | int:
        """The bytes, or the error."""
        cookie = self.send(0, offset, length, flags=flags)
        if not self.structured:
            found, error = self.reply()
            assert found == cookie
            return error or self.receive(length)
        found, done, kind, payload = self.chunk()
        assert (found, done) == (cookie, 1)
        if kind == 0x8001:
            return int.from_bytes(payload[:4], "big")
        assert kind == bool(payload[8:]), "no data are no chunk of data"
        assert not payload or int.from_bytes(payload[:8], "big") == offset
        return payload[8:]

    def status(self, offset: int, length: int, *, flags: int = 0) -> list[tuple[int, int]] | int:
        """Extents, or the error."""
        cookie = self.send(7, offset, length, flags=flags)
        found, done, kind, payload = self.chunk()
        assert (found, done) == (cookie, 1)
        if kind == 0x8001:
            return int.from_bytes(payload[:4], "big")
        assert (kind, payload[:4]) == (5, b"\0\0\0\1")
        return list(struct.iter_unpack(">II", payload[4:]))
