"""JinDisk 1 in the shape of `formats.VolumeFormat`: for interchange with the reference's kernel module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NotSupported
from jindiskd.jindisk.device import FileDevice, OpenFile
from jindiskd.jindisk.errors import VolumeUnrecognised
from jindiskd.jindisk.served import Served
from jindiskd.jindisk.v1.check import check_catalogue, check_volume
from jindiskd.jindisk.v1.export import bulk_export
from jindiskd.jindisk.v1.identification import Certainty, dump, identify
from jindiskd.jindisk.v1.keys import ROOT_BYTES
from jindiskd.jindisk.v1.layout import Layout, largest_layout, layout_for
from jindiskd.jindisk.v1.load import bulk_load, create_empty
from jindiskd.jindisk.v1.served import ServedVersion1
from jindiskd.jindisk.v1.session import Session, open_session
from jindiskd.jindisk.v1.volume import Volume, measurement, open_volume, read_layout
from jindiskd.jindisksetup.formats import Access, Document, NewVolume, Serving, Source
from jindiskd.jindisksetup.progress import Progress
from jindiskd.jindisksetup.targets import Target


class JinDisk1:
    """Byte-compatible with the kernel module, and as little protected."""

    name = "jindisk1"
    key_bytes = ROOT_BYTES
    anchored = False
    warning = (
        "a JinDisk 1 volume protects nothing against whoever has the disk: the keys of its data lie there in clear, "
        "and neither changes nor old copies are noticed. Use it for interchange alone"
    )

    def create(self, target: Target, new: NewVolume) -> Document:
        """See `VolumeFormat`."""
        layout = self._layout(target, new)
        end = new.offset_bytes + layout.total_bytes
        if not target.is_block and target.size_bytes < end:
            os.ftruncate(target.fd, end)
        device = FileDevice(target.fd, name=os.fspath(target.path), offset_bytes=new.offset_bytes)
        create_empty(device, layout=layout, key=new.key, blank=target.is_new)
        return self._made(layout)

    def _layout(self, target: Target, new: NewVolume) -> Layout:
        if new.label:
            raise InvalidArgument("a label", new.label, "a JinDisk 1 volume has none")
        if new.size_bytes is not None:
            return layout_for(new.size_bytes)
        if target.is_new or not target.size_bytes:
            raise InvalidArgument("a new file", os.fspath(target.path), "say how large the volume is, with --size")
        layout = largest_layout(target.size_bytes - new.offset_bytes)
        if layout is None:
            raise InvalidArgument("a device of", f"{target.size_bytes} bytes", "the smallest volume needs 1465393152")
        return layout

    def load(self, source_fd: int, source_bytes: int, target: Target, new: NewVolume, progress: Progress) -> Document:
        """See `VolumeFormat`. Zeros are stored: the module does not read zeros where nothing was written."""
        layout = layout_for(max(source_bytes, 1)) if new.size_bytes is None else self._layout(target, new)
        if layout.size_bytes < source_bytes:
            raise InvalidArgument("a size of", f"{layout.size_bytes} bytes", f"the source has {source_bytes}")
        bulk_load(
            source_fd,
            target.fd,
            size_bytes=source_bytes,
            key=new.key,
            layout=layout,
            target_offset_bytes=new.offset_bytes,
            progress=progress,
        )
        return self._made(layout)

    def fill(self, source: Source, target: Target, new: NewVolume, progress: Progress) -> Document:
        """Fail."""
        del source, new, progress
        raise NotSupported(f"filling {target.path} in version 1 from a stream or volume", "load an image file")

    def _made(self, layout: Layout) -> Document:
        return {"format": self.name, "size_bytes": layout.size_bytes, "device_bytes": layout.total_bytes}

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
            found = identify(opened)
        if found.certainty is Certainty.NO or found.layout is None:
            raise VolumeUnrecognised(os.fspath(device))
        return {**self._made(found.layout), "certainty": found.certainty.value, "authentic": False}

    def dump(self, access: Access) -> Document:
        """See `VolumeFormat`."""
        with self._reading(access) as volume:
            found = dump(volume)
        return {**found, "format": self.name}

    def check(self, access: Access, *, data: bool, progress: Progress) -> Document:
        """See `VolumeFormat`."""
        with OpenFile(access.device, writable=False, offset_bytes=access.offset_bytes) as device:
            damage = check_catalogue(device, read_layout(device, access.key))
            if damage:  # it cannot even be opened
                return {"format": self.name, "faults": [f"{finding.id}: {finding.text}" for finding in damage]}
            volume = open_volume(device, key=access.key, size_bytes=access.size_bytes, strict=False)
            report = check_volume(volume, data=data, progress=progress)
        return {
            "format": self.name,
            "mapped_blocks": report.mapped,
            "nodes": report.nodes,
            "data_blocks": report.data_blocks if data else None,
            "leaked_blocks": report.leaked_blocks,
            "faults": [f"{finding.id}: {finding.text}" for finding in report.findings],
        }

    def measure(self, access: Access) -> Document:
        """See `VolumeFormat`. The reference's measurement, the tag of the superblock: it follows from key and size."""
        with self._reading(access) as volume:
            return {"format": self.name, "measurement": measurement(volume.device).hex(), "covers_data": False}

    def rekey(self, access: Access, new_key: Secret) -> Document:
        """Fail."""
        del new_key  # the old one protects nothing, so another would not either
        raise NotSupported(f"re-keying {access.device}, a JinDisk 1 volume,", "convert it to version 2")

    @contextlib.contextmanager
    def open_served(self, access: Access, serving: Serving) -> Iterator[Served]:
        """See `VolumeFormat`."""
        target: Volume | Session
        with OpenFile(access.device, writable=not serving.read_only, offset_bytes=access.offset_bytes) as device:
            if serving.read_only:
                target = open_volume(device, key=access.key, size_bytes=access.size_bytes)
            else:
                target = open_session(device, key=access.key, size_bytes=access.size_bytes)
            yield ServedVersion1(target)

    @contextlib.contextmanager
    def _reading(self, access: Access) -> Iterator[Volume]:
        with OpenFile(access.device, writable=False, offset_bytes=access.offset_bytes) as device:
            yield open_volume(device, key=access.key, size_bytes=access.size_bytes)
