"""Why guests were refused, for people who may know, and what another policy would have said. Calls block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from jindiskd.attest.kept import restore, shown
from jindiskd.attest.model import Finding, MalformedEvidence
from jindiskd.errors import NotFound
from jindiskd.keys.refusals import StoredRefusal
from jindiskd.keys.store import ImageRecord
from jindiskd.policy.advice import remedy
from jindiskd.policy.release import decide
from jindiskd.policy.rules import ReleaseRules


def decided_again(
    refusal: StoredRefusal, record: ImageRecord, rules: ReleaseRules, *, allow_simulated: bool, now: datetime
) -> list[Finding]:
    """What would be found against the guest of a refusal by other rules.

    Raises:
        NotFound: its evidence is no longer kept, or none came.
    """
    if refusal.evidence is None:
        raise NotFound("evidence", f"of audit row {refusal.number}: it is no longer kept, or none came")
    try:
        verified = restore(refusal.evidence)
    except MalformedEvidence:
        # It was not genuine, which no policy changes.
        return [Finding(*finding) for finding in refusal.findings]
    return decide(replace(record, rules=rules), verified, allow_simulated=allow_simulated, now=now)


def told(finding: Finding) -> dict[str, str]:
    """A finding with what to do about it."""
    return {"id": finding.id, "text": finding.text, "remedy": remedy(finding.id)}


def explained(refusal: StoredRefusal) -> Mapping[str, Any]:
    """A refusal with its findings and what the evidence said; `evidence.raw` is the evidence itself, hexadecimal."""
    evidence: dict[str, Any] = {}
    if refusal.evidence is not None:
        evidence = {"tee": refusal.evidence.tee.value, "raw": refusal.evidence.blob.hex()}
        try:
            evidence |= shown(refusal.evidence)
        except (MalformedEvidence, ValueError) as exc:
            evidence["unreadable"] = str(exc)
    return {
        "row": refusal.number,
        "time": refusal.time,
        "image_id": refusal.image_id,
        "peer": refusal.peer,
        "simulated": refusal.simulated,
        "findings": [told(Finding(*finding)) for finding in refusal.findings],
        "evidence": evidence,
    }
