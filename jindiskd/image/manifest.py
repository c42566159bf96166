"""The manifest of an image: what was built, from what, and what its guest will measure as."""

from __future__ import annotations

from dataclasses import dataclass, field

from jindiskd.base.platform import Platform

FILE = "manifest.json"
SCHEMA = 2
READABLE = frozenset({1, SCHEMA})
"""1 is of before there were data volumes, and is 2 without any."""


def volume_file(name: str) -> str:
    """The file of a data volume's disk in the image's directory."""
    return f"volume-{name}.img"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition of the disk."""

    name: str
    """GPT partition name: `boot`, `UEFI` or `jindisk-rootfs`, in this order."""
    uuid: str
    type_uuid: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """An encrypted volume."""

    format: str
    """`luks2`, `jindisk` (version 2) or `jindisk1`."""
    uuid: str
    cipher: str
    header_bytes: int = 0
    header_sha256: bytes = b""
    anchor: bytes = b""
    """JinDisk 2: the anchor after the build, 73 bytes, JinDisk 2 format section 13.1; else empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataVolume:
    """A further volume, on a disk of its own, which begins with it."""

    name: str
    """Names the disk's file, its serial number, and its links in the guest."""
    resource: str
    """The key's resource path `default/<image_id>/<name>`."""
    volume: Volume
    size_bytes: int
    """Of what is inside: what the guest sees."""
    disk_size_bytes: int
    """Of the disk's file."""
    mount: str = ""
    """Where its file system is mounted in the guest; empty where it is made without one."""

    @property
    def file(self) -> str:
        """The disk's file in the image's directory, raw."""
        return volume_file(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootFile:
    """A file that direct boot hands to the guest and that the platform measures."""

    file: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of the virtual machine enters the launch digest."""

    firmware: str
    """Path of the firmware image on the host."""
    firmware_sha256: bytes
    vcpus: int
    cpu_model: str
    guest_features: int = 1
    guest_policy: int | None = None
    """What the image demands of the host (`attest.guest_policy`); None for the platform's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """An image in the store. The directory's name is `name`; the image's identity is `image_id`."""

    schema: int
    image_id: str
    """Random UUID; part of the key's resource path `default/<image_id>/root`."""
    name: str
    created: str
    """RFC 3339, UTC."""
    platform: Platform
    base_sha256: bytes
    """Of the base image file, or of the tar stream of the root file system."""
    base_kind: str
    """`disk` or `rootfs`."""
    distribution: str
    """PRETTY_NAME of the base's os-release, else empty."""
    kernel_release: str
    disk_size_bytes: int
    partitions: tuple[Partition, ...]
    volume: Volume
    """The root."""
    kernel: BootFile
    initrd: BootFile
    cmdline: BootFile
    shape: Shape
    launch_digest: bytes
    """48 bytes (SNP; of TDX, MRTD) or 32 (SEV, SEV-ES)."""
    broker_spki_sha256: bytes
    resource: str
    initrd_kind: str = "own"
    """`own`, our own initrd, or `system`, the initramfs that the base's system made."""
    seeded: bool = False
    """Built with a fixed seed: keys are guessable by whoever knows it; for tests and reproduction only."""
    changes: tuple[str, ...] = field(default=())
    """What the builder altered inside the root file system, in words."""
    clone_of: str = ""
    """Identity of the image that it was cloned from, else empty."""
    volumes: tuple[DataVolume, ...] = ()
    """What its guests have besides the root."""
    finds_root: bool = False
    """Whether the agent in its initrd finds the root on any disk; an older one looks at the first virtio disk alone."""
    disk_bus: str = "virtio"
    """How its domains have their disks: `virtio`, or `scsi` on a virtio SCSI controller, for which its initrd has the
    drivers then. Those for virtio disks are in each."""
    id_block: bytes = b""
    """SEV-SNP: the owner's signed statement of digest and policy, 96 bytes; else empty. See `attest.id_block`."""
    id_auth: bytes = b""
    """What authenticates it, 4096 bytes; else empty."""

    @property
    def anchored(self) -> tuple[tuple[str, Volume], ...]:
        """Its JinDisk 2 volumes, whose states the broker remembers, each with its key's resource path."""
        found = ((self.resource, self.volume), *((volume.resource, volume.volume) for volume in self.volumes))
        return tuple((resource, volume) for resource, volume in found if volume.anchor)
