"""The relay passes everything on and can do nothing with it: not read, not alter, not replay, not stand in."""

import asyncio
import contextlib
import json
import socket
import time
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from brokerbench import DIGEST, IMAGE, KEY, OTHER, Bench, bench

from jindiskd.base.endpoint import Endpoint, parse_endpoint
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import listen_tcp
from jindiskd.broker.relay import Relay, RelayLimits, RelayState
from jindiskd.errors import InvalidArgument
from jindiskd.kbs.client import BrokerNotTrusted, BrokerUnreachable, KbsClient
from jindiskd.sim.pki import SimulatedRoot

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports asyncore for a part that is not used here
    from tlslite.handshakesettings import HandshakeSettings
    from tlslite.tlsconnection import TLSConnection
    from tlslite.utils.keyfactory import parsePEMKey
    from tlslite.x509certchain import X509CertChain

DOMAIN = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
RESOURCE = f"default/{IMAGE}/root"


@contextlib.asynccontextmanager
async def relayed(root: SimulatedRoot, tmp: Path, **limits: Any) -> AsyncIterator[tuple[Bench, Relay, Path]]:
    """A broker on TCP, and our relay to it with a socket for one guest."""
    async with bench(root, tmp) as b:
        tcp = await listen_tcp(b.broker, b.identity, "127.0.0.1", 0)
        relay = Relay(Endpoint(host="127.0.0.1", port=tcp.addresses[0][1]), limits=RelayLimits(**limits))
        listener = await relay.open(tmp / "guest", DOMAIN)
        try:
            yield b, relay, tmp / "guest"
        finally:
            await listener.close()
            await tcp.close()
        assert relay.total.open == 0
        assert not (tmp / "guest").exists()


def connect(path: Path) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.settimeout(10)
    try:
        stream.connect(str(path))
    except BaseException:
        stream.close()
        raise
    return stream


def client(b: Bench, path: Path, within_s: float = 60) -> KbsClient:
    return KbsClient(lambda: connect(path), spki_sha256=b.identity.spki_sha256, deadline=time.monotonic() + within_s)


async def fetch(b: Bench, path: Path, within_s: float = 60, resource: str = RESOURCE) -> bytes:
    with await asyncio.to_thread(client(b, path, within_s).fetch, "snp", resource, b.evidence) as key:
        return bytes(key.reveal())


async def until(condition: Callable[[], bool], within_s: float = 30) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 (nobody could set an event)
            await asyncio.sleep(0.01)


async def test_a_guest_gets_its_key_through_the_relay(root: SimulatedRoot, tmp_path: Path) -> None:
    """And the view tells how much went through, and nothing of what it was."""
    async with relayed(root, tmp_path) as (b, relay, path):
        assert await fetch(b, path) == KEY
        await until(lambda: relay.total.open == 0)
        view = relay.view(DOMAIN)
        assert (view.state, view.connections, view.refused, view.reason) == (RelayState.IDLE, 1, 0, "")
        assert view.bytes_up > 3000
        assert view.bytes_down > 500
        assert [row["peer"] for row in b.store.audit_rows() if row["kind"] == "released"] == ["tcp 127.0.0.1"]
    assert relay.view(DOMAIN).connections == 0


async def test_a_broker_that_is_away_is_told_and_found_again(root: SimulatedRoot, tmp_path: Path) -> None:
    """The guest's connection ends at once; the state says why; attempts become rare; then all is well again."""
    now = [1000.0]
    changes = []
    async with bench(root, tmp_path) as b:
        tcp = await listen_tcp(b.broker, b.identity, "127.0.0.1", 0)
        port = tcp.addresses[0][1]
        await tcp.close()
        relay = Relay(Endpoint(host="127.0.0.1", port=port), changed=lambda: changes.append(1), clock=lambda: now[0])
        listener = await relay.open(tmp_path / "guest", DOMAIN)
        with pytest.raises(BrokerUnreachable):
            await fetch(b, tmp_path / "guest", 2)
        assert relay.total.state is relay.view(DOMAIN).state is RelayState.UNREACHABLE
        assert f"127.0.0.1:{port}" in relay.view(DOMAIN).reason
        assert changes
        tcp = await listen_tcp(b.broker, b.identity, "127.0.0.1", port)
        with pytest.raises(BrokerUnreachable):  # the clock stands: it is not tried again yet
            await fetch(b, tmp_path / "guest", 1)
        now[0] += 1
        assert await fetch(b, tmp_path / "guest") == KEY
        await until(lambda: relay.total.open == 0)
        assert (relay.total.state, relay.view(DOMAIN).state) == (RelayState.IDLE, RelayState.IDLE)
        await listener.close()
        await tcp.close()


