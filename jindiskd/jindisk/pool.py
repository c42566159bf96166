"""Worker processes for loading and exporting in bulk: tasks and results are bytes, results come back in order.

Processes, because the cipher is called once a block and threads would wait for the interpreter's lock. They are forked,
so they have the descriptors of their parent, and die with it. Nothing else of a volume uses processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import struct
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from jindiskd.errors import JindiskError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PIPE_BYTES = 1 << 20
DEPTH = 2
"""Tasks a worker has at a time; task and result of each must fit into a pipe of `PIPE_BYTES` together."""
_HEAD = struct.Struct("<iI")  # error number, or zero, and length

Work = Callable[[bytes], bytes]


class WorkerFailed(JindiskError, code="VolumeWorkerFailed"):
    """A worker process of a bulk load or export ended early."""

    def __init__(self, status: int) -> None:
        """`status` as from `waitpid`."""
        super().__init__(f"a worker process ended early with status {os.waitstatus_to_exitcode(status)}; see the log")


class Pool:
    """Runs tasks in processes, or with fewer than two in this one. A context manager; leaving it ends the processes."""

    def __init__(self, work: Work, workers: int) -> None:
        """`work` runs in the workers and may raise `OSError`, which `next` raises here."""
        self._work, self._size = work, workers if workers > 1 else 0
        self._workers: list[tuple[int, int, int]] = []
        self._load: list[int] = []
        self._order: deque[int] = deque()
        self._done: deque[bytes] = deque()

    @property
    def lanes(self) -> int:
        """How many tasks run at a time: one for each process, or one."""
        return max(self._size, 1)

    @property
    def waiting(self) -> int:
        """Tasks whose results were not taken yet."""
        return len(self._order) + len(self._done)

    @property
    def full(self) -> bool:
        """Whether a result must be taken before another task can be given."""
        if not self._size:
            return bool(self._done)
        return len(self._order) >= DEPTH * self._size

    def __enter__(self) -> Self:
        parent = os.getpid()
        for _ in range(self._size):
            task_in, task_out = os.pipe2(os.O_CLOEXEC)
            result_in, result_out = os.pipe2(os.O_CLOEXEC)
            for end in (task_out, result_out):
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            pid = os.fork()
            if pid == 0:
                os.close(task_out)
                os.close(result_in)
                for _, earlier_out, earlier_in in self._workers:
                    os.close(earlier_out)
                    os.close(earlier_in)
                _serve(self._work, task_in, result_out, parent)  # does not return
            os.close(task_in)
            os.close(result_out)
            self._workers.append((pid, task_out, result_in))
            self._load.append(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, _exc: object, _traceback: TracebackType | None) -> None:
        for pid, task_out, result_in in self._workers:
            os.close(task_out)
            os.close(result_in)
            if kind is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        statuses = [os.waitpid(pid, 0)[1] for pid, _, _ in self._workers]
        if kind is None and any(statuses):
            raise WorkerFailed(next(status for status in statuses if status))

    def give(self, task: bytes, lane: int | None = None) -> None:
        """Give a task to the worker of a lane, or to the least busy one. Not while `full`.

        Who chooses lanes gives none more than `DEPTH`.
        """
        if not self._size:
            self._done.append(self._work(task))
            return
        worker = min(range(self._size), key=self._load.__getitem__) if lane is None else lane
        self._load[worker] += 1
        self._order.append(worker)
        with contextlib.suppress(BrokenPipeError):  # it has ended, and what it said last, or nothing, tells why
            _write(self._workers[worker][1], _HEAD.pack(0, len(task)) + task)

    def next(self) -> bytes:
        """The result of the oldest task.

        Raises:
            OSError: the work raised it.
            WorkerFailed: the worker ended.
        """
        if self._done:
            return self._done.popleft()
        worker = self._order.popleft()
        self._load[worker] -= 1
        head = _read(self._workers[worker][2], _HEAD.size)
        if head is None:
            raise self._lost(worker)
        number, length = _HEAD.unpack(head)
        if number:
            raise OSError(number, os.strerror(number))
        result = _read(self._workers[worker][2], length)
        if result is None:
            raise self._lost(worker)
        return result

    def _lost(self, worker: int) -> WorkerFailed:
        pid, task_out, result_in = self._workers.pop(worker)
        os.close(task_out)
        os.close(result_in)
        return WorkerFailed(os.waitpid(pid, 0)[1])


def _serve(work: Work, tasks: int, results: int, parent: int) -> None:
    """A worker's life; it ends here in every case, so that nothing of its parent's runs twice."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            while (head := _read(tasks, _HEAD.size)) is not None:
                task = _read(tasks, _HEAD.unpack(head)[1])
                if task is None:
                    break
                try:
                    result = work(task)
                except OSError as exc:
                    _write(results, _HEAD.pack(exc.errno or errno.EIO, 0))
                    break
                _write(results, _HEAD.pack(0, len(result)) + result)
            status = 0
    finally:
        os._exit(status)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd: int, length: int) -> bytes | None:
    """Exactly `length` bytes; None if the other side has ended."""
    data = bytearray()
    while len(data) < length:
        part = os.read(fd, length - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def default_workers() -> int:
    """One for each processor that this process may use."""
    return len(os.sched_getaffinity(0))
