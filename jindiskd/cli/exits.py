"""Exit statuses by the names of errors on the bus; the texts are for people and are never looked at.

The errors of the service are defined where they arise, in packages that the command line has no other reason to load.
A test compares this table with the whole tree of errors.
"""

from __future__ import annotations

from collections.abc import Mapping

from jindiskd.bus.contract import FDO
from jindiskd.errors import (
    EXIT_BUSY,
    EXIT_INTEGRITY,
    EXIT_INTERRUPTED,
    EXIT_NOT_AUTHORIZED,
    EXIT_NOT_FOUND,
    EXIT_REFUSED,
    EXIT_UNAVAILABLE,
    EXIT_UNCHANGED,
    EXIT_USAGE,
)

BY_CODE: Mapping[str, int] = {
    "AlreadyExists": EXIT_BUSY,
    "BadConfiguration": EXIT_USAGE,
    "Busy": EXIT_BUSY,
    "Cancelled": EXIT_INTERRUPTED,
    "InvalidArgument": EXIT_USAGE,
    "MalformedDocument": EXIT_INTEGRITY,
    "NotAuthorized": EXIT_NOT_AUTHORIZED,
    "NotConfirmed": EXIT_USAGE,
    "NotFound": EXIT_NOT_FOUND,
    "ServiceUnavailable": EXIT_UNAVAILABLE,
}
"""Codes of our own errors; what is not here is 1."""

BY_NAME: Mapping[str, int] = {
    FDO + ".Error.AccessDenied": EXIT_NOT_AUTHORIZED,
    FDO + ".Error.InteractiveAuthorizationRequired": EXIT_NOT_AUTHORIZED,
    FDO + ".Error.LimitsExceeded": EXIT_BUSY,
    FDO + ".Error.NoReply": EXIT_UNAVAILABLE,
    FDO + ".Error.ServiceUnknown": EXIT_UNAVAILABLE,
    FDO + ".Error.NameHasNoOwner": EXIT_UNAVAILABLE,
    FDO + ".Error.Timeout": EXIT_UNAVAILABLE,
    FDO + ".Error.UnknownObject": EXIT_NOT_FOUND,
    FDO + ".Error.InvalidArgs": EXIT_USAGE,
}
"""Errors of the bus itself; what is not here is 1."""

MEANINGS: Mapping[int, str] = {
    0: "It is done.",
    1: "It failed; standard error says why.",
    EXIT_USAGE: "The command line or the configuration is wrong.",
    EXIT_NOT_FOUND: "What was named does not exist.",
    EXIT_UNCHANGED: "There was nothing to do.",
    EXIT_NOT_AUTHORIZED: "Not authorised.",
    EXIT_BUSY: "It is busy, or in the wrong state.",
    EXIT_REFUSED: "Attestation or the policy refused it.",
    EXIT_INTEGRITY: "Data are not what they should be.",
    EXIT_UNAVAILABLE: "The service, or one that it needs, is not available.",
    EXIT_INTERRUPTED: "It was interrupted or cancelled.",
}
"""For the section EXIT STATUS of the manual pages."""
