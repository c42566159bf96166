"""Our guest and relay with a Trustee broker that shares no code with them, and the recorded exchanges, both ways."""

import asyncio
import contextlib
import hashlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from brokerbench import IMAGE, KEY, Bench, bench
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from jindiskd.base.endpoint import Endpoint
from jindiskd.broker import sessions
from jindiskd.broker.relay import Relay
from jindiskd.kbs import client as kbs_client
from jindiskd.kbs import jwe
from jindiskd.kbs.client import BrokerRefused, KbsClient
from jindiskd.kbs.evidence import snp_to_json
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import trustee

RESOURCE = f"default/{IMAGE}/root"
DIGEST = bytes(range(48))
VERSIONS = ("0.4.0", "0.2.0")
CASES = ("ecdh-p256", "ecdh-p521", "rsa-oaep-256")


class Guest:
    """What our agent does, with our relay between it and the other broker."""

    def __init__(self, peer: trustee.TrusteeBroker, root: SimulatedRoot, path: Path) -> None:
        self.peer, self.path, self.firmware = peer, path, SimulatedSnpFirmware(root, DIGEST)

    def connect(self) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(60)
        stream.connect(str(self.path))
        return stream

    def evidence(self, data: bytes) -> Mapping[str, Any]:
        return snp_to_json(self.firmware.report(data), self.firmware.certificate_table())

    async def fetch(self, resource: str = RESOURCE, within_s: float = 120) -> bytes:
        pin = hashlib.sha256(self.peer.spki).digest()
        client = KbsClient(self.connect, spki_sha256=pin, deadline=time.monotonic() + within_s)
        with await asyncio.to_thread(client.fetch, "snp", resource, self.evidence) as key:
            return bytes(key.reveal())


@contextlib.asynccontextmanager
async def guest(root: SimulatedRoot, tmp: Path, **peer: Any) -> AsyncIterator[Guest]:
    given: dict[str, Any] = {"roots": [root.ark], "measurements": [DIGEST], "secrets": {RESOURCE: KEY}}
    other = trustee.TrusteeBroker(tmp, **{**given, **peer})
    relay = Relay(Endpoint(host="127.0.0.1", port=other.port))
    listener = await relay.open(tmp / "guest", IMAGE)
    try:
        yield Guest(other, root, tmp / "guest")
    finally:
        await listener.close()
        await asyncio.to_thread(other.close)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scrambled", [False, True], ids=["reference order", "another order"])
async def test_our_guest_gets_its_key_from_a_trustee_broker(
    root: SimulatedRoot, tmp_path: Path, version: str, *, scrambled: bool
) -> None:
    """Through our relay; the evidence is judged by other code, the answer sealed by other code, in any member order."""
    async with guest(root, tmp_path, version=version, scrambled=scrambled) as g:
        assert await g.fetch() == KEY
        asked = [("auth", 200), ("attest", 200), ("resource", 200)]
        assert g.peer.asked == (asked if version == "0.4.0" else [("auth", 401), *asked])


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_denial_is_one_attestation(root: SimulatedRoot, tmp_path: Path, version: str) -> None:
    """Status 401 stands for everything; our guest reads the kind and does not ask three times."""
    async with guest(root, tmp_path, version=version, measurements=[bytes(48)]) as g:
        with pytest.raises(BrokerRefused) as refused:
            await g.fetch()
        assert refused.value.kind == "PolicyDeny"
        assert [name for name, _ in g.peer.asked].count("attest") == 1


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_report_for_something_else_is_refused_there_too(
    root: SimulatedRoot, tmp_path: Path, version: str
) -> None:
    """The other broker recomputes what the report binds: all 64 bytes, by the version's own document."""
    async with guest(root, tmp_path, version=version) as g:
        honest = g.evidence
        g.evidence = lambda data: honest(data[:63] + b"x")  # type: ignore[method-assign]  # a guest that lies
        with pytest.raises(BrokerRefused) as refused:
            await g.fetch()
        assert refused.value.kind == "AttestationError"


@pytest.mark.parametrize("version", ["0.1.1", "0.3.0", "0.5.0"])
async def test_no_other_version_is_spoken(root: SimulatedRoot, tmp_path: Path, version: str) -> None:
    """Nothing older or unknown, whoever asks for it; the refusal names both versions."""
    async with guest(root, tmp_path, version=version) as g:
        with pytest.raises(BrokerRefused, match=rf"version {version}, this guest 0\.4\.0"):
            await g.fetch()
        assert g.peer.asked == [("auth", 401)]


@pytest.fixture(scope="session")
def recorded(vectors: Path) -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in json.loads((vectors / "kbs/kbs-0.4.0.json").read_text())["cases"]}


