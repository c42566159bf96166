"""The measured configuration of a guest: a file in its initrd, so part of the launch digest.

Nothing else configures the guest's agent: no kernel command line, firmware variable, SMBIOS or DHCP value.
"""

from __future__ import annotations

from dataclasses import dataclass

PATH = "etc/jindisk/guest.json"
SCHEMA = 1

KBS_PORT = 19012  # vsock: the broker, TLS
FIRMWARE_PORT = 19013  # vsock: the simulated firmware
PROGRESS_PORT = 19014  # vsock: fixed progress codes for the host
SERIAL_PREFIX = "jd-"
MAX_VOLUMES = 7
"""Further volumes of a guest: with the root's, as many keys as a session at a broker of ours may ask for."""


def serial_of(name: str) -> str:
    """The serial number of the disk of a data volume, of the 20 characters at most that virtio has room for.

    It is the host's word: it says which disk to try, and proves nothing.
    """
    return f"{SERIAL_PREFIX}{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerPin:
    """The one broker the guest talks to."""

    spki_sha256: bytes
    """SHA-256 (32 bytes) of the DER SubjectPublicKeyInfo of the broker's TLS certificate."""
    cid: int = 2
    """vsock context id, 2 is the host."""
    port: int = KBS_PORT


@dataclass(frozen=True, slots=True, kw_only=True)
class Luks2Expectation:
    """What the LUKS2 header must be: its exact bytes, and in words for a second check."""

    header_bytes: int
    """Length of the header area: both headers, both JSON areas, the key slots; the data begins behind it."""
    header_sha256: bytes
    uuid: str
    cipher: str
    """For example `aes-xts-plain64`."""
    key_bytes: int
    sector_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JindiskExpectation:
    """What the JinDisk volume must be; its freshness comes from the broker with the key."""

    version: int
    uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Jindisk1Expectation:
    """What the JinDisk 1 volume must be. The superblock is written once; nothing else of this format can be told, so
    the root is whatever the host makes of it."""

    superblock_sha256: bytes
    """SHA-256 (32 bytes) of the first 148 bytes of the volume: the sealed superblock and its tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RootVolume:
    """The volume that holds the root file system."""

    device: str
    """Where it is looked for first, for example `/dev/vda3`; then in the same partition of all disks, or on all whole
    disks. A locator, not an identity: see `rootdisk`."""
    resource: str
    """The key's resource path `repository/type/tag`."""
    luks2: Luks2Expectation | None = None
    jindisk: JindiskExpectation | None = None
    jindisk1: Jindisk1Expectation | None = None
    mapping: str = "root"
    """The volume opens as `/dev/mapper/<mapping>` (LUKS2, JinDisk 1)."""
    filesystem: str = "ext4"
    options: str = "ro"
    """Mount options, comma separated; the system's own init remounts it as its fstab says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataVolume:
    """A further volume, on a disk of its own, from the disk's beginning."""

    name: str
    """Of 1 to 16 lower-case letters, digits and hyphens; names its disk (`serial_of`) and its links in /dev."""
    resource: str
    """The key's resource path `repository/type/tag`."""
    luks2: Luks2Expectation | None = None
    jindisk: JindiskExpectation | None = None
    mount: str = ""
    """Where its file system belongs in the system, an absolute path; empty for none: it is a device alone."""
    filesystem: str = "ext4"
    options: str = "rw"
    """As of the root."""

    @property
    def mapping(self) -> str:
        """The volume opens as `/dev/mapper/<mapping>` (LUKS2)."""
        return f"jindisk-{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretArea:
    """Where the firmware keeps the secret that is injected before the guest runs (SEV, SEV-ES)."""

    address: int
    """Guest physical, of the firmware's own table."""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """All that the agent knows when it starts."""

    schema: int
    image_id: str
    platform: str
    """A `base.platform.Platform` value; decides where the report comes from."""
    broker: BrokerPin
    root: RootVolume
    modules: tuple[str, ...]
    """Kernel module files in the initrd in the order of loading, absolute paths."""
    report_source: str = ""
    """`module:attribute` of a report source in the initrd instead of the platform's own; empty for that."""
    key_program: bool = False
    """The key comes from the program in the initrd (`guest.script`), and no broker is asked."""
    init: str = "/sbin/init"
    timeout_s: int = 120
    """From the agent's start to the mounted root; then power off."""
    volumes: tuple[DataVolume, ...] = ()
    """What is opened besides the root, with the same attestation; all of it, or the guest does not start."""
    secret: SecretArea | None = None
    """For platforms whose guests are measured before they run; their key is never asked for."""

    @property
    def all_volumes(self) -> tuple[RootVolume | DataVolume, ...]:
        """The root and the others, in the order in which they are opened."""
        return (self.root, *self.volumes)

    @property
    def jindisk(self) -> bool:
        """Whether a volume is JinDisk 2, which a process of ours serves."""
        return any(volume.jindisk is not None for volume in self.all_volumes)

    @property
    def luks2(self) -> bool:
        """Whether a volume is LUKS2."""
        return any(volume.luks2 is not None for volume in self.all_volumes)

    @property
    def ends_volumes(self) -> bool:
        """Whether a volume must be closed at the very end: JinDisk of both kinds, by the initrd's own program."""
        return self.jindisk or self.root.jindisk1 is not None
