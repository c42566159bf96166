"""The owner's side of SEV launches where its broker is elsewhere: asked over TLS, as guests ask it through the relay.

The host passes on what its processor and libvirt say, and gets back what is encrypted to that processor and to that
launch. It has no part in the judgement, and learns neither the session's keys nor the secret.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from jindiskd.attest.model import EvidenceRefused, Finding
from jindiskd.attest.sev import LaunchReport, SealedSecret
from jindiskd.base.endpoint import Endpoint
from jindiskd.broker.peer import Peer
from jindiskd.broker.relay import Relay
from jindiskd.broker.sev import HostPlatform, ReleaseWaits
from jindiskd.broker.sev_messages import APPROVE, BEGIN, BeginRequest, dump_approve, parse_begun, parse_sealed
from jindiskd.errors import EXIT_BUSY, JindiskError, NotSupported
from jindiskd.kbs.client import BrokerMisbehaved, BrokerRefused, BrokerUnreachable, Channel, KbsClient
from jindiskd.kbs.messages import PREFIX, MalformedMessage

STEP_S = 30.0
"""How long a step is tried, in a thread that nobody can end sooner."""
CONNECT_S = 10.0
T = TypeVar("T")


class LaunchForgotten(JindiskError, code="LaunchForgotten", exit_code=EXIT_BUSY):
    """The owner's broker does not judge this launch, or not again."""

    def __init__(self) -> None:
        """It does not say which of the reasons it is."""
        super().__init__(
            "the owner's broker no longer knows this launch: it was begun too long ago, the broker was restarted, or "
            "its answer was lost; launch again"
        )


class _Answered(Exception):
    """What the broker refused, past everything that would try it again."""

    def __init__(self, refused: BrokerRefused) -> None:
        super().__init__(refused.kind)
        self.refused = refused


class SevClient(KbsClient):
    """Has launches judged by the pinned broker. Blocks. It tries connections again, and no judgement."""

    def ask(self, verb: str, body: bytes, cookie: str | None = None) -> tuple[bytes, str | None]:
        """One step; returns the answer and the session's cookie.

        Raises:
            BrokerRefused: what the broker answered.
            BrokerNotTrusted, BrokerUnreachable, BrokerMisbehaved: as for guests.
        """

        def attempt(channel: Channel) -> tuple[bytes, str | None]:
            try:
                return self._answer(channel, "POST", f"{PREFIX}/jindisk/{verb}", body, cookie)
            except BrokerRefused as exc:
                raise _Answered(exc) from exc

        try:
            return self._until_deadline(attempt)
        except _Answered as exc:
            raise exc.refused from None


class RemoteOwner:
    """Has launches judged by the owner's broker; a `SevSide`.

    Args:
        relay: the way to the broker; its state is told there.
        spki_sha256: of the broker's card.
    """

    def __init__(self, relay: Relay, spki_sha256: bytes) -> None:
        self._relay, self._pin = relay, spki_sha256

    @property
    def broker(self) -> Endpoint:
        """Where the broker is."""
        return self._relay.broker

    async def begin(self, peer: Peer, policy: int, host: HostPlatform) -> RemoteTurn:
        """Have a session made for one launch of the peer's image.

        Raises:
            EvidenceRefused: the broker refuses it, and tells its owner why.
            NotSupported: it is a broker that judges no launches.
            BrokerNotTrusted, BrokerUnreachable, BrokerMisbehaved: it was not asked.
        """
        request = BeginRequest(image_id=peer.image_id or "", policy=policy, host=host)
        answer, cookie = await self.ask(BEGIN, request.dump(), None)
        certificate, session = _read(parse_begun, answer)
        return RemoteTurn(self, certificate, session, cookie)

    async def ask(self, verb: str, body: bytes, cookie: str | None) -> tuple[bytes, str | None]:
        """One step at the broker; raises as `begin`, and `ReleaseWaits`, `LaunchForgotten`."""
        client = SevClient(self._connect, spki_sha256=self._pin, deadline=time.monotonic() + STEP_S)
        try:
            found = await asyncio.to_thread(client.ask, verb, body, cookie)
        except BrokerUnreachable as exc:
            self._relay.missed(exc.problem)
            raise BrokerUnreachable(f"{exc.problem} (at {self.broker})") from exc
        except BrokerRefused as exc:
            self._relay.reached()
            _refused(verb, exc)
        self._relay.reached()
        return found

    def _connect(self) -> socket.socket:
        return socket.create_connection((self.broker.host, self.broker.port), timeout=CONNECT_S)


class RemoteTurn:
    """One launch; a `SevTurn`."""

    def __init__(self, owner: RemoteOwner, dh_certificate: bytes, session: bytes, cookie: str | None) -> None:
        """Use `RemoteOwner.begin`."""
        self._owner, self._cookie = owner, cookie
        self.dh_certificate, self.session = dh_certificate, session

    async def approve(self, report: LaunchReport) -> SealedSecret:
        """Have the measurement judged. Raises as `SevTurn.approve`, and `LaunchForgotten`."""
        answer, _cookie = await self._owner.ask(APPROVE, dump_approve(report), self._cookie)
        return _read(parse_sealed, answer)

    def close(self) -> None:
        """Nothing is kept here that would help anybody."""
        self._cookie = None


def _read(parse: Callable[[bytes], T], answer: bytes) -> T:
    try:
        return parse(answer)
    except MalformedMessage as exc:
        raise BrokerMisbehaved(exc.problem) from exc


def _refused(verb: str, exc: BrokerRefused) -> NoReturn:
    """What a refusal of the broker means at this step."""
    if exc.kind in {"PluginNotFound", "InvalidRequestPath"} or exc.kind.startswith("HTTP status 4"):
        remedy = "have images of SEV and SEV-ES judged by jindisk-broker; others judge evidence from inside a guest"
        raise NotSupported("judging a launch before it runs at the owner's broker", remedy) from exc
    if exc.kind == "PluginInternalError" and verb == APPROVE:
        raise ReleaseWaits from exc
    if exc.kind == "TokenNotFound":
        raise LaunchForgotten from exc
    if exc.kind in {"PolicyDeny", "AttestationError"}:
        raise EvidenceRefused([Finding("broker.refused", str(exc))]) from exc
    raise exc
