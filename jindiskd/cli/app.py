"""What all commands share: the options common to them, how they run, and how their errors end.

Results go to standard output, all else to standard error. Exit statuses are those of `jindiskd.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import click

from jindiskd.cli.output import clean_lines
from jindiskd.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_AUTHORIZED,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    JindiskError,
)

P = ParamSpec("P")
R = TypeVar("R")


class NotConfirmed(JindiskError, code="NotConfirmed", exit_code=EXIT_USAGE):
    """Something that cannot be undone was asked for, and nobody confirmed it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} cannot be undone: confirm it with --yes")


class App:
    """The options that every command has."""

    def __init__(self) -> None:
        self.json = False
        self.log_json = False
        self.legend = True
        self.host = ""
        """The machine whose service is asked, as ssh takes it; empty for this one."""

    @property
    def progress_bar(self) -> bool:
        """Whether somebody looks at standard error on a terminal."""
        return sys.stderr.isatty() and not self.log_json and os.environ.get("TERM") != "dumb"

    def show(self, document: dict[str, Any], text: Callable[[], str]) -> None:
        """Print a result: as one JSON object with --json, otherwise as text."""
        click.echo(json.dumps(document, indent=2, ensure_ascii=False) if self.json else text())

    def event(self, kind: str, identity: str, **fields: Any) -> None:
        """Print one JSON line to standard error, if that was asked for."""
        if self.log_json:
            click.echo(json.dumps({"type": kind, "id": identity, **fields}, ensure_ascii=False), err=True)

    def say(self, sentence: str) -> None:
        """Tell people something on standard error."""
        if self.log_json:
            self.event("message", "message", text=sentence)
        else:
            click.echo(sentence, err=True)

    def confirm(self, question: str, what: str, *, yes: bool) -> None:
        """Ask before something that cannot be undone; without a terminal `--yes` is needed.

        Raises:
            NotConfirmed: the answer was no, or nobody could be asked.
        """
        if yes:
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()) or not click.confirm(question, err=True):
            raise NotConfirmed(what)


pass_app = click.make_pass_decorator(App, ensure=True)


def _set(attribute: str, value: bool) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(context: click.Context, _parameter: click.Parameter, given: bool) -> None:  # noqa: FBT001, RUF100
        if given:
            setattr(context.ensure_object(App), attribute, value)

    return callback


def common(command: Callable[P, R]) -> Callable[P, R]:
    """Add the options that every command and group has."""
    for flags, attribute, value, text in (
        ("--no-legend", "legend", False, "Leave out the head of tables."),
        ("--log-json", "log_json", True, "Report on standard error as JSON lines."),
        ("--json", "json", True, "Print the result as one JSON object."),
    ):
        command = click.option(flags, is_flag=True, expose_value=False, callback=_set(attribute, value), help=text)(
            command
        )
    return command


def run(main: Coroutine[Any, Any, R]) -> R:
    """Run the asynchronous part of a command."""
    return asyncio.run(main)


def exit_status(app: App, body: Callable[[], object], program: str = "jindiskctl") -> int:
    """Run a command line of `program`; return its exit status, having told what went wrong."""
    status, code, text = 0, "", ""
    try:
        outcome = body()
        # What click hands back for a command that ended with a status of its own.
        status = outcome if isinstance(outcome, int) else 0
    except JindiskError as exc:
        status, code, text = exc.exit_code, exc.code, str(exc)
    except click.ClickException as exc:
        status, code = exc.exit_code, "Usage"
        text = exc.format_message()
        if not app.log_json:
            exc.show()
            text = ""
    except (click.Abort, KeyboardInterrupt, asyncio.CancelledError):
        status, code, text = EXIT_INTERRUPTED, "Interrupted", "interrupted"
    except BrokenPipeError:
        # Whoever read our output has enough of it; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_FAILED
    except PermissionError as exc:
        status, code, text = EXIT_NOT_AUTHORIZED, "PermissionDenied", f"{exc.filename or 'it'}: {exc.strerror}"
    except ConnectionError as exc:
        status, code, text = EXIT_UNAVAILABLE, "ServiceUnavailable", f"the service is not available: {exc}"
    except OSError as exc:
        status, code, text = EXIT_FAILED, "OSError", f"{exc.filename or 'it'}: {exc.strerror or exc}"
    if app.log_json:
        app.event("error" if status else "message", code or "done", text=text, finished=True, exit_status=status)
    elif text:
        with contextlib.suppress(BrokenPipeError):
            click.echo(f"{program}: {clean_lines(text)}", err=True)
    return status


Waiter = Callable[[], Awaitable[None]]
