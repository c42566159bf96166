"""Does a genuine SEV-SNP report say what its owner wants? Every expectation is strict unless loosened by name.

Findings, all refusals: `snp.simulated`, `snp.debug`, `snp.migration_agent`, `snp.vmpl`, `snp.measurement`,
`snp.guest_svn`, `snp.policy_abi`, `snp.tcb.too_old`, `snp.tcb.no_minimum`, `snp.firmware.too_old`,
`snp.firmware.provisional`, `snp.host_data`, `snp.chip_id.unknown`, `.masked`, `snp.platform.<what>`, `snp.mitigations`,
`snp.generation`, `snp.signer.vlek`, `snp.crl.missing`, `snp.crl.old`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from jindiskd.attest.model import Finding
from jindiskd.attest.snp import VerifiedSnp
from jindiskd.attest.snp_minimums import KNOWN_MINIMUMS
from jindiskd.attest.snp_report import (
    HOST_REQUESTED_VMPL,
    FirmwareVersion,
    GuestPolicy,
    PlatformInfo,
    SnpReport,
    Tcb,
)

NO_MIGRATION_AGENT = b"\xff" * 32
DEBUG, MIGRATE_MA = int(GuestPolicy.DEBUG), int(GuestPolicy.MIGRATE_MA)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpExpectations:
    """What a report must say. The defaults accept nothing until measurements or keys, and host data, are named."""

    measurements: frozenset[bytes] = frozenset()
    """Launch digests (48 bytes) that are allowed."""
    id_key_digests: frozenset[bytes] = frozenset()
    """Digests (48 bytes) of ID keys whose signed images are allowed; use with `minimum_guest_svn`."""
    author_key_digests: frozenset[bytes] = frozenset()
    """Digests (48 bytes) of author keys whose ID keys are allowed; counts only where AUTHOR_KEY_EN is set."""
    any_measurement: bool = False
    """Accept any code at all. For looking at evidence, never for releasing a key."""
    host_data: frozenset[bytes] = frozenset()
    """HOST_DATA values (32 bytes) that are allowed; zeros must be named like any other."""
    any_host_data: bool = False
    minimum_guest_svn: int = 0
    minimum_policy_abi: tuple[int, int] = (0, 0)
    minimum_tcb: Mapping[str, Tcb] = field(default_factory=dict)
    """By product name. Once one product is named, evidence of a product that is not named is refused."""
    known_minimum_tcb: bool = False
    """For products that `minimum_tcb` does not name, `snp_minimums.KNOWN_MINIMUMS` counts; genuine evidence only."""
    minimum_firmware: FirmwareVersion = field(default_factory=lambda: FirmwareVersion(0, 0, 0))
    vmpl: int = 0
    chip_ids: frozenset[bytes] | None = None
    """CHIP_ID values (64 bytes) of the owner's machines; None where no list is kept."""
    generations: frozenset[str] | None = None
    """Product names that are allowed; None for all that the roots vouch for."""
    providers: frozenset[str] | None = None
    """CSP identities whose VLEK may have signed; None where the verifier has decided that already."""
    allow_masked_chip_id: bool = True
    """False to refuse what a verifier let pass that was told to leave this to the owner."""
    require_crl: bool = False
    """A current revocation list was looked at; genuine (not simulated) evidence only."""
    maximum_crl_age: timedelta | None = None
    allow_simulated: bool = False
    allow_debug: bool = False
    allow_migration_agent: bool = False
    allow_provisional_firmware: bool = False
    """Accept firmware newer than the committed one, which the host can still roll back."""
    require_smt_off: bool = False
    require_ciphertext_hiding: bool = False
    require_aes_256_xts: bool = False
    require_rapl_off: bool = False
    require_single_socket: bool = False
    require_page_swap_disabled: bool = False
    require_no_cxl: bool = False
    require_alias_check: bool = False
    required_mitigations: int = 0
    """Bits that must be set in both mitigation vectors; a report before version 5 has none."""


