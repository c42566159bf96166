"""`jindiskctl`: the program. `jindiskctl NOUN VERB`, results on standard output, all else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import jindiskd
from jindiskd.cli.app import App, common, exit_status
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


@click.group(cls=LazyGroup, places=COMMANDS)
@click.version_option(jindiskd.__version__, prog_name=PROGRAM)
@common
def cli() -> None:
    """Build, launch and attest virtual machines whose disks only they can read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    app = App()
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(app, lambda: cli.main(words, prog_name=PROGRAM, standalone_mode=False, obj=app))
