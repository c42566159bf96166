"""Who remembers a volume's anchor, and when the engine tells (format document, section 13)."""

from __future__ import annotations

import enum
from typing import Protocol

from jindiskd.base.anchor import State


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
