"""Devices of the host behind the bus: whose volumes they are, and who has the keys.

With a broker in the service, a volume that is opened here for writing is a session like a guest's: released, adopted,
reported, closed, each with its row in the audit log. Where the broker is the owner's, nothing here has a key, nor may
anything here change the state that the owner remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from jindiskd.base.secret import Secret
from jindiskd.broker.freshness import Freshness
from jindiskd.broker.http import Refusal
from jindiskd.broker.peer import Peer
from jindiskd.bus.ports import BlockDeviceView
from jindiskd.device.helper_client import HelperClient
from jindiskd.device.registry import KIND_OF_FORMAT, DeviceView, ImageVolume
from jindiskd.device.service import DeviceService, Permit, VolumeKeys
from jindiskd.device.states import StatesListener
from jindiskd.device.watch import BlockWatch, Seen
from jindiskd.errors import NotFound, NotSupported
from jindiskd.helper.protocol import Kind
from jindiskd.helper.states import FENCED, LATER, OK
from jindiskd.image.store import ImageStore
from jindiskd.kbs.messages import MalformedMessage
from jindiskd.keys.audit import Requester
from jindiskd.keys.store import Store
from jindiskd.keys.volumes import VolumeRecord, Volumes

log = structlog.get_logger(__name__)
ROOT = "jindisk-rootfs"
STATES = "states"
"""Name of the socket in the service's runtime directory, which the helper's workers know."""


def image_volumes(images: ImageStore) -> list[ImageVolume]:
    """The roots and data volumes of the images in the store."""
    found = []
    for image in images.list():
        manifest = image.manifest
        parts = [part.uuid.lower() for part in manifest.partitions if part.name == ROOT]
        found.append(
            ImageVolume(
                image=manifest.name,
                image_id=manifest.image_id,
                kind=KIND_OF_FORMAT.get(manifest.volume.format, ""),
                uuid=manifest.volume.uuid.lower(),
                partition_uuid=parts[0] if parts else "",
                header_sha256=manifest.volume.header_sha256,
                simulated=manifest.platform.simulated,
            )
        )
        found += [
            ImageVolume(
                image=manifest.name,
                image_id=manifest.image_id,
                kind=KIND_OF_FORMAT.get(volume.volume.format, ""),
                uuid=volume.volume.uuid.lower(),
                header_sha256=volume.volume.header_sha256,
                resource=volume.resource,
                simulated=manifest.platform.simulated,
            )
            for volume in manifest.volumes
        ]
    return found


class StoredVolumes:
    """Volumes whose keys are in the service's own store."""

    def __init__(self, images: ImageStore, store: Store) -> None:
        """Nothing is read yet."""
        self._images, self._store, self._volumes = images, store, Volumes(store)

    def volumes(self) -> Sequence[ImageVolume]:
        """The images' own volumes, and all others that are remembered."""
        own = image_volumes(self._images)
        by_image, known = {volume.image_id: volume for volume in own}, {volume.uuid for volume in own}
        more = [
            ImageVolume(
                image=by_image[record.image_id].image,
                image_id=record.image_id,
                kind=Kind.JINDISK2.value,
                uuid=record.volume,
                resource=record.resource,
                simulated=by_image[record.image_id].simulated,
            )
            for record in self._volumes.list()
            if record.volume not in known and record.image_id in by_image
        ]
        return [*own, *more]

    def permit(self, volume: ImageVolume, *, read_only: bool, key: Secret | None, who: str) -> Permit:
        """The key of a volume, and the state that it must be in; the audit row is durable before this returns.

        Raises:
            NotFound, ReleaseRefused, ApprovalWaiting, KeyUnreadable: no key leaves.
        """
        # To approvals and limits, who opens a device is a guest of its own: an approval is for what a person was shown.
        by = Requester(peer=who, simulated=volume.simulated, guest=who)
        record = self._record(volume)
        if record is not None and not read_only:
            grant = self._volumes.release(
                volume.uuid, volume.image_id, by, resource=volume.resource or None
            )  # fmt: skip
            if key is not None:
                grant.key.close()
            anchor = grant.anchor.pack() if grant.anchor else b""
            return Permit(key=key or grant.key, anchor=anchor, session=grant.session, lease_s=grant.lease_s)
        anchor = b""
        if record is not None and record.anchor is not None and not record.accept_any:
            anchor = record.anchor.pack()
        if key is None:
            key = self._store.release_to(volume.image_id, by, resource=volume.resource or None)
        return Permit(key=key, anchor=anchor)

    def _record(self, volume: ImageVolume) -> VolumeRecord | None:
        if volume.kind != Kind.JINDISK2:
            return None
        try:
            return self._volumes.get(volume.uuid)
        except NotFound:
            return None


