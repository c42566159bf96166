"""A small strict reader of DER (ITU-T X.690), as much as AMD's certificates and revocation lists need.

AMD's chip certificates have serial number 0, which RFC 5280 forbids and which general X.509 libraries warn about or
refuse; so certificates are taken apart here, and only keys and signatures go to a library. Every length is checked
against its container, lengths must be minimal, and nothing recurses.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from jindiskd.attest.model import MalformedEvidence

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, NULL, OID = 0x01, 0x02, 0x03, 0x04, 0x05, 0x06
UTF8_STRING, PRINTABLE_STRING, TELETEX_STRING, IA5_STRING = 0x0C, 0x13, 0x14, 0x16
UTC_TIME, GENERALIZED_TIME = 0x17, 0x18
SEQUENCE, SET = 0x30, 0x31
STRINGS = frozenset({UTF8_STRING, PRINTABLE_STRING, TELETEX_STRING, IA5_STRING})
MAX_CHILDREN = 4096
MAX_OID_BYTES = 64
CRITICAL = b"\x01\x01\xff"
"""BOOLEAN true."""


def context(number: int) -> int:
    """The tag byte of a constructed, context-specific element `[number]`."""
    return 0xA0 | number


class Element(NamedTuple):
    """One element: its tag byte, its content, and all its bytes as they stood."""

    tag: int
    content: bytes
    raw: bytes


def read(data: bytes, offset: int = 0) -> tuple[Element, int]:
    """The element at `offset` of `data`, and the offset just after it.

    Raises:
        MalformedEvidence: truncated, indefinite or not minimal length, or a tag number of 31 and above.
    """
    if offset + 2 > len(data):
        raise MalformedEvidence("DER structure", "it ends within an element")
    tag, length, start = data[offset], data[offset + 1], offset + 2
    if tag & 0x1F == 0x1F:
        raise MalformedEvidence("DER structure", f"it has a long tag at offset {offset}")
    if length >= 0x80:
        size = length & 0x7F
        if not 1 <= size <= 4 or start + size > len(data):
            raise MalformedEvidence("DER structure", f"the length at offset {offset + 1} is not usable")
        length = int.from_bytes(data[start : start + size], "big")
        start += size
        if length < 0x80 or length >> (8 * (size - 1)) == 0:
            raise MalformedEvidence("DER structure", f"the length at offset {offset + 1} is not minimal")
    end = start + length
    if end > len(data):
        raise MalformedEvidence("DER structure", f"the element at offset {offset} is longer than what holds it")
    return tuple.__new__(Element, (tag, data[start:end], data[offset:end])), end


def ends_at(data: bytes) -> int:
    """The offset just after the first element of `data`; raises as `read`. Copies nothing of the usual long ones."""
    if len(data) > 4 and data[1] == 0x82 and data[2] and data[0] & 0x1F != 0x1F:
        end = 4 + (data[2] << 8 | data[3])
        if end <= len(data):
            return end
    return read(data)[1]


def whole(data: bytes, tag: int, what: str) -> Element:
    """`data` as exactly one element of tag `tag`, with nothing after it."""
    element, end = read(data)
    if element.tag != tag or end != len(data):
        raise MalformedEvidence(what, "it is not exactly one DER element of the right kind")
    return element


def children(element: Element) -> list[Element]:
    """The elements inside a constructed element, in order; at most `MAX_CHILDREN`."""
    found: list[Element] = []
    data, offset, make = element.content, 0, tuple.__new__
    size = len(data)
    while offset < size:
        # The short form without a call, since that is what nearly all elements have; `read` judges all others.
        tag, start = data[offset], offset + 2
        if start <= size and (length := data[offset + 1]) < 0x80 and tag & 0x1F != 0x1F and start + length <= size:
            end = start + length
            found.append(make(Element, (tag, data[start:end], data[offset:end])))
            offset = end
        else:
            child, offset = read(data, offset)
            found.append(child)
        if len(found) > MAX_CHILDREN:
            raise MalformedEvidence("DER structure", f"it has more than {MAX_CHILDREN} parts")
    return found


def short_extension(data: bytes, at: int) -> tuple[str, bool, bytes, int] | None:
    """At offset `at` an extension of a certificate (RFC 5280 section 4.1) whose parts are all short: its dotted name,
    whether it is critical, its value, and the offset just after it.

    None where something else stands there, for `read` to judge: nearly all extensions of AMD's certificates have this
    form, and are read here without an object for each part.
    """
    size = len(data)
    if at + 6 > size or data[at] != SEQUENCE or data[at + 2] != OID:
        return None
    length, value = data[at + 1], at + 4 + data[at + 3]
    end = at + 2 + length
    if length >= 0x80 or end > size or value + 2 > end:
        return None
    name = data[at + 4 : value]
    critical = data[value : value + 3] == CRITICAL
    if critical:
        value += 3
        if value + 2 > end:
            return None
    # The value's length is short, since it reaches the end of what is itself shorter than 0x80.
    if data[value] != OCTET_STRING or value + 2 + data[value + 1] != end:
        return None
    if not name or name[-1] & 0x80 or len(name) > MAX_OID_BYTES:
        return None
    return _dotted(name), critical, data[value + 2 : end], end


def sequence(element: Element, what: str, *forms: tuple[int, ...]) -> list[Element]:
    """The elements inside, whose tags must be exactly those of one of `forms`."""
    found = children(element)
    tags = tuple([part.tag for part in found])
    if tags not in forms:
        shown = " ".join(f"{tag:02x}" for tag in tags[:16]) or "none"
        raise MalformedEvidence(what, f"its parts have the tags {shown}")
    return found


class Fields:
    """Walks the children of a SEQUENCE or SET in order, by tag, and refuses what is left over."""

    def __init__(self, element: Element, what: str) -> None:
        """`what` names the structure in errors."""
        self._parts = children(element)
        self._next = 0
        self._what = what

    def take(self, tag: int) -> Element:
        """The next element, which must have tag `tag`."""
        at = self._next
        if at < len(self._parts) and self._parts[at].tag == tag:
            self._next = at + 1
            return self._parts[at]
        raise MalformedEvidence(self._what, f"an element with tag 0x{tag:02x} is missing")

    def optional(self, *tags: int) -> Element | None:
        """The next element if its tag is among `tags`, else None."""
        at = self._next
        if at < len(self._parts) and self._parts[at].tag in tags:
            self._next = at + 1
            return self._parts[at]
        return None

    def end(self) -> None:
        """Refuse anything that was not taken."""
        if self._next < len(self._parts):
            tag = self._parts[self._next].tag
            raise MalformedEvidence(self._what, f"an unexpected element with tag 0x{tag:02x}")


def oid(element: Element) -> str:
    """An OBJECT IDENTIFIER in dotted form."""
    content = element.content
    if element.tag != OID or not content or content[-1] & 0x80 or len(content) > MAX_OID_BYTES:
        raise MalformedEvidence("DER structure", "an object identifier is not valid")
    return _dotted(content)


@lru_cache(maxsize=256)
def _dotted(content: bytes) -> str:
    arcs, value, fresh = [], 0, True
    for byte in content:
        if fresh and byte == 0x80:
            raise MalformedEvidence("DER structure", "an object identifier is not minimal")
        value, fresh = value << 7 | byte & 0x7F, byte < 0x80
        if fresh:
            arcs.append(value)
            value = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(str(arc) for arc in [first, arcs[0] - 40 * first, *arcs[1:]])


def integer(element: Element) -> int:
    """An INTEGER, which must be minimal and not longer than 64 bytes."""
    content = element.content
    if element.tag != INTEGER or not 1 <= len(content) <= 64:
        raise MalformedEvidence("DER structure", "an integer is not valid")
    if len(content) > 1 and (content[0], content[1] >> 7) in {(0, 0), (0xFF, 1)}:
        raise MalformedEvidence("DER structure", "an integer is not minimal")
    return int.from_bytes(content, "big", signed=True)


def octet(data: bytes, what: str) -> int:
    """`data` as exactly one INTEGER from 0 to 255: it has two forms, with one byte of content or with two."""
    if len(data) == 3 and data[0] == INTEGER and data[1] == 1 and data[2] < 0x80:
        return data[2]
    if len(data) == 4 and data[:3] == b"\x02\x02\x00" and data[3] >= 0x80:
        return data[3]
    raise MalformedEvidence(what, "a number is not one from 0 to 255")


def boolean(element: Element) -> bool:
    """A BOOLEAN; true is 0xFF and nothing else in DER."""
    if element.tag != BOOLEAN or element.content not in {b"\x00", b"\xff"}:
        raise MalformedEvidence("DER structure", "a truth value is not valid")
    return element.content == b"\xff"


def bit_string(element: Element) -> bytes:
    """A BIT STRING of whole bytes."""
    if element.tag != BIT_STRING or element.content[:1] != b"\x00":
        raise MalformedEvidence("DER structure", "a bit string is not of whole bytes")
    return element.content[1:]


def text(element: Element) -> str:
    """A character string, as Latin-1 where it is not UTF-8, so that every byte is kept for comparison."""
    if element.tag not in STRINGS:
        raise MalformedEvidence("DER structure", "a character string is of an unknown kind")
    try:
        return element.content.decode("utf-8" if element.tag == UTF8_STRING else "latin-1")
    except UnicodeDecodeError as exc:
        raise MalformedEvidence("DER structure", "a character string is not UTF-8") from exc


def time(element: Element) -> datetime:
    """A UTCTime or GeneralizedTime in the one form that RFC 5280 section 4.1.2.5 allows: seconds, and Z."""
    try:
        digits = element.content.decode("ascii")
        if element.tag == UTC_TIME and len(digits) == 13:
            digits = ("20" if digits[:2] < "50" else "19") + digits
        if element.tag not in {UTC_TIME, GENERALIZED_TIME} or len(digits) != 15 or digits[14] != "Z":
            raise ValueError(digits)
        if not digits[:14].isdigit():
            raise ValueError(digits)
        return datetime.fromisoformat(f"{digits[:8]}T{digits[8:14]}+00:00")
    except ValueError as exc:
        raise MalformedEvidence("DER structure", "a time is not valid") from exc


def encode(tag: int, content: bytes) -> bytes:
    """One element in DER."""
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    size = (length.bit_length() + 7) // 8
    return bytes([tag, 0x80 | size]) + length.to_bytes(size, "big") + content
