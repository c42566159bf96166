"""Judging a domain's XML before libvirt sees it: every fault found, each naming its element.

libvirt drops without a word what it does not know, accepts what QEMU or the firmware refuses later, and takes for
granted what our attestation depends on. Its own schema (`VIR_DOMAIN_DEFINE_VALIDATE`) is only the second line.
Sources: libvirt formatdomain; libvirt notes sections 2.1 to 2.6 and 6.
"""

from __future__ import annotations

import base64
import binascii
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jindiskd.domain import security, xml
from jindiskd.domain.spec import DataDisk
from jindiskd.errors import EXIT_INTEGRITY, JindiskError
from jindiskd.image.manifest import volume_file

SNP_POLICY_MUST = 1 << 17
TDX_POLICY_MAY = 1 << 0 | 1 << 28
SEV_POLICY_ES = security.SEV_POLICY_ES
FIRST_CID = 3
VOLUME_FILE = re.compile(re.escape(volume_file("*")).replace(r"\*", ".*"))
MACHINE = re.compile(r"(pc-)?q35(-[0-9.]+)?")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,32}|[0-9]{1,32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    element: str
    """The element, or `element@attribute`."""
    problem: str

    def __str__(self) -> str:
        return f"<{self.element}> {self.problem}"


class DomainRefused(JindiskError, code="DomainRefused", exit_code=EXIT_INTEGRITY):
    """A domain's definition cannot be started as a trusted guest."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        """All that was found."""
        super().__init__("the domain's definition is refused: " + "; ".join(map(str, faults)))
        self.faults = faults


def bus_faults(root: ET.Element, disk: ET.Element, what: str, *, scsi: bool) -> Iterator[Fault]:
    """What is wrong with where a disk of an image is attached: its guests have drivers for virtio disks, and where the
    image was built so (`scsi`) for those on a virtio SCSI controller.

    `what` names the disk, after "of".
    """
    target, address = disk.find("target"), disk.find("address")
    bus = "" if target is None else target.get("bus", "")
    if bus == xml.VIRTIO and disk.get("device", "disk") == "disk":
        return
    if bus != xml.SCSI or disk.get("device", "disk") != "disk":
        remedy = "make it 'virtio', for which its guests have the driver"
        if scsi:
            remedy += ", or 'scsi' on a controller of model virtio-scsi"
        yield Fault(element="target@bus", problem=f"of {what} is {bus!r}: {remedy}")
    elif not scsi:
        remedy = "make it 'virtio', for which they have one, or build the image with --disk-bus scsi"
        yield Fault(element="target@bus", problem=f"of {what} is 'scsi', for which its guests have no driver: {remedy}")
    else:
        index = "0" if address is None else address.get("controller", "0")
        models = [
            controller.get("model", "")
            for controller in root.iterfind("devices/controller[@type='scsi']")
            if controller.get("index", "0") == index
        ]
        if models != [xml.VIRTIO_SCSI]:
            found = " and ".join(map(repr, models)) or "not given"
            problem = f"of SCSI controller {index} is {found}: make it 'virtio-scsi', for {what}"
            yield Fault(element="controller@model", problem=problem)


def root_bus_faults(root: ET.Element, path: str, *, scsi: bool) -> Iterator[Fault]:
    """`bus_faults` of the image's own disk, which is at `path`."""
    for disk in root.iterfind("devices/disk"):
        source = disk.find("source")
        if source is not None and source.get("file", "") == path:
            yield from bus_faults(root, disk, "the image's disk", scsi=scsi)


def volume_faults(root: ET.Element, volumes: Sequence[DataDisk], *, scsi: bool = False) -> Iterator[Fault]:
    """What is wrong with the disks of the data volumes of a domain's image: each is there once, as it should be; `scsi`
    as of `bus_faults`.
    """
    for volume in volumes:
        disks = xml.with_serial(root, volume.serial)
        if len(disks) != 1:
            problem = f"with <serial>{volume.serial}</serial> stands there {len(disks)} times instead of once"
            yield Fault(element="disk", problem=f"{problem}, for {volume.path}")
            continue
        source, driver = (disks[0].find(tag) for tag in ("source", "driver"))
        path = "" if source is None else source.get("file", "")
        if path != str(volume.path) and driver is not None and driver.get("type") == "qcow2":
            continue  # a snapshot lies on top of it: the guest finds the latest state there, and no other would do
        if path != str(volume.path):
            problem = f"of the disk with serial number {volume.serial!r} is {path!r} instead of {str(volume.path)!r}"
            yield Fault(element="source@file", problem=problem)
        if driver is not None and driver.get("type", "raw") != "raw":
            problem = f"of the disk with serial number {volume.serial!r} is {driver.get('type')!r} and must be 'raw'"
            yield Fault(element="driver@type", problem=problem)
        yield from bus_faults(root, disks[0], f"the disk with serial number {volume.serial!r}", scsi=scsi)


def stray_faults(root: ET.Element, directory: Path, volumes: Sequence[DataDisk]) -> Iterator[Fault]:
    """Disks of data volumes that the image does not have any more, `directory` being the image's."""
    known = {str(volume.path) for volume in volumes}
    for disk in root.iterfind("devices/disk"):
        source = disk.find("source")
        path = "" if source is None else source.get("file", "")
        if path not in known and of_volume(path, directory):
            yield Fault(element="source@file", problem=f"is {path!r}, which is no volume of the image any more")


def of_volume(path: str, directory: Path) -> bool:
    """Whether a path is one that the disk of a data volume of an image has."""
    return Path(path).parent == directory and VOLUME_FILE.fullmatch(Path(path).name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What a type of launch security may have inside."""

    attributes: frozenset[str]
    sizes: Mapping[str, int]
    """Elements in base64 and their lengths in bytes."""
    others: frozenset[str]
    policy_bits: int
    policy_required: bool


KINDS: Mapping[str, _Kind] = {
    "sev": _Kind(
        attributes=frozenset({"kernelHashes"}),
        sizes={"dhCert": security.DH_CERT_BYTES, "session": security.SESSION_BYTES},
        others=frozenset({"policy", "cbitpos", "reducedPhysBits"}),
        policy_bits=32,
        policy_required=True,
    ),
    "sev-snp": _Kind(
        attributes=frozenset({"kernelHashes", "authorKey", "vcek"}),
        sizes={
            "guestVisibleWorkarounds": security.WORKAROUNDS_BYTES,
            "idBlock": security.ID_BLOCK_BYTES,
            "idAuth": security.ID_AUTH_BYTES,
            "hostData": security.HOST_DATA_BYTES,
        },
        others=frozenset({"policy", "cbitpos", "reducedPhysBits"}),
        policy_bits=64,
        policy_required=True,
    ),
    "tdx": _Kind(
        attributes=frozenset(),
        sizes=dict.fromkeys(("mrConfigId", "mrOwner", "mrOwnerConfig"), security.TDX_REGISTER_BYTES),
        others=frozenset({"policy", "quoteGenerationService"}),
        policy_bits=64,
        policy_required=False,
    ),
}


def refuse(root: ET.Element, *, simulated: bool = False) -> None:
    """Raise if a domain's definition has faults.

    Args:
        root: `<domain>`.
        simulated: its launch security is a stand-in's, so that it runs by emulation.

    Raises:
        DomainRefused: with all of them.
    """
    found = tuple(faults(root, simulated=simulated))
    if found:
        raise DomainRefused(found)


def faults(root: ET.Element, *, simulated: bool = False) -> Iterator[Fault]:
    """Everything that is wrong with a domain's definition, in the order of the checks."""
    secured = root.findall("launchSecurity")
    if len(secured) > 1:
        yield Fault(
            element="launchSecurity", problem=f"stands there {len(secured)} times; libvirt would drop all but one"
        )
    kind = secured[0].get("type", "") if secured else ""
    for element in secured:
        yield from _security(element, root)
    yield from _machine(root, kind)
    yield from _loader(root, kind)
    yield from _vsock(root)
    for encryption in root.iterfind("devices/disk//encryption"):
        yield Fault(
            element="encryption",
            problem=f"format {encryption.get('format')!r} means that QEMU on the host holds the disk's key",
        )
    if secured:
        yield from _companions(root, kind, secured[0], simulated=simulated)


def _security(element: ET.Element, root: ET.Element) -> Iterator[Fault]:
    name = element.get("type", "")
    kind = KINDS.get(name)
    if kind is None:
        hint = "; SEV-ES is type 'sev' with policy bit 2" if name == "sev-es" else ""
        yield Fault(element="launchSecurity@type", problem=f"{name!r} is not one of {', '.join(KINDS)}{hint}")
        return
    for attribute, value in element.attrib.items():
        if attribute == "type":
            continue
        if attribute not in kind.attributes:
            problem = f"is not known for type {name!r}, and libvirt would drop it"
            yield Fault(element=f"launchSecurity@{attribute}", problem=problem)
        elif value not in {"yes", "no"}:
            yield Fault(element=f"launchSecurity@{attribute}", problem=f"is {value!r} instead of 'yes' or 'no'")
    tags = [child.tag for child in element]
    for tag in dict.fromkeys(tags):
        if tag not in kind.sizes and tag not in kind.others:
            yield Fault(element=tag, problem=f"is not known for launch security of type {name!r}")
        elif tags.count(tag) > 1:
            yield Fault(element=tag, problem=f"stands in <launchSecurity> {tags.count(tag)} times")
    yield from _policy(element, name, kind)
    for tag, size_bytes in kind.sizes.items():
        yield from _base64(element, tag, size_bytes)
    yield from _pairs(element, kind)
    service = element.find("quoteGenerationService")
    if service is not None and "path" in service.attrib and not service.attrib["path"].startswith("/"):
        yield Fault(
            element="quoteGenerationService@path", problem=f"{service.attrib['path']!r} is not an absolute path"
        )
    if element.get("kernelHashes") == "yes" and not root.findtext("os/kernel"):
        yield Fault(element="kernel", problem="is missing, and kernelHashes='yes' hashes it")


def _pairs(element: ET.Element, kind: _Kind) -> Iterator[Fault]:
    for one, other in (("dhCert", "session"), ("session", "dhCert"), ("idAuth", "idBlock"), ("idBlock", "idAuth")):
        if one in kind.sizes and element.find(one) is not None and element.find(other) is None:
            yield Fault(element=other, problem=f"is missing, and <{one}> means nothing without it")


def _policy(element: ET.Element, name: str, kind: _Kind) -> Iterator[Fault]:
    policy = element.find("policy")
    if policy is None:
        if kind.policy_required:
            yield Fault(element="policy", problem=f"is missing, and launch security of type {name!r} needs it")
        return
    value = number(policy.text)
    if value is None:
        yield Fault(
            element="policy", problem=f"{(policy.text or '')[:40]!r} is not a number, decimal or 0x hexadecimal"
        )
    elif value >= 1 << kind.policy_bits:
        yield Fault(element="policy", problem=f"0x{value:x} has more than {kind.policy_bits} bits")
    elif name == "sev-snp" and not value & SNP_POLICY_MUST:
        yield Fault(element="policy", problem=f"0x{value:x} has bit 17 clear, which SEV-SNP firmware refuses")
    elif name == "tdx" and value & ~TDX_POLICY_MAY:
        problem = f"0x{value:x} has bits other than 0 (debug) and 28 (SEPT_VE_DISABLE), which libvirt refuses"
        yield Fault(element="policy", problem=problem)


def _base64(element: ET.Element, tag: str, size_bytes: int) -> Iterator[Fault]:
    child = element.find(tag)
    if child is None:
        return
    try:
        data = base64.b64decode("".join((child.text or "").split()), validate=True)
    except (binascii.Error, ValueError):
        yield Fault(element=tag, problem="is not base64")
        return
    if len(data) != size_bytes:
        yield Fault(element=tag, problem=f"has {len(data)} bytes instead of {size_bytes}")


def _machine(root: ET.Element, kind: str) -> Iterator[Fault]:
    machine = root.find("os/type")
    if machine is None:
        yield Fault(element="type", problem="is missing in <os>")
        return
    if machine.get("arch", "x86_64") != "x86_64":
        yield Fault(element="type@arch", problem=f"is {machine.get('arch')!r}; guests here are x86_64")
    if kind and not MACHINE.fullmatch(machine.get("machine", "")):
        problem = f"is {machine.get('machine')!r}; launch security needs q35: others have no modern virtio"
        yield Fault(element="type@machine", problem=problem)


def _loader(root: ET.Element, kind: str) -> Iterator[Fault]:
    loader = root.find("os/loader")
    variables = [tag for tag in ("nvram", "varstore") if root.find(f"os/{tag}") is not None]
    stateless = loader is not None and loader.get("stateless") == "yes"
    for tag in variables:
        if stateless or kind:
            yield Fault(element=tag, problem="holds firmware variables, which nobody measures; the loader is stateless")
    if not kind:
        return
    if loader is None or not stateless:
        yield Fault(
            element="loader", problem="must have stateless='yes': variables that the host keeps are not measured"
        )
    if loader is None:
        return
    os = root.find("os")
    chosen_by_libvirt = os is not None and os.get("firmware") == "efi" and not (loader.text or "").strip()
    if loader.get("type", "rom" if chosen_by_libvirt else "") != "rom":
        yield Fault(element="loader@type", problem=f"is {loader.get('type')!r}; measured firmware is of type 'rom'")
    if loader.get("secure") == "yes":
        yield Fault(element="loader@secure", problem="is 'yes', which needs SMM, and launch security excludes that")


def _vsock(root: ET.Element) -> Iterator[Fault]:
    for cid in root.iterfind("devices/vsock/cid"):
        address = cid.get("address")
        value = number(address) if address is not None else FIRST_CID
        if value is None or not FIRST_CID <= value < 1 << 32:
            yield Fault(element="cid@address", problem=f"is {address!r}; context ids of guests begin at {FIRST_CID}")


def _companions(root: ET.Element, kind: str, element: ET.Element, *, simulated: bool) -> Iterator[Fault]:
    """What must stand beside launch security for it to work and to mean something."""
    virt = root.get("type", "")
    if virt != "kvm" and not simulated:
        yield Fault(element="domain@type", problem=f"is {virt!r}: launch security is hardware's, and needs 'kvm'")
    if root.findtext("on_reboot", "restart").strip() != "destroy":
        problem = "must be 'destroy': such a guest cannot be reset in place, and anew it has no secret"
        yield Fault(element="on_reboot", problem=problem)
    if root.find("maxMemory") is not None:
        yield Fault(element="maxMemory", problem="makes memory pluggable, which is not measured")
    if root.find("devices/hostdev") is not None:
        yield Fault(element="hostdev", problem="gives the guest a device that reaches only memory shared with the host")
    balloon = root.find("devices/memballoon")
    if balloon is not None and balloon.get("model") != "none":
        yield Fault(element="memballoon@model", problem=f"is {balloon.get('model')!r} and must be 'none'")
    if (
        kind == "sev"
        and virt == "kvm"
        and root.find("memoryBacking/locked") is None
        and root.find("memtune/hard_limit") is None
    ):
        yield Fault(element="memoryBacking", problem="has no <locked/>: SEV pins all of the guest's memory")
    if kind == "tdx":
        yield from _tdx_features(root)
    elif kind == "sev-snp" or _encrypted_state(element):
        cpu = root.find("cpu")
        if cpu is None or cpu.get("mode") != "custom":
            mode = None if cpu is None else cpu.get("mode")
            problem = f"is {mode!r}: the processor is measured, so that it must be a named model"
            yield Fault(element="cpu@mode", problem=problem)


def _encrypted_state(element: ET.Element) -> bool:
    policy = number(element.findtext("policy"))
    return element.get("type") == "sev" and bool((policy or 0) & SEV_POLICY_ES)


def _tdx_features(root: ET.Element) -> Iterator[Fault]:
    for tag in ("pmu", "smm"):
        state = root.find(f"features/{tag}")
        if state is None or state.get("state") != "off":
            yield Fault(element=tag, problem="must be in <features> with state='off' for TDX")
    ioapic = root.find("features/ioapic")
    if ioapic is None or ioapic.get("driver") != "qemu":
        yield Fault(element="ioapic", problem="must be in <features> with driver='qemu' for TDX")


def number(text: str | None) -> int | None:
    """A number as libvirt reads it, decimal or hexadecimal with 0x; None where it is not one."""
    text = (text or "").strip()
    if not _NUMBER.fullmatch(text):
        return None
    return int(text, 16) if text[:2].lower() == "0x" else int(text)
