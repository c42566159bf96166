"""Errors of the D-Bus protocol itself, with the names that its specification and its tools know.

What concerns images, domains, keys is a `jindiskd.errors.JindiskError`; this is for calls that are wrong as calls.
"""

from __future__ import annotations

from jindiskd.bus.contract import FDO

ACCESS_DENIED = FDO + ".Error.AccessDenied"
INTERACTION_REQUIRED = FDO + ".Error.InteractiveAuthorizationRequired"
INVALID_ARGS = FDO + ".Error.InvalidArgs"
LIMITS_EXCEEDED = FDO + ".Error.LimitsExceeded"
NO_REPLY = FDO + ".Error.NoReply"
PROPERTY_READ_ONLY = FDO + ".Error.PropertyReadOnly"
UNKNOWN_INTERFACE = FDO + ".Error.UnknownInterface"
UNKNOWN_METHOD = FDO + ".Error.UnknownMethod"
UNKNOWN_OBJECT = FDO + ".Error.UnknownObject"
UNKNOWN_PROPERTY = FDO + ".Error.UnknownProperty"


class BusFault(Exception):
    """An answer to a call: `name` is the error's name on the bus, `text` one sentence for people."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name, self.text = name, text
