"""The guest's dealings with its broker: connection, evidence, and the client's errors as codes."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from jindiskd.base.platform import Platform, Tee
from jindiskd.base.secret import Secret
from jindiskd.errors import JindiskError
from jindiskd.guest import report
from jindiskd.guest.codes import Code, GuestFailure
from jindiskd.guest.config import BrokerPin
from jindiskd.kbs import client, evidence
from jindiskd.kbs.client import Ask

CONNECT_S = 10.0
REFUSALS = {
    "AttestationError": Code.EVIDENCE_REFUSED,
    "PolicyDeny": Code.POLICY_DENIED,
}


@contextlib.contextmanager
def failing_with(code: Code) -> Iterator[None]:
    """Any exception inside becomes `GuestFailure(code)`, and its text is lost."""
    try:
        yield
    except GuestFailure:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the host gets to see the code alone
        raise GuestFailure(code) from None


def code_of(exc: Exception) -> Code:
    """The code for an error of the client, or of what it called."""
    match exc:
        case GuestFailure():
            return exc.code
        case client.BrokerNotTrusted():
            return Code.BROKER_NOT_TRUSTED
        case client.Fenced():
            return Code.FENCED
        case client.BrokerRefused() if exc.versions is not None:
            return Code.BROKER_MISBEHAVED
        case client.BrokerRefused():
            return REFUSALS.get(exc.kind, Code.BROKER_TROUBLE)
        case client.BrokerUnreachable() | OSError():
            return Code.BROKER_UNREACHABLE
        case JindiskError() | ValueError() | EOFError():
            return Code.BROKER_MISBEHAVED
        case _:
            return Code.INTERNAL


@contextlib.contextmanager
def broker_failures() -> Iterator[None]:
    """The client's errors as codes."""
    try:
        yield
    except Exception as exc:  # noqa: BLE001 - whatever it is, the host gets to see the code alone
        raise GuestFailure(code_of(exc)) from None


class GuestBroker:
    """The one broker of the measured configuration. Works without any file, so after the change of root as well."""

    def __init__(self, pin: BrokerPin, platform: Platform, report_source: str = "") -> None:
        """`platform` decides where reports come from, unless the configuration names a source of its own."""
        self._pin, self._platform, self._report_source = pin, platform, report_source

    def client(self, deadline_s: float) -> client.KbsClient:
        """A client that gives up at `deadline_s`, a `time.monotonic()` value."""
        return client.KbsClient(self._connect, spki_sha256=self._pin.spki_sha256, deadline=deadline_s)

    def obtain(self, asks: Sequence[Ask], deadline_s: float, reported: Callable[[], None]) -> list[Secret]:
        """Attest once and get the secrets of all volumes; `reported` is called when the platform has given a report.

        A guest whose platform can say so has said then that it asks no more.

        Raises:
            GuestFailure: with the code for what went wrong.
        """
        with broker_failures():
            found = self.client(deadline_s).obtain(self._platform.tee.value, asks, self._prover(reported))
        try:
            with failing_with(Code.REPORT):
                report.end_attesting(self._platform)
        except BaseException:
            for secret in found:
                secret.close()
            raise
        return found

    def _prover(self, reported: Callable[[], None]) -> Callable[[bytes], Mapping[str, object]]:
        with failing_with(Code.REPORT):
            source = report.source_for(self._platform, self._report_source)

        def prove(data: bytes) -> Mapping[str, object]:
            with failing_with(Code.REPORT):
                found = source.get(data)
                reported()
                if self._platform.tee is Tee.TDX:
                    return evidence.tdx_to_json(found.report, report.event_log())
                return evidence.snp_to_json(found.report, found.table)

        return prove

    def _connect(self) -> socket.socket:
        stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            stream.settimeout(CONNECT_S)
            stream.connect((self._pin.cid, self._pin.port))
        except OSError:
            stream.close()
            raise
        return stream


def seconds_from_now(seconds: float) -> float:
    """A deadline as `time.monotonic()` counts."""
    return time.monotonic() + seconds
