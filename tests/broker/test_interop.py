"""Guest components as they are: the reference client's order of requests, its retries, and its two peculiarities."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from brokerbench import IMAGE, KEY, Bench, bench, kind
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap, aes_key_wrap

from jindiskd.kbs import initdata, jcs, jwe
from jindiskd.sim.firmware import SimulatedSnpFirmware
from jindiskd.sim.pki import SimulatedRoot

RESOURCE = f"/kbs/v0/resource/default/{IMAGE}/root"
HASHES = {"supported-hash-algorithms": ["sha256", "sha384", "sha512", "sm3"]}
ATTEMPTS = 3


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def kek(z: bytes) -> bytes:
    """The Concat KDF of section 8, written out."""
    alg = b"ECDH-ES+A256KW"
    info = len(alg).to_bytes(4, "big") + alg + bytes(8) + (256).to_bytes(4, "big")
    return hashlib.sha256(b"\0\0\0\1" + z + info).digest()


class ReferenceClient:
    """What the protocol page says of the reference client (sections 4 to 9), with nothing of our own client in it."""

    def __init__(self, b: Bench, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
        self.b, self.key, self.cookie = b, key, ""
        self.requests: list[tuple[str, int]] = []

    def public(self) -> dict[str, str]:
        if isinstance(self.key, rsa.RSAPrivateKey):
            n = self.key.public_key().public_numbers().n.to_bytes(256, "big")
            return {"kty": "RSA", "alg": "RSA-OAEP-256", "n": b64(n), "e": "AQAB"}
        point = self.key.public_key().public_numbers()
        name, width = {"secp256r1": ("P-256", 32), "secp521r1": ("P-521", 66)}[self.key.curve.name]
        x, y = b64(point.x.to_bytes(width, "big")), b64(point.y.to_bytes(width, "big"))
        return {"kty": "EC", "crv": name, "alg": "ECDH-ES+A256KW", "x": x, "y": y}

    async def ask(self, method: str, path: str, told: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        body = json.dumps(told).encode() if told is not None else b""
        more = {"User-Agent": "attestation-agent-kbs-client/0.1.0", "Content-Type": "application/json"}
        status, headers, answer = await self.b.ask(method, path, body, cookie=self.cookie, headers=more)
        if "set-cookie" in headers:
            self.cookie = headers["set-cookie"].split(";")[0]
        self.requests.append((path.split("/")[3], status))
        return status, answer

    async def attest(self) -> bool:
        told = {"version": "0.4.0", "tee": "snp", "extra-params": HASHES}
        status, answer = await self.ask("POST", "/kbs/v0/auth", told)
        assert status == 200
        nonce, public = json.loads(answer)["nonce"], self.public()
        document = {"additional-evidence": "", "nonce": nonce, "tee-pubkey": public}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        bound = hashlib.sha384(text.encode()).digest().ljust(64, b"\0")
        told = {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": public},
            "tee-evidence": {"primary_evidence": self.b.evidence(bound), "additional_evidence": ""},
        }
        return (await self.ask("POST", "/kbs/v0/attest", told))[0] == 200

    async def get(self) -> bytes | None:
        """The resource first; on 401 the handshake, and again: three times in all."""
        for _ in range(ATTEMPTS):
            status, answer = await self.ask("GET", RESOURCE)
            if status == 200:
                return self.opened(json.loads(answer))
            assert status == 401
            if not await self.attest():
                return None
        status, answer = await self.ask("GET", RESOURCE)
        return self.opened(json.loads(answer)) if status == 200 else None

    def opened(self, told: dict[str, str]) -> bytes:
        """As it opens an answer: its own serialisation of the header is the additional data, not what was received."""
        header = json.loads(unb64(told["protected"]))
        if "epk" in header:
            epk = {member: header["epk"][member] for member in ("crv", "kty", "x", "y")}
            again: dict[str, Any] = {"alg": header["alg"], "enc": header["enc"], "epk": epk}
            assert isinstance(self.key, ec.EllipticCurvePrivateKey)
            x, y = (int.from_bytes(unb64(header["epk"][n]), "big") for n in ("x", "y"))
            far = ec.EllipticCurvePublicNumbers(x, y, self.key.curve).public_key()
            assert header["alg"] == "ECDH-ES+A256KW"
            cek = aes_key_unwrap(kek(self.key.exchange(ec.ECDH(), far)), unb64(told["encrypted_key"]))
        else:
            again = {"alg": header["alg"], "enc": header["enc"]}
            assert isinstance(self.key, rsa.RSAPrivateKey)
            oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
            cek = self.key.decrypt(unb64(told["encrypted_key"]), oaep)
        aad = b64(json.dumps(again, separators=(",", ":")).encode()).encode()
        return AESGCM(cek).decrypt(unb64(told["iv"]), unb64(told["ciphertext"]) + unb64(told["tag"]), aad)


def keys() -> dict[str, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey]:
    return {
        "P-256": ec.generate_private_key(ec.SECP256R1()),
        "P-521": ec.generate_private_key(ec.SECP521R1()),
        "RSA": rsa.generate_private_key(65537, 2048),
    }


@pytest.mark.parametrize("name", ["P-256", "P-521", "RSA"])
async def test_the_reference_client_gets_its_key(root: SimulatedRoot, tmp_path: Path, name: str) -> None:
    """It asks for the resource, is sent to attest, and opens the answer in its own way, with each kind of key."""
    async with bench(root, tmp_path) as b:
        client = ReferenceClient(b, keys()[name])
        assert await client.get() == KEY
        assert client.requests == [("resource", 401), ("auth", 200), ("attest", 200), ("resource", 200)]


async def test_one_denial_becomes_three_attestations_and_no_more(root: SimulatedRoot, tmp_path: Path) -> None:
    """The reference client takes 401 for an invitation; each is in the log, and it ends."""
    async with bench(root, tmp_path) as b:
        b.store.revoke(IMAGE)
        client = ReferenceClient(b, keys()["P-256"])
        assert await client.get() is None
        assert [name for name, _ in client.requests].count("attest") <= ATTEMPTS
        rows = [row for row in b.store.audit_rows() if row["kind"] == "refused"]
        assert 1 <= len(rows) <= ATTEMPTS
        assert {finding["id"] for row in rows for finding in row["detail"]["findings"]} == {"key.state"}


async def test_genuine_evidence_alone_is_no_reason_to_release(root: SimulatedRoot, tmp_path: Path) -> None:
    """The reference broker's default policy gives a key to any genuine machine; ours asks which image it runs."""
    async with bench(root, tmp_path) as b:
        b.firmware = SimulatedSnpFirmware(root, bytes(48))
        cookie, token, _ = await b.attested()  # genuine: attested, with a token
        assert token
        status, _, answer = await b.ask("GET", RESOURCE, cookie=cookie)
        assert (status, kind(answer)) == (401, "PolicyDeny")
        assert "snp.measurement" in b.last_findings()
        claims = json.loads(unb64(token.split(".")[1]))["submods"]["cpu0"]
        assert claims["ear.trustworthiness-vector"]["executables"] == 0  # says nothing of what runs


