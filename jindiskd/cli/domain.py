"""`jindiskctl launch` and `jindiskctl domain`: guests."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import click

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.lib import Variant
from jindiskd.cli.app import App, common, pass_app, run
from jindiskd.cli.client import connected
from jindiskd.cli.completion import domains, images
from jindiskd.cli.jobs import result, start_and_follow
from jindiskd.cli.lazy import LazyGroup
from jindiskd.cli.objects import MANAGER, Kind, Listing, Properties, show_one
from jindiskd.cli.output import clean, moment, platform
from jindiskd.cli.parameters import Size

DOMAIN = "org.jindisk1.Domain"
DOMAINS = Kind(interface=DOMAIN, getter="GetDomain")


@click.command()
@click.argument("image", shell_complete=images)
@click.option("--name", help="Name of the domain.")
@click.option("--memory", type=Size(), help="Memory of the guest, such as 2G.")
@click.option("--timeout", type=click.IntRange(10), help="Seconds until it must run.")
@click.option("--host-data", help="Hexadecimal; its evidence shows it: HOSTDATA of SEV-SNP, MRCONFIGID of TDX.")
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def launch(
    app: App,
    image: str,
    name: str | None,
    memory: int | None,
    timeout: int | None,
    host_data: str | None,
    no_wait: bool,
) -> None:
    """Start a guest from IMAGE and follow it until its encrypted root is open and its system runs."""
    options: dict[str, Any] = {}
    if name:
        options["name"] = Variant("s", name)
    if memory:
        options["memory"] = Variant("t", memory)
    if timeout:
        options["timeout"] = Variant("u", timeout)
    if host_data:
        options["host-data"] = Variant("s", host_data)
    run(_launch(app, image, options, not no_wait))


async def _launch(app: App, image: str, options: dict[str, Any], wait: bool) -> None:
    async with connected() as client:
        job = await start_and_follow(
            client, app, lambda: client.call(ROOT_PATH, MANAGER, "Launch", image, options), wait=wait
        )
        if job is None:
            return
        _, found = await DOMAINS.find(client, await result(client, job))
    app.show({"domain": found}, lambda: _ended(found))


def _ended(domain: dict[str, Any]) -> str:
    """How a launch ended, in one sentence."""
    attested = "attested by simulated firmware, which proves nothing," if domain["Simulated"] else "attested,"
    return (
        f"Domain {clean(domain['Name'])} {attested} received the key of image {clean(domain['Image'])} "
        f"and runs from its encrypted root."
    )


@click.group(cls=LazyGroup, places={"console": "console:console"})
@common
def domain() -> None:
    """Look at guests, and end them."""


LISTING = Listing(
    interface=DOMAIN,
    name="domains",
    order=itemgetter("Name"),
    columns={
        "NAME": itemgetter("Name"),
        "IMAGE": itemgetter("Image"),
        "PLATFORM": platform,
        "STATE": itemgetter("State"),
        "SINCE": lambda item: moment(item["Since"]),
        "REASON": itemgetter("Reason"),
    },
)


@domain.command(name="list")
@common
@pass_app
def list_(app: App) -> None:
    """List the domains."""
    run(LISTING.show(app))


@domain.command()
@click.argument("name", shell_complete=domains)
@common
@pass_app
def show(app: App, name: str) -> None:
    """Show a domain."""
    run(show_one(app, DOMAINS, name, "domain", _fields))


def _fields(found: Properties) -> dict[str, str]:
    way = (found["RelayState"], found["RelayReason"])
    return {
        "name": found["Name"],
        "uuid": found["Uuid"],
        "image": found["Image"],
        "platform": platform(found),
        "attestation": "simulated: proves nothing" if found["Simulated"] else "by hardware",
        "state": found["State"],
        "since": moment(found["Since"]),
        "reason": found["Reason"],
        "vsock cid": str(found["Cid"] or ""),
        **({"owner's broker": " ".join(filter(None, way))} if any(way) else {}),
    }


@domain.command()
@click.argument("domain_", metavar="DOMAIN")
@click.argument("image", shell_complete=images)
@common
@pass_app
def adopt(app: App, domain_: str, image: str) -> None:
    """Make the libvirt domain DOMAIN, made by virsh, virt-install or virt-manager, a guest of IMAGE.

    What is measured becomes the image's: firmware, kernel, initrd, command line, processors, launch security. Its first
    disk must be the image's. Networks, displays and the rest stay. It is then started by `virsh start` as before.
    """
    run(_adopt(app, domain_, image))


async def _adopt(app: App, name: str, image: str) -> None:
    async with connected() as client:
        job = await start_and_follow(
            client, app, lambda: client.call(ROOT_PATH, MANAGER, "AdoptDomain", name, image, {}), wait=True
        )
        assert job is not None  # waited for
        _, found = await DOMAINS.find(client, await result(client, job))
    app.show(
        {"domain": found},
        lambda: (
            f"Domain {clean(found['Name'])} is a guest of image {clean(found['Image'])}: start it by virsh as before."
        ),
    )


@domain.command()
@click.argument("name", shell_complete=domains)
@click.option("--timeout", type=click.IntRange(1), help="Seconds until it must run.")
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def start(app: App, name: str, timeout: int | None, no_wait: bool) -> None:
    """Start a domain that is off, as it is defined, and follow it until its system runs.

    Like virsh start, and also for SEV and SEV-ES, which are measured before they run.
    """
    run(_start(app, name, {"timeout": Variant("u", timeout)} if timeout else {}, not no_wait))


async def _start(app: App, name: str, options: dict[str, Any], wait: bool) -> None:
    async with connected() as client:
        path, _ = await DOMAINS.find(client, name)
        job = await start_and_follow(client, app, lambda: client.call(path, DOMAIN, "Start", options), wait=wait)
        if job is None:
            return
        _, found = await DOMAINS.find(client, await result(client, job))
    app.show({"domain": found}, lambda: _ended(found))


@domain.command()
@click.argument("name", shell_complete=domains)
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@pass_app
def release(app: App, name: str, yes: bool) -> None:
    """Undo domain adopt: the domain stays in libvirt, and is none of ours any more.

    Our metadata and our vsock device are removed. What it boots stays the image's until you change it, and it can no
    longer unlock the image's disk.
    """
    run(_release(app, name, yes))


async def _release(app: App, name: str, yes: bool) -> None:
    async with connected() as client:
        path, found = await DOMAINS.find(client, name)
        app.confirm(f"Let go of domain {found['Name']}?", f"releasing domain {name}", yes=yes)
        await start_and_follow(client, app, lambda: client.call(path, DOMAIN, "Release", {}), wait=True)
    app.show({"released": found["Name"]}, lambda: f"Domain {clean(found['Name'])} is no guest of ours any more.")


@domain.command()
@click.argument("name", required=False, shell_complete=domains)
@click.option("--image", shell_complete=images, help="Of the domain that launch would define for this image, instead.")
@click.option("--memory", type=Size(), help="Memory of that, such as 2G.")
@click.option("--host-data", help="Hexadecimal; as of launch.")
@common
@pass_app
def xml(app: App, name: str | None, image: str | None, memory: int | None, host_data: str | None) -> None:
    """Print the definition of domain NAME as libvirt keeps it; or with --image the one that launch would make.

    With both, NAME is the name it would have.
    """
    if name is None and image is None:
        raise click.UsageError("give a domain, or --image")
    if (memory is not None or host_data) and image is None:
        raise click.UsageError("--memory and --host-data are for what launch would define: give --image")
    options: dict[str, Any] = {"name": Variant("s", name)} if name else {}
    if memory:
        options["memory"] = Variant("t", memory)
    if host_data:
        options["host-data"] = Variant("s", host_data)
    run(_xml(app, name, image, options))


async def _xml(app: App, name: str | None, image: str | None, options: dict[str, Any]) -> None:
    async with connected() as client:
        if image is not None:
            text: str = await client.call(ROOT_PATH, MANAGER, "DescribeDomain", image, options)
        else:
            assert name is not None  # by the caller
            path, _ = await DOMAINS.find(client, name)
            text = await client.call(path, DOMAIN, "GetXml", {})
    app.show({"xml": text}, text.rstrip)


@domain.command()
@click.argument("name", shell_complete=domains)
@click.option("--force", is_flag=True, help="Power it off instead of asking its system to shut down.")
@click.option("--timeout", type=click.IntRange(1), help="Seconds until it must be off; 90 otherwise.")
@click.option("--yes", is_flag=True, help="Do not ask before --force.")
@click.option("--no-wait", is_flag=True, help="Print the job and leave it to itself.")
@common
@pass_app
def stop(app: App, name: str, force: bool, timeout: int | None, yes: bool, no_wait: bool) -> None:
    """End a guest: press its power button until its system has shut down."""
    options = {"force": Variant("b", True)} if force else {}
    options |= {"timeout": Variant("u", timeout)} if timeout else {}
    run(_stop(app, name, options, yes, not no_wait))


async def _stop(app: App, name: str, options: dict[str, Any], yes: bool, wait: bool) -> None:
    async with connected() as client:
        path, found = await DOMAINS.find(client, name)
        if "force" in options:
            app.confirm(f"Power off {found['Name']} at once?", f"powering off domain {name}", yes=yes)
        if await start_and_follow(client, app, lambda: client.call(path, DOMAIN, "Stop", options), wait=wait) is None:
            return
    app.show({"stopped": found["Name"]}, lambda: f"Domain {clean(found['Name'])} is off.")


@domain.command()
@click.argument("name", shell_complete=domains)
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@pass_app
def undefine(app: App, name: str, yes: bool) -> None:
    """Remove a domain that is off; the image and its disk stay."""
    run(_undefine(app, name, yes))


async def _undefine(app: App, name: str, yes: bool) -> None:
    async with connected() as client:
        path, found = await DOMAINS.find(client, name)
        app.confirm(f"Remove domain {found['Name']}?", f"removing domain {name}", yes=yes)
        await start_and_follow(client, app, lambda: client.call(path, DOMAIN, "Undefine", {}), wait=True)
    app.show({"undefined": found["Name"]}, lambda: f"Removed domain {clean(found['Name'])}; its image stays.")
