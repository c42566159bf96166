"""Domains that others made, changed into guests of an image: what changes, what stays, what is refused."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from lxml import etree

from jindiskd.domain import adoption, check, layers, xml
from jindiskd.domain.check import DomainRefused

from .test_xml import NEWEST_SCHEMA, UUID, VOLUMES, of_kind

KINDS = ["simulated-snp", "sev", "sev-es", "snp", "tdx"]


@pytest.fixture
def made() -> str:
    """What virt-install 4.1 defined with libvirt 9.0, as `virsh dumpxml --inactive --security-info` shows it.

    Its options: --virt-type qemu --import --machine q35 --disk path=...,format=raw,bus=virtio
    --network type=user,model=virtio --graphics vnc,password=secret
    """
    return (Path(__file__).parent / "data/virt-install.xml").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_what_virt_install_made_becomes_a_guest_of_the_image(made: str, golden, kind: str) -> None:
    """Measured parts are the image's, the rest the owner's; the newest schema accepts it; again changes nothing."""
    spec = of_kind(kind, name="web")
    text = adoption.adopt(made, spec)
    root = xml.parse(text)
    assert xml.boot_inputs(root) == spec.boot if kind != "tdx" else True
    assert xml.binding_of(root) == spec.binding
    before = xml.parse(made)
    assert root.findtext("memory") == before.findtext("memory")
    graphics = root.find("devices/graphics")
    assert graphics is not None
    assert graphics.get("passwd") == "secret"
    assert len(root.findall("devices/interface")) == 1
    assert sorted(adoption.adopt(text, spec).split()) == sorted(text.split())
    golden(Path(__file__).parent / "golden" / f"adopted-{kind}.xml", text)
    if NEWEST_SCHEMA.exists():
        etree.RelaxNG(etree.parse(NEWEST_SCHEMA)).assertValid(etree.fromstring(text))


@pytest.mark.parametrize(
    ("old", "new", "element"),
    [
        ("machine='pc-q35-7.2'", "machine='pc'", "type@machine"),
        ("/var/lib/jindiskd/images/web/disk.img", "/other.img", "disk"),
        ("type='raw'", "type='qcow2'", "driver@type"),
        ("bus='virtio'", "bus='sata'", "target@bus"),
        ("dev='vda' bus='virtio'", "dev='sda' bus='scsi'", "target@bus"),
        (">hvm<", ">exe<", "type"),
    ],
)
def test_what_is_not_ours_to_change_is_refused(made: str, old: str, new: str, element: str) -> None:
    """By the element, before anything is done."""
    assert old in made
    with pytest.raises(DomainRefused) as caught:
        adoption.adopt(made.replace(old, new), of_kind("simulated-snp", name="web"))
    assert [fault.element for fault in caught.value.faults] == [element]


def test_the_images_disk_may_be_any_of_them(made: str) -> None:
    """Where its guests look for it, which older images do not; our serial number is put on it, unless it has one."""
    first = """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/own.qcow2'/>
      <target dev='vdb' bus='virtio'/></disk>"""
    text = made.replace("<disk", f"{first}<disk", 1)
    with pytest.raises(DomainRefused, match=r"look for '/var/lib/jindiskd/images/web/disk\.img' there"):
        adoption.adopt(text, of_kind("simulated-snp", name="web"))
    spec = of_kind("simulated-snp", name="web", finds_root=True)
    disks = xml.parse(adoption.adopt(text, spec)).findall("devices/disk")
    assert [disk.findtext("serial") for disk in disks] == [None, "jd-root"]
    assert list(layers.of_image(xml.parse(adoption.adopt(text, spec)))) == []
    named = text.replace("disk.img'/>", "disk.img'/><serial>mine</serial>")
    disks = xml.parse(adoption.adopt(named, spec)).findall("devices/disk")
    assert [disk.findtext("serial") for disk in disks] == [None, "mine"]


def test_a_device_in_the_way_of_ours(made: str) -> None:
    """The slot of the vsock device must be free."""
    root = xml.parse(made)
    interface = root.find("devices/interface")
    assert interface is not None
    ET.SubElement(interface, "address", type="pci", domain="0", bus="0x00", slot="0x1e", function="0")
    with pytest.raises(DomainRefused, match="slot 0x1e"):
        adoption.adopt(ET.tostring(root, encoding="unicode"), of_kind("simulated-snp", name="web"))


def test_a_domain_without_disks_gets_the_images() -> None:
    """And a console, whose log can be looked at."""
    machine = "<os><type machine='q35'>hvm</type></os>"
    text = f"<domain type='qemu'><name>web</name><uuid>{UUID}</uuid><memory>1</memory>{machine}</domain>"
    spec = of_kind("simulated-snp", name="web")
    root = xml.parse(adoption.adopt(text, spec))
    source = root.find("devices/disk/source")
    assert source is not None
    assert source.get("file") == str(spec.disk)
    assert root.find("devices/serial/log") is not None


def test_the_owners_launch_security_stays(made: str) -> None:
    """Host data and an ID block are the owner's; a SEV session is for one launch and goes."""
    root = xml.parse(made)
    root.append(
        ET.fromstring(
            "<launchSecurity type='sev-snp' kernelHashes='yes'><cbitpos>51</cbitpos><policy>0xb0000</policy>"
            f"<hostData>{'A' * 43}=</hostData></launchSecurity>"
        )
    )
    found = xml.parse(adoption.adopt(ET.tostring(root, encoding="unicode"), of_kind("snp", name="web")))
    assert found.findtext("launchSecurity/policy") == "0xb0000"
    assert found.findtext("launchSecurity/hostData") == "A" * 43 + "="
    assert found.find("launchSecurity/cbitpos") is None
    sev = ET.tostring(root, encoding="unicode").replace("sev-snp", "sev")
    found = xml.parse(adoption.adopt(sev.replace("hostData", "session"), of_kind("sev", name="web")))
    assert found.find("launchSecurity/session") is None


