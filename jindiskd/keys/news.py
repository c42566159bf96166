"""What other brokers write to a PostgreSQL database that several share: heard within seconds.

Each write notifies the channel in its own transaction, so that nobody hears of what is not durable; who wants to know
has one connection that listens. A notification says no more than that something was written.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
import structlog

log = structlog.get_logger(__name__)
CHANNEL = "jindiskd"
LOOK_S = 5.0
"""Between two questions to a server that says nothing: it may be gone, or a notification have come with an answer."""
RETRY_S = 5.0


class News:
    """Listens in a thread of its own until it is closed.

    Args:
        engine: the database's.
        own: what this process's notifications say; they are passed over.
        changed: called in that thread after what others wrote, and when a connection is there: something may have been
            written before. It must not block or raise.
    """

    def __init__(self, engine: sa.Engine, own: str, changed: Callable[[], None]) -> None:
        self._engine, self._own, self._changed = engine, own, changed
        self._reading, self._writing = os.pipe()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="database-news", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no longer. Repeating it is no error."""
        if not self._closed.is_set():
            self._closed.set()
            os.close(self._writing)
            self._thread.join()
            os.close(self._reading)

    def _run(self) -> None:
        missed = False
        while not self._closed.is_set():
            try:
                self._listen()
            except Exception as exc:  # noqa: BLE001 (the driver's errors come through in places: all are tried again)
                if not missed:
                    log.warning("what other brokers write is not heard", problem=str(getattr(exc, "orig", exc)))
                missed = True
                self._closed.wait(RETRY_S)
            else:
                missed = False

    def _listen(self) -> None:
        """Until it is closed, or the connection fails."""
        heard = False

        def notified(notice: Any) -> None:
            nonlocal heard
            heard = heard or notice.payload != self._own

        with contextlib.closing(self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")) as connection:
            driver: Any = connection.connection.driver_connection
            connection.detach()  # it belongs to no pool any more: nobody else is to get a connection that listens
            driver.add_notify_handler(notified)
            connection.exec_driver_sql(f"LISTEN {CHANNEL}")
            self._changed()
            while True:
                ready, _, _ = select.select([driver.fileno(), self._reading], [], [], LOOK_S)
                if self._reading in ready:
                    return
                connection.exec_driver_sql("SELECT 1")  # the driver hands over notifications with an answer
                if heard:
                    heard = False
                    self._changed()