def appraise_snp(
    verified: VerifiedSnp, expectations: SnpExpectations, *, now: datetime | None = None
) -> list[Finding]:
    """Every way in which a genuine report falls short; an empty list means that it is acceptable.

    `now` is needed for the age of revocation lists alone.
    """
    findings: list[Finding] = []
    report = verified.report
    if verified.simulated and not expectations.allow_simulated:
        findings.append(Finding("snp.simulated", "the report comes from simulated firmware, which proves nothing"))
    _appraise_signer(verified, expectations, now, findings)
    _appraise_code(report, expectations, findings)
    _appraise_guest(report, expectations, findings)
    _appraise_versions(verified, expectations, findings)
    _appraise_platform(report, expectations, findings)
    return findings


def _appraise_signer(
    verified: VerifiedSnp, wanted: SnpExpectations, now: datetime | None, findings: list[Finding]
) -> None:
    """Who vouches for the report, and whether that was still so."""
    if wanted.generations is not None and verified.product.value not in wanted.generations:
        text = f"the platform is {verified.product}; allowed are {', '.join(sorted(wanted.generations)) or 'none'}"
        findings.append(Finding("snp.generation", text))
    if verified.csp_id is not None and wanted.providers is not None and verified.csp_id not in wanted.providers:
        text = f"the key of the provider {verified.csp_id!r} signed, which the policy does not allow"
        findings.append(Finding("snp.signer.vlek", text))
    if verified.csp_id is None and verified.report.chip_id_masked and not wanted.allow_masked_chip_id:
        text = "the host hides the chip identity, so the report cannot be tied to the certificate's chip"
        findings.append(Finding("snp.chip_id.masked", text))
    if verified.simulated:
        return
    if verified.crl_issued is None:
        if wanted.require_crl or wanted.maximum_crl_age is not None:
            text = "no revocation list of the platform's root was at hand: fetch or import AMD's"
            findings.append(Finding("snp.crl.missing", text))
    elif wanted.maximum_crl_age is not None:
        issued = datetime.fromtimestamp(verified.crl_issued, UTC)
        if now is None or issued + wanted.maximum_crl_age < now:
            text = f"the revocation list is of {issued:%Y-%m-%d}, older than {wanted.maximum_crl_age.days} days"
            findings.append(Finding("snp.crl.old", text + ": fetch a new one"))


def _appraise_code(report: SnpReport, wanted: SnpExpectations, findings: list[Finding]) -> None:
    known = (
        wanted.any_measurement
        or report.measurement in wanted.measurements
        or (report.id_key_digest in wanted.id_key_digests and any(report.id_key_digest))
        or (report.author_key_enabled and report.author_key_digest in wanted.author_key_digests)
    )
    if not known:
        text = f"the launch digest {report.measurement.hex()} is not allowed, nor is the key that signed the image"
        findings.append(Finding("snp.measurement", text))
    if report.guest_svn < wanted.minimum_guest_svn:
        text = f"the guest's security version {report.guest_svn} is below {wanted.minimum_guest_svn}"
        findings.append(Finding("snp.guest_svn", text))
    if not wanted.any_host_data and report.host_data not in wanted.host_data:
        text = f"HOST_DATA {report.host_data.hex()} is not among the expected values"
        findings.append(Finding("snp.host_data", text))


def _appraise_guest(report: SnpReport, wanted: SnpExpectations, findings: list[Finding]) -> None:
    if report.policy & DEBUG and not wanted.allow_debug:
        findings.append(Finding("snp.debug", "the guest's policy lets the host read and change its memory (DEBUG)"))
    migratable = report.policy & MIGRATE_MA or report.report_id_ma != NO_MIGRATION_AGENT
    if migratable and not wanted.allow_migration_agent:
        text = "a migration agent could export the guest: launch it without MIGRATE_MA"
        findings.append(Finding("snp.migration_agent", text))
    if report.vmpl != wanted.vmpl:
        asked = "the host" if report.vmpl == HOST_REQUESTED_VMPL else f"privilege level {report.vmpl}"
        findings.append(Finding("snp.vmpl", f"{asked} asked for the report instead of privilege level {wanted.vmpl}"))
    if report.policy_abi < wanted.minimum_policy_abi:
        least = ".".join(map(str, wanted.minimum_policy_abi))
        text = f"the guest's policy accepts firmware ABI {'.'.join(map(str, report.policy_abi))}, below {least}"
        findings.append(Finding("snp.policy_abi", text))


