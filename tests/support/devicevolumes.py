"""Volumes for the tests of devices."""

from __future__ import annotations

import os
import socket
import struct
import uuid
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.luks2.header import make_header

UUID = "7c1d1f0a-5a0e-4bd5-9a3e-3b0c6a7f0a11"
UUID2 = "e0b51e6c-6f5e-4d52-8a0e-0d8f1c1f7a22"
LABEL = 'a label "with" \n things'
KEY = bytes(range(32))
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698


def make_jindisk2(path: Path, size_bytes: int, *, label: str = LABEL) -> Path:
    """A closed, empty volume of JinDisk 2 in a file."""
    geometry = default_geometry(size_bytes // BLOCK)
    with path.open("wb") as file:
        file.truncate(geometry.end * BLOCK)
    with OpenFile(path, writable=True) as device:
        create_volume(
            device, geometry=geometry, key=Secret(KEY), uuid=uuid.UUID(UUID), session_id=os.urandom(32), label=label
        ).close()
    return path


def luks2_header(data_bytes: int, *, key: bytes = KEY) -> bytes:
    """A LUKS2 header as images have it, 1 MiB."""
    return make_header(
        volume_key=Secret.random(64), passphrase=Secret(key), uuid=UUID, data_bytes=data_bytes, rng=os.urandom
    )


class Kernel:
    """The kernel's end of the connection: requests of the network block device's transmission phase."""

    def __init__(self, fd: int) -> None:
        self.stream = socket.socket(fileno=fd)
        self.stream.settimeout(120)

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.stream.recv(length - len(data))
            assert part, "the server has gone"
            data += part
        return data

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> tuple[int, bytes]:
        self.stream.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, kind, 7, offset, length or len(data)) + data)
        magic, error, cookie = struct.unpack(">IIQ", self._exactly(16))
        assert (magic, cookie) == (REPLY_MAGIC, 7)
        return error, self._exactly(length) if kind == 0 and not error else b""
