"""The owner's judgement of SEV and SEV-ES launches: a session each, a measurement judged, a key sealed to the launch.

There is no report from inside. The owner's session is in the definition before the machine is made; between its making
and its first instruction the host shows a measurement, and gets a secret that only this launch's processor can open.
`SevJudge` takes both steps, wherever the host is: `broker.sev_owner` asks it within the service, `broker.sev_steps` for
hosts that come over the network. Between the steps a launch is kept as a `HeldLaunch`.

What AMD's key server says of a processor is in the collateral (`attest.collateral`), or was put by hand into a
directory, which goes before:

    ark.cert ask.cert           AMD's root and intermediate for the processor's generation
    cek-<16 digits>.cert        the signed CEK; the digits are the first of `cpu0-id`, hexadecimal

For the simulated platform the one file of `sim.sev_platform` stands in their place.

Findings beside those of `attest.sev`: `platform.kind`, `platform.simulation`, `key.state`, `key.count`,
`resource.unknown`, `peer.image`, and those of limits and dates.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from jindiskd.attest.collecting import Collector
from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.sev import LaunchReport, SealedSecret, SevKeys, SevPolicy, SevSession, appraise_policy
from jindiskd.attest.sev_certs import (
    ARK_SHA256,
    CERTIFICATE_BYTES,
    CHAIN_BYTES,
    SevPlatform,
    signed_by,
    verify_platform,
)
from jindiskd.base.platform import Tee
from jindiskd.broker.peer import Peer
from jindiskd.errors import EXIT_BUSY, EXIT_NOT_FOUND, JindiskError, NotFound
from jindiskd.keys import wrap
from jindiskd.keys.store import ApprovalWaiting, ImageRecord, KeyState, RecordChanged, ReleaseRefused, Requester, Store
from jindiskd.policy.rules import version_of, window
from jindiskd.sim.sev_platform import SevPlatformRoot

MAX_CERTIFICATE_BYTES = 4096
MAX_CPU_ID_BYTES = 64
MAX_POLICY = (1 << 32) - 1
PURPOSE = "SEV session"
ATTEMPTS = 3
"""How often a decision is made anew because the record changed under it."""


class ReleaseWaits(JindiskError, code="ReleaseWaits", exit_code=EXIT_BUSY):
    """A launch measured as it should, and its key is not released yet: ask again."""

    def __init__(self, approval: int | None = None) -> None:
        """`approval` as of `ApprovalWaiting`, where who is asked tells it."""
        super().__init__("it measured as it should, and its release waits for the owner's approval")
        self.approval = approval


class SevCertificateMissing(NotFound, code="SevCertificateMissing", exit_code=EXIT_NOT_FOUND):
    """AMD's certificates for a host's processor are not there, so that its SEV platform cannot be judged."""

    def __init__(self, cpu_id: bytes) -> None:
        """`cpu_id` as the host tells it."""
        super().__init__("SEV certificate of AMD's for the processor", cpu_id.hex())
        self.args = (
            f"{self}: 'jindiskctl collateral fetch --sev-processor {cpu_id.hex()}' gets it, and its authorities",
        )


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
            except (LookupError, ValueError, binascii.Error) as exc:
                raise MalformedEvidence("SEV platform", f"its {name} is missing or not base64") from exc
            if not low <= len(data) <= high:
                raise MalformedEvidence("SEV platform", f"its {name} has {len(data)} bytes")
            return data

        return cls(
            pdh=part("pdh", CERTIFICATE_BYTES, CERTIFICATE_BYTES),
            chain=part("cert-chain", CHAIN_BYTES, CHAIN_BYTES),
            cpu_id=part("cpu0-id", 8, MAX_CPU_ID_BYTES),
        )

    def told(self) -> dict[str, str]:
        """What `read` reads."""
        parts = {"pdh": self.pdh, "cert-chain": self.chain, "cpu0-id": self.cpu_id}
        return {name: base64.b64encode(data).decode() for name, data in parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLaunch:
    """A launch between its two steps. Its keys are wrapped, and bound to all the rest of it."""

    image_id: str
    guest: str
    """SHA-256 of the session, hexadecimal: one launch of one guest."""
    chip: str
    """`cpu0-id`, hexadecimal."""
    simulated: bool
    began: int
    """Seconds since the epoch."""
    wrapped: bytes = field(repr=False)

    @property
    def owner(self) -> str:
        """What its keys are bound to."""
        return f"{self.image_id} {self.guest} {self.chip} {self.simulated} {self.began}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunLaunch:
    """What the host puts into the domain's definition, and what is kept."""

    dh_certificate: bytes
    """2084 bytes."""
    session: bytes
    """128 bytes."""
    held: HeldLaunch


