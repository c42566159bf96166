"""The one interface of everything that judges evidence: evidence in; a verified object, or all the findings, out.

A verifier is pure but for what it was given when it was made: no network, and time is an argument. `SnpVerifier` is
one as it stands; `TdxJudge` adds to `TdxVerifier` where the collateral comes from. Others come in as plug-ins, by the
entry points of the group `jindiskd.verifiers` (`attest.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from jindiskd.attest.ccel import check_replay, parse_event_log
from jindiskd.attest.kept import Verified
from jindiskd.attest.model import EvidenceRefused, Finding
from jindiskd.attest.tdx import TdxVerifier, VerifiedTdx
from jindiskd.attest.tdx_quote import TdxQuote, parse_quote
from jindiskd.base.platform import Tee


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a guest sent, in the form of its platform. Nothing of it is believed."""

    tee: Tee
    blob: bytes
    """SNP: the report. TDX: the quote."""
    certificates: tuple[bytes, ...] = ()
    """SNP: what came with the report, DER or PEM."""
    event_log: bytes = b""
    """TDX: the guest's event log (CCEL), empty where none was sent."""


class Verifier(Protocol):
    """Judges one kind of evidence under fixed roots. Called from any thread, from several at once."""

    @property
    def tee(self) -> Tee:
        """The kind of evidence."""

    def judge(self, evidence: Evidence, *, report_data: bytes | None, now: datetime) -> Verified:
        """Check evidence of this kind.

        Args:
            evidence: as sent.
            report_data: the 64 bytes it must have been made for; None where the challenge is not known.
            now: the time to judge dates by, with a time zone.

        Raises:
            MalformedEvidence: it is not in its format.
            EvidenceRefused: it is not genuine; has every reason.
        """


def judge_any(
    verifiers: Sequence[Verifier], evidence: Evidence, *, report_data: bytes | None, now: datetime
) -> Verified:
    """The judgement of the first verifier of its kind that accepts the evidence, else the refusal of the first.

    Raises:
        MalformedEvidence: it is not in its format.
        EvidenceRefused: with the evidence, and every reason under the first set of roots.
    """
    reasons: tuple[Finding, ...] = ()
    for verifier in verifiers:
        if verifier.tee is not evidence.tee:
            continue
        try:
            return verifier.judge(evidence, report_data=report_data, now=now)
        except EvidenceRefused as exc:
            reasons = reasons or exc.findings
    text = f"no roots are configured to judge evidence of {evidence.tee} by"
    raise EvidenceRefused(reasons or [Finding("evidence.no_roots", text)], evidence.tee, evidence.blob)


class TdxJudge:
    """A `Verifier` of TDX quotes that asks for the collateral of each quote's platform.

    Args:
        verifier: with the roots.
        collateral: the collateral document for a quote, or None where there is none at hand. Called in the thread that
            judges, with a quote that is parsed and not believed.
    """

    tee = Tee.TDX

    def __init__(self, verifier: TdxVerifier, collateral: Callable[[TdxQuote], bytes | None]) -> None:
        self._verifier, self._collateral = verifier, collateral

    def judge(self, evidence: Evidence, *, report_data: bytes | None, now: datetime) -> VerifiedTdx:
        """See `Verifier`. An event log that was sent must lead to the quote's registers."""
        quote = parse_quote(evidence.blob)
        events = parse_event_log(evidence.event_log) if evidence.event_log else None
        collateral = self._collateral(quote)
        if collateral is None:
            text = "there is no collateral for the quote's platform: fetch or import it"
            raise EvidenceRefused([Finding("tdx.collateral.missing", text)], Tee.TDX, evidence.blob)
        verified = self._verifier.verify(evidence.blob, collateral=collateral, report_data=report_data, now=now)
        findings = check_replay(events, verified.quote.rtmrs) if events is not None else []
        if findings:
            raise EvidenceRefused(findings, Tee.TDX, evidence.blob)
        return verified
