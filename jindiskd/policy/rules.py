"""The owner's rules for one image, beyond its launch digests. Every default is the strict one of the appraisal.

This is the stored form: JSON (`base.document`), so bytes are hexadecimal. People write the same as TOML
(`policy.form`), where `section` in a field's metadata is its table, and `help` and `why` stand beside it. The digest of
the rules stands in each audit row of a decision, so that it can be told later by which rules it was made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from datetime import datetime

from jindiskd.attest import guest_policy
from jindiskd.attest.model import Finding
from jindiskd.attest.snp_report import FirmwareVersion, GuestPolicy, Tcb
from jindiskd.base import document
from jindiskd.base.platform import Tee
from jindiskd.errors import InvalidArgument
from jindiskd.policy.values import PRODUCTS, MinimumTcb, problem_of, setting, time_of, version_of

__all__ = ["PRODUCTS", "MinimumTcb", "ReleaseRules", "load", "time_of", "version_of"]

NO_HOST_DATA = bytes(32)
NO_REGISTER = bytes(48)
WHAT = "the release rules"
MAX_LEASE_S = 86400
MAX_COUNT = 1_000_000
STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
"""TCB statuses of a TDX platform that an owner may accept; Revoked is never accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRules:
    """What genuine evidence must say, how often a key is given, and what a volume's session must keep to."""

    # Table release.
    approval: bool = setting(
        "release",
        "each guest waits until a person has approved it; starts of one image on one TDX machine are one guest",
        "off: a guest that proves what it is needs nobody",
        default=False,
    )
    releases_per_hour: int | None = setting(
        "release",
        "releases of this image's key within an hour, to all guests together",
        "no limit: the right number is that of the owner's guests; a limit bounds what a leak of evidence can do",
        default=None,
        range=(1, MAX_COUNT),
    )
    releases_per_guest: int | None = setting(
        "release",
        "releases to one launch of a guest, or with TDX to an image on one machine",
        "no limit: a guest whose answer was lost asks again. With 1, root in a running guest cannot ask again",
        default=None,
        range=(1, MAX_COUNT),
    )
    releases_in_all: int | None = setting(
        "release",
        "releases of this image's key for ever; 1 is single use",
        "no limit: every start of a guest is a release",
        default=None,
        range=(1, MAX_COUNT),
    )
    not_before: str = setting(
        "release", "no release before this time (RFC 3339, with zone)", "none", default="", kind="time"
    )
    not_after: str = setting(
        "release",
        "no release after this time (RFC 3339, with zone)",
        "none: a date that is forgotten stops guests from starting",
        default="",
        kind="time",
    )
    lease_s: int = setting(
        "release",
        "JinDisk volumes: seconds that a session may write without an answer of the broker; 0 for no lease",
        "0: a broker that cannot be reached then stops no guest",
        default=0,
        range=(0, MAX_LEASE_S),
    )
    # Table platform.
    allow_simulated: bool | None = setting(
        "platform",
        "accept simulated evidence, which proves nothing",
        "unset: only for an image that was built for a simulated platform, and only where the broker allows it too; "
        "true does not make a real image accept it",
        default=None,
    )
    # Table revocation.
    revocation_required: bool = setting(
        "revocation",
        "refuse SEV-SNP evidence where no current revocation list of AMD's root was at hand",
        "on: what could not be checked is not passed. Fetch or import the lists, which also works without a network",
        default=True,
    )
    revocation_maximum_age_days: int | None = setting(
        "revocation",
        "refuse where AMD's revocation list is older than this",
        "none: the list's own next-update date bounds it",
        default=None,
        range=(1, 3650),
    )
    # Table snp.
    generations: tuple[str, ...] = setting(
        "snp",
        "platform generations allowed",
        "all that are known: each is judged by its own root; leave out those you have no machines of",
        default=PRODUCTS,
        choices=PRODUCTS,
    )
    allow_debug: bool = setting(
        "snp",
        "accept a guest whose policy has DEBUG",
        "off: the host can read and change such a guest's memory",
        default=False,
    )
    allow_migration_agent: bool = setting(
        "snp",
        "accept a guest with a migration agent",
        "off: the agent can export the guest's memory",
        default=False,
    )
    vmpl: int = setting(
        "snp",
        "privilege level that asked for the report",
        "0: the highest; without an SVSM, another level means that something stood above the guest's kernel",
        default=0,
        range=(0, 3),
    )
    measurements: tuple[bytes, ...] = setting(
        "snp",
        "launch digests allowed besides the image's own",
        "none: the image's own digest is what was built. For a second processor count or a firmware update",
        default=(),
        length=48,
    )
    id_key_digests: tuple[bytes, ...] = setting(
        "snp",
        "digests of ID keys whose signed images are allowed; set minimum_guest_svn too",
        "none: nobody but the image itself is trusted",
        default=(),
        length=48,
    )
    author_key_digests: tuple[bytes, ...] = setting(
        "snp", "digests of author keys whose ID keys are allowed", "none: as above", default=(), length=48
    )
    minimum_policy_abi: str = setting(
        "snp",
        "least firmware ABI that the guest's policy must demand, as 1.55",
        "none, unless the image was built with one",
        default="",
        kind="version",
    )
    minimum_guest_svn: int = setting(
        "snp",
        "least security version of a signed image",
        "0: only images with an ID block have one",
        default=0,
        range=(0, (1 << 32) - 1),
    )
    host_data: tuple[bytes, ...] = setting(
        "snp",
        "HOST_DATA values allowed",
        "zeros alone: nothing was bound at launch. Name the digest of your init-data instead",
        default=(NO_HOST_DATA,),
        length=32,
        least=1,
    )
    minimum_tcb: dict[str, MinimumTcb] = field(
        default_factory=dict,
        metadata={
            "section": "snp.minimum_tcb",
            "help": "least firmware versions by generation, as in a report's TCB; a generation not named has the known "
            "minimum, or is refused where that is off or not known",
            "why": "none: known_minimum_tcb has what is known; name here what newer bulletins demand, or less for "
            "machines that cannot be mended. `jindiskctl attest verify` shows those of a real report",
        },
    )
    known_minimum_tcb: bool = setting(
        "snp",
        "for generations that minimum_tcb does not name, require the firmware by which the known holes are mended",
        "on: a correct launch digest on firmware with a hole proves little. docs/policy.md has values and sources; "
        "simulated firmware is left out",
        default=True,
    )
    minimum_firmware: str = setting(
        "snp", "least SNP firmware, as 1.55 or 1.55.21", "none: minimum_tcb is what is signed for", default="",
        kind="version",
    )
    allow_provisional_firmware: bool = setting(
        "snp",
        "accept firmware that is not committed",
        "off: the host can roll such firmware back to one with known holes",
        default=False,
    )
    chip_ids: tuple[bytes, ...] | None = setting(
        "snp",
        "CHIP_ID values of the owner's machines",
        "none kept: any genuine chip. A list stops evidence of a broken chip elsewhere",
        default=None,
        length=64,
    )
    allow_masked_chip_id: bool = setting(
        "snp",
        "accept reports whose host hides the chip's identity",
        "off: such a report cannot be tied to the certificate's chip",
        default=False,
    )
    providers: tuple[str, ...] = setting(
        "snp",
        "providers (CSP identities) whose VLEK may have signed",
        "none: a VLEK vouches for a provider, not for a machine",
        default=(),
    )
    require_smt_off: bool = setting(
        "snp", "simultaneous multithreading must be off", "off: costs half of the processors", default=False
    )
    require_ciphertext_hiding: bool = setting(
        "snp", "the host must not see ciphertext in memory", "off: needs Turin, or later", default=False
    )
    require_single_socket: bool = setting(
        "snp", "the guest must keep to one socket", "off: concerns physical attacks on the link", default=False
    )
    require_alias_check: bool = setting(
        "snp",
        "memory must have been checked for aliases since reset (AMD-SB-3015)",
        "off: needs firmware that reports it; turn it on where the host's memory modules may be tampered with",
        default=False,
    )
    require_aes_256_xts: bool = setting(
        "snp", "the guest's policy must ask for AES-256-XTS", "off: needs Turin, or later", default=False
    )
    require_rapl_off: bool = setting(
        "snp", "power measurement must be off", "off: needs a host that turns it off", default=False
    )
    require_page_swap_disabled: bool = setting(
        "snp", "the guest's policy must refuse page moves and swaps", "off: needs recent firmware", default=False
    )
    require_no_cxl: bool = setting(
        "snp", "the guest's policy must not allow CXL memory", "off: usual policies do not allow it", default=False
    )
    required_mitigations: int = setting(
        "snp",
        "bits that must be set in both mitigation vectors",
        "0: only reports of version 5 have them",
        default=0,
        range=(0, (1 << 63) - 1),
    )
    # Table tdx.
    tdx_statuses: tuple[str, ...] = setting(
        "tdx",
        "TCB statuses accepted; Revoked never is",
        "UpToDate alone: every other says that something known is not mended",
        default=("UpToDate",),
        choices=STATUSES,
        least=1,
    )
    tdx_advisories: tuple[str, ...] = setting(
        "tdx",
        "advisories accepted where a status other than UpToDate is",
        "none: each is to be read before it is accepted",
        default=(),
    )
    tdx_grace_days: int = setting(
        "tdx",
        "days that a platform may be out of date, from the date of its TCB level",
        "0: out of date is refused at once",
        default=0,
        range=(0, 3650),
    )
    tdx_minimum_tcb_evaluation: int = setting(
        "tdx",
        "least tcbEvaluationDataNumber of the collateral",
        "0: raise it with each recovery, so that a host cannot serve an older evaluation that is still valid",
        default=0,
        range=(0, MAX_COUNT),
    )
    tdx_rtmr0: tuple[bytes, ...] | None = setting(
        "tdx",
        "values of RTMR0 (firmware configuration) allowed",
        "none is known before the first launch, so none is accepted; \"any\" accepts every value",
        default=(),
        length=48,
    )
    tdx_rtmr1: tuple[bytes, ...] | None = setting(
        "tdx", "values of RTMR1 (kernel) allowed", "as rtmr0; \"any\" accepts every kernel", default=(), length=48
    )
    tdx_rtmr2: tuple[bytes, ...] | None = setting(
        "tdx",
        "values of RTMR2 (command line, initrd) allowed",
        "as rtmr0; \"any\" accepts every initrd",
        default=(),
        length=48,
    )
    tdx_rtmr3: tuple[bytes, ...] | None = setting(
        "tdx",
        "values of RTMR3 (left to the guest) allowed",
        "zeros: it is extended when the guest has its keys, so that it gets none again",
        default=(NO_REGISTER,),
        length=48,
    )
    tdx_mr_td: tuple[bytes, ...] = setting(
        "tdx", "MRTD values (firmware) allowed besides the image's own", "none: as built", default=(), length=48
    )
    tdx_mr_config_id: tuple[bytes, ...] = setting(
        "tdx",
        "MRCONFIGID values allowed",
        "zeros alone: nothing was bound at launch. Name the digest of your init-data instead",
        default=(NO_REGISTER,),
        length=48,
        least=1,
    )
    tdx_mr_owner: tuple[bytes, ...] = setting(
        "tdx", "MROWNER values allowed", "zeros alone", default=(NO_REGISTER,), length=48, least=1
    )
    tdx_mr_owner_config: tuple[bytes, ...] = setting(
        "tdx", "MROWNERCONFIG values allowed", "zeros alone", default=(NO_REGISTER,), length=48, least=1
    )
    tdx_mr_seam: tuple[bytes, ...] | None = setting(
        "tdx", "TDX modules allowed", "any that Intel's collateral vouches for", default=None, length=48
    )
    tdx_ppids: tuple[bytes, ...] | None = setting(
        "tdx", "PPIDs of the owner's machines", "none kept: any genuine machine", default=None, length=16
    )
    tdx_require_smt_off: bool = setting(
        "tdx", "simultaneous multithreading must be off", "off: costs half of the processors", default=False
    )
    tdx_require_static_platform: bool = setting(
        "tdx", "processors must not be added to the platform", "off: server platforms are dynamic", default=False
    )
    tdx_require_no_cached_keys: bool = setting(
        "tdx", "Intel must not keep the platform's keys", "off: server platforms have them kept", default=False
    )
    # Table sev.
    sev_minimum_api: str = setting(
        "sev",
        "SEV and SEV-ES: least API version and build, as 1.55 or 1.55.21",
        "none: as with minimum_tcb",
        default="",
        kind="version",
    )
    sev_allow_send: bool = setting(
        "sev", "SEV and SEV-ES: accept a policy that lets the host send the guest elsewhere", "off: it need not",
        default=False,
    )

    def check(self) -> ReleaseRules:
        """Return the rules.

        Raises:
            InvalidArgument: a value out of its range; names the first.
        """
        for name, problem in self.problems():
            raise InvalidArgument(name, getattr(self, name), problem)
        return self

    def problems(self) -> list[tuple[str, str]]:
        """Every field whose value cannot be used, and what would be right."""
        found = []
        for item in fields(self):
            problem = problem_of(getattr(self, item.name), item.metadata)
            if problem:
                found.append((item.name, problem))
        if self.not_before and self.not_after and not dict(found).keys() & {"not_before", "not_after"}:
            begin, end = time_of(self.not_before), time_of(self.not_after)
            if begin is not None and end is not None and begin >= end:
                found.append(("not_after", f"it lies after not_before, {self.not_before}"))
        return found

    def tcb_minimums(self) -> dict[str, Tcb]:
        """`minimum_tcb` as the appraisal wants it."""
        return {
            name: Tcb(fmc=low.fmc, bootloader=low.bootloader, tee=low.tee, snp=low.snp, microcode=low.microcode)
            for name, low in self.minimum_tcb.items()
        }

    def firmware_minimum(self) -> FirmwareVersion:
        """`minimum_firmware` as the appraisal wants it."""
        return FirmwareVersion(*version_of(self.minimum_firmware))

    def dump(self) -> str:
        """As stored."""
        return document.dump(self).decode()

    @property
    def digest(self) -> str:
        """SHA-256 of the stored form, hexadecimal."""
        return hashlib.sha256(self.dump().encode()).hexdigest()


