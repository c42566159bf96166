"""Judging files: the verdict, the fields, every reason, and clear refusals of files that are something else."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from jindiskd.attest.appraise import SnpExpectations
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.offline import Verdict, snp_report_of, verify_files
from jindiskd.attest.snp_report import parse_report
from jindiskd.attest.snp_table import parse_certificate_table
from jindiskd.attest.tdx import TdxExpectations
from jindiskd.base.platform import Tee
from jindiskd.errors import InvalidArgument, NotFound
from jindiskd.kbs.evidence import snp_from_json, snp_to_json

NOW = datetime.fromisoformat("2026-07-15T00:00:00Z")


def snp(attestation: Path, name: str, **options):
    product = name.partition("-")[0]
    folder = attestation / "snp" / name
    arguments = {
        "evidence": folder / "report.bin",
        "certificates": [folder / "vek.der", attestation / "amd-roots" / product],
        "collateral": None,
        "at": NOW,
        "policy": None,
        **options,
    }
    return verify_files(Tee.SNP, **arguments)


@pytest.mark.parametrize("name", ["milan-v2-vcek", "milan-v3-vcek", "genoa-v5-vcek", "turin-v5-vcek"])
def test_genuine_accepted_refused(attestation, name):
    """A real report is genuine; it is accepted by a policy made for it and refused, with all reasons, by another."""
    found = snp(attestation, name)
    assert (found.verdict, found.simulated, found.findings) == (Verdict.GENUINE, False, ())
    assert json.loads(json.dumps(found.fields)) == found.fields
    wanted = SnpExpectations(
        measurements=frozenset({bytes.fromhex(found.fields["measurement"])}),
        host_data=frozenset({bytes.fromhex(found.fields["host_data"])}),
        allow_provisional_firmware=True,
    )
    assert snp(attestation, name, policy=wanted).verdict is Verdict.ACCEPTED
    strict = snp(attestation, name, policy=replace(wanted, measurements=frozenset(), vmpl=3))
    assert strict.verdict is Verdict.REFUSED
    assert {"snp.measurement", "snp.vmpl"} == {finding.id for finding in strict.findings}


def test_refused_evidence_still_shows_its_fields(attestation):
    """Evidence without its certificate, or later than the certificate lives, is refused and shown."""
    bare = snp(attestation, "milan-v3-vcek", certificates=[])
    assert [finding.id for finding in bare.findings] == ["snp.certificate.missing"]
    assert bare.fields["measurement"].startswith("7f51e17f")
    late = snp(attestation, "milan-v3-vcek", at=datetime.fromisoformat("2060-01-01T00:00:00Z"))
    assert {"snp.certificate.dates", "snp.chain.dates"} == {finding.id for finding in late.findings}


def test_certificate_table_file(attestation):
    """A host's certificate table is enough; its contents need not be taken apart by hand."""
    table = attestation / "snp/genoa-v3-vcek-auxblob/auxblob.bin"
    assert snp(attestation, "genoa-v3-vcek-auxblob", certificates=[table]).verdict is Verdict.GENUINE


def test_provider_key(attestation):
    """Evidence under a provider's key is refused until the provider is named."""
    at = datetime.fromisoformat("2024-06-04T21:14:27Z")
    refused = snp(attestation, "milan-v2-vlek-vmpl1", at=at)
    assert [finding.id for finding in refused.findings] == ["snp.signer.vlek"]
    named = frozenset({"CN=cc-us-east-2.amazonaws.com"})
    assert snp(attestation, "milan-v2-vlek-vmpl1", at=at, allow_vlek_csp=named).verdict is Verdict.GENUINE


def test_simulated_root(attestation):
    """Evidence under a simulated root needs that root named, is marked, and is never accepted by a normal policy."""
    pki = attestation / "snp-test-pki/milan"
    options = {
        "evidence": pki / "good.bin",
        "certificates": [pki / "vcek.der", pki / "ask.pem", pki / "crl.der"],
    }
    refused = snp(attestation, "milan-v3-vcek", **options)
    assert refused.verdict is Verdict.REFUSED
    found = snp(attestation, "milan-v3-vcek", **options, simulated_root=pki / "ark.pem")
    assert (found.verdict, found.simulated, found.fields["simulated"]) == (Verdict.GENUINE, True, True)
    policy = SnpExpectations(any_measurement=True, any_host_data=True)
    found = snp(attestation, "milan-v3-vcek", **options, simulated_root=pki / "ark.pem", policy=policy)
    assert [finding.id for finding in found.findings] == ["snp.simulated"]
    options["certificates"][2] = pki / "crl-ask-revoked.der"
    found = snp(attestation, "milan-v3-vcek", **options, simulated_root=pki / "ark.pem")
    assert [finding.id for finding in found.findings] == ["snp.revoked"]


