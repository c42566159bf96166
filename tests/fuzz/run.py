"""Coverage-guided fuzzing of all targets, or one: `python tests/fuzz/run.py CORPUS [TARGET] [libFuzzer options]`.

With all targets in one process the first byte of an input chooses the target. Ends with a status other than 0 where a
parser raised what it may not, and leaves the input in the current directory.
"""

import os
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
PACKAGES = ("attest", "kbs", "broker", "device", "helper", "jindisk", "guest", "base")
with atheris.instrument_imports(include=[f"jindiskd.{name}" for name in PACKAGES]):
    from targets import LONG, TARGETS, Target, feed

NAMES = sorted(TARGETS)


@atheris.instrument_func
def planted(data: bytes) -> None:
    """A parser with a fault that only guidance by coverage finds: to show that it would be found."""
    if len(data) > 4 and data[0] == 0x4A and data[1] == 0x44 and data[2] == 0x52 and data[3] == 0x31:
        raise IndexError("planted")


def main() -> None:
    corpus, rest = sys.argv[1], sys.argv[2:]
    chosen: list[Target] = [TARGETS[name] for name in NAMES]
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        chosen = [Target(planted, ())] if name == "planted" else [LONG[name]]

    def one(data: bytes) -> None:
        if len(chosen) == 1:
            feed(chosen[0], data)
        elif data:
            feed(chosen[data[0] % len(chosen)], data[1:])

    atheris.Setup([sys.argv[0], *rest, corpus], one)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    main()
