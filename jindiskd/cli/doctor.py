"""`jindiskctl doctor`: what is not right, and what to do about it; also where the service does not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from jindiskd.base.platform import Platform
from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.completion import domains, images
from jindiskd.cli.objects import MANAGER
from jindiskd.cli.output import clean
from jindiskd.doctor import host
from jindiskd.doctor.check import Verdict
from jindiskd.errors import EXIT_FAILED, ServiceUnavailable

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM", "unknown": "unknown"}
SERVICE_DOWN = {
    "id": "service",
    "verdict": Verdict.PROBLEM.value,
    "found": "the service does not run: images, domains and libvirt were not looked at, and the host as this user",
    "remedy": "start it: 'systemctl start jindiskd', and see 'journalctl -u jindiskd' if it ends",
    "tees": [],
}


@click.command()
@click.option("--image", help="Look at this image too.", shell_complete=images)
@click.option("--domain", help="Look at this domain too, and its image.", shell_complete=domains)
@click.option(
    "--platform",
    type=click.Choice([item.value for item in Platform]),
    help="Only what guests of this platform need.",
)
@click.option("--all", "everything", is_flag=True, help="Show what is right, too.")
@common
@pass_app
def doctor(app: App, image: str | None, domain: str | None, platform: str | None, everything: bool) -> None:
    """
    Look at host, image and domain, and say what to do about each thing that is not right.

    Nothing is changed. Exit status 1 if there is a problem.
    """
    run(_doctor(app, {"image": image, "domain": domain, "platform": platform}, everything=everything))


async def _doctor(app: App, asked: Mapping[str, str | None], *, everything: bool) -> None:
    options = {name: Variant("s", value) for name, value in asked.items() if value}
    try:
        async with connected() as client:
            rows = await client.call(ROOT_PATH, MANAGER, "Diagnose", options)
    except ServiceUnavailable:
        if asked["image"] or asked["domain"] or app.host:
            raise
        rows = [SERVICE_DOWN, *_local(asked["platform"])]
    problems = sum(row["verdict"] == Verdict.PROBLEM for row in rows)
    app.show({"checks": rows, "problems": problems}, lambda: _text(rows, problems, everything=everything))
    if problems:
        raise click.exceptions.Exit(EXIT_FAILED)


def _local(platform: str | None) -> Sequence[Mapping[str, Any]]:
    """What can be seen without the service."""
    wanted = Platform(platform) if platform else None
    rows = []
    for check in host.examine(host.Surroundings()):
        if wanted is not None and check.tees and (wanted.simulated or wanted.tee not in check.tees):
            continue
        demoted = wanted is None and check.tees and check.verdict is Verdict.PROBLEM
        verdict = Verdict.NOTE if demoted else check.verdict
        tees = sorted(tee.value for tee in check.tees)
        rows.append(
            {"id": check.id, "verdict": verdict.value, "found": check.found, "remedy": check.remedy, "tees": tees}
        )
    return rows


def _text(rows: Sequence[Mapping[str, Any]], problems: int, *, everything: bool) -> str:
    lines = []
    for row in rows:
        if row["verdict"] == Verdict.OK and not everything:
            continue
        needed = f" [{', '.join(row['tees'])}]" if row["tees"] else ""
        lines.append(f"{MARKS[row['verdict']]}  {row['id']}{needed}: {clean(row['found'])}")
        if row["remedy"]:
            lines.append(f"         → {clean(row['remedy'])}")
    right = sum(row["verdict"] == Verdict.OK for row in rows)
    lines.append(f"{len(rows)} checks: {right} right, {problems} problem{'' if problems == 1 else 's'}")
    return "\n".join(lines)
