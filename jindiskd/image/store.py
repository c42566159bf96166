"""The image store: a directory with one directory an image. What is visible in it is whole.

::

    <root>/
      .lock                     held by the one process that owns the store
      .staging-<random>/        an image being built; its builder holds a lock on the directory
      .removed-<random>/        an image being removed
      <name>/                   an image
        manifest.json           what it is; the last file written
        disk.img  vmlinuz  initrd  cmdline

After a crash: during a build, a `.staging-*` directory with cipher text, a kernel and an initrd, never clear text of
the root, which lives in unlinked files only; during a removal, a `.removed-*` directory. `clean` removes both. A rename
decides: an image is there with all its files synced, or not at all. The manifest is believed as far as its form; that
files fit their recorded digests is for `verify`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from jindiskd.base import document
from jindiskd.base.files import exchange, fsync_directory, rename_new, replace_file
from jindiskd.errors import EXIT_INTEGRITY, AlreadyExists, Busy, JindiskError, NotFound
from jindiskd.image import manifest as manifests
from jindiskd.image.manifest import DataVolume, Manifest
from jindiskd.image.request import NAME, check_name

log = structlog.get_logger(__name__)
DISK, KERNEL, INITRD, CMDLINE = "disk.img", "vmlinuz", "initrd", "cmdline"
STAGING_PREFIX, REMOVED_PREFIX = ".staging-", ".removed-"


class ImageDamaged(JindiskError, code="ImageDamaged", exit_code=EXIT_INTEGRITY):
    """A file of an image in the store is not what its manifest says."""

    def __init__(self, name: str, problem: str) -> None:
        """`name` is the image's, `problem` says what is wrong."""
        super().__init__(f"image {name!r} is damaged, {problem}: remove it and build it again")
        self.problem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """An image in the store."""

    path: Path
    manifest: Manifest

    @property
    def disk(self) -> Path:
        """The disk image, raw."""
        return self.path / DISK

    def volume_disk(self, volume: DataVolume) -> Path:
        """The disk image of a data volume, raw."""
        return self.path / volume.file


class Staging:
    """A directory for one image being made; gone with its content unless it was committed."""

    def __init__(self, path: Path) -> None:
        """Make and lock it; `ImageStore.staging` calls this."""
        path.mkdir(mode=0o700)
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def manifest(self, name: str) -> Manifest:
        """The manifest of the finished image `name` in it; raises as `read_manifest`."""
        return read_manifest((self.path / manifests.FILE).read_bytes(), name)

    def close(self) -> None:
        """Drop the lock and whatever is still there under this name."""
        os.close(self._fd)
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)


