"""The domain XML: against libvirt's own schema, and read back without trust."""

from __future__ import annotations

import base64
import itertools
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from jindiskd.base.platform import Platform
from jindiskd.domain import check, xml
from jindiskd.domain.binding import Binding
from jindiskd.domain.security import Sev, Snp, Tdx, default_security, element, host_data_of, with_host_data
from jindiskd.domain.spec import BootInputs, DataDisk, DomainSpec, from_manifest
from jindiskd.domain.state import ACTIVE, NEXT, DomainState
from jindiskd.errors import InvalidArgument, NotSupported

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
NEWEST_SCHEMA = Path(__file__).resolve().parents[2] / "build/tools/usr/share/libvirt/schemas/domain.rng"
LIBVIRT = subprocess.run(["virsh", "--version"], capture_output=True, check=True).stdout
UUID = "1c1d0000-5e70-4000-8000-000000000006"


@pytest.fixture
def spec(manifest, tmp_path) -> DomainSpec:
    (tmp_path / "cmdline").write_text("a <b> & 'c' \"d\"")
    return from_manifest(
        manifest,
        tmp_path,
        name="web & <co>",
        uuid=UUID,
        memory_mib=512,
        console_log=Path("/log"),
        vsock=Path("/v.sock"),
    )


KINDS = {
    "simulated-snp": Platform.SIMULATED_SNP,
    "sev": Platform.SEV,
    "sev-es": Platform.SEV_ES,
    "snp": Platform.SNP,
    "tdx": Platform.TDX,
}
OLD_KNOWS = {"simulated-snp", "sev", "sev-es"}


def of_kind(kind: str, **changes: Any) -> DomainSpec:
    """A domain of one kind whose paths are the same on every machine."""
    platform = KINDS[kind]
    return replace(
        DomainSpec(
            name=f"web-{kind}",
            uuid=UUID,
            binding=Binding(image="web", image_id="00000000-0000-4000-8000-000000000001", platform=platform),
            boot=BootInputs(
                firmware="/usr/share/ovmf/OVMF.fd",
                kernel="/var/lib/jindiskd/images/web/vmlinuz",
                initrd="/var/lib/jindiskd/images/web/initrd",
                cmdline='console=ttyS0 a=<b>&"c"',
                vcpus=2,
                cpu_model="EPYC-Milan",
            ),
            memory_mib=1024,
            disk=Path("/var/lib/jindiskd/images/web/disk.img"),
            console_log=Path("/var/lib/jindiskd/console/web.log"),
            vsock_socket=Path("/run/jindiskd/vsock/web/device.sock"),
            security=default_security(platform),
        ),
        **changes,
    )


VOLUMES = tuple(
    DataDisk(serial=f"jd-{name}", path=Path(f"/var/lib/jindiskd/images/web/volume-{name}.img"))
    for name in ("data", "logs")
)
FULL = {
    "simulated-snp-volumes": of_kind("simulated-snp", volumes=VOLUMES),
    "snp-volumes": of_kind("snp", volumes=VOLUMES),
    "simulated-snp-kernel-vsock": of_kind("simulated-snp", vsock_socket=None),
    "sev-session": of_kind("sev", security=Sev(dh_cert=bytes(2084), session=bytes(128))),
    "snp-kernel-vsock": of_kind("snp", vsock_socket=None),
    "snp-full": of_kind(
        "snp",
        security=Snp(
            policy=0xB0000,
            id_block=bytes(96),
            id_auth=bytes(4096),
            author_key=True,
            vlek=True,
            host_data=bytes(range(32)),
            workarounds=bytes(16),
        ),
    ),
    "tdx-full": of_kind(
        "tdx",
        security=Tdx(mr_config_id=b"\1" * 48, mr_owner=b"\2" * 48, mr_owner_config=b"\3" * 48, quote_socket="/run/qgs"),
    ),
}
CASES = {**{kind: of_kind(kind) for kind in KINDS}, **FULL}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_is_written_as_reviewed(golden, case) -> None:
    """One golden file a case; our own check finds nothing in any of them."""
    spec = CASES[case]
    text = xml.write(spec)
    golden(Path(__file__).parent / "golden" / f"{case}.xml", text)
    assert list(check.faults(xml.parse(text), simulated=spec.binding.platform.simulated)) == []
    assert xml.boot_inputs(xml.parse(text)).cmdline == spec.boot.cmdline


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schema", [SCHEMA, NEWEST_SCHEMA], ids=["oldest", "newest"])
def test_libvirts_schemas_accept_it(schema, case) -> None:
    """Of the oldest libvirt that is supported, as far as it knows the kind, and of the newest in Debian's archive."""
    if not schema.exists():
        pytest.skip(f"{schema} is missing; run scripts/setup")
    relaxng = etree.RelaxNG(etree.parse(schema))
    document = etree.fromstring(xml.write(CASES[case]))
    if schema == SCHEMA and case.split("-")[0] not in {"simulated", "sev"} and b"12." not in LIBVIRT:
        assert not relaxng.validate(document)
    else:
        relaxng.assertValid(document)