def test_two_vsock_devices_never(made: str) -> None:
    """The owner's goes; arguments of the owner's for QEMU stay beside ours."""
    text = made.replace(
        "</devices>", "<vsock model='virtio'><cid auto='yes'/></vsock></devices>"
        f"<commandline xmlns='{xml.QEMU_URI}'><arg value='-name'/><arg value='guest=x'/></commandline>",
    )  # fmt: skip
    found = xml.parse(adoption.adopt(text, of_kind("simulated-snp", name="web")))
    assert found.find("devices/vsock") is None
    values = [arg.get("value") for arg in found.iter(f"{{{xml.QEMU_URI}}}arg")]
    assert values[:2] == ["-name", "guest=x"]
    assert len(values) == 6


def test_the_disks_of_data_volumes_are_added(made: str) -> None:
    """Behind the owner's own disks, each with its serial number; one that says to be such a disk is replaced."""
    stray = """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/stray.qcow2'/>
      <target dev='vdb' bus='virtio'/></disk>"""
    false = """<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/false.img'/>
      <target dev='vdc' bus='virtio'/><serial>jd-data</serial></disk>"""
    text = made.replace("<controller", f"{stray}{false}<controller", 1)
    spec = of_kind("snp", name="web", volumes=VOLUMES)
    adopted = adoption.adopt(text, spec)
    disks = xml.parse(adopted).findall("devices/disk")
    found = [(disk.findtext("serial"), disk.find("source").get("file")) for disk in disks]  # type: ignore[union-attr]  # ours have one
    assert found[0] == ("jd-root", str(spec.disk))
    assert set(found[1:]) == {(None, "/stray.qcow2"), *((disk.serial, str(disk.path)) for disk in VOLUMES)}
    assert len({disk.find("target").get("dev") for disk in disks}) == 4  # type: ignore[union-attr]  # as above
    assert all(disk.find("driver").get("iommu") == "on" for disk in disks)  # type: ignore[union-attr]  # as above
    assert sorted(adoption.adopt(adopted, spec).split()) == sorted(adopted.split())
    if NEWEST_SCHEMA.exists():
        etree.RelaxNG(etree.parse(NEWEST_SCHEMA)).assertValid(etree.fromstring(adopted))


