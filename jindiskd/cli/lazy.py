"""A command group whose commands are imported when they are asked for: a command costs what it needs itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """A group that knows where its commands are: `places` gives for each name, in the order of the help, the module
    below `jindiskd.cli` and the attribute in it, with a colon between.
    """

    def __init__(self, *args: Any, places: Mapping[str, str], **more: Any) -> None:
        """Import nothing yet."""
        super().__init__(*args, **more)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, sorted."""
        return sorted({*super().list_commands(ctx), *self._places})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; None if there is none."""
        place = self._places.get(cmd_name)
        if place is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = place.partition(":")
        found = getattr(import_module(f"jindiskd.cli.{module}"), attribute)
        if not isinstance(found, click.Command) or found.name != cmd_name:
            raise TypeError(f"{place} is not the command {cmd_name}")
        return found


def members(group: click.Group) -> dict[str, click.Command]:
    """All commands of a group by name, sorted."""
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}
