"""Is the evidence genuine, fresh and bound to the guest's key? The first half of a decision; policy is the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jindiskd.attest.kept import Verified
from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.snp import VerifiedSnp
from jindiskd.attest.verifier import Evidence, Verifier, judge_any
from jindiskd.base.platform import Tee
from jindiskd.kbs import initdata, jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.evidence import snp_from_json, tdx_from_json
from jindiskd.kbs.messages import VERSION, VERSION_0_2, MalformedMessage, parse_attestation

HOST_DATA_BYTES, MR_CONFIG_ID_BYTES = 32, 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Attested:
    """Genuine evidence for one nonce and key."""

    verified: Verified
    tee_pubkey: dict[str, str]
    init_data: Mapping[str, str] | None
    """Entries of the init-data that the report binds; None where none was sent."""


def judge(
    body: bytes,
    nonce: str,
    verifiers: Sequence[Verifier],
    now: datetime,
    tee: Tee = Tee.SNP,
    version: str = VERSION,
) -> Attested:
    """Judge the body of an `/attest`; blocks for a millisecond or two.

    Args:
        body: as received.
        nonce: of the session.
        verifiers: one for each set of roots; the first that accepts the report decides.
        now: to judge dates by.
        tee: the kind of evidence that the guest said it would send.
        version: of the protocol, as the guest said.

    Raises:
        EvidenceRefused: with every reason that could be found.
    """
    try:
        return _judge(body, nonce, verifiers, now, tee, version)
    except (MalformedMessage, MalformedEvidence) as exc:
        raise EvidenceRefused([Finding("evidence.malformed", str(exc))]) from exc


def _judge(
    body: bytes, nonce: str, verifiers: Sequence[Verifier], now: datetime, tee: Tee, version: str
) -> Attested:
    told = parse_attestation(body, version)
    if version != VERSION_0_2 and told.nonce != nonce:  # there the report alone has it
        raise EvidenceRefused([Finding("session.nonce", "the nonce is not the one that was sent")])
    if told.additional_evidence not in {"", "{}"}:
        raise EvidenceRefused([Finding("evidence.additional", "evidence of devices is not judged by this broker")])
    jwk.public_key(told.tee_pubkey)
    evidence = read_evidence(tee, told.primary_evidence)
    digest, entries = initdata.read(told.init_data["body"]) if told.init_data else (None, None)
    bound = report_data(nonce, told.tee_pubkey, told.additional_evidence, version)
    verified = judge_any(verifiers, evidence, report_data=bound, now=now)
    if digest is not None and not _binds(verified, digest):
        text = "the report binds other init-data than was sent"
        raise EvidenceRefused([Finding("init_data.other", text)], tee, evidence.blob)
    return Attested(verified=verified, tee_pubkey=told.tee_pubkey, init_data=entries)


def read_evidence(tee: Tee, document: object) -> Evidence:
    """The primary evidence of the protocol in the form of its platform.

    Raises:
        MalformedMessage: it is not evidence of that kind.
    """
    if tee is Tee.TDX:
        quote, log = tdx_from_json(document)
        return Evidence(tee=tee, blob=quote, event_log=log)
    report, certificates = snp_from_json(document)
    return Evidence(tee=tee, blob=report, certificates=tuple(certificates))


def _binds(verified: Verified, digest: bytes) -> bool:
    """Whether the launch bound init-data of this digest: in HOST_DATA, or in MRCONFIGID."""
    if isinstance(verified, VerifiedSnp):
        return verified.report.host_data == initdata.placed(digest, HOST_DATA_BYTES)
    return verified.quote.mr_config_id == initdata.placed(digest, MR_CONFIG_ID_BYTES)
