"""The identification block: raw block 0, in clear, for tools and people; not trusted (format document, section 5)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from uuid import UUID

from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.errors import VolumeMalformed, VolumeUnrecognised, VolumeUnsupported
from jindiskd.jindisk.geometry import BLOCK

MAGIC = b"JinDisk2"
MAJOR, MINOR = 1, 0
LABEL_BYTES = 64
_FIELDS = struct.Struct("<8sHHI16sQQQQQ64s")
_CRC = struct.Struct("<I")
_CRC_AT = 508
WHAT = "identification block"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identification:
    """The fields of the identification block."""

    segment_bits: int
    uuid: UUID
    blocks: int
    end: int
    label: str = ""
    incompatible: int = 0
    readonly_compatible: int = 0
    compatible: int = 0

    def encode(self) -> bytes:
        """4096 bytes.

        Raises:
            InvalidArgument: the label has more than 64 bytes in UTF-8.
        """
        label = self.label.encode()
        if len(label) > LABEL_BYTES or b"\0" in label:
            raise InvalidArgument("the label", self.label, f"it has at most {LABEL_BYTES} bytes in UTF-8, none zero")
        head = _FIELDS.pack(
            MAGIC, MAJOR, MINOR, self.segment_bits, self.uuid.bytes, self.incompatible,
            self.readonly_compatible, self.compatible, self.blocks, self.end, label,
        ).ljust(_CRC_AT, b"\0")  # fmt: skip
        return (head + _CRC.pack(zlib.crc32(head))).ljust(BLOCK, b"\0")


def decode(block: bytes, where: str) -> Identification:
    """Read an identification block.

    Args:
        block: 4096 bytes.
        where: the device's name, for messages.

    Raises:
        VolumeUnrecognised: no magic.
        VolumeUnsupported: another version, or an unknown incompatible feature.
        VolumeMalformed: checksum, reserved bytes or label are wrong.
    """
    magic, major, _, bits, uuid, incompatible, readonly, compatible, blocks, end, label = _FIELDS.unpack_from(block)
    if magic != MAGIC:
        raise VolumeUnrecognised(where)
    if _CRC.unpack_from(block, _CRC_AT)[0] != zlib.crc32(block[:_CRC_AT]):
        raise VolumeMalformed(WHAT, "its checksum does not match")
    if major != MAJOR:
        raise VolumeUnsupported("major version", major)
    if incompatible:
        raise VolumeUnsupported("incompatible feature", hex(incompatible))
    if any(block[_FIELDS.size : _CRC_AT]) or any(block[_CRC_AT + _CRC.size :]):
        raise VolumeMalformed(WHAT, "reserved bytes are not zero")
    try:
        text = label.rstrip(b"\0").decode()
    except UnicodeDecodeError as exc:
        raise VolumeMalformed(WHAT, "its label is not UTF-8") from exc
    if "\0" in text:
        raise VolumeMalformed(WHAT, "its label goes on behind a zero")
    return Identification(
        segment_bits=bits,
        uuid=UUID(bytes=uuid),
        blocks=blocks,
        end=end,
        label=text,
        incompatible=incompatible,
        readonly_compatible=readonly,
        compatible=compatible,
    )
