"""Addresses of TCP services as people write them: `host:port`, `[::1]:port`, `*:port`. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jindiskd.errors import InvalidArgument

_FORM = re.compile(r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([A-Za-z0-9._-]+|\*)):([0-9]{1,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Host and port."""

    host: str
    """A name or an address; empty for all addresses of this machine."""
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host or "*"
        return f"{host}:{self.port}"


def parse_endpoint(text: str, what: str) -> Endpoint:
    """Read one.

    Raises:
        InvalidArgument: it is none; `what` names the setting or option.
    """
    found = _FORM.fullmatch(text)
    if found is None or not 0 <= int(found[3]) <= 65535:
        raise InvalidArgument(what, text[:200], "write host:port, [IPv6 address]:port, or *:port")
    host = found[1] or found[2]
    return Endpoint(host="" if host == "*" else host, port=int(found[3]))