def _appraise_versions(verified: VerifiedSnp, wanted: SnpExpectations, findings: list[Finding]) -> None:
    report = verified.report
    minimum = wanted.minimum_tcb.get(verified.product.value)
    source, known = "", wanted.known_minimum_tcb and not verified.simulated
    if minimum is None and known and (found := KNOWN_MINIMUMS.get(verified.product.value)):
        minimum, source = found.tcb, f" of {found.bulletin}, {found.issued}"
    if minimum is None and (wanted.minimum_tcb or known):
        text = f"no least firmware versions are configured for {verified.product}"
        findings.append(Finding("snp.tcb.no_minimum", text))
    if minimum is not None:
        levels = {"reported": report.reported_tcb, "committed": report.committed_tcb, "launch": report.launch_tcb}
        for name, tcb in levels.items():
            low = tcb.below(minimum)
            if low:
                parts = ", ".join(low)
                text = f"the {name} TCB ({tcb}) is below the least{source} ({minimum}) in {parts}: update the firmware"
                findings.append(Finding("snp.tcb.too_old", text))
    if min(report.current_version, report.committed_version) < wanted.minimum_firmware:
        text = (
            f"SNP firmware {report.current_version} (committed {report.committed_version}) is below "
            f"{wanted.minimum_firmware}: update it"
        )
        findings.append(Finding("snp.firmware.too_old", text))
    provisional = report.current_version != report.committed_version or report.current_tcb != report.committed_tcb
    if provisional and not wanted.allow_provisional_firmware:
        text = f"firmware {report.current_version} is not committed, so the host can roll it back: commit it"
        findings.append(Finding("snp.firmware.provisional", text))


DEMANDS: tuple[tuple[str, bool, int, bool, str, str], ...] = (
    # Field of `SnpExpectations`; True for a bit of POLICY, False for PLATFORM_INFO; the bit; its value; finding; text.
    ("require_smt_off", False, PlatformInfo.SMT_EN, False, "smt", "simultaneous multithreading is on"),
    (
        "require_ciphertext_hiding",
        False,
        PlatformInfo.CIPHERTEXT_HIDING_DRAM_EN,
        True,
        "ciphertext_hiding",
        "the host can read ciphertext in memory",
    ),
    (
        "require_aes_256_xts",
        True,
        GuestPolicy.MEM_AES_256_XTS,
        True,
        "aes_256_xts",
        "the guest's policy does not ask for AES-256-XTS",
    ),
    ("require_rapl_off", False, PlatformInfo.RAPL_DIS, True, "rapl", "the power measurement interface is on"),
    (
        "require_single_socket",
        True,
        GuestPolicy.SINGLE_SOCKET,
        True,
        "single_socket",
        "the guest's policy allows several sockets",
    ),
    (
        "require_page_swap_disabled",
        True,
        GuestPolicy.PAGE_SWAP_DISABLE,
        True,
        "page_swap",
        "the guest's policy lets the host move and swap pages",
    ),
    ("require_no_cxl", True, GuestPolicy.CXL_ALLOW, False, "cxl", "the guest's policy allows CXL memory"),
    (
        "require_alias_check",
        False,
        PlatformInfo.ALIAS_CHECK_COMPLETE,
        True,
        "alias_check",
        "memory was not checked for aliases since the platform's reset (AMD-SB-3015)",
    ),
)


def _appraise_platform(report: SnpReport, wanted: SnpExpectations, findings: list[Finding]) -> None:
    for demand, of_policy, bit, value, name, text in DEMANDS:
        if getattr(wanted, demand) and bool((report.policy if of_policy else report.platform_info) & bit) is not value:
            findings.append(Finding(f"snp.platform.{name}", text))
    for moment, vector in (("launch", report.launch_mit_vector), ("now", report.current_mit_vector)):
        missing = wanted.required_mitigations & ~(vector or 0)
        if missing:
            text = f"mitigations 0x{missing:x} are not in force ({moment})"
            findings.append(Finding("snp.mitigations", text))
    if wanted.chip_ids is not None and report.chip_id not in wanted.chip_ids:
        text = f"the chip {report.chip_id.hex()} is not on the list of machines"
        findings.append(Finding("snp.chip_id.unknown", text))
