"""Pages by themselves: their names, the pools they lie in, and the tables that say who reads them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from treepo.engines.local.engine import prefix_of
from treepo.engines.local.kv_store import KVStore
from treepo.engines.local.prefix import Span
from treepo.engines.local.shared_pages import PageName, Pages, Reads, page_names
from treepo.tree import ROOT, Stop, Tree

LAYERS, HEADS, SIZE, D = 2, 3, 4, 5


def test_a_page_is_named_by_the_segment_that_holds_its_last_position() -> None:
    tree = Tree([1] * 6)
    first = tree.add(ROOT, [2] * 5, [0.0] * 5, seed=10)
    left = tree.add(first, [3] * 8, [0.0] * 8, seed=11)
    right = tree.add(first, [3] * 3, [0.0] * 3, seed=12)
    kept = KVStore(100)
    # Key-values are those of all tokens but the last: the prompt's lie at 0 to 5, the first segment's from there to 10.
    assert page_names(kept, prefix_of(tree, ROOT).spans, 4) == [(kept, 0, None)]
    assert page_names(kept, prefix_of(tree, first).spans, 4) == [(kept, 0, None), (kept, 1, 10)]
    assert page_names(kept, prefix_of(tree, left).spans, 4) == [
        (kept, 0, None),
        (kept, 1, 10),
        (kept, 2, 11),
        (kept, 3, 11),
    ]
    assert page_names(kept, prefix_of(tree, right).spans, 4) == [(kept, 0, None), (kept, 1, 10), (kept, 2, 12)]
    assert page_names(kept, prefix_of(tree, right).spans, 5) == [(kept, 0, None), (kept, 1, 10)]
    # A cut leaves the pages before it what they were.
    tree.finish(left, Stop.LENGTH)
    node = tree.node_after(left, 5 + 5)
    assert page_names(kept, prefix_of(tree, node).spans, 4) == [(kept, 0, None), (kept, 1, 10), (kept, 2, 11)]
    assert page_names(kept, [], 4) == []


def test_spans_that_end_with_a_page_fill_it() -> None:
    kept = KVStore(100)
    spans = [Span(None, 0, 4), Span(7, 4, 8), Span(8, 8, 9)]
    assert page_names(kept, spans, 4) == [(kept, 0, None), (kept, 1, 7)]


class World:
    """Pages whose key-values say what they are, and how often each was asked for."""

    def __init__(self) -> None:
        self.pages = Pages(SIZE, torch.empty(LAYERS, 2, 0, HEADS, 0, D))
        self.contents: dict[PageName, Tensor] = {}
        self.asked: list[PageName] = []

    def arrange(self, readers: dict[PageName, list[int]]) -> None:
        def read(name: PageName) -> Tensor:
            self.asked.append(name)
            self.contents[name] = torch.full((LAYERS, 2, HEADS, SIZE, D), float(len(self.asked)))
            return self.contents[name]

        self.pages.arrange(readers, read)

    def found(self, reads: Reads) -> dict[tuple[int, int], list[tuple[float, int]]]:
        """By (row, page number): the content that the row gets to see there, and in which pool, for every head."""
        entries: list[tuple[float, int, int, int]] = []  # content, pool, head, who asks
        for pool, (kv, table) in enumerate(reads.pools):
            pages, width = kv.shape[2], len(table) // (kv.shape[2] * HEADS)
            for i, unit in enumerate(table.tolist()):
                page, head = i // (HEADS * width), i // width % HEADS
                assert page < pages and (kv[:, :, page] == kv[0, 0, page, 0, 0, 0]).all()
                entries.append((kv[0, 0, page, 0, 0, 0].item(), pool, head, unit))
        seen: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for unit, parts in enumerate(reads.parts.tolist()):
            for number, part in enumerate(parts):
                if not part:
                    continue
                content, pool, head, asks = entries[part - 1]
                assert asks == unit and head == unit % HEADS
                seen.setdefault((unit // HEADS, number), []).append((content, pool))
        return seen


histories = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), max_size=3)), min_size=1, max_size=9),
    min_size=1,
    max_size=6,
)


@given(histories)
def test_after_any_history_every_row_sees_its_own_pages_once(history: list[list[tuple[int, list[int]]]]) -> None:
    world, trees = World(), [KVStore(1) for _ in range(2)]
    there: set[PageName] = set()
    for rows in history:
        readers: dict[PageName, list[int]] = {}
        paths = []
        for slot, (tree, turns) in enumerate(rows):  # a row is a path of turns in one of the trees
            paths.append([(trees[tree], i, hash(tuple(turns[: i + 1]))) for i in range(len(turns))])
            for name in paths[-1]:
                readers.setdefault(name, []).append(slot)
        world.asked, before = [], there
        old = {name: world.contents[name] for name in before & readers.keys()}
        world.arrange(readers)
        assert sorted(world.asked, key=str) == sorted(readers.keys() - before, key=str)  # each once, and none again
        assert all(world.contents[name] is block for name, block in old.items())
        there = set(readers)
        assert all(name in world.pages for name in there) and not any(name in world.pages for name in before - there)
        assert sum(len(pool.names) for pool in world.pages._pools.values()) == len(there)
        reads = world.pages.reads(readers, [len(path) * SIZE for path in paths])
        assert reads.begins.tolist() == [len(path) * SIZE for path in paths]
        seen = world.found(reads)
        assert seen.keys() == {(slot, i) for slot, path in enumerate(paths) for i in range(len(path))}
        for (slot, i), heads in seen.items():
            name = paths[slot][i]
            assert len(heads) == HEADS and {content for content, _ in heads} == {world.contents[name].max().item()}
        for pool in world.pages._pools.values():
            assert all(pool.readers / 2 < len(readers[name]) <= pool.readers for name in pool.names)
