"""How far long work is: a bar on a terminal, JSON lines for programs, now and then a line for a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from jindiskd.cli.app import App
from jindiskd.cli.output import size

EVERY_S = 0.2
LINE_EVERY_S = 10.0
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@contextlib.contextmanager
def progress(app: App, stage: str) -> Iterator[Progress]:
    """Show work called `stage`. No thread is used: the work may fork."""
    if app.progress_bar:
        with _bar(stage) as update:
            yield _seldom(update, EVERY_S)
    elif app.log_json:

        def event(done: int, total: int) -> None:
            app.event("progress", stage, stage=stage, bytes=done, total=total, fraction=done / total if total else 1.0)

        yield _seldom(event, EVERY_S)
    else:
        yield _seldom(
            lambda done, total: app.say(f"{stage}: {size(done)} of {size(total)}"), LINE_EVERY_S, first=LINE_EVERY_S
        )


def _seldom(show: Progress, every_s: float, *, first: float = 0.0) -> Progress:
    """Show at most so often, and the end if anything was shown."""
    due, shown = time.monotonic() + first, False

    def told(done: int, total: int) -> None:
        nonlocal due, shown
        now = time.monotonic()
        if now >= due or (shown and done >= total):
            due, shown = now + every_s, done < total
            show(done, total)

    return told


@contextlib.contextmanager
def _bar(stage: str) -> Iterator[Progress]:
    from rich.console import Console  # loading it takes longer than most commands
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(stage, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        yield update
