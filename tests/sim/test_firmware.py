"""The simulated platform passes the production verifier, is marked wherever it does, and passes nowhere else."""

import shutil
import subprocess
import warnings
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.attest import guest_policy
from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.id_block import IdBlock, sign
from jindiskd.attest.model import EvidenceRefused
from jindiskd.attest.snp import AMD_ROOTS, SnpVerifier
from jindiskd.attest.snp_certs import parse_certificate
from jindiskd.attest.snp_endorsement import parse_endorsement
from jindiskd.attest.snp_report import PlatformInfo, Tcb, parse_report
from jindiskd.attest.snp_table import table_certificates
from jindiskd.base.platform import Tee
from jindiskd.errors import InvalidArgument
from jindiskd.sim.firmware import TCB, SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot, SimulatedRootDamaged

NOW = datetime(2026, 7, 15, tzinfo=UTC)
DIGEST = bytes(range(48))


def refused(verifier: SnpVerifier, report: bytes, firmware: SimulatedSnpFirmware, **options) -> set[str]:
    certificates, _lists = table_certificates(firmware.certificate_table())
    with pytest.raises(EvidenceRefused) as info:
        verifier.verify(report, certificates, **{"report_data": None, "now": NOW, **options})
    return {finding.id for finding in info.value.findings}


def test_accepted_and_marked(root):
    """A simulated report verifies under its own root with a revocation list, and says that it is simulated."""
    firmware = SimulatedSnpFirmware(root, DIGEST)
    report = firmware.report(b"r" * 64)
    certificates, _lists = table_certificates(firmware.certificate_table())
    verifier = SnpVerifier(roots=root.roots, crls=[root.crl], require_crl=True)
    verified = verifier.verify(report, certificates, report_data=b"r" * 64, now=NOW)
    assert verified.simulated
    assert verified.report_data_checked
    assert verified.roots.startswith("simulated")
    assert verified.report.measurement == DIGEST
    wanted = SnpExpectations(measurements=frozenset({DIGEST}), host_data=frozenset({bytes(32)}))
    assert [finding.id for finding in appraise_snp(verified, wanted)] == ["snp.simulated"]
    assert appraise_snp(verified, replace(wanted, allow_simulated=True)) == []


def test_refused_by_real_roots_and_other_simulated_ones(root):
    """Neither AMD's roots nor another simulated root accept it."""
    firmware = SimulatedSnpFirmware(root, DIGEST)
    report = firmware.report(bytes(64))
    assert "snp.chain.root" in refused(SnpVerifier(roots=AMD_ROOTS), report, firmware)
    other = replace(root.roots, ark_sha256={"Milan": "00" * 32})
    assert "snp.chain.root" in refused(SnpVerifier(roots=other), report, firmware)


def test_all_findings_together(root):
    """Faults of different kinds are reported together, each once."""
    firmware = SimulatedSnpFirmware(root, DIGEST)
    report = bytearray(firmware.report(bytes(64)))
    report[0x4C] = 1
    found = refused(
        SnpVerifier(roots=root.roots, require_crl=True),
        bytes(report),
        firmware,
        report_data=b"x" * 64,
        now=NOW + timedelta(days=365 * 30),
    )
    assert {
        "snp.reserved",
        "snp.report_data",
        "snp.signature",
        "snp.certificate.dates",
        "snp.chain.dates",
        "snp.crl.missing",
    } == found


