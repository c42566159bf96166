"""What all tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of recorded data to test against; a test that needs it is skipped where it is not there."""
    found = Path(os.environ.get("JINDISK_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not found.is_dir():
        pytest.skip(f"the recorded test data is not at {found}; set JINDISK_VECTORS to its folder")
    return found
