"""What the bus objects need of the rest of the service, as narrow protocols and plain values.

The objects know these alone; `jindiskd.backend` fulfils them with the image store, the key store and libvirt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from jindiskd.base.secret import Secret
from jindiskd.jobs.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageView:
    """An image, and the state of its key."""

    name: str
    image_id: str
    platform: str
    simulated: bool
    seeded: bool
    format: str
    size_bytes: int
    launch_digest: bytes
    key_state: str
    created: datetime
    distribution: str
    kernel_release: str
    vcpus: int
    volumes: Sequence[Mapping[str, object]] = ()
    """Its data volumes: "name", "format", "uuid", "mount", "size-bytes", "file-bytes"."""
    guest_policy: int = 0
    id_key_digest: bytes = b""
    """SEV-SNP: of the key by which an owner signed the image; empty where none did."""
    author_key_digest: bytes = b""
    guest_svn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyView:
    """The keys of an image, as everybody may see them, and the policy of their release."""

    image_id: str
    name: str
    platform: str
    simulated: bool
    state: str
    created: datetime
    policy_digest: str
    """Hexadecimal; empty where another broker has the policy."""


VolumeOrder = tuple[str, int, str, str]
"""A data volume: name, bytes, format (empty for JinDisk 2) and mount point (empty for none)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    """What a caller wants built; None and empty mean what is configured."""

    name: str
    base_kind: str = "disk"
    platform: str = ""
    format: str = ""
    initrd: str = ""
    vcpus: int | None = None
    cpu_model: str = ""
    firmware: str = ""
    size_bytes: int | None = None
    cmdline: str = ""
    seed: str | None = None
    debug: bool = False
    guest_policy: str = ""
    """Words, as `attest.guest_policy` has them."""
    vouch_firmware: bool = False
    report_source: str | None = None
    """Name of a plug-in; empty for the platform's own way."""
    key_program: str | None = None
    """Path on the host; empty for the broker."""
    volumes: Sequence[VolumeOrder] = ()
    disk_bus: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOrder:
    """How a caller wants a stream taken; empty means what is in it."""

    name: str = ""
    firmware: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOrder:
    """What a caller wants started; None and empty mean what is configured."""

    image: str
    name: str = ""
    memory_bytes: int | None = None
    timeout_s: int | None = None
    host_data: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestView:
    """A domain."""

    uuid: str
    name: str
    image: str
    image_id: str
    platform: str
    simulated: bool
    state: str
    reason: str
    since: datetime
    cid: int
    relay_state: str = ""
    relay_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDeviceView:
    """A block device of this host that carries a volume of ours."""

    device_id: str
    node: str
    kind: str
    uuid: str
    label: str
    size_bytes: int
    image: str
    image_id: str
    state: str
    mapped_node: str
    read_only: bool
    opened_by: int
    reason: str


class Images(Protocol):
    """The images."""

    def checked(self, order: BuildOrder) -> BuildOrder:
        """The order with every default filled in; raises `JindiskError` for what can be refused at once."""

    async def views(self) -> Sequence[ImageView]:
        """All of them."""

    async def manifest(self, name: str) -> str:
        """The manifest, a JSON document."""

    async def build(self, order: BuildOrder, base_fd: int, job: Job) -> str:
        """Build one; the caller closes the descriptor afterwards. The result is its name."""

    async def clone(self, name: str, new_name: str, by: str, job: Job) -> str:
        """Make a second image of the same system under keys of its own; the result is its name."""

    async def export(self, name: str, target_fd: int, job: Job) -> str:
        """Write one as a stream; the caller closes the descriptor afterwards. The result is the stream's digest."""

    async def import_(self, order: ImportOrder, source_fd: int, job: Job) -> str:
        """Take one from a stream; the caller closes the descriptor afterwards. The result is its name."""

    async def remove(self, name: str) -> None:
        """Remove one and its key."""

    async def update(self, name: str, kernel_fd: int, initrd_fd: int, job: Job) -> bytes:
        """Replace its kernel and initramfs; the caller closes the descriptors. The result is its new launch digest."""

    async def add_volume(self, name: str, volume: VolumeOrder, by: str, job: Job) -> bytes:
        """Give its guests one more data volume; the result is its new launch digest."""

    async def remove_volume(self, name: str, volume: str, by: str, job: Job) -> bytes:
        """Take a data volume from it, with disk and key; the result is its new launch digest."""

    async def sign(self, name: str, block: bytes, auth: bytes) -> None:
        """Take an owner's ID block for its launches; two empty ones take it away."""

    async def measure(self, name: str) -> bytes:
        """Its launch digest, computed again."""

    async def measure_all(self, name: str) -> str:
        """What it measures as on each platform with all inputs, a JSON document."""


