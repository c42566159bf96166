"""Initrds for tests that boot many: what is the same in all is made once, and the configuration goes behind it.

The kernel unpacks archives one after the other into the same tree, so that the guest finds what `build_initrd` would
have made; uncompressed, as an emulator is slow at that. `test_boot.test_success` boots what it really makes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

from jindiskd.guest.config import GuestConfig
from jindiskd.image import initrd, system_initrd

_FOLDER = TemporaryDirectory(prefix="jindisk-initrds-")
_MADE: dict[object, tuple[Path, GuestConfig]] = {}


def build_initrd(*, config: GuestConfig, modules_dir: Path, output: Path) -> None:
    """Write an initrd for a guest with this configuration."""
    needs = (
        config.platform, config.report_source, config.jindisk, config.root.jindisk1 is not None, config.luks2,
        *(volume.filesystem for volume in config.all_volumes if getattr(volume, "mount", "/")),
        config.root.device.startswith("/dev/sd"),
    )  # fmt: skip
    if (needs, modules_dir) not in _MADE:
        path = Path(_FOLDER.name) / f"initrd{len(_MADE)}"
        known, archive = initrd.make_initrd(config, initrd.module_files(config, modules_dir))
        path.write_bytes(archive.to_bytes())
        _MADE[needs, modules_dir] = (path, known)
    common, known = _MADE[needs, modules_dir]
    told = dataclasses.replace(config, modules=known.modules, key_program=False)
    system_initrd.append(common, told, output)
