"""A second reader of JinDisk 2, written from the format document alone; it shares no code with the engine.

Plain and slow: it reads all trees into dictionaries. Numbers in comments are sections of the document.
"""

import hashlib
import itertools
import struct
import zlib
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PER_LEAF = {1: 170, 2: 512, 3: 85}


class Wrong(Exception):
    """What the document calls unauthentic, stale, malformed or inconsistent; the class is the first word."""


def le(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def unseal(key: bytes, nonce: bytes, sealed: bytes, aad: bytes) -> bytes | None:
    try:
        return AESGCM(key).decrypt(nonce, sealed, aad)
    except InvalidTag:
        return None


def superblock_key(key: bytes, uuid: bytes, salt: bytes) -> bytes:  # 6.1
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=uuid + salt, info=b"jindisk2/1 superblock").derive(key)


def superblock_aad(slot: int, uuid: bytes) -> bytes:
    return b"JD2S" + struct.pack("<I", slot) + uuid


def journal_aad(epoch: int, index: int, root: bytes) -> bytes:
    return b"JD2J" + bytes(4) + struct.pack("<QQ", epoch, index) + root


def page_aad(tree: int, level: int, index: int, raw: int) -> bytes:
    return b"JD2P" + bytes([tree, level, 0, 0]) + struct.pack("<QQ", index, raw)


