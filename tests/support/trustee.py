"""A key broker that follows the Trustee protocol page and nothing else: no line of it is ours to share.

Written from the page's sections 3 to 11 and 16.1 with the standard library, an independent JOSE implementation for the
token, and primitives. It imports nothing of jindiskd, so what our guest and our relay do with it, they do with the
protocol.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import ssl
import threading
import uuid
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_wrap
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwcrypto import jwk, jws

ERRORS = "https://github.com/confidential-containers/kbs/errors/"
LIFE = timedelta(minutes=5)
TCB = ("bootloader", "tee", 0, 0, 0, 0, "snp", "microcode")
TCB_WITH_FMC = ("fmc", "bootloader", "tee", "snp", 0, 0, 0, "microcode")


class Refused(Exception):
    """An error of section 9."""

    def __init__(self, kind: str, detail: str, status: int = 401) -> None:
        super().__init__(kind)
        self.kind, self.detail, self.status = kind, detail, status


@dataclass
class Session:
    nonce: str
    version: str
    token: str = ""
    claims: dict[str, Any] = field(default_factory=dict)
    key: dict[str, str] = field(default_factory=dict)


def packed(report: dict[str, Any]) -> bytes:
    """Section 11.1: the report's object as the 1184 bytes that were signed."""
    out = bytearray(1184)

    def put(at: int, size: int, value: int) -> None:
        out[at : at + size] = value.to_bytes(size, "little")

    def put_bytes(at: int, size: int, name: str) -> None:
        value = bytes(report[name])
        assert len(value) == size, name
        out[at : at + size] = value

    def put_tcb(at: int, name: str) -> None:
        tcb = report[name]
        order = TCB if tcb.get("fmc") is None else TCB_WITH_FMC
        out[at : at + 8] = bytes(tcb[part] if isinstance(part, str) else part for part in order)

    for at, size, name in (
        (0x00, 4, "version"), (0x04, 4, "guest_svn"), (0x08, 8, "policy"), (0x30, 4, "vmpl"), (0x34, 4, "sig_algo"),
        (0x40, 8, "plat_info"), (0x48, 4, "key_info"),
    ):  # fmt: skip
        put(at, size, report[name])
    for at, size, name in (
        (0x10, 16, "family_id"), (0x20, 16, "image_id"), (0x50, 64, "report_data"), (0x90, 48, "measurement"),
        (0xC0, 32, "host_data"), (0xE0, 48, "id_key_digest"), (0x110, 48, "author_key_digest"),
        (0x140, 32, "report_id"), (0x160, 32, "report_id_ma"), (0x1A0, 64, "chip_id"),
    ):  # fmt: skip
        put_bytes(at, size, name)
    for at, name in ((0x38, "current_tcb"), (0x180, "reported_tcb"), (0x1E0, "committed_tcb"), (0x1F0, "launch_tcb")):
        put_tcb(at, name)
    if report["version"] >= 3:
        out[0x188:0x18B] = bytes([report["cpuid_fam_id"], report["cpuid_mod_id"], report["cpuid_step"]])
    for at, name in ((0x1E8, "current"), (0x1EC, "committed")):
        out[at : at + 3] = bytes([report[name]["build"], report[name]["minor"], report[name]["major"]])
    if report["version"] >= 5:
        put(0x1F8, 8, report["launch_mit_vector"])
        put(0x200, 8, report["current_mit_vector"])
    out[0x2A0:0x2E8], out[0x2E8:0x330] = bytes(report["signature"]["r"]), bytes(report["signature"]["s"])
    return bytes(out)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def canonical(value: object) -> bytes:
    """Section 6: all values are strings and all names ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class TrusteeBroker:
    """Serves on a TCP port of the loopback interface, from threads of its own.

    Args:
        folder: for its certificate.
        roots: DER of the root certificates that it trusts.
        version: the one protocol version that it speaks.
        measurements: launch digests that its policy calls affirming.
        secrets: by resource path.
        scrambled: write the JWE's header with other order and white space than the reference.
    """

    def __init__(
        self,
        folder: Path,
        *,
        roots: list[bytes],
        measurements: list[bytes],
        secrets: dict[str, bytes],
        version: str = "0.4.0",
        scrambled: bool = False,
    ) -> None:
        self.roots, self.version, self.measurements, self.secrets = roots, version, measurements, secrets
        self.scrambled = scrambled
        self.sessions: dict[str, Session] = {}
        self.asked: list[tuple[str, int]] = []
        self.bodies: list[dict[str, Any]] = []
        self.nonce: str | None = None
        self.recorded: dict[str, Any] | None = None
        self.signer = jwk.JWK.generate(kty="EC", crv="P-256")
        private = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kbs")])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).serial_number(3)
        builder = builder.public_key(private.public_key()).not_valid_before(now).not_valid_after(now + LIFE * 100)
        self.certificate = folder / "kbs.pem"
        self.certificate.write_bytes(
            builder.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM)
            + private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        self.spki = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        broker = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def log_message(self, *_: object) -> None:
                return

            def do_GET(self) -> None:
                broker.serve(self)

            def do_POST(self) -> None:
                broker.serve(self)

        class Server(http.server.ThreadingHTTPServer):
            def get_request(self) -> tuple[ssl.SSLSocket, Any]:
                taken, where = super().get_request()
                # The handshake is the thread's of the connection, with its first read.
                return context.wrap_socket(taken, server_side=True, do_handshake_on_connect=False), where

            def handle_error(self, *_: object) -> None:
                return  # a guest that hangs up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", "0")))
        name = request.path.removeprefix("/kbs/v0/").split("/")[0]
        headers: dict[str, str] = {}
        try:
            status, answer = 200, self.answer(request, body, headers)
        except Refused as exc:
            status, answer = exc.status, json.dumps({"type": ERRORS + exc.kind, "detail": exc.detail}).encode()
        self.asked.append((name, status))
        request.send_response(status)
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(answer))}
        for header, value in headers.items():
            request.send_header(header, value)
        request.end_headers()
        request.wfile.write(answer)

    def answer(self, request: http.server.BaseHTTPRequestHandler, body: bytes, headers: dict[str, str]) -> bytes:
        match request.command, request.path.split("/")[1:]:
            case "POST", ["kbs", "v0", "auth"]:
                return self.auth(json.loads(body), headers)
            case "POST", ["kbs", "v0", "attest"]:
                session = self.session(request)
                if not session.token:  # on an attested session nothing is judged again
                    self.attest(session, json.loads(body))
                return json.dumps({"token": session.token}).encode()
            case "GET", ["kbs", "v0", "resource", *path]:
                return self.resource(self.session(request), "/".join(path))
        raise Refused("PluginNotFound", "no such plugin", 404)

    def auth(self, told: dict[str, Any], headers: dict[str, str]) -> bytes:
        if told["version"] != self.version:
            expected = f"expect ={self.version} while the request is {told['version']}"
            raise Refused("AttestationError", f"KBS Client Protocol Version Mismatch: {expected}")
        if told["tee"] not in {"snp", "sample"}:
            raise Refused("AttestationError", "unknown tee")
        nonce = self.nonce or base64.b64encode(os.urandom(32)).decode()
        name = uuid.uuid4().hex
        self.sessions[name] = Session(nonce=nonce, version=told["version"])
        expires = format_datetime(datetime.now(UTC) + LIFE, usegmt=True)
        headers["Set-Cookie"] = f"kbs-session-id={name}; Expires={expires}"
        return json.dumps({"nonce": nonce, "extra-params": ""}).encode()

    def session(self, request: http.server.BaseHTTPRequestHandler) -> Session:
        name = request.headers.get("Cookie", "").removeprefix("kbs-session-id=")
        if name not in self.sessions:
            raise Refused("TokenNotFound", "no session")
        return self.sessions[name]

    def attest(self, session: Session, told: dict[str, Any]) -> None:
        self.bodies.append(told)
        try:
            if session.version == "0.2.0":
                assert told.keys() == {"tee-pubkey", "tee-evidence"}
                key, evidence = told["tee-pubkey"], told["tee-evidence"]
                document: dict[str, Any] = {"nonce": session.nonce, "tee-pubkey": key}
            else:
                assert told.keys() == {"init-data", "runtime-data", "tee-evidence"}
                assert told["runtime-data"].keys() == {"nonce", "tee-pubkey"}
                assert told["runtime-data"]["nonce"] == session.nonce
                key, evidence = told["runtime-data"]["tee-pubkey"], told["tee-evidence"]["primary_evidence"]
                additional = told["tee-evidence"]["additional_evidence"]
                document = {"additional-evidence": additional, "nonce": session.nonce, "tee-pubkey": key}
            assert set(key) in ({"kty", "crv", "alg", "x", "y"}, {"kty", "alg", "n", "e"})
            digest = hashlib.sha384(canonical(document)).digest()
            claims = self.judged(evidence, digest.ljust(64, b"\0"))
        except (AssertionError, KeyError, TypeError, ValueError, InvalidSignature) as exc:
            raise Refused("AttestationError", "Attestation error: RCAR handshake Attest failed") from exc
        session.claims, session.key = claims, key
        claims["ear.veraison.annotated-evidence"]["runtime_data_claims"] = document
        now = int(datetime.now(UTC).timestamp())
        ear = {
            "eat_profile": "tag:github.com,2024:confidential-containers/Trustee", "iss": "CoCo-Attestation-Service",
            "iat": now, "exp": now + 300, "submods": {"cpu0": claims},
        }  # fmt: skip
        token = jws.JWS(json.dumps(ear))
        token.add_signature(self.signer, None, json.dumps({"typ": "JWT", "alg": "ES256"}))
        session.token = token.serialize(compact=True)

    def judged(self, evidence: dict[str, Any], bound: bytes) -> dict[str, Any]:
        """Chain, signature, binding; then what an affirming policy asks for."""
        report = evidence["attestation_report"]
        blob = packed(report)
        found = {entry["cert_type"]: bytes(entry["data"]) for entry in evidence["cert_chain"] or []}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # serial number 0
            chain = [x509.load_der_x509_certificate(found[kind]) for kind in ("VCEK", "ASK", "ARK")]
            assert found["ARK"] in self.roots
            for signed, issuer in ((chain[0], chain[1]), (chain[1], chain[2]), (chain[2], chain[2])):
                signed.verify_directly_issued_by(issuer)
        r, s = (int.from_bytes(bytes(report["signature"][part]), "little") for part in "rs")
        public = chain[0].public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        public.verify(encode_dss_signature(r, s), blob[:0x2A0], ec.ECDSA(hashes.SHA384()))
        assert bytes(report["report_data"]) == bound
        assert report["version"] in {3, 4, 5}
        assert report["vmpl"] == 0
        affirming = bytes(report["measurement"]) in self.measurements and not report["policy"] >> 19 & 1
        return {
            "ear.status": "affirming" if affirming else "contraindicated",
            "ear.trustworthiness-vector": {"executables": 3 if affirming else 33, "hardware": 2, "configuration": 2},
            "ear.appraisal-policy-id": "default",
            "ear.veraison.annotated-evidence": {"snp": {"measurement": bytes(report["measurement"]).hex()}},
        }

    def resource(self, session: Session, path: str) -> bytes:
        if not session.token:
            raise Refused("TokenNotFound", "attest first")
        if session.claims["ear.status"] != "affirming":
            raise Refused("PolicyDeny", "Access denied by policy")
        if path not in self.secrets:
            raise Refused("PluginInternalError", "Plugin internal error")
        if self.recorded is not None:
            return json.dumps(self.recorded).encode()
        return self.sealed(self.secrets[path], session.key)

    def sealed(self, secret: bytes, key: dict[str, str]) -> bytes:
        """Section 8, formula by formula."""
        x, y = (int.from_bytes(unb64(key[name]), "big") for name in "xy")
        far = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        ephemeral = ec.generate_private_key(ec.SECP256R1())
        point = ephemeral.public_key().public_numbers()
        near = {"x": b64(point.x.to_bytes(32, "big")), "y": b64(point.y.to_bytes(32, "big"))}
        epk = {"crv": "P-256", "kty": "EC", **near}
        header: dict[str, Any] = {"alg": "ECDH-ES+A256KW", "enc": "A256GCM", "epk": epk}
        text = json.dumps(header, separators=(",", ":"))
        if self.scrambled:
            text = json.dumps({name: header[name] for name in ("epk", "enc", "alg")}, indent=1)
        protected = b64(text.encode())
        info = bytes.fromhex("0000000e") + b"ECDH-ES+A256KW" + bytes(8) + bytes.fromhex("00000100")
        kek = hashlib.sha256(bytes.fromhex("00000001") + ephemeral.exchange(ec.ECDH(), far) + info).digest()
        cek, iv = os.urandom(32), os.urandom(12)
        body = AESGCM(cek).encrypt(iv, secret, protected.encode())
        told = {"protected": protected, "encrypted_key": b64(aes_key_wrap(kek, cek)), "iv": b64(iv)}
        return json.dumps({**told, "ciphertext": b64(body[:-16]), "tag": b64(body[-16:])}).encode()
