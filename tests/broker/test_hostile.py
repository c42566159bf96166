"""Guests and strangers that mean harm: each is bounded, none learns anything, honest ones are served."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from brokerbench import DIGEST, IMAGE, KEY, OTHER, REQUEST, Bench, bench, kind

from jindiskd.broker import http, listener
from jindiskd.broker.listener import listen_tcp, listen_unix, listen_vsock
from jindiskd.broker.service import BrokerLimits, Peer
from jindiskd.errors import NotSupported
from jindiskd.kbs.client import BrokerRefused, KbsClient
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot


@contextlib.contextmanager
def held(b: Bench, number: int) -> Any:
    """Connections that say nothing at all, not even the beginning of TLS."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(b.connect()) for _ in range(number)]


async def closed_after(stream: socket.socket, within_s: float) -> float:
    """Seconds until the other end has closed."""
    begun = time.monotonic()

    def wait() -> None:
        stream.settimeout(within_s)
        with contextlib.suppress(ConnectionError):
            while stream.recv(65536):
                pass

    await asyncio.to_thread(wait)
    return time.monotonic() - begun


async def test_a_guest_that_never_speaks_is_dropped(
    root: SimulatedRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handshake has its time limit; others are served meanwhile."""
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.4)
    async with bench(root, tmp_path) as b:
        with held(b, 8) as silent:
            assert await b.fetch() == KEY
            assert await closed_after(silent[0], 5) < 3


async def test_a_guest_that_is_silent_behind_tls_is_dropped(
    root: SimulatedRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is one that sends its header byte by byte (slow loris): what is not a whole request is idleness."""
    monkeypatch.setattr(http, "IDLE_S", 0.5)
    async with bench(root, tmp_path) as b:
        stream = await asyncio.to_thread(b.tls)
        assert await closed_after(stream, 5) < 3
        stream.close()
        loris, begun = await asyncio.to_thread(b.tls), time.monotonic()

        def drip() -> None:
            with contextlib.suppress(OSError):
                for octet in b"POST /kbs/v0/auth HTTP/1.1\r\n" + b"X: y\r\n" * 100:
                    loris.sendall(bytes([octet]))
                    time.sleep(0.05)

        await asyncio.to_thread(drip)
        loris.close()
        assert time.monotonic() - begun < 30
        assert await b.fetch() == KEY


async def test_a_body_that_drips_is_given_up(
    root: SimulatedRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length that is announced and never arrives."""
    monkeypatch.setattr(http, "BODY_TIME_S", 0.4)
    monkeypatch.setattr(http, "LINGER_S", 0.2)
    async with bench(root, tmp_path) as b:
        begun = time.monotonic()
        answer = await b.raw(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 401 " in answer.split(b"\r\n")[0]
        assert b"did not arrive" in answer
        assert time.monotonic() - begun < 30


async def test_a_connection_has_an_end(
    root: SimulatedRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However busy it is kept."""
    monkeypatch.setattr(listener, "LIFETIME_S", 0.6)
    async with bench(root, tmp_path) as b:
        stream = await asyncio.to_thread(b.tls)

        def keep_busy() -> int:
            stream.settimeout(5)
            count = 0
            with contextlib.suppress(OSError):
                while True:
                    stream.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    if not stream.recv(65536):
                        break
                    count += 1
                    time.sleep(0.01)
            return count

        begun = time.monotonic()
        assert await asyncio.to_thread(keep_busy) > 0
        assert time.monotonic() - begun < 30
        stream.close()
        assert await b.fetch() == KEY


async def test_connections_of_a_peer_are_limited(root: SimulatedRoot, tmp_path: Path) -> None:
    """More are closed at once, before TLS; a peer on another socket is served."""
    limits = BrokerLimits(connections_per_peer=4)
    async with bench(root, tmp_path, limits=limits) as b:
        other = await listen_unix(b.broker, b.identity, tmp_path / "other", Peer(description="two", image_id=IMAGE))
        with held(b, 4):
            with b.connect() as fifth:
                assert await closed_after(fifth, 5) < 2
            b.path, own = tmp_path / "other", b.path
            assert await b.fetch() == KEY
            b.path = own
        assert b.broker.metrics.value("jindisk_broker_connections_refused_total") == 1
        assert await b.fetch() == KEY
        await other.close()
        assert b.broker.metrics.value("jindisk_broker_connections") <= 1


async def test_a_hundred_megabytes_are_not_read(root: SimulatedRoot, tmp_path: Path) -> None:
    """Neither announced nor chunked: the answer comes, or the connection goes, long before."""
    async with bench(root, tmp_path) as b:
        for announced in (True, False):
            stream = await asyncio.to_thread(b.tls)

            def pour(announced: bool = announced, stream: Any = stream) -> tuple[int, bytes]:
                stream.settimeout(10)
                length = b"Content-Length: 104857600" if announced else b"Transfer-Encoding: chunked"
                sent, block = 0, b"x" * 65536
                with contextlib.suppress(OSError):
                    stream.sendall(b"POST /kbs/v0/auth HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n")
                    while sent < 100 << 20:
                        stream.sendall(block if announced else b"%x\r\n%s\r\n" % (len(block), block))
                        sent += len(block)
                answer = b""
                with contextlib.suppress(OSError):
                    answer = stream.recv(65536)
                return sent, answer

            sent, answer = await asyncio.to_thread(pour)
            stream.close()
            assert sent < 100 << 20 or b" 401 " in answer.split(b"\r\n")[0]
            assert b" 200 " not in answer.split(b"\r\n")[0]
        assert await b.fetch() == KEY


async def test_a_compressed_body_is_refused(root: SimulatedRoot, tmp_path: Path) -> None:
    """A few bytes must not become gigabytes."""
    async with bench(root, tmp_path) as b:
        status, _, body = await b.ask("POST", "/kbs/v0/auth", REQUEST, headers={"Content-Encoding": "gzip"})
        assert (status, kind(body)) == (401, "AttestationError")


DEEP: Any = {}
for _ in range(30):
    DEEP = {"a": DEEP}


def primary(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], bytes]:
    """An attestation whose evidence was changed."""

    def made(good: dict[str, Any]) -> bytes:
        changed = change(good["tee-evidence"]["primary_evidence"])
        return json.dumps({**good, "tee-evidence": {**good["tee-evidence"], "primary_evidence": changed}}).encode()

    return made


def report(**fields: Any) -> Callable[[dict[str, Any]], bytes]:
    """An attestation with fields of its report replaced."""
    return primary(lambda e: {**e, "attestation_report": {**e["attestation_report"], **fields}})


def text(old: bytes, new: bytes) -> Callable[[dict[str, Any]], bytes]:
    """An attestation whose text was changed, once."""

    def made(good: dict[str, Any]) -> bytes:
        whole = json.dumps(good).encode()
        assert old in whole
        return whole.replace(old, new, 1)

    return made


def runtime(**members: Any) -> Callable[[dict[str, Any]], bytes]:
    """An attestation with members of its runtime data replaced."""
    return lambda good: json.dumps({**good, "runtime-data": {**good["runtime-data"], **members}}).encode()


def init_data(body: object) -> Callable[[dict[str, Any]], bytes]:
    """An attestation with this as the text of its init-data."""
    return lambda good: json.dumps({**good, "init-data": {"format": "toml", "body": body}}).encode()


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "no evidence": (primary(lambda _: None), "evidence.malformed"),
    "a list": (primary(lambda _: []), "evidence.malformed"),
    "empty": (primary(lambda _: {}), "evidence.malformed"),
    "deep": (primary(lambda _: DEEP), "evidence.malformed"),
    "no report": (primary(lambda e: {**e, "attestation_report": None}), "evidence.malformed"),
    "huge version": (report(version=2**70), "evidence.malformed"),
    "short digest": (report(measurement=[0] * 47), "evidence.malformed"),
    "no bytes": (report(measurement=[256] * 48), "evidence.malformed"),
    "other digest": (report(measurement=[0] * 48), "snp.signature"),
    "other policy": (report(policy=0xB0000), "snp.signature"),
    "other challenge": (report(report_data=[0] * 64), "snp.report_data"),
    "no certificates": (primary(lambda e: {**e, "cert_chain": None}), "snp.certificate.missing"),
    "damaged certificate": (
        primary(lambda e: {**e, "cert_chain": [{"cert_type": "VCEK", "data": [0x30]}]}),
        "snp.certificate.malformed",
    ),
    "many certificates": (primary(lambda e: {**e, "cert_chain": e["cert_chain"] * 20}), "evidence.malformed"),
    "large certificate": (
        primary(lambda e: {**e, "cert_chain": [{"cert_type": "VCEK", "data": [1] * 70000}]}),
        "evidence.malformed",
    ),
    "other nonce": (runtime(nonce="bm9uY2U="), "session.nonce"),
    "key member more": (runtime(**{"tee-pubkey": {"kty": "EC", "kid": "1"}}), "evidence.malformed"),
    "key as list": (runtime(**{"tee-pubkey": []}), "evidence.malformed"),
    "deep init-data": (init_data("a=" + "[" * 50000), "evidence.malformed"),
    "init-data of dots": (init_data("a." * 63_000 + "a=1"), "evidence.malformed"),
    "init-data that is no text": (init_data(5), "evidence.malformed"),
    "init-data without UTF-8": (init_data("a = '\ud800'"), "evidence.malformed"),
    "init-data with a long number": (init_data("a = " + "9" * 5000), "evidence.malformed"),
    "member twice": (text(b'"version": 3', b'"version": 3, "version": 3'), "evidence.malformed"),
    "a float": (text(b'"version": 3', b'"version": 3.0'), "evidence.malformed"),
    "not a number": (text(b'"version": 3', b'"version": NaN'), "evidence.malformed"),
    "brackets": (lambda _: b"[" * 500_000, "evidence.malformed"),
    "braces": (lambda _: b'{"a":' * 100_000, "evidence.malformed"),
    "nothing": (lambda _: b"", "evidence.malformed"),
    "no text": (lambda _: b"\xff" * 100, "evidence.malformed"),
}


