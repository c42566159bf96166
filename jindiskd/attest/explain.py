"""Why does a guest measure otherwise than its image says? Tries what could differ, and says what explains it.

A launch digest is a hash: it says *that* something differs, never what. So the digest is computed again with each thing
that is commonly wrong, one change first, then two, until one gives the reported digest. Each digest costs some tenths
of a millisecond once a firmware's own hash is known; the number tried is bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jindiskd.attest.firmware import inspect_firmware
from jindiskd.attest.measure import (
    GUEST_FEATURES_DEBUG_SWAP,
    GUEST_FEATURES_SNP,
    LaunchInputs,
    SnpMeasurer,
)
from jindiskd.errors import JindiskError

CPU_MODELS = ("EPYC-v4", "EPYC-Rome", "EPYC-Milan", "EPYC-Genoa", "EPYC-Turin")
FEATURES = (GUEST_FEATURES_SNP, GUEST_FEATURES_DEBUG_SWAP)
MAX_TRIES = 20000


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """What else might have been used, beside what is tried in any case."""

    firmware: Sequence[Path] = ()
    kernels: Sequence[Path] = ()
    initrds: Sequence[Path] = ()
    cmdlines: Sequence[str] = ()
    maximum_vcpus: int = 64
    cpu_models: Sequence[str] = field(default=CPU_MODELS)


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that would have to differ from the record."""

    what: str
    """`vcpus`, `cpu_model`, `guest_features`, `firmware`, `kernel`, `initrd`, `cmdline` or `kernel_hashes`."""
    text: str
    """For people: what was recorded, and what explains the digest."""
    value: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The result: no changes means that the record measures as reported; `found` False that nothing tried did."""

    found: bool
    changes: tuple[Change, ...]
    tried: int
    """How many digests were computed."""

    def __str__(self) -> str:
        if not self.found:
            return (
                f"nothing tried explains the digest ({self.tried} variants of one and two changes): a file itself "
                "differs, or the host added something of its own"
            )
        if not self.changes:
            return "the digest is the one that the record gives"
        return "the digest is explained by: " + "; and ".join(change.text for change in self.changes)


@dataclass(frozen=True, slots=True)
class _Launch:
    inputs: LaunchInputs
    kernel_hashes: bool


def explain_digest(
    reported: bytes, recorded: LaunchInputs, alternatives: Alternatives | None = None
) -> Explanation:
    """Find the smallest change to a recorded launch that gives the reported digest (SEV-SNP, 48 bytes).

    May take seconds: call it off the event loop, from any thread. Changes that cannot be measured, such as a firmware
    without a page for the hashes, are passed over.

    Raises:
        JindiskError: the recorded launch itself cannot be measured.
    """
    given = alternatives or Alternatives()
    digest = _Measurer()
    start = _Launch(recorded, kernel_hashes=True)
    if digest(start) == reported:
        return Explanation(found=True, changes=(), tried=digest.tried)
    groups = [list(group) for group in _candidates(recorded, given)]
    for change in itertools.chain.from_iterable(groups):
        if digest.same(_apply(start, change), reported):
            return Explanation(found=True, changes=(change,), tried=digest.tried)
    for first, second in itertools.combinations(groups, 2):
        for pair in itertools.product(first, second):
            if digest.tried >= MAX_TRIES:
                return Explanation(found=False, changes=(), tried=digest.tried)
            if digest.same(_apply(_apply(start, pair[0]), pair[1]), reported):
                return Explanation(found=True, changes=pair, tried=digest.tried)
    return Explanation(found=False, changes=(), tried=digest.tried)


class _Measurer:
    """Computes digests, and counts them."""

    def __init__(self) -> None:
        self._measurer = SnpMeasurer()
        self.tried = 0

    def __call__(self, launch: _Launch) -> bytes:
        self.tried += 1
        return self._measurer.digest(launch.inputs, kernel_hashes=launch.kernel_hashes)

    def same(self, launch: _Launch, reported: bytes) -> bool:
        try:
            return self(launch) == reported
        except JindiskError:
            return False


def _apply(launch: _Launch, change: Change) -> _Launch:
    if change.what == "kernel_hashes":
        return _Launch(launch.inputs, kernel_hashes=False)
    values: dict[str, Any] = {change.what: change.value}
    return _Launch(replace(launch.inputs, **values), launch.kernel_hashes)


def _candidates(recorded: LaunchInputs, given: Alternatives) -> Iterator[Iterator[Change]]:
    """Groups of alternative values; two changes come from two different groups."""

    def others(what: str, values: Iterable[object], say: Callable[[object], str]) -> Iterator[Change]:
        seen = {getattr(recorded, what)}
        for value in values:
            if value not in seen:
                seen.add(value)
                yield Change(what, f"{say(value)} instead of {say(getattr(recorded, what))}", value)

    yield iter([Change("kernel_hashes", "the host launched it without kernel hashes (kernelHashes='no')", None)])
    yield others("vcpus", range(1, given.maximum_vcpus + 1), lambda count: f"{count} virtual processors")
    yield others("cpu_model", given.cpu_models, lambda model: f"processor model {model}")
    yield others("guest_features", FEATURES, lambda bits: f"guest features 0x{bits:x}")
    yield others("firmware", given.firmware, lambda path: f"firmware {_firmware_name(path)}")
    lines = [*given.cmdlines, *_cmdline_variants(recorded.cmdline)]
    yield others("cmdline", lines, lambda line: f"command line {line!r}")
    yield others("kernel", given.kernels, lambda path: f"kernel {path}")
    yield others("initrd", given.initrds, lambda path: f"initrd {path}")


def _firmware_name(path: object) -> str:
    assert isinstance(path, Path)
    try:
        name = inspect_firmware(path).name
    except JindiskError:
        name = None
    return f"{path} ({name})" if name else str(path)


def _cmdline_variants(cmdline: str) -> Iterator[str]:
    """What tools do to a command line on its way: trailing newline or space, quotes, QEMU's own initrd argument."""
    stripped = cmdline.strip()
    yield from (stripped, f"{stripped}\n", f"{stripped} ", f" {stripped}", f'"{stripped}"', "")
    yield from (f"{stripped} initrd=initrd", f"initrd=initrd {stripped}")
