"""Judging evidence from files, without a broker or a network: what `jindiskctl attest verify` shows.

Nothing is released on this: the challenge behind evidence in a file is not known, so a good verdict says that the
evidence is genuine and fits the policy, not that it is fresh.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.ccel import check_replay, parse_event_log
from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.offline_sev import SevExpectations, verify_sev_files
from jindiskd.attest.snp import AMD_ROOTS, SnpRoots, SnpVerifier
from jindiskd.attest.snp_certs import parse_certificate, parse_crl, read_files
from jindiskd.attest.snp_endorsement import parse_endorsement
from jindiskd.attest.snp_report import REPORT_BYTES, SnpReport, parse_report
from jindiskd.attest.snp_table import table_certificates
from jindiskd.attest.tdx import TdxExpectations, TdxVerifier, VerifiedTdx, appraise_tdx
from jindiskd.attest.tdx_quote import TdAttributes, TdxQuote, parse_quote
from jindiskd.attest.verdict import OfflineVerdict, Verdict, read_evidence_file, verdict_of
from jindiskd.base.platform import Tee
from jindiskd.errors import InvalidArgument
from jindiskd.kbs.evidence import snp_from_json
from jindiskd.kbs.messages import MalformedMessage, read_object

__all__ = ["OfflineVerdict", "Verdict", "snp_fields", "snp_report_of", "tdx_fields", "verify_files"]
IOCTL_RESPONSE_BYTES = 4000


def verify_files(
    tee: Tee,
    evidence: Path,
    certificates: Sequence[Path],
    collateral: Path | None,
    at: datetime,
    policy: SnpExpectations | TdxExpectations | SevExpectations | None,
    *,
    session_key: Path | None = None,
    simulated_root: Path | None = None,
    event_log: Path | None = None,
    allow_vlek_csp: frozenset[str] | None = frozenset(),
    allow_masked_chip_id: bool = False,
) -> OfflineVerdict:
    """Judge evidence from files. Reads files and computes: call it off the event loop.

    Args:
        tee: the kind of evidence.
        evidence: SNP: a report (1184 bytes), the response of the SNP_GET_REPORT ioctl (4000 bytes), or the protocol's
            JSON; TDX: a quote; SEV and SEV-ES: what libvirt says of the launch (`attest.offline_sev`).
        certificates: SNP: files or directories with certificates and revocation lists, DER or PEM, or a certificate
            table (`auxblob`). SEV: those of the platform.
        collateral: TDX: the JSON file of Intel's collateral.
        at: the time to judge by.
        policy: what it should say; None asks only whether it is genuine.
        simulated_root: certificate of a simulated root (SNP), or of a test root (TDX), trusted instead of the real.
        event_log: TDX: the guest's log (CCEL), which must lead to the quote's registers.
        allow_vlek_csp: SNP: providers whose key may have signed; None leaves that to the policy.
        allow_masked_chip_id: SNP: accept reports of hidden chips, or leave that to the policy.
        session_key: SEV: the integrity key (TIK) of the launch's session.

    Raises:
        NotFound: a file that is not there.
        MalformedEvidence: a file that is not in its format.
        InvalidArgument: arguments that do not belong together.
    """
    if tee in {Tee.SEV, Tee.SEV_ES}:
        if policy is not None and not isinstance(policy, SevExpectations):
            raise InvalidArgument("policy", type(policy).__name__, "it is one for SEV, as the evidence is")
        es = True if tee is Tee.SEV_ES else None
        return verify_sev_files(evidence, certificates, session_key, policy, encrypted_state=es)
    blob = read_evidence_file(evidence, "evidence")
    if tee is Tee.SNP:
        if policy is not None and not isinstance(policy, SnpExpectations):
            raise InvalidArgument("policy", type(policy).__name__, "it is one for SEV-SNP, as the evidence is")
        return _snp(blob, certificates, at, policy, simulated_root, allow_vlek_csp, allow_masked_chip_id)
    if policy is not None and not isinstance(policy, TdxExpectations):
        raise InvalidArgument("policy", type(policy).__name__, "it is one for TDX, as the evidence is")
    if collateral is None:
        raise InvalidArgument("collateral", None, "a TDX quote is judged with Intel's collateral: name its file")
    log = read_evidence_file(event_log, "event log") if event_log is not None else None
    return _tdx(blob, read_evidence_file(collateral, "collateral"), at, policy, simulated_root, log)


def _one_certificate(path: Path) -> bytes:
    found = read_files([path])
    if len(found) != 1:
        raise MalformedEvidence("root certificate", f"{path} has {len(found)} certificates instead of one")
    return found[0]


# SEV-SNP


def snp_report_of(blob: bytes) -> tuple[bytes, list[bytes]]:
    """The report in a file of evidence, and the certificates that are with it in the JSON form.

    Raises:
        MalformedEvidence: none of the forms that `verify_files` takes.
    """
    if len(blob) == REPORT_BYTES:
        return blob, []
    if len(blob) == IOCTL_RESPONSE_BYTES:
        status, size = (int.from_bytes(blob[at : at + 4], "little") for at in (0, 4))
        if status != 0 or size != REPORT_BYTES:
            raise MalformedEvidence("response of the SEV device", f"it has status {status} and {size} bytes")
        return blob[32 : 32 + REPORT_BYTES], []
    if blob.lstrip()[:1] == b"{":
        try:
            return snp_from_json(read_object(blob, "the SNP evidence"))
        except MalformedMessage as exc:
            raise MalformedEvidence("SEV-SNP evidence", exc.problem) from exc
    raise MalformedEvidence("SEV-SNP evidence", f"{len(blob)} bytes are no report, device response or JSON")


def _snp_files(paths: Sequence[Path]) -> tuple[list[bytes], list[bytes]]:
    """Certificates and revocation lists of files, directories and certificate tables."""
    certificates: list[bytes] = []
    lists: list[bytes] = []
    for path in paths:
        blob = b"" if path.is_dir() else read_evidence_file(path, "certificate")
        if blob and blob[:1] != b"\x30" and b"-----BEGIN" not in blob[:64]:
            sent, revoked = table_certificates(blob)
            certificates += sent
            lists += revoked
            continue
        for structure in read_files([path]):
            (lists if _is_crl(structure) else certificates).append(structure)
    return certificates, lists


def _is_crl(structure: bytes) -> bool:
    try:
        parse_crl(structure)
    except MalformedEvidence:
        return False
    return True


def _snp(
    blob: bytes,
    paths: Sequence[Path],
    at: datetime,
    policy: SnpExpectations | None,
    simulated_root: Path | None,
    allow_vlek_csp: frozenset[str] | None,
    allow_masked_chip_id: bool,
) -> OfflineVerdict:
    report, sent = snp_report_of(blob)
    certificates, lists = _snp_files(paths)
    roots = SnpRoots.simulated_from(_one_certificate(simulated_root)) if simulated_root else AMD_ROOTS
    authorities = [_one_certificate(simulated_root)] if simulated_root else []
    verifier = SnpVerifier(
        roots=roots,
        intermediates=authorities + [blob for blob in certificates if not _is_signing(blob)],
        crls=lists,
        allow_vlek_csp=allow_vlek_csp,
        allow_masked_chip_id=allow_masked_chip_id,
    )
    given = sent + [blob for blob in certificates if _is_signing(blob)]
    shown: dict[str, Any] = {}
    findings: list[Finding] = []
    try:
        verified = verifier.verify(report, given, report_data=None, now=at)
    except EvidenceRefused as exc:
        findings = list(exc.findings)
        shown = snp_fields(parse_report(report, product=_product_of(given)))
    else:
        shown = snp_fields(verified.report) | {
            "product": verified.product.value,
            "csp_id": verified.csp_id,
            "roots": verified.roots,
            "certificate_sha256": verified.certificate_sha256,
            "crl_issued": datetime.fromtimestamp(verified.crl_issued, UTC).isoformat() if verified.crl_issued else None,
        }
        if policy is not None:
            findings = appraise_snp(verified, policy, now=at)
    return verdict_of(shown, findings, simulated=roots.simulated, judged=policy is not None)


def _is_signing(blob: bytes) -> bool:
    try:
        return parse_certificate(blob).subject_cn in {"SEV-VCEK", "SEV-VLEK"}
    except MalformedEvidence:
        return True  # let the verifier report it among its findings


def _product_of(given: Sequence[bytes]) -> Any:
    for blob in given:
        try:
            return parse_endorsement(parse_certificate(blob)).product
        except MalformedEvidence:
            continue
    return None


def snp_fields(report: SnpReport) -> dict[str, Any]:
    """A report's fields ready for JSON, with names for the bits."""
    shown = {field.name: _plain(getattr(report, field.name)) for field in fields(report)}
    shown["policy"] = f"0x{report.policy:x}"
    shown["policy_flags"] = [flag.name for flag in report.policy_flags]
    shown["platform_flags"] = [flag.name for flag in report.platform_flags]
    shown["signer"] = report.signer.value
    return shown


