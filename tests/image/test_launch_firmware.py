"""Firmware at launch: what was measured, and nothing that boots any kernel under an unchanged measurement."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jindiskd.attest.firmware import (
    KNOWN,
    FirmwareUnsuitable,
    KnownFirmware,
    enforcement_problem,
    inspect_firmware,
)
from jindiskd.base.platform import Platform
from jindiskd.errors import NotFound
from jindiskd.image.manifest import BootFile, Manifest, Shape, Volume
from jindiskd.image.measurement import require_launch_firmware


@pytest.fixture
def manifest(firmware: Path, tmp_path: Path) -> Manifest:
    path = tmp_path / "ovmf.fd"
    path.write_bytes(firmware.read_bytes())
    file = BootFile(file="x", size_bytes=1, sha256=bytes(32))
    given: dict[str, Any] = dict.fromkeys(("created", "base_kind", "distribution", "kernel_release", "resource"), "")
    return Manifest(
        schema=1,
        image_id="i",
        name="web",
        platform=Platform.SNP,
        base_sha256=b"",
        disk_size_bytes=0,
        partitions=(),
        volume=Volume(format="luks2", uuid="", cipher=""),
        kernel=file,
        initrd=file,
        cmdline=file,
        shape=Shape(
            firmware=str(path),
            firmware_sha256=inspect_firmware(path).sha256,
            vcpus=1,
            cpu_model="EPYC-v4",
        ),
        launch_digest=bytes(48),
        broker_spki_sha256=b"",
        **given,
    )


def test_the_same_firmware_starts(manifest: Manifest) -> None:
    """And a simulated platform does not ask, as it proves nothing in any case."""
    require_launch_firmware(manifest)
    other = replace(manifest, platform=Platform.SIMULATED_SNP, shape=replace(manifest.shape, firmware="/none"))
    require_launch_firmware(other)


def test_another_firmware_does_not(manifest: Manifest) -> None:
    """One changed byte, or none at all."""
    path = Path(manifest.shape.firmware)
    changed = bytearray(path.read_bytes())
    changed[100] ^= 1
    path.write_bytes(changed)
    with pytest.raises(FirmwareUnsuitable, match="another than the image was measured with"):
        require_launch_firmware(manifest)
    path.unlink()
    with pytest.raises(NotFound):
        require_launch_firmware(manifest)


def test_what_is_known_by_now_counts(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image vouched for at its build is refused once its firmware is known to boot any kernel."""
    digest = manifest.shape.firmware_sha256.hex()
    monkeypatch.setitem(KNOWN, digest, KnownFirmware(name="lax", enforces_kernel_hashes=False))  # type: ignore[arg-type]
    with pytest.raises(FirmwareUnsuitable, match="does not check kernels"):
        require_launch_firmware(manifest)
    monkeypatch.setitem(KNOWN, digest, KnownFirmware(name="good", enforces_kernel_hashes=True))  # type: ignore[arg-type]
    require_launch_firmware(manifest)


def test_every_build_that_is_known() -> None:
    """Those that do not check say their name."""
    for digest, known in KNOWN.items():
        problem = enforcement_problem(bytes.fromhex(digest))
        assert bool(problem) != known.enforces_kernel_hashes
        assert not problem or known.name in problem
    assert enforcement_problem(bytes(32)) == ""
