"""What the simulator's tests share: one simulated root, since making one takes seconds."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from jindiskd.sim.pki import SimulatedRoot

NOW = datetime(2026, 7, 15, tzinfo=UTC)


@pytest.fixture(scope="session")
def root_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simulated") / "root"
    SimulatedRoot.load_or_create(path, now=NOW)
    return path


@pytest.fixture(scope="session")
def root(root_directory: Path) -> SimulatedRoot:
    return SimulatedRoot.load_or_create(root_directory)
