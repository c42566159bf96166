"""The decision: what a genuine report must say for an image, and that each rule bites."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.snp import SnpVerifier, VerifiedSnp
from jindiskd.base.platform import Platform
from jindiskd.keys.store import ImageRecord, KeyState
from jindiskd.policy.release import decide
from jindiskd.policy.rules import MinimumTcb, ReleaseRules
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

DIGEST = bytes(range(48))


@pytest.fixture(scope="session")
def verified() -> VerifiedSnp:
    """A report that was really verified."""
    now = datetime.now(UTC)
    root = SimulatedRoot.generate(now=now)
    firmware = SimulatedSnpFirmware(root, DIGEST)
    vcek = root.chip_certificate(root.chip_id("default"), firmware.template.reported_tcb)
    report, chain = firmware.report(bytes(64)), [vcek, root.ask, root.ark]
    return SnpVerifier(roots=root.roots).verify(report, chain, report_data=bytes(64), now=now)


def record(**changes: Any) -> ImageRecord:
    given: dict[str, Any] = {
        "image_id": "i",
        "name": "web",
        "platform": Platform.SIMULATED_SNP,
        "resource": "default/i/root",
        "state": KeyState.ACTIVE,
        "launch_digests": (bytes(48), DIGEST),
        "created": "",
    }
    return ImageRecord(**{**given, **changes})


def ids(image: ImageRecord, verified: VerifiedSnp, *, allow_simulated: bool = True) -> set[str]:
    return {finding.id for finding in decide(image, verified, allow_simulated=allow_simulated)}


def test_the_image_it_was_built_for(verified: VerifiedSnp) -> None:
    """One of its digests, active, simulated on both sides: no reason against it."""
    assert ids(record(), verified) == set()


def test_simulation_needs_image_and_broker(verified: VerifiedSnp) -> None:
    """Neither the image's platform nor the broker's configuration alone suffices; nor a genuine report."""
    assert "snp.simulated" in ids(record(), verified, allow_simulated=False)
    assert {"snp.simulated", "platform.simulation"} <= ids(record(platform=Platform.SNP), verified)
    genuine = replace(verified, simulated=False)
    assert "platform.simulation" in ids(record(), genuine)
    assert ids(record(platform=Platform.SNP), genuine, allow_simulated=False) == set()


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"state": KeyState.PENDING}, "key.state"),
        ({"state": KeyState.REVOKED}, "key.state"),
        ({"launch_digests": ()}, "snp.measurement"),
        ({"launch_digests": (bytes(48),)}, "snp.measurement"),
        ({"platform": Platform.TDX}, "platform.kind"),
        ({"rules": ReleaseRules(host_data=(b"h" * 32,))}, "snp.host_data"),
        ({"rules": ReleaseRules(minimum_tcb={"Milan": MinimumTcb(snp=25)})}, "snp.tcb.too_old"),
        ({"rules": ReleaseRules(minimum_tcb={"Genoa": MinimumTcb()})}, "snp.tcb.no_minimum"),
        ({"rules": ReleaseRules(minimum_guest_svn=1)}, "snp.guest_svn"),
        ({"rules": ReleaseRules(chip_ids=(bytes(64),))}, "snp.chip_id.unknown"),
        ({"rules": ReleaseRules(chip_ids=())}, "snp.chip_id.unknown"),
        ({"rules": ReleaseRules(require_smt_off=True)}, "snp.platform.smt"),
        ({"rules": ReleaseRules(require_ciphertext_hiding=True)}, "snp.platform.ciphertext_hiding"),
        ({"rules": ReleaseRules(require_single_socket=True)}, "snp.platform.single_socket"),
    ],
    ids=str,
)
def test_each_rule_bites(verified: VerifiedSnp, changes: dict[str, Any], finding: str) -> None:
    """A rule that could not refuse would be decoration."""
    assert finding in ids(record(**changes), verified)


def test_rules_that_are_met_do_not_refuse(verified: VerifiedSnp) -> None:
    """All at once."""
    rules = ReleaseRules(
        minimum_tcb={"Milan": MinimumTcb(snp=24)}, chip_ids=(verified.report.chip_id,), require_alias_check=True
    )
    assert ids(record(rules=rules), verified) == set()


def test_all_reasons_are_told_at_once(verified: VerifiedSnp) -> None:
    """So that an operator mends them in one go."""
    found = ids(record(state=KeyState.REVOKED, launch_digests=(), rules=ReleaseRules(minimum_guest_svn=9)), verified)
    assert {"key.state", "snp.measurement", "snp.guest_svn"} <= found


def test_the_defaults_are_those_of_the_appraisal(verified: VerifiedSnp) -> None:
    """Debugging, migration and other privilege levels are refused without any rule."""
    for change, finding in (
        ({"policy": verified.report.policy | 1 << 19}, "snp.debug"),
        ({"report_id_ma": bytes(32)}, "snp.migration_agent"),
        ({"vmpl": 1}, "snp.vmpl"),
    ):
        worse = replace(verified, report=replace(verified.report, **change))
        assert finding in ids(record(), worse)
        assert appraise_snp(worse, SnpExpectations())
