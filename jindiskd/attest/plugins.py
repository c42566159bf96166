"""Verifiers of other packages: entry points of the group `jindiskd.verifiers`, named in `[broker] verifiers`.

An entry point is a function that takes the `Collector` (cache and vendors) and returns a `Verifier`. What a verifier
accepts is believed like what ours accept: it is part of what the owner trusts. Verifiers are asked in order, ours
first, and one acceptance is enough: a plug-in adds what can be accepted, and takes nothing away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from jindiskd.attest.collecting import Collector
from jindiskd.attest.verifier import Verifier
from jindiskd.base.platform import Tee
from jindiskd.base.plugins import VERIFIERS, PluginUnusable, load


def plugged_in(names: Sequence[str], collector: Collector) -> list[Verifier]:
    """The verifiers with these names, in this order.

    Raises:
        PluginUnusable: one is not installed, cannot be loaded, or makes something else than a verifier.
    """
    found = []
    for name in names:
        make = load(VERIFIERS, name)
        if not callable(make):
            raise PluginUnusable(VERIFIERS, name, "is not a function")
        try:
            verifier = make(collector)
        except Exception as exc:
            raise PluginUnusable(VERIFIERS, name, f"fails: {type(exc).__name__}: {exc}") from exc
        if not isinstance(getattr(verifier, "tee", None), Tee) or not callable(getattr(verifier, "judge", None)):
            raise PluginUnusable(VERIFIERS, name, "makes something that is no verifier (it has no tee, or no judge)")
        found.append(cast("Verifier", verifier))
    return found
