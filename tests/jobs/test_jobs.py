"""Jobs begin, report, end and are cancelled; whatever happens, somebody learns how it ended."""

import asyncio
import gc
import weakref
from datetime import UTC, datetime

import pytest

from jindiskd.errors import Busy, Cancelled, NotFound, TimedOut
from jindiskd.jobs.job import NEXT, Change, Job, JobState, Operation
from jindiskd.jobs.manager import JobManager

BUILD = Operation.IMAGE_BUILD


@pytest.fixture
async def jobs():
    manager = JobManager(keep_s=30)
    yield manager
    await manager.close()


@pytest.fixture
def told(jobs):
    """What a watcher was told: change, state, line."""
    found = []
    jobs.watch(lambda job, change, line: found.append((change, job.state.value, line)))
    return found


async def test_a_job_succeeds_with_its_result(jobs, told):
    """New, progress, log, state, in this order; the fraction ends at one."""

    async def work(job: Job) -> str:
        job.progress("reading", 0.5, 10, 20)
        job.log("half\x1b[2J\n")
        return "name"

    job = jobs.start(BUILD, ["demo"], 1000, work)
    assert job.state is JobState.RUNNING
    await jobs.wait(job.number)
    assert (job.state, job.result, job.fraction) == (JobState.SUCCEEDED, "name", 1.0)
    assert told == [
        (Change.NEW, "running", ""),
        (Change.PROGRESS, "running", ""),
        (Change.LOG, "running", "half\ufffd[2J\ufffd"),
        (Change.STATE, "succeeded", ""),
    ]


@pytest.mark.parametrize(
    ("raised", "state", "code"),
    [
        (TimedOut("it", 3), JobState.FAILED, "Timeout"),
        (Cancelled("it"), JobState.CANCELLED, "Cancelled"),
        (RuntimeError("secret detail"), JobState.FAILED, "Internal"),
    ],
)
async def test_a_job_fails_with_a_typed_error(jobs, raised, state, code):
    """What was not foreseen becomes Internal with a reference, without its text."""

    async def work(job: Job) -> None:
        raise raised

    job = await jobs.wait(jobs.start(BUILD, [], 0, work).number)
    assert (job.state, job.error.code) == (state, code)
    assert "secret" not in str(job.error)


async def test_errors_kept_do_not_keep_what_the_work_held(jobs):
    """A finished job stays a minute; the frames of its failure, with whatever secrets they hold, do not."""

    class Thing:
        pass

    seen = []

    async def work(job: Job) -> None:
        thing = Thing()
        seen.append(weakref.ref(thing))
        try:
            raise ValueError("inner")
        except ValueError as exc:
            raise TimedOut("it", 1) from exc

    job = await jobs.wait(jobs.start(BUILD, [], 0, work).number)
    gc.collect()
    assert job.error is not None
    assert seen[0]() is None


async def test_cancelling_waits_for_what_has_to_be_undone(jobs, told):
    """Cancelling is a state of its own, until the work has cleaned up."""
    steps = []

    async def work(job: Job) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            steps.append("undone")

    job = jobs.start(BUILD, [], 0, work)
    await asyncio.sleep(0)
    jobs.cancel(job.number)
    assert job.state is JobState.CANCELLING
    jobs.cancel(job.number)  # once is enough
    await jobs.wait(job.number)
    assert (job.state, job.error.code, steps) == (JobState.CANCELLED, "Cancelled", ["undone"])
    assert [state for change, state, _ in told if change is Change.STATE] == ["cancelling", "cancelled"]


async def test_a_job_cancelled_before_its_first_step_ends_too(jobs):
    """Its work never ran, and what was to be closed at its end is closed all the same."""
    closed, ran = [], []

    async def work(job: Job) -> None:
        ran.append(True)

    job = jobs.start(BUILD, [], 0, work, at_end=lambda: closed.append(True))
    jobs.cancel(job.number)
    await jobs.wait(job.number)
    assert (job.state, closed, ran) == (JobState.CANCELLED, [True], [])


async def test_work_that_ends_in_spite_of_it_has_succeeded(jobs):
    """Who asks too late gets what was made."""

    async def work(job: Job) -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
        return "made"

    job = jobs.start(BUILD, [], 0, work)
    await asyncio.sleep(0)
    jobs.cancel(job.number)
    assert (await jobs.wait(job.number)).state is JobState.SUCCEEDED


async def test_some_work_cannot_be_cancelled(jobs):
    """It says so instead of pretending."""
    done = asyncio.Event()

    async def work(job: Job) -> None:
        await done.wait()

    job = jobs.start(BUILD, [], 0, work, cancelable=False)
    with pytest.raises(Busy):
        jobs.cancel(job.number)
    done.set()
    await jobs.wait(job.number)
    jobs.cancel(job.number)  # it has ended: nothing to do
    with pytest.raises(NotFound):
        jobs.cancel(99)


