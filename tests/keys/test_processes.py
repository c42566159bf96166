"""Several processes on one SQLite file: writers wait for each other, limits count over all, a kill tears nothing."""

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from jindiskd.base.platform import Platform
from jindiskd.base.secret import Secret
from jindiskd.keys import database
from jindiskd.keys.database import DatabaseFailed
from jindiskd.keys.store import ReleaseRefused, Requester, Store
from jindiskd.policy.rules import ReleaseRules

IMAGE = "11111111-1111-4111-8111-111111111111"
KEY = bytes(range(32))

WORKER = """
import sys
from jindiskd.base.secret import Secret
from jindiskd.keys.store import ReleaseRefused, Requester, Store
path, image, verb, times = sys.argv[1:]
store = Store.open(f"sqlite:///{path}", Secret(sys.stdin.buffer.read(32)))
print("ready", flush=True)
sys.stdin.buffer.read(1)
done = 0
for number in range(int(times)):
    who = Requester(peer=verb, measurement=bytes(48), guest=verb)
    if verb == "refuse":
        store.record_refusal(image, who, [("test", str(number))])
        done += 1
    elif verb == "flip":
        store.revoke(image)
        store.reinstate(image)
        done += 2
    else:
        try:
            store.release_to(image, who).close()
            done += 1
        except ReleaseRefused:
            pass
    print(done, flush=True)
store.close()
"""


class Worker:
    """A process with a store of its own; it begins when all are ready."""

    def __init__(self, path: Path, kek: bytes, verb: str, times: int) -> None:
        words = [sys.executable, "-c", WORKER, str(path), IMAGE, verb, str(times)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.process.stdin.write(kek)
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"ready\n", self.process.stderr.read().decode()

    def go(self) -> None:
        self.process.stdin.write(b"!")
        self.process.stdin.flush()

    def done(self) -> int:
        """How much it did, when it has ended."""
        out, err = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, err.decode()
        return int(out.split()[-1])


@pytest.fixture
def kek() -> bytes:
    return bytes(range(100, 132))


@pytest.fixture
def path(tmp_path: Path, kek: bytes) -> Path:
    found = tmp_path / "keys.db"
    store = Store.open(f"sqlite:///{found}", Secret(kek))
    store.add_image(IMAGE, "web", Platform.SNP, f"default/{IMAGE}/root", Secret(KEY))
    store.activate(IMAGE, [bytes(48)])
    store.close()
    return found


def opened(path: Path, kek: bytes) -> Store:
    return Store.open(f"sqlite:///{path}", Secret(kek))


def test_rows_of_all_processes_make_one_chain(path: Path, kek: bytes) -> None:
    """Releases, refusals and changes of state at the same time: nothing fails, nothing is lost, nothing is twice."""
    store = opened(path, kek)
    before = store.verify_audit()[0]
    workers = [Worker(path, kek, verb, 20) for verb in ("release", "refuse", "flip")]
    for worker in workers:
        worker.go()
    done = sum(worker.done() for worker in workers)
    assert store.verify_audit()[0] == before + done
    assert len([row for row in store.audit_rows(1000) if row["kind"] == "refused"]) == 20
    store.close()


def test_a_limit_counts_over_all_processes(path: Path, kek: bytes) -> None:
    """Ten an hour are ten, however many brokers ask the database whether there is one left."""
    store = opened(path, kek)
    store.set_rules(IMAGE, ReleaseRules(releases_per_hour=10))
    workers = [Worker(path, kek, "release", 15) for _ in range(2)]
    for worker in workers:
        worker.go()
    assert sum(worker.done() for worker in workers) == 10
    with pytest.raises(ReleaseRefused):
        store.release_to(IMAGE, Requester(peer="third", measurement=bytes(48), guest="third"))
    store.close()


def test_a_killed_process_tears_nothing(path: Path, kek: bytes) -> None:
    """SIGKILL in the middle of its writing: the chain is whole, others go on at once, and what it reported is there."""
    store = opened(path, kek)
    before = store.verify_audit()[0]
    worker = Worker(path, kek, "release", 100_000)
    worker.go()
    for _ in range(5):
        reported = int(worker.process.stdout.readline())
    worker.process.send_signal(signal.SIGKILL)
    # Not by `communicate`, which forgets what was read ahead.
    reported = int((worker.process.stdout.read().split() or [reported])[-1])
    worker.process.communicate()
    store.release_to(IMAGE, Requester(peer="other", measurement=bytes(48), guest="other")).close()
    rows = store.verify_audit()[0] - before - 1
    assert reported <= rows <= reported + 1
    store.close()


def test_a_process_that_keeps_the_database_is_named(path: Path, kek: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting has an end: a typed error that says what is in the way, no key, and no row."""
    monkeypatch.setattr(database, "WAIT_S", 0.3)
    store = opened(path, kek)
    before = store.verify_audit()[0]
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseFailed, match="locked"):
        store.release_to(IMAGE, Requester(peer="x", measurement=bytes(48), guest="x"))
    assert store.verify_audit()[0] == before
    holder.execute("ROLLBACK")
    holder.close()
    store.release_to(IMAGE, Requester(peer="x", measurement=bytes(48), guest="x")).close()
    assert store.verify_audit()[0] == before + 1
    store.close()
