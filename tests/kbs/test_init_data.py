"""Init-data that would cost the broker too much, or that its reader was not made for: refused like any other."""

import pytest

from jindiskd.base import toml
from jindiskd.kbs import initdata
from jindiskd.kbs.messages import MalformedMessage, parse_attestation

HEAD = 'algorithm = "sha384"\nversion = "0.1.0"\n'
DOTS = "." * toml.MAX_DOTS_A_LINE


@pytest.mark.parametrize(
    "text",
    [
        "a." * 63_000 + "a = 1",
        "[" + "a." * 63_000 + "a]",
        f"a = '{DOTS}.'",
        "a = " + "9" * 5000,
        "a = " + "1_" * 5000 + "1",
        "a = '\ud800'",
        "a = " + "[" * 50_000,
    ],
)
def test_what_cannot_be_read_in_time_is_refused_before_it_is_parsed(text: str) -> None:
    """A key of 63,000 parts keeps the parser busy for a minute; whoever can reach the broker can send one."""
    with pytest.raises(MalformedMessage) as refused:
        initdata.read(HEAD + text)
    assert refused.value.problem == "not TOML that can be read"


def test_dots_in_reason_are_read() -> None:
    """Names and addresses have some; each line is counted by itself."""
    digest, entries = initdata.read(f'{HEAD}[data]\na = "{DOTS}"\nb = "{DOTS}"\n')
    assert (len(digest), entries) == (48, {"a": DOTS, "b": DOTS})


@pytest.mark.parametrize("body", ["5", "null", '["a"]', "{}", "true"])
def test_init_data_is_a_text(body: str) -> None:
    """Nothing else is taken out of the message."""
    message = '{"runtime-data": {"nonce": "", "tee-pubkey": {}}, "tee-evidence": {"additional_evidence": ""}, '
    with pytest.raises(MalformedMessage):
        parse_attestation((message + '"init-data": {"format": "toml", "body": ' + body + "}}").encode())
