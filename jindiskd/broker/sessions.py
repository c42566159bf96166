"""Sessions of guests: one nonce, one attestation, one key pair; short, counted, and gone after.

A session's name is the guest's cookie and a secret; its id is a digest of that, stands in tokens and audit rows, and is
none. `MemorySessions` serves one broker, `broker.shared.DatabaseSessions` several.

A launch that is measured before it runs (SEV, SEV-ES) is a session too: begun with what is kept of it, used up by
its one judgement, and renewed only where that could not be made yet.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import heapq
import secrets
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from jindiskd.attest.kept import Verified
from jindiskd.base.platform import Tee
from jindiskd.broker.peer import BrokerLimits
from jindiskd.broker.sev import HeldLaunch
from jindiskd.errors import EXIT_BUSY, JindiskError
from jindiskd.kbs.messages import VERSION


class TooManySessions(JindiskError, code="TooManySessions", exit_code=EXIT_BUSY):
    """A limit is reached."""

    def __init__(self, peer: str) -> None:
        """`peer` is who asked."""
        super().__init__(f"{peer} has too many attestation sessions open: they end by themselves, try again")


class Stage(enum.StrEnum):
    """How far a session is."""

    CHALLENGED = "challenged"  # nonce sent, nothing believed
    SPENT = "spent"  # the nonce was used; final, unless the evidence proves good
    VERIFIED = "verified"  # evidence is genuine and bound to the key
    ENDED = "ended"  # refused; final


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One guest's way to a key, as it was when it was looked up."""

    session_id: str
    peer: str
    nonce: str
    expires: float
    """On the keeper's clock, seconds."""
    tee: Tee = Tee.SNP
    """What kind of evidence the guest said it would send."""
    version: str = VERSION
    """Of the protocol that the guest speaks."""
    stage: Stage = Stage.CHALLENGED
    asked: int = 0
    tee_pubkey: dict[str, str] = field(default_factory=dict)
    verified: Verified | None = None
    launch: HeldLaunch | None = None
    """What is kept of a launch that is measured before it runs; such a session attests nothing else."""


