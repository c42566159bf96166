"""Running pieces side by side, each on a throw-away host of its own."""

import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMPTY = 5
"""pytest's exit status where no test was selected."""


@dataclasses.dataclass
class Piece:
    """Tests that run together."""

    name: str
    words: list[str]
    """For pytest: which tests, and what to do with them."""
    seconds: float = 0.0
    status: int = 0
    """pytest's, or below 0 if it was ended."""
    output: str = ""

    @property
    def failed(self) -> bool:
        return self.status not in (0, EMPTY)

    def summary(self) -> str:
        """What failed in it, a line each."""
        lines = [line for line in self.output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return "\n".join([f"{self.name}: pytest ended with {self.status}", *lines])


class Lanes:
    """A few pieces at once, the next one as soon as one is through."""

    def __init__(
        self, pieces: Sequence[Piece], *, count: int, words: Sequence[str], prefix: Sequence[str], bound_s: int
    ) -> None:
        """Prepare a run.

        Args:
            pieces: all of them, in the order of work.
            count: how many at once.
            words: for each pytest, after those of its piece.
            prefix: a command that is given each piece's command, such as `nice`; none if empty.
            bound_s: seconds after which a piece is ended; what of it is written down stays.
        """
        self._waiting, self._count, self._bound_s = list(pieces), count, bound_s
        self._words, self._prefix = list(words), list(prefix)
        self._lock, self._running = threading.Lock(), set[subprocess.Popen[bytes]]()
        self.through: list[Piece] = []
        self.interrupted = False

    def run(self, tell: Callable[[Piece, int], None]) -> None:
        """Run all; `tell` gets each piece that is through and how many wait, one call at a time. ^C ends them."""
        lanes = [threading.Thread(target=self._lane, args=(tell,)) for _ in range(self._count)]
        for lane in lanes:
            lane.start()
        try:
            for lane in lanes:
                lane.join()
        except KeyboardInterrupt:
            with self._lock:
                self._waiting.clear()
                for process in self._running:
                    _end(process)
            self.interrupted = True
            for lane in lanes:
                lane.join()

    def _lane(self, tell: Callable[[Piece, int], None]) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                piece = self._waiting.pop(0)
            self._one(piece)
            with self._lock:
                self.through.append(piece)
                tell(piece, len(self._waiting))

    def _one(self, piece: Piece) -> None:
        command = [*self._prefix, "scripts/testenv", ".venv/bin/pytest", "-q", *piece.words, *self._words]
        began = time.monotonic()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
            start_new_session=True,
        ) as process:  # fmt: skip
            with self._lock:
                self._running.add(process)
            try:
                output, _ = process.communicate(timeout=self._bound_s)
            except subprocess.TimeoutExpired:
                _end(process)
                output, _ = process.communicate()
                output += f"\nended after {self._bound_s} s\n".encode()
            with self._lock:
                self._running.discard(process)
        piece.seconds, piece.status = time.monotonic() - began, process.returncode
        piece.output = output.decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The throw-away host goes with the process that holds it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself meanwhile
