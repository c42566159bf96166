"""What every verifier says: findings, refusals, and evidence that cannot even be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jindiskd.base.platform import Tee
from jindiskd.errors import EXIT_REFUSED, JindiskError


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason against believing evidence, or against releasing a key on it."""

    id: str
    """Dotted and stable, from the general to the particular, such as `snp.tcb.too_old`."""
    text: str
    """One sentence for people: what was found, what was expected, and where possible what to do."""

    def __str__(self) -> str:
        return f"{self.text} [{self.id}]"


class EvidenceRefused(JindiskError, code="EvidenceRefused", exit_code=EXIT_REFUSED):
    """Evidence was read and is not believed. Carries every finding, so that all can be mended in one go."""

    def __init__(self, findings: Sequence[Finding], tee: Tee | None = None, blob: bytes = b"") -> None:
        """`findings` has at least one entry; the order is kept. `blob` is the evidence, where the refuser had it."""
        assert findings, "a refusal names its reasons"
        super().__init__("the evidence is refused: " + "; ".join(str(finding) for finding in findings))
        self.findings: tuple[Finding, ...] = tuple(findings)
        self.tee, self.blob = tee, blob


class MalformedEvidence(JindiskError, code="MalformedEvidence", exit_code=EXIT_REFUSED):
    """Evidence, a certificate or collateral is not in its format, so nothing in it can be judged."""

    def __init__(self, what: str, problem: str) -> None:
        """`what` names the thing read, for example "SEV-SNP report"; `problem` is the rest of the sentence."""
        super().__init__(f"the {what} cannot be read: {problem}")
        self.what, self.problem = what, problem
