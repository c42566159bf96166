"""TDX verdicts against real quotes and collateral, and against a self-made hierarchy with every TCB status."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jindiskd.attest.ccel import check_replay, parse_event_log, replay
from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.tdx import TdxExpectations, TdxVerifier, VerifiedTdx, appraise_tdx, parse_collateral
from jindiskd.attest.tdx_quote import parse_quote

dcap_qvl = pytest.importorskip("dcap_qvl", reason="the Python package dcap-qvl is not installed")


@pytest.fixture(scope="module")
def entries(attestation: Path) -> list[dict]:
    known = json.loads((attestation / "manifest.json").read_text())["entries"]
    return [entry for entry in known if entry["kind"].startswith("tdx-quote")]


def at(entry: dict) -> datetime:
    return datetime.fromtimestamp(entry["now_unix"], UTC)


def load(attestation: Path, entry: dict) -> tuple[bytes, bytes, TdxVerifier]:
    root = (attestation / entry["root_ca"]).read_bytes() if "root_ca" in entry else None
    verifier = TdxVerifier(root_ca_der=root)
    return (attestation / entry["file"]).read_bytes(), (attestation / entry["collateral"]).read_bytes(), verifier


def expectations(quote: bytes, **changes) -> TdxExpectations:
    parsed = parse_quote(quote)
    return TdxExpectations(
        **{
            "mr_td": frozenset({parsed.mr_td}),
            "rtmrs": tuple(frozenset({value}) for value in parsed.rtmrs),
            "mr_config_id": frozenset({parsed.mr_config_id}),
            "mr_owner": frozenset({parsed.mr_owner}),
            "mr_owner_config": frozenset({parsed.mr_owner_config}),
            "allow_simulated": True,
            **changes,
        }
    )


def test_every_recorded_verdict(attestation, entries):
    """Each quote gets its recorded verdict, status, advisories and default decision; expiry and Intel's root refuse."""
    seen = set()
    for entry in entries:
        quote, collateral, verifier = load(attestation, entry)
        options = {"collateral": collateral, "report_data": parse_quote(quote).report_data, "now": at(entry)}
        expect = entry["expect"]
        default = entry.get("default_policy") or expect.get("default_policy")
        if expect["verdict"] == "rejected":
            with pytest.raises(EvidenceRefused) as info:
                verifier.verify(quote, **options)
            assert expect["error"].removeprefix("Verification failed: ")[:20] in str(info.value), entry["file"]
            assert default in {"reject", None}
        else:
            verified = verifier.verify(quote, **options)
            assert expect["tcb_status"] == verified.status, entry["file"]
            assert set(expect["advisory_ids"]) == verified.advisory_ids
            findings = appraise_tdx(verified, expectations(quote), now=at(entry))
            assert (not findings) == (verified.status == "UpToDate"), (entry["file"], findings)
            if default:
                assert (default == "accept") == (not findings)
            with pytest.raises(EvidenceRefused, match=r"tdx\.quote"):
                verifier.verify(quote, **{**options, "now": at(entry) + timedelta(days=3650)})
            seen.add(verified.status)
        if "root_ca" in entry:
            with pytest.raises(EvidenceRefused):
                TdxVerifier().verify(quote, **options)
    assert {"UpToDate", "OutOfDate", "SWHardeningNeeded", "ConfigurationNeeded"} <= seen
    assert len(entries) >= 20


def test_decoded_fields(attestation, entries):
    """Every field is read as recorded, and as the library reads it."""
    for entry in entries:
        blob = (attestation / entry["file"]).read_bytes()
        quote = parse_quote(blob)
        report = dcap_qvl.parse_quote(blob).report
        for ours, theirs in (("mr_td", "mr_td"), ("mr_seam", "mr_seam"), ("report_data", "report_data"),
                             ("mr_config_id", "mr_config_id"), ("mr_owner", "mr_owner"), ("xfam", "xfam"),
                             ("mr_owner_config", "mr_owner_config"), ("tee_tcb_svn", "tee_tcb_svn"),
                             ("mr_signer_seam", "mr_signer_seam"), ("seam_attributes", "seam_attributes")):
            assert getattr(report, theirs) == getattr(quote, ours), ours
        assert report.td_attributes == quote.td_attributes.to_bytes(8, "little")
        assert (report.rt_mr0, report.rt_mr1, report.rt_mr2, report.rt_mr3) == quote.rtmrs
        if quote.mr_service_td is not None:
            assert report.mr_service_td == quote.mr_service_td
        fields = entry.get("fields", {})
        if fields:
            assert fields["quote_version"] == quote.version
            assert fields["quote_len"] == len(quote.quote) + quote.padding_bytes
            assert fields["signed_len"] == quote.signed_bytes
            assert fields["mr_td"] == quote.mr_td.hex()
            assert fields["rt_mr2"] == quote.rtmrs[2].hex()


