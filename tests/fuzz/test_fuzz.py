"""No bytes make a parser raise anything but its own refusal: seeds altered at random, and guided by coverage."""

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from targets import LONG, TARGETS, Target, feed, seeds  # noqa: E402 (found by the line above)

SEED = int(os.environ.get("FUZZ_SEED", "20261125"))
ALTERED = 150
RUNS = 20_000
MIN_COVERAGE = 500
MAX_LEN = 12 << 10


@pytest.fixture(scope="session")
def attestation(vectors: Path) -> Path:
    return vectors / "attestation"


def altered(blob: bytes, chance: random.Random) -> bytes:
    """A seed with a few bytes changed, cut, doubled or put in from elsewhere."""
    out = bytearray(blob)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(out) + 1)
        match chance.randrange(6):
            case 0 if out:
                out[at % len(out)] ^= 1 << chance.randrange(8)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = chance.randbytes(chance.randint(1, 16))
            case 3:
                del out[at : at + chance.randint(1, 64)]
            case 4:
                out[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
            case _:
                out += out[at : at + 200]
    return bytes(out)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_altered_seeds(name: str, attestation: Path) -> None:
    """Every target with its own recorded inputs, altered; the seed of chance is printed with a failure."""
    target, chance = TARGETS[name], random.Random(f"{SEED} {name}")
    known = seeds(target, attestation)
    assert known, "a target without a seed finds nothing"
    for blob in (b"", b"\0", b"{", b"[" * 3000, b"\xff" * 3000, *known):
        feed(target, blob)
    for _ in range(ALTERED):
        blob = altered(chance.choice(known), chance)
        try:
            feed(target, blob)
        except Exception as exc:
            raise AssertionError(f"{name}, seed {SEED}: {blob[:400].hex()}") from exc


def test_a_target_takes_what_is_good(attestation: Path) -> None:
    """The real ones are taken: targets are not all refusal."""
    for name, target in TARGETS.items():
        small = [blob for blob in seeds(target, attestation) if len(blob) < MAX_LEN]
        assert small, f"{name}: nothing to begin with when it is guided by coverage"
        # A challenge of their own time, and a token's key, cannot be recorded.
        assert name in {"judge", "token"} or any(feed(target, blob) for blob in small), name


def corpus_of(folder: Path, name: str | None, attestation: Path) -> Path:
    folder.mkdir()
    names = sorted(TARGETS if name is None else LONG)
    for index, each in enumerate(names):
        if name is not None and each != name:
            continue
        for number, blob in enumerate(seeds(LONG[each], attestation)):
            if len(blob) < MAX_LEN:
                head = bytes([index]) if name is None else b""
                (folder / f"{each}-{number}").write_bytes(head + blob)
    return folder


def fuzz(tmp_path: Path, corpus: Path, *options: str, limit_s: float = 300) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install jindiskd[test]")
    words = [sys.executable, str(HERE / "run.py"), str(corpus), *options, f"-seed={SEED % (1 << 31)}"]
    words += [f"-max_len={MAX_LEN}", "-timeout=60", "-rss_limit_mb=2048"]
    return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=limit_s)


def test_guided_by_coverage(tmp_path: Path, attestation: Path) -> None:
    """All targets in one process, for a bounded number of runs."""
    corpus = corpus_of(tmp_path / "corpus", None, attestation)
    out = fuzz(tmp_path, corpus, f"-runs={RUNS}", limit_s=600)
    assert out.returncode == 0, out.stderr[-4000:]
    assert f"Done {RUNS} runs" in out.stderr
    # Guidance without instrumentation would be none.
    assert int(re.findall(r"cov: (\d+)", out.stderr)[-1]) > MIN_COVERAGE, out.stderr[-2000:]


def test_a_planted_fault_is_found(tmp_path: Path) -> None:
    """Four bytes that have to be right: coverage leads to them, and the fuzzer says so."""
    (tmp_path / "corpus").mkdir()
    out = fuzz(tmp_path, tmp_path / "corpus", "planted", "-runs=2000000", limit_s=600)
    assert out.returncode != 0
    assert "planted" in out.stderr + out.stdout


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(LONG))
def test_each_target_for_a_while(name: str, tmp_path: Path, attestation: Path) -> None:
    """Half a minute for each parser by itself."""
    corpus = corpus_of(tmp_path / "corpus", name, attestation)
    out = fuzz(tmp_path, corpus, name, "-max_total_time=30", limit_s=600)
    assert out.returncode == 0, out.stderr[-4000:]


def test_every_target_says_what_it_may_raise() -> None:
    """Nothing broad."""
    for name, target in TARGETS.items():
        assert isinstance(target, Target)
        assert Exception not in target.allowed, name
        assert ValueError not in target.allowed, name
