"""Vendors' services that misbehave: named, nothing of theirs kept, and none asked too often."""

import threading
from datetime import datetime

import pytest
from playedchips import report_of, serve_chip, vendors

from jindiskd.attest.collecting import ASKS_PER_HOUR, Collector, platform_of
from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.snp_report import Product, parse_report
from jindiskd.attest.vendors import MAX_BYTES, Vendors, VendorUnavailable
from jindiskd.errors import InvalidArgument

NOW = datetime.fromisoformat("2026-07-15T00:00:00Z")


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
