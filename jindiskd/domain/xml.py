"""The domain's XML: written from a `DomainSpec`, and read back as libvirt has it.

Element by element: libvirt's formatdomain page. Magic values say where they come from.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

from jindiskd.base.platform import Platform
from jindiskd.domain.binding import Binding
from jindiskd.domain.security import Stated, Tdx, element
from jindiskd.domain.spec import BootInputs, DomainSpec
from jindiskd.errors import EXIT_INTEGRITY, JindiskError
from jindiskd.guest.config import SERIAL_PREFIX, serial_of

METADATA_URI = "https://jindisk.org/xmlns/libvirt/domain/1"
ROOT_SERIAL = serial_of("root")
"""Of the image's own disk: tells the guest where to look first."""
TARGETS = tuple(f"vd{letter}" for letter in "bcdefghijklmnopqrstuvwxyz")
"""For the disks of data volumes; the guest finds them by their serial numbers."""
VIRTIO, SCSI, VIRTIO_SCSI = "virtio", "scsi", "virtio-scsi"
QEMU_URI = "http://libvirt.org/schemas/domain/qemu/1.0"
MAX_XML_BYTES = 1 << 20
ET.register_namespace("jd", METADATA_URI)
ET.register_namespace("qemu", QEMU_URI)


class MalformedDomain(JindiskError, code="MalformedDomain", exit_code=EXIT_INTEGRITY):
    """A domain's XML is not what can be worked with."""

    def __init__(self, problem: str) -> None:
        """`problem` names the element."""
        super().__init__(f"the domain's XML cannot be used: {problem}")


def write(spec: DomainSpec) -> str:
    """The XML to define. Whether it can be right is `check.refuse`'s to say, whether this host can run it
    `capabilities.require`'s.
    """
    domain = ET.Element("domain", type=spec.virt_type)
    _text(domain, "name", spec.name)
    _text(domain, "uuid", spec.uuid)
    ET.SubElement(domain, "metadata").append(metadata(spec))
    _text(domain, "memory", str(spec.memory_mib), unit="MiB")
    _memory_backing(domain, spec)
    _text(domain, "vcpu", str(spec.boot.vcpus), placement="static")
    boot = ET.SubElement(domain, "os")
    _text(boot, "type", "hvm", arch="x86_64", machine="q35")  # i440fx has no modern virtio, which iommu='on' needs
    _text(boot, "loader", spec.boot.firmware, type="rom", stateless="yes")  # no variables that are not measured
    _text(boot, "kernel", spec.boot.kernel)
    _text(boot, "initrd", spec.boot.initrd)
    _text(boot, "cmdline", spec.boot.cmdline)
    _features(ET.SubElement(domain, "features"), spec)
    if spec.named_cpu:
        cpu = ET.SubElement(domain, "cpu", mode="custom", match="exact", check="none")
        _text(cpu, "model", spec.boot.cpu_model, fallback="forbid")
    else:
        ET.SubElement(domain, "cpu", mode="host-passthrough", check="none", migratable="on")
    ET.SubElement(domain, "clock", offset="utc")
    _text(domain, "on_poweroff", "destroy")
    # Guests of real platforms cannot be reset in place, and a SEV guest that is made anew would lack its secret.
    _text(domain, "on_reboot", "restart" if spec.security is None else "destroy")
    _text(domain, "on_crash", "destroy")
    _devices(ET.SubElement(domain, "devices"), spec)
    if spec.vsock_socket is not None:
        domain.append(vsock_arguments(spec.vsock_socket, iommu=spec.security is not None))
    if spec.security is not None:
        domain.append(element(spec.security))
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def metadata(spec: DomainSpec) -> ET.Element:
    """Our element in a domain's metadata. Readable by everybody, and writable by whoever may define domains."""
    binding = spec.binding
    ours = ET.Element(f"{{{METADATA_URI}}}domain")
    ET.SubElement(
        ours, f"{{{METADATA_URI}}}image", name=binding.image, id=binding.image_id, platform=binding.platform.value
    )
    if spec.security is None and (told := spec.stated.elements(METADATA_URI)):
        ET.SubElement(ours, f"{{{METADATA_URI}}}launchSecurity").extend(told)
    return ours


