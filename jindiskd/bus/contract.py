"""The contract as the program sees it: interfaces, members, annotations, read from `dbus/*.xml`.

The XML is the truth. Signatures, access, signals, polkit actions and known options are taken from it when a class of
bus objects is defined; what introspection returns is it, unchanged.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field

BUS_NAME = "org.jindisk1"
ROOT_PATH = "/org/jindisk1"
ERROR_PREFIX = BUS_NAME + ".Error."
FDO = "org.freedesktop.DBus"
EMITS = FDO + ".Property.EmitsChangedSignal"
ACTION = BUS_NAME + ".Action"
ACTION_UNLESS_OWNER = BUS_NAME + ".ActionUnlessOwner"
OPTIONS = BUS_NAME + ".Options"

DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)

# D-Bus specification 0.41, "Standard Interfaces".
STANDARD_XML = """<node>
<interface name="org.freedesktop.DBus.Peer">
 <method name="Ping"/>
 <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
</interface>
<interface name="org.freedesktop.DBus.Introspectable">
 <method name="Introspect"><arg name="xml_data" type="s" direction="out"/></method>
</interface>
<interface name="org.freedesktop.DBus.Properties">
 <method name="Get">
  <arg name="interface_name" type="s" direction="in"/><arg name="property_name" type="s" direction="in"/>
  <arg name="value" type="v" direction="out"/>
 </method>
 <method name="GetAll">
  <arg name="interface_name" type="s" direction="in"/><arg name="properties" type="a{sv}" direction="out"/>
 </method>
 <method name="Set">
  <arg name="interface_name" type="s" direction="in"/><arg name="property_name" type="s" direction="in"/>
  <arg name="value" type="v" direction="in"/>
 </method>
 <signal name="PropertiesChanged">
  <arg name="interface_name" type="s"/><arg name="changed_properties" type="a{sv}"/>
  <arg name="invalidated_properties" type="as"/>
 </signal>
</interface>
<interface name="org.freedesktop.DBus.ObjectManager">
 <method name="GetManagedObjects"><arg name="objects" type="a{oa{sa{sv}}}" direction="out"/></method>
 <signal name="InterfacesAdded">
  <arg name="object_path" type="o"/><arg name="interfaces" type="a{sa{sv}}"/>
 </signal>
 <signal name="InterfacesRemoved">
  <arg name="object_path" type="o"/><arg name="interfaces" type="as"/>
 </signal>
</interface>
</node>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument of a method or signal."""

    name: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method: what it takes and gives, the right it needs, the options it knows."""

    name: str
    takes: tuple[Argument, ...]
    gives: tuple[Argument, ...]
    action: str = ""
    action_unless_owner: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    """Name of each known option and its D-Bus type."""

    @property
    def in_signature(self) -> str:
        """Signature of a call."""
        return "".join(argument.type for argument in self.takes)

    @property
    def out_signature(self) -> str:
        """Signature of the answer."""
        return "".join(argument.type for argument in self.gives)


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """A property; all of ours are read-only."""

    name: str
    type: str
    emits: str
    """`true`, `invalidates`, `const` or `false`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One interface of the contract."""

    name: str
    methods: Mapping[str, Method]
    properties: Mapping[str, Property]
    signals: Mapping[str, str]
    """Signature of each signal."""
    element: ET.Element


def _annotations(element: ET.Element) -> dict[str, str]:
    return {note.attrib["name"]: note.attrib["value"] for note in element.findall("annotation")}


def _arguments(element: ET.Element, direction: str) -> tuple[Argument, ...]:
    return tuple(
        Argument(name=arg.attrib["name"], type=arg.attrib["type"])
        for arg in element.findall("arg")
        if arg.get("direction", "in") == direction
    )


def parse(text: str) -> dict[str, Interface]:
    """The interfaces of an XML file, by name. The text is our own, shipped with the program."""
    found = {}
    for element in ET.fromstring(text).findall("interface"):  # noqa: S314 (our own file)
        methods = {}
        for item in element.findall("method"):
            notes = _annotations(item)
            options = dict(option.split(":", 1) for option in notes.get(OPTIONS, "").split())
            methods[item.attrib["name"]] = Method(
                name=item.attrib["name"],
                takes=_arguments(item, "in"),
                gives=_arguments(item, "out"),
                action=notes.get(ACTION, ""),
                action_unless_owner=notes.get(ACTION_UNLESS_OWNER, ""),
                options=options,
            )
        properties = {}
        for item in element.findall("property"):
            if item.attrib["access"] != "read":
                raise ValueError(f"{item.attrib['name']}: only properties to be read are supported")
            properties[item.attrib["name"]] = Property(
                name=item.attrib["name"], type=item.attrib["type"], emits=_annotations(item).get(EMITS, "true")
            )
        signals = {
            item.attrib["name"]: "".join(arg.attrib["type"] for arg in item.findall("arg"))
            for item in element.findall("signal")
        }
        found[element.attrib["name"]] = Interface(
            name=element.attrib["name"], methods=methods, properties=properties, signals=signals, element=element
        )
    return found


@functools.cache
def interface(name: str) -> Interface:
    """The interface `name` of the contract."""
    text = importlib.resources.files("jindiskd.interfaces").joinpath(name + ".xml").read_text(encoding="utf-8")
    return parse(text)[name]


@functools.cache
def standard() -> Mapping[str, Interface]:
    """The interfaces that every object has; ObjectManager is at the root alone."""
    return parse(STANDARD_XML)


def snake(name: str) -> str:
    """`LaunchDigest` → `launch_digest`, `OwnerUID` → `owner_uid`: the Python name of a member or argument."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|-", "_", name).lower()


def path_label(name: str) -> str:
    """A name as one element of an object path, the way systemd does it: `vm-1` → `vm_2d1`."""
    label = "".join(
        chr(byte) if 65 <= byte <= 90 or 97 <= byte <= 122 or (48 <= byte <= 57 and at) else f"_{byte:02x}"
        for at, byte in enumerate(name.encode())
    )
    return label or "_"


def path_name(label: str) -> str:
    """The name behind an element of an object path."""
    if label == "_":
        return ""
    return re.sub(rb"_([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), label.encode()).decode()
