"""The command line of `jindiskd` itself. What it does is in `jindiskd.daemon`, and given here as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

import jindiskd
from jindiskd.config import DEFAULT_FILE


def daemon_command(run: Callable[..., int]) -> click.Command:
    """The command, which calls `run(path, check_config, show_config)` and returns its exit status."""

    @click.command()
    @click.version_option(jindiskd.__version__, prog_name="jindiskd")
    @click.option(
        "--config",
        "path",
        type=click.Path(path_type=Path),
        help=f"The configuration, instead of {DEFAULT_FILE}; its drop-ins are in a directory of its name and .d added.",
    )
    @click.option("--check-config", is_flag=True, help="Only check the configuration: exit status 0 or 2.")
    @click.option("--show-config", is_flag=True, help="Only print the settings in effect, as JSON.")
    def command(path: Path | None, check_config: bool, show_config: bool) -> int:
        """Serve images, domains and keys on the system bus."""
        return run(path, check_config, show_config)

    return command
