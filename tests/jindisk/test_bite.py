"""Faults put into the engine on purpose: each must be noticed by the tests that are there to notice it (section 22)."""

import random
from collections.abc import Callable, Iterable

import pytest
from jd import Audit, World, content, world
from jd_crash import RecordingDevice, Run, crashes, verify

from jindiskd.base import anchor
from jindiskd.jindisk import appender, checkpoint, recovery, segments, session, slots
from jindiskd.jindisk.crypto import SealingKey
from jindiskd.jindisk.errors import VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.runs import SealingRun

NOTICED = (AssertionError, VolumeUnauthentic, VolumeInconsistent)


def enumerate_crashes(seed: int = 5) -> None:
    """What `test_crash` asserts, with some seed."""
    recorded = Run(seed=seed).record(120)
    rng = random.Random(seed)
    for crash in crashes(recorded, rng, share=1.0, subsets=3, exhaustive=False):
        verify(recorded, crash, rng, onward=False)


def committed_into_hollow_segment() -> tuple[World, dict[int, bytes]]:
    """A segment is being filled at a checkpoint, none of it live; then a commit goes into it, and the machine stops."""
    here = world()
    here.create(None).close()
    running = here.begin()
    running.write(0, content(1))
    running.flush()
    running.discard(0, BLOCK)
    running.checkpoint()
    (segment,) = running.appender.filling
    assert running.volume.segments.live[segment] == 0
    running.write(5 * BLOCK, content(2))
    running.flush()
    raw = int.from_bytes(running.volume.entry(5)[:8], "little")
    assert running.volume.geometry.segment_of(raw) == segment
    return here, {5: content(2)}


def directed() -> None:
    """Section 12, R5: after the stop that segment is not free."""
    here, expected = committed_into_hollow_segment()
    again, many = here.begin(), content(3) * 64
    for _ in range(4):  # so that every free segment is taken
        for lba in range(64, 4096, 64):
            again.write(lba * BLOCK, many)
        again.flush()
        for lba, block in expected.items():
            assert again.read(lba * BLOCK, BLOCK) == block


def test_a_hollow_segment_that_was_committed_into_is_kept() -> None:
    directed()


def continue_last_segment(patch: pytest.MonkeyPatch) -> None:
    begin = appender.Appender.__init__

    def mutated(self: appender.Appender, volume: object, generator: object, *, ordered: bool) -> None:
        begin(self, volume, generator, ordered=ordered)
        table, geometry = volume.segments, volume.geometry
        used = [s for s in range(geometry.segments) if 0 < table.live[s] < geometry.segment_blocks]
        if used:
            key = SealingKey.take_over(table.key(used[-1]))
            start, room = geometry.segment_start(used[-1]), geometry.segment_blocks - table.live[used[-1]]
            self._streams["guest"].begin(used[-1], start + table.live[used[-1]], room, key)

    patch.setattr(appender.Appender, "__init__", mutated)


def test_continuing_a_segment_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """K1: the key of a segment found on the disk seals."""
    audit = Audit()
    audit.install(monkeypatch)
    continue_last_segment(monkeypatch)
    here = world(audit=audit)
    running = here.create()
    running.write(0, content(1))
    running.close()
    running = here.begin()
    running.write(BLOCK, content(2))
    running.close()
    with pytest.raises(AssertionError, match="had not drawn"):
        audit.verify()


