"""The decision: may this guest have this image's key?"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.kept import Verified
from jindiskd.attest.model import Finding
from jindiskd.attest.snp import VerifiedSnp
from jindiskd.attest.tdx import TdxExpectations, appraise_tdx
from jindiskd.base.platform import Tee
from jindiskd.keys.store import ImageRecord, KeyState
from jindiskd.policy.rules import ReleaseRules, version_of, window


def decide(
    record: ImageRecord, verified: Verified, *, allow_simulated: bool, now: datetime | None = None
) -> list[Finding]:
    """Every reason against release; none means yes. Limits and approval are the store's, in its transaction.

    Simulated evidence counts only where the broker is configured for it *and* the image was built for a simulated
    platform: a real image's key never goes to a simulated guest. Everything else is the strict default of the
    appraisal (no debugging, no migration agent, VMPL 0, a launch digest of this image) with the image's own rules.

    Args:
        record: the image.
        verified: what the guest proved.
        allow_simulated: the broker's configuration.
        now: to judge dates by, with a time zone; the clock's if not given.
    """
    now = now or datetime.now(UTC)
    findings = []
    if record.state is not KeyState.ACTIVE:
        findings.append(Finding("key.state", f"the image's key is {record.state}"))
    tee = Tee.SNP if isinstance(verified, VerifiedSnp) else Tee.TDX
    if record.platform.tee is not tee:
        name = {Tee.SNP: "SEV-SNP", Tee.TDX: "TDX"}[tee]
        findings.append(Finding("platform.kind", f"the image is for {record.platform}, the report is of {name}"))
    if record.platform.simulated != verified.simulated:
        kind = "simulated" if verified.simulated else "genuine"
        findings.append(Finding("platform.simulation", f"the image is for {record.platform}, the report is {kind}"))
    findings += window(record.rules, now)
    simulated = allow_simulated and record.platform.simulated and record.rules.allow_simulated is not False
    return findings + appraise(verified, record.rules, record.launch_digests, allow_simulated=simulated, now=now)


def appraise(
    verified: Verified, rules: ReleaseRules, digests: tuple[bytes, ...], *, allow_simulated: bool, now: datetime
) -> list[Finding]:
    """What is wrong with genuine evidence by an image's rules and launch digests (MRTD values with TDX)."""
    if isinstance(verified, VerifiedSnp):
        return appraise_snp(verified, snp_expectations(rules, digests, allow_simulated=allow_simulated), now=now)
    return appraise_tdx(verified, tdx_expectations(rules, digests, allow_simulated=allow_simulated), now=now)


def snp_expectations(rules: ReleaseRules, digests: tuple[bytes, ...], *, allow_simulated: bool) -> SnpExpectations:
    """What a report must say by the rules of an image with these launch digests."""
    age = rules.revocation_maximum_age_days
    return SnpExpectations(
        measurements=frozenset((*digests, *rules.measurements)),
        id_key_digests=frozenset(rules.id_key_digests),
        author_key_digests=frozenset(rules.author_key_digests),
        host_data=frozenset(rules.host_data),
        minimum_guest_svn=rules.minimum_guest_svn,
        minimum_policy_abi=version_of(rules.minimum_policy_abi)[:2],
        minimum_tcb=rules.tcb_minimums(),
        known_minimum_tcb=rules.known_minimum_tcb,
        minimum_firmware=rules.firmware_minimum(),
        vmpl=rules.vmpl,
        chip_ids=frozenset(rules.chip_ids) if rules.chip_ids is not None else None,
        generations=frozenset(rules.generations),
        providers=frozenset(rules.providers),
        allow_masked_chip_id=rules.allow_masked_chip_id,
        require_crl=rules.revocation_required,
        maximum_crl_age=timedelta(days=age) if age is not None else None,
        allow_simulated=allow_simulated,
        allow_debug=rules.allow_debug,
        allow_migration_agent=rules.allow_migration_agent,
        allow_provisional_firmware=rules.allow_provisional_firmware,
        require_smt_off=rules.require_smt_off,
        require_ciphertext_hiding=rules.require_ciphertext_hiding,
        require_aes_256_xts=rules.require_aes_256_xts,
        require_rapl_off=rules.require_rapl_off,
        require_single_socket=rules.require_single_socket,
        require_page_swap_disabled=rules.require_page_swap_disabled,
        require_no_cxl=rules.require_no_cxl,
        require_alias_check=rules.require_alias_check,
        required_mitigations=rules.required_mitigations,
    )


def tdx_expectations(rules: ReleaseRules, digests: tuple[bytes, ...], *, allow_simulated: bool) -> TdxExpectations:
    """What a quote must say by the rules of an image; `digests` are the MRTD values it was built with."""

    def allowed(values: tuple[bytes, ...] | None) -> frozenset[bytes] | None:
        return frozenset(values) if values is not None else None

    return TdxExpectations(
        mr_td=frozenset((*digests, *rules.tdx_mr_td)),
        rtmrs=tuple(
            allowed(values) for values in (rules.tdx_rtmr0, rules.tdx_rtmr1, rules.tdx_rtmr2, rules.tdx_rtmr3)
        ),
        mr_config_id=frozenset(rules.tdx_mr_config_id),
        mr_owner=frozenset(rules.tdx_mr_owner),
        mr_owner_config=frozenset(rules.tdx_mr_owner_config),
        mr_seam=allowed(rules.tdx_mr_seam),
        statuses=frozenset(rules.tdx_statuses),
        advisories=frozenset(rules.tdx_advisories),
        grace=timedelta(days=rules.tdx_grace_days),
        minimum_tcb_evaluation=rules.tdx_minimum_tcb_evaluation,
        allow_simulated=allow_simulated,
        require_smt_off=rules.tdx_require_smt_off,
        require_static_platform=rules.tdx_require_static_platform,
        require_no_cached_keys=rules.tdx_require_no_cached_keys,
        ppids=allowed(rules.tdx_ppids),
    )
