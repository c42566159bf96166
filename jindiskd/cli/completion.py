"""The names that completion of `jindiskctl` offers.

Names come from the service if it runs; completing never starts it, and says nothing when it fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import click
from click.shell_completion import CompletionItem

from jindiskd.cli.app import App
from jindiskd.cli.client import Client, connected

TIMEOUT_S = 2.0


def _offered(
    context: click.Context, incomplete: str, names: Callable[[Client], Awaitable[list[str]]]
) -> list[CompletionItem]:
    app = context.find_object(App)
    if app is not None and app.host:
        return []  # no log-in at the press of a key

    async def ask() -> list[str]:
        async with asyncio.timeout(TIMEOUT_S), connected(agent=False, auto_start=False) as client:
            return await names(client)

    try:
        found = asyncio.run(ask())
    except Exception:  # noqa: BLE001 (whoever presses a key wants no message)
        return []
    return [CompletionItem(name) for name in found if name.startswith(incomplete)]


def _complete(
    context: click.Context, interface: str, incomplete: str, property_: str = "Name"
) -> list[CompletionItem]:
    async def names(client: Client) -> list[str]:
        return sorted(str(item[property_]) for item in (await client.objects(interface)).values())

    return _offered(context, incomplete, names)


def images(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of images."""
    return _complete(context, "org.jindisk1.Image", incomplete)


def volumes(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the data volumes of the image that is named already."""
    image = context.params.get("name", "")

    async def names(client: Client) -> list[str]:
        items = (await client.objects("org.jindisk1.Image")).values()
        return sorted(str(one["name"]) for item in items if item["Name"] == image for one in item["Volumes"])

    return _offered(context, incomplete, names)


def domains(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of domains."""
    return _complete(context, "org.jindisk1.Domain", incomplete)


def keys(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of images whose keys are known."""
    return _complete(context, "org.jindisk1.Key", incomplete)


def approvals(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Numbers of approvals."""
    return _complete(context, "org.jindisk1.Approval", incomplete, "Number")


def jobs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Numbers of jobs."""
    return _complete(context, "org.jindisk1.Job", incomplete, "Id")


def devices(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Nodes of block devices of this host."""
    return _complete(context, "org.jindisk1.Device", incomplete, "Node")
