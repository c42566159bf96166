"""The checkpoint: memtable into trees, and the next superblock (format document, section 11.2)."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jindiskd.base.anchor import State
from jindiskd.jindisk.errors import VolumeInconsistent
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Kind
from jindiskd.jindisk.journal import JournalWriter
from jindiskd.jindisk.memtable import LEAF, Memtable
from jindiskd.jindisk.superblock import SLOT_START, root_after_superblock
from jindiskd.jindisk.tree import ZERO_PAGE, PageWriter, TreeUpdate

if TYPE_CHECKING:
    from jindiskd.jindisk.session import Session

_ENTRY = ENTRY_BYTES[Kind.F]
_R_LEAF = PER_LEAF[Kind.R]
_RAWS = struct.Struct("<" + f"Q{_ENTRY - 8}x" * LEAF)
_LBA = struct.Struct("<Q")
FEW_ENTRIES = 24
"""Of a leaf: fewer are cheaper one by one."""


def merge(session: Session, *, closing: bool) -> tuple[list[int], bytes, JournalWriter]:
    """Steps C2 and C3, and the superblock to be written. The caller holds the volume's lock.

    Returns:
        The segments freed, the sealed superblock, and the journal of the next epoch.
    """
    volume, slots = session.volume, session.room.slots
    sequence = session.sequence + 1
    writer = PageWriter(volume.device, slots, session.generator)
    updates = {kind: TreeUpdate(tree, writer, slots) for kind, tree in volume.trees.items()}
    if closing:
        session.appender.end_streams()
    filling = session.appender.filling
    delta: Counter[int] = Counter()
    placed: list[tuple[int, int]] = []
    if volume.memtable.touched or volume.segments.taken:
        _merge_map(session, updates[Kind.F], delta, placed)
        _merge_reverse(session, updates[Kind.R], placed)
        freed = volume.segments.checkpoint(updates[Kind.S], delta, filling, sequence)
        for update in updates.values():
            update.finish()
        writer.finish()
    else:
        freed = []
    freed = [segment for segment in freed if segment not in session.appender.free]
    volume.memtable, volume.named = Memtable(), set()
    session.appender.take_log()  # all of it is in the trees now
    journal_key = session.generator.sealing_key()
    before = volume.superblock
    superblock = replace(
        before,
        epoch=session.epoch + 1,
        sequence=sequence,
        closed=closing,
        mapped=volume.segments.mapped,
        oldest_stamp=volume.segments.oldest_stamp(),
        committed_at=int(session.clock()),
        session=session.session_id,
        previous_root=session.durable.root,
        journal_key=journal_key.material,
        tops={kind: tree.top for kind, tree in volume.trees.items()},
    )
    sealed = superblock.seal(volume.key, session.generator)
    volume.superblock = superblock
    return freed, sealed, JournalWriter(journal_key, superblock.epoch, root_after_superblock(sealed))


def commit(session: Session, sealed: bytes) -> None:
    """Steps C4 to C6. Raises `OSError`."""
    device, superblock = session.volume.device, session.volume.superblock
    device.flush()
    device.pwrite((SLOT_START + superblock.slot) * BLOCK, sealed)
    device.flush()
    session.epoch, session.sequence = superblock.epoch, superblock.sequence
    root = root_after_superblock(sealed)
    session.durable = State(session=session.session_id, sequence=superblock.sequence, root=root)


def _merge_map(
    session: Session, update: TreeUpdate, delta: Counter[int], placed: list[tuple[int, int]]
) -> None:
    """Tree F: patch each touched leaf; count blocks that come and go by segment; collect (raw block, LBA)."""
    volume, geometry = session.volume, session.volume.geometry
    start, end, bits = geometry.data_start, geometry.end, geometry.segment_bits
    tree, cleared = volume.trees[Kind.F], volume.memtable.cleared
    for index, entries in volume.memtable.by_leaf():
        old = tree.page(0, index) or ZERO_PAGE
        new = bytearray(ZERO_PAGE if index in cleared else old)
        for at, entry in entries:
            new[at * _ENTRY : (at + 1) * _ENTRY] = entry
        changed = range(LEAF) if index in cleared else [at for at, _ in entries]
        for at, was, now in zip(changed, _raws(old, changed), _raws(new, changed), strict=True):
            if (was and not start <= was < end) or (now and not start <= now < end):
                what = f"the entry of logical block {index * LEAF + at} in tree F"
                raise VolumeInconsistent(what, f"raw block {was} or {now} lies outside the data region")
            if was:
                delta[(was - start) >> bits] -= 1
            if now:
                delta[(now - start) >> bits] += 1
                placed.append((now, index * LEAF + at))
        if new != old:
            update.replace(index, bytes(new))


def _raws(page: bytes | bytearray, places: Sequence[int]) -> list[int]:
    """The raw blocks of some entries of a leaf of F."""
    if len(places) < FEW_ENTRIES:
        return [int.from_bytes(page[at * _ENTRY : at * _ENTRY + 8], "little") for at in places]
    found = _RAWS.unpack_from(page)
    return [found[at] for at in places]


def _merge_reverse(session: Session, update: TreeUpdate, placed: list[tuple[int, int]]) -> None:
    """Tree R: the LBA of each block placed since the last checkpoint."""
    volume = session.volume
    tree, start = volume.trees[Kind.R], volume.geometry.data_start
    placed.sort()
    leaf, page, base = -1, bytearray(), start - _R_LEAF
    for raw, lba in placed:
        if raw - base >= _R_LEAF:
            if page:
                update.replace(leaf, bytes(page))
            leaf = (raw - start) // _R_LEAF
            page, base = bytearray(tree.page(0, leaf) or ZERO_PAGE), start + leaf * _R_LEAF
        _LBA.pack_into(page, (raw - base) * 8, lba + 1)
    if page:
        update.replace(leaf, bytes(page))
