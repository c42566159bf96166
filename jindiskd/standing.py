"""What the service says of itself: where its keys are, and what an administrator should know."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from jindiskd.attest.collateral import CollateralCache, Entry, warnings_of
from jindiskd.bus.objects import microseconds
from jindiskd.config import Config, Deployment
from jindiskd.keys.kek import KekPlace
from jindiskd.side import kek_place


def status(config: Config) -> dict[str, object]:
    """What Manager.Status tells. Blocks on files."""
    relayed = config.broker.deployment is Deployment.RELAY
    kek = kek_place(config)
    entries = [] if relayed else CollateralCache(config.collateral_dir).entries()
    expiries = [entry.expires for entry in entries if entry.expires is not None]
    return {
        "key-encryption": "owner" if relayed else kek.found,
        "collateral": len(entries),
        "collateral-expires": microseconds(min(expiries)) if expiries else 0,
        "warnings": list(warnings(config, kek, collateral=entries)),
    }


def warnings(config: Config, kek: KekPlace, *, collateral: Sequence[Entry]) -> Iterator[str]:
    """What an administrator should know, a sentence each."""
    relayed = config.broker.deployment is Deployment.RELAY
    if relayed:
        yield "the key of an image that is built here is in this host's memory meanwhile: build where you trust"
    else:
        yield "the key broker runs in this service: whoever rules this host can read the keys of its images"
    if not relayed and (warning := kek.warning()):
        yield warning
    if config.broker.allow_simulated:
        yield "reports of simulated firmware are accepted (broker.allow_simulated): they prove nothing"
    if not relayed:
        yield from (f"collateral: {line}" for line in warnings_of(collateral, datetime.now(UTC)))
    if os.geteuid() == 0:
        yield "the service runs as root: nothing it does needs that; use its unit"
