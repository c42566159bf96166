"""Counters and times of a broker, as text in the Prometheus exposition format 0.0.4. Names and labels are ours alone:
nothing that a guest says becomes a label.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP = {
    "jindisk_broker_requests_total": "requests answered, by step and status",
    "jindisk_broker_requests_delayed_total": "answers that waited, since the peer asked faster than its rate",
    "jindisk_broker_attestations_total": "evidence judged, by outcome",
    "jindisk_broker_releases_total": "keys given out",
    "jindisk_broker_refusals_total": "findings against a guest, by id",
    "jindisk_broker_connections_refused_total": "connections closed at once, since a limit was reached",
    "jindisk_broker_connections": "connections open",
    "jindisk_broker_sessions": "attestation sessions living",
    "jindisk_broker_judge_seconds": "time to judge evidence",
    "jindisk_broker_release_seconds": "time to decide, write down and seal a release",
}


class Metrics:
    """What a broker counts. Safe to use from several threads."""

    def __init__(self) -> None:
        """Nothing was counted yet."""
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self._times: dict[str, tuple[list[int], float]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def count(self, name: str, by: int = 1, /, **labels: str) -> None:
        """Add to a counter (or, with a negative number, to a gauge that is counted)."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += by

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Have `read` called for a value when it is asked for."""
        self._gauges[name] = read

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - begun
            with self._lock:
                buckets, total = self._times.setdefault(name, ([0] * (len(BUCKETS_S) + 1), 0.0))
                buckets[bisect_left(BUCKETS_S, taken)] += 1
                self._times[name] = (buckets, total + taken)

    def value(self, name: str, **labels: str) -> int:
        """What a counter stands at."""
        with self._lock:
            return self._counts[name, tuple(sorted(labels.items()))]

    def render(self) -> str:
        """All of it; calls the gauges, which may block."""
        gauges = {name: read() for name, read in self._gauges.items()}
        with self._lock:
            counts, times = sorted(self._counts.items()), {n: (list(b), t) for n, (b, t) in self._times.items()}
        lines: list[str] = []
        for name, text in HELP.items():
            rows = [(labels, value) for (found, labels), value in counts if found == name]
            kind = "counter" if name.endswith("_total") else "histogram" if name.endswith("_seconds") else "gauge"
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(labels)} {value}" for labels, value in rows]
            if name in gauges:
                lines.append(f"{name} {gauges[name]:g}")
            if name in times:
                lines += _histogram(name, *times[name])
        return "\n".join(lines) + "\n"


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""


def _histogram(name: str, buckets: list[int], total: float) -> Iterator[str]:
    running = 0
    for bound, found in zip((*map(str, BUCKETS_S), "+Inf"), buckets, strict=True):
        running += found
        yield f'{name}_bucket{{le="{bound}"}} {running}'
    yield f"{name}_sum {total:.6f}"
    yield f"{name}_count {running}"
