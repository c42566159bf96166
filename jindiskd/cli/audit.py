"""`jindiskctl audit`: the log of release decisions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import AUDIT, AUDIT_PATH, Client, RemoteError, connected
from jindiskd.cli.completion import domains, images
from jindiskd.cli.domain import DOMAINS
from jindiskd.cli.image import IMAGES
from jindiskd.cli.jobs import result, start_and_follow
from jindiskd.cli.objects import Kind
from jindiskd.cli.output import clean, moment, table
from jindiskd.errors import EXIT_NOT_FOUND

PAGE_ROWS = 1000
"""As many as the service gives at once."""
HEAD = ("ROW", "WHEN", "WHAT", "IMAGE", "PEER", "EVIDENCE", "FINDINGS")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class When(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """A moment: `2026-01-31`, `2026-01-31T12:00:00`, local time; or how long ago: `90m`, `2d`."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The moment, with a zone."""
        if isinstance(value, datetime):
            return value
        try:
            if value[-1:] in UNITS and value[:-1].isdecimal():
                return datetime.now(UTC) - timedelta(seconds=int(value[:-1]) * UNITS[value[-1]])
            return datetime.fromisoformat(value).astimezone()
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no moment: write 2026-01-31, 2026-01-31T12:00:00, 90m or 2d", param, ctx)


@click.group()
@common
def audit() -> None:
    """Look at the log of release decisions."""


@audit.command(name="list")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Number of rows.")
@click.option("--image", shell_complete=images, help="Only rows about this image, a name or an id.")
@click.option("--guest", shell_complete=domains, help="Only rows about this domain, or this launch (REPORT_ID).")
@click.option(
    "--verdict", type=click.Choice(["released", "refused", "waiting"]), help="Only decisions that ended like this."
)
@click.option("--since", type=When(), help="Only rows that are not older: a date, a time, or 90m, 12h, 2d.")
@click.option("--until", type=When(), help="Only rows that are older.")
@click.option("--follow", is_flag=True, help="Go on with what is decided from now on, until interrupted.")
@common
@pass_app
def audit_list(app: App, /, limit: int, follow: bool, **given: Any) -> None:
    """List the decisions, newest last. With --follow and --json each row is a JSON object on a line of its own."""
    run(_list(app, limit, follow, given))


async def _list(app: App, limit: int, follow: bool, given: dict[str, Any]) -> None:
    async with connected() as client:
        options = await _options(client, given)
        if follow:
            await client.subscribe()
        rows = await newest(client, options, limit)
        if not follow:
            app.show({"rows": rows}, lambda: table(HEAD, [cells(row) for row in rows], legend=app.legend))
            return
        _print(app, rows)
        # Rows that the filter leaves out count as read as well.
        last = max([row["number"] for row in rows], default=0)
        async for grown in _followed(client, options, last):
            _print(app, grown)


async def _options(client: Client, given: dict[str, Any]) -> dict[str, Variant]:
    """The options of the method, from those of the command; names become identities."""
    options: dict[str, Variant] = {}
    if given["image"]:
        options["image"] = Variant("s", await _identity(client, IMAGES, given["image"], "ImageId"))
    if given["guest"]:
        options["guest"] = Variant("s", await _identity(client, DOMAINS, given["guest"], "Uuid"))
    if given["verdict"]:
        options["verdict"] = Variant("s", given["verdict"])
    for name in ("since", "until"):
        if given[name] is not None:
            options[name] = Variant("t", max(round(given[name].timestamp() * 1_000_000), 0))
    return options


async def _identity(client: Client, kind: Kind, name: str, identity: str) -> str:
    """The identity of an image or domain; what is not known by that name may be one of something that is gone."""
    try:
        _, found = await kind.find(client, name)
    except RemoteError as exc:
        if exc.exit_code != EXIT_NOT_FOUND:
            raise
        return name
    return str(found[identity])


async def page(client: Client, options: Mapping[str, Variant], limit: int) -> tuple[list[dict[str, Any]], bool]:
    """Some rows, and whether there are more."""
    rows, more = await client.call(AUDIT_PATH, AUDIT, "List", {**options, "limit": Variant("u", limit)})
    return rows, more


async def newest(client: Client, options: Mapping[str, Variant], limit: int) -> list[dict[str, Any]]:
    """The last `limit` rows, oldest first, page by page."""
    found: list[dict[str, Any]] = []
    more, wanted = True, dict(options)
    while more and len(found) < limit:
        rows, more = await page(client, wanted, min(limit - len(found), PAGE_ROWS))
        found[:0] = rows
        if rows:
            wanted["before"] = Variant("t", rows[0]["number"])
    return found


async def after(client: Client, options: Mapping[str, Variant], last: int) -> list[dict[str, Any]]:
    """All rows with higher numbers, oldest first, page by page."""
    found: list[dict[str, Any]] = []
    more = True
    while more:
        rows, more = await page(client, {**options, "after": Variant("t", last)}, PAGE_ROWS)
        found += rows
        last = rows[-1]["number"] if rows else last
    return found


async def _followed(client: Client, options: Mapping[str, Variant], last: int) -> AsyncIterator[list[dict[str, Any]]]:
    """Rows as they are added, whenever the service says that there are some."""
    async for path, member, _ in client.signals():
        if path == AUDIT_PATH and member == "Appended":
            rows = await after(client, options, last)
            if rows:
                last = rows[-1]["number"]
                yield rows


def _print(app: App, rows: list[dict[str, Any]]) -> None:
    """Rows of a log that is followed."""
    for row in rows:
        click.echo(json.dumps(row, ensure_ascii=False) if app.json else "  ".join(clean(cell) for cell in cells(row)))


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row for people."""
    return (
        str(row["number"]),
        moment(row["at"]),
        row["kind"],
        row["image-id"],
        row["peer"],
        _evidence(row),
        " ".join(row["findings"]),
    )


def _evidence(row: Mapping[str, Any]) -> str:
    """What kind of report a row is about; most rows are about none."""
    if row["simulated"]:
        return "simulated"
    return "hardware" if row["measurement"] else "-"


@audit.command(name="verify")
@common
@pass_app
def audit_verify(app: App) -> None:
    """Check that no row of the log was changed, removed or inserted."""
    run(_verify(app))


async def _verify(app: App) -> None:
    async with connected() as client:

        async def start() -> str:
            path: str = await client.call(AUDIT_PATH, AUDIT, "Verify", {})
            return path

        job = await start_and_follow(client, app, start, wait=True)
        assert job is not None  # waited for
        found = json.loads(await result(client, job))
    app.show(found, lambda: f"The audit log is whole: {found['rows']} rows, the last is {found['head'] or 'none'}.")
