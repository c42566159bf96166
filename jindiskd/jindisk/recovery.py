"""Finding the state of a volume: steps R1 to R4 of the format document, section 12. Reads only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from uuid import UUID

from jindiskd.base.anchor import Anchor, State
from jindiskd.base.secret import Secret
from jindiskd.jindisk import identification
from jindiskd.jindisk.anchor import Unanchored
from jindiskd.jindisk.crypto import OpeningKey, block_nonce
from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import (
    VolumeDeviceFailed,
    VolumeError,
    VolumeInconsistent,
    VolumeMalformed,
    VolumeStale,
    VolumeUnauthentic,
)
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START, Geometry, Kind
from jindiskd.jindisk.identification import Identification
from jindiskd.jindisk.journal import UNORDERED_MAPS, Block, Map, Segment, decode, journal_aad
from jindiskd.jindisk.segments import SegmentTable, Taken, data_aad
from jindiskd.jindisk.superblock import SLOT_START, Superblock, open_superblock, root_after_superblock
from jindiskd.jindisk.tree import Tree

READ_BLOCKS = 64
S_CACHE_PAGES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A commit of the journal."""

    state: State
    ordered: bool
    blocks: tuple[Block, ...] = field(repr=False)


@dataclass(slots=True, kw_only=True)
class Recovered:
    """The state chosen, and what it needs."""

    identification: Identification
    superblock: Superblock
    state: State
    commits: tuple[Commit, ...]
    """Those of the journal up to the state."""
    segments: SegmentTable
    """With the segments that these commits declare."""
    slots: tuple[str, str]
    """What each superblock slot holds, in words; for the checker."""


def read_block(device: Device, raw: int, what: str, count: int = 1) -> bytes:
    """Raw blocks of the device. Raises `VolumeDeviceFailed`."""
    try:
        return device.pread(raw * BLOCK, count * BLOCK)
    except OSError as exc:
        raise VolumeDeviceFailed(f"reading {what}", exc) from exc


def read_identification(device: Device, where: str) -> Identification:
    """The identification block, of which nothing may be believed. Raises `VolumeError`."""
    if device.size_bytes < (JOURNAL_START + 1) * BLOCK:
        raise VolumeMalformed("device", f"{where} has {device.size_bytes} bytes")
    return identification.decode(read_block(device, 0, "the identification block"), where)


def recover(device: Device, *, key: Secret, uuid: UUID | None, anchor: Anchor | Unanchored, where: str) -> Recovered:
    """Choose the state to open.

    Args:
        device: the whole device.
        key: the volume key.
        uuid: the volume expected; None takes what the identification block says.
        anchor: what the owner remembers, or the explicit `UNANCHORED`.
        where: the device's name, for messages.

    Raises:
        VolumeError: one of the classes of section 16.
    """
    header = read_identification(device, where)
    found = choose_state(device, key=key, uuid=uuid or header.uuid, anchor=anchor)
    _agree(header, found.superblock, uuid)
    found.identification = header
    return found


def choose_state(device: Device, *, key: Secret, uuid: UUID, anchor: Anchor | Unanchored) -> Recovered:
    """Steps R2 to R4, which do not need the identification block. Arguments and errors as `recover`.

    The result's `identification` is what the block should be, with an empty label.
    """
    candidates: list[tuple[Superblock, bytes]] = []
    failures: list[VolumeError] = []
    unauthentic: list[VolumeError] = []
    words = ["", ""]
    for slot in (0, 1):
        block = read_block(device, SLOT_START + slot, f"superblock slot {slot}")
        try:
            found = open_superblock(
                block, slot=slot, key=key, uuid=uuid, device_bytes=device.size_bytes
            )
        except VolumeUnauthentic as exc:
            unauthentic.append(exc)
            words[slot] = "unauthentic"
        except VolumeError as exc:
            failures.append(exc)
            words[slot] = str(exc)
        else:
            candidates.append((found, block))
            words[slot] = f"epoch {found.epoch}, sequence {found.sequence}{', closed' if found.closed else ''}"
    candidates.sort(key=lambda c: c[0].epoch, reverse=True)
    for superblock, block in candidates:
        try:
            chosen = _choose(device, superblock, block, anchor)
        except VolumeUnauthentic as exc:
            # A superblock can be whole while its pages are not; the older one counts then. What is inconsistent is an
            # error: it is never the host's work, and what was acknowledged since the older one would be lost.
            failures.append(exc)
            continue
        if chosen is not None:
            state, commits, segments = chosen
            return Recovered(
                identification=superblock.identification(""),
                superblock=superblock,
                state=state,
                commits=commits,
                segments=segments,
                slots=(words[0], words[1]),
            )
    if failures:
        raise failures[0]
    if not candidates:
        raise unauthentic[0]
    newest, block = candidates[0]
    wanted = anchor.sequence if isinstance(anchor, Anchor) else 0
    state = State(session=newest.session, sequence=newest.sequence, root=root_after_superblock(block))
    raise VolumeStale(wanted, f"sequence number {newest.sequence} and its journal", state)


