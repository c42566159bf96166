"""Sessions of guests: one nonce, one attestation, one key pair; short, counted, and gone after."""

from __future__ import annotations

import base64
import enum
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from jindiskd.attest.snp import VerifiedSnp
from jindiskd.errors import EXIT_BUSY, JindiskError


class TooManySessions(JindiskError, code="TooManySessions", exit_code=EXIT_BUSY):
    """A limit is reached."""

    def __init__(self, peer: str) -> None:
        """`peer` is who asked."""
        super().__init__(f"{peer} has too many attestation sessions open: they end by themselves, try again")


class Stage(enum.Enum):
    """How far a session is."""

    CHALLENGED = enum.auto()  # nonce sent, nothing believed
    VERIFIED = enum.auto()  # evidence is genuine and bound to the key
    SPENT = enum.auto()  # refused; final


@dataclass(slots=True, kw_only=True)
class Session:
    """One guest's way to a key."""

    peer: str
    expires: float
    """On the monotonic clock, seconds."""
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    nonce: str = field(default_factory=lambda: base64.b64encode(secrets.token_bytes(32)).decode())
    stage: Stage = Stage.CHALLENGED
    tee_pubkey: dict[str, str] = field(default_factory=dict)
    verified: VerifiedSnp | None = None


class Sessions:
    """All sessions of a broker, in memory: after a restart guests begin anew."""

    def __init__(self, *, lifetime_s: float, per_peer: int, total: int, clock: Callable[[], float]) -> None:
        """`clock` is a monotonic clock in seconds."""
        self._lifetime, self._per_peer, self._total, self._clock = lifetime_s, per_peer, total, clock
        self._open: dict[str, Session] = {}

    def new(self, peer: str) -> Session:
        """Begin a session.

        Raises:
            TooManySessions: of this peer, or in all.
        """
        self._expire()
        mine = sum(session.peer == peer for session in self._open.values())
        if mine >= self._per_peer or len(self._open) >= self._total:
            raise TooManySessions(peer)
        session = Session(peer=peer, expires=self._clock() + self._lifetime)
        self._open[session.name] = session
        return session

    def find(self, name: str, peer: str) -> Session | None:
        """The session of that name, if this peer began it and it lives."""
        self._expire()
        session = self._open.get(name)
        return session if session is not None and session.peer == peer else None

    def end(self, session: Session) -> None:
        """Forget a session."""
        self._open.pop(session.name, None)

    def _expire(self) -> None:
        now = self._clock()
        for name in [name for name, session in self._open.items() if session.expires <= now]:
            del self._open[name]
