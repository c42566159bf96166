"""Cloning an image: the same system on a disk, under a key and with an identity of its own. Runs in a worker process.

Two images with one key would share what is released and what is fresh; so a clone is encrypted anew throughout, and no
key of the source's opens anything of it. Kernel, command line and agent are the source's, byte for byte; the measured
configuration in the initrd names the new image and volume, so that the clone measures otherwise than its source.

As with a build, clear text is kept in unlinked files only, and a kill leaves a staging directory alone.
What a system knows of itself (host name, machine id, SSH host keys) is the source's: that is for whoever uses it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from jindiskd.base import document, files
from jindiskd.base.secret import Secret
from jindiskd.guest import config as guest
from jindiskd.guest.config import GuestConfig
from jindiskd.image import data_volumes, disk
from jindiskd.image import manifest as manifests
from jindiskd.image.data_volumes import Keys
from jindiskd.image.manifest import Manifest
from jindiskd.image.measured import open_source
from jindiskd.image.measurement import launch_digest
from jindiskd.image.reading import read_data, read_root
from jindiskd.image.request import BuildTask, CloneTask, Progress, Report, resource_of, shares
from jindiskd.image.sparse import block_ranges, unlinked_file
from jindiskd.image.store import CMDLINE, INITRD, KERNEL
from jindiskd.image.volume import Expectation, prepare_volume


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CloneKeys:
    """What a clone is made with: the keys of the source, and new ones."""

    source: Secret
    new: Secret
    """Which the broker will release to the clone's guests."""
    source_volumes: Keys
    new_volumes: Keys


def clone(task: CloneTask, keys: CloneKeys, report: Report) -> Manifest:
    """Clone the image that `task` names into its staging directory.

    Args:
        task: what the service decided.
        keys: of the source and of the clone.
        report: called with progress.

    Raises:
        ImageDamaged: the source is not what was built, or measures otherwise than its key is released to.
        VolumeError, Luks2HeaderRefused, WrongKey: its disk is not what it should be, or not in its last known state.
        NoSpace: the file system is full.
    """
    with files.space_for(Path(task.build.staging)), ExitStack() as stack:
        return _clone(task, keys, report, stack)


def _clone(task: CloneTask, keys: CloneKeys, report: Report, stack: ExitStack) -> Manifest:
    build, request = task.build, task.build.request

    def owned(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    opened = open_source(task, report)
    source, config, staging = opened.image, opened.config, opened.staging
    decrypted, encrypted = shares(report, "decrypt"), shares(report, "encrypt")
    clear = owned(unlinked_file(staging))
    size = read_root(
        source, config, clear, key=keys.source, anchor=task.anchor, workers=build.workers, share=decrypted
    )
    contents = {}
    for one in config.volumes:
        contents[one.name] = owned(unlinked_file(staging))
        read_data(
            source,
            one,
            contents[one.name],
            key=keys.source_volumes[one.name],
            anchor=task.volume_anchors.get(one.name, b""),
            workers=build.workers,
            share=decrypted,
        )
    report(Progress(stage="boot", fraction=None))
    now = int(time.time())
    volume = stack.enter_context(prepare_volume(build, keys.new, size, now))
    volumes = data_volumes.prepare(build, keys.new_volumes, now, stack, contents)
    for name in (KERNEL, CMDLINE):
        shutil.copyfile(source.path / name, staging / name)
    new_config = _renamed(config, build, volume.expected, volumes)
    initrd = opened.archive.replaced(guest.PATH, document.dump(new_config))
    files.replace_file(staging / INITRD, initrd.to_gzip())
    digest = launch_digest(request, staging, (staging / CMDLINE).read_text(encoding="ascii"))
    layout = disk.lay_out(staging, volume, request.stream("identities"), time=now, owned=owned)
    ranges = block_ranges(clear, 0, size)
    sealed = disk.write_disk(staging, layout, lambda fd, offset: volume.fill(clear, fd, ranges, offset, encrypted))
    written = tuple(one.write(staging, encrypted) for one in volumes)
    report(Progress(stage="finish", fraction=None))
    manifest = dataclasses.replace(
        source.manifest,
        image_id=build.image_id,
        name=request.name,
        created=build.created,
        disk_size_bytes=layout.size_bytes,
        partitions=layout.partitions,
        volume=sealed,
        kernel=disk.boot_file(staging, KERNEL),
        initrd=disk.boot_file(staging, INITRD),
        cmdline=disk.boot_file(staging, CMDLINE),
        launch_digest=digest,
        broker_spki_sha256=build.broker_spki_sha256,
        resource=resource_of(build.image_id),
        seeded=False,
        clone_of=source.manifest.image_id,
        volumes=written,
        id_block=b"",
        id_auth=b"",
    )
    files.replace_file(staging / manifests.FILE, document.dump(manifest))
    return manifest


def _renamed(
    config: GuestConfig, build: BuildTask, expected: Expectation, volumes: Sequence[data_volumes.Prepared]
) -> GuestConfig:
    """The configuration for another image and other volumes, whose keys this broker has."""
    root = dataclasses.replace(
        config.root,
        resource=resource_of(build.image_id),
        luks2=expected if isinstance(expected, guest.Luks2Expectation) else None,
        jindisk=expected if isinstance(expected, guest.JindiskExpectation) else None,
        jindisk1=expected if isinstance(expected, guest.Jindisk1Expectation) else None,
    )
    broker = dataclasses.replace(config.broker, spki_sha256=build.broker_spki_sha256)
    others = tuple(
        dataclasses.replace(
            old, resource=new.config.resource, luks2=new.config.luks2, jindisk=new.config.jindisk
        )
        for old, new in zip(config.volumes, volumes, strict=True)
    )
    return dataclasses.replace(config, image_id=build.image_id, root=root, broker=broker, volumes=others)