async def test_hostile_attestations_end_in_the_same_refusal(root: SimulatedRoot, tmp_path: Path) -> None:
    """One error and one text for all; an audit row with the reason each; no attested session; no fault of ours."""
    async with bench(root, tmp_path, limits=BrokerLimits(sessions_per_peer=100, refusals=100)) as b:
        texts = set()
        for name, (make, finding) in HOSTILE.items():
            cookie, nonce = await b.session()
            before = len(b.store.audit_rows(1000))
            body = make(json.loads(b.attestation(nonce)))
            status, _, answer = await b.ask("POST", "/kbs/v0/attest", body, cookie=cookie)
            texts.add(answer)
            assert status == 401, name
            assert len(b.store.audit_rows(1000)) == before + 1, name
            assert finding in b.last_findings(), name
            status, _, answer = await b.ask("GET", f"/kbs/v0/resource/default/{IMAGE}/root", cookie=cookie)
            assert (status, kind(answer)) == (401, "TokenNotFound"), name
        assert len(texts) == 1
        assert kind(texts.pop()) == "AttestationError"
        assert await b.fetch() == KEY


@pytest.mark.parametrize(
    "cookie",
    ["", "kbs-session-id=", "kbs-session-id=" + "0" * 32, "kbs-session-id=../../etc", "session_id=" + "0" * 32],
)
async def test_wrong_cookies_are_no_sessions(root: SimulatedRoot, tmp_path: Path, cookie: str) -> None:
    """The reference teaching broker's cookie name among them."""
    async with bench(root, tmp_path) as b:
        status, _, body = await b.ask("GET", f"/kbs/v0/resource/default/{IMAGE}/root", cookie=cookie)
        assert (status, kind(body)) == (401, "TokenNotFound")


