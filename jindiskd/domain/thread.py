"""One thread for calls that may block for ever: the event loop never waits for it, nor does the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class CallThread:
    """Runs calls one after another.

    Not an executor: those are waited for when the interpreter ends, and a libvirtd that hangs must not keep a service
    from ending.
    """

    def __init__(self, name: str) -> None:
        """The thread begins with the first call."""
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Call `function` after all that was given earlier; the future belongs to the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, problem: BaseException | None) -> None:
            if future.cancelled():
                return
            if problem is not None:
                future.set_exception(problem)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # the function's own, when there is no problem

        def call() -> None:
            result: T | None = None
            problem: BaseException | None = None
            try:
                result = function()
            except BaseException as exc:  # noqa: BLE001 - raised where the future is awaited
                problem = exc
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(settle, result, problem)

        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put(call)
        return future

    def close(self) -> None:
        """End the thread after what it was given; does not wait."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
