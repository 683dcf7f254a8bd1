"""One whole training step: TreePO on packed trees against GRPO on independent responses and padded rows.

Both sample the same number of leaves of the same length with the same model on the local engine, reward them, compute
advantages, accumulate the gradient and take an AdamW step. GRPO's update takes the padded rows in the fastest of
several micro-batch sizes. The packed update may hold as many tokens at once. `speedup` is GRPO / TreePO time of the
whole step, `sampling_speedup` and `update_speedup` are those of its two large parts. The `_share` fields say which part
of TreePO's step each of them took. `decoded_ratio` and `flat_over_unique` are the speed-ups of sampling and update that
sharing would give if every token cost the same.

    python -m benchmarks.training [--quick] [--threads N] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks import report
from benchmarks.flat import VOCABULARY, FlatRows, new_model
from treepo.advantages import GRPO, TreePO
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.forest import Forest
from treepo.learner.gradient import accumulate
from treepo.learner.loss import PolicyLoss
from treepo.learner.packing import pack
from treepo.policies.branching import LevelBudget
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import ScoredTree, Tree

LEAVES = 16
LEVELS = 8
COLUMNS = (
    "shape",
    "speedup",
    "sampling_speedup",
    "decoded_ratio",
    "update_speedup",
    "flat_over_unique",
    "sample_share",
)


# One path until level 4, then two children each: what problems with a long common beginning allow.
LATE = LevelBudget(first_divergence=1, start=4)


def main() -> None:
    args = report.arguments(__doc__ or "")
    hidden, layers, prompts, segment, repeats = (128, 2, 2, 8, 1) if args.quick else (256, 4, 8, 64, args.repeats)
    model = new_model(hidden, layers)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCABULARY, 4 * segment if args.quick else 64).tolist() for _ in range(prompts)]
    shape = SamplerSettings(width=LEAVES, segment_tokens=segment, max_depth=LEVELS)
    shapes = {
        "late forks": shape.model_copy(update={"branching": LATE}),
        "early forks": shape.model_copy(update={"branching": LevelBudget(first_divergence=2)}),
    }
    longest = len(ids[0]) + shape.response_tokens
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    micro = _fastest_micro_batch(plain, _sample(model, shape.model_copy(update={"mode": "iid"}), ids))
    arms: dict[str, Callable[[], dict[str, float]]] = {
        "grpo": partial(_grpo_step, model, plain, shape.model_copy(update={"mode": "iid"}), ids, micro),
        **{name: partial(_tree_step, model, s, ids, micro * longest) for name, s in shapes.items()},
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):  # the first round is not counted
        for name, arm in arms.items():
            found = arm()
            if repeat:
                runs[name].append(found)
            print(f"{name}: {found['seconds']:.1f} s", file=sys.stderr)
    median = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    report.finish(
        "training",
        [
            _row(name, median["grpo"], median[name])
            | {
                "micro_batch": micro,
                "max_tokens": micro * longest,
                "threads": args.threads,
                "repeats": repeats,
                "parameters": model.num_parameters(),
                "leaves": LEAVES * prompts,
                "response_tokens": shape.response_tokens,
            }
            for name in shapes
        ],
        args,
        COLUMNS,
    )


def _row(name: str, grpo: dict[str, float], tree: dict[str, float]) -> dict[str, Any]:
    if grpo["flat"] != tree["flat"]:
        raise RuntimeError(f"{name} has {tree['flat']} trajectory tokens, and GRPO {grpo['flat']}")
    rest = tree["seconds"] - tree["sample"] - tree["update"]
    return {
        "shape": name,
        "speedup": grpo["seconds"] / tree["seconds"],
        "sampling_speedup": grpo["sample"] / tree["sample"],
        "decoded_ratio": grpo["decoded"] / tree["decoded"],
        "update_speedup": grpo["update"] / tree["update"],
        "flat_over_unique": tree["with_prompts"] / tree["unique"],
        "sample_share": tree["sample"] / tree["seconds"],
        "update_share": tree["update"] / tree["seconds"],
        "rest_share": rest / tree["seconds"],  # rewards, advantages, packing
        "treepo_s": tree["seconds"],
        "grpo_s": grpo["seconds"],
    }


def _sample(model: PreTrainedModel, settings: SamplerSettings, prompts: Sequence[list[int]]) -> list[ScoredTree]:
    engine = LocalEngine(model, LocalSettings(slots=len(prompts) * LEAVES))
    sampler = Sampler(engine, settings, str, ())  # nothing stops a response early
    trees = sampler.sample([(str(i), prompt) for i, prompt in enumerate(prompts)], seed=0)
    return [ScoredTree(tree.key, tree, [_reward(tree, leaf) for leaf in tree.leaves()]) for tree in trees]


def _reward(tree: Tree, leaf: int) -> float:
    return float(sum(tree.response(leaf)) % 2)


def _tree_step(
    model: PreTrainedModel, settings: SamplerSettings, prompts: Sequence[list[int]], max_tokens: int
) -> dict[str, float]:
    clock = _Clock()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    trees = _sample(model, settings, prompts)
    clock.lap("sample")
    forest = Forest.of(trees)
    rows = pack(forest, TreePO()(forest), max_tokens=max_tokens)
    clock.lap("rest")
    accumulate(model, rows, PolicyLoss(), max_tokens=max_tokens)
    optimizer.step()
    optimizer.zero_grad()
    clock.lap("update")
    return clock.laps | _sizes(trees) | {"unique": float(sum(map(len, rows)))}


def _grpo_step(
    model: PreTrainedModel, plain: PreTrainedModel, settings: SamplerSettings, prompts: Sequence[list[int]], micro: int
) -> dict[str, float]:
    clock = _Clock()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6)
    trees = _sample(model, settings, prompts)
    clock.lap("sample")
    forest = Forest.of(trees)
    flat = FlatRows(forest, GRPO()(forest))
    clock.lap("rest")
    flat.step(plain, micro)
    optimizer.step()
    optimizer.zero_grad()
    clock.lap("update")
    return clock.laps | _sizes(trees) | {"unique": float(flat.tokens)}


def _fastest_micro_batch(plain: PreTrainedModel, trees: Sequence[ScoredTree]) -> int:
    forest = Forest.of(trees[:2])
    flat = FlatRows(forest, np.ones(forest.path.shape))
    return report.fastest((1, 4, 16), lambda n: flat.step(plain, n))


def _sizes(trees: Sequence[ScoredTree]) -> dict[str, float]:
    flat = sum(scored.tree.flat_tokens for scored in trees)
    return {
        "decoded": float(sum(scored.tree.unique_tokens for scored in trees)),
        "flat": float(flat),
        "with_prompts": float(flat + sum(len(scored.tree.prompt) * len(scored.tree.leaves()) for scored in trees)),
    }


class _Clock:
    """Seconds of the parts of a step, and of the whole."""

    def __init__(self) -> None:
        self.start = self.last = report.clock()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = report.clock()
        self.laps |= {name: now - self.last, "seconds": now - self.start}
        self.last = now


if __name__ == "__main__":
    main()
