"""Strict JSON documents to and from frozen dataclasses. Standard library only.

A document is what we wrote ourselves and read back, perhaps after somebody changed it: unknown members, missing
members, duplicates, wrong types and floats are errors that name the member.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from typing import Any, TypeVar

from jindiskd.errors import EXIT_INTEGRITY, JindiskError

T = TypeVar("T")


class MalformedDocument(JindiskError, code="MalformedDocument", exit_code=EXIT_INTEGRITY):
    """A JSON document of ours is not what it should be."""

    def __init__(self, document: str, member: str, problem: str) -> None:
        """`document` says which document, `member` the path of the member within it."""
        super().__init__(f"{document}: {member or 'the document'} {problem}")
        self.document, self.member = document, member


def dump(value: Any) -> bytes:
    """A dataclass as UTF-8 JSON: sorted names, two spaces of indentation, a newline at the end; deterministic."""
    return (json.dumps(_plain(value), sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def to_plain(value: Any) -> Any:
    """A dataclass as plain JSON values: dictionaries, lists, strings, integers, booleans and None; bytes as hex."""
    return _plain(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def load(cls: type[T], data: bytes, *, document: str, limit_bytes: int = 1 << 20) -> T:
    """Read a document into dataclass `cls`.

    Fields may be str, int, bool, bytes (hex), enumerations, nested dataclasses, `tuple[X, ...]`, `dict[str, X]` and
    `X | None`. A field with a default may be absent.

    Raises:
        MalformedDocument: anything else than exactly that.
    """
    if len(data) > limit_bytes:
        raise MalformedDocument(document, "", f"is longer than {limit_bytes} bytes")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise MalformedDocument(document, "", "names a member twice")
        return found

    try:
        parsed = json.loads(data, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise MalformedDocument(document, "", "is not JSON") from exc
    return typing.cast("T", _typed(cls, parsed, document, ""))


def _typed(kind: Any, value: Any, document: str, path: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in {types.UnionType, typing.Union}:
        if value is None:
            return None
        kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, document, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise MalformedDocument(document, path, "is not a list")
        item = typing.get_args(kind)[0]
        return tuple(_typed(item, part, document, f"{path}[{i}]") for i, part in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise MalformedDocument(document, path, "is not an object")
        item = typing.get_args(kind)[1]
        return {name: _typed(item, part, document, f"{path}.{name}") for name, part in value.items()}
    return _scalar(kind, value, document, path)


def _scalar(kind: Any, value: Any, document: str, path: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(value)
        except ValueError as exc:
            raise MalformedDocument(document, path, f"is not one of {', '.join(str(m.value) for m in kind)}") from exc
    if kind is bytes:
        try:
            return bytes.fromhex(value)
        except (ValueError, TypeError) as exc:
            raise MalformedDocument(document, path, "is not hexadecimal") from exc
    if kind is Any:
        return value
    if type(value) is not kind:
        raise MalformedDocument(document, path, f"is not of type {kind.__name__}")
    return value


def _dataclass(kind: Any, value: Any, document: str, path: str) -> Any:
    if not isinstance(value, dict):
        raise MalformedDocument(document, path, "is not an object")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise MalformedDocument(document, f"{path}.{name}".lstrip("."), "is not known")
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _typed(hints[name], value[name], document, f"{path}.{name}".lstrip("."))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise MalformedDocument(document, f"{path}.{name}".lstrip("."), "is missing")
    return kind(**arguments)
