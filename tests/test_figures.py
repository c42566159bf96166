"""What writes down results of tests and figures loses none of them."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
from results import Result, Results, Source

ROOT = Path(__file__).resolve().parent.parent
NEW = ["7", "7", "0", "1", "today"]
OF = Source(commit="0123456789", changes="")


@pytest.fixture
def reliability(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    loader = SourceFileLoader("reliability_script", str(ROOT / "scripts/reliability"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    found = module_from_spec(spec)
    loader.exec_module(found)
    return found


def test_the_page_is_what_the_script_writes(reliability: ModuleType, tmp_path: Path) -> None:
    """Reading and writing it changes nothing, and a row that is measured again leaves all else."""
    page = tmp_path / "page.md"
    before = reliability.PAGE.read_text()
    page.write_text(before)
    reliability.PAGE = page
    reliability.page().write()
    assert page.read_text() == before
    section = reliability.SECTIONS["kills"]
    rows: Mapping[str, list[str]] = reliability.page().rows(section)
    name = section.rows[2]
    again = reliability.page()
    again.put_rows(section, {name: NEW})
    again.write()
    after = reliability.page().rows(section)
    assert after[name] == NEW
    assert {n: row[:4] for n, row in after.items() if n != name} == {n: row[:4] for n, row in rows.items() if n != name}
    assert page.read_text().partition("## Kill points")[0] == before.partition("## Kill points")[0]


def test_each_test_is_written_down_as_it_ends(tmp_path: Path) -> None:
    """By pytest: also what is skipped, fails, or fails after it passed; what others wrote stays."""
    record, tests = tmp_path / "record.json", tmp_path / "test_four.py"
    Results(record).put("another", outcome="passed", seconds=1, processor_s=1, of=OF, figures={})
    tests.write_text(
        """
import os
import pytest
@pytest.fixture
def bad():
    yield
    raise ValueError
def test_good(record_property): record_property("stones", 3)
def test_skipped(): pytest.skip("so")
def test_failed(): assert False
def test_failed_after(bad): pass
def test_cut(): os._exit(9)
"""
    )
    words = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), f"--record={record}"]
    words += [str(tests), "-p", "no:cacheprovider", f"--confcutdir={ROOT}", "-pconftest"]
    done = subprocess.run(words, cwd=ROOT / "tests", env={"PYTHONPATH": str(ROOT / "tests"), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, check=False)  # fmt: skip
    found = Results(record).read()
    outcomes = {name.rpartition(":")[2]: one.outcome for name, one in found.items()}
    assert outcomes == {
        "another": "passed", "test_good": "passed", "test_skipped": "skipped", "test_failed": "failed",
        "test_failed_after": "failed",
    }, done.stdout + done.stderr  # fmt: skip
    assert found["another"].source == OF
    assert found[next(name for name in found if name.endswith("test_good"))].figures == {"stones": 3}


def test_the_table_names_what_did_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what failed, with the source of each."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from suite.table import table

    good = Result(outcome="passed", seconds=2, processor_s=1, date="", load=0, figures={"stones": 3}, **asdict(OF))
    bad = Result(outcome="failed", seconds=3, processor_s=1, date="", load=0, commit="fedcba9876", changes="abc")
    text = table(["tests/a.py::one[1]", "tests/a.py::one[2]", "tests/a.py::one[3]"], {
        "tests/a.py::one[1]": good, "tests/a.py::one[2]": bad,
    })  # fmt: skip
    line = text.splitlines()[1].split()
    assert line[:8] == ["a.py::one", "3", "1", "0", "1", "1", "5", "2"]
    assert "3 stones" in text
    assert "0123456789" in text
    assert "fedcba9876 and changes abc" in text
    assert text.splitlines()[-2:] == ["FAILED tests/a.py::one[2]", "NOT RUN tests/a.py::one[3]"]
