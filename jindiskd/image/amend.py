"""What the builder alters inside the root file system, so that nothing outside the encrypted root is trusted by it.

Each alteration keeps owner, mode and extended attributes of the file it replaces, and is told in a sentence that the
manifest keeps. Made on the private copy, by debugfs, without a mount.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping

from jindiskd.image.debugfs import About, FileSystem, FileSystemNotWritten, inode_commands, quote, write_commands

FSTAB = "/etc/fstab"
CLOUD_INIT = "/etc/cloud/cloud.cfg.d"
CLOUD_INIT_FILE = "zz-jindiskd.cfg"  # the last name wins
CLOUD_INIT_TEXT = b"# Data from the host must not configure this system.\ndatasource_list: [ None ]\n"
UNITS = "/etc/systemd/system"
GUEST_AGENT = "qemu-guest-agent.service"
UNIT_PLACES = ("/usr/lib/systemd/system", "/lib/systemd/system", UNITS)

_HOST_FILE_SYSTEMS = {"9p", "virtiofs"}
_BOOT_PLACES = ("/boot", "/efi")
_MARK = "# left out by jindiskd: "
INHERITED = ("security.selinux",)
"""What a new file takes over from its directory."""


def amend(system: FileSystem, root_device: str) -> tuple[str, ...]:
    """Make all alterations and return a sentence for each.

    Args:
        system: the private copy.
        root_device: what the opened root will be, for example `/dev/mapper/root`.

    Raises:
        FileSystemNotWritten: one did not work.
    """
    changes = []
    before = system.read(FSTAB)
    if before is None and system.find(FSTAB) is not None:
        raise FileSystemNotWritten(f"{FSTAB} is not a plain file of a reasonable size")
    if system.find("/etc") is not None:
        text, told = amended_fstab((before or b"").decode(errors="surrogateescape"), root_device)
        put_file(system, FSTAB, text.encode(errors="surrogateescape"))
        changes += told
    if system.list(CLOUD_INIT):
        put_file(system, f"{CLOUD_INIT}/{CLOUD_INIT_FILE}", CLOUD_INIT_TEXT)
        changes.append(f"{CLOUD_INIT}/{CLOUD_INIT_FILE}: cloud-init takes no data from the host")
    if any(GUEST_AGENT in system.list(place) for place in UNIT_PLACES) and system.find(UNITS) is not None:
        _mask_unit(system, GUEST_AGENT)
        changes.append(f"{UNITS}/{GUEST_AGENT}: masked, it runs programs for the host")
    return tuple(changes)


def amended_fstab(text: str, root_device: str) -> tuple[str, list[str]]:
    """The text of /etc/fstab with the root on `root_device` and without anything that a host's disk could pose as.

    Returns:
        The new text, and a sentence for each change.
    """
    lines, changes, has_root = [], [], False
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 3 or line.lstrip().startswith("#"):
            lines.append(line)
            continue
        source, place, kind = fields[:3]
        if place == "/":
            options = fields[3] if len(fields) > 3 else "defaults"
            # The initrd has mounted the root by then; a check of the file system would find it in use.
            new = f"{root_device} / {kind} {options} 0 0"
            if not has_root:
                lines.append(new)
                changes.append(f"{FSTAB}: the root is {root_device} instead of {source}")
            has_root = True
        elif _from_outside(source, place, kind):
            lines.append(_MARK + line)
            changes.append(f"{FSTAB}: {source} is not used for {place}")
        else:
            lines.append(line)
    if not has_root:
        lines.insert(0, f"{root_device} / ext4 defaults 0 0")
        changes.append(f"{FSTAB}: the root is {root_device}")
    return "\n".join(lines) + "\n", changes


def _from_outside(source: str, place: str, kind: str) -> bool:
    """Whether a line mounts something from the boot partitions, from another disk, or from the host."""
    in_boot = any(place == boot or place.startswith(f"{boot}/") for boot in _BOOT_PLACES)
    tagged = source.partition("=")[0] in {"UUID", "LABEL", "PARTUUID", "PARTLABEL", "ID"}
    return in_boot or tagged or source.startswith("/dev/") or kind in _HOST_FILE_SYSTEMS


def put_file(system: FileSystem, path: str, content: bytes) -> None:
    """Give the plain file `path` another content, or make it: then owned by root, mode 0644.

    Raises:
        FileSystemNotWritten: it did not work, or what is there afterwards is something else.
    """
    old = system.find(path)
    parent = path.rpartition("/")[0]
    if old is None:
        mode, uid, gid = 0o644, 0, 0
        kept = {key: value for key, value in system.attributes(parent).items() if key in INHERITED}
        commands = []
    elif old.is_regular:
        mode, uid, gid = stat.S_IMODE(old.mode), old.uid, old.gid
        kept = system.attributes(path)
        commands = [f"rm {quote(path)}"]
    else:
        raise FileSystemNotWritten(f"{path} is not a plain file")
    with memory_files({"": content, **kept}) as fds:
        attributes = tuple((key, fds[key]) for key in kept)
        about = About(mode=stat.S_IFREG | mode, uid=uid, gid=gid, time=system.now, attributes=attributes)
        commands += write_commands(path, fds[""], about)
        system.alter(commands, list(fds.values()))
    new = system.find(path)
    if new is None or (new.mode, new.uid, new.gid) != (stat.S_IFREG | mode, uid, gid) or system.read(path) != content:
        raise FileSystemNotWritten(f"{path} did not become what it should")
    if system.attributes(path) != kept:
        raise FileSystemNotWritten(f"{path} lost its extended attributes")


def _mask_unit(system: FileSystem, unit: str) -> None:
    path = f"{UNITS}/{unit}"
    remove = [f"rm {quote(path)}"] if system.find(path) is not None else []
    link = inode_commands(unit, About(mode=stat.S_IFLNK | 0o777, uid=0, gid=0, time=system.now))
    system.alter([*remove, f"cd {quote(UNITS)}", f"symlink {quote(unit)} /dev/null", *link])
    new = system.find(path)
    if new is None or not stat.S_ISLNK(new.mode):
        raise FileSystemNotWritten(f"{path} did not become a link")


@contextlib.contextmanager
def memory_files(contents: Mapping[str, bytes]) -> Iterator[dict[str, int]]:
    """Descriptors of files in memory with the given contents, by the same names; closed at the end."""
    fds: dict[str, int] = {}
    try:
        for name, content in contents.items():
            fds[name] = os.memfd_create("content", 0)
            view = memoryview(content)
            while view:
                view = view[os.write(fds[name], view) :]
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)