# TDX


def tdx_fields(quote: TdxQuote) -> dict[str, Any]:
    """A quote's fields ready for JSON, with names for the bits."""
    shown = {field.name: _plain(getattr(quote, field.name)) for field in fields(quote) if field.name != "quote"}
    shown["td_attributes"] = f"0x{quote.td_attributes:x}"
    shown["td_attribute_flags"] = [flag.name for flag in TdAttributes if quote.td_attributes & flag]
    return shown


def _tdx(
    blob: bytes,
    collateral: bytes,
    at: datetime,
    policy: TdxExpectations | None,
    simulated_root: Path | None,
    log: bytes | None,
) -> OfflineVerdict:
    quote = parse_quote(blob)
    events = parse_event_log(log) if log is not None else None
    verifier = TdxVerifier(root_ca_der=_one_certificate(simulated_root) if simulated_root else None)
    shown = tdx_fields(quote)
    findings: list[Finding] = []
    verified: VerifiedTdx | None = None
    try:
        verified = verifier.verify(blob, collateral=collateral, report_data=None, now=at)
    except EvidenceRefused as exc:
        findings = list(exc.findings)
    else:
        shown |= {
            "tcb_status": verified.status,
            "advisory_ids": sorted(verified.advisory_ids),
            "tcb_date": verified.tcb_date.isoformat(),
            "tcb_evaluation": verified.tcb_evaluation,
            "fmspc": verified.fmspc.hex(),
            "ppid": verified.ppid.hex(),
            "smt_enabled": verified.smt_enabled,
        }
        if policy is not None:
            findings += appraise_tdx(verified, policy, now=at)
    if events is not None:
        findings += check_replay(events, quote.rtmrs)
        shown["events"] = len(events)
    return verdict_of(shown, findings, simulated=simulated_root is not None, judged=policy is not None)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value
