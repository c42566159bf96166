"""Completion scripts for shells, for any of our programs: `PROGRAM completion SHELL`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from jindiskd.cli.app import common


def script(cli: click.Command, shell: str, program: str) -> str:
    """What a shell has to read."""
    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(cli, {}, program, f"_{program.upper()}_COMPLETE")
    return made.source_template % made.source_vars()


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL, for its completions directory."""
    root = context.find_root()
    click.echo(script(root.command, shell, root.info_name or "jindiskctl"))
