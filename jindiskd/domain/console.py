"""The console log of a guest: what its end says about why the machine stopped.

The guest writes it, so it is bounded, and nothing of it is shown but fixed codes and a kernel's printable last words.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from jindiskd.errors import JindiskError, NotFound
from jindiskd.guest.codes import Code

TAIL_BYTES = 16384
_CODE = re.compile(rb"^jindisk: (E\d\d)\r?$", re.MULTILINE)
_PANIC = re.compile(rb"Kernel panic - not syncing: ([ -~]{1,120})")


class ConsoleNotReadable(JindiskError, code="ConsoleNotReadable"):
    """A console log is not the service's to read."""

    def __init__(self, name: str) -> None:
        """`name` of the domain."""
        attach = f"attach to the console itself (jindiskctl domain console {name} --attach)"
        whole = "have logs not cut (max_size = 0 in /etc/libvirt/virtlogd.conf)"
        super().__init__(
            f"the console log of domain {name!r} has grown, and libvirt's logger has begun another one as root: "
            f"{attach}, or {whole}"
        )


def open_log(path: Path, name: str) -> int:
    """A readable descriptor of a console log, which the caller closes. Blocks.

    Raises:
        NotFound: there is none. ConsoleNotReadable: libvirt's logger has begun one that is root's.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise NotFound("console log of domain", name) from exc
    except PermissionError as exc:
        raise ConsoleNotReadable(name) from exc


def prepare(path: Path) -> None:
    """Make an empty log of ours, to which libvirt's logger appends: it is root, and one of its own we may not read."""
    if path.exists() and not os.access(path, os.R_OK):
        path.unlink()
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    os.truncate(path, 0)


def tail(path: Path, limit_bytes: int = TAIL_BYTES) -> bytes:
    """The last bytes of a console log; empty where there is none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - limit_bytes))
            return stream.read(limit_bytes)
    except OSError:
        return b""


def sentence(code: str) -> str:
    """What a guest's code means, with the code; a code that is not known is named as such."""
    known = next((item.sentence for item in Code if item == code), "the guest gave a code that is not known here")
    return f"{known} ({code})"


def diagnose(path: Path) -> str:
    """One sentence on how the guest ended by its console's end, or empty where that says nothing."""
    data = tail(path)
    codes = _CODE.findall(data)
    if codes:
        return sentence(codes[-1].decode())
    panic = _PANIC.findall(data)
    if panic:
        return f"the guest's kernel stopped: {panic[-1].decode().strip()}"
    return ""
