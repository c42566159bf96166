"""The images for the bus: orders with every default from the configuration, and the images with their keys."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import jindiskd.image.worker  # noqa: F401 (registers the errors that a build worker can name)
from jindiskd.attest import guest_policy
from jindiskd.attest.descriptors import choose
from jindiskd.attest.expected import expected
from jindiskd.attest.measure import launch_digest
from jindiskd.base import document, plugins
from jindiskd.base.deadline import within
from jindiskd.base.platform import Platform, Tee
from jindiskd.bus.ports import BuildOrder, ImageView, ImportOrder, VolumeOrder
from jindiskd.config import Config
from jindiskd.domain.service import DomainService
from jindiskd.errors import EXIT_INTEGRITY, InvalidArgument, JindiskError, NotSupported
from jindiskd.image.manifest import Manifest
from jindiskd.image.measurement import inputs_of
from jindiskd.image.request import BaseKind, BuildRequest, DiskBus, InitrdKind, Progress, VolumeFormat, VolumeRequest
from jindiskd.image.service import ImageService
from jindiskd.image.signing import policy_of, signature_of
from jindiskd.image.store import DISK, verify
from jindiskd.image.volume_service import Changed
from jindiskd.jobs.job import Job

KEY_UNKNOWN = "unknown"
"""State of the key of an image that this key store does not know, for example one copied from elsewhere."""

MORE_TIME = "it was given up; set images.build_timeout_s higher, or try again when this machine has less to do"


class DigestDiffers(JindiskError, code="DigestDiffers", exit_code=EXIT_INTEGRITY):
    """An image no longer measures as it did when it was built."""

    def __init__(self, name: str, recorded: bytes, computed: bytes) -> None:
        super().__init__(
            f"image {name!r} measures as {computed.hex()}, but its key is released to {recorded.hex()}: its firmware "
            "has changed since it was built; put that back, or build the image again"
        )


class KeyStates(Protocol):
    """What is known of the keys of images; calls block."""

    def states(self) -> Mapping[str, str]:
        """The state of each image's key, by image id."""


