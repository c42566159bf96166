"""The agent as files, for an initramfs that a distribution makes.

Runs in two places. `python -m jindiskd.image.initramfs_files --package DIR`, when a package is built: the Python
sources that the agent and this module need, beyond the standard library. `initramfs_files DIR`, called by the hook of
initramfs-tools or of dracut in the guest's own system: the agent's closure into the tree of an initramfs in the
making, at the same places as in our own initrd, and::

    usr/lib/jindisk/unlock           attests and opens the root, or switches off
    usr/lib/jindisk/load-modules     what the agent expects to be loaded
    usr/lib/jindisk/mount-volumes    mounts the data volumes in the root, once that is mounted, or switches off
    usr/lib/jindisk/running          tells the host that the root is mounted
    usr/lib/jindisk/give-up          in the place of a rescue shell
    usr/lib/jindisk/shutdown         goes to /run/initramfs for a root that a process serves
    usr/lib/jindisk/files            what is copied there with it
    etc/jindisk/guest.json           the measured configuration, where this system has one

The configuration is written into the root by `jindiskctl image build`; until then an initramfs has none, and the agent
is not run. Every file of an initramfs is measured with it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from jindiskd.base import document
from jindiskd.errors import JindiskError
from jindiskd.guest import config as guest_config
from jindiskd.guest.config import GuestConfig
from jindiskd.image.cpio import Archive, Entry
from jindiskd.image.python_closure import LATE_IMPORTS, MERGED, add_python, closure, script

UNLOCK_ENTRY = "jindiskd.guest.unlock"
ENTRIES = (
    UNLOCK_ENTRY,
    "jindiskd.guest.agent",
    "jindiskd.guest.jindisk_root",
    "jindiskd.guest.shutdown",
    *LATE_IMPORTS,
)
HOME = "usr/lib/jindisk"
UNLOCK = f"{HOME}/unlock"
"""By this file an initramfs is known to have the agent."""
MOUNT_VOLUMES = f"{HOME}/mount-volumes"
"""By this one, that its agent knows data volumes, and finds the root on any disk."""
FOLDERS = ("dev", "oldroot", "proc", "run", "sys", "tmp")
"""Of the copy in /run/initramfs; systemd-shutdown wants `oldroot`."""
PACKAGED = Path("/usr/lib/jindisk-initramfs")
SCRIPTS = ("give-up", "load-modules")
"""Of the shell, as they are."""
DISTRIBUTIONS = ("cryptography", "cffi")
"""Whose notes on version and licence go with the sources."""


def agent() -> Archive:
    """The closure with its links and directories: all that is kept for a root that a process serves.

    Raises:
        InitrdFailed: this installation cannot supply it.
    """
    archive = Archive()
    for name in FOLDERS:
        archive.directory(name)
    for name in MERGED:
        archive.directory(f"usr/{name}")
        archive.link(name, f"usr/{name}")
    add_python(archive, ENTRIES)
    return archive


def write_tree(target: Path, config: bytes | None, scripts: Path = PACKAGED) -> None:
    """Put everything below `target`.

    Args:
        target: the root of an initramfs.
        config: the measured configuration's file, or None.
        scripts: where the shell scripts are.

    Raises:
        InitrdFailed: as of `agent`.
        MalformedDocument: the configuration is none.
        OSError: a script is missing.
    """
    if config is not None:
        document.load(GuestConfig, config, document=f"/{guest_config.PATH}")
    archive = agent()
    kept = archive.entries
    own = Archive()
    own.file(UNLOCK, script(UNLOCK_ENTRY), 0o755)
    own.file(MOUNT_VOLUMES, script(UNLOCK_ENTRY, call="mounting"), 0o755)
    own.file(f"{HOME}/running", script(UNLOCK_ENTRY, call="running"), 0o755)
    own.file(f"{HOME}/give-up-agent", script(UNLOCK_ENTRY, call="give_up"), 0o755)
    for name in SCRIPTS:
        own.file(f"{HOME}/{name}", (scripts / name).read_bytes(), 0o755)
    own.file(f"{HOME}/shutdown", script("jindiskd.guest.shutdown"), 0o755)
    own.file(f"{HOME}/files", "".join(f"{line(name, entry)}\n" for name, entry in kept.items()).encode())
    if config is not None:
        own.file(guest_config.PATH, config)
    for name, entry in [*kept.items(), *own.entries.items()]:
        write_entry(target, name, entry)


def line(name: str, entry: Entry) -> str:
    """An entry in `files`, as `guest.unlock.copy_agent` reads it."""
    if stat.S_ISDIR(entry.mode):
        return f"{name}/"
    return f"{name} -> {entry.data.decode()}" if stat.S_ISLNK(entry.mode) else name


def write_entry(target: Path, name: str, entry: Entry) -> None:
    """Make one name below `target`. What is there already stays: directories and links are the
    distribution's, and so may a library be, under a link."""
    path = target / name
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if stat.S_ISDIR(entry.mode):
        path.mkdir(mode=0o755, exist_ok=True)
    elif stat.S_ISLNK(entry.mode):
        if not os.path.lexists(path):
            path.symlink_to(entry.data.decode())
    elif not path.is_file() or path.read_bytes() != entry.data:
        path.unlink(missing_ok=True)  # it may be a link out of the tree
        path.write_bytes(entry.data)
        path.chmod(stat.S_IMODE(entry.mode))


def write_package(target: Path) -> None:
    """Copy the Python sources that a package of this needs, and the licences of what is not ours.

    Raises:
        InitrdFailed: as of `closure`.
    """
    library = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    site = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    for module in closure((__name__ if __name__ != "__main__" else "jindiskd.image.initramfs_files", *ENTRIES)):
        theirs = any(module.file.is_relative_to(place) for place in library)
        if theirs and not any(module.file.is_relative_to(place) for place in site):
            continue
        stem = module.name.replace(".", "/")
        if module.package:
            place = Path(stem) / module.file.name
        else:
            place = Path(stem).parent / module.file.name
        target.joinpath(place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(module.file, target / place)
    for name in DISTRIBUTIONS:
        found = metadata.distribution(name)
        for file in found.files or ():
            if ".dist-info/" in str(file) and file.name not in {"RECORD", "INSTALLER", "REQUESTED"}:
                target.joinpath(file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(found.locate_file(file)), target / file)


def main() -> None:
    """The command that hooks and package builds run; status 1 and one line on standard error when it fails."""
    parser = argparse.ArgumentParser(description="The jindisk agent as files for an initramfs.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--package", action="store_true", help="the sources for a package instead")
    parser.add_argument("--config", type=Path, default=Path("/", guest_config.PATH), help="the measured configuration")
    parser.add_argument("--scripts", type=Path, default=PACKAGED, help="where the shell scripts are")
    arguments = parser.parse_args()
    try:
        if arguments.package:
            write_package(arguments.directory)
        else:
            config = arguments.config.read_bytes() if arguments.config.exists() else None
            write_tree(arguments.directory, config, arguments.scripts)
    except (JindiskError, OSError) as exc:
        sys.exit(f"jindisk: the initramfs gets no agent: {exc}")


if __name__ == "__main__":
    main()
