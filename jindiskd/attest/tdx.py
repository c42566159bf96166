"""Is a TDX quote genuine, and does it say what its owner wants?

The chain of signatures, revocation and TCB matching is `dcap-qvl`'s, which works offline; around it stands our own
reading of the quote, so that what is judged is what was signed, and every reason is named. Its functions that use the
network are never called. Sources: attestation notes section 6; Intel PCS v4 (collateral).

Findings: `tdx.report_data`, `tdx.debug`, `tdx.attributes`, `tdx.migratable`, `tdx.sept_ve`, `tdx.seam`,
`tdx.service_td`, `tdx.collateral`, `tdx.quote` from `TdxVerifier`; `tdx.simulated`, `tdx.status`, `tdx.advisory`,
`tdx.tcb_evaluation`, `tdx.mr_td`, `tdx.rtmr<n>`, `tdx.mr_config_id`, `tdx.mr_owner`, `tdx.mr_owner_config`,
`tdx.mr_seam`, `tdx.platform.<what>`, `tdx.ppid` from `appraise_tdx`.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import json
import types
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from jindiskd.attest.memory import Memory
from jindiskd.attest.model import EvidenceRefused, Finding, MalformedEvidence
from jindiskd.attest.tdx_quote import KNOWN_BITS, UNTRUSTED_BITS, TdAttributes, TdxQuote, parse_quote
from jindiskd.errors import NotSupported

MAX_COLLATERAL_BYTES = 1 << 20
REMEMBERED = 16
ZERO_REGISTER = bytes(48)
COLLATERAL_MEMBERS = frozenset(
    {
        "pck_crl_issuer_chain",
        "root_ca_crl",
        "pck_crl",
        "tcb_info_issuer_chain",
        "tcb_info",
        "tcb_info_signature",
        "qe_identity_issuer_chain",
        "qe_identity",
        "qe_identity_signature",
    }
)
OUT_OF_DATE = frozenset({"OutOfDate", "OutOfDateConfigurationNeeded"})


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedTdx:
    """A genuine quote. Only `TdxVerifier.verify` makes these."""

    quote: TdxQuote
    status: str
    """TCB status in Intel's words, the worse of platform and quoting enclave: a property of the collateral."""
    advisory_ids: frozenset[str]
    tcb_date: datetime
    """Of the TCB level that the platform has."""
    tcb_evaluation: int
    """Lesser `tcbEvaluationDataNumber` of TCB info and enclave identity."""
    fmspc: bytes
    ppid: bytes
    dynamic_platform: bool | None
    """PCK configuration; None where the certificate says nothing (processor CA)."""
    cached_keys: bool | None
    smt_enabled: bool | None
    simulated: bool
    report_data_checked: bool

    @property
    def measurement(self) -> bytes:
        """What the policy knows firmware by: MRTD, 48 bytes. The kernel is in RTMR1, its initrd in RTMR2."""
        return self.quote.mr_td

    @property
    def guest(self) -> str:
        """What comes nearest to one launch of one guest: a quote has no such identity, so a digest of the platform, the
        registers and MRCONFIGID. A guest that is started anew on the same machine is the same guest."""
        quote = self.quote
        parts = (self.ppid, quote.mr_td, *quote.rtmrs[:3], quote.mr_config_id, quote.mr_owner, quote.mr_owner_config)
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def chip(self) -> str:
        """The platform: PPID, hexadecimal."""
        return self.ppid.hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxExpectations:
    """What a genuine quote must say. Accepts nothing until registers are named; strict unless loosened by name."""

    mr_td: frozenset[bytes] = frozenset()
    """Firmware images (48 bytes each) that are allowed."""
    rtmrs: tuple[frozenset[bytes] | None, ...] = (frozenset(), frozenset(), frozenset(), None)
    """Allowed values of RTMR0 to RTMR3; None accepts any. With direct boot the kernel, initrd and command line are in
    RTMR1 and RTMR2: without these, any kernel is accepted."""
    mr_config_id: frozenset[bytes] = frozenset({ZERO_REGISTER})
    mr_owner: frozenset[bytes] = frozenset({ZERO_REGISTER})
    mr_owner_config: frozenset[bytes] = frozenset({ZERO_REGISTER})
    any_measurement: bool = False
    """Accept any code and configuration at all. For looking at evidence, never for releasing a key."""
    mr_seam: frozenset[bytes] | None = None
    """TDX modules that are allowed; None accepts any that the collateral vouches for."""
    statuses: frozenset[str] = frozenset({"UpToDate"})
    advisories: frozenset[str] = frozenset()
    """Advisories that the owner accepts, where a status other than UpToDate is accepted."""
    grace: timedelta = timedelta(0)
    """How long after its TCB level's date an out-of-date platform is still accepted."""
    minimum_tcb_evaluation: int = 0
    allow_simulated: bool = False
    require_smt_off: bool = False
    require_static_platform: bool = False
    require_no_cached_keys: bool = False
    ppids: frozenset[bytes] | None = None


