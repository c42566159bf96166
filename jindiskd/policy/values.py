"""The kinds of values that rules have: what the documents say of each, and what is wrong with one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from jindiskd.attest.snp_report import Product

PRODUCTS = tuple(product.value for product in Product)
VERSION = re.compile(r"(\d{1,3})\.(\d{1,3})(?:\.(\d{1,3}))?")


def setting(section: str, text: str, why: str, *, default: Any, **more: Any) -> Any:
    """A field with what the documents say of it. `range` bounds numbers, `choices` words, `length` bytes."""
    metadata = {"section": section, "help": text, "why": why, **more}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumTcb:
    """Lowest security versions of a product's firmware, component by component."""

    bootloader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0
    fmc: int | None = None
    """Turin only."""


def problem_of(value: Any, metadata: Mapping[str, Any]) -> str:
    """What is wrong with one field's value; empty where nothing is."""
    if value is None:
        return ""
    kind = metadata.get("kind")
    if kind == "time" and value and time_of(value) is None:
        return "it is a time with a zone, such as 2030-01-31T12:00:00Z"
    if kind == "version" and value and VERSION.fullmatch(value) is None:
        return "it is a version such as 1.55 or 1.55.21"
    if "range" in metadata:
        low, high = metadata["range"]
        return "" if low <= value <= high else f"it is {low} to {high}"
    if isinstance(value, dict):
        return _tcb_problem(value)
    if not isinstance(value, tuple):
        return ""
    if len(value) < metadata.get("least", 0):
        return "give at least one value"
    choices = metadata.get("choices")
    if choices and (wrong := [word for word in value if word not in choices]):
        return f"{wrong[0]} is none of {', '.join(choices)}"
    length = metadata.get("length")
    if length and any(len(item) != length for item in value):
        return f"each value has {length} bytes, {2 * length} hexadecimal digits"
    return ""


def _tcb_problem(minimums: Mapping[str, MinimumTcb]) -> str:
    for name, tcb in minimums.items():
        if name not in PRODUCTS:
            return f"{name} is none of {', '.join(PRODUCTS)}"
        if any(not 0 <= part <= 255 for part in (tcb.bootloader, tcb.tee, tcb.snp, tcb.microcode, tcb.fmc or 0)):
            return f"each component of {name} is 0 to 255"
        if tcb.fmc and not Product(name).has_fmc:
            return f"{name} has no component fmc"
    return ""


def time_of(text: str) -> datetime | None:
    """A time with a zone, or None where the text is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found.astimezone(UTC) if found.tzinfo is not None else None


def version_of(text: str) -> tuple[int, int, int]:
    """Major, minor and build; zeros for an empty text."""
    found = VERSION.fullmatch(text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)
