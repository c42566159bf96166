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

import contextlib
import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.snp_certs import Certificate, RevocationList, parse_certificate, parse_crl, signed_by, to_der
from jindiskd.attest.snp_endorsement import Endorsement, parse_endorsement
from jindiskd.attest.snp_report import (
    SIGNATURE_ECDSA_P384_SHA384,
    SIGNED_BYTES,
    Product,
    Signer,
    SnpReport,
    parse_report,
    reserved_faults,
)
from jindiskd.attest.snp_roots import AMD_ROOTS, SnpRoots, authority_product
from jindiskd.base.platform import Tee

if TYPE_CHECKING:  # it imports this module
    from jindiskd.attest.verifier import Evidence

__all__ = ["AMD_ROOTS", "SnpRoots", "SnpVerifier", "VerifiedSnp"]

P384_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
MAX_CERTIFICATES = 16
CACHED = 512
SIGNING_NAMES = {"SEV-VCEK": Signer.VCEK, "SEV-VLEK": Signer.VLEK}


K = TypeVar("K")
V = TypeVar("V")


class _Memory(OrderedDict[K, V]):
    """A dictionary that forgets its oldest entries; a thread that finds one forgotten works it out again."""

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > CACHED:
            with contextlib.suppress(KeyError):
                self.popitem(last=False)


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


@dataclass(frozen=True, slots=True)
class _Chain:
    """The certificates found, as far as they go."""

    signing: Certificate | None
    endorsement: Endorsement | None
    key: ec.EllipticCurvePublicKey | None
    intermediate: Certificate | None
    root: Certificate | None
    product: Product | None
    crl_issued: int | None = None


