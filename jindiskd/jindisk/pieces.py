"""Pieces of a clear image, as a load reads them: where data may be, and which blocks of a piece are not zero."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.geometry import BLOCK

PIECE_BLOCKS = 256
"""Read at once."""
Run = tuple[int, int]
"""First block and count."""
_ZERO, _WORDS = bytes(BLOCK), BLOCK // 8


def data_pieces(fd: int, offset: int, blocks: int) -> Iterator[Run]:
    """The pieces of the source that may hold data, in order: runs of at most 256 blocks."""
    at, end = 0, blocks * BLOCK
    while at < end:
        try:
            start = os.lseek(fd, offset + at, os.SEEK_DATA) - offset
            stop = os.lseek(fd, offset + start, os.SEEK_HOLE) - offset
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # only a hole follows, or the end
            if exc.errno != errno.EINVAL:
                raise
            start, stop = at, end  # a device that knows no holes
        first, last = max(at, start) // BLOCK, -(-min(stop, end) // BLOCK)
        for block in range(first, last, PIECE_BLOCKS):
            yield block, min(PIECE_BLOCKS, last - block)
        at = last * BLOCK


def pieces_of(ranges: Sequence[tuple[int, int]], blocks: int) -> Iterator[Run]:
    """The given parts of the source as runs of at most 256 blocks."""
    before = 0
    for offset, length in ranges:
        first, last = offset // BLOCK, (offset + length) // BLOCK
        if offset % BLOCK or length % BLOCK or not before <= first < last <= blocks:
            raise InvalidArgument("a range of", f"{length} bytes at {offset}", "whole blocks, in order, in the image")
        for block in range(first, last, PIECE_BLOCKS):
            yield block, min(PIECE_BLOCKS, last - block)
        before = last


class PieceBuffer:
    """Memory for a piece of the source."""

    def __init__(self) -> None:
        self._memory = bytearray(PIECE_BLOCKS * BLOCK)
        self.view = memoryview(self._memory)
        self._words = self.view.cast("Q")
        self.blocks = [self.view[at : at + BLOCK] for at in range(0, len(self.view), BLOCK)]

    def read(self, fd: int, offset: int, count: int) -> None:
        """Blocks of the source; zeros behind its end."""
        done, end = 0, count * BLOCK
        while done < end:
            more = os.preadv(fd, [self.view[done:end]], offset + done)
            if not more:
                self.view[done:end] = bytes(end - done)
                return
            done += more

    def runs(self, count: int) -> Iterator[Run]:
        """Which of the first blocks are not zero."""
        start = 0
        for block, word in enumerate(self._words[: count * _WORDS : _WORDS]):
            if not word and self._memory[block * BLOCK : (block + 1) * BLOCK] == _ZERO:
                if block > start:
                    yield start, block - start
                start = block + 1
        if count > start:
            yield start, count - start