@pytest.mark.parametrize(
    ("old", "new", "element"),
    [
        ("<serial>jd-data</serial>", "", "disk"),
        ("<serial>jd-data</serial>", "<serial>jd-logs</serial>", "disk"),
        ("volume-data.img", "volume-logs.img", "source@file"),
        ("volume-data.img", "disk.img", "source@file"),
    ],
)
def test_a_domain_without_its_data_disks_is_not_started(old: str, new: str, element: str) -> None:
    """A disk that is missing, doubled, or another's is found before the machine is started."""
    text = xml.write(of_kind("snp", volumes=VOLUMES))
    assert list(check.volume_faults(xml.parse(text), VOLUMES)) == []
    changed = xml.parse(text.replace(old, new))
    found = list(check.volume_faults(changed, VOLUMES))
    assert found
    assert found[0].element == element
    assert "<disk>" in xml.differences(xml.parse(text), changed)


def on_scsi(made: str, model: str = "virtio-scsi", disk: str = "controller='0' ") -> str:
    """What virt-install made, with its disk on a SCSI controller."""
    address = f"<address type='drive' {disk}bus='0' target='0' unit='0'/>"
    start, end = made.index("<address", made.index("<disk")), made.index("</disk>")
    text = made[:start] + address + made[end:]
    text = text.replace("dev='vda' bus='virtio'", "dev='sda' bus='scsi'")
    controller = f"<controller type='scsi' index='0' model='{model}'/>" if model else ""
    return text.replace("<controller", f"{controller}<controller", 1)


@pytest.mark.parametrize("kind", ["simulated-snp", "snp"])
def test_a_disk_on_a_virtio_scsi_controller_is_taken_by_an_image_built_for_it(made: str, kind: str) -> None:
    """Its data disks are added as virtio disks, whose driver each image has; the controller gets its bounce buffers."""
    spec = of_kind(kind, name="web", volumes=VOLUMES, scsi=True)
    adopted = adoption.adopt(on_scsi(made), spec)
    root = xml.parse(adopted)
    buses = [target.get("bus") for target in root.iterfind("devices/disk/target")]
    assert buses == ["scsi", *("virtio" for _ in VOLUMES)]
    driver = root.find("devices/controller[@model='virtio-scsi']/driver")
    assert (driver is not None and driver.get("iommu") == "on") == (kind == "snp")
    assert sorted(adoption.adopt(adopted, spec).split()) == sorted(adopted.split())
    assert not list(check.root_bus_faults(root, str(spec.disk), scsi=True))
    (fault,) = check.root_bus_faults(root, str(spec.disk), scsi=False)
    assert "build the image with --disk-bus scsi" in str(fault)
    if NEWEST_SCHEMA.exists():
        etree.RelaxNG(etree.parse(NEWEST_SCHEMA)).assertValid(etree.fromstring(adopted))


@pytest.mark.parametrize(
    ("changes", "scsi", "word"),
    [
        ({}, False, "no driver: make it 'virtio', for which they have one, or build the image with --disk-bus scsi"),
        ({"model": "lsilogic"}, True, "is 'lsilogic': make it 'virtio-scsi'"),
        ({"model": ""}, True, "SCSI controller 0 is not given: make it 'virtio-scsi'"),
        ({"disk": "controller='3' "}, True, "SCSI controller 3 is not given"),
    ],
)
def test_a_scsi_disk_without_a_driver_is_refused(made: str, changes: dict[str, str], scsi: bool, word: str) -> None:
    """The image has none, or none for that controller: the refusal says what to change."""
    with pytest.raises(DomainRefused) as caught:
        adoption.adopt(on_scsi(made, **changes), of_kind("simulated-snp", name="web", scsi=scsi))
    assert word in str(caught.value)


