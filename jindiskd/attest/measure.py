"""The launch digest a guest will have, computed from its owner's own files before it runs.

Uses `sev-snp-measure` for the arithmetic, after checking here that the firmware can carry what is asked of it. These
functions read files and burn the processor for tens of milliseconds: call them off the event loop, from any thread.

Source: AMD 56860 section 8.17.2 (SNP), AMD 55766 section 6.5 (SEV), QEMU `target/i386/sev.c`; attestation notes
sections 3.2, 3.4 and 5.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sevsnpmeasure.gctx import GCTX
from sevsnpmeasure.guest import calc_launch_digest, calc_snp_ovmf_hash, snp_update_metadata_pages
from sevsnpmeasure.ovmf import OVMF
from sevsnpmeasure.sev_hashes import SevHashes
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vcpu_types import CPU_SIGS
from sevsnpmeasure.vmm_types import VMMType
from sevsnpmeasure.vmsa import VMSA

from jindiskd.attest.firmware import FirmwareInfo, FirmwareUnsuitable, inspect_firmware
from jindiskd.attest.tdx_measure import mr_td
from jindiskd.base.platform import Tee
from jindiskd.errors import EXIT_USAGE, InvalidArgument, JindiskError, NotFound

GUEST_FEATURES_SNP = 0x1
GUEST_FEATURES_DEBUG_SWAP = 0x21
"""What hosts with Linux 6.6 and 6.7 set in addition."""
MAX_VCPUS = 4096
MAX_CMDLINE_BYTES = 2048
HASHES_BYTES = 176


class UnknownCpuModel(JindiskError, code="UnknownCpuModel", exit_code=EXIT_USAGE):
    """A processor model whose CPUID signature is not known, so that no digest can be computed for it."""

    def __init__(self, model: str) -> None:
        """`model` as given."""
        super().__init__(
            f"the processor model {model!r} has no known signature: use a named one such as "
            f"{', '.join(sorted(name for name in CPU_SIGS if re.fullmatch('EPYC(-[A-Z][a-z]+)?', name)))}, "
            "and never host-passthrough, which measures differently on every machine"
        )
        self.model = model


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchInputs:
    """Everything that enters a launch digest."""

    firmware: Path
    kernel: Path
    initrd: Path
    cmdline: str
    """Without the terminating NUL, which is measured with it."""
    vcpus: int
    cpu_model: str
    """QEMU's name, such as `EPYC-Milan` or `EPYC-v4`."""
    guest_features: int = GUEST_FEATURES_SNP
    """SEV_FEATURES of the virtual processors; SNP only."""


def cpu_signature(model: str) -> int:
    """CPUID Fn0000_0001_EAX of a QEMU processor model; versions (`-v2`) of a model share one.

    Raises:
        UnknownCpuModel: not a model of AMD's that is known here.
    """
    form = re.fullmatch(r"(EPYC(?:-[A-Z][a-z]+)?)(?:-v[0-9]{1,2}|-IBPB)?", model)
    signature = CPU_SIGS.get(form[1]) if form else None
    if signature is None:
        raise UnknownCpuModel(model)
    return int(signature)


def snp_launch_digest(inputs: LaunchInputs) -> bytes:
    """MEASUREMENT of an SEV-SNP guest with direct boot and kernel hashes: 48 bytes, SHA-384.

    Raises:
        FirmwareUnsuitable: no SNP metadata, or no page for the kernel hashes.
        UnknownCpuModel, NotFound, InvalidArgument: other inputs that cannot be used.
    """
    return snp_digest(inputs, kernel_hashes=True)


def snp_digest(inputs: LaunchInputs, *, kernel_hashes: bool) -> bytes:
    """As `snp_launch_digest`, also for launches without kernel hashes, which measure the firmware alone.

    Args:
        inputs: the launch; without kernel hashes, its kernel, initrd and command line are not looked at.
        kernel_hashes: whether the host was told to measure them.
    """
    _check(inputs)
    info = inspect_firmware(inputs.firmware)
    _require_snp(info, inputs.firmware, kernel_hashes=kernel_hashes)
    signature = cpu_signature(inputs.cpu_model)
    if kernel_hashes:
        _require_files(inputs)
    return bytes(
        calc_launch_digest(
            SevMode.SEV_SNP,
            inputs.vcpus,
            signature,
            os.fspath(inputs.firmware),
            os.fspath(inputs.kernel) if kernel_hashes else "",
            os.fspath(inputs.initrd) if kernel_hashes else "",
            inputs.cmdline if kernel_hashes else "",
            inputs.guest_features,
        )
    )


