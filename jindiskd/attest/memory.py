"""A dictionary that forgets: what verifiers remember, so that the next guest of a machine costs less."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Memory(OrderedDict[K, V]):
    """Keeps the newest `limit` entries. For several threads: one that finds an entry forgotten works it out again."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > self._limit:
            with contextlib.suppress(KeyError):
                self.popitem(last=False)
