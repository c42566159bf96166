"""Data volumes of images in the store: added and removed, all at once or not at all.

Order of a change, so that no crash leaves an image without a key, or a key that is released to what is not there: the
change is written down in the key store, with the key that comes; a worker makes the image anew in a staging directory,
with links to the disks that stay; the store exchanges the two; then the key store follows, in one step. `settle`
finishes what the exchange decided, and takes back the rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import structlog

from jindiskd.base.secret import Secret
from jindiskd.base.threads import decided, finished
from jindiskd.image.data_volumes import joined
from jindiskd.image.manifest import Manifest
from jindiskd.image.request import (
    KEY_BYTES,
    BuildRequest,
    BuildTask,
    Progress,
    VolumeRequest,
    VolumesTask,
    resource_of,
    with_volume,
    without_volume,
)
from jindiskd.image.running import run_worker
from jindiskd.image.store import ImageStore, Staging, StoredImage
from jindiskd.image.volume_change import needs_modules
from jindiskd.keys.changes import ROOT_READ, Change
from jindiskd.keys.handover import Opened

log = structlog.get_logger(__name__)


class ChangePort(Protocol):
    """What is needed of the key store; calls block, and are made in a thread."""

    hands_over: bool
    """Whether keys go to the owner's broker, which changes nothing before its owner takes the change over."""

    def take(self, image_id: str, by: str, why: str) -> Opened:
        """The keys of an image and the last states of its volumes; written down who took them, and why."""

    def released_to(self, manifest: Manifest) -> tuple[bytes, ...]:
        """The launch digests that the keys of an image are released to."""

    def begin_change(self, change: Change, key: Secret | None) -> None:
        """Write a change down, with the key that comes."""

    def prepare_change(self, change: Change, manifest: Manifest) -> None:
        """The image as in the manifest becomes visible next: do what needs the key that comes."""

    def finish_change(self, change: Change, manifest: Manifest) -> bool:
        """The image is that of the manifest now; whether the rules of release name measurements of their own."""

    def undo_change(self, image_id: str) -> None:
        """The image has not changed; no error where nothing is under way."""

    def changes(self) -> Sequence[Change]:
        """Those that are under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """What came of a change."""

    before: Manifest
    after: Manifest
    rules_measure: bool
    """Whether the rules of release name measurements of their own, which stay allowed."""
    handed_over: bool
    """Whether the owner's broker has to take the change over first."""


class VolumeService:
    """Adds data volumes to images, and takes them away.

    Args:
        store: the images.
        keys: the key store.
        broker_spki_sha256: what guests pin.
        workers: processes that encrypt.
    """

    def __init__(self, store: ImageStore, keys: ChangePort, *, broker_spki_sha256: bytes, workers: int) -> None:
        self._store, self._keys = store, keys
        self._spki, self._workers = broker_spki_sha256, workers

    async def add(
        self, name: str, volume: VolumeRequest, by: str, progress: Callable[[Progress], None]
    ) -> Changed:
        """Give the guests of an image one more data volume. Cancelling ends the worker and changes nothing.

        The image must not be in use meanwhile: whoever calls keeps domains from starting from it.

        Args:
            name: of the image.
            volume: what it is to be.
            by: who asks, for the audit log.
            progress: called in the event loop's thread.

        Raises:
            NotFound: there is no such image, or its keys are not here.
            AlreadyExists, InvalidArgument, NotSupported: it cannot have that volume.
            ReleaseRefused: its keys are revoked.
            ImageDamaged, VolumeError, NoKernel, NoSpace, JindiskError: as of `volume_change.change`.
        """
        image = await finished(lambda: self._store.get(name))
        request = with_volume(image.manifest, volume)
        change = Change(
            image_id=image.manifest.image_id, added=resource_of(image.manifest.image_id, volume.name), by=by
        )
        with Secret.random(KEY_BYTES) as key:
            return await self._change(image, request, change, {volume.name: key}, progress)

    async def remove(
        self, name: str, volume: str, by: str, progress: Callable[[Progress], None]
    ) -> Changed:
        """Take a data volume from an image, and delete its disk and its key for good; as `add`.

        Raises:
            NotFound: there is no such image or volume. Others as `add`.
        """
        image = await finished(lambda: self._store.get(name))
        request = without_volume(image.manifest, volume)
        change = Change(
            image_id=image.manifest.image_id, removed=resource_of(image.manifest.image_id, volume), by=by
        )
        return await self._change(image, request, change, {}, progress)

    async def settle(self, images: Mapping[str, Manifest]) -> None:
        """Finish what a crash left, or take it back; `images` are those of the store, by their ids."""
        for change in await finished(self._keys.changes):
            manifest = images.get(change.image_id)
            if manifest is None:
                continue  # another service's, on the same key store
            there = {volume.resource for volume in manifest.volumes}
            if (change.added in there) if change.added else (change.removed not in there):
                await finished(partial(self._keys.finish_change, change, manifest))
                log.info("a change of volumes was finished", image=manifest.name)
            else:
                await finished(partial(self._keys.undo_change, change.image_id))
                log.info("a change of volumes was taken back", image=manifest.name)

    async def _change(
        self,
        image: StoredImage,
        request: BuildRequest,
        change: Change,
        keys: Mapping[str, Secret],
        progress: Callable[[Progress], None],
    ) -> Changed:
        before, begun = image.manifest, []
        released_to = await finished(lambda: self._keys.released_to(before))
        change = replace(change, before=released_to)
        names = list(keys)
        staging = await finished(self._store.stage)

        def begin() -> None:
            self._keys.begin_change(change, keys[names[0]] if names else None)
            begun.append(change)

        try:
            with contextlib.ExitStack() as stack:
                await finished(begin)
                given = {"volumes": stack.enter_context(joined(keys, names))}
                anchor = b""
                if names and needs_modules(before, request.volumes[-1].format):
                    taken = await finished(lambda: self._keys.take(change.image_id, change.by, ROOT_READ))
                    stack.callback(taken.close)
                    given["source-key"] = taken.keys[before.resource]
                    known = taken.anchors.get(before.volume.uuid)
                    anchor = known.pack() if known is not None else b""
                task = VolumesTask(
                    build=BuildTask(
                        request=request,
                        image_id=before.image_id,
                        created=before.created,
                        broker_spki_sha256=self._spki,
                        staging=os.fspath(staging.path),
                        workers=self._workers,
                    ),
                    source=os.fspath(image.path),
                    added=names[0] if names else "",
                    anchor=anchor,
                    released_to=released_to,
                )
                await run_worker(task, given, {}, progress)
            after, rules_measure = await decided(lambda: self._exchange(staging, change, before))
        except BaseException:
            if begun:
                await finished(lambda: self._keys.undo_change(change.image_id))
            raise
        finally:
            await finished(staging.close)
        told = {"launch_digest": after.launch_digest.hex(), "simulated": after.platform.simulated}
        log.info("volumes of an image changed", image=before.name, image_id=before.image_id, **told)
        return Changed(
            before=before, after=after, rules_measure=rules_measure, handed_over=self._keys.hands_over
        )

    def _exchange(self, staging: Staging, change: Change, before: Manifest) -> tuple[Manifest, bool]:
        """Exchange the image, then have the key store follow; where that fails, exchange it back."""
        self._keys.prepare_change(change, staging.manifest(before.name))
        after = self._store.replace(staging, before.name).manifest
        try:
            return after, self._keys.finish_change(change, after)
        except BaseException:
            self._store.replace(staging, before.name)
            raise
