"""Reading ext4 from a hostile disk ends in ranges inside the file system or in a refusal, never in another error."""

import hashlib
import os
import random
import shutil
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jindiskd.image import base
from jindiskd.image.ext4 import read_superblock, require_ext4, used_ranges
from jindiskd.image.refusals import BaseRefused


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_superblock_and_descriptors(data, root_image, tmp_path) -> None:
    """Altered fields of superblock and group descriptors, in any combination."""
    copy = tmp_path / "copy"
    with root_image.open("rb") as source:
        pristine = source.read(12288)
    if not copy.exists():
        shutil.copyfile(root_image, copy)
    with copy.open("r+b") as stream:
        head = bytearray(pristine)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.one_of(st.integers(1024, 1024 + 0x160), st.integers(4096, 4096 + 64)))
            width = data.draw(st.sampled_from([1, 2, 4]))
            value = data.draw(st.one_of(st.integers(0, 2 ** (8 * width) - 1), st.just(2 ** (8 * width) - 1)))
            head[at : at + width] = value.to_bytes(width, "little")
        stream.write(head)
        stream.flush()
        try:
            found = read_superblock(stream.fileno())
            if found is None:
                return
            require_ext4(found, os.fstat(stream.fileno()).st_size)
            ranges = used_ranges(stream.fileno(), found)
        except BaseRefused:
            return
        end = 0
        for offset, length in ranges:
            assert offset >= end
            assert length > 0
            end = offset + length
        assert end <= -(-found.size_bytes // 4096) * 4096


def test_every_magic_is_looked_for_in_its_place(tmp_path) -> None:
    """A superblock is one only with its magic at its place."""
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(1024 + 0x38) + struct.pack("<H", 0xEF54) + bytes(4096))
    with path.open("rb") as stream:
        assert read_superblock(stream.fileno()) is None


def test_digest_counts_holes_as_zeros(tmp_path) -> None:
    """The digest of a sparse file is that of all its bytes, wherever the holes are."""
    for size, places in (
        (0, ()),
        (5 << 20, ()),
        (5 << 20, (0,)),
        (5 << 20, (2 << 20, (5 << 20) - 5)),
        (12345, (12000,)),
    ):
        path = tmp_path / "sparse"
        path.write_bytes(b"")
        os.truncate(path, size)
        with path.open("r+b") as stream:
            for place in places:
                stream.seek(place)
                stream.write(b"data!")
        with path.open("rb") as stream:
            assert base.Digest(stream.fileno()).result() == hashlib.sha256(path.read_bytes()).digest()


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(b"y" * 4096), lambda p: os.truncate(p, 10)])
def test_digest_of_a_file_that_changes(tmp_path, change) -> None:
    """A digest of a moving target is refused."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    with path.open("rb") as stream:
        digest = base.Digest(stream.fileno())
        change(path)
        os.utime(path, (1, 1))
        with pytest.raises(base.BaseChanged):
            digest.result()
