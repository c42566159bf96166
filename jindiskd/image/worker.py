"""One piece of work on an image in a process of its own: `python -m jindiskd.image.worker` and its descriptors.

::

    --key FD --base FD            build: the new key, and the base
    --key FD --source-key FD      clone: the new key, and that of the image that is cloned
    --volume-keys FD              build, clone: the new keys of the data volumes, one after the other
    --volumes FD                  a data volume comes or goes: the key of the new one, or nothing
    --source-key FD               with that: the root's, where it must be read
    --source-volume-keys FD       clone: those of the image that is cloned
    --export FD                   export: where the stream goes
    --import FD                   import: where it comes from

Standard input carries one line, the task as JSON, and then stays open: its end means that whoever wanted the work is
gone, and ends this process at once, with the tools it started. Keys come by descriptors. Standard output carries JSON
lines: `{"progress": …}`, then one of `{"result": text}` and `{"error": code, "message": text}`.

The process parses what others made, holds the keys of one image, or of a clone and its source, and ends. It removes
nothing: what it leaves in the staging directory is the starter's to remove, who must be able to do so after a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import threading
import time

import structlog

from jindiskd.base import document
from jindiskd.base.log import setup
from jindiskd.base.secret import Secret
from jindiskd.errors import EXIT_FAILED, Internal, JindiskError
from jindiskd.guest import kernel
from jindiskd.image.builder import build
from jindiskd.image.clone import CloneKeys, clone
from jindiskd.image.data_volumes import Keys, parted
from jindiskd.image.request import (
    KEY_BYTES,
    BuildRequest,
    BuildTask,
    CloneTask,
    ExportTask,
    ImportTask,
    Progress,
    VolumesTask,
)
from jindiskd.image.transfer import export, import_
from jindiskd.image.volume_change import change

log = structlog.get_logger(__name__)
REQUEST_LIMIT_BYTES = 1 << 16
PROGRESS_INTERVAL_S = 0.2
MEMORY_BYTES = 4 << 30
"""For this process and each tool: a hostile base may make them want any amount, and must not take the host's."""


def say(message: dict[str, object]) -> None:
    """Write one line to the starter; it is gone if that fails, and so are we."""
    try:
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")
    except OSError:
        os._exit(EXIT_FAILED)


def read_line(fd: int) -> bytes:
    """The first line of the request's descriptor."""
    data = b""
    while not data.endswith(b"\n") and len(data) <= REQUEST_LIMIT_BYTES:
        piece = os.read(fd, REQUEST_LIMIT_BYTES)
        if not piece:
            os._exit(EXIT_FAILED)
        data += piece
    return data


def end_with(fd: int) -> None:
    """Wait for the end of the request's descriptor, then end the process, whatever it is doing."""
    while os.read(fd, 4096):
        pass
    os._exit(EXIT_FAILED)


class Reporter:
    """Passes progress on, a few times a second at most, and each change of stage."""

    def __init__(self) -> None:
        self._stage, self._next = "", 0.0

    def __call__(self, progress: Progress) -> None:
        """Report, or not if it is too soon."""
        now = time.monotonic()
        if progress.stage == self._stage and now < self._next and progress.fraction != 1.0:
            return
        self._stage, self._next = progress.stage, now + PROGRESS_INTERVAL_S
        say({"progress": document.to_plain(progress)})


def read_key(fd: int, key_bytes: int) -> Secret:
    """The key, from a descriptor that has exactly that."""
    buffer = bytearray(key_bytes + 1)
    length = 0
    with os.fdopen(fd, "rb", buffering=0) as stream:
        while length < len(buffer) and (count := stream.readinto(memoryview(buffer)[length:])):
            length += count
    if length != key_bytes:
        buffer[:] = bytes(len(buffer))
        raise ValueError(f"the key has {length} bytes")
    key = Secret(memoryview(buffer)[:key_bytes])
    buffer[:] = bytes(len(buffer))
    return key


def read_volume_keys(fd: int | None, request: BuildRequest) -> contextlib.AbstractContextManager[Keys]:
    """The keys of the data volumes of a request; wiped at the end."""
    names = [volume.name for volume in request.volumes]
    data = read_key(fd, KEY_BYTES * len(names)) if fd is not None else Secret(b"")
    return parted(data, names)


def work(line: bytes, arguments: argparse.Namespace) -> str:
    """Do what was asked for; the result is the image's name, or the digest of an exported stream."""
    report = Reporter()
    if arguments.export is not None:
        return export(document.load(ExportTask, line, document="export task"), arguments.export, report)
    if arguments.import_ is not None:
        return import_(document.load(ImportTask, line, document="import task"), arguments.import_, report).name
    if arguments.volumes is not None:
        return change_volumes(document.load(VolumesTask, line, document="volumes task"), arguments, report)
    if arguments.source_key is None:
        task = document.load(BuildTask, line, document="build task")
        with (
            read_key(arguments.key, task.request.format.key_bytes) as key,
            read_volume_keys(arguments.volume_keys, task.request) as volume_keys,
        ):
            return build(task, arguments.base, key, report, volume_keys).name
    cloning = document.load(CloneTask, line, document="clone task")
    request = cloning.build.request
    key_bytes = request.format.key_bytes
    with (
        read_key(arguments.key, key_bytes) as key,
        read_key(arguments.source_key, key_bytes) as source_key,
        read_volume_keys(arguments.volume_keys, request) as volume_keys,
        read_volume_keys(arguments.source_volume_keys, request) as source_volume_keys,
    ):
        keys = CloneKeys(
            source=source_key, new=key, source_volumes=source_volume_keys, new_volumes=volume_keys
        )
        return clone(cloning, keys, report).name


def change_volumes(task: VolumesTask, arguments: argparse.Namespace, report: Reporter) -> str:
    """Add a data volume or take one away; the result is the image's name."""
    request = task.build.request
    with contextlib.ExitStack() as stack:
        root_key = None
        if arguments.source_key is not None:
            root_key = stack.enter_context(read_key(arguments.source_key, request.format.key_bytes))
        names = [task.added] if task.added else []
        data = read_key(arguments.volumes, KEY_BYTES * len(names))
        volume_keys = stack.enter_context(parted(data, names))
        return change(task, root_key, volume_keys, report).name


def keep_key_private() -> None:
    """No core file with the key in it, nor a dump piped to a program, which the limit does not stop; no debugger but
    root's: the tools that read the base run as the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def main() -> int:
    """Do one piece of work; the exit status is the error's."""
    parser = argparse.ArgumentParser(prog="jindiskd.image.worker")
    for option in ("--key", "--base", "--source-key", "--volume-keys", "--source-volume-keys", "--volumes", "--export"):
        parser.add_argument(option, type=int)
    parser.add_argument("--import", type=int, dest="import_")
    arguments = parser.parse_args()
    setup()
    keep_key_private()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        line = read_line(sys.stdin.fileno())
        threading.Thread(target=end_with, args=(sys.stdin.fileno(),), daemon=True).start()
        result = work(line, arguments)
    except JindiskError as exc:
        say({"error": exc.code, "message": str(exc)})
        return exc.exit_code
    except Exception:  # the starter must get an answer, and the journal the reason
        reference = f"build-{os.getpid()}"
        log.exception("build failed", reference=reference)
        error = Internal(reference)
        say({"error": error.code, "message": str(error)})
        return error.exit_code
    say({"result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
