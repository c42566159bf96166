"""The command line's end of the bus believes the service, and nobody else who is on the bus."""

import asyncio
from typing import Any

from jindiskd.bus.contract import BUS_NAME, ROOT_PATH
from jindiskd.bus.lib import Message, MessageType, Variant
from jindiskd.cli.client import Client

JOB = f"{ROOT_PATH}/jobs/1"


def changed(state: str, destination: str = "") -> Any:
    body = ["org.jindisk1.Job", {"State": Variant("s", state)}, []]
    return Message(
        message_type=MessageType.SIGNAL,
        destination=destination or None,
        path=JOB,
        interface="org.freedesktop.DBus.Properties",
        member="PropertiesChanged",
        signature="sa{sv}as",
        body=body,
    )


def spurious(destination: str) -> Any:
    """What the bus would say if the service had gone, and an odd one."""
    return Message(
        message_type=MessageType.SIGNAL,
        destination=destination,
        path="/org/freedesktop/DBus",
        interface="org.freedesktop.DBus",
        member="NameOwnerChanged",
        signature="sss",
        body=[BUS_NAME, ":1.1", ""],
    )


async def test_signals_of_others_are_not_the_service_s(connect):
    """The bus hands over what any user sends to a name by itself, whatever was subscribed to."""
    service, stranger, bus = [await connect() for _ in range(3)]
    await service.request_name(BUS_NAME)
    client = Client(bus, interactive=False)
    await client.subscribe()
    for forged in (changed("succeeded", bus.unique_name), spurious(bus.unique_name)):
        await stranger.send(forged)
    await asyncio.sleep(0.2)
    await service.send(changed("failed"))
    async with asyncio.timeout(10):
        assert await anext(client.signals()) == (
            JOB,
            "PropertiesChanged",
            ["org.jindisk1.Job", {"State": "failed"}, []],
        )


async def test_a_service_that_comes_after_the_client_is_believed(connect):
    """A call may be what starts the service; another may follow it."""
    first, second, stranger, bus = [await connect() for _ in range(4)]
    client = Client(bus, interactive=False)
    await client.subscribe()
    heard = client.news()
    told: list[Any] = []
    async with asyncio.timeout(10):
        await first.request_name(BUS_NAME)
        await first.send(changed("one"))
        told += [await anext(heard) for _ in range(2)]
        await first.release_name(BUS_NAME)
        await second.request_name(BUS_NAME)
        for sender in (first, stranger):
            await sender.send(changed("forged", bus.unique_name))
        await asyncio.sleep(0.2)
        await second.send(changed("two"))
        told += [await anext(heard) for _ in range(3)]
    names = [body[1:] for _, member, body in told if member == "NameOwnerChanged"]
    assert names == [
        ["", first.unique_name],
        [first.unique_name, ""],
        ["", second.unique_name],
    ]
    assert [body[1]["State"] for _, member, body in told if member == "PropertiesChanged"] == ["one", "two"]
