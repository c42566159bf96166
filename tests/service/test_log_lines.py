"""Log lines: whatever a value holds, nobody but the program begins one."""

from collections.abc import Iterator

import pytest
import structlog

from jindiskd.base import log

FORGED = "event='released' peer='domain 1'"
TEXTS = ["its disk goes on in 'a\n" + FORGED, "a\\n" + FORGED, "a\r" + FORGED, "a\u2028" + FORGED, "a\x1b[2J" + FORGED]


@pytest.fixture(params=["journal", "terminal"])
def written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log lines are written for the journal, or for a terminal."""
    if request.param == "journal":
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    else:
        monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    before = structlog.get_config()
    log.setup()
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("text", TEXTS)
def test_a_value_makes_no_line_of_its_own(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """A path that somebody chose must not look like a release; nor may it move a terminal's cursor."""
    structlog.get_logger().info("domain", reason=text)
    (line,) = capsys.readouterr().err.splitlines()
    assert FORGED in line
    assert line.isprintable()


@pytest.mark.usefixtures("written")
def test_a_traceback_is_marked_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines are many; the text of the exception is somebody else's too."""
    try:
        raise ValueError(f"a\n{FORGED}")
    except ValueError:
        structlog.get_logger().exception("fault")
    lines = capsys.readouterr().err.splitlines()
    assert any("ValueError: a" in line for line in lines)
    if lines[0].startswith("<3>"):
        assert [line for line in lines if not line.startswith("<3>traceback: ")] == lines[:1]
