"""Who is at the other end of a connection, what happens to it, and how much it may use."""

from __future__ import annotations

from dataclasses import dataclass

from jindiskd.attest.model import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end, as the transport knows it; not what it says."""

    description: str
    """Names the peer in logs and audit rows; peers of one description share the limits of a peer."""
    domain_uuid: str | None = None
    image_id: str | None = None
    """The only image whose key this peer may ask for; None for any."""
    local: bool = False
    """Whether it is a user of this machine, known by the kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerEvent:
    """What happened to a guest at the broker."""

    peer: Peer
    kind: str
    """`challenged`, `attested`, `waiting` (for a person's approval), `released` or `refused`."""
    image_id: str = ""
    simulated: bool = False
    findings: tuple[Finding, ...] = ()
    approval: int = 0
    """Number of the approval that is waited for; 0 where so many wait that this one has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLimits:
    """What peers may use."""

    session_lifetime_s: float = 60.0
    sessions_per_peer: int = 32
    """A session counts until its life is over, however it ended: this also bounds refusals and their audit rows."""
    sessions: int = 256
    launch_lifetime_s: float = 600.0
    """Of a launch that is measured before it runs: its machine is made meanwhile, with all its memory pinned."""
    launches_per_peer: int = 64
    """At once; they live longer than other sessions."""
    asks_per_session: int = 8
    """How often an attested session may ask for a resource."""
    refusals: int = 8
    """Of one guest at once. Each further one costs it a pause in which it is not judged, twice as long as the last."""
    refusal_pause_s: float = 60.0
    longest_refusal_pause_s: float = 900.0
    """A guest that is quiet for so long after a pause begins anew."""
    requests_per_s: float = 50.0
    """Of one guest, in the long run; an address has those of 16. Over it, answers wait."""
    requests_burst: int = 200
    """Answered at once, after as long a silence as that many take."""
    starts_per_minute: int = 600
    """Connections that one guest may begin within a minute; each costs a TLS handshake."""
    connections_per_peer: int = 64
    connections: int = 1024
    """Of one listener."""


LOCAL_LIMITS = BrokerLimits(connections_per_peer=16, connections=64)
"""Of what is no guest: administrators and whoever reads metrics."""
