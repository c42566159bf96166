"""pytest's part of writing results down (`--record FILE`)."""

import os
from pathlib import Path

import pytest
from results import Results, source


class Recorder:
    """Puts each test into a file of results when it is through."""

    def __init__(self, path: Path, root: Path) -> None:
        self._results, self._source = Results(path), source(root)
        self._outcome, self._seconds, self._used_s = "", 0.0, 0.0

    @pytest.hookimpl
    def pytest_runtest_logstart(self) -> None:
        self._used_s = processor_s()

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":
            self._outcome, self._seconds = "passed", 0.0
        self._seconds += report.duration
        if report.outcome != "passed" and self._outcome != "failed":
            self._outcome = report.outcome
        if report.when == "teardown":
            used_s = processor_s() - self._used_s
            self._results.put(
                report.nodeid, outcome=self._outcome, seconds=self._seconds, processor_s=used_s, of=self._source,
                figures={kind: number for kind, number in report.user_properties if isinstance(number, int)},
            )  # fmt: skip


def processor_s() -> float:
    """Processor time of this process and of those of its children that have ended."""
    return sum(os.times()[:4])