class OwnersVolumes:
    """Volumes whose keys and states are at the owner's broker."""

    def __init__(self, images: ImageStore) -> None:
        """Nothing is read yet."""
        self._images = images

    def volumes(self) -> Sequence[ImageVolume]:
        """The images' roots."""
        return image_volumes(self._images)

    def permit(self, volume: ImageVolume, *, read_only: bool, key: Secret | None, who: str) -> Permit:  # noqa: ARG002
        """For reading, with a key that the owner gave.

        Raises:
            NotSupported: anything else.
        """
        if key is None:
            raise NotSupported(
                f"opening the volume of image {volume.image!r} with its key",
                "the owner's broker has it: give the key with --key-file",
            )
        if not read_only and volume.kind == Kind.JINDISK2:
            raise NotSupported(
                f"writing the volume of image {volume.image!r}",
                "the owner's broker remembers its state, and would refuse the disk: open it with --read-only",
            )
        return Permit(key=key)


class SessionStates:
    """Takes what the processes that serve volumes tell."""

    def __init__(self, store: Store) -> None:
        """Nothing is told yet."""
        self._freshness = Freshness(Volumes(store))
        self._peer = Peer(description="a volume open on this host", local=True)

    async def tell(self, verb: str, body: bytes) -> bytes:
        """Do what a message says; the answer to it."""
        try:
            if verb == "stale":
                await self._freshness.stale(body, self._peer)
            else:
                await self._freshness.tell(verb, body, self._peer)
        except Refusal as exc:
            return LATER if exc.kind == "LeaseHeld" else FENCED
        except MalformedMessage:
            return FENCED
        return OK


def _view(view: DeviceView) -> BlockDeviceView:
    return BlockDeviceView(
        device_id=view.device_id,
        node=view.node,
        kind=view.kind,
        uuid=view.uuid,
        label=view.label,
        size_bytes=view.size_bytes,
        image=view.image,
        image_id=view.image_id,
        state=view.state.value,
        mapped_node=view.mapped_node,
        read_only=view.read_only,
        opened_by=view.opened_by,
        reason=view.fault,
    )


class HostDevices:
    """The devices and the listener for their states, started and stopped together.

    Args:
        images: the image store.
        store: the key store; None where the owner's broker has it.
        helper: its socket.
        running: name of a domain that runs from an image, by the image's id; empty if none does.
        runtime_dir: of the service.
        watch: whether to look for devices at all.
    """

    def __init__(
        self,
        images: ImageStore,
        store: Store | None,
        *,
        helper: Path,
        running: Callable[[str], str],
        runtime_dir: Path,
        watch: bool,
    ) -> None:
        """Nothing is looked at yet."""
        keys: VolumeKeys = OwnersVolumes(images) if store is None else StoredVolumes(images, store)
        self.service = DeviceService(
            keys, HelperClient(helper), running=running, watch=BlockWatch if watch else NoWatch
        )
        self._states = None if store is None else StatesListener(runtime_dir / STATES, SessionStates(store).tell)

    async def start(self) -> None:
        """Hear states, then look for devices: what is open tells its states again to a service that was restarted."""
        if self._states is not None:
            self._states.start()
        await self.service.start()

    async def stop(self) -> None:
        """End both. What is open stays open."""
        await self.service.stop()
        if self._states is not None:
            await self._states.stop()


class DevicesBackend:
    """The devices, in the form that the bus wants."""

    def __init__(self, service: DeviceService) -> None:
        """`service` is started and stopped by others."""
        self._service = service

    def views(self) -> Sequence[BlockDeviceView]:
        """All devices."""
        return [_view(view) for view in self._service.views()]

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called when something is different."""
        self._service.subscribe(changed)

    def find(self, name: str) -> BlockDeviceView:
        """One device. Raises `NotFound`, `InvalidArgument`."""
        return _view(self._service.find(name))

    async def open(self, device_id: str, *, key: Secret | None, read_only: bool, owner: int) -> str:
        """Map its volume; see `DeviceService.open`."""
        return await self._service.open(device_id, key=key, read_only=read_only, owner=owner)

    async def close(self, device_id: str) -> None:
        """Take that away; see `DeviceService.close`."""
        await self._service.close(device_id)


class NoWatch:
    """Where nothing is looked for."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """`changed` is never called."""

    def start(self) -> None:
        """Nothing to begin."""

    def stop(self) -> None:
        """Nothing to end."""

    def look(self) -> Sequence[Seen]:
        """Nothing."""
        return ()
