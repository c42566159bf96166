"""What the broker's tests share: `brokerbench`, and one simulated root for all, since it takes seconds to make."""

import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jindiskd.sim.pki import SimulatedRoot
from jindiskd.sim.sev_platform import SevPlatformKeys

sys.path.insert(0, str(Path(__file__).parent))

from sev_place import Place


@pytest.fixture(scope="session")
def keys() -> SevPlatformKeys:
    return SevPlatformKeys.generate()


@pytest.fixture(scope="session")
def root() -> SimulatedRoot:
    return SimulatedRoot.generate(now=datetime.now(UTC))


@pytest.fixture
async def place(tmp_path: Path, keys: SevPlatformKeys, root: SimulatedRoot) -> AsyncIterator[Place]:
    made = Place(tmp_path, keys, root)
    yield made
    made.store.close()
