"""Collateral that is fetched from played services when a guest's evidence needs it, and what is judged with it."""

import io
import json
from datetime import datetime, timedelta

import pytest
from playedchips import PROCESSOR, report_of, serve_chip, sev_certificates, vendors

from jindiskd.attest.collateral import CollateralCache
from jindiskd.attest.collecting import CachingSnpVerifier, Collector, genuine_verifiers, platform_of
from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.snp_report import Product
from jindiskd.attest.tdx import TdxVerifier
from jindiskd.attest.tdx_quote import parse_quote
from jindiskd.attest.verifier import Evidence, TdxJudge
from jindiskd.base.platform import Tee

NOW = datetime.fromisoformat("2026-07-15T00:00:00Z")
CASES = ("milan-v2-vcek", "milan-v3-vcek", "genoa-v5-vcek", "turin-v5-vcek")


@pytest.mark.parametrize("case", CASES)
def test_a_report_alone_is_judged_with_what_is_fetched(services, cache, attestation, case):
    """Bare evidence of a real chip: asked for once, kept, and enough from then on without any service."""
    services.play_amd(attestation, lists=False)
    path = serve_chip(services, attestation, case)
    collector = Collector(cache, vendors(services))
    product = Product(case.partition("-")[0].capitalize())
    assert len(collector.fetch_authorities([product])) == 2  # the lists
    verifier, evidence = CachingSnpVerifier(collector), Evidence(tee=Tee.SNP, blob=report_of(attestation, case))
    for _ in range(2):
        assert verifier.judge(evidence, report_data=None, now=NOW).product is product
    assert services.asked[path] == 1
    offline = CachingSnpVerifier(Collector(CollateralCache(cache.root)))
    assert offline.judge(evidence, report_data=None, now=NOW).product is product
    other = "turin-v5-vcek" if product is not Product.TURIN else "milan-v3-vcek"
    with pytest.raises(EvidenceRefused, match=r"certificate\.missing"):
        offline.judge(Evidence(tee=Tee.SNP, blob=report_of(attestation, other)), report_data=None, now=NOW)


def test_a_wrong_certificate_of_the_host_is_put_right(services, cache, attestation):
    """A host's table may be of other firmware versions or another chip: that of the cache is taken then."""
    services.play_amd(attestation, lists=False)
    serve_chip(services, attestation, "milan-v3-vcek")
    collector = Collector(cache, vendors(services))
    collector.fetch_authorities([Product.MILAN])
    wrong = (attestation / "snp/milan-v2-vcek/vek.der").read_bytes()
    blob = report_of(attestation, "milan-v3-vcek")
    evidence = Evidence(tee=Tee.SNP, blob=blob, certificates=(wrong,))
    assert CachingSnpVerifier(collector).judge(evidence, report_data=None, now=NOW).product is Product.MILAN
    altered = Evidence(tee=Tee.SNP, blob=blob[:0x90] + bytes([blob[0x90] ^ 1]) + blob[0x91:], certificates=(wrong,))
    with pytest.raises(EvidenceRefused, match=r"snp\.signature"):
        CachingSnpVerifier(collector).judge(altered, report_data=None, now=NOW)


def test_lists_count_as_soon_as_they_are_there(cache, attestation):
    """The verifier reads authorities and lists again when they change."""
    product = "milan"
    pem = (attestation / f"amd-roots/{product}/vcek_cert_chain.pem").read_bytes()
    evidence = Evidence(
        tee=Tee.SNP,
        blob=report_of(attestation, "milan-v3-vcek"),
        certificates=((attestation / "snp/milan-v3-vcek/vek.der").read_bytes(),),
    )
    verifier = CachingSnpVerifier(Collector(cache))
    with pytest.raises(EvidenceRefused, match=r"chain\.incomplete"):
        verifier.judge(evidence, report_data=None, now=NOW)
    cache.put("snp/Milan/vcek-chain.pem", pem)
    assert verifier.judge(evidence, report_data=None, now=NOW).crl_issued is None
    # A list by a stranger of the same name is no list of AMD's, and says so.
    cache.put("snp/Milan/vcek.crl", (attestation / "snp-test-pki/milan/crl.der").read_bytes())
    with pytest.raises(EvidenceRefused) as refused:
        verifier.judge(evidence, report_data=None, now=NOW)
    assert {finding.id for finding in refused.value.findings} <= {"snp.crl.signature", "snp.crl.dates"}


