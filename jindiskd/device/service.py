"""The devices of this host: looked at again whenever something may have changed, opened and closed on demand.

`reconcile` is the one way by which anything becomes known: at start, after an event, after lost events, after the
helper did something, after a restart of the service. It remembers nothing that the kernel could tell.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from jindiskd.base.secret import Secret
from jindiskd.device.helper_client import HelperClient
from jindiskd.device.registry import DeviceState, DeviceView, ImageVolume, views
from jindiskd.device.watch import Seen
from jindiskd.errors import Busy, InvalidArgument, JindiskError, NotFound
from jindiskd.helper.mapped import Mapped, mapped
from jindiskd.helper.protocol import Close, Kind, Open, Serving

log = structlog.get_logger(__name__)
SETTLE_S = 0.1
"""Events come in bursts; one look does for all of a burst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """What opens a volume; the key is wiped by whoever got this."""

    key: Secret
    anchor: bytes = b""
    """JinDisk 2: the state that must be there; empty for whatever is."""
    session: bytes = b""
    """JinDisk 2, for writing: whose states are told."""
    lease_s: int = 0


class VolumeKeys(Protocol):
    """Who remembers the keys and states of volumes. Calls block."""

    def volumes(self) -> Sequence[ImageVolume]:
        """All volumes that are known."""

    def permit(self, volume: ImageVolume, *, read_only: bool, key: Secret | None, who: str) -> Permit:
        """The key and state of a volume, written down before it leaves; with `key`, what goes with that one.

        Raises:
            JindiskError: it may not be opened like this.
        """


