"""The outcome of judging evidence from files."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jindiskd.attest.model import Finding, MalformedEvidence
from jindiskd.errors import NotFound

MAX_EVIDENCE_BYTES = 1 << 20


class Verdict(enum.StrEnum):
    """The one word of an offline judgement."""

    GENUINE = "genuine"
    """Goes back to its roots; no policy was given, or the roots are simulated ones (`OfflineVerdict.simulated`)."""
    ACCEPTED = "accepted"
    """Genuine, and says what the policy wants."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineVerdict:
    """A judgement and what it rests on."""

    verdict: Verdict
    simulated: bool
    """True where it was judged by roots that prove nothing."""
    fields: dict[str, Any]
    """What the evidence says, ready for JSON: bytes as hexadecimal. Not to be believed when refused."""
    findings: tuple[Finding, ...]


def verdict_of(
    shown: dict[str, Any], findings: Sequence[Finding], *, simulated: bool, judged: bool
) -> OfflineVerdict:
    """The verdict that follows from findings; `judged`: whether there was a policy."""
    verdict = Verdict.REFUSED if findings else Verdict.ACCEPTED if judged else Verdict.GENUINE
    return OfflineVerdict(
        verdict=verdict, simulated=simulated, fields={**shown, "simulated": simulated}, findings=tuple(findings)
    )


def read_evidence_file(path: Path, kind: str) -> bytes:
    """All of a file, at most 1 MiB.

    Raises:
        NotFound, MalformedEvidence: no such file; one that is longer.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_EVIDENCE_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise NotFound(f"{kind} file", str(path)) from exc
    if len(data) > MAX_EVIDENCE_BYTES:
        raise MalformedEvidence(kind, f"it is longer than {MAX_EVIDENCE_BYTES} bytes")
    return data
