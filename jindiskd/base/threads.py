"""Blocking work of coroutines that must come to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def finished(function: Callable[[], T]) -> T:
    """Run in a thread to its end, even when cancelled meanwhile; the cancellation is delivered afterwards."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def decided(function: Callable[[], T]) -> T:
    """As `finished`, for what cannot be taken back once it is done: a cancellation that comes meanwhile is too late."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if task.exception() is not None:
            raise
        current = asyncio.current_task()
        assert current is not None
        current.uncancel()
        return task.result()
