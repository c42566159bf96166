"""`jindiskctl`: the program. `jindiskctl NOUN VERB`, results on standard output, all else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import jindiskd
from jindiskd.cli.app import App, common, exit_status, pass_app
from jindiskd.cli.elsewhere import check_destination, refuse_here
from jindiskd.cli.lazy import LazyGroup

PROGRAM = "jindiskctl"


COMMANDS = {
    "status": "service:status",
    "monitor": "monitor:monitor",
    "doctor": "doctor:doctor",
    "image": "image:image",
    "launch": "domain:launch",
    "domain": "domain:domain",
    "device": "device:device",
    "job": "job:job",
    "key": "key:key",
    "audit": "audit:audit",
    "approval": "approval:approval",
    "attest": "attest:attest",
    "policy": "policy:policy",
    "collateral": "collateral:collateral",
    "broker": "broker:broker",
    "daemon": "service:daemon",
    "system-files": "system:system_files",
    "completion": "shells:completion",
}
"""Where each command is; tests see to it that the names are right."""


class Program(LazyGroup):
    """The commands, some of which are of no use with `--host`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; refuses what `elsewhere.refuse_here` does."""
        found = super().resolve_command(ctx, args)
        if ctx.params.get("host") is not None and not ctx.resilient_parsing:
            refuse_here(check_destination(ctx.params["host"]), self._names(ctx, args))
        return found

    def _names(self, context: click.Context, words: Sequence[str]) -> list[str]:
        """The names of the command that is given, such as `image`, `export`."""
        names: list[str] = []
        command: click.Command | None = self
        for word in words:
            if not isinstance(command, click.Group):
                break
            if not word.startswith("-"):  # groups have flags alone
                names.append(word)
                command = command.get_command(context, word)
        return names


@click.group(cls=Program, places=COMMANDS)
@click.version_option(jindiskd.__version__, prog_name=PROGRAM)
@click.option("-H", "--host", metavar="HOST", help="Ask the service of another machine, over ssh ([user@]host).")
@common
@pass_app
def cli(app: App, host: str | None) -> None:
    """Build, launch and attest virtual machines whose disks only they can read."""
    app.host = host or ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    app = App()
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(app, lambda: cli.main(words, prog_name=PROGRAM, standalone_mode=False, obj=app))
