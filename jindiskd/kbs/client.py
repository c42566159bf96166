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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_REFUSED, JindiskError
from jindiskd.kbs import jwe, jwk
from jindiskd.kbs.binding import report_data
from jindiskd.kbs.freshness import VolumeGrant, VolumeState, dump_release
from jindiskd.kbs.messages import (
    COOKIE,
    PREFIX,
    VERSION,
    VERSION_0_2,
    VERSIONS,
    MalformedMessage,
    check_resource,
    read_object,
)

MAX_ANSWER_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 10
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 5.0
REQUEST_TIME_S = 60.0
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
        self.problem = problem


class BrokerRefused(JindiskError, code="BrokerRefused", exit_code=EXIT_REFUSED):
    """The broker answered that it will not do what was asked."""

    def __init__(self, kind: str, step: str = "", versions: tuple[str, str] | None = None) -> None:
        """`kind` is the protocol's error type, for example `PolicyDeny`; `step` the last word of the path asked for.

        `versions` are the broker's and ours where they differ.
        """
        if versions is not None:
            text = f"the key broker speaks protocol version {versions[0]}, this guest {versions[1]}: use a matching one"
        else:
            text = f"the key broker refused ({kind}): its audit log has the reasons"
        super().__init__(text)
        self.kind, self.step, self.versions = kind, step, versions


class Fenced(BrokerRefused, code="SessionFenced", exit_code=EXIT_REFUSED):
    """The session may not write its volume any more: stop writing, for good."""

    def __init__(self) -> None:
        """Nothing more is known, and nothing more helps."""
        super().__init__("Fenced")


class BrokerMisbehaved(JindiskError, code="BrokerMisbehaved"):
    """The broker's answer breaks the protocol."""

    def __init__(self, problem: str) -> None:
        """`problem` says how."""
        super().__init__(f"the key broker does not follow the protocol: {problem}")


class _TimeOver(Exception):
    """The deadline has passed in the middle of an attempt."""


# Protocol section 9: what may be tried again. Kinds that stand nowhere here are trouble at the broker: back off.
FINAL = frozenset({"PolicyDeny", "PluginNotFound", "InvalidRequestPath", "AdminAuthAccess", "Fenced"})
ONCE_MORE = frozenset({"AttestationError", "TokenVerifierError"})
_VERSIONS = re.compile(r"expect =([0-9.]{1,16}) while the request is ([0-9.]{1,16})")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A secret that an attested guest asks for."""

    method: str
    path: str
    body: bytes = b""

    @classmethod
    def resource(cls, resource: str) -> Ask:
        """A key, by its path `repository/type/tag`."""
        return cls(method="GET", path=f"{PREFIX}/resource/{check_resource(resource)}")

    @classmethod
    def release(cls, resource: str, volume: str) -> Ask:
        """A session of a JinDisk volume (its UUID) with its key; what comes is for `unpacked`."""
        return cls(method="POST", path=f"{PREFIX}/jindisk/release", body=dump_release(resource, volume))


def unpacked(sealed: Secret) -> VolumeGrant:
    """What came for an `Ask.release`; the secret is wiped.

    Raises:
        BrokerMisbehaved: it is none.
    """
    try:
        return VolumeGrant.unpack(sealed)
    except MalformedMessage as exc:
        raise BrokerMisbehaved(exc.problem) from exc


def may_try_again(refused: BrokerRefused, before: int) -> bool:
    """Whether a refusal is worth another attempt from `/auth`; `before` counts refusals of this kind until now."""
    if refused.kind in FINAL or refused.kind.startswith("HTTP status 4"):
        return False
    if refused.kind in ONCE_MORE:
        # At /auth nothing was judged yet, so nothing can come out differently.
        return refused.step != "auth" and before == 0
    return True


def pin_of(certificate: bytes) -> bytes | None:
    """SHA-256 of the public key (DER SubjectPublicKeyInfo) in a certificate; None for what cannot be read as one."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
        return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm):
        return None