def test_signed_but_wrong(root):
    """Correctly signed reports that contradict their certificate are refused for that reason."""
    firmware = SimulatedSnpFirmware(root, DIGEST)
    verifier = SnpVerifier(roots=root.roots)
    low = Tcb(bootloader=1, tee=0, snp=1, microcode=1)
    for changes, finding in (
        ({"reported_tcb": low}, "snp.tcb.certificate"),
        ({"chip_id": b"\1" * 64}, "snp.chip_id"),
        ({"chip_id": bytes(64)}, "snp.chip_id.masked"),
        ({"key_info": 1 << 2}, "snp.signer.kind"),
        ({"key_info": 7 << 2}, "snp.signer"),
        ({"key_info": 1 << 5}, "snp.reserved"),
        ({"policy": 0x10000}, "snp.reserved"),
        ({"policy": 0x30000 | 1 << 40}, "snp.reserved"),
        ({"signature_algorithm": 2}, "snp.signature.algorithm"),
        ({"cpuid_model": 0x11}, "snp.product"),
    ):
        report = firmware.sign(replace(firmware.template, **changes))
        assert finding in refused(verifier, report, firmware), changes
    allowing = SnpVerifier(roots=root.roots, allow_masked_chip_id=True)
    certificates, _lists = table_certificates(firmware.certificate_table())
    masked = firmware.sign(replace(firmware.template, chip_id=bytes(64)))
    assert allowing.verify(masked, certificates, report_data=None, now=NOW).report.chip_id_masked


def test_appraisal_of_every_row(root):
    """Each expectation, alone, refuses a report that falls short of it and accepts one that does not."""
    firmware = SimulatedSnpFirmware(root, DIGEST)
    verifier = SnpVerifier(roots=root.roots)
    certificates, _lists = table_certificates(firmware.certificate_table())
    base = SnpExpectations(
        measurements=frozenset({DIGEST}), host_data=frozenset({bytes(32)}), allow_simulated=True
    )

    def judge(wanted: SnpExpectations, **changes) -> list[str]:
        report = firmware.sign(replace(firmware.template, **changes))
        verified = verifier.verify(report, certificates, report_data=None, now=NOW)
        return [finding.id for finding in appraise_snp(verified, wanted)]

    good, low = TCB, Tcb(bootloader=4, tee=0, snp=23, microcode=219)
    version = firmware.template.current_version
    policy, platform = firmware.template.policy, firmware.template.platform_info
    assert judge(base) == []
    assert judge(SnpExpectations(allow_simulated=True)) == ["snp.measurement", "snp.host_data"]
    rows = [
        ({}, {"measurement": bytes(48)}, "snp.measurement"),
        ({"measurements": frozenset(), "id_key_digests": frozenset({bytes(48)})}, {}, "snp.measurement"),
        ({"measurements": frozenset(), "author_key_digests": frozenset({b"a" * 48})},
         {"author_key_digest": b"a" * 48}, "snp.measurement"),
        ({"minimum_guest_svn": 2}, {"guest_svn": 1}, "snp.guest_svn"),
        ({}, {"host_data": b"h" * 32}, "snp.host_data"),
        ({}, {"policy": policy | 1 << 19}, "snp.debug"),
        ({}, {"policy": policy | 1 << 18}, "snp.migration_agent"),
        ({}, {"report_id_ma": bytes(32)}, "snp.migration_agent"),
        ({}, {"vmpl": 1}, "snp.vmpl"),
        ({"vmpl": 2}, {"vmpl": 0xFFFFFFFF}, "snp.vmpl"),
        ({"minimum_policy_abi": (1, 51)}, {"policy": policy | 0x0132}, "snp.policy_abi"),
        ({"minimum_tcb": {"Genoa": good}}, {}, "snp.tcb.no_minimum"),
        ({"minimum_tcb": {"Milan": good}, "allow_provisional_firmware": True}, {"committed_tcb": low},
         "snp.tcb.too_old"),
        ({"minimum_tcb": {"Milan": good}}, {"launch_tcb": low}, "snp.tcb.too_old"),
        ({"minimum_tcb": {"Milan": replace(good, snp=25)}}, {}, "snp.tcb.too_old"),
        ({"minimum_firmware": replace(version, build=30)}, {}, "snp.firmware.too_old"),
        ({}, {"committed_version": replace(version, build=1)}, "snp.firmware.provisional"),
        ({}, {"committed_tcb": low}, "snp.firmware.provisional"),
        ({"require_smt_off": True}, {}, "snp.platform.smt"),
        ({"require_ciphertext_hiding": True}, {}, "snp.platform.ciphertext_hiding"),
        ({"require_aes_256_xts": True}, {}, "snp.platform.aes_256_xts"),
        ({"require_rapl_off": True}, {}, "snp.platform.rapl"),
        ({"require_single_socket": True}, {}, "snp.platform.single_socket"),
        ({"require_page_swap_disabled": True}, {}, "snp.platform.page_swap"),
        ({"require_no_cxl": True}, {"policy": policy | 1 << 21}, "snp.platform.cxl"),
        ({"require_alias_check": True}, {"platform_info": platform & ~(1 << 5)}, "snp.platform.alias_check"),
        ({"required_mitigations": 1}, {}, "snp.mitigations"),
        ({"chip_ids": frozenset()}, {}, "snp.chip_id.unknown"),
    ]
    for wanted, changes, finding in rows:
        found = judge(replace(base, **wanted), **changes)
        assert {finding} == set(found), (wanted, changes)
    hard = {
        "require_smt_off": True, "require_ciphertext_hiding": True, "require_aes_256_xts": True,
        "require_rapl_off": True, "require_single_socket": True, "require_page_swap_disabled": True,
        "require_no_cxl": True, "require_alias_check": True, "chip_ids": frozenset({firmware.template.chip_id}),
        "minimum_tcb": {"Milan": good}, "minimum_firmware": version,
    }
    assert judge(replace(base, **hard), platform_info=0b111000, policy=policy | 0b11_1101 << 20 & ~(1 << 21)) == []
    keyed = replace(base, measurements=frozenset(), author_key_digests=frozenset({b"a" * 48}))
    assert judge(keyed, author_key_digest=b"a" * 48, key_info=1) == []
    keyed = replace(base, measurements=frozenset(), id_key_digests=frozenset({b"i" * 48}))
    assert judge(keyed, id_key_digest=b"i" * 48) == []
    assert judge(SnpExpectations(any_measurement=True, any_host_data=True, allow_simulated=True)) == []


