"""Changes of the map since the last checkpoint, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jindiskd.jindisk.geometry import PER_LEAF, Kind

LEAF = PER_LEAF[Kind.F]
UNMAPPED = bytes(24)


class Memtable:
    """Entries of tree F (24 bytes: raw block, tag) that hide the tree's; whole leaves may be marked as emptied."""

    __slots__ = ("cleared", "entries", "touched")

    def __init__(self) -> None:
        """Empty."""
        self.entries: dict[int, bytes] = {}
        """By LBA; `UNMAPPED` where nothing is mapped any more."""
        self.cleared: set[int] = set()
        """Leaves of F of which only `entries` count."""
        self.touched: set[int] = set()
        """Leaves of F that a checkpoint will look at."""

    def __len__(self) -> int:
        return len(self.entries) + len(self.cleared)

    def get(self, lba: int) -> bytes | None:
        """The entry that hides F's; None if F's counts."""
        entry = self.entries.get(lba)
        if entry is None and self.cleared and lba // LEAF in self.cleared:
            return UNMAPPED
        return entry

    def put(self, lba: int, entry: bytes) -> None:
        """Set an entry."""
        self.entries[lba] = entry
        self.touched.add(lba // LEAF)

    def put_all(self, entries: Sequence[tuple[int, bytes]]) -> None:
        """Set entries, given with their LBAs."""
        self.entries.update(entries)
        self.touched.update({lba // LEAF for lba, _ in entries})

    def clear(self, lba: int, count: int, present: Callable[[int, int], Iterable[int]]) -> None:
        """Unmap a range.

        Args:
            lba: first block.
            count: at least 1.
            present: of `count` leaves from a first one, those that exist in F. If it raises, nothing is changed.
        """
        end = lba + count
        first, last = -(-lba // LEAF), end // LEAF
        if first >= last:
            first = last = -1
        found = set(present(first, last - first)) if first >= 0 else set()
        for block in range(lba, end) if first < 0 else (*range(lba, first * LEAF), *range(last * LEAF, end)):
            self.put(block, UNMAPPED)
        if first < 0:
            return
        # Whole leaves: forget their entries, whichever way is shorter, then mark those that exist.
        low, high = first * LEAF, last * LEAF
        if high - low > len(self.entries):
            self.entries = {k: v for k, v in self.entries.items() if not low <= k < high}
        else:
            for block in range(low, high):
                self.entries.pop(block, None)
        self.cleared |= found
        self.touched |= found

    def by_leaf(self) -> list[tuple[int, list[tuple[int, bytes]]]]:
        """All touched leaves in order, each with its entries as (index in the leaf, entry)."""
        leaves: dict[int, list[tuple[int, bytes]]] = {index: [] for index in sorted(self.touched)}
        for lba, entry in self.entries.items():
            leaves[lba // LEAF].append((lba % LEAF, entry))
        return list(leaves.items())
