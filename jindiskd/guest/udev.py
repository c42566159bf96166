"""What udev must find when it starts after us: that the root's mapping was activated properly.

The device-mapper rules (10-dm.rules, udev/12-dm-permissions in LVM2) ignore a mapping at cold plug that no udev saw
when it was activated, and systemd then waits in vain for its device unit. A distribution's initramfs hands its udev
database over in /run/udev; this writes the one record that the rules import from there. Where a udev runs already, in
such an initramfs, it hears of the mapping from the kernel, and makes link and record itself.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from jindiskd.guest.dm import Mapping

DATABASE = Path("/run/udev/data")
CONTROL = Path("/run/udev/control")
"""A udev that runs listens there."""
MAPPER = Path("/dev/mapper")
VOLUMES = Path("/dev/disk/by-jindisk")
RULES = Path("/run/udev/rules.d/61-jindisk-volumes.rules")
"""Read by the system's udev, which makes the links anew, and so lets systemd wait for them."""


def publish(mapping: Mapping) -> Path:
    """Make the link that an active mapping is known by, and see to it that udev takes the mapping for what it is."""
    path = MAPPER / mapping.name
    with contextlib.suppress(FileExistsError):
        path.symlink_to(os.path.relpath(mapping.node, MAPPER))
    if not CONTROL.exists():
        remember_mapping(mapping)
    return path


def link_volume(name: str, node: Path, links: Path = VOLUMES, rules: Path = RULES) -> None:
    """Make an open volume known by its name, as `/dev/disk/by-jindisk/<name>`, now and once a udev runs.

    `node` is the block device, or a link to it.
    """
    device = Path(os.path.realpath(node))
    # systemd takes a mapping without a name for one that is not ready, and small systems have no rule that says it.
    named = 'ENV{DM_NAME}="$attr{dm/name}", ' if device.name.startswith("dm-") else ""
    links.mkdir(mode=0o755, parents=True, exist_ok=True)
    links.joinpath(name).symlink_to(os.path.relpath(device, links))
    rules.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with rules.open("a", encoding="ascii") as text:
        text.write(f'SUBSYSTEM=="block", KERNEL=="{device.name}", {named}SYMLINK+="disk/by-jindisk/{name}"\n')


def remember_mapping(mapping: Mapping, database: Path = DATABASE) -> None:
    """Write the database record of an active mapping.

    In udev's format: `S:` is a link below /dev, `E:` a property, `V:` the version of the format.
    """
    database.mkdir(mode=0o755, parents=True, exist_ok=True)
    record = (
        f"S:mapper/{mapping.name}\n"
        "E:DM_UDEV_PRIMARY_SOURCE_FLAG=1\n"
        "E:DM_UDEV_RULES_VSN=2\n"
        f"E:DM_NAME={mapping.name}\n"
        "V:1\n"
    )
    database.joinpath(f"b{mapping.major}:{mapping.minor}").write_text(record, encoding="ascii")
