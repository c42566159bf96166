"""What the tests of JinDisk 1 share."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests' own helpers, `jd1` and `second_reader`

from jd1 import Vector


@pytest.fixture(scope="session")
def vector(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Vector]:
    """Unpack one of the volumes written by the reference module; never write to it."""
    manifest = json.loads((vectors / "jindisk" / "manifest.json").read_text())
    entries = {entry["name"]: entry for entry in manifest["volumes"]}
    folder = tmp_path_factory.mktemp("jindisk1")

    def unpack(name: str) -> Vector:
        path = folder / f"{name}.img"
        if not path.exists():
            packed = vectors / "jindisk" / entries[name]["file"]
            words = ["zstd", "-q", "-d", "--sparse", str(packed), "-o", str(path)]
            subprocess.run(words, check=True, timeout=300)
        return Vector(path, entries[name])

    return unpack


@pytest.fixture(scope="session")
def constants(vectors: Path) -> dict[str, object]:
    """The recorded constants."""
    found: dict[str, object] = json.loads((vectors / "jindisk" / "constants.json").read_text())
    return found
