"""Lower layers never import upper ones, and the guest's agent imports little."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jindiskd"
# Lowest first; packages of one row may import each other.
ROWS = (
    {"errors", "base"},
    {"kbs", "jindisk"},
    {"luks2"},
    {"guest"},
    {"attest"},
    {"sim"},
    {"policy", "keys", "broker"},
    {"image"},
    {"domain"},
    {"doctor"},
    {"jobs", "bus", "cli", "config", "broker_config", "interfaces", "jindisksetup", "system_files", "device", "helper"},
    {"program", "backend", "handed", "custody", "decisions", "devices", "diagnosis"},
    {"side", "standing", "daemon", "brokerd"},
)
LEVEL = {name: number for number, row in enumerate(ROWS) for name in row}
GUEST_MAY = {"errors", "base", "kbs", "jindisk", "luks2", "guest"}


def imports(path: Path) -> set[str]:
    """The parts of this package that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "jindiskd" else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("jindiskd.")}
    return {name for name in found if not name.startswith("_")}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if part(path) != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_imports_from_a_layer_above(path: Path) -> None:
    """The order of the layers is that of the architecture document."""
    assert part(path) in LEVEL, f"{part(path)} is in no layer: name its place in ROWS"
    above = {name for name in imports(path) if LEVEL[name] > LEVEL[part(path)]}
    assert not above


@pytest.mark.parametrize("path", sorted((PACKAGE / "guest").glob("*.py")), ids=lambda p: p.name)
def test_the_guest_imports_only_what_is_measured_with_it(path: Path) -> None:
    """What the agent imports is in every initrd and every launch digest: it stays small."""
    assert imports(path) <= GUEST_MAY


def test_one_module_imports_the_bus_library() -> None:
    """dbus-next is confined to one module, so that it can be replaced."""
    users = [p for p in MODULES if "dbus_next" in p.read_text()]
    assert [str(p.relative_to(PACKAGE)) for p in users] == ["bus/lib.py"]