class ImagesBackend:
    """The images and their keys."""

    def __init__(self, service: ImageService, keys: KeyStates, domains: DomainService, config: Config) -> None:
        self._service, self._keys, self._domains, self._config = service, keys, domains, config

    def checked(self, order: BuildOrder) -> BuildOrder:
        """Fill in the defaults; refuse what can be refused before any work is done.

        Raises:
            InvalidArgument, NotSupported: it cannot be built.
        """
        images = self._config.images
        platform = Platform(_choice(Platform, "platform", order.platform or images.platform.value))
        firmware = self._named_firmware(order.firmware) or images.firmware or choose(platform.tee)
        program = order.key_program
        if program:
            found = _in_place("key program", Path(program), images.key_program_dirs, "images.key_program_dirs")
            program = os.fspath(found)
        order = replace(
            order,
            key_program=program,
            platform=platform.value,
            format=order.format or images.format.value,
            vcpus=images.vcpus if order.vcpus is None else order.vcpus,
            cpu_model=order.cpu_model or images.cpu_model,
            firmware=os.fspath(firmware),
        )
        request = self._request(order)
        request.check()
        if request.platform.simulated and not self._config.broker.allow_simulated:
            raise NotSupported(
                f"platform {request.platform}",
                "set allow_simulated in [broker]; reports of simulated firmware prove nothing",
            )
        return order

    def _named_firmware(self, name: str) -> Path | None:
        """The firmware that a caller names, if it lies where callers may name one; None for an empty name.

        Raises:
            InvalidArgument: it lies elsewhere.
        """
        if not name:
            return None
        return _in_place("firmware", Path(name), self._config.images.firmware_dirs, "images.firmware_dirs")

    def _request(self, order: BuildOrder) -> BuildRequest:
        """The order as the builder takes it, with what is configured for all images."""
        images = self._config.images
        source = images.report_source if order.report_source is None else order.report_source
        program = images.key_program if order.key_program is None else order.key_program
        return replace(
            _request(order),
            report_source=plugins.find(plugins.REPORT_SOURCES, source).value if source else "",
            key_program=os.fspath(program) if program else "",
        )

    async def views(self) -> Sequence[ImageView]:
        """All images with the state of their keys."""
        images = await self._service.list()
        states = await asyncio.to_thread(self._keys.states)
        return [_view(image.manifest, states.get(image.manifest.image_id, KEY_UNKNOWN)) for image in images]

    async def manifest(self, name: str) -> str:
        """The manifest, a JSON document."""
        return document.dump((await self._service.get(name)).manifest).decode()

    async def build(self, order: BuildOrder, base_fd: int, job: Job) -> str:
        """Build one; the result is its name."""
        async with self._in_time("build", order.name):
            built = await self._service.build(self._request(order), base_fd, _telling(job))
        inside = built.distribution or "a system without a name"
        job.log(f"{inside}, kernel {built.kernel_release}, root {built.volume.format}, {built.disk_size_bytes} bytes")
        if built.launch_digest:
            job.log(f"launch digest {built.launch_digest.hex()}")
        if built.platform.tee is Tee.TDX:
            job.log("that is MRTD alone: its key is released once its policy names RTMR0 to RTMR2 (docs/policy.md)")
        return built.name

    async def clone(self, name: str, new_name: str, by: str, job: Job) -> str:
        """Make a second image of the same system under keys of its own; the result is its name."""
        async with self._held(name, "clone", why="it is being cloned; wait for that to end", disks=True):
            return (await self._service.clone(name, new_name, by, _telling(job))).name

    async def export(self, name: str, target_fd: int, job: Job) -> str:
        """Write one as a stream; the result is the stream's SHA-256, hexadecimal."""
        async with self._held(name, "export", why="it is being exported; wait for that to end", disks=True):
            return await self._service.export(name, target_fd, _telling(job))

    async def import_(self, order: ImportOrder, source_fd: int, job: Job) -> str:
        """Take one from a stream; the result is its name."""
        path = self._named_firmware(order.firmware) or self._config.images.firmware
        firmware = (os.fspath(path),) if path is not None else ()
        async with self._in_time("import", order.name):
            return (
                await self._service.import_(
                    source_fd,
                    name=order.name,
                    firmware=firmware,
                    firmware_dirs=tuple(os.fspath(place) for place in self._config.images.firmware_dirs),
                    idle_s=self._config.images.stream_idle_s,
                    progress=_telling(job),
                )
            ).name

    def _in_time(self, work: str, name: str) -> contextlib.AbstractAsyncContextManager[None]:
        """What stands inside ends in the time that is configured, or is given up as `TimedOut`.

        Args:
            work: a noun for it, such as "build".
            name: of the image, empty where only its stream knows it.
        """
        image = f"image {name!r}" if name else "an image"
        return within(self._config.images.build_timeout_s, f"the end of the {work} of {image}", MORE_TIME)

    @contextlib.asynccontextmanager
    async def _held(self, name: str, work: str, *, why: str, disks: bool = False) -> AsyncIterator[None]:
        """No domain starts from it meanwhile, and it ends in time.

        Args:
            name: of the image.
            work: a noun for what is done with it.
            why: what those are told who would start it meanwhile.
            disks: its disks are read or changed, too.
        """
        found = await self._service.get(name)
        manifest = found.manifest
        with self._domains.hold(manifest.name, manifest.image_id, why):
            async with self._in_time(work, name):
                if disks:
                    files = (DISK, *(volume.file for volume in manifest.volumes))
                    paths = frozenset(os.fspath(found.path / file) for file in files)
                    await self._domains.refuse_users(manifest.name, manifest.image_id, paths)
                yield

    async def remove(self, name: str) -> None:
        """Remove one and its key, unless a domain runs from it."""
        async with self._held(name, "removal", why="it is being removed", disks=True):
            await self._service.remove(name)

    async def update(self, name: str, kernel_fd: int, initrd_fd: int, job: Job) -> bytes:
        """Replace its kernel and initramfs, unless a domain runs from it; the result is its new launch digest."""
        async with self._held(name, "update", why="it is being updated; wait for that to end"):
            made = await self._service.update(name, kernel_fd, initrd_fd)
        job.log(f"kernel {made.kernel_release}")
        return made.launch_digest

    async def add_volume(self, name: str, volume: VolumeOrder, by: str, job: Job) -> bytes:
        """Give its guests one more data volume, unless a domain runs from it; the result is its new launch digest."""
        why = "it is being given a volume; wait for that to end"
        async with self._held(name, "change", why=why, disks=True):
            changed = await self._service.volumes.add(name, _volume(volume), by, _telling(job))
        _tell_change(changed, job)
        return changed.after.launch_digest

    async def remove_volume(self, name: str, volume: str, by: str, job: Job) -> bytes:
        """Take a data volume from it, with its disk and key; as `add_volume`."""
        why = "one of its volumes is being removed; wait for that to end"
        async with self._held(name, "change", why=why, disks=True):
            changed = await self._service.volumes.remove(name, volume, by, _telling(job))
        _tell_change(changed, job)
        return changed.after.launch_digest

    async def sign(self, name: str, block: bytes, auth: bytes) -> None:
        """Take an owner's ID block for the launches of an image, unless a domain runs from it; empty for none."""
        async with self._held(name, "signing", why="it is being signed; wait for that to end"):
            await self._service.sign(name, block, auth)

    async def measure(self, name: str) -> bytes:
        """Compute the launch digest from the files in the store; refuse one that is not the recorded one."""
        image = await self._service.get(name)
        manifest = image.manifest
        if not manifest.launch_digest:
            raise NotSupported(f"measuring for {manifest.platform}", "the platform has no digest before the launch")

        def compute() -> bytes:
            verify(image)
            return launch_digest(manifest.platform.tee, inputs_of(image))

        digest = await asyncio.to_thread(compute)
        if digest != manifest.launch_digest:
            raise DigestDiffers(name, manifest.launch_digest, digest)
        return digest

    async def measure_all(self, name: str) -> str:
        """What it measures as on each platform, with all inputs, as JSON; fails as `measure` does."""
        image = await self._service.get(name)
        digest = await self.measure(name) if image.manifest.launch_digest else b""
        found = await asyncio.to_thread(expected, inputs_of(image))
        shown = {"launch_digest": digest.hex(), **found, "guest_policy": _policy(image.manifest)}
        signature = signature_of(image.manifest)
        if signature is not None:
            block, signed = signature
            shown["signed"] = {
                "id_key_digest": signed.id_key_digest.hex(),
                "author_key_digest": signed.author_key_digest.hex(),
                "family_id": block.family_id.hex(),
                "image_id": block.image_id.hex(),
                "guest_svn": block.guest_svn,
            }
        return json.dumps(shown, ensure_ascii=False)


