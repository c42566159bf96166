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
    """The device node that the launch configuration gives it, for example `/dev/vda3`; a locator, not an identity."""
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
    secret: SecretArea | None = None
    """For platforms whose guests are measured before they run; their key is never asked for."""
