"""One request of an administrator: who asks, for what, and what may be asked for by whom."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jindiskd.errors import InvalidArgument
from jindiskd.kbs.messages import MalformedMessage, read_object
from jindiskd.keys.audit import Requester
from jindiskd.keys.roles import Role

Answer = dict[str, Any] | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks."""

    who: Requester
    role: Role
    local: bool
    """Whether by the socket of this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: the variable parts of its path, its query and its body."""

    caller: Caller
    parts: tuple[str, ...]
    query: Mapping[str, str]
    body: bytes

    def members(self, **kinds: type) -> dict[str, Any]:
        """The body as a JSON object with these members, each of its type; those of `NoneType` unions are not for here.

        Raises:
            InvalidArgument: it is another one.
        """
        try:
            found = read_object(self.body or b"{}", "the body")
        except MalformedMessage as exc:
            raise InvalidArgument("the body", f"of {len(self.body)} bytes", exc.problem) from exc
        unknown = sorted(set(found) - set(kinds))
        if unknown:
            raise InvalidArgument("member", unknown[0][:100], f"known are {', '.join(kinds)}")
        for name, value in found.items():
            if type(value) is not kinds[name]:
                raise InvalidArgument(name, type(value).__name__, f"it is a {kinds[name].__name__}")
        return found


Call = Callable[[Asked], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One thing that can be asked for."""

    method: str
    path: re.Pattern[str]
    role: Role
    local: bool
    call: Call
