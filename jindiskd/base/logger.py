"""Loggers for modules that programs of a moment import, too."""

from __future__ import annotations

from typing import Any


class Logger:
    """A structlog logger that is made when the first word is said: loading the library takes as long as a command."""

    def __init__(self, name: str) -> None:
        """`name` is the module's."""
        self._name = name

    def __getattr__(self, method: str) -> Any:
        import structlog

        return getattr(structlog.get_logger(self._name), method)
