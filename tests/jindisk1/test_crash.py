"""Crashes: whatever of the writes since the last barrier reached the disk, the state is that of a commit.

Between barriers a device may do writes in any order, or leave them out, and tear them at sectors of 512 bytes.
"""

import random
from collections.abc import Callable

import pytest
from jd1 import BLOCK, KEY, SparseDevice, key, pattern
from second_reader import SecondReader

from jindiskd.jindisk.v1 import index_file, session
from jindiskd.jindisk.v1.layout import Layout
from jindiskd.jindisk.v1.load import create_empty
from jindiskd.jindisk.v1.session import open_session
from jindiskd.jindisk.v1.volume import open_volume

Content = dict[int, bytes]


def new_device(n: int = 1) -> SparseDevice:
    layout = Layout(n + 320)
    device = SparseDevice(layout.total_bytes)
    create_empty(device, layout=layout, key=key(), blank=True)
    return device


def recorded_run(seed: int, n: int) -> tuple[SparseDevice, list[tuple[int, bytes] | None], list[tuple[int, Content]]]:
    """The device before, its writes, and the content at each flush with the number of writes by then."""
    rng = random.Random(seed)
    device = new_device(n)
    start = device.copy()
    device.log = []
    writer = open_session(device, key=key())
    content: Content = {}
    states = [(0, dict(content))]
    for number in range(50):
        for _ in range(rng.choice([1, 5, 40])):
            lba = rng.choice([rng.randrange(1024), rng.randrange(32)])
            content[lba] = pattern(lba, rng.randrange(1 << 30))
            writer.write(lba * BLOCK, content[lba])
        writer.flush()
        states.append((len(device.log), dict(content)))
        if number % 12 == 11:
            writer.close()
            states.append((len(device.log), dict(content)))
            writer = open_session(device, key=key())
    writer.close()
    states.append((len(device.log), dict(content)))
    return start, device.log, states


def cut(
    start: SparseDevice, log: list[tuple[int, bytes] | None], at: int, rng: random.Random, *, tear: bool
) -> SparseDevice:
    """The device after a crash when `at` writes were begun: all before the last barrier, and any of those after it."""
    barrier = max((i for i in range(at) if log[i] is None), default=-1)
    device = start.copy()
    for item in log[: barrier + 1]:
        if item is not None:
            device.apply(*item)
    late = [item for item in log[barrier + 1 : at] if item is not None and rng.random() < 0.7]
    rng.shuffle(late)
    for offset, data in late:
        unit = 512 if tear and rng.random() < 0.4 else BLOCK
        for piece in range(0, len(data), unit):
            if unit == BLOCK or rng.random() < 0.7:
                device.apply(offset + piece, data[piece : piece + unit])
    return device


def content_of(device: SparseDevice) -> Content:
    volume = open_volume(device, key=key())
    return {lba: volume.read(lba * BLOCK, BLOCK) for keys, _ in volume.chunks() for lba in keys}


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PENDING_BLOCKS", 16)
    monkeypatch.setattr(session, "FRESH_LIMIT", 1 << 20)
    monkeypatch.setattr(session, "FOLD_AT", 160)
    monkeypatch.setattr(index_file, "FILE_RECORDS", 600)


def crash(seed: int, n: int, cuts: int) -> None:
    print("seed", seed)
    start, log, states = recorded_run(seed, n)
    rng = random.Random(seed)
    barriers = [i for i, item in enumerate(log) if item is None]
    seen = set()
    for _ in range(cuts):
        # Right before a barrier most is in the air, the sector that makes a commit at times.
        at = rng.choice(barriers) if rng.random() < 0.6 else rng.randrange(len(log) + 1)
        tear = rng.random() < 0.5
        device = cut(start, log, at, rng, tear=tear)
        before = max(i for i, (count, _) in enumerate(states) if count <= at)
        allowed = [content for count, content in states[before : before + 2]]
        found = content_of(device)
        assert found in allowed
        seen.add(allowed.index(found))
        reader = SecondReader(device.pread, KEY[:16], KEY[16:])
        if not tear:
            # An entry of the DST can lie in two sectors, so a torn one is against the module's rules until we open.
            reader.check_rules()
        assert set(found) == set(reader.map)
        # It can be written on, and then all rules hold whatever the crash left.
        again = open_session(device, key=key())
        changed = dict(found)
        for _ in range(60):
            lba = rng.randrange(1024)
            changed[lba] = pattern(lba, rng.randrange(1 << 30))
            again.write(lba * BLOCK, changed[lba])
        again.close()
        assert changed == content_of(device)
        reader = SecondReader(device.pread, KEY[:16], KEY[16:])
        reader.check_rules()
        assert reader.free_blocks_marked_used() == 0
    assert seen == {0, 1}, "both outcomes of a commit were seen"


@pytest.mark.parametrize(("seed", "n"), [(1, 1), (2, 1024)])
@pytest.mark.usefixtures("small_limits")
def test_a_crash_leaves_the_state_of_a_commit(
    seed: int, n: int, record_property: Callable[[str, object], None]
) -> None:
    cuts = 60 if n == 1 else 20
    crash(seed, n, cuts)
    record_property("images", cuts)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 14))
@pytest.mark.usefixtures("small_limits")
def test_many_crashes(seed: int, record_property: Callable[[str, object], None]) -> None:
    crash(seed, 1, 1000)
    record_property("images", 1000)
