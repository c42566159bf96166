"""Nodes of the index files of JinDisk 1: parsing and sealing (`docs/formats/jindisk1.md`, section 6).

A node is sealed under its file's key with a constant nonce and constant data beside it, so all nodes of a file share a
key stream, and their tags do not say where they belong. What is checked here beyond the tag are the rules that a node
keeps within itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import pairwise
from operator import lt

from jindiskd.jindisk.v1.keys import TAG_BYTES
from jindiskd.jindisk.v1.layout import INNER_BYTES, INNER_CHILDREN, LEAF_BYTES, LEAF_RECORDS, NONE

RECORD_BYTES = 40
"""PBA, u64; tag and key of the data block, 16 bytes each."""
RECORD = struct.Struct("<Q16s16s")
MARK = RECORD.pack(NONE, bytes(16), bytes(16))
_WORDS = RECORD_BYTES // 8
"""A deletion mark."""
_HEAD = struct.Struct("<BQ")
_KEYS_AT = _HEAD.size
_RECORDS_AT = _KEYS_AT + 4 * LEAF_RECORDS
_NEXT_AT = _RECORDS_AT + RECORD_BYTES * LEAF_RECORDS
_NEXT = struct.Struct("<Q")
_CHILD = struct.Struct("<BIQ")
LEAF_PLAIN = LEAF_BYTES - TAG_BYTES
INNER_PLAIN = INNER_BYTES - TAG_BYTES
assert _NEXT_AT + _NEXT.size == LEAF_PLAIN, "the table of the format's page"
assert _HEAD.size + _CHILD.size * INNER_CHILDREN == INNER_PLAIN, "the table of the format's page"
_POSITIONS = tuple(struct.Struct("<" + "Q32x" * count) for count in range(LEAF_RECORDS + 1))
_KEYS = tuple(struct.Struct(f"<{count}I") for count in range(LEAF_RECORDS + 1))


def pack_records(first: int, tags: bytes, keys: bytes) -> bytes:
    """The records of blocks at consecutive positions from `first` on, with 16 bytes of tag and of key for each."""
    count = len(tags) // 16
    packed = bytearray(count * RECORD_BYTES)
    places = memoryview(struct.pack(f"<{count}Q", *range(first, first + count))).cast("Q")
    seals, materials = memoryview(tags).cast("Q"), memoryview(keys).cast("Q")
    # Words are only copied here, so the machine's byte order does not matter.
    with memoryview(packed) as whole, whole.cast("Q") as words:
        words[0::_WORDS] = places
        words[1::_WORDS], words[2::_WORDS] = seals[0::2], seals[1::2]
        words[3::_WORDS], words[4::_WORDS] = materials[0::2], materials[1::2]
    return bytes(packed)



class BadNode(ValueError):
    """A node breaks a rule of the format; the text says which."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Records in order of keys. A key can come twice, as a live record and then a mark; the first counts."""

    keys: tuple[int, ...]
    positions: tuple[int, ...]
    """PBA of each; `NONE` for a deletion mark."""
    records: bytes = field(repr=False)
    """40 bytes each: they hold data keys."""
    next: int
    """Byte position of the next leaf, which the module follows and we do not."""
    marks: bool
    """Whether any is a deletion mark."""

    def record(self, number: int) -> bytes:
        """40 bytes."""
        return self.records[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]


@dataclass(frozen=True, slots=True)
class Inner:
    """Children in order of keys: the greatest key below each, and its byte position on the raw device."""

    keys: tuple[int, ...]
    positions: tuple[int, ...]
    leaves: bool
    """Whether the children are leaves."""


def parse_leaf(plain: bytes, data_blocks: int) -> Leaf:
    """Read a leaf in clear.

    Args:
        plain: 5649 bytes.
        data_blocks: every PBA is smaller, or a mark.

    Raises:
        BadNode: not a leaf, or against the format.
    """
    flags, count = _HEAD.unpack_from(plain)
    if not flags & 1:
        raise BadNode("it is an inner node where a leaf belongs")
    if not 1 <= count <= LEAF_RECORDS:
        raise BadNode(f"it has {count} records, of 1 to {LEAF_RECORDS}")
    keys = _KEYS[count].unpack_from(plain, _KEYS_AT)
    positions = _POSITIONS[count].unpack_from(plain, _RECORDS_AT)
    marks = max(positions) >= data_blocks
    if marks:
        for position in positions:
            if data_blocks <= position < NONE:
                raise BadNode(f"it points to data block {position}, of {data_blocks}")
    if not all(map(lt, keys, keys[1:])):
        for at, (before, after) in enumerate(pairwise(keys)):
            pair = before == after and positions[at] != NONE and positions[at + 1] == NONE
            if before >= after and not pair:
                raise BadNode(f"key {after} follows key {before}")
    records = plain[_RECORDS_AT : _RECORDS_AT + RECORD_BYTES * count]
    return Leaf(keys, positions, records, _NEXT.unpack_from(plain, _NEXT_AT)[0], marks)


def parse_inner(plain: bytes, start: int, end: int) -> Inner:
    """Read an inner node in clear.

    Args:
        plain: 425 bytes.
        start: first byte of the file's slot.
        end: behind its last byte.

    Raises:
        BadNode: not an inner node, or against the format.
    """
    flags, count = _HEAD.unpack_from(plain)
    if flags & 1:
        raise BadNode("it is a leaf where an inner node belongs")
    if not 1 <= count <= INNER_CHILDREN:
        raise BadNode(f"it has {count} children, of 1 to {INNER_CHILDREN}")
    children = [_CHILD.unpack_from(plain, _HEAD.size + _CHILD.size * number) for number in range(count)]
    leaves = children[0][0] & 1
    size = LEAF_BYTES if leaves else INNER_BYTES
    before = -1
    for kind, key, position in children:
        if kind & 1 != leaves:
            raise BadNode("its children are of both kinds")
        if key < before:
            raise BadNode(f"key {key} follows key {before}")
        if not start <= position <= end - size:
            raise BadNode(f"a child at byte {position} lies outside the slot")
        before = key
    return Inner(tuple(c[1] for c in children), tuple(c[2] for c in children), bool(leaves))


def build_leaf(keys: list[int], records: bytes, following: int) -> bytes:
    """The 5649 bytes of a leaf.

    Args:
        keys: 1 to 128, ascending.
        records: 40 bytes each.
        following: byte position of the next leaf; 0 in the last one, if it is not full.
    """
    count = len(keys)
    head = _HEAD.pack(1, count) + _KEYS[count].pack(*keys)
    return head.ljust(_RECORDS_AT, b"\0") + records.ljust(_NEXT_AT - _RECORDS_AT, b"\0") + _NEXT.pack(following)


def build_inner(children: list[tuple[int, int]], *, leaves: bool) -> bytes:
    """The 425 bytes of an inner node, of greatest keys and byte positions."""
    body = b"".join(_CHILD.pack(leaves, key, position) for key, position in children)
    return (_HEAD.pack(0, len(children)) + body).ljust(INNER_PLAIN, b"\0")
