"""Key-values that several rows read, each once per step.

A prefix is divided into *pages*: page i of size S holds the positions S * i to S * (i + 1). The block of key-values
that holds a page's last position determines the prefix up to there, so it names the page. A row reads the first few of
its pages together with other rows, and keeps the rest of its prefix, its *tail*, in a slot of its own.

Rows share a page by being rows of one small matrix: a page that r rows read lies in the *pool* of the next power of
two, whose pages have room for that many readers. The pages of a pool lie side by side, so that one batched product
reads them all in place; only queries are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from treepo.engines.local.kv_store import KVStore
from treepo.engines.local.prefix import Span

FIRST = 8  # pages of a pool's first allocation

PageName = tuple[KVStore, int, Hashable]
"""A store, the number of the page in its prefix, and the name of the block that holds the page's last position."""


def page_names(store: KVStore, spans: Sequence[Span], size: int) -> list[PageName]:
    """The pages of `size` positions that the prefix of `spans` fills."""
    found: list[PageName] = []
    for span in spans:
        found += [(store, page, span.name) for page in range(len(found), span.end // size)]
    return found


@dataclass(slots=True)
class Reads:
    """Which pages the n rows of a batch read, as tensors; K is the number of key-value heads."""

    begins: Tensor  # [n] int64: the position at which the tail of each row begins
    pools: list[tuple[Tensor, Tensor]]  # pages [layers, 2, P, K, S, d]; readers [P * K * R] int64, as row * K + head
    # [n * K, most pages] int64: where the parts of a row's attention are, among an empty one (0) and the P * K * R of
    # each pool.
    parts: Tensor


class _Pool:
    """Pages that up to `readers` rows read."""

    def __init__(self, readers: int, empty: Tensor) -> None:
        self.readers = readers
        self.kv = empty  # [layers, 2, capacity, K, S, d], of which the first are in use
        self.names: list[PageName] = []

    def add(self, name: PageName, block: Tensor) -> None:
        n, capacity = len(self.names), self.kv.shape[2]
        if n == capacity:
            old = self.kv
            self.kv = old.new_empty((*old.shape[:2], max(FIRST, 2 * n), *old.shape[3:]))
            self.kv[:, :, :n] = old
        self.kv[:, :, n] = block
        self.names.append(name)

    def drop(self, index: int) -> None:
        """The last page fills the gap."""
        last = self.names.pop()
        if index < len(self.names):
            self.names[index] = last
            self.kv[:, :, index] = self.kv[:, :, len(self.names)]


class Pages:
    """All pages that some row reads."""

    def __init__(self, size: int, empty: Tensor) -> None:
        """`empty` [layers, 2, 0, K, 0, d]: key-values of no tokens, for their shape, type and device."""
        self.size = size
        self._empty = empty.new_empty((*empty.shape[:4], size, empty.shape[5]))
        self._pools: dict[int, _Pool] = {}  # by the number of readers
        self._names: set[PageName] = set()

    def __contains__(self, name: PageName) -> bool:
        return name in self._names

    def arrange(self, readers: Mapping[PageName, Sequence[int]], read: Callable[[PageName], Tensor]) -> None:
        """Hold exactly the pages of `readers`, each in the pool for its number of readers.

        `read` gives the key-values [layers, 2, K, S, d] of a page that is new.
        """
        homes = {name: power_of_two(len(rows)) for name, rows in readers.items()}
        new = homes.copy()
        for pool in list(self._pools.values()):
            for index in reversed(range(len(pool.names))):
                name = pool.names[index]
                home = homes.get(name)
                new.pop(name, None)
                if home == pool.readers:
                    continue
                if home is not None:
                    self._pool(home).add(name, pool.kv[:, :, index])
                pool.drop(index)
        for name, home in new.items():
            self._pool(home).add(name, read(name))
        self._names = set(homes)

    def reads(self, readers: Mapping[PageName, Sequence[int]], begins: Sequence[int]) -> Reads:
        """Which pages the rows read, after `arrange(readers, ...)`; the tail of row i starts at `begins[i]`."""
        device, heads = self._empty.device, self._empty.shape[3]
        n = len(begins)
        head = np.arange(heads)
        parts = np.zeros((n, heads, max(begins) // self.size), np.int64)
        total, pools = 1, []
        for pool in self._pools.values():
            if not pool.names:
                continue
            counts = np.array([len(readers[name]) for name in pool.names])
            page = np.repeat(np.arange(len(counts)), counts)
            column = np.arange(len(page)) - np.repeat(counts.cumsum() - counts, counts)
            row = np.array([row for name in pool.names for row in readers[name]])
            number = np.array([name[1] for name in pool.names])[page]
            table = np.zeros((len(counts), heads, pool.readers), np.int64)  # the padding's results are not used
            table[page, :, column] = row[:, None] * heads + head
            place = total + (page[:, None] * heads + head) * pool.readers + column[:, None]
            parts[row[:, None], head, number[:, None]] = place
            total += table.size
            pools.append((pool.kv[:, :, : len(counts)], torch.as_tensor(table.ravel(), device=device)))
        return Reads(
            torch.tensor(begins, device=device),
            pools,
            torch.as_tensor(parts.reshape(n * heads, -1), device=device),
        )

    def _pool(self, readers: int) -> _Pool:
        if readers not in self._pools:
            self._pools[readers] = _Pool(readers, self._empty)
        return self._pools[readers]


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
