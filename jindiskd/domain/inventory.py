"""What libvirt has: every domain that concerns us, read in one go. Runs in the libvirt thread."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass

import libvirt
import structlog

from jindiskd.domain import xml
from jindiskd.domain.binding import Binding
from jindiskd.domain.spec import BootInputs
from jindiskd.domain.xml import MalformedDomain

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One domain as libvirt has it."""

    uuid: str
    name: str
    active: bool
    coming_up: bool
    """libvirt is at work on its start, which may still come to nothing; it counts as active."""
    halted: str
    """Why its processors stand still although it is active, one sentence; empty while they run."""
    claim: Binding | None
    """What our metadata element claims."""
    boot: BootInputs | None
    """What it boots; None where that is not a direct boot of ours."""
    root: ET.Element
    """Its definition: of the machine while it runs, else of the next start."""


def read(
    conn: libvirt.virConnect, is_ours: Callable[[str], bool]
) -> tuple[tuple[Found, ...], frozenset[str]]:
    """All domains that carry our metadata or that `is_ours` knows by UUID.

    With them the UUIDs of those that are there and could not be read: libvirtd may end in the middle.
    """
    found, unread = [], set()
    for dom in conn.listAllDomains():
        try:
            item = _read(dom, is_ours)
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # gone since it was listed
                log.warning("a domain cannot be read", problem=str(exc))
                unread.add(dom.UUIDString())
        except MalformedDomain as exc:
            log.warning("a domain is left alone", domain=dom.UUIDString(), problem=str(exc))
            unread.add(dom.UUIDString())
        else:
            if item is not None:
                found.append(item)
    return tuple(found), frozenset(unread)


def halted(state: int, why: int, name: str) -> str:
    """Why a domain stands still although it is active, one sentence with a remedy; empty if it does not.

    Args:
        state: a virDomainState.
        why: the reason that belongs to the state; for paused ones a virDomainPausedReason.
        name: of the domain, for the remedy.
    """
    if state == libvirt.VIR_DOMAIN_PAUSED and why == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
        return f"it is paused, because its disk could not be read or written: see to that, then 'virsh resume {name}'"
    if state == libvirt.VIR_DOMAIN_PAUSED and why != libvirt.VIR_DOMAIN_PAUSED_STARTING_UP:
        return f"it is paused; 'virsh resume {name}' lets it go on"
    if state == libvirt.VIR_DOMAIN_PMSUSPENDED:
        return f"its system sleeps; 'virsh dompmwakeup {name}' wakes it"
    if state == libvirt.VIR_DOMAIN_CRASHED:
        return f"its system crashed, and its machine is kept to be looked at; 'virsh destroy {name}' ends it"
    return ""


def _read(dom: libvirt.virDomain, is_ours: Callable[[str], bool]) -> Found | None:
    identity = dom.UUIDString()
    root = xml.parse(dom.XMLDesc())
    claim = xml.binding_of(root)
    if claim is None and not is_ours(identity):
        return None
    try:
        boot: BootInputs | None = xml.boot_inputs(root)
    except MalformedDomain:
        boot = None
    state, why = dom.state()
    coming_up = (state, why) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP)
    return Found(
        uuid=identity,
        name=dom.name(),
        active=bool(dom.isActive()),
        coming_up=coming_up,
        halted=halted(state, why, dom.name()),
        claim=claim,
        boot=boot,
        root=root,
    )
