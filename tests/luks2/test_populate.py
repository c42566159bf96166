"""Bulk encryption puts each sector where dm-crypt would look for it, leaves holes, and reports failure truthfully."""

import os
import random
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from jindiskd.base.secret import Secret
from jindiskd.errors import NoSpace
from jindiskd.luks2.populate import CHUNK_BYTES, PopulateFailed, populate

KEY = random.Random(5).randbytes(64)


def decrypt(disk: bytes, offset: int) -> bytes:
    """dm-crypt of a LUKS2 segment with 4096-byte sectors: tweak = 512-byte sector number, an independent loop."""
    out = b""
    for start in range(0, len(disk), 4096):
        tweak = struct.pack("<QQ", (offset + start) // 512, 0)
        out += Cipher(algorithms.AES(KEY), modes.XTS(tweak)).decryptor().update(disk[start : start + 4096])
    return out


@pytest.mark.parametrize("workers", [1, 3])
def test_ranges_are_encrypted_in_place_and_the_rest_stays_hole(tmp_path, workers: int) -> None:
    """Only the ranges are written; they decrypt to the source; progress ends at their sum."""
    rng = random.Random(1)
    size = 12 << 20
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(8192) + rng.randbytes(size))
    target.touch()
    os.truncate(target, size + (1 << 20))
    ranges = [(0, 4096), (8192, 3 * CHUNK_BYTES + 4096), (9 << 20, 2 << 20)]
    seen: list[int] = []
    with source.open("rb") as src, target.open("r+b") as dst:
        done = populate(
            src.fileno(), dst.fileno(), ranges, volume_key=Secret(KEY), source_offset_bytes=8192,
            target_offset_bytes=1 << 20, workers=workers, progress=seen.append,
        )  # fmt: skip
    assert done == sum(length for _, length in ranges) == seen[-1]
    assert seen == sorted(seen)
    plain, cipher = source.read_bytes()[8192:], target.read_bytes()[1 << 20 :]
    for offset, length in ranges:
        assert decrypt(cipher[offset : offset + length], offset) == plain[offset : offset + length]
    assert target.stat().st_blocks * 512 <= done + (64 << 10)
    covered = bytearray(size)
    for offset, length in ranges:
        covered[offset : offset + length] = b"\1" * length
    assert all(cipher[i] == 0 for i in range(0, size, 512) if not covered[i])


def test_short_source_reads_as_zeros(tmp_path) -> None:
    """A source that ends in a hole is padded with zeros, which are encrypted."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * 100)
    target.write_bytes(b"")
    with source.open("rb") as src, target.open("r+b") as dst:
        populate(src.fileno(), dst.fileno(), [(0, 8192)], volume_key=Secret(KEY))
    assert decrypt(target.read_bytes(), 0) == b"x" * 100 + bytes(8092)


def test_failure_to_write_is_an_error(tmp_path, left_processes) -> None:
    """A target that cannot be written fails the call, and no process is left."""
    source = tmp_path / "source"
    source.write_bytes(bytes(1 << 20))
    with source.open("rb") as src, source.open("rb") as dst, pytest.raises(PopulateFailed, match="Bad file"):
        populate(src.fileno(), dst.fileno(), [(0, 1 << 20)], volume_key=Secret(KEY), workers=2)
    assert left_processes() == set()


def test_full_disk_is_told_apart(tmp_path) -> None:
    """ENOSPC becomes NoSpace."""
    source = tmp_path / "source"
    source.write_bytes(bytes(1 << 20))
    with source.open("rb") as src, Path("/dev/full").open("wb") as dst, pytest.raises(NoSpace):
        populate(src.fileno(), dst.fileno(), [(0, 1 << 20)], volume_key=Secret(KEY))


def test_interruption_leaves_no_process(tmp_path, left_processes) -> None:
    """An exception from the progress callback ends the work and its processes."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(8 << 20))

    def stop(_done: int) -> None:
        raise KeyboardInterrupt

    target.touch()
    with source.open("rb") as src, target.open("r+b") as dst, pytest.raises(KeyboardInterrupt):
        populate(src.fileno(), dst.fileno(), [(0, 8 << 20)], volume_key=Secret(KEY), workers=2, progress=stop)
    assert left_processes() == set()
