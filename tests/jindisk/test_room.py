"""Page slots: a change is taken only if the next checkpoint has room for all that it touches (section 14.4)."""

from types import SimpleNamespace

import pytest
from jd import World, content, world

from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.geometry import BLOCK, PER_LEAF, Geometry, Kind, default_geometry
from jindiskd.jindisk.room import Room
from jindiskd.jindisk.session import Session

LEAF = PER_LEAF[Kind.F]
PLAIN = Geometry(blocks=1 << 18, segment_bits=6, segments=4320, journal_blocks=64, meta_slots=0)
TIGHT = Geometry(blocks=1 << 18, segment_bits=6, segments=4320, journal_blocks=64, meta_slots=PLAIN.pages + 64)
"""As few page slots as may be, as beyond 20 TiB by default."""
S_LEAVES = TIGHT.levels[Kind.S][0]
STEP = 15 * LEAF
HALF = S_LEAVES * STEP


def scattered(free: int) -> tuple[World, Session]:
    """Two blocks mapped in segments of every page of S, one in each half; so many page slots are free."""
    here = world(TIGHT)
    session = here.create(TIGHT)
    session.appender.free._choose = lambda count: count - 1
    for number in range(2 * S_LEAVES):
        session.appender.free._list.sort(key=lambda s, n=number: s // 85 == n % S_LEAVES)
        session.write(number * STEP * BLOCK, content(number))
        session.flush()
        session.appender.end_streams()
    session.close()
    session = here.begin()
    slots = session.room.slots
    while slots.free > free:
        slots.take()
    return here, session


@pytest.mark.parametrize(("free", "before", "unaligned"), [(45, 0, 0), (45, 6, 100), (64, 25, 0)])
def test_trimming_much_fits(free: int, before: int, unaligned: int) -> None:
    """Though every page of S changes: with changes before it, and none. The session goes on, and closes."""
    here, session = scattered(free)
    assert S_LEAVES > 48
    written = [7 + 30 * LEAF * n for n in range(before)]
    for lba in written:
        session.write(lba * BLOCK, content(lba))
    session.zero(unaligned, HALF * BLOCK - unaligned)
    session.flush()
    assert session.fenced is None
    assert session.read(0, BLOCK) == content(0)[:unaligned].ljust(BLOCK, b"\0")
    for lba in [STEP * n for n in range(1, S_LEAVES)] + written:
        assert session.read(lba * BLOCK, BLOCK) == bytes(BLOCK)
    session.write(5 * BLOCK, content(5))
    session.close()
    volume = here.open()
    assert volume.read(5 * BLOCK, BLOCK) == content(5)
    assert volume.superblock.mapped == S_LEAVES + 1 + bool(unaligned)
    assert all(volume.read(n * STEP * BLOCK, BLOCK) == content(n) for n in range(S_LEAVES, 2 * S_LEAVES))
    assert not check_volume(volume, data=True).faults


def test_the_largest_volumes_alone_are_trimmed_in_pieces() -> None:
    """By their default geometry."""

    def at_once(blocks: int) -> int:
        return Room(SimpleNamespace(geometry=default_geometry(blocks)), SimpleNamespace()).zeroed_at_once

    for blocks in (4096, 1 << 24, 1 << 32):
        assert at_once(blocks) == blocks
    assert 10_000 < at_once(1 << 34) < 1 << 16
