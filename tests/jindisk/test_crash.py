"""The machine stops at any point; what was acknowledged is there, and nothing that nobody wrote (section 22)."""

import random
from collections.abc import Callable

import pytest
from jd import Audit
from jd_crash import Run, crashes, verify

from jindiskd.jindisk.anchor import Reporting

Counted = Callable[[str, object], None]
CASES = [
    pytest.param(1, False, Reporting.INTERVAL, id="sparse"),
    pytest.param(2, True, Reporting.INTERVAL, id="full"),
    pytest.param(3, False, Reporting.COMMIT, id="commit"),
]


@pytest.mark.parametrize(("seed", "full", "reporting"), CASES)
def test_a_stop_loses_nothing_acknowledged(
    seed: int, full: bool, reporting: Reporting, audit: Audit, record_property: Counted
) -> None:
    """A share of the points of a run, with torn and reordered writes, and stops inside recovery."""
    recorded = Run(seed=seed, full=full, reporting=reporting, audit=audit).record(150 if full else 120)
    if full:
        assert recorded.cleaned, "there was room without cleaning: the run shows nothing"
    rng, count = random.Random(seed), 0
    for crash in crashes(recorded, rng, share=0.05 if full else 0.25, subsets=1, exhaustive=False):
        verify(recorded, crash, rng, inside=2 if count % 10 == 0 else 0, check=count % 20 == 0)
        count += 1
    record_property("images", count)
    record_property("sealings", audit.count)
    assert count > 15


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 13))
@pytest.mark.parametrize("reporting", [Reporting.INTERVAL, Reporting.COMMIT])
@pytest.mark.parametrize("full", [False, True])
def test_a_stop_at_every_point(
    seed: int, full: bool, reporting: Reporting, audit: Audit, record_property: Counted
) -> None:
    """Every point, several subsets of sectors for each, and every subset where there are few sectors."""
    recorded = Run(seed=seed, full=full, reporting=reporting, audit=audit).record(200)
    rng, count = random.Random(seed), 0
    share = 0.2 if full else 1.0
    for crash in crashes(recorded, rng, share=share, subsets=3, exhaustive=not full):
        verify(recorded, crash, rng, inside=2 if count % 10 == 0 else 0, check=count % 50 == 0)
        count += 1
    record_property("images", count)
    record_property("sealings", audit.count)
    assert count > (100 if full else 200)
