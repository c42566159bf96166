"""How fast a stage of a job is, and when it ends if it goes on like that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S, STEP_S = 10.0, 0.5
"""Over which time the speed is taken, and how far apart what is kept for that lies."""
LEAST_S = 1.0
"""Of which less says nothing about when a stage ends."""
LONGEST_S = 30 * 86_400.0
"""An end further away is no expectation."""


@dataclass(frozen=True, slots=True)
class Point:
    """How far it was, once."""

    at: float
    done_bytes: int
    fraction: float | None


class Pace:
    """The reports of one stage, as far as the window reaches. `monotonic` gives seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._points: deque[Point] = deque()
        self._latest = Point(monotonic(), 0, None)

    def begin(self) -> None:
        """A stage begins."""
        self._points.clear()
        self._latest = Point(self._monotonic(), 0, None)
        self._points.append(self._latest)

    def report(self, done_bytes: int, fraction: float | None) -> None:
        """The stage is that far."""
        self._latest = Point(self._monotonic(), done_bytes, fraction)
        newest = self._points[-1]
        if self._latest.at - newest.at >= STEP_S or (newest.fraction is None and fraction is not None):
            self._points.append(self._latest)
        while len(self._points) > 1 and self._latest.at - self._points[1].at >= WINDOW_S:
            self._points.popleft()

    @property
    def rate(self) -> int:
        """Bytes a second."""
        if not self._points:
            return 0
        first = self._points[0]
        seconds = self._monotonic() - first.at
        return max(int((self._latest.done_bytes - first.done_bytes) / seconds), 0) if seconds > 0 else 0

    @property
    def left_s(self) -> float | None:
        """Seconds until the stage is done; None while that is not known."""
        now = self._latest
        first = next((point for point in self._points if point.fraction is not None), None)
        if first is None or first.fraction is None or now.fraction is None:
            return None
        passed, done = now.at - first.at, now.fraction - first.fraction
        if passed < LEAST_S or done <= 0:
            return None
        left = (1.0 - now.fraction) * passed / done
        return max(left - (self._monotonic() - now.at), 0.0) if left <= LONGEST_S else None