def test_tdx_collateral(services, cache, attestation):
    """Put together from Intel's five answers, byte for byte what was signed; the quote verifies with it, also later."""
    folder = attestation / "tdx/v4-uptodate"
    quote, collateral = (folder / "quote.bin").read_bytes(), (folder / "collateral.json").read_bytes()
    fmspc, ca = platform_of(parse_quote(quote).quote)
    services.play_intel(collateral, fmspc, ca)
    entries = json.loads((attestation / "manifest.json").read_text())["entries"]
    now = datetime.fromisoformat(next(e["now"] for e in entries if e["file"] == "tdx/v4-uptodate/quote.bin"))
    clock = [now]
    collector = Collector(cache, vendors(services), now=lambda: clock[0])
    evidence = Evidence(tee=Tee.TDX, blob=quote)
    judge = TdxJudge(TdxVerifier(), collector.tdx)
    for _ in range(2):
        assert judge.judge(evidence, report_data=None, now=now).status == "UpToDate"
    assert set(services.asked.values()) == {1}
    assert json.loads(cache.tdx(fmspc, ca))["tcb_info"] == json.loads(collateral)["tcb_info"]
    offline = genuine_verifiers(Collector(CollateralCache(cache.root)))
    assert [verifier.tee for verifier in offline] == [Tee.SNP, Tee.TDX]
    assert offline[1].judge(evidence, report_data=None, now=now).status == "UpToDate"
    # A month later it is over: asked for anew, and what there is stays where Intel does not answer.
    clock[0] = now + timedelta(days=400)
    with pytest.raises(EvidenceRefused, match=r"tdx\.quote"):
        judge.judge(evidence, report_data=None, now=clock[0])
    assert set(services.asked.values()) == {2}
    services.answers.clear()
    assert collector.tdx(parse_quote(quote)) == cache.tdx(fmspc, ca)
    assert cache.tdx(fmspc, ca) is not None
    bare = TdxJudge(TdxVerifier(), Collector(CollateralCache(cache.root / "none")).tdx)
    with pytest.raises(EvidenceRefused, match=r"collateral\.missing"):
        bare.judge(evidence, report_data=None, now=now)


@pytest.mark.parametrize("generation", ["Naples", "Rome"])
def test_sev_certificates(services, cache, attestation, tmp_path, generation):
    """The CEK by the processor's id, and of the authorities those that signed it; then from a bundle."""
    there = sev_certificates(attestation, generation.lower())
    services.play_sev(attestation)
    services.add(f"/cek/id/{PROCESSOR.hex()}", there["cek"])
    collector = Collector(cache, vendors(services, sev=f"{services.url}/sev"))
    assert collector.fetch_sev(PROCESSOR) == []
    asked = ["Naples"] if generation == "Naples" else ["Naples", "Rome"]
    assert cache.names() == [*(f"sev/{one}/ask-ark.cert" for one in asked), f"sev/cek/{PROCESSOR.hex()}.cert"]
    out = io.BytesIO()
    cache.export(out)
    out.seek(0)
    other = CollateralCache(tmp_path / "other")
    assert other.import_bundle(out) == len(cache.names())
    offline = Collector(other)
    assert offline.cek(PROCESSOR) == there["cek"]
    assert offline.sev_authorities(there["cek"]) == (there["ask"], there["ark"])
    assert offline.cek(bytes(64)) is None
    # SEV certificates have no dates: they are of use for ever.
    assert {(entry.state(NOW), entry.expires) for entry in other.entries()} == {("ok", None)}


def test_sev_certificates_that_are_not(services, cache, attestation):
    """Another certificate, an unsigned CEK, another generation's authorities, a cut: named, and nothing is kept."""
    naples, rome = sev_certificates(attestation, "naples"), sev_certificates(attestation, "rome")
    collector = Collector(cache, vendors(services, sev=f"{services.url}/sev"))
    unsigned = naples["cek"][:0x414] + bytes(1040)
    for body in (naples["pek"], unsigned, naples["cek"][:-1], naples["cek"] + b"x", naples["ask"], b"<html>"):
        services.add(f"/cek/id/{PROCESSOR.hex()}", body)
        (problem,) = collector.fetch_sev(PROCESSOR)
        assert isinstance(problem, MalformedEvidence), body
        assert collector.cek(PROCESSOR) is None
    services.add(f"/cek/id/{PROCESSOR.hex()}", naples["cek"])
    altered = bytearray(naples["ask"])
    altered[100] ^= 1
    bad = (
        rome["ask"] + rome["ark"],
        naples["ark"] + naples["ask"],
        naples["ask"] + naples["ask"],
        bytes(altered) + naples["ark"],
        naples["ask"],
        naples["ask"] + naples["ark"] + b"x",
        naples["ask"] + (attestation / "sev/certs/naples/ark.cert.bad").read_bytes(),
    )
    for body in bad:
        services.add("/sev/ask_ark_naples.cert", body)
        assert any(isinstance(problem, MalformedEvidence) for problem in collector.fetch_sev(PROCESSOR))
        assert cache.sev_authorities() == []
        assert collector.sev_authorities(naples["cek"]) is None
    assert cache.names() == [f"sev/cek/{PROCESSOR.hex()}.cert"]
    # Authorities that are genuine and of another generation signed something else.
    services.play_sev(attestation)
    services.add("/sev/ask_ark_naples.cert", b"")
    assert collector.fetch_sev(PROCESSOR) != []
    assert collector.sev_authorities(naples["cek"]) is None
