"""The owner's rules for one image, beyond its launch digests. Every default is the strict one of the appraisal.

Written as JSON (`base.document`), so bytes are hexadecimal. The digest of the rules stands in each audit row of a
decision, so that it can be told later by which rules it was made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from jindiskd.attest.snp_report import Product, Tcb
from jindiskd.base import document
from jindiskd.errors import InvalidArgument

NO_HOST_DATA = bytes(32)
WHAT = "the release rules"
MAX_LEASE_S = 86400
MAX_COUNT = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumTcb:
    """Lowest security versions of a product's firmware, component by component."""

    bootloader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0
    fmc: int | None = None
    """Turin only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRules:
    """What a genuine report must say, how often a key is given, and what a volume's session must keep to."""

    host_data: tuple[bytes, ...] = (NO_HOST_DATA,)
    """HOST_DATA values (32 bytes) that are allowed; zeros where nothing was bound at launch."""
    minimum_tcb: dict[str, MinimumTcb] = field(default_factory=dict)
    """By product, for example `Milan`. Once one is named, evidence of a product that is not named is refused."""
    minimum_guest_svn: int = 0
    chip_ids: tuple[bytes, ...] | None = None
    """CHIP_ID values (64 bytes) of the owner's machines; none kept if absent."""
    require_smt_off: bool = False
    require_ciphertext_hiding: bool = False
    require_single_socket: bool = False
    require_alias_check: bool = False
    approval: bool = False
    """Whether each guest waits until a person has approved it."""
    releases_per_hour: int | None = None
    """Of this image, to all guests together."""
    releases_per_guest: int | None = None
    """To one launch of a guest (one REPORT_ID): root in a guest can ask again after boot, and this ends that. A guest
    whose answer was lost asks again too, so 1 trades availability."""
    lease_s: int = 0
    """Volumes: how long a session may write without an answer; 0 for no lease."""

    def check(self) -> ReleaseRules:
        """Return the rules.

        Raises:
            InvalidArgument: a value out of its range.
        """
        if any(len(value) != 32 for value in self.host_data) or not self.host_data:
            raise InvalidArgument("host_data", "of another length", "give at least one value of 32 bytes")
        if any(len(value) != 64 for value in self.chip_ids or ()):
            raise InvalidArgument("chip_ids", "of another length", "a chip id has 64 bytes")
        products = [product.value for product in Product]
        for name, tcb in self.minimum_tcb.items():
            if name not in products:
                raise InvalidArgument("product in minimum_tcb", name, f"it is one of {', '.join(products)}")
            if any(not 0 <= part <= 255 for part in (tcb.bootloader, tcb.tee, tcb.snp, tcb.microcode, tcb.fmc or 0)):
                raise InvalidArgument("minimum_tcb of", name, "each component is 0 to 255")
        counts = (self.releases_per_hour, self.releases_per_guest)
        if any(count is not None and not 1 <= count <= MAX_COUNT for count in counts):
            raise InvalidArgument("a limit of releases", counts, f"it is 1 to {MAX_COUNT}, or absent")
        if not 0 <= self.lease_s <= MAX_LEASE_S or self.minimum_guest_svn < 0:
            raise InvalidArgument("lease_s", self.lease_s, f"it is 0 to {MAX_LEASE_S} seconds")
        return self

    def tcb_minimums(self) -> dict[str, Tcb]:
        """`minimum_tcb` as the appraisal wants it."""
        return {
            name: Tcb(fmc=low.fmc, bootloader=low.bootloader, tee=low.tee, snp=low.snp, microcode=low.microcode)
            for name, low in self.minimum_tcb.items()
        }

    def dump(self) -> str:
        """As stored."""
        return document.dump(self).decode()

    @property
    def digest(self) -> str:
        """SHA-256 of the stored form, hexadecimal."""
        return hashlib.sha256(self.dump().encode()).hexdigest()


def load(text: str | bytes) -> ReleaseRules:
    """Rules from JSON.

    Raises:
        MalformedDocument, InvalidArgument: they are none.
    """
    data = text.encode() if isinstance(text, str) else text
    return document.load(ReleaseRules, data, document=WHAT, limit_bytes=64 << 10).check()
