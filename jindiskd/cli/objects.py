"""What commands about one kind of the service's objects share: finding one, listing all, showing one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jindiskd.bus.contract import ROOT_PATH
from jindiskd.cli.app import App
from jindiskd.cli.client import Client, RemoteError, connected
from jindiskd.cli.output import Columns, fields, listing
from jindiskd.errors import NotFound

MANAGER = "org.jindisk1.Manager"
Properties = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of objects, that the service finds by a name."""

    interface: str
    getter: str
    """Method of the manager that finds one."""

    async def find(self, client: Client, name: str) -> tuple[str, Properties]:
        """Path and properties of the one with this name."""
        path: str = await client.call(ROOT_PATH, MANAGER, self.getter, name)
        return path, await client.properties(path, self.interface)


async def numbered(client: Client, path: str, interface: str, word: str, number: int) -> Properties:
    """Properties of an object whose path is made of its number.

    Raises:
        NotFound: it is not there, or no longer.
    """
    try:
        return await client.properties(path, interface)
    except RemoteError as exc:
        if exc.name.endswith(".UnknownObject"):
            raise NotFound(word, str(number)) from exc
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """How the objects with one interface are listed."""

    interface: str
    name: str
    """The list's name in JSON."""
    order: Callable[[Properties], Any]
    columns: Columns
    right: tuple[str, ...] = ()
    """Columns that are aligned there."""

    async def show(self, app: App) -> None:
        """Print the list."""
        async with connected() as client:
            found = sorted((await client.objects(self.interface)).values(), key=self.order)
        text = listing(self.columns, found, legend=app.legend, right=self.right)
        app.show({self.name: found}, lambda: text)


async def show_one(
    app: App, kind: Kind, name: str, word: str, pairs: Callable[[Properties], Mapping[str, str]]
) -> None:
    """Print the object with this name, as `word` in JSON, as `pairs` of its properties for people."""
    async with connected() as client:
        _, found = await kind.find(client, name)
    app.show({word: found}, lambda: fields(pairs(found)))
