"""`jindiskctl monitor`: domains, jobs, approvals and decisions as they are, until it is interrupted.

On a terminal a picture that changes; otherwise a line for each thing that happens, with --json a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.job import progress_text
from jindiskd.cli.jobs import FINAL, pace_text
from jindiskd.cli.output import clean, moment, platform
from jindiskd.cli.watching import News, Watched

KEPT = 200
"""Lines of the past that are kept; as many are shown as there is room for."""
PICTURES_PER_SECOND = 4
COLOURS = {
    "running": "green", "succeeded": "green", "released": "green", "up": "green",
    "refused": "red", "failed": "red", "down": "red",
    "waiting": "yellow", "approved": "green",
    "attested": "cyan", "unlocked": "cyan", "started": "cyan", "starting": "cyan",
}  # fmt: skip


@click.command()
@click.option(
    "--rows", type=click.IntRange(0, 1000), default=10, show_default=True, help="Decisions of the past to begin with."
)
@click.option("--lines", is_flag=True, help="Print lines, on a terminal too.")
@common
@pass_app
def monitor(app: App, rows: int, lines: bool) -> None:
    """Watch domains, jobs, approvals and, where that is allowed, decisions; goes on through restarts of the service."""
    run(_monitor(app, rows, lines))


async def _monitor(app: App, rows: int, lines: bool) -> None:
    async with connected(agent=False) as client:
        watched = Watched(client, rows=rows)
        if app.json:
            async for item in watched.news():
                click.echo(json.dumps(document(item), ensure_ascii=False))
        elif lines or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
            async for item in watched.news():
                if told := sentence(item):
                    click.echo(f"{item.at.astimezone():%H:%M:%S}  {told}")
        else:
            await _picture(watched)


async def _picture(watched: Watched) -> None:
    """Keep a picture of everything on the terminal."""
    past: deque[Text] = deque(maxlen=KEPT)
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:

        async def draw() -> None:
            while True:
                live.update(picture(watched, list(past), console.size.height), refresh=True)
                await asyncio.sleep(1 / PICTURES_PER_SECOND)

        drawing = asyncio.ensure_future(draw())
        try:
            async for item in watched.news():
                if told := sentence(item):
                    past.append(Text(f"{item.at.astimezone():%H:%M:%S}  {told}", style=colour_of(item)))
                if drawing.done():
                    drawing.result()
        finally:
            drawing.cancel()


def document(item: News) -> dict[str, Any]:
    """One piece of news for programs."""
    found = {"time": item.at.isoformat(), "event": item.event, "action": item.action, "data": item.data}
    return {**found, "changed": list(item.changed)} if item.action == "changed" else found


def colour_of(item: News) -> str:
    """The colour of a line about the past."""
    word = item.action if item.event == "service" else item.data.get("State", item.data.get("kind", ""))
    return COLOURS.get(word, "")


def sentence(item: News) -> str:
    """One piece of news for people; empty for what is only of passing interest."""
    data = item.data
    if item.event == "service":
        return f"jindiskd {clean(data.get('Version', ''))} is {item.action}" + (
            f", broker {clean(data['Deployment'])}" if item.action == "up" else ""
        )
    if item.event == "decision":
        simulated = " (simulated: proves nothing)" if data["simulated"] else ""
        findings = f": {' '.join(data['findings'])}" if data["findings"] else ""
        about = f" about image {data['image-id']}" if data["image-id"] else ""
        return clean(f"decision {data['number']}: {data['kind']}{about} for {data['peer'] or '-'}{simulated}{findings}")
    if item.event == "log":
        return clean(f"job {data['Id']}: {data['Line']}")
    if item.event == "approval":
        return _approval_sentence(item)
    return _domain_sentence(item) if item.event == "domain" else _job_sentence(item)


def _approval_sentence(item: News) -> str:
    data = item.data
    if item.action == "changed" and "State" not in item.changed:
        return ""
    simulated = " (simulated: proves nothing)" if data["Simulated"] else ""
    how = {"waiting": "waits for a person", "approved": "is approved"}[data["State"]]
    how = "is over" if item.action == "removed" else how
    return clean(f"approval {data['Number']}: image {data['Image']} for {data['Peer']}{simulated} {how}")


def _domain_sentence(item: News) -> str:
    data = item.data
    name = f"domain {data['Name']}" + (" (simulated)" if data["Simulated"] else "")
    if item.action == "removed":
        return clean(f"{name} is gone")
    if item.action == "changed" and not {"State", "Reason", "RelayState"} & set(item.changed):
        return ""
    reason = f": {data['Reason']}" if data["Reason"] else ""
    relay = f"; relay {data['RelayState']} {data['RelayReason']}" if data["RelayState"] else ""
    return clean(f"{name} {data['State']}{reason}{relay}".rstrip())


def _job_sentence(item: News) -> str:
    data = item.data
    name = f"job {data['Id']} {data['Operation']} {' '.join(data['Objects'])}".rstrip()
    if item.action == "removed":
        return ""
    if item.action == "changed" and not {"State", "Stage"} & set(item.changed):
        return ""
    if data["State"] in FINAL or data["State"] == "cancelling":
        return clean(f"{name} {data['State']}" + (f": {data['Message']}" if data["Message"] else ""))
    return clean(f"{name}: {data['Stage'] or 'begun'}")


def picture(watched: Watched, past: list[Text], height: int) -> Group:
    """Everything that is known, in as many lines as there are."""
    head = Text()
    if watched.up:
        service = watched.service
        head.append(f"jindiskd {service['Version']}", style="bold")
        head.append(f"  broker {service['Deployment']}")
        if service["AllowSimulated"]:
            head.append("  simulated reports are accepted: they prove nothing", style="yellow")
        if waiting := sum(item["State"] == "waiting" for item in watched.approvals.values()):
            head.append(f"  {waiting} waiting for approval: jindiskctl approval list", style="yellow")
    else:
        head.append("jindiskd is not running; waiting for it", style="red")
    domains, jobs = _domains(watched), _jobs(watched)
    used = 1 + sum(table.row_count + 2 for table in (domains, jobs)) + 2
    log = "" if watched.may_read_log else " (the audit log may not be read: not authorised, or it is the owner's)"
    shown = past[-max(height - used, 3) :]
    return Group(head, domains, jobs, Text(f"\nEVENTS{log}", style="bold"), *shown)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, title=f"\n{title}", title_justify="left", title_style="bold", header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table


def _domains(watched: Watched) -> Table:
    table = _table("DOMAINS", "NAME", "IMAGE", "PLATFORM", "STATE", "SINCE", "REASON")
    for item in sorted(watched.domains.values(), key=lambda domain: str(domain["Name"])):
        state = Text(item["State"], style=COLOURS.get(item["State"], ""))
        name, image, reason = (Text(clean(item[key])) for key in ("Name", "Image", "Reason"))
        table.add_row(name, image, Text(platform(item)), state, moment(item["Since"]), reason)
    return table


def _jobs(watched: Watched) -> Table:
    table = _table("JOBS", "JOB", "OPERATION", "OBJECTS", "STATE", "STAGE", "PROGRESS")
    for item in sorted(watched.jobs.values(), key=lambda job: int(job["Id"]), reverse=True)[:10]:
        state = Text(item["State"], style=COLOURS.get(item["State"], ""))
        how_far = f"{progress_text(item)} {pace_text(item)}" if item["State"] not in FINAL else clean(item["Message"])
        cells = (str(item["Id"]), item["Operation"], " ".join(item["Objects"]))
        table.add_row(*(Text(clean(cell)) for cell in cells), state, Text(clean(item["Stage"])), Text(how_far.strip()))
    return table
