"""What commands print with --json, against their schemas."""

from collections.abc import Sequence
from typing import Any

import jsonschema

from jindiskd.cli import schemas


def command_of(words: Sequence[str]) -> str:
    """The command that a command line calls; options stand after it."""
    plain = [word for word in words if not word.startswith("-")]
    for count in (3, 2, 1):
        name = " ".join(plain[:count])
        if name in schemas.SHAPES:
            return name
    raise KeyError(f"{words}: what it prints is in no schema")


def check(words: Sequence[str], printed: Any) -> None:
    """Raise unless `printed` is what the command says that it prints."""
    if words[0] in schemas.NO_OBJECT and words[:2] != ("broker", "make-card"):
        return
    jsonschema.validate(printed, schemas.schema(command_of(words)))
