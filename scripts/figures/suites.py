"""Rows of the page that consist of tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from results import DATE, Result, Results, counted
from suite.lanes import ROOT
from suite.pieces import collected

SUITE_S = 3000
COLUMNS = ("cases", "passed", "skipped", "seconds", "measured")
RECORD = ROOT / "build/long-tests.json"

DISK = {
    "service and broker": ["tests/service/test_full_disk.py"],
    "launches and adoptions": ["tests/domain/test_full_disk_launch.py"],
}
KILLS = {
    "the service and the build worker, at each stage of a build": ["tests/image/test_service.py", "-k", "killed"],
    "processes that share a key store": ["tests/keys/test_processes.py"],
    "a JinDisk 2 volume at each write": ["tests/jindisk/test_crash.py"],
    "a JinDisk 1 volume at each write": ["tests/jindisk1/test_crash.py"],
    "the service in each state of a launch": ["tests/e2e/test_faults.py"],
    "libvirtd, the service, a guest's machine at random moments": ["tests/domain/test_kill.py", "-m", "not long"],
}
HOSTILE = {
    "guests against the broker": ["tests/broker/test_hostile.py"],
    "guests that run, against the host": ["tests/e2e/test_hostile_guest.py"],
    "disks and NBD clients against the volume engine": [
        "tests/jindisk/test_hostile.py",
        "tests/jindisk/test_hostile_run.py",
    ],
    "evidence and collateral": ["tests/attest/test_hostile.py"],
    "clients of the bus": ["tests/service/test_hostile.py", "tests/bus"],
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of the tests of a row."""

    cases: int
    found: Sequence[Result]
    """One for each test that ended."""

    def count(self, outcome: str) -> int:
        return sum(one.outcome == outcome for one in self.found)

    @property
    def sound(self) -> bool:
        """Every case passed, or was skipped."""
        return self.count("passed") + self.count("skipped") == self.cases

    def cells(self) -> list[str]:
        """As the table has them."""
        seconds = round(sum(one.seconds for one in self.found))
        cases = ", ".join(filter(None, [str(self.cases), counted(self.found)]))
        return [cases, str(self.count("passed")), str(self.count("skipped")), str(seconds), self._measured()]

    def _measured(self) -> str:
        if not self.found:
            return ""
        dates, loads = sorted({one.date[:10] for one in self.found}), sorted(round(one.load) for one in self.found)
        sources = sorted({one.commit + ("+" if one.changes else "") for one in self.found})
        load = str(loads[0]) if loads[0] == loads[-1] else f"{loads[0]}–{loads[-1]}"
        return f"{' and '.join(dates)}, of {', '.join(sources)}, load {load}"


def measure(words: Sequence[str], *, recorded: bool) -> Row:
    """Run tests on a throw-away host.

    Args:
        words: for pytest.
        recorded: take what earlier runs, also of the long tests, have written down, whatever source it was of, where
            that passed.
    """
    tests = collected(words)
    known = Results(RECORD).read() if recorded else {}
    found = {test: known[test] for test in tests if test in known and known[test].outcome == "passed"}
    left = [test for test in tests if test not in found]
    if left:
        command = ["scripts/testenv", ".venv/bin/pytest", "-q", f"--record={RECORD}", *left]
        began = datetime.now(UTC).strftime(DATE)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SUITE_S, check=False)
            if done.returncode:
                print(done.stdout[-3000:] + done.stderr[-3000:], file=sys.stderr)
        except subprocess.TimeoutExpired:
            print(f"ended after {SUITE_S} s: {' '.join(words)}", file=sys.stderr)
        now = Results(RECORD).read()
        found |= {test: now[test] for test in left if test in now and now[test].date >= began}
    return Row(cases=len(tests), found=list(found.values()))
