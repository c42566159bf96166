"""The kernel of a base: the newest that has its modules, copied out together with the modules that the initrd needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jindiskd.image.debugfs import FileSystem, sayable
from jindiskd.image.refusals import NoKernel

RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}")
MODULES = "/lib/modules"
INDEXES = ("modules.dep", "modules.builtin", "modules.order", "modules.softdep", "modules.builtin.modinfo")
REQUIRED_INDEXES = INDEXES[:2]
MAX_KERNEL_BYTES = 256 << 20
_PREFIX = "vmlinuz-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel in a base."""

    release: str
    system: FileSystem
    """The file system it is on: the root, or a boot partition of the base."""
    path: str


def version_key(release: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts releases as people do: runs of digits by value, `6.1.0-9` before `6.1.0-13`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", release)
    return tuple((1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts)


def find_kernel(root: FileSystem, others: Sequence[FileSystem] = ()) -> Kernel:
    """The newest kernel: in /boot of the root, beside its modules, or on a boot partition of its own.

    Raises:
        NoKernel: none, or none that has its modules.
    """
    found: dict[str, Kernel] = {}
    for system, directory in ((root, "/boot"), *((other, "/") for other in others)):
        for name, node in system.list(directory).items():
            release = name.removeprefix(_PREFIX)
            if name.startswith(_PREFIX) and node.is_regular and RELEASE.fullmatch(release):
                path = f"{directory.rstrip('/')}/{name}"
                found.setdefault(release, Kernel(release=release, system=system, path=path))
    with_modules = {name for name, node in root.list(MODULES).items() if node.is_directory and RELEASE.fullmatch(name)}
    for release in with_modules - found.keys():
        beside = root.list(f"{MODULES}/{release}").get("vmlinuz")
        if beside is not None and beside.is_regular:
            found[release] = Kernel(release=release, system=root, path=f"{MODULES}/{release}/vmlinuz")
    if not found:
        raise NoKernel("there is no vmlinuz-* in /boot or on a boot partition, nor /lib/modules/*/vmlinuz")
    usable = sorted(found.keys() & with_modules, key=version_key)
    if not usable:
        raise NoKernel(f"the modules of {', '.join(sorted(found, key=version_key))} are not in {MODULES}")
    return found[usable[-1]]


def extract_kernel(kernel: Kernel, target: Path) -> None:
    """Copy the kernel out to the file `target`.

    Raises:
        NoKernel: it is empty, beyond all size, or cannot be read whole.
    """
    node = kernel.system.find(kernel.path)
    if node is None or not 0 < node.size_bytes <= MAX_KERNEL_BYTES or not kernel.system.dump(kernel.path, target):
        raise NoKernel(f"{kernel.path} cannot be read or is no kernel")
    target.chmod(0o644)


def extract_modules(
    root: FileSystem, release: str, directory: Path, needed: Callable[[Path], tuple[Path, ...]]
) -> Path:
    """Copy out the module indexes, then those modules that `needed` asks for.

    Args:
        root: the root file system.
        release: of the kernel.
        directory: where the tree is made.
        needed: gets the tree with the indexes and returns the paths in it that must exist.

    Returns:
        The tree: `directory/<release>`.

    Raises:
        NoKernel: an index or a module is missing.
    """
    tree = directory / release
    tree.mkdir(parents=True)
    for name in INDEXES:
        if not root.dump(f"{MODULES}/{release}/{name}", tree / name) and name in REQUIRED_INDEXES:
            raise NoKernel(f"{MODULES}/{release}/{name} is missing")
    for path in needed(tree):
        inside = f"{MODULES}/{release}/{path.relative_to(tree)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not sayable(inside) or not root.dump(inside, path):
            raise NoKernel(f"{inside} is missing or cannot be read")
    return tree
