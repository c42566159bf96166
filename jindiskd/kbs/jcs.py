"""Canonical JSON (RFC 8785) for the documents the protocol hashes: strings, lists, objects, integers; no floats."""

from __future__ import annotations

import json
from typing import Any


def canonical(value: Any) -> bytes:
    """The UTF-8 bytes that both sides hash.

    Member names must be ASCII, so that sorting by code point and by UTF-16 unit is one order (RFC 8785 section 3.2.3).

    Raises:
        ValueError: a float, or a member name outside ASCII.
    """
    _check(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _check(value: Any) -> None:
    if isinstance(value, float):
        raise ValueError("canonical JSON here has no floating-point numbers")
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str) or not name.isascii():
                raise ValueError("a member name is not ASCII")
            _check(item)
    elif isinstance(value, list):
        for item in value:
            _check(item)
