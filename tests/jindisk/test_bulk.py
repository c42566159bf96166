"""Loading and exporting whole images."""

import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from jd import KEY, UUID1, Audit

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NoSpace
from jindiskd.jindisk import bulk
from jindiskd.jindisk.bulk import bulk_load
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.crypto import Generator, SealingKey
from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeFenced, VolumeUnauthentic, VolumeUnrecognised
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.geometry import BLOCK, default_geometry, largest_logical, required_bytes
from jindiskd.jindisk.native import Native, native
from jindiskd.jindisk.pool import Pool, WorkerFailed
from jindiskd.jindisk.runs import SealingRun
from jindiskd.jindisk.volume import Volume, open_volume

SIZE = 72 << 20
OFFSET = 3 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image with holes, written zeros, single blocks and long runs."""
    path, rng = tmp_path / "image", random.Random(7)
    with path.open("wb") as file:
        file.truncate(SIZE - 5 * BLOCK - 100)  # it ends before the volume does, within a block
        runs = ((0, 3 * BLOCK), (1 << 20, 9 << 20), (40 << 20, 12 << 20), (SIZE - 6 * BLOCK, BLOCK - 100))
        for start, length in runs:
            file.seek(start)
            file.write(rng.randbytes(length))
        for _ in range(500):
            file.seek((20 << 20) + rng.randrange(4000) * BLOCK)
            file.write(rng.randbytes(BLOCK))
        file.seek(42 << 20)
        file.write(bytes(2 << 20))
    return path


def load(source: Path, target: Path, workers: int, **options: object) -> Anchor:
    fd, out = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        return bulk_load(
            fd, out, size_bytes=SIZE, key=Secret(KEY), uuid=UUID1, session_id=b"s" * 32, timestamp=5,
            target_offset_bytes=OFFSET, workers=workers, entropy=lambda n: b"e" * n, **options,
        )  # fmt: skip
    finally:
        os.close(fd)
        os.close(out)


def opened(target: Path, anchor: Anchor) -> Iterator[Volume]:
    fd = os.open(target, os.O_RDWR)
    try:
        device = FileDevice(fd, name="target", offset_bytes=OFFSET)
        yield open_volume(device, key=Secret(KEY), uuid=UUID1, anchor=anchor)
    finally:
        os.close(fd)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_loaded_is_what_is_read_and_exported(image: Path, tmp_path: Path, workers: int) -> None:
    """The volume opens with the returned anchor, checks clean, and gives the image back by reading and by export."""
    told: list[int] = []
    anchor = load(image, tmp_path / "volume", workers, progress=lambda done, _total: told.append(done))
    assert told == sorted(told)
    assert told[-1] == SIZE
    data = image.read_bytes().ljust(SIZE, b"\0")
    for volume in opened(tmp_path / "volume", anchor):
        report = check_volume(volume, data=True)
        assert not report.faults
        assert report.data_blocks == sum(data[i : i + BLOCK] != bytes(BLOCK) for i in range(0, SIZE, BLOCK))
        assert volume.read(0, SIZE) == data
        out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        bulk_export(volume, out, workers=workers)
        os.close(out)
    assert (tmp_path / "out").read_bytes() == data
    assert (tmp_path / "out").stat().st_blocks * 512 < 32 << 20


@pytest.mark.parametrize("bits", [6, 10])
def test_loading_depends_on_content_and_entropy_alone(image: Path, tmp_path: Path, bits: int) -> None:
    """Holes, workers and order of work do not change a byte, with segments smaller and larger than leaves of R."""
    dense = tmp_path / "dense"
    dense.write_bytes(image.read_bytes().ljust(SIZE, b"\0"))
    base = default_geometry(SIZE // BLOCK)
    geometry = replace(base, segment_bits=bits, segments=(base.blocks >> bits) + 16)
    first = load(image, tmp_path / "a", 1, geometry=geometry)
    second = load(dense, tmp_path / "b", 3, geometry=geometry)
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_altered_block_stops_the_export(image: Path, tmp_path: Path) -> None:
    """No image is exported past a block that does not open."""
    anchor = load(image, tmp_path / "volume", 1)
    for volume in opened(tmp_path / "volume", anchor):
        raw = int.from_bytes(volume.entry(0)[:8], "little")
        old = volume.device.pread(raw * BLOCK, 1)
        volume.device.pwrite(raw * BLOCK, bytes([old[0] ^ 1]))
        out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        with pytest.raises(VolumeUnauthentic, match="logical block 0"):
            bulk_export(volume, out, workers=2)
        os.close(out)


def test_room_and_size_are_each_others_inverse() -> None:
    """`largest_logical` fits, and one block more does not; what is too small is refused."""
    for window in (20 << 20, 100 << 20, 1 << 30, 5 << 30, 40 << 30):
        size = largest_logical(window)
        assert required_bytes(size) <= window < required_bytes(size + BLOCK)
    with pytest.raises(InvalidArgument):
        largest_logical(16 << 20)
    with pytest.raises(InvalidArgument):
        required_bytes((16 << 20) + 1)


def test_ranges_alone_count(image: Path, tmp_path: Path) -> None:
    """What lies between the ranges becomes zeros, whatever the source has there; ranges out of order are refused."""
    target = tmp_path / "target"
    ranges = [(1 << 20, 5 << 20), (40 << 20, BLOCK), (SIZE - 8 * BLOCK, 8 * BLOCK)]
    anchor = load(image, target, 2, ranges=ranges)
    whole = image.read_bytes().ljust(SIZE, b"\0")
    wanted = bytearray(SIZE)
    for offset, length in ranges:
        wanted[offset : offset + length] = whole[offset : offset + length]
    for volume in opened(target, anchor):
        assert volume.read(0, SIZE) == wanted
    for wrong in ([(BLOCK, BLOCK), (0, BLOCK)], [(0, 100)], [(SIZE, BLOCK)], [(0, 0)]):
        with pytest.raises(InvalidArgument, match="whole blocks, in order"):
            load(image, tmp_path / "other", 1, ranges=wrong)


def test_a_key_that_was_handed_over_seals_no_more() -> None:
    """K1 in a load: parent and worker never seal with the same key."""
    key = Generator(Secret(KEY), bytes(32), os.urandom).sealing_key()
    key.seal(bytes(12), b"", b"")
    material = key.hand_over()
    with pytest.raises(VolumeFenced, match="another process"):
        key.seal(bytes(12), b"", b"")
    with pytest.raises(VolumeFenced):
        key.seal_run(0, [0], [bytes(BLOCK)], SealingRun(1))
    SealingKey.take_over(material).seal(bytes(12), b"", b"")


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_store_ends_a_load(
    image: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch, left_processes: Callable[[], set[int]]
) -> None:
    """With the error that says so, no process or descriptor left, and no volume that opens."""
    write, before = FileDevice.write_by, descriptors()

    def full(self: FileDevice, fd: int, offset: int, data: memoryview) -> int:
        if offset > 20 << 20:
            raise OSError(errno.ENOSPC, "no space left")
        return write(self, fd, offset, data)

    monkeypatch.setattr(FileDevice, "write_by", full)
    with pytest.raises(NoSpace):
        load(image, tmp_path / "volume", workers, ordered_placement=True)
    assert not left_processes()
    assert descriptors() == before
    with pytest.raises(VolumeUnrecognised):
        next(iter(opened(tmp_path / "volume", Anchor(open=False, session=bytes(32), sequence=1, root=bytes(32)))))


@pytest.mark.parametrize("refusal", ["open", "write", "part"])
def test_a_store_that_cannot_be_written_past_the_cache(
    image: Path, tmp_path: Path, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems refuse at once, some at the first write, any may write less: the volume is the same."""
    anchor, before = load(image, tmp_path / "direct", 1), descriptors()
    write = FileDevice.write_by

    def refuses(_self: FileDevice, _fd: int, _offset: int, _data: memoryview) -> int:
        raise OSError(errno.EINVAL, "not so")

    def writes_less(self: FileDevice, fd: int, offset: int, data: memoryview) -> int:
        return write(self, fd, offset, data[: len(data) // 2])

    if refusal == "open":
        monkeypatch.setattr(FileDevice, "open_again", lambda *_: -1)
    else:
        monkeypatch.setattr(FileDevice, "write_by", refuses if refusal == "write" else writes_less)
    assert load(image, tmp_path / "cached", 1) == anchor
    assert (tmp_path / "cached").read_bytes() == (tmp_path / "direct").read_bytes()
    assert descriptors() == before


def test_a_worker_that_is_killed_ends_the_work(left_processes: Callable[[], set[int]]) -> None:
    """The parent says so instead of waiting, and ends the others."""

    def work(task: bytes) -> bytes:
        if task == b"3":
            os.kill(os.getpid(), signal.SIGKILL)
        return task * 2

    def run() -> None:
        with Pool(work, 2) as pool:
            for number in range(8):
                while pool.full:
                    assert pool.next()
                pool.give(b"%d" % number)
            while pool.waiting:
                pool.next()

    with pytest.raises(WorkerFailed, match="-9"):
        run()
    assert not left_processes()


@pytest.mark.parametrize("choice", [native, lambda: None])
def test_no_nonce_comes_twice(
    choice: Callable[[], Native | None], image: Path, tmp_path: Path, audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of data, pages and superblock, by the compiled loop and without it; every key was drawn by this load."""
    monkeypatch.setattr(bulk, "native", choice)
    load(image, tmp_path / "volume", 1)
    data = image.read_bytes()
    assert audit.count > sum(any(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_source_that_becomes_shorter_is_not_read_as_zeros(workers: int, image: Path, tmp_path: Path) -> None:
    """Its end counts as zeros where it was at the beginning, and nowhere else."""

    def cut(done: int, _total: int) -> None:
        if 0 < done < SIZE:
            os.truncate(image, 10 << 20)

    with pytest.raises(VolumeDeviceFailed, match="became shorter"):
        load(image, tmp_path / "volume", workers, progress=cut)
    assert (tmp_path / "volume").read_bytes()[OFFSET : OFFSET + BLOCK] == bytes(BLOCK), "not to be taken for a volume"
