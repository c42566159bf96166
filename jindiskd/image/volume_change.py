"""Adding a data volume to an image that exists, and taking one away. Runs in a worker process.

The image is made anew in a staging directory: its disks are linked, not copied, and nothing is written to them; the
configuration of its guests names other volumes, so that the initrd is another and the image measures otherwise. The
agent in that initrd is this installation's, since an older one may not know what it is told; its kernel modules are
those that it had. Where the new volume needs others, they are read from the root, which is decrypted for that.

Killed at any step, only the staging directory is left: the image changes when the store exchanges the two.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from jindiskd.base import document, files
from jindiskd.base.secret import Secret
from jindiskd.errors import NotSupported
from jindiskd.guest.config import GuestConfig
from jindiskd.image import data_volumes, disk, initrd
from jindiskd.image import kernel as kernels
from jindiskd.image import manifest as manifests
from jindiskd.image.cpio import Archive
from jindiskd.image.data_volumes import Keys
from jindiskd.image.debugfs import FileSystem
from jindiskd.image.manifest import Manifest
from jindiskd.image.measured import open_source
from jindiskd.image.measurement import launch_digest
from jindiskd.image.reading import read_root
from jindiskd.image.request import Progress, Report, Share, VolumeFormat, VolumesTask, shares
from jindiskd.image.sparse import unlinked_file
from jindiskd.image.store import CMDLINE, DISK, INITRD, KERNEL, StoredImage

LUKS2 = VolumeFormat.LUKS2


def needs_modules(manifest: Manifest, form: VolumeFormat) -> bool:
    """Whether a volume of a format needs kernel modules that the initrd of an image does not have."""
    return form.value not in {manifest.volume.format, *(volume.volume.format for volume in manifest.volumes)}


def change(task: VolumesTask, root_key: Secret | None, volume_keys: Keys, report: Report) -> Manifest:
    """Make the image that `task` describes in its staging directory.

    Args:
        task: what the service decided.
        root_key: of the root, where `needs_modules` says that it must be read.
        volume_keys: of the new volume, by its name.
        report: called with progress.

    Raises:
        ImageDamaged: the image is not what was built, or measures otherwise than its keys are released to.
        VolumeError, Luks2HeaderRefused, WrongKey: its root cannot be read.
        NotSupported: its keys come from a program, which knows no states of JinDisk 2 volumes.
        NoKernel, ModulesUnusable: its kernel lacks a module that the volume needs.
        NoSpace: the file system is full.
    """
    with files.space_for(Path(task.build.staging)), ExitStack() as stack:
        return _change(task, root_key, volume_keys, report, stack)


def _change(
    task: VolumesTask, root_key: Secret | None, volume_keys: Keys, report: Report, stack: ExitStack
) -> Manifest:
    build, request = task.build, task.build.request
    opened = open_source(task, report)
    source, config, staging = opened.image, opened.config, opened.staging
    program = _key_program(opened.archive)
    if program is not None and any(one.name == task.added and one.format is not LUKS2 for one in request.volumes):
        text = f"choose format {LUKS2}: JinDisk 2 needs the broker, which remembers the volume's state"
        raise NotSupported(f"a volume of another format for image {request.name!r}, whose keys a program gives,", text)
    names = {volume.name for volume in request.volumes}
    kept = tuple(volume for volume in source.manifest.volumes if volume.name in names)
    alone = dataclasses.replace(request, volumes=tuple(one for one in request.volumes if one.name == task.added))
    new = data_volumes.prepare(dataclasses.replace(build, request=alone), volume_keys, int(time.time()), stack)
    told = tuple(volume for volume in config.volumes if volume.name in names)
    config = dataclasses.replace(config, volumes=(*told, *(one.config for one in new)))
    modules = initrd.modules_of(opened.archive, config)
    if root_key is not None:
        modules = _modules(task, source, config, root_key, shares(report, "decrypt"))
    report(Progress(stage="boot", fraction=None))
    _, made = initrd.make_initrd(config, modules, program)
    files.replace_file(staging / INITRD, made.to_gzip(), 0o644)
    unchanged = [DISK, KERNEL, CMDLINE, *(volume.file for volume in kept)]
    for name in unchanged:
        os.link(source.path / name, staging / name)
    written = tuple(one.write(staging, shares(report, "encrypt")) for one in new)
    report(Progress(stage="finish", fraction=None))
    manifest = dataclasses.replace(
        source.manifest,
        initrd=disk.boot_file(staging, INITRD),
        launch_digest=launch_digest(request, staging, (staging / CMDLINE).read_text(encoding="ascii")),
        volumes=(*kept, *written),
        finds_root=True,
        id_block=b"",  # it was signed for the other digest
        id_auth=b"",
    )
    files.replace_file(staging / manifests.FILE, document.dump(manifest), 0o644)
    return manifest


def _key_program(archive: Archive) -> bytes | None:
    entry = archive.entries.get(initrd.KEY_PROGRAM)
    return entry.data if entry is not None else None


def _modules(
    task: VolumesTask, source: StoredImage, config: GuestConfig, key: Secret, share: Share
) -> list[tuple[str, bytes]]:
    """The modules that the guest needs now, from its own root, which is read into a file without a name."""
    staging = Path(task.build.staging)
    work, clear = staging / "work", unlinked_file(staging)
    try:
        read_root(source, config, clear, key=key, anchor=task.anchor, workers=task.build.workers, share=share)
        release = source.manifest.kernel_release
        tree = kernels.extract_modules(
            FileSystem(clear), release, work, lambda directory: initrd.wanted_modules(config, directory)
        )
        return initrd.module_files(config, tree)
    finally:
        os.close(clear)
        shutil.rmtree(work, ignore_errors=True)
