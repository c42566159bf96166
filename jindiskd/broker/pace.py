"""How fast a peer is answered: one that asks without end gets its answers late, and costs the others little.

A leaky bucket a peer. Nothing is refused: an answer waits until the peer's rate allows it, and since a connection's
next request comes after its last answer, a peer has as many requests under way as it has connections.
"""

from __future__ import annotations

from collections.abc import Callable

from jindiskd.broker.peer import BrokerLimits, Peer
from jindiskd.broker.refusals import MAX_PEERS, SHARED_FACTOR

LONGEST_WAIT_S = 10.0


class Pace:
    """Knows when each peer may be answered next; for one event loop."""

    def __init__(self, limits: BrokerLimits, clock: Callable[[], float]) -> None:
        """`clock` is a monotonic clock in seconds."""
        self._limits, self._clock = limits, clock
        self._next: dict[str, float] = {}

    def wait_s(self, peer: Peer) -> float:
        """Count one request; returns how many seconds its answer must wait.

        A peer of which only an address is known may be many guests, and has as many guests' rate.
        """
        now, one = self._clock(), self._limits
        rate = one.requests_per_s * (1 if peer.domain_uuid is not None else SHARED_FACTOR)
        burst_s = one.requests_burst / one.requests_per_s
        at = max(self._next.pop(peer.description, 0.0), now - burst_s) + 1 / rate
        while len(self._next) >= MAX_PEERS:
            del self._next[next(iter(self._next))]
        self._next[peer.description] = at
        return min(max(at - now, 0.0), LONGEST_WAIT_S)
