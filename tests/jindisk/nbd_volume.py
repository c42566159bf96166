"""A real volume behind the NBD server, and the numbers of the protocol."""

import os
from contextlib import contextmanager
from pathlib import Path

from jd import KEY, UUID1

from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.create import create_volume
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.extents import Extent
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.nbd_server import Server, listen
from jindiskd.jindisk.served import ServedSession, ServedVolume
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import open_volume

SIZE = 16 << 20
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST = 1, 2, 4, 8, 16


def new_file(path: Path, blocks: int = SIZE // BLOCK) -> Path:
    with path.open("wb") as file:
        file.truncate(default_geometry(blocks).end * BLOCK)
    return path


@contextmanager
def served(path: Path, *, create: bool = True, size: int = SIZE, writable: bool = True, **options):
    """A volume in a file, served; yields the socket's path and the server."""
    if create:
        new_file(path, size // BLOCK)
    with OpenFile(path, writable=writable) as device:
        if create:
            session = create_volume(
                device, geometry=default_geometry(size // BLOCK), key=Secret(KEY), uuid=UUID1, session_id=os.urandom(32)
            )
            volume = ServedSession(session)
        else:
            opened = open_volume(device, key=Secret(KEY), uuid=None, anchor=UNANCHORED)
            if writable:
                session = Session(opened, session_id=os.urandom(32))
                session.begin()
                volume = ServedSession(session)
            else:
                volume = ServedVolume(opened)
        server = Server(listen(path.with_suffix(".sock")), volume, **options)
        server.start()
        try:
            yield path.with_suffix(".sock"), server
        finally:
            server.stop()
            volume.close()
            path.with_suffix(".sock").unlink()


class Memory:
    """A block device of 64 KiB."""

    size_bytes, read_only, zeroes_fast, fault = 1 << 16, False, True, None

    def __init__(self) -> None:
        self.data = bytearray(self.size_bytes)

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size_bytes
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        assert offset + len(data) <= self.size_bytes
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def flush(self) -> None:
        """Nothing to do."""

    def extents(self, offset: int, length: int) -> list[Extent]:
        assert length > 0
        return [(length, True)]

    def close(self) -> None:
        """Nothing to do."""
