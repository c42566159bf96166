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
    "AlreadyEncrypted": EXIT_USAGE,
    "AlreadyExists": EXIT_BUSY,
    "AnchorFileDamaged": EXIT_INTEGRITY,
    "ApprovalWaiting": EXIT_BUSY,
    "AuditBroken": EXIT_INTEGRITY,
    "BadConfiguration": EXIT_USAGE,
    "BadPolicy": EXIT_USAGE,
    "BaseChanged": EXIT_USAGE,
    "BaseTruncated": EXIT_USAGE,
    "BrokerNotTrusted": EXIT_REFUSED,
    "BrokerRefused": EXIT_REFUSED,
    "BundleRefused": EXIT_USAGE,
    "Busy": EXIT_BUSY,
    "Cancelled": EXIT_INTERRUPTED,
    "DatabaseFailed": EXIT_UNAVAILABLE,
    "DatabaseNewer": EXIT_INTEGRITY,
    "DigestDiffers": EXIT_INTEGRITY,
    "DomainRefused": EXIT_INTEGRITY,
    "EvidenceNotAccepted": EXIT_REFUSED,
    "EvidenceRefused": EXIT_REFUSED,
    "FirmwareUnsuitable": EXIT_USAGE,
    "FetchIncomplete": EXIT_UNAVAILABLE,
    "HandoverUnusable": EXIT_INTEGRITY,
    "IdentityDamaged": EXIT_INTEGRITY,
    "ImageDamaged": EXIT_INTEGRITY,
    "ImageFormatRefused": EXIT_USAGE,
    "InitramfsRefused": EXIT_USAGE,
    "InvalidArgument": EXIT_USAGE,
    "KekMissing": EXIT_INTEGRITY,
    "KekNotUnsealed": EXIT_INTEGRITY,
    "KekUnusable": EXIT_INTEGRITY,
    "KekWrong": EXIT_INTEGRITY,
    "KeyUnreadable": EXIT_INTEGRITY,
    "LaunchRefused": EXIT_REFUSED,
    "LeaseHeld": EXIT_BUSY,
    "Luks2HeaderRefused": EXIT_INTEGRITY,
    "MalformedArchive": EXIT_INTEGRITY,
    "MalformedDocument": EXIT_INTEGRITY,
    "MalformedDomain": EXIT_INTEGRITY,
    "MalformedEvidence": EXIT_REFUSED,
    "NoFirmware": EXIT_NOT_FOUND,
    "NoKernel": EXIT_USAGE,
    "NoPartitionTable": EXIT_USAGE,
    "NoReport": EXIT_REFUSED,
    "NoRootPartition": EXIT_USAGE,
    "NoSecret": EXIT_REFUSED,
    "NotAuthorized": EXIT_NOT_AUTHORIZED,
    "NotConfirmed": EXIT_USAGE,
    "NotFound": EXIT_NOT_FOUND,
    "PartitionTableDamaged": EXIT_USAGE,
    "PluginUnusable": EXIT_USAGE,
    "RecordChanged": EXIT_BUSY,
    "ReleaseRefused": EXIT_REFUSED,
    "RootDamaged": EXIT_USAGE,
    "RootNotExt4": EXIT_USAGE,
    "ServiceUnavailable": EXIT_UNAVAILABLE,
    "SessionFenced": EXIT_REFUSED,
    "SessionRefused": EXIT_REFUSED,
    "SignatureFound": EXIT_BUSY,
    "SimulatedRootDamaged": EXIT_INTEGRITY,
    "StartRefused": EXIT_REFUSED,
    "StreamDamaged": EXIT_INTEGRITY,
    "TarRefused": EXIT_USAGE,
    "TooManySessions": EXIT_BUSY,
    "UnknownCpuModel": EXIT_USAGE,
    "UnsafeCommandLine": EXIT_USAGE,
    "VolumeFaultsFound": EXIT_INTEGRITY,
    "VendorUnavailable": EXIT_UNAVAILABLE,
    "VolumeFenced": EXIT_BUSY,
    "VolumeInconsistent": EXIT_INTEGRITY,
    "VolumeMalformed": EXIT_INTEGRITY,
    "VolumeReadOnly": EXIT_BUSY,
    "VolumeStale": EXIT_INTEGRITY,
    "VolumeUnauthentic": EXIT_INTEGRITY,
    "WrongKey": EXIT_REFUSED,
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
