"""Why a guest gave up: fixed codes from the inside, sentences for the host's side.

The guest prints and sends the code alone, never a text made from what it saw: the console and the progress port are
the host's to read. Whoever shows a code to people looks the sentence up here.
"""

from __future__ import annotations

import enum


class Code(enum.StrEnum):
    """A reason to power off instead of booting. Numbers are never given a second meaning."""

    TIMEOUT = "E01"
    MOUNTS = "E10"
    CONFIG = "E11"
    MODULES = "E12"
    REPORT = "E20"
    SECRET = "E21"  # noqa: S105 (a code)
    BROKER_UNREACHABLE = "E30"
    BROKER_NOT_TRUSTED = "E31"
    EVIDENCE_REFUSED = "E32"
    POLICY_DENIED = "E33"
    BROKER_MISBEHAVED = "E34"
    BROKER_TROUBLE = "E35"
    DEVICE_MISSING = "E40"
    HEADER = "E41"
    KEY = "E42"
    ACTIVATION = "E43"
    ROOT_MOUNT = "E44"
    INIT_MISSING = "E45"
    SWITCH_ROOT = "E46"
    INITRAMFS = "E47"
    ROOT_DOUBLE = "E48"
    VOLUME = "E50"
    STALE = "E51"
    STORAGE = "E52"
    FENCED = "E53"
    TARGET = "E54"
    DATA_MISSING = "E60"
    DATA_DOUBLE = "E61"
    DATA_VOLUME = "E62"
    DATA_MOUNT = "E63"
    INTERNAL = "E99"

    @property
    def sentence(self) -> str:
        """What happened and what to look at, for people on the host's side."""
        return SENTENCES[self]


SENTENCES = {
    Code.TIMEOUT: "the guest did not reach its root file system in the time its image allows;"
    " look at the broker's answer times and at the host's load",
    Code.MOUNTS: "the guest's kernel could not mount one of proc, sysfs, devtmpfs, tmpfs; use a distribution kernel",
    Code.CONFIG: "the configuration in the initrd is not readable; build the image again",
    Code.MODULES: "the guest's kernel refused a module from the initrd;"
    " kernel and modules may not belong together, build the image again",
    Code.REPORT: "the platform gave the guest no attestation report;"
    " check that the domain runs with the launch security that the image was built for",
    Code.SECRET: "no disk key was injected into the guest before it ran;"
    " start it by its owner's service, and check that the firmware is the one that the image was built with",
    Code.BROKER_UNREACHABLE: "the guest could not reach its key broker over vsock; check that the broker runs"
    " and that the domain has a vsock device",
    Code.BROKER_NOT_TRUSTED: "what answered the guest is not the broker its image is pinned to;"
    " build the image again for this broker, or restore the broker's identity",
    Code.EVIDENCE_REFUSED: "the broker did not accept the guest's attestation; its audit log has the findings",
    Code.POLICY_DENIED: "the broker's policy denies this guest the key; its audit log has the reason",
    Code.BROKER_MISBEHAVED: "the guest did not understand the broker's answer;"
    " check that nothing else listens there and that both are of compatible versions",
    Code.BROKER_TROUBLE: "the broker had no key for the guest or trouble of its own; look at the broker's log",
    Code.DEVICE_MISSING: "no disk that may hold the root appeared in the guest;"
    " check that the domain has the image's disk, on virtio",
    Code.HEADER: "the volume header is not the one written when the image was built: the disk was exchanged or altered",
    Code.KEY: "the released key does not open the volume; the disk belongs to another image",
    Code.ACTIVATION: "the guest's kernel did not activate the encrypted volume; check its device-mapper modules",
    Code.ROOT_MOUNT: "the root file system could not be mounted; the disk's content may be damaged or altered",
    Code.INIT_MISSING: "the root file system has no init program at the place the image names",
    Code.SWITCH_ROOT: "the guest could not hand over to the system's init",
    Code.INITRAMFS: "the initramfs that the guest's distribution made did not come to the root, or was told to open a"
    " shell; its own words are on the guest's console",
    Code.ROOT_DOUBLE: "two disks of the domain look like the root, and neither is where the image expects it or has the"
    " serial number jd-root; detach the one that is a copy",
    Code.VOLUME: "the JinDisk volume is damaged, or not the one the image was built with",
    Code.STALE: "the JinDisk volume is not in its latest state: an old copy of the disk was attached",
    Code.STORAGE: "the guest could not start the JinDisk volume's storage process",
    Code.TARGET: "the guest's kernel has no jindisk target, which a root on JinDisk 1 needs;"
    " use a kernel with the dm-jindisk module, or a root on JinDisk 2",
    Code.FENCED: "another instance of this guest has taken the JinDisk volume over",
    Code.DATA_MISSING: "a data volume's disk did not appear in the guest; check that the domain has a virtio disk for"
    " each volume of its image, with the serial number that `jindiskctl domain xml` shows",
    Code.DATA_DOUBLE: "two disks of the domain have the serial number of one data volume; attach each volume once",
    Code.DATA_VOLUME: "a data volume's disk is not the one that the image was built with: it was exchanged with another"
    " or altered; attach each disk with its own serial number",
    Code.DATA_MOUNT: "a data volume's file system could not be mounted; its content may be damaged",
    Code.INTERNAL: "the guest's agent failed in a way it was not made for; please report this",
}


class GuestFailure(Exception):
    """The boot cannot go on. Carries the code and nothing else, so that nothing else can be shown."""

    def __init__(self, code: Code) -> None:
        """`code` is what the host gets to see."""
        super().__init__(code.value)
        self.code = code
