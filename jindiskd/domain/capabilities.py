"""What a host can start: libvirt's domain capabilities, its and QEMU's version, and what the kernel says beside them.

All of it is data: captured documents of real hosts are inputs of the tests. Source: libvirt formatdomaincaps; libvirt
notes sections 1, 2.8 and 8.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import libvirt

from jindiskd.base.platform import Platform, Tee
from jindiskd.domain.spec import EMULATOR
from jindiskd.domain.xml import MAX_XML_BYTES, MalformedDomain
from jindiskd.errors import NotSupported

Version = tuple[int, int, int]
OLDEST_LIBVIRT: Version = (8, 6, 0)
"""The first that has `stateless` loaders; kernel hashes came with 8.0."""
OLDEST: Mapping[Tee, tuple[Version, Version]] = {
    Tee.SEV: ((8, 6, 0), (6, 2, 0)),
    Tee.SEV_ES: ((8, 6, 0), (6, 2, 0)),
    Tee.SNP: ((10, 5, 0), (9, 1, 0)),
    Tee.TDX: ((11, 6, 0), (10, 1, 0)),
}
"""First releases of libvirt and QEMU, with kernel hashes where the platform has them."""
SECTYPE: Mapping[Tee, str] = {Tee.SEV: "sev", Tee.SEV_ES: "sev", Tee.SNP: "sev-snp", Tee.TDX: "tdx"}
PARAMETERS: Mapping[Tee, tuple[str, str]] = {
    Tee.SEV: ("kvm_amd", "sev"),
    Tee.SEV_ES: ("kvm_amd", "sev_es"),
    Tee.SNP: ("kvm_amd", "sev_snp"),
    Tee.TDX: ("kvm_intel", "tdx"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What one emulator on a host can do for one domain type."""

    libvirt: Version
    qemu: Version
    emulator: str
    virt_type: str
    """`kvm` or `qemu`."""
    sectypes: frozenset[str]
    """Types of launch security that emulator and kernel together claim; SNP needs the kernel's word beside it."""
    sev_guests: int
    """Guests with encrypted memory at once; 0 where the processor does not say."""
    sev_es_guests: int
    """Guests with encrypted registers at once."""
    parameters: Mapping[str, bool]
    """Parameters of kvm_amd and kvm_intel that are there, by `module.parameter`."""


def version(number: int) -> Version:
    """libvirt's and QEMU's version as libvirt gives it: 1000000 * major + 1000 * minor + release."""
    return number // 1_000_000, number // 1_000 % 1_000, number % 1_000


def parse(text: str, *, libvirt_version: int, qemu_version: int, parameters: Mapping[str, bool]) -> Host:
    """Read a `<domainCapabilities>` document.

    Raises:
        MalformedDomain: it is none.
    """
    if len(text) > MAX_XML_BYTES or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise MalformedDomain("the domain capabilities are too long or declare entities")
    try:
        root = ET.fromstring(text)  # noqa: S314 (no entities, bounded; above)
    except ET.ParseError as exc:
        raise MalformedDomain("the domain capabilities are not XML") from exc
    if root.tag != "domainCapabilities":
        raise MalformedDomain("the domain capabilities begin with another element")
    sev = root.find("features/sev[@supported='yes']")
    listed = root.find("features/launchSecurity")
    if listed is not None:
        sectypes = frozenset(value.text or "" for value in listed.iterfind("enum[@name='sectype']/value"))
    else:  # libvirt before 10.5
        sectypes = frozenset({"sev"} if sev is not None else ())
    return Host(
        libvirt=version(libvirt_version),
        qemu=version(qemu_version),
        emulator=root.findtext("path", ""),
        virt_type=root.findtext("domain", ""),
        sectypes=sectypes,
        sev_guests=_count(sev, "maxGuests"),
        sev_es_guests=_count(sev, "maxESGuests"),
        parameters=parameters,
    )


def _count(sev: ET.Element | None, tag: str) -> int:
    text = "" if sev is None else sev.findtext(tag, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def kernel_parameters(root: Path = Path("/")) -> Mapping[str, bool]:
    """Which of the modules' parameters are on; those of modules that are not loaded are left out."""
    found = {}
    for module, parameter in set(PARAMETERS.values()):
        try:
            said = (root / "sys/module" / module / "parameters" / parameter).read_text()
        except OSError:
            continue
        found[f"{module}.{parameter}"] = said[:1] in {"1", "Y", "y"}
    return found


def read(conn: libvirt.virConnect, virt_type: str, emulator: str = EMULATOR, root: Path = Path("/")) -> Host:
    """Ask libvirt. Runs in the libvirt thread; the first time for an emulator takes seconds.

    Raises:
        NotSupported: the emulator is not there, or cannot run domains of this type.
    """
    try:
        text = conn.getDomainCapabilities(emulator, "x86_64", "q35", virt_type)
    except libvirt.libvirtError as exc:
        if exc.get_error_code() not in {libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_CONFIG_UNSUPPORTED}:
            raise
        remedy = "enable virtualisation in the machine's firmware setup and load kvm_amd or kvm_intel"
        raise NotSupported(f"a domain of type {virt_type!r} with {emulator}", remedy) from exc
    return parse(
        text,
        libvirt_version=conn.getLibVersion(),
        qemu_version=conn.getVersion(),
        parameters=kernel_parameters(root),
    )


def require(host: Host, platform: Platform) -> None:
    """Refuse a platform that this host cannot start.

    Raises:
        NotSupported: naming what is missing, and what would give it.
    """
    what, tee = f"launching a guest of platform {platform}", platform.tee
    if host.libvirt < OLDEST_LIBVIRT:
        raise NotSupported(what, f"libvirt {_dotted(host.libvirt)} is here and {_dotted(OLDEST_LIBVIRT)} is needed")
    if platform is Platform.SIMULATED_SNP:
        return
    for name, found, oldest in (("libvirt", host.libvirt, OLDEST[tee][0]), ("QEMU", host.qemu, OLDEST[tee][1])):
        if found < oldest:
            raise NotSupported(what, f"{name} {_dotted(found)} is here and {_dotted(oldest)} is needed: upgrade it")
    module, parameter = PARAMETERS[tee]
    remedy = f"enable it in the machine's firmware setup, and load {module} with {parameter}=1"
    if SECTYPE[tee] not in host.sectypes:
        claimed = ", ".join(sorted(host.sectypes)) or "none"
        text = f"the host has launch security {claimed} and not {SECTYPE[tee]} (`virsh domcapabilities`): {remedy}"
        raise NotSupported(what, text)
    if tee is Tee.SEV_ES and host.sev_guests and not host.sev_es_guests:
        raise NotSupported(
            what, "no guest with encrypted registers is possible: raise the SEV-ES ASID limit in the setup"
        )
    if not platform.simulated and host.parameters.get(f"{module}.{parameter}") is not True:
        raise NotSupported(what, f"the kernel says that {module}.{parameter} is off or not there: {remedy}")


def _dotted(number: Version) -> str:
    return ".".join(map(str, number))
