"""What stands behind the bus: image store, key store and domains, in the form that `bus.ports` describes.

Defaults from the configuration are filled in here, and blocking calls are moved off the event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import jindiskd.image.worker  # noqa: F401 (registers the errors that a build worker can name)
from jindiskd.attest.descriptors import choose
from jindiskd.attest.expected import expected
from jindiskd.attest.measure import launch_digest
from jindiskd.base import document, plugins
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.broker.relay import Relay, RelayView
from jindiskd.bus.jobs import microseconds
from jindiskd.bus.manager import MEBIBYTE
from jindiskd.bus.ports import BuildOrder, GuestView, ImageView, LaunchOrder
from jindiskd.config import Config
from jindiskd.domain.service import DomainService
from jindiskd.domain.state import ACTIVE, DomainView
from jindiskd.errors import EXIT_INTEGRITY, Busy, InvalidArgument, JindiskError, NotFound, NotSupported
from jindiskd.image.manifest import Manifest, Volume
from jindiskd.image.measurement import inputs_of
from jindiskd.image.request import BaseKind, BuildRequest, Progress, VolumeFormat, resource_of
from jindiskd.image.service import ImageService
from jindiskd.image.store import verify
from jindiskd.jobs.job import Job
from jindiskd.kbs.freshness import Anchor
from jindiskd.keys.audit import Requester
from jindiskd.keys.handover import BrokerCard, Handover, read_card
from jindiskd.keys.registry import Registry
from jindiskd.keys.store import KeyState, Store
from jindiskd.keys.volumes import VolumeRecord, Volumes

KEY_UNKNOWN = "unknown"
"""State of the key of an image that this key store does not know, for example one copied from elsewhere."""


class DigestDiffers(JindiskError, code="DigestDiffers", exit_code=EXIT_INTEGRITY):
    """An image no longer measures as it did when it was built."""

    def __init__(self, name: str, recorded: bytes, computed: bytes) -> None:
        super().__init__(
            f"image {name!r} measures as {computed.hex()}, but its key is released to {recorded.hex()}: its firmware "
            "has changed since it was built; put that back, or build the image again"
        )


class KeySide(Protocol):
    """Where the keys of images are, as far as images are concerned; calls block."""

    def states(self) -> Mapping[str, str]:
        """The state of each image's key, by image id."""

    def revoke(self, image_id: str) -> None:
        """Stop release of its keys."""

    def reinstate(self, image_id: str) -> None:
        """Allow release of its keys again."""

    def accept_rollback(self, image_id: str, reason: str) -> None:
        """Have its next start take whatever authentic state its volumes are in, once."""

    def export(self, image_id: str, card: BrokerCard | None, by: str) -> Handover:
        """Its keys, sealed for a broker."""


class KeyPort:
    """What builds and images need of the key store."""

    def __init__(self, store: Store) -> None:
        self._store, self._volumes = store, Volumes(store)

    def add_pending(self, image_id: str, name: str, request: BuildRequest, key: Secret) -> None:
        """Store the key of an image that is being built."""
        self._store.add_image(image_id, name, request.platform, resource_of(image_id), key)

    def activate(self, image_id: str, launch_digests: Sequence[bytes], volume: Volume) -> None:
        """Allow release of the key, and remember the state in which a JinDisk volume was closed by its builder."""
        if volume.anchor:
            self._volumes.activate(image_id, launch_digests, volume.uuid, Anchor.unpack(volume.anchor))
        else:
            self._store.activate(image_id, launch_digests)

    def prepare(self, manifest: Manifest) -> None:
        """Nothing: the key is stored already."""

    def forget(self, image_id: str) -> None:
        """Delete the key."""
        self._store.forget(image_id)

    def states(self) -> Mapping[str, str]:
        """The state of each image's key."""
        return {record.image_id: record.state.value for record in self._store.images()}

    def revoke(self, image_id: str) -> None:
        """Stop release of its keys."""
        self._store.revoke(image_id)

    def reinstate(self, image_id: str) -> None:
        """Allow release of its keys again."""
        self._store.reinstate(image_id)

    def accept_rollback(self, image_id: str, reason: str) -> None:
        """Have its next start take whatever authentic state its volumes are in, once.

        Raises:
            NotSupported: it has no volume whose state is remembered.
        """
        records = self._volumes.of_image(image_id)
        if not records:
            raise NotSupported(
                f"accepting another state for image {image_id}", "only JinDisk 2 roots have states that are remembered"
            )
        for record in records:
            self._volumes.accept_rollback(record.volume, reason)

    def export(self, image_id: str, card: BrokerCard | None, by: str) -> Handover:
        """Its keys, sealed for the broker of a card.

        Raises:
            InvalidArgument: there is no card. NotFound: the key store does not know the image.
        """
        if card is None:
            raise InvalidArgument("card", None, "name the broker that shall be able to open it: --to CARD")
        return Registry(self._store).export(image_id, card.transfer_key, Requester(peer=by))

    def pending(self) -> Sequence[str]:
        """Ids of images whose key is pending."""
        return [record.image_id for record in self._store.images() if record.state is KeyState.PENDING]


