"""The administration of a broker as the command line sees it: HTTP over its local socket, or over TLS with a token.

Over TLS the broker is known by the digest of its public key, as guests know it; certificates' names and dates are not
looked at.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jindiskd.base.endpoint import parse_endpoint
from jindiskd.cli.client import RemoteError
from jindiskd.errors import InvalidArgument, NotAuthorized, ServiceUnavailable
from jindiskd.kbs.client import BrokerNotTrusted, pin_of

SOCKET = Path("/run/jindisk-broker/admin.sock")
UNIT = "jindisk-broker.service"
TIMEOUT_S = 60.0
MAX_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which broker, and what shows that we may."""

    address: str
    """`/path/of/socket` or `host:port`."""
    pin: bytes = b""
    token_file: Path | None = None


class _Local(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("broker", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Pinned(http.client.HTTPConnection):
    """HTTP over TLS 1.3 with the one broker that has the pinned key; nothing is sent to another."""

    def __init__(self, host: str, port: int, pin: bytes) -> None:
        super().__init__(host, port, timeout=TIMEOUT_S)
        self._pin = pin

    def connect(self) -> None:
        super().connect()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the pin below is the verification
        stream = context.wrap_socket(self.sock)
        self.sock = stream
        if pin_of(stream.getpeercert(binary_form=True) or b"") != self._pin:
            stream.close()
            raise BrokerNotTrusted


class BrokerClient:
    """Calls of one broker's administration."""

    def __init__(self, where: Where) -> None:
        """Connect nothing yet. Raises `InvalidArgument`, `OSError` for what is missing."""
        self._where, self._headers = where, {"Content-Type": "application/json"}
        if where.address.startswith("/"):
            return
        parse_endpoint(where.address, "--server")
        if len(where.pin) != 32:
            remedy = "over the network a broker is known by its key; take the digest from its card"
            raise InvalidArgument("--pin", where.pin.hex(), remedy)
        if where.token_file is None:
            raise InvalidArgument("--token-file", None, "over the network a token is needed; see broker token add")
        token = where.token_file.read_text(encoding="ascii").strip()
        if not re.fullmatch(r"[A-Za-z0-9_-]{20,200}", token):
            raise InvalidArgument("--token-file", str(where.token_file), "it holds a token, and nothing else")
        self._headers["Authorization"] = f"Bearer {token}"

    def _connection(self) -> http.client.HTTPConnection:
        if self._where.address.startswith("/"):
            return _Local(self._where.address)
        found = parse_endpoint(self._where.address, "--server")
        return _Pinned(found.host or "localhost", found.port, self._where.pin)

    def call(
        self,
        method: str,
        *path: str,
        body: bytes | Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Any:
        """Ask for something; `path` is parts, which may hold anything.

        Raises:
            RemoteError: the broker's own error, with its exit status. ServiceUnavailable: no answer.
            BrokerNotTrusted: another broker answers there. NotAuthorized: we may not.
        """
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        where = "/v1/" + "/".join(quote(part, safe="") for part in path)
        if query:
            where += "?" + urlencode(query)
        connection = self._connection()
        try:
            connection.request(method, where, body=data, headers=self._headers)
            answer = connection.getresponse()
            told, kind = answer.read(MAX_ANSWER_BYTES), answer.getheader("Content-Type", "")
        except PermissionError as exc:
            raise NotAuthorized(f"the socket {self._where.address}") from exc
        except (OSError, http.client.HTTPException) as exc:
            remedy = f"{type(exc).__name__} at {self._where.address}; is it running, and is that the right address?"
            raise ServiceUnavailable(UNIT, remedy) from exc
        finally:
            connection.close()
        if kind.startswith("text/plain"):
            return told.decode()
        try:
            found = json.loads(told)
        except ValueError as exc:
            raise ServiceUnavailable(UNIT, "what answers there is no administration of a broker") from exc
        if answer.status != 200:
            code, text = str(found.get("error", "")), str(found.get("message", ""))
            raise RemoteError(f"org.jindisk1.Error.{code}", text)
        return found
