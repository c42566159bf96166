"""Starting file system tools from a build worker, so that they end when the worker is killed.

The worker is one process that builds one image step by step; it has no event loop of its own to keep free.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence

from jindiskd.base.process import run

TIMEOUT_S = 3600.0
"""For one tool on one image; a guard against a tool that hangs, not a measure of work."""


def tool(
    argv: Sequence[str | os.PathLike[str]],
    *,
    pass_fds: Sequence[int] = (),
    ok: Sequence[int] = (0,),
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    timeout_s: float = TIMEOUT_S,
) -> bytes:
    """Run a program to its end and return what it printed; errors as `base.process.run`.

    The kernel kills it when this process dies (`setpriv --pdeathsig`): `run` gives each program a session of its own,
    which the signal to the worker's does not reach.
    """
    words = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
    return asyncio.run(run(words, timeout_s=timeout_s, pass_fds=pass_fds, ok=ok, env=env, stdin=stdin))
