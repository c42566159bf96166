"""Whether a program listens on a unix socket: its file is there a moment before, and it would notice a connection."""

from __future__ import annotations

import os
from pathlib import Path

ACCEPTS = 0x00010000  # __SO_ACCEPTCON (include/linux/net.h)
TABLE = Path("/proc/net/unix")
FIELDS = 8  # Num RefCount Protocol Flags Type St Inode Path (net/unix/af_unix.c, unix_seq_show)


def is_listening(path: Path) -> bool:
    """By the kernel's list of this network namespace; the path is the one that the program gave to `bind`."""
    wanted = os.fsencode(path)
    for line in TABLE.read_bytes().splitlines()[1:]:
        words = line.split(maxsplit=FIELDS - 1)
        if len(words) == FIELDS and words[-1] == wanted and int(words[3], 16) & ACCEPTS:
            return True
    return False
