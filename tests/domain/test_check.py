"""Faulty definitions, refused before libvirt sees them, with the element in the sentence."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from jindiskd.domain import check, xml

ELEMENT = {
    "dhcert-without-session": "session",
    "kernelhashes-without-kernel": "kernel",
    "rng-kernelhashes-not-yes-no": "launchSecurity@kernelHashes",
    "rng-policy-not-a-number": "policy",
    "rng-qgs-path-relative": "quoteGenerationService@path",
    "rng-sev-unknown-attribute": "launchSecurity@vcek",
    "rng-sev-without-policy": "policy",
    "rng-tdx-with-kernelhashes": "launchSecurity@kernelHashes",
    "rng-two-launchsecurity": "launchSecurity",
    "rng-unknown-type": "launchSecurity@type",
    "sev-i440fx": "type@machine",
    "sev-policy-33-bits": "policy",
    "sev-secure-loader": "loader@secure",
    "snp-hostdata-31-bytes": "hostData",
    "snp-idauth-not-base64": "idAuth",
    "snp-idblock-95-bytes": "idBlock",
    "snp-policy-65-bits": "policy",
    "snp-policy-bit17-clear": "policy",
    "stateless-with-nvram": "nvram",
    "tdx-ioapic-kvm": "ioapic",
    "tdx-mrowner-47-bytes": "mrOwner",
    "tdx-no-ioapic-element": "ioapic",
    "tdx-no-pmu-element": "pmu",
    "tdx-no-smm-element": "smm",
    "tdx-pflash-loader": "loader@type",
    "tdx-pmu-on": "pmu",
    "tdx-policy-bit1": "policy",
    "tdx-smm-on": "smm",
    "virt-type-qemu": "domain@type",
    "virt-type-qemu-host-passthrough": "domain@type",
    "vsock-cid-2": "cid@address",
}


@pytest.mark.parametrize("name", ELEMENT)
def test_each_recorded_fault_is_refused_by_its_element_alone(vectors: Path, name: str) -> None:
    """Exactly the fault that is there, whatever libvirt would have said or swallowed."""
    root = xml.parse((vectors / "libvirt/invalid" / f"{name}.xml").read_text())
    with pytest.raises(check.DomainRefused) as caught:
        check.refuse(root)
    assert [fault.element for fault in caught.value.faults] == [ELEMENT[name]]
    assert f"<{ELEMENT[name]}>" in str(caught.value)


def test_every_recorded_fault_is_in_the_table(vectors: Path) -> None:
    """New recordings do not go untested."""
    recorded = json.loads((vectors / "libvirt/invalid/expected.json").read_text())
    assert {name.removesuffix(".xml") for name in recorded} == set(ELEMENT)


@pytest.mark.parametrize("name", ["sev", "sev-es", "sev-snp", "tdx", "tcg"])
def test_recorded_good_domains_pass(vectors: Path, name: str) -> None:
    """What libvirt started on a simulated host has no faults."""
    assert list(check.faults(xml.parse((vectors / f"libvirt/domain-{name}.xml").read_text()))) == []


def test_a_recorded_domain_that_measures_an_unnamed_processor(vectors: Path) -> None:
    """SNP with host-passthrough starts, and has a measurement that nobody can compute beforehand."""
    root = xml.parse((vectors / "libvirt/domain-sev-snp-autofirmware.xml").read_text())
    assert [fault.element for fault in check.faults(root)] == ["cpu@mode"]


def good(kind: str) -> ET.Element:
    golden = Path(__file__).parent / "golden" / f"{kind}.xml"
    return xml.parse(golden.read_text())


@pytest.mark.parametrize(
    ("kind", "path", "attribute", "value", "element"),
    [
        ("snp", "os/type", "arch", "aarch64", "type@arch"),
        ("snp", "os/loader", "stateless", "no", "loader"),
        ("snp", "os/loader", "type", "pflash", "loader@type"),
        ("snp", "devices/memballoon", "model", "virtio", "memballoon@model"),
        ("snp", "cpu", "mode", "host-passthrough", "cpu@mode"),
        ("sev-es", "cpu", "mode", "host-model", "cpu@mode"),
    ],
)
def test_companions(kind: str, path: str, attribute: str, value: str, element: str) -> None:
    """What stands beside launch security and would make it fail, or mean nothing."""
    root = good(kind)
    found = root.find(path)
    assert found is not None
    found.set(attribute, value)
    assert [fault.element for fault in check.faults(root)] == [element]


@pytest.mark.parametrize(
    ("kind", "parent", "added", "element"),
    [
        ("snp", ".", "<maxMemory slots='1'>9999999</maxMemory>", "maxMemory"),
        ("snp", "devices", "<hostdev mode='subsystem' type='pci'/>", "hostdev"),
        ("simulated-snp", "devices/disk", "<encryption format='luks'/>", "encryption"),
        ("snp", "os", "<varstore path='/x'/>", "varstore"),
        ("snp", "launchSecurity", "<dhCert>AA==</dhCert>", "dhCert"),
        ("sev", "launchSecurity", "<policy>3</policy>", "policy"),
    ],
)
def test_what_must_not_be_there(kind: str, parent: str, added: str, element: str) -> None:
    """Devices and options that undo what launch security gives."""
    root = good(kind)
    place = root.find(parent)
    assert place is not None
    place.append(ET.fromstring(added))
    assert [fault.element for fault in check.faults(root)] == [element]


@pytest.mark.parametrize(
    ("kind", "path", "element"),
    [
        ("snp", "on_reboot", "on_reboot"),
        ("sev", "memoryBacking", "memoryBacking"),
        ("snp", "os/loader", "loader"),
        ("tdx", "features", "pmu"),
        ("tdx", "os/type", "type"),
    ],
)
def test_what_must_be_there(kind: str, path: str, element: str) -> None:
    """A missing element is as bad as a wrong one."""
    root = good(kind)
    parent = root.find(path.rpartition("/")[0] or ".")
    child = root.find(path)
    assert parent is not None
    assert child is not None
    parent.remove(child)
    assert element in [fault.element for fault in check.faults(root)]


@pytest.mark.parametrize(
    ("text", "value"),
    [("0x30000", 0x30000), ("0X3", 3), ("10", 10), (" 7 ", 7), ("", None), (None, None), ("-1", None), ("0x", None),
     ("1e3", None), ("\N{ARABIC-INDIC DIGIT THREE}", None), ("9" * 33, None)],
)  # fmt: skip
def test_numbers(text: str | None, value: int | None) -> None:
    """Decimal and hexadecimal in ASCII, bounded, nothing else."""
    assert check.number(text) == value


def test_all_faults_are_found_at_once() -> None:
    """An operator fixes them in one go."""
    root = good("tdx")
    for child in list(root):
        if child.tag in {"features", "on_reboot"}:
            root.remove(child)
    with pytest.raises(check.DomainRefused) as caught:
        check.refuse(root)
    assert {fault.element for fault in caught.value.faults} == {"pmu", "smm", "ioapic", "on_reboot"}
