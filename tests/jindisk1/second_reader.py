"""A second reader of JinDisk 1, written from the description of the format alone; it imports nothing of the package.

It reads the whole volume by the slow and plain way, and demands every rule that a writer must respect for the module.
"""

import itertools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NOTHING = 0xFFFFFFFFFFFFFFFF
Read = Callable[[int, int], bytes]
"""Bytes at an offset of the raw device."""


class RuleBroken(AssertionError):
    """The volume is not one that the module can use."""


def up(a: int, b: int) -> int:
    return (a + b - 1) // b


def gcm_open(key: bytes, nonce: bytes, number: int, ciphertext: bytes, tag: bytes) -> bytes:
    return AESGCM(key).decrypt(nonce, ciphertext + tag, number.to_bytes(8, "little") + nonce)


def crc(data: bytes) -> int:
    register = 0xFFFFFFFF
    for bit in (byte >> shift & 1 for byte in data for shift in range(7, -1, -1)):
        out = register >> 31
        register = register << 1 & 0xFFFFFFFF
        if out ^ bit:
            register ^= 0x04C11DB7
    return register


@dataclass
class File:
    slot: int
    level: int
    version: int
    first: int
    last: int
    count: int
    key: bytes
    root: int
    records: list[tuple[int, int, bytes, bytes]] = field(default_factory=list)
    """LBA, PBA, tag, key."""


