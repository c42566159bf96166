"""The key broker: Trustee KBS protocol 0.4.0 and 0.2.0 as a server, with the freshness messages of JinDisk volumes.

`/auth` gives a nonce, `/attest` judges the evidence, `/resource` and `/jindisk/release` decide and release. A guest is
told that it was refused, never why: the reasons go to the audit log and to whoever runs the broker.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TypeVar

import structlog
from aiohttp import web

from jindiskd.attest.kept import Kept, keep
from jindiskd.attest.model import EvidenceRefused, Finding
from jindiskd.attest.verifier import Verifier
from jindiskd.broker.deciding import Deciding, Give, requester
from jindiskd.broker.freshness import Freshness
from jindiskd.broker.http import Handler, Refusal, answer, body_of, error, with_cookie
from jindiskd.broker.judge import judge
from jindiskd.broker.metrics import Metrics
from jindiskd.broker.pace import Pace
from jindiskd.broker.peer import BrokerEvent, BrokerLimits, Peer
from jindiskd.broker.refusals import Refusals
from jindiskd.broker.sessions import MemorySessions, Session, SessionKeeper, Stage, TooManySessions, session_id
from jindiskd.broker.sev import SevJudge
from jindiskd.broker.sev_messages import APPROVE, BEGIN
from jindiskd.broker.sev_steps import SevSteps
from jindiskd.broker.token import TokenMaker, TokenRefused, draw_signing_key
from jindiskd.errors import InvalidArgument, JindiskError
from jindiskd.kbs.freshness import parse_release
from jindiskd.kbs.messages import (
    COOKIE,
    MAX_BODY_BYTES,
    PREFIX,
    VERSION,
    VERSIONS,
    MalformedMessage,
    check_resource,
    parse_request,
)
from jindiskd.keys.store import (
    ApprovalWaiting,
    RecordChanged,
    Requester,
    Store,
)
from jindiskd.keys.volumes import Volumes

__all__ = ["Broker", "BrokerEvent", "BrokerLimits", "Peer"]
log = structlog.get_logger(__name__)
T = TypeVar("T")
_NAME = re.compile(r"[0-9a-f]{32}")
JUDGES = 4
"""Evidences that are judged at the same time."""
FAULT, FAULT_S = "fault while serving a guest", 1.0


class Broker:
    """Judges guests and releases keys.

    Args:
        store: keys and audit.
        verifiers: one for each set of roots; evidence is accepted by the first that does.
        allow_simulated: whether simulated platforms may get keys of images built for them.
        limits: what peers may use.
        on_event: told of each step, in the event loop.
        now: wall clock, for certificates.
        monotonic: clock of the sessions, seconds.
        sessions: where sessions are kept; in memory if not given.
        metrics: counters to use.
        sev: judges launches that are measured before they run, for hosts that ask for it; None to answer none.
    """

    def __init__(
        self,
        *,
        store: Store,
        verifiers: Sequence[Verifier],
        allow_simulated: bool,
        limits: BrokerLimits | None = None,
        on_event: Callable[[BrokerEvent], None] = lambda _event: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        sessions: SessionKeeper | None = None,
        metrics: Metrics | None = None,
        sev: SevJudge | None = None,
    ) -> None:
        """Open nothing."""
        self.limits = limits or BrokerLimits()
        self.metrics = metrics or Metrics()
        self._store, self._verifiers = store, tuple(verifiers)
        self._on_event, self._now, self._monotonic = on_event, now, monotonic
        self._next_fault_s, self._faults_omitted = float("-inf"), 0
        self._tees = {verifier.tee.value: verifier.tee for verifier in self._verifiers}
        with store.database.signing_key(draw_signing_key) as key:
            self._tokens = TokenMaker(key.reveal())
        self._sessions = sessions or MemorySessions(self.limits, monotonic)
        self._refusals = Refusals(self.limits, monotonic)
        self._pace = Pace(self.limits, monotonic)
        self._judges = ThreadPoolExecutor(JUDGES, thread_name_prefix="judge")
        self._volumes = Volumes(store)
        self._deciding = Deciding(store, self._volumes, allow_simulated=allow_simulated, now=now)
        self._freshness = Freshness(self._volumes, monotonic)
        self._launches = None if sev is None else SevSteps(
            sev,
            sessions=self._sessions,
            keep=self._keep,
            refused=self._refused,
            judges=self._judges,
            limits=self.limits,
            metrics=self.metrics,
            on_event=on_event,
            now=lambda: now().timestamp(),
        )
        self.metrics.gauge("jindisk_broker_sessions", self._sessions.count)

    def handler(self, peer: Peer) -> Handler:
        """What answers the requests of one peer."""

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            if wait_s := self._pace.wait_s(peer):
                self.metrics.count("jindisk_broker_requests_delayed_total")
                await asyncio.sleep(wait_s)
            step, response = await self._guarded(request, peer)
            self.metrics.count("jindisk_broker_requests_total", step=step, status=str(response.status))
            return response

        return handle

    async def _guarded(self, request: web.BaseRequest, peer: Peer) -> tuple[str, web.Response]:
        """Turn every failure into an answer of the protocol that tells a guest nothing new."""
        step = "other"
        try:
            step, path = _step(request)
            if step == "auth":
                return step, await self._auth(request, peer)
            if step == "attest":
                return step, await self._attest(request, peer)
            if step == "resource":
                return step, await self._resource(request, peer, path)
            if step == "release":
                return step, await self._release(request, peer)
            if step == "stale":
                return step, await self._stale(request, peer)
            if step in {BEGIN, APPROVE}:
                return step, await self._launch(step, request, peer)
            return step, answer(await self._freshness.tell(step, await body_of(request), peer))
        except Refusal as exc:
            return step, error(exc.kind, exc.detail, exc.status)
        except MalformedMessage as exc:
            return step, error("AttestationError" if step in {"auth", "attest"} else "SerdeError", str(exc))
        except TooManySessions:
            # A kind that clients try again after a while.
            return step, error("PluginInternalError", "too many sessions")
        except JindiskError as exc:
            self._tell_of_fault(peer, step, str(exc))
        except ConnectionError:
            pass  # the guest went away in the middle; the answer goes nowhere
        except Exception as exc:  # whatever it is, a guest is told nothing of it, and the journal its kind
            self._tell_of_fault(peer, step, type(exc).__name__)
            log.debug(FAULT, exc_info=exc)
        return step, error("PluginInternalError", "internal error")

    def _tell_of_fault(self, peer: Peer, step: str, problem: str) -> None:
        """One line in `FAULT_S`: while a database is away every request of every guest is one."""
        now = self._monotonic()
        if now < self._next_fault_s:
            self._faults_omitted += 1
            return
        log.error(FAULT, peer=peer.description, step=step, problem=problem, omitted=self._faults_omitted)
        self._next_fault_s, self._faults_omitted = now + FAULT_S, 0

    # The steps

    async def _stale(self, request: web.BaseRequest, peer: Peer) -> web.Response:
        """A guest got its key, and then found an old copy of its disk: as much a refusal as one of ours."""
        found = await self._freshness.stale(await body_of(request), peer)
        log.warning("refused", peer=peer.description, image_id=found.image_id, findings=[found.finding.id])
        self.metrics.count("jindisk_broker_refusals_total", finding=found.finding.id)
        self._on_event(
            BrokerEvent(
                peer=peer,
                kind="refused",
                image_id=found.image_id,
                simulated=found.simulated,
                findings=(found.finding,),
            )
        )
        return answer({"result": "ok"})

    async def _auth(self, request: web.BaseRequest, peer: Peer) -> web.Response:
        asked = parse_request(await body_of(request))
        if asked.version not in VERSIONS:
            raise Refusal(
                "AttestationError",
                f"KBS Client Protocol Version Mismatch: expect ={VERSION} while the request is {asked.version}",
            )
        if asked.tee not in self._tees:
            raise Refusal("AttestationError", "this broker does not judge that kind of TEE")
        self._turn_away(peer)
        name, session = await self._keep(
            self._sessions.new, peer.description, self._tees[asked.tee], asked.version
        )
        self._on_event(BrokerEvent(peer=peer, kind="challenged"))
        told = answer({"nonce": session.nonce, "extra-params": ""})
        return with_cookie(told, name, self.limits.session_lifetime_s)

    async def _attest(self, request: web.BaseRequest, peer: Peer) -> web.Response:
        session = await self._session(request, peer, bearer=False)
        if session.launch is not None:
            raise Refusal("TokenNotFound", "the session is of a launch")
        # Whatever comes of it, the nonce was used: of two at the same time, one is judged. And before the body is
        # read, since a session then holds one body at most, and sessions are counted.
        if not await self._keep(self._sessions.spend, session):
            raise Refusal("AttestationError", "RCAR handshake Attest failed")
        self._turn_away(peer)
        body = await body_of(request, MAX_BODY_BYTES)
        try:
            with self.metrics.timed("jindisk_broker_judge_seconds"):
                arguments = (body, session.nonce, self._verifiers, self._now(), session.tee, session.version)
                # In threads of its own: a vendor's service that is slow to answer keeps nothing else waiting.
                found = await asyncio.get_running_loop().run_in_executor(self._judges, judge, *arguments)
        except EvidenceRefused as exc:
            self.metrics.count("jindisk_broker_attestations_total", outcome="refused")
            await self._keep(self._sessions.end, session)
            who = Requester(peer=peer.description, token=session.session_id)
            kept = Kept(tee=exc.tee, blob=exc.blob, facts={}) if exc.tee is not None else None
            await self._refused(peer, who, peer.image_id or "", exc.findings, kept)
            raise Refusal("AttestationError", "RCAR handshake Attest failed") from exc
        verified = found.verified
        outcome = "simulated" if verified.simulated else "genuine"
        self.metrics.count("jindisk_broker_attestations_total", outcome=outcome)
        await self._keep(self._sessions.verify, session, found.tee_pubkey, verified)
        image_id = peer.image_id or ""
        self._on_event(BrokerEvent(peer=peer, kind="attested", image_id=image_id, simulated=verified.simulated))
        token_session = Session(
            session_id=session.session_id,
            peer=session.peer,
            nonce=session.nonce,
            expires=session.expires,
            tee_pubkey=found.tee_pubkey,
        )
        token = self._tokens.make(token_session, verified, self._now(), found.init_data)
        name = request.cookies.get(COOKIE, "")
        return with_cookie(answer({"token": token}), name, self.limits.session_lifetime_s)

    async def _resource(self, request: web.BaseRequest, peer: Peer, path: str) -> web.Response:
        session = await self._session(request, peer)
        try:
            resource = check_resource(path)
        except InvalidArgument as exc:
            raise Refusal("InvalidRequestPath", "the path is not a resource", 404) from exc
        return await self._decided(session, peer, resource, self._deciding.key)

    async def _release(self, request: web.BaseRequest, peer: Peer) -> web.Response:
        session = await self._session(request, peer)
        resource, volume = parse_release(await body_of(request))
        return await self._decided(session, peer, resource, functools.partial(self._deciding.grant, volume))

    async def _decided(
        self, session: Session, peer: Peer, resource: str, give: Give
    ) -> web.Response:
        """Decide about an attested session, and seal what `give` gives."""
        if session.stage is not Stage.VERIFIED or session.verified is None:
            raise Refusal("TokenNotFound", "the session is not attested")
        if not await self._keep(self._sessions.ask, session):
            raise Refusal("TokenNotFound", "the session has asked as often as it may")
        self._turn_away(peer)
        with self.metrics.timed("jindisk_broker_release_seconds"):
            try:
                decided = await asyncio.to_thread(self._deciding.decide, session, peer, resource, give)
            except (ApprovalWaiting, RecordChanged) as exc:
                if isinstance(exc, ApprovalWaiting):
                    self._on_event(BrokerEvent(peer=peer, kind="waiting", approval=exc.number))
                # A kind that clients try again after a while; by then a person may have looked.
                raise Refusal("PluginInternalError", "not available yet") from exc
        simulated = session.verified.simulated
        image_id, sealed, findings = decided
        if findings:
            await self._keep(self._sessions.end, session)
            await self._refused(peer, requester(session, peer), image_id, findings, keep(session.verified))
            raise Refusal("PolicyDeny", "Access denied by policy")
        log.info("released", peer=peer.description, image_id=image_id, simulated=simulated)
        self.metrics.count("jindisk_broker_releases_total", simulated=str(simulated).lower())
        self._on_event(BrokerEvent(peer=peer, kind="released", image_id=image_id, simulated=simulated))
        return web.Response(text=sealed, content_type="application/json")

    async def _launch(self, step: str, request: web.BaseRequest, peer: Peer) -> web.Response:
        """A step of a launch that is measured before it runs."""
        if self._launches is None:
            raise Refusal("PluginNotFound", "no such path", 404)
        self._turn_away(peer)
        if step == BEGIN:
            return await self._launches.begin(await body_of(request), peer)
        session = await self._session(request, peer, bearer=False)
        return await self._launches.approve(await body_of(request), session, peer)

    async def _refused(
        self, peer: Peer, who: Requester, image_id: str, findings: Sequence[Finding], evidence: Kept | None
    ) -> None:
        for finding in findings:
            self.metrics.count("jindisk_broker_refusals_total", finding=finding.id)
        noted = self._refusals.note(peer)
        if noted.write:
            ids = [finding.id for finding in findings]
            log.warning("refused", peer=peer.description, image_id=image_id, findings=ids, pause_s=noted.pause_s)
            told = [(finding.id, finding.text) for finding in findings]
            more = {"omitted": noted.omitted, "pause_s": noted.pause_s}
            detail = {name: value for name, value in more.items() if value}
            await asyncio.to_thread(self._store.record_refusal, image_id, who, told, evidence, detail=detail)
        event = BrokerEvent(
            peer=peer, kind="refused", image_id=image_id, simulated=who.simulated, findings=tuple(findings)
        )
        self._on_event(event)

    def _turn_away(self, peer: Peer) -> None:
        """Refuse a guest that was refused too often, before anything of it is looked at."""
        finding = self._refusals.turned_away(peer)
        if finding is not None:
            self.metrics.count("jindisk_broker_refusals_total", finding=finding.id)
            if self._refusals.to_tell(peer):
                image_id = peer.image_id or ""
                self._on_event(BrokerEvent(peer=peer, kind="refused", image_id=image_id, findings=(finding,)))
            raise Refusal("AttestationError", "refused too often: not judged for a while")

    # Sessions

    async def _session(self, request: web.BaseRequest, peer: Peer, *, bearer: bool = True) -> Session:
        """The session of a request, by its cookie or (for resources) its token."""
        name = request.cookies.get(COOKIE, "")
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if _NAME.fullmatch(name):
            wanted = session_id(name)
        elif bearer and kind.lower() == "bearer":
            try:
                wanted = self._tokens.session_of(token.strip(), self._now())
            except TokenRefused as exc:
                raise Refusal("TokenVerifierError", "the token is not one of this broker, or is over") from exc
        else:
            raise Refusal("TokenNotFound", "no session, or it has ended")
        session = await self._keep(self._sessions.find, wanted, peer.description)
        if session is None:
            raise Refusal("TokenNotFound", "no session, or it has ended")
        return session

    async def _keep(self, call: Callable[..., T], *arguments: object) -> T:
        if self._sessions.blocking:
            return await asyncio.to_thread(call, *arguments)
        return call(*arguments)


_STEPS = {
    ("POST", "auth"): "auth",
    ("POST", "attest"): "attest",
    ("POST", "jindisk/release"): "release",
    ("POST", "jindisk/adopt"): "adopt",
    ("POST", "jindisk/report"): "report",
    ("POST", "jindisk/close"): "close",
    ("POST", "jindisk/stale"): "stale",
    ("POST", f"jindisk/{BEGIN}"): BEGIN,
    ("POST", f"jindisk/{APPROVE}"): APPROVE,
}


def _step(request: web.BaseRequest) -> tuple[str, str]:
    """What is asked for, and of a resource its path as sent, without decoding.

    Raises:
        Refusal: nothing that guests may ask for.
    """
    path = request.raw_path.partition("?")[0]
    if not path.startswith(f"{PREFIX}/"):
        raise Refusal("InvalidRequestPath", "no such path", 404)
    path = path.removeprefix(f"{PREFIX}/")
    step = _STEPS.get((request.method, path))
    if step is not None:
        return step, ""
    if path.startswith("resource/"):
        if request.method != "GET":
            raise Refusal("AdminAuthAccess", "guests cannot change resources")
        return "resource", path.removeprefix("resource/")
    raise Refusal("PluginNotFound", "no such path", 404)
