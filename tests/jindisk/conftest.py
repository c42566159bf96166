"""What the tests of JinDisk share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests' own helpers, `jd`

from jd import Audit


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Audit]:
    """Watch every sealing of the test: a repeated nonce or a key that was not drawn here fails it."""
    found = Audit()
    found.install(monkeypatch)
    yield found
    found.verify()
