"""`jindiskctl job`: work under way."""

from __future__ import annotations

import os
from operator import itemgetter
from typing import Any

import click

from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import RemoteError, connected
from jindiskd.cli.completion import jobs
from jindiskd.cli.jobs import FINAL, JOB, follow, job_path, pace_text, result
from jindiskd.cli.objects import Listing, numbered
from jindiskd.cli.output import fields, moment
from jindiskd.errors import EXIT_UNCHANGED


def progress_text(job: dict[str, Any]) -> str:
    """How far it is."""
    return f"{job['Progress']:.0%}" if job["ProgressValid"] else ""


@click.group()
@common
def job() -> None:
    """Look at work under way, and stop it."""


LISTING = Listing(
    interface=JOB,
    name="jobs",
    order=itemgetter("Id"),
    columns={
        "JOB": lambda item: str(item["Id"]),
        "OPERATION": itemgetter("Operation"),
        "OBJECTS": lambda item: " ".join(item["Objects"]),
        "STATE": itemgetter("State"),
        "STAGE": itemgetter("Stage"),
        "PROGRESS": progress_text,
        "STARTED": lambda item: moment(item["StartTime"]),
    },
    right=("JOB", "PROGRESS"),
)


@job.command(name="list")
@common
@pass_app
def list_(app: App) -> None:
    """List jobs: those that run, and those that ended in the last minute."""
    run(LISTING.show(app))


@job.command()
@click.argument("number", type=click.IntRange(1), shell_complete=jobs)
@click.option("--wait", is_flag=True, help="Wait until it has ended, and end as it does.")
@common
@pass_app
def show(app: App, number: int, wait: bool) -> None:
    """Show a job."""
    run(_show(app, number, wait))


async def _show(app: App, number: int, wait: bool) -> None:
    async with connected() as client:
        await client.subscribe()
        found = await numbered(client, job_path(number), JOB, "job", number)
        if wait:
            found = await follow(client, app, job_path(number))
        if found["State"] == "succeeded" and os.geteuid() in {0, found["OwnerUID"]}:
            found["Result"] = await result(client, found)
    pairs = {
        "job": str(found["Id"]),
        "operation": found["Operation"],
        "objects": " ".join(found["Objects"]),
        "state": found["State"],
        "stage": found["Stage"],
        "progress": f"{progress_text(found)} {pace_text(found)}".strip(),
        "started": moment(found["StartTime"]),
        "owner": str(found["OwnerUID"]),
        "result": found.get("Result", ""),
        "error": found["Message"],
    }
    app.show({"job": found}, lambda: fields(pairs))


@job.command()
@click.argument("number", type=click.IntRange(1), shell_complete=jobs)
@common
@pass_app
def cancel(app: App, number: int) -> None:
    """Cancel a job, and wait until what it made is undone. Exit status 4 if it had ended already."""
    run(_cancel(app, number))


async def _cancel(app: App, number: int) -> None:
    async with connected() as client:
        await client.subscribe()
        found = await numbered(client, job_path(number), JOB, "job", number)
        if found["State"] not in FINAL:
            await client.call(job_path(number), JOB, "Cancel", {})
            try:
                await follow(client, app, job_path(number))
            except RemoteError as exc:
                if exc.name.endswith(".Cancelled"):
                    app.show({"cancelled": number}, lambda: f"Job {number} was cancelled.")
                    return
                raise
    app.show({"cancelled": None}, lambda: f"Job {number} had ended before it could be cancelled.")
    raise click.exceptions.Exit(EXIT_UNCHANGED)
