"""What an administrator's token allows. A module of its own: the command line needs the names, and no database."""

from __future__ import annotations

import enum


class Role(enum.StrEnum):
    """What a token allows; each allows what stands before it."""

    READ = "read"
    """Look."""
    APPROVE = "approve"
    """Grant and deny waiting releases."""
    MANAGE = "manage"
    """Everything that is possible over the network."""

    def allows(self, needed: Role) -> bool:
        """Whether this role is at least the one needed."""
        order = list(Role)
        return order.index(self) >= order.index(needed)
