"""Keys and policies on the bus: an object of each for every image whose keys are known. Never a key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from jindiskd.bus.contract import ROOT_PATH, path_label
from jindiskd.bus.jobs import microseconds
from jindiskd.bus.keyfd import document_descriptor, read_secret
from jindiskd.bus.objects import Object, ObjectPath, Options, Row, number, text
from jindiskd.bus.peers import Caller, Descriptor
from jindiskd.bus.ports import Keys, KeyView, Policies
from jindiskd.bus.server import Server
from jindiskd.errors import InvalidArgument, JindiskError, NotFound

log = structlog.get_logger(__name__)
REASON_LIMIT = 500
HANDOVER_LIMIT_BYTES = 1 << 20
INTERVAL_S = 0.2
"""Between two looks at the keys: guests decide how often something is written."""


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


class KeyObject(Object, spec="org.jindisk1.Key"):
    """The keys of one image."""

    def __init__(self, view: KeyView, keys: Keys, on_bus: KeysOnBus) -> None:
        self._view, self._keys, self._on_bus = view, keys, on_bus

    def polkit_details(self) -> Mapping[str, str]:
        """The image's name, for the question."""
        return {"image": self._view.name}

    def _update(self, view: KeyView) -> None:
        old, self._view = self._view, view
        self.changed(*(["State"] if old.state != view.state else []), *(["Name"] if old.name != view.name else []))

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

    async def accept_rollback(self, caller: Caller, reason: str, options: Options) -> None:  # noqa: ARG002 (as above)
        """Take whatever state its volumes are in, once."""
        await self._keys.accept_rollback(self._view.image_id, bounded_reason(reason), user(caller))

    async def rotate(self, caller: Caller, handover: Descriptor, options: Options) -> None:  # noqa: ARG002 (as above)
        """Replace them by others."""
        with await read_secret(handover, limit_bytes=HANDOVER_LIMIT_BYTES) as document:
            await self._keys.rotate(self._view.image_id, bytes(document.reveal()), user(caller))
        await self._on_bus.refresh()

    async def export(self, caller: Caller, options: Options) -> Descriptor:
        """Seal them for a broker."""
        data = await self._keys.export(self._view.image_id, text(options, "card"), user(caller))
        return document_descriptor("handover", data)

    @property
    def image_id(self) -> str:
        """Identity of the image."""
        return self._view.image_id

    @property
    def name(self) -> str:
        """Its name."""
        return self._view.name

    @property
    def platform(self) -> str:
        """What it was built for."""
        return self._view.platform

    @property
    def simulated(self) -> bool:
        """Whether that is simulated."""
        return self._view.simulated

    @property
    def state(self) -> str:
        """Whether they are released."""
        return self._view.state

    @property
    def created(self) -> int:
        """When the image was built."""
        return microseconds(self._view.created)


class PolicyObject(Object, spec="org.jindisk1.Policy"):
    """By what the keys of one image are released."""

    def __init__(self, view: KeyView, policies: Policies, on_bus: KeysOnBus) -> None:
        self._view, self._policies, self._on_bus = view, policies, on_bus

    def polkit_details(self) -> Mapping[str, str]:
        """The image's name, for the question."""
        return {"image": self._view.name}

    def _update(self, view: KeyView) -> None:
        old, self._view = self._view, view
        digest = ["Digest"] if old.policy_digest != view.policy_digest else []
        self.changed(*digest, *(["Name"] if old.name != view.name else []))

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
    def image_id(self) -> str:
        """Identity of the image."""
        return self._view.image_id

    @property
    def name(self) -> str:
        """Its name."""
        return self._view.name

    @property
    def digest(self) -> str:
        """Which policy it is."""
        return self._view.policy_digest


class KeysOnBus:
    """Keeps the objects of keys and policies as the key store is; `also` is awaited when a state changed."""

    def __init__(self, server: Server, keys: Keys, policies: Policies, also: Callable[[], Awaitable[None]]) -> None:
        self._server, self._keys, self._policies, self._also = server, keys, policies, also
        self._objects: dict[str, tuple[KeyObject, PolicyObject]] = {}
        self._views: dict[str, KeyView] = {}
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow what others change from now on."""
        self._keys.subscribe(self._changed.set)
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Follow no longer."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self.refresh()
            except JindiskError as exc:
                log.warning("the keys could not be looked at", error=str(exc))
            await asyncio.sleep(INTERVAL_S)

    async def refresh(self) -> None:
        """After a change: look at the store again, and at what else shows the states of keys."""
        before = {image_id: view.state for image_id, view in self._views.items()}
        await self.look()
        if before != {image_id: view.state for image_id, view in self._views.items()}:
            await self._also()

    async def look(self) -> None:
        """Look at the store again: export what is new, take off what is gone, tell of changes."""
        async with self._lock:  # two looks at once could tell the older state last
            self._views = {view.image_id: view for view in await self._keys.views()}
            for image_id in self._objects.keys() - self._views.keys():
                del self._objects[image_id]
                self._server.unexport(key_path(image_id))
                self._server.unexport(policy_path(image_id))
            for image_id, view in self._views.items():
                if image_id in self._objects:
                    for there in self._objects[image_id]:
                        there._update(view)  # noqa: SLF001 (one thing in two classes)
                    continue
                key, policy = KeyObject(view, self._keys, self), PolicyObject(view, self._policies, self)
                self._objects[image_id] = (key, policy)
                self._server.export(key_path(image_id), key)
                self._server.export(policy_path(image_id), policy)

    def find(self, name: str) -> KeyView:
        """The keys of the image with this name or id.

        Raises:
            NotFound: there are none.
        """
        for view in self._views.values():
            if name in {view.name, view.image_id}:
                return view
        raise NotFound("key of image", name)
