"""The guest's side of the protocol: one broker, known by its public key, over any stream socket.

The broker's identity is checked before a byte of the protocol is sent: whoever can answer in its place could hand the
guest a key, and with a disk made for that key, a system, of its own choice (protocol section 17).
Clocks are the host's: dates in certificates are not looked at, the pin alone decides.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_REFUSED, JindiskError
from jindiskd.kbs import jwe, jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.messages import COOKIE, PREFIX, VERSION, MalformedMessage, check_resource, read_object

MAX_ANSWER_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 10
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 5.0
MAX_ATTESTATIONS = 4
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})(?: [^\r\n]*)?")
_SESSION = re.compile(COOKIE + r"=([0-9a-f]{32})(?:;|$)")


class BrokerNotTrusted(JindiskError, code="BrokerNotTrusted", exit_code=EXIT_REFUSED):
    """Whoever answered has another key than the measured configuration names."""

    def __init__(self) -> None:
        """The digests are public, but not worth a line on a console."""
        super().__init__("the broker's key is not the one in the measured configuration: nothing was sent to it")


class BrokerUnreachable(JindiskError, code="BrokerUnreachable"):
    """No answer within the time."""

    def __init__(self, problem: str) -> None:
        """`problem` says what failed last."""
        super().__init__(f"the key broker could not be reached in time: {problem}")


class BrokerRefused(JindiskError, code="BrokerRefused", exit_code=EXIT_REFUSED):
    """The broker answered that it will not release the key."""

    def __init__(self, kind: str) -> None:
        """`kind` is the protocol's error type, for example `PolicyDeny`."""
        super().__init__(f"the key broker refused ({kind}): its audit log has the reasons")
        self.kind = kind


class BrokerMisbehaved(JindiskError, code="BrokerMisbehaved"):
    """The broker's answer breaks the protocol."""

    def __init__(self, problem: str) -> None:
        """`problem` says how."""
        super().__init__(f"the key broker does not follow the protocol: {problem}")


# Protocol section 9: what may be tried again, and from where.
FINAL = frozenset({"PolicyDeny", "PluginNotFound", "InvalidRequestPath", "AdminAuthAccess"})