class TdxVerifier:
    """Decides whether quotes are genuine. Pure: no network, and time is an argument. May be called from any thread.

    Args:
        root_ca_der: a root of our own for tests and simulation, which marks all results as simulated; Intel's if not
            given.
    """

    def __init__(self, *, root_ca_der: bytes | None = None) -> None:
        """Raises `NotSupported` where the library for TDX is not installed."""
        self._root = root_ca_der
        self._library = _library()
        self._collateral: Memory[bytes, Any] = Memory(REMEMBERED)

    def verify(self, quote: bytes, *, collateral: bytes, report_data: bytes | None, now: datetime) -> VerifiedTdx:
        """Check one quote.

        Args:
            quote: as the guest got it; zeros after it are ignored.
            collateral: JSON object with the nine members of Intel's collateral; certificates in PEM, signed documents
                as the exact text, binary members in hexadecimal.
            report_data: the 64 bytes it must have been made for; None for evidence whose challenge is not known.
            now: the time to judge by, with a time zone.

        Raises:
            MalformedEvidence: quote or collateral are not in their formats.
            EvidenceRefused: not genuine, or of a kind that is never accepted; has every reason.
        """
        parsed = parse_quote(quote)
        findings = _check_quote(parsed, report_data)
        seconds = int(now.timestamp())
        claims: dict[str, Any] | None = None
        try:
            claims = json.loads(
                self._library.QuoteVerifier(self._root)
                .verify_with_policy(
                    parsed.quote,
                    self._read(collateral),
                    seconds,
                    self._library.QuotePolicy.claims_only(seconds),
                )
                .to_json()
            )
        except (ValueError, OverflowError) as exc:
            text = " ".join(str(exc).split())[:300]
            findings.append(Finding("tdx.quote", f"the quote does not verify with this collateral: {text}"))
        if findings or claims is None:
            raise EvidenceRefused(findings)
        pck = claims["platform"]["pck"]
        return VerifiedTdx(
            quote=parsed,
            status=str(claims["tcb"]["status"]),
            advisory_ids=frozenset(claims["tcb"]["advisory_ids"]),
            tcb_date=datetime.fromtimestamp(claims["platform"]["tcb_date_tag"], UTC),
            tcb_evaluation=min(claims["tcb"]["eval_data_number"], claims["qe"]["tcb_eval_data_number"]),
            fmspc=bytes(pck["fmspc"]),
            ppid=bytes(pck["ppid"]),
            dynamic_platform=_flag(pck["dynamic_platform"]),
            cached_keys=_flag(pck["cached_keys"]),
            smt_enabled=_flag(pck["smt_enabled"]),
            simulated=self._root is not None,
            report_data_checked=report_data is not None,
        )

    def _read(self, collateral: bytes) -> Any:
        """The library's form of collateral, remembered by content: one month's serves every guest of a platform.

        Raises:
            MalformedEvidence: see `parse_collateral`.
            ValueError: the library cannot read a member.
        """
        digest = hashlib.sha256(collateral).digest()
        found = self._collateral.get(digest)
        if found is None:
            found = self._library.QuoteCollateralV3.from_json(json.dumps(parse_collateral(collateral)))
            self._collateral[digest] = found
        return found


def _library() -> types.ModuleType:
    try:
        return importlib.import_module("dcap_qvl")
    except ImportError as exc:
        raise NotSupported("Intel TDX evidence", "install the Python package dcap-qvl (jindiskd[tdx])") from exc


def _flag(text: str) -> bool | None:
    return {"True": True, "False": False}.get(text)


def parse_collateral(data: bytes) -> dict[str, str]:
    """The nine members of a collateral file, all text.

    Raises:
        MalformedEvidence: not that, or longer than 1 MiB.
    """
    what = "TDX collateral"
    if len(data) > MAX_COLLATERAL_BYTES:
        raise MalformedEvidence(what, f"it is longer than {MAX_COLLATERAL_BYTES} bytes")
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise MalformedEvidence(what, "it is not JSON") from exc
    if not isinstance(parsed, dict):
        raise MalformedEvidence(what, "it is not a JSON object")
    missing = COLLATERAL_MEMBERS - parsed.keys()
    if missing:
        raise MalformedEvidence(what, f"the member {min(missing)} is missing")
    for name in COLLATERAL_MEMBERS:
        if not isinstance(parsed[name], str):
            raise MalformedEvidence(what, f"the member {name} is not text")
    return {name: parsed[name] for name in COLLATERAL_MEMBERS}


