"""The owner's rules as people write them: TOML with a table a subject, everything optional, all faults told at once.

    [release]
    approval = true
    [snp]
    host_data = ["5a…"]
    [snp.minimum_tcb.Milan]
    snp = 23
    microcode = 213

The settings are the fields of `policy.rules.ReleaseRules`; a field's table is the `section` of its metadata, and within
`[tdx]` and `[sev]` the prefix of its name is left out. Bytes are hexadecimal text, times are TOML times with a zone.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from jindiskd.base import toml
from jindiskd.base.settings import near
from jindiskd.errors import EXIT_USAGE, JindiskError
from jindiskd.policy.rules import PRODUCTS, MinimumTcb, ReleaseRules

LIMIT_BYTES = 64 << 10
WIDTH = 100
ANY = "any"
"""In place of a list: every value is accepted. Only where leaving the setting out does not mean that already."""


class BadPolicy(JindiskError, code="BadPolicy", exit_code=EXIT_USAGE):
    """A policy cannot be used; the text lists all that is wrong, a line each."""

    def __init__(self, faults: typing.Iterable[str]) -> None:
        """`faults` name table, setting, value and what would be right."""
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One setting."""

    section: str
    name: str
    """As written in its table."""
    field: dataclasses.Field[Any]
    kind: Any

    @property
    def default(self) -> Any:
        """What counts where it is not set."""
        if self.field.default_factory is not dataclasses.MISSING:
            return self.field.default_factory()
        return self.field.default

    @property
    def optional(self) -> bool:
        """Whether the value may be None."""
        return typing.get_origin(self.kind) is types.UnionType


def entries() -> Iterator[Entry]:
    """All settings, in the order in which they are shown."""
    hints = typing.get_type_hints(ReleaseRules)
    for item in dataclasses.fields(ReleaseRules):
        section = item.metadata["section"]
        yield Entry(section, item.name.removeprefix(f"{section}_"), item, hints[item.name])


def sections() -> dict[str, dict[str, Entry]]:
    """The tables of a policy and their settings."""
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries():
        found.setdefault(entry.section.partition(".")[0], {})[entry.name] = entry
    return found


# Reading


def read(text: str | bytes, where: str = "the policy") -> ReleaseRules:
    """The rules of a TOML text; `where` is named in front of every fault, for example its file.

    Raises:
        BadPolicy: with every fault.
    """
    faults: list[str] = []
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    tables = sections()
    for section, content in _parsed(text, where).items():
        if section not in tables:
            faults.append(f"{where}: [{section}] is no table of a policy: {near(section, tables)}")
        elif not isinstance(content, Mapping):
            faults.append(f"{where}: {section} is a table: write [{section}]")
        else:
            for name, raw in content.items():
                place = f"{where}: [{section}] {name}"
                entry = tables[section].get(name)
                if entry is None:
                    faults.append(f"{place} is no setting of a policy: {near(name, tables[section])}")
                    continue
                try:
                    values[entry.field.name] = _value(entry, raw)
                    places[entry.field.name] = f"{place} = {_shown(raw)}"
                except ValueError as exc:
                    faults += [f"{place} = {_shown(raw)} {problem}" for problem in exc.args]
    rules = ReleaseRules(**values)
    faults += [f"{places.get(name, f'{where}: {name}')} cannot be: {text}" for name, text in rules.problems()]
    if faults:
        raise BadPolicy(faults)
    return rules


def _shown(raw: Any) -> str:
    text = json.dumps(raw, default=str)
    return text if len(text) <= 120 else text[:120] + "…"


def _parsed(text: str | bytes, where: str) -> Mapping[str, Any]:
    data = text.encode() if isinstance(text, str) else text
    if len(data) > LIMIT_BYTES:
        raise BadPolicy([f"{where}: longer than {LIMIT_BYTES} bytes"])
    try:
        return toml.loads(data.decode())
    except ValueError as exc:
        raise BadPolicy([f"{where}: not TOML: {exc}"]) from exc


def _value(entry: Entry, raw: Any) -> Any:
    """The typed value; raises ValueError with a text for each fault."""
    kind = entry.kind
    if entry.optional:
        if raw == ANY and entry.default is not None:
            return None
        kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
    if entry.field.name == "minimum_tcb":
        return _minimum_tcb(raw)
    if typing.get_origin(kind) is tuple:
        if not isinstance(raw, list) or not all(isinstance(item, str) for item in raw):
            raise ValueError("is not a list of texts")
        return tuple(_bytes(raw)) if typing.get_args(kind)[0] is bytes else tuple(raw)
    if entry.field.metadata.get("kind") == "time":
        if isinstance(raw, datetime) and raw.tzinfo is not None:
            return raw.isoformat()
        raise ValueError("is not a time with a zone: write 2030-01-31T12:00:00Z, without quotes")
    if type(raw) is not kind:
        raise ValueError(f"is not of type {({int: 'integer', bool: 'boolean', str: 'string'})[kind]}")
    return raw