@pytest.mark.parametrize("name", ["sev", "sev-es", "sev-snp", "tdx"])
def test_launch_security_is_what_libvirt_has_started(vectors, name) -> None:
    """Read out of a recorded domain and written again, it is the same element."""
    recorded = xml.parse((vectors / f"libvirt/domain-{name}.xml").read_text())
    wanted = recorded.find("launchSecurity")

    def data(tag: str) -> bytes:
        return base64.b64decode(wanted.findtext(tag, ""))

    policy = int(wanted.findtext("policy"), 16)
    security = {
        "sev": lambda: Sev(policy=policy, dh_cert=data("dhCert"), session=data("session")),
        "sev-snp": lambda: Snp(
            policy=policy, id_block=data("idBlock"), id_auth=data("idAuth"), author_key=True,
            host_data=data("hostData"), workarounds=data("guestVisibleWorkarounds"),
        ),
        "tdx": lambda: Tdx(
            policy=policy, mr_config_id=data("mrConfigId"), mr_owner=data("mrOwner"),
            mr_owner_config=data("mrOwnerConfig"),
        ),
    }[wanted.get("type")]()  # fmt: skip
    for tag in ("cbitpos", "reducedPhysBits"):  # the host's, filled in at the start
        for child in wanted.findall(tag):
            wanted.remove(child)
    wanted.attrib.pop("vcek", None)  # 'yes' is the default
    made = etree.tostring(etree.fromstring(ET.tostring(element(security))), method="c14n")
    for item in wanted.iter():
        item.text, item.tail = (item.text or "").strip().replace("0x0000000000030000", "0x30000") or None, None
    assert etree.tostring(etree.fromstring(ET.tostring(wanted)), method="c14n") == made


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


@pytest.mark.parametrize(("platform", "length"), [(Platform.SNP, 32), (Platform.TDX, 48)])
def test_host_data_is_written_and_read_back(platform: Platform, length: int) -> None:
    """HOSTDATA or MRCONFIGID: what libvirt is given, what a later start keeps, and nothing of another length."""
    data, plain = bytes(range(length)), default_security(platform)
    security = with_host_data(plain, data, platform)
    assert security is not None
    domain = ET.Element("domain")
    domain.append(element(security))
    assert host_data_of(domain) == data
    assert with_host_data(plain, b"", platform) == plain
    for wrong in (data[:-1], data + b"x"):
        with pytest.raises(InvalidArgument, match=str(length)):
            with_host_data(plain, wrong, platform)


@pytest.mark.parametrize("platform", [Platform.SIMULATED_SNP, Platform.SEV, Platform.SEV_ES])
def test_host_data_is_refused_where_there_is_none(platform: Platform) -> None:
    """Instead of being dropped without a word."""
    with pytest.raises(NotSupported, match="SEV-SNP and TDX alone"):
        with_host_data(default_security(platform), bytes(32), platform)


def test_host_data_that_cannot_be_read_is_none() -> None:
    """A definition that somebody edited."""
    assert host_data_of(ET.fromstring("<domain/>")) == b""
    text = "<domain><launchSecurity type='sev-snp'><hostData>!!</hostData></launchSecurity></domain>"
    assert host_data_of(ET.fromstring(text)) == b""
