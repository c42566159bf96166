"""Exporting a JinDisk 1 volume as a raw image, in order of logical blocks; what was not written stays a hole."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from jindiskd.jindisk.bulk import lengthen
from jindiskd.jindisk.device import FileDevice, read_parts
from jindiskd.jindisk.errors import VolumeUnauthentic
from jindiskd.jindisk.native import native
from jindiskd.jindisk.pool import Pool, default_workers
from jindiskd.jindisk.runs import OpeningRun
from jindiskd.jindisk.v1.keys import blocks_of, open_run
from jindiskd.jindisk.v1.layout import BLOCK
from jindiskd.jindisk.v1.nodes import RECORD_BYTES
from jindiskd.jindisk.v1.volume import Volume, block_name

BATCH_BLOCKS = 1024
SMALL_BLOCKS = 8192
"""Below this, processes cost more than they bring."""
STEP_BLOCKS = 64
"""Read, opened and written at once."""
_COUNT = struct.Struct("<I")
_RESULT = struct.Struct("<BQQ")
_RECORD_WORDS, _TAG_AT = RECORD_BYTES // 8, 8
GOOD, BAD = 0, 1


def bulk_export(
    volume: Volume,
    target_fd: int,
    *,
    target_offset_bytes: int = 0,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> int:
    """Write the content of a volume to a file or device; returns the bytes of data written.

    Args:
        volume: open for reading, and nobody writes it meanwhile.
        target_fd: written at `target_offset_bytes` and after it. Holes are not written: what is there must be zeros,
            as in a new file, which is given its full length.
        target_offset_bytes: where the image begins in the target.
        progress: called with bytes of the volume done, and in all.
        workers: processes; None for one on each processor.

    Raises:
        VolumeError: the first block or node that cannot be read; the target is incomplete then.
        OSError: reading or writing failed.
    """
    total, written = volume.size_bytes, 0
    if workers is None:
        mapped = sum(entry.records for entry in volume.levels.entries)
        workers = default_workers() if mapped > SMALL_BLOCKS else 1
    tell = progress or (lambda _done, _total: None)
    lengthen(target_fd, target_offset_bytes + total)
    ends: list[int] = []

    def take() -> None:
        nonlocal written
        result, first, second = _RESULT.unpack(pool.next())
        if result == BAD:
            raise VolumeUnauthentic(block_name(first, volume.layout.data_start + second))
        written += first
        tell(min((ends.pop(0) + 1) * BLOCK, total), total)

    with Pool(_Worker(volume, target_fd, target_offset_bytes).work, workers) as pool:
        for keys, records in _batches(volume):
            while pool.full:
                take()
            ends.append(keys[-1])
            pool.give(_COUNT.pack(len(keys)) + struct.pack(f"<{len(keys)}I", *keys) + records)
        while pool.waiting:
            take()
    tell(total, total)
    return written


def _batches(volume: Volume) -> Iterator[tuple[list[int], bytes]]:
    """The mapped blocks within the volume's size, by the thousand."""
    limit = -(-volume.size_bytes // BLOCK)
    keys: list[int] = []
    records = bytearray()
    for some, theirs in volume.chunks():
        keys += some
        records += theirs
        while len(keys) >= BATCH_BLOCKS:
            part, keys = keys[:BATCH_BLOCKS], keys[BATCH_BLOCKS:]
            if part[-1] >= limit:
                keys = part + keys
                break
            yield part, bytes(records[: BATCH_BLOCKS * RECORD_BYTES])
            del records[: BATCH_BLOCKS * RECORD_BYTES]
        if keys and keys[-1] >= limit:
            break  # records of an earlier, longer table
    count = sum(key < limit for key in keys)
    for at in range(0, count, BATCH_BLOCKS):
        end = min(at + BATCH_BLOCKS, count)
        yield keys[at:end], bytes(records[at * RECORD_BYTES : end * RECORD_BYTES])


class _Worker:
    """The task, as it runs in the worker processes."""

    def __init__(self, volume: Volume, target_fd: int, offset: int) -> None:
        self._device, self._layout, self._size = volume.device, volume.layout, volume.size_bytes
        self._target = FileDevice(target_fd, name="the target", offset_bytes=offset)
        # Used again and again: memory that is new costs more than the cipher.
        self._room, self._plain = OpeningRun(STEP_BLOCKS), memoryview(bytearray(STEP_BLOCKS * BLOCK))
        self._plains = [self._plain[at : at + BLOCK] for at in range(0, len(self._plain), BLOCK)]
        self._native, self._sealed = native(), memoryview(bytearray(STEP_BLOCKS * BLOCK))

    def work(self, task: bytes) -> bytes:
        """Read, open and write some blocks; how many bytes, or which block is not authentic."""
        (count,) = _COUNT.unpack_from(task)
        keys = struct.unpack_from(f"<{count}I", task, _COUNT.size)
        at = _COUNT.size + 4 * count
        positions = struct.unpack_from("<" + f"Q{RECORD_BYTES - 8}x" * count, task, at)
        done = written = 0
        while done < count:
            run = 1
            lba, position = keys[done], positions[done]
            while (
                run < STEP_BLOCKS
                and done + run < count
                and keys[done + run] == lba + run
                and positions[done + run] == position + run
            ):
                run += 1
            room = [self._sealed[: run * BLOCK]] if self._native is not None else self._room.blocks[:run]
            read_parts(self._device, (self._layout.data_start + position) * BLOCK, room)
            start = at + done * RECORD_BYTES
            bad = self._open(position, task[start : start + run * RECORD_BYTES], run)
            if bad is not None:
                return _RESULT.pack(BAD, lba + bad, position + bad)
            # The last block of a size that is no multiple of 4096 is cut.
            length = min(run * BLOCK, self._size - lba * BLOCK)
            self._target.pwrite(lba * BLOCK, self._plain[:length])
            written += length
            done += run
        return _RESULT.pack(GOOD, written, 0)

    def _open(self, position: int, records: bytes, count: int) -> int | None:
        """Open blocks that were read; which one does not open."""
        keys = struct.unpack("24x16s" * count, records)
        if self._native is not None:
            tags = memoryview(records)[_TAG_AT:]
            good = self._native.unseal(
                blocks_of(keys, position), self._sealed, tags, self._plain, tag_step=RECORD_BYTES
            )
            return good if good < count else None
        words = memoryview(records).cast("Q")
        self._room.put_tags(words[1::_RECORD_WORDS], words[2::_RECORD_WORDS])
        return open_run(keys, position, self._room, self._plains[:count])
