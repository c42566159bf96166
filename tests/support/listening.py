"""Whether a program listens on a unix socket: its file is there a moment before."""

import os
from pathlib import Path

ACCEPTS = "00010000"  # __SO_ACCEPTCON (include/linux/net.h)


def is_listening(path: Path) -> bool:
    """By the kernel's list: asking the program would be a connection."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(line[-1] == os.fspath(path) and line[3] == ACCEPTS for line in lines)
