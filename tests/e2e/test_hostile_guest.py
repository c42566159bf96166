"""Guests that mean harm, played against the whole service: each launch ends with its error, and no key leaves.

Bus, libvirtd, machine, vsock device, broker and simulated firmware are real; the machine's kernel does nothing, and
the test speaks in the guest's place.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from played import PROGRESS, REQUEST, Played

from jindiskd.kbs import jwk
from jindiskd.kbs.client import BrokerNotTrusted, BrokerRefused

from .conftest import Host, virsh

pytestmark = [pytest.mark.host, pytest.mark.slow]
REFUSED, FAILED = 7, 1


@pytest.fixture
def launch(bare: Host) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Played]]]:
    """Begins a launch and gives its guest; afterwards the domain is gone, and nothing was released by these tests."""
    made: list[Played] = []
    running: list[subprocess.Popen[str]] = []
    before = len([row for row in bare.rows() if row["kind"] == "released"])

    def begin(name: str = "one", *words: str) -> tuple[subprocess.Popen[str], Played]:
        running.append(bare.spawn("launch", name, *words))
        made.append(bare.play(name, running[-1]))
        return running[-1], made[-1]

    yield begin
    for guest in made:
        guest.close()
    for process in running:
        process.terminate()
        process.communicate(timeout=120)
    bare.clear()
    assert len([row for row in bare.rows() if row["kind"] == "released"]) == before
    bare.until(lambda: not bare.strays(), "the end of all machines")
    assert virsh("list", "--all", "--name").split() == []


def ended(process: subprocess.Popen[str], status: int, text: str) -> None:
    """The launch ended with this status and says this, in one sentence."""
    _, err = process.communicate(timeout=300)
    last = err.strip().splitlines()[-1]
    assert process.returncode == status, err
    assert text in last
    assert last.startswith("jindiskctl: ")


def test_one_that_never_speaks(bare: Host, launch) -> None:
    """Its time runs out, and the sentence says how far it came."""
    process, _ = launch("one", "--timeout", "10")
    ended(process, FAILED, "came as far as started")
    assert bare.domain("one")["State"] == "failed"


@pytest.mark.long
def test_one_that_connects_and_says_nothing(bare: Host, launch) -> None:
    """On every port, as often as it can: the launch ends in time all the same, and with it the connections."""
    process, guest = launch("one", "--timeout", "10")
    held = [guest.connect(port) for port in (19012, 19013, 19014) for _ in range(100)]
    ended(process, FAILED, "came as far as started")
    for stream in held:
        with contextlib.suppress(ConnectionError):
            while stream.recv(1 << 16):  # ends: a time-out would be an error
                pass
        stream.close()


@pytest.mark.parametrize(
    ("garbage", "finding"),
    [
        (b"\x00\xff" * 5000, "evidence.malformed"),
        pytest.param(b"[" * 200_000, "evidence.malformed", marks=pytest.mark.long),
        pytest.param(b'{"tee-evidence": {"primary_evidence": {}}}', "evidence.malformed", marks=pytest.mark.long),
    ],
)
def test_one_that_speaks_garbage_for_evidence(bare: Host, launch, garbage: bytes, finding: str) -> None:
    """Refused, with the reason in the sentence and in the audit log."""
    process, guest = launch()
    cookie, _ = guest.session()
    status, _, _ = guest.ask("POST", "/kbs/v0/attest", garbage, cookie)
    assert status == 401
    ended(process, REFUSED, "refused")
    assert any(finding in text for text in bare.refusal())


@pytest.mark.long
def test_one_that_speaks_garbage_on_every_port(bare: Host, launch) -> None:
    """What is no TLS, no report request and no progress word is dropped, and the launch is not helped by it."""
    process, guest = launch("one", "--timeout", "15")
    for port in (19012, 19013, PROGRESS):
        with guest.connect(port) as stream, contextlib.suppress(OSError):
            stream.sendall(b"\xff\x00running\r\nfail E99999\n" * 1000)
            stream.recv(4096)
    with guest.connect() as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in raw.recv(4096)  # at most an alert of TLS
    guest.say("attested", "unlocked", "running")  # known words, in the wrong order: not believed
    ended(process, FAILED, "came as far as started")


@pytest.mark.parametrize("chunked", [False, pytest.param(True, marks=pytest.mark.long)])
def test_one_that_sends_100_megabytes(bare: Host, launch, chunked: bool) -> None:
    """All that it manages to send is thrown away: the service does not grow, and the others are served."""
    process, guest = launch("one", "--timeout", "60")
    before = resident_kib(bare)
    head = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 104857600"
    block, sent, peak = b"x" * (1 << 20), 0, before
    with guest.tls() as stream, contextlib.suppress(OSError):
        stream.sendall(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        while sent < 100 << 20:
            stream.sendall(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
            sent += len(block)
            peak = max(peak, resident_kib(bare))
    assert peak - before < 32 << 10
    assert process.poll() is None
    bare.ctl("status")
    cookie, _ = guest.session()
    status, _, _ = guest.ask("POST", "/kbs/v0/attest", b"{}", cookie)
    assert status == 401
    ended(process, REFUSED, "refused")


def resident_kib(host: Host) -> int:
    assert host.daemon is not None
    return int(Path(f"/proc/{host.daemon.pid}/status").read_text().split("VmRSS:")[1].split()[0])


@pytest.mark.long
def test_one_that_sends_slowly(bare: Host, launch) -> None:
    """A byte at a time: when the launch's time is over it is cut off in the middle."""
    process, guest = launch("one", "--timeout", "10")
    stream = guest.tls()
    end = time.monotonic() + 120
    with contextlib.suppress(OSError):
        stream.settimeout(60)
        for octet in b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 10_000:
            stream.sendall(bytes([octet]))
            time.sleep(0.05)
            assert time.monotonic() < end
            if process.poll() is not None:
                stream.recv(1)
                break
    stream.close()
    ended(process, FAILED, "came as far as started")


