"""A broker of a few lines for guests under test: honest unless told otherwise. The real one has tests of its own."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from jindiskd.base.anchor import Anchor, State
from jindiskd.base.secret import Secret
from jindiskd.kbs import binding, evidence, freshness, jwe

ERROR = "https://github.com/confidential-containers/kbs/errors/"


class SmallBroker:
    """TLS and the four steps; `answers` may replace the answer to a step by (status, body)."""

    def __init__(self, directory: Path, key: bytes) -> None:
        private = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker")])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
            .serial_number(7).not_valid_before(now).not_valid_after(now + dt.timedelta(days=2))
            .sign(private, hashes.SHA256())
        )  # fmt: skip
        pem = directory / "broker.pem"
        pem.write_bytes(
            private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + certificate.public_bytes(Encoding.PEM)
        )
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(pem)
        spki = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.spki_sha256 = hashlib.sha256(spki).digest()
        self.key = key
        self.keys: dict[str, bytes] = {}
        """Other keys than that, by their resources."""
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[str] = []
        self.bound: list[bool] = []
        self.session = os.urandom(16).hex()
        self.nonce = "bm9uY2Ugbm9uY2Ugbm9uY2Ugbm9uY2Ugbm9uY2U="
        self.recipient: dict[str, str] = {}
        self.more: Callable[[str, dict], tuple[int, bytes]] | None = None

    def refuse(self, step: str, kind: str) -> None:
        self.answers[step] = (401, json.dumps({"type": ERROR + kind, "detail": ""}).encode())

    def serve(self, raw: socket.socket) -> None:
        raw.settimeout(300)
        try:
            with self.context.wrap_socket(raw, server_side=True) as stream, stream.makefile("rwb") as file:
                while line := file.readline():
                    method, path, _ = line.decode().split()
                    length = 0
                    while (field := file.readline().strip()) != b"":
                        if field.lower().startswith(b"content-length:"):
                            length = int(field.split(b":")[1])
                    self.asked.append(f"{method} {path}")
                    status, body = self._answer(path, json.loads(file.read(length) or b"{}"))
                    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n"
                    head += f"Set-Cookie: kbs-session-id={self.session}\r\n\r\n"
                    file.write(head.encode() + body)
                    file.flush()
        except (ssl.SSLError, OSError):
            return

    def _answer(self, path: str, body: dict) -> tuple[int, bytes]:
        step = path.split("/")[3]
        if step in self.answers:
            return self.answers[step]
        if step == "auth":
            return 200, json.dumps({"nonce": self.nonce, "extra-params": {}}).encode()
        if step == "attest":
            runtime = body["runtime-data"]
            self.recipient = runtime["tee-pubkey"]
            report, _ = evidence.snp_from_json(body["tee-evidence"]["primary_evidence"])
            self.bound.append(report[0x50:0x90] == binding.report_data(runtime["nonce"], self.recipient))
            return 200, b'{"token":"x.y.z"}'
        if step == "resource":
            key = self.keys.get(path.partition("/resource/")[2], self.key)
            return 200, jwe.seal(key, self.recipient).encode()
        assert self.more is not None
        return self.more(path.split("/")[4], body)


class Remembering:
    """The broker's side of section 13 of the format, by its table, for one volume."""

    def __init__(self, broker: SmallBroker, key: Secret, anchor: Anchor, volume: str) -> None:
        self.broker, self.key, self.anchor, self.volume = broker, key, anchor, volume
        self.resource = "default/image/root"
        self.pending: bytes | None = None
        self.told: list[str] = []
        broker.more = self.answer

    @property
    def said(self) -> list[str]:
        """What was told, without reports: how many there are depends on the clock."""
        return [word for word in self.told if word != "report"]

    def answer(self, verb: str, body: dict) -> tuple[int, bytes]:
        self.told.append(verb)
        if verb == "release":
            assert body == {"resource": self.resource, "volume": self.volume}
            self.pending = bytes([len(self.told)]) * 32
            grant = freshness.VolumeGrant(
                key=self.key, anchor=self.anchor, session=self.pending, lease_s=0
            )
            return 200, jwe.seal(grant.pack(), self.broker.recipient).encode()
        if verb == "stale":
            assert bytes.fromhex(body["session"]) == self.pending
            self.told[-1] += f" {body['sequence']}"
            return 200, b"{}"
        session, sequence, root = bytes.fromhex(body["session"]), body["sequence"], bytes.fromhex(body["root"])
        wanted = self.pending if verb == "adopt" else self.anchor.session
        state = State(session=session if verb != "adopt" else self.anchor.session, sequence=sequence, root=root)
        if session != wanted or not self.anchor.accepts(state):
            self.told[-1] += " fenced"
            return 401, json.dumps({"type": ERROR + "Fenced", "detail": ""}).encode()
        self.anchor = Anchor(open=verb != "close", session=session, sequence=sequence, root=root)
        self.pending = None if verb == "adopt" else self.pending
        return 200, b"{}"


def firmware(stream: socket.socket) -> None:
    """The simulated firmware's side of the wire, with a report that nobody signed."""
    magic, version, data = struct.unpack("<4sI64s", stream.recv(72, socket.MSG_WAITALL))
    assert (magic, version) == (b"JSIM", 1)
    report = bytearray(1184)
    report[0:4] = (3).to_bytes(4, "little")
    report[0x50:0x90] = data
    stream.sendall(struct.pack("<II", 0, len(report)) + report + struct.pack("<I", 0))
