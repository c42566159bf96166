"""What the attestation tests share: recorded data and real firmware."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def attestation(vectors: Path) -> Path:
    return vectors / "attestation"


@pytest.fixture(scope="session")
def ovmf(firmware: Path) -> Path:
    """Folder of firmware images that carry kernel hashes."""
    return firmware.parent
