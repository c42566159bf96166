"""The domain XML: against libvirt's own schema, and read back without trust."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from lxml import etree

from jindiskd.domain import xml
from jindiskd.domain.state import ACTIVE, NEXT, DomainState
from jindiskd.errors import InvalidArgument

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
UUID = "1c1d0000-5e70-4000-8000-000000000006"


@pytest.fixture
def spec(manifest, tmp_path) -> xml.DomainSpec:
    (tmp_path / "cmdline").write_text("a <b> & 'c' \"d\"")
    return xml.from_manifest(
        manifest,
        tmp_path,
        name="web & <co>",
        uuid=UUID,
        memory_mib=512,
        console_log=Path("/log"),
        vsock=Path("/v.sock"),
    )


@pytest.mark.parametrize("vsock", [Path("/run/v.sock"), None])
def test_libvirts_schema_accepts_it(spec, vsock) -> None:
    """With a vhost-user device and with the kernel's."""
    if not SCHEMA.exists():
        pytest.skip(f"{SCHEMA} is missing; install libvirt-daemon-system")
    from dataclasses import replace

    schema = etree.RelaxNG(etree.parse(SCHEMA))
    schema.assertValid(etree.fromstring(xml.write(replace(spec, name="web", vsock_socket=vsock))))


def test_what_is_written_is_read(spec) -> None:
    """Names, binding and all inputs of the launch digest survive, whatever characters they have."""
    root = xml.parse(xml.write(spec))
    assert root.findtext("name") == spec.name
    assert xml.binding_of(root) == spec.binding
    assert xml.boot_inputs(root) == spec.boot
    assert xml.differences(root, root) == ()


def test_recorded_domains_are_read(vectors) -> None:
    """The recorded definitions parse; their metadata is of another form and binds nothing."""
    for path in sorted((vectors / "libvirt").glob("domain-*.xml")):
        root = xml.parse(path.read_text())
        assert root.find("os/kernel") is not None or root.find("os/loader") is not None


@pytest.mark.parametrize("tag", ["loader", "kernel", "initrd", "cmdline"])
def test_a_changed_boot_input_is_named(spec, tag) -> None:
    """Whatever libvirt altered or dropped among the measured inputs."""
    wanted, got = xml.parse(xml.write(spec)), xml.parse(xml.write(spec))
    element = got.find(f"os/{tag}")
    element.text = "/else"
    assert xml.differences(wanted, got) == (f"<{tag}>",)
    got.find("os").remove(element)
    assert xml.differences(wanted, got) == (f"<{tag}>",)


def test_swallowed_launch_security_is_seen(vectors) -> None:
    """libvirt drops what it does not know; a policy in another spelling is the same policy."""
    text = (vectors / "libvirt" / "domain-sev-snp.xml").read_text()
    wanted = xml.parse(text)
    assert xml.differences(wanted, xml.parse(text.replace("0x0000000000030000", "0x30000"))) == ()
    assert xml.differences(wanted, xml.parse(text.replace("0x0000000000030000", "0xb0000"))) == ("<launchSecurity>",)
    assert xml.differences(wanted, xml.parse(text.replace(" kernelHashes='yes'", ""))) == ("<launchSecurity>",)
    got = xml.parse(text)
    got.remove(got.find("launchSecurity"))
    assert xml.differences(wanted, got) == ("<launchSecurity>",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<domain",
        "<network/>",
        "<!DOCTYPE domain [<!ENTITY a 'b'>]><domain/>",
        "<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain/>",
        "<domain>" + " " * (1 << 20) + "</domain>",
    ],
    ids=["empty", "torn", "other", "entity", "external", "long"],
)
def test_hostile_documents_are_refused(text) -> None:
    """Bounded, no entities, a domain and nothing else."""
    with pytest.raises(xml.MalformedDomain):
        xml.parse(text)


def test_an_unknown_platform_in_metadata(spec) -> None:
    """Anybody who may define domains may write there."""
    root = xml.parse(xml.write(spec).replace("simulated-snp", "nonesuch"))
    with pytest.raises(xml.MalformedDomain, match="platform"):
        xml.binding_of(root)


def test_running_is_reached_through_the_broker_alone() -> None:
    """No path from a started guest to a running one goes around attestation and release."""
    order = [DomainState.STARTED, DomainState.ATTESTED, DomainState.RELEASED, DomainState.UNLOCKED, DomainState.RUNNING]
    for (i, a), (j, b) in itertools.permutations(enumerate(order), 2):
        if j > i + 1:
            assert b not in NEXT[a], f"{a} must not become {b}"
    assert {state for state in DomainState if not NEXT[state]} == set()
    for state in ACTIVE:
        assert NEXT[state] >= {DomainState.FAILED, DomainState.STOPPED}


def test_bindings(tmp_path, spec) -> None:
    """Kept until dropped; damaged ones count as absent; a name is a UUID and nothing else."""
    from jindiskd.domain.binding import Bindings

    bindings = Bindings(tmp_path / "domains")
    assert bindings.get(UUID) is None
    bindings.put(UUID, spec.binding)
    assert Bindings(tmp_path / "domains").get(UUID) == spec.binding
    (tmp_path / "domains" / f"{UUID}.json").write_text("{}")
    assert bindings.get(UUID) is None
    bindings.drop(UUID)
    bindings.drop(UUID)
    with pytest.raises(InvalidArgument):
        bindings.get("../../etc/passwd")
