"""Keys and policies on the bus: an object of each for every image whose keys are known. Never a key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from jindiskd.bus.collection import Collection, Follower, Item, named
from jindiskd.bus.contract import ROOT_PATH, path_label
from jindiskd.bus.keyfd import document_descriptor, read_secret
from jindiskd.bus.objects import ObjectPath, Options, Row, number, text
from jindiskd.bus.peers import Caller, Descriptor
from jindiskd.bus.ports import Keys, KeyView, Policies
from jindiskd.bus.server import Server
from jindiskd.errors import InvalidArgument

REASON_LIMIT = 500
HANDOVER_LIMIT_BYTES = 1 << 20


def key_path(image_id: str) -> ObjectPath:
    """Where the keys of an image are exported."""
    return ObjectPath(f"{ROOT_PATH}/key/{path_label(image_id)}")


def policy_path(image_id: str) -> ObjectPath:
    """Where the policy of an image is exported."""
    return ObjectPath(f"{ROOT_PATH}/policy/{path_label(image_id)}")


def user(caller: Caller) -> str:
    """A caller as the audit log names it."""
    return f"user {caller.uid}"


def bounded_reason(reason: str) -> str:
    """A reason for the audit log, as it is to be kept.

    Raises:
        InvalidArgument: it is too long, or has characters that are not for a line.
    """
    if len(reason) > REASON_LIMIT or not reason.isprintable():
        remedy = f"give one line of printable text, {REASON_LIMIT} characters at most"
        raise InvalidArgument("reason", f"{len(reason)} characters", remedy)
    return reason


class KeyObject(Item[KeyView], spec="org.jindisk1.Key", view=KeyView):
    """The keys of one image."""

    def __init__(self, view: KeyView, keys: Keys, on_bus: KeysOnBus) -> None:
        super().__init__(view)
        self._keys, self._on_bus = keys, on_bus

    def polkit_details(self) -> Mapping[str, str]:
        """The image's name, for the question."""
        return {"image": self._view.name}

    async def describe(self, caller: Caller, options: Options) -> tuple[Options, Sequence[Row]]:  # noqa: ARG002 (contract)
        """What is known of them."""
        return await self._keys.describe(self._view.image_id)

    async def revoke(self, caller: Caller, options: Options) -> None:  # noqa: ARG002 (as above)
        """Stop their release."""
        await self._keys.revoke(self._view.image_id, user(caller))
        await self._on_bus.refresh()

    async def reinstate(self, caller: Caller, options: Options) -> None:  # noqa: ARG002 (as above)
        """Allow it again."""
        await self._keys.reinstate(self._view.image_id, user(caller))
        await self._on_bus.refresh()

    async def accept_rollback(self, caller: Caller, reason: str, options: Options) -> None:
        """Take whatever state its volumes are in, once."""
        volume = text(options, "volume")
        await self._keys.accept_rollback(self._view.image_id, bounded_reason(reason), user(caller), volume)

    async def rotate(self, caller: Caller, handover: Descriptor, options: Options) -> None:  # noqa: ARG002 (as above)
        """Replace them by others."""
        with await read_secret(handover, limit_bytes=HANDOVER_LIMIT_BYTES) as document:
            await self._keys.rotate(self._view.image_id, bytes(document.reveal()), user(caller))
        await self._on_bus.refresh()

    async def export(self, caller: Caller, options: Options) -> Descriptor:
        """Seal them for a broker."""
        data = await self._keys.export(self._view.image_id, text(options, "card"), user(caller))
        return document_descriptor("handover", data)


class PolicyObject(Item[KeyView], spec="org.jindisk1.Policy", view=KeyView):
    """By what the keys of one image are released."""

    def __init__(self, view: KeyView, policies: Policies, on_bus: KeysOnBus) -> None:
        super().__init__(view)
        self._policies, self._on_bus = policies, on_bus

    def polkit_details(self) -> Mapping[str, str]:
        """The image's name, for the question."""
        return {"image": self._view.name}

    async def get(self, caller: Caller, options: Options) -> str:  # noqa: ARG002 (the contract's arguments)
        """The document."""
        return await self._policies.policy(self._view.image_id, set_only=options.get("set-only") is True)

    async def set(self, caller: Caller, policy: str, options: Options) -> bool:  # noqa: ARG002 (as above)
        """Replace it."""
        changed = await self._policies.set_policy(self._view.image_id, policy, user(caller))
        await self._on_bus.refresh()
        return changed

    async def check(self, caller: Caller, options: Options) -> tuple[int, Sequence[Row]]:  # noqa: ARG002 (as above)
        """Try one on a refusal."""
        wanted = text(options, "policy") if "policy" in options else None
        return await self._policies.check_policy(self._view.image_id, text=wanted, row=number(options, "row"))

    @property
    def digest(self) -> str:
        """Which policy it is."""
        return self._view.policy_digest


class KeysOnBus:
    """Keeps the objects of keys and policies as the key store is; `also` is awaited when a state changed."""

    def __init__(self, server: Server, keys: Keys, policies: Policies, also: Callable[[], Awaitable[None]]) -> None:
        self._keys, self._also = keys, also
        self._views: dict[str, KeyView] = {}
        self._lock = asyncio.Lock()
        self._shown_keys = Collection[KeyView, KeyObject](
            server,
            identity=lambda view: view.image_id,
            path=key_path,
            make=lambda view: KeyObject(view, keys, self),
        )
        self._shown_policies = Collection[KeyView, PolicyObject](
            server,
            identity=lambda view: view.image_id,
            path=policy_path,
            make=lambda view: PolicyObject(view, policies, self),
        )
        self._follower = Follower(self.refresh, "the keys")

    def start(self) -> None:
        """Follow what others change from now on."""
        self._keys.subscribe(self._follower.news)
        self._follower.start()

    async def close(self) -> None:
        """Follow no longer."""
        await self._follower.close()

    async def refresh(self) -> None:
        """After a change: look at the store again, and at what else shows the states of keys."""
        before = {image_id: view.state for image_id, view in self._views.items()}
        await self.look()
        if before != {image_id: view.state for image_id, view in self._views.items()}:
            await self._also()

    async def look(self) -> None:
        """Look at the store again, and show keys and policies as they are."""
        async with self._lock:  # two looks at once could tell the older state last
            self._views = {view.image_id: view for view in await self._keys.views()}
            self._shown_keys.show(self._views.values())
            self._shown_policies.show(self._views.values())

    def find(self, name: str) -> KeyView:
        """The keys of the image with this name or id.

        Raises:
            NotFound: there are none.
        """
        return named("key of image", name, self._views, lambda view: view.name)