def _telling(job: Job) -> Callable[[Progress], None]:
    """Progress of a worker as that of a job."""
    return lambda step: job.progress(step.stage, step.fraction, step.done_bytes, step.total_bytes)


def _policy(manifest: Manifest) -> dict[str, object]:
    """The guest policy of an image as a number and in words."""
    policy = policy_of(manifest)
    return {"value": policy, "words": guest_policy.written(policy, manifest.platform.tee)}


def _choice(kind: type[Platform | BaseKind | VolumeFormat | InitrdKind | DiskBus], what: str, value: str) -> str:
    names = [member.value for member in kind]
    if value not in names:
        raise InvalidArgument(what, value, f"it is one of {', '.join(names)}")
    return value


def _in_place(what: str, path: Path, places: Sequence[Path], setting: str) -> Path:
    """A file that a caller names, by a path on which no link is his: it is read later, with the service's rights.

    Raises:
        InvalidArgument: it lies outside of where callers may name one.
    """
    kept, real = path.parent.resolve() / path.name, path.resolve()
    inside = [any(one.is_relative_to(place) for place in places) for one in (kept, real)]
    if not path.is_absolute() or not all(inside):
        known = ", ".join(str(place) for place in places)
        raise InvalidArgument(what, str(path), f"it must lie in one of {known} ({setting})")
    return kept


