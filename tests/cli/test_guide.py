"""jindisk(7) and the sample settings: what a newcomer copies is right."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from jindiskd.broker_config import Config as BrokerConfig
from jindiskd.cli import guide, manpages
from jindiskd.cli.lazy import members
from jindiskd.cli.main import cli
from jindiskd.config import Config, load, load_as

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
COMMANDS = [command for name, value in vars(guide).items() if name.endswith("_COMMANDS") for command in value]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("jindiskctl")])
def test_its_commands_are_commands(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is taken apart by the command line itself, which stops before it does anything."""
    monkeypatch.chdir(tmp_path)
    for file in ("root.tar", "demo.json", "web.img"):  # what an earlier command has made
        (tmp_path / file).touch()
    words = shlex.split(line.replace("/var/tmp/", ""))[1:]
    command: click.Command = cli
    while isinstance(command, click.Group):
        command = members(command)[words.pop(0)]
    with command.make_context("test", words):  # which closes what it has opened
        pass


def test_the_page_is_clean(tmp_path: Path) -> None:
    """groff has no complaint, and shows each command as it is typed."""
    page = tmp_path / "jindisk.7"
    page.write_text(manpages.guide_page())
    words = ["groff", "-man", "-ww", "-Tutf8", "-Kutf8", "-rHY=0", "-rLL=200n", "-P-cbou", page]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    text = done.stdout.replace("\u2010", "-").replace("\u2212", "-")
    for command in (line for line in COMMANDS if line not in guide.UNIT_COMMANDS):
        assert f"# {command}\n" in text
    assert "[broker]" in text


def test_every_right_is_named() -> None:
    """What an administrator may grant is what polkit knows."""
    policy = (EXAMPLES.parents[1] / "dbus/org.jindisk1.policy").read_text()
    actions = re.findall(r'<action id="org\.jindisk1\.([a-z-]+)"', policy)
    assert [name for name in actions if not re.search(rf"[\s.]{name}\b", guide.RIGHTS)] == []


@pytest.mark.parametrize(
    ("text", "schema"), [(manpages.sample(), Config), (manpages.broker_sample(), BrokerConfig)], ids=["host", "broker"]
)
def test_the_sample_changes_nothing_and_has_everything(tmp_path: Path, text: str, schema: type) -> None:
    """As it is, and with every line that has a value taken in: the defaults."""
    file = tmp_path / "sample.toml"
    file.write_text(text)
    assert load_as(schema, file).config == schema()
    taken = re.sub(r"^#(\w+ = (?!\(none\)).*)$", r"\1", text, flags=re.MULTILINE)
    assert taken.count("\n") == text.count("\n")
    file.write_text(taken)
    loaded = load_as(schema, file)
    assert loaded.config == schema()
    assert {item.name.partition(".")[2] for item in loaded.settings} == set(
        re.findall(r"^#?(\w+) = ", text, re.MULTILINE)
    )


def test_the_settings_for_simulation(tmp_path: Path) -> None:
    """They load, and say what they are for."""
    file = tmp_path / "jindiskd.toml"
    file.write_text((EXAMPLES / "simulated.toml").read_text())
    config = load(file).config
    assert config.broker.allow_simulated
    assert config.images.platform.simulated
