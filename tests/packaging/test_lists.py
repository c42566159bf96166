"""What wheel and packages hold is what the tree holds: nothing forgotten when a part is added."""

from __future__ import annotations

import tomllib
from pathlib import Path

from jindiskd.system_files import FILES, SOURCE_TREE

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_in_the_wheel() -> None:
    """A sub-package that is missing in the list works from a checkout and nowhere else."""
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "jindiskd").rglob("__init__.py")}
    data = {"jindiskd.interfaces", "jindiskd.units", "jindiskd.rules"}
    assert found | data == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_system_file_has_a_place() -> None:
    """Units, bus policy and actions lie in the tree for a reason: each is in the list of what is installed."""
    for package, folder in SOURCE_TREE.items():
        there = {path.name for path in (ROOT / folder).iterdir() if path.is_file() and path.suffix != ".py"}
        assert there == {file.name for file in FILES if file.package == package}


def test_every_program_is_in_a_debian_package() -> None:
    """Each program is linked into the path by one package, and has a manual page there."""
    links = "".join(path.read_text() for path in (ROOT / "debian").glob("*.links"))
    pages = "".join(path.read_text() for path in (ROOT / "debian").glob("*.manpages"))
    for name in PROJECT["project"]["scripts"]:
        assert f"usr/lib/jindisk/bin/{name} usr/" in links
        assert f"/{name}." in pages
