"""The two steps of a SEV launch at the broker, for hosts that come over the network: sessions and limits of `SevJudge`.

A host may be anybody's: it shows certificates and measurements, and gets what only the launch's processor can open. It
is told that it was refused, never why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, TypeVar

import structlog
from aiohttp import web

from jindiskd.attest.kept import Kept
from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.sev import SealedSecret, SevPolicy
from jindiskd.base.platform import Tee
from jindiskd.broker.http import Refusal, answer, with_cookie
from jindiskd.broker.metrics import Metrics
from jindiskd.broker.peer import BrokerEvent, BrokerLimits, Peer
from jindiskd.broker.sessions import Session, SessionKeeper
from jindiskd.broker.sev import HeldLaunch, ReleaseWaits, SevJudge
from jindiskd.broker.sev_messages import dump_begun, dump_sealed, parse_approve, parse_begin
from jindiskd.errors import NotFound
from jindiskd.kbs.messages import VERSION
from jindiskd.keys.store import Requester

log = structlog.get_logger(__name__)
T = TypeVar("T")
Keep = Callable[..., Awaitable[Any]]
Refused = Callable[[Peer, Requester, str, Sequence[Finding], Kept | None], Awaitable[None]]
LONGEST_WAIT_S = 1800.0
"""How long a launch may wait for its owner. An approval that is waited for ends sooner, and counts as long again."""


class SevSteps:
    """Answers hosts.

    Args:
        judge: of the broker's store.
        sessions: where launches are kept between the steps.
        keep: calls a session keeper's method, off the event loop where that blocks.
        refused: writes a refusal down, counts it and tells of it.
        judges: threads for what costs.
        limits, metrics, on_event: the broker's.
        now: wall clock, seconds since the epoch.
    """

    def __init__(
        self,
        judge: SevJudge,
        *,
        sessions: SessionKeeper,
        keep: Keep,
        refused: Refused,
        judges: Executor,
        limits: BrokerLimits,
        metrics: Metrics,
        on_event: Callable[[BrokerEvent], None],
        now: Callable[[], float],
    ) -> None:
        self._judge, self._sessions, self._keep, self._refused = judge, sessions, keep, refused
        self._judges, self._limits, self._metrics, self._on_event, self._now = judges, limits, metrics, on_event, now

    async def begin(self, body: bytes, peer: Peer) -> web.Response:
        """Answer a `sev-begin`.

        Raises:
            MalformedMessage, Refusal, TooManySessions: no session was made.
        """
        asked = parse_begin(body)
        try:
            begun = await self._thread(self._judge.begin, peer, asked.image_id, asked.policy, asked.host)
        except (EvidenceRefused, MalformedEvidence, NotFound) as exc:
            chip = asked.host.cpu_id.hex()
            who = await asyncio.to_thread(self._judge.requester, peer, asked.image_id, chip)
            await self._refused(peer, who, asked.image_id, _findings(exc), None)
            raise Refusal("PolicyDeny", "Access denied by policy") from exc
        held = begun.held
        tee = Tee.SEV_ES if asked.policy & SevPolicy.ES else Tee.SEV
        name, _session = await self._keep(self._sessions.new, peer.description, tee, VERSION, held)
        self._tell(peer, "challenged", held)
        told = answer(dump_begun(begun.dh_certificate, begun.session))
        return with_cookie(told, name, self._limits.launch_lifetime_s)

    async def approve(self, body: bytes, session: Session, peer: Peer) -> web.Response:
        """Answer a `sev-approve`. Of two at the same time, one is judged; what was judged is not judged again.

        Raises:
            MalformedMessage, Refusal: no key left.
        """
        held = session.launch
        if held is None or not await self._keep(self._sessions.spend, session):
            raise Refusal("TokenNotFound", "no such launch, or it was judged already")
        who = replace(self._judge.requester(peer, held.image_id, held.chip, held), token=session.session_id)
        try:
            report = parse_approve(body)
            with self._metrics.timed("jindisk_broker_release_seconds"):
                sealed: SealedSecret = await self._thread(self._judge.approve, held, report, who)
        except ReleaseWaits as exc:
            if self._now() < held.began + LONGEST_WAIT_S:
                await self._keep(self._sessions.renew, session)
            # A kind that clients try again after a while; by then a person may have looked.
            raise Refusal("PluginInternalError", "not available yet") from exc
        except (EvidenceRefused, MalformedEvidence) as exc:
            self._metrics.count("jindisk_broker_attestations_total", outcome="refused")
            await self._keep(self._sessions.end, session)
            await self._refused(peer, who, held.image_id, _findings(exc), None)
            raise Refusal("PolicyDeny", "Access denied by policy") from exc
        await self._keep(self._sessions.end, session)
        outcome, simulated = "simulated" if held.simulated else "genuine", str(held.simulated).lower()
        self._metrics.count("jindisk_broker_attestations_total", outcome=outcome)
        self._metrics.count("jindisk_broker_releases_total", simulated=simulated)
        log.info("released", peer=peer.description, image_id=held.image_id, simulated=held.simulated)
        self._tell(peer, "attested", held)
        self._tell(peer, "released", held)
        return answer(dump_sealed(sealed))

    def _tell(self, peer: Peer, kind: str, held: HeldLaunch) -> None:
        self._on_event(BrokerEvent(peer=peer, kind=kind, image_id=held.image_id, simulated=held.simulated))

    async def _thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._judges, call, *arguments)


def _findings(exc: EvidenceRefused | MalformedEvidence | NotFound) -> tuple[Finding, ...]:
    if isinstance(exc, EvidenceRefused):
        return exc.findings
    name = "evidence.malformed" if isinstance(exc, MalformedEvidence) else "sev.chain.missing"
    return (Finding(name, str(exc)),)
