"""Which domain was made for which image: our own record, since anybody who may define domains may write metadata.

::

    <directory>/<uuid>.json     one file a domain, replaced atomically

libvirt's metadata says the same and is what people see; where the two differ, this record rules.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import structlog

from jindiskd.base import document
from jindiskd.base.files import replace_file, space_for
from jindiskd.base.platform import Platform
from jindiskd.errors import InvalidArgument

log = structlog.get_logger(__name__)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A domain's image, by the image's name and identity."""

    image: str
    image_id: str
    platform: Platform
    adopted: bool = False
    """Whether somebody else made the domain, so that its definition is theirs."""


class Bindings:
    """The records below one directory. Small files: the methods may run in the event loop."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = directory

    def get(self, uuid: str) -> Binding | None:
        """The record of a domain; None where there is none that can be read."""
        try:
            data = self._path(uuid).read_bytes()
            return document.load(Binding, data, document=f"binding of domain {uuid}")
        except FileNotFoundError:
            return None
        except (OSError, document.MalformedDocument) as exc:
            log.warning("a binding cannot be read", domain=uuid, problem=str(exc))
            return None

    def all(self) -> list[Binding]:
        """All that can be read."""
        found = (self.get(path.stem) for path in self._directory.glob("*.json") if UUID.fullmatch(path.stem))
        return [binding for binding in found if binding is not None]

    def put(self, uuid: str, binding: Binding) -> None:
        """Record it durably; raises `NoSpace` where that is not possible, and the old record stays."""
        with space_for(self._directory):
            replace_file(self._path(uuid), document.dump(binding), 0o600)

    def drop(self, uuid: str) -> None:
        """Forget it; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._path(uuid).unlink()

    def uuids(self) -> set[str]:
        """The domains that have a record."""
        return {path.stem for path in self._directory.glob("*.json") if UUID.fullmatch(path.stem)}

    def _path(self, uuid: str) -> Path:
        if not UUID.fullmatch(uuid):
            raise InvalidArgument("domain UUID", uuid, "it is 36 characters of lower-case hexadecimal and hyphens")
        return self._directory / f"{uuid}.json"
