"""Rules for writers that no crash is likely to show broken: what is written in which order, and what it says."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from jd import KEY, MemoryDevice, World, content, small_geometry, world

from jindiskd.base.anchor import Anchor, State
from jindiskd.base.secret import Secret
from jindiskd.jindisk import room
from jindiskd.jindisk import session as session_module
from jindiskd.jindisk.errors import VolumeFenced
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START, Geometry, Kind, default_geometry
from jindiskd.jindisk.journal import LAST, ORDERED, UNORDERED_MAPS
from jindiskd.jindisk.recovery import recover
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.slots import Slots
from jindiskd.jindisk.superblock import Superblock, open_superblock, root_after_superblock


class Logging(MemoryDevice):
    """Tells in which regions was written, in order, neighbours together, and where barriers are."""

    def __init__(self, size_bytes: int, blocks: dict[int, bytes]) -> None:
        super().__init__(size_bytes, blocks)
        self.events: list[str] = []
        self.geometry = None

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().pwrite(offset, data)
        raw, shape = offset // BLOCK, self.geometry
        assert shape is not None
        where = "data" if raw >= shape.data_start else "pages" if raw >= shape.meta_start else "journal"
        where = where if raw >= JOURNAL_START else f"superblock {raw - 1}" if raw else "identification"
        if self.events[-1:] != [where]:
            self.events.append(where)

    def flush(self) -> None:
        self.events.append("barrier")


def logging() -> tuple[World, Logging, Session]:
    here = world()
    here.create().close()
    device = Logging(here.device.size_bytes, here.device.blocks)
    device.geometry = here.open().geometry
    here.device = device
    session = here.begin()
    device.events.clear()
    return here, device, session


@pytest.mark.parametrize("blocks", [1, UNORDERED_MAPS, UNORDERED_MAPS + 1, 600])
def test_a_large_commit_has_its_data_down_before_it_is_written(blocks: int) -> None:
    """Section 11.1: one barrier up to 256 blocks, two and ORDERED above; LAST in the last block alone."""
    here, device, session = logging()
    for lba in range(blocks):
        session.write(lba * BLOCK, content(lba))
    session.flush()
    large = blocks > UNORDERED_MAPS
    assert device.events == ["data", *(["barrier"] if large else []), "journal", "barrier"]
    found = recover(device, key=Secret(KEY), uuid=None, anchor=here.broker.anchor, where="it")
    (commit,) = found.commits
    assert commit.ordered == large
    assert [block.last for block in commit.blocks] == [False] * (len(commit.blocks) - 1) + [True]
    assert (LAST, ORDERED) == (1, 2)
    device.events.clear()
    session.flush()
    assert device.events == [], "nothing new: no commit, no barrier"


def superblocks(device: MemoryDevice) -> Iterator[tuple[Superblock, bytes]]:
    for slot in (0, 1):
        block = device.pread((1 + slot) * BLOCK, BLOCK)
        yield open_superblock(
            block, slot=slot, key=Secret(KEY), uuid=world().uuid, device_bytes=device.size_bytes
        ), root_after_superblock(block)


def test_checkpoints_have_barriers_on_both_sides_of_the_superblock() -> None:
    """Section 11.2: slots in turn; the journal begins anew behind it; each names the state it was made from."""
    _, device, session = logging()
    for number in range(4):
        before, epoch, sequence = session.durable, session.epoch, session.sequence
        session.write(number * BLOCK, content(number))
        if number % 2:
            session.flush()
            before, sequence = session.durable, session.sequence
            device.events.clear()
        session.checkpoint()
        slot = (epoch + 1) % 2
        data = [] if number % 2 else ["data"]
        assert device.events == [*data, "pages", "barrier", f"superblock {slot}", "barrier"]
        newest, root = max(superblocks(device), key=lambda found: found[0].epoch)
        assert (newest.epoch, newest.sequence, newest.slot) == (epoch + 1, sequence + 1, slot)
        assert newest.previous_root == before.root
        assert (session.durable.sequence, session.durable.root) == (sequence + 1, root)
        assert session.journal is not None
        assert (session.journal.index, session.journal.root) == (0, root)
        device.events.clear()
    keys = {found.journal_key for found, _ in superblocks(device)}
    assert len(keys) == 2


def test_a_segment_is_stamped_by_the_commit_that_first_named_it() -> None:
    """Section 8: the journal's, or the checkpoint's where that was first; recovery knows it too."""
    here, _, session = logging()
    segments = session.volume.segments

    def filled(lba: int) -> int:
        return session.volume.geometry.segment_of(int.from_bytes(session.volume.entry(lba)[:8], "little"))

    session.write(0, content(1))
    session.flush()
    first, named = filled(0), session.sequence
    session.write(BLOCK, content(2))
    session.flush()
    assert here.fork().open().segments.taken[first].stamp == named
    recovered = here.fork().begin()
    assert recovered.volume.segments.stamps[first] == named
    session.checkpoint()
    assert segments.stamps[first] == named
    assert session.volume.superblock.oldest_stamp == named
    for lba in range(64):
        session.write(lba * BLOCK, content(lba + 9))
    session.checkpoint()
    second = filled(63)
    assert second != first
    assert segments.stamps[second] == session.sequence
    session.write(63 * BLOCK, content(7))
    session.checkpoint()
    assert segments.stamps[second] == session.sequence - 1, "it is filled on"
    assert min(stamp for stamp in segments.stamps if stamp) == session.volume.superblock.oldest_stamp


@pytest.mark.parametrize(
    ("still_open", "same_session", "numbers", "same_root", "accepted"),
    [
        (False, True, (5, 5), True, True),
        (False, False, (5, 5), True, True),  # the session is not what names a state
        (False, True, (5, 6), False, False),  # closed: exactly one
        (False, True, (5, 5), False, False),
        (True, False, (5, 5), True, True),
        (True, True, (5, 6), False, True),
        (True, True, (5, 5), False, False),
        (True, True, (5, 4), False, False),
        (True, False, (5, 6), False, False),
        (True, True, (5, 4), True, False),
    ],
)
def test_what_an_anchor_accepts(
    still_open: bool, same_session: bool, numbers: tuple[int, int], same_root: bool, accepted: bool
) -> None:
    """Section 13.3, case by case; also those that no disk has, since nobody writes after closing."""
    anchor = Anchor(open=still_open, session=b"s" * 32, sequence=numbers[0], root=b"r" * 32)
    session = b"s" * 32 if same_session else b"o" * 32
    state = State(session=session, sequence=numbers[1], root=b"r" * 32 if same_root else b"q" * 32)
    assert anchor.accepts(state) is accepted


def test_geometry_at_its_limits() -> None:
    """Section 4, requirement by requirement: the last value that is allowed, and the first that is not."""
    good = small_geometry()
    least = good.pages + 64

    def fault(**changes: int) -> str | None:
        return replace(good, **changes).fault()

    def sized(bits: int, blocks: int = 4096, spare: int = 8) -> str | None:
        segments = -(-blocks // (1 << bits)) + spare
        shape = Geometry(blocks=blocks, segment_bits=bits, segments=segments, journal_blocks=16, meta_slots=0)
        return replace(shape, meta_slots=shape.pages + 64).fault()

    assert fault() is None
    assert (fault(journal_blocks=16), fault(journal_blocks=65536)) == (None, None)
    assert "journal" in (fault(journal_blocks=15) or "")
    assert "journal" in (fault(journal_blocks=65537) or "")
    assert fault(meta_slots=least) is None
    assert "page slots" in (fault(meta_slots=least - 1) or "")
    assert [bits for bits in range(15) if sized(bits) is None] == [6, 7, 8, 9, 10, 11, 12]
    assert "segments" in (sized(6, spare=7) or "")
    assert "logical blocks" in (sized(6, blocks=4095) or "")
    assert sized(12, blocks=1 << 36) is None
    assert "logical blocks" in (sized(12, blocks=(1 << 36) + 1) or "")
    huge = default_geometry(1 << 36)
    assert huge.fault() is None
    most = (1 << 40) - 1 - huge.data_start >> huge.segment_bits
    shapes = [replace(huge, segments=most + more, meta_slots=huge.meta_slots) for more in (0, 1)]
    grown = [replace(shape, meta_slots=shape.pages + 64) for shape in shapes]
    limits = [shape.end < 1 << 40 for shape in grown]
    assert [shape.fault() is None for shape in grown] == limits
    assert "limit" in (replace(grown[1], segments=most + 4096, meta_slots=1 << 33).fault() or "")


def test_page_slots_are_taken_in_rotation() -> None:
    """Section 14.4: so that writes spread; one that was given back comes again after all others."""
    shape = small_geometry()
    slots = Slots(shape)
    first = [slots.take() for _ in range(3)]
    for raw in first:
        slots.retire(raw)
    assert slots.free == shape.meta_slots - 3, "not before the superblock that drops them is durable"
    slots.release_retired()
    assert slots.free == shape.meta_slots
    rest = [slots.take() for _ in range(shape.meta_slots)]
    assert rest[: shape.meta_slots - 3] == list(range(shape.meta_start + 3, shape.meta_end))
    assert rest[-3:] == first
    assert slots.free == 0


def epochs(running: Session) -> int:
    """How many checkpoints 40 flushed writes made."""
    before = running.epoch
    for lba in range(40):
        running.write(lba * 170 * BLOCK % running.size_bytes, content(lba))
        running.flush()
    return running.epoch - before


def test_a_checkpoint_comes_when_memory_or_page_slots_get_scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 11.2: many changes at a flush, or at any time; four fifths of the free slots at a flush."""
    big = default_geometry(1 << 18)
    running = world(big).create(big)
    assert epochs(running) == 0
    monkeypatch.setattr(session_module, "MEMTABLE_AT_FLUSH", 9)
    assert epochs(running) == 4
    monkeypatch.undo()
    running.checkpoint()
    monkeypatch.setattr(room, "MEMTABLE_LIMIT", 10)
    assert epochs(running) == 3
    monkeypatch.undo()
    running.checkpoint()
    slots = running.room.slots
    for share, made in ((2.0, 0), (1.1, 1)):
        running.checkpoint()
        before = running.epoch
        for lba in range(20):
            running.write(lba * 170 * BLOCK, content(lba))
        while slots.free > running.room._page_estimate(0) * share:
            slots.take()
        running.flush()
        assert running.epoch == before + made, "what may not fit must not get into the journal"


def test_a_lease_counts_from_when_the_message_was_sent() -> None:
    """The broker reckons from when it answered, which is later: so the process ends first."""
    now = [0.0]
    here = world()
    here.create().close()
    running = here.begin(monotonic=lambda: now[0], interval_s=10.0, lease_s=100.0)
    report = here.broker.report

    def slow(state: State) -> None:
        now[0] += 50.0
        report(state)

    here.broker.report = slow  # type: ignore[method-assign]  # this broker's alone
    now[0] = 20.0
    running.tick()
    assert now[0] == 70.0
    now[0] = 119.0
    running.reporter.check()
    now[0] = 121.0
    with pytest.raises(VolumeFenced, match="lease"):
        running.reporter.check()


def test_segments_differ_in_size_as_pages_of_r_do() -> None:
    """What the estimate of page slots stands on: a segment lies in so many leaves of R."""
    for bits in (6, 9, 12):
        shape = replace(small_geometry(), segment_bits=bits)
        assert shape.levels[Kind.R][0] == -(-shape.segments * (1 << bits) // 512)