def test_one_that_replays_a_report(bare: Host, launch) -> None:
    """A report of this very launch, made for an earlier challenge, binds neither nonce nor key of the present one."""
    process, guest = launch()
    _, nonce = guest.session()
    earlier = guest.attestation(nonce)
    cookie, nonce = guest.session()
    later = guest.attestation(nonce)
    later["tee-evidence"] = earlier["tee-evidence"]
    status, answer = guest.attest(later, cookie)
    assert status == 401
    assert b"report" not in answer
    ended(process, REFUSED, "refused")
    assert any("snp.report_data" in text for text in bare.refusal())


@pytest.mark.long
def test_one_that_replays_a_whole_attestation(bare: Host, launch) -> None:
    """What another session sent, word for word: its nonce is not this session's."""
    process, guest = launch()
    _, nonce = guest.session()
    recorded = guest.attestation(nonce)
    cookie, _ = guest.session()
    assert guest.attest(recorded, cookie)[0] == 401
    ended(process, REFUSED, "refused")
    assert any("session.nonce" in text for text in bare.refusal())


@pytest.mark.long
def test_one_with_a_report_of_another_launch(bare: Host, launch) -> None:
    """Genuine, fresh, for its nonce and key, and of the wrong machine: the other image's digest is not this one's."""
    cmdline = bare.image("two") / "cmdline"
    original = cmdline.read_text()
    cmdline.write_text(original + " altered")
    try:
        process, guest = launch()
        _, other = launch("two")
    finally:
        cmdline.write_text(original)
    cookie, nonce = guest.session()
    thief = Played(guest.home, guest.pin)
    thief.evidence = other.evidence  # type: ignore[method-assign]
    assert guest.attest(thief.attestation(nonce), cookie)[0] == 200  # a genuine report
    status, _, body = guest.ask("GET", f"/kbs/v0/resource/{bare.resource('one')}", cookie=cookie)
    assert (status, json.loads(body)["type"].rsplit("/", 1)[-1]) == (401, "PolicyDeny")
    ended(process, REFUSED, "launch digest")


def test_one_that_asks_for_another_images_key(bare: Host, launch) -> None:
    """Its own launch is as it should be, and it gets no key but its own: the socket it comes by decides."""
    process, guest = launch()
    with pytest.raises(BrokerRefused, match="PolicyDeny"):
        guest.fetch(bare.resource("two"))
    ended(process, REFUSED, "another image")
    assert any("peer.image" in text for text in bare.refusal())


@pytest.mark.long
def test_one_that_uses_anothers_session(bare: Host, launch) -> None:
    """A cookie that was stolen from another domain is none."""
    _, guest = launch()
    _, other = launch("two")
    cookie, nonce = other.session()
    assert other.attest(other.attestation(nonce), cookie)[0] == 200
    status, _, body = guest.ask("GET", f"/kbs/v0/resource/{bare.resource('two')}", cookie=cookie)
    assert (status, json.loads(body)["type"].rsplit("/", 1)[-1]) == (401, "TokenNotFound")


@pytest.mark.long
def test_one_that_meets_another_broker(bare: Host, launch) -> None:
    """A guest whose image pins another key says nothing to this one."""
    _, guest = launch("one", "--timeout", "10")
    guest.pin = bytes(32)
    before = len(bare.rows())
    with pytest.raises(BrokerNotTrusted):
        guest.fetch(bare.resource("one"))
    assert len(bare.rows()) == before


def test_one_that_is_refused_without_end(bare: Host, launch) -> None:
    """The loop ends by itself: a few rows, then it is not judged any more, and the sentence says for how long."""
    before = len(bare.rows())
    kinds = set()
    for _ in range(10):
        process, guest = launch("two", "--timeout", "60")
        with contextlib.suppress(OSError):  # a refused machine is switched off soon
            for _ in range(20):
                status, cookie, _ = guest.ask("POST", "/kbs/v0/auth", REQUEST)
                kinds.add(status)
                if status == 200:
                    guest.ask("POST", "/kbs/v0/attest", b"{}", cookie)
        process.wait(120)
        if "again in" in (err := process.communicate()[1]):
            break
    assert kinds == {200, 401}
    assert "it was refused 8 times; it is judged again in" in err
    assert process.returncode == REFUSED
    assert len([row for row in bare.rows()[before:] if row["kind"] == "refused"]) == 8


@pytest.mark.long
def test_a_key_of_another_kind_is_not_sealed_to(bare: Host, launch) -> None:
    """A key that the report does not bind."""
    process, guest = launch()
    cookie, nonce = guest.session()
    body = guest.attestation(nonce)
    from cryptography.hazmat.primitives.asymmetric import ec

    body["runtime-data"]["tee-pubkey"] = jwk.tee_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    assert guest.attest(body, cookie)[0] == 401
    ended(process, REFUSED, "refused")
