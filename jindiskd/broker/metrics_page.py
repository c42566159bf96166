"""What Prometheus and load balancers are told, without TLS: counters, and whether requests could be served now."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from jindiskd.broker.http import Handler
from jindiskd.broker.metrics import CONTENT_TYPE, Metrics
from jindiskd.broker.peer import LOCAL_LIMITS, Peer
from jindiskd.errors import JindiskError

log = structlog.get_logger(__name__)


class MetricsPage:
    """`/metrics` for Prometheus and `/healthz` for a load balancer; nothing else, and nothing secret."""

    def __init__(self, metrics: Metrics, healthy: Callable[[], Awaitable[bool]]) -> None:
        """`healthy` says whether requests could be served now."""
        self.limits, self.metrics = LOCAL_LIMITS, Metrics()
        self._shown, self._healthy = metrics, healthy

    def handler(self, peer: Peer) -> Handler:
        """The same for all."""

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            if request.method == "GET" and request.path == "/metrics":
                try:
                    text = await asyncio.to_thread(self._shown.render)
                except JindiskError as exc:
                    log.warning("metrics cannot be told", problem=str(exc), who=peer.description)
                    return web.Response(status=503, text="the database does not answer\n")
                return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})
            if request.method == "GET" and request.path == "/healthz":
                good = await self._healthy()
                return web.Response(status=200 if good else 503, text="ok\n" if good else "the database is away\n")
            return web.Response(status=404, text="there are /metrics and /healthz\n")

        return handle
