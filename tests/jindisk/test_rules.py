"""Rules for writers that no crash is likely to show broken: what is written in which order, and what it says."""

from collections.abc import Iterator

import pytest
from jd import KEY, MemoryDevice, World, content, world

from jindiskd.base.secret import Secret
from jindiskd.jindisk.geometry import BLOCK, JOURNAL_START
from jindiskd.jindisk.journal import LAST, ORDERED, UNORDERED_MAPS
from jindiskd.jindisk.recovery import recover
from jindiskd.jindisk.session import Session
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
