"""A writer of volumes that are authentic and wrong: what only a faulty or hostile *writer* with the key could make.

Built on the second reader, so that it does not inherit the engine's idea of the format.
"""

import os
import struct
from collections.abc import Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from jd_reader import Reader, journal_aad, page_aad, sha256, superblock_aad, superblock_key

BLOCK = 4096
TOP = {1: 264, 2: 320, 3: 376}
"""Offset of a tree's top reference in the superblock."""


class Forge:
    """Changes structures of the newest state in place, and seals again whatever depends on them."""

    def __init__(self, blocks: dict[int, bytes], key: bytes) -> None:
        self.blocks, self.key = dict(blocks), key
        self.reader = Reader(self._get, key, None, None)
        self.plain = bytearray(self.reader.super)

    def _get(self, raw: int) -> bytes:
        return self.blocks.get(raw, bytes(BLOCK))

    def superblock(self, at: int, data: bytes, slot: int | None = None) -> None:
        """Patch the superblock's plaintext, and seal it again where it was, or for another slot."""
        self.plain[at : at + len(data)] = data
        place = self.reader.epoch % 2 if slot is None else slot
        salt = os.urandom(32)
        sealing = AESGCM(superblock_key(self.key, self.reader.uuid, salt))
        sealed = sealing.encrypt(bytes(12), bytes(self.plain), superblock_aad(place, self.reader.uuid))
        self.blocks[1 + place] = salt + sealed

    def page(self, tree: int, level: int, index: int, at: int, data: bytes) -> None:
        """Patch a page that exists, and seal it again with all above it."""
        path = [(level, index)]
        while path[-1][0] < len(self.reader.levels[tree]) - 1:
            path.append((path[-1][0] + 1, path[-1][1] // 73))
        ref = bytes(self.plain[TOP[tree] : TOP[tree] + 56])
        refs = {path[-1]: ref}
        for above, below in zip(path[::-1], path[-2::-1], strict=False):
            page = self.reader.page(tree, *above, refs[above])
            refs[below] = page[56 * (below[1] % 73) : 56 * (below[1] % 73) + 56]
        for place in path:
            ref = refs[place]
            page = bytearray(self.reader.page(tree, *place, ref))
            page[at : at + len(data)] = data
            raw = int.from_bytes(ref[:8], "little")
            sealed = AESGCM(ref[8:40]).encrypt(bytes(12), bytes(page), page_aad(tree, *place, raw))
            self.blocks[raw] = sealed[:BLOCK]
            at, data = 56 * (place[1] % 73), ref[:40] + sealed[BLOCK:]
        self.superblock(TOP[tree], data)

    def first_leaf(self, tree: int) -> int:
        """Index of the first leaf that is no hole."""
        return min(self.reader.leaves(tree))

    def journal(self, plains: Sequence[bytes]) -> bytes:
        """Make these plaintexts (4080 bytes, or their beginning) the newest superblock's journal; the root after it."""
        root = sha256(b"JD2R" + self.blocks[1 + self.reader.epoch % 2])
        for index, plain in enumerate(plains):
            aad = journal_aad(self.reader.epoch, index, root)
            nonce = struct.pack("<QI", index, 0)
            sealed = AESGCM(bytes(self.plain[232:264])).encrypt(nonce, plain.ljust(BLOCK - 16, b"\0"), aad)
            self.blocks[8 + index] = sealed
            root = sha256(root + sealed)
        return root

    def commit(self, entries: Sequence[bytes], **changes: int) -> bytes:
        """The plaintext of a journal block, its head's fields changed as told."""
        head = {
            "epoch": self.reader.epoch, "sequence": int.from_bytes(self.plain[64:72], "little") + 1, "index": 0,
            "count": len(entries), "flags": 1, "zero": 0,
        } | changes  # fmt: skip
        return struct.pack("<QQIHHQ", *head.values()) + b"".join(entries)


def entry(kind: int, value: int, b: int = 0, c: bytes = bytes(16)) -> bytes:
    """A journal entry."""
    return struct.pack("<QQ16s", kind << 56 | value, b, c)
