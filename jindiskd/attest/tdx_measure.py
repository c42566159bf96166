"""MRTD of a TDX guest from its firmware: the pages that the host adds before the guest runs, and their contents.

It follows from the firmware image alone. RTMR1 (kernel) and RTMR2 (command line, initrd) are in `tdx_registers`; RTMR0
(memory layout, ACPI tables) depends on the machine's shape and on QEMU's version: take it from a guest you trust.

Computed by the documents, and not compared with a machine: none was at hand. Source: Intel TDX module base
architecture, "Measurement and attestation" (TDH.MEM.PAGE.ADD, TDH.MR.EXTEND); edk2
`OvmfPkg/ResetVector/X64/IntelTdxMetadata.asm` for the metadata; Linux `arch/x86/kvm/vmx/tdx.c` for the order: each page
is added and then, where it is measured, extended.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jindiskd.attest.firmware import TDX_METADATA_GUID, FirmwareUnsuitable, read_firmware, read_table

PAGE, CHUNK = 4096, 256
SIGNATURE = b"TDVF"
EXTENDED, AUGMENTED = 1 << 0, 1 << 1
MAX_SECTIONS, MAX_SECTION_BYTES = 32, 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxSection:
    """One section of the TDX metadata."""

    offset: int
    """Of its contents in the image; 0 with `raw_bytes` 0 for zero pages."""
    raw_bytes: int
    address: int
    """Guest physical."""
    size_bytes: int
    kind: int
    """0 boot firmware, 1 variables, 2 hand-off block, 3 temporary memory, 4 permanent memory."""
    attributes: int


def read_tdx_sections(data: bytes, path: Path) -> tuple[TdxSection, ...]:
    """The sections of an image.

    Raises:
        FirmwareUnsuitable: it has no TDX metadata, or they contradict each other.
    """
    entry = read_table(data, path).get(TDX_METADATA_GUID)
    if entry is None or len(entry) < 4:
        raise FirmwareUnsuitable(path, "has no TDX metadata")
    start = len(data) - int.from_bytes(entry[:4], "little")
    head = data[start : start + 16] if start >= 0 else b""
    version, count = (int.from_bytes(head[at : at + 4], "little") for at in (8, 12))
    if len(head) != 16 or head[:4] != SIGNATURE or version != 1 or not 1 <= count <= MAX_SECTIONS:
        raise FirmwareUnsuitable(path, "has damaged TDX metadata")
    body = data[start + 16 : start + 16 + 32 * count]
    if len(body) != 32 * count:
        raise FirmwareUnsuitable(path, "has TDX metadata of an impossible size")
    found = tuple(_section(body[at : at + 32]) for at in range(0, len(body), 32))
    for section in found:
        inside = section.offset + section.raw_bytes <= len(data) and section.raw_bytes <= section.size_bytes
        if not inside or section.address % PAGE or section.size_bytes % PAGE:
            raise FirmwareUnsuitable(path, "has a TDX section outside of its image, or not of whole pages")
        if section.size_bytes > MAX_SECTION_BYTES and not section.attributes & AUGMENTED:
            raise FirmwareUnsuitable(path, f"has a TDX section of {section.size_bytes} bytes")
    return found


def _section(raw: bytes) -> TdxSection:
    def number(at: int, size: int) -> int:
        return int.from_bytes(raw[at : at + size], "little")

    return TdxSection(
        offset=number(0, 4),
        raw_bytes=number(4, 4),
        address=number(8, 8),
        size_bytes=number(16, 8),
        kind=number(24, 4),
        attributes=number(28, 4),
    )


def mr_td(path: Path) -> bytes:
    """MRTD, 48 bytes, SHA-384. Reads and hashes some MiB: call it off the event loop.

    Raises:
        NotFound: no such file.
        FirmwareUnsuitable: not a firmware for TDX.
    """
    data = read_firmware(path)
    digest = hashlib.sha384()
    for section in read_tdx_sections(data, path):
        if section.attributes & AUGMENTED:
            continue
        contents = data[section.offset : section.offset + section.raw_bytes].ljust(section.size_bytes, b"\0")
        for at in range(0, section.size_bytes, PAGE):
            digest.update(_record(b"MEM.PAGE.ADD", section.address + at))
            if section.attributes & EXTENDED:
                for chunk in range(at, at + PAGE, CHUNK):
                    digest.update(_record(b"MR.EXTEND", section.address + chunk) + contents[chunk : chunk + CHUNK])
    return digest.digest()


def _record(name: bytes, address: int) -> bytes:
    """The 128 bytes that stand for an operation: its name, at 16 the address, zeros."""
    return (name.ljust(16, b"\0") + address.to_bytes(8, "little")).ljust(128, b"\0")
