"""Keys of images where the broker is the owner's: made here, sealed to that broker, and handed over instead of kept.

The directory, mode 0700; a file is whole or absent::

    <image id>.pending   the handover of an image that becomes visible next
    <image id>.json      the handover of an image in the store, which was built here
    <image id>.changing  the handover of a change of its data volumes that becomes visible next
    <image id>.change-N  the handover of one that happened, N in four digits from 0001; of imported images too

A key is in this process's memory from the beginning of a build until its handover is written, and nowhere else. What
only the owner's broker knows, the service says so instead of guessing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jindiskd.base import document
from jindiskd.base.anchor import Anchor
from jindiskd.base.files import fsync_directory, replace_file
from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.bus.objects import microseconds
from jindiskd.bus.ports import ApprovalView, AuditOrder, KeyView
from jindiskd.custody import from_threads
from jindiskd.errors import Busy, InvalidArgument, NotFound, NotSupported
from jindiskd.image.manifest import Manifest
from jindiskd.image.request import resource_of
from jindiskd.jobs.job import Job
from jindiskd.keys import handover
from jindiskd.keys.changes import ROOT_READ, Change
from jindiskd.keys.handover import Amendment, BrokerCard, HandedVolume, Handover, Opened, read_card

SEALED, PENDING, CHANGING, CHANGE = "sealed", "pending", "changing", "change-"
MOST_CHANGES = 9999


class HandedKeys:
    """The handovers of images built here. Calls block; they come from several threads.

    Args:
        directory: made if it is not there.
        card: of the owner's broker.
    """

    hands_over = True

    def __init__(self, directory: Path, card: BrokerCard) -> None:
        """Read nothing yet."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory, self._card = directory, card
        self._lock = threading.Lock()
        self._building: dict[str, dict[str, Secret]] = {}
        self._rules: dict[str, str] = {}
        self._changing: dict[str, Secret | None] = {}
        self._watchers: list[Callable[[], None]] = []

    @property
    def card(self) -> BrokerCard:
        """Of the owner's broker."""
        return self._card

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called when a handover came or went, in the thread that did it."""
        self._watchers.append(changed)

    def _tell(self) -> None:
        for changed in self._watchers:
            changed()

    def add_pending(
        self,
        image_id: str,
        name: str,  # noqa: ARG002 (what else is known comes with the manifest)
        platform: Platform,  # noqa: ARG002 (as above)
        key: Secret,
        rules: str = "",
        *,
        volume_keys: Mapping[str, Secret] | None = None,
    ) -> None:
        """Hold the keys and rules of an image that is being built."""
        held = {resource_of(image_id): Secret(bytes(key.reveal()))}
        for volume, one in (volume_keys or {}).items():
            held[resource_of(image_id, volume)] = Secret(bytes(one.reveal()))
        with self._lock:
            self._building[image_id], self._rules[image_id] = held, rules

    def take(self, image_id: str, by: str, why: str) -> Opened:  # noqa: ARG002 (the port's arguments)
        """Not here. Raises `NotSupported`."""
        if why == ROOT_READ:
            what = f"giving image {image_id} a volume of a format that it has none of yet, on this host,"
            remedy = "its root, whose key is at the owner's broker alone, must be read: choose the root's format"
            raise NotSupported(what, remedy)
        remedy = "its key is at the owner's broker alone: clone it where it was built, and export the clone to here"
        raise NotSupported(f"cloning image {image_id} on this host", remedy)

    def released_to(self, manifest: Manifest) -> tuple[bytes, ...]:
        """The launch digests of an image as it was last handed over; of one that came from elsewhere, its own: what
        the owner's broker releases its keys to, that broker looks at when it takes a change over.

        Raises:
            NotSupported: it is for another broker than the one that this host hands over to.
        """
        if manifest.broker_spki_sha256 != self._card.spki_sha256:
            remedy = "name the card of the broker that it pins as relay.card"
            raise NotSupported(f"changing the volumes of image {manifest.name!r}, which is for another broker,", remedy)
        known = [one for one in self.handovers() if one.image_id == manifest.image_id]
        if known:
            return known[-1].launch_digests
        return (manifest.launch_digest,) if manifest.launch_digest else ()

    def begin_change(self, change: Change, key: Secret | None) -> None:
        """Hold the key that comes. Raises `Busy`: a change is under way."""
        with self._lock:
            if change.image_id in self._changing or self._path(change.image_id, CHANGING).exists():
                text = "a change of its volumes was not finished; restart the service"
                raise Busy(f"image {change.image_id!r}", text)
            self._changing[change.image_id] = Secret(bytes(key.reveal())) if key is not None else None

    def prepare_change(self, change: Change, manifest: Manifest) -> None:
        """Seal the key that comes, durably; then it is held no longer."""
        with self._lock:
            key = self._changing[change.image_id]
        built = [(one, volume) for one, volume in manifest.anchored if change.added and one == change.added]
        amends = Amendment(before=change.before, added=change.added, removed=change.removed)
        told = _told(manifest, [HandedVolume(volume=volume.uuid, resource=one) for one, volume in built], amends=amends)
        anchors = {volume.uuid: Anchor.unpack(volume.anchor) for _, volume in built}
        keys = {change.added: key} if key is not None else {}
        sealed = handover.seal(told, keys, anchors, self._card.transfer_key)
        replace_file(self._path(change.image_id, CHANGING), document.dump(sealed), 0o600)

    def finish_change(self, change: Change, manifest: Manifest) -> bool:  # noqa: ARG002 (the port's arguments)
        """The image has changed: so the handover of that is to be had. Repeating it changes nothing."""
        changing = self._path(change.image_id, CHANGING)
        if changing.exists():
            made = self._changes_of(change.image_id)
            number = int(made[-1].suffix.rpartition("-")[2]) + 1 if made else 1
            if number > MOST_CHANGES:
                raise NotSupported(f"change {number} of image {change.image_id}", "build it again under another name")
            changing.replace(self._path(change.image_id, f"{CHANGE}{number:04d}"))
            fsync_directory(self._directory)
        self._drop_change(change.image_id)
        self._tell()
        return False

    def undo_change(self, image_id: str) -> None:
        """The image has not changed; no error where nothing is under way."""
        self._path(image_id, CHANGING).unlink(missing_ok=True)
        fsync_directory(self._directory)
        self._drop_change(image_id)

    def changes(self) -> Sequence[Change]:
        """Those that are under way, as a crash left them."""
        found = []
        for path in sorted(self._directory.glob(f"*.{CHANGING}")):
            told = handover.read(path.read_bytes())
            assert told.amends is not None, "a change, as written here"
            found.append(Change(image_id=told.image_id, added=told.amends.added, removed=told.amends.removed))
        return found

    def _drop_change(self, image_id: str) -> None:
        with self._lock:
            key = self._changing.pop(image_id, None)
        if key is not None:
            key.close()

    def _changes_of(self, image_id: str) -> list[Path]:
        return sorted(self._directory.glob(f"{image_id}.{CHANGE}[0-9][0-9][0-9][0-9]"))

    def prepare(self, manifest: Manifest) -> None:
        """Seal the keys of a finished image, durably; then they are held no longer."""
        with self._lock:
            keys, rules = self._building.pop(manifest.image_id), self._rules.pop(manifest.image_id)
        volumes = [HandedVolume(volume=volume.uuid, resource=resource) for resource, volume in manifest.anchored]
        told = _told(manifest, volumes, rules=rules)
        anchors = {volume.uuid: Anchor.unpack(volume.anchor) for _, volume in manifest.anchored}
        try:
            sealed = handover.seal(told, keys, anchors, self._card.transfer_key)
        finally:
            _wipe(keys)
        replace_file(self._path(manifest.image_id, PENDING), document.dump(sealed), 0o600)

    def activate(self, manifest: Manifest) -> None:
        """The image is visible: so is its handover, which has digests and volume. Repeating it is no error.

        Raises:
            NotFound: there is none.
        """
        image_id = manifest.image_id
        pending, final = self._path(image_id, PENDING), self._path(image_id)
        if pending.exists():
            pending.replace(final)
            fsync_directory(self._directory)
            self._tell()
        elif not final.exists():
            raise NotFound("handover of image", image_id)

    def forget(self, image_id: str) -> None:
        """Remove the handover, and drop the keys; no error where there is none."""
        with self._lock:
            keys = self._building.pop(image_id, {})
            self._rules.pop(image_id, None)
        _wipe(keys)
        self._drop_change(image_id)
        mine = (self._path(image_id, kind) for kind in (PENDING, CHANGING, "json"))
        for path in (*mine, *self._changes_of(image_id)):
            path.unlink(missing_ok=True)
        fsync_directory(self._directory)
        self._tell()

    def pending(self) -> Sequence[str]:
        """Ids of images whose handover is not decided about."""
        return sorted(path.stem for path in self._directory.glob(f"*.{PENDING}"))

    def states(self) -> Mapping[str, str]:
        """The state of each image's key, as far as it is known here."""
        found = {}
        for path in self._directory.glob("[!.]*"):
            if path.suffix == ".json" or path.suffix.startswith(f".{CHANGE}"):
                found[path.stem] = SEALED
            elif path.suffix == f".{PENDING}":
                found.setdefault(path.stem, PENDING)
        return found

    def export(self, image_id: str, card: BrokerCard | None) -> Sequence[Handover]:
        """The handover, as it was sealed when the image was built, where that was here, and those of the changes of its
        volumes in their order.

        Raises:
            NotFound: there is none. InvalidArgument: it cannot be sealed for another.
        """
        if card is not None:
            raise InvalidArgument("card", card.spki_sha256.hex(), "keys are sealed for the configured broker already")
        paths = [self._path(image_id), *self._changes_of(image_id)]
        found = [handover.read(path.read_bytes()) for path in paths if path.exists()]
        if not found:
            raise NotFound("handover of image", image_id)
        return found

    def handovers(self) -> Sequence[Handover]:
        """Of each image that has any, the latest."""
        images = sorted(image_id for image_id, state in self.states().items() if state == SEALED)
        return [self.export(image_id, None)[-1] for image_id in images]

    def _path(self, image_id: str, kind: str = "json") -> Path:
        return self._directory / f"{image_id}.{kind}"


