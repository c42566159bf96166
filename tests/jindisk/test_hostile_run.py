"""A host that goes on changing the disk while the volume is used, stopped, and opened again, while it still opens."""

import random
from collections.abc import Callable

import pytest
from jd import ZERO, Audit, MemoryDevice, World, content, small_geometry, world

from jindiskd.jindisk.errors import VolumeError
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.jindisk.journal import EntryLog
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.tree import PageCache

BLOCKS = 4096
Contents = dict[int, bytes]


class Remembering(MemoryDevice):
    """Keeps every version of every block, as a host may."""

    def __init__(self, size_bytes: int, blocks: dict[int, bytes] | None = None) -> None:
        super().__init__(size_bytes, blocks)
        self.versions: dict[int, list[bytes]] = {}

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().pwrite(offset, data)
        for raw in range(offset // BLOCK, (offset + len(data)) // BLOCK):
            self.versions.setdefault(raw, []).append(self.blocks[raw])

    def attack(self, rng: random.Random) -> None:
        """Replay, swap, copy, flip or wipe one of the blocks that were ever written."""
        raws = sorted(self.versions)
        low = [raw for raw in raws if raw < small_geometry().data_start]
        raw = rng.choice(low if rng.random() < 0.6 else raws)
        other = rng.choice(raws)
        here, there = self.blocks.get(raw, ZERO), self.blocks.get(other, ZERO)
        match rng.randrange(6):
            case 0 | 1:
                self.blocks[raw] = rng.choice(self.versions[raw])
            case 2:
                self.blocks[raw], self.blocks[other] = there, here
            case 3:
                self.blocks[raw] = rng.choice(self.versions[other])
            case 4:
                at = rng.randrange(BLOCK)
                self.blocks[raw] = here[:at] + bytes([here[at] ^ 1 << rng.randrange(8)]) + here[at + 1 :]
            case _:
                self.blocks[raw] = ZERO


class Run:
    """Requests and attacks in turn; every read is right or fails."""

    def __init__(self, seed: int, audit: Audit) -> None:
        self.random = random.Random(seed)
        here = world(seed=seed, audit=audit)
        self.world: World = here.fork(Remembering(here.device.size_bytes))
        self.now: Contents = {}
        self.committed: dict[tuple[int, bytes], Contents] = {}
        self.right = self.failed = self.opened = self.number = 0
        self.session: Session = self.world.create()
        self.watch()

    def watch(self) -> None:
        """Note what the volume holds at every commit; requests are noted in `now` when they are accepted."""
        session = self.session
        checkpoint, write_commit = session.checkpoint, session._write_commit

        def watched_checkpoint(*, closing: bool = False) -> None:
            checkpoint(closing=closing)
            self.note()

        def watched_commit(log: EntryLog) -> None:
            write_commit(log)
            self.note()

        session.checkpoint, session._write_commit = watched_checkpoint, watched_commit
        self.note()

    def note(self) -> None:
        durable = self.session.durable
        self.committed.setdefault((durable.sequence, durable.root), dict(self.now))

    def read(self, lba: int, count: int) -> None:
        try:
            found = self.session.read(lba * BLOCK, count * BLOCK)
        except VolumeError:
            self.failed += 1
            return
        expected = b"".join(self.now.get(n, ZERO) for n in range(lba, lba + count))
        assert found == expected, "content that is not the latest"
        self.right += 1

    def change(self) -> None:
        count = self.random.choice((1, 1, 3, 20))
        lba = self.random.choice((self.random.randrange(300), self.random.randrange(BLOCKS - 20)))
        after = dict(self.now)
        if self.random.random() < 0.85:
            blocks = []
            for at in range(lba, lba + count):
                self.number += 1
                after[at] = content(self.number)
                blocks.append(after[at])
            self.session.write(lba * BLOCK, b"".join(blocks))
        else:
            for at in range(lba, lba + count):
                after.pop(at, None)
            self.session.discard(lba * BLOCK, count * BLOCK)
        self.now = after

    def step(self) -> None:
        choice = self.random.random()
        if choice < 0.25:
            self.read(self.random.randrange(300), self.random.choice((1, 4)))
        elif choice < 0.65:
            self.change()
        elif choice < 0.85:
            self.session.flush()
        elif choice < 0.93:
            self.session.checkpoint()
        elif choice < 0.96:
            self.session.checkpoint()
            self.session.cleaner.clean(len(self.session.appender.free) + 1)
        else:
            self.session.reporter.report(self.session.durable)

    def reopen(self) -> bool:
        """Stop, be opened again if the disk allows; whether it does."""
        anchor = self.world.broker.anchor
        assert anchor is not None
        try:
            volume = self.world.open()
            state = (volume.state.sequence, volume.state.root)
            assert state in self.committed, "a state that was never committed"
            assert volume.state.sequence >= anchor.sequence, "older than what was reported"
            self.session = self.world.begin()
        except VolumeError:
            return False
        self.now = dict(self.committed[state])
        self.watch()
        self.opened += 1
        return True

    def go(self, steps: int) -> None:
        for _ in range(steps):
            if self.random.random() < 0.04:
                self.world.device.attack(self.random)
            if self.random.random() < 0.1:
                for tree in self.session.volume.trees.values():
                    tree._leaves, tree._interior = PageCache(16), PageCache(16)
            try:
                self.step()
            except VolumeError:
                self.failed += 1
            if (self.session.fenced or self.random.random() < 0.02) and not self.reopen():
                return


@pytest.mark.parametrize("runs", [40, pytest.param(800, marks=pytest.mark.long)])
def test_under_constant_attack(runs: int, audit: Audit, record_property: Callable[[str, object], None]) -> None:
    """Right or failed, never wrong; reopened only in states that were committed and are not older than the report."""
    right = failed = opened = 0
    for seed in range(runs):
        run = Run(seed, audit)
        run.go(400)
        right, failed, opened = right + run.right, failed + run.failed, opened + run.opened
    for kind, number in (("runs", runs), ("reads right", right), ("requests failed", failed), ("reopened", opened)):
        record_property(kind, number)
    assert right > runs
    assert failed > runs
    assert opened > runs // 2
