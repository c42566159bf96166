"""Runs jobs, keeps those that ended for a minute, and ends all of them when the service stops."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence

import structlog

from jindiskd.errors import Busy, Cancelled, Internal, JindiskError, NotFound
from jindiskd.jobs.job import Change, Job, JobState, Operation, Watcher

log = structlog.get_logger(__name__)
KEEP_S = 60.0
LIMIT = 64
"""Jobs that run at once."""
LIMIT_PER_OWNER = 32
KEPT_FOR_ROOT = 16
"""Of those, how many the administrator can have when all others have theirs."""
KEEP_LIMIT = 256
"""Jobs that have ended and can still be looked at."""
Work = Callable[[Job], Awaitable[str | None]]
"""The work: reports to the job it is given, returns what came of it in a word, or None."""


class JobManager:
    """All jobs of the service. For the event loop's thread only."""

    def __init__(self, *, keep_s: float = KEEP_S, limit: int = LIMIT, limit_per_owner: int = LIMIT_PER_OWNER) -> None:
        self._keep_s, self._limit, self._limit_per_owner = keep_s, limit, limit_per_owner
        self._jobs: dict[int, Job] = {}
        self._tasks: dict[int, asyncio.Task[str]] = {}
        self._forget: dict[int, asyncio.TimerHandle] = {}
        self._watchers: list[Watcher] = []
        self._last = 0
        self._closing = False

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Have `watcher(job, change, line)` called at each change; the function returned ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def _tell(self, job: Job, change: Change, line: str) -> None:
        for watcher in list(self._watchers):
            watcher(job, change, line)

    def jobs(self) -> list[Job]:
        """Those that run and those that ended less than a minute ago, oldest first."""
        return list(self._jobs.values())

    def job(self, number: int) -> Job:
        """One of them.

        Raises:
            NotFound: it never was, or it ended more than a minute ago.
        """
        if number not in self._jobs:
            raise NotFound("job", str(number))
        return self._jobs[number]

    def start(
        self,
        operation: Operation,
        objects: Sequence[str],
        owner_uid: int,
        work: Work,
        *,
        cancelable: bool = True,
        at_end: Callable[[], None] | None = None,
    ) -> Job:
        """Begin `work` and return its job at once; `at_end()` is called when it has ended, even if it never ran.

        Raises:
            Busy: too many jobs run already, or the service is stopping.
        """
        running = [job for job in self._jobs.values() if not job.state.final]
        if self._closing:
            raise Busy("the service", "it is stopping")
        most = self._limit - (min(KEPT_FOR_ROOT, self._limit // 4) if owner_uid else 0)
        if len(running) >= most or sum(job.owner_uid == owner_uid for job in running) >= self._limit_per_owner:
            raise Busy("the service", f"{len(running)} jobs are running already; wait for one to end")
        self._last += 1
        job = Job(
            number=self._last,
            operation=operation,
            objects=tuple(objects),
            owner_uid=owner_uid,
            tell=self._tell,
            cancelable=cancelable,
        )
        self._jobs[job.number] = job
        self._tell(job, Change.NEW, "")
        task = self._tasks[job.number] = asyncio.get_running_loop().create_task(self._run(job, work))
        task.add_done_callback(lambda done: self._ended(job, done, at_end))
        return job

    async def _run(self, job: Job, work: Work) -> str:
        with structlog.contextvars.bound_contextvars(
            job=job.number, operation=job.operation.value, objects=job.objects, uid=job.owner_uid
        ):
            log.info("job started")
            try:
                return await work(job) or ""
            except JindiskError:
                raise
            except Exception as exc:
                reference = os.urandom(4).hex()
                log.exception("fault in a job", reference=reference)
                raise Internal(reference) from exc

    def _ended(self, job: Job, task: asyncio.Task[str], at_end: Callable[[], None] | None) -> None:
        """Draw the conclusion. A task cancelled before its first step never ran, so this cannot be part of it."""
        error: JindiskError | None = None
        if task.cancelled():
            state, error = JobState.CANCELLED, Cancelled(f"{job.operation} {' '.join(job.objects)}".rstrip())
        elif (exc := task.exception()) is None:
            state = JobState.SUCCEEDED
        else:
            assert isinstance(exc, JindiskError)
            # The error is kept for a minute; the frames of its traceback, with all they hold, are not.
            exc.__traceback__ = exc.__cause__ = exc.__context__ = None
            state, error = (JobState.CANCELLED if isinstance(exc, Cancelled) else JobState.FAILED), exc
        result = task.result() if error is None else ""
        bound = log.bind(job=job.number, operation=job.operation.value, objects=job.objects, uid=job.owner_uid)
        if error is None:
            bound.info("job ended", state=state.value, result=result)
        else:
            bound.warning("job ended", state=state.value, error=error.code, message=str(error))
        if at_end is not None:
            at_end()
        del self._tasks[job.number]
        while len(self._forget) >= KEEP_LIMIT:
            self._drop(self._jobs[min(self._forget)])
        self._forget[job.number] = asyncio.get_running_loop().call_later(self._keep_s, self._drop, job)
        job.become(state, result=result, error=error)

    def _drop(self, job: Job) -> None:
        self._forget.pop(job.number).cancel()
        del self._jobs[job.number]
        self._tell(job, Change.FORGOTTEN, "")

    def cancel(self, number: int) -> None:
        """Ask a job to stop; one that has ended is left as it is.

        Raises:
            NotFound: there is no such job.
            Busy: it cannot be cancelled.
        """
        job = self.job(number)
        if job.state is not JobState.RUNNING:
            return
        if not job.cancelable:
            raise Busy(f"job {number}", "it is past the point where it can be cancelled; wait for its end")
        job.become(JobState.CANCELLING)
        self._tasks[number].cancel()

    async def wait(self, number: int) -> Job:
        """Wait until a job has ended."""
        job = self.job(number)
        task = self._tasks.get(number)
        if task is not None:
            await asyncio.wait({task})
            await asyncio.sleep(0)  # the conclusion is drawn in the turn after the task's end
        return job

    async def close(self) -> None:
        """Cancel all that runs, wait until it is undone, forget all."""
        self._closing = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)  # as in `wait`
        for job in self.jobs():
            self._drop(job)
