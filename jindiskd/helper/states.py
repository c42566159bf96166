"""Telling the service the states of an open volume, as a guest tells its broker: adopt, report, close, stale.

Each message has a connection of its own, so a service that restarts meanwhile loses none: a packet of the verb, a
space and the body of the broker's protocol; the answer is `ok`, `fenced` or `later`. The session identifier in it is
what the service gave to whoever opened the volume. Served by `jindiskd.device.states`.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from jindiskd.base.anchor import State
from jindiskd.jindisk.errors import VolumeFenced
from jindiskd.kbs.freshness import VolumeState

SOCKET = Path("/run/jindiskd/states")
PACKET_BYTES = 4096
OK, FENCED, LATER = b"ok", b"fenced", b"later"
ANSWER_S = 30.0
RETRY_S = 1.0
PATIENCE_S = {"adopt": 30.0, "report": 0.0, "close": 30.0, "stale": 5.0}
"""For how long a message is tried again while nobody answers; what is reported is told again at the next report."""


class ServiceKeeper:
    """The service as the one who remembers the anchor, for one session of one volume."""

    def __init__(self, volume: str, session: bytes, path: Path = SOCKET) -> None:
        """`volume` is its UUID, `session` the 32 bytes of its release."""
        self._volume, self._session, self._path = volume, session, path

    def adopt(self, state: State, session: bytes) -> None:
        """See `jindisk.anchor.Keeper`."""
        self._tell("adopt", state, session)

    def report(self, state: State) -> None:
        """See `jindisk.anchor.Keeper`."""
        self._tell("report", state, self._session)

    def close(self, state: State) -> None:
        """See `jindisk.anchor.Keeper`."""
        self._tell("close", state, self._session)

    def stale(self, state: State) -> None:
        """The disk's newest state is this one, which the anchor does not accept."""
        self._tell("stale", state, self._session)

    def _tell(self, verb: str, state: State, session: bytes) -> None:
        told = VolumeState(volume=self._volume, session=session, sequence=state.sequence, root=state.root)
        packet = verb.encode() + b" " + told.dump()
        deadline = time.monotonic() + PATIENCE_S[verb]
        while True:
            try:
                answer = self._ask(packet)
            except OSError:
                answer = LATER
            if answer == OK:
                return
            if answer == FENCED:
                raise VolumeFenced("a newer session has begun, or the state is not accepted")
            if time.monotonic() >= deadline:
                raise OSError("the service does not answer")
            time.sleep(RETRY_S)

    def _ask(self, packet: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as stream:
            stream.settimeout(ANSWER_S)
            stream.connect(os.fspath(self._path))
            stream.send(packet)
            return stream.recv(64)