async def test_a_stolen_cookie_is_of_no_use_elsewhere(root: SimulatedRoot, tmp_path: Path) -> None:
    """A session belongs to the peer that began it; the token too."""
    async with bench(root, tmp_path) as b:
        cookie, token, _ = await b.attested()
        other = await listen_unix(b.broker, b.identity, tmp_path / "other", Peer(description="another domain"))
        b.path = tmp_path / "other"
        for credentials in ({"Cookie": cookie}, {"Authorization": f"Bearer {token}"}):
            where = f"/kbs/v0/resource/default/{IMAGE}/root"
            status, _, body = await b.ask("GET", where, headers=credentials)
            assert (status, kind(body)) == (401, "TokenNotFound")
        await other.close()


async def test_an_attested_session_asks_a_few_times_only(root: SimulatedRoot, tmp_path: Path) -> None:
    """Each release is an audit row: a guest cannot make them without end."""
    async with bench(root, tmp_path, limits=BrokerLimits(asks_per_session=3)) as b:
        cookie, _, _ = await b.attested()
        where = f"/kbs/v0/resource/default/{IMAGE}/root"
        assert [(await b.ask("GET", where, cookie=cookie))[0] for _ in range(5)] == [200, 200, 200, 401, 401]


async def test_refused_attestations_use_up_the_sessions_of_a_peer(root: SimulatedRoot, tmp_path: Path) -> None:
    """So the audit log grows by so many rows in a session's life, whatever a guest does; others are not disturbed."""
    async with bench(root, tmp_path, limits=BrokerLimits(sessions_per_peer=4, sessions=100)) as b:
        for _ in range(4):
            cookie, _ = await b.session()
            await b.ask("POST", "/kbs/v0/attest", b"{}", cookie=cookie)
        status, _, body = await b.ask("POST", "/kbs/v0/auth", REQUEST)
        assert (status, kind(body)) == (401, "PluginInternalError")
        other = await listen_unix(b.broker, b.identity, tmp_path / "other", Peer(description="two", image_id=IMAGE))
        b.path = tmp_path / "other"
        assert await b.fetch() == KEY
        await other.close()


