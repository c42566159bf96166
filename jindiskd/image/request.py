"""What can be asked of a build, checked before anything is done."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from jindiskd.attest import guest_policy
from jindiskd.base.platform import Platform
from jindiskd.errors import AlreadyExists, InvalidArgument, NotFound, NotSupported
from jindiskd.guest.config import MAX_VOLUMES
from jindiskd.image import randomness
from jindiskd.image.manifest import Manifest
from jindiskd.jindisk.v1.keys import ROOT_BYTES

SOURCE = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
KEY_BYTES = 32
MIN_ROOT_BYTES = 8 << 20
MAX_ROOT_BYTES = 16 << 40
GRANULE_BYTES = 4096
MAX_SEED_BYTES = 1024
VOLUME_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,15}")
"""Of a data volume. Its disk's serial number has it, for which virtio has room for 20 characters."""
ROOT = "root"
"""The name of the root among an image's volumes."""
MIN_VOLUME_BYTES = 16 << 20
MAX_MOUNT_CHARACTERS = 255
MOUNT_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SYSTEMS_OWN = frozenset({"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin", "sys",
                         "usr", "var"})  # fmt: skip
"""Directories in / that the system does not start without: no empty file system goes over them."""
KERNELS_OWN = frozenset({"dev", "proc", "run", "sys"})
"""Below these nothing of a disk belongs."""


class BaseKind(enum.StrEnum):
    """What the base is."""

    DISK = "disk"
    """An image of a disk with a GPT, raw or qcow2."""
    ROOTFS = "rootfs"
    """A tar stream of a root file system."""


class VolumeFormat(enum.StrEnum):
    """How the root is encrypted."""

    LUKS2 = "luks2"
    JINDISK = "jindisk"
    """JinDisk 2."""
    JINDISK1 = "jindisk1"
    """JinDisk 1, for guests whose kernel has the reference's module. Protects nothing against the host."""

    @property
    def key_bytes(self) -> int:
        """Length of the key that the broker releases for it."""
        return ROOT_BYTES if self is VolumeFormat.JINDISK1 else KEY_BYTES


class InitrdKind(enum.StrEnum):
    """Who made what opens the root."""

    OWN = "own"
    """Our own initrd: the agent and nothing else."""
    SYSTEM = "system"
    """The one that the base's system made, by initramfs-tools or dracut, with the agent in it."""


