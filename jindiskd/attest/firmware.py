"""What a guest firmware image (OVMF) is able to do, from the table at its end and from what is known of its build.

A firmware that has room for kernel hashes is not thereby one that *checks* them: general-purpose OVMF of newer builds
has the page, is measured with the hashes in it, and then boots whatever kernel it is given. Whether the check is there
cannot be read from the table, so images are known by digest.

Source: edk2 `OvmfPkg/ResetVector` (GUID table, SEV metadata), attestation notes sections 3.4 and 5.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jindiskd.errors import EXIT_USAGE, JindiskError, NotFound

MAX_FIRMWARE_BYTES = 64 << 20
FOUR_GIB = 1 << 32
FOOTER_GUID = "96b582de-1fb2-45f7-baea-a366c55a082d"
HASH_TABLE_GUID = "7255371f-3a3b-4b04-927b-1da6efa8d454"
LAUNCH_AREA_GUID = "4c2eb361-7d9b-4cc3-8081-127c90d3d294"
RESET_BLOCK_GUID = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
METADATA_GUID = "dc886566-984a-4798-a75e-5585a7bf67cc"
TDX_METADATA_GUID = "e47a6535-984a-4798-865e-4685a7bf8ec2"
SECTION_KERNEL_HASHES = 0x10
MAX_SECTIONS = 64


class FirmwareUnsuitable(JindiskError, code="FirmwareUnsuitable", exit_code=EXIT_USAGE):
    """A firmware image cannot do what the launch needs of it."""

    def __init__(self, path: Path, problem: str) -> None:
        """`problem` says what is missing or wrong with the image at `path`."""
        super().__init__(
            f"the firmware {path} {problem}: use OVMF built for AMD SEV with kernel hashes, such as OVMF.amdsev.fd"
            " (in Debian of package ovmf-amdsev; for simulated guests OVMF.fd of ovmf-generic)"
        )
        self.path, self.problem = path, problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of the SEV metadata: pages that the launch adds."""

    address: int
    size_bytes: int
    kind: int
    """1 SEC memory, 2 secrets, 3 CPUID, 4 SVSM calling area, 0x10 kernel hashes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFirmware:
    """An image that was looked into: what it does with the kernel that it is given."""

    name: str
    enforces_kernel_hashes: bool
    """Boots only the kernel, initrd and command line whose hashes the launch measured (SEV, SEV-ES, SNP)."""
    boots_disks: bool = True
    """Boots from a disk too, where it is given no kernel."""
    secure_boot: bool = False
    """Starts only kernels that are signed under Microsoft's keys."""
    extends_registers: bool = False
    """Measures what it boots into RTMRs (TDX): nothing is refused by it, the verifier must compare."""


