"""The keys behind the bus, where the broker is in this service: what builds, owners and listings need of the key store.

Calls of the store block, and are made in threads.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_private_key

from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.bus.objects import microseconds
from jindiskd.bus.ports import KeyView
from jindiskd.domain.service import DomainService
from jindiskd.domain.state import ACTIVE
from jindiskd.errors import Busy, InvalidArgument, NotFound, NotSupported
from jindiskd.image.manifest import Manifest
from jindiskd.image.request import resource_of
from jindiskd.keys import handover
from jindiskd.keys.audit import Requester
from jindiskd.keys.changes import Change, Changes
from jindiskd.keys.handover import HandoverUnusable, Opened
from jindiskd.keys.registry import Registry
from jindiskd.keys.store import KeyState, Store
from jindiskd.keys.volumes import BuiltVolume, VolumeRecord, Volumes
from jindiskd.policy import rules as release_rules


def from_threads(changed: Callable[[], None]) -> Callable[[], None]:
    """`changed`, to be called from any thread: it runs in the event loop that runs now, until that is closed."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(changed)

    return call


class KeyPort:
    """What builds and images need of the key store."""

    hands_over = False

    def __init__(self, store: Store) -> None:
        self._store, self._volumes, self._changes = store, Volumes(store), Changes(store)

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
        """Store the keys of an image that is being made; `rules` of its release, the strict defaults if empty."""
        given = release_rules.load(rules) if rules else None
        others = {resource_of(image_id, volume): one for volume, one in (volume_keys or {}).items()}
        self._store.add_image(image_id, name, platform, resource_of(image_id), key, given, others)

    def take(self, image_id: str, by: str, why: str) -> Opened:
        """The keys of an image that is being cloned or changed; an audit row of the kind `why` says who took them.

        Raises:
            NotFound: the key store does not know the image. ReleaseRefused: it is revoked.
        """
        return Registry(self._store).take(image_id, Requester(peer=by), why, active=True)

    def released_to(self, manifest: Manifest) -> tuple[bytes, ...]:
        """The launch digests that the keys of an image are released to; raises `NotFound`."""
        return self._store.image(manifest.image_id).launch_digests

    def begin_change(self, change: Change, key: Secret | None) -> None:
        """See `Changes.begin`."""
        self._changes.begin(change, key)

    def prepare_change(self, change: Change, manifest: Manifest) -> None:
        """Nothing: the key is stored already."""

    def finish_change(self, change: Change, manifest: Manifest) -> bool:
        """See `Changes.finish`; the image is that of the manifest now."""
        digests = (manifest.launch_digest,) if manifest.launch_digest else ()
        built = [one for one in _built(manifest) if one.resource == change.added]
        return self._changes.finish(change, digests, built)

    def undo_change(self, image_id: str) -> None:
        """See `Changes.undo`."""
        self._changes.undo(image_id)

    def changes(self) -> Sequence[Change]:
        """The changes of images' volumes that are under way."""
        return self._changes.list()

    def activate(self, manifest: Manifest) -> None:
        """Allow release of the keys, and remember the states in which JinDisk volumes were closed by their builder."""
        digests = (manifest.launch_digest,) if manifest.launch_digest else ()
        self._volumes.activate(manifest.image_id, digests, _built(manifest))

    def prepare(self, manifest: Manifest) -> None:
        """Nothing: the key is stored already."""

    def forget(self, image_id: str) -> None:
        """Delete the key."""
        self._store.forget(image_id)

    def states(self) -> Mapping[str, str]:
        """The state of each image's key."""
        return {record.image_id: record.state.value for record in self._store.images()}

    def pending(self) -> Sequence[str]:
        """Ids of images whose key is pending."""
        return [record.image_id for record in self._store.images() if record.state is KeyState.PENDING]


