"""Images as the rest of the service sees them: build, list, get, remove; never half of one.

Order of a build, so that no crash loses a key of a visible image or releases one of an invisible image: the key is
stored as `pending`; a worker builds in a staging directory; the rename makes the image visible; the key becomes active
with the image's launch digest, and the first state of its volume is remembered in the same step. After a crash,
`reconcile` finishes what the rename decided, and forgets the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

import structlog

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.base.threads import finished
from jindiskd.errors import AlreadyExists, JindiskError, NotFound
from jindiskd.image import boot_update, randomness, signing
from jindiskd.image.data_volumes import joined
from jindiskd.image.manifest import Manifest
from jindiskd.image.request import BuildRequest, BuildTask, CloneTask, ExportTask, ImportTask, Progress, clone_request
from jindiskd.image.running import run_worker
from jindiskd.image.store import ImageStore, Staging, StoredImage
from jindiskd.image.volume_service import ChangePort, VolumeService
from jindiskd.policy.rules import by_guest_policy

log = structlog.get_logger(__name__)


class KeyPort(ChangePort, Protocol):
    """What is needed of the key store; calls block, and are made in a thread."""

    def add_pending(
        self,
        image_id: str,
        name: str,
        platform: Platform,
        key: Secret,
        rules: str = "",
        *,
        volume_keys: Mapping[str, Secret] | None = None,
    ) -> None:
        """Store the keys of an image that is being made: its root's, and those of its data volumes by their names.

        `rules` of their release, as the key store keeps them.
        """

    def prepare(self, manifest: Manifest) -> None:
        """The image is finished, and becomes visible next: do what needs the key and its manifest; pending still."""

    def activate(self, manifest: Manifest) -> None:
        """The image is there: its keys may be released to guests with its launch digest, and what its builder says
        of its volumes is remembered in the same step. Repeating it is no error."""

    def forget(self, image_id: str) -> None:
        """Delete the key for good; no error if it is not there."""

    def pending(self) -> Sequence[str]:
        """The ids of images whose key is pending."""


class ImageService:
    """Builds and keeps images.

    Args:
        store: where they are; its methods block and are called in threads.
        keys: the key store.
        broker_spki_sha256: what guests will pin.
        workers: processes that encrypt in one build.
        now: the time.
    """

    def __init__(
        self,
        store: ImageStore,
        keys: KeyPort,
        *,
        broker_spki_sha256: bytes,
        workers: int = 2,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store, self._keys = store, keys
        self._spki, self._workers, self._now = broker_spki_sha256, workers, now
        self.volumes = VolumeService(store, keys, broker_spki_sha256=broker_spki_sha256, workers=workers)
        """What adds data volumes to images, and takes them away."""
        self._building: set[str] = set()
        self._committing = asyncio.Lock()

    async def list(self) -> list[StoredImage]:
        """All images by name."""
        return await asyncio.to_thread(self._store.list)

    async def get(self, name: str) -> StoredImage:
        """The image of that name; raises NotFound."""
        return await asyncio.to_thread(self._store.get, name)

    async def remove(self, name: str) -> None:
        """Remove an image and forget its key, so that copies of its disk can never be opened again.

        The key goes last: after a crash in between, the key of no image is left, which `reconcile` cannot tell from one
        of an image kept elsewhere; removing is only reported done when both are gone.
        """
        found = await self.get(name)
        await asyncio.to_thread(self._store.remove, name)
        await asyncio.to_thread(self._keys.forget, found.manifest.image_id)
        log.info("image removed", image=name, image_id=found.manifest.image_id)

    async def update(self, name: str, kernel_fd: int, initrd_fd: int) -> Manifest:
        """Give an image that starts by its system's own initramfs another kernel and initramfs.

        What it measures as changes with them; to whom its key is released does not, that is its owner's to decide.

        Raises:
            NotFound: no such image.
            NotSupported, InvalidArgument, InitramfsRefused: as of `boot_update.stage`; nothing was changed.
        """
        found = await self.get(name)
        staging = await asyncio.to_thread(self._store.stage)
        try:

            def work() -> Manifest:
                boot_update.stage(found, staging.path, kernel_fd, initrd_fd)
                return self._store.replace(staging, name).manifest

            manifest = await finished(work)
        finally:
            await finished(staging.close)
        log.info("boot files of an image replaced", image=name, image_id=manifest.image_id)
        return manifest

    async def sign(self, name: str, block: bytes, auth: bytes) -> Manifest:
        """Take an owner's ID block for the launches of an image; two empty ones take it away.

        Raises:
            NotFound: no such image. NotSupported, InvalidArgument: as of `signing.signed`; nothing was changed.
        """
        found = await self.get(name)

        def work() -> Manifest:
            manifest = signing.signed(found.manifest, block, auth)
            self._store.rewrite(manifest)
            return manifest

        manifest = await finished(work)
        log.info("ID block of an image set", image=name, image_id=manifest.image_id, present=bool(block))
        return manifest

    async def reconcile(self) -> None:
        """Put right what a crash left; call once at start, before anything is built."""
        await asyncio.to_thread(self._store.clean)
        images = {image.manifest.image_id: image.manifest for image in await self.list()}
        for image_id in await asyncio.to_thread(self._keys.pending):
            if image_id in images:
                await asyncio.to_thread(self._activate, images[image_id])
                log.info("key of a finished image activated", image_id=image_id)
            else:
                await asyncio.to_thread(self._keys.forget, image_id)
                log.info("key of an unfinished image forgotten", image_id=image_id)
        await self.volumes.settle(images)

    async def build(self, request: BuildRequest, base_fd: int, progress: Callable[[Progress], None]) -> Manifest:
        """Build an image. Cancelling ends the worker and leaves nothing.

        Args:
            request: what to build.
            base_fd: the base; stays open and belongs to the caller.
            progress: called in the event loop's thread.

        Raises:
            AlreadyExists: the name is taken, or being built.
            BaseRefused, NoSpace, JindiskError: as of `builder.build`.
        """
        request.check()
        async with self._naming(request.name):
            return await self._build(request, base_fd, progress)

    async def clone(self, name: str, new_name: str, by: str, progress: Callable[[Progress], None]) -> Manifest:
        """Make a second image of the same system, under keys and an identity of its own: never two with one key.

        The source must not change meanwhile: whoever calls keeps domains from starting from it.

        Args:
            name: the source.
            new_name: of the clone.
            by: who asks, for the audit log.
            progress: called in the event loop's thread.

        Raises:
            NotFound: there is no source, or its key is not here.
            AlreadyExists: the name is taken, or being built.
            ImageDamaged, VolumeError, NoSpace, JindiskError: as of `clone.clone`; nothing is left.
        """
        source = await self.get(name)
        async with self._naming(new_name):
            return await self._clone(source, new_name, by, progress)

    async def export(self, name: str, target_fd: int, progress: Callable[[Progress], None]) -> str:
        """Write an image without its key to a descriptor, as `stream` says; returns the stream's SHA-256 as text.

        The image must not change meanwhile: whoever calls keeps domains from starting from it. Raises as
        `transfer.export`; what was written then is no whole stream.
        """
        source = await self.get(name)
        task = ExportTask(source=os.fspath(source.path))
        digest = await run_worker(task, {}, {"export": target_fd}, progress)
        log.info("image exported", image=name, image_id=source.manifest.image_id, sha256=digest)
        return digest

    async def import_(
        self,
        source_fd: int,
        *,
        name: str,
        firmware: Sequence[str],
        firmware_dirs: Sequence[str],
        idle_s: int,
        progress: Callable[[Progress], None],
    ) -> Manifest:
        """Take an image from a stream; its key stays where it is.

        Args:
            source_fd: read from where it stands; stays open and belongs to the caller.
            name: of the image here; that in the stream if empty.
            firmware: files on this host that may be its firmware.
            firmware_dirs: where else that is looked for.
            idle_s: for how long the stream may be silent.
            progress: called in the event loop's thread.

        Raises:
            StreamDamaged, StreamSilent, AlreadyExists, NotFound, ImageDamaged, JindiskError: as of `transfer.import_`;
                nothing is left.
        """
        staging = await asyncio.to_thread(self._store.stage)
        try:
            task = ImportTask(
                staging=os.fspath(staging.path),
                store=os.fspath(self._store.root),
                name=name,
                firmware=tuple(firmware),
                firmware_dirs=tuple(firmware_dirs),
                idle_s=idle_s,
            )
            found = await run_worker(task, {}, {"import": source_fd}, progress)
            async with self._committing:  # of two imports of one stream, one is there first
                manifest = await finished(lambda: self._take(staging, found))
        finally:
            await finished(staging.close)
        log.info("image imported", image=found, image_id=manifest.image_id, simulated=manifest.platform.simulated)
        return manifest

    def _take(self, staging: Staging, name: str) -> Manifest:
        """Make an imported image visible, unless the same image has come meanwhile."""
        manifest = staging.manifest(name)
        for other in self._store.list():
            if other.manifest.image_id == manifest.image_id:
                raise AlreadyExists("image", other.manifest.name)
        return self._store.commit(staging, name).manifest

    @contextlib.asynccontextmanager
    async def _naming(self, name: str) -> AsyncIterator[None]:
        """Be the only one to make an image of this name."""
        await asyncio.to_thread(self._store.require_free, name)
        if name in self._building:
            raise AlreadyExists("image", name)
        self._building.add(name)
        try:
            yield
        finally:
            self._building.discard(name)

    async def _clone(
        self, source: StoredImage, new_name: str, by: str, progress: Callable[[Progress], None]
    ) -> Manifest:
        image_id = randomness.new_uuid(randomness.system)
        manifest = source.manifest
        stored: list[str] = []
        taken = await finished(lambda: self._keys.take(manifest.image_id, by, "cloned"))
        staging = await asyncio.to_thread(self._store.stage)

        def store_key() -> None:
            rules = taken.handover.rules
            self._keys.add_pending(image_id, new_name, manifest.platform, key, rules, volume_keys=volume_keys)
            stored.append(image_id)

        try:
            request = clone_request(manifest, new_name)
            names = [volume.name for volume in request.volumes]
            old_volume_keys = {}
            for volume in manifest.volumes:
                if volume.resource not in taken.keys:
                    raise NotFound("key", volume.resource)
                old_volume_keys[volume.name] = taken.keys[volume.resource]
            with (
                Secret(bytearray(request.stream("root key")(request.format.key_bytes))) as key,
                _volume_keys(request) as volume_keys,
                joined(volume_keys, names) as all_volume_keys,
                joined(old_volume_keys, names) as all_old_volume_keys,
            ):
                await finished(store_key)
                anchor = taken.anchors.get(manifest.volume.uuid)
                task = CloneTask(
                    build=BuildTask(
                        request=request,
                        image_id=image_id,
                        created=self._now().strftime("%Y-%m-%dT%H:%M:%SZ"),
                        broker_spki_sha256=self._spki,
                        staging=os.fspath(staging.path),
                        workers=self._workers,
                    ),
                    source=os.fspath(source.path),
                    anchor=anchor.pack() if anchor is not None else b"",
                    volume_anchors={
                        volume.name: taken.anchors[volume.volume.uuid].pack()
                        for volume in manifest.volumes
                        if volume.volume.uuid in taken.anchors
                    },
                    released_to=taken.handover.launch_digests,
                )
                keys = {"key": key, "source-key": taken.keys[manifest.resource]}
                if names:
                    keys |= {"volume-keys": all_volume_keys, "source-volume-keys": all_old_volume_keys}
                await run_worker(task, keys, {}, progress)
            made = await finished(lambda: self._finish(staging, new_name))
        except BaseException:
            if stored:
                await finished(lambda: self._undo(new_name, image_id))
            raise
        finally:
            taken.close()
            await finished(staging.close)
        told = {"image_id": image_id, "source": manifest.name, "simulated": manifest.platform.simulated}
        log.info("image cloned", image=new_name, **told)
        return made

    async def _build(self, request: BuildRequest, base_fd: int, progress: Callable[[Progress], None]) -> Manifest:
        image_id = randomness.new_uuid(request.stream("image id"))
        chosen = request.guest_policy
        rules = "" if chosen is None else by_guest_policy(chosen, request.platform.tee).dump()
        stored: list[str] = []

        def store_key() -> None:
            self._keys.add_pending(image_id, request.name, request.platform, key, rules, volume_keys=volume_keys)
            stored.append(image_id)

        staging = await asyncio.to_thread(self._store.stage)
        try:
            with (
                Secret(bytearray(request.stream("root key")(request.format.key_bytes))) as key,
                _volume_keys(request) as volume_keys,
                joined(volume_keys, [volume.name for volume in request.volumes]) as all_volume_keys,
            ):
                await finished(store_key)
                task = BuildTask(
                    request=request,
                    image_id=image_id,
                    created=self._now().strftime("%Y-%m-%dT%H:%M:%SZ"),
                    broker_spki_sha256=self._spki,
                    staging=os.fspath(staging.path),
                    workers=self._workers,
                )
                given = {"key": key, **({"volume-keys": all_volume_keys} if request.volumes else {})}
                await run_worker(task, given, {"base": base_fd}, progress)
            manifest = await finished(lambda: self._finish(staging, request.name))
        except BaseException:
            if stored:
                await finished(lambda: self._undo(request.name, image_id))
            raise
        finally:
            await finished(staging.close)
        log.info("image built", image=request.name, image_id=image_id, simulated=request.platform.simulated)
        return manifest

    def _finish(self, staging: Staging, name: str) -> Manifest:
        """Prepare the key, rename, then activate."""
        self._keys.prepare(staging.manifest(name))
        manifest = self._store.commit(staging, name).manifest
        self._activate(manifest)
        return manifest

    def _activate(self, manifest: Manifest) -> None:
        self._keys.activate(manifest)

    def _undo(self, name: str, image_id: str) -> None:
        """Leave nothing of a build that failed or was cancelled, however far it came: the image first, then its key."""
        with contextlib.suppress(JindiskError):
            if self._store.get(name).manifest.image_id == image_id:
                self._store.remove(name)
        self._keys.forget(image_id)


@contextlib.contextmanager
def _volume_keys(request: BuildRequest) -> Iterator[Mapping[str, Secret]]:
    """New keys for the data volumes of a request, by name; wiped at the end."""
    with contextlib.ExitStack() as stack:
        keys = {}
        for volume in request.volumes:
            drawn = bytearray(request.stream(f"key of volume {volume.name}")(volume.format.key_bytes))
            keys[volume.name] = stack.enter_context(Secret(drawn))
        yield keys
