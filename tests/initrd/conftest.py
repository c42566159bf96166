"""Fixtures of the initrd's tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "guest"))

import qemu_kernel


@pytest.fixture(scope="session")
def kernel_modules(tmp_path_factory) -> Path:
    """The modules directory of a distribution's kernel."""
    found = qemu_kernel.find_kernel(tmp_path_factory.mktemp("kernel"))
    if found is None:
        pytest.skip(qemu_kernel.MISSING)
    return found.modules
