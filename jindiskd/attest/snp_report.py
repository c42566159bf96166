"""The SEV-SNP attestation report, versions 2 to 5: bytes to fields and back. Believes nothing.

Source: AMD 56860 "SEV Secure Nested Paging Firmware ABI Specification", structure ATTESTATION_REPORT (1184 bytes in
every version), guest policy, and TCB_VERSION. All integers are little-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace
from functools import lru_cache

from jindiskd.attest.model import MalformedEvidence

REPORT_BYTES = 0x4A0
SIGNED_BYTES = 0x2A0
"""The signature covers this many bytes from the start; what follows R and S is covered by nothing."""
VERSIONS = range(2, 6)
SIGNATURE_ECDSA_P384_SHA384 = 1
KNOWN_POLICY_BITS = (1 << 26) - 1
KNOWN_PLATFORM_BITS = 0b1011_1111
KNOWN_KEY_BITS = 0b1_1111
HOST_REQUESTED_VMPL = 0xFFFFFFFF
TCB_OFFSETS = (0x38, 0x180, 0x1E0, 0x1F0)
LAYOUT = struct.Struct("<IIQ16s16sII8sQII64s48s32s48s48s32s32s8s24x64s8s4s4s8sQQ152x72s72s")
"""Every field in its place; the processor's identity, 3 bytes at 0x188 since version 3, is read by itself."""


class Product(enum.StrEnum):
    """Processor lines, by the names that AMD's key server uses."""

    MILAN = "Milan"
    GENOA = "Genoa"
    TURIN = "Turin"
    VENICE = "Venice"

    @property
    def has_fmc(self) -> bool:
        """True where TCB_VERSION begins with the FMC component and chip identities have 8 bytes."""
        return self in {Product.TURIN, Product.VENICE}


class GuestPolicy(enum.IntFlag):
    """Bits of POLICY above the two bytes of the least firmware ABI version."""

    SMT = 1 << 16
    RESERVED_ONE = 1 << 17
    MIGRATE_MA = 1 << 18
    DEBUG = 1 << 19
    SINGLE_SOCKET = 1 << 20
    CXL_ALLOW = 1 << 21
    MEM_AES_256_XTS = 1 << 22
    RAPL_DIS = 1 << 23
    CIPHERTEXT_HIDING_DRAM = 1 << 24
    PAGE_SWAP_DISABLE = 1 << 25


RESERVED_ONE = int(GuestPolicy.RESERVED_ONE)
"""The bit of POLICY that must be set."""

class PlatformInfo(enum.IntFlag):
    """Bits of PLATFORM_INFO."""

    SMT_EN = 1 << 0
    TSME_EN = 1 << 1
    ECC_EN = 1 << 2
    RAPL_DIS = 1 << 3
    CIPHERTEXT_HIDING_DRAM_EN = 1 << 4
    ALIAS_CHECK_COMPLETE = 1 << 5
    TIO_EN = 1 << 7


class Signer(enum.StrEnum):
    """The kind of key that signed a report: the chip's, one loaded by a cloud provider, or none."""

    VCEK = "vcek"
    VLEK = "vlek"
    NONE = "none"
    RESERVED = "reserved"


SIGNERS = {0: Signer.VCEK, 1: Signer.VLEK, 7: Signer.NONE}
"""By KEY_INFO bits 4:2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tcb:
    """Security versions of the platform's parts. Never ordered as one number: compare part by part."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None
    """Only where `Product.has_fmc`, else None."""

    def below(self, minimum: Tcb) -> list[str]:
        """Names of the parts that are below those of `minimum`; a part that is missing counts as 0."""
        parts = (
            ("bootloader", self.bootloader, minimum.bootloader),
            ("tee", self.tee, minimum.tee),
            ("snp", self.snp, minimum.snp),
            ("microcode", self.microcode, minimum.microcode),
            ("fmc", self.fmc or 0, minimum.fmc or 0),
        )
        return [name for name, has, least in parts if has < least]

    def __str__(self) -> str:
        first = "" if self.fmc is None else f"fmc {self.fmc}, "
        return f"{first}boot loader {self.bootloader}, TEE {self.tee}, SNP {self.snp}, microcode {self.microcode}"


