"""Calls are checked against the contract before anything of ours runs."""

import asyncio
import dataclasses
import xml.etree.ElementTree as ET
from datetime import UTC, datetime

import pytest

from jindiskd.bus import contract
from jindiskd.bus.collection import Item
from jindiskd.bus.contract import path_label, path_name, snake
from jindiskd.bus.lib import Message, Variant
from jindiskd.bus.objects import ContractMismatch, Object, Options
from jindiskd.bus.peers import Caller

E = "org.freedesktop.DBus.Error."
PROPERTIES = "org.freedesktop.DBus.Properties"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"member": "Nonsense"}, "UnknownMethod"),
        ({"member": "WhoAmI"}, "InvalidArgs"),
        ({"member": "WhoAmI", "signature": "s", "body": ["x"]}, "InvalidArgs"),
        ({"member": "WhoAmI", "interface": "no.such"}, "UnknownInterface"),
        ({"member": "WhoAmI", "path": "/org/example/none"}, "UnknownObject"),
        ({"member": "Level"}, "UnknownMethod"),
        ({"member": "__init__"}, None),
        ({"member": "values"}, "UnknownMethod"),
        (
            {"member": "Get", "interface": PROPERTIES, "signature": "ss", "body": ["org.example.Probe", "None"]},
            "UnknownProperty",
        ),
        (
            {"member": "Get", "interface": PROPERTIES, "signature": "ss", "body": ["no.such", "Level"]},
            "UnknownInterface",
        ),
        (
            {
                "member": "Set",
                "interface": PROPERTIES,
                "signature": "ssv",
                "body": ["org.example.Probe", "Level", Variant("u", 1)],
            },
            "PropertyReadOnly",
        ),
        ({"member": "GetManagedObjects", "interface": "org.freedesktop.DBus.ObjectManager"}, "UnknownMethod"),
        ({"member": "Swap", "signature": "h", "body": [3]}, "InvalidArgs"),
    ],
)
async def test_wrong_calls_have_the_names_that_tools_know(probe, client, fields, error):
    """Each mistake of a caller has its standard name, and the service goes on."""
    fields = {
        "destination": "org.example.Probe",
        "path": "/org/example/probe",
        "interface": "org.example.Probe",
    } | fields
    reply = await client.call(Message(**fields))
    if error is None:
        assert reply.error_name
    else:
        assert reply.error_name == E + error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"color": Variant("s", "red")}, "did you mean 'colour'?"),
        ({"x" * 300: Variant("s", "red")}, "known: colour, size"),
        ({"size": Variant("s", "3")}, "it is 'u'"),
    ],
)
async def test_unknown_and_mistyped_options_are_refused(probe, client, message, options, words):
    """A slip must not silently mean the default."""
    reply = await client.call(message("Choose", "a{sv}", options))
    assert reply.error_name == "org.jindisk1.Error.InvalidArgument"
    assert words in reply.body[0]
    assert probe._ran == []


async def test_known_options_arrive_as_plain_values(probe, client, message):
    """Handlers see no variants."""
    await client.call(message("Choose", "a{sv}", {"size": Variant("u", 3)}))
    assert probe._ran == ["{'size': 3}"]


async def test_calls_without_an_interface_are_allowed(probe, client, message):
    """The specification says so."""
    reply = await client.call(message("WhoAmI", "d", 0.0, interface=None))
    assert reply.body[0].startswith(client.unique_name)


async def test_many_changes_are_one_signal(probe, client):
    """What changes in one turn of the loop is told once; a dear property is only called stale."""
    rule = "type='signal',member='PropertiesChanged'"
    got = asyncio.Queue()
    client.add_message_handler(lambda m: got.put_nowait(m.body) if m.member == "PropertiesChanged" else None)
    await client.call(
        Message(
            destination="org.freedesktop.DBus",
            path="/org/freedesktop/DBus",
            interface="org.freedesktop.DBus",
            member="AddMatch",
            signature="s",
            body=[rule],
        )
    )
    for level in range(50):
        probe._level = level
        probe.changed("Level", "Costly")
    async with asyncio.timeout(5):
        name, changed, stale = await got.get()
    assert name == "org.example.Probe"
    assert changed["Level"].value == 49
    assert stale == ["Costly"]
    await asyncio.sleep(0.05)
    assert got.empty()