def session_id(name: str) -> str:
    """The id of a session with that name."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def draw(
    peer: str, expires: float, tee: Tee = Tee.SNP, version: str = VERSION, launch: HeldLaunch | None = None
) -> tuple[str, Session]:
    """A name and a session of that name, with a fresh nonce."""
    name = uuid.uuid4().hex
    nonce = base64.b64encode(secrets.token_bytes(32)).decode()
    made = Session(
        session_id=session_id(name),
        peer=peer,
        nonce=nonce,
        expires=expires,
        tee=tee,
        version=version,
        launch=launch,
    )
    return name, made


class SessionKeeper(Protocol):
    """Keeps sessions. Every step that may be taken once is taken by one caller alone, however many ask at once."""

    blocking: bool
    """Whether calls block, and belong in a thread."""

    def new(
        self, peer: str, tee: Tee = Tee.SNP, version: str = VERSION, launch: HeldLaunch | None = None
    ) -> tuple[str, Session]:
        """Begin a session; returns its name too. Raises `TooManySessions`."""

    def renew(self, session: Session) -> None:
        """Let a launch that was spent be asked for again, for as long as a new one."""

    def find(self, session_id: str, peer: str) -> Session | None:
        """The living session of that id, if this peer began it."""

    def spend(self, session: Session) -> bool:
        """Use up the nonce; False where it was used before."""

    def verify(self, session: Session, tee_pubkey: dict[str, str], verified: Verified) -> None:
        """The evidence was good."""

    def ask(self, session: Session) -> bool:
        """Count one request of an attested session; False where it may not ask, or no more."""

    def end(self, session: Session) -> None:
        """Nothing more comes of this session; it counts against the limits until its life is over."""

    def count(self) -> int:
        """Living sessions."""


class MemorySessions:
    """All sessions of one broker, in memory: after a restart guests begin anew."""

    blocking = False

    def __init__(self, limits: BrokerLimits, clock: Callable[[], float]) -> None:
        """`clock` is a monotonic clock in seconds."""
        self._limits, self._clock = limits, clock
        self._open: dict[str, Session] = {}
        self._ends: list[tuple[float, str]] = []
        """A heap of when sessions end; one that was renewed is in it again."""
        self._of_peer: Counter[str] = Counter()
        self._lock = threading.Lock()

    def new(
        self, peer: str, tee: Tee = Tee.SNP, version: str = VERSION, launch: HeldLaunch | None = None
    ) -> tuple[str, Session]:
        """Begin a session; returns its name too. Raises `TooManySessions`."""
        with self._lock:
            self._expire()
            if self._of_peer[peer] >= self._limits.sessions_per_peer:
                raise TooManySessions(peer)
            if launch is not None and self._launches(peer) >= self._limits.launches_per_peer:
                raise TooManySessions(peer)
            if len(self._open) >= self._limits.sessions and not self._make_room(peer):
                raise TooManySessions(peer)
            life_s = self._limits.session_lifetime_s if launch is None else self._limits.launch_lifetime_s
            name, session = draw(peer, self._clock() + life_s, tee, version, launch)
            self._put(session)
            self._of_peer[peer] += 1
            return name, session

    def renew(self, session: Session) -> None:
        """Let a launch that was spent be asked for again, for as long as a new one."""
        with self._lock:
            now = self._open.get(session.session_id)
            if now is not None and now.stage is Stage.SPENT:
                expires = self._clock() + self._limits.launch_lifetime_s
                self._put(replace(now, stage=Stage.CHALLENGED, expires=expires))

    def find(self, session_id: str, peer: str) -> Session | None:
        """The living session of that id, if this peer began it."""
        with self._lock:
            self._expire()
            session = self._open.get(session_id)
            return session if session is not None and session.peer == peer else None

    def spend(self, session: Session) -> bool:
        """Use up the nonce; False where it was used before."""
        with self._lock:
            now = self._open.get(session.session_id)
            if now is None or now.stage is not Stage.CHALLENGED:
                return False
            self._open[session.session_id] = replace(now, stage=Stage.SPENT)
            return True

    def verify(self, session: Session, tee_pubkey: dict[str, str], verified: Verified) -> None:
        """The evidence was good."""
        self._replace(session, stage=Stage.VERIFIED, tee_pubkey=tee_pubkey, verified=verified)

    def ask(self, session: Session) -> bool:
        """Count one request of an attested session; False where it may not ask, or no more."""
        with self._lock:
            now = self._open.get(session.session_id)
            if now is None or now.stage is not Stage.VERIFIED or now.asked >= self._limits.asks_per_session:
                return False
            self._open[session.session_id] = replace(now, asked=now.asked + 1)
            return True

    def end(self, session: Session) -> None:
        """Nothing more comes of this session; it counts against the limits until its life is over."""
        self._replace(session, stage=Stage.ENDED, verified=None, launch=None)

    def count(self) -> int:
        """Living sessions."""
        with self._lock:
            self._expire()
            return len(self._open)

    def _replace(self, session: Session, **changes: object) -> None:
        with self._lock:
            now = self._open.get(session.session_id)
            if now is not None:
                self._open[session.session_id] = replace(now, **changes)  # type: ignore[arg-type]  # fields of ours

    def _launches(self, peer: str) -> int:
        return sum(found.launch is not None and found.peer == peer for found in self._open.values())

    def _put(self, session: Session) -> None:
        self._open[session.session_id] = session
        heapq.heappush(self._ends, (session.expires, session.session_id))

    def _make_room(self, peer: str) -> bool:
        """End a session of the peer that has most, if `peer` has none: a few guests together must not lock out one."""
        heaviest, most = max(self._of_peer.items(), key=lambda item: item[1], default=("", 0))
        if self._of_peer[peer] or most < 2:
            return False
        held = (found for found in self._open.values() if found.peer == heaviest and found.stage is not Stage.VERIFIED)
        victim = next(held, None)
        if victim is None:
            return False
        self._remove(victim)
        return True

    def _remove(self, session: Session) -> None:
        del self._open[session.session_id]
        self._of_peer[session.peer] -= 1
        if not self._of_peer[session.peer]:
            del self._of_peer[session.peer]

    def _expire(self) -> None:
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            _, name = heapq.heappop(self._ends)
            session = self._open.get(name)
            if session is not None and session.expires <= now:
                self._remove(session)
