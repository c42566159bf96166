"""Binding a domain that somebody else made to an image: what changes in its definition, and what stays.

What is measured or protects the guest becomes the image's; everything else, such as networks, displays and further
disks, stays as its owner made it. virsh, virt-manager and virt-clone keep our metadata; a clone has another UUID and is
not adopted by that.
"""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from jindiskd.domain import check, layers, xml
from jindiskd.domain.check import DomainRefused, Fault
from jindiskd.domain.security import Tdx, element
from jindiskd.domain.spec import DomainSpec

_QEMU_ARG = f"{{{xml.QEMU_URI}}}arg"
_COMMANDLINE = f"{{{xml.QEMU_URI}}}commandline"
_OURS = f"{{{xml.METADATA_URI}}}domain"
VSOCK_SLOT = 0x1E


def adopt(text: str, spec: DomainSpec) -> str:
    """The definition to give libvirt, made from the one it has.

    Args:
        text: the inactive XML, with secrets (`VIR_DOMAIN_XML_SECURE`), or they would be lost.
        spec: the domain that would be made for the image; its name, memory and devices other than ours are not used.

    Raises:
        MalformedDomain: not a domain.
        DomainRefused: it cannot become a guest of this image, with every reason.
    """
    root = xml.parse(text)
    found = tuple(_obstacles(root, spec))
    if found:
        raise DomainRefused(found)
    if spec.security is not None:
        root.set("type", spec.virt_type)
    _metadata(root, spec)
    _measured(root, spec)
    _memory(root, spec)
    _devices(root, spec)
    _security(root, spec)
    check.refuse(root, simulated=spec.binding.platform.simulated)
    if wrong := tuple(check.volume_faults(root, spec.volumes, scsi=spec.scsi)):
        raise DomainRefused(wrong)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def release(text: str) -> str:
    """The definition without what only we can serve: our metadata, and the vsock device whose socket we make.

    What is measured stays the image's: what it was before is not known.

    Raises:
        MalformedDomain: not a domain.
    """
    root = xml.parse(text)
    metadata = root.find("metadata")
    if metadata is not None:
        for ours in metadata.findall(_OURS):
            metadata.remove(ours)
    for commandline in root.findall(_COMMANDLINE):
        arguments = commandline.findall(_QEMU_ARG)
        for option, value in zip(arguments[::2], arguments[1::2], strict=False):
            if "jdvsock" in value.get("value", ""):
                commandline.remove(option)
                commandline.remove(value)
        if not len(commandline):
            root.remove(commandline)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _obstacles(root: ET.Element, spec: DomainSpec) -> Iterator[Fault]:
    """What we do not change for the owner."""
    machine = root.find("os/type")
    if machine is None or (machine.text or "").strip() != "hvm":
        yield Fault(element="type", problem="is not 'hvm' in <os>")
    elif not check.MACHINE.fullmatch(machine.get("machine", "")):
        yield Fault(element="type@machine", problem=f"is {machine.get('machine')!r}: make the domain with machine q35")
    yield from _root_obstacles(root, spec)
    for layer in layers.of_image(root, str(spec.disk)):
        # Made the image's own again, it would be started without what was written since.
        problem = f"of the image's disk {layer.target} must be 'raw': {layer.told(root.findtext('name') or '')}"
        yield Fault(element="driver@type", problem=problem)
    for address in root.iterfind("devices/*/address[@type='pci']"):
        if check.number(address.get("bus")) == 0 and check.number(address.get("slot")) == VSOCK_SLOT:
            yield Fault(
                element="address", problem=f"takes slot 0x{VSOCK_SLOT:x} of the root bus, where the vsock device goes"
            )


