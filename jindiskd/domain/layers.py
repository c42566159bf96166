"""Files that lie on top of an image's disks: snapshots that were taken behind our back, and disks of other domains.

Written to is the topmost file alone. So the image's own files are not what its guest has, until they are put back into
one (`virsh blockcommit`): they must not be exported or cloned as if they were, nor removed from under the others.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import libvirt

from jindiskd.domain import xml
from jindiskd.domain.xml import MalformedDomain
from jindiskd.errors import Busy
from jindiskd.guest.config import SERIAL_PREFIX

MAX_CHAIN = 200
"""Files below a disk that are looked at; libvirt has a bound of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A disk of an image's that goes on in another file."""

    target: str
    """Its name in the domain, such as `vda`."""
    file: str

    def told(self, domain: str) -> str:
        """A sentence with what to do."""
        return (
            f"its disk {self.target} goes on in {self.file!r}, by a snapshot perhaps: while it runs, "
            f"'virsh blockcommit {domain} {self.target} --active --pivot' puts that back into the image's disk"
        )


def of_image(root: ET.Element, own: str = "") -> Iterator[Layer]:
    """Those of the disks of a domain of ours that are its image's: by their serial numbers; else the root is the first.

    `own` is the image's file of the root, if it is known: a disk that is still that is the root's.
    """
    disks = [disk for disk in root.iterfind("devices/disk") if disk.get("device", "disk") == "disk"]
    roots = [*xml.with_serial(root, xml.ROOT_SERIAL), *(disk for disk in disks if own and _file(disk) == own), *disks]
    for disk in disks:
        if disk is roots[0] or (disk.findtext("serial") or "").strip().startswith(SERIAL_PREFIX):
            driver = disk.find("driver")
            if driver is not None and driver.get("type", "raw") != "raw":
                yield Layer(target=_target(disk), file=_file(disk))


def told(root: ET.Element, domain: str) -> str:
    """What is to be said of them, one sentence; empty where there are none."""
    found = list(of_image(root))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0].told(domain)}{more}" if found else ""


def refuse_users(conn: libvirt.virConnect, image: str, files: frozenset[str], is_ours: Callable[[str], bool]) -> None:
    """Refuse to have an image's disks read or removed that somebody changes, or has other files on top of.

    Runs in the libvirt thread. Domains of ours that run are the table's matter.

    Args:
        conn: libvirt.
        image: its name.
        files: the paths of its disks.
        is_ours: whether a domain, by UUID, is one of this image's.

    Raises:
        Busy: with the domain, and what to do.
    """
    for dom in conn.listAllDomains():
        try:
            why = _why_not(dom, files, ours=is_ours(dom.UUIDString()))
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # gone since it was listed
                raise
        except MalformedDomain:
            continue  # none that libvirt could start
        else:
            if why:
                raise Busy(f"image {image!r}", why)


def _why_not(dom: libvirt.virDomain, files: frozenset[str], *, ours: bool) -> str:
    name, active = dom.name(), bool(dom.isActive())
    roots = [xml.parse(dom.XMLDesc())]
    if active and dom.isPersistent():
        roots.append(xml.parse(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
    if ours and dom.hasManagedSaveImage():
        return (
            f"the machine of domain {name!r} is saved, and goes on with its disk: start it, or drop what was saved by "
            f"'virsh managedsave-remove {name}'"
        )
    for root in roots:
        if ours and (said := told(root, name)):
            return f"of domain {name!r}, {said}"
        for disk in root.iterfind("devices/disk"):
            if _chain(disk) & files:
                return (
                    f"domain {name!r} has {_file(disk)!r} on top of its disk: put that back by 'virsh blockcommit "
                    f"{name} {_target(disk)} --active --pivot', or undefine the domain"
                )
            if active and not ours and _file(disk) in files and disk.find("readonly") is None:
                return f"domain {name!r}, which is not ours, runs from its disk: 'virsh shutdown {name}' ends it"
    return ""


def _chain(disk: ET.Element) -> set[str]:
    """The files below a disk's own, as far as libvirt tells: of what runs or ran a snapshot it does."""
    found: set[str] = set()
    below = disk.find("backingStore")
    while below is not None and len(found) < MAX_CHAIN:
        source = below.find("source")
        path = "" if source is None else source.get("file", "")
        if not path:
            break
        found.add(path)
        below = below.find("backingStore")
    return found


def _file(disk: ET.Element) -> str:
    source = disk.find("source")
    return "" if source is None else source.get("file") or source.get("dev") or source.get("name") or ""


def _target(disk: ET.Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")