def test_a_nonce_that_comes_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write is sealed anew for the same raw block."""
    audit = Audit()
    audit.install(monkeypatch)
    seal = segments.Stream.seal

    def mutated(self: segments.Stream, items: list[tuple[int, bytes]], room: SealingRun) -> int:
        place = self.next
        seal(self, items, room)
        self.next = place
        return seal(self, items, room)

    monkeypatch.setattr(segments.Stream, "seal", mutated)
    running = world(audit=audit).create()
    running.write(0, content(1))
    running.flush()
    with pytest.raises(AssertionError, match="came twice"):
        audit.verify()


def skip_tail(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "_arrived", lambda *_: True)


def reuse_slots_early(patch: pytest.MonkeyPatch) -> None:
    def retire(self: slots.Slots, raw: int) -> None:
        self._used[raw - self._start] = 0
        self.free += 1

    patch.setattr(slots.Slots, "retire", retire)


def many_checkpoints() -> None:
    """Checkpoints of few pages each, among pages of all ages: slots are taken in rotation."""
    here, rng = world(), random.Random(1)
    session = here.create()
    for lba in range(0, 4096, 170):
        session.write(lba * BLOCK, content(lba))
    session.close()
    here = here.fork(RecordingDevice(here.device.size_bytes, here.device.blocks))
    session = here.begin()
    here.device.session = session
    for _ in range(150):
        session.write(rng.randrange(4096) * BLOCK, content(rng.randrange(100)))
        session.checkpoint()


def test_reusing_page_slots_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """W1 in the device fails if a replaced page's slot is free before the superblock that drops it is durable."""
    many_checkpoints()
    reuse_slots_early(monkeypatch)
    with pytest.raises(AssertionError, match="W1"):
        many_checkpoints()


def reuse_segments_early(patch: pytest.MonkeyPatch) -> None:
    merge = checkpoint.merge

    def mutated(running: session.Session, *, closing: bool) -> tuple[list[int], bytes, object]:
        freed, sealed, journal = merge(running, closing=closing)
        running.appender.free.add(freed)
        # Handed out first, so that a write during the barriers gets one.
        running.appender.free._choose = lambda count: count - 1
        running.appender.end_streams()
        return [], sealed, journal

    patch.setattr(checkpoint, "merge", mutated)


def acknowledge_early(patch: pytest.MonkeyPatch) -> None:
    write = session.Session._write_commit

    def mutated(self: session.Session, log: object) -> None:
        device = self.volume.device
        flush, device.flush = device.flush, lambda: None
        try:
            write(self, log)
        finally:
            device.flush = flush

    patch.setattr(session.Session, "_write_commit", mutated)


def superblock_before_pages(patch: pytest.MonkeyPatch) -> None:
    commit = checkpoint.commit

    def mutated(running: session.Session, sealed: bytes) -> None:
        device = running.volume.device
        flush, device.flush = device.flush, lambda: setattr(device, "flush", flush)
        commit(running, sealed)

    patch.setattr(checkpoint, "commit", mutated)


def forget_a_commit_entry(patch: pytest.MonkeyPatch) -> None:
    log = appender.EntryLog.map_all

    def mutated(self: appender.EntryLog, entries: list[tuple[int, bytes]]) -> None:
        log(self, [(lba, entry) for lba, entry in entries if lba % 50])

    patch.setattr(appender.EntryLog, "map_all", mutated)


Mutation = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: list[Mutation] = [
    skip_tail,
    reuse_segments_early,
    acknowledge_early,
    superblock_before_pages,
    forget_a_commit_entry,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_crash_enumeration_bites(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fault, some image does not recover to an acknowledged state, or W1 is broken."""
    mutation(monkeypatch)
    with pytest.raises(NOTICED):
        enumerate_crashes()


def test_freeing_what_the_journal_names_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directed test fails if R5 forgets the journal."""
    free = segments.SegmentTable.free_segments

    def mutated(self: segments.SegmentTable, _named: Iterable[int]) -> list[int]:
        return free(self, ())

    monkeypatch.setattr(segments.SegmentTable, "free_segments", mutated)
    with pytest.raises(NOTICED):
        directed()


def test_accepting_another_session_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of freshness fails if a greater sequence number is enough."""
    from .test_freshness import verify_every_pair

    def accepts(self: anchor.Anchor, state: anchor.State) -> bool:
        same = (state.sequence, state.root) == (self.sequence, self.root)
        return same or (self.open and state.sequence > self.sequence)

    verify_every_pair()
    monkeypatch.setattr(anchor.Anchor, "accepts", accepts)
    with pytest.raises(AssertionError):
        verify_every_pair()
