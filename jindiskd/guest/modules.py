"""Loading kernel modules without an index: the initrd lists its files in the order of loading."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from jindiskd.guest import kernel

# Parameters belong to the agent and not to the kernel command line, so that they are part of the measured archive.
PARAMETERS: Mapping[str, str] = {"nbd": "nbds_max=1 max_part=0"}

# EEXIST: built in, or loaded already. ENODEV: a driver for hardware that this machine lacks, such as aesni_intel on a
# processor without AES instructions; whatever really needs it fails later, with its own code.
HARMLESS = frozenset({errno.EEXIST, errno.ENODEV})


def load_modules(files: Iterable[Path]) -> None:
    """Load kernel modules in the order given.

    Raises:
        OSError: a file is missing, or the kernel refused it.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            kernel.load_module(descriptor, PARAMETERS.get(file.stem.replace("-", "_"), ""))
        except OSError as exc:
            if exc.errno not in HARMLESS:
                raise
        finally:
            os.close(descriptor)
