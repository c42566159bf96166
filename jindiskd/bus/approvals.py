"""Guests that wait for a person, on the bus: an object for each launch that waits, or whose approval still counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from jindiskd.bus.collection import Collection, Follower, Item
from jindiskd.bus.contract import ROOT_PATH
from jindiskd.bus.keys import user
from jindiskd.bus.objects import ObjectPath, Options
from jindiskd.bus.peers import Caller
from jindiskd.bus.ports import Approvals, ApprovalView
from jindiskd.bus.server import Server

SOONEST_S = 1.0
"""Until the next look after one at what is about to end: the store's clock may be another."""


def approval_path(number: str) -> ObjectPath:
    """Where an approval is exported."""
    return ObjectPath(f"{ROOT_PATH}/approval/{number}")


class ApprovalObject(Item[ApprovalView], spec="org.jindisk1.Approval", view=ApprovalView):
    """One launch of a guest."""

    def __init__(self, view: ApprovalView, approvals: Approvals, on_bus: ApprovalsOnBus) -> None:
        super().__init__(view)
        self._approvals, self._on_bus = approvals, on_bus

    def polkit_details(self) -> Mapping[str, str]:
        """Who wants what, for the question."""
        what = f"the guest at {self._view.peer}" + (" (simulated)" if self._view.simulated else "")
        return {"guest": what, "image": self._view.image or self._view.image_id}

    async def approve(self, caller: Caller, options: Options) -> None:  # noqa: ARG002 (the contract's arguments)
        """Let it have its keys."""
        await self._decide(caller, approve=True)

    async def deny(self, caller: Caller, options: Options) -> None:  # noqa: ARG002 (as above)
        """Take it off the list."""
        await self._decide(caller, approve=False)

    async def _decide(self, caller: Caller, *, approve: bool) -> None:
        try:
            await self._approvals.decide(self._view.number, approve=approve, by=user(caller))
        finally:
            await self._on_bus.look()

    @property
    def state(self) -> str:
        """Whether somebody has approved it."""
        return "approved" if self._view.granted else "waiting"


class ApprovalsOnBus:
    """Keeps the objects of approvals as the key store is. `announce(member, *arguments)` sends a manager's signal."""

    def __init__(
        self,
        server: Server,
        approvals: Approvals,
        subscribe: Callable[[Callable[[], None]], None],
        announce: Callable[..., None],
    ) -> None:
        """`subscribe` has a function called when the store may have changed."""
        self._approvals, self._subscribe, self._announce = approvals, subscribe, announce
        self._lock = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._follower = Follower(self.look, "the approvals")
        self._shown = Collection[ApprovalView, ApprovalObject](
            server,
            identity=lambda view: str(view.number),
            path=approval_path,
            make=lambda view: ApprovalObject(view, approvals, self),
        )

    async def start(self) -> None:
        """Show those that are there, and follow them from now on."""
        self._subscribe(self._follower.news)
        await self.look()
        self._follower.start()

    async def close(self) -> None:
        """Follow them no longer."""
        self._stop_timer()
        await self._follower.close()

    async def look(self) -> None:
        """Look at the store again, and show the approvals as they are; again when the first of them ends."""
        async with self._lock:  # two looks at once could tell the older state last
            views = await self._approvals.approvals()
            for view in self._shown.show(views):
                self._announce("ApprovalNew", view.number, approval_path(str(view.number)))
            self._stop_timer()
            if views:
                left = min(view.expires.timestamp() for view in views) - time.time()
                self._timer = asyncio.get_running_loop().call_later(max(left, SOONEST_S), self._follower.news)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
