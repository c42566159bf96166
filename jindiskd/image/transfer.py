"""Writing an image of the store as a stream, and taking one into it. Runs in a worker process; no key is involved.

A stream is a stranger's: its manifest is vetted first, its parts go to fixed names in the staging directory and fit
their sizes and digests, and what the image measures as is computed again. Killed at any step, only the staging
directory is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jindiskd.attest import measure
from jindiskd.attest.firmware import inspect_firmware
from jindiskd.base import document
from jindiskd.base.files import replace_file, space_for
from jindiskd.errors import AlreadyExists, JindiskError, NotFound
from jindiskd.image import manifest as manifests
from jindiskd.image import vetting
from jindiskd.image.manifest import Manifest
from jindiskd.image.measurement import inputs_of
from jindiskd.image.request import ExportTask, ImportTask, Progress, Report, check_name
from jindiskd.image.sparse import data_ranges
from jindiskd.image.store import (
    DISK,
    ImageDamaged,
    ImageStore,
    StoredImage,
    read_manifest,
    verify,
)
from jindiskd.image.stream import SCHEMA, Header, Part, Reader, StreamDamaged, Writer


class _Share:
    """Progress of a stage by bytes."""

    def __init__(self, report: Report, stage: str, total: int) -> None:
        self._report, self._stage, self._total, self._done = report, stage, total, 0

    def __call__(self, count: int) -> None:
        self._done += count
        fraction = min(1.0, self._done / self._total) if self._total else None
        self._report(
            Progress(stage=self._stage, fraction=fraction, done_bytes=self._done, total_bytes=self._total)
        )


def parts_of(manifest: Manifest) -> tuple[Part, ...]:
    """The files of an image, in the order of a stream."""
    boot = (manifest.kernel, manifest.initrd, manifest.cmdline)
    parts = [Part(name=entry.file, size_bytes=entry.size_bytes) for entry in boot]
    disks = [Part(name=DISK, size_bytes=manifest.disk_size_bytes)]
    disks += [Part(name=volume.file, size_bytes=volume.disk_size_bytes) for volume in manifest.volumes]
    return (*parts, *disks)


def export(task: ExportTask, target_fd: int, report: Report) -> str:
    """Write the image that `task` names to a descriptor; returns the stream's SHA-256, hexadecimal.

    Raises:
        ImageDamaged: a boot file is not what was built, or the disk has another length.
        StreamDamaged, StreamNotWritten, OSError: reading or writing failed.
    """
    path = Path(task.source)
    report(Progress(stage="read", fraction=None))
    image = StoredImage(path=path, manifest=read_manifest((path / manifests.FILE).read_bytes(), path.name))
    verify(image)
    parts = parts_of(image.manifest)
    with contextlib.ExitStack() as stack:
        opened = []
        for part in parts:
            fd = os.open(path / part.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            opened.append((part, fd))
        total = sum(length for part, fd in opened for _, length in data_ranges(fd, 0, part.size_bytes))
        share = _Share(report, "write", total)
        share(0)  # who takes it may let us wait for its first byte
        writer = Writer(target_fd)
        writer.header(Header(schema=SCHEMA, manifest=image.manifest, parts=parts))
        for part, fd in opened:
            writer.part(fd, part.size_bytes, share)
        writer.end()
    with contextlib.suppress(OSError):  # a pipe has nothing to be synced
        os.fsync(target_fd)
    return writer.digest.hex()


def import_(task: ImportTask, source_fd: int, report: Report) -> Manifest:
    """Take a stream into the staging directory of `task`.

    Raises:
        StreamDamaged, MalformedDocument: it is not what it should be; says what.
        StreamSilent: nothing came for the time that the task allows.
        InvalidArgument: the name is none.
        AlreadyExists: an image of that name or identity is in the store.
        NotFound: the image's firmware is not on this host.
        ImageDamaged: the image measures otherwise than it says.
        NoSpace: the file system is full.
    """
    with space_for(Path(task.staging)):
        return _import(task, source_fd, report)


def _import(task: ImportTask, source_fd: int, report: Report) -> Manifest:
    staging = Path(task.staging)
    report(Progress(stage="read", fraction=None))
    reader = Reader(source_fd, idle_s=task.idle_s)
    header = reader.header()
    wrong = tuple(vetting.faults(header.manifest))
    if wrong:
        raise StreamDamaged(f"has a manifest that cannot be used ({'; '.join(wrong)})")
    manifest = header.manifest
    if header.parts != parts_of(manifest):
        raise StreamDamaged("has other parts than its manifest names")
    name = task.name or manifest.name
    check_name(name)
    store = ImageStore(Path(task.store))
    store.require_free(name)
    for other in store.list():
        if other.manifest.image_id == manifest.image_id:
            raise AlreadyExists("image", f"{other.manifest.name} (the same image, {manifest.image_id})")
    firmware = _firmware(manifest, task)
    shape = dataclasses.replace(manifest.shape, firmware=os.fspath(firmware))
    manifest = dataclasses.replace(manifest, name=name, shape=shape)
    share = _Share(report, "receive", 0)
    for part in header.parts:
        _receive(reader, part, staging / part.name, share)
    reader.end()
    report(Progress(stage="measure", fraction=None))
    image = StoredImage(path=staging, manifest=manifest)
    verify(image)
    if manifest.launch_digest:
        found = measure.launch_digest(manifest.platform.tee, inputs_of(image))
        if found != manifest.launch_digest:
            raise ImageDamaged(name, f"it measures as {found.hex()} instead of {manifest.launch_digest.hex()}")
    report(Progress(stage="finish", fraction=None))
    replace_file(staging / manifests.FILE, document.dump(manifest))
    return manifest


def _receive(reader: Reader, part: Part, path: Path, share: Callable[[int], None]) -> None:
    """Write a part to a new file, synced. Boot files have no holes: their digests are checked with the image."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.truncate(fd, part.size_bytes)
        for offset, data in reader.part(part):
            view, at = memoryview(data), offset
            while view:
                count = os.pwrite(fd, view, at)
                view, at = view[count:], at + count
            share(len(data))
        os.fchmod(fd, 0o644)
        os.fsync(fd)
    finally:
        os.close(fd)


def _firmware(manifest: Manifest, task: ImportTask) -> Path:
    """The image's firmware on this host, by its digest; only where callers may name one is looked.

    Raises:
        NotFound: it is not there.
    """
    for path in _candidates(manifest, task):
        with contextlib.suppress(OSError, JindiskError):
            if inspect_firmware(path).sha256 == manifest.shape.firmware_sha256:
                return path
    digest = manifest.shape.firmware_sha256.hex()
    raise NotFound("firmware with SHA-256", f"{digest} (on the builder's machine {manifest.shape.firmware})")


def _candidates(manifest: Manifest, task: ImportTask) -> Iterator[Path]:
    yield from map(Path, task.firmware)
    places = [Path(place) for place in task.firmware_dirs]
    named = Path(manifest.shape.firmware)
    # By a path on which no link is somebody else's: it goes into the manifest, and is opened again at each start.
    kept = named.parent.resolve() / named.name
    inside = [any(one.is_relative_to(place) for place in places) for one in (kept, named.resolve())]
    if named.is_absolute() and all(inside):
        yield kept
    for place in places:
        yield place / named.name
