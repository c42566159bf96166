"""The domain's XML: written from a specification, and read back as libvirt has it.

Element by element: libvirt's formatdomain page. Magic values say where they come from.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from jindiskd.base.platform import Platform
from jindiskd.domain.binding import Binding
from jindiskd.errors import EXIT_INTEGRITY, JindiskError, NotSupported
from jindiskd.image.manifest import Manifest

METADATA_URI = "https://jindisk.org/xmlns/libvirt/domain/1"
QEMU_URI = "http://libvirt.org/schemas/domain/qemu/1.0"
MAX_XML_BYTES = 1 << 20
ET.register_namespace("jd", METADATA_URI)
ET.register_namespace("qemu", QEMU_URI)


class MalformedDomain(JindiskError, code="MalformedDomain", exit_code=EXIT_INTEGRITY):
    """A domain's XML is not what can be worked with."""

    def __init__(self, problem: str) -> None:
        """`problem` names the element."""
        super().__init__(f"the domain's XML cannot be used: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BootInputs:
    """What libvirt was told to boot: the inputs of the launch digest."""

    firmware: str
    kernel: str
    initrd: str
    cmdline: str
    vcpus: int
    cpu_model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSpec:
    """A domain to be defined."""

    name: str
    uuid: str
    binding: Binding
    boot: BootInputs
    memory_mib: int
    disk: Path
    console_log: Path
    vsock_socket: Path | None
    """The vhost-user socket; None where the host's kernel has vhost-vsock."""
    emulator: str = "/usr/bin/qemu-system-x86_64"


def from_manifest(
    manifest: Manifest, directory: Path, *, name: str, uuid: str, memory_mib: int, console_log: Path, vsock: Path | None
) -> DomainSpec:
    """The domain of an image in the store, `directory` being the image's."""
    return DomainSpec(
        name=name,
        uuid=uuid,
        binding=Binding(image=manifest.name, image_id=manifest.image_id, platform=manifest.platform),
        boot=BootInputs(
            firmware=manifest.shape.firmware,
            kernel=str(directory / manifest.kernel.file),
            initrd=str(directory / manifest.initrd.file),
            cmdline=(directory / manifest.cmdline.file).read_text(),
            vcpus=manifest.shape.vcpus,
            cpu_model=manifest.shape.cpu_model,
        ),
        memory_mib=memory_mib,
        disk=directory / "disk.img",
        console_log=console_log,
        vsock_socket=vsock,
    )


def write(spec: DomainSpec) -> str:
    """The XML to define.

    Raises:
        NotSupported: a platform whose launch security this release does not write.
    """
    if not spec.binding.platform.simulated:
        raise NotSupported(
            f"launching an image of platform {spec.binding.platform}", "this release launches simulated platforms only"
        )
    # Emulation, unless somebody shows that hardware virtualisation works: /dev/kvm being there does not.
    domain = ET.Element("domain", type="qemu")
    _text(domain, "name", spec.name)
    _text(domain, "uuid", spec.uuid)
    ours = ET.SubElement(ET.SubElement(domain, "metadata"), f"{{{METADATA_URI}}}domain")
    binding = spec.binding
    ET.SubElement(
        ours, f"{{{METADATA_URI}}}image", name=binding.image, id=binding.image_id, platform=binding.platform.value
    )
    _text(domain, "memory", str(spec.memory_mib), unit="MiB")
    if spec.vsock_socket is not None:
        backing = ET.SubElement(domain, "memoryBacking")  # vhost-user devices map the guest's memory
        ET.SubElement(backing, "source", type="memfd")
        ET.SubElement(backing, "access", mode="shared")
    _text(domain, "vcpu", str(spec.boot.vcpus), placement="static")
    boot = ET.SubElement(domain, "os")
    _text(boot, "type", "hvm", arch="x86_64", machine="q35")
    _text(boot, "loader", spec.boot.firmware, type="rom", stateless="yes")
    _text(boot, "kernel", spec.boot.kernel)
    _text(boot, "initrd", spec.boot.initrd)
    _text(boot, "cmdline", spec.boot.cmdline)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    cpu = ET.SubElement(domain, "cpu", mode="custom", match="exact", check="none")
    _text(cpu, "model", spec.boot.cpu_model, fallback="forbid")
    ET.SubElement(domain, "clock", offset="utc")
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart")
    _text(domain, "on_crash", "destroy")
    _devices(ET.SubElement(domain, "devices"), spec)
    if spec.vsock_socket is not None:
        commandline = ET.SubElement(domain, f"{{{QEMU_URI}}}commandline")
        for argument in (
            "-chardev",
            f"socket,id=jdvsock,path={spec.vsock_socket}",
            "-device",
            "vhost-user-vsock-pci,id=jdvsock0,chardev=jdvsock,addr=0x1e",  # a slot libvirt does not hand out
        ):
            ET.SubElement(commandline, f"{{{QEMU_URI}}}arg", value=argument)
    return ET.tostring(domain, encoding="unicode")


def _devices(devices: ET.Element, spec: DomainSpec) -> None:
    _text(devices, "emulator", spec.emulator)
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="raw", discard="unmap")
    ET.SubElement(disk, "source", file=str(spec.disk))
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    ET.SubElement(devices, "controller", type="usb", model="none")
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "log", file=str(spec.console_log), append="off")
    ET.SubElement(serial, "target", type="isa-serial", port="0")
    if spec.vsock_socket is None:
        ET.SubElement(ET.SubElement(devices, "vsock", model="virtio"), "cid", auto="yes")
    ET.SubElement(devices, "memballoon", model="none")
    _text(ET.SubElement(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")


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


def boot_inputs(root: ET.Element) -> BootInputs:
    """What a domain boots, from its live XML.

    Raises:
        MalformedDomain: an element of direct boot is missing.
    """
    found = {tag: root.findtext(f"os/{tag}") for tag in ("loader", "kernel", "initrd", "cmdline")}
    model = root.findtext("cpu/model")
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
    )


def differences(wanted: ET.Element, got: ET.Element) -> tuple[str, ...]:
    """The elements that decide what is measured and protected and in which two definitions differ, by name.

    libvirt drops what it does not know, without a word, and completes what is missing; the former must not pass.
    """
    found = []
    for tag in ("os/loader", "os/kernel", "os/initrd", "os/cmdline", "vcpu", "cpu/model", "devices/disk/source"):
        a, b = wanted.find(tag), got.find(tag)
        if (a is None) != (b is None) or (a is not None and b is not None and _signature(a) - _signature(b)):
            found.append(f"<{tag.rpartition('/')[2]}>")
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


def _signature(element: ET.Element) -> set[tuple[str, str]]:
    """Attributes and text of an element; a number as its value, since libvirt writes it in a form of its own."""
    text = (element.text or "").strip()
    if text.startswith("0x"):
        text = str(int(text, 16))
    return {*element.attrib.items(), ("", text)}