class Watch(Protocol):
    """What tells of devices."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """End."""

    def look(self) -> Sequence[Seen]:
        """What is there now. Blocks."""


class DeviceService:
    """The devices, from `start` to `stop`.

    Args:
        keys: who has the keys.
        helper: who has the rights.
        running: name of a domain that runs from an image, by the image's id; empty if none does.
        watch: made with the function that it calls when something may have changed.
        look_mapped: what the kernel has mapped.
    """

    def __init__(
        self,
        keys: VolumeKeys,
        helper: HelperClient,
        *,
        running: Callable[[str], str],
        watch: Callable[[Callable[[], None]], Watch],
        look_mapped: Callable[[], Sequence[Mapped]] = mapped,
    ) -> None:
        """Nothing is looked at before `start`."""
        self._keys, self._helper, self._running, self._look_mapped = keys, helper, running, look_mapped
        self._watch = watch(self.poke)
        self._views: dict[str, DeviceView] = {}
        self._subscribers: list[Callable[[], None]] = []
        self._one_at_a_time = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._opening: dict[str, str] = {}

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called in the loop after each look that found something different."""
        self._subscribers.append(changed)

    def views(self) -> Sequence[DeviceView]:
        """All devices, as last seen, by node."""
        return sorted(self._views.values(), key=lambda view: (view.node or "~", view.device_id))

    async def start(self) -> None:
        """Listen, and look for the first time."""
        try:
            self._watch.start()
        except OSError as exc:  # in a container, say: guests run all the same
            log.warning("block devices are not watched", reason=exc.strerror)
        await self._look_again()
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def stop(self) -> None:
        """Listen no more. What is open stays open, and is found again by the next service."""
        self._watch.stop()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def poke(self) -> None:
        """Something may have changed: look soon. From the loop's thread."""
        self._wanted.set()

    async def _keep(self) -> None:
        while True:
            await self._wanted.wait()
            await asyncio.sleep(SETTLE_S)
            self._wanted.clear()
            await self._look_again()

    async def _look_again(self) -> None:
        try:
            await self.reconcile()
        except Exception:  # one bad look must not be the last, nor hide what went wrong before
            log.exception("fault while looking at devices")

    async def reconcile(self) -> None:
        """Look at everything, tell of what is different, and close what was lost and is not in use."""
        async with self._one_at_a_time:
            found = await self._look()
            for view in list(found.values()):
                if view.state is DeviceState.LOST and await self._let_go(view):
                    found = await self._look()
        if found != self._views:
            self._views = found
            for changed in self._subscribers:
                changed()

    async def _look(self) -> dict[str, DeviceView]:
        seen = await asyncio.to_thread(self._watch.look)
        there = await asyncio.to_thread(self._look_mapped)
        serving: Sequence[Serving] = ()
        if there:
            try:
                serving = await self._helper.serving()
            except JindiskError as exc:
                log.warning("the helper does not tell how volumes are served", reason=str(exc))
        volumes = await asyncio.to_thread(self._keys.volumes)
        return views(seen, there, serving, volumes)

    async def _let_go(self, view: DeviceView) -> bool:
        """Close what was lost; False where it is in use, or cannot be closed."""
        assert view.mapped is not None
        try:
            await self._helper.close(Close(node=view.mapped.node, mark=view.mapped.mark))
        except JindiskError as exc:
            gone = exc.code == "VolumeNotClosed"
            log.warning("the device of an open volume was taken away", node=view.mapped.node, reason=str(exc))
            return gone
        return True

    def in_use(self, image_id: str) -> str:
        """Why an image cannot run now, as the end of a sentence; empty if it can. From any thread."""
        for view in tuple(self._views.values()):
            if view.image_id == image_id and view.mapped is not None and not view.read_only:
                what = view.node or "a device that was taken away"
                return (
                    f"is not given to a guest now, for {what} carries its volume and is open on this host as "
                    f"{view.mapped_node}: close it with 'jindiskctl device close' first"
                )
        opening = self._opening.get(image_id)
        return (
            f"is not given to a guest now, for {opening} carries its volume and is being opened on this host"
            if opening
            else ""
        )

    def find(self, name: str) -> DeviceView:
        """The device with this id, node, kernel name, mapped node, volume or image.

        Raises:
            NotFound: there is none. InvalidArgument: there are several.
        """
        for view in self._views.values():
            if name in {view.device_id, view.node, view.node.removeprefix("/dev/"), view.mapped_node} - {""}:
                return view
        found = [view for view in self._views.values() if name and name in {view.uuid, view.image, view.image_id}]
        if len(found) > 1:
            nodes = ", ".join(sorted(view.node for view in found))
            raise InvalidArgument("device", name, f"several carry it, name one: {nodes}")
        if not found:
            raise NotFound("device", name)
        return found[0]

    def _get(self, device_id: str) -> DeviceView:
        if device_id not in self._views:
            raise NotFound("device", device_id)
        return self._views[device_id]

    async def open(self, device_id: str, *, key: Secret | None, read_only: bool, owner: int) -> str:
        """Map the volume of a device; the mapped node.

        Args:
            device_id: which.
            key: what opens it; None for the key of the image whose volume it is. It is wiped.
            read_only: nothing can be written, and no state changes.
            owner: user id of who asks.

        Raises:
            Busy: it is open, or a domain runs from its image.
            NotSupported, NotFound: it is nothing that can be opened, or nobody here has its key.
            JindiskError: the key store, the helper or the volume refuses.
        """
        with contextlib.ExitStack() as stack:
            if key is not None:
                stack.enter_context(key)
            view = self._get(device_id)
            self._check_free(view, read_only=read_only)
            if view.image_id:
                if view.image_id in self._opening:
                    raise Busy(view.node, "it is being opened already")
                self._opening[view.image_id] = view.node
                stack.callback(self._opening.pop, view.image_id)
            permit = await self._permit(view, key, read_only=read_only, owner=owner)
            with permit.key:
                # A domain may have been started meanwhile; from here on `in_use` keeps one from that.
                self._check_free(view, read_only=read_only)
                request = Open(
                    kind=Kind(view.kind),
                    below=view.below,
                    owner=owner,
                    read_only=read_only,
                    uuid=view.uuid if view.kind != Kind.JINDISK1 else "",
                    anchor=permit.anchor,
                    session=permit.session,
                    lease_s=permit.lease_s,
                    header_sha256=view.volume.header_sha256 if view.volume and view.kind == Kind.LUKS2 else b"",
                )
                try:
                    node = await self._helper.open(request, permit.key)
                finally:
                    await asyncio.shield(self._look_again())
        log.info("device opened", node=view.node, mapped=node, volume=view.uuid, read_only=read_only, owner=owner)
        return f"/dev/{node}"

    def _check_free(self, view: DeviceView, *, read_only: bool) -> None:
        if view.mapped is not None:
            raise Busy(view.node or view.device_id, f"its volume is open as {view.mapped_node} already")
        if view.kind not in {kind.value for kind in Kind}:
            raise InvalidArgument("device", view.node, "it has the partition type of JinDisk, but shows no volume")
        if view.read_only and not read_only:
            raise InvalidArgument("device", view.node, "it can only be read: open it with --read-only")
        if view.image_id and (domain := self._running(view.image_id)):
            raise Busy(
                view.node, f"domain {domain!r} runs from image {view.image!r}: two would use one volume, stop it"
            )
        for other in self._views.values():
            shared = other.mapped is not None and view.uuid and other.uuid == view.uuid
            if shared and not (read_only and other.read_only):
                raise Busy(view.node, f"another copy of its volume is open as {other.mapped_node}: close that")

    async def _permit(self, view: DeviceView, key: Secret | None, *, read_only: bool, owner: int) -> Permit:
        if view.volume is not None:
            who = f"device {view.node} of this host, opened by user {owner}"
            volume = view.volume
            return await asyncio.to_thread(lambda: self._keys.permit(volume, read_only=read_only, key=key, who=who))
        if key is None:
            raise InvalidArgument("device", view.node, "no image here has its key: give the key with --key-file")
        return Permit(key=key)

    async def close(self, device_id: str) -> None:
        """Take the mapping of a device away, and wait until its volume is closed.

        Raises:
            NotFound: it is not open.
            Busy: it is in use.
            JindiskError: it is gone, but was not closed well.
        """
        view = self._get(device_id)
        if view.mapped is None:
            raise NotFound("open volume on", view.node)
        try:
            await self._helper.close(Close(node=view.mapped.node, mark=view.mapped.mark))
        finally:
            await asyncio.shield(self._look_again())
        log.info("device closed", node=view.node, mapped=view.mapped_node)