def test_certificates_have_the_real_shape(root):
    """OpenSSL follows the chain, the chip certificate has serial 0 like AMD's, and every subject says Simulated."""
    firmware = SimulatedSnpFirmware(root, DIGEST, platform="one")
    certificates, _lists = table_certificates(firmware.certificate_table())
    assert parse_certificate(certificates[0]).serial == 0
    endorsement = parse_endorsement(parse_certificate(certificates[0]))
    assert endorsement.hardware_id == root.chip_id("one") != root.chip_id("two")
    for blob in certificates:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # serial number 0
            subject = x509.load_der_x509_certificate(blob).subject.rfc4514_string()
        assert "Simulated" in subject


def test_openssl_agrees(root, tmp_path):
    """OpenSSL verifies ASK and the chip certificate under ARK."""
    firmware = SimulatedSnpFirmware(root, DIGEST)
    certificates, _lists = table_certificates(firmware.certificate_table())
    for name, blob in zip(("vcek", "ask", "ark"), certificates, strict=True):
        text = subprocess.run(
            ["openssl", "x509", "-inform", "DER"], input=blob, capture_output=True, check=True, timeout=20
        ).stdout
        (tmp_path / name).write_bytes(text)
    done = subprocess.run(
        ["openssl", "verify", "-attime", str(int(NOW.timestamp())), "-CAfile", tmp_path / "ark", "-untrusted",
         tmp_path / "ask", tmp_path / "vcek"],
        capture_output=True, text=True, timeout=20, check=False,
    )
    assert done.returncode == 0, done.stderr


def test_chip_key_is_a_function_of_chip_and_versions(root):
    """The same machine at the same versions has the same key in every process; another version has another."""
    chip, other = root.chip_id("a"), replace(TCB, snp=1)
    numbers = [root.chip_key(chip, tcb).private_numbers().private_value for tcb in (TCB, TCB, other)]
    assert numbers[0] == numbers[1] != numbers[2]


def test_identity_is_fresh_for_each_launch(root):
    """REPORT_ID stays within a launch and differs between launches."""
    one, two = SimulatedSnpFirmware(root, DIGEST), SimulatedSnpFirmware(root, DIGEST)
    ids = [parse_report(firmware.report(bytes(64))).report_id for firmware in (one, one, two)]
    assert ids[0] == ids[1] != ids[2]


