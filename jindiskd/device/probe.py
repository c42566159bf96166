"""What a block device seems to carry, seen without a key: the program that udev's rules start.

    python3 -m jindiskd.device.probe NODE

It prints properties for udev, or nothing, and always ends with status 0. What it reads may be hostile: it reads
`HEAD_BYTES` at most, ends after `LIMIT_S`, and prints values of known alphabets alone. None of it is authentic; only
opening the volume with its key is. Imports little: udev starts it for many devices.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from jindiskd.errors import JindiskError
from jindiskd.jindisk import identification
from jindiskd.jindisk.geometry import BLOCK
from jindiskd.luks2 import layout

HEAD_BYTES = layout.HEADER_BYTES
"""The primary LUKS2 header with its JSON area; a volume of JinDisk shows itself in the first block."""
LIMIT_S = 10
JINDISK2, LUKS2 = "jindisk2", "luks2"
KINDS = (JINDISK2, LUKS2)
"""A volume of JinDisk 1 shows nothing without its key: it is known by its partition alone."""
PREFIX = "JINDISK_"
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789#+-.:=@_/")
_DECIMAL = re.compile(r"[1-9][0-9]{0,17}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What seems to be there. Not authentic."""

    kind: str
    """One of `KINDS`."""
    uuid: str
    """Of the volume, lower case."""
    size_bytes: int
    """Logical size."""
    label: str = ""

    def properties(self) -> dict[str, str]:
        """As properties for udev; values are of letters, digits and `#+-.:=@_/`, others as `\\xHH`."""
        told = {"KIND": self.kind, "UUID": self.uuid, "SIZE": str(self.size_bytes), "LABEL_ENC": encoded(self.label)}
        return {PREFIX + name: value for name, value in told.items() if value}


def encoded(text: str) -> str:
    """Text of others in the alphabet that udev's own properties have: everything else as `\\xHH`, byte by byte."""
    return "".join(c if c in _PLAIN else "".join(f"\\x{byte:02x}" for byte in c.encode()) for c in text)


def decoded(text: str) -> str:
    """What `encoded` made of a text; what is no such text is replaced."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), text.encode())
    return raw.decode(errors="replace")


def probe(head: bytes) -> Found | None:
    """Tell what the beginning of a device is.

    Args:
        head: the first `HEAD_BYTES` bytes, or all of a shorter device.

    Returns:
        None if it is nothing of ours, or damaged.
    """
    if len(head) < BLOCK:
        return None
    for look in (_jindisk2, _luks2):
        try:
            found = look(head)
        except (JindiskError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue  # the last three: a JSON area of another shape
        if found is not None:
            return found
    return None


def _jindisk2(head: bytes) -> Found | None:
    if not head.startswith(identification.MAGIC):
        return None
    there = identification.decode(head[:BLOCK], "device")
    if there.blocks >= 1 << 51:
        return None
    return Found(kind=JINDISK2, uuid=str(there.uuid), size_bytes=there.blocks * BLOCK, label=there.label)


def _luks2(head: bytes) -> Found | None:
    """A LUKS2 header of the form that images have: one key slot without cost, and a segment of fixed length."""
    if not head.startswith(layout.MAGIC_PRIMARY) or len(head) < layout.HEADER_BYTES:
        return None
    header, area = layout.parse_copy(head[: layout.HEADER_BYTES], primary=True)
    values = json.loads(area.rstrip(b"\0"))
    slots, segments = values["keyslots"], values["segments"]
    kdf, segment = slots["0"]["kdf"], segments["0"]
    ours = (
        list(slots) == ["0"]
        and list(segments) == ["0"]
        and values["tokens"] == {}
        and (kdf["type"], kdf["iterations"]) == ("pbkdf2", layout.ITERATIONS)
        and segment["encryption"] == layout.CIPHER
        and segment["offset"] == str(layout.DATA_OFFSET_BYTES)
    )
    size = segment["size"]
    if not ours or not isinstance(size, str) or not _DECIMAL.fullmatch(size) or not _UUID.fullmatch(header.uuid):
        return None
    return Found(kind=LUKS2, uuid=str(UUID(header.uuid)), size_bytes=int(size))


def read_head(node: str) -> bytes:
    """The beginning of a block device.

    Raises:
        OSError: it cannot be read, or is no block device.
    """
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            raise OSError(f"{node} is no block device")
        return os.pread(fd, HEAD_BYTES, 0)
    finally:
        os.close(fd)


def main(arguments: Sequence[str]) -> int:
    """Print the properties of the device that is named; udev reads them."""
    signal.alarm(LIMIT_S)
    try:
        found = probe(read_head(arguments[0])) if len(arguments) == 1 else None
    except OSError:
        return 0
    if found is not None:
        sys.stdout.write("".join(f"{name}={value}\n" for name, value in found.properties().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