class DiskBus(enum.StrEnum):
    """How an image's domains have its disks."""

    VIRTIO = "virtio"
    """As virtio block devices."""
    SCSI = "scsi"
    """On a virtio SCSI controller: `sda` and so on. More drivers in the initrd then read what the host says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRequest:
    """A data volume to be made. `check` refuses what cannot be."""

    name: str
    size_bytes: int
    """Of what the guest sees."""
    format: VolumeFormat = VolumeFormat.JINDISK
    mount: str = ""
    """Where the guest mounts the file system (ext4) that is made on it; empty for a volume without one."""

    def check(self) -> None:
        """Raises `InvalidArgument`: a value is out of its range."""
        if not VOLUME_NAME.fullmatch(self.name) or self.name == ROOT:
            text = f"it has 1 to 16 of a-z, 0-9 and '-', begins with a letter or digit, and is not {ROOT!r}"
            raise InvalidArgument("name of the volume", self.name, text)
        if self.format is VolumeFormat.JINDISK1:
            raise InvalidArgument("format of the volume", self.format, "choose jindisk or luks2")
        if not MIN_VOLUME_BYTES <= self.size_bytes <= MAX_ROOT_BYTES or self.size_bytes % GRANULE_BYTES:
            text = f"it is a multiple of {GRANULE_BYTES} between {MIN_VOLUME_BYTES} and {MAX_ROOT_BYTES} bytes"
            raise InvalidArgument(f"size of volume {self.name!r}", self.size_bytes, text)
        if self.mount:
            self._check_mount()

    def _check_mount(self) -> None:
        parts = PurePosixPath(self.mount).parts[1:]
        plain = all(MOUNT_PART.fullmatch(part) for part in parts) and self.mount == "/" + "/".join(parts)
        if not parts or not plain or len(self.mount) > MAX_MOUNT_CHARACTERS:
            text = "it is an absolute path of letters, digits, '.', '_' and '-', such as /srv/data"
            raise InvalidArgument(f"mount point of volume {self.name!r}", self.mount, text)
        if parts[0] in KERNELS_OWN or (len(parts) == 1 and parts[0] in SYSTEMS_OWN):
            text = "the system's own files are there: choose another place, such as /srv/data"
            raise InvalidArgument(f"mount point of volume {self.name!r}", self.mount, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A build, without the base itself. `check` refuses what cannot be built."""

    name: str
    platform: Platform
    format: VolumeFormat
    base_kind: BaseKind
    firmware: str
    """Path of the firmware image on this host, that the guest will be launched with."""
    vcpus: int
    cpu_model: str
    """QEMU's name of a processor model, such as `EPYC-v4`."""
    guest_features: int = 1
    size_bytes: int | None = None
    """Length of the root file system, at least that of the base's; None leaves a disk's as it is and gives a tar
    stream's content half as much again."""
    cmdline: str = ""
    """Words to add to the kernel command line."""
    seed: bytes | None = None
    """Makes every random choice, keys included, follow from these bytes."""
    debug: bool = False
    """Permit command line words that open the guest to whoever has its console."""
    report_source: str = ""
    """`module:attribute` of a report source in the guest instead of the platform's own; empty for that."""
    key_program: str = ""
    """Path on this host of a program that gives the key in the guest instead of the broker; empty for the broker."""
    initrd: InitrdKind = InitrdKind.OWN
    guest_policy: int | None = None
    """What the image demands of the host beyond its platform's default; None for that."""
    vouch_firmware: bool = False
    """The owner knows that a firmware of an unknown build checks the kernel against the measured hashes."""
    volumes: tuple[VolumeRequest, ...] = ()
    """What its guests have besides the root, each on a disk of its own."""
    disk_bus: DiskBus = DiskBus.VIRTIO

    def stream(self, purpose: str) -> randomness.Rng:
        """Randomness for one purpose of this build; with a seed it follows from that, the image's name and the purpose.

        The name is in it so that no two images ever have one key.
        """
        return randomness.stream(self.seed, f"{self.name}/{purpose}")

    def check(self) -> None:
        """Check all that can be checked without the base.

        Raises:
            InvalidArgument: a value is out of its range.
            NotSupported: the platform cannot be built for yet.
        """
        check_name(self.name)
        if self.platform.measured_before and self.format is not VolumeFormat.LUKS2:
            text = f"choose format {VolumeFormat.LUKS2}: a broker tells a JinDisk volume's state while the guest boots"
            raise NotSupported(f"a root of format {self.format} on {self.platform}", text)
        size = self.size_bytes
        if size is not None and (not MIN_ROOT_BYTES <= size <= MAX_ROOT_BYTES or size % GRANULE_BYTES):
            text = f"it is a multiple of {GRANULE_BYTES} between {MIN_ROOT_BYTES} and {MAX_ROOT_BYTES} bytes"
            raise InvalidArgument("size of the root file system", size, text)
        if self.seed is not None and not 1 <= len(self.seed) <= MAX_SEED_BYTES:
            raise InvalidArgument("seed length", len(self.seed), f"it has 1 to {MAX_SEED_BYTES} bytes")
        if self.key_program and self.format is VolumeFormat.JINDISK:
            text = "JinDisk 2 needs the broker, which remembers the volume's state: build with another format"
            raise InvalidArgument("key program", self.key_program, text)
        if self.initrd is InitrdKind.SYSTEM:
            text = f"build with initrd {InitrdKind.OWN}"
            if self.format is VolumeFormat.JINDISK1:
                what = f"a root of format {self.format} opened by the system's initrd"
                reason = "no distribution's kernel has its module, and the package jindisk-initramfs does not bring it"
                raise NotSupported(what, f"{reason}; choose format {VolumeFormat.JINDISK}, or {text}")
            if self.key_program or self.report_source:
                raise NotSupported("a key program or a report source of one's own in the system's initrd", text)
        self._check_volumes()
        if self.report_source and not SOURCE.fullmatch(self.report_source):
            raise InvalidArgument("report source", self.report_source, "it is module:attribute")
        if self.guest_policy is not None and (wrong := guest_policy.problem(self.guest_policy, self.platform.tee)):
            raise InvalidArgument("guest policy", hex(self.guest_policy), wrong)
        if not self.firmware.startswith("/"):
            raise InvalidArgument("firmware", self.firmware, "an absolute path is needed")


    def _check_volumes(self) -> None:
        if not self.volumes:
            return
        for volume in self.volumes:
            volume.check()
        if len(self.volumes) > MAX_VOLUMES:
            text = f"an image has {MAX_VOLUMES} at most besides its root"
            raise InvalidArgument("number of volumes", len(self.volumes), text)
        for what, given in (("name", "name"), ("mount point", "mount")):
            values = [value for volume in self.volumes if (value := getattr(volume, given))]
            for value in values:
                if values.count(value) > 1:
                    raise InvalidArgument(f"{what} of a volume", value, "two volumes have it; give each its own")
        what = "data volumes beside the root of an image"
        if self.platform.measured_before and any(one.format is not VolumeFormat.LUKS2 for one in self.volumes):
            text = f"choose format {VolumeFormat.LUKS2}: a broker tells a JinDisk volume's state while the guest boots"
            raise NotSupported(f"{what} for {self.platform} in another format", text)
        if self.key_program and any(one.format is not VolumeFormat.LUKS2 for one in self.volumes):
            text = f"choose format {VolumeFormat.LUKS2}: JinDisk 2 needs the broker, which remembers the volume's state"
            raise NotSupported(f"{what} whose keys a program gives, in another format", text)


def clone_request(manifest: Manifest, name: str) -> BuildRequest:
    """What a build of the clone would be asked for; raises as `BuildRequest.check`."""
    request = _as_built(manifest, name)
    request.check()
    return request