async def test_the_recorded_exchange_as_its_client(
    root: SimulatedRoot, tmp_path: Path, recorded: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the recorded nonce and key our guest sends what was recorded, and opens the recorded answer."""
    case = recorded["ecdh-p256"]
    private = load_pem_private_key(case["tee_private_pkcs8"].encode(), None)
    async with guest(root, tmp_path) as g:
        monkeypatch.setattr(kbs_client.ec, "generate_private_key", lambda _curve: private)
        g.peer.nonce, g.peer.recorded = case["nonce"], case["response"]
        assert await g.fetch() == case["plaintext_utf8"].encode()
        (told,) = g.peer.bodies
        assert told["runtime-data"] == {"nonce": case["nonce"], "tee-pubkey": case["tee_pubkey"]}
        report = told["tee-evidence"]["primary_evidence"]["attestation_report"]
        assert bytes(report["report_data"]).hex() == case["runtime"]["snp_tdx_report_data"]


@pytest.mark.parametrize("name", CASES)
async def test_the_recorded_exchange_as_its_server(
    root: SimulatedRoot, tmp_path: Path, recorded: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With the recorded nonce, the recorded message is accepted, and what is answered opens with the recorded key."""
    case = recorded[name]
    private = load_pem_private_key(case["tee_private_pkcs8"].encode(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    draw = sessions.draw

    def drawn(*arguments: Any) -> Any:
        session_name, session = draw(*arguments)
        return session_name, sessions.replace(session, nonce=case["nonce"])

    monkeypatch.setattr(sessions, "draw", drawn)
    async with bench(root, tmp_path) as b:
        cookie, nonce = await b.session()
        assert nonce == case["nonce"]
        evidence = b.evidence(bytes.fromhex(case["runtime"]["snp_tdx_report_data"]))
        told = {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": case["tee_pubkey"]},
            "tee-evidence": {"primary_evidence": evidence, "additional_evidence": ""},
        }
        status, _, answer = await b.ask("POST", "/kbs/v0/attest", json.dumps(told).encode(), cookie=cookie)
        assert status == 200, answer
        status, _, answer = await b.ask("GET", f"/kbs/v0/resource/{RESOURCE}", cookie=cookie)
        assert status == 200, answer
        with jwe.open_(answer, private) as opened:
            assert bytes(opened.reveal()) == KEY
        header = trustee.unb64(json.loads(answer)["protected"]).decode()
        members = ["alg", "enc", "epk"] if "epk" in json.loads(header) else ["alg", "enc"]
        assert list(json.loads(header)) == list(json.loads(case["protected_header"])) == members
        assert header == json.dumps(json.loads(header), separators=(",", ":"))


async def old_exchange(b: Bench, private: ec.EllipticCurvePrivateKey, **changes: Any) -> tuple[int, str]:
    """A guest component of version 0.2.0, by the protocol page; returns the attestation's status, and its cookie."""
    asked = json.dumps({"version": "0.2.0", "tee": "snp", "extra-params": ""}).encode()
    status, headers, answer = await b.ask("POST", "/kbs/v0/auth", asked)
    assert status == 200, answer
    cookie, nonce = headers["set-cookie"].split(";")[0], json.loads(answer)["nonce"]
    point = private.public_key().public_numbers()
    x, y = (trustee.b64(value.to_bytes(32, "big")) for value in (point.x, point.y))
    key = {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": x, "y": y}
    bound = hashlib.sha384(trustee.canonical({"nonce": nonce, "tee-pubkey": key})).digest().ljust(64, b"\0")
    told = {"tee-pubkey": key, "tee-evidence": b.evidence(bound)}
    status, _, _ = await b.ask("POST", "/kbs/v0/attest", json.dumps({**told, **changes}).encode(), cookie=cookie)
    return status, cookie


async def test_older_guest_components_are_served(root: SimulatedRoot, tmp_path: Path) -> None:
    """Version 0.2.0: attested, released, the answer in the order that the reference client needs, and in the log."""
    async with bench(root, tmp_path) as b:
        private = ec.generate_private_key(ec.SECP256R1())
        status, cookie = await old_exchange(b, private)
        assert status == 200
        status, _, answer = await b.ask("GET", f"/kbs/v0/resource/{RESOURCE}", cookie=cookie)
        assert status == 200, answer
        header = trustee.unb64(json.loads(answer)["protected"]).decode()
        again = json.loads(header)
        assert header == json.dumps(again, separators=(",", ":"))
        assert list(again) == ["alg", "enc", "epk"]
        with jwe.open_(answer, private) as opened:
            assert bytes(opened.reveal()) == KEY
        assert [row["kind"] for row in b.store.audit_rows()][-1] == "released"


async def test_the_two_versions_do_not_mix(root: SimulatedRoot, tmp_path: Path) -> None:
    """Each session is judged by the version it began with; a report of one binds nothing in the other."""
    async with bench(root, tmp_path) as b:
        private = ec.generate_private_key(ec.SECP256R1())
        status, _ = await old_exchange(b, private, **{"tee-evidence": b.evidence(bytes(64))})
        assert (status, b.last_findings()) == (401, ["snp.report_data"])
        asked = json.dumps({"version": "0.2.0", "tee": "snp", "extra-params": ""}).encode()
        _, headers, answer = await b.ask("POST", "/kbs/v0/auth", asked)
        new = b.attestation(json.loads(answer)["nonce"])
        cookie = headers["set-cookie"].split(";")[0]
        assert (await b.ask("POST", "/kbs/v0/attest", new, cookie=cookie))[0] == 401
        cookie, nonce = await b.session()
        point = private.public_key().public_numbers()
        x, y = (trustee.b64(value.to_bytes(32, "big")) for value in (point.x, point.y))
        key = {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": x, "y": y}
        bound = hashlib.sha384(trustee.canonical({"nonce": nonce, "tee-pubkey": key})).digest().ljust(64, b"\0")
        wrapped = {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": key},
            "tee-evidence": {"primary_evidence": b.evidence(bound), "additional_evidence": ""},
        }
        status, _, _ = await b.ask("POST", "/kbs/v0/attest", json.dumps(wrapped).encode(), cookie=cookie)
        assert (status, b.last_findings()) == (401, ["snp.report_data"])
