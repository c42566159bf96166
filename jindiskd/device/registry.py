"""What there is, put together from what udev, the kernel, the helper and the image store tell; no memory of its own."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jindiskd.device.probe import JINDISK2, LUKS2
from jindiskd.device.watch import Seen
from jindiskd.helper.mapped import Mapped
from jindiskd.helper.protocol import Below, Kind, Serving

NOBODY = (1 << 32) - 1
UNKNOWN = ""
KIND_OF_FORMAT = {"jindisk": JINDISK2, "luks2": LUKS2, "jindisk1": Kind.JINDISK1.value}


class DeviceState(enum.StrEnum):
    """How a device is."""

    CLOSED = "closed"  # it is there, and nothing is mapped from it
    OPEN = "open"  # its volume is mapped
    FAILED = "failed"  # it is mapped, but cannot be written, or nobody serves it: close it
    LOST = "lost"  # it is mapped, but the device has gone: close it


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageVolume:
    """A volume that is known here: an image's root, or another one whose key is an image's."""

    image: str
    """Name of the image."""
    image_id: str
    kind: str
    uuid: str
    partition_uuid: str = ""
    """Of the image's own disk."""
    header_sha256: bytes = b""
    resource: str = ""
    """Of its key; empty for that of the image's root."""
    simulated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """A device."""

    device_id: str
    """Number and sequence number; another disk in its place has another one."""
    below: Below
    node: str
    """Empty where it has gone."""
    kind: str
    """`jindisk2`, `luks2`, `jindisk1`, or empty for a partition of our type that shows nothing."""
    uuid: str
    label: str
    size_bytes: int
    """Of the device."""
    volume: ImageVolume | None
    state: DeviceState
    mapped: Mapped | None
    read_only: bool
    """While it is open: whether it can only be read. While it is closed: whether the device itself can."""
    fault: str

    @property
    def image(self) -> str:
        """Name of the image, or empty."""
        return self.volume.image if self.volume else ""

    @property
    def image_id(self) -> str:
        """Id of the image, or empty."""
        return self.volume.image_id if self.volume else ""

    @property
    def mapped_node(self) -> str:
        """The node in clear, or empty."""
        return f"/dev/{self.mapped.node}" if self.mapped else ""

    @property
    def opened_by(self) -> int:
        """User id of who opened it; `NOBODY` while it is closed."""
        return self.mapped.owner if self.mapped else NOBODY


def device_id(below: Below) -> str:
    """What a device is called on the bus."""
    return f"{below.major}-{below.minor}-{below.sequence}"


def match(kind: str, uuid: str, partition_uuid: str, volumes: Sequence[ImageVolume]) -> ImageVolume | None:
    """Whose volume a device seems to carry. By the volume's UUID; a volume that shows none, by its partition's."""
    for volume in volumes:
        if kind and uuid and (volume.kind, volume.uuid) == (kind, uuid):
            return volume
    for volume in volumes:
        hidden = not kind and volume.kind == Kind.JINDISK1.value
        if hidden and partition_uuid and volume.partition_uuid == partition_uuid:
            return volume
    return None


def views(
    seen: Sequence[Seen], mapped: Sequence[Mapped], serving: Sequence[Serving], volumes: Sequence[ImageVolume]
) -> dict[str, DeviceView]:
    """All devices by id: those that are there, and those that have gone while their volume was open."""
    served = {(item.node, item.mark): item for item in serving}
    by_below = {item.below: item for item in mapped}
    found: dict[str, DeviceView] = {}
    for item in seen:
        volume = match(item.kind, item.uuid, item.partition_uuid, volumes)
        there = by_below.pop(item.below, None)
        state, fault = _state(there, served)
        found[device_id(item.below)] = DeviceView(
            device_id=device_id(item.below),
            below=item.below,
            node=item.node,
            kind=item.kind or (volume.kind if volume else UNKNOWN),
            uuid=item.uuid,
            label=item.label,
            size_bytes=item.size_bytes,
            volume=volume,
            state=state,
            mapped=there,
            read_only=there.read_only if there else item.read_only,
            fault=fault,
        )
    for below, there in by_below.items():
        _, fault = _state(there, served)
        found[device_id(below)] = DeviceView(
            device_id=device_id(below),
            below=below,
            node="",
            kind=there.kind.value,
            uuid=there.uuid,
            label="",
            size_bytes=0,
            volume=match(there.kind.value, there.uuid, "", volumes),
            state=DeviceState.LOST,
            mapped=there,
            read_only=there.read_only,
            fault=fault or "the device was taken away while its volume was open",
        )
    return found


def _state(there: Mapped | None, served: Mapping[tuple[str, str], Serving]) -> tuple[DeviceState, str]:
    if there is None:
        return DeviceState.CLOSED, ""
    told = served.get((there.node, there.mark))
    if told is not None and not told.alive:
        return DeviceState.FAILED, told.fault or "the process that served it is gone; what was flushed is there"
    if told is not None and told.fault:
        return DeviceState.FAILED, told.fault
    return DeviceState.OPEN, ""
