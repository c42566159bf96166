"""The anchor of a volume in a file, for whoever has no broker: 120 bytes that must not lie where the volume lies.

| offset | size | |
|---|---|---|
| 0 | 8 | magic `JD2state` |
| 8 | 4 | version 1, u32 little-endian |
| 12 | 4 | zero |
| 16 | 16 | the volume's UUID |
| 32 | 73 | the anchor (format document, section 13.1) |
| 105 | 11 | zero |
| 116 | 4 | CRC-32 of the bytes before, u32 little-endian; against accidents |

The file is no secret, but whoever can change it can have an old state accepted. It is replaced as a whole, durably,
before anything that depends on it goes on; one at a time, under a lock of its directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from jindiskd.base.anchor import ANCHOR_BYTES, Anchor, State
from jindiskd.base.files import replace_file
from jindiskd.errors import EXIT_INTEGRITY, AlreadyExists, InvalidArgument, JindiskError
from jindiskd.jindisk.errors import VolumeFenced

MAGIC = b"JD2state"
VERSION = 1
FILE_BYTES = 120
_HEAD = struct.Struct("<8sII16s")
_CRC = struct.Struct("<I")
_ANCHOR_END = _HEAD.size + ANCHOR_BYTES
_CRC_AT = FILE_BYTES - _CRC.size


class AnchorFileDamaged(JindiskError, code="AnchorFileDamaged", exit_code=EXIT_INTEGRITY):
    """A file that should hold an anchor holds something else."""

    def __init__(self, path: Path, why: str) -> None:
        """`why` in words."""
        super().__init__(
            f"{path} is no anchor file: {why}; restore it, or open the volume unanchored and make a new one"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What an anchor file holds."""

    uuid: UUID
    anchor: Anchor

    def encode(self) -> bytes:
        """120 bytes."""
        head = _HEAD.pack(MAGIC, VERSION, 0, self.uuid.bytes) + self.anchor.pack()
        head = head.ljust(_CRC_AT, b"\0")
        return head + _CRC.pack(zlib.crc32(head))


def read(path: Path) -> Remembered:
    """Read an anchor file.

    Raises:
        AnchorFileDamaged: it is none.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(FILE_BYTES + 1)
    if len(data) != FILE_BYTES:
        raise AnchorFileDamaged(path, f"it has not {FILE_BYTES} bytes")
    magic, version, zero, uuid = _HEAD.unpack_from(data)
    if magic != MAGIC or _CRC.unpack_from(data, _CRC_AT)[0] != zlib.crc32(data[:_CRC_AT]):
        raise AnchorFileDamaged(path, "its magic number or checksum is wrong")
    if version != VERSION or zero or any(data[_ANCHOR_END:_CRC_AT]) or data[_HEAD.size] > 1:
        raise AnchorFileDamaged(path, "its version is another, or reserved bytes are not zero")
    return Remembered(uuid=UUID(bytes=uuid), anchor=Anchor.unpack(data[_HEAD.size : _ANCHOR_END]))


def write(path: Path, remembered: Remembered, *, replace: bool) -> None:
    """Write an anchor file, durably.

    Raises:
        AlreadyExists: there is a file, and it is not to be replaced.
        OSError: it cannot be written.
    """
    with _locked(path):
        if not replace and path.exists():
            raise AlreadyExists("the anchor file", os.fspath(path))
        replace_file(path, remembered.encode(), 0o600)


def check_place(path: Path, *, replace: bool) -> None:
    """Look whether an anchor file could be written, before something is done whose state it shall keep.

    Raises:
        AlreadyExists: there is something, and it is not to be replaced.
        InvalidArgument: there is something that is no anchor file.
        OSError: its directory is missing, or cannot be written.
    """
    with _locked(path):
        if path.exists() or path.is_symlink():
            if not replace:
                raise AlreadyExists("the anchor file", os.fspath(path))
            if not path.is_file() or path.stat().st_size != FILE_BYTES:
                raise InvalidArgument("the anchor file", os.fspath(path), "something else lies there")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else changes anchor files of this directory meanwhile."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


class FileKeeper:
    """The keeper of one session's anchor in a file, by the broker's rules (format document, section 13.2).

    A session that has begun elsewhere on the same anchor file fences this one.
    """

    def __init__(self, path: Path, uuid: UUID, session: bytes) -> None:
        """`session`: 32 bytes, drawn for this session; there is nobody else who could know it before adoption."""
        self._path, self._uuid, self._session = path, uuid, session

    def adopt(self, state: State, session: bytes) -> None:
        """See `anchor.Keeper`."""
        with self._changing() as known:
            if session != self._session or not known.accepts(state):
                raise VolumeFenced("the anchor file does not accept the state")
            self._write(state, still_open=True)

    def report(self, state: State) -> None:
        """See `anchor.Keeper`."""
        self._follow(state, still_open=True)

    def close(self, state: State) -> None:
        """See `anchor.Keeper`."""
        self._follow(state, still_open=False)

    def _follow(self, state: State, *, still_open: bool) -> None:
        with self._changing() as known:
            same = (state.sequence, state.root) == (known.sequence, known.root)
            ours = known.session == self._session == state.session
            if ours and same and known.open == still_open:
                return  # said before
            if not ours or not known.open or state.sequence < known.sequence:
                raise VolumeFenced("another session has begun on this anchor file")
            if state.sequence == known.sequence and not same:
                raise VolumeFenced("the anchor file has another state of this number")
            self._write(state, still_open=still_open)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Anchor]:
        with _locked(self._path):
            known = read(self._path)
            if known.uuid != self._uuid:
                raise VolumeFenced("the anchor file is another volume's")
            yield known.anchor

    def _write(self, state: State, *, still_open: bool) -> None:
        anchor = Anchor(open=still_open, session=self._session, sequence=state.sequence, root=state.root)
        replace_file(self._path, Remembered(uuid=self._uuid, anchor=anchor).encode(), 0o600)
