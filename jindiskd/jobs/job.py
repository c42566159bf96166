"""One piece of long work, as others see it: what it is, how far it is, how it ended."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from jindiskd.errors import JindiskError
from jindiskd.jobs.pace import Pace


class Operation(enum.StrEnum):
    """What a job does; a closed list."""

    IMAGE_BUILD = "image-build"
    IMAGE_CLONE = "image-clone"
    IMAGE_EXPORT = "image-export"
    IMAGE_IMPORT = "image-import"
    IMAGE_REMOVE = "image-remove"
    IMAGE_MEASURE = "image-measure"
    IMAGE_UPDATE = "image-update"
    IMAGE_ADD_VOLUME = "image-add-volume"
    IMAGE_REMOVE_VOLUME = "image-remove-volume"
    REFUSAL_EXPLAIN = "refusal-explain"
    AUDIT_VERIFY = "audit-verify"
    DOMAIN_ADOPT = "domain-adopt"
    DOMAIN_LAUNCH = "domain-launch"
    DOMAIN_RELEASE = "domain-release"
    DOMAIN_START = "domain-start"
    DOMAIN_STOP = "domain-stop"
    DOMAIN_UNDEFINE = "domain-undefine"
    DEVICE_OPEN = "device-open"
    DEVICE_CLOSE = "device-close"


class JobState(enum.StrEnum):
    """Where a job is. The last three are final."""

    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """True for a job that has ended."""
        return not NEXT[self]


NEXT: Mapping[JobState, frozenset[JobState]] = {
    JobState.RUNNING: frozenset({JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    # Work that was nearly done when it was asked to stop may still succeed, or fail at stopping.
    JobState.CANCELLING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class Change(enum.Enum):
    """What a watcher of jobs is told."""

    NEW = enum.auto()
    PROGRESS = enum.auto()
    STATE = enum.auto()
    LOG = enum.auto()
    FORGOTTEN = enum.auto()


Watcher = Callable[["Job", Change, str], None]
"""Called in the event loop; the text is the line of `Change.LOG`, else empty."""


class Job:
    """Work under way. Made by the `JobManager` alone; the work itself reports through `progress` and `log`.

    For the event loop's thread only.
    """

    def __init__(
        self,
        *,
        number: int,
        operation: Operation,
        objects: tuple[str, ...],
        owner_uid: int,
        tell: Watcher,
        cancelable: bool = True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.number, self.operation, self.objects, self.owner_uid = number, operation, objects, owner_uid
        self.cancelable = cancelable
        self.started = datetime.now(tz=UTC)
        self.state = JobState.RUNNING
        self.stage = ""
        self.fraction: float | None = None
        """0 to 1, or None while it is not known."""
        self.done_bytes = self.total_bytes = 0
        self.result = ""
        self.error: JindiskError | None = None
        self._tell = tell
        self._pace = Pace(monotonic)

    @property
    def rate(self) -> int:
        """Bytes a second in this stage, over the last ten seconds or so."""
        return self._pace.rate

    @property
    def expected_end(self) -> datetime | None:
        """When this stage ends if it goes on as in the last ten seconds or so; None while that is not known."""
        left_s = None if self.state.final else self._pace.left_s
        return None if left_s is None else datetime.now(tz=UTC) + timedelta(seconds=left_s)

    def progress(self, stage: str, fraction: float | None = None, done_bytes: int = 0, total_bytes: int = 0) -> None:
        """Say how far the work is: a stage in a word or two, and how much of it is done (0 to 1, or None)."""
        if self.state.final:
            return
        if stage != self.stage:
            self._pace.begin()
        self.stage = stage
        self.fraction = None if fraction is None else min(max(fraction, 0.0), 1.0)
        self.done_bytes, self.total_bytes = max(done_bytes, 0), max(total_bytes, 0)
        self._pace.report(self.done_bytes, self.fraction)
        self._tell(self, Change.PROGRESS, "")

    def log(self, line: str) -> None:
        """Tell people one line; control characters are replaced, since guests and tools may have written it."""
        clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)[:1000]
        self._tell(self, Change.LOG, clean)

    def become(self, state: JobState, *, result: str = "", error: JindiskError | None = None) -> None:
        """Change the state; for the manager."""
        if state not in NEXT[self.state]:
            raise ValueError(f"a job cannot go from {self.state} to {state}")
        self.state, self.result, self.error = state, result, error
        if state is JobState.SUCCEEDED:
            self.fraction = 1.0
        self._tell(self, Change.STATE, "")
