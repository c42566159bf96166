"""A broker with two images, and a guest's view of it: real TLS, real verification of simulated reports."""

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.attest.snp import SnpVerifier
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import listen_unix
from jindiskd.broker.service import Broker, BrokerEvent, Peer
from jindiskd.kbs import jwe, jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.client import KbsClient
from jindiskd.kbs.evidence import snp_to_json
from jindiskd.keys.store import Store
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

DIGEST = bytes(range(48))
KEY = b"\x00the key that must not be seen.\n\xff"
IMAGE, OTHER = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
REQUEST = b'{"version":"0.4.0","tee":"snp","extra-params":""}'


class Bench:
    """A broker, not yet listening."""

    def __init__(self, root: SimulatedRoot, tmp: Path, **broker: Any) -> None:
        self.root, self.path, self.database = root, tmp / "guest_19012", tmp / "keys.db"
        self.kek = Secret.random(32)
        self.store = Store.open(f"sqlite:///{self.database}", self.kek)
        for image, name in ((IMAGE, "one"), (OTHER, "two")):
            self.store.add_image(image, name, Platform.SIMULATED_SNP, f"default/{image}/root", Secret(KEY))
            self.store.activate(image, [DIGEST])
        self.events: list[BrokerEvent] = []
        self.identity = TlsIdentity.load_or_create(tmp / "identity.pem")
        arguments: dict[str, Any] = {
            "store": self.store,
            "verifiers": [SnpVerifier(roots=root.roots, crls=[root.crl])],
            "allow_simulated": True,
            "on_event": self.events.append,
        }
        self.broker = Broker(**{**arguments, **broker})
        self.peer = Peer(description="domain one", domain_uuid=IMAGE, image_id=IMAGE)
        self.firmware = SimulatedSnpFirmware(root, DIGEST)

    def connect(self) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(5)
        try:
            stream.connect(str(self.path))
        except BaseException:
            stream.close()
            raise
        return stream

    def evidence(self, data: bytes) -> Mapping[str, Any]:
        return snp_to_json(self.firmware.report(data), self.firmware.certificate_table())

    def client(self, pin: bytes | None = None, within_s: float = 10) -> KbsClient:
        pin = pin or self.identity.spki_sha256
        return KbsClient(self.connect, spki_sha256=pin, deadline=time.monotonic() + within_s)

    async def fetch(
        self, image: str = IMAGE, pin: bytes | None = None, evidence: Any = None, within_s: float = 10
    ) -> bytes:
        resource, client = f"default/{image}/root", self.client(pin, within_s)
        with await asyncio.to_thread(client.fetch, "snp", resource, evidence or self.evidence) as key:
            return bytes(key.reveal())

    def last_findings(self) -> list[str]:
        row = self.store.audit_rows()[-1]
        assert row["kind"] == "refused"
        return [finding["id"] for finding in row["detail"]["findings"]]

    def tls(self) -> ssl.SSLSocket:
        """A connection that nobody checked: what a hostile guest speaks over."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(self.connect())

    async def raw(self, request: bytes) -> bytes:
        """Send bytes, and return what comes first."""

        def exchange() -> bytes:
            with contextlib.suppress(OSError), self.tls() as stream:
                with contextlib.suppress(OSError):
                    stream.sendall(request)
                return stream.recv(65536)
            return b""

        return await asyncio.to_thread(exchange)

    async def ask(
        self, method: str, where: str, body: bytes = b"", *, cookie: str = "", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers (lower case), body."""
        lines = [f"{method} {where} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}"]
        lines += [f"Cookie: {cookie}"] if cookie else []
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]

        def exchange() -> bytes:
            with self.tls() as stream:
                stream.sendall("\r\n".join([*lines, "", ""]).encode() + body)
                found = b""
                with contextlib.suppress(OSError):
                    while data := stream.recv(65536):
                        found += data
                return found

        head, _, rest = (await asyncio.to_thread(exchange)).partition(b"\r\n\r\n")
        first, *fields = head.decode().split("\r\n")
        return int(first.split()[1]), {n.lower(): v for n, _, v in (f.partition(": ") for f in fields)}, rest

    async def session(self) -> tuple[str, str]:
        """Cookie and nonce of a fresh session."""
        status, headers, answer = await self.ask("POST", "/kbs/v0/auth", REQUEST)
        assert status == 200, answer
        return headers["set-cookie"].split(";")[0], json.loads(answer)["nonce"]

    def attestation(
        self, nonce: str, key: ec.EllipticCurvePrivateKey | None = None, **members: Any
    ) -> bytes:
        """An honest body for this nonce, with members replaced."""
        public = jwk.tee_jwk((key or ec.generate_private_key(ec.SECP256R1())).public_key())
        told = {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": public},
            "tee-evidence": {
                "primary_evidence": self.evidence(report_data(nonce, public)),
                "additional_evidence": "",
            },
        }
        return json.dumps({**told, **members}).encode()

    async def attested(self) -> tuple[str, str, ec.EllipticCurvePrivateKey]:
        """Cookie, token and key of an attested session."""
        cookie, nonce = await self.session()
        key = ec.generate_private_key(ec.SECP256R1())
        status, _, answer = await self.ask("POST", "/kbs/v0/attest", self.attestation(nonce, key), cookie=cookie)
        assert status == 200, answer
        return cookie, json.loads(answer)["token"], key


def opened(body: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The plaintext of an answer."""
    with jwe.open_(body, key) as secret:
        return bytes(secret.reveal())


def claims(token: str) -> dict[str, Any]:
    """The payload of a token, its signature not looked at."""
    part = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def kind(body: bytes) -> str:
    """The type of an error, its last part."""
    return str(json.loads(body)["type"]).rsplit("/", 1)[-1]


@contextlib.asynccontextmanager
async def bench(root: SimulatedRoot, tmp: Path, **broker: Any) -> AsyncIterator[Bench]:
    """A broker that listens on a unix socket for one peer."""
    made = Bench(root, tmp, **broker)
    listener = await listen_unix(made.broker, made.identity, made.path, made.peer)
    try:
        yield made
    finally:
        await listener.close()
        made.store.close()
