"""Firmware below which SEV-SNP has holes that are known and mended: what AMD's bulletins demand, by generation.

AMD publishes, with each bulletin, the least component of the TCB that shows a mitigation in a report. The table has the
highest that was known on `AS_OF`. The bulletins themselves were not at hand: each number was taken from what others
cite of them, and compared with what somebody else cites, both named in `quoted`. It grows old: an owner who follows
the bulletins names his own minimums in the policy, which then count instead.

What was found and is not in the table: AMD-SB-3034 (CVE-2025-54510) demanded SNP 28 of Genoa for a while, and was
amended in September 2026 to name no value; AMD-SB-3030 is said to have a floor of the boot loader for Genoa and of the
TEE for Turin, of which no number was found. Some of these show in the mitigation vectors of reports of version 5.

Microcode is left out on purpose: a report has the low byte of its revision, which each stepping counts by itself (a
mended Milan B1 reports 222 and a mended B2 71), so one number for a generation would refuse good machines or pass bad
ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jindiskd.attest.snp_report import Tcb

AS_OF = "2026-11-26"
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
    quoted: tuple[str, ...]
    """Who cites the number, each independently of the others; all of them agreed on `AS_OF`."""


KNOWN_MINIMUMS: Mapping[str, KnownMinimum] = {
    "Milan": KnownMinimum(
        tcb=Tcb(bootloader=0, tee=0, snp=29, microcode=0),
        bulletin="AMD-SB-3030",
        issued="2026-05",
        what="reroute the secure processor's own writes (CVE-2025-61971); also covers AMD-SB-3019 and AMD-SB-3016",
        quoted=(
            "the verifier of the Sentinel subnet: TCB[SNP] >= 0x1D for EPYC 7003, by AMD-SB-3030",
            "the fleet policy of Stogas: SNP 29 with microcode 222, on Milan B1",
        ),
    ),
    "Genoa": KnownMinimum(
        tcb=Tcb(bootloader=0, tee=0, snp=27, microcode=0),
        bulletin="AMD-SB-3016",
        issued="2026-04",
        what="change guests' memory through the IOMMU's buffer (CVE-2023-20585), or write the reverse map table while "
        "it is set up (AMD-SB-3020, CVE-2025-0033)",
        quoted=(
            "a review of the verifier pi-tee: SPL 0x1B by AMD-SB-3020, after 0x17 by AMD-SB-3019",
            "a checker of platform collateral for agents: TCB[SNP] >= 0x1B for Milan and Genoa, by AMD-SB-3016",
        ),
    ),
    "Turin": KnownMinimum(
        tcb=Tcb(fmc=0, bootloader=0, tee=0, snp=4, microcode=0),
        bulletin="AMD-SB-3020",
        issued="2025-10",
        what="write the reverse map table while it is set up (CVE-2025-0033)",
        quoted=(
            "a review of the verifier pi-tee: SPL 0x04 with microcode 0x0B002150, by AMD-SB-3020",
            "Tinfoil's platform policy for Turin: SNP 4",
        ),
    ),
}
"""By `Product` name; a generation that is not here has none that is known."""
