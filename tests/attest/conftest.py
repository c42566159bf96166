"""What the attestation tests share: recorded data and real firmware."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vendorbench import Played

from jindiskd.attest.collateral import CollateralCache


@pytest.fixture(scope="session")
def attestation(vectors: Path) -> Path:
    return vectors / "attestation"


@pytest.fixture(scope="session")
def ovmf(firmware: Path) -> Path:
    """Folder of firmware images that carry kernel hashes."""
    return firmware.parent


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Played]:
    with Played(tmp_path) as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> CollateralCache:
    return CollateralCache(tmp_path / "cache")
