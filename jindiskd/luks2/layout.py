"""Where things lie in a LUKS2 header, and its binary part. Standard library only.

Source: "LUKS2 On-Disk Format Specification", version 1.1.1, sections 2 (binary header) and 3 (JSON area). All integers
of the binary header are big-endian. A header is stored twice: the binary part and the JSON area of `HEADER_BYTES`
together at offset 0, the second copy directly behind, then the key slot area, then the data.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from jindiskd.errors import EXIT_INTEGRITY, JindiskError

MAGIC_PRIMARY = b"LUKS\xba\xbe"
MAGIC_SECONDARY = b"SKUL\xba\xbe"
VERSION = 2
CHECKSUM = b"sha256"

BINARY_BYTES = 4096
HEADER_BYTES = 16384
"""Binary part and JSON area of one copy; the smallest size the format allows."""
JSON_BYTES = HEADER_BYTES - BINARY_BYTES
KEYSLOTS_OFFSET_BYTES = 2 * HEADER_BYTES
DATA_OFFSET_BYTES = 1 << 20
"""Both copies and the key slot area; the data starts on a mebibyte, so that it is aligned on any device."""
KEYSLOTS_BYTES = DATA_OFFSET_BYTES - KEYSLOTS_OFFSET_BYTES

KEY_BYTES = 64
"""Two AES-256 keys: XTS takes one for the data and one for the tweak."""
SECTOR_BYTES = 4096
CIPHER = "aes-xts-plain64"
HASH = "sha256"
DIGEST_BYTES = 32
SALT_BYTES = 32
STRIPES = 4000
"""Anti-forensic stripes; every LUKS2 implementation requires this number."""
ITERATIONS = 1000
"""The least that cryptsetup accepts. See `luks2.header` for why the least is enough."""
SLOT_AREA_BYTES = (KEY_BYTES * STRIPES + 4095) // 4096 * 4096
AREA_SECTOR_BYTES = 512
"""Key slot areas are encrypted in sectors of this size, whatever the size for the data is."""
TWEAK_UNIT_BYTES = 512
"""`plain64` counts in this unit from the start of the segment, whatever the sector size (no `iv_large_sectors`)."""

_BINARY = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_CHECKSUM_OFFSET = _BINARY.size - 64


class Luks2HeaderRefused(JindiskError, code="Luks2HeaderRefused", exit_code=EXIT_INTEGRITY):
    """A LUKS2 header is damaged, foreign or was tampered with; nothing was opened."""

    def __init__(self, field: str, problem: str) -> None:
        """`field` is a dotted path such as `segments.0.encryption`, `problem` what is wrong with it."""
        super().__init__(
            f"the LUKS2 header is refused: {field} {problem}; use the disk image as it was built, or build it again"
        )
        self.field, self.problem = field, problem


@dataclass(frozen=True, slots=True, kw_only=True)
class BinaryHeader:
    """The binary part of one copy, without what is the same in every header of ours."""

    primary: bool
    uuid: str
    salt: bytes
    """64 random bytes that make the two copies differ; they protect nothing."""
    sequence: int = 1

    @property
    def offset_bytes(self) -> int:
        """Where this copy begins on the device."""
        return 0 if self.primary else HEADER_BYTES

    def pack(self, json_area: bytes) -> bytes:
        """One copy of the header, `HEADER_BYTES` long, with its checksum over both parts."""
        blank = _BINARY.pack(
            MAGIC_PRIMARY if self.primary else MAGIC_SECONDARY,
            VERSION,
            HEADER_BYTES,
            self.sequence,
            b"",
            CHECKSUM,
            self.salt,
            self.uuid.encode("ascii"),
            b"",
            self.offset_bytes,
            b"",
            b"",
        ).ljust(BINARY_BYTES, b"\0")
        copy = bytearray(blank + json_area)
        digest = hashlib.sha256(copy).digest()
        copy[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + len(digest)] = digest
        return bytes(copy)


def parse_copy(copy: bytes, *, primary: bool) -> tuple[BinaryHeader, bytes]:
    """Read one copy of a header, `HEADER_BYTES` long, into its binary part and its JSON area.

    Strict: whatever `BinaryHeader` does not carry must be what `pack` writes, padding included.

    Raises:
        Luks2HeaderRefused: anything else, a wrong checksum included.
    """
    which = "primary" if primary else "secondary"
    if len(copy) != HEADER_BYTES:
        raise Luks2HeaderRefused(which, f"is {len(copy)} bytes long instead of {HEADER_BYTES}")
    magic, version, size, sequence, _, _, salt, uuid, _, offset, _, checksum = _BINARY.unpack_from(copy)
    if magic != (MAGIC_PRIMARY if primary else MAGIC_SECONDARY):
        raise Luks2HeaderRefused(f"{which}.magic", "is not that of LUKS2")
    if version != VERSION:
        raise Luks2HeaderRefused(f"{which}.version", f"is {version} instead of {VERSION}")
    if size != HEADER_BYTES:
        raise Luks2HeaderRefused(f"{which}.hdr_size", f"is {size} instead of {HEADER_BYTES}")
    if offset != (0 if primary else HEADER_BYTES):
        raise Luks2HeaderRefused(f"{which}.hdr_offset", f"is {offset}")
    try:
        text = uuid.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError as exc:
        raise Luks2HeaderRefused(f"{which}.uuid", "is not text") from exc
    json_area = copy[BINARY_BYTES:]
    blank = bytearray(copy)
    blank[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + 64] = bytes(64)
    if hashlib.sha256(blank).digest().ljust(64, b"\0") != checksum:
        raise Luks2HeaderRefused(f"{which}.csum", "does not fit the content")
    header = BinaryHeader(primary=primary, uuid=text, salt=salt, sequence=sequence)
    if header.pack(json_area) != copy:
        raise Luks2HeaderRefused(which, "carries a label, a subsystem, another checksum or data in its padding")
    return header, json_area