class SnpMeasurer:
    """Computes many digests of similar launches: reads each file once and keeps its hash.

    Not for files that change meanwhile, nor for several threads at a time.
    """

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._firmware: dict[Path, tuple[FirmwareInfo, OVMF, bytes]] = {}
        self._hashes: dict[tuple[Path, Path], SevHashes] = {}

    def digest(self, inputs: LaunchInputs, *, kernel_hashes: bool = True) -> bytes:
        """The same as `snp_digest`, and the same errors."""
        _check(inputs)
        if inputs.firmware not in self._firmware:
            info = inspect_firmware(inputs.firmware)
            _require_snp(info, inputs.firmware, kernel_hashes=False)
            name = os.fspath(inputs.firmware)
            self._firmware[inputs.firmware] = info, OVMF(name), calc_snp_ovmf_hash(name)
        info, ovmf, firmware_hash = self._firmware[inputs.firmware]
        _require_snp(info, inputs.firmware, kernel_hashes=kernel_hashes)
        signature = cpu_signature(inputs.cpu_model)
        context = GCTX(seed=firmware_hash)
        snp_update_metadata_pages(context, ovmf, self._table(inputs) if kernel_hashes else None, VMMType.QEMU)
        states = VMSA(SevMode.SEV_SNP, ovmf.sev_es_reset_eip(), signature, inputs.guest_features, VMMType.QEMU)
        for page in states.pages(inputs.vcpus):
            context.update_vmsa_page(page)
        return bytes(context.ld())

    def _table(self, inputs: LaunchInputs) -> SevHashes:
        pair = (inputs.kernel, inputs.initrd)
        if pair not in self._hashes:
            _require_files(inputs)
            self._hashes[pair] = SevHashes(os.fspath(inputs.kernel), os.fspath(inputs.initrd), "")
        table = self._hashes[pair]
        table.cmdline_hash = hashlib.sha256(inputs.cmdline.encode() + b"\0").digest()
        return table


def sev_launch_digest(inputs: LaunchInputs, *, encrypted_state: bool) -> bytes:
    """Launch digest (LD) of a SEV, or with `encrypted_state` a SEV-ES guest, with kernel hashes: 32 bytes, SHA-256.

    For SEV-ES it holds for hosts with Linux 6.10 and later, whose virtual processors start with MXCSR and FCW set.

    Raises:
        FirmwareUnsuitable: no place for the kernel hashes, or for SEV-ES no start address of processors.
        UnknownCpuModel, NotFound, InvalidArgument: other inputs that cannot be used.
    """
    _check(inputs)
    _require_files(inputs)
    info = inspect_firmware(inputs.firmware)
    if not info.has_hash_table:
        raise FirmwareUnsuitable(inputs.firmware, "has no place for kernel hashes")
    if encrypted_state and info.reset_address is None:
        raise FirmwareUnsuitable(inputs.firmware, "has no start address for secondary processors")
    return bytes(
        calc_launch_digest(
            SevMode.SEV_ES if encrypted_state else SevMode.SEV,
            inputs.vcpus,
            cpu_signature(inputs.cpu_model) if encrypted_state else 0,
            os.fspath(inputs.firmware),
            os.fspath(inputs.kernel),
            os.fspath(inputs.initrd),
            inputs.cmdline,
            0,
        )
    )


def kernel_hashes_table(kernel: Path, initrd: Path, cmdline: str) -> bytes:
    """The table that QEMU puts into guest memory: 168 bytes padded to 176 (attestation notes section 3.4)."""
    return bytes(SevHashes(os.fspath(kernel), os.fspath(initrd), cmdline).construct_table())


def launch_digest(tee: Tee, inputs: LaunchInputs) -> bytes:
    """The launch digest of a guest of this kind with kernel hashes: 48 bytes for SNP, 32 for SEV and SEV-ES.

    For TDX it is MRTD, 48 bytes, which covers the firmware alone: kernel, initrd and command line go to registers while
    the guest boots, whose values the owner's policy names.

    Raises:
        FirmwareUnsuitable, UnknownCpuModel, NotFound, InvalidArgument: as the functions above.
    """
    if tee is Tee.SNP:
        return snp_launch_digest(inputs)
    if tee is Tee.TDX:
        return mr_td(inputs.firmware)
    return sev_launch_digest(inputs, encrypted_state=tee is Tee.SEV_ES)


def _check(inputs: LaunchInputs) -> None:
    if not 1 <= inputs.vcpus <= MAX_VCPUS:
        raise InvalidArgument("number of virtual processors", inputs.vcpus, f"it lies between 1 and {MAX_VCPUS}")
    if not 0 <= inputs.guest_features < 1 << 64:
        raise InvalidArgument("set of guest features", inputs.guest_features, "it is an unsigned 64-bit number")
    if "\0" in inputs.cmdline or len(inputs.cmdline.encode()) >= MAX_CMDLINE_BYTES:
        text = f"it has no NUL and fewer than {MAX_CMDLINE_BYTES} bytes"
        raise InvalidArgument("kernel command line", inputs.cmdline[:64], text)


def _require_snp(info: FirmwareInfo, path: Path, *, kernel_hashes: bool) -> None:
    if not info.has_snp_metadata or info.reset_address is None:
        raise FirmwareUnsuitable(path, "has no SEV-SNP metadata")
    known = {1, 2, 3, 4, 0x10}
    for section in info.sections:
        if section.kind not in known:
            raise FirmwareUnsuitable(path, f"has SEV metadata of the unknown kind 0x{section.kind:x}")
        if section.size_bytes % 4096 or section.size_bytes > 1 << 30:
            raise FirmwareUnsuitable(path, f"has a SEV metadata section of {section.size_bytes} bytes")
    if info.size_bytes % 4096:
        raise FirmwareUnsuitable(path, "is not of whole pages")
    if kernel_hashes and not (info.has_snp_hash_section and info.has_hash_table):
        raise FirmwareUnsuitable(path, "has no page for kernel hashes, so it would boot any kernel")


def _require_files(inputs: LaunchInputs) -> None:
    for kind, path in (("kernel", inputs.kernel), ("initrd", inputs.initrd)):
        if not path.is_file():
            raise NotFound(kind, str(path))