class ImageStore:
    """The images below one directory. Methods block on the file system: call them off the event loop.

    Args:
        root: the directory; made if it is not there.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o755)
        self.root = root

    def list(self) -> list[StoredImage]:
        """All images by name. One that cannot be read is logged and left out."""
        found = []
        for path in sorted(self.root.iterdir()):
            if NAME.fullmatch(path.name) and path.is_dir():
                try:
                    found.append(self.get(path.name))
                except (JindiskError, OSError) as exc:
                    log.warning("an image cannot be read", image=path.name, reason=str(exc))
        return found

    def get(self, name: str) -> StoredImage:
        """The image of that name.

        Raises:
            NotFound: there is none.
            MalformedDocument, ImageDamaged: its manifest is not one of that name.
        """
        check_name(name)
        path = self.root / name
        try:
            data = (path / manifests.FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise NotFound("image", name) from exc
        found = read_manifest(data, name)
        return StoredImage(path=path, manifest=found)

    def require_free(self, name: str) -> None:
        """Refuse a name that cannot be or is taken.

        Raises:
            InvalidArgument, AlreadyExists: as said.
        """
        check_name(name)
        if (self.root / name).exists():
            raise AlreadyExists("image", name)

    def stage(self) -> Staging:
        """A new locked directory to make an image in, on the store's file system; close it in any case."""
        return Staging(self.root / f"{STAGING_PREFIX}{secrets.token_hex(8)}")

    def commit(self, staging: Staging, name: str) -> StoredImage:
        """Make a finished image visible under its name, all at once and durably.

        The files must be synced already. What is in the directory must be an image of that name.

        Raises:
            AlreadyExists: the name is taken; nothing was changed.
        """
        check_name(name)
        found = staging.manifest(name)
        known = {DISK, KERNEL, INITRD, CMDLINE, manifests.FILE, *(volume.file for volume in found.volumes)}
        for entry in staging.path.iterdir():
            if entry.name not in known:
                raise ImageDamaged(name, f"there is an unexpected {entry.name}")
        staging.path.chmod(0o755)
        fsync_directory(staging.path)
        try:
            rename_new(staging.path, self.root / name)
        except OSError as exc:
            if isinstance(exc, FileExistsError) or (self.root / name).exists():
                raise AlreadyExists("image", name) from exc
            raise
        return StoredImage(path=self.root / name, manifest=found)

    def replace(self, staging: Staging, name: str) -> StoredImage:
        """Put a finished image in the place of the one of its name, all at once and durably.

        The files must be synced already. The old image's files are the staging directory's from then on.

        Raises:
            NotFound: there is none of that name.
        """
        self.get(name)
        found = staging.manifest(name)
        staging.path.chmod(0o755)
        fsync_directory(staging.path)
        exchange(staging.path, self.root / name)
        return StoredImage(path=self.root / name, manifest=found)

    def rewrite(self, manifest: Manifest) -> None:
        """Put another manifest in the place of an image's, all at once and durably; its files stay as they are.

        Raises:
            NotFound: there is no such image, or it has been built anew meanwhile.
        """
        image = self.get(manifest.name)
        if image.manifest.image_id != manifest.image_id:
            raise NotFound("image", f"{manifest.name} ({manifest.image_id})")
        replace_file(image.path / manifests.FILE, document.dump(manifest), 0o644)

    def remove(self, name: str) -> None:
        """Remove an image: invisible at once, its room freed before this returns.

        Raises:
            NotFound: there is none.
        """
        check_name(name)
        if not (self.root / name).is_dir():
            raise NotFound("image", name)
        grave = self.root / f"{REMOVED_PREFIX}{secrets.token_hex(8)}"
        rename_new(self.root / name, grave)
        shutil.rmtree(grave)

    def clean(self) -> tuple[str, ...]:
        """Remove what crashes left, but no directory that a living builder has locked. Returns the names removed."""
        removed = []
        for path in sorted(self.root.iterdir()):
            if not path.name.startswith((STAGING_PREFIX, REMOVED_PREFIX)):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            finally:
                os.close(fd)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
            log.info("removed what an interrupted operation left", path=str(path))
        return tuple(removed)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Be the one process that changes the store.

        Raises:
            Busy: another process is.
        """
        fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise Busy(f"the image store {self.root}", "another service uses it; stop that first") from exc
            yield
        finally:
            os.close(fd)


def read_manifest(data: bytes, name: str) -> Manifest:
    """A manifest of the image `name`.

    Raises:
        MalformedDocument: not a manifest.
        ImageDamaged: of another schema or another image.
    """
    found = document.load(Manifest, data, document=f"manifest of image {name!r}")
    if found.schema not in manifests.READABLE:
        raise ImageDamaged(name, f"its manifest has schema {found.schema} instead of {manifests.SCHEMA}")
    if found.schema != manifests.SCHEMA:
        found = replace(found, schema=manifests.SCHEMA)
    if found.name != name:
        raise ImageDamaged(name, f"its manifest is that of {found.name!r}")
    return found


def verify(image: StoredImage) -> None:
    """Compare the boot files with the digests in the manifest, and the disks with their lengths.

    Raises:
        ImageDamaged: one differs.
    """
    name = image.manifest.name
    for entry in (image.manifest.kernel, image.manifest.initrd, image.manifest.cmdline):
        with (image.path / entry.file).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()
        if digest != entry.sha256:
            raise ImageDamaged(name, f"{entry.file} is not what was built")
    sizes = {DISK: image.manifest.disk_size_bytes}
    for volume in image.manifest.volumes:
        sizes[volume.file] = volume.disk_size_bytes
    for file, size_bytes in sizes.items():
        try:
            found = (image.path / file).stat().st_size
        except FileNotFoundError as exc:
            raise ImageDamaged(name, f"{file} is missing") from exc
        if found != size_bytes:
            raise ImageDamaged(name, f"{file} has another length than was built")
