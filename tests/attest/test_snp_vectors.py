"""SEV-SNP verdicts against real reports and a self-made hierarchy, each recorded with what must be answered."""

import json
import warnings
from datetime import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from jindiskd.attest.appraise import SnpExpectations, appraise_snp
from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.snp import AMD_ROOTS, SnpRoots, SnpVerifier
from jindiskd.attest.snp_certs import parse_certificate, to_der
from jindiskd.attest.snp_endorsement import parse_endorsement
from jindiskd.attest.snp_report import REPORT_BYTES, encode_report, parse_report, reserved_faults
from jindiskd.attest.snp_table import encode_certificate_table, parse_certificate_table, table_certificates

REASONS = {
    "chain_signature": {"snp.chain.signature", "snp.chain.root", "snp.chain.incomplete"},
    "report_signature": {"snp.signature"},
    "product_mismatch": {"snp.product"},
    "signer_kind_mismatch": {"snp.signer.kind"},
    "cert_validity": {"snp.certificate.dates"},
    "chip_id_masked": {"snp.chip_id.masked"},
    "tcb_mismatch": {"snp.tcb.certificate"},
    "revoked": {"snp.revoked"},
    "debug_allowed": {"snp.debug"},
    "migration_agent_allowed": {"snp.migration_agent"},
    "vmpl": {"snp.vmpl"},
    "signer_kind": {"snp.signer.vlek"},
}
KINDS = {
    "snp-report",
    "snp-vek-negative",
    "snp-wrong-key-pairing",
    "snp-expired-certificate",
    "snp-report-test-pki",
    "snp-revoked-intermediate",
}


@pytest.fixture(scope="module")
def folder(vectors: Path) -> Path:
    return vectors / "attestation"


@pytest.fixture(scope="module")
def entries(folder: Path) -> list[dict]:
    return [entry for entry in json.loads((folder / "manifest.json").read_text())["entries"] if entry["kind"] in KINDS]


def chain(folder: Path, roots: str) -> list[bytes]:
    return [(folder / roots / f"{name}.pem").read_bytes() for name in ("ark", "ask", "asvk")]


def amd(folder: Path) -> list[bytes]:
    return [blob for product in ("milan", "genoa", "turin") for blob in chain(folder, f"amd-roots/{product}")]


def judge(folder: Path, entry: dict, roots: SnpRoots, intermediates: list[bytes]):
    """Everything that speaks against an entry: first whether it is genuine, then whether it is acceptable."""
    report = (folder / entry.get("report", entry["file"])).read_bytes()
    certificate = (folder / (entry.get("vek") or entry["file"])).read_bytes()
    crls = [(folder / entry["crl"]).read_bytes()] if "crl" in entry else []
    endorsed_by_provider = "vlek" in entry.get("vek", entry["file"])
    csp = parse_endorsement(parse_certificate(certificate)).csp_id if endorsed_by_provider else None
    now = datetime.fromisoformat(entry["now"])
    found = {}
    for name, allowed in (("authentic", frozenset({csp}) if csp else frozenset()), ("default", frozenset())):
        verifier = SnpVerifier(roots=roots, intermediates=intermediates, crls=crls, allow_vlek_csp=allowed)
        parsed = parse_report(report)
        try:
            verified = verifier.verify(report, [certificate], report_data=parsed.report_data, now=now)
        except EvidenceRefused as exc:
            found[name] = {finding.id for finding in exc.findings}
            continue
        found[name] = set()
        wanted = SnpExpectations(
            measurements=frozenset({parsed.measurement}),
            host_data=frozenset({parsed.host_data}),
            allow_provisional_firmware=True,
            allow_simulated=True,
        )
        found["default"] = {finding.id for finding in appraise_snp(verified, wanted)}
        if name == "authentic" and csp is None:
            break
    return found


def test_every_recorded_verdict(folder, entries):
    """Real and self-made reports get the recorded verdict and reason, and AMD's roots refuse everything self-made."""
    seen = 0
    for entry in entries:
        expect = entry["expect"]
        made = entry["file"].startswith("snp-test-pki")
        if made:
            intermediates = chain(folder, entry["roots"])
            roots = SnpRoots.simulated_from(to_der(intermediates[0])[0])
        else:
            intermediates, roots = amd(folder), AMD_ROOTS
        found = judge(folder, entry, roots, intermediates)
        assert expect["authentic"] == (not found["authentic"]), (entry["file"], found)
        if not expect["authentic"]:
            assert found["authentic"] & REASONS[expect["reason"]], (entry["file"], found)
        elif "default_policy" in expect:
            assert (expect["default_policy"] == "accept") == (not found["default"]), (entry["file"], found)
            for reason in expect["reasons"]:
                if not (reason == "vmpl" and "snp.signer.vlek" in found["default"]):
                    assert found["default"] & REASONS[reason], (entry["file"], found)
        if made:
            refused = judge(folder, entry, AMD_ROOTS, intermediates)["authentic"]
            assert refused & {"snp.chain.root"}, (entry["file"], refused)
            refused = judge(folder, entry, AMD_ROOTS, amd(folder))["authentic"]
            assert refused & {"snp.chain.signature"}, (entry["file"], refused)
        seen += 1
    assert seen >= 35


