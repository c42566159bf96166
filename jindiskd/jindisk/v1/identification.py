"""Is there a JinDisk 1 volume? Looked at without a key (`docs/formats/jindisk1.md`, section 8).

The format has no mark in clear, and its superblock looks like random bytes. But its catalogue is in clear: where it
names an index file whose root opens under the key beside it, this is a volume, and its data are open to the finder.
An empty volume has no such file, and can only be guessed.
"""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass

from jindiskd.jindisk.device import Device
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError
from jindiskd.jindisk.v1 import superblock
from jindiskd.jindisk.v1.catalogue import Entry, read_catalogue
from jindiskd.jindisk.v1.index_file import IndexFile, LeafCache
from jindiskd.jindisk.v1.layout import BLOCK, MAX_SEGMENTS, RESERVE_SEGMENTS, Layout, largest_layout
from jindiskd.jindisk.v1.volume import Volume, measurement

COMPRESSED_AT_LEAST = 140
"""Of the superblock's 148 bytes, if they are random."""


class Certainty(enum.StrEnum):
    """How sure it is."""

    NO = "no"
    POSSIBLE = "possible"
    """Like an empty volume, or like random bytes before zeros."""
    CERTAIN = "certain"


@dataclass(frozen=True, slots=True)
class Detection:
    """What was found on a device."""

    certainty: Certainty
    layout: Layout | None
    """The layout that fits, unless there is none."""


def identify(device: Device, *, segments: int | None = None) -> Detection:
    """Look for a JinDisk 1 volume, reading at most some hundred KiB.

    Args:
        device: any.
        segments: S, of the layout to try; None for the one that the module's tools choose for the device's size. A
            volume with another layout is not found without its key: `open_volume` finds it.

    Raises:
        VolumeDeviceFailed: reading failed.
    """
    layout = largest_layout(device.size_bytes) if segments is None else Layout(segments)
    if layout is None or not RESERVE_SEGMENTS < layout.segments <= MAX_SEGMENTS:
        return Detection(Certainty.NO, None)
    if device.size_bytes < layout.total_bytes:
        return Detection(Certainty.NO, None)
    try:
        head = device.pread(0, superblock.SEALED_BYTES)
        entries = read_catalogue(device, layout)
        if entries:
            IndexFile(device, layout, entries[0], LeafCache()).leaf(0)
            return Detection(Certainty.CERTAIN, layout)
        tables = device.pread(layout.svt_start * BLOCK, layout.svt_blocks * BLOCK)
    except OSError as exc:
        raise VolumeDeviceFailed("looking for a JinDisk 1 volume", exc) from exc
    except VolumeDeviceFailed:
        raise
    except VolumeError:
        return Detection(Certainty.NO, None)
    if any(tables) or len(zlib.compress(head)) < COMPRESSED_AT_LEAST:
        return Detection(Certainty.NO, None)
    return Detection(Certainty.POSSIBLE, layout)


def dump(volume: Volume) -> dict[str, object]:
    """What is to be told about an open volume, without keys; ready for JSON.

    Raises:
        OSError: reading failed.
    """
    layout = volume.layout
    fields = superblock.fields_of(layout)
    fields["checksum"] = superblock.checksum(superblock.encode(layout))
    return {
        "format": "JinDisk 1",
        "protection": "none: the keys of all data are on the disk in clear",
        "size_bytes": volume.size_bytes,
        "segments": layout.segments,
        "total_bytes": layout.total_bytes,
        "superblock": fields,
        "measurement": measurement(volume.device).hex(),
        "tables": {
            name.lower(): {"raw_block": start, "blocks_per_copy": blocks} for name, start, blocks in layout.tables
        },
        "slots": layout.slots,
        "level1_capacity": layout.cap,
        "index_files": [_file(entry) for entry in sorted(volume.levels.entries, key=lambda e: e.slot)],
    }


def _file(entry: Entry) -> dict[str, int]:
    names = ("slot", "level", "version", "first", "last", "records", "root")
    return {name: getattr(entry, name) for name in names}
