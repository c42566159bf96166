"""New kernel and initramfs for an image that starts by its system's own: as that system made them for itself.

The files in the store change, and what the image measures as. To whom its key is released does not: that the owner of
the key decides, by a policy that names the new digest.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from jindiskd.attest import measure
from jindiskd.base import document
from jindiskd.base.files import fsync_directory, replace_file
from jindiskd.errors import InvalidArgument, NotSupported
from jindiskd.image import manifest as manifests
from jindiskd.image import system_initrd
from jindiskd.image.kernel import MAX_KERNEL_BYTES, RELEASE
from jindiskd.image.manifest import BootFile, Manifest
from jindiskd.image.measurement import inputs_of
from jindiskd.image.request import InitrdKind
from jindiskd.image.store import CMDLINE, DISK, INITRD, KERNEL, StoredImage

_PIECE = 1 << 20


def stage(image: StoredImage, directory: Path, kernel_fd: int, initrd_fd: int) -> Manifest:
    """Make the image anew in `directory`, with another kernel and initramfs and the same disk; all of it synced.

    Args:
        image: one that was built with the system's own initramfs.
        directory: empty, on the store's file system.
        kernel_fd: a regular file.
        initrd_fd: a regular file; made by the image's own system, so that it holds the configuration.

    Raises:
        NotSupported: the image starts by our own initrd.
        InvalidArgument: a file is empty or beyond all size.
        InitramfsRefused: it does not have the agent.
    """
    old = image.manifest
    if old.initrd_kind != InitrdKind.SYSTEM:
        text = "build it again from a base that has the kernel, or with the system's own initramfs"
        raise NotSupported(f"another kernel for image {old.name!r}, which starts by our own initrd", text)
    kernel = _copy(kernel_fd, directory / KERNEL, "kernel", MAX_KERNEL_BYTES)
    initrd = _copy(initrd_fd, directory / INITRD, "initramfs", system_initrd.MAX_BYTES)
    knows = system_initrd.require_agent(directory / INITRD, "the file given", volumes=bool(old.volumes))
    replace_file(directory / CMDLINE, (image.path / CMDLINE).read_bytes(), 0o644)
    os.link(image.disk, directory / DISK)
    for volume in old.volumes:
        os.link(image.volume_disk(volume), directory / volume.file)
    new = replace(
        old,
        kernel=kernel,
        initrd=initrd,
        kernel_release=release_of(directory / KERNEL) or old.kernel_release,
        finds_root=knows,
    )
    if old.launch_digest:
        digest = measure.launch_digest(old.platform.tee, inputs_of(StoredImage(path=directory, manifest=new)))
        new = replace(new, launch_digest=digest, id_block=b"", id_auth=b"")  # it was signed for the other digest
    replace_file(directory / manifests.FILE, document.dump(new), 0o644)
    fsync_directory(directory)
    return new


def release_of(kernel: Path) -> str:
    """The release that a kernel for x86 says it is (Documentation/arch/x86/boot.rst, `kernel_version`), or nothing."""
    with kernel.open("rb") as stream:
        head = stream.read(0x8000)
    if head[0x202:0x206] != b"HdrS":
        return ""
    at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    word = re.split(rb"[\0 ]", head[at : at + 128], maxsplit=1)[0].decode("ascii", errors="replace")
    return word if at > 0x200 and RELEASE.fullmatch(word) else ""


def _copy(fd: int, target: Path, what: str, limit_bytes: int) -> BootFile:
    size, state = 0, hashlib.sha256()
    with target.open("xb") as out:
        while piece := os.pread(fd, _PIECE, size):
            size += len(piece)
            if size > limit_bytes:
                break
            state.update(piece)
            out.write(piece)
        out.flush()
        os.fchmod(out.fileno(), 0o644)
        os.fsync(out.fileno())
    if not 0 < size <= limit_bytes:
        raise InvalidArgument(f"length of the {what}", size, f"it has 1 to {limit_bytes} bytes")
    return BootFile(file=target.name, size_bytes=size, sha256=state.digest())
