"""Parsers of what lies on a volume's disk, and of what a block device's client sends: each as a function of bytes.

Where the engine opens a seal before it parses, the bytes are sealed first: they are what a faulty writer with the key
could have written.
"""

import contextlib
import os
import struct
import sys
from pathlib import Path
from uuid import UUID

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.guest import nbd as guest_nbd
from jindiskd.jindisk import anchor_file, identification, journal, nbd_protocol
from jindiskd.jindisk.crypto import ZERO_NONCE, Generator
from jindiskd.jindisk.geometry import BLOCK, Kind, default_geometry
from jindiskd.jindisk.nbd_connection import Connection
from jindiskd.jindisk.nbd_handshake import Agreed, ExportInfo, Handshake
from jindiskd.jindisk.nbd_server import flags_of
from jindiskd.jindisk.superblock import _AAD, HOLE, PLAIN_BYTES, Superblock, open_superblock
from jindiskd.jindisk.v1 import superblock as superblock1
from jindiskd.jindisk.v1.catalogue import Entry, decode_entry
from jindiskd.jindisk.v1.layout import layout_for
from jindiskd.jindisk.v1.nodes import build_inner, build_leaf, parse_inner, parse_leaf

sys.path.insert(0, str(Path(__file__).parents[1] / "jindisk"))
from jd import content, world
from jd_attack import attack
from jd_forge import Forge
from jd_reader import Wrong
from nbd_volume import Memory

KEY, NAMED = Secret(bytes(range(32))), UUID(int=7)
GEOMETRY, LAYOUT1 = default_geometry(4096), layout_for(8 << 20)
SEALING = Generator(KEY, bytes(32), os.urandom)
SUPERBLOCK = Superblock(
    uuid=NAMED, geometry=GEOMETRY, epoch=1, sequence=1, closed=True, mapped=0, oldest_stamp=0, formatted_at=0,
    committed_at=0, session=bytes(32), previous_root=bytes(32), journal_key=bytes(32), tops=dict.fromkeys(Kind, HOLE),
)  # fmt: skip
IDENTIFICATION = SUPERBLOCK.identification("a").encode()[:600]
ANCHOR = anchor_file.Remembered(
    uuid=NAMED, anchor=Anchor(open=True, session=bytes(32), sequence=1, root=bytes(32))
).encode()
JOURNAL = struct.pack("<QQIHHQ", 1, 2, 0, 4, 3, 0) + b"".join(
    [
        *journal.segment_entries(3, bytes(32)),
        struct.pack("<QQ16s", 1 << 56 | 5, GEOMETRY.data_start, bytes(16)),
        journal.unmap_entry(7, 9),
    ]
)
LEAF1 = build_leaf([1, 2, 9], struct.pack("<Q32x", 5) * 3, 0)
INNER1 = build_inner([(3, LAYOUT1.slot_start(0)), (9, LAYOUT1.slot_start(0) + 6000)], leaves=True)
ENTRY1 = Entry(
    root=LAYOUT1.slot_start(0), key=bytes(16), slot=0, level=1, version=2, first=1, last=9, records=3
).encode()
SUPERBLOCK1 = superblock1.encode(LAYOUT1)


def identify(data: bytes) -> None:
    """Raw block 0, which nothing protects; a good one is written back as it was but for the minor version."""
    block = data[:BLOCK].ljust(BLOCK, b"\0")
    found = identification.decode(block, "the disk")
    if not found.incompatible and block[10:12] == b"\0\0":
        assert found.encode() == block


def superblock(data: bytes) -> None:
    """The plaintext of a superblock, sealed for both slots."""
    plain = data[:PLAIN_BYTES].ljust(PLAIN_BYTES, b"\0")
    slot = plain[56] % 2
    salt, key = SEALING.superblock_key(KEY, NAMED)
    block = salt + key.seal(ZERO_NONCE, plain, _AAD.pack(b"JD2S", slot, NAMED.bytes))
    found = open_superblock(block, slot=slot, key=KEY, uuid=NAMED, device_bytes=GEOMETRY.end * BLOCK)
    if plain[10:12] == b"\0\0":
        assert found.encode() == plain


def journal_block(data: bytes) -> None:
    """The plaintext of a journal block."""
    found = journal.decode(data[: BLOCK - 16].ljust(BLOCK - 16, b"\0"), epoch=1, index=0, geometry=GEOMETRY)
    assert all(entry.lba < GEOMETRY.blocks for entry in found.entries if isinstance(entry, journal.Map))


def kept_anchor(data: bytes) -> None:
    """An anchor file."""
    fd = os.memfd_create("anchor")
    try:
        os.write(fd, data)
        assert anchor_file.read(Path(f"/proc/self/fd/{fd}")).encode() == data
    finally:
        os.close(fd)


def leaf1(data: bytes) -> None:
    """A leaf of version 1."""
    parse_leaf(data[: len(LEAF1)].ljust(len(LEAF1), b"\0"), LAYOUT1.data_blocks)


