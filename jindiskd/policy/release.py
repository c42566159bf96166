"""The decision: may this guest have this image's key?"""

from __future__ import annotations

from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.model import Finding
from jindiskd.attest.snp import VerifiedSnp
from jindiskd.base.platform import Tee
from jindiskd.keys.store import ImageRecord, KeyState


def decide(record: ImageRecord, verified: VerifiedSnp, *, allow_simulated: bool) -> list[Finding]:
    """Every reason against release; none means yes.

    A simulated report counts only where the broker is configured for it *and* the image was built for a simulated
    platform: a real image's key never goes to a simulated guest. Everything else is the strict default of the
    appraisal (no debugging, no migration agent, VMPL 0, a launch digest of this image) with the image's own rules.
    """
    findings = []
    if record.state is not KeyState.ACTIVE:
        findings.append(Finding("key.state", f"the image's key is {record.state}"))
    if record.platform.tee is not Tee.SNP:
        findings.append(Finding("platform.kind", f"the image is for {record.platform}, the report is of SEV-SNP"))
    if record.platform.simulated != verified.simulated:
        kind = "simulated" if verified.simulated else "genuine"
        findings.append(Finding("platform.simulation", f"the image is for {record.platform}, the report is {kind}"))
    rules = record.rules
    wanted = SnpExpectations(
        measurements=frozenset(record.launch_digests),
        host_data=frozenset(rules.host_data),
        minimum_guest_svn=rules.minimum_guest_svn,
        minimum_tcb=rules.tcb_minimums(),
        chip_ids=frozenset(rules.chip_ids) if rules.chip_ids is not None else None,
        require_smt_off=rules.require_smt_off,
        require_ciphertext_hiding=rules.require_ciphertext_hiding,
        require_single_socket=rules.require_single_socket,
        require_alias_check=rules.require_alias_check,
        allow_simulated=allow_simulated and record.platform.simulated,
    )
    return findings + appraise_snp(verified, wanted)
