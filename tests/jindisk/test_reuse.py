"""Segments that are given back and taken again, and what comes in while a barrier lasts."""

import pytest
from jd import MemoryDevice, World, content, world
from test_room import TIGHT, scattered

from jindiskd.jindisk.anchor import Reporting
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.errors import VolumeUnauthentic
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.session import Session


class Hooked(MemoryDevice):
    """Does something before the next read of a raw block, or during the next barrier."""

    def __init__(self, size_bytes: int, blocks: dict[int, bytes]) -> None:
        super().__init__(size_bytes, blocks)
        self.before_read: dict[int, object] = {}
        self.meanwhile: list[object] = []

    def pread(self, offset: int, length: int) -> bytes:
        for raw in range(offset // BLOCK, (offset + length) // BLOCK):
            if raw in self.before_read:
                self.before_read.pop(raw)()
        return super().pread(offset, length)

    def flush(self) -> None:
        if self.meanwhile:
            self.meanwhile.pop()()


def hooked() -> tuple[World, Hooked, Session]:
    here = world()
    here.create().close()
    here.device = device = Hooked(here.device.size_bytes, here.device.blocks)
    return here, device, here.begin()


def place(session: Session, lba: int) -> int:
    return int.from_bytes(session.volume.entry(lba)[:8], "little")


def take_next(session: Session, segment: int) -> None:
    """The next segment that is taken is this one, if it is free."""
    session.appender.end_streams()
    session.appender.free._choose = lambda count: count - 1
    session.appender.free._list.sort(key=lambda other: other == segment)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_block_that_moves_while_it_is_read_is_read_where_it_is_now(blocks: int) -> None:
    """It was looked up, then its segment was given back and filled with other things: no error, and the latest."""
    _, device, session = hooked()
    for lba in range(blocks):
        session.write(lba * BLOCK, content(lba))
    session.checkpoint()
    raw = place(session, 0)
    segment = session.volume.geometry.segment_of(raw)
    session.appender.end_streams()
    assert session.read(0, BLOCK) == content(0)  # its key is held ready now

    def meanwhile() -> None:
        for lba in range(blocks):
            session.write(lba * BLOCK, content(100 + lba))
        session.checkpoint()
        assert segment in session.appender.free
        take_next(session, segment)
        for lba in range(64):
            session.write((500 + lba) * BLOCK, content(200 + lba))
        session.flush()
        assert session.volume.geometry.segment_of(place(session, 500)) == segment

    device.before_read[raw] = meanwhile
    assert session.read(0, blocks * BLOCK) == b"".join(content(100 + lba) for lba in range(blocks))
    assert not device.before_read
    assert session.read(500 * BLOCK, BLOCK) == content(200), "under the key of old"
    # Damage is no move.
    device.blocks[place(session, 0)] = bytes(BLOCK)
    with pytest.raises(VolumeUnauthentic):
        session.read(0, blocks * BLOCK)


@pytest.mark.parametrize("how", ["commit", "large commit", "checkpoint"])
def test_what_is_written_during_a_barrier_is_not_acknowledged_with_it(how: str) -> None:
    """The next flush commits it."""
    here, device, session = hooked()
    for lba in range(300 if how == "large commit" else 1):
        session.write(lba * BLOCK, content(lba))
    device.meanwhile = [lambda: session.write(4000 * BLOCK, content(7))]
    (session.checkpoint if how == "checkpoint" else session.flush)()
    assert not device.meanwhile
    before = session.durable
    session.flush()
    assert session.durable != before
    assert here.fork().begin().read(4000 * BLOCK, BLOCK) == content(7)


def hollow() -> tuple[World, int]:
    """A volume with a segment that was being filled at the last checkpoint, with nothing live in it."""
    here = world()
    session = here.create()
    session.write(0, content(1))
    session.flush()
    session.discard(0, BLOCK)
    session.checkpoint()
    (segment,) = session.appender.filling
    return here, segment


def test_a_hollow_segment_is_forgotten_by_the_next_checkpoint_that_changes_anything() -> None:
    """Its key goes, and it is free once."""
    here, segment = hollow()
    session = here.begin()
    table = session.volume.segments
    assert table.stamps[segment]
    assert segment in session.appender.free
    free = len(session.appender.free)
    take_next(session, -1)
    session.write(BLOCK, content(2))
    session.checkpoint()
    assert not table.stamps[segment]
    assert bytes(table._pages[segment // 85][segment % 85 * 48 :][:48]) == bytes(48)
    assert len(session.appender.free) == free - 1
    assert len(set(session.appender.free._list)) == len(session.appender.free._list), "free twice"


def test_a_hollow_segment_may_be_taken_at_once() -> None:
    """Under another key, and nobody else takes it meanwhile."""
    here, segment = hollow()
    session = here.begin()
    take_next(session, segment)
    session.write(BLOCK, content(2))
    session.flush()
    assert session.volume.geometry.segment_of(place(session, 1)) == segment
    assert here.fork().begin().read(BLOCK, BLOCK) == content(2)
    session.checkpoint()
    assert segment not in session.appender.free
    assert session.read(BLOCK, BLOCK) == content(2)
    session.discard(BLOCK, BLOCK)
    session.appender.end_streams()
    session.checkpoint()
    assert segment in session.appender.free
    assert len(set(session.appender.free._list)) == len(session.appender.free._list), "free twice"
    session.close()
    assert not check_volume(here.open(), data=True).faults


def test_cleaning_ends_where_only_hollow_segments_are_left() -> None:
    """They are free already: nothing is gained by emptying them."""
    here, _ = hollow()
    session = here.begin()
    rounds = 0
    checkpoint = session.checkpoint

    def counted() -> None:
        nonlocal rounds
        rounds += 1
        assert rounds < 10
        checkpoint()

    session.checkpoint = counted  # type: ignore[method-assign]  # this session's alone
    session.cleaner.clean(len(session.appender.free) + 1)


def test_cleaning_leaves_page_slots_for_its_checkpoint() -> None:
    """Each block that moves changes pages of F and S: where slots are few, fewer segments are emptied at a time."""
    here, session = scattered(45)
    live = session.volume.superblock.mapped
    session.cleaner.clean(TIGHT.segments)
    assert session.fenced is None
    session.close()
    assert here.open().superblock.mapped == live
    assert not check_volume(here.open(), data=True).faults


def test_the_first_state_of_a_session_is_told_before_anything_is_acknowledged() -> None:
    """With reports of each commit: after `begin` the state that was found is not accepted any more."""
    here = world()
    here.create().close()
    session = here.begin(reporting=Reporting.COMMIT)
    assert here.broker.anchor is not None
    assert here.broker.anchor.sequence == session.durable.sequence


def test_a_session_that_is_closed_fills_no_segment_further() -> None:
    """The closing checkpoint keeps none in use for itself that holds nothing."""
    here, _ = hollow()
    session = here.begin()
    session.write(0, content(1))
    session.flush()
    session.discard(0, BLOCK)
    session.close()
    table = here.open().segments
    assert not any(table.stamps)
    assert here.open().superblock.oldest_stamp == 0
