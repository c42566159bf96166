"""Commands are imported when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from jindiskd.cli.lazy import LazyGroup, members
from jindiskd.cli.main import COMMANDS, cli

HEAVY = ("sqlalchemy", "alembic", "aiohttp", "libvirt", "cryptography")
"""What the daemons need, or one command alone."""


@pytest.mark.parametrize("words", [["--version"], ["launch", "--help"], ["domain", "list", "--help"]])
def test_a_command_does_not_import_what_others_need(words: list[str]) -> None:
    code = (
        "import sys; from jindiskd.cli.main import main; status = main(sys.argv[1:]); "
        f"print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_every_place_has_its_command() -> None:
    assert set(members(cli)) == set(COMMANDS)


def test_a_place_with_another_command_is_a_fault() -> None:
    wrong = LazyGroup("wrong", places={"start": "domain:launch"})
    with pytest.raises(TypeError, match="domain:launch is not the command start"):
        members(wrong)
    assert wrong.get_command(click.Context(wrong), "stop") is None
