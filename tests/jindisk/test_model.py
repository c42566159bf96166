"""A volume against a dict: every mechanism, with cleaning, crashes of the process, and reopening."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from jd import Audit, World, content, world

from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.geometry import BLOCK, default_geometry
from jindiskd.jindisk.session import Session


class Model:
    """The volume under test, and what it should hold at each state."""

    def __init__(self, seed: int, audit: Audit, size: int) -> None:
        self.size = size
        geometry = replace(default_geometry(size), journal_blocks=16)
        self.world: World = world(geometry, seed=seed, audit=audit)
        self.random = random.Random(seed)
        self.blocks: dict[int, bytes] = {}
        self.flushed: dict[int, bytes] = {}
        self.number = 0
        self.session: Session = self.world.create(geometry)

    def write(self) -> None:
        count = self.random.choice((1, 1, 1, 2, 8, 40))
        lba = self.random.randrange(self.size - count) if self.random.random() < 0.5 else self.random.randrange(600)
        data = b""
        for at in range(count):
            self.number += 1
            block = content(self.number) if self.random.random() < 0.95 else bytes(BLOCK)
            data += block
            self.blocks[lba + at] = block
        self.session.write(lba * BLOCK, data)

    def write_part(self) -> None:
        offset, length = self.random.randrange((self.size - 4) * BLOCK), self.random.randrange(1, 3 * BLOCK)
        data = self.random.randbytes(length)
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        old = b"".join(self.blocks.get(b, bytes(BLOCK)) for b in range(first, last + 1))
        at = offset - first * BLOCK
        new = old[:at] + data + old[at + length :]
        for number, block in enumerate(range(first, last + 1)):
            self.blocks[block] = new[number * BLOCK : (number + 1) * BLOCK]
        self.session.write(offset, data)

    def trim(self) -> None:
        count = self.random.choice((1, 3, 100, 400, 1500))
        lba = self.random.randrange(self.size - count)
        self.session.discard(lba * BLOCK, count * BLOCK)
        for block in range(lba, lba + count):
            self.blocks.pop(block, None)

    def flush(self) -> None:
        self.session.flush()
        self.flushed = dict(self.blocks)

    def read(self) -> None:
        count = self.random.choice((1, 1, 5, 200))
        lba = self.random.randrange(self.size - count)
        expected = b"".join(self.blocks.get(b, bytes(BLOCK)) for b in range(lba, lba + count))
        assert self.session.read(lba * BLOCK, count * BLOCK) == expected

    def checkpoint(self) -> None:
        self.session.checkpoint()
        self.flushed = dict(self.blocks)

    def clean(self) -> None:
        self.checkpoint()
        self.session.cleaner.clean(len(self.session.appender.free) + 1)

    def reopen(self) -> None:
        crash = self.random.random() < 0.5
        if crash:
            self.flush()
        else:
            self.session.close()
        self.session = self.world.begin()
        self.compare()

    def compare(self) -> None:
        found = self.session.read(0, self.size * BLOCK)
        expected = b"".join(self.blocks.get(b, bytes(BLOCK)) for b in range(self.size))
        assert found == expected


SHORT = [(seed, 2_500, 4096) for seed in range(3)]
LONG = [
    *[pytest.param(seed, 50_000, 4096, marks=pytest.mark.long) for seed in range(3, 6)],
    pytest.param(6, 10_000, 16_384, marks=pytest.mark.long, id="three levels"),
]


@pytest.mark.parametrize(("seed", "requests", "size"), [*SHORT, *LONG])
def test_the_volume_holds_what_a_dict_holds(
    seed: int, requests: int, size: int, audit: Audit, record_property: Callable[[str, object], None]
) -> None:
    """Random requests, reopening and crashes; compared after each opening, and checked at the end."""
    model = Model(seed, audit, size)
    steps = [model.write] * 60 + [model.read] * 15 + [model.write_part] * 6 + [model.flush] * 14 + [model.trim] * 4
    steps += [model.checkpoint]
    rare = [model.reopen] * 3 + [model.clean]
    for number in range(requests):
        model.random.choice(rare if number % 50 == 49 else steps)()
    record_property("requests", requests)
    record_property("sealings", audit.count)
    model.compare()
    model.session.close()
    found = check_volume(model.world.open(), data=True)
    assert not found.faults
    assert found.mapped == sum(block != bytes(BLOCK) for block in model.blocks.values())
