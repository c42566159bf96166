"""Building an image: base in, encrypted disk, boot files and manifest out. Runs in a worker process, step by step.

Everything named is written to one staging directory, and holds nothing secret at any moment: the disk with cipher text,
the kernel, the initrd, the command line, modules on their way into the initrd. Clear text of the root file system (the
private copy that is amended, a converted qcow2 image, a spooled tar stream) is kept in unlinked files of the same file
system, which the kernel frees however the process ends. Killed at any step, it leaves the staging directory, which the
store's `clean` removes.

Apart from keys and UUIDs the result depends on the base and the request alone; with a seed it does so wholly.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from jindiskd.attest.firmware import FirmwareInfo
from jindiskd.base import document
from jindiskd.base.files import replace_file, space_for
from jindiskd.base.process import ToolFailed
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NoSpace, NotFound
from jindiskd.guest import config as guest
from jindiskd.image import base, data_volumes, disk, initrd, randomness, system_initrd, tarroot
from jindiskd.image import kernel as kernels
from jindiskd.image import manifest as manifests
from jindiskd.image.amend import amend, put_file
from jindiskd.image.cmdline import ROOT, command_line
from jindiskd.image.debugfs import FileSystem, FileSystemNotWritten
from jindiskd.image.ext4 import Superblock, read_superblock, used_ranges
from jindiskd.image.manifest import Manifest, Shape
from jindiskd.image.measurement import launch_digest, suitable_firmware
from jindiskd.image.refusals import RootDamaged
from jindiskd.image.request import (
    BaseKind,
    BuildTask,
    DiskBus,
    InitrdKind,
    Progress,
    Report,
    VolumeFormat,
    resource_of,
    shares,
)
from jindiskd.image.sparse import path_of, unlinked_file
from jindiskd.image.store import CMDLINE, INITRD, KERNEL
from jindiskd.image.tools import tool
from jindiskd.image.volume import SealedVolume, placeholder, prepare_volume

MAX_PROGRAM_BYTES = 32 << 20
ROOT_DEVICES = {DiskBus.VIRTIO: "/dev/vda3", DiskBus.SCSI: "/dev/sda3"}
"""The root is a disk's third partition, most often of the first disk: a locator, no identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearRoot:
    """The private copy of the root, amended and checked, at the start of an unlinked file."""

    fd: int
    superblock: Superblock
    size_bytes: int
    base_sha256: Callable[[], bytes]
    distribution: str
    changes: tuple[str, ...]
    kernel_release: str


def build(
    task: BuildTask, base_fd: int, key: Secret, report: Report, volume_keys: data_volumes.Keys | None = None
) -> Manifest:
    """Build the image that `task` describes in its staging directory.

    Args:
        task: checked request and what the service decided.
        base_fd: the base: a regular file for a disk, anything readable for a tar stream.
        key: of the format's length; what the broker will release to the guest.
        report: called with progress.
        volume_keys: of its data volumes, by name.

    Raises:
        BaseRefused: one of the family; the base cannot be built from.
        NoSpace: the file system is full.
        JindiskError: others, each saying what to do.
    """
    task.request.check()
    try:
        with space_for(Path(task.staging)), ExitStack() as stack:
            return _Build(task, key, report, stack, volume_keys or {}).run(base_fd)
    except (ToolFailed, FileSystemNotWritten) as exc:
        said = exc.stderr if isinstance(exc, ToolFailed) else str(exc)
        if os.strerror(errno.ENOSPC) in said:
            raise NoSpace(task.staging) from exc
        raise


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


