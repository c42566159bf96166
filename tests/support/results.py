"""Results of single tests, written down as each ends: what was run, with what end, how long it took, of which source.

Standard library only: the runner (scripts/run-tests) uses it outside the virtual environment.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

GOOD = ("passed", "skipped")
FIGURES = "docs/reliability.md"
"""Made of results, so that it is no part of what was tested."""
DATE = "%Y-%m-%d %H:%M:%S"
"""Of results: UTC, so that later ones are greater."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was tested."""

    commit: str
    """Abbreviated, or `unknown` outside a repository."""
    changes: str
    """A digest of what differs from the commit, files that it does not know included; empty if nothing does."""

    def __str__(self) -> str:
        return f"{self.commit} and changes {self.changes}" if self.changes else self.commit


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one test ended."""

    outcome: str
    """`passed`, `skipped`, `failed`."""
    seconds: float
    """With the setting up of what it was the first to use."""
    processor_s: float
    """Processor time of pytest, and of those of its processes that have ended."""
    commit: str
    changes: str
    date: str
    load: float
    """The machine's load average when it ended."""
    figures: Mapping[str, int] = field(default_factory=dict)
    """What the test counted (pytest's `record_property`): of each kind, how many."""

    @property
    def source(self) -> Source:
        return Source(commit=self.commit, changes=self.changes)


def counted(found: Iterable[Result]) -> str:
    """The sums of what tests counted, such as `3768 images`; empty if they counted nothing."""
    sums: Counter[str] = Counter()
    for one in found:
        sums.update(one.figures)
    return ", ".join(f"{number} {kind}" for kind, number in sums.items())


def _git(root: Path, *words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout


def source(root: Path) -> Source:
    """The state of the tree at `root`."""
    try:
        commit = _git(root, "rev-parse", "--short=10", "HEAD").decode().strip()
        changed = _git(root, "diff", "HEAD", "--", ".", f":!{FIGURES}")
        new = sorted(filter(None, _git(root, "ls-files", "-z", "--others", "--exclude-standard").split(b"\0")))
    except (OSError, subprocess.CalledProcessError):
        return Source(commit="unknown", changes="")
    if not changed and not new:
        return Source(commit=commit, changes="")
    digest = hashlib.sha256(changed)
    for name in new:
        path = root / os.fsdecode(name)
        digest.update(name + b"\0" + (path.read_bytes() if path.is_file() else b""))
    return Source(commit=commit, changes=digest.hexdigest()[:10])


class Results:
    """A file of results by test, which several runs may write at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Result]:
        """All of them; none if there is no file."""
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        return {name: Result(**entry) for name, entry in found["tests"].items()}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def put(
        self, test: str, *, outcome: str, seconds: float, processor_s: float, of: Source, figures: Mapping[str, int]
    ) -> None:
        """Write one down; replaces what was known of this test."""
        result = Result(
            outcome=outcome, seconds=round(seconds, 1), processor_s=round(processor_s, 1),
            commit=of.commit, changes=of.changes,
            date=datetime.now(UTC).strftime(DATE), load=round(os.getloadavg()[0], 1),
            figures=dict(figures),
        )  # fmt: skip
        with self._locked():
            kept = self.read() | {test: result}
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps({"tests": {name: asdict(kept[name]) for name in sorted(kept)}}, indent=1) + "\n")
            new.replace(self.path)
