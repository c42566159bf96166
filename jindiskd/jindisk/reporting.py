"""What the keeper of the anchor is told, and when a process may no longer write (format document, section 13.2).

A refusal fences: the process writes nothing any more. No answer is no refusal, except where a commit must be reported
before it is acknowledged, and where a lease runs out. Messages are sent one at a time, so an older state never
overtakes a newer one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from jindiskd.base.anchor import State
from jindiskd.jindisk.anchor import Keeper, Reporting
from jindiskd.jindisk.errors import VolumeFenced


class Reporter:
    """The conversation of one session with its keeper."""

    def __init__(
        self,
        keeper: Keeper,
        reporting: Reporting,
        *,
        interval_s: float,
        lease_s: float,
        monotonic: Callable[[], float],
    ) -> None:
        """`lease_s`: fence when the keeper's last answer is older; 0 for no lease. Reports then come often enough."""
        self._keeper, self._reporting, self._monotonic = keeper, reporting, monotonic
        self._interval_s, self._lease_s = interval_s, lease_s
        self._told: State | None = None
        self._answered = self._last_report = monotonic()
        self._one_at_a_time = threading.RLock()
        self.fenced: str | None = None
        """Why the process gave up writing; None while it has not."""

    def fence(self, why: str) -> None:
        """End all writing; reads may go on."""
        self.fenced = self.fenced or why

    def check(self) -> None:
        """Raise `VolumeFenced` where nothing may be written any more."""
        if self.fenced is None and self._lease_s and self._monotonic() - self._answered > self._lease_s:
            self.fence("the lease ran out without an answer from the broker")
        if self.fenced is not None:
            raise VolumeFenced(self.fenced)

    def adopt(self, found: State, session_id: bytes) -> None:
        """The session begins from the state found. Raises `VolumeFenced`, and whatever the keeper raises.

        The first state of the session itself is due at the next tick: until it is told, the state that was found is
        acceptable again at the next start.
        """
        self._tell(lambda: self._keeper.adopt(found, session_id), found)
        self._last_report = self._monotonic() - self._interval_s

    def committed(self, state: State) -> None:
        """A state is durable and about to be acknowledged; tell it first where that is the policy.

        Raises:
            VolumeFenced: refused, or not answered: the state must not be acknowledged.
        """
        if self._reporting is not Reporting.COMMIT:
            return
        with self._one_at_a_time:
            if self._told == state:
                return
            try:
                self.report(state)
            except VolumeFenced:
                raise
            except Exception as exc:
                self.fence(f"the broker gives no answer ({exc})")
                raise VolumeFenced(self.fenced or "") from exc

    def report(self, state: State) -> None:
        """Tell a durable state. Raises `VolumeFenced`, and whatever the keeper raises."""
        self._tell(lambda: self._keeper.report(state), state)

    def close(self, state: State) -> None:
        """The session ended in this state. Raises `VolumeFenced`, and whatever the keeper raises."""
        self._tell(lambda: self._keeper.close(state), state)

    def tick(self, current: Callable[[], State | None]) -> None:
        """Report what is due by the clock; only a refusal has an effect, and it fences.

        Args:
            current: the state to report; None if there is nothing to report any more.
        """
        by_clock = self._reporting is Reporting.INTERVAL
        if not by_clock and not self._lease_s:
            return
        with self._one_at_a_time:
            state, now = current(), self._monotonic()
            # A lease is renewed in time for two more attempts, also by a session that has nothing new to tell.
            renewal_s = self._lease_s / 3 if self._lease_s else self._interval_s
            due = now - self._last_report >= min(self._interval_s, renewal_s)
            renew = self._lease_s > 0 and now - self._answered >= renewal_s
            new = by_clock and state != self._told
            if state is None or not due or not (new or renew) or self.fenced is not None:
                return
            self._last_report = now
            try:
                self.report(state)
            except Exception:  # noqa: BLE001 - no answer is no refusal: the next interval tries again, a lease may run out
                return

    def _tell(self, message: Callable[[], None], state: State) -> None:
        with self._one_at_a_time:
            asked = self._monotonic()
            try:
                message()
            except VolumeFenced as exc:
                self.fence(f"the broker refuses the session ({exc})")
                raise
            self._answered, self._told = asked, state
