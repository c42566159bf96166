"""Partition tables: what we write others read, what others write we read, and damage is named."""

import dataclasses
import json
import os
import random
import subprocess
import uuid
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jindiskd.image import gpt
from jindiskd.image.refusals import BaseRefused, BaseTruncated, PartitionTableDamaged

MIB = 1 << 20
DISK = "0b5c1f0e-7a63-4c39-9d0a-2d6a3c1f9e11"


def written(path, sizes) -> tuple[gpt.Entry, ...]:
    """A disk with partitions of these sizes."""
    rng = random.Random(7)
    parts = [
        (str(uuid.UUID(bytes=rng.randbytes(16))), str(uuid.UUID(bytes=rng.randbytes(16))), f"part {number} ü", size)
        for number, size in enumerate(sizes)
    ]
    entries = gpt.lay_out(parts)
    size = gpt.disk_bytes(sizes)
    with path.open("w+b") as stream:
        stream.truncate(size)
        gpt.write_table(stream.fileno(), size, DISK, entries)
    return entries


def read(path) -> tuple[gpt.Entry, ...]:
    with path.open("rb") as stream:
        return gpt.read_table(stream.fileno(), path.stat().st_size)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 50 * MIB), min_size=1, max_size=128))
def test_written_tables_are_read_back(tmp_path_factory, sizes) -> None:
    """Any number of partitions of any size: aligned, in order, inside the disk, the same after reading."""
    path = tmp_path_factory.mktemp("gpt") / "disk"
    entries = written(path, sizes)
    assert read(path) == entries
    end = MIB
    for entry, size in zip(entries, sizes, strict=True):
        assert entry.offset_bytes == end
        assert 0 <= entry.size_bytes - size < MIB
        end += entry.size_bytes
    assert end + MIB == path.stat().st_size


def test_sfdisk_agrees_both_ways(tmp_path, kit, tools) -> None:
    """sfdisk finds no fault with ours, and we read its tables as it does."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    entries = written(ours, [3 * MIB, 5 * MIB - 1])
    said = subprocess.run(["sfdisk", "--verify", ours], capture_output=True, text=True, check=True)
    assert "No errors detected" in said.stdout + said.stderr
    table = json.loads(kit.run("sfdisk", "--json", ours))["partitiontable"]
    assert table["id"].lower() == DISK
    assert [part["name"] for part in table["partitions"]] == [entry.name for entry in entries]
    kit.make_disk(theirs, [(kit.ESP_TYPE, None, 3), (kit.ROOT_TYPE, None, 20)])
    table = json.loads(kit.run("sfdisk", "--json", theirs))["partitiontable"]["partitions"]
    found = read(theirs)
    assert [(e.offset_bytes, e.size_bytes) for e in found] == [(p["start"] * 512, p["size"] * 512) for p in table]
    assert [e.type_uuid for e in found] == [kit.ESP_TYPE, kit.ROOT_TYPE]


def test_second_copy_serves(tmp_path) -> None:
    """With the first copy gone the second is read."""
    path = tmp_path / "disk"
    entries = written(path, [MIB])
    with path.open("r+b") as stream:
        stream.seek(512)
        stream.write(bytes(34 * 512 - 512))
    assert read(path) == entries


def test_partition_beyond_the_end(tmp_path) -> None:
    """A disk cut off is told from a damaged one."""
    path = tmp_path / "disk"
    written(path, [MIB, 5 * MIB])
    os.truncate(path, 4 * MIB)
    with pytest.raises(BaseTruncated):
        read(path)


def test_overlap_is_damage(tmp_path) -> None:
    """Partitions that share sectors make the table unbelievable."""
    path = tmp_path / "disk"
    entries = list(written(path, [4 * MIB, 4 * MIB]))
    entries[1] = dataclasses.replace(entries[1], offset_bytes=2 * MIB)
    with path.open("r+b") as stream:
        gpt.write_table(stream.fileno(), path.stat().st_size, DISK, entries)
    with pytest.raises(PartitionTableDamaged, match="overlapping"):
        read(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_refusal_or_the_true_table(tmp_path_factory, data) -> None:
    """Whatever bytes the tables have, nothing but the true entries or a refusal comes out."""
    path = tmp_path_factory.mktemp("gpt") / "disk"
    entries = written(path, [MIB, 2 * MIB])
    size = path.stat().st_size
    with path.open("r+b") as stream:
        for _ in range(data.draw(st.integers(1, 6))):
            base = data.draw(st.sampled_from([0, 512, 1024, size - 512, size - 33 * 512]))
            stream.seek(base + data.draw(st.integers(0, 511)))
            stream.write(bytes([data.draw(st.integers(0, 255))]))
    try:
        assert read(path) == entries
    except BaseRefused:
        pass


def test_table_at_an_absurd_place(tmp_path) -> None:
    """Right checksums around a table beyond every disk are no crash."""
    path = tmp_path / "disk"
    written(path, [MIB])
    with path.open("r+b") as stream:
        for lba in (1, path.stat().st_size // 512 - 1):
            stream.seek(lba * 512)
            header = bytearray(stream.read(92))
            header[72:80] = b"\xff" * 8
            header[16:20] = bytes(4)
            header[16:20] = zlib.crc32(header).to_bytes(4, "little")
            stream.seek(lba * 512)
            stream.write(header)
    with pytest.raises(PartitionTableDamaged, match="at sector"):
        read(path)
