"""Images as the rest of the service sees them: build, list, get, remove; never half of one.

Order of a build, so that no crash loses a key of a visible image or releases one of an invisible image: the key is
stored as `pending`; a worker builds in a staging directory; the rename makes the image visible; the key becomes active
with the image's launch digest, and the first state of its volume is remembered in the same step. After a crash,
`reconcile` finishes what the rename decided, and forgets the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Protocol, TypeVar

import structlog

from jindiskd.base import document
from jindiskd.base.process import ENVIRONMENT, terminate
from jindiskd.base.secret import Secret
from jindiskd.errors import AlreadyExists, Internal, JindiskError
from jindiskd.image import boot_update, randomness
from jindiskd.image.manifest import Manifest, Volume
from jindiskd.image.request import BuildRequest, BuildTask, Progress
from jindiskd.image.store import ImageStore, Staging, StoredImage

log = structlog.get_logger(__name__)
LINE_LIMIT_BYTES = 1 << 16
T = TypeVar("T")


class KeyPort(Protocol):
    """What is needed of the key store; calls block, and are made in a thread."""

    def add_pending(self, image_id: str, name: str, request: BuildRequest, key: Secret) -> None:
        """Store the key of an image that is being built."""

    def prepare(self, manifest: Manifest) -> None:
        """The image is finished, and becomes visible next: do what needs the key and its manifest; pending still."""

    def activate(self, image_id: str, launch_digests: Sequence[bytes], volume: Volume) -> None:
        """The image is there: its key may be released to guests with these launch digests, and what its builder says
        of the volume is remembered in the same step. Repeating it is no error."""

    def forget(self, image_id: str) -> None:
        """Delete the key for good; no error if it is not there."""

    def pending(self) -> Sequence[str]:
        """The ids of images whose key is pending."""


class BuildWorkerFailed(JindiskError, code="BuildWorkerFailed"):
    """The process that built an image ended without saying why."""

    def __init__(self, status: int) -> None:
        """`status` as of the process, negative for a signal."""
        super().__init__(f"the build process ended with status {status}; the journal may say more, try again")


def as_raised(code: str, message: str) -> JindiskError:
    """The error that a worker named, with its text."""
    kind = JindiskError.by_code.get(code, Internal)
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


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
        self._building: set[str] = set()

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

            manifest = await _finished(work)
        finally:
            await _finished(staging.close)
        log.info("boot files of an image replaced", image=name, image_id=manifest.image_id)
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
        await asyncio.to_thread(self._store.require_free, request.name)
        if request.name in self._building:
            raise AlreadyExists("image", request.name)
        self._building.add(request.name)
        try:
            return await self._build(request, base_fd, progress)
        finally:
            self._building.discard(request.name)

    async def _build(self, request: BuildRequest, base_fd: int, progress: Callable[[Progress], None]) -> Manifest:
        image_id = randomness.new_uuid(request.stream("image id"))
        stored: list[str] = []

        def store_key() -> None:
            self._keys.add_pending(image_id, request.name, request, key)
            stored.append(image_id)

        staging = await asyncio.to_thread(self._store.stage)
        try:
            with Secret(bytearray(request.stream("root key")(request.format.key_bytes))) as key:
                await _finished(store_key)
                task = BuildTask(
                    request=request,
                    image_id=image_id,
                    created=self._now().strftime("%Y-%m-%dT%H:%M:%SZ"),
                    broker_spki_sha256=self._spki,
                    staging=os.fspath(staging.path),
                    workers=self._workers,
                )
                await self._work(task, base_fd, key, progress)
            manifest = await _finished(lambda: self._finish(staging, request.name))
        except BaseException:
            if stored:
                await _finished(lambda: self._undo(request.name, image_id))
            raise
        finally:
            await _finished(staging.close)
        log.info("image built", image=request.name, image_id=image_id, simulated=request.platform.simulated)
        return manifest

    def _finish(self, staging: Staging, name: str) -> Manifest:
        """Prepare the key, rename, then activate."""
        self._keys.prepare(staging.manifest(name))
        manifest = self._store.commit(staging, name).manifest
        self._activate(manifest)
        return manifest

    def _activate(self, manifest: Manifest) -> None:
        digests = (manifest.launch_digest,) if manifest.launch_digest else ()
        self._keys.activate(manifest.image_id, digests, manifest.volume)

    def _undo(self, name: str, image_id: str) -> None:
        """Leave nothing of a build that failed or was cancelled, however far it came: the image first, then its key."""
        with contextlib.suppress(JindiskError):
            if self._store.get(name).manifest.image_id == image_id:
                self._store.remove(name)
        self._keys.forget(image_id)

    async def _work(self, task: BuildTask, base_fd: int, key: Secret, progress: Callable[[Progress], None]) -> None:
        """Run the worker to its end; kill it when cancelled."""
        with _key_pipe(key) as key_fd:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "jindiskd.image.worker", "--key", str(key_fd), "--base", str(base_fd)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=dict(ENVIRONMENT),
                start_new_session=True,
                pass_fds=(key_fd, base_fd),
                limit=LINE_LIMIT_BYTES,
            )
        outcome: dict[str, object] = {}
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(document.to_plain(task)).encode() + b"\n")
            with contextlib.suppress(ConnectionError):  # its status says more
                await process.stdin.drain()
            while line := await process.stdout.readline():
                message = json.loads(line)
                if "progress" in message:
                    progress(Progress(**message["progress"]))
                else:
                    outcome = message
            status = await process.wait()
        finally:
            if process.returncode is None:
                await asyncio.shield(terminate(process))
        if "error" in outcome:
            raise as_raised(str(outcome["error"]), str(outcome["message"]))
        if status != 0 or "manifest" not in outcome:
            raise BuildWorkerFailed(status)


@contextlib.contextmanager
def _key_pipe(key: Secret) -> Iterator[int]:
    """A descriptor to read the key from; it fits a pipe, so that nobody waits."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(writing, key.reveal())
        os.close(writing)
        yield reading
    finally:
        os.close(reading)


async def _finished(function: Callable[[], T]) -> T:
    """Run in a thread to its end, even when cancelled meanwhile; the cancellation is delivered afterwards."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
