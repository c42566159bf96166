"""JinDisk 2 in the shape of `formats.VolumeFormat`."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from jindiskd.base.anchor import Anchor
from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, JindiskError
from jindiskd.jindisk import anchor_file
from jindiskd.jindisk.anchor import UNANCHORED, Unanchored
from jindiskd.jindisk.anchor_file import FileKeeper
from jindiskd.jindisk.bulk import bulk_load
from jindiskd.jindisk.check import check_volume
from jindiskd.jindisk.create import create_volume, identify, wipe
from jindiskd.jindisk.crypto import KEY_BYTES, SESSION_BYTES
from jindiskd.jindisk.device import FileDevice, OpenFile
from jindiskd.jindisk.errors import VolumeDeviceFailed
from jindiskd.jindisk.export import bulk_export
from jindiskd.jindisk.geometry import BLOCK, MIN_BLOCKS, Geometry, blocks_of, default_geometry, largest_logical
from jindiskd.jindisk.identification import Identification
from jindiskd.jindisk.recovery import read_identification
from jindiskd.jindisk.served import Served, ServedSession, ServedVolume
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import Volume, anchor_of, open_volume
from jindiskd.jindisksetup.formats import Access, Document, NewVolume, Serving, Source
from jindiskd.jindisksetup.progress import Progress
from jindiskd.jindisksetup.targets import Target

COPY_BYTES = 4 << 20
FLUSH_BYTES = 64 << 20


class JinDisk2:
    """Confidential, authentic, fresh where an anchor is kept."""

    name = "jindisk2"
    key_bytes = KEY_BYTES
    warning = ""
    anchored = True

    def create(self, target: Target, new: NewVolume) -> Document:
        """See `VolumeFormat`."""
        size = new.size_bytes
        if size is None:
            if target.is_new or not target.size_bytes:
                raise InvalidArgument("a new file", os.fspath(target.path), "say how large the volume is, with --size")
            room = target.size_bytes - new.offset_bytes
            size = largest_logical(room, reserve_per_mille=new.reserve_per_mille)
        session = self._begin(target, new, size, identified=True)
        session.close()
        return self._made(new, anchor_of(session.durable, still_open=False), size, session.volume.geometry.end * BLOCK)

    def _begin(self, target: Target, new: NewVolume, size: int, *, identified: bool) -> Session:
        """Format, and begin the first session."""
        geometry = default_geometry(blocks_of(size), reserve_per_mille=new.reserve_per_mille)
        _check_room(target, new, geometry)
        if not target.is_block and target.size_bytes < new.offset_bytes + geometry.end * BLOCK:
            os.ftruncate(target.fd, new.offset_bytes + geometry.end * BLOCK)
        device = FileDevice(target.fd, name=os.fspath(target.path), offset_bytes=new.offset_bytes)
        try:
            return create_volume(
                device,
                geometry=geometry,
                key=new.key,
                uuid=new.uuid,
                session_id=secrets.token_bytes(SESSION_BYTES),
                label=new.label,
                identified=identified,
            )
        except OSError as exc:
            raise VolumeDeviceFailed(f"formatting {target.path}", exc) from exc

    def load(self, source_fd: int, source_bytes: int, target: Target, new: NewVolume, progress: Progress) -> Document:
        """See `VolumeFormat`."""
        size = new.size_bytes if new.size_bytes is not None else max(-(-source_bytes // BLOCK), MIN_BLOCKS) * BLOCK
        if size < source_bytes:
            raise InvalidArgument("a size of", f"{size} bytes", f"the source has {source_bytes}")
        geometry = default_geometry(blocks_of(size), reserve_per_mille=new.reserve_per_mille)
        _check_room(target, new, geometry)
        anchor = bulk_load(
            source_fd,
            target.fd,
            size_bytes=size,
            key=new.key,
            uuid=new.uuid,
            session_id=secrets.token_bytes(SESSION_BYTES),
            timestamp=int(time.time()),
            target_offset_bytes=new.offset_bytes,
            progress=progress,
            label=new.label,
            geometry=geometry,
        )
        return self._made(new, anchor, size, geometry.end * BLOCK)

    def fill(self, source: Source, target: Target, new: NewVolume, progress: Progress) -> Document:
        """See `VolumeFormat`. What is half done cannot be opened, whatever ended it: it is identified at the end."""
        size = new.size_bytes if new.size_bytes is not None else max(source.size_bytes, MIN_BLOCKS * BLOCK)
        if size < source.size_bytes:
            raise InvalidArgument("a size of", f"{size} bytes", f"the source has {source.size_bytes}")
        session = self._begin(target, new, size, identified=False)
        try:
            copy(source, session, progress)
            session.close()
            identify(session.volume.device, session.volume.identification)
        except BaseException as exc:
            wipe(session.volume.device, session.volume.geometry)
            if isinstance(exc, OSError) and isinstance(exc.__cause__, JindiskError):
                raise exc.__cause__ from None  # what the source's server made a number of
            raise
        return self._made(new, anchor_of(session.durable, still_open=False), size, session.volume.geometry.end * BLOCK)

    def _made(self, new: NewVolume, anchor: Anchor, size: int, needed: int) -> Document:
        return {
            "format": self.name,
            "uuid": str(new.uuid),
            "label": new.label,
            "size_bytes": size,
            "device_bytes": needed,
            **_anchor_fields(anchor),
        }

    def size_bytes(self, access: Access) -> int:
        """See `VolumeFormat`."""
        with self._reading(access) as volume:
            return volume.size_bytes

    def export(self, access: Access, target_fd: int, offset_bytes: int, progress: Progress) -> int:
        """See `VolumeFormat`."""
        with self._reading(access) as volume:
            return bulk_export(volume, target_fd, target_offset_bytes=offset_bytes, progress=progress)

    def describe(self, device: Path, offset_bytes: int) -> Document:
        """See `VolumeFormat`."""
        with OpenFile(device, writable=False, offset_bytes=offset_bytes) as opened:
            found = read_identification(opened, os.fspath(device))
        return {"format": self.name, **_identification_fields(found), "authentic": False}

    def dump(self, access: Access) -> Document:
        """See `VolumeFormat`."""
        with self._reading(access) as volume:
            superblock, geometry, state = volume.superblock, volume.geometry, volume.state
            return {
                "format": self.name,
                **_identification_fields(volume.identification),
                "authentic": True,
                "anchored": access.anchor_file is not None,
                "closed": superblock.closed,
                "epoch": superblock.epoch,
                "sequence": state.sequence,
                "root": state.root.hex(),
                "mapped_blocks": superblock.mapped,
                "oldest_stamp": superblock.oldest_stamp,
                "formatted_at": superblock.formatted_at,
                "committed_at": superblock.committed_at,
                "segments": geometry.segments,
                "journal_blocks": geometry.journal_blocks,
                "page_slots": geometry.meta_slots,
                "pages": geometry.pages,
                "data_start_block": geometry.data_start,
                "slots": list(volume.slot_words),
            }

    def check(self, access: Access, *, data: bool, progress: Progress) -> Document:
        """See `VolumeFormat`."""
        with self._reading(access) as volume:
            report = check_volume(volume, data=data, progress=progress)
        return {
            "format": self.name,
            "anchored": access.anchor_file is not None,
            "slots": list(report.slots),
            "sequence": report.sequence,
            "mapped_blocks": report.mapped,
            "pages": report.pages,
            "data_blocks": report.data_blocks if data else None,
            "faults": [str(fault) for fault in report.faults],
        }

    def measure(self, access: Access) -> Document:
        """See `VolumeFormat`."""
        with self._reading(access) as volume:
            anchor = anchor_of(volume.state, still_open=not volume.superblock.closed)
            return {
                "format": self.name,
                "uuid": str(volume.uuid),
                "anchored": access.anchor_file is not None,
                **_anchor_fields(anchor),
            }

    def rekey(self, access: Access, new_key: Secret) -> Document:
        """See `VolumeFormat`."""
        with self._writing(access) as session:
            session.rekey(new_key)
            session.close()
            anchor = anchor_of(session.durable, still_open=False)
            return {"format": self.name, "uuid": str(session.volume.uuid), **_anchor_fields(anchor)}

    @contextlib.contextmanager
    def open_served(self, access: Access, serving: Serving) -> Iterator[Served]:
        """See `VolumeFormat`."""
        if serving.read_only:
            with self._reading(access) as volume:
                yield ServedVolume(volume)
        else:
            with self._writing(access, serving) as session:
                yield ServedSession(session)

    @contextlib.contextmanager
    def _reading(self, access: Access) -> Iterator[Volume]:
        with OpenFile(access.device, writable=False, offset_bytes=access.offset_bytes) as device:
            yield _open(device, access)

    @contextlib.contextmanager
    def _writing(self, access: Access, serving: Serving | None = None) -> Iterator[Session]:
        """A session that has begun; the block closes it."""
        with OpenFile(access.device, writable=True, offset_bytes=access.offset_bytes) as device:
            volume, session_id = _open(device, access), secrets.token_bytes(SESSION_BYTES)
            keeper = None
            if access.anchor_file is not None:
                keeper = FileKeeper(access.anchor_file, volume.uuid, session_id)
            if serving is None:
                session = Session(volume, session_id=session_id, keeper=keeper)
            else:
                session = Session(
                    volume,
                    session_id=session_id,
                    keeper=keeper,
                    reporting=serving.reporting,
                    interval_s=serving.interval_s,
                )
            session.begin()
            yield session


def _check_room(target: Target, new: NewVolume, geometry: Geometry) -> None:
    """Before anything is written: a file grows, a device does not."""
    need = new.offset_bytes + geometry.end * BLOCK
    if target.is_block and target.size_bytes < need:
        fits = f"a volume of {geometry.size_bytes} bytes needs {need}; say a smaller --size"
        raise InvalidArgument("a device of", f"{target.size_bytes} bytes", fits)


def copy(source: Source, session: Session, progress: Progress) -> None:
    """Write all that a block device has into an empty volume; holes stay holes."""
    at, unflushed, total = 0, 0, source.size_bytes
    while at < total:
        for length, mapped in source.extents(at, total - at):
            end = at + length
            while mapped and at < end:
                data = source.read(at, min(COPY_BYTES, end - at))
                session.write(at, data)
                at, unflushed = at + len(data), unflushed + len(data)
                if unflushed >= FLUSH_BYTES:
                    session.flush()
                    unflushed = 0
                progress(at, total)
            at = end
    session.flush()
    progress(total, total)


def _open(device: FileDevice, access: Access) -> Volume:
    if access.size_bytes is not None:
        raise InvalidArgument("a size of", f"{access.size_bytes} bytes", "a JinDisk 2 volume knows its own")
    anchor: Anchor | Unanchored = UNANCHORED
    uuid: UUID | None = access.uuid
    if access.anchor_file is not None:
        known = anchor_file.read(access.anchor_file)
        if uuid is not None and uuid != known.uuid:
            raise InvalidArgument("the UUID", str(uuid), f"the anchor file is of volume {known.uuid}")
        anchor, uuid = known.anchor, known.uuid
    return open_volume(device, key=access.key, uuid=uuid, anchor=anchor, name=os.fspath(access.device))


def _anchor_fields(anchor: Anchor) -> Document:
    return {
        "closed": not anchor.open,
        "sequence": anchor.sequence,
        "root": anchor.root.hex(),
        "anchor": anchor.pack().hex(),
    }


def _identification_fields(found: Identification) -> Document:
    return {
        "uuid": str(found.uuid),
        "label": found.label,
        "size_bytes": found.blocks * BLOCK,
        "device_bytes": found.end * BLOCK,
        "segment_bytes": BLOCK << found.segment_bits,
        "features": {
            "incompatible": found.incompatible,
            "readonly_compatible": found.readonly_compatible,
            "compatible": found.compatible,
        },
    }


def remembered(document: Document) -> anchor_file.Remembered:
    """What an anchor file holds for a volume just made or measured."""
    anchor = Anchor.unpack(bytes.fromhex(document["anchor"]))
    return anchor_file.Remembered(uuid=UUID(document["uuid"]), anchor=anchor)
