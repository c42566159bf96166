"""Loading images into new volumes; what is written satisfies the module's rules, by another reader's word."""

import hashlib
import os
import random
from pathlib import Path

import pytest
from jd1 import BLOCK, KEY, key, pattern
from second_reader import SecondReader, open_path

from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.errors import VolumeMalformed, VolumeUnauthentic
from jindiskd.jindisk.v1 import index_file
from jindiskd.jindisk.v1 import load as load_module
from jindiskd.jindisk.v1.export import bulk_export
from jindiskd.jindisk.v1.layout import Layout, layout_for, required_bytes
from jindiskd.jindisk.v1.load import bulk_load, create_empty
from jindiskd.jindisk.v1.volume import open_volume


def second(path: Path) -> SecondReader:
    return open_path(path, KEY[:16], KEY[16:])


def exported(path: Path, target: Path, *, workers: int = 1, size_bytes: int | None = None) -> bytes:
    with OpenFile(path, writable=False) as device, target.open("w+b") as out:
        bulk_export(open_volume(device, key=key(), size_bytes=size_bytes), out.fileno(), workers=workers)
        out.seek(0)
        return out.read()


def load(image: bytes, path: Path, **options: object) -> Layout:
    source = path.with_suffix(".src")
    source.write_bytes(image)
    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        with source.open("rb") as fd:
            return bulk_load(fd.fileno(), target, size_bytes=len(image), key=key(), **options)  # type: ignore[arg-type]  # passed on
    finally:
        os.close(target)