def by_guest_policy(policy: int, tee: Tee) -> ReleaseRules:
    """The strict defaults, and that a guest was launched with no less than this policy, which its image was built with.

    Args:
        policy: as `attest.guest_policy` has it. Its word `debug` is what makes these rules laxer than the defaults.
        tee: of the image.
    """
    major, minor = guest_policy.abi(policy, tee)
    least = f"{major}.{minor}" if major or minor else ""
    if tee is not Tee.SNP:
        return ReleaseRules(sev_minimum_api=least)
    return ReleaseRules(
        minimum_policy_abi=least,
        allow_debug=bool(policy & GuestPolicy.DEBUG),
        require_smt_off=not policy & GuestPolicy.SMT,
        require_single_socket=bool(policy & GuestPolicy.SINGLE_SOCKET),
        require_aes_256_xts=bool(policy & GuestPolicy.MEM_AES_256_XTS),
        require_rapl_off=bool(policy & GuestPolicy.RAPL_DIS),
        require_ciphertext_hiding=bool(policy & GuestPolicy.CIPHERTEXT_HIDING_DRAM),
        require_page_swap_disabled=bool(policy & GuestPolicy.PAGE_SWAP_DISABLE),
        require_no_cxl=not policy & GuestPolicy.CXL_ALLOW,
    )


def window(rules: ReleaseRules, now: datetime) -> list[Finding]:
    """What the times in an image's rules say against a release now."""
    begin, end = time_of(rules.not_before), time_of(rules.not_after)
    if begin is not None and now < begin:
        return [Finding("policy.too_early", f"the policy releases the key from {rules.not_before} on")]
    if end is not None and now > end:
        return [Finding("policy.too_late", f"the policy releases the key until {rules.not_after} only")]
    return []


def load(text: str | bytes) -> ReleaseRules:
    """Rules from JSON.

    Raises:
        MalformedDocument, InvalidArgument: they are none.
    """
    data = text.encode() if isinstance(text, str) else text
    return document.load(ReleaseRules, data, document=WHAT, limit_bytes=64 << 10).check()