def _request(order: BuildOrder) -> BuildRequest:
    assert order.vcpus is not None  # an order that was checked
    platform = Platform(_choice(Platform, "platform", order.platform))
    policy = guest_policy.read(order.guest_policy, platform.tee, debug=order.debug) if order.guest_policy else None
    return BuildRequest(
        name=order.name,
        platform=platform,
        format=VolumeFormat(_choice(VolumeFormat, "format", order.format)),
        initrd=InitrdKind(_choice(InitrdKind, "initrd", order.initrd or InitrdKind.OWN)),
        base_kind=BaseKind(_choice(BaseKind, "kind of base", order.base_kind)),
        firmware=order.firmware,
        vcpus=order.vcpus,
        cpu_model=order.cpu_model,
        size_bytes=order.size_bytes,
        cmdline=order.cmdline,
        seed=order.seed.encode() if order.seed is not None else None,
        debug=order.debug,
        guest_policy=policy,
        vouch_firmware=order.vouch_firmware,
        volumes=tuple(map(_volume, order.volumes)),
        disk_bus=DiskBus(_choice(DiskBus, "disk bus", order.disk_bus or DiskBus.VIRTIO)),
    )


def _volume(order: VolumeOrder) -> VolumeRequest:
    name, size_bytes, form, mount = order
    return VolumeRequest(
        name=name,
        size_bytes=size_bytes,
        format=VolumeFormat(_choice(VolumeFormat, "format of a volume", form or VolumeFormat.JINDISK)),
        mount=mount,
    )


def _tell_change(changed: Changed, job: Job) -> None:
    """What whoever changed the volumes of an image has to know."""
    before, after = changed.before, changed.after
    if after.platform.tee is Tee.TDX:
        job.log("its RTMR2 is another now: its keys are released once its policy names that (docs/policy.md)")
    elif after.launch_digest != before.launch_digest:
        old, new = before.launch_digest.hex(), after.launch_digest.hex()
        said = "its keys are released to it once" if changed.handed_over else "its keys are no longer released to"
        rest = f"the owner's broker has taken the change over, and to {old} until then" if changed.handed_over else old
        job.log(f"launch digest {new}; {said} {rest}")
    if changed.handed_over:
        words = f"'jindiskctl key export {after.name} --output FILE' here"
        job.log(f"hand the change to the owner's broker: {words}, 'jindiskctl broker image import FILE' there")
    if changed.rules_measure:
        job.log("its policy names measurements of its own, which stay allowed: see 'jindiskctl policy show'")
    if before.id_block:
        job.log("its signature was for the old digest and is gone: sign it again by 'jindiskctl image sign'")
    job.log("domains adopted for it are refused until they are adopted again; 'jindiskctl launch' makes its own anew")


def _view(manifest: Manifest, key_state: str) -> ImageView:
    signature = signature_of(manifest)
    return ImageView(
        name=manifest.name,
        image_id=manifest.image_id,
        platform=manifest.platform.value,
        simulated=manifest.platform.simulated,
        seeded=manifest.seeded,
        format=manifest.volume.format,
        size_bytes=manifest.disk_size_bytes,
        launch_digest=manifest.launch_digest,
        key_state=key_state,
        created=datetime.fromisoformat(manifest.created).astimezone(UTC),
        distribution=manifest.distribution,
        kernel_release=manifest.kernel_release,
        vcpus=manifest.shape.vcpus,
        volumes=[
            {
                "name": volume.name,
                "format": volume.volume.format,
                "uuid": volume.volume.uuid,
                "mount": volume.mount,
                "size-bytes": volume.size_bytes,
                "file-bytes": volume.disk_size_bytes,
            }
            for volume in manifest.volumes
        ],
        guest_policy=policy_of(manifest),
        id_key_digest=signature[1].id_key_digest if signature else b"",
        author_key_digest=signature[1].author_key_digest if signature else b"",
        guest_svn=signature[0].guest_svn if signature else 0,
    )
