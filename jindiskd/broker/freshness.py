"""The messages that keep a JinDisk volume fresh, over HTTP: `adopt`, `report`, `close` (format document, section 13),
and `stale`, by which a guest says that its disk is in no state that its session may begin from.

They carry no cookie: the session identifier, which only the process has that was given it, authenticates them.
"""

from __future__ import annotations

import asyncio

import structlog

from jindiskd.broker.http import Refusal
from jindiskd.broker.peer import Peer
from jindiskd.kbs.freshness import parse_state
from jindiskd.keys.store import Requester
from jindiskd.keys.volumes import LeaseHeld, SessionRefused, Stale, Volumes

log = structlog.get_logger(__name__)
MOST_PEERS = 4096


class Freshness:
    """Takes what sessions say of their volumes.

    Args:
        volumes: what is remembered.
        fenced_per_peer: how many fencings of a peer are written to the audit log while this broker runs; a fenced
            guest that goes on asking must not fill it.
    """

    def __init__(self, volumes: Volumes, fenced_per_peer: int = 64) -> None:
        """Nothing was said yet."""
        self.volumes = volumes
        self._left: dict[str, int] = {}
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
        left = self._left.get(who.peer, self._fenced_per_peer if len(self._left) < MOST_PEERS else 0)
        log.warning("fenced", peer=who.peer, volume=volume, message=verb, reason=why.finding)
        if left <= 0 or why.finding == "volume.unknown":
            return
        self._left[who.peer] = left - 1
        await asyncio.to_thread(self.volumes.record_fenced, volume, verb, who, why)
