"""States of a volume, and which of them may be used (format document, section 13)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import Protocol

from jindiskd.errors import InvalidArgument

_ANCHOR = struct.Struct("<B32sQ32s")
ANCHOR_BYTES = _ANCHOR.size


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A committed state of a volume: sequence number and root name it completely."""

    session: bytes = field(repr=False)
    """32 bytes: the session that wrote the superblock it belongs to."""
    sequence: int
    root: bytes
    """32 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """What the owner remembers of a volume."""

    open: bool
    """Whether the session it belongs to was not closed."""
    session: bytes = field(repr=False)
    """32 bytes."""
    sequence: int
    """Unsigned, 64 bits."""
    root: bytes
    """32 bytes: the state root."""

    def pack(self) -> bytes:
        """73 bytes: u8 mode (0 closed, 1 open), session, u64 little-endian sequence number, root."""
        return _ANCHOR.pack(self.open, self.session, self.sequence, self.root)

    @classmethod
    def unpack(cls, data: bytes) -> Anchor:
        """Read what `pack` wrote.

        Raises:
            InvalidArgument: another length or mode.
        """
        if len(data) != ANCHOR_BYTES or data[0] > 1:
            raise InvalidArgument("an anchor of", f"{len(data)} bytes", f"it has {ANCHOR_BYTES}, the first is 0 or 1")
        mode, session, sequence, root = _ANCHOR.unpack(data)
        return cls(open=bool(mode), session=session, sequence=sequence, root=root)

    def accepts(self, state: State) -> bool:
        """Whether a state found on a disk may be used (section 13.3)."""
        if (state.sequence, state.root) == (self.sequence, self.root):
            return True
        return self.open and state.session == self.session and state.sequence > self.sequence


class Unanchored(enum.Enum):
    """The explicit decision to take whatever authentic state is the newest (section 13.4)."""

    UNANCHORED = "unanchored"


UNANCHORED = Unanchored.UNANCHORED


class Keeper(Protocol):
    """Who remembers the anchor: the broker, or a file. Each call returns when the message is acknowledged.

    A refusal is `VolumeFenced`; any other exception means that no answer came.
    """

    def adopt(self, state: State, session: bytes) -> None:
        """The session `session` begins from the state found (which carries the session that wrote it)."""

    def report(self, state: State) -> None:
        """This commit is durable."""

    def close(self, state: State) -> None:
        """The session ended in this state."""


class Forgetful:
    """A keeper for volumes without a broker: remembers nothing."""

    def adopt(self, state: State, session: bytes) -> None:
        """Nothing to do."""

    def report(self, state: State) -> None:
        """Nothing to do."""

    def close(self, state: State) -> None:
        """Nothing to do."""


class Reporting(enum.StrEnum):
    """When commits are told to the keeper (section 13.2)."""

    CLOSE = "close"
    """Only the beginning and the end of a session."""
    INTERVAL = "interval"
    """Whenever an interval passed and there was a commit since; `Volume.tick` does it."""
    COMMIT = "commit"
    """Before a flush is acknowledged."""
