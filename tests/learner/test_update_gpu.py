"""The same exactness on CUDA: decoding, packed log-probs and gradients. Skipped where there is no CUDA device."""

import copy

import numpy as np
import pytest
import torch

from treepo import Forest, LocalEngine, LocalSettings, Sampler, SamplerSettings
from treepo.learner.gradient import backward_row
from treepo.learner.loss import PolicyLoss, policy_loss
from treepo.learner.packing import fold, pack_row
from treepo.models import causal_lm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_the_engine_equals_a_plain_forward_pass_on_cuda(on_cuda) -> None:
    served = causal_lm.prepare(copy.deepcopy(on_cuda))
    settings = SamplerSettings(width=12, segment_tokens=8, max_depth=5)
    sampler = Sampler(LocalEngine(served, LocalSettings(slots=7)), settings, str, {1})
    for tree in sampler.sample([(str(i), list(range(2, 5 + i))) for i in range(6)], seed=0):
        for leaf in tree.leaves():
            ids = torch.tensor([tree.tokens(leaf)], device="cuda")
            with torch.no_grad():
                logprobs = on_cuda(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            expected = logprobs[0, :-1].gather(1, ids[0, 1:, None])[len(tree.prompt) - 1 :, 0].cpu()
            sampled = torch.tensor([value for node in tree.path(leaf) for value in tree.nodes[node].logprobs])
            torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("plan", ["auto", "chains"])
@pytest.mark.parametrize("max_tokens", [40, 10**6])
def test_the_packed_update_on_cuda_equals_the_one_on_the_cpu(plan, max_tokens, on_cuda, random_rollout) -> None:
    trees = [random_rollout(seed, leaves=12, segment=16, vocabulary=60) for seed in range(4)]
    forest = Forest.of(trees)
    folded = fold(forest, np.random.default_rng(0).standard_normal(forest.path.shape))
    batch = pack_row(forest, folded, range(4))
    gradients = {}

    def loss(rows, logprob, _) -> torch.Tensor:
        arrays = (torch.as_tensor(x[rows], device=logprob.device) for x in (batch.adv_pos, batch.adv_neg, batch.weight))
        return policy_loss(PolicyLoss(), logprob, None, *arrays, float(batch.weight.sum()))[0]

    for device in ("cpu", "cuda"):
        policy = causal_lm.prepare(copy.deepcopy(on_cuda).to(device))
        backward_row(policy, batch, loss, max_tokens=max_tokens, plan=plan if device == "cuda" else "reference")
        gradients[device] = {name: p.grad.cpu() for name, p in policy.named_parameters()}
    largest = max(g.abs().max().item() for g in gradients["cpu"].values())
    for name, expected in gradients["cpu"].items():
        torch.testing.assert_close(gradients["cuda"][name], expected, atol=1e-4 * largest, rtol=0)