class KeysBackend:
    """The keys of images, as their owner sees and decides about them.

    Args:
        store: the key store.
        spki_sha256: of the broker's TLS key; for its card.
        domains: what runs from the images.
    """

    def __init__(self, store: Store, spki_sha256: bytes, domains: DomainService) -> None:
        self._store, self._spki_sha256, self._domains = store, spki_sha256, domains
        self._volumes, self._registry = Volumes(store), Registry(store)

    async def views(self) -> Sequence[KeyView]:
        """The keys of all images."""
        return [
            KeyView(
                image_id=record.image_id,
                name=record.name,
                platform=record.platform.value,
                simulated=record.platform.simulated,
                state=record.state.value,
                created=datetime.fromisoformat(record.created),
                policy_digest=record.rules.digest,
            )
            for record in await asyncio.to_thread(self._store.images)
        ]

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called when the key store was written."""
        self._store.database.watch(from_threads(changed))

    async def describe(self, image_id: str) -> tuple[Mapping[str, object], Sequence[Mapping[str, object]]]:
        """What is known of one image's keys, and of each of their volumes."""

        def look() -> tuple[Mapping[str, object], Sequence[Mapping[str, object]]]:
            record = self._store.image(image_id)
            key = {
                "image-id": record.image_id,
                "name": record.name,
                "platform": record.platform.value,
                "simulated": record.platform.simulated,
                "resource": record.resource,
                "state": record.state.value,
                "launch-digests": [digest.hex() for digest in record.launch_digests],
                "further-resources": [other.resource for other in self._registry.keys(image_id)],
                "created": microseconds(datetime.fromisoformat(record.created)),
            }
            return key, [_volume(volume, record.resource) for volume in self._volumes.of_image(image_id)]

        return await asyncio.to_thread(look)

    async def revoke(self, image_id: str, by: str) -> None:
        """Stop release of its keys."""
        await asyncio.to_thread(self._store.revoke, image_id, Requester(peer=by))

    async def reinstate(self, image_id: str, by: str) -> None:
        """Allow release of its keys again."""
        await asyncio.to_thread(self._store.reinstate, image_id, Requester(peer=by))

    async def accept_rollback(self, image_id: str, reason: str, by: str, volume: str = "") -> None:
        """Have its next start take whatever authentic state its volumes are in, once; or one volume, `root` or a name.

        Raises:
            Busy: a domain runs from it. NotSupported: it has no volume whose state is remembered.
            NotFound: none of that name.
        """
        self._check_idle(image_id)

        def accept() -> None:
            records = self._volumes.of_image(image_id)
            if not records:
                raise NotSupported(
                    f"accepting another state for image {image_id}",
                    "only JinDisk 2 volumes have states that are remembered",
                )
            if volume:
                root = self._store.image(image_id).resource
                records = [one for one in records if (one.resource or root).rpartition("/")[2] == volume]
                if not records:
                    raise NotFound("JinDisk 2 volume", volume)
            for record in records:
                self._volumes.accept_rollback(record.volume, reason, Requester(peer=by))

        await asyncio.to_thread(accept)

    async def rotate(self, image_id: str, handover_: bytes, by: str) -> None:
        """Put what a handover holds in place of its keys, launch digests and volumes.

        Raises:
            Busy: a domain runs from it. HandoverUnusable, MalformedDocument, AlreadyExists: nothing was changed.
        """
        self._check_idle(image_id)

        def change() -> None:
            told = handover.read(handover_)
            if told.image_id != image_id:
                raise HandoverUnusable(f"is of image {told.image_id}", f"give one of image {image_id}")
            opened = handover.open_(told, self._transfer_key()[1])
            try:
                self._registry.rotate(opened, Requester(peer=by))
            finally:
                opened.close()

        await asyncio.to_thread(change)

    async def export(self, image_id: str, card: str, by: str) -> bytes:
        """Its keys, sealed for the broker of a card (JSON).

        Raises:
            InvalidArgument, MalformedDocument: there is no card, or it is none.
        """
        if not card:
            raise InvalidArgument("card", None, "name the broker that shall be able to open it: --to CARD")
        recipient = handover.read_card(card.encode()).transfer_key
        return document.dump(await asyncio.to_thread(self._registry.export, image_id, recipient, Requester(peer=by)))

    async def card(self) -> str:
        """The card of the broker in this service, JSON."""
        return document.dump((await asyncio.to_thread(self._transfer_key))[0]).decode()

    def _transfer_key(self) -> tuple[handover.BrokerCard, ec.EllipticCurvePrivateKey]:
        """The broker's card, and the key behind it; drawn when first asked for."""
        with self._store.database.transfer_key(handover.draw_transfer_key) as key:
            private = load_der_private_key(bytes(key.reveal()), None)
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            return handover.card(self._spki_sha256, key), private

    async def set_recovery_key(self, pem: bytes, by: str) -> None:
        """Have recovery copies sealed to a public key."""
        await asyncio.to_thread(self._registry.set_recovery_key, pem, Requester(peer=by))

    async def recovery_copy(self, by: str) -> bytes:
        """All keys, sealed to that key, as JSON; raises `NoRecoveryKey`."""
        copies = await asyncio.to_thread(self._registry.recovery_copy, Requester(peer=by))
        return json.dumps({"handovers": [document.to_plain(copy) for copy in copies]}).encode()

    def _check_idle(self, image_id: str) -> None:
        for domain in self._domains.list():
            if domain.image_id == image_id and domain.state in ACTIVE:
                raise Busy(f"image {domain.image!r}", f"domain {domain.name!r} runs from it; stop that first")


def _built(manifest: Manifest) -> list[BuiltVolume]:
    """The volumes of an image whose states are remembered, as they were built."""
    return [
        BuiltVolume(volume=volume.uuid, anchor=Anchor.unpack(volume.anchor), resource=resource)
        for resource, volume in manifest.anchored
    ]


def _volume(record: VolumeRecord, root: str) -> Mapping[str, object]:
    """What is told of a volume: where it stands, never a session."""
    known = record.anchor
    return {
        "volume": record.volume,
        "resource": record.resource or root,
        "state": ("open" if known.open else "closed") if known else "unknown",
        "sequence": known.sequence if known else 0,
        "root": known.root.hex() if known else "",
        "pending": record.pending,
        "rollback-accepted": record.accept_any,
    }