class KbsClient:
    """Fetches keys from the one broker that has the pinned key.

    Args:
        connect: makes a connected stream socket to the broker, raising OSError where it cannot; called for each
            connection, and must itself return within a few seconds.
        spki_sha256: SHA-256 (32 bytes) of the DER SubjectPublicKeyInfo of the broker's certificate.
        deadline: `time.monotonic()` after which everything gives up.

    It speaks version 0.4.0, and 0.2.0 with a broker that says it speaks that alone: it is the pinned one that says so.
    """

    def __init__(self, connect: Callable[[], socket.socket], *, spki_sha256: bytes, deadline: float) -> None:
        """Connect nothing yet."""
        self._connect, self._pin, self._deadline = connect, spki_sha256, deadline
        self._version = VERSION
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
            BrokerNotTrusted, BrokerRefused: final. BrokerUnreachable, BrokerMisbehaved: the deadline has passed.
        """
        return self.obtain(tee, [Ask.resource(resource)], evidence)[0]

    def release(
        self, tee: str, resource: str, volume: str, evidence: Callable[[bytes], Mapping[str, Any]]
    ) -> VolumeGrant:
        """Attest and begin a session of a JinDisk volume: key, anchor and session identifier.

        Args:
            tee: the protocol's name of the TEE.
            resource: of the volume's key, `repository/type/tag`.
            volume: UUID of the volume.
            evidence: makes the primary evidence for 64 bytes of report data.

        Raises:
            BrokerNotTrusted, BrokerRefused: final. BrokerUnreachable, BrokerMisbehaved: the deadline has passed.
        """
        return unpacked(self.obtain(tee, [Ask.release(resource, volume)], evidence)[0])

    def obtain(
        self, tee: str, asks: Sequence[Ask], evidence: Callable[[bytes], Mapping[str, Any]]
    ) -> list[Secret]:
        """Attest, and with that one attestation get several secrets, in the order asked for; all of them or none.

        Where an attempt ends before it has all, the next one attests anew and asks for what is missing. Each is
        encrypted to a fresh key that the report binds.

        Args:
            tee: the protocol's name of the TEE.
            asks: what is wanted.
            evidence: makes the primary evidence for 64 bytes of report data.

        Raises:
            BrokerNotTrusted, BrokerRefused: final. BrokerUnreachable, BrokerMisbehaved: the deadline has passed.
        """
        got: list[Secret] = []

        def attempt(channel: Channel) -> None:
            key = ec.generate_private_key(ec.SECP256R1())
            cookie = self._attest(channel, tee, key, evidence)
            for ask in asks[len(got) :]:
                sealed, _ = self._answer(channel, ask.method, ask.path, ask.body, cookie)
                got.append(jwe.open_(sealed, key))

        try:
            self._until_deadline(attempt)
        except BaseException:
            for secret in got:
                secret.close()
            raise
        return got

    def adopt(self, volume: str, session: bytes, sequence: int, root: bytes) -> None:
        """Make a released session the volume's own, from the state found. Until this returns nothing may be written.

        Raises:
            Fenced: the session was replaced, or the state is none that the broker accepts.
            BrokerNotTrusted, BrokerRefused, BrokerUnreachable, BrokerMisbehaved: as for `fetch`.
        """
        self._tell("adopt", VolumeState(volume=volume, session=session, sequence=sequence, root=root))

    def report(self, volume: str, session: bytes, sequence: int, root: bytes) -> None:
        """Tell a state that is durable; from then on no earlier one is accepted. Raises as `adopt`."""
        self._tell("report", VolumeState(volume=volume, session=session, sequence=sequence, root=root))

    def close(self, volume: str, session: bytes, sequence: int, root: bytes) -> None:
        """Tell the last state of the session; nothing may be written after it is sent. Raises as `adopt`."""
        self._tell("close", VolumeState(volume=volume, session=session, sequence=sequence, root=root))

    def stale(self, volume: str, session: bytes, sequence: int, root: bytes) -> None:
        """Tell that the disk's newest state is this one, none that the anchor accepts: the session does not begin.

        Raises as `adopt`.
        """
        self._tell("stale", VolumeState(volume=volume, session=session, sequence=sequence, root=root))

    def _tell(self, verb: str, state: VolumeState) -> None:
        body = state.dump()

        def attempt(channel: Channel) -> None:
            self._answer(channel, "POST", f"{PREFIX}/jindisk/{verb}", body, None)

        # Each message may be sent again: the broker answers a repetition as it answered the first.
        self._until_deadline(attempt)

    def _until_deadline(self, attempt: Callable[[Channel], T]) -> T:
        wait, refusals = FIRST_WAIT_S, 0
        problem: JindiskError = BrokerUnreachable("the time is over")
        while True:
            try:
                with self._channel() as channel:
                    return attempt(channel)
            except _TimeOver:
                raise problem from None  # what went wrong before says more than that the time is over
            except (OSError, EOFError) as exc:
                if time.monotonic() < self._deadline:
                    problem = BrokerUnreachable(type(exc).__name__)
            except MalformedMessage as exc:
                problem = BrokerMisbehaved(exc.problem)
            except BrokerRefused as exc:
                if exc.versions and exc.versions[0] in VERSIONS and exc.versions[0] != self._version == VERSION:
                    self._version = exc.versions[0]
                    continue
                if not may_try_again(exc, refusals):
                    raise
                refusals += exc.kind in ONCE_MORE
                problem = exc
            pause = wait * random.uniform(0.5, 1.0)  # noqa: S311 (jitter, not a secret)
            if time.monotonic() + pause >= self._deadline:
                raise problem
            time.sleep(pause)
            wait = min(wait * 2, LONGEST_WAIT_S)

    def _attest(
        self,
        channel: Channel,
        tee: str,
        key: ec.EllipticCurvePrivateKey,
        evidence: Callable[[bytes], Mapping[str, Any]],
    ) -> str:
        """Run request, challenge, attestation; returns the session's cookie."""
        version = self._version
        request = {"version": version, "tee": tee, "extra-params": {"supported-hash-algorithms": ["sha384"]}}
        body, cookie = self._answer(channel, "POST", f"{PREFIX}/auth", json.dumps(request).encode(), None)
        challenge = read_object(body, "the challenge")
        nonce, extra = challenge.get("nonce"), challenge.get("extra-params")
        if not isinstance(nonce, str) or not 16 <= len(nonce) <= 256 or cookie is None:
            raise MalformedMessage("the challenge", "no nonce or no session")
        if isinstance(extra, dict) and str(extra.get("selected-hash-algorithm", "sha384")).lower() != "sha384":
            raise MalformedMessage("the challenge", "a digest was chosen that was not offered")
        public = jwk.tee_jwk(key.public_key())
        made = evidence(report_data(nonce, public, version=version))
        attestation: dict[str, Any] = {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": public},
            "tee-evidence": {"primary_evidence": made, "additional_evidence": ""},
        }
        if version == VERSION_0_2:
            attestation = {"tee-pubkey": public, "tee-evidence": made}
        self._answer(channel, "POST", f"{PREFIX}/attest", json.dumps(attestation).encode(), cookie)
        return cookie

    def _channel(self) -> Channel:
        """A TLS connection to the pinned broker."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise _TimeOver
        raw = self._connect()
        try:
            raw.settimeout(min(left, 30.0))
            stream = self._context.wrap_socket(raw)
        except BaseException:
            raw.close()
            raise
        if pin_of(stream.getpeercert(binary_form=True) or b"") != self._pin:
            stream.close()
            raise BrokerNotTrusted
        return Channel(stream, self._deadline)

    def _answer(
        self, channel: Channel, method: str, path: str, body: bytes, cookie: str | None
    ) -> tuple[bytes, str | None]:
        status, answer, session = channel.request(method, path, body, cookie)
        if status == 200:
            return answer, session or cookie
        if 300 <= status < 400:
            raise MalformedMessage("the answer", "a redirection")
        step = path.removeprefix(f"{PREFIX}/").split("/")[0]
        try:
            told = read_object(answer, "the error")
        except MalformedMessage:
            told = {}
        kind = str(told.get("type", "")).rsplit("/", 1)[-1]
        if kind == "Fenced":
            raise Fenced
        versions = _VERSIONS.search(str(told.get("detail", ""))) if step == "auth" else None
        raise BrokerRefused(
            kind if re.fullmatch(r"[A-Za-z]{1,40}", kind) else f"HTTP status {status}",
            step,
            (versions[1], versions[2]) if versions else None,
        )


class Channel:
    """One HTTP/1.1 connection: a dozen lines of the protocol suffice, and pull in no library."""

    def __init__(self, stream: ssl.SSLSocket, deadline: float) -> None:
        self.stream, self._deadline = stream, deadline
        self._left = b""

    def __enter__(self) -> Channel:  # noqa: PYI034 (private and final)
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
        self._limit()
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

    def _limit(self) -> None:
        """Set the time for the next step anew: a host that lets bytes through one by one gains nothing."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise _TimeOver
        self.stream.settimeout(min(left, REQUEST_TIME_S))

    def _read(self) -> bytes:
        self._limit()
        data = self.stream.recv(65536)
        if not data:
            raise EOFError("the broker closed the connection")
        return data

