"""What an image will measure as, and whether the firmware makes that measurement mean anything."""

from __future__ import annotations

from pathlib import Path

from jindiskd.attest import measure
from jindiskd.attest.firmware import FirmwareInfo, FirmwareUnsuitable, enforcement_problem, inspect_firmware
from jindiskd.attest.tdx_measure import mr_td
from jindiskd.base.platform import Tee
from jindiskd.image.manifest import Manifest
from jindiskd.image.request import BuildRequest
from jindiskd.image.store import StoredImage


def suitable_firmware(request: BuildRequest) -> FirmwareInfo:
    """Look into the firmware of a build, and refuse one that would start any kernel under an unchanged measurement.

    A simulated platform proves nothing in any case, so that the general-purpose firmware will do for it.

    Raises:
        FirmwareUnsuitable: it does not check kernel hashes, or is of an unknown build that nobody vouches for.
        NotFound: no such file.
    """
    path = Path(request.firmware)
    info = inspect_firmware(path)
    if request.platform.measured_before and not (info.has_hash_table and info.secret_address):
        raise FirmwareUnsuitable(path, "has no place for kernel hashes and a secret")
    if request.platform.simulated:
        return info
    if request.platform.tee is Tee.TDX:
        mr_td(path)  # what follows is measured into registers, so that no hash needs to be checked; refuses without TDX
        return info
    problem = enforcement_problem(info.sha256)
    if problem:
        raise FirmwareUnsuitable(path, problem)
    if info.enforces_kernel_hashes is None and not request.vouch_firmware:
        raise FirmwareUnsuitable(path, "is of an unknown build: vouch for it if it checks kernel hashes; otherwise")
    return info


def require_launch_firmware(manifest: Manifest) -> None:
    """Refuse to start a guest on a real platform whose firmware is not the one measured, or checks no kernel.

    An image may be older than what is known of its firmware, or come from another store. Reads the file: call it off
    the event loop.

    Raises:
        FirmwareUnsuitable, NotFound: with the reason.
    """
    if manifest.platform.simulated:
        return
    path = Path(manifest.shape.firmware)
    problem = "" if manifest.platform.tee is Tee.TDX else enforcement_problem(manifest.shape.firmware_sha256)
    if not problem and inspect_firmware(path).sha256 != manifest.shape.firmware_sha256:
        problem = "is another than the image was measured with: put that back, or build the image again; otherwise"
    if problem:
        raise FirmwareUnsuitable(path, problem)


def launch_digest(request: BuildRequest, directory: Path, cmdline: str) -> bytes:
    """The launch digest of the image whose boot files lie in `directory`, as `measure.launch_digest` says."""
    return measure.launch_digest(
        request.platform.tee,
        measure.LaunchInputs(
            firmware=Path(request.firmware),
            kernel=directory / "vmlinuz",
            initrd=directory / "initrd",
            cmdline=cmdline,
            vcpus=request.vcpus,
            cpu_model=request.cpu_model,
            guest_features=request.guest_features,
        ),
    )


def inputs_of(image: StoredImage) -> measure.LaunchInputs:
    """What enters the launch digest of an image in the store."""
    manifest = image.manifest
    return measure.LaunchInputs(
        firmware=Path(manifest.shape.firmware),
        kernel=image.path / manifest.kernel.file,
        initrd=image.path / manifest.initrd.file,
        cmdline=cmdline_of(image),
        vcpus=manifest.shape.vcpus,
        cpu_model=manifest.shape.cpu_model,
        guest_features=manifest.shape.guest_features,
    )


def cmdline_of(image: StoredImage) -> str:
    """The kernel command line of an image in the store."""
    return (image.path / image.manifest.cmdline.file).read_text(encoding="utf-8")
