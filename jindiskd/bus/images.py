"""Images on the bus."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping

from jindiskd.bus.collection import Collection, Item, named
from jindiskd.bus.contract import ROOT_PATH, path_label
from jindiskd.bus.jobs import job_path, start_bound
from jindiskd.bus.keyfd import take_regular_file, take_stream
from jindiskd.bus.objects import ObjectPath, Options
from jindiskd.bus.peers import Caller, Descriptor
from jindiskd.bus.ports import Images, ImageView
from jindiskd.bus.server import Server
from jindiskd.errors import InvalidArgument
from jindiskd.jobs.job import Job, Operation
from jindiskd.jobs.manager import JobManager


def image_path(image_id: str) -> ObjectPath:
    """Where an image is exported."""
    return ObjectPath(f"{ROOT_PATH}/image/{path_label(image_id)}")


MEASURED_AT_ONCE = 2
"""Each takes a thread, which guests need too, and reads a kernel, an initrd and a firmware into memory."""


class ImageObject(Item[ImageView], spec="org.jindisk1.Image", view=ImageView):
    """One image."""

    def __init__(
        self,
        view: ImageView,
        images: Images,
        jobs: JobManager,
        refresh: Callable[[], Awaitable[None]],
        measuring: asyncio.Semaphore,
    ) -> None:
        super().__init__(view)
        self._images, self._jobs, self._refresh = images, jobs, refresh
        self._measuring = measuring

    def polkit_details(self) -> Mapping[str, str]:
        """Its name, for the question."""
        return {"image": self._view.name}

    async def remove(self, caller: Caller, options: Options) -> ObjectPath:  # noqa: ARG002 (the contract's arguments)
        """Remove it and its key."""
        name = self._view.name

        async def work(job: Job) -> str:
            job.progress("removing")
            try:
                await self._images.remove(name)
            finally:
                await self._refresh()
            return name

        job = self._jobs.start(Operation.IMAGE_REMOVE, [name], caller.uid, work, cancelable=False)
        return job_path(job.number)

    async def clone(self, caller: Caller, name: str, options: Options) -> ObjectPath:
        """Make a second image of the same system under keys of its own."""
        source, by = self._view.name, f"user {caller.uid}"

        async def work(job: Job) -> str:
            try:
                return await self._images.clone(source, name, by, job)
            finally:
                await self._refresh()

        return start_bound(self._jobs, caller, Operation.IMAGE_CLONE, [source, name], work, options)

    async def export(self, caller: Caller, target: Descriptor, options: Options) -> ObjectPath:
        """Write it as a stream."""
        name, taken = self._view.name, Descriptor(take_stream(target, writing=True))
        fd = taken.fileno()

        async def work(job: Job) -> str:
            return await self._images.export(name, fd, job)

        return start_bound(self._jobs, caller, Operation.IMAGE_EXPORT, [name], work, options, at_end=taken.close)

    async def measure(self, caller: Caller, options: Options) -> ObjectPath:
        """Compute its digest again."""
        name = self._view.name
        everything = options.get("all") is True

        async def work(job: Job) -> str:
            job.progress("waiting")
            async with self._measuring:
                job.progress("measuring")
                return await self._images.measure_all(name) if everything else (await self._images.measure(name)).hex()

        job = self._jobs.start(Operation.IMAGE_MEASURE, [name], caller.uid, work)
        return job_path(job.number)

    async def update(
        self,
        caller: Caller,
        kernel: Descriptor,
        initrd: Descriptor,
        options: Options,  # noqa: ARG002 (as above)
    ) -> ObjectPath:
        """Replace its kernel and initramfs."""
        name = self._view.name
        with contextlib.ExitStack() as stack:
            kernel_fd = take_regular_file(kernel)
            stack.callback(os.close, kernel_fd)
            initrd_fd = take_regular_file(initrd)
            stack.callback(os.close, initrd_fd)
            close = stack.pop_all().close

        async def work(job: Job) -> str:
            job.progress("replacing")
            try:
                return (await self._images.update(name, kernel_fd, initrd_fd, job)).hex()
            finally:
                await self._refresh()

        try:
            job = self._jobs.start(Operation.IMAGE_UPDATE, [name], caller.uid, work, cancelable=False, at_end=close)
        except BaseException:
            close()
            raise
        return job_path(job.number)

    async def add_volume(
        self, caller: Caller, name: str, size: int, form: str, mount: str, options: Options
    ) -> ObjectPath:
        """Give its guests one more data volume."""
        image, by = self._view.name, f"user {caller.uid}"

        async def work(job: Job) -> str:
            try:
                return (await self._images.add_volume(image, (name, size, form, mount), by, job)).hex()
            finally:
                await self._refresh()

        return start_bound(self._jobs, caller, Operation.IMAGE_ADD_VOLUME, [image, name], work, options)

    async def remove_volume(self, caller: Caller, name: str, options: Options) -> ObjectPath:
        """Take a data volume from it, with disk and key."""
        image, by = self._view.name, f"user {caller.uid}"

        async def work(job: Job) -> str:
            try:
                return (await self._images.remove_volume(image, name, by, job)).hex()
            finally:
                await self._refresh()

        return start_bound(self._jobs, caller, Operation.IMAGE_REMOVE_VOLUME, [image, name], work, options)

    async def set_id_block(self, caller: Caller, block: str, authentication: str, options: Options) -> None:  # noqa: ARG002
        """Take an owner's signature on it."""
        await self._images.sign(self._view.name, _binary("block", block), _binary("authentication", authentication))
        await self._refresh()

    async def get_manifest(self, caller: Caller, options: Options) -> str:  # noqa: ARG002 (as above)
        """What was built, from what."""
        return await self._images.manifest(self._view.name)

    @property
    def state(self) -> str:
        """State of its key."""
        return self._view.key_state


def _binary(what: str, text: str) -> bytes:
    """Bytes in base64; raises `InvalidArgument`."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as exc:
        raise InvalidArgument(what, text[:20], "it is base64") from exc


class ImagesOnBus:
    """Keeps the image objects as the store is; `also` is awaited after a change of ours, for the keys."""

    def __init__(self, server: Server, images: Images, jobs: JobManager, also: Callable[[], Awaitable[None]]) -> None:
        self._images, self._also = images, also
        self._views: dict[str, ImageView] = {}
        self._lock = asyncio.Lock()
        measuring = asyncio.Semaphore(MEASURED_AT_ONCE)
        self._shown = Collection[ImageView, ImageObject](
            server,
            identity=lambda view: view.image_id,
            path=image_path,
            make=lambda view: ImageObject(view, images, jobs, self.refresh, measuring),
        )

    async def refresh(self) -> None:
        """After a change of ours: look at the store again, and at the keys."""
        await self.look()
        await self._also()

    async def look(self) -> None:
        """Look at the store again, and show the images as they are."""
        async with self._lock:  # two looks at once could tell the older state last
            self._views = {view.image_id: view for view in await self._images.views()}
            self._shown.show(self._views.values())

    def find(self, name: str) -> ImageView:
        """The image with this name or id.

        Raises:
            NotFound: there is none.
        """
        return named("image", name, self._views, lambda view: view.name)

    def all(self) -> list[ImageView]:
        """All images, by name."""
        return sorted(self._views.values(), key=lambda view: view.name)
