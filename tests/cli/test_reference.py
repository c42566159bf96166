"""The reference documents are those of this version."""

from pathlib import Path

import pytest

from jindiskd.cli.reference import DOCUMENTS
from jindiskd.errors import JindiskError

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_committed_document_is_current(name: str) -> None:
    """If not, `python -m jindiskd.cli.reference docs` writes it anew."""
    assert DOCUMENTS[name]() == (DOCS / name).read_text()


def test_every_error_says_what_it_is() -> None:
    """Each condition has a sentence and a status that the table of statuses knows."""
    text = DOCUMENTS["errors.md"]()
    for code, kind in JindiskError.by_code.items():
        if not kind.__module__.startswith("jindiskd."):
            continue
        assert kind.__doc__, code
        assert f"| {code} | {kind.exit_code} | " in text
        assert f"\n| {kind.exit_code} | " in text.partition("## Exit statuses")[2]
