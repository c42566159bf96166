"""Running a worker: a process of its own for one image being made, written or taken, from task to answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

from jindiskd.base import document
from jindiskd.base.process import ENVIRONMENT, terminate
from jindiskd.base.secret import Secret
from jindiskd.errors import Internal, JindiskError
from jindiskd.image.request import Progress, Task

LINE_LIMIT_BYTES = 1 << 16


class BuildWorkerFailed(JindiskError, code="BuildWorkerFailed"):
    """The process that built an image ended without saying why."""

    def __init__(self, status: int) -> None:
        """`status` as of the process, negative for a signal."""
        super().__init__(f"the build process ended with status {status}; the journal may say more, try again")


def as_raised(code: str, message: str) -> JindiskError:
    """The error that a worker named, with its text."""
    kind = JindiskError.by_code.get(code, Internal)
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


async def run_worker(
    task: Task,
    keys: Mapping[str, Secret],
    files: Mapping[str, int],
    progress: Callable[[Progress], None],
) -> str:
    """Run a worker to its end; kill it when cancelled. What it made is in the task's staging directory.

    The result is the image's name, or of an export the stream's digest.

    Args:
        task: goes to its standard input.
        keys: by the option of the worker that takes each; they go through pipes.
        files: descriptors by option; they stay open and belong to the caller.
        progress: called in the event loop's thread.

    Raises:
        JindiskError: as the worker raised it. BuildWorkerFailed: it ended without saying why.
    """
    with contextlib.ExitStack() as stack:
        given = {**{name: stack.enter_context(_key_pipe(key)) for name, key in keys.items()}, **files}
        words = [word for name, fd in given.items() for word in (f"--{name}", str(fd))]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "jindiskd.image.worker", *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(ENVIRONMENT),
            start_new_session=True,
            pass_fds=tuple(given.values()),
            limit=LINE_LIMIT_BYTES,
        )
    outcome: dict[str, object] = {}
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(document.to_plain(task)).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # its status says more
            await process.stdin.drain()
        while line := await process.stdout.readline():
            message = json.loads(line)
            if "progress" in message:
                progress(Progress(**message["progress"]))
            else:
                outcome = message
        status = await process.wait()
    finally:
        if process.returncode is None:
            await asyncio.shield(terminate(process))
    if "error" in outcome:
        raise as_raised(str(outcome["error"]), str(outcome["message"]))
    if status != 0 or "result" not in outcome:
        raise BuildWorkerFailed(status)
    return str(outcome["result"])


@contextlib.contextmanager
def _key_pipe(key: Secret) -> Iterator[int]:
    """A descriptor to read the key from; it fits a pipe, so that nobody waits."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(writing, key.reveal())
        os.close(writing)
        yield reading
    finally:
        os.close(reading)
