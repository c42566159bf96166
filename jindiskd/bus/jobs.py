"""Jobs on the bus: one object for each, and the signals of the manager that announce them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from jindiskd.bus.collection import Collection, Item
from jindiskd.bus.contract import ERROR_PREFIX, ROOT_PATH
from jindiskd.bus.objects import ObjectPath, Options, microseconds
from jindiskd.bus.peers import Caller
from jindiskd.bus.server import Server
from jindiskd.jobs.job import Change, Job, Operation
from jindiskd.jobs.manager import JobManager, Work

SIGNAL_INTERVAL_S = 0.2
PRIORITY_INFO = 6
PROGRESS_PROPERTIES = ("Stage", "Progress", "ProgressValid", "Bytes", "BytesTotal", "Rate", "ExpectedEnd")


def job_path(number: int) -> ObjectPath:
    """Where a job is exported."""
    return ObjectPath(f"{ROOT_PATH}/job/{number}")


def start_bound(
    jobs: JobManager,
    caller: Caller,
    operation: Operation,
    names: Sequence[str],
    work: Work,
    options: Options,
    *,
    at_end: Callable[[], None] = lambda: None,
) -> ObjectPath:
    """Start a job; with the option bind-to-caller it is cancelled when its starter leaves the bus."""
    end_watch: Callable[[], None] = lambda: None  # noqa: E731 (replaced below)

    def ended() -> None:
        end_watch()
        at_end()

    try:
        job = jobs.start(operation, names, caller.uid, work, at_end=ended)
    except BaseException:
        at_end()
        raise
    if options.get("bind-to-caller") is True:
        end_watch = caller.on_leave(lambda: jobs.cancel(job.number))
    return job_path(job.number)


class JobObject(Item[Job], spec="org.jindisk1.Job"):
    """One job."""

    def __init__(self, job: Job, jobs: JobManager) -> None:
        super().__init__(job)
        self._jobs = jobs
        self._next_signal = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def job_owner(self) -> int:
        """Who started it may cancel it."""
        return self._view.owner_uid

    def polkit_details(self) -> Mapping[str, str]:
        """For the question whether somebody else's job may be cancelled."""
        return {"operation": self._view.operation.value}

    async def cancel(self, caller: Caller, options: Options) -> None:  # noqa: ARG002 (the contract's arguments)
        """Ask it to stop."""
        self._jobs.cancel(self._view.number)

    async def get_result(self, caller: Caller, options: Options) -> str:  # noqa: ARG002 (as above)
        """What came of it."""
        return self._view.result

    def _progressed(self) -> None:
        """Tell of progress, five times a second at most; the last value is never lost."""
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        wait = self._next_signal - loop.time()
        if wait > 0:
            self._timer = loop.call_later(wait, self._tell_progress)
        else:
            self._tell_progress()

    def _tell_progress(self) -> None:
        self._stop_timer()
        self._next_signal = asyncio.get_running_loop().time() + SIGNAL_INTERVAL_S
        self.changed(*PROGRESS_PROPERTIES)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _state_changed(self) -> None:
        self._stop_timer()
        self.changed("State", "Error", "Message", *PROGRESS_PROPERTIES)
        if self._view.state.final:
            self.signal("Completed", self._view.error is None, self.error, self.message)

    @property
    def id(self) -> int:  # noqa: A003, RUF100 (the contract's name)
        """Number of the job."""
        return self._view.number

    @property
    def operation(self) -> str:
        """What it does."""
        return self._view.operation.value

    @property
    def state(self) -> str:
        """Where it is."""
        return self._view.state.value

    @property
    def stage(self) -> str:
        """What it is doing."""
        return self._view.stage

    @property
    def progress(self) -> float:
        """How far it is."""
        return self._view.fraction or 0.0

    @property
    def progress_valid(self) -> bool:
        """Whether that is known."""
        return self._view.fraction is not None

    @property
    def bytes(self) -> int:
        """Bytes processed."""
        return self._view.done_bytes

    @property
    def bytes_total(self) -> int:
        """Bytes to process."""
        return self._view.total_bytes

    @property
    def rate(self) -> int:
        """Bytes a second."""
        return self._view.rate

    @property
    def expected_end(self) -> int:
        """When this stage ends, at this speed."""
        end = self._view.expected_end
        return microseconds(end) if end is not None else 0

    @property
    def start_time(self) -> int:
        """When it began."""
        return microseconds(self._view.started)

    @property
    def objects(self) -> Sequence[str]:
        """What it works on."""
        return list(self._view.objects)

    @property
    def owner_uid(self) -> int:
        """Who started it."""
        return self._view.owner_uid

    @property
    def cancelable(self) -> bool:
        """Whether it can be cancelled."""
        return self._view.cancelable

    @property
    def error(self) -> str:
        """Name of the error it ended with."""
        return ERROR_PREFIX + self._view.error.code if self._view.error else ""

    @property
    def message(self) -> str:
        """That error in a sentence."""
        return str(self._view.error or "")


class JobsOnBus:
    """Keeps the job objects as the jobs are. `announce(member, *arguments)` sends a signal of the manager."""

    def __init__(self, server: Server, jobs: JobManager, announce: Callable[..., None]) -> None:
        self._announce = announce
        self._shown = Collection[Job, JobObject](
            server,
            identity=lambda job: str(job.number),
            path=lambda identity: job_path(int(identity)),
            make=lambda job: JobObject(job, jobs),
        )
        self._end_watch = jobs.watch(self._on_change)

    def _on_change(self, job: Job, change: Change, line: str) -> None:
        if change is Change.NEW:
            self._shown.add(job)
            self._announce("JobNew", job.number, job_path(job.number))
            return
        item = self._shown.item(job)
        if change is Change.PROGRESS:
            item._progressed()  # noqa: SLF001 (one thing in two classes)
        elif change is Change.LOG:
            item.signal("LogMessage", PRIORITY_INFO, line)
        elif change is Change.STATE:
            item._state_changed()  # noqa: SLF001 (as above)
            if job.state.final:
                self._announce("JobRemoved", job.number, job_path(job.number), job.state.value)
        elif change is Change.FORGOTTEN:
            self._shown.remove(str(job.number))

    def close(self) -> None:
        """Stop following the jobs."""
        self._end_watch()
