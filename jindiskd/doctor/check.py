"""One thing looked at: what was found, and the remedy."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from jindiskd.base.platform import Tee


class Verdict(enum.StrEnum):
    """How it is."""

    OK = "ok"
    NOTE = "note"
    """Not needed for what was asked about, or a matter of choice."""
    PROBLEM = "problem"
    UNKNOWN = "unknown"
    """It could not be looked at; that is not the same as being right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing."""

    id: str
    """Dotted and stable, for example `host.vsock.vhost`."""
    verdict: Verdict
    found: str
    """A sentence without a full stop."""
    remedy: str = ""
    """What to do; empty where nothing is."""
    tees: frozenset[Tee] = frozenset()
    """Kinds of platform that need it; empty where all do."""


def ok(name: str, found: str, tees: Iterable[Tee] = ()) -> Check:
    """It is right."""
    return Check(id=name, verdict=Verdict.OK, found=found, tees=frozenset(tees))


def problem(name: str, found: str, remedy: str, tees: Iterable[Tee] = ()) -> Check:
    """It is wrong."""
    return Check(id=name, verdict=Verdict.PROBLEM, found=found, remedy=remedy, tees=frozenset(tees))


def note(name: str, found: str, remedy: str = "", tees: Iterable[Tee] = ()) -> Check:
    """Good to know."""
    return Check(id=name, verdict=Verdict.NOTE, found=found, remedy=remedy, tees=frozenset(tees))


def unknown(name: str, found: str, remedy: str = "", tees: Iterable[Tee] = ()) -> Check:
    """It could not be looked at."""
    return Check(id=name, verdict=Verdict.UNKNOWN, found=found, remedy=remedy, tees=frozenset(tees))
