"""A volume whose structures a faulty writer seals: what the tests of all of them share."""

from jd import small_geometry
from jd_forge import Forge, entry

GEOMETRY = small_geometry()
WRITTEN = [*range(200), 1000, 4095]
"""The logical blocks that have content."""
D = GEOMETRY.data_start
FREE = GEOMETRY.segments - 1
SPARE = {1, 2, FREE}
"""The segments that the cases name as free."""
TAG = b"t" * 16


def only_newest(forge: Forge) -> Forge:
    """Without the older superblock, so that no candidate takes the place of the wrong one."""
    forge.blocks.pop(2 - forge.reader.epoch % 2)
    return forge


def free_block(forge: Forge) -> int:
    """A raw block of a segment that is not in use."""
    free = next(s for s in range(GEOMETRY.segments) if s not in forge.reader.keys)
    return D + free * GEOMETRY.segment_blocks


def mapped(forge: Forge) -> bytes:
    """A MAP that is right."""
    raw, tag = forge.reader.map[0]
    return entry(1, 0, raw, tag)