class OwnersKeys:
    """What the bus can be told of keys and decisions that are the owner's: the handovers, and who to ask."""

    def __init__(self, keys: HandedKeys) -> None:
        self._keys = keys

    async def views(self) -> Sequence[KeyView]:
        """One a handover."""
        return [
            KeyView(
                image_id=told.image_id,
                name=told.name,
                platform=told.platform.value,
                simulated=told.platform.simulated,
                state=SEALED,
                created=datetime.fromisoformat(told.created),
                policy_digest="",
            )
            for told in await asyncio.to_thread(self._keys.handovers)
        ]

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called when a handover came or went."""
        self._keys.watch(from_threads(changed))

    async def describe(self, image_id: str) -> tuple[Mapping[str, object], Sequence[Mapping[str, object]]]:
        """A handover; where its volumes stand, the owner's broker knows."""
        told = (await asyncio.to_thread(self._keys.export, image_id, None))[-1]
        key = {
            "image-id": told.image_id,
            "name": told.name,
            "platform": told.platform.value,
            "simulated": told.platform.simulated,
            "resource": told.resource,
            "state": SEALED,
            "launch-digests": [digest.hex() for digest in told.launch_digests],
            "further-resources": [],
            "created": microseconds(datetime.fromisoformat(told.created)),
        }
        return key, []

    async def revoke(self, image_id: str, by: str) -> None:  # noqa: ARG002 (the port's arguments)
        """At the owner's."""
        _owner(f"revoking the key of image {image_id}", "jindiskctl broker key revoke")

    async def reinstate(self, image_id: str, by: str) -> None:  # noqa: ARG002 (as above)
        """At the owner's."""
        _owner(f"reinstating the key of image {image_id}", "jindiskctl broker key reinstate")

    async def accept_rollback(
        self, image_id: str, reason: str, by: str, volume: str = ""  # noqa: ARG002 (as above)
    ) -> None:
        """At the owner's."""
        _owner(f"accepting another state for image {image_id}", "jindiskctl broker volume accept-rollback")

    async def rotate(self, image_id: str, handover: bytes, by: str) -> None:  # noqa: ARG002 (as above)
        """At the owner's."""
        _owner(f"rotating the key of image {image_id}", "jindiskctl broker key rotate")

    async def export(self, image_id: str, card: str, by: str) -> bytes:  # noqa: ARG002 (nothing leaves in clear)
        """The handover, as it was sealed when the image was built; a list of several where its volumes changed."""
        told = read_card(card.encode()) if card else None
        found = await asyncio.to_thread(self._keys.export, image_id, told)
        if len(found) == 1:
            return document.dump(found[0])
        return document.dump({"handovers": [document.to_plain(one) for one in found]})

    async def card(self) -> str:
        """Of the owner's broker."""
        return document.dump(self._keys.card).decode()

    async def set_recovery_key(self, pem: bytes, by: str) -> None:  # noqa: ARG002 (the port's arguments)
        """At the owner's."""
        _owner("setting a recovery key", "jindiskctl broker recovery set-key")

    async def recovery_copy(self, by: str) -> bytes:  # noqa: ARG002 (as above)
        """At the owner's."""
        _owner("a recovery copy", "jindiskctl broker recovery copy")

    async def rows(self, order: AuditOrder) -> tuple[Sequence[Mapping[str, object]], bool]:  # noqa: ARG002 (as above)
        """At the owner's."""
        _owner("the audit log", "jindiskctl broker audit list")

    async def last(self) -> int:
        """None here."""
        return 0

    async def approvals(self) -> Sequence[ApprovalView]:
        """None here."""
        return []

    async def decide(self, number: int, *, approve: bool, by: str) -> None:  # noqa: ARG002 (as above)
        """At the owner's."""
        _owner(f"approval {number}", "jindiskctl broker approval list")

    async def verify(self, job: Job) -> str:  # noqa: ARG002 (as above)
        """At the owner's."""
        _owner("the audit log", "jindiskctl broker audit verify")

    async def policy(self, image_id: str, *, set_only: bool) -> str:  # noqa: ARG002 (the port's arguments)
        """At the owner's."""
        _owner("the policy", "jindiskctl broker image policy")

    async def set_policy(self, image_id: str, text: str, by: str) -> bool:  # noqa: ARG002 (as above)
        """At the owner's."""
        _owner("the policy", "jindiskctl broker image policy --set")

    async def check_policy(
        self, image_id: str, *, text: str | None, row: int | None  # noqa: ARG002 (as above)
    ) -> tuple[int, Sequence[Mapping[str, object]]]:
        """At the owner's."""
        _owner("the policy", "jindiskctl broker image policy")

    async def explain(self, *, image_id: str | None, domain: str | None, row: int | None, job: Job) -> str:  # noqa: ARG002
        """At the owner's."""
        _owner("why a guest was refused", "jindiskctl broker audit list")


def _told(
    manifest: Manifest, volumes: Sequence[HandedVolume], *, rules: str = "", amends: Amendment | None = None
) -> Handover:
    """What is in clear of a handover of an image as it is now, with these of its volumes."""
    return Handover(
        image_id=manifest.image_id,
        name=manifest.name,
        platform=manifest.platform,
        resource=manifest.resource,
        launch_digests=(manifest.launch_digest,) if manifest.launch_digest else (),
        created=manifest.created,
        volumes=tuple(volumes),
        rules=rules,
        amends=amends,
    )


def _wipe(keys: Mapping[str, Secret]) -> None:
    for key in keys.values():
        key.close()


def _owner(what: str, command: str) -> NoReturn:
    raise NotSupported(f"{what} from this host", f"the owner's broker has it: {command}, on its machine")
