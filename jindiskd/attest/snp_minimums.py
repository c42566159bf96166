"""Firmware below which SEV-SNP has holes that are known and mended: what AMD's bulletins demand, by generation.

AMD publishes, with each bulletin, the least component of the TCB that shows a mitigation in a report. The table has the
highest that was known on `AS_OF`; the numbers were taken from what others cite of the bulletins, for some from one or
two places alone, since the bulletins themselves were not at hand. It grows old: an owner who follows the bulletins
names his own minimums in the policy, which then count instead.

Microcode is left out on purpose: a report has the low byte of its revision, which each stepping counts by itself (a
mended Milan B1 reports 222 and a mended B2 71), so one number for a generation would refuse good machines or pass bad
ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jindiskd.attest.snp_report import Tcb

AS_OF = "2026-11-25"
"""When the table was last compared with what is cited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownMinimum:
    """The least firmware of one generation."""

    tcb: Tcb
    bulletin: str
    issued: str
    """Of the bulletin: year and month."""
    what: str
    """What somebody who rules the host can do below it."""


KNOWN_MINIMUMS: Mapping[str, KnownMinimum] = {
    "Milan": KnownMinimum(
        tcb=Tcb(bootloader=0, tee=0, snp=29, microcode=0),
        bulletin="AMD-SB-3030",
        issued="2026-05",
        what="reroute the secure processor's own writes (CVE-2025-61971); also covers AMD-SB-3019 and AMD-SB-3016",
    ),
    "Genoa": KnownMinimum(
        tcb=Tcb(bootloader=0, tee=0, snp=27, microcode=0),
        bulletin="AMD-SB-3016",
        issued="2026-04",
        what="change guests' memory through the IOMMU's buffer (CVE-2023-20585), or write the reverse map table while "
        "it is set up (AMD-SB-3020, CVE-2025-0033)",
    ),
    "Turin": KnownMinimum(
        tcb=Tcb(fmc=0, bootloader=0, tee=0, snp=4, microcode=0),
        bulletin="AMD-SB-3020",
        issued="2025-10",
        what="write the reverse map table while it is set up (CVE-2025-0033)",
    ),
}
"""By `Product` name; a generation that is not here has none that is known."""
