"""A guest that a test plays: it speaks on the sockets that a domain's vsock device would reach.

Its reports come from the domain's simulated firmware, so they are as good as those of a guest that was really booted.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from jindiskd.guest.report import SimulatedFirmware
from jindiskd.kbs import jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.client import KbsClient
from jindiskd.kbs.evidence import snp_to_json

BROKER, FIRMWARE, PROGRESS = 19012, 19013, 19014
REQUEST = b'{"version":"0.4.0","tee":"snp","extra-params":""}'


class Played:
    """The guest of one domain."""

    def __init__(self, home: Path, pin: bytes) -> None:
        """`home` is the directory of the domain's sockets, `pin` the digest of the broker's public key."""
        self.home, self.pin = home, pin
        self._progress: socket.socket | None = None

    def connect(self, port: int = BROKER) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(60)
        try:
            stream.connect(os.fspath(self.home / f"guest_{port}"))
        except BaseException:
            stream.close()
            raise
        return stream

    def say(self, *words: str) -> None:
        """Progress, on a connection that stays open."""
        if self._progress is None:
            self._progress = self.connect(PROGRESS)
        self._progress.sendall("".join(f"{word}\n" for word in words).encode())

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def evidence(self, data: bytes) -> Mapping[str, Any]:
        """Of this launch, binding 64 bytes."""
        found = SimulatedFirmware(lambda: self.connect(FIRMWARE)).get(data)
        return snp_to_json(found.report, found.table)

    def fetch(self, resource: str, within_s: float = 60) -> bytes:
        """Attest as an honest guest does, and get a key."""
        client = KbsClient(self.connect, spki_sha256=self.pin, deadline=time.monotonic() + within_s)
        with client.fetch("snp", resource, self.evidence) as key:
            return bytes(key.reveal())

    def tls(self) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(self.connect())

    def ask(self, method: str, where: str, body: bytes = b"", cookie: str = "") -> tuple[int, str, bytes]:
        """One request on a connection of its own: status, session cookie, body."""
        lines = [f"{method} {where} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}"]
        lines += [f"Cookie: {cookie}"] if cookie else []
        with self.tls() as stream:
            stream.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            found = b""
            while data := stream.recv(65536):
                found += data
        head, _, rest = found.partition(b"\r\n\r\n")
        first, *fields = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
        return int(first.split()[1]), headers.get("set-cookie", "").split(";")[0], rest

    def session(self) -> tuple[str, str]:
        """Cookie and nonce of a fresh session."""
        status, cookie, body = self.ask("POST", "/kbs/v0/auth", REQUEST)
        assert status == 200, body
        return cookie, json.loads(body)["nonce"]

    def attestation(self, nonce: str, key: ec.EllipticCurvePrivateKey | None = None) -> dict[str, Any]:
        """An honest body for this nonce."""
        public = jwk.tee_jwk((key or ec.generate_private_key(ec.SECP256R1())).public_key())
        return {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": public},
            "tee-evidence": {
                "primary_evidence": self.evidence(report_data(nonce, public)),
                "additional_evidence": "",
            },
        }

    def attest(self, body: object, cookie: str) -> tuple[int, bytes]:
        status, _, answer = self.ask("POST", "/kbs/v0/attest", json.dumps(body).encode(), cookie)
        return status, answer
