"""`jindiskctl status` and `daemon`: the service itself."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import click

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.approval import APPROVAL
from jindiskd.cli.client import connected
from jindiskd.cli.domain import DOMAIN
from jindiskd.cli.image import IMAGE
from jindiskd.cli.jobs import FINAL, JOB
from jindiskd.cli.objects import MANAGER
from jindiskd.cli.output import clean, fields, moment, styled, table

DAY_S = 86_400


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


DEPLOYMENTS = {
    "embedded": "in this service (embedded): this host can read the keys",
    "relay": "the owner's, elsewhere (relay): guests are passed on to it",
}
KEY_ENCRYPTION = {
    "credential": "a credential of the unit",
    "file": "a file beside the keys",
    "tpm2": "sealed to the TPM",
    "owner": "at the owner's broker",
}


def _collateral(count: int, expires: int) -> str:
    """How long the certificates and revocation lists last."""
    if not count:
        return "none: jindiskctl collateral fetch"
    if not expires:  # those of SEV have no dates
        return f"{count} certificates and lists; none with a date"
    left = round((expires / 1e6 - time.time()) / DAY_S)
    when = f"the first expires on {moment(expires)[:10]}, in {left} days" if left >= 0 else "one has expired"
    return f"{count} certificates and lists; {when}"


def _waiting(waiting: list[dict[str, Any]]) -> str:
    """How many guests wait for a person, and what to do."""
    if not waiting:
        return "no guest waits for one"
    images = ", ".join(sorted({item["Image"] for item in waiting}))
    return styled(f"{_counted(waiting, 'guest')} waiting ({images}): jindiskctl approval list", "yellow")


async def _status(app: App) -> None:
    async with connected() as client:
        service = await client.properties(ROOT_PATH, MANAGER)
        told = await client.call(ROOT_PATH, MANAGER, "Status", {})
        objects = await client.managed()
    kinds = (IMAGE, DOMAIN, JOB, APPROVAL)
    images, domains, jobs, approvals = (list(objects.get(kind, {}).values()) for kind in kinds)
    waiting = [item for item in approvals if item["State"] == "waiting"]
    jobs = [item for item in jobs if item["State"] not in FINAL]
    states = Counter(item["State"] for item in domains)
    embedded = service["Deployment"] == "embedded"
    pairs = {
        "version": service["Version"],
        "broker": styled(DEPLOYMENTS.get(service["Deployment"], service["Deployment"]), "yellow" if embedded else ""),
        **_relay(service, domains),
        "simulated reports": (
            styled("accepted: they prove nothing", "yellow") if service["AllowSimulated"] else "refused"
        ),
        "key-encryption key": KEY_ENCRYPTION.get(told["key-encryption"], told["key-encryption"]),
        **({"collateral": _collateral(told["collateral"], told["collateral-expires"])} if embedded else {}),
        "libvirt": "connected" if service["LibvirtConnected"] else "not connected; it is when first needed",
        "images": _counted(images, "image"),
        "domains": "; ".join(
            [_counted(domains, "domain"), *(f"{count} {state}" for state, count in sorted(states.items()))]
        ),
        "jobs": "; ".join(
            [f"{len(jobs)} running", *(f"{item['Operation']} {' '.join(item['Objects'])}" for item in jobs)]
        ),
        **({"approvals": _waiting(waiting)} if embedded else {}),
    }
    warnings = "".join(f"\n{styled('warning', 'yellow')}: {clean(line)}" for line in told["warnings"])
    document = {
        "service": service,
        "key_encryption": told["key-encryption"],
        "collateral": told["collateral"],
        "collateral_expires": told["collateral-expires"] or None,
        "warnings": told["warnings"],
        "images": len(images),
        "images_simulated": sum(bool(item["Simulated"]) for item in images),
        "domains": len(domains),
        "domains_simulated": sum(bool(item["Simulated"]) for item in domains),
        "domains_running": states["running"],
        "domain_states": dict(sorted(states.items())),
        "jobs_running": len(jobs),
        "approvals_waiting": len(waiting),
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