@pytest.mark.parametrize("size", [1, 4096, 5000, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 9_000_000])
def test_an_image_of_any_size_comes_back(size: int, tmp_path: Path) -> None:
    """Content and rules, at and beside the borders of blocks and segments."""
    image = random.Random(size).randbytes(size)
    layout = load(image, tmp_path / "v")
    reader = second(tmp_path / "v")
    reader.check_rules()
    assert -(-size // (4 << 20)) == reader.n == layout.logical_segments
    assert image.ljust(layout.size_bytes, b"\0") == exported(tmp_path / "v", tmp_path / "out")
    assert image[-1:] == reader.block((size - 1) // BLOCK)[(size - 1) % BLOCK :][:1]
    # Every block is mapped: the module returns stale memory for others.
    assert layout.size_bytes // BLOCK == len(reader.map)


def test_zeros_can_be_left_out(tmp_path: Path) -> None:
    """Blocks of zeros take no room if asked so, wherever the source has holes; others are packed."""
    blocks = {0: 1, 1: 2, 700: 3, 1023: 4, 1024: 5, 2047: 6, 3000: 7}
    image = bytearray(12 << 20)
    for lba, generation in blocks.items():
        image[lba * BLOCK : (lba + 1) * BLOCK] = pattern(lba, generation)
    load(bytes(image), tmp_path / "v", skip_zeros=True)
    reader = second(tmp_path / "v")
    reader.check_rules()
    assert list(blocks) == list(reader.map)
    assert list(range(7)) == [pba for pba, _, _ in reader.map.values()]
    assert bytes(image) == exported(tmp_path / "v", tmp_path / "out")


def test_several_index_files_and_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of level 1 that begin within segments, read back by several processes; small files, for the time's sake."""
    for module in (index_file, load_module):
        monkeypatch.setattr(module, "FILE_RECORDS", 1500)
    image = random.Random(4).randbytes(16 << 20)
    load(image, tmp_path / "v", workers=2, layout=Layout(324))
    reader = second(tmp_path / "v")
    reader.check_rules()
    assert [(f.slot, f.version, f.count) for f in reader.files] == [(0, 1, 1500), (1, 3, 1500), (2, 5, 1096)]
    assert image == exported(tmp_path / "v", tmp_path / "out", workers=2)


@pytest.mark.long
def test_more_blocks_than_an_index_file_takes(tmp_path: Path) -> None:
    """More than 131072 blocks: several files of level 1, read back by several processes."""
    size = 131072 * BLOCK + (8 << 20) + 4096
    source, target = tmp_path / "src", tmp_path / "v"
    at = [0, 5, 70_000, 131_071, 131_072, 131_073, 133_120]
    with source.open("w+b") as fd, target.open("w+b") as out:
        for lba in at:
            os.pwrite(fd.fileno(), pattern(lba, 1), lba * BLOCK)
        done: list[tuple[int, int]] = []
        bulk_load(fd.fileno(), out.fileno(), size_bytes=size, key=key(), workers=2, progress=lambda *p: done.append(p))
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]
        os.lseek(fd.fileno(), 0, os.SEEK_SET)
        fd.truncate(layout_for(size).size_bytes)
        expected = hashlib.file_digest(fd, "sha256").hexdigest()
    reader = second(target)
    reader.check_rules()
    assert [(f.slot, f.version, f.count) for f in reader.files] == [(0, 1, 131072), (1, 3, 3072)]
    with OpenFile(target, writable=False) as device, (tmp_path / "out").open("w+b") as out:
        volume = open_volume(device, key=key())
        bulk_export(volume, out.fileno(), workers=2)
        out.seek(0)
        assert expected == hashlib.file_digest(out, "sha256").hexdigest()
        for lba in at:
            assert pattern(lba, 1) == volume.read(lba * BLOCK, BLOCK)
            assert pattern(lba, 1) == reader.block(lba)


def test_the_same_randomness_gives_the_same_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of processes."""
    for module in (index_file, load_module):
        monkeypatch.setattr(module, "FILE_RECORDS", 1500)
    image = random.Random(6).randbytes(16 << 20)
    found = set()
    for workers in (1, 2, 3):
        path = tmp_path / f"v{workers}"
        load(image, path, workers=workers, entropy=random.Random(7).randbytes)
        with path.open("rb") as file:
            found.add(hashlib.file_digest(file, "sha256").hexdigest())
    assert len(found) == 1


def test_ranges_are_stored_with_their_zeros_and_nothing_else(tmp_path: Path) -> None:
    """What a file system uses: the module must not return stale memory there."""
    image = bytearray(random.Random(8).randbytes(4 << 20))
    image[BLOCK : 2 * BLOCK] = bytes(BLOCK)
    load(bytes(image), tmp_path / "v", ranges=[(0, 2 * BLOCK), (5 * BLOCK, BLOCK), (1023 * BLOCK, BLOCK)])
    reader = second(tmp_path / "v")
    reader.check_rules()
    assert sorted(reader.map) == [0, 1, 5, 1023]
    assert bytes(BLOCK) == reader.block(1)
    assert image[5 * BLOCK : 6 * BLOCK] == reader.block(5)
    for wrong in ([(1, BLOCK)], [(0, BLOCK), (0, BLOCK)], [(4 << 20, BLOCK)], [(0, 0)], [(0, 100)]):
        with pytest.raises(InvalidArgument, match="whole blocks, in order"):
            load(bytes(image), tmp_path / "w", ranges=wrong)


def test_no_data_key_is_used_twice(tmp_path: Path) -> None:
    """The module uses one key and one nonce for a thousand blocks; we do not."""
    load(bytes(8 << 20), tmp_path / "v")
    reader = second(tmp_path / "v")
    keys = [record[3] for file in reader.files for record in file.records] + [file.key for file in reader.files]
    assert len(keys) == len(set(keys)) == 2049


def test_a_volume_over_an_older_one_has_nothing_of_it(tmp_path: Path) -> None:
    """Tables are cleared, so a smaller image leaves no segment of the older one allocated."""
    load(random.Random(1).randbytes(12 << 20), tmp_path / "v")
    with OpenFile(tmp_path / "v", writable=True) as device:
        create_empty(device, layout=Layout(323), key=key())
    reader = second(tmp_path / "v")
    reader.check_rules()
    assert not reader.map
    assert reader.free_blocks_marked_used() == 0
    small = random.Random(2).randbytes(4 << 20)
    load(small, tmp_path / "v", layout=Layout(323), skip_zeros=True)
    reader = second(tmp_path / "v")
    reader.check_rules()
    assert reader.free_blocks_marked_used() == 0
    assert small.ljust(12 << 20, b"\0") == exported(tmp_path / "v", tmp_path / "out")


@pytest.mark.parametrize("n", [319, 320, 321, 322, 640, 641])
def test_the_last_segment_is_marked_full_where_the_module_collects(n: int, tmp_path: Path) -> None:
    """Rule 11, at its borders."""
    image = random.Random(n).randbytes(1025 * BLOCK)
    load(image, tmp_path / "v", layout=Layout(n + 320), skip_zeros=True)
    reader = second(tmp_path / "v")
    reader.check_rules()
    padded = n >= 320 and n - 320 <= 2
    assert (1023 if padded else 0) == reader.free_blocks_marked_used()


def test_a_device_that_is_too_small_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(bytes(BLOCK))
    with OpenFile(tmp_path / "v", writable=True) as device, pytest.raises(VolumeMalformed, match="the volume needs"):
        create_empty(device, layout=Layout(321), key=key())


@pytest.mark.parametrize("size", [0, -1, 1 << 50])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(InvalidArgument, match="its size is"):
        required_bytes(size)


def test_the_size_in_between_is_told_by_who_opens(tmp_path: Path) -> None:
    """The superblock has whole segments only; a shorter or slightly longer table is accepted."""
    image = random.Random(3).randbytes(6 << 20)
    load(image, tmp_path / "v")
    assert image == exported(tmp_path / "v", tmp_path / "out", size_bytes=6 << 20)
    assert image[:512] == exported(tmp_path / "v", tmp_path / "out", size_bytes=512)
    longer = exported(tmp_path / "v", tmp_path / "out", size_bytes=(12 << 20) - 512)
    assert image.ljust((12 << 20) - 512, b"\0") == longer
    with pytest.raises(InvalidArgument):
        exported(tmp_path / "v", tmp_path / "out", size_bytes=12 << 20)


def test_another_key_opens_nothing(tmp_path: Path) -> None:
    load(bytes(4096), tmp_path / "v")
    other = key()
    other.reveal()[27] ^= 1
    with OpenFile(tmp_path / "v", writable=False) as device, pytest.raises(VolumeUnauthentic, match="superblock"):
        open_volume(device, key=other)
