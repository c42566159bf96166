"""Into which pieces the tests are taken apart, and in which order these are run."""

import re
import subprocess
from collections.abc import Iterable, Mapping

from .lanes import EMPTY, ROOT, Piece

MACHINES = "(guest or host)"
LONG_FIRST = ("e2e/", "guest/", "domain/")  # in this order; then the rest
SECONDS = {
    "service": 300, "the rest": 230, "guest/test_boot.py": 222, "image": 221, "e2e/test_jindisk.py": 204,
    "e2e/test_startup.py": 194, "jindisk": 102, "domain/test_launch.py": 85, "e2e/test_relay.py": 79,
    "guest/test_jindisk.py": 75, "e2e/test_faults.py": 67, "guest/test_storage.py": 66, "domain/test_virsh.py": 42,
    "e2e/test_virsh.py": 41, "e2e/test_hostile_guest.py": 37, "e2e/test_rootfs.py": 35,
}  # fmt: skip
"""What pieces of the short tests take on an idle machine of two processors, about: those that take long come first, so
that no lane waits for another at the end. What is not named takes less."""
OTHER = "the rest"
REST = {
    "service": ("bus", "cli", "service"), OTHER: (), "image": ("image", "initrd"), "jindisk": ("jindisk", "jindisk1"),
}  # fmt: skip
"""Parts of what needs no machine, by folders; one has what is in no other."""
APART = ("tests/jindisk/test_model.py", "tests/jindisk/test_crash.py", "tests/jindisk1/test_crash.py")
"""Files with long tests whose every case is a piece: some take minutes."""


def machine_files() -> list[str]:
    """The test files, as paths below tests/, which have tests that want a machine or libvirtd."""
    marker = re.compile(r"pytest\.mark\.(guest|host)\b")
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if marker.search(path.read_text())]
    names = [path.relative_to(ROOT / "tests").as_posix() for path in found]

    def key(name: str) -> tuple[int, int]:
        place = next((n for n, start in enumerate(LONG_FIRST) if name.startswith(start)), len(LONG_FIRST))
        return place, -(ROOT / "tests" / name).stat().st_size

    return sorted(names, key=key)


def short_pieces() -> list[Piece]:
    """Every test but the long ones: a piece is one file that wants machines, or a part of the rest. Long ones first."""
    whole = re.compile(r"^pytestmark = .*\bmark\.long\b", re.MULTILINE)  # such a file would need a host for nothing
    files = [name for name in machine_files() if not whole.search((ROOT / "tests" / name).read_text())]
    found = [Piece(name, ["-m", f"not long and {MACHINES}", f"tests/{name}"]) for name in files]
    rest = ["-m", f"not long and not {MACHINES}"]
    named = {folder for folders in REST.values() for folder in folders}
    other = sorted(
        path.as_posix()
        for path in (entry.relative_to(ROOT) for entry in (ROOT / "tests").iterdir())
        if path.name not in named and (path.name.startswith("test_") or any((ROOT / path).glob("test_*.py")))
    )
    parts = {name: [f"tests/{folder}" for folder in folders] for name, folders in REST.items()} | {OTHER: other}
    pieces = [*found, *(Piece(name, [*rest, *where]) for name, where in parts.items())]
    return sorted(pieces, key=lambda piece: -SECONDS.get(piece.name, 0))


def collected(words: Iterable[str]) -> list[str]:
    """The tests that pytest takes by these words, by its names.

    Raises:
        SystemExit: the tests cannot be collected; pytest's own words are shown.
    """
    command = [".venv/bin/pytest", "--collect-only", "-q", *words]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode not in (0, EMPTY):
        raise SystemExit(done.stdout + done.stderr)
    return [line for line in done.stdout.splitlines() if "::" in line]


def long_pieces(tests: Iterable[str], seconds: Mapping[str, float]) -> list[Piece]:
    """Pieces of these tests: a file that wants machines, which its tests share; else one test with all its cases.

    Args:
        tests: pytest's names.
        seconds: what tests took at another time, as far as known; pieces that took long come first. What nobody knows
            comes before these, as the machines' files are ordered for the short tests.
    """
    machines = [f"tests/{name}" for name in machine_files()]
    found: dict[str, list[str]] = {}
    for test in tests:
        file, _, _ = test.partition("::")
        name = file if file in machines else test if file in APART else test.partition("[")[0]
        found.setdefault(name.removeprefix("tests/"), []).append(test)

    def key(name: str) -> tuple[bool, float, int]:
        known = [seconds.get(test) for test in found[name]]
        file = f"tests/{name}".partition("::")[0]
        place = machines.index(file) if file in machines else len(machines)
        return None not in known, -sum(filter(None, known)), place

    return [Piece(name, found[name]) for name in sorted(found, key=key)]
