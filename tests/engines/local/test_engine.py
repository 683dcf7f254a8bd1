"""The life of an engine: segments that end or are cancelled, new weights, errors."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from typing import Any

import pytest
import torch

from tests.support.local_growth import extend, forest, grow, segment, until
from tests.support.local_models import PROMPTS, oracle, paged, plain_model, prepared, worst_error
from treepo.engines import Sampling, Segment
from treepo.engines.local.decoding import DecodingLoop
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError, EngineError
from treepo.models import causal_lm
from treepo.tree import ROOT, Tree


def test_any_of_several_stop_ids_ends_a_segment_as_its_last_token() -> None:
    free = segment(LocalEngine(prepared()), PROMPTS[0], 30, 3, Sampling())
    stops = {free.tokens[11], free.tokens[17]}
    end = min(free.tokens.index(stop) for stop in stops) + 1
    stopped = segment(LocalEngine(prepared()), PROMPTS[0], 30, 3, Sampling(), stops)
    assert stopped.tokens == free.tokens[:end]
    assert stopped.logprobs == pytest.approx(free.logprobs[:end], abs=1e-5)


def test_trees_with_and_without_stop_ids_share_a_batch() -> None:
    engine = LocalEngine(prepared())
    free = segment(engine, PROMPTS[0], 30, 3, Sampling()).tokens

    async def run() -> list[Segment]:
        handles = [await engine.open(Tree(PROMPTS[0]), Sampling(), stops) for stops in ([], [free[5]], [free[9]])]
        replies = await asyncio.gather(*(handle.generate(ROOT, 30, 3) for handle in handles))
        for handle in handles:
            handle.close()
        return replies

    assert [r.tokens for r in asyncio.run(run())] == [free] + [free[: free.index(free[i]) + 1] for i in (5, 9)]


@pytest.mark.parametrize("page", [4, 64])
def test_a_cancelled_call_frees_its_slot_and_harms_nobody(page: int) -> None:
    engine = paged(page)(prepared(), LocalSettings(slots=2))

    async def run() -> None:
        tree = Tree(PROMPTS[0])
        handle = await engine.open(tree, Sampling(), [])
        calls = [asyncio.create_task(handle.generate(ROOT, 40, seed)) for seed in range(4)]
        await until(lambda: engine.stats.steps >= 5)
        calls[0].cancel()  # decoding
        calls[3].cancel()  # waiting
        replies = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(reply) for reply in replies] == [asyncio.CancelledError, Segment, Segment, asyncio.CancelledError]
        again = await handle.generate(ROOT, 40, 0)  # a seed may be tried again
        for reply in (replies[1], replies[2], again):
            expected = oracle(plain_model(), tree.prompt + reply.tokens)[-40:]
            assert torch.allclose(expected, torch.tensor(reply.logprobs), atol=1e-5)
        handle.close()

    asyncio.run(run())
    assert engine.stats.decoded_tokens < 4 * 40


def test_closing_cancels_what_is_under_way() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        handles = [await engine.open(Tree(PROMPTS[0]), Sampling(), []) for _ in range(2)]
        calls = [asyncio.create_task(handle.generate(ROOT, 60, 1)) for handle in handles]
        await until(lambda: engine.stats.steps >= 3)
        handles[0].close()
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
        assert len((await calls[1]).tokens) == 60
        handles[1].close()
        handles[1].close()

    asyncio.run(run())


def test_closing_a_tree_frees_its_key_values_and_closing_the_last_one_frees_the_slots() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        trees = [Tree(PROMPTS[0]), Tree(PROMPTS[2])]
        first, second = [await grow(engine, tree, Sampling(), close=False) for tree in trees]
        kept = [len(tree.prompt) - 1 + tree.unique_tokens for tree in trees]
        assert engine.cached_tokens == sum(kept)
        first.close()
        assert engine.cached_tokens == kept[1]
        second.close()
        assert engine.cached_tokens == 0 and engine._loop.slots is None
        with pytest.raises(RuntimeError, match="closed"):
            await first.generate(ROOT, 1, 0)

    asyncio.run(run())


def test_later_segments_follow_the_new_weights_in_another_event_loop() -> None:
    model = prepared()
    engine = LocalEngine(model)
    assert forest(engine)[0].nodes[1].version == 0
    plain = plain_model(seed=1)
    model.load_state_dict(plain.state_dict())
    asyncio.run(engine.load_weights(7))
    tree = forest(engine)[0]
    assert {node.version for node in tree.nodes[1:]} == {7}
    assert worst_error(plain, tree) < 1e-5
    assert worst_error(plain_model(seed=0), tree) > 1e-2


def test_weights_do_not_change_under_an_open_tree() -> None:
    engine = LocalEngine(prepared())
    asyncio.run(engine.open(Tree([1, 2]), Sampling(), []))
    with pytest.raises(RuntimeError, match="1 trees are open"):
        asyncio.run(engine.load_weights(1))


def test_a_module_in_training_decodes_without_dropout_and_stays_as_it_was() -> None:
    expected = segment(LocalEngine(prepared()), PROMPTS[0], 10, 1, Sampling())
    model = prepared()
    model.model.embed_tokens.register_forward_hook(
        lambda module, _, output: torch.nn.functional.dropout(output, 0.5, module.training)
    )
    engine = LocalEngine(model)
    model.train()
    model.model.norm.eval()
    reply = segment(engine, PROMPTS[0], 10, 1, Sampling())
    assert reply == expected
    assert model.training and model.model.layers[0].training and not model.model.norm.training
    ids = torch.tensor([PROMPTS[0]])
    plan = causal_lm.Causal()
    causal_lm.hidden(model, ids, torch.arange(ids.shape[1])[None], plan).sum().backward()  # nothing is left behind


def test_requests_that_cannot_fit_say_so() -> None:
    engine = LocalEngine(prepared(), LocalSettings(max_tokens=16))
    assert engine.context == 16

    async def run() -> None:
        with pytest.raises(EngineError, match=r"20 tokens.*16.*engine\.max_tokens"):
            await engine.open(Tree([1] * 20), Sampling(), [])
        with pytest.raises(ConfigError, match=r"stop ids \[40\]"):
            await engine.open(Tree([1]), Sampling(), [1, 40])
        handle = await engine.open(Tree([1] * 10), Sampling(), [])
        with pytest.raises(EngineError, match=r"10 tokens of prefix and max_tokens=7 exceed 16"):
            await handle.generate(ROOT, 7, 1)
        assert len((await handle.generate(ROOT, 6, 1)).tokens) == 6
        handle.close()

    asyncio.run(run())


def test_a_seed_names_one_segment_of_a_tree() -> None:
    engine = LocalEngine(prepared())

    async def run() -> None:
        tree = Tree(PROMPTS[0])
        handle = await engine.open(tree, Sampling(), [])
        (node,) = await extend(tree, handle, (ROOT, 3, 1))
        with pytest.raises(ValueError, match="seed 1 already"):
            await handle.generate(node, 3, 1)
        handle.close()

    asyncio.run(run())


class FailingLoop(DecodingLoop):
    """Raises `error`, if there is one, instead of decoding."""

    error: Exception | None = None

    def step(self) -> None:
        if self.error is not None:
            raise self.error
        super().step()


class Failing(LocalEngine):
    loop = FailingLoop


@pytest.mark.parametrize(
    ("error", "seen", "text"),
    [
        (KeyError("bug"), KeyError, "bug"),
        (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
        (torch.OutOfMemoryError("no memory"), EngineError, r"lower engine\.slots"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), EngineError, r"lower engine\.slots"),
    ],
)
def test_an_error_reaches_everyone_who_waits_and_the_engine_lives_on(error: Exception, seen: Any, text: str) -> None:
    engine = Failing(prepared(), LocalSettings(slots=2))

    async def run() -> None:
        handle = await engine.open(Tree(PROMPTS[0]), Sampling(), [])
        engine._loop.error = error
        calls = [asyncio.create_task(handle.generate(ROOT, 5, seed)) for seed in range(5)]
        await asyncio.wait(calls)
        for call in calls:
            with pytest.raises(seen, match=text):
                call.result()
        engine._loop.error = None
        assert len((await handle.generate(ROOT, 5, 1)).tokens) == 5
        handle.close()

    asyncio.run(run())


def test_logits_that_are_not_finite_fail_the_segment() -> None:
    model = prepared()
    engine = LocalEngine(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(EngineError, match="not finite"):
        segment(engine, PROMPTS[0], 5, 1, Sampling())


def test_a_model_without_the_seam_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"causal_lm\.prepare"):
        LocalEngine(plain_model())


def test_an_event_loop_that_died_under_way_does_not_block_the_next() -> None:
    engine, lost = LocalEngine(prepared()), []

    async def leave() -> None:
        handle = await engine.open(Tree(PROMPTS[0]), Sampling(), [])
        lost.append(asyncio.create_task(handle.generate(ROOT, 60, 1)))
        await until(lambda: engine.stats.steps >= 3)

    asyncio.run(leave())
    assert len(segment(engine, PROMPTS[2], 10, 1, Sampling()).tokens) == 10


def test_an_engine_that_nobody_uses_any_more_lets_go_of_its_model_at_once() -> None:
    model = prepared()
    engine = LocalEngine(model)
    forest(engine)
    alive = weakref.ref(engine)
    gc.disable()  # Python's search for cycles must not be needed
    try:
        del engine
        assert alive() is None
    finally:
        gc.enable()
