"""Which parts of a volume are mapped: for clients that skip holes."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Kind
from jindiskd.jindisk.memtable import UNMAPPED
from jindiskd.jindisk.volume import Volume

MAX_LEAVES = 1024
"""Leaves of the map looked at for one answer; they cover 680 MiB."""
BATCH_LEAVES = 64
"""Leaves looked at before other users of the volume get their turn."""
_LEAF = PER_LEAF[Kind.F]
_RAWS = struct.Struct("<" + f"Q{ENTRY_BYTES[Kind.F] - 8}x" * _LEAF)
_ALL = (True,) * _LEAF
_NONE = (False,) * _LEAF
Extent = tuple[int, bool]
"""Length in bytes, and whether the blocks are mapped; what is not reads as zeros."""


def extents(volume: Volume, offset: int, length: int) -> list[Extent]:
    """Alternating extents from `offset` on. They may end before `offset + length`, but there is at least one.

    Args:
        volume: open for reading or in a session; changes meanwhile may be seen or not.
        offset: bytes; need not be aligned.
        length: bytes, at least 1.

    Raises:
        InvalidArgument: the range reaches beyond the end.
        VolumeError: a page of the map cannot be read.
    """
    volume.check_range(offset, length)
    first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
    leaf, last = first // _LEAF, (end - 1) // _LEAF
    last = min(last, leaf + MAX_LEAVES - 1)
    end = min(end, (last + 1) * _LEAF)
    runs: list[Extent] = []  # in blocks, from the beginning of the first leaf on
    for start in range(leaf, last + 1, BATCH_LEAVES):
        with volume.lock:
            for mapped in _leaves(volume, start, min(BATCH_LEAVES, last + 1 - start)):
                _append(runs, mapped)
    return _cut(runs, offset - leaf * _LEAF * BLOCK, min(end * BLOCK, offset + length) - offset)


def _leaves(volume: Volume, first: int, count: int) -> list[Sequence[bool]]:
    """For each leaf, which of its blocks are mapped. The lock is held."""
    tree, memtable, pending = volume.trees[Kind.F], volume.memtable, volume.pending
    present = set(tree.present(first, count))
    changed = {lba // _LEAF for lba in pending}
    changed |= {leaf for leaf in range(first, first + count) if leaf in memtable.touched}
    found: list[Sequence[bool]] = []
    for leaf in range(first, first + count):
        page = tree.page(0, leaf) if leaf in present and leaf not in memtable.cleared else None
        raws = _RAWS.unpack_from(page) if page is not None else _NONE
        if leaf in changed:
            mapped = [bool(raw) for raw in raws]
            for at, lba in enumerate(range(leaf * _LEAF, (leaf + 1) * _LEAF)):
                if lba in pending:
                    mapped[at] = True
                elif (entry := memtable.get(lba)) is not None:
                    mapped[at] = entry != UNMAPPED
            found.append(mapped)
        elif page is not None:
            found.append(_ALL if all(raws) else [bool(raw) for raw in raws])
        else:
            found.append(_NONE)
    return found


def _append(runs: list[Extent], mapped: Sequence[bool]) -> None:
    if mapped is _ALL or mapped is _NONE:
        pieces: list[Extent] = [(_LEAF, mapped is _ALL)]
    else:
        pieces = [(1, flag) for flag in mapped]
    for count, flag in pieces:
        if runs and runs[-1][1] == flag:
            runs[-1] = (runs[-1][0] + count, flag)
        else:
            runs.append((count, flag))


def _cut(runs: list[Extent], skip: int, length: int) -> list[Extent]:
    """The runs as bytes, without the first `skip` bytes and what lies behind `length` more."""
    cut: list[Extent] = []
    for count, flag in runs:
        size = count * BLOCK
        if skip >= size:
            skip -= size
            continue
        size = min(size - skip, length)
        skip = 0
        if size:
            cut.append((size, flag))
        length -= size
        if not length:
            break
    return cut