def levels(entries: int, per_leaf: int) -> list[int]:  # 4
    found = [-(-entries // per_leaf)]
    while found[-1] != 1:
        found.append(-(-found[-1] // 73))
    return found


class Reader:
    """A volume opened under an anchor: mode, session id, sequence number, root; or None."""

    def __init__(
        self,
        block: Callable[[int], bytes],
        key: bytes,
        uuid: bytes | None,
        anchor: tuple[bool, bytes, int, bytes] | None,
    ) -> None:
        """`block` gives 4096 bytes by raw block number."""
        self.block = block
        head = block(0)  # 5
        if head[:8] != b"JinDisk2":
            raise Wrong("unrecognised")
        if le(head, 508, 4) != zlib.crc32(head[:508]):
            raise Wrong("malformed")
        self.uuid = uuid or head[16:32]
        candidates = []
        for slot in (0, 1):  # R2
            raw = block(1 + slot)
            plain = unseal(
                superblock_key(key, self.uuid, raw[:32]), bytes(12), raw[32:], superblock_aad(slot, self.uuid)
            )
            if plain is not None:
                assert plain[:8] == b"JD2super"
                assert le(plain, 56, 8) % 2 == slot
                candidates.append((le(plain, 56, 8), plain, sha256(b"JD2R" + raw)))
        if not candidates:
            raise Wrong("unauthentic")
        for _, plain, root in sorted(candidates, reverse=True):  # R3
            self.super = plain
            self.geometry()
            chain = self.chain(root)
            while chain and not self.accepted(anchor, chain[-1][0], chain[-1][1]):
                chain.pop()
            if chain:
                break
        else:
            raise Wrong("stale")
        self.sequence, self.root = chain[-1][:2]
        self.commits = [entries for _, _, entries, _ in chain]
        self.load()

    def geometry(self) -> None:
        p = self.super
        self.epoch, self.session = le(p, 56, 8), p[168:200]
        self.blocks, self.end, self.segments = le(p, 72, 8), le(p, 80, 8), le(p, 88, 8)
        self.bits, self.journal = le(p, 96, 4), le(p, 100, 4)
        meta_start, meta_slots, self.data_start = le(p, 112, 8), le(p, 120, 8), le(p, 128, 8)
        assert le(p, 104, 8) == 8
        assert meta_start == 8 + self.journal
        size = 1 << self.bits
        assert self.data_start == -(-(meta_start + meta_slots) // size) * size
        assert self.end == self.data_start + self.segments * size
        assert not any(p[432:])
        self.slots = range(meta_start, meta_start + meta_slots)
        self.levels = {
            1: levels(self.blocks, 170), 2: levels(self.segments * size, 512), 3: levels(self.segments, 85)
        }  # fmt: skip
        assert meta_slots >= sum(sum(pages) for pages in self.levels.values()) + 64

    def accepted(self, anchor: tuple[bool, bytes, int, bytes] | None, sequence: int, root: bytes) -> bool:  # 13.3
        if anchor is None:
            return True
        still_open, session, least, exact = anchor
        return (sequence, root) == (least, exact) or (still_open and session == self.session and sequence > least)

    def chain(self, root: bytes) -> list[tuple[int, bytes, list[bytes], bool]]:
        """States: sequence number, root, journal entries of the commit, and whether it is ordered."""
        sequence = le(self.super, 64, 8)
        found: list[tuple[int, bytes, list[bytes], bool]] = [(sequence, root, [], True)]
        if le(self.super, 12, 4) & 1:
            return found
        entries: list[bytes] = []
        behind = False
        for index in range(self.journal):
            raw = self.block(8 + index)
            nonce = struct.pack("<QI", index, 0)
            plain = unseal(self.super[232:264], nonce, raw, journal_aad(self.epoch, index, root))
            if plain is None:
                break
            root = sha256(root + raw)
            assert (le(plain, 0, 8), le(plain, 8, 8), le(plain, 16, 4)) == (self.epoch, sequence + 1, index)
            count, flags = le(plain, 20, 2), le(plain, 22, 2)
            assert count <= 126
            assert not any(plain[32 + 32 * count :])
            entries += [plain[32 + 32 * n : 64 + 32 * n] for n in range(count)]
            behind = not flags & 1
            if flags & 1:
                sequence += 1
                found.append((sequence, root, entries, bool(flags & 2)))
                entries = []
        if len(found) > 1 and not found[-1][3] and not behind and not self.arrived(found):  # R3 c
            found.pop()
        return found

    def arrived(self, chain: list[tuple[int, bytes, list[bytes], bool]]) -> bool:
        keys = self.segment_keys([entries for _, _, entries, _ in chain])
        for entry in chain[-1][2]:
            if entry[7] == 1:
                lba, raw, tag = le(entry, 0, 7), le(entry, 8, 8), entry[16:]
                if self.data(keys, lba, raw, tag) is None:
                    return False
        return True

    def page(self, tree: int, level: int, index: int, ref: bytes) -> bytes:
        raw = le(ref, 0, 8)
        if raw == 0:
            assert not any(ref)
            return bytes(4096)
        assert raw in self.slots
        plain = unseal(ref[8:40], bytes(12), self.block(raw) + ref[40:], page_aad(tree, level, index, raw))
        if plain is None:
            raise Wrong(f"unauthentic page {tree} {level} {index}")
        return plain

    def leaves(self, tree: int) -> dict[int, bytes]:
        """All leaves of a tree that are no holes, by index."""
        at = 264 + 56 * (tree - 1)
        refs = {0: self.super[at : at + 56]}
        for level in range(len(self.levels[tree]) - 1, 0, -1):
            below = {}
            for index, ref in refs.items():
                page = self.page(tree, level, index, ref)
                for child in range(73):
                    if any(page[56 * child : 56 * child + 56]):
                        below[73 * index + child] = page[56 * child : 56 * child + 56]
            refs = below
        return {index: self.page(tree, 0, index, ref) for index, ref in refs.items() if any(ref)}

    def segment_keys(self, commits: list[list[bytes]]) -> dict[int, bytes]:
        keys = {}
        for index, page in self.leaves(3).items():
            for at in range(85):
                entry = page[48 * at : 48 * at + 48]
                if le(entry, 36, 4) & 1:
                    keys[85 * index + at] = entry[:32]
        for entries in commits:
            for first, second in itertools.pairwise(entries):
                if first[7] == 3:
                    assert second[7] == 4
                    keys[le(first, 0, 7)] = first[16:] + second[16:]
        return keys

    def data(self, keys: dict[int, bytes], lba: int, raw: int, tag: bytes) -> bytes | None:
        key = keys[(raw - self.data_start) >> self.bits]
        return unseal(key, struct.pack("<QI", raw, 0), self.block(raw) + tag, struct.pack("<Q", lba))

    def load(self) -> None:  # R5
        self.map: dict[int, tuple[int, bytes]] = {}
        for index, page in self.leaves(1).items():
            for at in range(170):
                raw = le(page, 24 * at, 8)
                if raw:
                    self.map[170 * index + at] = raw, page[24 * at + 8 : 24 * at + 24]
        self.keys = self.segment_keys(self.commits)
        for entries in self.commits:
            for entry in entries:
                value, b = le(entry, 0, 7), le(entry, 8, 8)
                if entry[7] == 1:
                    self.map[value] = b, entry[16:]
                elif entry[7] == 2:
                    for lba in range(value, value + b):
                        self.map.pop(lba, None)

    def read(self, lba: int) -> bytes:
        if lba not in self.map:
            return bytes(4096)
        plain = self.data(self.keys, lba, *self.map[lba])
        if plain is None:
            raise Wrong(f"unauthentic block {lba}")
        return plain