KNOWN: Mapping[str, KnownFirmware] = {
    "3e4fd0b3fe3b2dbe481c3d9e99418a034174f26cbe1f55aa212b0f18c12d2d6f": KnownFirmware(
        name="OVMF.amdsev.fd of Debian 14 (forky)", enforces_kernel_hashes=True, boots_disks=False
    ),
    "6a3e8f438ad7269f5dfd884647587b88391fb23965bb3aa7902b519438dba129": KnownFirmware(
        name="OVMF.fd of Debian 14 (forky), general-purpose", enforces_kernel_hashes=False
    ),
    "a265075b4147a096109e501e76196df1ec8a18659c26f7401492c597ec88f312": KnownFirmware(
        name="OVMF.inteltdx.ms.fd of Debian 14 (forky)",
        enforces_kernel_hashes=False,
        secure_boot=True,
        extends_registers=True,
    ),
    "7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773": KnownFirmware(
        name="OVMF.fd of Debian 12 (bookworm), general-purpose", enforces_kernel_hashes=False
    ),
}
"""By SHA-256. Established by unpacking the image's compressed volume and looking for the module that compares kernels
with the hashes: it carries the kernel entry's GUID 4de79437-abd2-427f-b835-d5b172d2045b. Secure Boot and disks: libvirt
notes section 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirmwareInfo:
    """A firmware image, as far as it can be known."""

    sha256: bytes
    size_bytes: int
    name: str | None
    """Of a build that is known, else None."""
    enforces_kernel_hashes: bool | None
    """None where the build is not known."""
    has_hash_table: bool
    """True where there is a place for the kernel hashes (SEV and SEV-ES; SNP needs `has_snp_hash_section` too)."""
    has_snp_metadata: bool
    has_snp_hash_section: bool
    """The SNP metadata has a page for the kernel hashes."""
    hash_table_address: int | None
    hash_table_bytes: int
    secret_address: int | None
    """Where a SEV launch secret goes (guest physical)."""
    secret_bytes: int
    reset_address: int | None
    """Where secondary processors start (SEV-ES, SNP)."""
    has_tdx_metadata: bool
    sections: tuple[Section, ...]


def enforcement_problem(sha256: bytes) -> str:
    """Why a firmware makes the measurement of a kernel worthless, as the end of a sentence; empty where it is not known
    to. `sha256` is of the image, 32 bytes."""
    known = KNOWN.get(sha256.hex())
    if known is None or known.enforces_kernel_hashes:
        return ""
    return f"({known.name}) does not check kernels against the measured hashes"


def read_table(data: bytes, path: Path) -> dict[str, bytes]:
    """The GUID table that ends 32 bytes before the image's end: GUID to content; empty where there is none.

    Raises:
        FirmwareUnsuitable: its sizes contradict each other.
    """
    footer = len(data) - 32 - 18
    if footer < 0 or str(uuid.UUID(bytes_le=data[footer + 2 : footer + 18])) != FOOTER_GUID:
        return {}
    at, start = footer, footer + 18 - int.from_bytes(data[footer : footer + 2], "little")
    if start < 0 or start > footer:
        raise FirmwareUnsuitable(path, "has a GUID table of an impossible size")
    found: dict[str, bytes] = {}
    while at > start:
        if at - start < 18:
            raise FirmwareUnsuitable(path, "has a damaged GUID table")
        size = int.from_bytes(data[at - 18 : at - 16], "little")
        if size < 18 or at - size < start:
            raise FirmwareUnsuitable(path, "has a GUID table entry of an impossible size")
        found[str(uuid.UUID(bytes_le=data[at - 16 : at]))] = data[at - size : at - 18]
        at -= size
    return found


def read_sections(data: bytes, table: Mapping[str, bytes], path: Path) -> tuple[Section, ...]:
    """The sections of the SEV metadata; empty where there are none.

    Raises:
        FirmwareUnsuitable: the metadata lies outside the image or has another version than 1.
    """
    entry = table.get(METADATA_GUID)
    if entry is None:
        return ()
    start = len(data) - int.from_bytes(entry[:4], "little")
    header = data[start : start + 16] if 0 <= start < len(data) else b""
    if len(entry) < 4 or header[:4] != b"ASEV" or int.from_bytes(header[8:12], "little") != 1:
        raise FirmwareUnsuitable(path, "has damaged SEV metadata")
    count = int.from_bytes(header[12:16], "little")
    body = data[start + 16 : start + 16 + 12 * count]
    if count > MAX_SECTIONS or len(body) != 12 * count:
        raise FirmwareUnsuitable(path, "has SEV metadata of an impossible size")
    words = [int.from_bytes(body[at : at + 4], "little") for at in range(0, len(body), 4)]
    return tuple(
        Section(address=address, size_bytes=size, kind=kind)
        for address, size, kind in zip(words[0::3], words[1::3], words[2::3], strict=True)
    )


def read_firmware(path: Path) -> bytes:
    """The whole image.

    Raises:
        NotFound: no such file.
        FirmwareUnsuitable: empty, or longer than 64 MiB.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FIRMWARE_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise NotFound("firmware image", str(path)) from exc
    if not 4096 <= len(data) <= MAX_FIRMWARE_BYTES:
        raise FirmwareUnsuitable(path, f"has {len(data)} bytes or more, which no firmware image has")
    return data


def inspect_firmware(path: Path) -> FirmwareInfo:
    """Read the image at `path` and say what it can do. Reads the whole file: call it off the event loop.

    Raises:
        NotFound: no such file.
        FirmwareUnsuitable: not a firmware image, or one with damaged tables.
    """
    data = read_firmware(path)
    table = read_table(data, path)
    sections = read_sections(data, table, path)

    def area(guid: str) -> tuple[int | None, int]:
        """Address and size of a memory area; an image without the feature has the entry with address 0."""
        entry = table.get(guid, b"")
        address = int.from_bytes(entry[0:4], "little")
        return (address, int.from_bytes(entry[4:8], "little")) if len(entry) >= 8 and address else (None, 0)

    hash_address, hash_bytes = area(HASH_TABLE_GUID)
    secret_address, secret_bytes = area(LAUNCH_AREA_GUID)
    reset = table.get(RESET_BLOCK_GUID, b"")
    digest = hashlib.sha256(data)
    known = KNOWN.get(digest.hexdigest())
    return FirmwareInfo(
        sha256=digest.digest(),
        size_bytes=len(data),
        name=known.name if known else None,
        enforces_kernel_hashes=known.enforces_kernel_hashes if known else None,
        has_hash_table=hash_address is not None,
        has_snp_metadata=bool(sections),
        has_snp_hash_section=any(section.kind == SECTION_KERNEL_HASHES for section in sections),
        hash_table_address=hash_address,
        hash_table_bytes=hash_bytes,
        secret_address=secret_address,
        secret_bytes=secret_bytes,
        reset_address=int.from_bytes(reset[:4], "little") if len(reset) >= 4 else None,
        has_tdx_metadata=TDX_METADATA_GUID in table,
        sections=sections,
    )
