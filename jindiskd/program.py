"""What the two services share as programs: signals, signs of life, memory that nobody reads, the command line's end."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
import structlog

from jindiskd.base.notify import notify, reloading, watchdog_interval_s
from jindiskd.errors import EXIT_FAILED, JindiskError
from jindiskd.guest import kernel

log = structlog.get_logger(__name__)


def credentials_directory() -> Path | None:
    """Where the service manager put the unit's credentials."""
    found = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(found) if found else None


def keep_memory_private() -> None:
    """Keys are in this memory: no core dumps, no debugger but root's. The watchdog's SIGABRT prints stacks alone."""
    faulthandler.enable()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


async def _signs_of_life(interval_s: float) -> None:
    """They come from the event loop, so they prove that it turns."""
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


def _check_again(check: Callable[[], object]) -> None:
    """On SIGHUP: say whether the configuration is right. What changed takes effect at the next start."""
    reloading()
    try:
        check()
        log.info("the configuration is right; changes take effect at the next start")
    except JindiskError as exc:
        log.error("the configuration is wrong; the service would not start with it", problem=str(exc))
    notify("READY=1")


@asynccontextmanager
async def signals(check: Callable[[], object]) -> AsyncIterator[asyncio.Event]:
    """Handle signals as services do: TERM and INT set the event, HUP calls `check`."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGHUP, _check_again, check)
    yield ended


async def until_first(*others: Coroutine[Any, Any, object], ended: asyncio.Event) -> int | None:
    """Say that the service is ready, and wait for its end: None where it was told to, else which of `others` ended."""
    loop = asyncio.get_running_loop()
    told = loop.create_task(ended.wait())
    ends = [loop.create_task(other) for other in others]
    interval_s = watchdog_interval_s()
    living = [loop.create_task(_signs_of_life(interval_s))] if interval_s is not None else []
    notify("READY=1", "STATUS=serving")
    try:
        await asyncio.wait({told, *ends}, return_when=asyncio.FIRST_COMPLETED)
        return None if told.done() else next(number for number, end in enumerate(ends) if end.done())
    finally:
        notify("STOPPING=1")
        tasks = [told, *ends, *living]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_program(name: str, command: click.Command, arguments: Sequence[str] | None) -> int:
    """Run a service's command line; returns its exit status, having told what went wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(command.main(words, prog_name=name, standalone_mode=False) or 0)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except JindiskError as exc:
        click.echo(f"{name}: {exc}", err=True)
        return exc.exit_code
    except OSError as exc:
        click.echo(f"{name}: {exc.filename or 'it'}: {exc.strerror or exc}", err=True)
        return EXIT_FAILED
