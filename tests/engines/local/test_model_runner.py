"""Packed prefill and recorded steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.local_growth import forest
from tests.support.local_models import PROMPTS, plain_model, prepared, worst_error
from treepo.engines.local import model_runner
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings


def key_values(plain: Any, prefix: list[int]) -> Tensor:
    """[layers, 2, K, t, d] as transformers caches them when the prefix is computed alone."""
    with torch.no_grad():
        cache = plain(input_ids=torch.tensor([prefix]), use_cache=True).past_key_values
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])


@pytest.mark.parametrize("most", [1, 6, 14, 10_000])
def test_a_packed_prefill_equals_one_of_each_prompt(most: int) -> None:
    plain, passes = plain_model(), []
    model = prepared()
    model.model.embed_tokens.register_forward_hook(lambda _, ids, __: passes.append(ids[0].numel()))
    with torch.no_grad():
        found = list(model_runner.prefill(model, PROMPTS, most))
    for prefix, kv in zip(PROMPTS, found, strict=True):
        torch.testing.assert_close(kv, key_values(plain, prefix), atol=1e-6, rtol=1e-5)
    assert passes == {1: [5, 1, 12, 2], 6: [6, 12, 2], 14: [6, 14], 10_000: [20]}[most]  # no padding


@pytest.mark.parametrize("slots", [3, 7, 64])
def test_steps_that_are_recorded_and_replayed_draw_the_same_trees(slots: int) -> None:
    class Replaying(LocalEngine):
        @classmethod
        def _new_slots(cls, *args: Any) -> Any:
            made.append(super()._new_slots(*args))
            made[-1].steps.graphs = True
            return made[-1]

    made: list[Any] = []
    trees = forest(Replaying(prepared(), LocalSettings(slots=slots)))
    for a, b in zip(trees, forest(LocalEngine(prepared(), LocalSettings(slots=slots))), strict=True):
        assert [n.tokens for n in a.nodes] == [n.tokens for n in b.nodes]
        assert worst_error(plain_model(), a) < 1e-5
    sizes = {size for each in made for size in each.steps._recorded}
    assert {rows for rows, _ in sizes} <= {1, 2, 4, 8, 16, 32, slots}
    assert {keys for _, keys in sizes} <= {16, 32, 64, 128}


def test_a_step_is_recorded_once_for_its_sizes_and_again_when_the_cache_has_grown() -> None:
    model = prepared()
    with torch.no_grad():
        cache = model_runner.Cache(model, 64, 1024)
        steps = model_runner.Steps(model, cache, model_runner.Decode, graphs=True)
        recorded = []
        for position, slots in ((0, 3), (1, 4), (2, 4)):
            if position == 2:
                cache.reserve(32, 512)
            steps(torch.ones(slots, dtype=torch.long), torch.full((slots,), position), position + 1)
            recorded.append(steps._recorded[4, 16])
    assert recorded[0] is recorded[1] is not recorded[2]
