"""What is remembered of a JinDisk 2 volume so that no older state of it is used (format document, section 13).

The engine, the guest, the messages between guest and broker, and the broker need it, and nothing more of each other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

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
