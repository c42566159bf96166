"""Images for TDX: MRTD from the firmware, the module for reports in the initrd, and nothing released by that alone."""

import tarfile
from pathlib import Path
from uuid import UUID

import pytest

from jindiskd.attest.firmware import TDX_METADATA_GUID, FirmwareUnsuitable
from jindiskd.attest.tdx_measure import mr_td
from jindiskd.base.platform import Platform
from jindiskd.image.cpio import Archive
from jindiskd.image.kmod import ModulesUnusable
from jindiskd.image.measurement import require_launch_firmware
from jindiskd.image.request import BaseKind
from jindiskd.policy.release import tdx_expectations
from jindiskd.policy.rules import ReleaseRules

FIRMWARE = Path(__file__).resolve().parents[2] / "build/tools/usr/share/ovmf/OVMF.inteltdx.ms.fd"
TDX = {"platform": Platform.TDX, "base_kind": BaseKind.ROOTFS, "firmware": str(FIRMWARE), "seed": None}


@pytest.fixture(scope="module")
def tdx_root(kit, tmp_path_factory) -> Path:
    """A root whose kernels have the driver."""
    entries = []
    for info, content in kit.tree_entries():
        if info.name.endswith("/modules.dep"):
            content += b"kernel/tdx-guest.ko:\n"
            info.size = len(content)
        entries.append((info, content))
    for release in kit.RELEASES:
        info = tarfile.TarInfo(f"usr/lib/modules/{release}/kernel/tdx-guest.ko")
        content = b"\x7fELF the driver of TDX guests"
        info.size = len(content)
        entries.append((info, content))
    path = tmp_path_factory.mktemp("tdx") / "root.tar"
    path.write_bytes(kit.make_tar(entries))
    return path


def test_an_image_is_built_for_tdx(builder, tdx_root) -> None:
    """Its digest is MRTD, its initrd loads the driver, and its firmware passes at the launch."""
    if not FIRMWARE.exists():
        pytest.skip(f"{FIRMWARE} is missing; run scripts/setup")
    manifest, staging = builder(tdx_root, **TDX)
    assert manifest.launch_digest == mr_td(FIRMWARE)
    assert len(manifest.launch_digest) == 48
    names = Archive.read((staging / "initrd").read_bytes()).entries
    assert any(name.endswith("/tdx-guest.ko") for name in names)
    require_launch_firmware(manifest)


def test_what_cannot_be_a_tdx_guest_is_refused(builder, tdx_root, tar_stream, tmp_path, firmware) -> None:
    """Firmware without TDX, and a kernel without the driver: such a guest gets no quote."""
    without = tmp_path / "without.fd"
    without.write_bytes(firmware.read_bytes().replace(UUID(TDX_METADATA_GUID).bytes_le, bytes(16)))
    with pytest.raises(FirmwareUnsuitable, match="has no TDX metadata"):
        builder(tdx_root, **{**TDX, "firmware": str(without)})
    if not FIRMWARE.exists():
        pytest.skip(f"{FIRMWARE} is missing; run scripts/setup")
    plain = tmp_path / "plain.tar"
    plain.write_bytes(tar_stream)
    with pytest.raises(ModulesUnusable, match="tdx_guest"):
        builder(plain, **TDX)


def test_nothing_is_released_by_the_firmware_alone() -> None:
    """By the default policy no value of the registers that hold kernel, initrd and command line is right."""
    wanted = tdx_expectations(ReleaseRules(), (bytes(48),), allow_simulated=False)
    assert wanted.mr_td == {bytes(48)}
    assert wanted.rtmrs[:3] == (frozenset(), frozenset(), frozenset())
