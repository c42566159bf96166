"""Block devices that udev has tagged, coming and going: a source of events for the loop that survives their loss.

An event says *look there*, nothing more: whoever is told looks at everything again. When the kernel had to drop events
because we were slow, the socket is done for: a new one is opened, and then all is looked at.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyudev
import structlog

from jindiskd.device.probe import KINDS, PREFIX, decoded
from jindiskd.helper.lower import TAG
from jindiskd.helper.protocol import Below

log = structlog.get_logger(__name__)
BUFFER_BYTES = 16 << 20
"""Of the socket; needs a right that the service does not have, and without it the kernel's default stays."""
EVENTS_A_TURN = 64
SECTOR_BYTES = 512
LABEL_CHARACTERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A tagged device, as udev and the kernel tell it. What the disk says is not authentic."""

    name: str
    """The kernel's: `sda2`."""
    node: str
    """`/dev/sda2`."""
    below: Below
    size_bytes: int
    read_only: bool
    kind: str = ""
    """What the probe found, one of `probe.KINDS`; empty for a partition of our type that shows nothing."""
    uuid: str = ""
    label: str = ""
    volume_bytes: int = 0
    partition_uuid: str = ""
    """Of the GPT partition, lower case; empty for a whole disk."""


def seen(device: pyudev.Device) -> Seen | None:
    """A device of pyudev's as plain values; None if it has gone meanwhile, or is not what its record says."""
    try:
        told, numbers = device.properties, device.device_number
        if device.device_node is None or TAG not in device.tags or not device.is_initialized:
            return None
        kind, partition = told.get(PREFIX + "KIND", ""), told.get("ID_PART_ENTRY_UUID", "")
        if kind not in KINDS and told.get(PREFIX + "PARTITION") != "1":
            return None  # the tag is of an earlier event
        return Seen(
            name=device.sys_name,
            node=device.device_node,
            below=Below(major=os.major(numbers), minor=os.minor(numbers), sequence=_sequence(Path(device.sys_path))),
            size_bytes=_number(Path(device.sys_path) / "size") * SECTOR_BYTES,
            read_only=_number(Path(device.sys_path) / "ro") == 1,
            kind=kind if kind in KINDS else "",
            uuid=told.get(PREFIX + "UUID", "")[:36],
            label=decoded(told.get(PREFIX + "LABEL_ENC", ""))[:LABEL_CHARACTERS],
            volume_bytes=int(told.get(PREFIX + "SIZE", "0")),
            partition_uuid=partition.lower()[:36],
        )
    except (OSError, ValueError, KeyError, pyudev.DeviceNotFoundError):
        return None


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _sequence(path: Path) -> int:
    """The sequence number of the disk that a device or partition is of; 0 before Linux 5.15."""
    for folder in (path, path.parent):
        try:
            return _number(folder / "diskseq")
        except (FileNotFoundError, NotADirectoryError):
            continue
    return 0


class BlockWatch:
    """Calls `changed()` in the event loop when something may be different; `look` tells what there is."""

    def __init__(self, changed: Callable[[], None], *, buffer_bytes: int = BUFFER_BYTES) -> None:
        """Nothing is listened to before `start`."""
        self._changed, self._buffer_bytes = changed, buffer_bytes
        self._context = pyudev.Context()
        self._monitor: pyudev.Monitor | None = None
        self.overruns = 0
        """How often events were lost."""

    def start(self) -> None:
        """Listen; then look, so that nothing falls between."""
        self._open()
        self._changed()

    def stop(self) -> None:
        """Listen no more."""
        if self._monitor is not None:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
            self._monitor = None

    def look(self) -> Sequence[Seen]:
        """All tagged devices now. Blocks; from any thread (the context is used by one call at a time)."""
        devices = pyudev.Context().list_devices(subsystem="block").match_tag(TAG)
        return [found for device in devices if (found := seen(device)) is not None]

    def _open(self) -> None:
        monitor = pyudev.Monitor.from_netlink(self._context, source="udev")  # after the rules; "kernel" is too early
        monitor.filter_by("block")
        try:
            monitor.set_receive_buffer_size(self._buffer_bytes)
        except OSError:
            log.debug("the receive buffer of device events stays as it is")
        monitor.start()
        self._monitor = monitor
        asyncio.get_running_loop().add_reader(monitor.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._monitor is not None
        for _ in range(EVENTS_A_TURN):
            try:
                device = self._monitor.poll(timeout=0)
            except OSError:  # ENOBUFS stays with the socket: only a new one helps
                self.overruns += 1
                log.warning("device events were lost; looking at all devices again", times=self.overruns)
                self.stop()
                self._open()
                break
            if device is None:
                break
        self._changed()