@pytest.mark.parametrize("bus", ["sata", "ide", "usb", "fdc"])
def test_a_disk_of_another_bus_is_refused_by_any_image(made: str, bus: str) -> None:
    """No initrd of ours has drivers for them."""
    for scsi, word in ((False, "make it 'virtio', for which"), (True, "or 'scsi' on a controller of model virtio")):
        with pytest.raises(DomainRefused, match=word):
            adoption.adopt(made.replace("bus='virtio'", f"bus='{bus}'"), of_kind("snp", name="web", scsi=scsi))


@pytest.mark.parametrize("kind", KINDS)
def test_domains_of_an_image_for_scsi_have_its_disks_there(kind: str) -> None:
    """All on one virtio SCSI controller, by their serial numbers, as the schema and our own checks want it."""
    spec = of_kind(kind, volumes=VOLUMES, scsi=True)
    text = xml.write(spec)
    root = xml.parse(text)
    targets = [(disk.get("dev"), disk.get("bus")) for disk in root.iterfind("devices/disk/target")]
    assert targets == [(f"sd{letter}", "scsi") for letter, _ in zip("abcdefg", [spec.disk, *VOLUMES], strict=False)]
    assert not list(check.root_bus_faults(root, str(spec.disk), scsi=True))
    assert not list(check.volume_faults(root, VOLUMES, scsi=True))
    assert list(check.volume_faults(root, VOLUMES))
    if NEWEST_SCHEMA.exists():
        etree.RelaxNG(etree.parse(NEWEST_SCHEMA)).assertValid(etree.fromstring(text))


def test_a_data_disk_the_guest_cannot_find_is_refused() -> None:
    """It looks for virtio disks alone, and the file is raw."""
    root = xml.parse(xml.write(of_kind("snp", volumes=VOLUMES)))
    (disk,) = xml.with_serial(root, "jd-data")
    for tag, attribute, value in (("target", "bus", "scsi"), ("driver", "type", "qcow2")):
        element = disk.find(tag)
        assert element is not None
        element.set(attribute, value)
    assert {fault.element for fault in check.volume_faults(root, VOLUMES)} == {"target@bus", "driver@type"}


def test_a_data_disk_of_before_goes_with_its_volume() -> None:
    """A definition of when the image had other volumes is refused; adopted again, it has what there are."""
    directory = VOLUMES[0].path.parent
    old = xml.write(of_kind("snp", volumes=VOLUMES))
    left = of_kind("snp", volumes=VOLUMES[1:])
    assert list(check.stray_faults(xml.parse(old), directory, VOLUMES)) == []
    (fault,) = check.stray_faults(xml.parse(old), directory, left.volumes)
    assert fault.element == "source@file"
    assert str(VOLUMES[0].path) in fault.problem
    stray = xml.parse(old.replace(str(VOLUMES[0].path), "/srv/volume-data.img"))
    assert list(check.stray_faults(stray, directory, left.volumes)) == [], "a disk that its owner put there"
    again = xml.parse(adoption.adopt(old, left))
    assert list(check.stray_faults(again, directory, left.volumes)) == []
    assert list(check.volume_faults(again, left.volumes)) == []
    more = xml.parse(adoption.adopt(xml.write(left), of_kind("snp", volumes=VOLUMES)))
    assert list(check.volume_faults(more, VOLUMES)) == []


def test_files_before_the_disks_are_found() -> None:
    """Of a snapshot, before the root's disk or a data volume's; the owner's own disks may be what they like."""
    root = xml.parse(xml.write(of_kind("snp", volumes=VOLUMES)))
    assert list(layers.of_image(root)) == []
    for disk in root.iterfind("devices/disk"):
        disk.find("driver").set("type", "qcow2")  # type: ignore[union-attr]  # ours have one
    stray = ET.SubElement(root.find("devices"), "disk", device="disk")  # type: ignore[arg-type]  # as above
    ET.SubElement(stray, "driver", type="qcow2")
    assert len(list(layers.of_image(root))) == 1 + len(VOLUMES)
