"""The dispatcher: incoming calls to bus objects, answers and errors back, the standard interfaces, introspection.

A call is checked against the contract, its caller is identified, polkit is asked, the handler runs in a task of its
own. What is raised on purpose goes out under its name; anything else is logged with a reference, and the caller gets
that reference alone: no text, path or traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from jindiskd.bus import faults
from jindiskd.bus.contract import DOCTYPE, ERROR_PREFIX, FDO, Method, standard
from jindiskd.bus.faults import BusFault
from jindiskd.bus.incoming import close_all
from jindiskd.bus.lib import Message, MessageFlag, MessageType
from jindiskd.bus.objects import Object, as_variant
from jindiskd.bus.outgoing import MessageTooLarge
from jindiskd.bus.peers import Authorize, Caller, Descriptor, Descriptors, Peers, Presence
from jindiskd.bus.transport import Connection
from jindiskd.errors import Internal, InvalidArgument, JindiskError

log = structlog.get_logger(__name__)
CALLS = 256
"""Calls under way in all …"""
CALLS_PER_PEER = 32
"""… for one peer …"""
CALLS_PER_USER = 64
"""… and for one user but root, who has as many peers as he likes, and who may let polkit wait for a password."""
ERROR_TEXT_LIMIT = 1024
MANAGER = FDO + ".ObjectManager"
Answer = tuple[str, list[Any], list[int]]
"""Signature, body, descriptors (closed after sending)."""


class Server:
    """The objects below one root path, and the calls to them."""

    def __init__(self, bus: Connection, *, root: str, authorize: Authorize) -> None:
        self.bus, self.root, self.peers = bus, root, Peers(bus)
        self._authorize = authorize
        self._objects: dict[str, dict[str, Object]] = {root: {}}
        self._tasks: set[asyncio.Task[None]] = set()
        self._per_peer: dict[str, int] = {}
        self._per_user: dict[int, int] = {}
        self._closing = False
        bus.add_message_handler(self._on_message)

    async def start(self) -> None:
        """Subscribe to what is needed before the first call can come; the bus name is requested after that."""
        await self.peers.start()

    async def close(self) -> None:
        """Refuse new calls, end those under way."""
        self._closing = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def export(self, path: str, *objects: Object) -> None:
        """Put objects on a path, one for each interface."""
        there = self._objects.setdefault(path, {})
        for item in objects:
            if item.contract.name in there:
                raise ValueError(f"{item.contract.name} is already on {path}")
            there[item.contract.name] = item
            item.attach(self, path)
        if path != self.root:
            added = {item.contract.name: item.values() for item in objects}
            self.emit(self.root, MANAGER, "InterfacesAdded", "oa{sa{sv}}", [path, added])

    def unexport(self, path: str) -> None:
        """Take everything off a path."""
        gone = self._objects.pop(path, {})
        for item in gone.values():
            item.flush()
            item.attach(None, "")
        if gone and path != self.root:
            self.emit(self.root, MANAGER, "InterfacesRemoved", "oas", [path, list(gone)])

    def emit(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> None:
        """Broadcast a signal."""
        self._send(Message.new_signal(path, interface, member, signature, body))

    def _send(self, message: Any) -> None:
        self.bus.send(message)  # a future that fails only when the connection ends, and the daemon with it

    def _reply(self, call: Any, reply: Any) -> None:
        if not call.flags & MessageFlag.NO_REPLY_EXPECTED:
            self._send(reply)

    def _error(self, call: Any, name: str, text: str) -> None:
        self._reply(call, Message.new_error(call, name, text[:ERROR_TEXT_LIMIT]))

    def _on_message(self, message: Any) -> bool:
        """Take a message; True keeps the library's own dispatch away from it."""
        if message.message_type is MessageType.SIGNAL:
            self.peers.on_signal(message)
            return False
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        busy = self._per_peer.get(message.sender, 0)
        refusal = ""
        if message.oversized:
            refusal = "the request is too large"
        elif self._closing:
            refusal = "the service is stopping"
        elif len(self._tasks) >= CALLS or busy >= CALLS_PER_PEER:
            refusal = "too many calls are under way"
        if refusal:
            close_all(message.unix_fds or ())
            self._error(message, faults.LIMITS_EXCEEDED, refusal)
            return True
        self._per_peer[message.sender] = busy + 1
        presence = self.peers.presence(message.sender)
        task = asyncio.get_running_loop().create_task(self._run(message, presence))
        self._tasks.add(task)  # the loop alone would not keep it alive
        task.add_done_callback(self._tasks.discard)
        return True

    async def _run(self, message: Any, presence: Presence) -> None:
        descriptors = Descriptors(message.unix_fds or ())
        try:
            signature, body, fds = await self._dispatch(message, descriptors, presence)
            try:
                self._reply(message, Message.new_method_return(message, signature, body, fds))
            finally:
                close_all(fds)  # the writer has copies of its own
        except BusFault as exc:
            self._error(message, exc.name, exc.text)
        except MessageTooLarge:
            self._error(message, faults.LIMITS_EXCEEDED, "the answer is too large for the bus: ask for less")
        except JindiskError as exc:
            self._error(message, ERROR_PREFIX + exc.code, str(exc))
        except asyncio.CancelledError:
            self._error(message, faults.NO_REPLY, "the service is stopping")
            raise
        except Exception:
            reference = os.urandom(4).hex()
            log.exception("fault in a bus method", member=message.member, reference=reference)
            self._error(message, ERROR_PREFIX + Internal.code, str(Internal(reference)))
        finally:
            descriptors.close()
            presence.end()
            left = self._per_peer[message.sender] - 1
            if left:
                self._per_peer[message.sender] = left
            else:
                del self._per_peer[message.sender]

    async def _dispatch(self, message: Any, descriptors: Descriptors, presence: Presence) -> Answer:
        interface, key = message.interface, (message.interface, message.member, message.signature)
        if key == (FDO + ".Introspectable", "Introspect", ""):
            return "s", [self._introspect(message.path)], []
        if key == (FDO + ".Peer", "Ping", ""):
            return "", [], []
        if key == (FDO + ".Peer", "GetMachineId", ""):
            return "s", [Path("/etc/machine-id").read_text(encoding="ascii").strip()], []
        here = self._objects.get(message.path)
        if here is None:
            raise BusFault(faults.UNKNOWN_OBJECT, "there is no such object")
        if message.path == self.root and key == (MANAGER, "GetManagedObjects", ""):
            return "a{oa{sa{sv}}}", [self._managed()], []
        if interface == FDO + ".Properties":
            return "a{sv}" if message.member == "GetAll" else "v", [self._property(message, here)], []
        if interface is None:  # allowed by the specification
            interface = next((name for name in here if message.member in here[name].contract.methods), None)
        elif interface in standard():
            raise BusFault(faults.UNKNOWN_METHOD, "there is no such method")
        elif interface not in here:
            raise BusFault(faults.UNKNOWN_INTERFACE, "the object has no such interface")
        method = here[interface].contract.methods.get(message.member) if interface else None
        if method is None:
            raise BusFault(faults.UNKNOWN_METHOD, "there is no such method")
        return await self._call(message, here[interface], method, descriptors, presence)

    async def _call(
        self, message: Any, target: Object, method: Method, descriptors: Descriptors, presence: Presence
    ) -> Answer:
        if len(descriptors) > sum(argument.type == "h" for argument in method.takes):
            # They would be held until polkit has answered, and there is an end to how many a process can hold.
            raise BusFault(faults.INVALID_ARGS, f"{method.name} takes fewer file descriptors")
        if message.signature != method.in_signature:
            raise BusFault(faults.INVALID_ARGS, f"{method.name} takes ({method.in_signature})")
        arguments = [
            _argument(method, argument.type, value, descriptors)
            for argument, value in zip(method.takes, message.body, strict=True)
        ]
        uid = await self.peers.uid(message.sender)
        if presence.left:  # the answer about it was on its way before it went
            raise BusFault(faults.ACCESS_DENIED, "the caller has left")
        caller = Caller(
            uid=uid,
            interactive=bool(message.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION),
            presence=presence,
            authorize=self._authorize,
        )
        action = method.action
        if method.action_unless_owner and caller.uid != target.job_owner():
            action = method.action_unless_owner
        with structlog.contextvars.bound_contextvars(caller=caller.sender, uid=uid), self._one_more_of(uid):
            if action:
                await caller.authorize(action, target.polkit_details())
            result = await target.handler(method.name)(caller, *arguments)
        results = () if not method.gives else (result,) if len(method.gives) == 1 else result
        fds: list[int] = []
        body = [_result(gives.type, value, fds) for gives, value in zip(method.gives, results, strict=True)]
        return method.out_signature, body, fds

    @contextlib.contextmanager
    def _one_more_of(self, uid: int) -> Iterator[None]:
        """A call of this user is under way, unless too many are."""
        busy = self._per_user.get(uid, 0)
        if uid and busy >= CALLS_PER_USER:
            raise BusFault(faults.LIMITS_EXCEEDED, "too many calls of this user are under way")
        self._per_user[uid] = busy + 1
        try:
            yield
        finally:
            self._per_user[uid] -= 1
            if not self._per_user[uid]:
                del self._per_user[uid]

    def _managed(self) -> dict[str, Any]:
        return {
            path: {name: item.values() for name, item in objects.items()}
            for path, objects in self._objects.items()
            if path != self.root
        }

    def _property(self, message: Any, here: Mapping[str, Object]) -> Any:
        """Get, GetAll and Set of the Properties interface."""
        if {"Get": "ss", "GetAll": "s", "Set": "ssv"}.get(message.member) != message.signature:
            raise BusFault(faults.UNKNOWN_METHOD, "there is no such method")
        name = message.body[0]
        if message.member == "GetAll" and (not name or name in standard()):
            return {} if name else {key: value for item in here.values() for key, value in item.values().items()}
        if name not in here:
            raise BusFault(faults.UNKNOWN_INTERFACE, "the object has no such interface")
        values = here[name].values()
        if message.member == "GetAll":
            return values
        if message.body[1] not in values:
            raise BusFault(faults.UNKNOWN_PROPERTY, "there is no such property")
        if message.member == "Set":
            raise BusFault(faults.PROPERTY_READ_ONLY, "the property is read-only")
        return values[message.body[1]]

    def _introspect(self, path: str) -> str:
        here, below = self._objects.get(path), path.rstrip("/") + "/"
        children = sorted({other[len(below) :].split("/")[0] for other in self._objects if other.startswith(below)})
        if here is None and not children:
            raise BusFault(faults.UNKNOWN_OBJECT, "there is no such object")
        node = ET.Element("node")
        if here is not None:
            node.extend(item.element for name, item in standard().items() if name != MANAGER or path == self.root)
            node.extend(item.contract.element for item in here.values())
        for child in children:
            ET.SubElement(node, "node", name=child)
        return DOCTYPE + ET.tostring(node, encoding="unicode")