async def test_a_guest_has_bounds_and_others_do_not_notice(root: SimulatedRoot, tmp_path: Path) -> None:
    """Connections at once, connections a minute, bytes; each with its reason."""
    stack = contextlib.AsyncExitStack()
    async with relayed(root, tmp_path, connections=3, bytes=200_000, starts_per_minute=40) as (b, relay, path), stack:
        other = await relay.open(tmp_path / "other", OTHER)
        stack.push_async_callback(other.close)
        hoard = [connect(path) for _ in range(3)]
        await until(lambda: relay.view(DOMAIN).open == 3)
        with connect(path) as fourth:
            assert await asyncio.to_thread(fourth.recv, 1) == b""
        assert "3 connections" in relay.view(DOMAIN).reason
        assert await fetch(b, tmp_path / "other") == KEY
        for stream in hoard:
            stream.close()
        await until(lambda: relay.view(DOMAIN).open == 0)
        with connect(path) as flood:
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    await asyncio.to_thread(flood.sendall, bytes(1000))
            with contextlib.suppress(OSError):
                await asyncio.to_thread(flood.recv, 1)
        await until(lambda: relay.view(DOMAIN).open == 0)
        assert relay.view(DOMAIN).bytes_up <= 200_000 + 65536
        for _ in range(1000):
            connect(path).close()
            await asyncio.sleep(0.01)
            if "within a minute" in relay.view(DOMAIN).reason:
                break
        assert "within a minute" in relay.view(DOMAIN).reason
        assert await fetch(b, tmp_path / "other") == KEY
        assert relay.view(OTHER).refused == 0


@pytest.mark.parametrize(("limits", "word"), [({"idle_s": 0.3}, "idle"), ({"life_s": 0.3}, "open for")])
async def test_silence_and_age_end_a_connection(
    root: SimulatedRoot, tmp_path: Path, limits: dict[str, float], word: str
) -> None:
    """Both ends are closed, and the reason is told."""
    async with relayed(root, tmp_path, **limits) as (_, relay, path):
        with connect(path) as stream:
            assert await asyncio.to_thread(stream.recv, 1) == b""
        await until(lambda: relay.view(DOMAIN).open == 0)
        assert word in relay.view(DOMAIN).reason


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "a b:1", "h:99999", "[::1]", "h:1/x", "http://h:1"])
def test_addresses_are_read_strictly(text: str) -> None:
    """What is not host and port is refused."""
    with pytest.raises(InvalidArgument):
        parse_endpoint(text, "relay.broker")


def test_addresses_have_three_forms() -> None:
    """Names, IPv6 addresses in brackets, and all addresses."""
    for text, host in (("h.example:1", "h.example"), ("[::1]:1", "::1"), ("*:1", "")):
        found = parse_endpoint(text, "x")
        assert (found.host, found.port, str(found)) == (host, 1, text)


# A hostile relay: what somebody with the host's power can try, between a real guest's client and a real broker.

Alter = Callable[[bytes, int], bytes | None]


class Hostile:
    """Passes bytes on, keeps a copy, and alters what `up` and `down` say. None drops the rest."""

    def __init__(self, port: int) -> None:
        self.port, self.up, self.down = port, None, None  # type: tuple[int, Alter | None, Alter | None]
        self.recorded: list[bytes] = []
        self.seen = bytearray()
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        sent = bytearray()
        try:
            far, back = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return

        async def passing(source: asyncio.StreamReader, target: asyncio.StreamWriter, up: bool) -> None:
            count = 0
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    self.seen += data
                    if up:
                        sent.extend(data)
                    alter = self.up if up else self.down
                    changed = alter(data, count) if alter else data
                    count += len(data)
                    if changed is None:
                        break
                    target.write(changed)
                    await target.drain()
            target.close()

        await asyncio.gather(passing(reader, back, True), passing(far, writer, False))
        self.recorded.append(bytes(sent))


@contextlib.asynccontextmanager
async def hostile(root: SimulatedRoot, tmp: Path) -> AsyncIterator[tuple[Bench, Hostile, Path]]:
    async with bench(root, tmp) as b:
        tcp = await listen_tcp(b.broker, b.identity, "127.0.0.1", 0)
        enemy = Hostile(tcp.addresses[0][1])
        server = await asyncio.start_unix_server(enemy.serve, str(tmp / "guest"))
        try:
            yield b, enemy, tmp / "guest"
        finally:
            server.close()
            await tcp.close()


def kinds(b: Bench) -> list[str]:
    return [row["kind"] for row in b.store.audit_rows() if row["kind"] != "activated"]


async def test_it_cannot_read(root: SimulatedRoot, tmp_path: Path) -> None:
    """Nothing of key, nonce, evidence or resource is in what went through."""
    async with hostile(root, tmp_path) as (b, enemy, path):
        assert await fetch(b, path) == KEY
        seen = bytes(enemy.seen)
        assert len(seen) > 4000
        for secret in (KEY, DIGEST, IMAGE.encode(), b"nonce", b"kbs-session-id", b"tee-pubkey", b"ciphertext"):
            assert secret not in seen


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("at", [0, 40, 300, 700, 1200, 2000, 2600, 4000])
async def test_it_cannot_alter(root: SimulatedRoot, tmp_path: Path, direction: str, at: int) -> None:
    """One bit anywhere, and the connection is over: the guest takes no other key, and once left alone gets its own.

    Offsets lie in the handshake and in each of the messages; those behind the end of a direction change nothing.
    """
    flipped = []

    def flip(data: bytes, count: int) -> bytes:
        if not flipped and count <= at < count + len(data):
            flipped.append(at)
            data = bytearray(data)
            data[at - count] ^= 0x20
            return bytes(data)
        return data

    async with hostile(root, tmp_path) as (b, enemy, path):
        setattr(enemy, direction, flip)
        assert await fetch(b, path) == KEY
        assert enemy.connections == 1 + len(flipped)  # an altered connection was good for nothing
        assert kinds(b).count("refused") == 0
        if at < 1200:
            assert flipped