def vsock_arguments(socket: Path, *, iommu: bool) -> ET.Element:
    """QEMU's arguments for a vhost-user vsock device, which libvirt has no element for."""
    commandline = ET.Element(f"{{{QEMU_URI}}}commandline")
    device = "vhost-user-vsock-pci,id=jdvsock0,chardev=jdvsock,addr=0x1e"  # a slot libvirt does not hand out
    for argument in (
        "-chardev",
        f"socket,id=jdvsock,path={socket}",
        "-device",
        f"{device},iommu_platform=on" if iommu else device,
    ):
        ET.SubElement(commandline, f"{{{QEMU_URI}}}arg", value=argument)
    return commandline


def _memory_backing(domain: ET.Element, spec: DomainSpec) -> None:
    if spec.vsock_socket is None and not spec.pinned:
        return
    backing = ET.SubElement(domain, "memoryBacking")
    if spec.pinned and spec.virt_type == "kvm":
        ET.SubElement(backing, "locked")  # the firmware pins it all: RLIMIT_MEMLOCK must not be in the way
    if spec.vsock_socket is not None:  # vhost-user devices map the guest's memory
        ET.SubElement(backing, "source", type="memfd")
        ET.SubElement(backing, "access", mode="shared")


def _features(features: ET.Element, spec: DomainSpec) -> None:
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if isinstance(spec.security, Tdx):  # libvirt does not add these; so that the XML shows what runs
        ET.SubElement(features, "pmu", state="off")
        ET.SubElement(features, "smm", state="off")
        ET.SubElement(features, "ioapic", driver="qemu")


def _devices(devices: ET.Element, spec: DomainSpec) -> None:
    # Bounce buffers for every virtio device: what the device reads is not encrypted memory. QEMU 6.0 and later does
    # it for confidential guests in any case; written so that the XML shows it.
    shared = {} if spec.security is None else {"iommu": "on"}
    _text(devices, "emulator", spec.emulator)
    bus, letter = (SCSI, "s") if spec.scsi else (VIRTIO, "v")
    driver = {} if spec.scsi else shared  # of the controller
    devices.append(disk(spec.disk, f"{letter}da", driver, ROOT_SERIAL, bus=bus))
    for volume, target in zip(spec.volumes, TARGETS, strict=False):
        devices.append(disk(volume.path, f"{letter}{target[1:]}", driver, volume.serial, bus=bus))
    if spec.scsi:
        controller = ET.SubElement(devices, "controller", type="scsi", index="0", model=VIRTIO_SCSI)
        if shared:
            ET.SubElement(controller, "driver", shared)
    ET.SubElement(devices, "controller", type="usb", model="none")
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "log", file=str(spec.console_log), append="on")
    ET.SubElement(serial, "target", type="isa-serial", port="0")
    if spec.vsock_socket is None:
        vsock = ET.SubElement(devices, "vsock", model="virtio")
        ET.SubElement(vsock, "cid", auto="yes")
        if shared:
            ET.SubElement(vsock, "driver", shared)
    ET.SubElement(devices, "memballoon", model="none")
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    if shared:
        ET.SubElement(rng, "driver", shared)


def disk(path: Path, target: str, driver: Mapping[str, str], serial: str = "", *, bus: str = VIRTIO) -> ET.Element:
    """A disk on a raw file; `driver` are further attributes of its driver."""
    made = ET.Element("disk", type="file", device="disk")
    ET.SubElement(made, "driver", {"name": "qemu", "type": "raw", "discard": "unmap", **driver})
    ET.SubElement(made, "source", file=str(path))
    ET.SubElement(made, "target", dev=target, bus=bus)
    if serial:
        _text(made, "serial", serial)
    return made


def with_serial(root: ET.Element, serial: str) -> list[ET.Element]:
    """The disks of a domain that have a serial number."""
    return [disk for disk in root.iterfind("devices/disk") if (disk.findtext("serial") or "").strip() == serial]


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def parse(text: str) -> ET.Element:
    """A domain document from libvirt or from a user: bounded, and without entities.

    Raises:
        MalformedDomain: too long, with a document type, or not a domain.
    """
    if len(text) > MAX_XML_BYTES or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise MalformedDomain("it is too long or declares entities")
    try:
        root = ET.fromstring(text)  # noqa: S314 (no entities, bounded; above)
    except ET.ParseError as exc:
        raise MalformedDomain("it is not XML") from exc
    if root.tag != "domain":
        raise MalformedDomain("the outermost element is not <domain>")
    return root


