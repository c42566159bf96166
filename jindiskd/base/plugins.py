"""Plug-ins: objects of other packages, by entry point and by name. Nothing is loaded that was not named.

An installed package alone changes nothing: a plug-in counts where its name stands in the configuration.
"""

from __future__ import annotations

import importlib.metadata

from jindiskd.errors import EXIT_USAGE, JindiskError

VERIFIERS = "jindiskd.verifiers"
REPORT_SOURCES = "jindiskd.report_sources"


class PluginUnusable(JindiskError, code="PluginUnusable", exit_code=EXIT_USAGE):
    """A plug-in that the configuration names cannot be used."""

    def __init__(self, group: str, name: str, problem: str) -> None:
        """`group` of entry points, the plug-in's `name`, and the end of the sentence."""
        super().__init__(f"the plug-in {name!r} of {group} {problem}")


def find(group: str, name: str) -> importlib.metadata.EntryPoint:
    """The entry point with that name.

    Raises:
        PluginUnusable: none, or several packages have it.
    """
    found = importlib.metadata.entry_points(group=group, name=name)
    if len({point.value for point in found}) != 1:
        known = ", ".join(sorted({point.name for point in importlib.metadata.entry_points(group=group)})) or "none"
        problem = "is in several packages" if found else f"is not installed (installed: {known})"
        raise PluginUnusable(group, name, problem)
    return next(iter(found))


def load(group: str, name: str) -> object:
    """The object behind the entry point.

    Raises:
        PluginUnusable: it is not there, or cannot be imported.
    """
    try:
        return find(group, name).load()
    except PluginUnusable:
        raise
    except Exception as exc:
        raise PluginUnusable(group, name, f"cannot be loaded: {type(exc).__name__}: {exc}") from exc
