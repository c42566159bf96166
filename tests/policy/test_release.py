"""The decision: what a genuine report must say for an image, and that each rule bites."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.snp import SnpVerifier, VerifiedSnp
from jindiskd.attest.snp_minimums import AS_OF, KNOWN_MINIMUMS
from jindiskd.attest.snp_report import Product, SnpReport, Tcb
from jindiskd.base.platform import Platform
from jindiskd.keys.store import ImageRecord, KeyState
from jindiskd.policy.release import decide
from jindiskd.policy.rules import MinimumTcb, ReleaseRules
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

DIGEST = bytes(range(48))
TCBS = ("reported_tcb", "current_tcb", "committed_tcb", "launch_tcb")
MENDED = dict.fromkeys(TCBS, Tcb(bootloader=4, tee=0, snp=29, microcode=222))


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
    mended = replace(verified.report, **MENDED)
    genuine = replace(verified, report=mended, simulated=False, crl_issued=int(datetime.now(UTC).timestamp()))
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
        ({"rules": ReleaseRules(require_aes_256_xts=True)}, "snp.platform.aes_256_xts"),
        ({"rules": ReleaseRules(require_rapl_off=True)}, "snp.platform.rapl"),
        ({"rules": ReleaseRules(require_page_swap_disabled=True)}, "snp.platform.page_swap"),
        ({"rules": ReleaseRules(required_mitigations=2)}, "snp.mitigations"),
        ({"rules": ReleaseRules(minimum_firmware="9.1")}, "snp.firmware.too_old"),
        ({"rules": ReleaseRules(vmpl=1)}, "snp.vmpl"),
        ({"rules": ReleaseRules(generations=("Genoa", "Turin"))}, "snp.generation"),
        ({"rules": ReleaseRules(generations=())}, "snp.generation"),
        ({"rules": ReleaseRules(allow_simulated=False)}, "snp.simulated"),
        ({"rules": ReleaseRules(not_before="2999-01-01T00:00:00Z")}, "policy.too_early"),
        ({"rules": ReleaseRules(not_after="1999-01-01T00:00:00+01:00")}, "policy.too_late"),
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


@pytest.mark.parametrize(
    ("change", "finding", "loosened"),
    [
        ({"report": {"policy": 1 << 19 | 0x30000}}, "snp.debug", {"allow_debug": True}),
        ({"report": {"policy": 1 << 21 | 0x30000}}, None, {"require_no_cxl": True}),
        ({"report": {"report_id_ma": bytes(32)}}, "snp.migration_agent", {"allow_migration_agent": True}),
        ({"report": {"vmpl": 2}}, "snp.vmpl", {"vmpl": 2}),
        ({"report": {"measurement": bytes(47) + b"1"}}, "snp.measurement", {"measurements": (bytes(47) + b"1",)}),
        (
            {"report": {"measurement": bytes(47) + b"1", "id_key_digest": b"k" * 48}},
            "snp.measurement",
            {"id_key_digests": (b"k" * 48,)},
        ),
        (
            {"report": {"measurement": bytes(47) + b"1", "author_key_digest": b"k" * 48, "key_info": 1}},
            "snp.measurement",
            {"author_key_digests": (b"k" * 48,)},
        ),
        ({"report": {"chip_id": bytes(64)}}, "snp.chip_id.masked", {"allow_masked_chip_id": True}),
        ({"csp_id": "CN=x"}, "snp.signer.vlek", {"providers": ("CN=x",)}),
        ({"simulated": False, "report": MENDED}, "snp.crl.missing", {"revocation_required": False}),
        ({"simulated": False, "crl_issued": 1}, "snp.tcb.too_old", {"known_minimum_tcb": False}),
    ],
    ids=str,
)
def test_what_the_defaults_refuse_can_be_allowed_by_name(
    verified: VerifiedSnp, change: dict[str, Any], finding: str | None, loosened: dict[str, Any]
) -> None:
    """Each loosening takes away its own finding and no other; the opposite setting (CXL) adds one."""
    given = dict(change)
    report = replace(verified.report, **given.pop("report", {}))
    other = replace(verified, report=report, **given)
    platform = Platform.SIMULATED_SNP if other.simulated else Platform.SNP
    strict = ids(record(platform=platform), other)
    loose = ids(record(platform=platform, rules=ReleaseRules(**loosened)), other)
    if finding is None:
        assert (strict, loose) == (set(), {"snp.platform.cxl"})
    else:
        assert (strict, loose) == ({finding}, set())


def test_age_of_revocation_lists(verified: VerifiedSnp) -> None:
    """A list that is current but older than the owner wants is refused; simulated platforms have none."""
    now = datetime.now(UTC)
    rules = ReleaseRules(revocation_maximum_age_days=30)
    for days, expected in ((29, set()), (31, {"snp.crl.old"})):
        issued = int((now - timedelta(days=days)).timestamp())
        genuine = replace(
            verified, report=replace(verified.report, **MENDED), simulated=False, crl_issued=issued
        )
        found = decide(record(platform=Platform.SNP, rules=rules), genuine, allow_simulated=False, now=now)
        assert {finding.id for finding in found} == expected
    assert ids(record(rules=rules), verified) == set()


def told(report: SnpReport, product: Product, rules: ReleaseRules) -> dict[str, str]:
    """Findings about the TCB of a genuine report, changed by hand."""
    genuine = VerifiedSnp(
        report=report, product=product, signer=report.signer, csp_id=None, simulated=False, roots="AMD",
        certificate_sha256="", crl_issued=1, report_data_checked=True,
    )  # fmt: skip
    image = record(platform=Platform.SNP, rules=rules)
    found = decide(image, genuine, allow_simulated=False, now=datetime.fromtimestamp(2, UTC))
    return {finding.id: finding.text for finding in found if finding.id.startswith("snp.tcb")}


@pytest.mark.parametrize("product", list(Product), ids=str)
@pytest.mark.parametrize("which", ["reported", "committed", "launch"])
def test_known_holes(verified: VerifiedSnp, product: Product, which: str) -> None:
    """A generation's known minimum counts in each of the three TCBs, until the owner names another or turns it off."""
    known = KNOWN_MINIMUMS.get(product.value)
    fmc = 0 if product.has_fmc else None
    least = known.tcb if known else Tcb(fmc=fmc, bootloader=9, tee=9, snp=99, microcode=99)
    good = replace(verified.report, **dict.fromkeys(TCBS, least))
    low = replace(good, **{f"{which}_tcb": replace(least, snp=least.snp - 1)})
    if known is None:
        assert told(good, product, ReleaseRules()).keys() == {"snp.tcb.no_minimum"}
    else:
        assert told(good, product, ReleaseRules()) == {}
        text = told(low, product, ReleaseRules())["snp.tcb.too_old"]
        assert which in text
        assert known.bulletin in text
    named = {product.value: MinimumTcb(snp=least.snp - 1, fmc=fmc)}
    assert told(low, product, ReleaseRules(minimum_tcb=named)) == {}
    assert told(low, product, ReleaseRules(known_minimum_tcb=False)) == {}
    stricter = {product.value: MinimumTcb(snp=least.snp, microcode=least.microcode + 1, fmc=fmc)}
    assert told(good, product, ReleaseRules(minimum_tcb=stricter)).keys() == {"snp.tcb.too_old"}


def test_known_minimums_are_documented() -> None:
    """Value, bulletin and date of each stand in the page, and when they were compared."""
    page = (Path(__file__).resolve().parents[2] / "docs/policy.md").read_text()
    assert f"as of {AS_OF}" in page
    for product, known in KNOWN_MINIMUMS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {product}") and "AMD-SB" in line)
        assert f"| SNP {known.tcb.snp} | {known.bulletin}, {known.issued} |" in row
        assert len(known.quoted) >= 2, "no number stands on one citation"
