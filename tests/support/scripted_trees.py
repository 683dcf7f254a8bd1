"""Trees grown on the scripted engine: an alphabet, scripts, and a sampler small enough to look at."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from treepo.engines.scripted import ScriptedEngine
from treepo.policies import Frontier
from treepo.sampler import Sampler, SamplerSettings
from treepo.seeds import generator
from treepo.tree import ROOT, Stop, Tree

EOS = 1
ALPHABET = "$^abcdefgh{}\\boxe"


def decode(tokens: Sequence[int]) -> str:
    return "".join(ALPHABET[t % len(ALPHABET)] for t in tokens if t != EOS)


def encode(text: str) -> list[int]:
    return [ALPHABET.index(c) for c in text]


def sampler(engine: ScriptedEngine, stop_ids: Sequence[int] = (EOS,), **given: Any) -> Sampler:
    shape = {"width": 8, "segment_tokens": 4, "max_depth": 5} | given
    return Sampler(engine, SamplerSettings(**shape), decode, stop_ids)


def mixed(seed: int, max_tokens: int) -> list[int]:
    """Letters, with an EOS here and there and, rarely, a box."""
    rng = generator(seed)
    if rng.random() < 0.1:
        return encode("\\boxed{a}"[:max_tokens])
    return [EOS if rng.random() < 0.06 else rng.randrange(2, 10) for _ in range(max_tokens)]


def mixed_reply(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
    return mixed(seed, max_tokens)


def never_ends(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
    return [2 + (seed >> i) % 8 for i in range(max_tokens)]


def per_level(tree: Tree) -> list[int]:
    """Segments at each depth from 1 on."""
    return [sum(node.depth == depth for node in tree.nodes) for depth in range(1, max(n.depth for n in tree.nodes) + 1)]


def star(*paths: Sequence[float], entropies: Sequence[Sequence[float]] | None = None) -> Tree:
    """A tree whose root has a child for each of `paths`, which are the log-probs of its tokens."""
    tree = Tree([2])
    for i, logprobs in enumerate(paths):
        tree.add(ROOT, [3] * len(logprobs), logprobs, seed=i, entropies=None if entropies is None else entropies[i])
    return tree


def chain(stop: Stop, *segments: Sequence[float]) -> Tree:
    """A single path of segments with these log-probs; its leaf is the last node."""
    tree, node = Tree([2]), ROOT
    for i, logprobs in enumerate(segments):
        last = stop if i == len(segments) - 1 else None
        node = tree.add(node, [3] * len(logprobs), logprobs, seed=i, stop=last)
    return tree


def frontier(tree: Tree, active: Sequence[int] = (), finished: Sequence[int] = (), **given: Any) -> Frontier:
    """The tree between two levels; 8 leaves wanted, 5 levels, seed 0, unless said."""
    state = {"finished_now": 0, "width": 8, "levels": 5, "progress": 0.0, "seed": 0} | given
    return Frontier(tree, active, finished, rng=Random(state.pop("seed")), **state)
