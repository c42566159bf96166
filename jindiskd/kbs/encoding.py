"""base64url without padding (RFC 7515 section 2), read strictly."""

from __future__ import annotations

import base64
import binascii
import re

from jindiskd.kbs.messages import MalformedMessage

_ALPHABET = re.compile(r"[A-Za-z0-9_-]*")


def encode(data: bytes) -> str:
    """Bytes as base64url text."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: object, what: str, length: int | None = None) -> bytes:
    """Bytes of base64url text; `length` is the exact number of bytes wanted.

    Raises:
        MalformedMessage: another alphabet, padding, non-canonical last bits, or another length.
    """
    if not isinstance(text, str) or not _ALPHABET.fullmatch(text):
        raise MalformedMessage(what, "not base64url")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as exc:
        raise MalformedMessage(what, "not base64url") from exc
    if encode(data) != text:
        raise MalformedMessage(what, "not canonical base64url")
    if length is not None and len(data) != length:
        raise MalformedMessage(what, f"not {length} bytes long")
    return data