class KbsClient:
    """Fetches keys from the one broker that has the pinned key.

    Args:
        connect: makes a connected stream socket to the broker, raising OSError where it cannot; called for each
            connection, and must itself return within a few seconds.
        spki_sha256: SHA-256 (32 bytes) of the DER SubjectPublicKeyInfo of the broker's certificate.
        deadline: `time.monotonic()` after which everything gives up.
    """

    def __init__(self, connect: Callable[[], socket.socket], *, spki_sha256: bytes, deadline: float) -> None:
        """Connect nothing yet."""
        self._connect, self._pin, self._deadline = connect, spki_sha256, deadline
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE  # the pin below is the verification, and an exclusive one

    def fetch(self, tee: str, resource: str, evidence: Callable[[bytes], Mapping[str, Any]]) -> Secret:
        """Attest and get one resource.

        Args:
            tee: the protocol's name of the TEE, for example `snp`.
            resource: `repository/type/tag`.
            evidence: makes the primary evidence for 64 bytes of report data.

        Raises:
            BrokerNotTrusted, BrokerRefused: final. BrokerUnreachable, BrokerMisbehaved: the deadline has passed, or
                attestation was refused as often as is sensible.
        """
        path = f"{PREFIX}/resource/{check_resource(resource)}"
        wait, attestations = FIRST_WAIT_S, 0
        while True:
            try:
                key = ec.generate_private_key(ec.SECP256R1())
                with self._channel() as channel:
                    attestations += 1
                    cookie = self._attest(channel, tee, key, evidence)
                    return jwe.open_(self._answer(channel, "GET", path, b"", cookie)[0], key)
            except (OSError, EOFError) as exc:
                problem: JindiskError = BrokerUnreachable(type(exc).__name__)
            except MalformedMessage as exc:
                problem = BrokerMisbehaved(exc.problem)
            except BrokerRefused as exc:
                problem = exc
                if exc.kind in FINAL or attestations >= MAX_ATTESTATIONS:
                    raise
            pause = wait * random.uniform(0.5, 1.0)  # noqa: S311 (jitter, not a secret)
            if time.monotonic() + pause >= self._deadline:
                raise problem
            time.sleep(pause)
            wait = min(wait * 2, LONGEST_WAIT_S)

    def _attest(
        self,
        channel: _Channel,
        tee: str,
        key: ec.EllipticCurvePrivateKey,
        evidence: Callable[[bytes], Mapping[str, Any]],
    ) -> str:
        """Run request, challenge, attestation; returns the session's cookie."""
        request = {"version": VERSION, "tee": tee, "extra-params": {"supported-hash-algorithms": ["sha384"]}}
        body, cookie = self._answer(channel, "POST", f"{PREFIX}/auth", json.dumps(request).encode(), None)
        challenge = read_object(body, "the challenge")
        nonce, extra = challenge.get("nonce"), challenge.get("extra-params")
        if not isinstance(nonce, str) or not 16 <= len(nonce) <= 256 or cookie is None:
            raise MalformedMessage("the challenge", "no nonce or no session")
        if isinstance(extra, dict) and str(extra.get("selected-hash-algorithm", "sha384")).lower() != "sha384":
            raise MalformedMessage("the challenge", "a digest was chosen that was not offered")
        public = jwk.tee_jwk(key.public_key())
        attestation = {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": public},
            "tee-evidence": {"primary_evidence": evidence(report_data(nonce, public)), "additional_evidence": ""},
        }
        self._answer(channel, "POST", f"{PREFIX}/attest", json.dumps(attestation).encode(), cookie)
        return cookie

    def _channel(self) -> _Channel:
        """A TLS connection to the pinned broker."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise BrokerUnreachable("the time is over")
        raw = self._connect()
        try:
            raw.settimeout(min(left, 30.0))
            stream = self._context.wrap_socket(raw)
        except BaseException:
            raw.close()
            raise
        try:
            certificate = x509.load_der_x509_certificate(stream.getpeercert(binary_form=True) or b"")
            spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            trusted = hashlib.sha256(spki).digest() == self._pin
        except ValueError:
            trusted = False
        if not trusted:
            stream.close()
            raise BrokerNotTrusted
        return _Channel(stream)

    def _answer(
        self, channel: _Channel, method: str, path: str, body: bytes, cookie: str | None
    ) -> tuple[bytes, str | None]:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise BrokerUnreachable("the time is over")
        channel.stream.settimeout(min(left, 60.0))
        status, answer, session = channel.request(method, path, body, cookie)
        if status == 200:
            return answer, session or cookie
        if 300 <= status < 400:
            raise MalformedMessage("the answer", "a redirection")
        try:
            kind = str(read_object(answer, "the error").get("type", "")).rsplit("/", 1)[-1]
        except MalformedMessage:
            kind = ""
        raise BrokerRefused(kind if re.fullmatch(r"[A-Za-z]{1,40}", kind) else f"HTTP status {status}")


class _Channel:
    """One HTTP/1.1 connection: a dozen lines of the protocol suffice, and pull in no library."""

    def __init__(self, stream: ssl.SSLSocket) -> None:
        self.stream = stream
        self._left = b""

    def __enter__(self) -> _Channel:  # noqa: PYI034 (private and final)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stream.close()

    def request(self, method: str, path: str, body: bytes, cookie: str | None) -> tuple[int, bytes, str | None]:
        """Send one request; returns status, body and a new session cookie."""
        lines = [f"{method} {path} HTTP/1.1", "Host: broker", "User-Agent: jindisk", f"Content-Length: {len(body)}"]
        if body:
            lines.append("Content-Type: application/json")
        if cookie:
            lines.append(f"Cookie: {COOKIE}={cookie}")
        self.stream.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        while b"\r\n\r\n" not in self._left:
            if len(self._left) > MAX_HEADER_BYTES:
                raise MalformedMessage("the answer", "its header is too long")
            self._left += self._read()
        head, self._left = self._left.split(b"\r\n\r\n", 1)
        first, *fields = head.split(b"\r\n")
        status = _STATUS.fullmatch(first)
        if status is None:
            raise MalformedMessage("the answer", "not HTTP/1.1")
        headers: dict[str, str] = {}
        for field in fields:
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        length = headers.get("content-length", "")
        if not re.fullmatch(r"\d{1,8}", length) or int(length) > MAX_ANSWER_BYTES or "transfer-encoding" in headers:
            raise MalformedMessage("the answer", "no usable content length")
        while len(self._left) < int(length):
            self._left += self._read()
        answer, self._left = self._left[: int(length)], self._left[int(length) :]
        session = _SESSION.match(headers.get("set-cookie", ""))
        return int(status[1]), answer, session[1] if session else None

    def _read(self) -> bytes:
        data = self.stream.recv(65536)
        if not data:
            raise EOFError("the broker closed the connection")
        return data