def test_forms_of_evidence(attestation, tmp_path):
    """A report, a device's response and the protocol's JSON are the same evidence."""
    folder = attestation / "snp/genoa-v3-vcek-auxblob"
    blob = (folder / "report.bin").read_bytes()
    response = bytes(4) + (1184).to_bytes(4, "little") + bytes(24) + blob
    assert snp_report_of(response.ljust(4000, b"\0")) == (blob, [])
    raw = (folder / "auxblob.bin").read_bytes()
    table = parse_certificate_table(raw)
    document = json.dumps(snp_to_json(blob, raw)).encode()
    report, certificates = snp_report_of(document)
    assert report == blob
    assert [entry.data for entry in table] == certificates
    (tmp_path / "evidence.json").write_bytes(document)
    found = snp(attestation, "genoa-v3-vcek-auxblob", evidence=tmp_path / "evidence.json", certificates=[])
    assert found.verdict is Verdict.GENUINE
    real = (attestation / "snp/msg-report-rsp.bin").read_bytes()
    assert parse_report(snp_report_of(real)[0]).version in range(2, 6)
    for bad in (b"", b"{", b"{}", b"[" * 4000, b"x" * 1183, b"\1" + response[1:].ljust(3999, b"\0")):
        with pytest.raises(MalformedEvidence):
            snp_report_of(bad)


def test_json_of_every_report(attestation):
    """Every recorded report survives the JSON form byte for byte."""
    seen = 0
    for path in [*attestation.glob("snp/*/report.bin"), *attestation.glob("snp-test-pki/*/*.bin")]:
        blob = path.read_bytes()
        form = json.loads(json.dumps(snp_to_json(blob)))
        assert (blob, []) == snp_from_json(form), path
        seen += 1
    assert seen >= 20


def test_tdx(attestation):
    """A real quote with its collateral and event log is genuine; another log, or a strict policy, refuses it."""
    folder = attestation / "tdx/v4-gcp-ccel"
    at = datetime.fromisoformat("2025-02-05T11:57:03Z")
    arguments = {"certificates": [], "collateral": folder / "collateral.json", "at": at, "policy": None}
    log = attestation / "ccel/gcp-cos-113/ccel.bin"
    found = verify_files(Tee.TDX, folder / "quote.bin", **arguments, event_log=log)
    assert found.verdict is Verdict.GENUINE
    assert json.loads(json.dumps(found.fields)) == found.fields
    other = attestation / "tdx/v4-uptodate/quote.bin"
    found = verify_files(Tee.TDX, other, **arguments, event_log=log)
    assert {"tdx.quote", "tdx.event_log"} == {finding.id for finding in found.findings}
    found = verify_files(Tee.TDX, folder / "quote.bin", **{**arguments, "policy": TdxExpectations()})
    assert "tdx.mr_td" in {finding.id for finding in found.findings}


def test_arguments(attestation, tmp_path):
    """Missing files, kinds without evidence, and policies of another kind are named."""
    good = {"certificates": [], "collateral": None, "at": NOW, "policy": None}
    report = attestation / "snp/milan-v3-vcek/report.bin"
    with pytest.raises(NotFound, match="evidence"):
        verify_files(Tee.SNP, tmp_path / "none", **good)
    with pytest.raises(NotFound):
        verify_files(Tee.SNP, report, **{**good, "certificates": [tmp_path / "none"]})
    with pytest.raises(InvalidArgument, match="collateral"):
        verify_files(Tee.TDX, report, **good)
    for tee, policy in ((Tee.SNP, TdxExpectations()), (Tee.TDX, SnpExpectations())):
        with pytest.raises(InvalidArgument, match="policy"):
            verify_files(tee, report, **{**good, "policy": policy})
    with pytest.raises(MalformedEvidence):
        verify_files(Tee.SEV, report, **good)
    with pytest.raises(InvalidArgument, match="policy"):
        verify_files(Tee.SEV, report, **{**good, "policy": SnpExpectations()})
    (tmp_path / "x").write_bytes(b"?")
    with pytest.raises(MalformedEvidence):
        verify_files(Tee.SNP, tmp_path / "x", **good)