class _Build:
    """One build. Its steps are methods in the order in which they run."""

    def __init__(
        self, task: BuildTask, key: Secret, report: Report, stack: ExitStack, volume_keys: data_volumes.Keys
    ) -> None:
        self.task, self.request, self.key, self.report, self.stack = task, task.request, key, report, stack
        self.volume_keys = volume_keys
        self.volumes: Sequence[data_volumes.Prepared] = ()
        self.staging = Path(task.staging)
        self.work = self.staging / "work"
        self.identities = task.request.stream("identities")
        self.firmware: FirmwareInfo | None = None
        self.finds_root = True

    def run(self, base_fd: int) -> Manifest:
        firmware = self.firmware = suitable_firmware(self.request)
        line = command_line(
            self.request.format, self.request.cmdline, debug=self.request.debug, system_initrd=self.system_initrd
        )
        self.work.mkdir()
        root = self.clear_root(base_fd)
        self.report(Progress(stage="boot", fraction=None))
        volume = self.stack.enter_context(
            prepare_volume(self.task, self.key, root.size_bytes, root.superblock.write_time)
        )
        self.volumes = data_volumes.prepare(
            self.task, self.volume_keys, root.superblock.write_time, self.stack
        )
        if self.system_initrd:
            root = self.configured(root, volume)
        self.boot_files(root, volume, line)
        digest = launch_digest(self.request, self.staging, line)
        time = root.superblock.write_time
        layout = disk.lay_out(self.staging, volume, self.identities, time=time, owned=self.owned)
        ranges = used_ranges(root.fd, root.superblock)
        encrypted = shares(self.report, "encrypt")
        sealed = disk.write_disk(
            self.staging,
            layout,
            lambda fd, offset: volume.fill(root.fd, fd, ranges, offset, encrypted),
        )
        written = tuple(prepared.write(self.staging, encrypted) for prepared in self.volumes)
        self.report(Progress(stage="finish", fraction=None))
        shutil.rmtree(self.work)
        manifest = Manifest(
            schema=manifests.SCHEMA,
            image_id=self.task.image_id,
            name=self.request.name,
            created=self.task.created,
            platform=self.request.platform,
            base_sha256=root.base_sha256(),
            base_kind=self.request.base_kind,
            distribution=root.distribution,
            kernel_release=root.kernel_release,
            disk_size_bytes=layout.size_bytes,
            partitions=layout.partitions,
            volume=sealed,
            kernel=disk.boot_file(self.staging, KERNEL),
            initrd=disk.boot_file(self.staging, INITRD),
            cmdline=disk.boot_file(self.staging, CMDLINE),
            shape=Shape(
                firmware=self.request.firmware,
                firmware_sha256=firmware.sha256,
                vcpus=self.request.vcpus,
                cpu_model=self.request.cpu_model,
                guest_features=self.request.guest_features,
                guest_policy=self.request.guest_policy,
            ),
            launch_digest=digest,
            broker_spki_sha256=self.task.broker_spki_sha256,
            resource=resource_of(self.task.image_id),
            initrd_kind=self.request.initrd.value,
            seeded=self.request.seed is not None,
            changes=root.changes,
            volumes=written,
            finds_root=self.finds_root,
            disk_bus=self.request.disk_bus.value,
        )
        replace_file(self.staging / manifests.FILE, document.dump(manifest))
        return manifest

    def owned(self, fd: int) -> int:
        """Close `fd` when the build ends."""
        self.stack.callback(os.close, fd)
        return fd

    def clear_root(self, base_fd: int) -> ClearRoot:
        """The private copy of the root, amended; the kernel and its modules go to the staging directory."""
        others: tuple[FileSystem, ...] = ()
        if self.request.base_kind is BaseKind.DISK:
            hashing = base.Digest(base_fd)
            self.stack.callback(hashing.stop)
            self.report(Progress(stage="read", fraction=None))
            image = base.open_disk(base_fd, self.staging)
            if image != base_fd:
                self.owned(image)
            found = base.find_root(image)
            self.require_room(found.superblock)
            fd = self.owned(unlinked_file(self.staging))
            base.copy_root(found, fd, shares(self.report, "read"))
            others = tuple(FileSystem(image, offset) for offset in found.others)
            self.resize(fd, found.superblock)
            base_sha256 = hashing.result
        else:
            fd, digest = self.tar_root(base_fd)
            base_sha256 = lambda: digest  # noqa: E731 (the disk's is waited for at the end, this one is known)
        self.report(Progress(stage="prepare", fraction=None))
        superblock = read_superblock(fd)
        assert superblock is not None
        system = FileSystem(fd, now=superblock.write_time)
        changes = amend(system, ROOT[self.request.format])
        if self.request.debug:
            changes = (*changes, "debug image: its command line may open it to whoever has the console")
        if self.request.format is VolumeFormat.JINDISK1:
            changes = (*changes, "root on JinDisk 1: whoever has the disk can read and change all of it")
        found_kernel = kernels.find_kernel(system, others)
        kernels.extract_kernel(found_kernel, self.staging / KERNEL)
        if self.system_initrd:
            path = system_initrd.extract(found_kernel, self.work / INITRD)
            # The package in the base may be older than we are.
            wanted = bool(self.request.volumes) or self.request.disk_bus is not DiskBus.VIRTIO
            self.finds_root = system_initrd.require_agent(self.work / INITRD, path, volumes=wanted)
            changes = (*changes, f"started with {path}, which its own system made")
        else:
            kernels.extract_modules(
                system, found_kernel.release, self.work,
                lambda tree: initrd.wanted_modules(self.guest_config(None), tree),
            )  # fmt: skip
        problem = system.check()
        if problem is not None:
            raise RootDamaged(f"after the builder's alterations: {problem}")
        superblock = read_superblock(fd)
        assert superblock is not None
        return ClearRoot(
            fd=fd,
            superblock=superblock,
            size_bytes=-(-superblock.size_bytes // 4096) * 4096,
            base_sha256=base_sha256,
            distribution=base.distribution(system),
            changes=changes,
            kernel_release=found_kernel.release,
        )

    def require_room(self, found: Superblock) -> None:
        """Fail early instead of after minutes: the private copy and the encrypted disk are there at the same time."""
        needed = 2 * found.used_bytes
        if _free_bytes(self.staging) < needed:
            raise NoSpace(self.task.staging, needed)

    def resize(self, fd: int, found: Superblock) -> None:
        """Grow the file system to the size asked for."""
        wanted = self.request.size_bytes
        if wanted is None or wanted == found.size_bytes:
            return
        if wanted < found.size_bytes:
            text = f"the base's root file system has {found.size_bytes} bytes, and is not made smaller"
            raise InvalidArgument("size of the root file system", wanted, text)
        os.truncate(fd, wanted)
        blocks = wanted // found.block_bytes
        system = FileSystem(fd, now=found.write_time)
        argv = ["resize2fs", "-f", path_of(fd), str(blocks)]
        tool(argv, pass_fds=(fd,), env=system.environment)

    def tar_root(self, stream_fd: int) -> tuple[int, bytes]:
        self.report(Progress(stage="read", fraction=None))
        spooled, digest = tarroot.spool(stream_fd, self.staging)
        self.owned(spooled)
        items = tarroot.read_items(spooled)
        size = self.request.size_bytes or tarroot.needed_bytes(items)
        uuid = randomness.new_uuid(self.identities)
        self.report(Progress(stage="prepare", fraction=None))
        fd = self.owned(tarroot.make_root(spooled, items, size_bytes=size, uuid=uuid, scratch=self.staging))
        return fd, digest

    def guest_config(self, volume: SealedVolume | None) -> guest.GuestConfig:
        """What the guest is told; without a volume yet, enough to know which modules it will need."""
        expected = volume.expected if volume else placeholder(self.request.format)
        secret = None
        if self.request.platform.measured_before and self.firmware is not None:
            address, size_bytes = self.firmware.secret_address or 0, self.firmware.secret_bytes
            secret = guest.SecretArea(address=address, size_bytes=size_bytes)
        return guest.GuestConfig(
            schema=guest.SCHEMA,
            image_id=self.task.image_id,
            platform=self.request.platform,
            broker=guest.BrokerPin(spki_sha256=self.task.broker_spki_sha256),
            root=guest.RootVolume(
                device=ROOT_DEVICES[self.request.disk_bus],
                resource=resource_of(self.task.image_id),
                luks2=expected if isinstance(expected, guest.Luks2Expectation) else None,
                jindisk=expected if isinstance(expected, guest.JindiskExpectation) else None,
                jindisk1=expected if isinstance(expected, guest.Jindisk1Expectation) else None,
            ),
            modules=(),
            report_source=self.request.report_source,
            volumes=tuple(one.config for one in self.volumes) if volume else data_volumes.placeholders(self.task),
            secret=secret,
        )

    @property
    def system_initrd(self) -> bool:
        """Whether the initrd is the one that the base's system made."""
        return self.request.initrd is InitrdKind.SYSTEM

    def configured(self, root: ClearRoot, volume: SealedVolume) -> ClearRoot:
        """The root with the configuration in it, so that its system puts that into each initramfs it makes."""
        system = FileSystem(root.fd, now=root.superblock.write_time)
        if not system.list(system_initrd.CONFIG_FOLDER) and system.find(system_initrd.CONFIG_FOLDER) is None:
            text = f"has no {system_initrd.CONFIG_FOLDER}: install the package jindisk-initramfs in the base"
            raise system_initrd.InitramfsRefused(f"its system {text}")
        put_file(system, f"/{guest.PATH}", document.dump(self.guest_config(volume)))
        problem = system.check()
        superblock = read_superblock(root.fd)
        if problem is not None or superblock is None:
            raise RootDamaged(f"after the configuration was written: {problem}")
        return replace(root, superblock=superblock)

    def key_program(self) -> bytes | None:
        """The program that gives the key in the guest, if one was asked for."""
        path = self.request.key_program
        if not path:
            return None
        try:
            with Path(path).open("rb") as stream:
                program = stream.read(MAX_PROGRAM_BYTES + 1)
        except OSError as exc:
            raise NotFound("key program", path) from exc
        if not program or len(program) > MAX_PROGRAM_BYTES:
            raise InvalidArgument("key program", path, f"it has 1 to {MAX_PROGRAM_BYTES} bytes")
        return program

    def boot_files(self, root: ClearRoot, volume: SealedVolume, line: str) -> None:
        """Write initrd and command line; the latter without its NUL or a line end, as QEMU is given it."""
        if self.system_initrd:
            system_initrd.append(self.work / INITRD, self.guest_config(volume), self.staging / INITRD)
        else:
            initrd.build_initrd(
                config=self.guest_config(volume),
                modules_dir=self.work / root.kernel_release,
                output=self.staging / INITRD,
                source_date_epoch=0,
                key_program=self.key_program(),
            )
        replace_file(self.staging / CMDLINE, line.encode("ascii"))