def _agree(header: Identification, superblock: Superblock, uuid: UUID | None) -> None:
    """The plaintext must repeat what is sealed."""
    geometry = superblock.geometry
    pairs = (
        ("UUID", header.uuid, uuid or superblock.uuid),
        ("segment size", header.segment_bits, geometry.segment_bits),
        ("logical size", header.blocks, geometry.blocks),
        ("end", header.end, geometry.end),
        ("read-only compatible features", header.readonly_compatible, superblock.readonly_compatible),
        ("compatible features", header.compatible, superblock.compatible),
    )
    for name, plain, sealed in pairs:
        if plain != sealed:
            raise VolumeMalformed("identification block", f"its {name} {plain} differs from the sealed {sealed}")


def _choose(
    device: Device, superblock: Superblock, block: bytes, anchor: Anchor | Unanchored
) -> tuple[State, tuple[Commit, ...], SegmentTable] | None:
    """Steps R3 a to d for one candidate; None if it has no acceptable state."""
    root = root_after_superblock(block)
    first = State(session=superblock.session, sequence=superblock.sequence, root=root)
    chain = [] if superblock.closed else list(_commits(device, superblock, root))
    dangling = bool(chain) and isinstance(chain[-1], _Dangling)
    commits = [commit for commit in chain if isinstance(commit, Commit)]

    def accepted(state: State) -> bool:
        return not isinstance(anchor, Anchor) or anchor.accepts(state)

    if not accepted(first) and not any(accepted(commit.state) for commit in commits):
        return None
    geometry = superblock.geometry
    tree = Tree(device, geometry, Kind.S, superblock.tops[Kind.S], cache_pages=S_CACHE_PAGES)
    segments = SegmentTable(geometry, tree, sequence=superblock.sequence, mapped=superblock.mapped)
    declared = _declare(commits, segments, geometry)
    if commits and not commits[-1].ordered and not dangling:
        segments.taken = declared
        if not _arrived(device, commits[-1], segments, geometry):
            commits.pop()
    while commits and not accepted(commits[-1].state):
        commits.pop()
    state = commits[-1].state if commits else first
    if not accepted(state):
        return None
    segments.taken = _declare(commits, segments, geometry)
    return state, tuple(commits), segments


def _declare(commits: list[Commit], segments: SegmentTable, geometry: Geometry) -> dict[int, Taken]:
    """The segments that commits declare, after checking that every MAP points into one declared or in use."""
    declared: dict[int, Taken] = {}
    for commit in commits:
        for block in commit.blocks:
            for entry in block.entries:
                if isinstance(entry, Segment):
                    declared[entry.segment] = Taken(entry.key, commit.state.sequence)
                elif isinstance(entry, Map):
                    segment = geometry.segment_of(entry.raw)
                    if segment not in declared and not segments.in_use(segment):
                        what = f"commit {commit.state.sequence} of the journal"
                        raise VolumeInconsistent(what, f"it maps a block into segment {segment}, which is not in use")
    return declared


def _arrived(device: Device, commit: Commit, segments: SegmentTable, geometry: Geometry) -> bool:
    """Whether every data block that a commit maps opens: its data had arrived when the machine stopped."""
    for block in commit.blocks:
        for entry in block.entries:
            if isinstance(entry, Map):
                sealed = read_block(device, entry.raw, "the last commit's data") + entry.tag
                key = segments.opening_key(geometry.segment_of(entry.raw))
                if key.opens(block_nonce(entry.raw), sealed, data_aad(entry.lba)) is None:
                    return False
    return True


class _Dangling:
    """A block of a commit without its last block opened: the commit before it was durable."""


def _commits(device: Device, superblock: Superblock, root: bytes) -> Iterator[Commit | _Dangling]:
    """The commits of a superblock's journal, in order; at the end `_Dangling` if an unfinished commit follows."""
    sequence, blocks = superblock.sequence + 1, []
    for index, plain, root_after in _journal(device, superblock, root):
        block = decode(plain, epoch=superblock.epoch, index=index, geometry=superblock.geometry)
        what = f"journal block {index} (raw block {JOURNAL_START + index})"
        if block.sequence != sequence:
            raise VolumeInconsistent(what, f"it has sequence number {block.sequence}, {sequence} is due")
        blocks.append(block)
        if block.last:
            maps = sum(isinstance(entry, Map) for b in blocks for entry in b.entries)
            if not any(b.entries for b in blocks) or (maps > UNORDERED_MAPS and not block.ordered):
                raise VolumeInconsistent(what, "it ends an empty commit, or a large one that is not ordered")
            state = State(session=superblock.session, sequence=sequence, root=root_after)
            yield Commit(state=state, ordered=block.ordered, blocks=tuple(blocks))
            sequence, blocks = sequence + 1, []
    if blocks:
        yield _Dangling()


def _journal(device: Device, superblock: Superblock, root: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Index, plaintext and state root of each journal block up to the first that does not open."""
    key = OpeningKey(superblock.journal_key)
    size = superblock.geometry.journal_blocks
    for start in range(0, size, READ_BLOCKS):
        count = min(READ_BLOCKS, size - start)
        data = read_block(device, JOURNAL_START + start, "the journal", count)
        for index in range(start, start + count):
            sealed = data[(index - start) * BLOCK : (index - start + 1) * BLOCK]
            plain = key.opens(block_nonce(index), sealed, journal_aad(superblock.epoch, index, root))
            if plain is None:
                return
            root = hashlib.sha256(root + sealed).digest()
            yield index, plain, root
