"""The protocol's messages, read strictly: size, depth, duplicates, types (Trustee KBS protocol 0.4.0, and 0.2.0).

Version 0.2.0 differs in the attestation alone: no nonce in it, no wrapper around key and evidence, no additional
evidence, no init-data (section 16.1). Older ones sealed keys in another way, and are not spoken.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from jindiskd.errors import InvalidArgument, JindiskError

VERSION = "0.4.0"
VERSION_0_2 = "0.2.0"
VERSIONS = (VERSION, VERSION_0_2)
MAX_BODY_BYTES = 1 << 20  # a TDX event log fits
MAX_DEPTH = 16
PREFIX = "/kbs/v0"
COOKIE = "kbs-session-id"
ERROR_TYPE = "https://github.com/confidential-containers/kbs/errors/"
_SEGMENT = re.compile(r"[A-Za-z0-9_\-]+[A-Za-z0-9_\-.]*")


class MalformedMessage(JindiskError, code="MalformedMessage"):
    """A protocol message is not what the protocol says."""

    def __init__(self, message: str, problem: str) -> None:
        """`message` names the message, `problem` what is wrong with it; no content of it is quoted."""
        super().__init__(f"{message}: {problem}")
        self.message, self.problem = message, problem


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthRequest:
    """`POST /auth`."""

    version: str
    tee: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """`POST /attest`; nothing of it is believed yet."""

    nonce: str
    tee_pubkey: dict[str, str]
    primary_evidence: Any
    additional_evidence: str
    init_data: dict[str, str] | None


def read_object(body: bytes, message: str) -> dict[str, Any]:
    """A JSON object within the limits.

    Raises:
        MalformedMessage: too long, too deep, not UTF-8 JSON, a member twice, a float, or not an object.
    """
    if len(body) > MAX_BODY_BYTES:
        raise MalformedMessage(message, f"longer than {MAX_BODY_BYTES} bytes")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise MalformedMessage(message, "a member stands twice")
        return found

    def no_float(_text: str) -> float:
        raise MalformedMessage(message, "a number is not an integer")

    try:
        value = json.loads(body.decode(), object_pairs_hook=pairs, parse_float=no_float, parse_constant=no_float)
    except (ValueError, RecursionError) as exc:
        raise MalformedMessage(message, "not JSON") from exc
    if not isinstance(value, dict):
        raise MalformedMessage(message, "not an object")
    _limit_depth(value, message, MAX_DEPTH)
    return value


def _limit_depth(value: Any, message: str, left: int) -> None:
    if left == 0:
        raise MalformedMessage(message, f"nested deeper than {MAX_DEPTH}")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        if isinstance(item, dict | list):
            _limit_depth(item, message, left - 1)


def _text(holder: dict[str, Any], name: str, message: str, limit: int) -> str:
    value = holder.get(name)
    if not isinstance(value, str) or len(value) > limit:
        raise MalformedMessage(message, f"{name} is not a string of at most {limit} characters")
    return value


def parse_request(body: bytes) -> AuthRequest:
    """Read the body of `/auth`. `extra-params` may be anything and is ignored (section 4)."""
    value = read_object(body, "the request")
    return AuthRequest(version=_text(value, "version", "the request", 32), tee=_text(value, "tee", "the request", 32))


def parse_attestation(body: bytes, version: str = VERSION) -> Attestation:
    """Read the body of `/attest` (section 5; in version 0.2.0 section 16.1, whose `nonce` is empty here)."""
    what = "the attestation"
    value = read_object(body, what)
    if version == VERSION_0_2:
        return Attestation(
            nonce="",
            tee_pubkey=_key(value.get("tee-pubkey"), what),
            primary_evidence=value.get("tee-evidence"),
            additional_evidence="",
            init_data=None,
        )
    runtime, evidence = value.get("runtime-data"), value.get("tee-evidence")
    if not isinstance(runtime, dict) or not isinstance(evidence, dict):
        raise MalformedMessage(what, "runtime-data or tee-evidence is not an object")
    init = value.get("init-data")
    if init is not None and (
        not isinstance(init, dict)
        or set(init) != {"format", "body"}
        or init["format"] != "toml"
        or not isinstance(init["body"], str)
    ):
        raise MalformedMessage(what, "init-data is neither null nor a TOML document")
    return Attestation(
        nonce=_text(runtime, "nonce", what, 256),
        tee_pubkey=_key(runtime.get("tee-pubkey"), what),
        primary_evidence=evidence.get("primary_evidence"),
        additional_evidence=_text(evidence, "additional_evidence", what, MAX_BODY_BYTES),
        init_data=init,
    )


def _key(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(part, str) for part in value.values()):
        raise MalformedMessage(what, "tee-pubkey is not an object of strings")
    return value


def check_resource(resource: str) -> str:
    """A resource path `repository/type/tag`, unchanged (section 13).

    Raises:
        InvalidArgument: another number of segments, or a character that does not belong there.
    """
    parts = resource.split("/")
    if len(parts) != 3 or not all(_SEGMENT.fullmatch(part) for part in parts):
        raise InvalidArgument("the resource path", resource, "it has the form repository/type/tag")
    return resource