async def test_a_revoked_image_in_the_middle_of_a_session(root: SimulatedRoot, tmp_path: Path) -> None:
    """Attested before, asked after: the key stays."""
    async with bench(root, tmp_path) as b:
        cookie, _, _ = await b.attested()
        await asyncio.to_thread(b.store.revoke, IMAGE)
        status, _, body = await b.ask("GET", f"/kbs/v0/resource/default/{IMAGE}/root", cookie=cookie)
        assert (status, kind(body)) == (401, "PolicyDeny")
        assert "key.state" in b.last_findings()


async def test_tcp_peers_are_told_apart_and_may_ask_for_any_image(root: SimulatedRoot, tmp_path: Path) -> None:
    """Without a binding the launch digest decides; a guest with another digest gets nothing."""
    async with bench(root, tmp_path) as b:
        tcp = await listen_tcp(b.broker, b.identity, "127.0.0.1", 0)
        address = tcp.addresses[0][:2]

        async def fetch(image: str) -> bytes:
            client = KbsClient(
                lambda: socket.create_connection(address, 5),
                spki_sha256=b.identity.spki_sha256,
                deadline=time.monotonic() + 10,
            )
            with await asyncio.to_thread(client.fetch, "snp", f"default/{image}/root", b.evidence) as key:
                return bytes(key.reveal())

        assert await fetch(IMAGE) == await fetch(OTHER) == KEY
        assert b.store.audit_rows()[-1]["peer"] == "tcp 127.0.0.1"
        b.firmware = SimulatedSnpFirmware(root, DIGEST[::-1])
        with pytest.raises(BrokerRefused):
            await fetch(OTHER)
        await tcp.close()


async def test_vsock_peers_are_known_by_their_context_id(root: SimulatedRoot, tmp_path: Path) -> None:
    """As the kernel gives it; a stranger's connection is closed before TLS."""
    made = Bench(root, tmp_path)
    known: dict[int, Peer] = {}
    try:
        vsock = await listen_vsock(made.broker, made.identity, 29012, known.get)
    except NotSupported as exc:
        made.store.close()
        pytest.skip(f"{exc}")
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as stream:
            stream.settimeout(5)
            try:
                await asyncio.to_thread(stream.connect, (1, 29012))
            except OSError as exc:
                pytest.skip(f"this kernel has no vsock loopback: {exc}")
            assert await closed_after(stream, 5) < 2
        known[1] = Peer(description="cid 1", image_id=IMAGE)

        def connect() -> socket.socket:
            stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            stream.connect((1, 29012))
            return stream

        client = KbsClient(connect, spki_sha256=made.identity.spki_sha256, deadline=time.monotonic() + 10)
        with await asyncio.to_thread(client.fetch, "snp", f"default/{IMAGE}/root", made.evidence) as key:
            assert bytes(key.reveal()) == KEY
    finally:
        await vsock.close()
        made.store.close()


async def test_old_tls_is_refused(root: SimulatedRoot, tmp_path: Path) -> None:
    """TLS 1.3 or nothing."""
    import ssl

    async with bench(root, tmp_path) as b:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2

        def attempt() -> None:
            with b.connect() as plain, context.wrap_socket(plain):
                pass

        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(attempt)


async def test_the_socket_is_for_its_owner_and_goes_with_the_listener(root: SimulatedRoot, tmp_path: Path) -> None:
    """Mode 0600 unless a group is meant to have it; nothing is left."""
    async with bench(root, tmp_path) as b:
        assert b.path.stat().st_mode & 0o777 == 0o600
        wide = await listen_unix(b.broker, b.identity, tmp_path / "wide", b.peer, mode=0o660)
        assert (tmp_path / "wide").stat().st_mode & 0o777 == 0o660
        with b.connect(), b.connect():
            begun = time.monotonic()
            await wide.close()
            assert time.monotonic() - begun < 30
        assert not (tmp_path / "wide").exists()
    assert not b.path.exists()
