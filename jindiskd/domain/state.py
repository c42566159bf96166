"""The states of a guest's trusted startup, and which may follow which."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from jindiskd.base.platform import Platform
from jindiskd.errors import EXIT_REFUSED, JindiskError


class DomainState(enum.StrEnum):
    """How far a guest has come."""

    DEFINED = "defined"  # known to libvirt, off, never started by us since
    STARTING = "starting"  # its listeners and its machine are being made
    STARTED = "started"  # its processors run
    ATTESTED = "attested"  # the broker accepted its report
    RELEASED = "released"  # the broker gave it the key
    UNLOCKED = "unlocked"  # it says that its root is open
    RUNNING = "running"  # it says that its system's init has taken over
    REFUSED = "refused"  # the broker refused; the machine is off
    FAILED = "failed"  # something else went wrong; the machine is off
    STOPPED = "stopped"  # it ran, and is off


_S = DomainState
_ENDS = frozenset({_S.REFUSED, _S.FAILED, _S.STOPPED})
NEXT: Mapping[DomainState, frozenset[DomainState]] = {
    _S.DEFINED: frozenset({_S.STARTING}),
    _S.STARTING: frozenset({_S.STARTED}) | _ENDS,
    _S.STARTED: frozenset({_S.STARTED, _S.ATTESTED}) | _ENDS,
    # A guest that tries again, or reboots, begins anew at `started`.
    _S.ATTESTED: frozenset({_S.STARTED, _S.ATTESTED, _S.RELEASED}) | _ENDS,
    _S.RELEASED: frozenset({_S.STARTED, _S.ATTESTED, _S.UNLOCKED}) | _ENDS,
    _S.UNLOCKED: frozenset({_S.STARTED, _S.RUNNING}) | _ENDS,
    _S.RUNNING: frozenset({_S.STARTED}) | _ENDS,
    _S.REFUSED: frozenset({_S.STARTING}),
    _S.FAILED: frozenset({_S.STARTING}),
    _S.STOPPED: frozenset({_S.STARTING}),
}
ACTIVE = frozenset({_S.STARTING, _S.STARTED, _S.ATTESTED, _S.RELEASED, _S.UNLOCKED, _S.RUNNING})


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainView:
    """What is told of a domain."""

    uuid: str
    name: str
    image: str
    image_id: str
    platform: Platform
    state: DomainState
    reason: str
    """One sentence; empty while all is well."""
    since: datetime
    cid: int
    """Its vsock context id, 0 while off."""
    console: str
    """Path of its console log."""
    halted: str = ""
    """Why its processors stand still although it is on, one sentence with a remedy; empty while they run."""
    layer: str = ""
    """That a disk of its image's goes on in another file, one sentence with a remedy; empty where none does."""

    @property
    def simulated(self) -> bool:
        """Whether its attestation proves nothing."""
        return self.platform.simulated


class LaunchRefused(JindiskError, code="LaunchRefused", exit_code=EXIT_REFUSED):
    """The broker refused the guest its key, or the guest its disk."""

    def __init__(self, name: str, reason: str) -> None:
        """`reason` is the broker's findings in one sentence."""
        super().__init__(f"domain {name!r} was refused: {reason}")
        self.reason = reason


class LaunchFailed(JindiskError, code="LaunchFailed"):
    """A guest did not come up."""

    def __init__(self, name: str, reason: str) -> None:
        """`reason` says what happened and what to look at."""
        super().__init__(f"domain {name!r} did not start: {reason}")
        self.reason = reason
