"""The names that completion of `jindiskctl` offers.

Names come from the service if it runs; completing never starts it, and says nothing when it fails.
"""

from __future__ import annotations

import asyncio

import click
from click.shell_completion import CompletionItem

from jindiskd.cli.client import connected

TIMEOUT_S = 2.0


async def _names(interface: str, property_: str) -> list[str]:
    async with asyncio.timeout(TIMEOUT_S), connected(agent=False, auto_start=False) as client:
        return sorted(str(item[property_]) for item in (await client.objects(interface)).values())


def _complete(interface: str, incomplete: str, property_: str = "Name") -> list[CompletionItem]:
    try:
        names = asyncio.run(_names(interface, property_))
    except Exception:  # noqa: BLE001 (whoever presses a key wants no message)
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def images(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of images."""
    return _complete("org.jindisk1.Image", incomplete)


def volumes(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the data volumes of the image that is named already."""
    image = context.params.get("name", "")

    async def found() -> list[str]:
        async with asyncio.timeout(TIMEOUT_S), connected(agent=False, auto_start=False) as client:
            items = (await client.objects("org.jindisk1.Image")).values()
            return sorted(str(one["name"]) for item in items if item["Name"] == image for one in item["Volumes"])

    try:
        names = asyncio.run(found())
    except Exception:  # noqa: BLE001 (as above)
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def domains(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of domains."""
    return _complete("org.jindisk1.Domain", incomplete)


def keys(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of images whose keys are known."""
    return _complete("org.jindisk1.Key", incomplete)


def approvals(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Numbers of approvals."""
    return _complete("org.jindisk1.Approval", incomplete, "Number")


def jobs(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Numbers of jobs."""
    return _complete("org.jindisk1.Job", incomplete, "Id")


def devices(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Nodes of block devices of this host."""
    return _complete("org.jindisk1.Device", incomplete, "Node")
