"""Starting other programs: the only place that does.

Argument list, a small fixed environment, standard input closed unless given, a required time limit, its own session;
on cancellation or time-out the whole group gets TERM, then KILL, and is waited for. Arguments are logged at debug
level: secrets go by standard input or a descriptor, never in `argv` or the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from jindiskd.base.logger import Logger
from jindiskd.errors import JindiskError, TimedOut

log = Logger(__name__)
ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
STDERR_TAIL = 2000
GRACE_S = 3.0


class ToolFailed(JindiskError, code="ToolFailed"):
    """A program we started ended with a status that means failure."""

    def __init__(self, argv: Sequence[str], status: int, stderr: str) -> None:
        """`status` is the exit status, negative for a signal; `stderr` what it said last."""
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        said = f": {stderr.strip()}" if stderr.strip() else ""
        super().__init__(f"{os.path.basename(argv[0])} {how}{said}")  # noqa: PTH119 (argv holds strings)
        self.argv, self.status, self.stderr = tuple(argv), status, stderr


class ToolMissing(JindiskError, code="ToolMissing"):
    """A program we need is not installed."""

    def __init__(self, program: str) -> None:
        """`program` is the name looked up in PATH."""
        super().__init__(f"the program {program} is not installed: install the package that has it")


async def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout_s: float,
    stdin: bytes | bytearray | None = None,
    ok: Sequence[int] = (0,),
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    cwd: str | os.PathLike[str] | None = None,
) -> bytes:
    """Run a program to its end and return its standard output.

    Args:
        argv: the program and its arguments.
        timeout_s: seconds until it is ended and `TimedOut` is raised.
        stdin: bytes for its standard input, else `/dev/null`.
        ok: exit statuses that mean success.
        env: variables in addition to the fixed environment.
        pass_fds: descriptors the program inherits, under the same numbers.
        cwd: its working directory.

    Raises:
        ToolFailed: another exit status; carries the tail of standard error.
        ToolMissing: no such program.
        TimedOut: the limit passed.
    """
    words = [os.fspath(word) for word in argv]
    log.debug("run", argv=words)
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **(env or {})},
            start_new_session=True,
            pass_fds=pass_fds,
            cwd=cwd,
        )
    except FileNotFoundError as exc:
        raise ToolMissing(words[0]) from exc
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(stdin)
    except TimeoutError as exc:
        raise TimedOut(f"the end of {words[0]}", timeout_s) from exc
    finally:
        if process.returncode is None:
            await asyncio.shield(terminate(process))
    status = process.returncode or 0
    if status not in ok:
        raise ToolFailed(words, status, err.decode(errors="replace")[-STDERR_TAIL:])
    return out


async def terminate(process: asyncio.subprocess.Process, grace_s: float = GRACE_S) -> None:
    """End a process group started with its own session: TERM, then KILL after `grace_s`; wait for its leader."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            async with asyncio.timeout(grace_s if number == signal.SIGTERM else None):
                await process.wait()
        except TimeoutError:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what its leader left behind
        return
