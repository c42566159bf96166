"""Expected launch digests: recorded ones, an independent computation page by page, and typed refusals."""

import contextlib
import hashlib
import json
import struct
from pathlib import Path

import pytest

from jindiskd.attest.firmware import KNOWN, FirmwareUnsuitable, inspect_firmware
from jindiskd.attest.measure import (
    LaunchInputs,
    SnpMeasurer,
    UnknownCpuModel,
    cpu_signature,
    kernel_hashes_table,
    sev_launch_digest,
    snp_digest,
    snp_launch_digest,
)
from jindiskd.errors import InvalidArgument, NotFound

DEBIAN12 = Path("/usr/share/ovmf/OVMF.fd")


@pytest.fixture
def inputs(tmp_path: Path, firmware: Path) -> LaunchInputs:
    empty = tmp_path / "empty"
    empty.touch()
    return LaunchInputs(
        firmware=firmware,
        kernel=empty,
        initrd=empty,
        cmdline="",
        vcpus=1,
        cpu_model="EPYC-v4",
    )


def changed(inputs: LaunchInputs, **names: object) -> LaunchInputs:
    return LaunchInputs(**{**{name: getattr(inputs, name) for name in LaunchInputs.__slots__}, **names})


def test_recorded_digests(attestation, inputs):
    """Every recorded SNP, SEV and SEV-ES digest is reproduced, and firmware without a place for hashes is refused."""
    for case in json.loads((attestation / "measure/cases.json").read_text()):
        launch = changed(
            inputs,
            firmware=attestation / "measure" / case["ovmf"],
            cmdline=case["append"] or "",
            vcpus=case["vcpus"],
            guest_features=case["guest_features"],
        )
        hashed = case["kernel"] is not None

        def digest(launch=launch, hashed=hashed, mode=case["mode"]) -> bytes:
            if mode == "SEV_SNP":
                return snp_digest(launch, kernel_hashes=hashed)
            return sev_launch_digest(launch, encrypted_state=mode == "SEV_ES")

        if "error" in case["expect"]:
            with pytest.raises(FirmwareUnsuitable, match="kernel hashes"):
                digest()
        elif hashed or case["mode"] == "SEV_SNP":
            assert case["expect"]["digest"] == digest().hex(), case["name"]


def snp_by_hand(launch: LaunchInputs, signature: int) -> bytes:
    """AMD 56860 section 8.17.2 and QEMU's order of pages, written without looking at any implementation's code."""
    digest = bytes(48)

    def add(kind: int, address: int, contents: bytes) -> None:
        nonlocal digest
        info = digest + contents + struct.pack("<HBBBBBBQ", 0x70, kind, 0, 0, 0, 0, 0, address)
        assert len(info) == 0x70
        digest = hashlib.sha384(info).digest()

    image = launch.firmware.read_bytes()
    for at in range(0, len(image), 4096):
        add(1, (1 << 32) - len(image) + at, hashlib.sha384(image[at : at + 4096]).digest())
    info = inspect_firmware(launch.firmware)
    for section in info.sections:
        pages = range(section.address, section.address + section.size_bytes, 4096)
        if section.kind == 0x10:
            page = bytearray(4096)
            table = kernel_hashes_table(launch.kernel, launch.initrd, launch.cmdline)
            offset = info.hash_table_address % 4096
            page[offset : offset + len(table)] = table
            add(1, section.address, hashlib.sha384(page).digest())
        else:
            for page_address in pages:
                add({1: 3, 2: 5, 3: 6, 4: 3}[section.kind], page_address, bytes(48))
    for number in range(launch.vcpus):
        start = 0xFFFFFFF0 if number == 0 else info.reset_address
        page = bytearray(4096)
        segments = [(at, 0x93) for at in range(0x00, 0x60, 0x10)] + [(0x60, 0), (0x70, 0x82), (0x80, 0), (0x90, 0x8B)]
        for at, attributes in segments:
            struct.pack_into("<HHIQ", page, at, 0, attributes, 0xFFFF, 0)
        struct.pack_into("<HHIQ", page, 0x10, 0xF000, 0x9B, 0xFFFF, start & 0xFFFF0000)
        values = {
            0xD0: 0x1000,  # EFER.SVME
            0x148: 0x40,  # CR4.MCE
            0x158: 0x10,  # CR0.ET
            0x160: 0x400,  # DR7
            0x168: 0xFFFF0FF0,  # DR6
            0x170: 2,  # RFLAGS
            0x178: start & 0xFFFF,  # RIP
            0x268: 0x7040600070406,  # PAT
            0x310: signature,  # RDX
            0x3B0: launch.guest_features,
            0x3E8: 1,  # XCR0
        }
        for at, value in values.items():
            struct.pack_into("<Q", page, at, value)
        struct.pack_into("<I", page, 0x408, 0x1F80)  # MXCSR
        struct.pack_into("<H", page, 0x410, 0x37F)  # x87 FCW
        add(2, 0xFFFFFFFFF000, hashlib.sha384(page).digest())
    return digest


