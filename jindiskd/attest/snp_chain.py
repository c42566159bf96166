"""The way from an SEV-SNP report's signing certificate to a pinned root, and whether it holds today.

What certificates alone decide (signatures, names, what they vouch for) is remembered by their content where it is good;
dates and revocation are judged each time. `attest.snp` judges the report itself, and lists the findings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from jindiskd.attest.memory import Memory
from jindiskd.attest.model import Finding, MalformedEvidence
from jindiskd.attest.snp_certs import Certificate, RevocationList, parse_certificate, parse_crl, signed_by, to_der
from jindiskd.attest.snp_endorsement import Endorsement, parse_endorsement
from jindiskd.attest.snp_report import Product, Signer
from jindiskd.attest.snp_roots import SnpRoots, authority_product

MAX_CERTIFICATES = 16
CACHED = 512
SIGNING_NAMES = {"SEV-VCEK": Signer.VCEK, "SEV-VLEK": Signer.VLEK}


@dataclass(frozen=True, slots=True)
class Chain:
    """The certificates found, as far as they go."""

    signing: Certificate | None = None
    endorsement: Endorsement | None = None
    key: ec.EllipticCurvePublicKey | None = None
    intermediate: Certificate | None = None
    root: Certificate | None = None
    product: Product | None = None
    """That of the root."""


class SnpChains:
    """Finds chains to the roots given.

    Args:
        roots: pinned root certificates.
        intermediates: ARK, ASK and ASVK certificates, DER or PEM; used as well as those in the evidence.
        crls: revocation lists, DER or PEM.
        require_crl: find fault where no list is at hand for the chain's root.

    What is remembered leads to a pinned root, so nobody can fill the memory with what he made himself.
    """

    def __init__(
        self, roots: SnpRoots, *, intermediates: Sequence[bytes], crls: Sequence[bytes], require_crl: bool
    ) -> None:
        """Read the given certificates and lists; raises `MalformedEvidence` if one cannot be read."""
        self.roots, self.require_crl = roots, require_crl
        self._pinned = frozenset(roots.ark_sha256.values())
        self._intermediates = [parse_certificate(blob) for given in intermediates for blob in to_der(given)]
        self._lists = [parse_crl(blob) for given in crls for blob in to_der(given, "revocation list")]
        self._chains: Memory[tuple[Signer, tuple[bytes, ...]], Chain] = Memory(CACHED)
        self._authorities: Memory[bytes, Certificate] = Memory(CACHED)
        self._signatures: Memory[tuple[str, str], bool] = Memory(CACHED)

    def find(
        self, given: Sequence[bytes], signer: Signer, now: datetime, findings: list[Finding]
    ) -> tuple[Chain, int | None]:
        """The chain for a report that names `signer`, and when the newest current revocation list was issued.

        Args:
            given: what came with the report, DER or PEM, in any order.
            signer: the kind of key that the report names.
            now: to judge dates by.
            findings: what is wrong is added to it.
        """
        items = given[: MAX_CERTIFICATES + 1]
        digests = tuple([hashlib.sha256(item).digest() for item in items])
        name = signer, digests
        chain = self._chains.get(name)
        if chain is None:
            faults: list[Finding] = []
            chain = self._build(items, digests, signer, faults)
            if faults:
                findings.extend(faults)
            else:
                self._chains[name] = chain
        issued = None
        self._check_dates(chain, now, findings)
        if chain.intermediate is not None and chain.root is not None and chain.product is not None:
            issued = self._check_revocation(chain.intermediate, chain.root, now, findings)
        return chain, issued

    # What depends on the certificates alone

    def _build(
        self, given: Sequence[bytes], digests: Sequence[bytes], signer: Signer, findings: list[Finding]
    ) -> Chain:
        pool = self._read(given, digests, findings)
        signing = self._choose(pool, signer)
        if signing is None:
            text = f"no {signer.upper()} certificate came with the report, and none was configured"
            findings.append(Finding("snp.certificate.missing", text))
            return Chain()
        endorsement = None
        try:
            endorsement = parse_endorsement(signing)
        except MalformedEvidence as exc:
            findings.append(Finding("snp.certificate.malformed", str(exc)))
        key = _key(signing)
        if key is None:
            findings.append(Finding("snp.certificate.key", "the signing certificate's key is not one of curve P-384"))
        intermediate, root = self._climb(signing, pool, findings)
        product = self.roots.product_of(root) if root is not None else None
        if intermediate is not None and root is not None and product is not None:
            self._check_names(signing, intermediate, root, product, findings)
            for authority in (intermediate, root):
                self._authorities[authority.der] = authority
        return Chain(signing, endorsement, key, intermediate, root, product)

    def _read(self, given: Sequence[bytes], digests: Sequence[bytes], findings: list[Finding]) -> list[Certificate]:
        """The certificates in what was given; `digests` are of that, so of a certificate that is given as it is."""
        pool: list[Certificate] = []
        try:
            blobs: list[tuple[bytes, bytes | None]] = []
            for item, digest in zip(given, digests, strict=True):
                blobs += [(blob, digest if blob is item else None) for blob in to_der(item)]
            if len(blobs) > MAX_CERTIFICATES:
                raise MalformedEvidence("certificate list", f"it has more than {MAX_CERTIFICATES} certificates")
            pool = [self._authorities.get(blob) or self._parsed(blob, digest) for blob, digest in blobs]
        except MalformedEvidence as exc:
            findings.append(Finding("snp.certificate.malformed", str(exc)))
        return pool + self._intermediates

    def _parsed(self, blob: bytes, digest: bytes | None) -> Certificate:
        # A root that is pinned is a constant of the program: it is read once, whoever sends it.
        if digest is not None and digest.hex() in self._pinned:
            return _pinned_root(blob)
        return parse_certificate(blob, digest)

    @staticmethod
    def _choose(pool: list[Certificate], signer: Signer) -> Certificate | None:
        """The signing certificate of the kind the report names, else one of the other kind, which is then refused."""
        signing = [certificate for certificate in pool if certificate.subject_cn in SIGNING_NAMES]
        return next(
            (certificate for certificate in signing if SIGNING_NAMES[certificate.subject_cn] == signer),
            signing[0] if signing else None,
        )

    def _signed(self, signed: Certificate | RevocationList, issuer: Certificate) -> bool:
        """`signed_by`, remembered where it holds under a pinned root: the answer depends on the bytes alone."""
        pair = (signed.sha256, issuer.sha256)
        if pair in self._signatures:
            return True
        good = signed_by(signed, issuer)
        if good and self.roots.product_of(issuer) is not None:
            self._signatures[pair] = True
        return good

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

    # What depends on the time and on what was taken back

    @staticmethod
    def _check_dates(chain: Chain, now: datetime, findings: list[Finding]) -> None:
        for certificate in (chain.signing, chain.intermediate, chain.root):
            if certificate is None or certificate.not_before <= now <= certificate.not_after:
                continue
            where = "certificate" if certificate is chain.signing else "chain"
            text = f"{certificate.subject_cn} is valid from {certificate.not_before} to {certificate.not_after} only"
            findings.append(Finding(f"snp.{where}.dates", text))

    def _check_revocation(
        self, intermediate: Certificate, root: Certificate, now: datetime, findings: list[Finding]
    ) -> int | None:
        """Judge by the revocation lists of the root; returns when the newest current one was issued."""
        lists = [revoked for revoked in self._lists if revoked.issuer == root.subject]
        if not lists:
            if self.require_crl:
                text = f"no revocation list of {root.subject_cn} is at hand: configure one"
                findings.append(Finding("snp.crl.missing", text))
            return None
        genuine = [candidate for candidate in lists if self._signed(candidate, root)]
        if not genuine:
            text = f"the revocation list of {root.subject_cn} is not signed by it"
            findings.append(Finding("snp.crl.signature", text))
        elif not any(_is_current(candidate, now) for candidate in genuine):
            text = f"every revocation list of {root.subject_cn} is out of date: fetch a new one"
            findings.append(Finding("snp.crl.dates", text))
        if any(intermediate.serial in one.revoked or root.serial in one.revoked for one in genuine):
            findings.append(Finding("snp.revoked", f"{intermediate.subject_cn} is revoked"))
        return max((int(one.this_update.timestamp()) for one in genuine if _is_current(one, now)), default=None)


@lru_cache(maxsize=8)
def _pinned_root(blob: bytes) -> Certificate:
    return parse_certificate(blob)


def _key(signing: Certificate) -> ec.EllipticCurvePublicKey | None:
    """The certificate's key if it is of curve P-384."""
    try:
        key = load_der_public_key(signing.spki)
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return None
    return key


def _is_current(revoked: RevocationList, now: datetime) -> bool:
    return revoked.next_update is not None and revoked.this_update <= now <= revoked.next_update
