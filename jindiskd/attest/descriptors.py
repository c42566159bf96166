"""Firmware by descriptor: which image on this machine is made for a platform.

Descriptors are `*.json` files in the directories below; a later directory overrides a file of the same name, an empty
file masks it, and the order is that of the file names. Source: QEMU docs/interop/firmware.json; libvirt notes 2.7.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jindiskd.base.platform import Tee
from jindiskd.errors import EXIT_NOT_FOUND, JindiskError

DIRECTORIES = (Path("/usr/share/qemu/firmware"), Path("/etc/qemu/firmware"))
LIMIT_BYTES = 1 << 20
FEATURES: Mapping[Tee, frozenset[str]] = {
    Tee.SEV: frozenset({"amd-sev"}),
    Tee.SEV_ES: frozenset({"amd-sev", "amd-sev-es"}),
    Tee.SNP: frozenset({"amd-sev-snp"}),
    Tee.TDX: frozenset({"intel-tdx"}),
}
PACKAGES: Mapping[Tee, str] = {tee: "ovmf-inteltdx" if tee is Tee.TDX else "ovmf-amdsev" for tee in Tee}
MACHINE = re.compile(r"pc-q35-\*|pc-q35-[0-9.]+|q35")


class NoFirmware(JindiskError, code="NoFirmware", exit_code=EXIT_NOT_FOUND):
    """No descriptor offers a firmware image for a platform."""

    def __init__(self, tee: Tee) -> None:
        """For guests of `tee`."""
        needed = ", ".join(sorted(FEATURES[tee]))
        super().__init__(
            f"no stateless firmware with {needed} is described in {' or '.join(map(str, DIRECTORIES))}: "
            f"install {PACKAGES[tee]}, or name an image (images.firmware)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """One usable descriptor: a stateless image for x86_64 q35."""

    file: Path
    image: Path
    features: frozenset[str]


def descriptors(directories: Sequence[Path] = DIRECTORIES) -> Iterator[Descriptor]:
    """All usable ones, in order. A file that is not a descriptor is passed over: others put it there."""
    files: dict[str, Path] = {}
    for directory in directories:
        files.update((path.name, path) for path in sorted(directory.glob("*.json")))
    for _, path in sorted(files.items()):
        try:
            with path.open("rb") as stream:
                parsed = json.loads(stream.read(LIMIT_BYTES) or b"null")
            found = _usable(path, parsed)
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            continue
        if found is not None:
            yield found


def _usable(path: Path, parsed: Any) -> Descriptor | None:
    if parsed is None or "uefi" not in parsed["interface-types"] or parsed["mapping"]["device"] != "memory":
        return None
    for target in parsed["targets"]:
        if target["architecture"] == "x86_64" and any(MACHINE.fullmatch(name) for name in target["machines"]):
            image = Path(parsed["mapping"]["filename"])
            return (
                Descriptor(file=path, image=image, features=frozenset(parsed["features"]))
                if image.is_absolute()
                else None
            )
    return None


def choose(tee: Tee, directories: Sequence[Path] = DIRECTORIES) -> Path:
    """The image of the first descriptor that has what the platform needs.

    Raises:
        NoFirmware: there is none.
    """
    for found in descriptors(directories):
        if found.features >= FEATURES[tee]:
            return found.image
    raise NoFirmware(tee)