def _bytes(raw: list[str]) -> list[bytes]:
    try:
        return [bytes.fromhex(item) for item in raw]
    except ValueError:
        raise ValueError("has something that is not hexadecimal") from None


def _minimum_tcb(raw: Any) -> dict[str, MinimumTcb]:
    if not isinstance(raw, Mapping):
        raise ValueError("is a table: write [snp.minimum_tcb.Milan]")
    known = [item.name for item in dataclasses.fields(MinimumTcb)]
    faults, found = [], {}
    for product, parts in raw.items():
        if product not in PRODUCTS:
            faults.append(f"names the generation {product}: {near(product, PRODUCTS)}")
        elif not isinstance(parts, Mapping):
            faults.append(f"has for {product} no table: write [snp.minimum_tcb.{product}]")
        else:
            wrong = [name for name in parts if name not in known]
            faults += [f"names the component {name} of {product}: {near(name, known)}" for name in wrong]
            other = [name for name in parts if name in known and type(parts[name]) is not int]
            faults += [f"has for {name} of {product} something that is not an integer" for name in other]
            if not wrong and not other:
                found[product] = MinimumTcb(**parts)
    if faults:
        raise ValueError(*faults)
    return found


# Writing


def write(rules: ReleaseRules, *, explain: bool = True) -> str:
    """The rules as TOML that `read` reads back.

    Args:
        rules: what to write.
        explain: with every setting, its help and why its default is what it is; those at their default stand in a
            comment. Otherwise only what differs from the default.
    """
    out: list[str] = []
    for section, known in sections().items():
        lines: list[str] = []
        tables: list[str] = []
        for entry in known.values():
            value = getattr(rules, entry.field.name)
            if isinstance(value, dict):
                told = _explained(entry) if explain else []
                tables += ["", *told] if told else []
                tables += list(_minimums(value))
                continue
            changed = value != entry.default
            if explain:
                lines += ["", *_explained(entry)]
            if changed:
                lines.append(f"{entry.name} = {_toml(value, entry)}")
            elif explain:
                unset = value is None or value == ""
                lines.append(f"# {entry.name}" + (": not set" if unset else f" = {_toml(value, entry)}"))
        if lines or tables:
            out += ["", f"[{section}]", *lines, *tables] if lines else ["", *tables]
    return "\n".join(out).strip("\n") + ("\n" if out else "")


def _explained(entry: Entry) -> list[str]:
    told = (entry.field.metadata["help"] + ".", f"Default: {entry.field.metadata['why']}.")
    return [f"# {line}" for text in told for line in textwrap.wrap(text[0].upper() + text[1:], WIDTH)]


def _minimums(value: Mapping[str, MinimumTcb]) -> Iterator[str]:
    for product, low in value.items():
        yield ""
        yield f"[snp.minimum_tcb.{product}]"
        for item in dataclasses.fields(low):
            part = getattr(low, item.name)
            if part is not None:
                yield f"{item.name} = {part}"


def _toml(value: Any, entry: Entry) -> str:
    if value is None:
        return f'"{ANY}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple):
        items = [_quoted(item.hex() if isinstance(item, bytes) else item) for item in value]
        short = f"[{', '.join(items)}]"
        return short if len(short) <= 110 else "[\n  " + ",\n  ".join(items) + ",\n]"
    if entry.field.metadata.get("kind") == "time":
        return str(value)
    return _quoted(value)


def _quoted(text: str) -> str:
    """A TOML basic string: as in JSON, but no escaped surrogates, and no bare DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def plain(rules: ReleaseRules) -> dict[str, dict[str, Any]]:
    """The effective value of every setting by table, ready for JSON."""
    found: dict[str, dict[str, Any]] = {}
    for section, known in sections().items():
        found[section] = {name: _plain(getattr(rules, entry.field.name)) for name, entry in known.items()}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [item.hex() if isinstance(item, bytes) else item for item in value]
    if isinstance(value, dict):
        return {name: dataclasses.asdict(low) for name, low in value.items()}
    return value