def with_volume(manifest: Manifest, volume: VolumeRequest) -> BuildRequest:
    """What a build of the image with one more data volume would be asked for.

    Raises:
        AlreadyExists: it has a volume of that name. Others as `BuildRequest.check`.
    """
    request = _as_built(manifest, manifest.name)
    if volume.name in {other.name for other in request.volumes}:
        raise AlreadyExists(f"volume of image {manifest.name!r}", volume.name)
    request = replace(request, volumes=(*request.volumes, volume))
    request.check()
    return request


def without_volume(manifest: Manifest, name: str) -> BuildRequest:
    """What a build of the image without a data volume would be asked for; raises `NotFound`."""
    request = _as_built(manifest, manifest.name)
    left = tuple(volume for volume in request.volumes if volume.name != name)
    if len(left) == len(request.volumes):
        raise NotFound(f"volume of image {manifest.name!r}", name)
    return replace(request, volumes=left)


def _as_built(manifest: Manifest, name: str) -> BuildRequest:
    """An order for what is there."""
    return BuildRequest(
        name=name,
        platform=manifest.platform,
        format=VolumeFormat(manifest.volume.format),
        base_kind=BaseKind(manifest.base_kind),
        firmware=manifest.shape.firmware,
        vcpus=manifest.shape.vcpus,
        cpu_model=manifest.shape.cpu_model,
        guest_features=manifest.shape.guest_features,
        volumes=tuple(
            VolumeRequest(
                name=volume.name,
                size_bytes=volume.size_bytes,
                format=VolumeFormat(volume.volume.format),
                mount=volume.mount,
            )
            for volume in manifest.volumes
        ),
        guest_policy=manifest.shape.guest_policy,
        initrd=InitrdKind(manifest.initrd_kind),
        disk_bus=DiskBus(manifest.disk_bus),
    )


def check_name(name: str) -> None:
    """Refuse a name that no image can have: it is a directory's name, and part of messages and listings.

    Raises:
        InvalidArgument: anything but 1 to 63 letters, digits, dots, underscores and hyphens, letter or digit first.
    """
    if not NAME.fullmatch(name):
        text = "it has 1 to 63 letters, digits, '.', '_' or '-', and begins with a letter or digit"
        raise InvalidArgument("image name", name, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildTask:
    """What the service adds to a request, and the worker reads from its standard input."""

    request: BuildRequest
    image_id: str
    created: str
    """RFC 3339, UTC."""
    broker_spki_sha256: bytes
    staging: str
    """An empty directory on the store's file system; the worker writes nowhere else."""
    workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneTask:
    """A clone, as the worker reads it from its standard input."""

    build: BuildTask
    """Of the image to be: its base is the source."""
    source: str
    """The directory of the source in the store, which does not change meanwhile."""
    anchor: bytes
    """JinDisk 2: the last known state of the source's root, 73 bytes; else empty."""
    volume_anchors: dict[str, bytes]
    """The same of its data volumes, by name."""
    released_to: tuple[bytes, ...]
    """The launch digests that the source's key is released to, as the key store has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumesTask:
    """A change of the data volumes of an image, as the worker reads it from its standard input."""

    build: BuildTask
    """Of the image as it shall be, with all its volumes."""
    source: str
    """The directory of the image in the store, which does not change meanwhile."""
    added: str
    """The name of the volume that is new; empty where one goes."""
    anchor: bytes
    """JinDisk 2: the last known state of the root, 73 bytes; empty where the root is not read."""
    released_to: tuple[bytes, ...]
    """The launch digests that the image's keys are released to, as the key store has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportTask:
    """An export, as the worker reads it."""

    source: str
    """The directory of the image in the store, which does not change meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportTask:
    """An import, as the worker reads it."""

    staging: str
    store: str
    """The image store's directory: names and identities there are taken."""
    name: str = ""
    """Of the image here; that in the stream if empty."""
    firmware: tuple[str, ...] = ()
    """Files on this host that may be the image's firmware."""
    firmware_dirs: tuple[str, ...] = ()
    """Where else it is looked for, by the path and by the name that it had where the image was built."""
    idle_s: int | None = None
    """For how long the stream may be silent; None for ever."""


Task = BuildTask | CloneTask | VolumesTask | ExportTask | ImportTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a build is."""

    stage: str
    """One word for people: `read`, `prepare`, `decrypt`, `boot`, `encrypt`, `write`, `receive`, `measure`, `finish`."""
    fraction: float | None
    """Of the stage, 0 to 1; None where it cannot be told."""
    done_bytes: int = 0
    total_bytes: int = 0


Report = Callable[[Progress], None]
"""Called with the progress of a piece of work."""
Share = Callable[[int, int], None]
"""Called with the bytes done and those of all, of one stage."""


def shares(report: Report, stage: str) -> Share:
    """Progress of one stage, told to `report`."""
    return lambda done, total: report(
        Progress(stage=stage, fraction=done / total if total else 1.0, done_bytes=done, total_bytes=total)
    )


def resource_of(image_id: str, volume: str = ROOT) -> str:
    """The resource path of a volume's key at the broker."""
    return f"default/{image_id}/{volume}"
