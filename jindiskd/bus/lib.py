"""The one module that imports the D-Bus library, dbus-next 0.2.3.

Its private hooks are overridden in `transport`; that is safe because there is this one version everywhere.
What types it declares are wrong in places: to the type checker, all that comes from here is `Any`.
"""

from __future__ import annotations

import typing
from typing import Any

if not hasattr(typing, "no_type_check_decorator"):  # gone in Python 3.15, and the library imports it
    typing.no_type_check_decorator = lambda decorator: decorator

import dbus_next
import dbus_next.aio.message_bus
import dbus_next.auth
import dbus_next.errors
from dbus_next import signature
from dbus_next._private import constants, unmarshaller

_top: Any = dbus_next
_aio: Any = dbus_next.aio.message_bus
_auth: Any = dbus_next.auth
_errors: Any = dbus_next.errors
_unmarshaller: Any = unmarshaller
_constants: Any = constants
_signature: Any = signature

AuthAnonymous = _auth.AuthAnnonymous
BusType = _top.BusType
Message = _top.Message
MessageFlag = _top.MessageFlag
MessageType = _top.MessageType
NameFlag = _top.NameFlag
RequestNameReply = _top.RequestNameReply
Variant = _top.Variant
MessageBus = _aio.MessageBus
MessageWriter = _aio._MessageWriter  # noqa: SLF001 (its writing loop has to be replaced)
DBusError = _errors.DBusError
InvalidMessageError = _errors.InvalidMessageError
HeaderField = _constants.HeaderField
MarshallerStreamEndError = _unmarshaller.MarshallerStreamEndError
Unmarshaller = _unmarshaller.Unmarshaller
SignatureTree = _signature.SignatureTree