class SecondReader:
    """Opens, and gives the map; `check_rules` then demands everything the module needs."""

    def __init__(self, read: Read, key: bytes, iv: bytes) -> None:
        self.read = read
        block = read(0, 4096)
        plain = gcm_open(key, iv, 0, block[:132], block[132:148])
        assert crc(plain[4:]) ^ 0x3828 == struct.unpack("<I", plain[:4])[0]
        (magic, per_segment, s, data_start) = struct.unpack_from("<QIQQ", plain, 4)
        assert (magic, per_segment) == (0x22946, 1024)
        assert struct.unpack_from("<IIQQIQ", plain, 32) == (10, 2, s * 1024, 1, 128, 507904)
        assert struct.unpack_from("<QQQ", plain, 68) == (0, 0, 0), "journal head, tail and checkpoint"
        journal, svt, dst, rit, bvt = struct.unpack_from("<QQQQQ", plain, 92)
        self.s, self.n, self.data_start = s, s - 320, data_start
        self.cap = up(s, 128) + 1
        slots = 2 * self.cap
        where = 1 + up(slots * 5815513, 4096)
        assert journal == where
        where += 16384
        assert svt == where
        where += 2 * up(up(s, 64) * 8, 4096)
        assert dst == where
        where += 2 * (s // 30 + 1)
        assert rit == where
        where += 2 * (2 * s + 1)
        assert bvt == where
        where += 2 * up(up(slots, 64) * 8, 4096)
        bitc = where
        where += 2 * (slots // 46 + 1)
        assert data_start == where
        self.svt, self.dst, self.rit = svt, dst, rit
        bits = read(bvt * 4096, 4096 * up(up(slots, 64) * 8, 4096))
        self.files = []
        for slot in range(slots):
            if bits[slot // 8] >> slot % 8 & 1:
                self.files.append(self._file(slot, read(4096 * (bitc + slot // 46) + 88 * (slot % 46), 88)))
        self.map: dict[int, tuple[int, bytes, bytes]] = {}
        for file in sorted(self.files, key=lambda f: (-f.level, f.version)):
            seen = set()
            for lba, pba, tag, data_key in file.records:
                if lba not in seen:
                    seen.add(lba)
                    self.map[lba] = (pba, tag, data_key)
        self.map = {lba: value for lba, value in self.map.items() if value[0] != NOTHING}

    def _file(self, slot: int, entry: bytes) -> File:
        root, key, _, number, level, version, first, last, count = struct.unpack_from("<Q16s12sQQQIII", entry)
        assert number == slot, "a catalogue entry names its slot"
        file = File(slot, level, version, first, last, count, key, root)
        start = 4096 + slot * 5815513

        def node(position: int, size: int) -> bytes:
            assert start <= position <= start + 5815513 - size, "nodes lie in their slot"
            data = self.read(position, size)
            return gcm_open(key, bytes(12), 0, data[:-16], data[-16:])

        def children(position: int, *, of_leaves: bool) -> list[tuple[int, int]]:
            plain = node(position, 441)
            assert not plain[0] & 1
            number = struct.unpack_from("<Q", plain, 1)[0]
            assert 1 <= number <= 32
            found = [struct.unpack_from("<BIQ", plain, 9 + 13 * i) for i in range(number)]
            assert all((flag & 1) == of_leaves for flag, _, _ in found), "exactly three levels"
            return [(greatest, place) for _, greatest, place in found]

        sizes = []
        for greatest_inner, inner in children(root, of_leaves=False):
            for greatest, leaf in children(inner, of_leaves=True):
                plain = node(leaf, 5665)
                assert plain[0] & 1
                number = struct.unpack_from("<Q", plain, 1)[0]
                assert 1 <= number <= 128
                sizes.append(number)
                keys = struct.unpack_from(f"<{number}I", plain, 9)
                for i, lba in enumerate(keys):
                    pba, tag, data_key = struct.unpack_from("<Q16s16s", plain, 521 + 40 * i)
                    file.records.append((lba, pba, tag, data_key))
                if keys[-1] != greatest:
                    raise RuleBroken("a child's key is the greatest below it")
            if file.records[-1][0] != greatest_inner:
                raise RuleBroken("a child's key is the greatest below it")
        if any(size != 128 for size in sizes[:-1]):
            raise RuleBroken("every leaf but the last is full")
        if (file.records[0][0], file.records[-1][0], len(file.records)) != (first, last, count):
            raise RuleBroken("first key, last key and count of an entry are exact")
        return file

    def block(self, lba: int) -> bytes:
        if lba not in self.map:
            return bytes(4096)
        pba, tag, key = self.map[lba]
        return gcm_open(key, bytes(12), pba, self.read(4096 * (self.data_start + pba), 4096), tag)

    def check_rules(self, *, table_segments: int | None = None, module_wrote: bool = False) -> None:
        """All rules of the section for writers that can be read off the disk.

        `module_wrote`: leave out what the module itself does not keep: versions, marks, owners of covered blocks.
        """
        self._files_in_order(strict=not module_wrote)
        owners: dict[int, int] = {}
        for lba, (pba, _, _) in self.map.items():
            if pba in owners:
                raise RuleBroken("one LBA for each PBA (rule 10)")
            owners[pba] = lba
        if not module_wrote:
            self._covered_blocks(owners)
        self._segments(self.n if table_segments is None else table_segments, owners)

    def _files_in_order(self, *, strict: bool) -> None:
        level0 = [file for file in self.files if file.level == 0]
        level1 = sorted((file for file in self.files if file.level == 1), key=lambda f: f.first)
        if len(level0) > 1 or any(file.level > 1 for file in self.files):
            raise RuleBroken("at most one file of level 0 (rule 3)")
        if len(level1) >= self.cap:
            raise RuleBroken("level 1 is below its capacity (rule 5)")
        if any(after.first <= before.last for before, after in itertools.pairwise(level1)):
            raise RuleBroken("ranges of level 1 are disjoint (rule 6)")
        for file in level0:
            if any(f.version >= file.version and f.first <= file.last and file.first <= f.last for f in level1):
                raise RuleBroken("level 0 is newer than what it covers (rule 4)")
        if len({file.key for file in self.files}) != len(self.files):
            raise RuleBroken("each file has a key of its own")
        if not strict:
            return
        # What the module will take for its next version, in its own strict comparison.
        following = 0
        for file in self.files:
            if following < file.version:
                following = file.version + 1
        greatest = max((file.version for file in self.files), default=-1)
        if self.files and (following < greatest or (not level0 and following <= greatest)):
            raise RuleBroken(f"the module's next version {following} is not beyond {greatest} (rule 4)")
        for file in self.files:
            lbas = [record[0] for record in file.records]
            if lbas != sorted(set(lbas)) or any(record[1] == NOTHING for record in file.records):
                raise RuleBroken("keys ascend, and there are no deletion marks (rule 12)")

    def _covered_blocks(self, owners: dict[int, int]) -> None:
        """A record of level 1 that level 0 covers is given back by the module when it merges: it must own its block."""
        covered = {record[0] for file in self.files if file.level == 0 for record in file.records}
        for file in self.files:
            for lba, pba, _, _ in file.records if file.level else ():
                if lba in covered:
                    if pba in owners:
                        raise RuleBroken(f"block {pba} of covered block {lba} is used by block {owners[pba]}")
                    owners[pba] = lba

    def _segments(self, n: int, owners: dict[int, int]) -> None:
        svt = self.read(4096 * self.svt, 4096 * up(up(self.s, 64) * 8, 4096))
        allocated = [svt[i // 8] >> i % 8 & 1 for i in range(self.s)]
        entries = []
        for i in range(self.s):
            entry = self.read(4096 * (self.dst + i // 30) + 136 * (i % 30), 136)
            entries.append((int.from_bytes(entry[:8], "little"), int.from_bytes(entry[8:], "little")))
        for i, (count, bits) in enumerate(entries):
            if count != bits.bit_count():
                raise RuleBroken(f"segment {i}: the count is the number of bits (rule 8)")
            if count and not allocated[i]:
                raise RuleBroken(f"segment {i} is not allocated but has blocks (rule 8)")
        if n >= 320 and sum(allocated) >= n - 320 and any(1 <= count <= 1023 for count, _ in entries):
            raise RuleBroken("where collection runs, no segment is marked partly used (rule 11)")
        for pba, lba in owners.items():
            if not allocated[pba // 1024] or not entries[pba // 1024][1] >> pba % 1024 & 1:
                raise RuleBroken(f"live block {pba} may be reused (rule 8)")
            if struct.unpack("<Q", self.read(4096 * self.rit + 8 * pba, 8))[0] != lba:
                raise RuleBroken(f"RIT of {pba} is not {lba} (rule 9)")

    def free_blocks_marked_used(self) -> int:
        """Blocks that are lost to the module."""
        marked = 0
        for i in range(self.s):
            entry = self.read(4096 * (self.dst + i // 30) + 136 * (i % 30), 136)
            marked += int.from_bytes(entry[8:], "little").bit_count()
        return marked - len({pba for file in self.files for _, pba, _, _ in file.records if pba != NOTHING})


def open_path(path: str | os.PathLike[str], key: bytes, iv: bytes) -> SecondReader:
    fd = os.open(path, os.O_RDONLY)  # for the life of the process
    return SecondReader(lambda offset, length: os.pread(fd, length, offset), key, iv)