def memory_mib(root: ET.Element) -> int | None:
    """A domain's memory in MiB, rounded up; None where it is not given in a way that is known."""
    memory = root.find("memory")
    text = "" if memory is None else (memory.text or "").strip()
    # libvirt writes KiB, whatever it was given.
    unit = {"b": 1, "bytes": 1, "KiB": 1 << 10, "k": 1 << 10, "MiB": 1 << 20, "M": 1 << 20, "GiB": 1 << 30}
    scale = unit.get("KiB" if memory is None else memory.get("unit", "KiB"))
    if scale is None or not text.isascii() or not text.isdigit() or len(text) > 20:
        return None
    return -(-int(text) * scale // (1 << 20))


def binding_of(root: ET.Element) -> Binding | None:
    """Our metadata of a domain; None where there is none."""
    image = root.find(f"metadata/{{{METADATA_URI}}}domain/{{{METADATA_URI}}}image")
    if image is None:
        return None
    try:
        platform = Platform(image.get("platform", ""))
    except ValueError as exc:
        raise MalformedDomain("the platform in our metadata is not known") from exc
    return Binding(image=image.get("name", ""), image_id=image.get("id", ""), platform=platform)


def stated(root: ET.Element) -> Stated:
    """The policy and ID block that a domain is launched with; of one that is simulated in the guest, by our metadata.

    Raises:
        MalformedDomain: they cannot be read.
    """
    element = root.find("launchSecurity")
    if element is None:
        element = root.find(f"metadata/{{{METADATA_URI}}}domain/{{{METADATA_URI}}}launchSecurity")
    try:
        return Stated.read(element)
    except ValueError as exc:
        raise MalformedDomain("its launch security cannot be read") from exc


def boot_inputs(root: ET.Element) -> BootInputs:
    """What a domain boots, from its live XML.

    Raises:
        MalformedDomain: an element of direct boot is missing.
    """
    found = {tag: root.findtext(f"os/{tag}") for tag in ("loader", "kernel", "initrd", "cmdline")}
    passed = root.find("cpu[@mode='host-passthrough']")
    model = root.findtext("cpu/model") if passed is None else "host-passthrough"
    for tag, value in {**found, "cpu model": model}.items():
        if value is None:
            raise MalformedDomain(f"it has no <{tag}>")
    return BootInputs(
        firmware=found["loader"] or "",
        kernel=found["kernel"] or "",
        initrd=found["initrd"] or "",
        cmdline=found["cmdline"] or "",
        vcpus=int(root.findtext("vcpu") or "1"),
        cpu_model=model or "",
        simulated=stated(root) if root.find("launchSecurity") is None else Stated(),
    )


def kernel_cid(root: ET.Element) -> int | None:
    """The context id of the kernel's vsock device; None where there is none, or none yet (it is off)."""
    cid = root.find("devices/vsock/cid")
    address = "" if cid is None else cid.get("address", "")
    return int(address) if address.isascii() and address.isdecimal() and len(address) <= 10 else None


def differences(wanted: ET.Element, got: ET.Element) -> tuple[str, ...]:
    """The elements that decide what is measured and protected and in which two definitions differ, by name.

    libvirt drops what it does not know, without a word, and completes what is missing; the former must not pass.
    """
    found = []
    for tag in ("os/loader", "os/kernel", "os/initrd", "os/cmdline", "vcpu", "cpu/model", "devices/disk/source"):
        a, b = wanted.find(tag), got.find(tag)
        if (a is None) != (b is None) or (a is not None and b is not None and _signature(a) - _signature(b)):
            found.append(f"<{tag.rpartition('/')[2]}>")
    if _sources(wanted) != _sources(got):
        found.append("<disk>")
    a, b = wanted.find("launchSecurity"), got.find("launchSecurity")
    if (a is None) != (b is None):
        found.append("<launchSecurity>")
    elif a is not None and b is not None:
        missing = _signature(a) - _signature(b)
        for child in a:
            other = b.find(child.tag)
            if other is None or _signature(child) - _signature(other):
                missing.add((child.tag, ""))
        if missing:
            found.append("<launchSecurity>")
    return tuple(found)


def _sources(root: ET.Element) -> list[tuple[str, str]]:
    """Serial number and file of each disk that has a serial number of ours."""
    found = []
    for disk in root.iterfind("devices/disk"):
        serial, source = (disk.findtext("serial") or "").strip(), disk.find("source")
        if serial.startswith(SERIAL_PREFIX):
            found.append((serial, "" if source is None else source.get("file", "")))
    return sorted(found)


def _signature(element: ET.Element) -> set[tuple[str, str]]:
    """Attributes and text of an element; a number as its value, since libvirt writes it in a form of its own."""
    text = (element.text or "").strip()
    if text.startswith("0x"):
        text = str(int(text, 16))
    return {*element.attrib.items(), ("", text)}
