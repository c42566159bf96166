"""Collateral carried from machine to machine, read from files of any bytes, and the command that does it."""

import io
import json
import tarfile
from datetime import UTC, datetime

import jsonout
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playedchips import PROCESSOR, report_of, serve_chip, sev_certificates, vendors

from jindiskd.attest.collateral import BundleRefused, CollateralCache, read_entry
from jindiskd.attest.collecting import Collector, platform_of
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp_report import Product, parse_report
from jindiskd.cli.main import main

NOW = datetime.fromisoformat("2026-07-15T00:00:00Z")


@pytest.fixture
def filled(services, cache, attestation) -> CollateralCache:
    services.play_amd(attestation)
    collector = Collector(cache, vendors(services))
    assert collector.fetch_authorities([Product.MILAN, Product.TURIN]) == []
    serve_chip(services, attestation, "milan-v3-vcek")
    assert collector.vceks(parse_report(report_of(attestation, "milan-v3-vcek")))
    return cache


def test_bundles(filled, tmp_path, attestation):
    """What was exported is imported elsewhere, byte for byte."""
    out = io.BytesIO()
    assert filled.export(out) == len(filled.names()) == 9
    other = CollateralCache(tmp_path / "other")
    out.seek(0)
    assert other.import_bundle(out) == 9
    assert other.names() == filled.names()
    assert all((other.root / name).read_bytes() == (filled.root / name).read_bytes() for name in other.names())
    assert {entry.state(NOW) for entry in other.entries()} <= {"ok", "expired", "expires soon"}


