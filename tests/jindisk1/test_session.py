"""Writing in place: against a plain array, against the module's rules, and against crashes."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from jd1 import BLOCK, KEY, SparseDevice, Vector, key, pattern
from second_reader import SecondReader

from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeFenced, VolumeUnsupported
from jindiskd.jindisk.v1 import index_file, session, survey
from jindiskd.jindisk.v1.layout import Layout
from jindiskd.jindisk.v1.load import create_empty
from jindiskd.jindisk.v1.session import Session, open_session
from jindiskd.jindisk.v1.volume import open_volume

SEGMENT = 4 << 20


def new_device(n: int = 1) -> SparseDevice:
    layout = Layout(n + 320)
    device = SparseDevice(layout.total_bytes)
    create_empty(device, layout=layout, key=key(), blank=True)
    return device


def second(device: SparseDevice) -> SecondReader:
    return SecondReader(device.pread, KEY[:16], KEY[16:])


def in_memory(path: Path) -> SparseDevice:
    """A copy of a sparse file."""
    device = SparseDevice(path.stat().st_size)
    with path.open("rb") as file:
        at = 0
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return device
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            device.apply(at, os.pread(file.fileno(), end - at, at))
            at = end


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so small that every mechanism runs: several files of level 1, commits of their own accord, merges."""
    monkeypatch.setattr(session, "PENDING_BLOCKS", 16)
    monkeypatch.setattr(survey, "WINDOW_BLOCKS", 50 * 1024)
    monkeypatch.setattr(session, "FRESH_LIMIT", 96)
    monkeypatch.setattr(session, "FOLD_AT", 160)
    monkeypatch.setattr(index_file, "FILE_RECORDS", 600)


