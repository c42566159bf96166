"""The owner's side of SEV launches where it is in the same service as the host's: `SevJudge`, asked directly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from jindiskd.attest.collecting import Collector
from jindiskd.attest.model import EvidenceRefused, Finding
from jindiskd.attest.sev import LaunchReport, SealedSecret
from jindiskd.broker.peer import BrokerEvent, Peer
from jindiskd.broker.sev import BegunLaunch, HeldLaunch, HostPlatform, ReleaseWaits, SevJudge
from jindiskd.keys.store import Requester, Store
from jindiskd.sim.sev_platform import SevPlatformRoot

log = structlog.get_logger(__name__)


class SevOwner:
    """Begins launches and judges them, for the images of one key store; a `SevSide`.

    Args:
        store: keys, records and the audit log.
        certificates, collector: as of `SevJudge`.
        simulated: gives the simulated platform, where simulation is allowed; called in a thread.
        on_event: told of each decision, in the event loop.
    """

    def __init__(
        self,
        store: Store,
        *,
        certificates: Path,
        collector: Collector,
        simulated: Callable[[], SevPlatformRoot] | None,
        on_event: Callable[[BrokerEvent], None] = lambda _event: None,
    ) -> None:
        self.judge = SevJudge(store, certificates=certificates, collector=collector, simulated=simulated)
        self._store, self._on_event = store, on_event

    async def begin(self, peer: Peer, policy: int, host: HostPlatform) -> OwnTurn:
        """Make a session for one launch of the peer's image; raises as `SevJudge.begin`."""
        image_id = peer.image_id or ""
        try:
            begun = await asyncio.to_thread(self.judge.begin, peer, image_id, policy, host)
        except EvidenceRefused as exc:
            who = await asyncio.to_thread(self.judge.requester, peer, image_id, host.cpu_id.hex())
            await self.refused(peer, who, exc)
            raise
        self.tell(peer, "challenged", begun.held)
        return OwnTurn(self, peer, begun)

    def tell(self, peer: Peer, kind: str, held: HeldLaunch, findings: tuple[Finding, ...] = ()) -> None:
        """Tell of a decision."""
        event = BrokerEvent(peer=peer, kind=kind, image_id=held.image_id, simulated=held.simulated, findings=findings)
        self._on_event(event)

    async def refused(self, peer: Peer, who: Requester, exc: EvidenceRefused) -> None:
        """Write a refusal down, and tell of it."""
        findings, image_id = tuple(exc.findings), peer.image_id or ""
        told = [(finding.id, finding.text) for finding in findings]
        await asyncio.to_thread(self._store.record_refusal, image_id, who, told)
        log.warning("refused", peer=peer.description, image_id=image_id, findings=[name for name, _ in told])
        self._on_event(
            BrokerEvent(peer=peer, kind="refused", image_id=image_id, simulated=who.simulated, findings=findings)
        )


class OwnTurn:
    """One launch; a `SevTurn`."""

    def __init__(self, owner: SevOwner, peer: Peer, begun: BegunLaunch) -> None:
        """Use `SevOwner.begin`."""
        self._owner, self._peer = owner, peer
        self._held: HeldLaunch | None = begun.held
        self.dh_certificate, self.session = begun.dh_certificate, begun.session

    async def approve(self, report: LaunchReport) -> SealedSecret:
        """Have the measurement judged: once, and again only after `ReleaseWaits`. Raises as `SevJudge.approve`."""
        owner, held, self._held = self._owner, self._held, None
        if held is None:
            raise EvidenceRefused([Finding("session.spent", "the launch was judged already")])
        who = owner.judge.requester(self._peer, held.image_id, held.chip, held)
        try:
            sealed = await asyncio.to_thread(owner.judge.approve, held, report, who)
        except ReleaseWaits:
            self._held = held
            raise
        except EvidenceRefused as exc:
            await owner.refused(self._peer, who, exc)
            raise
        owner.tell(self._peer, "attested", held)
        log.info("released", peer=self._peer.description, image_id=held.image_id, simulated=held.simulated)
        owner.tell(self._peer, "released", held)
        return sealed

    def close(self) -> None:
        """Forget the session's keys."""
        self._held = None
