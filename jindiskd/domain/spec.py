"""A domain as a value, and what is filled in for an image on a host. Writing it is `xml.write`'s, judging `check`'s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jindiskd.base.platform import Tee
from jindiskd.domain.binding import Binding
from jindiskd.domain.security import Security, Stated, security_of, with_host_data
from jindiskd.guest.config import serial_of
from jindiskd.image.manifest import Manifest
from jindiskd.image.request import DiskBus

EMULATOR = "/usr/bin/qemu-system-x86_64"


@dataclass(frozen=True, slots=True, kw_only=True)
class BootInputs:
    """What libvirt was told to boot: the inputs of the launch digest."""

    firmware: str
    kernel: str
    initrd: str
    cmdline: str
    vcpus: int
    cpu_model: str
    simulated: Stated = Stated()  # noqa: RUF009 (a value that does not change)
    """What the simulated firmware is told beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataDisk:
    """The disk of a data volume."""

    serial: str
    """What the guest finds it by; the host's word, which proves nothing."""
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSpec:
    """A domain to be defined."""

    name: str
    uuid: str
    binding: Binding
    boot: BootInputs
    memory_mib: int
    disk: Path
    console_log: Path
    vsock_socket: Path | None
    """The vhost-user socket; None where the host's kernel has vhost-vsock."""
    emulator: str = EMULATOR
    security: Security | None = None
    volumes: tuple[DataDisk, ...] = ()
    finds_root: bool = False
    """Whether the guest finds the image's disk wherever it is among the disks."""
    scsi: bool = False
    """Whether its guests find disks on a virtio SCSI controller, too, so that they get theirs there."""
    stated: Stated = Stated()  # noqa: RUF009 (as above)
    """The policy and ID block that the image has of its own: what rules over an owner's of an adopted domain."""

    @property
    def virt_type(self) -> str:
        """libvirt's domain type. Emulation for what is simulated, and hardware for nothing less than hardware."""
        return "qemu" if self.binding.platform.simulated else "kvm"

    @property
    def pinned(self) -> bool:
        """Whether the firmware pins all of the guest's memory, which then must not count against a limit."""
        return self.security is not None and self.binding.platform.tee in {Tee.SEV, Tee.SEV_ES}

    @property
    def named_cpu(self) -> bool:
        """Whether the processor model is measured, so that it must be named; TDX measures what the hardware is."""
        return self.binding.platform.tee is not Tee.TDX


def data_disks(manifest: Manifest, directory: Path) -> tuple[DataDisk, ...]:
    """The disks of an image's data volumes, `directory` being the image's."""
    return tuple(
        DataDisk(serial=serial_of(volume.name), path=directory / volume.file) for volume in manifest.volumes
    )


def from_manifest(
    manifest: Manifest,
    directory: Path,
    *,
    name: str,
    uuid: str,
    memory_mib: int,
    console_log: Path,
    vsock: Path | None,
    emulator: str = EMULATOR,
    host_data: bytes = b"",
) -> DomainSpec:
    """The domain of an image in the store, `directory` being the image's, with every default filled in.

    Raises:
        InvalidArgument, NotSupported: as `security.with_host_data`.
    """
    security = with_host_data(security_of(manifest), host_data, manifest.platform)
    stated = Stated.of_image(manifest)
    return DomainSpec(
        name=name,
        uuid=uuid,
        binding=Binding(image=manifest.name, image_id=manifest.image_id, platform=manifest.platform),
        boot=BootInputs(
            firmware=manifest.shape.firmware,
            kernel=str(directory / manifest.kernel.file),
            initrd=str(directory / manifest.initrd.file),
            cmdline=(directory / manifest.cmdline.file).read_text(),
            vcpus=manifest.shape.vcpus,
            cpu_model=manifest.shape.cpu_model,
            simulated=stated if security is None else Stated(),
        ),
        memory_mib=memory_mib,
        disk=directory / "disk.img",
        console_log=console_log,
        vsock_socket=vsock,
        emulator=emulator,
        volumes=data_disks(manifest, directory),
        finds_root=manifest.finds_root,
        scsi=manifest.disk_bus == DiskBus.SCSI,
        security=security,
        stated=stated,
    )
