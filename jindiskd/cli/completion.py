"""Completion for shells: `jindiskctl completion SHELL`, and the names that it offers.

Names come from the service if it runs; completing never starts it, and says nothing when it fails.
"""

from __future__ import annotations

import asyncio

import click
from click.shell_completion import CompletionItem, get_completion_class

from jindiskd.cli.app import common
from jindiskd.cli.client import connected

PROGRAM = "jindiskctl"
VARIABLE = "_JINDISKCTL_COMPLETE"
TIMEOUT_S = 2.0


async def _names(interface: str) -> list[str]:
    async with asyncio.timeout(TIMEOUT_S), connected(agent=False, auto_start=False) as client:
        return sorted(str(item["Name"]) for item in (await client.objects(interface)).values())


def _complete(interface: str, incomplete: str) -> list[CompletionItem]:
    try:
        names = asyncio.run(_names(interface))
    except Exception:  # noqa: BLE001 (whoever presses a key wants no message)
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def images(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of images."""
    return _complete("org.jindisk1.Image", incomplete)


def domains(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of domains."""
    return _complete("org.jindisk1.Domain", incomplete)


def script(cli: click.Command, shell: str) -> str:
    """What a shell has to read."""
    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(cli, {}, PROGRAM, VARIABLE)
    return made.source_template % made.source_vars()


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL, for its completions directory."""
    click.echo(script(context.find_root().command, shell))
