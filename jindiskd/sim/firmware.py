"""Simulated SEV-SNP firmware: answers a guest's request with a report in the real format, signed by a simulated chip.

Source of the format: AMD 56860, ATTESTATION_REPORT version 3 (Turin: 5).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from jindiskd.attest.guest_policy import SNP_DEFAULT
from jindiskd.attest.id_block import IdBlock, SignedIdBlock
from jindiskd.attest.snp_report import (
    SIGNATURE_ECDSA_P384_SHA384,
    SIGNED_BYTES,
    FirmwareVersion,
    GuestPolicy,
    PlatformInfo,
    Product,
    SnpReport,
    Tcb,
    encode_report,
    with_signature,
)
from jindiskd.attest.snp_table import encode_certificate_table
from jindiskd.errors import InvalidArgument
from jindiskd.sim.pki import SimulatedRoot

CPUID = {Product.MILAN: (0x19, 0x01, 1), Product.GENOA: (0x19, 0x11, 1), Product.TURIN: (0x1A, 0x02, 1)}
TCB = Tcb(bootloader=4, tee=0, snp=24, microcode=219)
TURIN_TCB = Tcb(fmc=1, bootloader=3, tee=2, snp=5, microcode=97)
VERSION = FirmwareVersion(1, 55, 29)
PLATFORM = PlatformInfo.SMT_EN | PlatformInfo.ECC_EN | PlatformInfo.ALIAS_CHECK_COMPLETE


def _platform(policy: int) -> int:
    """PLATFORM_INFO of a machine that a guest with this policy can be launched on."""
    info = PLATFORM if policy & GuestPolicy.SMT else PLATFORM & ~PlatformInfo.SMT_EN
    if policy & GuestPolicy.RAPL_DIS:
        info |= PlatformInfo.RAPL_DIS
    if policy & GuestPolicy.CIPHERTEXT_HIDING_DRAM:
        info |= PlatformInfo.CIPHERTEXT_HIDING_DRAM_EN
    return int(info)


class SimulatedSnpFirmware:
    """The firmware of one simulated machine, for the life of one guest.

    Args:
        root: the simulated root that the machine's chip goes back to.
        launch_digest: MEASUREMENT, 48 bytes.
        platform: name of the machine; CHIP_ID follows from it and the root.
        policy: the guest's POLICY.
        host_data: 32 bytes that the host chose at launch.
        signed: an ID block whose signatures were checked.
        tcb: firmware versions of the machine, current, committed, reported and at launch alike.
        random: source of the REPORT_ID, which is drawn once: `random(n)` gives n bytes.
    """

    def __init__(
        self,
        root: SimulatedRoot,
        launch_digest: bytes,
        *,
        platform: str = "default",
        policy: int = SNP_DEFAULT,
        host_data: bytes = bytes(32),
        signed: SignedIdBlock | None = None,
        tcb: Tcb | None = None,
        random: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """Derive the chip's key and have its certificate signed: some tens of milliseconds."""
        if len(launch_digest) != 48 or len(host_data) != 32:
            raise InvalidArgument("launch digest or host data", launch_digest.hex(), "they have 48 and 32 bytes")
        block = IdBlock(launch_digest=launch_digest) if signed is None else IdBlock.decode(signed.block)
        if signed is not None and (block.launch_digest, block.policy) != (launch_digest, policy):
            remedy = f"it is for digest {launch_digest.hex()} and policy {policy:#x}, as the machine is launched"
            raise InvalidArgument("ID block", f"{block.launch_digest.hex()} and {block.policy:#x}", remedy)
        if tcb is None:
            tcb = TURIN_TCB if root.product.has_fmc else TCB
        chip_id = root.chip_id(platform)
        self._root = root
        self._key = root.chip_key(chip_id, tcb)
        self._certificate = root.chip_certificate(chip_id, tcb)
        family, model, stepping = CPUID[root.product]
        mitigations = 0 if root.product.has_fmc else None
        self.template = SnpReport(
            version=5 if root.product.has_fmc else 3,
            guest_svn=block.guest_svn,
            policy=policy,
            family_id=block.family_id,
            image_id=block.image_id,
            vmpl=0,
            signature_algorithm=SIGNATURE_ECDSA_P384_SHA384,
            current_tcb=tcb,
            platform_info=_platform(policy),
            key_info=int(signed is not None and any(signed.author_key_digest)),  # bit 0: AUTHOR_KEY_EN
            report_data=bytes(64),
            measurement=launch_digest,
            host_data=host_data,
            id_key_digest=bytes(48) if signed is None else signed.id_key_digest,
            author_key_digest=bytes(48) if signed is None else signed.author_key_digest,
            report_id=random(32),
            report_id_ma=b"\xff" * 32,
            reported_tcb=tcb,
            cpuid_family=family,
            cpuid_model=model,
            cpuid_stepping=stepping,
            chip_id=chip_id,
            committed_tcb=tcb,
            current_version=VERSION,
            committed_version=VERSION,
            launch_tcb=tcb,
            launch_mit_vector=mitigations,
            current_mit_vector=mitigations,
            signature_r=0,
            signature_s=0,
            product=root.product,
        )
        """What every report of this guest says, apart from the request's own data; the identity stays for its life."""

    def report(self, report_data: bytes, *, vmpl: int = 0) -> bytes:
        """A signed report, 1184 bytes.

        Args:
            report_data: 64 bytes that the guest chose.
            vmpl: the guest's privilege level that asks.
        """
        if len(report_data) != 64:
            raise InvalidArgument("report data", report_data.hex(), "it has 64 bytes")
        return self.sign(replace(self.template, report_data=report_data, vmpl=vmpl))

    def sign(self, report: SnpReport) -> bytes:
        """Sign any report at all, also an impossible one: what a test of refusals needs."""
        signed = encode_report(report)[:SIGNED_BYTES]
        r, s = decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA384())))
        return encode_report(with_signature(report, r, s))

    def certificate_table(self) -> bytes:
        """What the host gives with a report (`auxblob`): VCEK, ASK and ARK."""
        return encode_certificate_table(
            [("VCEK", self._certificate), ("ASK", self._root.ask), ("ARK", self._root.ark)]
        )