def test_status_of_the_library_is_the_merged_one(attestation, entries):
    """The status taken from the detailed claims is the one that the library's short answer merges."""
    for entry in entries:
        if entry["expect"]["verdict"] == "rejected":
            continue
        quote, collateral, verifier = load(attestation, entry)
        root = (attestation / entry["root_ca"]).read_bytes() if "root_ca" in entry else None
        given = dcap_qvl.QuoteCollateralV3.from_json(collateral.decode())
        seconds = entry["now_unix"]
        if root:
            short = dcap_qvl.verify_with_root_ca(quote, given, root, seconds)
        else:
            short = dcap_qvl.verify(quote, given, seconds)
        verified = verifier.verify(quote, collateral=collateral, report_data=None, now=at(entry))
        assert short.status == verified.status
        assert set(short.advisory_ids) == verified.advisory_ids


@pytest.fixture(scope="module")
def genuine(attestation, entries) -> tuple[VerifiedTdx, bytes, datetime]:
    entry = next(entry for entry in entries if entry["file"] == "tdx-test-pki/v4-uptodate.bin")
    quote, collateral, verifier = load(attestation, entry)
    return verifier.verify(quote, collateral=collateral, report_data=None, now=at(entry)), quote, at(entry)


def test_appraisal_of_every_row(genuine):
    """Each expectation, alone, refuses a quote that falls short of it."""
    verified, quote, now = genuine
    other = b"o" * 48
    rows = [
        ({"allow_simulated": False}, {}, "tdx.simulated"),
        ({"mr_td": frozenset()}, {}, "tdx.mr_td"),
        *(
            ({"rtmrs": tuple(frozenset({other}) if n == number else None for n in range(4))}, {}, f"tdx.rtmr{number}")
            for number in range(4)
        ),
        ({"mr_config_id": frozenset({other})}, {}, "tdx.mr_config_id"),
        ({"mr_owner": frozenset({other})}, {}, "tdx.mr_owner"),
        ({"mr_owner_config": frozenset({other})}, {}, "tdx.mr_owner_config"),
        ({"mr_seam": frozenset({other})}, {}, "tdx.mr_seam"),
        ({"minimum_tcb_evaluation": verified.tcb_evaluation + 1}, {}, "tdx.tcb_evaluation"),
        ({"ppids": frozenset()}, {}, "tdx.ppid"),
        ({"require_smt_off": True}, {"smt_enabled": True}, "tdx.platform.smt"),
        ({"require_smt_off": True}, {"smt_enabled": None}, "tdx.platform.smt"),
        ({"require_static_platform": True}, {"dynamic_platform": True}, "tdx.platform.dynamic"),
        ({"require_no_cached_keys": True}, {"cached_keys": True}, "tdx.platform.cached_keys"),
        ({}, {"status": "OutOfDate"}, "tdx.status"),
        ({"grace": timedelta(days=1)}, {"status": "OutOfDate", "tcb_date": now - timedelta(days=2)}, "tdx.status"),
        ({"grace": timedelta(days=9)}, {"status": "ConfigurationNeeded", "tcb_date": now}, "tdx.status"),
        (
            {"statuses": frozenset({"SWHardeningNeeded"})},
            {"status": "SWHardeningNeeded", "advisory_ids": frozenset({"INTEL-SA-1"})},
            "tdx.advisory",
        ),
    ]
    for wanted, changes, finding in rows:
        found = appraise_tdx(replace(verified, **changes), expectations(quote, **wanted), now=now)
        assert [finding] == [one.id for one in found], (wanted, changes)
    for wanted, changes in [
        ({}, {}),
        ({"grace": timedelta(days=3)}, {"status": "OutOfDate", "tcb_date": now - timedelta(days=2)}),
        (
            {"statuses": frozenset({"SWHardeningNeeded"}), "advisories": frozenset({"INTEL-SA-1"})},
            {"status": "SWHardeningNeeded", "advisory_ids": frozenset({"INTEL-SA-1"})},
        ),
        ({"require_smt_off": True}, {"smt_enabled": False}),
    ]:
        assert appraise_tdx(replace(verified, **changes), expectations(quote, **wanted), now=now) == []
    assert {"tdx.mr_td", "tdx.rtmr0", "tdx.rtmr1", "tdx.rtmr2", "tdx.simulated"} <= {
        one.id for one in appraise_tdx(verified, TdxExpectations(), now=now)
    }


