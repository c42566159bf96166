"""A distribution's kernel with its modules for guests of the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE_IMAGE = ROOT / "build/base/debian.img"
MISSING = "no guest kernel: run scripts/setup and scripts/make-base-image, or set JINDISK_GUEST_KERNEL to the folder"
MISSING += " that a kernel package was unpacked into"
# Root of type «Linux root (x86-64)», Discoverable Partitions Specification.
ROOT_TYPE = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"


@dataclass(frozen=True)
class GuestKernel:
    kernel: Path
    modules: Path


def find_kernel(scratch: Path) -> GuestKernel | None:
    """From an unpacked package, or out of the base image, without mounting it."""
    unpacked = os.environ.get("JINDISK_GUEST_KERNEL")
    if unpacked:
        return _in_tree(Path(unpacked))
    tools = {name: shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") for name in ("debugfs", "sfdisk")}
    if not BASE_IMAGE.exists() or not all(tools.values()):
        return None
    table = json.loads(subprocess.check_output([tools["sfdisk"], "--json", BASE_IMAGE]))["partitiontable"]
    start = next(part["start"] for part in table["partitions"] if part["type"] == ROOT_TYPE) * table["sectorsize"]
    for folder in ("/boot", "/usr/lib/modules"):
        target = scratch / Path(folder).parent.relative_to("/")
        target.mkdir(parents=True, exist_ok=True)
        command = [tools["debugfs"], "-R", f"rdump {folder} {target}", f"{BASE_IMAGE}?offset={start}"]
        subprocess.run(command, check=True, capture_output=True)
    (scratch / "lib").symlink_to("usr/lib")
    return _in_tree(scratch)


def _in_tree(tree: Path) -> GuestKernel | None:
    for kernel in sorted((tree / "boot").glob("vmlinuz-*")):
        modules = tree / "lib/modules" / kernel.name.removeprefix("vmlinuz-")
        if (modules / "modules.dep").exists():
            return GuestKernel(kernel, modules)
    return None