async def test_jobs_are_forgotten_after_their_time():
    """And nobody can fill the memory with them meanwhile."""
    jobs = JobManager(keep_s=0.05)

    async def work(job: Job) -> None:
        pass

    forgotten = []
    jobs.watch(lambda job, change, _: forgotten.append(job.number) if change is Change.FORGOTTEN else None)
    await jobs.wait(jobs.start(BUILD, [], 0, work).number)
    assert len(jobs.jobs()) == 1
    async with asyncio.timeout(5):
        while not forgotten:  # noqa: ASYNC110 (the thing waited for is a timer)
            await asyncio.sleep(0.01)
    assert jobs.jobs() == []
    await jobs.close()
    many = JobManager(keep_s=60)
    for _ in range(300):
        await many.wait(many.start(BUILD, [], 0, work).number)
    assert len(many.jobs()) == 256
    await many.close()
    assert many.jobs() == []


async def test_there_are_limits_for_all_and_for_each():
    """One user's jobs leave room for others'."""
    jobs = JobManager(limit=3, limit_per_owner=2)

    async def work(job: Job) -> None:
        await asyncio.sleep(60)

    jobs.start(BUILD, [], 1, work)
    jobs.start(BUILD, [], 1, work)
    with pytest.raises(Busy):
        jobs.start(BUILD, [], 1, work)
    jobs.start(BUILD, [], 2, work)
    with pytest.raises(Busy):
        jobs.start(BUILD, [], 3, work)
    await jobs.close()
    with pytest.raises(Busy, match="stopping"):
        jobs.start(BUILD, [], 1, work)


def test_states_are_never_left_where_the_table_does_not_say():
    """Final states have no successor, and `become` refuses what the table does not have."""
    job = Job(number=1, operation=BUILD, objects=(), owner_uid=0, tell=lambda *_: None)
    job.become(JobState.FAILED)
    for state in JobState:
        with pytest.raises(ValueError, match="cannot go"):
            job.become(state)
    assert {state for state in JobState if state.final} == {s for s, after in NEXT.items() if not after}


def test_rates_and_fractions_are_kept_in_bounds():
    """A source that says nonsense makes no nonsense of the report."""
    now = [0.0]
    job = Job(number=1, operation=BUILD, objects=(), owner_uid=0, tell=lambda *_: None, monotonic=lambda: now[0])
    assert (job.rate, job.expected_end) == (0, None)
    job.progress("copy", 7.0, -5, -1)
    assert (job.fraction, job.done_bytes, job.total_bytes) == (1.0, 0, 0)
    assert (job.rate, job.expected_end) == (0, None)
    now[0] = 10.0
    job.progress("copy", 0.5, 1000, 2000)
    assert job.rate == 100
    assert job.expected_end is None, "it went backwards"
    job.progress("copy", float("inf"), -(1 << 70), 0)
    assert (job.fraction, job.done_bytes, job.rate) == (1.0, 0, 0)


async def test_others_leave_room_for_root():
    """When ordinary users have all the jobs they can, the administrator can still have his."""
    jobs = JobManager(limit=8, limit_per_owner=4)

    async def work(job: Job) -> None:
        await asyncio.sleep(60)

    for owner in (1, 1, 1, 2, 2, 2):
        jobs.start(BUILD, [], owner, work)
    with pytest.raises(Busy):
        jobs.start(BUILD, [], 3, work)
    for _ in range(2):
        jobs.start(BUILD, [], 0, work)
    with pytest.raises(Busy):
        jobs.start(BUILD, [], 0, work)
    await jobs.close()


def test_speed_and_end_are_those_of_the_last_seconds():
    """What was slow long ago counts no longer; a new stage begins anew; what is over has no end to come."""
    now = [0.0]
    job = Job(number=1, operation=BUILD, objects=(), owner_uid=0, tell=lambda *_: None, monotonic=lambda: now[0])
    job.progress("copy", 0.0, 0, 1000)
    assert job.expected_end is None, "nothing is known yet"
    for _ in range(100):  # slow: a thousandth a second
        now[0] += 1
        job.progress("copy", now[0] / 1000, round(now[0]), 1000)
    assert job.rate == 1
    left = (job.expected_end - datetime.now(tz=UTC)).total_seconds()
    assert 890 < left <= 900
    done = 100
    for _ in range(30):  # then twenty times as fast
        now[0] += 1
        done += 20
        job.progress("copy", done / 1000, done, 1000)
    assert 19 <= job.rate <= 20
    left = (job.expected_end - datetime.now(tz=UTC)).total_seconds()
    assert 10 < left <= 15.1
    now[0] += 5  # nothing more is reported: the moment stays, as the clock of the test went on
    assert (job.expected_end - datetime.now(tz=UTC)).total_seconds() < left - 4
    job.progress("seal", None, 0, 0)
    assert (job.rate, job.expected_end) == (0, None)
    job.become(JobState.SUCCEEDED)
    assert job.expected_end is None
