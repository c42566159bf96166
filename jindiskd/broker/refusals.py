"""How often a guest may be refused: one that tries without end must fill no audit log and burn no processor.

The first few refusals of a peer cost it nothing. After them it waits before it is judged again, each time twice as
long; what it asks meanwhile is turned away before anything is verified or written. Peers of which only an address is
known may be many guests: they are judged, and only the rows of their refusals become fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jindiskd.attest.model import Finding
from jindiskd.broker.peer import BrokerLimits, Peer

MAX_PEERS = 4096
SHARED_FACTOR = 16
"""How many guests' worth of refusals an address has."""
TELL_S = 1.0
"""How often it is told that a guest is turned away."""


@dataclass(slots=True)
class _Record:
    count: int = 0
    until: float = 0.0
    omitted: int = 0
    told: float = float("-inf")
    """When it was last told that the guest is turned away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """What a refusal means for the audit log."""

    write: bool
    """Whether it gets a row."""
    omitted: int = 0
    """Refusals without a row since the one before."""
    pause_s: float = 0.0
    """How long the peer is not judged from now on."""


class Refusals:
    """Counts the refusals of each peer; for one event loop."""

    def __init__(self, limits: BrokerLimits, clock: Callable[[], float]) -> None:
        """`clock` is a monotonic clock in seconds."""
        self._limits, self._clock = limits, clock
        self._of_peer: dict[str, _Record] = {}

    def turned_away(self, peer: Peer) -> Finding | None:
        """Why a peer is not judged now; None if it is."""
        record, now = self._of_peer.get(peer.description), self._clock()
        if record is None or record.until <= now or not _one_guest(peer):
            return None
        left = max(1, round(record.until - now))
        text = f"it was refused {record.count} times; it is judged again in {left} s"
        return Finding("peer.refusals", text)

    def to_tell(self, peer: Peer) -> bool:
        """Whether to tell that it is turned away: once a second, since it may be another start of the same domain."""
        record, now = self._of_peer.get(peer.description), self._clock()
        if record is None or now < record.told + TELL_S:
            return False
        record.told = now
        return True

    def note(self, peer: Peer) -> Noted:
        """A peer was refused after it was judged."""
        now, limits = self._clock(), self._limits
        record = self._record(peer, now)
        if now < record.until:  # judged at the same time as the one that began the pause, or an address
            record.omitted += 1
            return Noted(write=False)
        record.count += 1
        omitted, record.omitted, pause = record.omitted, 0, 0.0
        over = record.count - limits.refusals * (1 if _one_guest(peer) else SHARED_FACTOR)
        if over >= 0:
            pause = min(limits.refusal_pause_s * 2 ** min(over, 32), limits.longest_refusal_pause_s)
        record.until = now + pause
        return Noted(write=True, omitted=omitted, pause_s=pause)

    def _record(self, peer: Peer, now: float) -> _Record:
        """The record of a peer, moved to the end; one that was quiet for long enough begins anew."""
        record = self._of_peer.pop(peer.description, None)
        if record is None or now > record.until + self._limits.longest_refusal_pause_s:
            record = _Record()
        while len(self._of_peer) >= MAX_PEERS:
            del self._of_peer[next(iter(self._of_peer))]
        self._of_peer[peer.description] = record
        return record


def _one_guest(peer: Peer) -> bool:
    return peer.domain_uuid is not None
