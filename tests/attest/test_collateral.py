"""Collateral: fetched from played services, kept, carried in bundles, judged with; and services that misbehave."""

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jsonout
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vendorbench import Played

from jindiskd.attest.collateral import BundleRefused, CollateralCache, read_entry
from jindiskd.attest.collecting import ASKS_PER_HOUR, CachingSnpVerifier, Collector, genuine_verifiers, platform_of
from jindiskd.attest.model import EvidenceRefused, MalformedEvidence
from jindiskd.attest.snp_report import Product, parse_report
from jindiskd.attest.tdx import TdxVerifier
from jindiskd.attest.tdx_quote import parse_quote
from jindiskd.attest.vendors import MAX_BYTES, Vendors, VendorUnavailable
from jindiskd.attest.verifier import Evidence, TdxJudge
from jindiskd.base.platform import Tee
from jindiskd.cli.main import main
from jindiskd.errors import InvalidArgument

NOW = datetime.fromisoformat("2026-07-15T00:00:00Z")
CASES = ("milan-v2-vcek", "milan-v3-vcek", "genoa-v5-vcek", "turin-v5-vcek")


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Played]:
    with Played(tmp_path) as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> CollateralCache:
    return CollateralCache(tmp_path / "cache")


def vendors(services: Played, **options) -> Vendors:
    given = {"kds": services.url, "pcs": services.url, "root_crl": f"{services.url}/root.crl"}
    return Vendors(**{**given, "context": services.context(), "timeout_s": 20, **options})


def report_of(attestation: Path, case: str) -> bytes:
    return (attestation / "snp" / case / "report.bin").read_bytes()


def serve_chip(services: Played, attestation: Path, case: str) -> str:
    """Let the played service know the chip of a recorded report; returns the path by which it is asked."""
    product = Product(case.partition("-")[0].capitalize())
    report = parse_report(report_of(attestation, case), product=product)
    chip = report.chip_id[:8] if product.has_fmc else report.chip_id
    tcb = report.reported_tcb
    first = f"fmcSPL={tcb.fmc:02d}&" if product.has_fmc else ""
    query = f"{first}blSPL={tcb.bootloader:02d}&teeSPL={tcb.tee:02d}&snpSPL={tcb.snp:02d}&ucodeSPL={tcb.microcode:02d}"
    path = f"/vcek/v1/{product}/{chip.hex()}?{query}"
    services.add(path, (attestation / "snp" / case / "vek.der").read_bytes())
    return path


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


PROCESSOR = bytes(range(64))


def sev_certificates(attestation: Path, generation: str) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (attestation / "sev/certs" / generation).glob("*.cert")}


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


# Services that misbehave


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((500, {}, b"x"), "status 500"),
        ((302, {"Location": "https://elsewhere.example"}, b""), "status 302"),
        ((404, {}, b""), "does not know"),
        ((429, {"Retry-After": "77"}, b""), "too often"),
        ((200, {}, b""), "nothing"),
        ((200, {}, b"x" * (MAX_BYTES + 1)), "more than"),
        ((200, {"Content-Length": "4000"}, b"short"), "cannot be asked"),
    ],
)
def test_bad_answers(services, cache, answer, problem):
    """Named, and nothing is kept."""
    services.special["/vcek"] = answer
    with pytest.raises(VendorUnavailable, match=problem):
        vendors(services).snp_authorities(Product.MILAN, "vcek")
    assert len(Collector(cache, vendors(services)).fetch_authorities([Product.MILAN])) == 4
    assert cache.names() == []


def test_garbage_is_not_kept(services, cache, attestation):
    """What is no certificate, or one of something else, does not get into the cache, nor in the place of a good one."""
    services.play_amd(attestation, lists=False)
    collector = Collector(cache, vendors(services))
    collector.fetch_authorities([Product.MILAN])
    good = cache.authorities()
    for garbage in (b"\0" * 100, b"<html>", (attestation / "snp-test-pki/milan/crl.der").read_bytes()):
        services.special["/vcek/v1/Milan/cert_chain"] = (200, {}, garbage)
        assert any(isinstance(problem, MalformedEvidence) for problem in collector.fetch_authorities([Product.MILAN]))
        assert cache.authorities() == good
    # The certificate of another chip is not that of this one, whatever the service says.
    path = serve_chip(services, attestation, "milan-v3-vcek")
    services.add(path, (attestation / "snp/milan-v2-vcek/vek.der").read_bytes())
    assert collector.vceks(parse_report(report_of(attestation, "milan-v3-vcek"))) == []


