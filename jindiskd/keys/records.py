"""What the key store knows of an image, and why it may not give a key."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jindiskd.base.platform import Platform
from jindiskd.errors import EXIT_BUSY, EXIT_REFUSED, JindiskError
from jindiskd.policy import rules as release_rules
from jindiskd.policy.rules import ReleaseRules


class KeyState(enum.StrEnum):
    """Whether a key may be released."""

    PENDING = "pending"  # its image is being built
    ACTIVE = "active"
    REVOKED = "revoked"


class ReleaseRefused(JindiskError, code="ReleaseRefused", exit_code=EXIT_REFUSED):
    """The store does not give this key."""

    def __init__(self, image_id: str, finding: str, reason: str) -> None:
        """`finding` is a dotted id, `reason` a part of a sentence about the key."""
        super().__init__(f"the key of image {image_id} {reason}: it is not released")
        self.finding = finding


class ApprovalWaiting(JindiskError, code="ApprovalWaiting", exit_code=EXIT_BUSY):
    """A person has to approve the release first."""

    def __init__(self, number: int) -> None:
        """`number` of the approval that is waited for."""
        super().__init__(f"the release waits for approval {number}")
        self.number = number


class RecordChanged(JindiskError, code="RecordChanged", exit_code=EXIT_BUSY):
    """The image's record is another one than that by which it was decided."""

    def __init__(self, image_id: str) -> None:
        """Decide again."""
        super().__init__(f"the record of image {image_id} was changed while it was decided about: decide again")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """What the store knows of an image, without its key."""

    image_id: str
    name: str
    platform: Platform
    resource: str
    state: KeyState
    launch_digests: tuple[bytes, ...]
    created: str
    rules: ReleaseRules = field(default_factory=ReleaseRules)
    revision: int = 0
    """Counts the changes of this record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """One key of an image, wrapped."""

    owner: str
    """What it is bound to."""
    resource: str
    wrapped: bytes


def record_of(row: Mapping[Any, Any]) -> ImageRecord:
    """A record from a row of the images table."""
    return ImageRecord(
        image_id=row["image_id"],
        name=row["name"],
        platform=Platform(row["platform"]),
        resource=row["resource"],
        state=KeyState(row["state"]),
        launch_digests=tuple(bytes.fromhex(digest) for digest in row["launch_digests"]),
        created=row["created"],
        # Images of version 1 of the tables have no rules of their own: the strict defaults.
        rules=release_rules.load(row["rules"]) if row["rules"] else ReleaseRules(),
        revision=row["revision"],
    )
