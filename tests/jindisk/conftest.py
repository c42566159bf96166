"""What the tests of JinDisk share."""

import json
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests' own helpers, `jd`

from jd import BLOCK, KEY, Audit, content, world
from jd_disk import SPARE, WRITTEN
from jd_forge import Forge

from jindiskd.jindisksetup.main import main


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Audit]:
    """Watch every sealing of the test: a repeated nonce or a key that was not drawn here fails it."""
    found = Audit()
    found.install(monkeypatch)
    yield found
    found.verify()


@pytest.fixture
def no_endless_loop() -> Iterator[None]:
    """An alarm instead of a hanging suite."""

    def late(*_: object) -> None:
        raise AssertionError("endless")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def disk() -> dict[int, bytes]:
    """A volume whose newest superblock is not closed, with an empty journal. `SPARE` segments are not in use."""
    while True:  # segments are drawn
        here = world()
        session = here.create()
        for lba in WRITTEN:
            session.write(lba * BLOCK, content(lba))
        session.checkpoint()
        blocks = dict(here.device.blocks)
        if not SPARE & Forge(blocks, KEY).reader.keys.keys():
            return blocks


@pytest.fixture
def key(tmp_path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    return path


@pytest.fixture
def plain(tmp_path) -> Path:
    """A raw image: data, holes, an end that is no whole block."""
    path, generator = tmp_path / "plain", random.Random(9)
    with path.open("wb") as file:
        file.write(generator.randbytes(1_000_000))
        file.seek(12 << 20)
        file.write(generator.randbytes(70_001))
    return path


@pytest.fixture
def setup(capsys):
    """Runs the program in this process: the parsed output, with its status and what it told."""

    def run(*words: object, status: int = 0) -> dict:
        capsys.readouterr()
        assert main(["--json", *(str(word) for word in words)]) == status
        out, run.said = capsys.readouterr()
        return json.loads(out) if out else {}

    run.said = ""
    return run
