"""Into which pieces `scripts/run-tests` takes the tests."""

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

from suite.pieces import SECONDS, machine_files, short_pieces  # noqa: E402 (found by the line above)


def test_pieces_that_take_long_come_first() -> None:
    """Each whose time is told is there, and none is before one that takes longer."""
    names = [piece.name for piece in short_pieces()]
    assert set(SECONDS) <= set(names)
    assert names[: len(SECONDS)] == sorted(SECONDS, key=lambda name: -SECONDS[name])


def test_every_test_file_is_in_a_piece() -> None:
    """Once among those that need no machine, and its folder does not matter."""
    rest = [ROOT / word for piece in short_pieces() for word in piece.words if word.startswith("tests/")]
    files = set((ROOT / "tests").rglob("test_*.py"))
    counted = Counter(
        path
        for path in files
        for place in rest
        if place == path or (place.is_dir() and place in path.parents)
    )
    with_machines = {ROOT / "tests" / name for name in machine_files()}
    assert {path for path in files if not counted[path]} == set()
    assert {path for path in files - with_machines if counted[path] > 1} == set()
