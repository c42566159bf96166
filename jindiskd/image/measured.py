"""What the guests of an image are told: read from its initrd, once all of it is what its keys are released to.

Whatever makes an image anew from one in the store begins with that: `open_source`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jindiskd.attest import measure
from jindiskd.base import document
from jindiskd.errors import NotSupported
from jindiskd.guest import config as guest
from jindiskd.guest.config import GuestConfig
from jindiskd.image import manifest as manifests
from jindiskd.image.cpio import Archive, MalformedArchive
from jindiskd.image.measurement import inputs_of
from jindiskd.image.request import CloneTask, InitrdKind, Progress, Report, VolumesTask
from jindiskd.image.store import INITRD, ImageDamaged, StoredImage, read_manifest, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An image that another is made from, and where."""

    image: StoredImage
    archive: Archive
    """Its initrd."""
    config: GuestConfig
    """What its guests are told."""
    staging: Path
    """Where the other is made."""


def open_source(task: CloneTask | VolumesTask, report: Report) -> Source:
    """Begin to make an image from the one that a task names; raises as `measured_config`."""
    report(Progress(stage="prepare", fraction=None))
    path = Path(task.source)
    image = StoredImage(path=path, manifest=read_manifest((path / manifests.FILE).read_bytes(), path.name))
    archive, config = measured_config(image, task.released_to)
    return Source(image=image, archive=archive, config=config, staging=Path(task.build.staging))


def measured_config(source: StoredImage, released_to: tuple[bytes, ...]) -> tuple[Archive, GuestConfig]:
    """The initrd of an image and the configuration in it, once all of it is what its key is released to.

    Raises:
        ImageDamaged: it is not.
        NotSupported: the initrd is not ours, but the system's own. MalformedDocument: its configuration is none.
    """
    manifest = source.manifest
    if manifest.initrd_kind != InitrdKind.OWN:
        # That has the configuration in the root file system too, where its system makes initramfs images.
        what = f"cloning or changing image {manifest.name!r}, which starts with its system's own initramfs,"
        raise NotSupported(what, "build it again from its base under another name")
    verify(source)
    if manifest.launch_digest:
        found = measure.launch_digest(manifest.platform.tee, inputs_of(source))
        if found not in released_to:
            raise ImageDamaged(manifest.name, f"it measures as {found.hex()}, to which its key is not released")
    try:
        archive = Archive.read((source.path / INITRD).read_bytes())
    except MalformedArchive as exc:
        raise ImageDamaged(manifest.name, "its initrd is no archive of ours") from exc
    entry = archive.entries.get(guest.PATH)
    data = entry.data if entry is not None else b""
    config = document.load(GuestConfig, data, document="the guest's configuration")
    if (config.schema, config.image_id, config.root.resource) != (guest.SCHEMA, manifest.image_id, manifest.resource):
        raise ImageDamaged(manifest.name, "its initrd is that of another image")
    if [one.resource for one in config.volumes] != [one.resource for one in manifest.volumes]:
        raise ImageDamaged(manifest.name, "its manifest names other volumes than its initrd")
    return archive, config
