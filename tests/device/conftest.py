"""Fixtures of the tests of devices, and the path to their helper modules."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import devicevolumes


@pytest.fixture(scope="session")
def jindisk2(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The beginning of a JinDisk 2 volume of 16 MiB."""
    path = devicevolumes.make_jindisk2(tmp_path_factory.mktemp("jd2") / "volume", 16 << 20)
    return path.read_bytes()[: 1 << 20]


@pytest.fixture(scope="session")
def luks2() -> bytes:
    """A LUKS2 header as images have it."""
    return devicevolumes.luks2_header(8 << 20)
