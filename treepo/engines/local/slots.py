"""Who lies where: rows in the slots of a cache, and what several of them read in pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Generic, TypeVar

import torch
from torch import Tensor

from treepo.engines.local.batch import Batch, Row
from treepo.engines.local.model_runner import Steps
from treepo.engines.local.shared_pages import Name, Pages, Reads
from treepo.engines.local.tree_cache import Block

R = TypeVar("R", bound=Row)


class Slots(Generic[R]):
    """The rows that are decoded, by slot.

    A row that joins reads the pages at the beginning of its path that are there, or that another row in sight wants
    too, and copies the rest of its prefix to its slot.
    """

    def __init__(self, steps: Steps, pages: Pages | None) -> None:
        self.steps = steps
        self.rows: list[R] = []
        self._pages = pages
        self._reads: Reads | None = None  # None: no row reads a page

    def logits(self, batch: Batch) -> Tensor:
        """The logits [n, V] that follow the next tokens of `batch`, which holds the rows."""
        return self.steps(batch.ids, batch.positions, batch.longest, self._reads)

    def keep(self, slot: int) -> None:
        """Leave the key-values of the segment that has ended in `slot` with its tree."""
        row = self.rows[slot]
        first = row.prefix - 1
        kv = self.steps.cache.read(slot, first - row.begin, first - row.begin + len(row.tokens))
        row.kept.blocks[row.seed] = Block(first, kv)
        row.ended = True

    def change(self, free: Sequence[int], joining: Sequence[R], wanted: Mapping[Name, int]) -> tuple[int, int]:
        """Take the rows out of the slots `free` (ascending), put the rows `joining` in, and close the gaps.

        `wanted` is by how many rows, here or waiting, a page could be read. Returns how many tokens were copied into
        slots and pages, and how many of the prefixes lay in the right slot already.
        """
        cache, free, copied, continued = self.steps.cache, list(free), 0, 0
        for row in joining:
            row.begin = self._begin(row, wanted)
        room = max((row.prefix - row.begin for row in joining), default=0)
        cache.reserve(len(self.rows) - len(free) + len(joining), room)

        # A child of the segment that has just ended in a slot goes on there, unless it reads more pages.
        ended = {(row.kept, row.seed): slot for slot in free if (row := self.rows[slot]).ended}
        moving = []
        for row in joining:
            parent = (row.kept, row.spans[-1].seed) if row.spans else None
            if parent not in ended or self.rows[ended[parent]].begin != row.begin:
                moving.append(row)
                continue
            slot = ended.pop(parent)
            free.remove(slot)
            self.rows[slot] = row
            continued += row.prefix - 1
        for row in moving:
            slot = free.pop(0) if free else len(self.rows)
            self.rows[slot : slot + 1] = [row]
            for begin, block in row.kept.read(row.spans, row.begin, row.prefix - 1):
                cache.write(slot, begin - row.begin, block)
            copied += row.prefix - 1 - row.begin
        for slot in reversed(free):  # the highest first: the row that fills a gap is never done itself
            last = self.rows.pop()
            if slot < len(self.rows):
                cache.move(len(self.rows), slot, last.prefix + len(last.tokens) - last.begin)
                self.rows[slot] = last
        return copied + self._turn(), continued

    def _begin(self, row: R, wanted: Mapping[Name, int]) -> int:
        """The position at which the tail of a row begins that joins now."""
        if (pages := self._pages) is None:
            return 0
        return pages.size * sum(1 for _ in takewhile(lambda name: name in pages or wanted[name] > 1, row.pages))

    def _turn(self) -> int:
        """Bring the pages up to date with the rows; the tokens copied into them."""
        if (pages := self._pages) is None:
            return 0
        readers: dict[Name, list[int]] = {}
        for slot, row in enumerate(self.rows):
            for name in row.pages[: row.begin // pages.size]:
                readers.setdefault(name, []).append(slot)
        copied = 0

        def read(name: Name) -> Tensor:
            nonlocal copied
            copied += pages.size
            begin = name[1] * pages.size
            row = self.rows[readers[name][0]]
            return torch.cat([block for _, block in row.kept.read(row.spans, begin, begin + pages.size)], 3)

        pages.arrange(readers, read)
        self._reads = pages.reads(readers, [row.begin for row in self.rows]) if readers else None
        return copied