class SevTurn(Protocol):
    """One launch, as whoever makes the machine sees it. Close it."""

    dh_certificate: bytes
    session: bytes

    async def approve(self, report: LaunchReport) -> SealedSecret:
        """Have the measurement of the paused machine judged.

        Raises:
            ReleaseWaits: not yet; ask again with the same measurement.
            EvidenceRefused, MalformedEvidence, JindiskError: no key leaves, and this launch gets none any more.
        """

    def close(self) -> None:
        """Forget it."""


class SevSide(Protocol):
    """The owner's side of launches, here or elsewhere."""

    async def begin(self, peer: Peer, policy: int, host: HostPlatform) -> SevTurn:
        """Have a session made for one launch on this platform.

        Raises:
            EvidenceRefused: the platform is not genuine, the policy allows too much, or the key is withheld.
            MalformedEvidence: what the host shows is in no form that can be judged.
            NotFound, JindiskError: it cannot be judged now.
        """


class SevJudge:
    """Begins launches and judges them, for the images of one key store. Blocks.

    Args:
        store: keys, records and the audit log.
        certificates: the directory above.
        collector: gives the collateral.
        simulated: gives the simulated platform, where simulation is allowed.
    """

    def __init__(
        self,
        store: Store,
        *,
        certificates: Path,
        collector: Collector,
        simulated: Callable[[], SevPlatformRoot] | None,
    ) -> None:
        self._store, self._certificates, self._collector = store, certificates, collector
        self._simulated = simulated

    def begin(self, peer: Peer, image_id: str, policy: int, host: HostPlatform) -> BegunLaunch:
        """Follow the host's platform to its root, and make a session for one launch there.

        Raises:
            EvidenceRefused: the platform is not genuine, the policy allows too much, or the key is withheld.
            MalformedEvidence: what the host shows is in no form that can be judged.
            SevCertificateMissing: a certificate is not there, nor to be had.
        """
        record = self._record(image_id)
        findings = self._against(record, policy)
        if peer.image_id is not None and peer.image_id != image_id:
            findings.append(Finding("peer.image", "a launch of another image than the peer's own was begun"))
        if findings:
            raise EvidenceRefused(findings)
        platform = self._platform(host, simulated=record.platform.simulated)
        database = self._store.database
        with SevSession(platform, policy=policy, allow_send=record.rules.sev_allow_send) as session:
            held = HeldLaunch(
                image_id=record.image_id,
                guest=hashlib.sha256(session.session).hexdigest(),
                chip=host.cpu_id.hex(),
                simulated=record.platform.simulated,
                began=int(database.now().timestamp()),
                wrapped=b"",
            )
            with session.pack() as packed:
                wrapped = wrap.wrap(database.kek, packed, purpose=PURPOSE, owner=held.owner)
            return BegunLaunch(
                dh_certificate=session.dh_certificate,
                session=session.session,
                held=replace(held, wrapped=wrapped),
            )

    def approve(self, held: HeldLaunch, report: LaunchReport, who: Requester) -> SealedSecret:
        """Judge the measurement of the paused machine; the audit row is durable before the sealed key leaves.

        Whoever calls sees to it that a launch is judged once, and again only after `ReleaseWaits`.

        Args:
            held: of `begin`.
            report: what the host says of the launch.
            who: as `requester` gives it.

        Raises:
            ReleaseWaits: nothing speaks against it, but not yet; with the approval's number, if it waits for one.
            EvidenceRefused: with every reason.
            MalformedEvidence: no measurement. KeyUnreadable: a stored key does not open.
        """
        with self._keys(held) as keys:
            for _attempt in range(ATTEMPTS):
                try:
                    return self._release(keys, held, report, who)
                except RecordChanged:
                    continue
                except ReleaseRefused as exc:
                    raise EvidenceRefused([Finding(exc.finding, str(exc))]) from exc
                except ApprovalWaiting as exc:
                    raise ReleaseWaits(exc.number) from exc
        raise ReleaseWaits

    def _release(self, keys: SevKeys, held: HeldLaunch, report: LaunchReport, who: Requester) -> SealedSecret:
        record = self._record(held.image_id)
        findings = self._against(record, keys.policy)
        try:
            verified = keys.verify(
                report,
                launch_digests={digest.hex()[:16]: digest for digest in record.launch_digests},
                minimum_api=version_of(record.rules.sev_minimum_api),
            )
        except EvidenceRefused as exc:
            raise EvidenceRefused([*findings, *exc.findings]) from exc
        if findings:
            raise EvidenceRefused(findings)
        who = replace(who, measurement=verified.launch_digest)
        released = self._store.release_volumes(record.image_id, who, revision=record.revision)
        try:
            others = {resource: key for resource, key in released.items() if resource != record.resource}
            return keys.seal_keys(verified, released[record.resource], others)
        finally:
            for key in released.values():
                key.close()

    def requester(self, peer: Peer, image_id: str, chip: str, held: HeldLaunch | None = None) -> Requester:
        """Who asks, for audit rows and limits."""
        if held is not None:
            return Requester(peer=peer.description, simulated=held.simulated, guest=held.guest, chip=held.chip)
        try:
            simulated = self._store.image(image_id).platform.simulated
        except NotFound:
            simulated = False
        return Requester(peer=peer.description, simulated=simulated, chip=chip)

    def _record(self, image_id: str) -> ImageRecord:
        try:
            return self._store.image(image_id)
        except NotFound as exc:
            raise EvidenceRefused([Finding("resource.unknown", str(exc))]) from exc

    def _keys(self, held: HeldLaunch) -> SevKeys:
        packed = wrap.unwrap(self._store.database.kek, held.wrapped, purpose=PURPOSE, owner=held.owner)
        return SevKeys.unpack(packed)

    def _against(self, record: ImageRecord, policy: int) -> list[Finding]:
        """What speaks against a launch, whatever it measures as: asked at both steps, for rules may change between."""
        platform, rules, findings = record.platform, record.rules, []
        if not platform.measured_before:
            findings.append(Finding("platform.kind", f"the image is for {platform}, not for SEV or SEV-ES"))
        elif platform.tee is Tee.SEV_ES and not policy & SevPolicy.ES:
            findings.append(Finding("platform.kind", f"the image is for {platform}, the policy 0x{policy:x} is not"))
        if platform.measured_before:
            findings += appraise_policy(policy, encrypted_state=False, allow_send=rules.sev_allow_send)
        if platform.simulated and (self._simulated is None or rules.allow_simulated is False):
            text = "the image is for a simulated platform, which is not accepted"
            findings.append(Finding("platform.simulation", text))
        if record.state is not KeyState.ACTIVE:
            findings.append(Finding("key.state", f"the image's key is {record.state}"))
        now: datetime = self._store.database.now()
        return findings + window(rules, now)

    def _platform(self, host: HostPlatform, *, simulated: bool) -> SevPlatform:
        if simulated:
            assert self._simulated is not None  # found out by `_against`
            known = self._simulated()
            return verify_platform(
                host.pdh, host.chain, ask=known.ask, ark=known.ark, cek=known.cek, ark_sha256=known.ark_sha256
            )
        cek = self._certificate(f"cek-{host.cpu_id.hex()[:16]}") or self._collector.cek(host.cpu_id)
        if cek is None:
            raise SevCertificateMissing(host.cpu_id)
        ask, ark = self._certificate("ask"), self._certificate("ark")
        if ask is None or ark is None or not signed_by(ask, cek):
            found = self._collector.sev_authorities(cek)
            if found is not None:
                ask, ark = found
        if ask is None or ark is None:
            raise SevCertificateMissing(host.cpu_id)
        return verify_platform(host.pdh, host.chain, ask=ask, ark=ark, cek=cek, ark_sha256=ARK_SHA256)

    def _certificate(self, name: str) -> bytes | None:
        """One that was put there by hand."""
        try:
            with (self._certificates / f"{name}.cert").open("rb") as stream:
                return stream.read(MAX_CERTIFICATE_BYTES)
        except FileNotFoundError:
            return None