async def test_introspection_is_the_contract(probe, client):
    """Down from the root, children are named; the interface is the XML unchanged."""

    async def look(path):
        reply = await client.call(
            Message(
                destination="org.example.Probe",
                path=path,
                member="Introspect",
                interface="org.freedesktop.DBus.Introspectable",
            )
        )
        return ET.fromstring(reply.body[0])

    assert [n.get("name") for n in (await look("/")).findall("node")] == ["org"]
    assert [n.get("name") for n in (await look("/org/example")).findall("node")] == ["probe"]
    found = next(
        i for i in (await look("/org/example/probe")).findall("interface") if i.get("name") == "org.example.Probe"
    )
    assert contract.parse(f"<node>{ET.tostring(found, encoding='unicode')}</node>").keys() == {"org.example.Probe"}


SPEC = contract.parse(
    """<node><interface name="a.b"><method name="DoIt"><arg name="what" type="s" direction="in"/>
    <arg name="options" type="a{sv}" direction="in"/><arg name="done" type="b" direction="out"/></method>
    <property name="OwnerUID" type="u" access="read"/></interface></node>"""
)["a.b"]


def test_a_class_that_differs_from_the_contract_cannot_be_defined():
    """Missing, extra, misnamed, mistyped: each is found when the class is made."""

    class Right(Object, spec=SPEC):
        async def do_it(self, caller: Caller, what: str, options: Options) -> bool:
            return True

        @property
        def owner_uid(self) -> int:
            return 0

    assert Right.contract is SPEC
    with pytest.raises(ContractMismatch, match="owner_uid"):

        class Missing(Object, spec=SPEC):
            async def do_it(self, caller: Caller, what: str, options: Options) -> bool:
                return True

    for name, parameters in {
        "Renamed": {"caller": Caller, "thing": str, "options": Options, "return": bool},
        "Retyped": {"caller": Caller, "what": int, "options": Options, "return": bool},
        "Result": {"caller": Caller, "what": str, "options": Options, "return": str},
    }.items():

        async def do_it(self, caller, what, options):
            return True

        if name == "Renamed":

            async def do_it(self, caller, thing, options):
                return True

        do_it.__annotations__ = parameters
        with pytest.raises(ContractMismatch, match="DoIt"):
            type(name, (Object,), {"do_it": do_it, "owner_uid": Right.owner_uid}, spec=SPEC)


SHOWN = contract.parse(
    """<node><interface name="a.c"><property name="OwnerUID" type="u" access="read"/>
    <property name="Since" type="t" access="read"/><property name="Digest" type="s" access="read"/>
    <property name="State" type="s" access="read"/></interface></node>"""
)["a.c"]


def test_fields_of_a_view_are_properties():
    """By their names, in the forms of the bus; the class's own go before them, and the contract is held to."""

    @dataclasses.dataclass(frozen=True)
    class View:
        owner_uid: int
        since: datetime
        digest: bytes
        state: int

    class Right(Item[View], spec=SHOWN, view=View):
        @property
        def state(self) -> str:
            return f"state {self._view.state}"

    item = Right(View(owner_uid=7, since=datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), digest=b"\x01\xff", state=3))
    values = {name: value.value for name, value in item.values().items()}
    assert values == {"OwnerUID": 7, "Since": 1_000_000, "Digest": "01ff", "State": "state 3"}
    with pytest.raises(ContractMismatch, match=r"property .*State is not a Python property of type s"):

        class Retyped(Item[View], spec=SHOWN, view=View):
            pass

    with pytest.raises(ContractMismatch, match="state"):

        class Missing(Item[View], spec=SHOWN, view=dataclasses.make_dataclass("Less", [("since", datetime)])):
            pass


@pytest.mark.parametrize(
    ("name", "label"), [("vm-1.disk", "vm_2d1_2edisk"), ("0abc", "_30abc"), ("", "_"), ("ä", "_c3_a4")]
)
def test_names_become_path_elements_and_back(name, label):
    """The way systemd does it."""
    assert path_label(name) == label
    assert path_name(label) == name


def test_names_of_members_become_python_names():
    """Acronyms stay together."""
    assert [snake(n) for n in ("LaunchDigest", "OwnerUID", "GetImage", "Id", "BrokerSpkiSha256", "bind-to-caller")] == [
        "launch_digest",
        "owner_uid",
        "get_image",
        "id",
        "broker_spki_sha256",
        "bind_to_caller",
    ]
