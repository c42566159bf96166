"""The journal: entries, blocks, and reading a chain of them (format document, section 10)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jindiskd.jindisk.crypto import SealingKey, block_nonce
from jindiskd.jindisk.errors import VolumeInconsistent
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START, Geometry

ENTRIES = 126
LAST, ORDERED = 1, 2
MAP, UNMAP, SEG, SEGKEY = 1, 2, 3, 4
UNORDERED_MAPS = 256
_VALUE_MASK = (1 << 56) - 1
_HEAD = struct.Struct("<QQIHHQ")
_ENTRY = struct.Struct("<QQ16s")
_MAP_HEAD = struct.Struct("<Q")
_AAD = struct.Struct("<4sIQQ32s")
_PLAIN_BYTES = BLOCK - 16
_ZERO16 = bytes(16)


def unmap_entry(lba: int, count: int) -> bytes:
    """`count` blocks from `lba` read as zeros."""
    return _ENTRY.pack(UNMAP << 56 | lba, count, _ZERO16)


def segment_entries(segment: int, key: bytes) -> tuple[bytes, bytes]:
    """SEG and SEGKEY: the segment is filled under this key from now on."""
    return _ENTRY.pack(SEG << 56 | segment, 0, key[:16]), _ENTRY.pack(SEGKEY << 56 | segment, 0, key[16:])


class EntryLog:
    """The entries of the next commit, in order."""

    __slots__ = ("_unmapped", "entries", "maps", "segments")

    def __init__(self) -> None:
        """Empty."""
        self.entries: list[bytes] = []
        self.maps = 0
        self.segments: list[int] = []
        """Segments declared."""
        self._unmapped: tuple[int, int] | None = None

    def map_all(self, entries: Sequence[tuple[int, bytes]]) -> None:
        """Add MAPs: LBAs with their entries of F, which are the rest of a MAP as they are."""
        head = _MAP_HEAD.pack
        self.entries += [head(MAP << 56 | lba) + entry for lba, entry in entries]
        self.maps += len(entries)
        self._unmapped = None

    def unmap(self, lba: int, count: int) -> None:
        """Add an UNMAP, or lengthen the one before if this range follows it."""
        if self._unmapped and sum(self._unmapped) == lba:
            first, before = self._unmapped
            self.entries[-1] = unmap_entry(first, before + count)
            self._unmapped = first, before + count
        else:
            self.entries.append(unmap_entry(lba, count))
            self._unmapped = lba, count

    def segment(self, segment: int, key: bytes) -> None:
        """Add SEG and SEGKEY."""
        self.entries += segment_entries(segment, key)
        self.segments.append(segment)
        self._unmapped = None

    def blocks(self) -> list[list[bytes]]:
        """The entries in blocks; SEG and SEGKEY stay together."""
        if len(self.entries) <= ENTRIES:
            return [self.entries] if self.entries else []
        found: list[list[bytes]] = [[]]
        for entry in self.entries:
            room = ENTRIES - len(found[-1])
            if room == 0 or (room == 1 and entry[7] == SEG):
                found.append([])
            found[-1].append(entry)
        return found

    def block_bound(self) -> int:
        """At most so many blocks, without packing them."""
        return -(-len(self.entries) // (ENTRIES - 1))


class JournalWriter:
    """Seals the journal blocks of one epoch, drawn key and counter included."""

    def __init__(self, key: SealingKey, epoch: int, root: bytes) -> None:
        """`root`: the state root after the epoch's superblock."""
        self._key, self._epoch = key, epoch
        self.root = root
        self.index = 0

    def seal(self, blocks: Sequence[Sequence[bytes]], sequence: int, *, ordered: bool) -> bytes:
        """Seal one commit; returns its blocks as they are written, from raw block 8 + the index before."""
        sealed = bytearray()
        for number, entries in enumerate(blocks):
            flags = (LAST if number == len(blocks) - 1 else 0) | (ORDERED if ordered else 0)
            head = _HEAD.pack(self._epoch, sequence, self.index, len(entries), flags, 0)
            plain = (head + b"".join(entries)).ljust(_PLAIN_BYTES, b"\0")
            aad = _AAD.pack(b"JD2J", 0, self._epoch, self.index, self.root)
            block = self._key.seal(block_nonce(self.index), plain, aad)
            self.root = hashlib.sha256(self.root + block).digest()
            self.index += 1
            sealed += block
        return bytes(sealed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A MAP entry."""

    lba: int
    raw: int
    tag: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmap:
    """An UNMAP entry."""

    lba: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """SEG and SEGKEY."""

    segment: int
    key: bytes = field(repr=False)


Entry = Map | Unmap | Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A journal block that opened."""

    sequence: int
    last: bool
    ordered: bool
    entries: tuple[Entry, ...]


def journal_aad(epoch: int, index: int, root: bytes) -> bytes:
    """56 bytes of associated data of a journal block; `root` is the state root before it."""
    return _AAD.pack(b"JD2J", 0, epoch, index, root)


def decode(plain: bytes, *, epoch: int, index: int, geometry: Geometry) -> Block:
    """Read the plaintext of a journal block.

    Raises:
        VolumeInconsistent: it violates the format document.
    """
    what = f"journal block {index} (raw block {JOURNAL_START + index})"
    own_epoch, sequence, own_index, count, flags, zero = _HEAD.unpack_from(plain)
    if (own_epoch, own_index) != (epoch, index):
        raise VolumeInconsistent(what, f"it says epoch {own_epoch}, index {own_index}")
    if count > ENTRIES or flags & ~(LAST | ORDERED) or zero or any(plain[_HEAD.size + count * _ENTRY.size :]):
        raise VolumeInconsistent(what, "its count, flags or reserved bytes are wrong")
    entries = tuple(_entries(plain, count, geometry, what))
    return Block(sequence=sequence, last=bool(flags & LAST), ordered=bool(flags & ORDERED), entries=entries)


def _entries(plain: bytes, count: int, geometry: Geometry, what: str) -> Iterator[Entry]:
    pending: tuple[int, bytes] | None = None
    for typed, b, c in _ENTRY.iter_unpack(plain[_HEAD.size : _HEAD.size + count * _ENTRY.size]):
        kind, value = typed >> 56, typed & _VALUE_MASK
        if (pending is not None) != (kind == SEGKEY):
            raise VolumeInconsistent(what, "SEG and SEGKEY do not come in pairs")
        if kind == MAP and value < geometry.blocks and geometry.data_start <= b < geometry.end:
            yield Map(lba=value, raw=b, tag=c)
        elif kind == UNMAP and 1 <= b <= geometry.blocks - value and c == _ZERO16:
            yield Unmap(lba=value, count=b)
        elif kind == SEG and value < geometry.segments and not b:
            pending = value, c
        elif kind == SEGKEY and pending is not None and value == pending[0] and not b:
            yield Segment(segment=value, key=pending[1] + c)
            pending = None
        else:
            raise VolumeInconsistent(what, f"an entry of type {kind} is out of range")
    if pending is not None:
        raise VolumeInconsistent(what, "SEG and SEGKEY do not come in pairs")
