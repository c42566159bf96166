"""`jindiskctl system-files`: what the bus, polkit and systemd need to find."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from jindiskd.cli.app import App, common, pass_app
from jindiskd.errors import EXIT_UNCHANGED

DIRECTORY = click.Path(path_type=Path)


@click.group(name="system-files")
@common
def system_files() -> None:
    """Put the files that the bus, polkit and systemd need where they look for them; for installations by pip."""


def _places(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say where."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Only say what would be done."),
        click.option("--units", type=DIRECTORY, help="Directory of systemd units, where it is another than usual."),
        click.option(
            "--libexec", type=DIRECTORY, help="Directory of the program jindiskd; that of this one if not given."
        ),
        click.option("--root", type=DIRECTORY, default=Path("/"), help="Put everything below this directory."),
        click.option(
            "--prefix", type=DIRECTORY, default=Path("/usr/local"), show_default=True, help="/usr for packages."
        ),
    ):
        command = option(command)
    return command


def _run(app: App, given: dict[str, Any], *, remove: bool) -> None:
    from jindiskd import system_files as files

    places = files.Places(
        prefix=given["prefix"],
        libexec=given["libexec"] or Path(sys.argv[0]).resolve().parent,
        root=given["root"],
        units=given["units"],
    )
    work: Iterator[tuple[Path, bool]]
    work = files.remove(places, dry_run=given["dry_run"]) if remove else files.install(places, dry_run=given["dry_run"])
    done = list(work)
    verb = "removed" if remove else "installed"
    document: dict[str, Any] = {"files": [{"path": str(path), "changed": changed} for path, changed in done]}
    changed = any(change for _, change in done)
    if not remove:
        document["next_steps"] = list(files.NEXT_STEPS)

    def text() -> str:
        lines = [f"{verb if change else 'unchanged'} {path}" for path, change in done]
        if not remove and changed and given["root"] == Path("/"):
            lines += ["", "Now, as root:", *(f"  {step}" for step in files.NEXT_STEPS)]
        return "\n".join(lines)

    app.show(document, text)
    if not changed:
        raise click.exceptions.Exit(EXIT_UNCHANGED)


@system_files.command(name="install")
@_places
@common
@pass_app
def install(app: App, /, **given: Any) -> None:
    """Put the files in place. Exit status 4 if they all are already."""
    _run(app, given, remove=False)


@system_files.command(name="remove")
@_places
@common
@pass_app
def remove(app: App, /, **given: Any) -> None:
    """Take the files away again. Keys, images and settings stay."""
    _run(app, given, remove=True)
