"""Judging a manifest that somebody else made, before anything is done by it.

A manifest of our own store is ours. One from a stream is a stranger's: every value is bounded here, and what is shown
to people is printable, so that nothing in it can reach another file, fill the memory, or steer a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

from jindiskd.attest import guest_policy
from jindiskd.attest.measure import MAX_VCPUS
from jindiskd.base.anchor import ANCHOR_BYTES
from jindiskd.errors import InvalidArgument
from jindiskd.guest.config import MAX_VOLUMES
from jindiskd.image import signing
from jindiskd.image.manifest import READABLE, SCHEMA, BootFile, DataVolume, Manifest, Volume
from jindiskd.image.request import MAX_ROOT_BYTES, NAME, BaseKind, DiskBus, VolumeFormat, VolumeRequest, resource_of
from jindiskd.image.store import CMDLINE, INITRD, KERNEL

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
CPU_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TEXT_LIMIT = 200
MAX_CHANGES = 100
MAX_PARTITIONS = 16
MAX_BOOT_FILE_BYTES = 1 << 30
MAX_CMDLINE_BYTES = 1 << 16
MAX_DISK_BYTES = 4 * MAX_ROOT_BYTES
SHA256_BYTES = 32
DIGEST_BYTES = (32, 48)


def faults(manifest: Manifest) -> Iterator[str]:
    """What is wrong with a manifest, in words; nothing for one that can be used."""
    if manifest.schema not in READABLE:
        yield f"schema is {manifest.schema} instead of {SCHEMA}"
    if not NAME.fullmatch(manifest.name):
        yield "name is none that an image can have"
    if not UUID.fullmatch(manifest.image_id):
        yield "image_id is no UUID"
    elif manifest.resource != resource_of(manifest.image_id):
        yield "resource is not that of image_id"
    if manifest.clone_of and not UUID.fullmatch(manifest.clone_of):
        yield "clone_of is no UUID"
    if manifest.disk_bus not in set(DiskBus):
        yield "disk_bus is not known"
    yield from _texts(manifest)
    if manifest.base_kind not in set(BaseKind):
        yield "base_kind is not known"
    for name, digest in (("base_sha256", manifest.base_sha256), ("broker_spki_sha256", manifest.broker_spki_sha256)):
        if len(digest) != SHA256_BYTES:
            yield f"{name} has {len(digest)} bytes instead of {SHA256_BYTES}"
    if len(manifest.launch_digest) not in DIGEST_BYTES:
        yield f"launch_digest has {len(manifest.launch_digest)} bytes"
    yield from _volume("volume", manifest.volume)
    yield from _disk(manifest)
    yield from _volumes(manifest)
    yield from _boot_file("kernel", manifest.kernel, KERNEL, MAX_BOOT_FILE_BYTES)
    yield from _boot_file("initrd", manifest.initrd, INITRD, MAX_BOOT_FILE_BYTES)
    yield from _boot_file("cmdline", manifest.cmdline, CMDLINE, MAX_CMDLINE_BYTES)
    yield from _shape(manifest)


def _shape(manifest: Manifest) -> Iterator[str]:
    shape = manifest.shape
    if len(shape.firmware_sha256) != SHA256_BYTES or not 1 <= shape.vcpus <= MAX_VCPUS:
        yield "shape.firmware_sha256 or shape.vcpus is out of range"
    if not CPU_MODEL.fullmatch(shape.cpu_model) or not 0 <= shape.guest_features < 1 << 64:
        yield "shape.cpu_model or shape.guest_features is out of range"
    if shape.guest_policy is not None and (wrong := guest_policy.problem(shape.guest_policy, manifest.platform.tee)):
        yield f"shape.guest_policy: {wrong}"
    if wrong := signing.problem(manifest):
        yield f"id_block: {wrong}"


def _texts(manifest: Manifest) -> Iterator[str]:
    texts = {
        "distribution": manifest.distribution,
        "shape.firmware": manifest.shape.firmware,
        **{f"changes[{number}]": text for number, text in enumerate(manifest.changes[:MAX_CHANGES])},
    }
    for name, text in texts.items():
        if len(text) > TEXT_LIMIT or not text.isprintable():
            yield f"{name} is no printable text of {TEXT_LIMIT} characters at most"
    if len(manifest.changes) > MAX_CHANGES:
        yield f"changes has {len(manifest.changes)} entries"
    if not WORD.fullmatch(manifest.kernel_release):
        yield "kernel_release is none"
    try:
        aware = datetime.fromisoformat(manifest.created).tzinfo is not None
    except ValueError:
        aware = False
    if not aware:
        yield "created is no time with its zone"


def _volume(name: str, volume: Volume) -> Iterator[str]:
    if volume.format not in set(VolumeFormat):
        yield f"{name}.format is not known"
    if len(volume.cipher) > TEXT_LIMIT or not volume.cipher.isprintable():
        yield f"{name}.cipher is no printable text of {TEXT_LIMIT} characters at most"
    if volume.uuid and not UUID.fullmatch(volume.uuid):
        yield f"{name}.uuid is no UUID"
    if len(volume.anchor) not in {0, ANCHOR_BYTES}:
        yield f"{name}.anchor has {len(volume.anchor)} bytes"
    if not 0 <= volume.header_bytes <= 1 << 30 or len(volume.header_sha256) not in {0, SHA256_BYTES}:
        yield f"{name}.header_bytes or {name}.header_sha256 is out of range"


def _volumes(manifest: Manifest) -> Iterator[str]:
    if len(manifest.volumes) > MAX_VOLUMES:
        yield f"volumes has {len(manifest.volumes)} entries"
    names = [volume.name for volume in manifest.volumes]
    if len(set(names)) != len(names):
        yield "two volumes have one name"
    for number, volume in enumerate(manifest.volumes[:MAX_VOLUMES]):
        yield from _data_volume(f"volumes[{number}]", volume, manifest.image_id)


def _data_volume(what: str, volume: DataVolume, image_id: str) -> Iterator[str]:
    try:
        VolumeRequest(
            name=volume.name,
            size_bytes=volume.size_bytes,
            format=VolumeFormat(volume.volume.format),
            mount=volume.mount,
        ).check()
    except (InvalidArgument, ValueError):
        yield f"{what} has a name, size, format or mount point that none can have"
        return
    if volume.resource != resource_of(image_id, volume.name):
        yield f"{what}.resource is not that of image_id and name"
    if not 0 < volume.disk_size_bytes <= MAX_DISK_BYTES or volume.disk_size_bytes % 512:
        yield f"{what}.disk_size_bytes is {volume.disk_size_bytes}"
    yield from _volume(f"{what}.volume", volume.volume)


def _disk(manifest: Manifest) -> Iterator[str]:
    size = manifest.disk_size_bytes
    if not 0 < size <= MAX_DISK_BYTES or size % 512:
        yield f"disk_size_bytes is {size}"
    if len(manifest.partitions) > MAX_PARTITIONS:
        yield f"partitions has {len(manifest.partitions)} entries"
    at = 0
    for part in manifest.partitions[:MAX_PARTITIONS]:
        if not WORD.fullmatch(part.name) or not UUID.fullmatch(part.uuid) or not UUID.fullmatch(part.type_uuid):
            yield "a partition has an unusable name or identity"
        if part.offset_bytes < at or part.size_bytes < 0 or part.offset_bytes + part.size_bytes > size:
            yield "a partition lies outside the disk, or in another"
        at = part.offset_bytes + part.size_bytes


def _boot_file(name: str, entry: BootFile, file: str, limit_bytes: int) -> Iterator[str]:
    if entry.file != file:
        yield f"{name}.file is not {file}"
    if not 0 < entry.size_bytes <= limit_bytes or len(entry.sha256) != SHA256_BYTES:
        yield f"{name} has {entry.size_bytes} bytes, or a digest of another length"
