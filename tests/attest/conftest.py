"""What the attestation tests share: recorded data and real firmware."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def attestation(vectors: Path) -> Path:
    return vectors / "attestation"


@pytest.fixture(scope="session")
def ovmf() -> Path:
    """Folder of firmware images that carry kernel hashes."""
    found = Path(os.environ.get("JINDISK_OVMF", ROOT / "build" / "tools" / "usr" / "share" / "ovmf"))
    if not (found / "OVMF.amdsev.fd").is_file():
        pytest.skip(f"no firmware for confidential guests in {found}; set JINDISK_OVMF")
    return found
