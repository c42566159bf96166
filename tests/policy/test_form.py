"""Policies as people write them: what is read is what was written, and every fault is named at once."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jindiskd.errors import InvalidArgument
from jindiskd.policy import form
from jindiskd.policy.rules import MinimumTcb, ReleaseRules, load

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/policy.md"


def value_for(entry: form.Entry) -> st.SearchStrategy:
    """Any value that a setting may have."""
    metadata = entry.field.metadata
    if entry.field.name == "minimum_tcb":
        component = st.integers(0, 255)
        old = st.builds(MinimumTcb, bootloader=component, tee=component, snp=component, microcode=component)
        new = st.builds(MinimumTcb, fmc=component, snp=component)
        return st.fixed_dictionaries({}, optional={"Milan": old, "Genoa": old, "Turin": new})
    if "range" in metadata:
        found: st.SearchStrategy = st.integers(*metadata["range"])
    elif metadata.get("kind") == "time":
        return st.sampled_from(["", "2030-01-01T00:00:00+00:00"]) if entry.name == "not_before" else st.just("")
    elif metadata.get("kind") == "version":
        return st.sampled_from(["", "1.55", "1.55.21"])
    elif metadata.get("length"):
        found = st.lists(st.binary(min_size=metadata["length"], max_size=metadata["length"]), max_size=3)
        found = found.filter(lambda items: len(items) >= metadata.get("least", 0)).map(tuple)
    elif isinstance(entry.default, tuple):
        words = st.sampled_from(metadata["choices"]) if "choices" in metadata else st.text(max_size=9)
        found = st.lists(words, min_size=metadata.get("least", 0), max_size=3).map(tuple)
    else:
        found = st.booleans()
    return st.none() | found if entry.optional else found


RULES = st.fixed_dictionaries({entry.field.name: value_for(entry) for entry in form.entries()}).map(
    lambda values: ReleaseRules(**values)
)


@given(rules=RULES)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(rules: ReleaseRules) -> None:
    """With explanations and without, and through the stored form: any rules come back as they were."""
    assert rules.problems() == []
    for explain in (True, False):
        text = form.write(rules, explain=explain)
        assert form.read(text) == rules, text
    assert load(rules.dump()) == rules


def test_the_defaults_are_shown_and_change_nothing() -> None:
    """Everything is there with its reason, all of it in comments."""
    text = form.write(ReleaseRules())
    for entry in form.entries():
        if entry.name != "minimum_tcb":
            assert re.search(rf"^# {entry.name}( = |: not set)", text, re.MULTILINE), entry
    assert all(line == "" or line[0] in "#[" for line in text.splitlines())
    assert form.write(ReleaseRules(), explain=False) == ""
    assert form.read("") == ReleaseRules()


BAD = """
typo = 1
[relese]
approval = true
[release]
aproval = true
approval = "yes"
releases_per_hour = 0
not_before = 2026-01-01T00:00:00
not_after = "soon"
[snp]
vmpl = 4
host_data = ["zz"]
chip_ids = ["00"]
generations = ["Milano"]
minimum_firmware = "new"
[snp.minimum_tcb.Mila]
snp = 1
[snp.minimum_tcb.Genoa]
fmc = 1
[tdx]
statuses = []
rtmr1 = "all"
"""
TOLD = (
    "p.toml: [typo] is no table of a policy",
    "p.toml: [relese] is no table of a policy: did you mean release?",
    "p.toml: [release] aproval is no setting of a policy: did you mean approval?",
    'p.toml: [release] approval = "yes" is not of type boolean',
    "p.toml: [release] releases_per_hour = 0 cannot be: it is 1 to 1000000",
    'p.toml: [release] not_before = "2026-01-01 00:00:00" is not a time with a zone',
    'p.toml: [release] not_after = "soon" is not a time with a zone',
    "p.toml: [snp] vmpl = 4 cannot be: it is 0 to 3",
    'p.toml: [snp] host_data = ["zz"] has something that is not hexadecimal',
    'p.toml: [snp] chip_ids = ["00"] cannot be: each value has 64 bytes',
    'p.toml: [snp] generations = ["Milano"] cannot be: Milano is none of Milan, Genoa, Turin',
    'p.toml: [snp] minimum_firmware = "new" cannot be: it is a version such as 1.55',
    "names the generation Mila: did you mean Milan?",
    "p.toml: [tdx] statuses = [] cannot be: give at least one value",
    'p.toml: [tdx] rtmr1 = "all" is not a list of texts',
)


def test_all_faults_at_once() -> None:
    """File, table, setting, value, what is allowed, and the nearest name."""
    with pytest.raises(form.BadPolicy) as found:
        form.read(BAD, "p.toml")
    for line in TOLD:
        assert any(line in fault for fault in found.value.faults), (line, found.value.faults)
    assert len(found.value.faults) == len(TOLD)
    with pytest.raises(form.BadPolicy, match="Genoa has no component fmc"):
        form.read("[snp.minimum_tcb.Genoa]\nfmc = 1\n")


@pytest.mark.parametrize(
    "text", [b"\xff", b"[", b"a" * (70 << 10), b"[[[[" * 9000, b"x = " + b"[" * 5000, b"[snp]\n" * 2]
)
def test_what_is_not_toml(text: bytes) -> None:
    """One fault, and no other exception."""
    with pytest.raises(form.BadPolicy):
        form.read(text)


def test_times_that_contradict() -> None:
    """A window that never opens is a fault, not a policy that refuses all."""
    text = "[release]\nnot_before = 2030-01-02T00:00:00Z\nnot_after = 2030-01-01T00:00:00Z\n"
    with pytest.raises(form.BadPolicy, match="lies after not_before"):
        form.read(text)


def test_stored_rules_are_held_to_the_same() -> None:
    """The stored form goes through the same checks."""
    for bad in ({"vmpl": 7}, {"host_data": ()}, {"tdx_statuses": ("Revoked",)}, {"not_after": "x"}):
        with pytest.raises(InvalidArgument):
            ReleaseRules(**bad).check()


def test_the_document_has_every_setting() -> None:
    """With its help and its reason, as generated: `python -m jindiskd.policy.document` writes it."""
    text = " ".join(DOCUMENT.read_text().split())
    for entry in form.entries():
        for told in (f"`{entry.name}`", entry.field.metadata["help"], entry.field.metadata["why"]):
            assert told in text, (entry.name, told)


def test_every_setting_says_why() -> None:
    """No field without table, help and reason."""
    for item in dataclasses.fields(ReleaseRules):
        assert {"section", "help", "why"} <= item.metadata.keys(), item.name


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 50_000])
def test_what_the_parser_was_not_made_for_is_a_fault_of_the_policy(value: str) -> None:
    """Not one of the program: numbers and nesting without end."""
    with pytest.raises(form.BadPolicy, match="not TOML"):
        form.read(f"[release]\nreleases_in_all = {value}\n")


def test_a_key_without_end_is_refused_before_it_is_parsed() -> None:
    """Whoever may try a policy must not keep the service busy."""
    with pytest.raises(form.BadPolicy, match="more than 200 dots"):
        form.read("a." * 30_000 + "a = 1\n")
