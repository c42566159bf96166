"""Waiting for a job: progress on a terminal, its messages, ^C to cancel it, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.cli.app import App
from jindiskd.cli.client import Client, RemoteError
from jindiskd.cli.output import clean, size

if TYPE_CHECKING:
    from rich.progress import Progress

JOB = "org.jindisk1.Job"
FINAL = frozenset(("succeeded", "failed", "cancelled"))


def job_path(number: int) -> str:
    """Where a job is."""
    return f"{ROOT_PATH}/job/{number}"


def pace_text(job: dict[str, Any]) -> str:
    """How much of it is done, how fast, and how long the stage still takes."""
    words = [size(job["Bytes"])] if job["Bytes"] else []
    if words and job["Rate"] > 0:
        words.append(f"at {size(job['Rate'])}/s")
    if job["ExpectedEnd"]:
        left = max(round(job["ExpectedEnd"] / 1e6 - time.time()), 0)
        words.append(f"{timedelta(seconds=left)} left")
    return " ".join(words)


class View(Protocol):
    """Shows how far a job is."""

    def update(self, job: dict[str, Any]) -> None:
        """The job's properties have changed."""

    def line(self, text: str) -> None:
        """The job has said something."""


class _Bar:
    """A progress bar on standard error."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, detail="")

    def update(self, job: dict[str, Any]) -> None:
        detail = pace_text(job)
        self._progress.update(
            self._task,
            description=clean(job["Stage"]),
            total=1.0 if job["ProgressValid"] else None,
            completed=job["Progress"],
            detail=detail,
        )

    def line(self, text: str) -> None:
        self._progress.console.print(clean(text), markup=False, highlight=False)


class _Lines:
    """A line for each stage, for who reads standard error later; or JSON lines for programs."""

    def __init__(self, app: App, path: str) -> None:
        self._app, self._path, self._stage = app, path, ""

    def update(self, job: dict[str, Any]) -> None:
        if self._app.log_json:
            self._app.event(
                "progress",
                "job",
                job=self._path,
                stage=job["Stage"],
                fraction=job["Progress"] if job["ProgressValid"] else None,
                bytes=job["Bytes"],
                rate=job["Rate"],
                expected_end=job["ExpectedEnd"] or None,
            )
        elif job["Stage"] and job["Stage"] != self._stage:
            self._stage = job["Stage"]
            self._app.say(clean(self._stage))

    def line(self, text: str) -> None:
        self._app.say(clean(text))


@contextlib.contextmanager
def view(app: App, path: str) -> Iterator[View]:
    """What fits standard error."""
    if not app.progress_bar:
        yield _Lines(app, path)
        return
    from rich.console import Console  # loading it takes as long as a command
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress)


async def follow(client: Client, app: App, path: str) -> dict[str, Any]:
    """Wait for the end of a job; returns its last properties. ^C cancels it, a second ^C leaves at once.

    The client must have subscribed before the job was started.

    Raises:
        RemoteError: what the job failed with.
    """
    job = await client.properties(path, JOB)
    with view(app, path) as shown:
        waiting = asyncio.ensure_future(_until_final(client, path, job, shown))
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            app.say("cancelling; press ^C again to leave it alone")
            await client.call(path, JOB, "Cancel", {})
            await waiting
        finally:
            waiting.cancel()
    if job["State"] != "succeeded":
        raise RemoteError(job["Error"], job["Message"])
    return job


async def result(client: Client, job: dict[str, Any]) -> str:
    """What came of a job that succeeded."""
    text: str = await client.call(job_path(job["Id"]), JOB, "GetResult", {})
    return text


async def _until_final(client: Client, path: str, job: dict[str, Any], shown: View) -> None:
    """Follow the signals of a job, keeping `job` up to date, until it has ended."""
    shown.update(job)
    signals = client.signals()
    while job["State"] not in FINAL:
        where, member, body = await anext(signals)
        if where != path:
            continue
        if member == "PropertiesChanged" and body[0] == JOB:
            job.update(body[1])
            shown.update(job)
        elif member == "LogMessage":
            shown.line(body[1])


async def start_and_follow(
    client: Client, app: App, start: Callable[[], Awaitable[str]], *, wait: bool
) -> dict[str, Any] | None:
    """Start a job and wait for it, or with `wait` false print where it is and return None."""
    await client.subscribe()
    path = await start()
    if not wait:
        job = await client.properties(path, JOB)
        app.show({"job": {"Path": path, **job}}, lambda: f"job {job['Id']}")
        return None
    return await follow(client, app, path)
