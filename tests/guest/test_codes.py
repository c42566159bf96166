"""The table of codes."""

import re

from jindiskd.guest.codes import SENTENCES, Code, GuestFailure


def test_each_code_has_a_sentence() -> None:
    """No code without words, none shared, all of the form that fits a progress line."""
    assert set(SENTENCES) == set(Code)
    assert len(set(SENTENCES.values())) == len(Code)
    for code in Code:
        assert re.fullmatch(r"E\d\d", code.value)
        assert len(code.sentence) > 30
        assert not code.sentence.endswith(".")


def test_a_failure_shows_its_code_alone() -> None:
    """Whatever led to it, the exception's text is the code."""
    assert str(GuestFailure(Code.KEY)) == "E42"


def test_codes_do_not_change() -> None:
    """Codes are seen by people and tools; a number never gets another meaning."""
    assert {code.name: code.value for code in Code} == {
        "TIMEOUT": "E01", "MOUNTS": "E10", "CONFIG": "E11", "MODULES": "E12", "REPORT": "E20",
        "SECRET": "E21",
        "BROKER_UNREACHABLE": "E30", "BROKER_NOT_TRUSTED": "E31", "EVIDENCE_REFUSED": "E32", "POLICY_DENIED": "E33",
        "BROKER_MISBEHAVED": "E34", "BROKER_TROUBLE": "E35", "DEVICE_MISSING": "E40", "HEADER": "E41", "KEY": "E42",
        "ACTIVATION": "E43", "ROOT_MOUNT": "E44", "INIT_MISSING": "E45", "SWITCH_ROOT": "E46", "INITRAMFS": "E47",
        "ROOT_DOUBLE": "E48", "VOLUME": "E50",
        "STALE": "E51", "STORAGE": "E52", "FENCED": "E53", "TARGET": "E54",
        "DATA_MISSING": "E60", "DATA_DOUBLE": "E61", "DATA_VOLUME": "E62", "DATA_MOUNT": "E63", "INTERNAL": "E99",
    }  # fmt: skip
