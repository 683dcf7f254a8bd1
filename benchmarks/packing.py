"""The packed update against padded per-trajectory rows: forward and backward of one gradient step.

Both accumulate the gradient of the same loss from the same weights with the same chunked log-softmax. The baseline runs
one row per leaf through the model's own sdpa attention. Its rows are sorted by length and padded to the longest of
their micro-batch, and it takes the fastest of several micro-batch sizes. In the packed update each tree is a row. It
keeps the activations of no more tokens at once than the baseline's micro-batch, and is computed in pieces if it has
more. It takes the fastest of several budgets (`max_tokens`) up to that size.

- `speedup`: baseline / packed time.
- `flat_over_unique`: the speed-up that sharing would give if every token cost the same. `efficiency`: their ratio.
- `flops_ratio`: the speed-up that sharing would give if every operation cost the same. Late tokens attend to more keys
  than early ones, and the shared tokens are early.
- `memory_ratio`: packed / baseline peak of live tensor storage during the step (operator outputs and what autograd
  keeps; scratch space inside kernels is not counted).
- `whole_speedup`, `whole_memory_ratio`: the same for packed rows that are not divided into pieces.

    python -m benchmarks.packing [--quick] [--threads N] [--repeats N] [--out FILE]
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from benchmarks import report
from benchmarks.flat import VOCABULARY, FlatRows, new_model
from treepo.forest import Forest, Ints
from treepo.learner.gradient import backward_row
from treepo.learner.loss import PolicyLoss, policy_loss
from treepo.learner.packing import PackedBatch, pack
from treepo.learner.row_pieces import pieces, tokens_held
from treepo.tree import ROOT, ScoredTree, Stop, Tree

MICRO_BATCHES = (1, 4, 16)
COLUMNS = (
    *("shape", "flat_over_unique", "flops_ratio", "speedup", "efficiency", "memory_ratio"),
    *("max_logprob_error", "max_grad_error"),
)


def main() -> None:
    args = report.arguments(__doc__ or "")
    scale = 4 if args.quick else 1
    model = new_model(hidden=128, layers=2) if args.quick else new_model(hidden=256, layers=4)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    results = []
    for name, trees in _shapes(np.random.default_rng(0), scale).items():
        micro_batches, repeats = ((4, 16), 1) if args.quick else (MICRO_BATCHES, args.repeats)
        results.append(_compare(name, trees, model, plain, micro_batches, repeats))
        print(f"{name}: {results[-1]['speedup']:.2f}x of {results[-1]['flat_over_unique']:.2f}x", file=sys.stderr)
        report.keep("packing", results, args)
    report.finish("packing", results, args, columns=COLUMNS)


def _compare(
    name: str,
    trees: Sequence[Tree],
    model: PreTrainedModel,
    plain: PreTrainedModel,
    micro_batches: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    forest = Forest.of([ScoredTree(str(t), tree, [0.0] * len(tree.leaves())) for t, tree in enumerate(trees)])
    advantage = rng.standard_normal(forest.path.shape)
    # This budget gives each tree a row of its own. On a CPU that is as fast as one row of all, and needs less memory.
    batches = pack(forest, advantage, max_tokens=1)
    flat = FlatRows(forest, advantage)

    def packed_step(max_tokens: int) -> list[Tensor]:
        model.zero_grad()
        found = []
        for batch in batches:
            logprobs = torch.zeros(len(batch))
            backward_row(model, batch, partial(_loss, batch, flat.total, logprobs), max_tokens=max_tokens)
            found.append(logprobs)
        return found

    sizes = [n for n in micro_batches if n <= len(flat)]
    longest, whole = max(len(ids) for ids, *_ in flat.rows), max(len(batch) for batch in batches)
    micro = report.fastest(sizes, lambda n: flat.step(plain, n))
    budget = report.fastest([n * longest for n in sizes if n <= micro], packed_step)
    steps = {
        "packed": lambda: packed_step(budget),
        "whole": lambda: packed_step(whole),
        "flat": lambda: flat.step(plain, micro),
    }
    seconds = report.alternate(steps, repeats)
    packed_logprobs, flat_logprobs = packed_step(budget), flat.step(plain, micro)
    speedup = seconds["flat"] / seconds["packed"]
    unique = sum(len(batch) for batch in batches)
    sharing = flat.tokens / unique
    peak = {name: _peak(step) for name, step in steps.items()}
    divided = [pieces(batch, budget) for batch in batches]
    return {
        "shape": name,
        "leaves": len(flat),
        "unique_tokens": unique,
        "flat_over_unique": sharing,
        "flops_ratio": _operations(model, [np.arange(len(ids)) for ids, *_ in flat.rows])
        / _operations(model, [batch.position for batch in batches]),
        "speedup": speedup,
        "efficiency": speedup / sharing,
        "memory_ratio": peak["packed"] / peak["flat"],
        "max_logprob_error": _logprob_error(batches, packed_logprobs, flat_logprobs),
        "max_grad_error": _gradient_error(model, plain),
        "whole_speedup": seconds["flat"] / seconds["whole"],
        "whole_memory_ratio": peak["whole"] / peak["flat"],
        "micro_batch": micro,
        "max_tokens": budget,
        "most_held": max(int(tokens_held(row).max()) for row in divided),
        "pieces": sum(map(len, divided)),
        "packed_s": seconds["packed"],
        "flat_s": seconds["flat"],
        "packed_peak_mb": peak["packed"] / 1e6,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }


def _loss(batch: PackedBatch, total: float, found: Tensor, rows: Ints, logprob: Tensor, _: Tensor) -> Tensor:
    """The policy loss of `rows`, whose log-probs are kept in `found` [T]."""
    found[torch.as_tensor(rows)] = logprob.detach()
    arrays = (torch.as_tensor(x[rows]) for x in (batch.adv_pos, batch.adv_neg, batch.weight))
    return policy_loss(PolicyLoss(), logprob, None, *arrays, total)[0]


def _operations(model: PreTrainedModel, rows: Sequence[Ints]) -> float:
    """Multiplications of a forward pass over tokens at these positions: one per weight, and those of attention."""
    config, positions = model.config, np.concatenate(rows)
    per_key = 2 * config.num_hidden_layers * config.hidden_size  # a score, and a share of a value
    return float(len(positions) * model.num_parameters() + per_key * (positions + 1).sum())


def _logprob_error(
    batches: Sequence[PackedBatch], packed: Sequence[Tensor], flat: Sequence[tuple[list[int], Tensor]]
) -> float:
    """Largest difference over all (leaf, response token) pairs, leaves are recognised by their (random) tokens."""
    expected = {tuple(ids): logprob for ids, logprob in flat}
    differences = []
    for batch, found in zip(batches, packed, strict=True):
        for row in set(range(len(batch))) - set(batch.prev.tolist()):
            path = [row]
            while batch.prev[path[-1]] >= 0:
                path.append(int(batch.prev[path[-1]]))
            path.reverse()
            logprob = expected.pop(tuple(batch.token_ids[path].tolist()))
            differences.append((found[path][-len(logprob) :] - logprob).abs().max().item())
    if expected:
        raise RuntimeError(f"{len(expected)} leaves are missing from the packed rows")
    return float(np.max(differences))  # NaN if there is one


def _gradient_error(model: PreTrainedModel, plain: PreTrainedModel) -> float:
    """Largest difference of a gradient, as a share of the largest gradient of its parameter."""
    shares = [
        ((p.grad - q.grad).abs().max() / q.grad.abs().max()).item()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    ]
    return float(np.max(shares))


class _LiveStorage(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live += (size := storage.nbytes())
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _peak(step: Callable[[], object]) -> int:
    with _LiveStorage() as storage:
        step()
    return storage.peak


def _shapes(rng: np.random.Generator, scale: int) -> dict[str, list[Tree]]:
    """All lengths are divided by `scale`."""
    prompt, segment = 64 // scale, 64 // scale
    doubling_early = [2, 4, 8, 16, 16, 16, 16, 16]
    doubling_late = [1, 1, 1, 1, 2, 4, 8, 16]
    return {
        "T1: doubling at segments 1-4": [_levels(rng, prompt, segment, doubling_early)],
        "T2: one fork a segment": [_levels(rng, 4 * prompt, segment, list(range(1, 17)))],
        "T3: doubling at segments 5-8": [_levels(rng, prompt, segment, doubling_late)],
        "star": [_levels(rng, 8 * prompt, 2 * segment, [16])],
        "forest of 8 ragged trees": [_ragged(rng, prompt, segment) for _ in range(8)],
    }


def _levels(rng: np.random.Generator, prompt: int, segment: int, widths: Sequence[int]) -> Tree:
    """A tree whose level j has `widths[j]` segments, children given to the parents in turn."""
    tree = Tree(_ids(rng, prompt))
    level = [ROOT]
    for depth, width in enumerate(widths):
        stop = Stop.DEPTH if depth == len(widths) - 1 else None
        level = [_add(tree, rng, level[i % len(level)], segment, stop) for i in range(width)]
    return tree


def _ragged(rng: np.random.Generator, prompt: int, segment: int) -> Tree:
    """16 leaves; at each level every active path ends with chance 1/8, forks or goes on; the last segment is short."""
    tree = Tree(_ids(rng, int(rng.integers(prompt // 2, 2 * prompt))))
    level, finished = [ROOT] * int(rng.integers(2, 9)), 0
    for depth in range(8):
        children, room = [], 16 - finished - len(level)
        for parent in level:
            if depth == 7 or (depth > 1 and rng.random() < 1 / 8):
                _add(tree, rng, parent, int(rng.integers(1, segment + 1)), Stop.EOS)
                finished += 1
                continue
            node = _add(tree, rng, parent, segment, None)
            forks = int(room > 0 and rng.random() < 0.5)
            room -= forks
            children += [node] * (1 + forks)
        level = children
    return tree


def _add(tree: Tree, rng: np.random.Generator, parent: int, tokens: int, stop: Stop | None) -> int:
    return tree.add(parent, _ids(rng, tokens), [0.0] * tokens, seed=len(tree), stop=stop)


def _ids(rng: np.random.Generator, count: int) -> list[int]:
    return [int(i) for i in rng.integers(0, VOCABULARY, count)]


if __name__ == "__main__":
    main()
