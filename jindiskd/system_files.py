"""The files that belong outside the Python package, and where: one list for packages, for pip, and for tests.

A wheel cannot put files where the bus, polkit and systemd look for them. A distribution's package calls this with the
prefix `/usr` and its staging root; whoever installed with pip calls it once as root, and after each upgrade.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from jindiskd.base.files import replace_file

POLKIT_ACTIONS = "/usr/share/polkit-1/actions"
"""The one directory that polkit reads, whatever the prefix."""
SOURCE_TREE = {"interfaces": "dbus", "units": "systemd", "rules": "udev"}
INTERFACES = ("Approval", "Audit", "Device", "Domain", "Image", "Job", "Key", "Manager", "Policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFile:
    """One file: where it comes from and where it goes."""

    package: str
    name: str
    target: str
    """With `{dbus}`, `{prefix}`, `{units}`, `{udev}`, `{sysusers}` and `{tmpfiles}` to be filled in."""


FILES = (
    SystemFile(package="interfaces", name="org.jindisk1.conf", target="{dbus}/system.d/org.jindisk1.conf"),
    SystemFile(
        package="interfaces",
        name="org.jindisk1.service",
        target="{prefix}/share/dbus-1/system-services/org.jindisk1.service",
    ),
    SystemFile(package="interfaces", name="org.jindisk1.policy", target=f"{POLKIT_ACTIONS}/org.jindisk1.policy"),
    *(
        SystemFile(
            package="interfaces",
            name=f"org.jindisk1.{name}.xml",
            target=f"{{prefix}}/share/dbus-1/interfaces/org.jindisk1.{name}.xml",
        )
        for name in INTERFACES
    ),
    SystemFile(package="units", name="jindiskd.service", target="{units}/jindiskd.service"),
    SystemFile(package="units", name="jindiskd.socket", target="{units}/jindiskd.socket"),
    SystemFile(package="units", name="jindiskd.sysusers", target="{sysusers}/jindiskd.conf"),
    SystemFile(package="units", name="jindiskd.tmpfiles", target="{tmpfiles}/jindiskd.conf"),
    SystemFile(package="units", name="jindisk-helper.socket", target="{units}/jindisk-helper.socket"),
    SystemFile(package="units", name="jindisk-helper@.service", target="{units}/jindisk-helper@.service"),
    SystemFile(package="rules", name="62-jindisk.rules", target="{udev}/62-jindisk.rules"),
    SystemFile(package="units", name="jindisk-broker.service", target="{units}/jindisk-broker.service"),
    SystemFile(package="units", name="jindisk-broker.sysusers", target="{sysusers}/jindisk-broker.conf"),
    SystemFile(package="units", name="jindisk-broker.tmpfiles", target="{tmpfiles}/jindisk-broker.conf"),
)

NEXT_STEPS = (
    "systemd-sysusers jindiskd.conf jindisk-broker.conf",
    "systemd-tmpfiles --create jindiskd.conf jindisk-broker.conf",
    "busctl call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus ReloadConfig",
    "systemctl daemon-reload",
    "udevadm control --reload && udevadm trigger --subsystem-match=block",
    "systemctl enable --now jindisk-helper.socket jindiskd.socket jindiskd.service",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things go on one system."""

    prefix: Path
    """`/usr` for a distribution's package, else usually `/usr/local`."""
    libexec: Path
    """The directory of the program `jindiskd`."""
    root: Path = Path("/")
    """Everything goes below this; for packaging and tests."""
    units: Path | None = None
    """The directory of units, where the distribution wants another than `PREFIX/lib/systemd/system`."""

    def target(self, file: SystemFile) -> Path:
        """Where a file goes."""
        packaged = self.prefix == Path("/usr")
        lib, etc = self.prefix / "lib", Path("/etc")
        directories = {
            "prefix": self.prefix,
            "dbus": self.prefix / "share/dbus-1" if packaged else etc / "dbus-1",
            "units": self.units or (lib if packaged else etc) / "systemd/system",
            "udev": (lib if packaged else etc) / "udev/rules.d",
            "sysusers": (lib if packaged else etc) / "sysusers.d",
            "tmpfiles": (lib if packaged else etc) / "tmpfiles.d",
        }
        return self.root / file.target.format(**directories).lstrip("/")


def _source(file: SystemFile) -> Traversable:
    try:
        folder = importlib.resources.files(f"jindiskd.{file.package}")
    except ModuleNotFoundError:  # run from a source tree, which has these packages under other names
        folder = Path(__file__).resolve().parents[1] / SOURCE_TREE[file.package]
    return folder.joinpath(file.name)


def content(file: SystemFile, places: Places) -> bytes:
    """What a file holds on this system: the unit names the program's directory."""
    return _source(file).read_bytes().replace(b"@LIBEXEC@", str(places.libexec).encode())


def install(places: Places, *, dry_run: bool = False) -> Iterator[tuple[Path, bool]]:
    """Put every file in place, mode 0644; yields each and whether it was changed."""
    for file in FILES:
        target, data = places.target(file), content(file, places)
        changed = not target.is_file() or target.read_bytes() != data
        if changed and not dry_run:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, data, 0o644)
        yield target, changed


def remove(places: Places, *, dry_run: bool = False) -> Iterator[tuple[Path, bool]]:
    """Take every file away again; yields each and whether it was there. Keys, images and settings stay."""
    for file in FILES:
        target = places.target(file)
        there = target.is_file()
        if there and not dry_run:
            target.unlink()
        yield target, there