def inner1(data: bytes) -> None:
    """An inner node of version 1."""
    parse_inner(data[: len(INNER1)].ljust(len(INNER1), b"\0"), LAYOUT1.slot_start(0), LAYOUT1.slot_start(1))


def entry1(data: bytes) -> None:
    """A catalogue entry of version 1."""
    decode_entry(data[: len(ENTRY1)].ljust(len(ENTRY1), b"\0"), LAYOUT1, 0)


def header1(data: bytes) -> None:
    """A superblock of version 1 in clear."""
    superblock1.decode(data[: len(SUPERBLOCK1)].ljust(len(SUPERBLOCK1), b"\0"))


class Forged:
    """A small volume with contents, some of its authentic structures altered: everything a user does with it."""

    def __init__(self) -> None:
        self._disk: dict[int, bytes] | None = None

    def __call__(self, data: bytes) -> None:
        """Changes of nine bytes each: which structure, where, what."""
        if self._disk is None:
            session = world().create()
            for lba in (*range(200), 1000, 4095):
                session.write(lba * BLOCK, content(lba))
            session.checkpoint()
            self._disk = dict(session.volume.device.blocks)
        forge = Forge(self._disk, bytes(range(32)))
        for at in range(0, min(len(data), 36), 9):
            what, place = struct.unpack_from("<BH", data[at : at + 9].ljust(9, b"\0"))
            patch = data[at + 3 : at + 3 + (1, 2, 4, 6)[what >> 6]]
            tree = what % 4
            try:
                if not tree:
                    forge.superblock(place % 440, patch)
                else:
                    level = (what >> 2) % len(forge.reader.levels[tree])
                    forge.page(tree, level, 0 if level else forge.first_leaf(tree), place % (4096 - len(patch)), patch)
            except (AssertionError, Wrong, ValueError, KeyError, IndexError):
                break  # the forge finds no way to that page any more
        attack(forge)


class Wire:
    """What the server uses of a stream, with everything that the client will ever send there already."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self.sent = data, 0, 0

    def recv(self, length: int) -> bytes:
        part = self._data[self._at : self._at + length]
        self._at += len(part)
        return part

    def recv_into(self, view: memoryview) -> int:
        part = self.recv(len(view))
        view[: len(part)] = part
        return len(part)

    def sendall(self, data: bytes | memoryview) -> None:
        self.sent += len(data)

    def sendmsg(self, parts: list[bytes]) -> int:
        self.sent += sum(map(len, parts))
        return sum(map(len, parts))

    def settimeout(self, seconds: float | None) -> None:
        """It never waits."""

    def shutdown(self, how: int) -> None:
        """It has ended already."""


def nbd(data: bytes) -> None:
    """A client, from its first byte to its last."""
    volume = Memory()
    export = ExportInfo(name="disk", size_bytes=volume.size_bytes, flags=flags_of(volume), block_bytes=BLOCK)
    stream = Wire(data)
    agreed = Handshake(stream, export, timeout_s=3600).run()
    if agreed is not None:
        Connection(stream, volume, agreed, threads=1).run()


def nbd_requests(data: bytes) -> None:
    """Requests after a handshake; the first byte says what was agreed."""
    agreed = Agreed(structured=bool(data[:1] and data[0] & 1), allocation=data[:1] > b"\x7f")
    Connection(Wire(data[1:]), Memory(), agreed, threads=1).run()


def guest_requests(data: bytes) -> None:
    """Requests of the kernel, as the guest's storage process reads them."""
    stream, volume = Wire(data), Memory()
    with contextlib.suppress(guest_nbd.Disconnected):
        while True:
            guest_nbd.serve_one(stream, volume)


def option(number: int, data: bytes = b"") -> bytes:
    """An option of the handshake."""
    return nbd_protocol.OPTION.pack(nbd_protocol.OPTION_MAGIC, number, len(data)) + data


def request(kind: int, flags: int = 0, offset: int = 0, length: int = 0, data: bytes = b"") -> bytes:
    """A request with its data."""
    return nbd_protocol.REQUEST.pack(nbd_protocol.REQUEST_MAGIC, flags, kind, 5, offset, length) + data


CONTEXT = struct.pack(">III", 0, 1, 15) + b"base:allocation"
REQUESTS = b"".join(
    [
        request(1, 1, 4096, 4, b"data"),
        request(0, 4, 4095, 10),
        request(3),
        request(4, 1, 0, 8192),
        request(6, 2, 5, 100),
        request(7, 8, 0, 65536),
        request(6, 16, 0, 4096),
        request(2),
    ]
)
CLIENT = struct.pack(">I", 3) + b"".join(
    [option(8), option(3), option(9, CONTEXT), option(10, CONTEXT), option(6, struct.pack(">IHHH", 0, 2, 1, 3)),
     option(7, bytes(6)), REQUESTS]
)  # fmt: skip
OLD_CLIENT = struct.pack(">I", 1) + option(1, b"disk") + REQUESTS
