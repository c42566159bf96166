"""The messages by which a host has a SEV or SEV-ES launch judged by the owner's broker: two requests and their answers.

Below the protocol's prefix, in JSON with base64; over the TLS stream that ends at the broker:

    POST jindisk/sev-begin     {"image": id, "policy": n, "pdh": ..., "cert-chain": ..., "cpu0-id": ...}
                           ->  {"dh-cert": ..., "session": ...} and the session's cookie
    POST jindisk/sev-approve   {"measurement": ..., "api-major": n, "api-minor": n, "build": n, "policy": n}, the cookie
                           ->  {"header": ..., "secret": ...}

Nothing in them is secret: the session's keys are encrypted to the platform's processor, the secret to the launch.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.sev import (
    HEADER_BYTES,
    MAX_SECRET_BYTES,
    MEASUREMENT_BYTES,
    SESSION_BYTES,
    LaunchReport,
    SealedSecret,
)
from jindiskd.attest.sev_certs import CERTIFICATE_BYTES
from jindiskd.broker.sev import MAX_POLICY, HostPlatform
from jindiskd.kbs.messages import MalformedMessage, read_object

BEGIN, APPROVE = "sev-begin", "sev-approve"
_BEGIN, _APPROVE = "the beginning of a launch", "the launch's measurement"
_BEGUN, _SEALED = "the launch's session", "the launch's secret"
_IMAGE = re.compile(r"[0-9a-zA-Z-]{1,64}")
_NUMBERS = (("api-major", 255), ("api-minor", 255), ("build", 255), ("policy", MAX_POLICY))


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginRequest:
    """`sev-begin`; nothing of it is believed."""

    image_id: str
    policy: int
    host: HostPlatform

    def dump(self) -> bytes:
        """As sent."""
        return json.dumps({"image": self.image_id, "policy": self.policy, **self.host.told()}).encode()


def parse_begin(body: bytes) -> BeginRequest:
    """Read a `sev-begin`.

    Raises:
        MalformedMessage: it is none.
    """
    value = _members(body, _BEGIN, {"image", "policy", "pdh", "cert-chain", "cpu0-id"})
    image = value["image"]
    if not isinstance(image, str) or not _IMAGE.fullmatch(image):
        raise MalformedMessage(_BEGIN, "the image is not an identifier")
    try:
        host = HostPlatform.read(value)
    except MalformedEvidence as exc:
        raise MalformedMessage(_BEGIN, exc.problem) from exc
    return BeginRequest(image_id=image, policy=_number(value, "policy", MAX_POLICY, _BEGIN), host=host)


def dump_begun(dh_certificate: bytes, session: bytes) -> dict[str, str]:
    """The answer to a `sev-begin`."""
    return {"dh-cert": _text(dh_certificate), "session": _text(session)}


def parse_begun(body: bytes) -> tuple[bytes, bytes]:
    """The owner's certificate (2084 bytes) and session (128 bytes).

    Raises:
        MalformedMessage: it is not that.
    """
    value = _members(body, _BEGUN, {"dh-cert", "session"})
    certificate = _bytes(value, "dh-cert", CERTIFICATE_BYTES, CERTIFICATE_BYTES, _BEGUN)
    return certificate, _bytes(value, "session", SESSION_BYTES, SESSION_BYTES, _BEGUN)


def dump_approve(report: LaunchReport) -> bytes:
    """A `sev-approve`."""
    numbers = (report.api_major, report.api_minor, report.build, report.policy)
    named = dict(zip((name for name, _ in _NUMBERS), numbers, strict=True))
    return json.dumps({"measurement": _text(report.measurement), **named}).encode()


def parse_approve(body: bytes) -> LaunchReport:
    """Read a `sev-approve`; nothing of it is believed.

    Raises:
        MalformedMessage: it is none.
    """
    value = _members(body, _APPROVE, {"measurement", *(name for name, _ in _NUMBERS)})
    major, minor, build, policy = (_number(value, name, limit, _APPROVE) for name, limit in _NUMBERS)
    measurement = _bytes(value, "measurement", MEASUREMENT_BYTES, MEASUREMENT_BYTES, _APPROVE)
    return LaunchReport(measurement=measurement, api_major=major, api_minor=minor, build=build, policy=policy)


def dump_sealed(sealed: SealedSecret) -> dict[str, str]:
    """The answer to a `sev-approve`."""
    return {"header": _text(sealed.header), "secret": _text(sealed.payload)}


def parse_sealed(body: bytes) -> SealedSecret:
    """The sealed secret.

    Raises:
        MalformedMessage: it is none.
    """
    value = _members(body, _SEALED, {"header", "secret"})
    payload = _bytes(value, "secret", 16, MAX_SECRET_BYTES, _SEALED)
    if len(payload) % 16:
        raise MalformedMessage(_SEALED, "the secret has no whole number of blocks")
    return SealedSecret(header=_bytes(value, "header", HEADER_BYTES, HEADER_BYTES, _SEALED), payload=payload)


def _members(body: bytes, what: str, names: set[str]) -> dict[str, object]:
    value = read_object(body, what)
    if set(value) != names:
        raise MalformedMessage(what, f"it has other members than {', '.join(sorted(names))}")
    return value


def _number(value: Mapping[str, object], name: str, limit: int, what: str) -> int:
    number = value[name]
    if type(number) is not int or not 0 <= number <= limit:
        raise MalformedMessage(what, f"{name} is not a number of 0 to {limit}")
    return number


def _bytes(value: Mapping[str, object], name: str, low: int, high: int, what: str) -> bytes:
    text = value[name]
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (ValueError, binascii.Error) as exc:
        raise MalformedMessage(what, f"{name} is not base64") from exc
    if not low <= len(data) <= high:
        raise MalformedMessage(what, f"{name} has not its length")
    return data


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
