"""The secure processor of a simulated SEV platform: one object a launch, in the states of the real one.

    launch_start -> measure -> inject (as often as wanted) -> finish

Source: AMD 55766 chapter 6 (LAUNCH_START, LAUNCH_MEASURE, LAUNCH_SECRET, LAUNCH_FINISH) and its table of status codes.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

from jindiskd.attest.model import MalformedEvidence
from jindiskd.attest.sev import (
    HEADER_BYTES,
    LAUNCH_SECRET,
    MEASUREMENT_BYTES,
    SESSION_BYTES,
    LaunchReport,
    counter_mode,
    expected_measurement,
    transport_keys,
)
from jindiskd.errors import JindiskError
from jindiskd.sim.sev_platform import API, BUILD, SevPlatformKeys

INVALID_STATE, INVALID_LENGTH, BAD_MEASUREMENT, INVALID_PARAMETER = 1, 4, 11, 22


class SevRefused(JindiskError, code="SevRefused"):
    """The simulated secure processor refuses a command, as the real one would."""

    def __init__(self, command: str, status: int) -> None:
        """`status` is the firmware's number."""
        super().__init__(f"{command} ret=1 fw_error={status}")
        self.status = status


class SevLaunch:
    """One launch."""

    def __init__(
        self,
        platform: SevPlatformKeys,
        *,
        policy: int,
        dh_certificate: bytes,
        session: bytes,
        random: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """LAUNCH_START with the owner's session.

        Args:
            platform: whose processor this is.
            policy: as the machine is started with; the session's MAC must be over the same.
            dh_certificate: 2084 bytes.
            session: 128 bytes.
            random: source of the measurement's nonce.

        Raises:
            SevRefused: the session is not one for this platform and policy.
        """
        self.policy, self._random = policy, random
        if len(session) != SESSION_BYTES:
            raise SevRefused("LAUNCH_START", INVALID_PARAMETER)
        try:
            shared = platform.shared_secret(dh_certificate)
        except (MalformedEvidence, ValueError) as exc:
            raise SevRefused("LAUNCH_START", INVALID_PARAMETER) from exc
        nonce, wrapped, iv = session[:16], session[16:48], session[48:64]
        kek, kik = transport_keys(shared, nonce)
        unwrapped = counter_mode(kek, iv, wrapped)
        self._encryption, self._integrity = unwrapped[:16], unwrapped[16:]
        for key, message, mac in (
            (kik, wrapped, session[64:96]),
            (self._integrity, policy.to_bytes(4, "little"), session[96:]),
        ):
            if not hmac.compare_digest(hmac.digest(key, message, "sha256"), mac):
                raise SevRefused("LAUNCH_START", BAD_MEASUREMENT)
        self._measurement = b""

    @property
    def measurement(self) -> bytes:
        """The measurement that was taken; empty before."""
        return self._measurement

    def measure(self, launch_digest: bytes) -> bytes:
        """LAUNCH_MEASURE over the digest (32 bytes) of what was loaded: MAC 32, nonce 16. Once."""
        if self._measurement:
            raise SevRefused("LAUNCH_MEASURE", INVALID_STATE)
        nonce = self._random(16)
        report = LaunchReport(
            measurement=bytes(MEASUREMENT_BYTES), api_major=API[0], api_minor=API[1], build=BUILD, policy=self.policy
        )
        self._measurement = expected_measurement(self._integrity, report, launch_digest, nonce) + nonce
        return self._measurement

    def open_secret(self, header: bytes, payload: bytes) -> bytes:
        """LAUNCH_SECRET: the plain table that goes into guest memory.

        Raises:
            SevRefused: before the measurement, or the packet is not for this launch or was altered.
        """
        if not self._measurement:
            raise SevRefused("LAUNCH_SECRET", INVALID_STATE)
        if len(header) != HEADER_BYTES or len(payload) % 16 or not payload:
            raise SevRefused("LAUNCH_SECRET", INVALID_LENGTH)
        flags, iv, mac = header[:4], header[4:20], header[20:]
        length = len(payload).to_bytes(4, "little")
        message = LAUNCH_SECRET + flags + iv + length + length + payload + self._measurement[:32]
        if not hmac.compare_digest(hmac.digest(self._integrity, message, "sha256"), mac):
            raise SevRefused("LAUNCH_SECRET", BAD_MEASUREMENT)
        return counter_mode(self._encryption, iv, payload)