def test_second_computation(inputs, tmp_path):
    """A computation from AMD's document, page by page, agrees for kernels, command lines, processors and features."""
    for name, content in (("k", b"kernel"), ("i", b"initrd" * 1000)):
        (tmp_path / name).write_bytes(content)
    for vcpus, model, features, cmdline in ((1, "EPYC-Milan", 1, ""), (3, "EPYC-Genoa-v2", 0x21, "root=x quiet")):
        launch = changed(
            inputs,
            kernel=tmp_path / "k",
            initrd=tmp_path / "i",
            vcpus=vcpus,
            cpu_model=model,
            guest_features=features,
            cmdline=cmdline,
        )
        assert snp_by_hand(launch, cpu_signature(model)) == snp_launch_digest(launch)


def test_second_computation_with_real_firmware(ovmf, inputs):
    """The same for a complete firmware image, and when many launches are measured together."""
    launch = changed(inputs, firmware=ovmf / "OVMF.amdsev.fd", vcpus=2, cpu_model="EPYC-Milan")
    digest = snp_launch_digest(launch)
    assert snp_by_hand(launch, cpu_signature("EPYC-Milan")) == digest
    assert SnpMeasurer().digest(launch) == digest


def test_kernel_hashes_table(attestation):
    """The table has the recorded bytes: QEMU's order, and the command line with its NUL."""
    folder = attestation / "sev/measurement"
    for case in json.loads((folder / "cases.json").read_text())["cases"]:
        if "kernel" in case:
            table = kernel_hashes_table(folder / case["kernel"], folder / case["initrd"], case["cmdline"])
            assert case["kernel_hashes_table"] == table.hex()
            break
    else:
        pytest.fail("no recorded table")


def test_every_input_counts(inputs, tmp_path):
    """Each input of a launch changes the digest, also when many are measured together."""
    other = tmp_path / "other"
    other.write_bytes(b"other")
    measurer = SnpMeasurer()
    digests = {
        (snp_launch_digest(launch), measurer.digest(launch) == snp_launch_digest(launch))
        for launch in (
            inputs,
            changed(inputs, kernel=other),
            changed(inputs, initrd=other),
            changed(inputs, cmdline="quiet"),
            changed(inputs, vcpus=2),
            changed(inputs, cpu_model="EPYC-Rome"),
            changed(inputs, guest_features=0x21),
        )
    }
    assert len(digests) == 7
    assert all(same for _digest, same in digests)
    assert snp_digest(inputs, kernel_hashes=False) == measurer.digest(inputs, kernel_hashes=False)


def test_refusals(inputs, tmp_path):
    """Inputs that cannot be measured are refused by name, with what to use instead."""
    for model in ("host-passthrough", "Skylake-Server", "EPYC-Milan-v1-v2", ""):
        with pytest.raises(UnknownCpuModel, match="EPYC-Milan"):
            snp_launch_digest(changed(inputs, cpu_model=model))
    with pytest.raises(NotFound):
        snp_launch_digest(changed(inputs, kernel=tmp_path / "none"))
    with pytest.raises(NotFound):
        snp_launch_digest(changed(inputs, firmware=tmp_path / "none"))
    for names in ({"vcpus": 0}, {"vcpus": 5000}, {"cmdline": "a\0b"}, {"cmdline": "a" * 2048}, {"guest_features": -1}):
        with pytest.raises(InvalidArgument):
            snp_launch_digest(changed(inputs, **names))
    text = tmp_path / "text"
    text.write_bytes(b"x" * 8192)
    with pytest.raises(FirmwareUnsuitable, match="metadata"):
        snp_launch_digest(changed(inputs, firmware=text))


@pytest.mark.skipif(not DEBIAN12.is_file(), reason="no general-purpose OVMF is installed (package ovmf)")
def test_general_purpose_firmware(inputs):
    """A general-purpose OVMF has no page for the hashes and is refused rather than measured without them."""
    assert not inspect_firmware(DEBIAN12).has_hash_table
    with pytest.raises(FirmwareUnsuitable, match="would boot any kernel"):
        snp_launch_digest(changed(inputs, firmware=DEBIAN12))


def test_known_images_enforce_as_recorded(ovmf):
    """The SEV build is known to check kernel hashes and the general one not, though both have room for them."""
    sev, general = inspect_firmware(ovmf / "OVMF.amdsev.fd"), inspect_firmware(ovmf / "OVMF.fd")
    if sev.sha256.hex() not in KNOWN or general.sha256.hex() not in KNOWN:
        pytest.skip("the firmware in build/tools is of other builds than those that were looked into")
    assert (sev.enforces_kernel_hashes, general.enforces_kernel_hashes) == (True, False)
    assert sev.has_snp_hash_section
    assert general.has_snp_hash_section


def test_damaged_tables(attestation, tmp_path):
    """Damage to any byte of the firmware's tables gives a typed refusal or another reading, never another error."""
    original = (attestation / "measure/ovmf_AmdSev_suffix.bin").read_bytes()
    damaged = tmp_path / "damaged"
    interesting = len(original) - 32 - 18 - 300
    for at in [*range(interesting, len(original) - 32), *range(0, interesting, 37)]:
        for value in (0x00, 0xFF):
            data = bytearray(original)
            data[at] = value
            damaged.write_bytes(data)
            with contextlib.suppress(FirmwareUnsuitable):
                inspect_firmware(damaged)
