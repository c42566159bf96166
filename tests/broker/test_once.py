"""A nonce counts once, and a message that can be read in two ways is not read at all."""

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.attest.snp import SnpVerifier
from jindiskd.base.secret import Secret
from jindiskd.broker.identity import TlsIdentity
from jindiskd.broker.listener import listen_unix
from jindiskd.broker.service import Broker, Peer
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.evidence import snp_to_json
from jindiskd.keys.store import Store
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

REQUEST = b'{"version":"0.4.0","tee":"snp","extra-params":""}'


@contextlib.asynccontextmanager
async def guest(tmp: Path) -> AsyncIterator[tuple[Path, SimulatedRoot]]:
    root = SimulatedRoot.generate(now=datetime.now(UTC))
    store = Store.open(f"sqlite:///{tmp / 'keys.db'}", Secret.random(32))
    verifier = SnpVerifier(roots=root.roots, crls=[root.crl])
    broker = Broker(store=store, verifiers=[verifier], allow_simulated=True)
    identity = TlsIdentity.load_or_create(tmp / "identity.pem")
    listener = await listen_unix(broker, identity, tmp / "socket", Peer(description="domain one"))
    try:
        yield tmp / "socket", root
    finally:
        await listener.close()
        store.close()


async def post(path: Path, where: str, body: bytes, cookie: str = "") -> tuple[int, str, bytes]:
    """Status, cookie and body of the answer; a connection for each request."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_unix_connection(str(path), ssl=context, server_hostname="broker")
    head = f"POST /kbs/v0/{where} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nCookie: {cookie}\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    headers, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    lines = headers.decode().split("\r\n")
    sent = [line.partition(": ")[2] for line in lines if line.startswith("Set-Cookie: ")]
    return int(lines[0].split()[1]), "".join(sent), rest


def attestation(root: SimulatedRoot, nonce: str) -> bytes:
    """An honest body for this nonce."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    x, y = (base64.urlsafe_b64encode(n.to_bytes(32, "big")).rstrip(b"=").decode() for n in (numbers.x, numbers.y))
    key = {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": x, "y": y}
    firmware = SimulatedSnpFirmware(root, bytes(48))
    evidence = snp_to_json(firmware.report(report_data(nonce, key)), firmware.certificate_table())
    told = {
        "init-data": None,
        "runtime-data": {"nonce": nonce, "tee-pubkey": key},
        "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
    }
    return json.dumps(told).encode()


async def test_a_session_is_attested_once(tmp_path: Path) -> None:
    """The very body that was accepted is refused when it is sent again in its session."""
    async with guest(tmp_path) as (path, root):
        _, cookie, answer = await post(path, "auth", REQUEST)
        body = attestation(root, json.loads(answer)["nonce"])
        assert (await post(path, "attest", body, cookie))[0] == 200
        assert (await post(path, "attest", body, cookie))[0] == 401


async def test_a_member_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """Also where both say the same; and the nonce is spent by the attempt."""
    async with guest(tmp_path) as (path, root):
        doubled = REQUEST.replace(b'"tee":"snp"', b'"tee":"snp","tee":"snp"')
        assert (await post(path, "auth", doubled))[0] == 401
        _, cookie, answer = await post(path, "auth", REQUEST)
        body = attestation(root, json.loads(answer)["nonce"])
        twice = body.replace(b'"init-data": null', b'"init-data": null, "init-data": null')
        assert twice != body
        assert (await post(path, "attest", twice, cookie))[0] == 401
        assert (await post(path, "attest", body, cookie))[0] == 401
