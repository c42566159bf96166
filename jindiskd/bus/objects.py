"""Base class of everything on the bus: a Python class that is checked against the XML when it is defined.

A method `BuildImage(s name, h base, a{sv} options) → o job` is a Python method
`async def build_image(self, caller: Caller, name: str, base: Descriptor, options: Options) -> ObjectPath`;
a property is a Python property. A class whose members, parameter names or types differ from the XML cannot be imported.
"""

from __future__ import annotations

import asyncio
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, NewType, Protocol

from jindiskd.bus.contract import FDO, Interface, interface, snake
from jindiskd.bus.lib import Variant
from jindiskd.bus.peers import Caller, Descriptor

ObjectPath = NewType("ObjectPath", str)
Options = Mapping[str, object]
"""Options by name, checked against the contract: only known ones, of the right type."""
Row = Mapping[str, object]
"""A dictionary of plain values: str, bool, int, float, or a list of str."""

PYTHON: Mapping[str, object] = {
    "s": str,
    "o": ObjectPath,
    "b": bool,
    "u": int,
    "t": int,
    "d": float,
    "h": Descriptor,
    "as": Sequence[str],
    "ao": Sequence[ObjectPath],
    "a{sv}": Options,
    "aa{sv}": Sequence[Row],
    "a(sss)": Sequence[tuple[str, str, str]],
    "a(stss)": Sequence[tuple[str, int, str, str]],
}


def microseconds(moment: datetime) -> int:
    """A moment as the bus has it: microseconds since the epoch."""
    return round(moment.timestamp() * 1_000_000)


def text(options: Options, name: str) -> str:
    """A text option, or an empty string; the dispatcher has checked the type."""
    value = options.get(name, "")
    assert isinstance(value, str)
    return value


def number(options: Options, name: str) -> int | None:
    """A number option, or None; the dispatcher has checked the type."""
    value = options.get(name)
    assert value is None or isinstance(value, int)
    return value


class ContractMismatch(TypeError):
    """A class of bus objects differs from the XML it claims to implement."""


class Emitter(Protocol):
    """What an exported object needs of the server."""

    def emit(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> None:
        """Broadcast a signal."""


def as_variant(value: object) -> Any:
    """A plain value as the variant that clients find natural; integers are 64 bits."""
    if isinstance(value, bool):
        return Variant("b", value)
    if isinstance(value, int):
        return Variant("t" if value >= 0 else "x", value)
    if isinstance(value, float):
        return Variant("d", value)
    if isinstance(value, str):
        return Variant("s", value)
    if isinstance(value, list | tuple):
        return Variant("as", [str(item) for item in value])
    raise TypeError(f"{type(value).__name__} has no place in a dictionary on the bus")


class Object:
    """One interface of one object. Its handlers run in the event loop and must not block it."""

    contract: ClassVar[Interface]
    _server: Emitter | None = None
    _path: str = ""

    def __init_subclass__(cls, *, spec: str | Interface | None, **kwargs: object) -> None:
        """Check the class against interface `spec` of the contract, or one from elsewhere; None for a base class."""
        super().__init_subclass__(**kwargs)
        if spec is None:
            return
        cls.contract = interface(spec) if isinstance(spec, str) else spec
        expected = {snake(name) for name in (*cls.contract.methods, *cls.contract.properties)}
        public = {
            name
            for name, value in vars(cls).items()
            if not name.startswith("_") and isinstance(value, types.FunctionType | property) and name not in BASE_NAMES
        }
        if expected != public or expected & BASE_NAMES:
            raise ContractMismatch(f"{spec} and {cls.__name__} differ in {sorted(expected ^ public)}")
        for name, method in cls.contract.methods.items():
            _compare(cls.contract.name, name, vars(cls)[snake(name)], method.takes, tuple(a.type for a in method.gives))
        for name, prop in cls.contract.properties.items():
            getter = vars(cls)[snake(name)]
            if not isinstance(getter, property) or typing.get_type_hints(getter.fget)["return"] != PYTHON[prop.type]:
                raise ContractMismatch(f"property {spec}.{name} is not a Python property of type {prop.type}")

    @property
    def bus_path(self) -> ObjectPath:
        """Where it is exported."""
        return ObjectPath(self._path)

    def attach(self, server: Emitter | None, path: str) -> None:
        """Called by the server when the object is exported, and with None when it goes."""
        self._server, self._path = server, path

    def polkit_details(self) -> Mapping[str, str]:
        """What fills the placeholders in the polkit messages of this object's actions."""
        return {}

    def job_owner(self) -> int | None:
        """User id that needs no right for what only others need one for."""
        return None

    def handler(self, member: str) -> Any:
        """The Python method behind a method of the contract."""
        return getattr(self, snake(member))

    def values(self) -> dict[str, Any]:
        """All properties, as on the bus."""
        return {name: self._value(name) for name in self.contract.properties}

    def _value(self, name: str) -> Any:
        """A property, as on the bus."""
        kind, value = self.contract.properties[name].type, getattr(self, snake(name))
        if kind == "aa{sv}":
            value = [{key: as_variant(item) for key, item in row.items()} for row in value]
        return Variant(kind, value)

    def changed(self, *names: str) -> None:
        """Tell of new values of properties (bus names); what happens in one turn of the loop is one signal."""
        if self._server is None:
            return
        pending: set[str] = self.__dict__.setdefault("_pending", set())
        if not pending:
            asyncio.get_running_loop().call_soon(self.flush)
        pending.update(names)

    def flush(self) -> None:
        """Send what `changed` collected."""
        names: set[str] = self.__dict__.pop("_pending", set())
        if not names or self._server is None:
            return
        known = self.contract.properties
        new = {
            name: self._value(name)
            for name in sorted(names)
            if known[name].emits == "true"
        }
        old = sorted(name for name in names if known[name].emits == "invalidates")
        if new or old:
            body = [self.contract.name, new, old]
            self._server.emit(self._path, FDO + ".Properties", "PropertiesChanged", "sa{sv}as", body)

    def signal(self, member: str, *arguments: Any) -> None:
        """Broadcast a signal of the contract, after the property changes that came before it."""
        if self._server is not None:
            self.flush()
            signature = self.contract.signals[member]
            self._server.emit(self._path, self.contract.name, member, signature, list(arguments))


BASE_NAMES = frozenset(name for name in vars(Object) if not name.startswith("_"))


def _compare(spec: str, name: str, handler: Any, takes: Sequence[Any], gives: tuple[str, ...]) -> None:
    """Compare one handler with one method of the XML."""
    if not inspect.iscoroutinefunction(handler):
        raise ContractMismatch(f"{spec}.{name} is not an async method")
    hints = typing.get_type_hints(handler)
    returned = hints.pop("return", None)
    wanted = {"caller": Caller, **{snake(argument.name): PYTHON[argument.type] for argument in takes}}
    parameters = list(inspect.signature(handler).parameters)[1:]
    if parameters != list(wanted) or hints != wanted:
        raise ContractMismatch(f"{spec}.{name} takes {wanted}, not {hints}")
    if not gives:
        result: object = type(None)
    elif len(gives) == 1:
        result = PYTHON[gives[0]]
    else:
        result = tuple[tuple(PYTHON[kind] for kind in gives)]  # type: ignore[misc]  # a type made at run time
    if returned != result:
        raise ContractMismatch(f"{spec}.{name} gives {result}, not {returned}")
