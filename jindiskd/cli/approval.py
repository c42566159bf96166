"""`jindiskctl approval`: guests that wait until a person lets them have their keys."""

from __future__ import annotations

from operator import itemgetter

import click

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.completion import approvals
from jindiskd.cli.objects import Listing, Properties, numbered
from jindiskd.cli.output import clean, moment

APPROVAL = "org.jindisk1.Approval"


def evidence(item: Properties) -> str:
    """What kind of report the guest gave."""
    return "simulated" if item["Simulated"] else "hardware"


LISTING = Listing(
    interface=APPROVAL,
    name="approvals",
    order=itemgetter("Number"),
    columns={
        "NUMBER": lambda item: str(item["Number"]),
        "IMAGE": itemgetter("Image"),
        "GUEST": itemgetter("Peer"),
        "EVIDENCE": evidence,
        "DIGEST": lambda item: item["Measurement"][:16],
        "STATE": itemgetter("State"),
        "UNTIL": lambda item: moment(item["Expires"]),
    },
    right=("NUMBER",),
)


@click.group()
@common
def approval() -> None:
    """Decide about guests that wait for a person, where the policy of their image asks for one.

    Where the broker is the owner's, it is there that they wait: jindiskctl broker approval.
    """


@approval.command(name="list")
@common
@pass_app
def list_(app: App) -> None:
    """List the guests that wait, and those whose approval still counts; both end by themselves."""
    run(LISTING.show(app))


@approval.command()
@click.argument("number", type=click.IntRange(1), shell_complete=approvals)
@common
@pass_app
def approve(app: App, number: int) -> None:
    """Let this launch of a guest have its keys, for a quarter of an hour, in which it asks again by itself."""
    run(_decide(app, number, "Approve", "approved"))


@approval.command()
@click.argument("number", type=click.IntRange(1), shell_complete=approvals)
@common
@pass_app
def deny(app: App, number: int) -> None:
    """Take a guest off the list. If it asks again, it waits again: stop its domain, or revoke the key."""
    run(_decide(app, number, "Deny", "denied"))


async def _decide(app: App, number: int, member: str, word: str) -> None:
    path = f"{ROOT_PATH}/approval/{number}"
    async with connected() as client:
        found = await numbered(client, path, APPROVAL, "approval", number)
        await client.call(path, APPROVAL, member, {})
    what = clean(f"{found['Peer']} ({evidence(found)})")
    keys = f"the keys of image {clean(found['Image'])}"
    ends = {"approved": f"gets {keys} when it asks again", "denied": f"does not get {keys}"}
    app.show({word: found}, lambda: f"The guest at {what} {ends[word]}.")