def test_decoded_fields(folder, entries):
    """Every field of every recorded report is read as a second decoder read it, and written back identically."""
    for entry in entries:
        if "fields" not in entry:
            continue
        fields = entry["fields"]
        blob = (folder / entry["file"]).read_bytes()
        certificate = parse_certificate((folder / entry["vek"]).read_bytes())
        endorsement = parse_endorsement(certificate)
        report = parse_report(blob, product=endorsement.product)
        assert encode_report(report) == blob
        assert fields["version"] == report.version
        assert fields["product"] == endorsement.product == report.product
        assert fields["guest_svn"] == report.guest_svn
        assert int(fields["policy"], 16) == report.policy
        assert fields["vmpl"] == report.vmpl
        assert int(fields["platform_info"], 16) == report.platform_info
        assert int(fields["key_info"], 16) == report.key_info
        assert fields["signing_key"] == report.signer
        cpuid = [report.cpuid_family, report.cpuid_model, report.cpuid_stepping]
        assert fields["cpuid_fms"] == (None if report.version == 2 else cpuid)
        for name in ("report_data", "measurement", "host_data", "id_key_digest", "author_key_digest", "report_id"):
            assert fields[name] == getattr(report, name).hex(), name
        for name in ("chip_id", "family_id", "image_id"):
            if name in fields:
                assert fields[name] == getattr(report, name).hex(), name
        for name in ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"):
            tcb = getattr(report, name)
            parts = {"bl": tcb.bootloader, "tee": tcb.tee, "snp": tcb.snp, "ucode": tcb.microcode}
            if tcb.fmc is not None:
                parts["fmc"] = tcb.fmc
            assert fields[name] == parts, name
        assert fields["current_version"] == str(report.current_version)
        assert fields["committed_version"] == str(report.committed_version)
        extensions = fields.get("vek_extensions", {})
        if "hwid" in extensions:
            assert extensions["hwid"] == endorsement.hardware_id.hex()
        assert extensions.get("csp_id") == endorsement.csp_id


def test_certificates_are_read_as_a_library_reads_them(folder):
    """Names, dates, serials, keys and extensions of all certificates agree with cryptography's X.509 reader."""
    seen = 0
    paths = [path for pattern in ("amd-roots/*/a*.pem", "snp*/**/*.der", "snp-test-pki/*/a??.pem")
             for path in sorted(folder.glob(pattern))]
    for path in paths:
        if path.name.startswith("crl") or "invalid" in path.name:
            continue
        blob = to_der(path.read_bytes())[0]
        ours = parse_certificate(blob)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # serial number 0
            theirs = x509.load_der_x509_certificate(blob)
            assert theirs.serial_number == ours.serial
        assert theirs.tbs_certificate_bytes == ours.tbs
        assert theirs.signature == ours.signature
        assert theirs.not_valid_before_utc == ours.not_before
        assert theirs.not_valid_after_utc == ours.not_after
        assert theirs.issuer.public_bytes() == ours.issuer
        assert theirs.subject.public_bytes() == ours.subject
        key = theirs.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        assert key[-64:] == ours.spki[-64:]
        assert {extension.oid.dotted_string: extension.critical for extension in theirs.extensions} == {
            name: critical for name, (critical, _value) in ours.extensions.items()
        }
        seen += 1
    assert seen >= 28


def test_certificate_table(folder):
    """A real host's table is split as recorded, verifies its report with PEM inside, and is written back the same."""
    blob = (folder / "snp/genoa-v3-vcek-auxblob/auxblob.bin").read_bytes()
    table = parse_certificate_table(blob)
    assert sorted(entry.kind for entry in table) == ["ARK", "ASK", "VCEK"]
    certificates, lists = table_certificates(blob)
    assert (len(certificates), len(lists)) == (3, 0)
    report = (folder / "snp/genoa-v3-vcek-auxblob/report.bin").read_bytes()
    now = datetime.fromisoformat("2026-07-15T00:00:00Z")
    verified = SnpVerifier(roots=AMD_ROOTS).verify(report, certificates, report_data=None, now=now)
    assert not verified.report_data_checked
    assert not verified.simulated
    again = encode_certificate_table([(entry.kind, entry.data) for entry in table])
    assert [(e.kind, e.data) for e in parse_certificate_table(again)] == [(e.kind, e.data) for e in table]


def test_flipped_bits(folder, entries):
    """A change of any bit of any byte of a real report, signed or not, is refused."""
    now = datetime.fromisoformat("2026-07-15T00:00:00Z")
    verifier = SnpVerifier(roots=AMD_ROOTS, intermediates=amd(folder))
    for name in ("milan-v2-vcek", "milan-v3-vcek", "genoa-v5-vcek", "turin-v5-vcek"):
        blob = (folder / f"snp/{name}/report.bin").read_bytes()
        certificate = (folder / f"snp/{name}/vek.der").read_bytes()
        verifier.verify(blob, [certificate], report_data=None, now=now)
        for at in range(0, len(blob), 3):
            changed = bytearray(blob)
            changed[at] ^= 1 << (at % 8)
            with pytest.raises((EvidenceRefused, MalformedEvidence)):
                verifier.verify(bytes(changed), [certificate], report_data=None, now=now)


@pytest.mark.parametrize("case", ["milan-v2-vcek", "milan-v3-vcek", "genoa-v5-vcek", "turin-v5-vcek"])
def test_reserved_places(attestation, case):
    """Each single bit of a genuine report: the mask of reserved places says what writing the fields anew says.

    PLATFORM_INFO's own reserved bits are fields here; see `reserved_faults`.
    """
    blob = (attestation / "snp" / case / "report.bin").read_bytes()
    report = parse_report(blob)
    assert not reserved_faults(blob, report)
    seen = 0
    for at in range(REPORT_BYTES):
        changed = bytearray(blob)
        changed[at] ^= 0x10
        try:
            other = parse_report(bytes(changed))
        except MalformedEvidence:
            continue  # version or processor
        faults = [fault for fault in reserved_faults(bytes(changed), other) if fault.startswith("reserved byte")]
        assert faults == ([] if encode_report(other) == changed else [f"reserved byte at offset 0x{at:03x}"])
        seen += bool(faults)
    assert seen > 500