class Guests(Protocol):
    """The domains."""

    @property
    def connected(self) -> bool:
        """Whether libvirt is connected."""

    def views(self) -> Sequence[GuestView]:
        """All of them, as last known."""

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called in the event loop when a domain appears, changes or goes."""

    async def launch(self, order: LaunchOrder, job: Job) -> str:
        """Start one and follow it until it runs; the result is its UUID."""

    async def adopt(self, domain: str, image: str) -> str:
        """Bind a domain that somebody else made, by name or UUID, to an image; the result is its UUID."""

    async def start(self, uuid: str, timeout_s: int | None, job: Job) -> str:
        """Start one that is off, as it is defined, and follow it until it runs; the result is its UUID."""

    async def release(self, uuid: str) -> None:
        """Let go of one that was adopted."""

    async def definition(self, uuid: str) -> str:
        """Its XML as libvirt keeps it, without secrets."""

    async def plan(self, order: LaunchOrder) -> str:
        """The XML that a launch would define."""

    async def stop(self, uuid: str, *, force: bool, timeout_s: int | None) -> None:
        """End one, within this time or the usual one."""

    async def undefine(self, uuid: str) -> None:
        """Remove one that is off."""

    async def open_console(self, uuid: str) -> int:
        """A readable descriptor of its console log; the caller closes it."""

    async def attach_console(self, uuid: str, *, force: bool) -> int:
        """A socket that is its console, both ways; the caller closes it. `force` takes it from whoever has it."""


class Devices(Protocol):
    """Block devices of this host."""

    def views(self) -> Sequence[BlockDeviceView]:
        """All of them, as last seen."""

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called in the event loop when one appears, changes or goes."""

    def find(self, name: str) -> BlockDeviceView:
        """The one with this node, volume or image; raises `NotFound`, or `InvalidArgument` for several."""

    async def open(self, device_id: str, *, key: Secret | None, read_only: bool, owner: int) -> str:
        """Map its volume, with its image's key or the one given, which is wiped; the result is the mapped node."""

    async def close(self, device_id: str) -> None:
        """Take that away, and wait until the volume is closed."""


class Keys(Protocol):
    """What may be known of the keys, and what their owner decides about them; `by` names who asks."""

    async def views(self) -> Sequence[KeyView]:
        """The keys of all images."""

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Have `changed()` called in the event loop when keys, policies or the audit log may have changed."""

    async def describe(self, image_id: str) -> tuple[Mapping[str, object], Sequence[Mapping[str, object]]]:
        """What is known of one image's keys, and of each of their volumes."""

    async def revoke(self, image_id: str, by: str) -> None:
        """Stop release of its keys."""

    async def reinstate(self, image_id: str, by: str) -> None:
        """Allow release of its keys again."""

    async def accept_rollback(self, image_id: str, reason: str, by: str, volume: str) -> None:
        """Have its next start take whatever authentic state its volumes, or the one named, are in, once."""

    async def rotate(self, image_id: str, handover: bytes, by: str) -> None:
        """Put what a handover holds in place of its keys."""

    async def export(self, image_id: str, card: str, by: str) -> bytes:
        """Its keys as a JSON document, sealed for the broker of a card."""

    async def card(self) -> str:
        """The card of the broker that has the keys, a JSON document."""

    async def set_recovery_key(self, pem: bytes, by: str) -> None:
        """Have recovery copies sealed to a public key."""

    async def recovery_copy(self, by: str) -> bytes:
        """All keys, sealed to that key: a JSON document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalView:
    """A launch of a guest that waits for a person, or was approved."""

    number: int
    image_id: str
    image: str
    peer: str
    guest: str
    measurement: str
    """Hexadecimal, as `guest` is."""
    simulated: bool
    granted: bool
    expires: datetime


class Approvals(Protocol):
    """The guests that wait until a person approves the release."""

    async def approvals(self) -> Sequence[ApprovalView]:
        """All that wait or still count."""

    async def decide(self, number: int, *, approve: bool, by: str) -> None:
        """Let one have its keys, or take it off the list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOrder:
    """Which rows of the audit log are wanted; None and empty do not matter."""

    limit: int
    after: int | None = None
    before: int | None = None
    image_id: str | None = None
    guest: str = ""
    verdict: str = ""
    since: datetime | None = None
    until: datetime | None = None


class Audit(Protocol):
    """The log of decisions."""

    async def rows(self, order: AuditOrder) -> tuple[Sequence[Mapping[str, object]], bool]:
        """One dictionary a row, oldest first, and whether there are more."""

    async def last(self) -> int:
        """Number of the newest row, or 0."""

    async def verify(self, job: Job) -> str:
        """Check its chain; the result is a JSON object."""

    async def explain(self, *, image_id: str | None, domain: str | None, row: int | None, job: Job) -> str:
        """Why a guest was refused, a JSON document."""


class Policies(Protocol):
    """What guests must prove."""

    async def policy(self, image_id: str, *, set_only: bool) -> str:
        """The policy of an image, a TOML document."""

    async def set_policy(self, image_id: str, text: str, by: str) -> bool:
        """Replace it; False where it is that already."""

    async def check_policy(
        self, image_id: str, *, text: str | None, row: int | None
    ) -> tuple[int, Sequence[Mapping[str, object]]]:
        """Number of a refusal, and what the policy (the one in force if None) says of its evidence."""


class Diagnosis(Protocol):
    """What is wrong, and what to do."""

    async def diagnose(self, *, image: str, domain: str, platform: str) -> Sequence[Mapping[str, object]]:
        """One dictionary a check; empty strings for what is not asked about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFacts:
    """What the manager tells of the service."""

    version: str
    deployment: str
    allow_simulated: bool
    broker_spki_sha256: bytes
    status: Callable[[], Mapping[str, object]]
    """What Manager.Status tells; blocks on files."""
    relay_broker: str
    settings: tuple[tuple[str, str, str], ...]
    """Name, value as JSON, origin."""
