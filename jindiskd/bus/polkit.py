"""Asks polkit whether a caller may do something; without polkit only root may.

The subject is always the caller's bus name: process ids are used again, bus names are not. There is no cache, polkit
has its own. (org.freedesktop.PolicyKit1.Authority, polkit reference manual.)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

import structlog

from jindiskd.bus.contract import FDO
from jindiskd.bus.faults import ACCESS_DENIED, INTERACTION_REQUIRED, BusFault
from jindiskd.bus.lib import Message, MessageType, Variant
from jindiskd.bus.peers import Caller
from jindiskd.bus.transport import Connection
from jindiskd.errors import NotAuthorized

log = structlog.get_logger(__name__)
NAME = "org.freedesktop.PolicyKit1"
ABSENT = frozenset(
    (
        FDO + ".Error.ServiceUnknown",
        FDO + ".Error.NameHasNoOwner",
        FDO + ".Error.Spawn.ServiceNotFound",
        FDO + ".Error.Spawn.ExecFailed",
        FDO + ".Error.Spawn.ChildExited",
        FDO + ".Error.Spawn.FileInvalid",
        "org.freedesktop.systemd1.NoSuchUnit",
        "org.freedesktop.systemd1.UnitMasked",
    )
)
ALLOW_USER_INTERACTION = 1
INTERACTIVE_TIMEOUT_S = 300
TIMEOUT_S = 20


class Authority:
    """The check that the dispatcher runs before a method that needs a right."""

    def __init__(self, bus: Connection) -> None:
        self._bus, self._ids = bus, itertools.count(1)

    async def _call(self, member: str, signature: str, body: list[Any], timeout_s: float) -> Any:
        return await self._bus.call(
            Message(
                destination=NAME,
                path="/org/freedesktop/PolicyKit1/Authority",
                interface=NAME + ".Authority",
                member=member,
                signature=signature,
                body=body,
            ),
            timeout_s=timeout_s,
        )

    async def __call__(self, caller: Caller, action: str, details: Mapping[str, str]) -> None:
        """Return if `caller` has the right; root always has.

        Raises:
            NotAuthorized: polkit says no.
            BusFault: a person would have to answer, the caller left, or polkit is not there.
        """
        if caller.uid == 0:
            return
        reply = await self._ask(caller, action, details)
        if reply.message_type is MessageType.ERROR:
            if reply.error_name in ABSENT:
                raise BusFault(ACCESS_DENIED, "only root may do this: polkit is not there to ask")
            log.error("polkit refused to answer", error=reply.error_name, action=action)
            raise BusFault(ACCESS_DENIED, "the authorisation could not be checked")
        allowed, challenge, _ = reply.body[0]
        if allowed:
            return
        if challenge:
            raise BusFault(INTERACTION_REQUIRED, f"{action} needs authentication, and nobody is there to ask")
        raise NotAuthorized(action)

    async def _ask(self, caller: Caller, action: str, details: Mapping[str, str]) -> Any:
        """Ask, and stop asking when the caller leaves while a person still types."""
        cancellation = f"jindiskd-{next(self._ids)}"
        subject = ["system-bus-name", {"name": Variant("s", caller.sender)}]
        flags = ALLOW_USER_INTERACTION if caller.interactive else 0
        timeout_s = INTERACTIVE_TIMEOUT_S if caller.interactive else TIMEOUT_S
        body = [subject, action, dict(details), flags, cancellation]
        left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        end_watch = caller.on_leave(lambda: None if left.done() else left.set_result(None))
        ask = asyncio.ensure_future(self._call("CheckAuthorization", "(sa{sv})sa{ss}us", body, timeout_s))
        try:
            await asyncio.wait({ask, left}, return_when=asyncio.FIRST_COMPLETED)
            if not ask.done():
                await self._call("CancelCheckAuthorization", "s", [cancellation], 5)
                raise BusFault(ACCESS_DENIED, "the caller has left")
            return ask.result()
        except TimeoutError as exc:
            raise BusFault(ACCESS_DENIED, "nobody answered the request for authentication") from exc
        finally:
            end_watch()
            left.cancel()
            ask.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await ask