def _root_obstacles(root: ET.Element, spec: DomainSpec) -> Iterator[Fault]:
    """What is wrong with the image's own disk; a domain without disks gets it."""
    disks = [disk for disk in root.iterfind("devices/disk") if disk.get("device", "disk") == "disk"]
    if not disks:
        return
    ours = next((disk for disk in disks if _path(disk) == str(spec.disk)), None)
    if ours is None:
        problem = f"with the image's disk, {str(spec.disk)!r}, is not there; the first has {_path(disks[0])!r}"
        yield Fault(element="disk", problem=problem)
        return
    if ours is not disks[0] and not spec.finds_root:
        problem = f"has the first source {_path(disks[0])!r}: guests of this image look for {str(spec.disk)!r} there"
        yield Fault(element="disk", problem=problem)
    yield from check.bus_faults(root, ours, "the image's disk", scsi=spec.scsi)


def _path(disk: ET.Element) -> str:
    """The file of a disk; empty where it has none."""
    source = disk.find("source")
    return "" if source is None else source.get("file", "")


def _metadata(root: ET.Element, spec: DomainSpec) -> None:
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.Element("metadata")
        root.insert(0, metadata)
    for ours in metadata.findall(_OURS):
        metadata.remove(ours)
    metadata.append(xml.metadata(spec))


def _measured(root: ET.Element, spec: DomainSpec) -> None:
    boot = root.find("os")
    assert boot is not None  # looked at above
    boot.attrib.pop("firmware", None)
    _remove(boot, "firmware", "loader", "nvram", "varstore", "shim", "kernel", "initrd", "cmdline")
    ET.SubElement(boot, "loader", type="rom", stateless="yes").text = spec.boot.firmware
    for tag, text in (("kernel", spec.boot.kernel), ("initrd", spec.boot.initrd), ("cmdline", spec.boot.cmdline)):
        ET.SubElement(boot, tag).text = text
    _remove(root, "vcpu", "vcpus", "cpu")
    ET.SubElement(root, "vcpu", placement="static").text = str(spec.boot.vcpus)
    if spec.named_cpu:
        cpu = ET.SubElement(root, "cpu", mode="custom", match="exact", check="none")
        ET.SubElement(cpu, "model", fallback="forbid").text = spec.boot.cpu_model
    else:
        ET.SubElement(root, "cpu", mode="host-passthrough", check="none", migratable="on")
    if spec.security is not None:
        _remove(root, "maxMemory")
        on_reboot = root.find("on_reboot")
        if on_reboot is None:
            on_reboot = ET.SubElement(root, "on_reboot")
        on_reboot.text = "destroy"  # in its place: the schema wants the events beside each other


def _memory(root: ET.Element, spec: DomainSpec) -> None:
    backing = root.find("memoryBacking")
    if backing is None:
        backing = ET.SubElement(root, "memoryBacking")
    _remove(backing, "source", "access", "locked")
    if spec.pinned and spec.virt_type == "kvm":
        ET.SubElement(backing, "locked")
    if spec.vsock_socket is not None:
        ET.SubElement(backing, "source", type="memfd")
        ET.SubElement(backing, "access", mode="shared")


def _devices(root: ET.Element, spec: DomainSpec) -> None:
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    if not any(disk.get("device", "disk") == "disk" for disk in devices.iterfind("disk")):
        disk = ET.SubElement(devices, "disk", type="file", device="disk")
        ET.SubElement(disk, "driver", name="qemu", type="raw", discard="unmap")
        ET.SubElement(disk, "source", file=str(spec.disk))
        ET.SubElement(disk, "target", dev="vda", bus="virtio")
    for disk in devices.iterfind("disk"):
        if _path(disk) == str(spec.disk) and disk.find("serial") is None:
            ET.SubElement(disk, "serial").text = xml.ROOT_SERIAL
    serial = devices.find("serial")
    if serial is None:
        serial = ET.SubElement(devices, "serial", type="pty")
    if serial.find("log") is None:
        ET.SubElement(serial, "log", file=str(spec.console_log), append="on")
    _volumes(devices, spec)
    _vsock(root, devices, spec)
    if spec.security is None:
        return
    _remove(devices, "memballoon")
    ET.SubElement(devices, "memballoon", model="none")
    for device in devices:
        virtio = device.find("target[@bus='virtio']") is not None or device.find("model[@type='virtio']") is not None
        if (
            virtio
            or (device.tag in {"rng", "vsock"})
            or (device.tag, device.get("type")) == ("controller", "virtio-serial")
            or (device.tag, device.get("model")) == ("controller", xml.VIRTIO_SCSI)
        ):
            driver = device.find("driver")
            if driver is None:
                driver = ET.SubElement(device, "driver")
            driver.set("iommu", "on")


