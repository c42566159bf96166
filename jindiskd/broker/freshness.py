"""The messages that keep a JinDisk volume fresh, over HTTP: `adopt`, `report`, `close` (format document, section 13),
and `stale`, by which a guest says that its disk is in no state that its session may begin from.

They carry no cookie: the session identifier, which only the process has that was given it, authenticates them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from jindiskd.broker.http import Refusal
from jindiskd.broker.peer import Peer
from jindiskd.kbs.freshness import parse_state
from jindiskd.keys.store import Requester
from jindiskd.keys.volumes import LeaseHeld, SessionRefused, Stale, Volumes

log = structlog.get_logger(__name__)
MOST_PEERS, HOUR_S = 4096, 3600.0


class Freshness:
    """Takes what sessions say of their volumes.

    Args:
        volumes: what is remembered.
        clock: monotonic, seconds.
        fenced_per_peer: how many fencings of a peer are logged and written to the audit log within an hour; a fenced
            guest that goes on asking must fill neither.
    """

    def __init__(
        self, volumes: Volumes, clock: Callable[[], float] = time.monotonic, fenced_per_peer: int = 64
    ) -> None:
        """Nothing was said yet."""
        self.volumes = volumes
        self._clock = clock
        self._fenced_of: dict[tuple[str, bool], tuple[float, int]] = {}
        self._fenced_per_peer = fenced_per_peer

    async def tell(self, verb: str, body: bytes, peer: Peer) -> dict[str, str]:
        """Do what a message says; returns the answer's body.

        Raises:
            MalformedMessage, Refusal: it was not done.
        """
        state = parse_state(body)
        who = Requester(peer=peer.description)
        try:
            if verb == "adopt":
                await asyncio.to_thread(self.volumes.adopt, state, who, peer.image_id)
            elif verb == "report":
                await asyncio.to_thread(self.volumes.report, state, peer.image_id)
            else:
                await asyncio.to_thread(self.volumes.close, state, who, peer.image_id)
        except SessionRefused as exc:
            await self._fenced(verb, state.volume, who, exc)
            raise Refusal("Fenced", "the session may not write this volume") from exc
        except LeaseHeld as exc:
            raise Refusal("LeaseHeld", "the session before may still be writing") from exc
        return {"result": "ok"}

    async def stale(self, body: bytes, peer: Peer) -> Stale:
        """Take from a guest that its disk is an old one; the audit row is durable when this returns.

        Raises:
            MalformedMessage, Refusal: it was not taken.
        """
        state, who = parse_state(body), Requester(peer=peer.description)
        try:
            return await asyncio.to_thread(self.volumes.stale, state, who, peer.image_id)
        except SessionRefused as exc:
            await self._fenced("stale", state.volume, who, exc)
            raise Refusal("Fenced", "the session is not the one released last") from exc

    async def _fenced(self, verb: str, volume: str, who: Requester, why: SessionRefused) -> None:
        # What is said of volumes that nobody knows is counted apart: it must not use up the rows of known ones.
        now, known = self._clock(), why.finding != "volume.unknown"
        since, count = self._fenced_of.pop((who.peer, known), (now, 0))
        if now >= since + HOUR_S:
            since, count = now, 0
        while len(self._fenced_of) >= MOST_PEERS:  # the one that was quiet for longest
            del self._fenced_of[next(iter(self._fenced_of))]
        self._fenced_of[who.peer, known] = (since, count + 1)
        if count >= self._fenced_per_peer:
            return
        log.warning("fenced", peer=who.peer, volume=volume, message=verb, reason=why.finding)
        if known:  # of others there is nothing to say in any owner's log
            await asyncio.to_thread(self.volumes.record_fenced, volume, verb, who, why)