class ImagesBackend:
    """The images and their keys."""

    def __init__(self, service: ImageService, keys: KeySide, domains: DomainService, config: Config) -> None:
        self._service, self._keys, self._domains, self._config = service, keys, domains, config

    def checked(self, order: BuildOrder) -> BuildOrder:
        """Fill in the defaults; refuse what can be refused before any work is done.

        Raises:
            InvalidArgument, NotSupported: it cannot be built.
        """
        images = self._config.images
        platform = Platform(_choice(Platform, "platform", order.platform or images.platform.value))
        firmware = Path(order.firmware) if order.firmware else images.firmware or choose(platform.tee)
        if order.firmware:
            real = firmware.resolve()
            if not firmware.is_absolute() or not any(real.is_relative_to(place) for place in images.firmware_dirs):
                places = ", ".join(str(place) for place in images.firmware_dirs)
                raise InvalidArgument(
                    "firmware", order.firmware, f"it must lie in one of {places} (images.firmware_dirs)"
                )
        order = replace(
            order,
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

    def _request(self, order: BuildOrder) -> BuildRequest:
        """The order as the builder takes it, with what is configured for all images."""
        images = self._config.images
        return replace(
            _request(order),
            report_source=plugins.find(plugins.REPORT_SOURCES, images.report_source).value
            if images.report_source
            else "",
            key_program=os.fspath(images.key_program) if images.key_program else "",
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

        def progress(step: Progress) -> None:
            job.progress(step.stage, step.fraction, step.done_bytes, step.total_bytes)

        async with asyncio.timeout(self._config.images.build_timeout_s):
            return (await self._service.build(self._request(order), base_fd, progress)).name

    async def remove(self, name: str) -> None:
        """Remove one and its key, unless a domain runs from it."""
        image_id = (await self._service.get(name)).manifest.image_id
        for domain in self._domains.list():
            if domain.image_id == image_id and domain.state in ACTIVE:
                raise Busy(f"image {name!r}", f"domain {domain.name!r} runs from it; stop that first")
        await self._service.remove(name)

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
        return json.dumps({"launch_digest": digest.hex(), **found}, ensure_ascii=False)

    async def accept_rollback(self, image_id: str, reason: str) -> None:
        """Have its next start take whatever authentic state its volume is in, once."""
        for domain in self._domains.list():
            if domain.image_id == image_id and domain.state in ACTIVE:
                raise Busy(f"image {domain.image!r}", f"domain {domain.name!r} runs from it; stop that first")
        await asyncio.to_thread(self._keys.accept_rollback, image_id, reason)

    async def revoke(self, image_id: str) -> None:
        """Stop release of its key."""
        await asyncio.to_thread(self._keys.revoke, image_id)

    async def reinstate(self, image_id: str) -> None:
        """Allow release of its key again."""
        await asyncio.to_thread(self._keys.reinstate, image_id)

    async def export_key(self, image_id: str, card: str, by: str) -> bytes:
        """Its keys, sealed for the broker of a card (JSON; that of the configuration if empty)."""
        told = read_card(card.encode()) if card else None
        return document.dump(await asyncio.to_thread(self._keys.export, image_id, told, by))


def _choice(kind: type[Platform | BaseKind | VolumeFormat], what: str, value: str) -> str:
    names = [member.value for member in kind]
    if value not in names:
        raise InvalidArgument(what, value, f"it is one of {', '.join(names)}")
    return value


def _request(order: BuildOrder) -> BuildRequest:
    assert order.vcpus is not None  # an order that was checked
    return BuildRequest(
        name=order.name,
        platform=Platform(_choice(Platform, "platform", order.platform)),
        format=VolumeFormat(_choice(VolumeFormat, "format", order.format)),
        base_kind=BaseKind(_choice(BaseKind, "kind of base", order.base_kind)),
        firmware=order.firmware,
        vcpus=order.vcpus,
        cpu_model=order.cpu_model,
        size_bytes=order.size_bytes,
        cmdline=order.cmdline,
        seed=order.seed.encode() if order.seed is not None else None,
        debug=order.debug,
        vouch_firmware=order.vouch_firmware,
    )


def _view(manifest: Manifest, key_state: str) -> ImageView:
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
    )


class GuestsBackend:
    """The domains, and the way of each to its owner's broker where that is another's."""

    def __init__(self, service: DomainService, relay: Relay | None = None) -> None:
        self._service, self._relay = service, relay

    @property
    def connected(self) -> bool:
        """Whether libvirt is connected."""
        return self._service.connection.connected

    def views(self) -> Sequence[GuestView]:
        """All domains of ours."""
        return [self._guest(view) for view in self._service.list()]

    def _guest(self, view: DomainView) -> GuestView:
        way = self._relay.view(view.uuid) if self._relay is not None else None
        return _guest(view, way)

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called when a domain appears, changes or goes, and when libvirt comes."""
        self._service.subscribe(changed)
        if self._relay is not None:
            self._relay.changed = changed

    async def launch(self, order: LaunchOrder, job: Job) -> str:
        """Start one and follow it until it runs."""
        memory = order.memory_bytes
        view = await self._service.launch(
            order.image,
            name=order.name,
            memory_mib=memory // MEBIBYTE if memory else None,
            timeout_s=order.timeout_s,
            progress=job.progress,
        )
        return view.uuid

    async def adopt(self, domain: str, image: str) -> str:
        """Bind a domain that somebody else made to an image."""
        return (await self._service.adopt(domain, image)).uuid

    async def stop(self, uuid: str, *, force: bool) -> None:
        """End one."""
        await self._service.stop_domain(uuid, force=force)

    async def undefine(self, uuid: str) -> None:
        """Remove one that is off."""
        await self._service.undefine(uuid)

    async def open_console(self, uuid: str) -> int:
        """A readable descriptor of its console log."""
        view = self._service.get(uuid)
        try:
            return await asyncio.to_thread(os.open, view.console, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise NotFound("console log of domain", view.name) from exc


def _guest(view: DomainView, way: RelayView | None) -> GuestView:
    return GuestView(
        uuid=view.uuid,
        name=view.name,
        image=view.image,
        image_id=view.image_id,
        platform=view.platform.value,
        simulated=view.simulated,
        state=view.state.value,
        reason=view.reason,
        since=view.since,
        cid=view.cid,
        relay_state=way.state.value if way is not None else "",
        relay_reason=way.reason if way is not None else "",
    )


def _volume(record: VolumeRecord | None) -> Mapping[str, object]:
    """What is told of a volume: where it stands, never a session."""
    if record is None:
        return {}
    known = record.anchor
    return {
        "volume": record.volume,
        "volume-state": ("open" if known.open else "closed") if known else "unknown",
        "volume-sequence": known.sequence if known else 0,
        "volume-root": known.root.hex() if known else "",
        "volume-pending": record.pending,
        "volume-rollback-accepted": record.accept_any,
    }


class KeysBackend:
    """The key store's records and its audit log."""

    def __init__(self, store: Store) -> None:
        self._store, self._volumes = store, Volumes(store)

    async def records(self) -> Sequence[Mapping[str, object]]:
        """One dictionary a key, without the key."""
        volumes = {record.image_id: record for record in await asyncio.to_thread(self._volumes.list)}
        return [
            {
                "image-id": record.image_id,
                "name": record.name,
                "platform": record.platform.value,
                "simulated": record.platform.simulated,
                "resource": record.resource,
                "state": record.state.value,
                "launch-digests": [digest.hex() for digest in record.launch_digests],
                "created": microseconds(datetime.fromisoformat(record.created)),
                **_volume(volumes.get(record.image_id)),
            }
            for record in await asyncio.to_thread(self._store.images)
        ]

    async def audit(self, *, limit: int, image_id: str | None) -> Sequence[Mapping[str, object]]:
        """The last rows of the audit log, oldest first."""
        return [
            {
                "number": row["number"],
                "at": microseconds(datetime.fromisoformat(row["time"])),
                "kind": row["kind"],
                "image-id": row["image_id"],
                "peer": row["peer"],
                "simulated": bool(row["simulated"]),
                "measurement": row["measurement"],
                "findings": [f"{found['id']}: {found['text']}" for found in row["detail"].get("findings", [])],
            }
            for row in await asyncio.to_thread(self._store.audit_rows, limit, image_id)
        ]

    async def verify_audit(self) -> tuple[int, str]:
        """Number of rows and digest of the last."""
        return await asyncio.to_thread(self._store.verify_audit)