def test_directory(root_directory: Path, root: SimulatedRoot, tmp_path: Path):
    """The directory and its files are the owner's alone, nothing else is left beside it, and it reads back the same."""
    assert root_directory.stat().st_mode & 0o777 == 0o700
    assert {0o600} == {path.stat().st_mode & 0o777 for path in root_directory.iterdir()}
    assert [path.name for path in root_directory.parent.iterdir()] == ["root"]
    assert root.created == NOW
    (tmp_path / "root").mkdir()
    for path in root_directory.iterdir():
        (tmp_path / "root" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "root" / "ask.pem").write_bytes((root_directory / "ark.pem").read_bytes())
    with pytest.raises(SimulatedRootDamaged, match="belong"):
        SimulatedRoot.load_or_create(tmp_path / "root")
    (tmp_path / "root" / "ask-key.pem").unlink()
    with pytest.raises(SimulatedRootDamaged, match="cannot be read"):
        SimulatedRoot.load_or_create(tmp_path / "root")


def test_two_processes_make_one_root(root_directory: Path, root: SimulatedRoot, tmp_path: Path, monkeypatch):
    """Who finds the directory made by another meanwhile takes that one, and leaves nothing of its own."""
    path = tmp_path / "root"

    def overtaken(*_args, **_kwargs) -> SimulatedRoot:
        shutil.copytree(root_directory, path)
        return replace(root, ark=root.ask)

    monkeypatch.setattr(SimulatedRoot, "generate", overtaken)
    assert SimulatedRoot.load_or_create(path).ark == root.ark
    assert [child.name for child in tmp_path.iterdir()] == ["root"]


def test_an_id_block_is_held_to_and_reported(root):
    """A launch that is not as the block says is refused; otherwise reports show what is in it, and by whom."""
    id_key, author_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    policy = guest_policy.read("no-smt,abi=1.55", Tee.SNP)
    block = IdBlock(
        launch_digest=DIGEST, policy=policy, guest_svn=7, family_id=b"f" * 16, image_id=b"i" * 16
    )  # fmt: skip
    signed = sign(block, id_key, author_key)
    firmware = SimulatedSnpFirmware(root, DIGEST, policy=policy, signed=signed)
    report = parse_report(firmware.report(bytes(64)))
    assert (report.policy, report.guest_svn, report.family_id, report.image_id) == (policy, 7, b"f" * 16, b"i" * 16)
    assert (report.id_key_digest, report.author_key_digest) == (signed.id_key_digest, signed.author_key_digest)
    assert report.author_key_enabled
    assert report.policy_abi == (1, 55)
    assert not report.platform_info & PlatformInfo.SMT_EN
    certificates, _lists = table_certificates(firmware.certificate_table())
    verified = SnpVerifier(roots=root.roots).verify(firmware.report(bytes(64)), certificates, report_data=None, now=NOW)
    wanted = SnpExpectations(
        id_key_digests=frozenset({signed.id_key_digest}), minimum_guest_svn=7, host_data=frozenset({bytes(32)}),
        allow_simulated=True, require_smt_off=True, minimum_policy_abi=(1, 55),
    )  # fmt: skip
    assert appraise_snp(verified, wanted) == []
    assert {finding.id for finding in appraise_snp(verified, replace(wanted, minimum_guest_svn=8))} == {"snp.guest_svn"}
    found = appraise_snp(verified, replace(wanted, minimum_policy_abi=(1, 56)))
    assert {finding.id for finding in found} == {"snp.policy_abi"}
    for digest, other in ((bytes(48), policy), (DIGEST, guest_policy.SNP_DEFAULT)):
        with pytest.raises(InvalidArgument, match="as the machine is launched"):
            SimulatedSnpFirmware(root, digest, policy=other, signed=signed)
    assert not parse_report(SimulatedSnpFirmware(root, DIGEST).report(bytes(64))).author_key_enabled