def test_bundles_that_are_refused_whole(filled, tmp_path):
    """Other names, links, folders, garbage, a cut: nothing of it is taken."""
    name = filled.names()[0]
    good = (filled.root / name).read_bytes()

    def bundle(*members: tuple[str, bytes, bytes]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for path, kind, blob in members:
                info = tarfile.TarInfo(path)
                info.type, info.size, info.linkname = kind, len(blob) if kind == tarfile.REGTYPE else 0, "/etc/passwd"
                tar.addfile(info, io.BytesIO(blob))
        return out.getvalue()

    regular = tarfile.REGTYPE
    first = (name, regular, good)
    other = CollateralCache(tmp_path / "other")
    for bad in (
        bundle(first, ("../../etc/cron.d/x", regular, good)),
        bundle(first, ("/etc/x", regular, good)),
        bundle(first, ("snp/Milan/notes.txt", regular, b"x")),
        bundle(first, ("snp/Milan/vlek.crl", tarfile.SYMTYPE, b"")),
        bundle(first, ("snp/Milan", tarfile.DIRTYPE, b"")),
        bundle(first, first),
        bundle(first, ("snp/Milan/vlek.crl", regular, b"garbage")),
        bundle(first, ("tdx/00906ed50000-platform.json", regular, b"{}")),
        bundle(first)[:700],
        b"x" * 5000,
    ):
        with pytest.raises(BundleRefused):
            other.import_bundle(io.BytesIO(bad))
        assert not other.root.exists()


@given(blob=st.binary(max_size=300))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_entries_of_any_bytes(blob):
    """Every kind of file: an entry or a refusal, never another exception."""
    names = ("snp/Milan/vcek.crl", "snp/Turin/vlek-chain.pem", f"snp/Milan/{'0' * 128}-bl0-tee0-snp0-ucode0.der")
    names += ("sev/Naples/ask-ark.cert", "sev/Turin/ask-ark.cert", f"sev/cek/{'0' * 128}.cert")
    for name in (*names, "tdx/00906ed50000-platform.json", blob.hex()):
        with pytest.raises(MalformedEvidence):
            read_entry(name, blob)


def test_the_command(services, attestation, tmp_path, capsys):
    """fetch, status, export, import: against the played services, without the service; 69 for what is missing."""
    services.play_amd(attestation, lists=False)
    serve_chip(services, attestation, "milan-v3-vcek")
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    places = ["--kds", services.url, "--pcs", services.url, "--root-crl", f"{services.url}/root.crl"]
    places += ["--ca-file", str(services.certificate)]
    report = str(attestation / "snp/milan-v3-vcek/report.bin")
    words = ["collateral", "fetch", "--dir", here, *places]
    assert main(["--json", "collateral", "fetch", *words[2:], "--evidence", report]) == 69
    told = capsys.readouterr()
    found = json.loads(told.out)
    jsonout.check(["collateral", "fetch"], found)
    assert len(found["new"]) == 3
    assert "does not know" in told.err
    services.play_amd(attestation)
    assert main(["--json", *words]) == 0
    assert len(json.loads(capsys.readouterr().out)["new"]) == 10
    quote = attestation / "tdx/v4-uptodate/quote.bin"
    fmspc, ca = platform_of(quote.read_bytes())
    services.play_intel((quote.parent / "collateral.json").read_bytes(), fmspc, ca)
    assert main([*words, "--evidence", str(quote)]) == 0
    assert main([*words, "--platform", f"{fmspc}:{ca}"]) == 0
    assert main([*words, "--platform", "nonsense"]) == 2
    services.play_sev(attestation)
    services.add(f"/cek/id/{PROCESSOR.hex()}", sev_certificates(attestation, "rome")["cek"])
    sev = [*words, "--sev-authorities", f"{services.url}/sev"]
    assert main([*sev, "--sev-processor", PROCESSOR.hex().upper()]) == 0
    assert main([*sev, "--sev-processor", "00" * 8]) == 69
    for wrong in ("", "00", "0" * 17, "0" * 130, "../" * 6, "zz" * 8):
        assert main([*sev, "--sev-processor", wrong]) == 2
    assert main([*words, "--platform", "00906ED50000"]) == 69
    capsys.readouterr()
    assert main(["--json", "collateral", "status", "--dir", here, "--at", "2026-07-15"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["entries"]) == 17
    assert {entry["state"] for entry in shown["entries"]} <= {"ok", "expired", "expires soon"}
    assert any("expired" in line for line in shown["warnings"])
    (tmp_path / "here/snp/Milan/vlek.crl").write_bytes(b"x")
    assert main(["collateral", "status", "--dir", here]) == 0
    assert "damaged" in capsys.readouterr().out
    (tmp_path / "here/snp/Milan/vlek.crl").unlink()
    bundle = str(tmp_path / "bundle.tar")
    assert main(["collateral", "export", "--dir", here, bundle]) == 0
    assert main(["collateral", "export", "--dir", here, bundle]) == 1
    assert main(["collateral", "import", "--dir", there, bundle]) == 0
    assert main(["collateral", "import", "--dir", there, report]) == 2
    capsys.readouterr()
    # And judged with it, offline.
    assert main(["collateral", "status", "--dir", str(tmp_path / "empty")]) == 0
    assert "no revocation list" in capsys.readouterr().out


def test_dates_are_those_of_the_first_to_end(attestation):
    """TDX collateral ends with the first of its documents."""
    collateral = (attestation / "tdx/v4-uptodate/collateral.json").read_bytes()
    fmspc = json.loads(json.loads(collateral)["tcb_info"])["fmspc"].lower()
    entry = read_entry(f"tdx/{fmspc}-platform.json", collateral)
    update = datetime.fromisoformat(json.loads(json.loads(collateral)["tcb_info"])["nextUpdate"])
    assert entry.expires is not None
    assert entry.expires <= update.astimezone(UTC)
    with pytest.raises(MalformedEvidence, match="platforms"):
        read_entry("tdx/000000000000-platform.json", collateral)


def test_a_list_of_a_version_that_does_not_exist(attestation):
    """The library has an exception of its own for it."""
    path = next(iter(sorted((attestation / "tdx-test-pki/collateral").glob("*.json"))))
    told = json.loads(path.read_bytes())
    crl = bytes.fromhex(told["root_ca_crl"])
    version = crl.index(b"\x02\x01\x01\x30")
    assert version < 10
    told["root_ca_crl"] = (crl[:version] + b"\x02\x01\x08\x30" + crl[version + 4 :]).hex()
    fmspc = json.loads(told["tcb_info"])["fmspc"].lower()
    with pytest.raises(MalformedEvidence, match="cannot be read"):
        read_entry(f"tdx/{fmspc}-platform.json", json.dumps(told).encode())