class SnpVerifier:
    """Decides whether reports are genuine, under fixed roots.

    Certificates that come with evidence and those given here are equally untrusted: only a chain to a root whose
    digest is in `roots` counts. Safe to call from several threads; keeps a bounded memory of certificates read and of
    signatures between certificates that were checked, by content, so a fleet's evidence costs one signature each.

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
        self.require_crl = require_crl
        self.allow_vlek_csp = allow_vlek_csp
        self.allow_masked_chip_id = allow_masked_chip_id
        self._parsed: _Memory[bytes, Certificate] = _Memory()
        self._signatures: _Memory[tuple[str, str], bool] = _Memory()
        self._endorsements: _Memory[str, Endorsement] = _Memory()
        self._keys: _Memory[bytes, ec.EllipticCurvePublicKey] = _Memory()
        self._intermediates = [parse_certificate(blob) for given in intermediates for blob in to_der(given)]
        self._crls = [parse_crl(blob) for given in crls for blob in to_der(given, "revocation list")]

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
        chain = self._chain(certificates, parse_report(report).signer, now, findings)
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
            crl_issued=chain.crl_issued,
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

    def _check_signer(self, report: SnpReport, chain: _Chain, findings: list[Finding]) -> None:
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
        self, report: SnpReport, chain: _Chain, endorsement: Endorsement, findings: list[Finding]
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

    # The chain

    def _chain(
        self, given: Sequence[bytes], signer: Signer, now: datetime, findings: list[Finding]
    ) -> _Chain:
        pool = self._read(given, findings)
        signing = self._choose(pool, signer)
        if signing is None:
            text = f"no {signer.upper()} certificate came with the report, and none was configured"
            findings.append(Finding("snp.certificate.missing", text))
            return _Chain(None, None, None, None, None, None)
        endorsement = None
        try:
            endorsement = self._endorsement(signing)
        except MalformedEvidence as exc:
            findings.append(Finding("snp.certificate.malformed", str(exc)))
        key = self._key(signing)
        if key is None:
            findings.append(Finding("snp.certificate.key", "the signing certificate's key is not one of curve P-384"))
        intermediate, root = self._climb(signing, pool, findings)
        product = self.roots.product_of(root) if root is not None else None
        self._check_dates(signing, intermediate, root, now, findings)
        issued = None
        if intermediate is not None and root is not None and product is not None:
            self._check_names(signing, intermediate, root, product, findings)
            issued = self._check_revocation(intermediate, root, now, findings)
        return _Chain(signing, endorsement, key, intermediate, root, product, issued)

    def _read(self, given: Sequence[bytes], findings: list[Finding]) -> list[Certificate]:
        pool: list[Certificate] = []
        try:
            blobs = [blob for item in given[: MAX_CERTIFICATES + 1] for blob in to_der(item)]
            if len(blobs) > MAX_CERTIFICATES:
                raise MalformedEvidence("certificate list", f"it has more than {MAX_CERTIFICATES} certificates")
            pool = [self._parse(blob) for blob in blobs]
        except MalformedEvidence as exc:
            findings.append(Finding("snp.certificate.malformed", str(exc)))
        return pool + self._intermediates

    def _parse(self, blob: bytes) -> Certificate:
        digest = hashlib.sha256(blob).digest()
        known = self._parsed.get(digest)
        if known is None:
            known = self._parsed[digest] = parse_certificate(blob)
        return known

    def _endorsement(self, signing: Certificate) -> Endorsement:
        """`parse_endorsement`, remembered: the answer depends on the certificate's bytes alone."""
        known = self._endorsements.get(signing.sha256)
        if known is None:
            known = self._endorsements[signing.sha256] = parse_endorsement(signing)
        return known

    def _key(self, signing: Certificate) -> ec.EllipticCurvePublicKey | None:
        known = self._keys.get(signing.spki)
        if known is not None:
            return known
        try:
            key = load_der_public_key(signing.spki)
        except (ValueError, UnsupportedAlgorithm):
            return None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            return None
        self._keys[signing.spki] = key
        return key

    @staticmethod
    def _choose(pool: list[Certificate], signer: Signer) -> Certificate | None:
        """The signing certificate of the kind the report names, else one of the other kind, which is then refused."""
        signing = [certificate for certificate in pool if certificate.subject_cn in SIGNING_NAMES]
        return next(
            (certificate for certificate in signing if SIGNING_NAMES[certificate.subject_cn] == signer),
            signing[0] if signing else None,
        )

    def _signed(self, signed: Certificate, issuer: Certificate) -> bool:
        """`signed_by`, remembered: the answer depends on the two certificates' bytes alone."""
        pair = (signed.sha256, issuer.sha256)
        answer = self._signatures.get(pair)
        if answer is None:
            answer = self._signatures[pair] = signed_by(signed, issuer)
        return answer

    def _list_signed(self, revoked: RevocationList, root: Certificate) -> bool:
        """As `_signed`, for a revocation list: it stays the same for months."""
        pair = (hashlib.sha256(revoked.tbs + revoked.signature).hexdigest(), root.sha256)
        answer = self._signatures.get(pair)
        if answer is None:
            answer = self._signatures[pair] = signed_by(revoked, root)
        return answer

    def _climb(
        self, signing: Certificate, pool: list[Certificate], findings: list[Finding]
    ) -> tuple[Certificate | None, Certificate | None]:
        named = [certificate for certificate in pool if certificate.subject == signing.issuer]
        if not named:
            text = f"the certificate of {signing.issuer_cn!r} is missing: configure it, or send it with the evidence"
            findings.append(Finding("snp.chain.incomplete", text))
            return None, None
        issuers = [certificate for certificate in named if self._signed(signing, certificate)]
        if not issuers:
            text = f"the signing certificate was not signed by {signing.issuer_cn!r}"
            findings.append(Finding("snp.chain.signature", text))
            return None, None
        parents = [candidate for candidate in pool if any(candidate.subject == one.issuer for one in issuers)]
        pinned = [candidate for candidate in parents if self.roots.product_of(candidate) is not None]
        for root in pinned:
            for issuer in issuers:
                if self._signed(issuer, root) and self._signed(root, root):
                    return issuer, root
        if pinned:
            findings.append(Finding("snp.chain.signature", f"{signing.issuer_cn!r} was not signed by the pinned root"))
        elif parents:
            text = f"the root {parents[0].subject_cn!r} ({parents[0].sha256[:16]}…) is none of {self.roots.name}'s"
            findings.append(Finding("snp.chain.root", text))
        else:
            text = f"the root certificate {issuers[0].issuer_cn!r} is missing: configure it, or send it along"
            findings.append(Finding("snp.chain.incomplete", text))
        return issuers[0], None

    def _check_dates(
        self,
        signing: Certificate,
        intermediate: Certificate | None,
        root: Certificate | None,
        now: datetime,
        findings: list[Finding],
    ) -> None:
        for certificate in (signing, intermediate, root):
            if certificate is None or certificate.not_before <= now <= certificate.not_after:
                continue
            where = "certificate" if certificate is signing else "chain"
            text = f"{certificate.subject_cn} is valid from {certificate.not_before} to {certificate.not_after} only"
            findings.append(Finding(f"snp.{where}.dates", text))

    def _check_names(
        self,
        signing: Certificate,
        intermediate: Certificate,
        root: Certificate,
        product: Product,
        findings: list[Finding],
    ) -> None:
        prefix = "SEV-VLEK-" if signing.subject_cn == "SEV-VLEK" else "SEV-"
        simulated = self.roots.simulated
        try:
            authority = intermediate.is_authority
        except MalformedEvidence:
            authority = False
        if not authority or authority_product(root.subject_cn, "ARK-", simulated=simulated) != product:
            findings.append(Finding("snp.chain.names", f"{intermediate.subject_cn!r} may not vouch for {product}"))
        elif authority_product(intermediate.subject_cn, prefix, simulated=simulated) != product:
            text = f"{intermediate.subject_cn!r} is not the authority for a {signing.subject_cn} of {product}"
            findings.append(Finding("snp.chain.names", text))

    def _check_revocation(
        self, intermediate: Certificate, root: Certificate, now: datetime, findings: list[Finding]
    ) -> int | None:
        """Judge by the revocation lists of the root; returns when the newest current one was issued."""
        lists = [revoked for revoked in self._crls if revoked.issuer == root.subject]
        if not lists:
            if self.require_crl:
                text = f"no revocation list of {root.subject_cn} is at hand: configure one"
                findings.append(Finding("snp.crl.missing", text))
            return None
        genuine = [candidate for candidate in lists if self._list_signed(candidate, root)]
        if not genuine:
            text = f"the revocation list of {root.subject_cn} is not signed by it"
            findings.append(Finding("snp.crl.signature", text))
        elif not any(_is_current(candidate, now) for candidate in genuine):
            text = f"every revocation list of {root.subject_cn} is out of date: fetch a new one"
            findings.append(Finding("snp.crl.dates", text))
        serials = frozenset().union(*(candidate.revoked for candidate in genuine))
        if intermediate.serial in serials or root.serial in serials:
            findings.append(Finding("snp.revoked", f"{intermediate.subject_cn} is revoked"))
        return max((int(one.this_update.timestamp()) for one in genuine if _is_current(one, now)), default=None)


def _is_current(revoked: RevocationList, now: datetime) -> bool:
    return revoked.next_update is not None and revoked.this_update <= now <= revoked.next_update
