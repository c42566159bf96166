"""The superblock: two slots, each write under a fresh salt; all other keys hang on it (format document, section 7)."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from uuid import UUID

from jindiskd.base.secret import Secret
from jindiskd.jindisk.crypto import ZERO_NONCE, Generator, superblock_opening_key
from jindiskd.jindisk.errors import VolumeInconsistent, VolumeMalformed, VolumeUnsupported
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START, REF_BYTES, TAG_BYTES, Geometry, Kind
from jindiskd.jindisk.identification import MAJOR, MINOR, Identification

MAGIC = b"JD2super"
SLOT_START = 1
CLOSED = 1
SALT_BYTES = 32
LAST_COUNT = 1 << 63
"""No volume lives to see this epoch or sequence number; greater ones would soon have no successor."""
PLAIN_BYTES = BLOCK - SALT_BYTES - TAG_BYTES
HOLE = bytes(REF_BYTES)
_FIELDS = struct.Struct("<8sHHI16sQQQQQQQQIIQQQQQQQQ32s32s32s")
_AAD = struct.Struct("<4sI16s")
_REFS_AT = _FIELDS.size
_ZERO_AT = _REFS_AT + 3 * REF_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """The fields of a superblock. Counts and times are unsigned 64 bits."""

    uuid: UUID
    geometry: Geometry
    epoch: int
    sequence: int
    closed: bool
    mapped: int
    """Mapped logical blocks."""
    oldest_stamp: int
    formatted_at: int
    """Unix seconds; informative."""
    committed_at: int
    session: bytes = field(repr=False)
    previous_root: bytes
    journal_key: bytes = field(repr=False)
    tops: dict[Kind, bytes] = field(repr=False)
    """Page reference (56 bytes) of the top of each tree."""
    incompatible: int = 0
    readonly_compatible: int = 0
    compatible: int = 0

    @property
    def slot(self) -> int:
        """Slot it is written to, 0 or 1."""
        return self.epoch % 2

    def identification(self, label: str) -> Identification:
        """The identification block that goes with it; the label is public and authenticated nowhere."""
        return Identification(
            segment_bits=self.geometry.segment_bits,
            uuid=self.uuid,
            blocks=self.geometry.blocks,
            end=self.geometry.end,
            label=label,
            incompatible=self.incompatible,
            readonly_compatible=self.readonly_compatible,
            compatible=self.compatible,
        )

    def encode(self) -> bytes:
        """The plaintext, 4048 bytes."""
        g = self.geometry
        head = _FIELDS.pack(
            MAGIC, MAJOR, MINOR, CLOSED if self.closed else 0, self.uuid.bytes,
            self.incompatible, self.readonly_compatible, self.compatible,
            self.epoch, self.sequence, g.blocks, g.end, g.segments, g.segment_bits, g.journal_blocks,
            JOURNAL_START, g.meta_start, g.meta_slots, g.data_start,
            self.mapped, self.oldest_stamp, self.formatted_at, self.committed_at,
            self.session, self.previous_root, self.journal_key,
        )  # fmt: skip
        return (head + b"".join(self.tops[kind] for kind in Kind)).ljust(PLAIN_BYTES, b"\0")

    def seal(self, key: Secret, generator: Generator) -> bytes:
        """The block as it is written, 4096 bytes, under a fresh salt."""
        salt, sealing = generator.superblock_key(key, self.uuid)
        return salt + sealing.seal(ZERO_NONCE, self.encode(), _AAD.pack(b"JD2S", self.slot, self.uuid.bytes))


def root_after_superblock(block: bytes) -> bytes:
    """The state root (32 bytes) after a superblock as it is on the disk."""
    return hashlib.sha256(b"JD2R" + block).digest()


def open_superblock(block: bytes, *, slot: int, key: Secret, uuid: UUID, device_bytes: int) -> Superblock:
    """Open and check one slot.

    Raises:
        VolumeUnauthentic: the tag does not verify.
        VolumeUnsupported: version or feature.
        VolumeMalformed: the device is too small for it.
        VolumeInconsistent: it violates the format document.
    """
    what = f"superblock slot {slot} (raw block {SLOT_START + slot})"
    opening = superblock_opening_key(key, uuid, block[:SALT_BYTES])
    plain = opening.open(ZERO_NONCE, block[SALT_BYTES:], _AAD.pack(b"JD2S", slot, uuid.bytes), what)
    (
        magic, major, _, state, own_uuid, incompatible, readonly, compatible,
        epoch, sequence, blocks, end, segments, bits, journal,
        journal_start, meta_start, meta_slots, data_start,
        mapped, oldest, formatted, committed, session, previous, journal_key,
    ) = _FIELDS.unpack_from(plain)  # fmt: skip
    if magic != MAGIC or own_uuid != uuid.bytes:
        raise VolumeInconsistent(what, "magic or UUID is another")
    if major != MAJOR:
        raise VolumeUnsupported("major version", major)
    if incompatible:
        raise VolumeUnsupported("incompatible feature", hex(incompatible))
    if state & ~CLOSED or any(plain[_ZERO_AT:]):
        raise VolumeInconsistent(what, "reserved bits or bytes are not zero")
    if epoch % 2 != slot or not 0 < epoch <= LAST_COUNT or not 0 < sequence <= LAST_COUNT:
        raise VolumeInconsistent(what, f"epoch {epoch} or sequence number {sequence} cannot be there")
    if max(blocks, segments, meta_slots) > 1 << 40 or bits > 12 or journal > 65536:
        raise VolumeInconsistent(what, "its geometry is out of range")
    geometry = Geometry(
        blocks=blocks, segment_bits=bits, segments=segments, journal_blocks=journal, meta_slots=meta_slots
    )
    fault = geometry.fault()
    computed = (JOURNAL_START, geometry.meta_start, geometry.data_start, geometry.end)
    if fault is None and computed != (journal_start, meta_start, data_start, end):
        fault = "positions do not follow from the counts"
    if fault is not None:
        raise VolumeInconsistent(what, f"its geometry is impossible: {fault}")
    if geometry.end * BLOCK > device_bytes:
        raise VolumeMalformed("device", f"it has {device_bytes} bytes, the volume needs {geometry.end * BLOCK}")
    tops = {k: plain[_REFS_AT + i * REF_BYTES :][:REF_BYTES] for i, k in enumerate(Kind)}
    if mapped > blocks or oldest > sequence:
        raise VolumeInconsistent(what, "its counts are out of range")
    return Superblock(
        uuid=uuid, geometry=geometry, epoch=epoch, sequence=sequence, closed=bool(state & CLOSED), mapped=mapped,
        oldest_stamp=oldest, formatted_at=formatted, committed_at=committed, session=session, previous_root=previous,
        journal_key=journal_key, tops=tops, incompatible=incompatible, readonly_compatible=readonly,
        compatible=compatible,
    )  # fmt: skip
