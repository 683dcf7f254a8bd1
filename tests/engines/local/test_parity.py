"""The embedded engine against plain forward passes: exact log-probs and entropies, and mutants that must fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.local_growth import extend, forest, segment
from tests.support.local_models import PROMPTS, oracle, paged, plain_model, prepared, worst_error
from treepo.engines import Sampling, Segment
from treepo.engines.local import model_runner
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.tree import ROOT, Tree


@pytest.mark.parametrize("page", [1, 4, 8, 64])
@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize(("family", "kv_heads"), [("qwen2", 2), ("qwen2", 4), ("llama", 2), ("llama", 1), ("qwen3", 2)])
def test_every_log_prob_equals_that_of_a_plain_forward(family: str, kv_heads: int, slots: int, page: int) -> None:
    plain = plain_model(family=family, kv_heads=kv_heads)
    engine = paged(page)(prepared(family=family, kv_heads=kv_heads), LocalSettings(slots=slots))
    for tree in forest(engine):
        assert len(tree.leaves()) == 20
        assert worst_error(plain, tree) < 1e-5


class SeesOneTooMany(model_runner.Decode):
    """Mutant: each query sees the stale key after its own."""

    def __init__(self, cache: model_runner.Cache, positions: Tensor, longest: int) -> None:
        super().__init__(cache, positions, longest)
        self._bias = torch.cat((self._bias[..., :1], self._bias[..., :-1]), -1)


class WritesTooEarly(model_runner.Decode):
    """Mutant: keys land one place before their own."""

    def __init__(self, cache: model_runner.Cache, positions: Tensor, longest: int) -> None:
        super().__init__(cache, positions, longest)
        self._positions = positions - 1


class ReadsTooLate(model_runner.Cache):
    """Mutant: what a segment leaves behind begins one token late."""

    def read(self, slot: int, begin: int, end: int) -> Tensor:
        return super().read(slot, begin + 1, end + 1)


@pytest.mark.parametrize("mutant", [SeesOneTooMany, WritesTooEarly, ReadsTooLate])
def test_the_oracle_rejects_what_is_off_by_one(mutant: Any) -> None:
    class Mutated(LocalEngine):
        plan = mutant if issubclass(mutant, model_runner.Decode) else model_runner.Decode
        cache = mutant if issubclass(mutant, model_runner.Cache) else model_runner.Cache

    (tree,) = forest(Mutated(prepared(), LocalSettings(slots=3)), prompts=PROMPTS[:1])
    assert worst_error(plain_model(), tree) > 1e-3


def test_temperature_is_part_of_the_distribution_sampled() -> None:
    (tree,) = forest(LocalEngine(prepared()), Sampling(temperature=0.7), PROMPTS[:1])
    assert worst_error(plain_model(), tree, temperature=0.7) < 1e-5
    assert worst_error(plain_model(), tree, temperature=1.0) > 1e-2


def test_a_path_that_this_engine_did_not_sample_is_prefilled_and_exact() -> None:
    engine = LocalEngine(prepared())
    tree = Tree([1, 2, 3])
    node = tree.add(tree.add(ROOT, [4, 5], [-1.0, -1.0], seed=77), [6], [-1.0], seed=78)

    async def run() -> None:
        handle = await engine.open(tree, Sampling(), [])
        for child in await extend(tree, handle, (node, 5, 1), (node, 5, 2)):
            expected = oracle(plain_model(), tree.tokens(child))[-5:]
            assert torch.allclose(expected, torch.tensor(tree.nodes[child].logprobs), atol=1e-5)
        assert engine.stats.prefilled_tokens == 5
        handle.close()

    asyncio.run(run())


def test_the_halves_of_a_segment_that_this_engine_did_not_sample_are_prefilled_as_one() -> None:
    engine = LocalEngine(prepared())
    tree = Tree([1, 2, 3])
    leaf = tree.add(ROOT, [4, 5, 6, 7, 8], [-1.0] * 5, seed=77)
    head = tree.split(leaf, 2)

    async def run() -> None:
        handle = await engine.open(tree, Sampling(), [])
        for child in await extend(tree, handle, (leaf, 5, 1), (head, 5, 2)):
            expected = oracle(plain_model(), tree.tokens(child))[-5:]
            assert torch.allclose(expected, torch.tensor(tree.nodes[child].logprobs), atol=1e-5)
        handle.close()

    asyncio.run(run())


def test_greedy_equals_the_generate_of_transformers() -> None:
    plain = plain_model()
    prompt = PROMPTS[2]
    expected = plain.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)[0, len(prompt) :].tolist()
    reply = segment(LocalEngine(prepared()), prompt, 30, 5, Sampling(temperature=0))
    assert reply.tokens == expected
    assert reply.logprobs == [0.0] * 30


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.6, top_k=3), Sampling(top_p=0.5), Sampling(temperature=0)]
)
@pytest.mark.parametrize("page", [2, 64])
def test_entropies_are_those_of_a_plain_forward_after_temperature_and_before_filters(
    sampling: Sampling, page: int
) -> None:
    plain, engine, tree = plain_model(), paged(page)(prepared(), LocalSettings(slots=3)), Tree(PROMPTS[0])

    async def run() -> list[Segment]:
        asks = await engine.open(tree, sampling, [], entropies=True)
        other = await engine.open(Tree(PROMPTS[2]), Sampling(temperature=2), [])  # shares the batch, and does not ask
        *replies, silent = await asyncio.gather(
            *(asks.generate(ROOT, n, n) for n in (3, 9, 5, 12)), other.generate(ROOT, 20, 1)
        )
        assert silent.entropies is None
        for handle in (asks, other):
            handle.close()
        return replies

    for reply in asyncio.run(run()):
        ids = torch.tensor([tree.prompt + reply.tokens])
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0, len(tree.prompt) - 1 : -1].double()
        p = (logits / (sampling.temperature or 1.0)).softmax(-1)
        expected = -(p * p.log()).sum(-1)
        assert reply.entropies == pytest.approx(expected.tolist(), abs=1e-5)
        assert len(reply.entropies) == len(reply.tokens)


def test_trees_of_different_sampling_share_a_batch() -> None:
    engine, plain = LocalEngine(prepared()), plain_model()
    kinds = [Sampling(temperature=0), Sampling(), Sampling(temperature=0.5), Sampling(top_k=2)]

    async def run() -> list[Segment]:
        handles = [await engine.open(Tree(PROMPTS[0]), sampling, []) for sampling in kinds]
        replies = await asyncio.gather(*(handle.generate(ROOT, 12, 7) for handle in handles))
        for handle in handles:
            handle.close()
        return replies

    together = asyncio.run(run())
    alone = [segment(LocalEngine(prepared()), PROMPTS[0], 12, 7, sampling) for sampling in kinds]
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    half = oracle(plain, PROMPTS[0] + together[2].tokens, 0.5)[-12:]
    assert torch.allclose(half, torch.tensor(together[2].logprobs), atol=1e-5)
