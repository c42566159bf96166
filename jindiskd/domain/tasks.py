"""Work on domains that goes on beside the calls: owned, and ended with the service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ParamSpec

import structlog

from jindiskd.errors import JindiskError

log = structlog.get_logger(__name__)
P = ParamSpec("P")


class Tasks:
    """The tasks of one service; a fault in following one domain does not stop the others."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, function: Callable[P, Awaitable[None]], *args: P.args, **more: P.kwargs) -> None:
        """Run it in the event loop; what it raises is logged."""

        async def guarded() -> None:
            try:
                await function(*args, **more)
            except asyncio.CancelledError:
                raise
            except JindiskError as exc:
                log.warning("a domain could not be followed", problem=str(exc))
            except Exception:  # a fault in following one domain must not stop the others
                log.exception("fault while following a domain")

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancel all, and wait for their ends."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
