"""Logging: structured lines to the journal when the service manager reads them, plain text otherwise.

Never `dict_tracebacks` or rich tracebacks: they print local variables, and a key may be among them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog

PRIORITY = {"critical": 2, "error": 3, "exception": 3, "warning": 4, "info": 6, "debug": 7}


def _one_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Whatever stands in a value, a line stays a line: texts of errors quote what others chose, paths for example."""
    for name, value in event.items():
        if isinstance(value, str) and name != "exception" and not value.isprintable():
            event[name] = "".join(one if one.isprintable() else repr(one)[1:-1] for one in value)
    return event


def _to_journal(_logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    """A line with the priority prefix that systemd-journald reads (sd-daemon(3)), then one for each of a traceback."""
    trace = str(event.pop("exception", "")).splitlines()
    line = str(structlog.processors.KeyValueRenderer(key_order=["event"], sort_keys=True)(None, method, event))
    return "\n".join(f"<{PRIORITY.get(method, 6)}>{part}" for part in (line, *(f"traceback: {one}" for one in trace)))


class _StandardError:
    """Whatever standard error is when a line is written: a program may have put another in its place since."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def setup(level: str = "info") -> None:
    """Configure structlog for this process; call once, first thing in a program."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        _one_line,
    ]
    if os.environ.get("JOURNAL_STREAM"):
        tail: list[Any] = [_to_journal]
    else:
        tail = [
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ]
    structlog.configure(
        processors=shared + tail,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _StandardError())),
        cache_logger_on_first_use=True,
    )
