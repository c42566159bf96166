"""Objects on the bus that show things of one kind, kept as the things are; and looks after news, not too many."""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Generic, TypeVar

import structlog

from jindiskd.bus.contract import Interface, interface, snake
from jindiskd.bus.objects import Object, ObjectPath, microseconds
from jindiskd.bus.server import Server
from jindiskd.errors import JindiskError, NotFound

log = structlog.get_logger(__name__)
INTERVAL_S = 0.2
"""Between two looks after news: guests decide how often something is written."""
V = TypeVar("V")


def _shown(name: str, hint: object) -> property:
    """A property of the view's field: moments as the bus has them, bytes in hexadecimal, all else as it is."""
    given, told = FORMS.get(hint, (hint, lambda value: value))

    def get(self: Item[Any]) -> Any:
        return told(getattr(self._view, name))

    get.__annotations__["return"] = given
    return property(get)


FORMS: Mapping[object, tuple[object, Callable[[Any], object]]] = {
    datetime: (int, microseconds),
    bytes: (str, bytes.hex),
}


class Item(Object, Generic[V], spec=None):
    """An object that shows a view of one thing: a value that is replaced when the thing has changed.

    A property of the contract that the class does not define shows the view's field of that name.
    """

    def __init_subclass__(
        cls, *, spec: str | Interface | None, view: type[Any] | None = None, **kwargs: object
    ) -> None:
        """`view` is the class of the views, where fields of it are shown; all is checked as `Object` says."""
        if view is not None and spec is not None:
            hints = typing.get_type_hints(view)
            contract = interface(spec) if isinstance(spec, str) else spec
            for name in map(snake, contract.properties):
                if name not in vars(cls) and name in hints:
                    setattr(cls, name, _shown(name, hints[name]))
        super().__init_subclass__(spec=spec, **kwargs)

    def __init__(self, view: V) -> None:
        self._view = view

    def replace_view(self, view: V) -> None:
        """Show this view from now on, and tell of the properties that differ."""
        if view == self._view:
            return
        before = self.values()
        self._view = view
        self.changed(*(name for name, now in self.values().items() if now != before[name]))


T = TypeVar("T", bound=Item[Any])


class Collection(Generic[V, T]):
    """One object for each thing of a kind, each on a path of its own."""

    def __init__(
        self,
        server: Server,
        *,
        identity: Callable[[V], str],
        path: Callable[[str], ObjectPath],
        make: Callable[[V], T],
    ) -> None:
        """`path` takes what `identity` tells of a view; `make` makes the object of a thing that was not there."""
        self._server, self._identity, self._path, self._make = server, identity, path, make
        self._items: dict[str, T] = {}

    def add(self, view: V) -> T:
        """Export the object of a thing that was not there."""
        identity = self._identity(view)
        item = self._items[identity] = self._make(view)
        self._server.export(self._path(identity), item)
        return item

    def item(self, view: V) -> T:
        """The object of a thing that is there."""
        return self._items[self._identity(view)]

    def remove(self, identity: str) -> None:
        """Take the object of a thing off that is gone."""
        del self._items[identity]
        self._server.unexport(self._path(identity))

    def show(self, views: Iterable[V]) -> list[V]:
        """Export what is new, take off what is gone, tell of changes: afterwards there are these things, no others.

        Returns what is new.
        """
        new = []
        wanted = {self._identity(view): view for view in views}
        for identity in self._items.keys() - wanted.keys():
            self.remove(identity)
        for identity, view in wanted.items():
            if identity in self._items:
                self._items[identity].replace_view(view)
            else:
                self.add(view)
                new.append(view)
        return new


def named(kind: str, name: str, views: Mapping[str, V], name_of: Callable[[V], str]) -> V:
    """The one of `views`, by identity, that has this identity, or else this name: a name may look like an identity.

    Raises:
        NotFound: there is no such thing of this kind.
    """
    found = views.get(name) or next((view for view in views.values() if name_of(view) == name), None)
    if found is None:
        raise NotFound(kind, name)
    return found


class Follower:
    """Looks after news has come, again and again, with a pause after each look: much news is one look."""

    def __init__(self, look: Callable[[], Awaitable[None]], what: str) -> None:
        """`what` is looked at, for the log: a look that fails is tried again after the next news."""
        self._look, self._what = look, what
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def news(self) -> None:
        """Something may have changed."""
        self._news.set()

    def start(self) -> None:
        """Look whenever there is news, from now on."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Look no longer."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._look()
            except JindiskError as exc:
                log.warning(f"{self._what} could not be looked at", error=str(exc))
            await asyncio.sleep(INTERVAL_S)
