"""What a server remembers: the longest known beginning of a request, computed once, and dropped when room is short."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.small_runs import save_model
from treepo.engines import Sampling
from treepo.engines.local.engine import LocalEngine
from treepo.models import causal_lm
from treepo.serve.prefixes import Prefixes
from treepo.serve.radix import RadixNode

FEW = st.integers(0, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights and a context of 128 tokens."""
    return save_model(tmp_path_factory.mktemp("model"))


def everything(node):
    """The node and all below it."""
    return [node, *(below for child in node.children for below in everything(child))]


@given(st.lists(st.lists(FEW, min_size=1, max_size=6), max_size=12), st.lists(FEW, max_size=12))
def test_the_longest_known_beginning_is_found_and_no_path_changes(paths, ids):
    root = RadixNode(None, [1], 0, 0, 0)
    grown = []
    for path in [[1, *path] for path in paths]:
        node = root.longest(path)
        if node.end < len(path):
            node = node.add(path[node.end :], len(grown) + 1)
        assert node.all_tokens() == path
        grown.append((node, path))
    ids = [1, *ids]
    node = root.longest(ids)
    shared = [sum(all(a == b for a, b in zip(p[: i + 1], ids, strict=False)) for i in range(len(p))) for _, p in grown]
    best = max((min(n, len(ids)) for n in shared), default=1)
    assert node.end == max(1, best) and node.all_tokens() == ids[: node.end]
    for known, path in grown:  # whatever was divided since
        assert known.all_tokens() == path and known in everything(root)


@given(st.lists(st.lists(FEW, min_size=1, max_size=6), min_size=1, max_size=12))
def test_the_key_values_of_a_prefix_lie_where_its_segments_were_decoded(paths):
    root = RadixNode(None, [1, 1], "prompt", 0, 0)
    blocks = {"prompt": ([1, 1], 0)}  # the path when a block was made, and the first position that it holds
    for number, path in enumerate([1, 1, *path] for path in paths):
        node = root.longest(path)
        if node.end < len(path):
            blocks[number] = (path, node.end - 1)
            node = node.add(path[node.end :], number)
    for node in everything(root):
        prefix = node.prefix()
        assert prefix.tokens() == node.all_tokens() and prefix.length == node.end and prefix.last == node.tokens[-1]
        assert [i for span in prefix.spans for i in range(span.begin, span.end)] == list(range(node.end - 1))
        for span in prefix.spans:
            path, begin = blocks[span.name]
            assert begin <= span.begin and path[: span.end] == prefix.tokens()[: span.end]


def generate(prefixes, ids, seed, n=6, stops=frozenset()):
    return prefixes.generate(ids, n, seed, Sampling(), stops)


def test_a_prefix_is_computed_once(folder):
    engine = LocalEngine(causal_lm.load(str(folder)))
    prefixes = Prefixes(engine, 10_000)

    async def ask_on():
        prompt = list(range(1, 31))
        first = await generate(prefixes, prompt, 1)
        assert engine.stats.prefilled_tokens == 29 and first.cached_tokens == 0
        path = [*prompt, *first.segment.tokens]
        later = await asyncio.gather(
            generate(prefixes, path, 2),
            generate(prefixes, path[:-3], 3),  # from the middle of a segment
            generate(prefixes, prompt, 4),
            generate(prefixes, prompt, 4),  # the same once more
        )
        assert engine.stats.prefilled_tokens == 29 and len(prefixes) == 1
        assert [answer.cached_tokens for answer in later] == [36, 33, 30, 30]
        assert later[2].segment == later[3].segment
        foreign = await generate(prefixes, [*path[:-2], 90, 91], 5)
        assert foreign.cached_tokens == 34 and engine.stats.prefilled_tokens == 29 + 35
        await generate(prefixes, [9, *prompt], 6)
        assert len(prefixes) == 2
        return path, later

    path, later = asyncio.run(ask_on())
    alone = Prefixes(LocalEngine(causal_lm.load(str(folder))), 0)
    for ids, seed, answer in ((path, 2, later[0]), (path[:-3], 3, later[1])):
        again = asyncio.run(generate(alone, ids, seed)).segment
        assert again.tokens == answer.segment.tokens
        assert again.logprobs == pytest.approx(answer.segment.logprobs, abs=1e-5)


def test_the_least_recently_used_prefixes_go_first_and_none_that_is_needed(folder):
    engine = LocalEngine(causal_lm.load(str(folder)))
    prefixes = Prefixes(engine, 50)

    async def fill():
        for first in (1, 2, 3):
            await generate(prefixes, [first] * 10, first)
        assert len(prefixes) == 3 and prefixes.kept == 48
        await generate(prefixes, [1] * 10, 9)
        assert len(prefixes) == 2 and prefixes.kept == 38, "the second prompt's tree went"
        assert (await generate(prefixes, [1] * 10, 9)).cached_tokens == 10
        many = await asyncio.gather(*(generate(prefixes, [first] * 20, first) for first in range(20)))
        assert len(many) == 20 and prefixes.kept <= 50 and engine.cached_tokens <= 50
        prefixes.flush()
        assert len(prefixes) == prefixes.kept == engine.cached_tokens == 0

    asyncio.run(fill())
