"""A D-Bus client that shares no code with the service, so that mistakes of one library do not cancel out.

Little-endian only, marshals what it is given by signature. D-Bus specification 0.41, "Message Protocol".
"""

import array
import os
import socket
import struct
from typing import Any

FIXED = {"y": ("B", 1), "b": ("I", 4), "n": ("h", 2), "q": ("H", 2), "i": ("i", 4), "u": ("I", 4), "x": ("q", 8),
         "t": ("Q", 8), "d": ("d", 8), "h": ("I", 4)}  # fmt: skip
ALIGN = {**{k: size for k, (_, size) in FIXED.items()}, "s": 4, "o": 4, "g": 1, "a": 4, "(": 8, "{": 8, "v": 1}
CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4


def split(signature: str) -> list[str]:
    """The complete types of a signature."""
    found, at = [], 0
    while at < len(signature):
        end = _end(signature, at)
        found.append(signature[at:end])
        at = end
    return found


def _end(signature: str, at: int) -> int:
    if signature[at] == "a":
        return _end(signature, at + 1)
    if signature[at] in "({":
        depth = 0
        for index in range(at, len(signature)):
            depth += (signature[index] in "({") - (signature[index] in ")}")
            if not depth:
                return index + 1
    return at + 1


def marshal(out: bytearray, kind: str, value: Any) -> None:
    """Append one value; a variant is a pair (signature, value)."""
    out += bytes(-len(out) % ALIGN[kind[0]])
    if kind in FIXED:
        out += struct.pack("<" + FIXED[kind][0], value)
    elif kind in {"s", "o"}:
        data = value.encode("utf-8", "surrogateescape")
        out += struct.pack("<I", len(data)) + data + b"\0"
    elif kind == "g":
        out += bytes([len(value)]) + value.encode() + b"\0"
    elif kind == "v":
        marshal(out, "g", value[0])
        marshal(out, value[0], value[1])
    elif kind[0] == "a":
        at = len(out)
        out += bytes(4)
        out += bytes(-len(out) % ALIGN[kind[1]])
        start = len(out)
        for item in value.items() if kind[1] == "{" else value:
            marshal(out, kind[1:], item)
        struct.pack_into("<I", out, at, len(out) - start)
    else:
        for part, item in zip(split(kind[1:-1]), value, strict=True):
            marshal(out, part, item)


def unmarshal(data: bytes, at: int, kind: str) -> tuple[Any, int]:
    """One value and where the next begins."""
    at += -at % ALIGN[kind[0]]
    if kind in FIXED:
        form, size = FIXED[kind]
        return struct.unpack_from("<" + form, data, at)[0], at + size
    if kind in {"s", "o"}:
        length = struct.unpack_from("<I", data, at)[0]
        return data[at + 4 : at + 4 + length].decode(), at + 5 + length
    if kind == "g":
        return data[at + 1 : at + 1 + data[at]].decode(), at + 2 + data[at]
    if kind == "v":
        inner, at = unmarshal(data, at, "g")
        return unmarshal(data, at, inner)
    if kind[0] == "a":
        length = struct.unpack_from("<I", data, at)[0]
        at += 4 + (-(at + 4) % ALIGN[kind[1]])
        items, end = [], at + length
        while at < end:
            item, at = unmarshal(data, at, kind[1:])
            items.append(item)
        return (dict(items) if kind[1] == "{" else items), end
    parts = []
    for part in split(kind[1:-1]):
        item, at = unmarshal(data, at, part)
        parts.append(item)
    return tuple(parts), at


class RawBus:
    """A connection."""

    def __init__(self, address: str) -> None:
        path = address.split("path=")[1].split(",")[0]
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(path)
        self.serial = 0
        self.sock.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        assert self.sock.recv(200).startswith(b"OK")
        self.sock.sendall(b"NEGOTIATE_UNIX_FD\r\n")
        assert self.sock.recv(200).startswith(b"AGREE")
        self.sock.sendall(b"BEGIN\r\n")
        _, hello = self.call(None, "Hello", destination="org.freedesktop.DBus", path="/org/freedesktop/DBus")
        self.name = hello[0]

    def send(
        self, interface: str | None, member: str, signature: str = "", body: tuple[Any, ...] = (), *,
        destination: str = "org.jindisk1", path: str = "/org/jindisk1", kind: int = CALL, fds: tuple[int, ...] = (),
    ) -> int:  # fmt: skip
        """Send a message; returns its serial number."""
        self.serial += 1
        content = bytearray()
        for part, value in zip(split(signature), body, strict=True):
            marshal(content, part, value)
        fields = [(1, ("o", path)), (3, ("s", member)), (6, ("s", destination))]
        if interface:
            fields.append((2, ("s", interface)))
        if signature:
            fields.append((8, ("g", signature)))
        if fds:
            fields.append((9, ("u", len(fds))))
        head = bytearray(struct.pack("<BBBBII", ord("l"), kind, 0, 1, len(content), self.serial))
        marshal(head, "a(yv)", fields)
        head += bytes(-len(head) % 8)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        data = bytes(head + content)
        sent = self.sock.sendmsg([data], rights)
        self.sock.sendall(data[sent:])
        return self.serial

    def _exactly(self, length: int) -> bytes:
        out = b""
        while len(out) < length:
            data, ancillary, *_ = self.sock.recvmsg(length - len(out), 1024)
            if not data:
                raise EOFError
            out += data
            for _, _, payload in ancillary:
                for fd in array.array("i", payload):
                    os.close(fd)
        return out

    def receive(self) -> tuple[int, dict[int, Any], list[Any]]:
        """The next message: its type, header fields and body."""
        head = self._exactly(16)
        _, kind, _, _, length, _, fields_length = struct.unpack("<BBBBIII", head)
        rest = self._exactly(fields_length + (-fields_length % 8) + length)
        pairs, _ = unmarshal(head + rest, 12, "a(yv)")
        fields = dict(pairs)
        data = rest[len(rest) - length :] if length else b""
        body, at = [], 0
        for part in split(fields.get(8, "")):
            value, at = unmarshal(data, at, part)
            body.append(value)
        return kind, fields, body

    def call(self, interface: str | None, member: str, *args: Any, **more: Any) -> tuple[str, list[Any]]:
        """Call and wait: the error's name, or an empty string, and the body."""
        serial = self.send(interface, member, *args, **more)
        while True:
            kind, fields, body = self.receive()
            if kind in {RETURN, ERROR} and fields.get(5) == serial:
                return fields.get(4, ""), body

    def close(self) -> None:
        self.sock.close()
