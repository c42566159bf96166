"""The units as systemd's own tools see them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "systemd"
MOST_EXPOSED = 2.5
"""Of 10; what stays open is listed with its reason in each unit."""
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))


@pytest.fixture
def placed(tmp_path: Path) -> Path:
    """The units with a program that exists."""
    for unit in (*UNITS.glob("*.service"), *UNITS.glob("*.socket")):
        text = unit.read_text().replace("@LIBEXEC@", str(tmp_path))
        (tmp_path / unit.name).write_text(text)
        for line in text.splitlines():
            if line.startswith("ExecStart="):
                program = Path(line.removeprefix("ExecStart=").split()[0])
                if program.parent == tmp_path:
                    shutil.copy("/bin/true", program)
    return tmp_path


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("unit", SERVICES)
def test_exposure(placed: Path, unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Below the limit, by `systemd-analyze security`; the figure is in the output of the tests."""
    done = analyze("security", "--offline=true", "--no-pager", "--json=short", str(placed / unit))
    overall = analyze("security", "--offline=true", "--no-pager", str(placed / unit)).stdout.strip().splitlines()[-1]
    with capsys.disabled():
        print(f"\n{overall}")
    assert json.loads(done.stdout), done.stderr
    assert float(overall.split(": ")[1].split()[0]) <= MOST_EXPOSED, done.stdout


@pytest.mark.parametrize("unit", SERVICES)
def test_every_open_point_is_explained(placed: Path, unit: str) -> None:
    """What `systemd-analyze security` finds missing, of whatever weight, is named in the unit, with its reason."""
    comments = "\n".join(line for line in (UNITS / unit).read_text().splitlines() if line.startswith("#"))
    points = json.loads(analyze("security", "--offline=true", "--no-pager", "--json=short", str(placed / unit)).stdout)
    for point in points:
        weight = float(point.get("exposure") or 0)
        if not weight:
            continue
        name, _, value = point["name"].partition("=~")
        wanted = value if value.startswith("@") else f"{name}={value}" if value == "AF_UNIX" else name
        wanted = wanted.partition("=/")[0].rstrip("=")
        assert wanted in comments, f"{point['name']} ({weight}) is open and {unit} does not say why"


@pytest.mark.parametrize("unit", SERVICES)
def test_systemd_accepts_every_line(placed: Path, unit: str) -> None:
    """No unknown setting, nothing ignored."""
    done = analyze("verify", "--man=no", "--recursive-errors=no", str(placed / unit))
    assert unit not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
