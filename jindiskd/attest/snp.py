"""Is an SEV-SNP report genuine? Chain, signature, and agreement of report and certificate. Pure; no network, no clock.

What a genuine report *says* (debug, versions, measurement …) is judged in `jindiskd.attest.appraise`. Sources: AMD
56860 (report, signature encoding) and AMD 57230 chapter 3 (certificates). Findings, all refusals:

| id | meaning |
|---|---|
| `snp.reserved` | bits are set whose meaning is not known |
| `snp.report_data` | the report was made for another challenge |
| `snp.signature`, `.algorithm`, `.range` | not signed by the key of the certificate |
| `snp.signer`, `.vlek`, `.kind` | signed by no key, a provider's key that is not allowed, another kind than presented |
| `snp.certificate.missing`, `.malformed`, `.key`, `.dates` | the signing certificate |
| `snp.chain.incomplete`, `.signature`, `.root`, `.dates`, `.names` | the way to a pinned root |
| `snp.crl.missing`, `.malformed`, `.signature`, `.dates`, `snp.revoked` | revocation |
| `snp.product` | report, certificate, issuer and root name different products |
| `snp.tcb.certificate` | the certificate was issued for other firmware versions than REPORTED_TCB |
| `snp.chip_id`, `.masked` | the certificate belongs to another chip, or the host hides which chip it is |
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from jindiskd.attest.model import EvidenceRefused, Finding
from jindiskd.attest.snp_chain import SIGNING_NAMES, Chain, SnpChains
from jindiskd.attest.snp_endorsement import Endorsement
from jindiskd.attest.snp_report import (
    SIGNATURE_ECDSA_P384_SHA384,
    SIGNED_BYTES,
    Product,
    Signer,
    SnpReport,
    parse_report,
    reserved_faults,
)
from jindiskd.attest.snp_roots import AMD_ROOTS, SnpRoots
from jindiskd.base.platform import Tee

if TYPE_CHECKING:  # it imports this module
    from jindiskd.attest.verifier import Evidence

__all__ = ["AMD_ROOTS", "SnpRoots", "SnpVerifier", "VerifiedSnp"]

P384_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedSnp:
    """A genuine report. Only `SnpVerifier.verify` makes these."""

    report: SnpReport
    product: Product
    signer: Signer
    csp_id: str | None
    """The provider that a VLEK vouches for; None for a VCEK."""
    simulated: bool
    roots: str
    """Name of the roots it goes back to."""
    certificate_sha256: str
    """Of the VCEK or VLEK certificate."""
    crl_issued: int | None = None
    """When the newest current revocation list of the root was issued, seconds since the epoch; None where none was
    at hand."""
    report_data_checked: bool
    """False where the caller had no challenge to compare with (evidence from a file): freshness is then unknown."""

    @property
    def measurement(self) -> bytes:
        """What the policy knows code by: the launch digest, 48 bytes."""
        return self.report.measurement

    @property
    def guest(self) -> str:
        """One launch of one guest: REPORT_ID, hexadecimal."""
        return self.report.report_id.hex()

    @property
    def chip(self) -> str:
        """The processor: CHIP_ID, hexadecimal."""
        return self.report.chip_id.hex()


class SnpVerifier:
    """Decides whether reports are genuine, under fixed roots.

    Certificates that come with evidence and those given here are equally untrusted: only a chain to a root whose
    digest is in `roots` counts. Safe to call from several threads; keeps a bounded memory of chains that led to a root,
    by content, so a fleet's evidence costs one signature each.

    Args:
        roots: pinned root certificates.
        intermediates: ARK, ASK and ASVK certificates from files, DER or PEM; used as well as those in the evidence.
        crls: revocation lists, DER or PEM.
        require_crl: refuse where no list is at hand for the chain's root.
        allow_vlek_csp: provider identities whose VLEK may sign; empty refuses every VLEK, None leaves it to whoever
            appraises the report (`VerifiedSnp.csp_id`).
        allow_masked_chip_id: accept VCEK-signed reports whose host hides the chip identity.
    """

    tee = Tee.SNP

    def __init__(
        self,
        *,
        roots: SnpRoots,
        intermediates: Sequence[bytes] = (),
        crls: Sequence[bytes] = (),
        require_crl: bool = False,
        allow_vlek_csp: frozenset[str] | None = frozenset(),
        allow_masked_chip_id: bool = False,
    ) -> None:
        """Read the given certificates and lists; raises `MalformedEvidence` if one cannot be read."""
        self.roots = roots
        self.allow_vlek_csp = allow_vlek_csp
        self.allow_masked_chip_id = allow_masked_chip_id
        self._chains = SnpChains(roots, intermediates=intermediates, crls=crls, require_crl=require_crl)

    def verify(
        self, report: bytes, certificates: Sequence[bytes], *, report_data: bytes | None, now: datetime
    ) -> VerifiedSnp:
        """Check one report.

        Args:
            report: 1184 bytes.
            certificates: what came with it, DER or PEM, in any order: the VCEK or VLEK, and intermediates and the ARK
                unless the verifier was given them. At most 16.
            report_data: the 64 bytes it must have been made for; None for evidence whose challenge is not known.
            now: the time to judge dates by, with a time zone.

        Raises:
            MalformedEvidence: the report is not one.
            EvidenceRefused: it is not genuine; has every reason.
        """
        findings: list[Finding] = []
        parsed = parse_report(report)
        chain, crl_issued = self._chains.find(certificates, parsed.signer, now, findings)
        if parsed.version < 3 and chain.product is not None:
            parsed = parse_report(report, product=chain.product)
        self._check_report(report, parsed, report_data, findings)
        self._check_signer(parsed, chain, findings)
        if chain.key is not None:
            self._check_signature(report, parsed, chain.key, findings)
        if chain.endorsement is not None:
            self._check_agreement(parsed, chain, chain.endorsement, findings)
        if findings:
            raise EvidenceRefused(findings)
        assert chain.signing is not None
        assert chain.product is not None
        return VerifiedSnp(
            report=parsed,
            product=chain.product,
            signer=parsed.signer,
            csp_id=chain.endorsement.csp_id if chain.endorsement else None,
            simulated=self.roots.simulated,
            roots=self.roots.name,
            certificate_sha256=chain.signing.sha256,
            crl_issued=crl_issued,
            report_data_checked=report_data is not None,
        )

    def judge(self, evidence: Evidence, *, report_data: bytes | None, now: datetime) -> VerifiedSnp:
        """`verify`, as one of the `attest.verifier.Verifier`."""
        return self.verify(evidence.blob, evidence.certificates, report_data=report_data, now=now)

    # The report by itself

    def _check_report(
        self, blob: bytes, report: SnpReport, report_data: bytes | None, findings: list[Finding]
    ) -> None:
        faults = reserved_faults(blob, report)
        if faults:
            findings.append(Finding("snp.reserved", f"bits are set whose meaning is not known: {', '.join(faults)}"))
        if report_data is not None and not hmac.compare_digest(report.report_data, report_data):
            findings.append(Finding("snp.report_data", "the report was made for another challenge than this one"))
        if report.signature_algorithm != SIGNATURE_ECDSA_P384_SHA384:
            text = f"signature algorithm {report.signature_algorithm} is not ECDSA P-384 with SHA-384 (1)"
            findings.append(Finding("snp.signature.algorithm", text))

    def _check_signer(self, report: SnpReport, chain: Chain, findings: list[Finding]) -> None:
        if report.signer not in {Signer.VCEK, Signer.VLEK}:
            findings.append(Finding("snp.signer", "the report says that no chip or provider key signed it"))
            return
        if chain.signing is not None and SIGNING_NAMES[chain.signing.subject_cn] != report.signer:
            text = f"the report names a {report.signer.upper()}, the certificate is a {chain.signing.subject_cn}"
            findings.append(Finding("snp.signer.kind", text))
        csp = chain.endorsement.csp_id if chain.endorsement else None
        allowed = self.allow_vlek_csp
        if report.signer is Signer.VLEK and allowed is not None and csp not in allowed:
            text = f"the key of the provider {csp!r} signed, which is not allowed by configuration"
            findings.append(Finding("snp.signer.vlek", text))

    def _check_signature(
        self, blob: bytes, report: SnpReport, key: ec.EllipticCurvePublicKey, findings: list[Finding]
    ) -> None:
        r, s = report.signature_r, report.signature_s
        if not (0 < r < P384_ORDER and 0 < s < P384_ORDER):
            findings.append(Finding("snp.signature.range", "the signature's numbers are outside of their range"))
            return
        try:
            key.verify(encode_dss_signature(r, s), blob[:SIGNED_BYTES], ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            findings.append(Finding("snp.signature", "the report was not signed by the certificate's key, or altered"))

    def _check_agreement(
        self, report: SnpReport, chain: Chain, endorsement: Endorsement, findings: list[Finding]
    ) -> None:
        products = {"certificate": endorsement.product}
        if report.version >= 3 and report.product is not None:
            products["report"] = report.product
        elif not report.chip_id_masked and endorsement.product.has_fmc != (not any(report.chip_id[8:])):
            findings.append(Finding("snp.product", f"the chip identity has not the form of {endorsement.product}"))
        if chain.product is not None:
            products["root"] = chain.product
        if len(set(products.values())) != 1:
            named = ", ".join(f"the {where} {product}" for where, product in products.items())
            findings.append(Finding("snp.product", f"different products are named: {named}"))
            return
        if endorsement.tcb != report.reported_tcb:
            text = f"the certificate is for {endorsement.tcb}, the report says {report.reported_tcb}"
            findings.append(Finding("snp.tcb.certificate", text))
        if endorsement.hardware_id is None:
            return
        if report.chip_id_masked:
            if not self.allow_masked_chip_id:
                text = "the host hides the chip identity, so the report cannot be tied to the certificate's chip"
                findings.append(Finding("snp.chip_id.masked", text))
        elif report.chip_id != endorsement.hardware_id.ljust(64, b"\0"):
            findings.append(Finding("snp.chip_id", "the certificate belongs to another chip than the report"))
