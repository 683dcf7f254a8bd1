"""Which row has which slot of the cache, and which pages it reads together with other rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Generic, TypeVar

import torch
from torch import Tensor

from treepo.engines.local.batch import Batch, DecodingRow
from treepo.engines.local.kv_store import KVBlock
from treepo.engines.local.model_runner import Steps
from treepo.engines.local.shared_pages import PageName, Pages, Reads

R = TypeVar("R", bound=DecodingRow)


class Slots(Generic[R]):
    """The rows that are decoded, by slot.

    A row that joins reads the first pages of its prefix together with others, as far as these pages are here already or
    another row, here or waiting, wants them too. It copies the rest of its prefix to its slot.
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
        """Copy the key-values of the segment that has ended in `slot` to its store."""
        row = self.rows[slot]
        first = row.prefix.length - 1
        kv = self.steps.cache.read(slot, first - row.begin, first - row.begin + len(row.tokens))
        row.store.blocks[row.name] = KVBlock(first, kv)
        row.ended = True

    def change(self, free: Sequence[int], joining: Sequence[R], wanted: Mapping[PageName, int]) -> tuple[int, int]:
        """Take the rows out of the slots `free` (ascending), put the rows `joining` in, and close the gaps.

        `wanted` says by how many rows, here or waiting, a page could be read. Returns two numbers of tokens: those that
        were copied into slots and pages, and those of prefixes that lay in the right slot already.
        """
        cache, free, copied, continued = self.steps.cache, list(free), 0, 0
        for row in joining:
            row.begin = self._begin(row, wanted)
        room = max((row.prefix.length - row.begin for row in joining), default=0)
        cache.reserve(len(self.rows) - len(free) + len(joining), room)

        # A child of the segment that has just ended in a slot goes on there, unless it reads more pages.
        ended = {(row.store, row.name): slot for slot in free if (row := self.rows[slot]).ended}
        moving = []
        for row in joining:
            parent = (row.store, row.prefix.spans[-1].name) if row.prefix.spans else None
            if parent not in ended or self.rows[ended[parent]].begin != row.begin:
                moving.append(row)
                continue
            slot = ended.pop(parent)
            free.remove(slot)
            self.rows[slot] = row
            continued += row.prefix.length - 1
        for row in moving:
            slot = free.pop(0) if free else len(self.rows)
            self.rows[slot : slot + 1] = [row]
            for begin, block in row.store.read(row.prefix.spans, row.begin, row.prefix.length - 1):
                cache.write(slot, begin - row.begin, block)
            copied += row.prefix.length - 1 - row.begin
        for slot in reversed(free):  # the highest first, so that the row that fills a gap is not done itself
            last = self.rows.pop()
            if slot < len(self.rows):
                cache.move(len(self.rows), slot, last.prefix.length + len(last.tokens) - last.begin)
                self.rows[slot] = last
        return copied + self._turn(), continued

    def _begin(self, row: R, wanted: Mapping[PageName, int]) -> int:
        """The position at which the tail of a joining row begins."""
        if (pages := self._pages) is None:
            return 0
        return pages.size * sum(1 for _ in takewhile(lambda name: name in pages or wanted[name] > 1, row.pages))

    def _turn(self) -> int:
        """Bring the pages up to date with the rows; returns how many tokens were copied into them."""
        if (pages := self._pages) is None:
            return 0
        readers: dict[PageName, list[int]] = {}
        for slot, row in enumerate(self.rows):
            for name in row.pages[: row.begin // pages.size]:
                readers.setdefault(name, []).append(slot)
        copied = 0

        def read(name: PageName) -> Tensor:
            nonlocal copied
            copied += pages.size
            begin = name[1] * pages.size
            row = self.rows[readers[name][0]]
            return torch.cat([block for _, block in row.store.read(row.prefix.spans, begin, begin + pages.size)], 3)

        pages.arrange(readers, read)
        self._reads = pages.reads(readers, [row.begin for row in self.rows]) if readers else None
        return copied
