"""What a host can start, by the recorded capabilities of hosts; and firmware by descriptor."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from jindiskd.attest.descriptors import FEATURES, NoFirmware, choose, descriptors
from jindiskd.base.platform import Platform, Tee
from jindiskd.domain import capabilities
from jindiskd.domain.capabilities import Host
from jindiskd.domain.xml import MalformedDomain
from jindiskd.errors import NotSupported

ROOT = Path(__file__).resolve().parents[2]
RELEASES = {"9.0": (9_000_000, 7_002_000), "11.3": (11_003_000, 10_000_000), "12.8": (12_008_000, 11_001_000)}
ALL_ON = {f"{module}.{parameter}": True for module, parameter in capabilities.PARAMETERS.values()}


def recorded(vectors: Path, release: str, kind: str) -> Host:
    text = (vectors / f"libvirt/domaincaps/libvirt-{release}-{kind}.xml").read_text()
    libvirt_version, qemu_version = RELEASES[release]
    return capabilities.parse(
        text, libvirt_version=libvirt_version, qemu_version=qemu_version, parameters=ALL_ON if kind != "plain" else {}
    )


@pytest.mark.parametrize(
    ("release", "able"),
    [
        ("9.0", {Platform.SEV, Platform.SEV_ES}),
        ("11.3", {Platform.SEV, Platform.SEV_ES, Platform.SNP}),
        ("12.8", {Platform.SEV, Platform.SEV_ES, Platform.SNP, Platform.TDX}),
    ],
)
def test_what_each_release_can_start(vectors: Path, release: str, able: set[Platform]) -> None:
    """A confidential host of each release; a plain one can start nothing but what is simulated in the guest."""
    for kind, expected in (("confidential", able), ("plain", set())):
        host = recorded(vectors, release, kind)
        can = set()
        for platform in Platform:
            with contextlib.suppress(NotSupported):
                capabilities.require(host, platform)
                can.add(platform)
        assert {platform for platform in can if not platform.simulated} == expected
        assert (Platform.SIMULATED_SEV in can) == (kind == "confidential"), "what stands in is claimed by the emulator"
        assert Platform.SIMULATED_SNP in can
    assert recorded(vectors, release, "confidential").virt_type == "kvm"


@pytest.mark.parametrize(
    ("change", "platform", "said"),
    [
        ({"libvirt": (10, 4, 0)}, Platform.SNP, "libvirt 10.4.0 is here and 10.5.0 is needed"),
        ({"qemu": (9, 0, 2)}, Platform.SNP, "QEMU 9.0.2 is here and 9.1.0 is needed"),
        ({"libvirt": (8, 5, 0)}, Platform.SIMULATED_SNP, "8.6.0 is needed"),
        ({"sectypes": frozenset({"sev"})}, Platform.SNP, "kvm_amd with sev_snp=1"),
        ({"parameters": {**ALL_ON, "kvm_amd.sev_snp": False}}, Platform.SNP, "kvm_amd.sev_snp is off"),
        ({"parameters": {}}, Platform.TDX, "kvm_intel.tdx is off or not there"),
        ({"sev_guests": 509, "sev_es_guests": 0}, Platform.SEV_ES, "ASID limit"),
    ],
)
def test_what_is_missing_is_named(vectors: Path, change: dict[str, object], platform: Platform, said: str) -> None:
    """With what would help."""
    host = replace(recorded(vectors, "12.8", "confidential"), **change)  # type: ignore[arg-type]  # the test's table
    with pytest.raises(NotSupported, match=said):
        capabilities.require(host, platform)


def test_hostile_capabilities(vectors: Path) -> None:
    """Not XML, another document, entities, counts that are none."""
    for text in ("", "<a/>", "<!DOCTYPE a><domainCapabilities/>"):
        with pytest.raises(MalformedDomain):
            capabilities.parse(text, libvirt_version=0, qemu_version=0, parameters={})
    text = (vectors / "libvirt/domaincaps/libvirt-9.0-confidential.xml").read_text()
    host = capabilities.parse(
        text.replace("<maxGuests>0<", "<maxGuests>\N{SUPERSCRIPT TWO}<"),
        libvirt_version=0,
        qemu_version=0,
        parameters={},
    )
    assert host.sev_guests == 0


def test_the_kernels_parameters(tmp_path: Path) -> None:
    """Those that are there, on or off in each of the kernel's spellings."""
    for module, parameter, said in (
        ("kvm_amd", "sev", "Y\n"),
        ("kvm_amd", "sev_es", "1\n"),
        ("kvm_amd", "sev_snp", "N\n"),
    ):
        directory = tmp_path / "sys/module" / module / "parameters"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / parameter).write_text(said)
    assert capabilities.kernel_parameters(tmp_path) == {
        "kvm_amd.sev": True,
        "kvm_amd.sev_es": True,
        "kvm_amd.sev_snp": False,
    }


def test_firmware_of_the_next_debian_by_its_descriptors() -> None:
    """The packages' own descriptors, as scripts/setup unpacks them."""
    directory = ROOT / "build/tools/usr/share/qemu/firmware"
    if not (directory / "60-edk2-x86_64-inteltdx.json").exists():
        pytest.skip(f"{directory} is missing; run scripts/setup")
    for tee in (Tee.SEV, Tee.SEV_ES, Tee.SNP):
        assert choose(tee, [directory]) == Path("/usr/share/ovmf/OVMF.amdsev.fd")
    assert choose(Tee.TDX, [directory]) == Path("/usr/share/ovmf/OVMF.inteltdx.ms.fd")


def describe(directory: Path, name: str, **changes: object) -> None:
    directory.mkdir(exist_ok=True)
    document = {
        "interface-types": ["uefi"],
        "mapping": {"device": "memory", "filename": f"/{name}.fd"},
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": ["amd-sev", "amd-sev-es", "amd-sev-snp"],
        **changes,
    }
    (directory / f"{name}.json").write_text(json.dumps(document))


def test_the_order_of_descriptors(tmp_path: Path) -> None:
    """File names decide; a later directory overrides; an empty file masks."""
    vendor, admin = tmp_path / "vendor", tmp_path / "admin"
    admin.mkdir()
    describe(vendor, "50-b")
    describe(vendor, "40-a")
    assert choose(Tee.SNP, [vendor, admin]) == Path("/40-a.fd")
    (admin / "40-a.json").write_text("")
    assert choose(Tee.SNP, [vendor, admin]) == Path("/50-b.fd")
    describe(admin, "50-b", mapping={"device": "memory", "filename": "/other.fd"})
    assert choose(Tee.SNP, [vendor, admin]) == Path("/other.fd")


def test_unusable_descriptors_are_passed_over(tmp_path: Path) -> None:
    """Flash images, other machines, other features, relative paths, and what is no descriptor at all."""
    describe(tmp_path, "10-flash", mapping={"device": "flash", "executable": {"filename": "/x"}})
    describe(tmp_path, "11-arm", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    describe(tmp_path, "12-bios", **{"interface-types": ["bios"]})
    describe(tmp_path, "13-relative", mapping={"device": "memory", "filename": "x.fd"})
    describe(tmp_path, "14-plain", features=["acpi-s3"])
    describe(tmp_path, "15-torn", targets=None)
    for number, text in enumerate(("[]", "null", "7", "{", '{"a": 1}', "[" * 100000)):
        (tmp_path / f"2{number}.json").write_text(text)
    for tee in FEATURES:
        with pytest.raises(NoFirmware, match="install ovmf-"):
            choose(tee, [tmp_path])
    assert [found.file.name for found in descriptors([tmp_path])] == ["14-plain.json"]
