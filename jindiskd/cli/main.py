"""`jindiskctl`: the program. `jindiskctl NOUN VERB`, results on standard output, all else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import jindiskd
from jindiskd.cli.app import App, common, exit_status
from jindiskd.cli.approval import approval
from jindiskd.cli.attest import attest
from jindiskd.cli.audit import audit
from jindiskd.cli.broker import broker
from jindiskd.cli.collateral import collateral
from jindiskd.cli.copies import clone, export, import_
from jindiskd.cli.device import device
from jindiskd.cli.doctor import doctor
from jindiskd.cli.domain import domain, launch
from jindiskd.cli.image import image
from jindiskd.cli.job import job
from jindiskd.cli.key import key
from jindiskd.cli.measure import measure
from jindiskd.cli.monitor import monitor
from jindiskd.cli.policy import policy
from jindiskd.cli.service import daemon, status
from jindiskd.cli.shells import completion
from jindiskd.cli.system import system_files

PROGRAM = "jindiskctl"


@click.group()
@click.version_option(jindiskd.__version__, prog_name=PROGRAM)
@common
def cli() -> None:
    """Build, launch and attest virtual machines whose disks only they can read."""


_COMMANDS = (
    status, monitor, doctor, image, launch, domain, device, job, key, approval, audit, attest, policy, collateral,
    broker, daemon, system_files, completion,
)  # fmt: skip
for command in (measure, clone, export, import_):
    image.add_command(command)
for _command in _COMMANDS:
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    app = App()
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(app, lambda: cli.main(words, prog_name=PROGRAM, standalone_mode=False, obj=app))