@dataclass(frozen=True, slots=True, order=True)
class FirmwareVersion:
    """Version of the SNP firmware; ordered as one would expect."""

    major: int
    minor: int
    build: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.build}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpReport:
    """A report's fields, as reported and not believed. Names follow the specification's."""

    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algorithm: int
    current_tcb: Tcb
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: Tcb
    cpuid_family: int | None
    """Combined family, model and stepping; None in version 2."""
    cpuid_model: int | None
    cpuid_stepping: int | None
    chip_id: bytes
    committed_tcb: Tcb
    current_version: FirmwareVersion
    committed_version: FirmwareVersion
    launch_tcb: Tcb
    launch_mit_vector: int | None
    """Mitigations at launch and now, one bit each; None before version 5."""
    current_mit_vector: int | None
    signature_r: int
    signature_s: int
    product: Product | None
    """From the processor's family and model, or as the caller said for version 2; None where that is not known."""

    @property
    def signer(self) -> Signer:
        """KEY_INFO bits 4:2."""
        return SIGNERS.get(self.key_info >> 2 & 7, Signer.RESERVED)

    @property
    def author_key_enabled(self) -> bool:
        """KEY_INFO bit 0: AUTHOR_KEY_DIGEST was checked by the firmware."""
        return bool(self.key_info & 1)

    @property
    def policy_flags(self) -> GuestPolicy:
        """The named bits of POLICY."""
        return GuestPolicy(self.policy & 0x3FF0000)

    @property
    def policy_abi(self) -> tuple[int, int]:
        """Least firmware ABI, major and minor, that the guest accepts."""
        return self.policy >> 8 & 0xFF, self.policy & 0xFF

    @property
    def platform_flags(self) -> PlatformInfo:
        """The named bits of PLATFORM_INFO."""
        return PlatformInfo(self.platform_info & KNOWN_PLATFORM_BITS)

    @property
    def chip_id_masked(self) -> bool:
        """True where the host hides the chip's identity."""
        return not any(self.chip_id)


def product_of(family: int, model: int) -> Product | None:
    """Processor line of a combined family and model (AMD 57230 and the processor manuals), None if not known."""
    if family == 0x19 and model <= 0x0F:
        return Product.MILAN
    if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
        return Product.GENOA
    if family == 0x1A and model <= 0x11:
        return Product.TURIN
    if family == 0x1A and (0x50 <= model <= 0x57 or 0x90 <= model <= 0xAF or 0xC0 <= model <= 0xC7):
        return Product.VENICE
    return None


@lru_cache(maxsize=256)
def parse_tcb(raw: bytes, product: Product | None) -> Tcb:
    """Read the 8 bytes of TCB_VERSION in the layout of `product`; None has that of Milan and Genoa."""
    if product is not None and product.has_fmc:
        return Tcb(fmc=raw[0], bootloader=raw[1], tee=raw[2], snp=raw[3], microcode=raw[7])
    return Tcb(bootloader=raw[0], tee=raw[1], snp=raw[6], microcode=raw[7])


def encode_tcb(tcb: Tcb) -> bytes:
    """The 8 bytes of TCB_VERSION: with the FMC component if there is one, else in the layout of Milan and Genoa."""
    if tcb.fmc is not None:
        return bytes([tcb.fmc, tcb.bootloader, tcb.tee, tcb.snp, 0, 0, 0, tcb.microcode])
    return bytes([tcb.bootloader, tcb.tee, 0, 0, 0, 0, tcb.snp, tcb.microcode])


def parse_report(blob: bytes, *, product: Product | None = None) -> SnpReport:
    """Split a report into its fields; believe none of them.

    Args:
        blob: exactly 1184 bytes.
        product: for a version 2 report, which does not name its product: the line that its certificate names. Without
            it, Turin's layout is taken for a chip identity with zeros from byte 8 on. Later versions ignore this.

    Raises:
        MalformedEvidence: another length, a version outside 2 to 5, or a processor that is not known.
    """
    if len(blob) != REPORT_BYTES:
        raise MalformedEvidence("SEV-SNP report", f"it has {len(blob)} bytes instead of {REPORT_BYTES}")
    version = int.from_bytes(blob[0:4], "little")
    if version not in VERSIONS:
        raise MalformedEvidence("SEV-SNP report", f"version {version} is not among 2 to 5")
    cpuid: tuple[int | None, int | None, int | None] = (None, None, None)
    chip_id = blob[0x1A0:0x1E0]
    if version >= 3:
        cpuid = (blob[0x188], blob[0x189], blob[0x18A])
        product = product_of(blob[0x188], blob[0x189])
        if product is None:
            raise MalformedEvidence(
                "SEV-SNP report", f"processor family 0x{blob[0x188]:x} model 0x{blob[0x189]:x} is not known"
            )
    elif product is None and any(chip_id) and not any(chip_id[8:]):
        product = Product.TURIN

    (
        _version, guest_svn, policy, family_id, image_id, vmpl, algorithm, current_tcb, platform_info, key_info, _zero,
        report_data, measurement, host_data, id_key_digest, author_key_digest, report_id, report_id_ma, reported_tcb,
        chip_id, committed_tcb, current, committed, launch_tcb, launch_mit, current_mit, r, s,
    ) = LAYOUT.unpack_from(blob)  # fmt: skip
    return SnpReport(
        version=version,
        guest_svn=guest_svn,
        policy=policy,
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        signature_algorithm=algorithm,
        current_tcb=parse_tcb(current_tcb, product),
        platform_info=platform_info,
        key_info=key_info,
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        author_key_digest=author_key_digest,
        report_id=report_id,
        report_id_ma=report_id_ma,
        reported_tcb=parse_tcb(reported_tcb, product),
        cpuid_family=cpuid[0],
        cpuid_model=cpuid[1],
        cpuid_stepping=cpuid[2],
        chip_id=chip_id,
        committed_tcb=parse_tcb(committed_tcb, product),
        current_version=FirmwareVersion(current[2], current[1], current[0]),
        committed_version=FirmwareVersion(committed[2], committed[1], committed[0]),
        launch_tcb=parse_tcb(launch_tcb, product),
        launch_mit_vector=launch_mit if version >= 5 else None,
        current_mit_vector=current_mit if version >= 5 else None,
        signature_r=int.from_bytes(r, "little"),
        signature_s=int.from_bytes(s, "little"),
        product=product,
    )


