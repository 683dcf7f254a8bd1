"""Drawing tokens: filters, the inverse of the cumulative distribution, random numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.local_growth import segments
from tests.support.local_models import PROMPTS, V, plain_model, prepared
from treepo.engines import Sampling
from treepo.engines.local.engine import LocalEngine
from treepo.engines.local.token_sampling import NUCLEUS, WIDER, Draw, invert, uniform


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=3), Sampling(top_p=0.6), Sampling(top_k=5, top_p=0.8, temperature=1.5), Sampling(top_k=1000)],
)
def test_filters_keep_their_support_and_renormalise(sampling: Sampling) -> None:
    plain, prompt = plain_model(), PROMPTS[0]
    for reply in segments(LocalEngine(prepared()), prompt, 25, range(8), sampling):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + reply.tokens])).logits[0, len(prompt) - 1 : -1]
        for row, token, logprob in zip(logits, reply.tokens, reply.logprobs, strict=True):
            assert math.isclose(filtered(row, sampling)[token], math.exp(logprob), rel_tol=1e-4)


def filtered(logits: Tensor, sampling: Sampling) -> dict[int, float]:
    """The distribution after temperature, top-k and top-p, token by token as their definitions say."""
    p = (logits.double() / sampling.temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])[: sampling.top_k or None]
    total = sum(p[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if sampling.top_p == 1 or mass < sampling.top_p * total:
            kept.append(token)
            mass += p[token]
    return {token: p[token] / mass for token in kept}


@pytest.mark.parametrize("spread", [0.1, 3.0])  # top-p keeps more tokens than are sorted at first, or fewer
def test_filters_are_exact_on_a_large_vocabulary(spread: float) -> None:
    size = 4 * NUCLEUS
    kinds = [Sampling(top_p=0.7), Sampling(top_k=50, top_p=0.5), Sampling(top_k=2000), Sampling()]
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0)) * spread
    expected = [filtered(logits, sampling) for sampling in kinds]
    assert (len(expected[0]) > NUCLEUS) == (spread == 0.1)
    for chosen in (kinds, kinds[:1]):
        draw = Draw.of([(sampling, 5, 0) for sampling in chosen], size, torch.device("cpu"))
        for _ in range(50):
            for kept, token, logprob in zip(
                expected, *(x.tolist() for x in draw(logits.expand(len(chosen), size))), strict=False
            ):
                assert math.isclose(kept[token], math.exp(logprob), rel_tol=1e-4)


def test_a_nucleus_of_any_size_is_exact() -> None:
    size = 2 * WIDER * NUCLEUS
    spreads = torch.tensor([[3.0], [0.8], [0.05]])  # top-p keeps few tokens, more than are sorted at first, and most
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(0)) * spreads
    expected = [filtered(row, Sampling(top_p=0.7)) for row in logits]
    assert len(expected[0]) < NUCLEUS < len(expected[1]) < WIDER * NUCLEUS < len(expected[2])
    draw = Draw.of([(Sampling(top_p=0.7), seed, 0) for seed in range(3)], size, torch.device("cpu"))
    for _ in range(30):
        for kept, token, logprob in zip(expected, *(x.tolist() for x in draw(logits)), strict=True):
            assert math.isclose(kept[token], math.exp(logprob), rel_tol=1e-4)


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = p * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


def test_draws_follow_the_softmax() -> None:
    n = 20_000
    logits = torch.linspace(-2, 2, V)
    draw = Draw.of([(Sampling(), seed, 0) for seed in range(n)], V, torch.device("cpu"))
    p = logits.double().softmax(-1)
    limit = 74.7  # 39 degrees of freedom: exceeded with probability 0.0005
    for _ in range(3):
        tokens, logprobs = draw(logits.expand(n, V))
        counts = torch.bincount(tokens, minlength=V).double()
        assert chi_square(counts, p) < limit
        assert chi_square(counts, (logits.double() * 1.1).softmax(-1)) > limit  # the mutant: another temperature
        assert torch.allclose(logprobs.exp().double(), p[tokens])


def test_uniforms_are_splitmix64() -> None:
    # First outputs for the seed 1234567, as in the public test vectors of the generator.
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    states = [(1234567 + gamma * i) & mask for i in range(1, 4)]
    got = uniform(torch.tensor([s - (1 << 64) if s >> 63 else s for s in states]))
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert got.tolist() == [(value >> 11) * 2.0**-53 for value in expected]


@pytest.mark.parametrize("size", [1, 40, 128, 129, 1000])
def test_inversion_equals_a_search_in_the_running_sum(size: int) -> None:
    torch.manual_seed(size)
    p = torch.rand(500, size) * (torch.rand(500, size) < 0.5)
    p[:, size // 2] += 0.1
    u = torch.rand(500, dtype=torch.float64)
    sums = p.double().cumsum(-1)
    tokens, total = invert(p, u)
    assert torch.allclose(total, sums[:, -1])
    assert torch.equal(tokens, torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)[:, 0])
    for edge in (0.0, 1 - 2.0**-53):  # the ends never leave the support
        tokens, _ = invert(p, torch.full((500,), edge, dtype=torch.float64))
        assert (p.gather(1, tokens[:, None]) > 0).all()


def test_tokens_that_cannot_be_drawn_add_no_entropy() -> None:
    draw = Draw.of([(Sampling(), 0, 0)], 4, torch.device("cpu"))
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert draw.entropies(logits).tolist() == pytest.approx([math.log(2)])
