"""Every reason for a refusal has something that can be done about it."""

import re
from pathlib import Path

import pytest

from jindiskd.policy.advice import ADVICE, remedy

PACKAGE = Path(__file__).resolve().parents[2] / "jindiskd"
NAMES = re.compile(r'"((?:snp|tdx|sev|key|platform|peer|limit|policy|evidence|init_data)\.[a-z0-9_.]+)"')
MADE = {
    "snp": ["platform.smt", "certificate.dates", "chain.dates"],
    "tdx": ["platform.smt", "mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id", "mr_owner", "mr_owner_config"],
    "sev": ["policy.debug", "policy.sharing", "policy.es", "policy.send", "chain.cek", "chain.pdh"],
}


def every_finding() -> set[str]:
    found = {f"{kind}.{name}" for kind, names in MADE.items() for name in names}
    for package in ("attest", "policy", "broker", "keys"):
        for path in (PACKAGE / package).glob("*.py"):
            if path.name != "advice.py":
                found |= set(NAMES.findall(path.read_text()))
    return found - {"snp.minimum_tcb"}


@pytest.mark.parametrize("name", sorted(every_finding()))
def test_each_finding_has_a_remedy(name: str) -> None:
    """One sentence, in the imperative or saying what it means."""
    assert remedy(name).endswith((".", "?"))


def test_unknown_findings_have_none() -> None:
    """Nothing is made up; a beginning that is known serves for what is below it."""
    assert remedy("other.thing") == ""
    assert remedy("snp.chain.new") == ADVICE["snp.chain"]
    assert remedy("") == ""
