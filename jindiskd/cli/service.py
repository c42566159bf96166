"""`jindiskctl status` and `daemon`: the service itself."""

from __future__ import annotations

import json
from typing import Any

import click

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.domain import DOMAIN
from jindiskd.cli.image import IMAGE, MANAGER
from jindiskd.cli.jobs import FINAL, JOB
from jindiskd.cli.output import fields, table


def _counted(items: list[dict[str, Any]], what: str) -> str:
    """`3 images, 2 of them simulated`."""
    simulated = sum(bool(item.get("Simulated")) for item in items)
    suffix = f", {simulated} of them simulated" if simulated else ""
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}{suffix}"


def _relay(service: dict[str, Any], domains: list[dict[str, Any]]) -> dict[str, str]:
    """Where guests are passed on to, and whether that works; nothing where the broker is in the service."""
    if not service["RelayBroker"]:
        return {}
    reasons = {item["RelayReason"] for item in domains if item["RelayState"] == "unreachable"}
    count = sum(item["RelayState"] == "open" for item in domains)
    text = "; ".join(sorted(reasons)) or f"{count} guest{'' if count == 1 else 's'} being passed on"
    return {"owner's broker": f"{service['RelayBroker']}, {text}"}


@click.command()
@common
@pass_app
def status(app: App) -> None:
    """Show how the service is, and what an administrator should know."""
    run(_status(app))


async def _status(app: App) -> None:
    async with connected() as client:
        service = await client.properties(ROOT_PATH, MANAGER)
        images = list((await client.objects(IMAGE)).values())
        domains = list((await client.objects(DOMAIN)).values())
        jobs = [item for item in (await client.objects(JOB)).values() if item["State"] not in FINAL]
    running = [item for item in domains if item["State"] == "running"]
    pairs = {
        "version": service["Version"],
        "broker": service["Deployment"],
        **_relay(service, domains),
        "simulated reports": "accepted: they prove nothing" if service["AllowSimulated"] else "refused",
        "libvirt": "connected" if service["LibvirtConnected"] else "not connected",
        "images": _counted(images, "image"),
        "domains": f"{_counted(domains, 'domain')}; {len(running)} running",
        "jobs": f"{len(jobs)} running",
    }
    warnings = "".join(f"\nwarning: {line}" for line in service["Warnings"])
    document = {
        "service": service,
        "images": len(images),
        "images_simulated": sum(bool(item["Simulated"]) for item in images),
        "domains": len(domains),
        "domains_simulated": sum(bool(item["Simulated"]) for item in domains),
        "domains_running": len(running),
        "jobs_running": len(jobs),
    }
    app.show(document, lambda: fields(pairs) + warnings)


@click.group()
@common
def daemon() -> None:
    """Look into the service."""


@daemon.command()
@common
@pass_app
def config(app: App) -> None:
    """List the settings in effect, and the file that each comes from."""
    run(_config(app))


async def _config(app: App) -> None:
    async with connected() as client:
        settings = await client.call(ROOT_PATH, MANAGER, "Configuration", {})
    document = [{"name": name, "value": json.loads(value), "origin": origin} for name, value, origin in settings]
    rows = [tuple(setting) for setting in settings]
    app.show({"settings": document}, lambda: table(("SETTING", "VALUE", "FROM"), rows, legend=app.legend))
