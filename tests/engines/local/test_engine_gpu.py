"""Recorded steps on CUDA decode what plain ones do. Skipped where there is no CUDA device."""

import asyncio
import copy

import pytest
import torch

from treepo import LocalEngine, LocalSettings, Sampler, SamplerSettings
from treepo.models import causal_lm
from treepo.tree import Tree

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def grown(policy: torch.nn.Module, settings: LocalSettings) -> list[Tree]:
    sampler = Sampler(
        LocalEngine(policy, settings), SamplerSettings(width=12, segment_tokens=24, max_depth=8), str, {1}
    )
    return sampler.sample([(str(i), list(range(2, 5 + i))) for i in range(6)], seed=0)


@pytest.mark.parametrize("slots", [1, 7, 128])
def test_recorded_steps_are_exact_on_cuda(on_cuda: torch.nn.Module, slots: int) -> None:
    served = causal_lm.prepare(copy.deepcopy(on_cuda))
    for tree in grown(served, LocalSettings(slots=slots, cuda_graphs=True)):
        for leaf in tree.leaves():
            ids = torch.tensor([tree.tokens(leaf)], device="cuda")
            with torch.no_grad():
                logprobs = on_cuda(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            expected = logprobs[0, :-1].gather(1, ids[0, 1:, None])[len(tree.prompt) - 1 :, 0].cpu()
            sampled = torch.tensor([value for node in tree.path(leaf) for value in tree.nodes[node].logprobs])
            torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)


def test_recorded_steps_see_weights_that_changed_in_place(on_cuda: torch.nn.Module) -> None:
    served = causal_lm.prepare(copy.deepcopy(on_cuda))
    engine = LocalEngine(served, LocalSettings(slots=7))
    sampler = Sampler(engine, SamplerSettings(width=4, segment_tokens=8, max_depth=4), str, {1})
    before = sampler.sample([("0", [2, 3, 4])], seed=0)[0]
    with torch.no_grad():
        for parameter in served.parameters():
            parameter.mul_(1.5)
    asyncio.run(engine.load_weights(1))
    after = sampler.sample([("0", [2, 3, 4])], seed=0)[0]
    fresh = Sampler(LocalEngine(served, LocalSettings(slots=7, cuda_graphs=False)), sampler.settings, str, {1})
    assert [n.tokens for n in after.nodes] == [n.tokens for n in fresh.sample([("0", [2, 3, 4])], seed=0)[0].nodes]
    assert [n.logprobs for n in after.nodes] != [n.logprobs for n in before.nodes]