def encode_report(report: SnpReport) -> bytes:
    """The 1184 bytes of a report, with zeros in every reserved place; the inverse of `parse_report`.

    For any report with zeros there, `encode_report(parse_report(blob)) == blob`.
    """
    out = bytearray(REPORT_BYTES)
    struct.pack_into("<IIQ", out, 0, report.version, report.guest_svn, report.policy)
    out[0x10:0x30] = report.family_id + report.image_id
    struct.pack_into("<II", out, 0x30, report.vmpl, report.signature_algorithm)
    out[0x38:0x40] = encode_tcb(report.current_tcb)
    struct.pack_into("<QI", out, 0x40, report.platform_info, report.key_info)
    out[0x50:0x180] = b"".join(
        (
            report.report_data,
            report.measurement,
            report.host_data,
            report.id_key_digest,
            report.author_key_digest,
            report.report_id,
            report.report_id_ma,
        )
    )
    out[0x180:0x188] = encode_tcb(report.reported_tcb)
    if report.version >= 3:
        out[0x188:0x18B] = bytes([report.cpuid_family or 0, report.cpuid_model or 0, report.cpuid_stepping or 0])
    out[0x1A0:0x1E0] = report.chip_id
    out[0x1E0:0x1E8] = encode_tcb(report.committed_tcb)
    for at, version in ((0x1E8, report.current_version), (0x1EC, report.committed_version)):
        out[at : at + 3] = bytes([version.build, version.minor, version.major])
    out[0x1F0:0x1F8] = encode_tcb(report.launch_tcb)
    if report.version >= 5:
        struct.pack_into("<QQ", out, 0x1F8, report.launch_mit_vector or 0, report.current_mit_vector or 0)
    out[0x2A0:0x2E8] = report.signature_r.to_bytes(72, "little")
    out[0x2E8:0x330] = report.signature_s.to_bytes(72, "little")
    if len(out) != REPORT_BYTES:
        raise ValueError("a field of the report has the wrong length")
    return bytes(out)


def with_signature(report: SnpReport, r: int, s: int) -> SnpReport:
    """The same report with another signature."""
    return replace(report, signature_r=r, signature_s=s)


@lru_cache(maxsize=16)
def _reserved(version: int, fmc: bool) -> int:
    """A report as one little-endian number with ones wherever its version and TCB layout have no field."""
    places = [(0x4C, 0x50), (0x18B, 0x1A0), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x208, SIGNED_BYTES)]
    places.append((0x330, REPORT_BYTES))
    places += [(at + 4, at + 7) if fmc else (at + 2, at + 6) for at in TCB_OFFSETS]
    if version < 3:
        places.append((0x188, 0x18B))
    if version < 5:
        places.append((0x1F8, 0x208))
    mask = bytearray(REPORT_BYTES)
    for start, end in places:
        mask[start:end] = b"\xff" * (end - start)
    return int.from_bytes(mask, "little")


def reserved_faults(blob: bytes, report: SnpReport) -> list[str]:
    """Where `blob`, which was parsed into `report`, has bits set that its version must leave alone.

    PLATFORM_INFO is left out: it describes the platform and restricts nothing, and genuine Turin reports have bit 6
    set, which the specification calls reserved.
    """
    faults = []
    set_bits = int.from_bytes(blob, "little") & _reserved(report.version, report.reported_tcb.fmc is not None)
    if set_bits:
        first = ((set_bits & -set_bits).bit_length() - 1) // 8
        faults.append(f"reserved byte at offset 0x{first:03x}")
    if report.policy & ~KNOWN_POLICY_BITS:
        faults.append("POLICY above bit 25")
    if not report.policy & RESERVED_ONE:
        faults.append("POLICY bit 17, which must be one")
    if report.key_info & ~KNOWN_KEY_BITS:
        faults.append("KEY_INFO")
    return faults