def test_a_service_that_fails_is_left_alone(services):
    """Not asked again before the time it names, or one that doubles; asked again afterwards, and forgiven."""
    clock = [0.0]
    client = vendors(services, clock=lambda: clock[0])
    asked = services.asked

    def ask() -> str:
        try:
            client.snp_authorities(Product.MILAN, "vcek")
        except VendorUnavailable as exc:
            return exc.problem
        return ""

    services.special["/vcek"] = (429, {"Retry-After": "60"}, b"")
    assert ask() == ask() == "has been asked too often"
    assert asked["/vcek/v1/Milan/cert_chain"] == 1
    clock[0] = 59.0
    ask()
    assert asked["/vcek/v1/Milan/cert_chain"] == 1
    clock[0] = 61.0
    services.special["/vcek"] = (503, {"Retry-After": "x"}, b"")
    ask()
    assert asked["/vcek/v1/Milan/cert_chain"] == 2
    clock[0] = 61.0 + 119.0
    ask()
    assert asked["/vcek/v1/Milan/cert_chain"] == 2
    clock[0] += 2.0
    services.special["/vcek"] = (200, {}, b"fine")
    assert ask() == ""
    services.special["/vcek"] = (503, {}, b"")
    ask()
    clock[0] += 11.0
    ask()
    assert asked["/vcek/v1/Milan/cert_chain"] == 5


def test_many_who_want_the_same_ask_once(services):
    """Twenty threads, one request; all get its answer, or all its failure."""
    gate = threading.Event()

    def slow():
        gate.wait(20)
        return 200, {}, b"the chain"

    services.special["/vcek/v1/Milan"] = slow
    client = vendors(services)
    found: list[object] = []

    def want() -> None:
        try:
            found.append(client.snp_authorities(Product.MILAN, "vcek"))
        except VendorUnavailable as exc:
            found.append(exc.problem)

    threads = [threading.Thread(target=want) for _ in range(20)]
    for thread in threads:
        thread.start()
    while len(client._flights) < 1 or client.waiting < 19:
        threading.Event().wait(0.01)
    gate.set()
    for thread in threads:
        thread.join()
    assert found.count(b"the chain") == 20
    assert services.asked["/vcek/v1/Milan/cert_chain"] == 1


def test_strangers_and_plain_http(services, tmp_path):
    """Another's TLS certificate is not spoken to; addresses are https."""
    stranger = Vendors(kds=services.url, timeout_s=20)
    with pytest.raises(VendorUnavailable, match="SSL"):
        stranger.snp_authorities(Product.MILAN, "vcek")
    assert not services.asked
    for url in ("http://127.0.0.1", "https://", "file:///etc/passwd", "https://a@b", "https://x/?q=1"):
        with pytest.raises(InvalidArgument):
            Vendors(kds=url)
    closed = Vendors(kds="https://127.0.0.1:1", timeout_s=20)
    with pytest.raises(VendorUnavailable, match="cannot be asked"):
        closed.snp_authorities(Product.MILAN, "vcek")
    with pytest.raises(InvalidArgument):
        vendors(services).tdx("zz", "platform")


def test_guests_cannot_have_the_services_asked_for_ever(services, cache, attestation):
    """Each bare report of a chip that is not known costs a question; there are so many an hour."""
    clock = [0.0]
    collector = Collector(cache, vendors(services), clock=lambda: clock[0])
    blob = bytearray(report_of(attestation, "milan-v3-vcek"))
    for number in range(ASKS_PER_HOUR + 20):
        blob[0x1A0:0x1A4] = number.to_bytes(4, "little")
        assert collector.vceks(parse_report(bytes(blob))) == []
    assert sum(services.asked.values()) == ASKS_PER_HOUR
    clock[0] = 3601.0
    blob[0x1A0] ^= 0xFF
    collector.vceks(parse_report(bytes(blob)))
    assert sum(services.asked.values()) == ASKS_PER_HOUR + 1
    blob[0x1A0:0x1E0] = bytes(64)
    assert collector.vceks(parse_report(bytes(blob))) == []
    assert sum(services.asked.values()) == ASKS_PER_HOUR + 1


@pytest.mark.parametrize("change", ["signature", "header", "json", "deep"])
def test_intel_s_answers_altered(services, cache, attestation, change):
    """Refused when it is put together, not when a guest waits for it."""
    collateral = (attestation / "tdx/v4-uptodate/collateral.json").read_bytes()
    fmspc, ca = platform_of((attestation / "tdx/v4-uptodate/quote.bin").read_bytes())
    services.play_intel(collateral, fmspc, ca)
    path = f"/tdx/certification/v4/tcb?fmspc={fmspc.upper()}"
    status, headers, body = services.answers[path]
    services.answers[path] = {
        "signature": (status, headers, body.replace(b'"signature":"', b'"signature":"zz')),
        "header": (status, {}, body),
        "json": (status, headers, body[:-5]),
        "deep": (status, headers, b"[" * 100_000),
    }[change]
    with pytest.raises(MalformedEvidence):
        vendors(services).tdx(fmspc, ca)


# Bundles


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


# The command


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
