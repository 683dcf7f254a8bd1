"""Trees from an engine, and what must hold for them: whole, with the log-probs of the model, from the right weights."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from treepo.engines import Engine
from treepo.models import causal_lm
from treepo.models.attention import Causal
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import Stop, Tree

PROMPTS = [(f"q{i}", [5 + i, 6, 7 + 2 * i]) for i in range(6)]
SHAPE: dict[str, Any] = {"width": 6, "segment_tokens": 5, "max_depth": 4}
EXACT = 1e-4  # nats: what two computations of one log-prob in float32 differ by at most


def run(engine: Any, *works: Callable[[], Awaitable[Any]]) -> Any:
    """The results of functions of a running engine, which is closed at the end; of one function, its result."""

    async def all_of_them() -> list[Any]:
        try:
            return [await work() for work in works]
        finally:
            await engine.close()

    found = asyncio.run(all_of_them())
    return found[0] if len(found) == 1 else found


def grow(
    engine: Engine,
    prompts: Sequence[tuple[str, Sequence[int]]] = PROMPTS,
    stop_ids: Collection[int] = (0,),
    seed: int = 0,
    **more: Any,
) -> Callable[[], Awaitable[list[Tree]]]:
    """A function that samples a tree for each prompt, of the usual shape with the settings `more`."""
    sampler = Sampler(engine, SamplerSettings(**SHAPE | more), str, frozenset(stop_ids))
    return lambda: sampler.grow_all(list(prompts), seed)


def worst_error(model: PreTrainedModel, tree: Tree, temperature: float = 1.0) -> float:
    """Largest difference in nats between the tree's log-probs and those of one plain forward pass per leaf."""
    worst = 0.0
    for leaf in tree.leaves():
        if tree.nodes[leaf].stop is Stop.ERROR:
            continue
        ids = torch.tensor([tree.tokens(leaf)], device=model.device)
        with torch.no_grad():
            states = causal_lm.hidden(model, ids, torch.arange(ids.shape[1], device=ids.device)[None], Causal())
            logits = causal_lm.logits(model, states)[0, len(tree.prompt) - 1 : -1] / temperature
        plain = logits.log_softmax(-1).gather(1, ids[0, len(tree.prompt) :, None])[:, 0].cpu()
        sampled = torch.tensor([lp for node in tree.path(leaf) for lp in tree.nodes[node].logprobs])
        worst = max(worst, (plain - sampled).abs().max().item())
    return worst


def worst_of(model: PreTrainedModel, trees: Sequence[Tree], temperature: float = 1.0) -> float:
    """The largest `worst_error` of all trees."""
    return max(worst_error(model, tree, temperature) for tree in trees)


def intact(trees: Sequence[Tree], width: int = 6) -> bool:
    """Every tree is complete, with nothing lost."""
    assert len(trees) == len(PROMPTS)
    for tree in trees:
        assert len(tree.leaves()) == width
        for index, node in enumerate(tree.nodes[1:], 1):
            assert (node.stop is None) == bool(tree.children[index])
            assert len(node.tokens) == len(node.logprobs) and node.stop is not Stop.ERROR
    return True


def shaken(model: PreTrainedModel, by: float = 0.3) -> None:
    """Move all weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * parameter.std() * torch.randn(parameter.shape, generator=generator))


async def follows_updates(
    engine: Any,
    model: PreTrainedModel,
    move: Callable[[int], None],
    grown: Callable[[], Awaitable[list[Tree]]] | None = None,
) -> list[list[Tree]]:
    """Move `model` twice, by `move(version)`; each time the engine must decode with the new weights and say so.

    `grown`: how trees are sampled; the same prompts and seeds every time, so that a stale prefix cache would show.
    Returns the trees of both versions.
    """
    grown = grown or grow(engine)
    before, found = await grown(), []
    assert worst_of(model, before) < EXACT
    for version in (1, 2):
        move(version)
        assert worst_of(model, before) > 0.01, "the test wants an update that shows"
        await engine.load_weights(version)
        before = await grown()
        assert worst_of(model, before) < EXACT
        assert {node.version for tree in before for node in tree.nodes[1:]} == {version}
        found.append(before)
    return found
