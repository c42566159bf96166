"""What people read: sizes, tables, and nothing that could steer their terminal."""

import pytest

from jindiskd.cli.app import App, exit_status
from jindiskd.cli.console import Printable
from jindiskd.cli.output import clean, fields, moment, parse_size, platform, size, table
from jindiskd.errors import EXIT_FAILED, JindiskError


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 << 30, "10 GiB"), (1 << 62, "4 EiB")],
)
def test_sizes_are_binary(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000", 1000),
        ("20G", 20 << 30),
        ("512M", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("4k", 4096),
        ("2 TiB", 2 << 40),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "1.0001K", "ten", "nan", "inf", "9" * 30, "1e3x"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises((ValueError, OverflowError)):
        parse_size(text)


def test_tables_line_up_by_display_width():
    """Wide characters count for two cells, and empty cells show."""
    text = table(("NAME", "N"), [("日本", "1"), ("a", ""), ("b\x1b[2J", "300")], legend=True, right=(1,))
    assert text == "NAME     N\n日本     1\na        -\nb\ufffd[2J  300"
    assert table(("NAME",), [("x",)], legend=False) == "x"
    assert fields({"a": "1", "long": ""}) == "   a: 1\nlong: -"


def test_text_of_others_cannot_steer_a_terminal():
    """Escape sequences, carriage returns and the like are shown as replacement characters."""
    assert clean("a\x1b]0;x\x07b\u202ec\n") == "a\ufffd]0;x\ufffdb\ufffdc\ufffd"
    shown = Printable().clean(b"boot\r\n\x1b[31mred\x1b[0m\ttab\xff", final=True)
    assert shown == "boot\n\ufffd[31mred\ufffd[0m\ttab\ufffd"


def test_simulated_is_said_even_where_the_name_does_not():
    """No listing may hide it."""
    assert platform({"Platform": "simulated-snp", "Simulated": True}) == "simulated-snp"
    assert platform({"Platform": "snp", "Simulated": True}) == "snp (simulated)"
    assert platform({"Platform": "snp", "Simulated": False}) == "snp"


def test_no_moment_is_a_dash():
    assert moment(0) == "-"


def test_an_error_of_another_machine_s_service_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """What ends a command may hold names and words of guests, brokers and other hosts; its lines stay lines."""

    def refused() -> None:
        raise JindiskError("policy:\n  \x1b]0;owned\x07 no\x9b2J such key")

    assert exit_status(App(), refused) == EXIT_FAILED
    told = capsys.readouterr().err
    assert told == "jindiskctl: policy:\n  \ufffd]0;owned\ufffd no\ufffd2J such key\n"
