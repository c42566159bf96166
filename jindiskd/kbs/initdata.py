"""Init-data: a TOML text chosen at launch, whose digest the launch binds to the report (protocol section 12)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from jindiskd.base import toml
from jindiskd.kbs.messages import MalformedMessage

WHAT = "the init-data"
VERSION = "0.1.0"
ALGORITHMS = ("sha256", "sha384", "sha512")
MAX_TEXT_BYTES = 128 << 10


def read(text: str) -> tuple[bytes, Mapping[str, str]]:
    """Digest and entries of an init-data document. The digest covers the text byte for byte, comments and all.

    Raises:
        MalformedMessage: it is none, of another version, or with another digest than SHA-2.
    """
    try:
        raw = text.encode()
        if len(raw) > MAX_TEXT_BYTES:
            raise MalformedMessage(WHAT, f"longer than {MAX_TEXT_BYTES} bytes")
        value = toml.loads(text)
    except ValueError as exc:  # also of text that has no UTF-8 form, and of numbers that are too long
        raise MalformedMessage(WHAT, "not TOML that can be read") from exc
    algorithm, data = value.get("algorithm"), value.get("data")
    if algorithm not in ALGORITHMS or value.get("version") != VERSION:
        raise MalformedMessage(WHAT, f"not version {VERSION} with one of {', '.join(ALGORITHMS)}")
    if not isinstance(data, dict) or not all(isinstance(entry, str) for entry in data.values()):
        raise MalformedMessage(WHAT, "its data is not a table of strings")
    return hashlib.new(algorithm, raw).digest(), data


def placed(digest: bytes, length: int) -> bytes:
    """The digest as it stands in a hardware field of `length` bytes: zeros at the end, or cut at the end."""
    return digest[:length].ljust(length, b"\0")