def _argument(method: Method, kind: str, value: Any, descriptors: Descriptors) -> Any:
    if kind == "h":
        return descriptors.at(value)
    if kind == "a{sv}":
        return _options(method, value)
    return value


def _options(method: Method, given: Mapping[str, Any]) -> dict[str, object]:
    """Options as plain values; an unknown one is an error, so that a slip does not silently mean the default."""
    for name, variant in given.items():
        if name not in method.options:
            near = difflib.get_close_matches(name, method.options, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(method.options)) or 'none'}"
            raise InvalidArgument("option", name[:100], known)
        if variant.signature != method.options[name]:
            raise InvalidArgument("type of option", name, f"it is '{method.options[name]}'")
    return {name: variant.value for name, variant in given.items()}


def _result(kind: str, value: Any, fds: list[int]) -> Any:
    if kind == "h":
        assert isinstance(value, Descriptor)
        fds.append(value.take())
        return len(fds) - 1
    if kind == "a{sv}":
        return {name: as_variant(item) for name, item in value.items()}
    if kind == "aa{sv}":
        return [{name: as_variant(item) for name, item in row.items()} for row in value]
    if kind.startswith("a"):
        sequence: Sequence[Any] = value
        return [list(item) if isinstance(item, tuple) else item for item in sequence]
    return value
