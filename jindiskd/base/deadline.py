"""Time limits whose end is an error that names what was waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from jindiskd.errors import TimedOut


@contextlib.asynccontextmanager
async def within(seconds: float, what: str, remedy: str) -> AsyncIterator[None]:
    """Cancel what stands inside after `seconds`.

    Args:
        seconds: the limit.
        what: the thing that did not happen then, such as "the end of the build of image 'web'".
        remedy: what makes it happen, or gives it more time.

    Raises:
        TimedOut: the limit passed. A `TimeoutError` that the inside raises by itself is passed on as it is.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as exc:
        if not limit.expired():
            raise
        raise TimedOut(what, seconds, remedy) from exc
