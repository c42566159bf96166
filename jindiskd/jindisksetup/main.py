"""`jindisksetup`: the program. Results on standard output, all else on standard error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import click

import jindiskd
from jindiskd.base import log
from jindiskd.cli.app import App, common, exit_status
from jindiskd.cli.shells import completion
from jindiskd.jindisksetup.attach import close, create, list_, open_
from jindiskd.jindisksetup.convert import convert
from jindiskd.jindisksetup.look import check, dump, measure
from jindiskd.jindisksetup.make import export, format_, load, rekey
from jindiskd.jindisksetup.serve import serve

PROGRAM = "jindisksetup"


@click.group()
@click.version_option(jindiskd.__version__, prog_name=PROGRAM)
@common
def cli() -> None:
    """Set up JinDisk volumes: encrypted block devices on disks that others can read, change and set back."""


for _command in (
    format_,
    load,
    export,
    dump,
    check,
    measure,
    rekey,
    convert,
    serve,
    open_,
    create,
    list_,
    close,
    completion,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    log.setup("warning")
    app = App()
    if arguments is None:  # the program itself: TERM, or the end of the terminal, is as ^C: nothing is left half done
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup or the like
            signal.signal(signal.SIGHUP, signal.default_int_handler)
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(app, lambda: cli.main(words, prog_name=PROGRAM, standalone_mode=False, obj=app), PROGRAM)