async def test_other_dialects_are_told_which_version_is_spoken(root: SimulatedRoot, tmp_path: Path) -> None:
    """The text by which clients probe a broker's version; an attestation of 0.2.0 is none in a session of 0.4.0."""
    async with bench(root, tmp_path) as b:
        for version in ("0.1.0", "0.1.1", "0.3.0", "0.5.0", "1.0.0", "nonsense"):
            body = json.dumps({"version": version, "tee": "snp", "extra-params": ""}).encode()
            status, _, answer = await b.ask("POST", "/kbs/v0/auth", body)
            assert (status, kind(answer)) == (401, "AttestationError")
            assert f"expect =0.4.0 while the request is {version}" in json.loads(answer)["detail"]
        cookie, nonce = await b.session()
        old = {"tee-pubkey": {}, "tee-evidence": "{}", "nonce": nonce}
        assert (await b.ask("POST", "/kbs/v0/attest", json.dumps(old).encode(), cookie=cookie))[0] == 401


async def test_administration_is_not_where_guests_are(root: SimulatedRoot, tmp_path: Path) -> None:
    """No resource can be written, no policy set, by whoever reaches the guests' port."""
    async with bench(root, tmp_path) as b:
        for method, path in (
            ("POST", RESOURCE),
            ("DELETE", RESOURCE),
            ("POST", "/kbs/v0/resource-policy"),
            ("POST", "/kbs/v0/attestation-policy"),
            ("POST", "/kbs/v0/reference-value"),
            ("GET", "/v1/images"),
            ("GET", "/metrics"),
        ):
            status, _, _ = await b.ask(method, path, b"{}")
            assert status in {401, 404}, (method, path)
        assert await b.fetch() == KEY


def test_answers_of_other_brokers_open_whatever_the_order_of_their_header() -> None:
    """Our client takes the received text, as RFC 7516 says; so brokers that write it otherwise can be used."""
    private, ephemeral = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    point = ephemeral.public_key().public_numbers()
    epk = {"y": b64(point.y.to_bytes(32, "big")), "x": b64(point.x.to_bytes(32, "big")), "kty": "EC", "crv": "P-256"}
    header = json.dumps({"enc": "A256GCM", "epk": epk, "alg": "ECDH-ES+A256KW"}, indent=1)
    cek, protected = bytes(range(32)), b64(header.encode())
    wrapped = aes_key_wrap(kek(ephemeral.exchange(ec.ECDH(), private.public_key())), cek)
    sealed = AESGCM(cek).encrypt(bytes(12), KEY, protected.encode())
    told = {"protected": protected, "encrypted_key": b64(wrapped), "iv": b64(bytes(12))}
    told |= {"ciphertext": b64(sealed[:-16]), "tag": b64(sealed[-16:])}
    with jwe.open_(json.dumps(told).encode(), private) as opened:
        assert bytes(opened.reveal()) == KEY


def test_canonical_json_and_init_data_are_the_recorded_ones(vectors: Path) -> None:
    """The upstream examples, and where init-data is bound in a report."""
    recorded = json.loads((vectors / "kbs/kbs-0.4.0.json").read_text())
    canonical = next(example for example in recorded["public"] if "canonical" in example)
    text = jcs.canonical(canonical["input"])
    assert text.decode() == canonical["canonical"]
    assert hashlib.sha384(text).hexdigest() == canonical["sha384"]
    aad = next(example for example in recorded["public"] if "aad_ascii" in example)
    header = aad["protected_header"]
    plain = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    assert b64(plain.encode()) == aad["aad_ascii"]
    for case in recorded["init_data"]:
        digest, entries = initdata.read(case["toml"])
        assert digest.hex() == case["digest_hex"]
        assert initdata.placed(digest, 32).hex() == case["snp_host_data_hex"]
        assert initdata.placed(digest, 48).hex() == case["tdx_mrconfigid_hex"]
        assert entries