class Model:
    """A session and the array it should equal."""

    def __init__(self, device: SparseDevice, blocks: int) -> None:
        self.device, self.blocks = device, blocks
        self.content: dict[int, bytes] = {}
        self.session: Session = open_session(device, key=key())

    def expected(self, offset: int, length: int) -> bytes:
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        data = b"".join(self.content.get(lba, bytes(BLOCK)) for lba in range(first, end))
        return data[offset - first * BLOCK :][:length]

    def write(self, offset: int, data: bytes) -> None:
        self.session.write(offset, data)
        first, end = offset // BLOCK, -(-(offset + len(data)) // BLOCK)
        whole = bytearray(self.expected(first * BLOCK, (end - first) * BLOCK))
        whole[offset - first * BLOCK : offset - first * BLOCK + len(data)] = data
        for lba in range(first, end):
            self.content[lba] = bytes(whole[(lba - first) * BLOCK :][:BLOCK])

    def check(self, offset: int, length: int) -> None:
        assert self.expected(offset, length) == self.session.read(offset, length)

    def reopen(self) -> None:
        self.session.close()
        self.judge()
        self.session = open_session(self.device, key=key())

    def judge(self) -> None:
        """What is on the disk, by the second reader."""
        reader = second(self.device)
        reader.check_rules()
        packed = -(-len(reader.map) // index_file.FILE_RECORDS)
        assert len([f for f in reader.files if f.level]) <= max(reader.cap - 3, packed)
        for lba, plain in self.content.items():
            assert plain == reader.block(lba)
        assert set(self.content) == set(reader.map)
        assert reader.free_blocks_marked_used() == 0


def run_model(seed: int, operations: int, *, blocks: int = 1024, n: int = 1) -> Model:
    print("seed", seed)
    rng = random.Random(seed)
    model = Model(new_device(n), blocks)
    size = blocks * BLOCK
    for number in range(operations):
        action = rng.random()
        if action < 0.55:
            count = rng.choice([1, 1, 2, 3, 8, 40])
            lba = rng.choice([rng.randrange(blocks), rng.randrange(64)])
            count = min(count, blocks - lba)
            model.write(lba * BLOCK, b"".join(pattern(lba + i, number) for i in range(count)))
        elif action < 0.65:
            offset = rng.randrange(size - 20_000)
            model.write(offset, rng.randbytes(rng.randrange(1, 20_000)))
        elif action < 0.68:
            offset, length = rng.randrange(size), rng.randrange(30_000)
            length = min(length, size - offset)
            model.session.zero(offset, length)
            if length:
                first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
                whole = bytearray(model.expected(first * BLOCK, (end - first) * BLOCK))
                whole[offset - first * BLOCK : offset - first * BLOCK + length] = bytes(length)
                for lba in range(first, end):
                    model.content[lba] = bytes(whole[(lba - first) * BLOCK :][:BLOCK])
        elif action < 0.70:
            model.session.discard(rng.randrange(size // 2), rng.randrange(size // 2))
        elif action < 0.90:
            offset = rng.randrange(size)
            model.check(offset, min(rng.randrange(1, 60_000), size - offset))
        elif action < 0.985:
            model.session.flush()
        else:
            model.reopen()
    model.check(0, size)
    model.session.close()
    model.judge()
    return model


@pytest.mark.parametrize(("seed", "n"), [(0, 1), (1, 1), (2, 1024)])
@pytest.mark.usefixtures("small_limits")
def test_it_equals_a_plain_array(seed: int, n: int) -> None:
    """Writes of all sizes, reads, flushes and reopening; the second reader judges after every close.

    Small volumes are packed whenever they are merged; in large ones files of level 1 stay where nothing meets them.
    """
    run_model(seed, 900, n=n)


@pytest.mark.long
@pytest.mark.parametrize(("seed", "n"), [(100, 1), (101, 1), (102, 1), (103, 1024)])
@pytest.mark.usefixtures("small_limits")
def test_it_equals_a_plain_array_for_long(seed: int, n: int, record_property: Callable[[str, object], None]) -> None:
    """As above, a hundred thousand operations in all."""
    record_property("requests", 25_000)
    run_model(seed, 25_000, blocks=min(n * 1024, 4000), n=n)


def test_the_limits_in_use_work_too() -> None:
    """With the limits as they are: more blocks than are written without a commit, and than level 0 takes."""
    device = new_device(70)
    writer = open_session(device, key=key())
    blocks = 66_000
    for lba in range(0, blocks, 600):
        writer.write(lba * BLOCK, b"".join(pattern(lba + i, 1) for i in range(600)))
    before = device.written
    writer.close()
    assert device.written - before < 32_768 * BLOCK
    reader = second(device)
    reader.check_rules()
    assert list(range(blocks)) == sorted(reader.map)
    assert [file.level for file in reader.files] == [1]
    for lba in range(0, blocks, 97):
        assert pattern(lba, 1) == reader.block(lba)


def test_what_is_flushed_is_on_the_disk() -> None:
    """Without closing: the module and any reader see all of it after a flush."""
    model = Model(new_device(), 1024)
    model.write(5 * BLOCK, pattern(5, 1))
    assert not second(model.device).map
    model.session.flush()
    model.judge()
    model.write(5 * BLOCK, pattern(5, 2))
    model.session.flush()
    reader = second(model.device)
    reader.check_rules()
    assert pattern(5, 2) == reader.block(5)


def test_opening_and_closing_writes_nothing() -> None:
    model = Model(new_device(), 1024)
    model.write(0, pattern(0, 1))
    model.session.close()
    model.session.close()
    before = model.device.written
    again = open_session(model.device, key=key())
    again.read(0, BLOCK)
    again.flush()
    again.discard(0, BLOCK)
    again.close()
    assert before == model.device.written


@pytest.mark.usefixtures("small_limits")
def test_the_module_keeps_room_in_level_1() -> None:
    """Sessions that write to separate ranges are what makes the module crash; after ours there is room for three."""
    model = Model(new_device(), 1024)
    for number in range(12):
        model.write(number * 80 * BLOCK, pattern(number * 80, 1))
        model.reopen()
    model.session.close()


def test_the_full_volume_can_be_written_again_and_again() -> None:
    """Overwriting everything several times never runs out of room."""
    model = Model(new_device(2), 2048)
    for generation in range(4):
        for lba in range(0, 2048, 64):
            model.write(lba * BLOCK, b"".join(pattern(lba + i, generation) for i in range(64)))
        model.session.flush()
    model.reopen()
    model.session.close()


@pytest.mark.parametrize("n", [319, 320, 384, 400, 641])
def test_partly_used_segments_are_padded_where_the_module_collects(n: int) -> None:
    """Rule 11 after scattered overwrites, on both sides of its borders."""
    device = new_device(n)
    rng = random.Random(n)
    writer = open_session(device, key=key())
    content = {}
    for generation in range(3):
        for _ in range(300):
            lba = rng.randrange(n * 1024)
            writer.write(lba * BLOCK, pattern(lba, generation))
            content[lba] = pattern(lba, generation)
        writer.flush()
        second(device).check_rules()
    writer.close()
    reader = second(device)
    reader.check_rules()
    assert content == {lba: reader.block(lba) for lba in reader.map}


def test_a_key_seals_one_block() -> None:
    """Unlike the module, which uses a key and nonce for a thousand blocks."""
    model = Model(new_device(), 1024)
    keys: list[bytes] = []
    for generation in range(5):
        for lba in range(20):
            model.write(lba * BLOCK, pattern(lba, generation))
        model.session.flush()
        reader = second(model.device)
        keys += [record[3] for file in reader.files for record in file.records] + [f.key for f in reader.files]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", ["01-fresh", "02-sequential", "04-ext4", "07-reopened"])
def test_volumes_of_the_module_are_written_on(name: str, vector: Callable[[str], Vector]) -> None:
    """What the module wrote stays, what is written is there, and the rules hold that the module itself left open."""
    found = vector(name)
    with found.device() as opened:
        device = in_memory(found.path)
        old = open_volume(opened, key=found.key())
        content = {lba: old.read(lba * BLOCK, BLOCK) for keys, _ in old.chunks() for lba in keys}
    writer = open_session(device, key=found.key())
    rng = random.Random(5)
    for number in range(200):
        lba = rng.randrange(8192)
        content[lba] = pattern(lba, number)
        writer.write(lba * BLOCK, content[lba])
        if number % 50 == 0:
            writer.flush()
    writer.close()
    reader = SecondReader(device.pread, bytes.fromhex(found.entry["key"]), bytes.fromhex(found.entry["iv"]))
    reader.check_rules()
    assert reader.free_blocks_marked_used() == 0
    assert content == {lba: reader.block(lba) for lba in reader.map}


class Failing(SparseDevice):
    """Fails from some write on."""

    fails = False

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self.fails:
            raise OSError(28, "no space left on device")
        super().pwrite(offset, data)


def test_a_failing_device_ends_the_session_without_harm() -> None:
    """Data that could not be written stay readable; a commit that failed ends the session; the disk is as before."""
    plain = new_device()
    device = Failing(plain.size_bytes)
    device.blocks = plain.blocks
    writer = open_session(device, key=key())
    writer.write(0, pattern(0, 1))
    writer.flush()
    writer.write(0, pattern(0, 2))
    device.fails = True
    with pytest.raises(VolumeDeviceFailed):
        writer.flush()
    assert pattern(0, 2) == writer.read(0, BLOCK)
    device.fails = False
    writer.flush()
    assert pattern(0, 2) == second(device).block(0)
    writer.write(0, pattern(0, 3))
    writer._seal_pending()
    device.fails = True
    with pytest.raises(VolumeDeviceFailed):
        writer.flush()
    device.fails = False
    assert pattern(0, 3) == writer.read(0, BLOCK)
    reader = second(device)
    reader.check_rules()
    assert pattern(0, 2) == reader.block(0)


@pytest.mark.usefixtures("small_limits")
def test_a_failing_device_does_not_fill_the_memory() -> None:
    """What waits to be written is bounded however long somebody tries; it is all written once the device works."""
    plain = new_device()
    device = Failing(plain.size_bytes)
    device.blocks = plain.blocks
    writer = open_session(device, key=key())
    device.fails = True
    failures = 0
    for lba in range(200):
        try:
            writer.write(lba * BLOCK, pattern(lba, 1))
        except VolumeDeviceFailed:
            failures += 1
    assert failures == 200 - 16 == 200 - len(writer.pending)
    device.fails = False
    writer.close()
    assert list(range(16)) == sorted(second(device).map)


def test_ranges_and_sessions_that_ended_are_refused() -> None:
    writer = open_session(new_device(), key=key())
    for offset, length in ((-1, 1), (0, SEGMENT + 1), (SEGMENT, 1)):
        for refused in (
            lambda o=offset, n=length: writer.read(o, n),
            lambda o=offset, n=length: writer.zero(o, n),
            lambda o=offset, n=length: writer.discard(o, n),
            lambda o=offset, n=length: writer.write(o, bytes(n)),
        ):
            with pytest.raises(InvalidArgument):
                refused()
    writer.write(0, b"")
    writer.close()
    for ended in (writer.flush, lambda: writer.write(0, b"x"), lambda: writer.discard(0, 1)):
        with pytest.raises(VolumeFenced):
            ended()


def test_volumes_beyond_a_tebibyte_are_not_written_in_place() -> None:
    """Their commit would not be one sector."""
    layout = Layout(262_017)
    device = SparseDevice(layout.total_bytes)
    create_empty(device, layout=layout, key=key(), blank=True)
    assert bytes(BLOCK) == open_volume(device, key=key()).read(0, BLOCK)
    with pytest.raises(VolumeUnsupported):
        open_session(device, key=key())
