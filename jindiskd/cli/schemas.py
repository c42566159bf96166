"""What each command prints with --json, as JSON Schema; docs/json.md is made from it, tests hold real output to it.

A shape is written short: a type by its word, a list of a shape as a list of one, an object as a dictionary whose keys
end with `?` where they may be missing. `@Image` is an object with the properties of org.jindisk1.Image, as on the bus.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jindiskd.bus.contract import interface

WORDS: Mapping[str, Mapping[str, Any]] = {
    "text": {"type": "string"},
    "hex": {"type": "string", "pattern": "^[0-9a-f]*$"},
    "count": {"type": "integer", "minimum": 0},
    "microseconds": {"type": "integer", "minimum": 0, "description": "since 1970-01-01 UTC"},
    "moment": {"type": "string", "description": "RFC 3339"},
    "yes": {"type": "boolean"},
    "any": {},
    "object": {"type": "object"},
}
BUS = {
    "s": {"type": "string"}, "o": {"type": "string"}, "b": {"type": "boolean"}, "d": {"type": "number"},
    "u": WORDS["count"], "t": WORDS["count"], "as": {"type": "array", "items": {"type": "string"}},
    "ao": {"type": "array", "items": {"type": "string"}}, "aa{sv}": {"type": "array", "items": {"type": "object"}},
}  # fmt: skip
FINDING = {"id": "text", "text": "text", "remedy": "text"}
VOLUME = {
    "volume": "text", "resource": "text", "state": "text", "sequence": "count", "root": "hex", "pending": "yes",
    "rollback-accepted": "yes",
}  # fmt: skip
KEY = {
    "image-id": "text", "name": "text", "platform": "text", "simulated": "yes", "resource": "text", "state": "text",
    "launch-digests": ["hex"], "further-resources": ["text"], "created": "microseconds", "volumes": [VOLUME],
}  # fmt: skip
ROW = {
    "number": "count", "at": "microseconds", "kind": "text", "image-id": "text", "peer": "text", "guest": "text",
    "simulated": "yes", "measurement": "hex", "findings": ["text"], "detail": "text",
}  # fmt: skip
CHECK = {"id": "text", "verdict": "text", "found": "text", "remedy": "text", "tees": ["text"]}
CARD = {"schema": "count", "spki_sha256": "hex", "transfer_key": "object"}
FILES = {"files": [{"path": "text", "changed": "yes"}]}
JOB: Mapping[str, Any] = {"job": {"Path": "text", "+": "@Job"}}
"""Instead of its result, what a command prints with --no-wait."""

SHAPES: Mapping[str, Any] = {
    "status": {
        "service": "@Manager", "key_encryption": "text", "collateral": "count",
        "collateral_expires": "microseconds|null", "warnings": ["text"], "images": "count",
        "images_simulated": "count", "domains": "count", "domains_simulated": "count", "domains_running": "count",
        "domain_states": "object", "jobs_running": "count", "approvals_waiting": "count",
    },
    "monitor": {
        "time": "moment", "event": "text", "action": "text", "data": "object", "changed?": ["text"],
    },
    "doctor": {"checks": [CHECK], "problems": "count"},
    "image build": {"image": "@Image"},
    "image list": {"images": ["@Image"]},
    "image show": {"image": "@Image"},
    "image update": {"image": "@Image"},
    "image clone": {"image": "@Image"},
    "image export": {"image_id": "text", "file": "text", "size_bytes": "count", "sha256": "hex"},
    "image import": {"image": "@Image"},
    "image measure": {"image?": "text", "launch_digest?": "text", "measurements": "object", "inputs": "object",
                      "init_data?": "object", "id_block?": "object", "guest_policy?": "object", "signed?": "object"},
    "image sign": {"image": "@Image"},
    "image volume add": {"image": "@Image"},
    "image volume remove": {"image": "@Image"},
    "image volume list": {"volumes": [{"name": "text", "format": "text", "uuid": "text", "mount": "text",
                                       "size-bytes": "count", "file-bytes": "count"}]},
    "image remove": {"removed": "text"},
    "launch": {"domain": "@Domain"},
    "domain adopt": {"domain": "@Domain"},
    "domain list": {"domains": ["@Domain"]},
    "domain show": {"domain": "@Domain"},
    "domain console": {"console": "text"},
    "domain xml": {"xml": "text"},
    "domain start": {"domain": "@Domain"},
    "domain release": {"released": "text"},
    "domain stop": {"stopped": "text"},
    "domain undefine": {"undefined": "text"},
    "device list": {"devices": ["@Device"]},
    "device show": {"device": "@Device"},
    "device open": {"device": "@Device", "mapped": "text"},
    "device close": {"closed": "text"},
    "job list": {"jobs": ["@Job"]},
    "job show": {"job": {"+": "@Job", "Result?": "text"}},
    "job cancel": {"cancelled": "count|null"},
    "key list": {"keys": [KEY]},
    "key show": {"key": KEY},
    "key revoke": {"key": "@Key"},
    "key reinstate": {"key": "@Key"},
    "key rotate": {"key": "@Key"},
    "key card": CARD,
    "key export": {"image_id": "text", "output": "text"},
    "key accept-rollback": {"key": KEY},
    "key recovery set-key": {"recovery_key": "text"},
    "key recovery copy": {"output": "text"},
    "approval list": {"approvals": ["@Approval"]},
    "approval approve": {"approved": "@Approval"},
    "approval deny": {"denied": "@Approval"},
    "audit list": {"rows": [ROW]},
    "audit verify": {"rows": "count", "head": "hex"},
    "attest verify": {"verdict": "text", "simulated": "yes", "fields": "object", "findings": [FINDING]},
    "attest explain": {
        "row": "count", "at": "moment", "image": "text", "image_id": "text", "peer": "text", "simulated": "yes",
        "findings": [FINDING], "evidence": "object", "explanation": "object",
    },
    "policy show": {"image": "text", "policy": "object"},
    "policy set": {"image": "text", "changed": "yes", "differences": ["text"]},
    "policy edit": {"image": "text", "changed": "yes", "differences": ["text"]},
    "policy check": {"policy?": "object", "image?": "text", "row?": "count", "released?": "yes", "findings?": [FINDING],
                     "verdict?": "text", "simulated?": "yes", "fields?": "object"},
    "collateral status": {"directory": "text", "entries": ["object"], "warnings": ["text"]},
    "collateral fetch": {"directory": "text", "new": ["text"], "files": "count", "problems": ["text"]},
    "collateral import": {"directory": "text", "files": "count"},
    "collateral export": {"bundle": "text", "files": "count"},
    "daemon config": {"settings": [{"name": "text", "value": "any", "origin": "text"}]},
    "system-files install": {**FILES, "next_steps": ["text"]},
    "system-files remove": FILES,
    "broker make-card": CARD,
    "broker metrics": {"metrics": "text"},
}  # fmt: skip
NO_OBJECT: Mapping[str, str] = {
    "completion": "a script, with --json too",
    "broker": "what the broker's administration answers, as docs/broker.md tells",
}
"""Commands, or groups of them, that print something else."""
LEFT = frozenset(
    (
        "image build", "image clone", "image import", "image remove", "image volume add", "image volume remove",
        "launch", "domain start", "domain stop", "domain undefine", "device open", "device close",
    )
)  # fmt: skip
"""Commands with --no-wait."""
LINES = frozenset(("monitor",))
"""Commands that print one object a line, as things happen."""


def schema(command: str) -> dict[str, Any]:
    """The JSON Schema of what a command prints; raises `KeyError` for one that has none."""
    made = _schema(SHAPES[command])
    if _can_be_left(command):
        made = {"anyOf": [made, _schema(JOB)]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _can_be_left(command: str) -> bool:
    return command in LEFT


def _schema(shape: Any) -> dict[str, Any]:
    if isinstance(shape, str):
        if shape.startswith("@"):
            known = interface(f"org.jindisk1.{shape[1:]}").properties
            return _closed({name: BUS[prop.type] for name, prop in known.items()})
        word, _, null = shape.partition("|")
        found = dict(WORDS[word])
        return {**found, "type": [found["type"], "null"]} if null else found
    if isinstance(shape, list):
        return {"type": "array", "items": _schema(shape[0])}
    properties: dict[str, Any] = {}
    optional = set()
    for key, inner in shape.items():
        if key == "+":
            properties |= _schema(inner)["properties"]
            continue
        name = key.removesuffix("?")
        properties[name] = _schema(inner)
        if name != key:
            optional.add(name)
    return _closed(properties, optional)


def _closed(properties: Mapping[str, Any], optional: set[str] | frozenset[str] = frozenset()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


def document() -> str:
    """The reference of all of them, Markdown."""
    lines = [
        "# What `--json` prints",
        "",
        "Made from `jindiskd/cli/schemas.py`, which has it as JSON Schema; the tests hold what commands really print",
        "against it. A word is a type: `text`, `hex` (lower case), `count` (an integer from 0), `microseconds` (since",
        "1970-01-01 UTC), `moment` (RFC 3339), `yes` (a boolean), `object` (of any content), `any`. `?` after a name:",
        "it may be missing. `@Image` is an object with the properties of org.jindisk1.Image and so on, as in",
        "[dbus.md](dbus.md). Keys are added in later releases, and none is changed or goes.",
        "",
        "Errors are not part of it: they are sentences on standard error, or with `--log-json` JSON lines, and the",
        "exit status says of which kind they are ([errors.md](errors.md)).",
        "",
    ]
    for command in SHAPES:
        about = " (one object a line)" if command in LINES else ""
        other = "With `--no-wait` instead: `{\"job\": …}`, a @Job and its `Path`." if _can_be_left(command) else ""
        lines += [f"## {command}{about}", "", "```", _text(SHAPES[command]), "```", ""]
        lines += [other, ""] if other else []
    lines += ["## Others", ""]
    lines += [f"* `{command}`: {what}." for command, what in NO_OBJECT.items()]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _text(shape: Any, indent: int = 0) -> str:
    """A shape as people read it."""
    blank = "  " * (indent + 1)
    if isinstance(shape, str):
        return shape
    if isinstance(shape, list):
        return f"[{_text(shape[0], indent)}, …]"
    rows = [
        f"{blank}… all of {inner}" if key == "+" else
        f"{blank}{json.dumps(key.removesuffix('?'))}{'?' if key.endswith('?') else ''}: {_text(inner, indent + 1)}"
        for key, inner in shape.items()
    ]  # fmt: skip
    return "{\n" + ",\n".join(rows) + "\n" + "  " * indent + "}"