def test_all_findings_together(attestation, entries):
    """A debug quote for another challenge is refused with our reasons and the library's."""
    entry = next(entry for entry in entries if entry["file"] == "tdx-test-pki/v4-debug.bin")
    quote, collateral, verifier = load(attestation, entry)
    with pytest.raises(EvidenceRefused) as info:
        verifier.verify(quote, collateral=collateral, report_data=bytes(64), now=at(entry))
    assert {"tdx.report_data", "tdx.debug", "tdx.quote"} == {finding.id for finding in info.value.findings}


def test_flipped_bits(attestation, entries):
    """A change of any byte of a real quote's signed part, or of its signatures, is refused."""
    entry = next(entry for entry in entries if entry["file"] == "tdx/v5-td15-uptodate/quote.bin")
    quote, collateral, verifier = load(attestation, entry)
    signatures = parse_quote(quote).signed_bytes + 4 + 64 + 64 + 6 + 384 + 64
    for place in range(0, signatures, 3):
        changed = bytearray(quote)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises((EvidenceRefused, MalformedEvidence)):
            verifier.verify(bytes(changed), collateral=collateral, report_data=None, now=at(entry))


def test_padding(attestation, entries):
    """Zeros after a quote are ignored, as real hosts pad; anything else there is refused."""
    entry = next(entry for entry in entries if entry["file"] == "tdx/v4-gcp-ccel/quote.bin")
    quote, collateral, verifier = load(attestation, entry)
    assert len(quote) == 8000
    parsed = parse_quote(quote)
    assert len(parsed.quote) + parsed.padding_bytes == 8000
    assert parsed.padding_bytes > 0
    verifier.verify(quote, collateral=collateral, report_data=None, now=at(entry))
    with pytest.raises(MalformedEvidence, match="follows"):
        parse_quote(quote[:-1] + b"\1")
    with pytest.raises(MalformedEvidence):
        parse_quote(quote[:1000])
    sgx = bytearray(quote)
    sgx[4] = 0
    with pytest.raises(MalformedEvidence, match="not TDX"):
        parse_quote(bytes(sgx))


def test_event_log(attestation):
    """A real log replays to its quote's registers; a changed one does not."""
    log = (attestation / "ccel/gcp-cos-113/ccel.bin").read_bytes()
    quote = parse_quote((attestation / "tdx/v4-gcp-ccel/quote.bin").read_bytes())
    events = parse_event_log(log)
    assert quote.rtmrs == replay(events)
    assert check_replay(events, quote.rtmrs) == []
    assert any(event.data_is_digested for event in events)
    assert check_replay(events[:-1], quote.rtmrs) != []
    changed = [replace(events[5], digest=bytes(48)) if number == 5 else event for number, event in enumerate(events)]
    assert {"tdx.event_log"} == {finding.id for finding in check_replay(changed, quote.rtmrs)}


def test_collateral_files(attestation):
    """Every recorded collateral file is read; damaged ones are refused."""
    seen = 0
    for path in sorted(attestation.glob("tdx*/**/*.json")):
        assert len(parse_collateral(path.read_bytes())) == 9
        seen += 1
    assert seen >= 25
    for data in (b"", b"[]", b"{}", b"[" * 100000, b'{"tcb_info": 1}', b"\xff", b" " * (2 << 20)):
        with pytest.raises(MalformedEvidence):
            parse_collateral(data)
