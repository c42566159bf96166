"""The key broker: Trustee KBS protocol 0.4.0 as a server.

`/auth` gives a nonce, `/attest` judges the evidence, `/resource` decides and releases. A guest is told that it was
refused, never why: the reasons go to the audit log and to whoever runs the broker.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from aiohttp import web

from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.snp import SnpVerifier, VerifiedSnp
from jindiskd.broker.sessions import Session, Sessions, Stage, TooManySessions
from jindiskd.broker.token import TokenMaker
from jindiskd.errors import InvalidArgument, JindiskError, NotFound
from jindiskd.kbs import jwe, jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.evidence import snp_from_json
from jindiskd.kbs.messages import (
    COOKIE,
    ERROR_TYPE,
    MAX_BODY_BYTES,
    PREFIX,
    VERSION,
    MalformedMessage,
    check_resource,
    parse_attestation,
    parse_request,
)
from jindiskd.keys.store import ReleaseRefused, Store
from jindiskd.policy.release import decide

log = structlog.get_logger(__name__)
BODY_TIME_S = 20.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end, as the transport knows it; not what it says."""

    description: str
    domain_uuid: str | None = None
    image_id: str | None = None
    """The only image whose key this peer may ask for; None for any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerEvent:
    """What happened to a guest at the broker."""

    peer: Peer
    kind: str
    """`challenged`, `attested`, `released` or `refused`."""
    image_id: str = ""
    simulated: bool = False
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLimits:
    """What peers may use."""

    session_lifetime_s: float = 60.0
    sessions_per_peer: int = 16
    sessions: int = 256


class _Refusal(Exception):
    """An answer of the protocol that is not 200."""

    def __init__(self, kind: str, detail: str, status: int = 401) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.status = kind, detail, status


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
    """

    def __init__(
        self,
        *,
        store: Store,
        verifiers: Sequence[SnpVerifier],
        allow_simulated: bool,
        limits: BrokerLimits | None = None,
        on_event: Callable[[BrokerEvent], None] = lambda _event: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open nothing."""
        limits = limits or BrokerLimits()
        self._store, self._verifiers, self._allow_simulated = store, tuple(verifiers), allow_simulated
        self._on_event, self._now = on_event, now
        self._tokens = TokenMaker()
        self._sessions = Sessions(
            lifetime_s=limits.session_lifetime_s,
            per_peer=limits.sessions_per_peer,
            total=limits.sessions,
            clock=monotonic,
        )

    def application(self, peer: Peer) -> web.Application:
        """The HTTP application for one peer."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._guarded(request, handler)

        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[guarded])

        async def auth(request: web.Request) -> web.Response:
            return await self._auth(request, peer)

        async def attest(request: web.Request) -> web.Response:
            return await self._attest(request, peer)

        async def resource(request: web.Request) -> web.Response:
            return await self._resource(request, peer)

        app.router.add_post(f"{PREFIX}/auth", auth)
        app.router.add_post(f"{PREFIX}/attest", attest)
        app.router.add_get(f"{PREFIX}/resource/{{path:.*}}", resource)
        return app

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn every failure into an answer of the protocol that tells a guest nothing new."""
        try:
            return await handler(request)
        except _Refusal as exc:
            return _error(exc.kind, exc.detail, exc.status)
        except MalformedMessage as exc:
            return _error("AttestationError", str(exc))
        except TooManySessions:
            return _error("AttestationError", "too many sessions")
        except web.HTTPRequestEntityTooLarge:
            return _error("AttestationError", f"the body is longer than {MAX_BODY_BYTES} bytes")
        except web.HTTPException:
            return _error("InvalidRequestPath", "no such path", 404)
        except TimeoutError:
            return _error("AttestationError", "the body did not arrive in time")
        except JindiskError as exc:
            log.error("fault while serving a guest", problem=str(exc))
            return _error("PluginInternalError", "internal error")
        except Exception:  # whatever it is, a guest is told nothing of it
            log.exception("fault while serving a guest")
            return _error("PluginInternalError", "internal error")

    async def _auth(self, request: web.Request, peer: Peer) -> web.Response:
        asked = parse_request(await _body(request))
        if asked.version != VERSION:
            raise _Refusal(
                "AttestationError",
                f"KBS Client Protocol Version Mismatch: expect ={VERSION} while the request is {asked.version}",
            )
        if asked.tee != "snp":
            raise _Refusal("AttestationError", "this broker does not judge that kind of TEE")
        session = self._sessions.new(peer.description)
        self._on_event(BrokerEvent(peer=peer, kind="challenged"))
        answer = web.json_response({"nonce": session.nonce, "extra-params": ""})
        _set_cookie(answer, session)
        return answer

    async def _attest(self, request: web.Request, peer: Peer) -> web.Response:
        session = self._session(request, peer)
        body = await _body(request)
        if session.stage is not Stage.CHALLENGED:
            raise _Refusal("AttestationError", "RCAR handshake Attest failed")
        session.stage = Stage.SPENT  # whatever comes of it, the nonce was used
        simulated = False
        try:
            verified = await asyncio.to_thread(self._judge, session, body)
        except EvidenceRefused as exc:
            findings, simulated = exc.findings, False
        except MalformedMessage as exc:
            findings = (Finding("evidence.malformed", str(exc)),)
        except MalformedEvidence as exc:
            findings = (Finding("evidence.malformed", str(exc)),)
        else:
            session.verified, session.stage = verified, Stage.VERIFIED
            self._on_event(
                BrokerEvent(peer=peer, kind="attested", image_id=peer.image_id or "", simulated=verified.simulated)
            )
            answer = web.json_response({"token": self._tokens.make(session, verified, self._now())})
            _set_cookie(answer, session)
            return answer
        self._sessions.end(session)
        await self._refused(peer, peer.image_id or "", findings, simulated=simulated, measurement=b"")
        raise _Refusal("AttestationError", "RCAR handshake Attest failed")

    def _judge(self, session: Session, body: bytes) -> VerifiedSnp:
        """Whether the evidence is genuine and bound to nonce and key; blocks."""
        told = parse_attestation(body)
        if told.nonce != session.nonce:
            raise EvidenceRefused([Finding("session.nonce", "the nonce is not the one that was sent")])
        if told.additional_evidence not in {"", "{}"}:
            raise EvidenceRefused([Finding("evidence.additional", "evidence of devices is not judged by this broker")])
        jwk.public_key(told.tee_pubkey)
        report, certificates = snp_from_json(told.primary_evidence)
        bound = report_data(session.nonce, told.tee_pubkey, told.additional_evidence)
        reasons: list[Finding] = []
        for verifier in self._verifiers:
            try:
                verified = verifier.verify(report, certificates, report_data=bound, now=self._now())
            except EvidenceRefused as exc:
                reasons = reasons or list(exc.findings)
                continue
            session.tee_pubkey = told.tee_pubkey
            return verified
        raise EvidenceRefused(reasons)

    async def _resource(self, request: web.Request, peer: Peer) -> web.Response:
        session = self._session(request, peer)
        verified = session.verified
        if session.stage is not Stage.VERIFIED or verified is None:
            raise _Refusal("TokenNotFound", "the session is not attested")
        try:
            resource = check_resource(request.match_info["path"])
        except InvalidArgument as exc:
            raise _Refusal("InvalidRequestPath", "the path is not a resource", 404) from exc
        measurement = verified.report.measurement
        try:
            record = await asyncio.to_thread(self._store.by_resource, resource)
        except NotFound as exc:
            findings = [Finding("resource.unknown", "no image has that resource")]
            await self._refused(peer, "", findings, simulated=verified.simulated, measurement=measurement)
            raise _Refusal("PolicyDeny", "Access denied by policy") from exc
        findings = decide(record, verified, allow_simulated=self._allow_simulated)
        if peer.image_id is not None and peer.image_id != record.image_id:
            findings.insert(0, Finding("peer.image", "the guest asked for the key of another image than its own"))
        key = None
        if not findings:
            try:
                key = await asyncio.to_thread(
                    self._store.release,
                    record.image_id,
                    peer=peer.description,
                    measurement=measurement,
                    simulated=verified.simulated,
                )
            except (ReleaseRefused, NotFound) as exc:
                findings = [Finding("key.state", str(exc))]
        if key is None:
            self._sessions.end(session)
            await self._refused(peer, record.image_id, findings, simulated=verified.simulated, measurement=measurement)
            raise _Refusal("PolicyDeny", "Access denied by policy")
        with key:
            text = jwe.seal(key.reveal(), session.tee_pubkey)
        log.info("released", peer=peer.description, image_id=record.image_id, simulated=verified.simulated)
        self._on_event(
            BrokerEvent(peer=peer, kind="released", image_id=record.image_id, simulated=verified.simulated)
        )
        return web.Response(text=text, content_type="application/json")

    async def _refused(
        self, peer: Peer, image_id: str, findings: Sequence[Finding], *, simulated: bool, measurement: bytes
    ) -> None:
        log.warning("refused", peer=peer.description, image_id=image_id, findings=[f.id for f in findings])
        await asyncio.to_thread(
            self._store.record_refusal,
            image_id,
            peer=peer.description,
            findings=[(finding.id, finding.text) for finding in findings],
            simulated=simulated,
            measurement=measurement,
        )
        self._on_event(
            BrokerEvent(peer=peer, kind="refused", image_id=image_id, simulated=simulated, findings=tuple(findings))
        )

    def _session(self, request: web.Request, peer: Peer) -> Session:
        session = self._sessions.find(request.cookies.get(COOKIE, ""), peer.description)
        if session is None:
            raise _Refusal("TokenNotFound", "no session, or it has ended")
        return session


async def _body(request: web.Request) -> bytes:
    async with asyncio.timeout(BODY_TIME_S):
        return await request.read()


def _set_cookie(answer: web.Response, session: Session) -> None:
    # The reference sends the name and value and a date, without a path: the default path then is the prefix.
    answer.headers["Set-Cookie"] = f"{COOKIE}={session.name}"


def _error(kind: str, detail: str, status: int = 401) -> web.Response:
    body = json.dumps({"type": ERROR_TYPE + kind, "detail": detail})
    return web.Response(status=status, text=body, content_type="application/json")
