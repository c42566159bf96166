"""Is the evidence genuine, fresh and bound to the guest's key? The first half of a decision; policy is the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.snp import SnpVerifier, VerifiedSnp
from jindiskd.kbs import initdata, jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.evidence import snp_from_json
from jindiskd.kbs.messages import MalformedMessage, parse_attestation

HOST_DATA_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Attested:
    """Genuine evidence for one nonce and key."""

    verified: VerifiedSnp
    tee_pubkey: dict[str, str]
    init_data: Mapping[str, str] | None
    """Entries of the init-data that the report binds; None where none was sent."""


def judge(body: bytes, nonce: str, verifiers: Sequence[SnpVerifier], now: datetime) -> Attested:
    """Judge the body of an `/attest`; blocks for a millisecond or two.

    Args:
        body: as received.
        nonce: of the session.
        verifiers: one for each set of roots; the first that accepts the report decides.
        now: to judge dates by.

    Raises:
        EvidenceRefused: with every reason that could be found.
    """
    try:
        return _judge(body, nonce, verifiers, now)
    except (MalformedMessage, MalformedEvidence) as exc:
        raise EvidenceRefused([Finding("evidence.malformed", str(exc))]) from exc


def _judge(body: bytes, nonce: str, verifiers: Sequence[SnpVerifier], now: datetime) -> Attested:
    told = parse_attestation(body)
    if told.nonce != nonce:
        raise EvidenceRefused([Finding("session.nonce", "the nonce is not the one that was sent")])
    if told.additional_evidence not in {"", "{}"}:
        raise EvidenceRefused([Finding("evidence.additional", "evidence of devices is not judged by this broker")])
    jwk.public_key(told.tee_pubkey)
    report, certificates = snp_from_json(told.primary_evidence)
    digest, entries = initdata.read(told.init_data["body"]) if told.init_data else (None, None)
    bound = report_data(nonce, told.tee_pubkey, told.additional_evidence)
    reasons: list[Finding] = []
    for verifier in verifiers:
        try:
            verified = verifier.verify(report, certificates, report_data=bound, now=now)
        except EvidenceRefused as exc:
            reasons = reasons or list(exc.findings)
            continue
        if digest is not None and verified.report.host_data != initdata.placed(digest, HOST_DATA_BYTES):
            raise EvidenceRefused([Finding("init_data.other", "the report binds other init-data than was sent")])
        return Attested(verified=verified, tee_pubkey=told.tee_pubkey, init_data=entries)
    raise EvidenceRefused(reasons or [Finding("evidence.no_roots", "no roots are configured to judge evidence by")])
