"""Volumes in files for the tests of `jindisksetup`."""

import os
import sys
from pathlib import Path

from jd import KEY

from jindiskd.base.secret import Secret
from jindiskd.jindisk.anchor import UNANCHORED
from jindiskd.jindisk.device import OpenFile
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import open_volume

PROGRAM = Path(sys.executable).with_name("jindisksetup")
SIZE = 16 << 20


def contents(path: Path, key: bytes = KEY) -> bytes:
    with OpenFile(path, writable=False) as device:
        volume = open_volume(device, key=Secret(key), uuid=None, anchor=UNANCHORED)
        return volume.read(0, volume.size_bytes)


def change(path: Path, data: bytes, *, close: bool = True) -> None:
    """A session of somebody else."""
    with OpenFile(path, writable=True) as device:
        volume = open_volume(device, key=Secret(KEY), uuid=None, anchor=UNANCHORED)
        session = Session(volume, session_id=os.urandom(32))
        session.begin()
        session.write(0, data)
        session.flush()
        if close:
            session.close()