def _check_quote(quote: TdxQuote, report_data: bytes | None) -> list[Finding]:
    """What the quote says of itself that is never accepted."""
    findings = []
    if report_data is not None and not hmac.compare_digest(quote.report_data, report_data):
        findings.append(Finding("tdx.report_data", "the quote was made for another challenge than this one"))
    attributes = quote.td_attributes
    if attributes & TdAttributes.DEBUG:
        findings.append(Finding("tdx.debug", "the guest runs in debug mode, so the host can read its memory"))
    elif attributes & UNTRUSTED_BITS:
        findings.append(Finding("tdx.debug", f"the guest runs in an untrusted mode (0x{attributes & 0xFF:02x})"))
    if attributes & ~KNOWN_BITS:
        text = f"attribute bits are set whose meaning is not known (0x{attributes & ~KNOWN_BITS:x})"
        findings.append(Finding("tdx.attributes", text))
    if attributes & TdAttributes.MIGRATABLE:
        findings.append(Finding("tdx.migratable", "the guest can be migrated away"))
    if not attributes & TdAttributes.SEPT_VE_DISABLE:
        text = "the host can inject faults into the guest: launch it with SEPT_VE_DISABLE (policy 0x10000000)"
        findings.append(Finding("tdx.sept_ve", text))
    if any(quote.mr_signer_seam) or any(quote.seam_attributes):
        findings.append(Finding("tdx.seam", "the TDX module is not Intel's production module"))
    if quote.mr_service_td is not None and any(quote.mr_service_td):
        findings.append(Finding("tdx.service_td", "a service guest is bound to the guest and could act on it"))
    return findings


def appraise_tdx(verified: VerifiedTdx, wanted: TdxExpectations, *, now: datetime) -> list[Finding]:
    """Every way in which a genuine quote falls short of what is wanted; an empty list means acceptable."""
    findings: list[Finding] = []
    if verified.simulated and not wanted.allow_simulated:
        findings.append(Finding("tdx.simulated", "the quote comes from a simulated platform, which proves nothing"))
    _appraise_tcb(verified, wanted, now, findings)
    if not wanted.any_measurement:
        _appraise_registers(verified.quote, wanted, findings)
    if wanted.mr_seam is not None and verified.quote.mr_seam not in wanted.mr_seam:
        findings.append(Finding("tdx.mr_seam", f"the TDX module {verified.quote.mr_seam.hex()} is not allowed"))
    for required, state, name, text in (
        (wanted.require_smt_off, verified.smt_enabled, "smt", "simultaneous multithreading is on"),
        (wanted.require_static_platform, verified.dynamic_platform, "dynamic", "processors can be added to it"),
        (wanted.require_no_cached_keys, verified.cached_keys, "cached_keys", "its keys are cached by Intel"),
    ):
        if required and state is not False:
            finding = f"the platform's certificate does not say otherwise than that {text}"
            findings.append(Finding(f"tdx.platform.{name}", finding))
    if wanted.ppids is not None and verified.ppid not in wanted.ppids:
        findings.append(Finding("tdx.ppid", f"the machine {verified.ppid.hex()} is not on the list of machines"))
    return findings


def _appraise_tcb(verified: VerifiedTdx, wanted: TdxExpectations, now: datetime, findings: list[Finding]) -> None:
    accepted = verified.status in wanted.statuses
    if not accepted and verified.status in OUT_OF_DATE and wanted.grace:
        accepted = now <= verified.tcb_date + wanted.grace
    if not accepted:
        advisories = ", ".join(sorted(verified.advisory_ids)) or "none named"
        text = f"the platform's TCB is {verified.status} (advisories: {advisories}): update it"
        findings.append(Finding("tdx.status", text))
    elif verified.status != "UpToDate" and verified.advisory_ids - wanted.advisories:
        text = f"advisories apply that are not accepted: {', '.join(sorted(verified.advisory_ids - wanted.advisories))}"
        findings.append(Finding("tdx.advisory", text))
    if verified.tcb_evaluation < wanted.minimum_tcb_evaluation:
        text = f"the collateral's TCB evaluation {verified.tcb_evaluation} is below {wanted.minimum_tcb_evaluation}"
        findings.append(Finding("tdx.tcb_evaluation", text))


def _appraise_registers(quote: TdxQuote, wanted: TdxExpectations, findings: list[Finding]) -> None:
    for name, value, allowed in (
        ("mr_td", quote.mr_td, wanted.mr_td),
        *((f"rtmr{number}", value, wanted.rtmrs[number]) for number, value in enumerate(quote.rtmrs)),
        ("mr_config_id", quote.mr_config_id, wanted.mr_config_id),
        ("mr_owner", quote.mr_owner, wanted.mr_owner),
        ("mr_owner_config", quote.mr_owner_config, wanted.mr_owner_config),
    ):
        if allowed is not None and value not in allowed:
            text = f"{name.replace('_', '').upper()} {value.hex()} is not among the allowed values"
            findings.append(Finding(f"tdx.{name}", text))
