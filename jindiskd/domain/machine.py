"""The machine of a domain, as libvirt runs it: making, starting, ending and removing it, one call each.

Everything here is called in the event loop and runs in the libvirt thread.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass

import libvirt

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.sev import LaunchReport, SealedSecret
from jindiskd.domain import capabilities
from jindiskd.domain.binding import UUID
from jindiskd.domain.capabilities import Host
from jindiskd.domain.connection import Connection
from jindiskd.domain.guest import Guest
from jindiskd.domain.spec import EMULATOR
from jindiskd.errors import AlreadyExists, NotSupported


async def host(connection: Connection, virt_type: str, emulator: str = EMULATOR) -> Host:
    """What the host can start with this emulator; the first time for an emulator it takes libvirt seconds."""
    return await connection.call(
        f"asking for the capabilities of {emulator}", lambda conn: capabilities.read(conn, virt_type, emulator)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A domain that libvirt keeps."""

    uuid: str
    name: str
    active: bool
    saved: bool
    """Whether its next start goes on with the memory of an earlier machine, whatever is defined (`managedsave`)."""
    text: str
    """The XML of its next start, with secrets such as a display's password: not to be logged or shown."""


async def definition(connection: Connection, key: str) -> Definition:
    """One domain by UUID or name.

    Raises:
        NotFound: there is none.
        NotSupported: it is transient: libvirt forgets it when it stops.
    """

    def call(conn: libvirt.virConnect) -> Definition:
        dom = conn.lookupByUUIDString(key) if UUID.fullmatch(key) else conn.lookupByName(key)
        if not dom.isPersistent():
            raise NotSupported(f"domain {key!r}, which is transient,", "define it (`virsh define`) first")
        return Definition(
            uuid=dom.UUIDString(),
            name=dom.name(),
            active=bool(dom.isActive()),
            saved=bool(dom.hasManagedSaveImage()),
            text=str(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)),
        )

    return await connection.call(key, call)


async def public_definition(connection: Connection, name: str, uuid: str) -> str:
    """The XML of a domain's next start, without secrets; of a machine that is not kept, what runs."""

    def call(conn: libvirt.virConnect) -> str:
        dom = conn.lookupByUUIDString(uuid)
        return str(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE if dom.isPersistent() else 0))

    return await connection.call(f"reading domain {name!r}", call)


async def define(connection: Connection, name: str, text: str) -> str:
    """Make the domain of this XML known to libvirt; returns the XML that libvirt keeps."""

    def call(conn: libvirt.virConnect) -> str:
        dom = conn.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        return str(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))

    try:
        return await connection.call(f"defining domain {name!r}", call)
    except AlreadyExists as exc:
        raise AlreadyExists("domain", name) from exc


async def start_paused(connection: Connection, name: str, uuid: str) -> str:
    """Start it with its processors halted; returns the XML of what runs."""

    def call(conn: libvirt.virConnect) -> str:
        dom = conn.lookupByUUIDString(uuid)
        dom.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        return str(dom.XMLDesc())

    return await connection.call(f"starting domain {name!r}", call)


async def sev_platform(connection: Connection) -> Mapping[str, object]:
    """What the host shows of its SEV platform: `pdh`, `cert-chain`, `cpu0-id` in base64, and numbers.

    Raises:
        NotSupported: the host's default emulator has no SEV.
    """

    def call(conn: libvirt.virConnect) -> Mapping[str, object]:
        try:
            return dict(conn.getSEVInfo())
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
                raise
            raise NotSupported("SEV", "libvirt's default emulator has none (`virsh domcapabilities`)") from exc

    return await connection.call("asking for the SEV platform", call)


async def sev_measurement(connection: Connection, name: str, uuid: str) -> LaunchReport:
    """The measurement of a paused machine.

    Raises:
        MalformedEvidence: libvirt's answer is none.
    """
    info = await connection.call(
        f"measuring domain {name!r}", lambda conn: dict(conn.lookupByUUIDString(uuid).launchSecurityInfo())
    )
    try:
        return LaunchReport(
            measurement=base64.b64decode(str(info["sev-measurement"]), validate=True),
            api_major=int(info["sev-api-major"]),
            api_minor=int(info["sev-api-minor"]),
            build=int(info["sev-build-id"]),
            policy=int(info["sev-policy"]),
        )
    except (LookupError, ValueError, binascii.Error) as exc:
        raise MalformedEvidence("SEV measurement", "libvirt's answer has not all its parts") from exc


async def inject(connection: Connection, name: str, uuid: str, sealed: SealedSecret) -> None:
    """Give a paused machine its sealed secret; the firmware's table says where it goes."""
    state = {
        "sev-secret-header": base64.b64encode(sealed.header).decode(),
        "sev-secret": base64.b64encode(sealed.payload).decode(),
    }
    await connection.call(
        f"injecting the secret of domain {name!r}",
        lambda conn: conn.lookupByUUIDString(uuid).setLaunchSecurityState(state),
    )


async def resume(connection: Connection, name: str, uuid: str) -> None:
    """Let its processors run."""
    await connection.call(f"resuming domain {name!r}", lambda conn: conn.lookupByUUIDString(uuid).resume())


async def shut_down(connection: Connection, name: str, uuid: str) -> None:
    """Ask its system to shut down; does not wait."""
    await connection.call(f"shutting down domain {name!r}", lambda conn: conn.lookupByUUIDString(uuid).shutdown())


async def power_off(connection: Connection, name: str, uuid: str) -> None:
    """Switch it off; one that is off or gone is no error."""

    def call(conn: libvirt.virConnect) -> None:
        try:
            dom = conn.lookupByUUIDString(uuid)
            if dom.isActive():
                dom.destroy()
        except libvirt.libvirtError as exc:
            if exc.get_error_code() not in {libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID}:
                raise

    await connection.call(f"switching off domain {name!r}", call)


async def end(connection: Connection, guest: Guest) -> None:
    """Switch off a machine that must not go on; if libvirt cannot be asked now, the next look at all domains does it.

    Raises:
        JindiskError: it could not be asked; `guest.must_be_off` stays set.
    """
    guest.must_be_off = True
    await power_off(connection, guest.view.name, guest.view.uuid)
    guest.must_be_off = False


async def undefine(connection: Connection, name: str, uuid: str) -> None:
    """Remove it; one that is gone is no error."""

    def call(conn: libvirt.virConnect) -> None:
        try:
            conn.lookupByUUIDString(uuid).undefine()
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise

    await connection.call(f"removing domain {name!r}", call)


async def is_on(connection: Connection, name: str, uuid: str) -> bool:
    """Whether it runs; one that is gone does not."""

    def call(conn: libvirt.virConnect) -> bool:
        try:
            return bool(conn.lookupByUUIDString(uuid).isActive())
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
            return False

    return await connection.call(f"looking at domain {name!r}", call)
