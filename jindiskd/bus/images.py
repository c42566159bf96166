"""Images on the bus."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence

from jindiskd.bus.contract import ROOT_PATH, path_label
from jindiskd.bus.jobs import job_path, microseconds
from jindiskd.bus.objects import Object, ObjectPath, Options, Row
from jindiskd.bus.peers import Caller, Descriptor
from jindiskd.bus.ports import Decisions, Images, ImageView
from jindiskd.bus.server import Server
from jindiskd.errors import InvalidArgument, NotFound
from jindiskd.jobs.job import Job, Operation
from jindiskd.jobs.manager import JobManager

REASON_LIMIT = 500


def image_path(image_id: str) -> ObjectPath:
    """Where an image is exported."""
    return ObjectPath(f"{ROOT_PATH}/image/{path_label(image_id)}")


def bounded_reason(reason: str) -> str:
    """A reason for the audit log, as it is to be kept.

    Raises:
        InvalidArgument: it is too long, or has characters that are not for a line.
    """
    if len(reason) > REASON_LIMIT or not reason.isprintable():
        remedy = f"give one line of printable text, {REASON_LIMIT} characters at most"
        raise InvalidArgument("reason", f"{len(reason)} characters", remedy)
    return reason


class ImageObject(Object, spec="org.jindisk1.Image"):
    """One image."""

    def __init__(
        self,
        view: ImageView,
        images: Images,
        decisions: Decisions,
        jobs: JobManager,
        refresh: Callable[[], Awaitable[None]],
    ) -> None:
        self._view, self._images, self._jobs, self._refresh = view, images, jobs, refresh
        self._decisions = decisions

    def polkit_details(self) -> Mapping[str, str]:
        """Its name, for the question."""
        return {"image": self._view.name}

    def _update(self, view: ImageView) -> None:
        old, self._view = self._view, view
        if old.key_state != view.key_state:
            self.changed("State")

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

    async def measure(self, caller: Caller, options: Options) -> ObjectPath:
        """Compute its digest again."""
        name = self._view.name
        everything = options.get("all") is True

        async def work(job: Job) -> str:
            job.progress("measuring")
            return await self._images.measure_all(name) if everything else (await self._images.measure(name)).hex()

        job = self._jobs.start(Operation.IMAGE_MEASURE, [name], caller.uid, work)
        return job_path(job.number)

    async def revoke(self, caller: Caller, options: Options) -> None:  # noqa: ARG002 (as above)
        """Stop release of its key."""
        await self._images.revoke(self._view.image_id)
        await self._refresh()

    async def reinstate(self, caller: Caller, options: Options) -> None:  # noqa: ARG002 (as above)
        """Allow release of its key again."""
        await self._images.reinstate(self._view.image_id)
        await self._refresh()

    async def accept_rollback(self, caller: Caller, reason: str, options: Options) -> None:  # noqa: ARG002 (as above)
        """Take whatever state its volume is in, once."""
        await self._images.accept_rollback(self._view.image_id, bounded_reason(reason))

    async def export_key(self, caller: Caller, options: Options) -> Descriptor:
        """Its keys, sealed for a broker."""
        card = options.get("card", "")
        assert isinstance(card, str)
        data = await self._images.export_key(self._view.image_id, card, f"user {caller.uid}")
        fd = os.memfd_create("handover", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(os.dup(fd), "wb") as stream:
            stream.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        return Descriptor(fd)

    async def get_manifest(self, caller: Caller, options: Options) -> str:  # noqa: ARG002 (as above)
        """What was built, from what."""
        return await self._images.manifest(self._view.name)

    async def get_policy(self, caller: Caller, options: Options) -> str:  # noqa: ARG002 (as above)
        """By what its key is released."""
        return await self._decisions.policy(self._view.image_id, set_only=options.get("set-only") is True)

    async def set_policy(self, caller: Caller, policy: str, options: Options) -> bool:  # noqa: ARG002 (as above)
        """Replace that."""
        return await self._decisions.set_policy(self._view.image_id, policy)

    async def check_policy(self, caller: Caller, options: Options) -> tuple[int, Sequence[Row]]:  # noqa: ARG002
        """Try a policy on a refusal."""
        text, row = options.get("policy"), options.get("row")
        assert text is None or isinstance(text, str)
        assert row is None or isinstance(row, int)
        return await self._decisions.check_policy(self._view.image_id, text=text, row=row)

    @property
    def name(self) -> str:
        """Name in the store."""
        return self._view.name

    @property
    def image_id(self) -> str:
        """Identity."""
        return self._view.image_id

    @property
    def platform(self) -> str:
        """What it was built for."""
        return self._view.platform

    @property
    def simulated(self) -> bool:
        """Whether that is simulated."""
        return self._view.simulated

    @property
    def seeded(self) -> bool:
        """Whether its key is no secret."""
        return self._view.seeded

    @property
    def format(self) -> str:
        """Format of its root."""
        return self._view.format

    @property
    def size_bytes(self) -> int:
        """Size of its disk."""
        return self._view.size_bytes

    @property
    def launch_digest(self) -> str:
        """What its key is released to."""
        return self._view.launch_digest.hex()

    @property
    def state(self) -> str:
        """State of its key."""
        return self._view.key_state

    @property
    def created(self) -> int:
        """When it was built."""
        return microseconds(self._view.created)

    @property
    def distribution(self) -> str:
        """What is inside."""
        return self._view.distribution

    @property
    def kernel_release(self) -> str:
        """What it boots."""
        return self._view.kernel_release

    @property
    def vcpus(self) -> int:
        """Processors of its guests."""
        return self._view.vcpus


class ImagesOnBus:
    """Keeps the image objects as the store is."""

    def __init__(self, server: Server, images: Images, decisions: Decisions, jobs: JobManager) -> None:
        self._server, self._images, self._decisions, self._jobs = server, images, decisions, jobs
        self._objects: dict[str, ImageObject] = {}
        self._views: dict[str, ImageView] = {}

    async def refresh(self) -> None:
        """Look at the store again: export what is new, take off what is gone, tell of changes."""
        self._views = {view.image_id: view for view in await self._images.views()}
        for image_id in self._objects.keys() - self._views.keys():
            del self._objects[image_id]
            self._server.unexport(image_path(image_id))
        for image_id, view in self._views.items():
            if image_id in self._objects:
                self._objects[image_id]._update(view)  # noqa: SLF001 (one thing in two classes)
            else:
                item = self._objects[image_id] = ImageObject(
                    view, self._images, self._decisions, self._jobs, self.refresh
                )
                self._server.export(image_path(image_id), item)

    def find(self, name: str) -> ImageView:
        """The image with this name or id.

        Raises:
            NotFound: there is none.
        """
        for view in self._views.values():
            if name in {view.name, view.image_id}:
                return view
        raise NotFound("image", name)

    def all(self) -> list[ImageView]:
        """All images, by name."""
        return sorted(self._views.values(), key=lambda view: view.name)