def _volumes(devices: ET.Element, spec: DomainSpec) -> None:
    """Make the disks of the image's data volumes anew: those that say to be one, or were one, go; others stay."""
    ours = {volume.serial: str(volume.path) for volume in spec.volumes}
    for other in devices.findall("disk"):
        path = _path(other)
        known = (other.findtext("serial") or "").strip() in ours or path in ours.values()
        if known or check.of_volume(path, spec.disk.parent):
            devices.remove(other)
    taken = {target.get("dev") for target in devices.iterfind("disk/target")}
    free = (target for target in xml.TARGETS if target not in taken)
    for volume, target in zip(spec.volumes, free, strict=False):
        # Behind the other disks: the image's own stays the first that its guests see.
        at = max(number for number, device in enumerate(devices) if device.tag == "disk")
        devices.insert(at + 1, xml.disk(volume.path, target, {}, volume.serial))


def _vsock(root: ET.Element, devices: ET.Element, spec: DomainSpec) -> None:
    """One vsock device: a guest has no way to tell which of two leads to its broker."""
    _remove(devices, "vsock")
    commandline = root.find(_COMMANDLINE)
    if commandline is not None:
        arguments = commandline.findall(_QEMU_ARG)
        for option, value in itertools.pairwise(arguments):
            if "jdvsock" in value.get("value", ""):
                commandline.remove(option)
                commandline.remove(value)
    if spec.vsock_socket is None:
        ET.SubElement(ET.SubElement(devices, "vsock", model="virtio"), "cid", auto="yes")
        return
    ours = xml.vsock_arguments(spec.vsock_socket, iommu=spec.security is not None)
    if commandline is None:
        root.append(ours)
    else:
        commandline.extend(list(ours))


def _security(root: ET.Element, spec: DomainSpec) -> None:
    """The owner's own launch security stays where it is of the right type, but for what the image has of its own; a
    SEV session is never used again.
    """
    wanted = None if spec.security is None else element(spec.security)
    kept = root.find("launchSecurity")
    _remove(root, "launchSecurity")
    if wanted is None:
        return
    if kept is not None and kept.get("type") == wanted.get("type"):
        _remove(kept, "cbitpos", "reducedPhysBits", "dhCert", "session")
        if spec.stated.policy is not None:
            _take(kept, wanted, "policy")
        if spec.stated.id_block:
            _take(kept, wanted, "idBlock", "idAuth")
            kept.set("authorKey", wanted.get("authorKey", "no"))
        wanted = kept
    root.append(wanted)
    if isinstance(spec.security, Tdx):
        features = root.find("features")
        if features is None:
            features = ET.SubElement(root, "features")
        _remove(features, "pmu", "smm", "ioapic")
        ET.SubElement(features, "pmu", state="off")
        ET.SubElement(features, "smm", state="off")
        ET.SubElement(features, "ioapic", driver="qemu")


def _take(kept: ET.Element, wanted: ET.Element, *tags: str) -> None:
    """Replace these elements by those of the image's."""
    _remove(kept, *tags)
    kept.extend([child for child in wanted if child.tag in tags])


def _remove(parent: ET.Element, *tags: str) -> None:
    for child in [child for child in parent if child.tag in tags]:
        parent.remove(child)