async def test_it_cannot_replay(root: SimulatedRoot, tmp_path: Path) -> None:
    """A recorded guest's bytes, sent again, are no handshake that can be finished: nothing is judged or released."""
    async with hostile(root, tmp_path) as (b, enemy, path):
        assert await fetch(b, path) == KEY
        await until(lambda: len(enemy.recorded) == 1)
        before = kinds(b)
        sessions = b.broker.metrics.value("jindisk_broker_requests_total", step="auth", status="200")
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", enemy.port)
            writer.write(enemy.recorded[0])
            answer = b""
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    answer += data
            writer.close()
            assert KEY not in answer
        assert kinds(b) == before
        assert b.broker.metrics.value("jindisk_broker_requests_total", step="auth", status="200") == sessions


async def test_it_cannot_stand_in(root: SimulatedRoot, tmp_path: Path) -> None:
    """With a key of its own it finishes TLS, and the guest says not a word to it."""
    async with bench(root, tmp_path) as b:
        own = TlsIdentity.load_or_create(tmp_path / "own.pem")
        heard = bytearray()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                heard.extend(await reader.read(65536))
            writer.close()

        server = await asyncio.start_unix_server(serve, str(tmp_path / "guest"), ssl=own.ssl_context())
        with pytest.raises(BrokerNotTrusted):
            await fetch(b, tmp_path / "guest", 30)
        server.close()
        assert bytes(heard) == b""
        assert kinds(b) == []


async def test_the_brokers_certificate_alone_does_not_help_it(root: SimulatedRoot, tmp_path: Path) -> None:
    """The certificate is public and has the pinned key; who has not its private half cannot finish TLS with it."""
    async with bench(root, tmp_path) as b:
        pem = b.identity.path.read_text()
        chain, own = X509CertChain(), TlsIdentity.load_or_create(tmp_path / "own.pem").path.read_text()
        chain.parsePemList(pem[pem.index("-----BEGIN CERTIFICATE") :])
        keys = [parsePEMKey(text[: text.index("-----BEGIN CERT")], private=True) for text in (pem, own)]
        settings = HandshakeSettings()
        settings.minVersion = settings.maxVersion = (3, 4)
        heard: list[bytes] = []

        def serve(listening: socket.socket, key: object) -> None:
            """OpenSSL will not serve a certificate with another key; this library does."""
            taken, _ = listening.accept()
            taken.settimeout(10)
            channel = TLSConnection(taken)
            with contextlib.suppress(Exception), taken:
                channel.handshakeServer(certChain=chain, privateKey=key, settings=settings)
                heard.append(bytes(channel.read(max=100, min=1)))

        for key in keys:
            (tmp_path / "guest").unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(tmp_path / "guest"))
                listening.listen()
                forger = asyncio.create_task(asyncio.to_thread(serve, listening, key))
                with pytest.raises(BrokerUnreachable):
                    await fetch(b, tmp_path / "guest", 2)
                await forger
        # With the genuine key the guest speaks; that shows that the forger failed for want of it.
        assert [words[:17] for words in heard] == [b"POST /kbs/v0/auth"]
        assert kinds(b) == []


@pytest.mark.parametrize("after", [0, 100, 1500, 3000])
@pytest.mark.parametrize("direction", ["up", "down"])
async def test_it_can_drop_and_that_is_all(root: SimulatedRoot, tmp_path: Path, direction: str, after: int) -> None:
    """The guest gives up in time; when it is let through again, it is served as if nothing had been."""
    def drop(data: bytes, count: int) -> bytes | None:
        return data if count + len(data) <= after else None

    async with hostile(root, tmp_path) as (b, enemy, path):
        setattr(enemy, direction, drop)
        with contextlib.suppress(BrokerUnreachable):  # some of it may be enough
            assert await fetch(b, path, 3) == KEY
        setattr(enemy, direction, None)
        assert await fetch(b, path) == KEY
        assert "refused" not in kinds(b)


async def test_two_guests_cannot_be_exchanged(root: SimulatedRoot, tmp_path: Path) -> None:
    """One guest's cookie is of no use on another's connection: what it fetches is sealed to the first one's key."""
    async with hostile(root, tmp_path) as (b, _, _path):
        cookie, _token, key = await b.attested()
        status, _, sealed = await b.ask("GET", f"/kbs/v0/resource/{RESOURCE}", cookie=cookie)
        assert status == 200
        assert KEY not in sealed
        assert set(json.loads(sealed)) == {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
        assert key is not None

