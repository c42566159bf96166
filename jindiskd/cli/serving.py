"""The command lines of the services themselves. What they do is given here as a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

import jindiskd
from jindiskd import broker_config, config


def daemon_command(run: Callable[..., int]) -> click.Command:
    """The command of jindiskd, which calls `run(path, check_config, show_config, …)` and returns its exit status."""
    return _command("jindiskd", config.DEFAULT_FILE, "Serve images, domains and keys on the system bus.", run)


def broker_command(run: Callable[..., int]) -> click.Command:
    """The command of jindisk-broker, as `daemon_command`."""
    text = "Release the keys of encrypted images to guests that attest, on the machine of their owner."
    return _command("jindisk-broker", broker_config.DEFAULT_FILE, text, run)


def _command(program: str, default: Path, text: str, run: Callable[..., int]) -> click.Command:
    @click.command(help=text)
    @click.version_option(jindiskd.__version__, prog_name=program)
    @click.option(
        "--config",
        "path",
        type=click.Path(path_type=Path),
        help=f"The configuration, instead of {default}; its drop-ins are in a directory of its name and .d added.",
    )
    @click.option("--check-config", is_flag=True, help="Only check the configuration: exit status 0 or 2.")
    @click.option("--show-config", is_flag=True, help="Only print the settings in effect, as JSON.")
    @click.option(
        "--seal-kek",
        "seal",
        is_flag=True,
        help="Only seal the key-encryption key in its file to this machine's TPM, drawing one if there is none.",
    )
    @click.option(
        "--rotate-kek",
        "new_kek",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        metavar="FILE",
        help="Only wrap every key anew, by the key-encryption key in FILE; then put that in the old one's place.",
    )
    def command(**given: object) -> int:
        return run(**given)

    return command
