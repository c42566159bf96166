"""The broker's side of SEV and SEV-ES launches: a session each, the measurement judged, the key sealed to the launch.

There is no report from inside. The owner's session is in the definition before the machine is made; between its making
and its first instruction the host shows a measurement, and gets a secret that only this launch's processor can open.

What AMD's key server says of a processor is kept in a directory:

    ark.cert ask.cert           AMD's root and intermediate for the processor's generation
    cek-<16 digits>.cert        the signed CEK; the digits are the first of `cpu0-id`, hexadecimal

For the simulated platform the one file of `sim.sev_platform` stands in their place.

Findings beside those of `attest.sev`: `platform.kind`, `platform.simulation`, `key.state`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.sev import LaunchReport, SealedSecret, SevPolicy, SevSession
from jindiskd.attest.sev_certs import ARK_SHA256, CERTIFICATE_BYTES, CHAIN_BYTES, SevPlatform, verify_platform
from jindiskd.base.platform import Tee
from jindiskd.broker.peer import Peer
from jindiskd.broker.service import BrokerEvent
from jindiskd.errors import NotFound
from jindiskd.keys.store import ImageRecord, KeyState, ReleaseRefused, Requester, Store
from jindiskd.policy.release import window
from jindiskd.sim.sev_platform import SevPlatformKeys

log = structlog.get_logger(__name__)
MAX_CERTIFICATE_BYTES = 4096
MAX_CPU_ID_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlatform:
    """What a host shows of its SEV platform; not believed."""

    pdh: bytes
    chain: bytes
    cpu_id: bytes

    @classmethod
    def read(cls, info: Mapping[str, object]) -> HostPlatform:
        """libvirt's `virNodeGetSEVInfo`.

        Raises:
            MalformedEvidence: a part is missing, not base64, or of another length.
        """

        def part(name: str, low: int, high: int) -> bytes:
            try:
                data = base64.b64decode(str(info[name]), validate=True)
            except (LookupError, binascii.Error) as exc:
                raise MalformedEvidence("SEV platform", f"its {name} is missing or not base64") from exc
            if not low <= len(data) <= high:
                raise MalformedEvidence("SEV platform", f"its {name} has {len(data)} bytes")
            return data

        return cls(
            pdh=part("pdh", CERTIFICATE_BYTES, CERTIFICATE_BYTES),
            chain=part("cert-chain", CHAIN_BYTES, CHAIN_BYTES),
            cpu_id=part("cpu0-id", 8, MAX_CPU_ID_BYTES),
        )


class SevOwner:
    """Begins sessions and judges them, for the images of one key store."""

    def __init__(
        self,
        store: Store,
        *,
        certificates: Path,
        simulated: Callable[[], SevPlatformKeys] | None,
        on_event: Callable[[BrokerEvent], None] = lambda _event: None,
    ) -> None:
        """
        Args:
            store: keys, records and the audit log.
            certificates: the directory above.
            simulated: gives the simulated platform, where simulation is allowed; called in a thread.
            on_event: told of each decision, in the event loop.
        """
        self._store, self._certificates, self._simulated, self._on_event = store, certificates, simulated, on_event

    async def begin(self, peer: Peer, policy: int, host: HostPlatform) -> SevTurn:
        """Follow the host's platform to its root, and make a session for one launch there.

        Raises:
            EvidenceRefused: the platform is not genuine, the policy allows too much, or the key is withheld.
            MalformedEvidence: what the host shows is in no form that can be judged.
            NotFound: no such key, or a certificate is missing.
        """
        image_id = peer.image_id or ""
        try:
            record = await asyncio.to_thread(self._store.image, image_id)
            findings = _against(record, policy, simulation=self._simulated is not None)
            if findings:
                raise EvidenceRefused(findings)
            platform = await asyncio.to_thread(self._platform, host, simulated=record.platform.simulated)
            session = await asyncio.to_thread(SevSession, platform, policy=policy)
        except EvidenceRefused as exc:
            await self._refused(peer, Requester(peer=peer.description, chip=host.cpu_id.hex()), exc)
            raise
        self._on_event(BrokerEvent(peer=peer, kind="challenged", image_id=image_id))
        return SevTurn(self, record, peer, session, host)

    def _platform(self, host: HostPlatform, *, simulated: bool) -> SevPlatform:
        if simulated:
            assert self._simulated is not None  # found out by `_against`
            known = self._simulated()
            return verify_platform(
                host.pdh, host.chain, ask=known.ask, ark=known.ark, cek=known.cek, ark_sha256=known.ark_sha256
            )
        return verify_platform(
            host.pdh,
            host.chain,
            ask=self._certificate("ask"),
            ark=self._certificate("ark"),
            cek=self._certificate(f"cek-{host.cpu_id.hex()[:16]}"),
            ark_sha256=ARK_SHA256,
        )

    def _certificate(self, name: str) -> bytes:
        path = self._certificates / f"{name}.cert"
        try:
            with path.open("rb") as stream:
                return stream.read(MAX_CERTIFICATE_BYTES)
        except FileNotFoundError as exc:
            raise NotFound("certificate, which AMD's key server has for this processor,", str(path)) from exc

    async def _refused(self, peer: Peer, who: Requester, exc: EvidenceRefused) -> None:
        findings = tuple(exc.findings)
        told = [(finding.id, finding.text) for finding in findings]
        await asyncio.to_thread(self._store.record_refusal, peer.image_id or "", who, told)
        log.warning("refused", peer=peer.description, image_id=peer.image_id, findings=[name for name, _ in told])
        self._on_event(
            BrokerEvent(
                peer=peer, kind="refused", image_id=peer.image_id or "", simulated=who.simulated, findings=findings
            )
        )


class SevTurn:
    """One launch. Close it: it holds the session's keys."""

    def __init__(
        self, owner: SevOwner, record: ImageRecord, peer: Peer, session: SevSession, host: HostPlatform
    ) -> None:
        """Use `SevOwner.begin`."""
        self._owner, self._record, self._peer, self._session, self._host = owner, record, peer, session, host
        self.dh_certificate, self.session = session.dh_certificate, session.session

    async def approve(self, report: LaunchReport) -> SealedSecret:
        """Judge the measurement of the paused machine; the audit row is durable before the sealed key leaves.

        Raises:
            EvidenceRefused: with every reason; the refusal is in the audit log.
            MalformedEvidence: no measurement.
            ReleaseRefused, ApprovalWaiting, KeyUnreadable: the store does not give the key.
        """
        owner, record = self._owner, self._record
        digests = {digest.hex()[:16]: digest for digest in record.launch_digests}
        simulated = record.platform.simulated
        who = Requester(peer=self._peer.description, chip=self._host.cpu_id.hex(), simulated=simulated)
        try:
            verified = self._session.verify(report, launch_digests=digests)
        except EvidenceRefused as exc:
            await owner._refused(self._peer, who, exc)  # noqa: SLF001 (one thing in two classes)
            raise
        who = Requester(peer=who.peer, chip=who.chip, simulated=simulated, measurement=verified.launch_digest)
        owner._on_event(  # noqa: SLF001 (as above)
            BrokerEvent(peer=self._peer, kind="attested", image_id=record.image_id, simulated=simulated)
        )

        def seal() -> SealedSecret:
            with owner._store.release_to(record.image_id, who, revision=record.revision) as key:  # noqa: SLF001
                return self._session.seal_disk_key(verified, key)

        try:
            sealed = await asyncio.to_thread(seal)
        except ReleaseRefused as exc:
            refusal = EvidenceRefused([Finding(exc.finding, str(exc))])
            await owner._refused(self._peer, who, refusal)  # noqa: SLF001 (as above)
            raise refusal from exc
        log.info("released", peer=self._peer.description, image_id=record.image_id, simulated=simulated)
        owner._on_event(  # noqa: SLF001 (as above)
            BrokerEvent(peer=self._peer, kind="released", image_id=record.image_id, simulated=simulated)
        )
        return sealed

    def close(self) -> None:
        """Forget the session's keys."""
        self._session.close()


def _against(record: ImageRecord, policy: int, *, simulation: bool) -> list[Finding]:
    """What speaks against a launch before anything of the host is looked at."""
    findings = []
    if not record.platform.measured_before:
        findings.append(Finding("platform.kind", f"the image is for {record.platform}, not for SEV or SEV-ES"))
    elif record.platform.tee is Tee.SEV_ES and not policy & SevPolicy.ES:
        findings.append(Finding("platform.kind", f"the image is for {record.platform}, the policy 0x{policy:x} is not"))
    if record.platform.simulated and not simulation:
        findings.append(Finding("platform.simulation", "the image is for a simulated platform, which is not accepted"))
    if record.state is not KeyState.ACTIVE:
        findings.append(Finding("key.state", f"the image's key is {record.state}"))
    return findings + window(record.rules, datetime.now(UTC))
