"""RTMR1 and RTMR2 of a TDX guest whose firmware loads kernel, initrd and command line that QEMU hands it (direct boot).

RTMR1 is what the firmware starts, RTMR2 what the kernel's own EFI stub measures. Both follow from the boot files, under
these conditions, which are the field's newest: QEMU gives the firmware the kernel unpatched, the firmware adds
` initrd=initrd` to the command line and measures nothing else it loads (no option ROM, no partition table), and the
kernel is Linux 6.9 or later, whose stub measures by the CC protocol. RTMR0 has the memory layout, ACPI tables and
Secure Boot variables, which QEMU makes at each start: it is not computed.

Computed by the documents, and not compared with a machine: none was at hand. Sources: TCG PC Client Platform Firmware
Profile 3.3.4 (actions, separator); TCG EFI Platform Specification and Microsoft "Windows Authenticode Portable
Executable Signature Format" (digest of a PE image); UEFI 2.10 section 38.4.1 (which PCR is in which register); Linux
`drivers/firmware/efi/libstub/efi-stub-helper.c` (load options and initrd).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from jindiskd.attest.model import MalformedEvidence
from jindiskd.errors import NotFound

REGISTER_BYTES = 48
CALLING = b"Calling EFI Application from Boot Option"
SEPARATOR = bytes(4)
LEAVING = (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")
ADDED_BY_FIRMWARE = " initrd=initrd"
MAX_FILE_BYTES, MAX_SECTIONS = 1 << 30, 96
PE32_PLUS = 0x20B


def rtmr1(kernel: Path) -> bytes:
    """RTMR1, 48 bytes. Reads the file: call it off the event loop.

    Raises:
        NotFound: no such file. MalformedEvidence: no EFI image.
    """
    actions = [hashlib.sha384(text).digest() for text in (CALLING, SEPARATOR, *LEAVING)]
    return _extended([authenticode(_read(kernel, "kernel")), *actions])


def rtmr2(cmdline: str, initrd: Path) -> bytes:
    """RTMR2, 48 bytes. Reads the file: call it off the event loop. `cmdline` is as handed to QEMU.

    Raises:
        NotFound: no such file.
    """
    options = f"{cmdline}{ADDED_BY_FIRMWARE}\0".encode("utf-16-le")
    return _extended([hashlib.sha384(options).digest(), hashlib.sha384(_read(initrd, "initrd")).digest()])


def _extended(digests: Iterable[bytes]) -> bytes:
    register = bytes(REGISTER_BYTES)
    for digest in digests:
        register = hashlib.sha384(register + digest).digest()
    return register


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise NotFound(what, str(path)) from exc
    if len(data) > MAX_FILE_BYTES:
        raise MalformedEvidence(what, f"it is longer than {MAX_FILE_BYTES} bytes")
    return data


def authenticode(image: bytes, algorithm: str = "sha384") -> bytes:
    """Digest of a PE32+ image without what signing changes: its checksum, the entry of its certificates, and those.

    Raises:
        MalformedEvidence: not a PE32+ image, or its headers point outside of it.
    """
    what = "EFI image"

    def number(at: int, size: int) -> int:
        if at < 0 or at + size > len(image):
            raise MalformedEvidence(what, "its headers do not fit in it")
        return int.from_bytes(image[at : at + size], "little")

    header = number(0x3C, 4)
    if image[:2] != b"MZ" or image[header : header + 4] != b"PE\0\0" or number(header + 24, 2) != PE32_PLUS:
        raise MalformedEvidence(what, "it is not of the form PE32+: the kernel has no EFI stub")
    optional = header + 24
    sections, optional_bytes = number(header + 6, 2), number(header + 20, 2)
    checksum, entry, headers_end = optional + 64, optional + 144, number(optional + 60, 4)
    if number(optional + 108, 4) < 5 or not entry + 8 <= headers_end <= len(image) or sections > MAX_SECTIONS:
        raise MalformedEvidence(what, "its headers are not those of a signable image")
    certificates_bytes = number(entry + 4, 4)
    digest = hashlib.new(algorithm)
    for start, end in ((0, checksum), (checksum + 4, entry), (entry + 8, headers_end)):
        digest.update(image[start:end])
    hashed = headers_end
    table = optional + optional_bytes
    places = [(number(at + 20, 4), number(at + 16, 4)) for at in range(table, table + 40 * sections, 40)]
    for start, size in sorted(place for place in places if place[1]):
        if start + size > len(image):
            raise MalformedEvidence(what, "a section lies outside of it")
        digest.update(image[start : start + size])
        hashed += size
    if len(image) < hashed + certificates_bytes:
        raise MalformedEvidence(what, "its sections overlap")
    digest.update(image[hashed : len(image) - certificates_bytes])
    return digest.digest()
