"""What the guests of an image are told: read from its initrd, once all of it is what its keys are released to."""

from __future__ import annotations

from jindiskd.attest import measure
from jindiskd.base import document
from jindiskd.errors import NotSupported
from jindiskd.guest import config as guest
from jindiskd.guest.config import GuestConfig
from jindiskd.image.cpio import Archive, MalformedArchive
from jindiskd.image.measurement import inputs_of
from jindiskd.image.request import InitrdKind
from jindiskd.image.store import INITRD, ImageDamaged, StoredImage, verify


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
