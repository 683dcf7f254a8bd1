"""The packed update against padded per-trajectory rows: forward and backward of one gradient step.

Both accumulate the gradient of the same loss from the same weights with the same chunked log-softmax. The baseline
runs one row per leaf through the model's own sdpa attention, rows sorted by length, padded to the longest of their
micro-batch, with the fastest of several micro-batch sizes; packed, each tree is a row. `speedup` is baseline / packed
CPU time; `flat_over_unique` is what sharing could give at equal cost per token, `efficiency` their ratio.
`memory_ratio` is packed / baseline peak of live tensor storage during the step (operator outputs and what autograd
keeps; scratch space inside kernels is not seen), for the baseline at its fastest micro-batch and, in
`memory_ratio_tree`, at as many rows as a tree has leaves.

    python -m benchmarks.packing [--quick] [--out FILE]
"""

from __future__ import annotations

import copy
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks import report
from treepo.attention import plan_for
from treepo.forest import Forest
from treepo.loss import LossSettings, policy_loss
from treepo.model import logprobs, prepare, token_logprobs
from treepo.packing import PackedBatch, bins, fold, pack
from treepo.tree import ROOT, Rollout, Stop, Tree

VOCABULARY = 512
MICRO_BATCHES = (1, 4, 16)
COLUMNS = ("shape", "flat_over_unique", "speedup", "efficiency", "memory_ratio", "max_logprob_error", "max_grad_error")


def main() -> None:
    args = report.arguments(__doc__ or "")
    scale = 4 if args.quick else 1
    model = _model(hidden=96, layers=2) if args.quick else _model(hidden=256, layers=4)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    results = []
    for name, trees in _shapes(np.random.default_rng(0), scale).items():
        results.append(_compare(name, trees, model, plain, (4, 16) if args.quick else MICRO_BATCHES))
        print(f"{name}: {results[-1]['speedup']:.2f}x of {results[-1]['flat_over_unique']:.2f}x", file=sys.stderr)
    report.finish("packing", results, args, columns=COLUMNS)


def _compare(
    name: str, trees: Sequence[Tree], model: PreTrainedModel, plain: PreTrainedModel, micro_batches: Sequence[int]
) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    rollouts = [Rollout(str(t), tree, [0.0] * len(tree.leaves())) for t, tree in enumerate(trees)]
    forest = Forest.of(rollouts)
    advantage = rng.standard_normal(forest.path.shape)
    folded, every = fold(forest, advantage), range(len(rollouts))
    # One tree a row, as `bins` does under a small budget: on a CPU that is faster than one row of all, and leaner.
    batches = [pack(rollouts, forest, folded, which) for which in bins(rollouts, forest, folded, every, max_tokens=1)]
    flat = _FlatRows(rollouts, forest, advantage)

    def packed_step() -> list[Tensor]:
        model.zero_grad()
        found = []
        for batch in batches:
            logprob = logprobs(model, batch)
            arrays = (torch.as_tensor(x) for x in (batch.adv_pos, batch.adv_neg, batch.weight))
            loss, _ = policy_loss(LossSettings(), logprob, None, *arrays, flat.total)
            loss.backward()
            found.append(logprob.detach())
        return found

    micro = min((n for n in micro_batches if n <= len(flat)), key=lambda n: _cpu_seconds(lambda: flat.step(plain, n)))
    seconds = report.alternate({"packed": packed_step, "flat": lambda: flat.step(plain, micro)}, 3)
    packed_logprobs, flat_logprobs = packed_step(), flat.step(plain, micro)
    speedup = seconds["flat"] / seconds["packed"]
    unique = sum(len(batch) for batch in batches)
    sharing = flat.tokens / unique
    plan = Counter(str(plan_for(batch)) for batch in batches).most_common(1)[0][0]
    packed_peak, flat_peak = _peak(packed_step), _peak(lambda: flat.step(plain, micro))
    leaves = len(flat) // len(trees)
    tree_peak = flat_peak if micro == leaves else _peak(lambda: flat.step(plain, leaves))
    return {
        "shape": name,
        "leaves": len(flat),
        "unique_tokens": unique,
        "flat_over_unique": sharing,
        "speedup": speedup,
        "efficiency": speedup / sharing,
        "memory_ratio": packed_peak / flat_peak,
        "memory_ratio_tree": packed_peak / tree_peak,
        "max_logprob_error": _logprob_error(batches, packed_logprobs, flat_logprobs),
        "max_grad_error": _gradient_error(model, plain),
        "plan": plan,
        "micro_batch": micro,
        "packed_cpu_s": seconds["packed"],
        "flat_cpu_s": seconds["flat"],
    }


def _cpu_seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


class _FlatRows:
    """One row per leaf, longest first: the trajectory as any other library would train on it."""

    def __init__(self, rollouts: Sequence[Rollout], forest: Forest, advantage: np.ndarray) -> None:
        self.rows = []  # (token ids of the path, prompt length, advantages of the response)
        for row, (t, node) in enumerate(zip(forest.tree, forest.leaf, strict=True)):
            tree = rollouts[t].tree
            leaf = int(node - forest.first_node[t])
            path = tree.path(leaf)
            of_token = np.repeat(advantage[row, 1 : len(path)], [len(tree.nodes[n].tokens) for n in path[1:]])
            self.rows.append((tree.tokens(leaf), len(tree.prompt), of_token.astype(np.float32)))
        self.rows.sort(key=lambda row: -len(row[0]))
        self.tokens = sum(len(ids) for ids, *_ in self.rows)
        self.total = float(sum(len(adv) for _, _, adv in self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def step(self, model: PreTrainedModel, micro: int) -> list[tuple[list[int], Tensor]]:
        """One accumulated gradient; returns the tokens of each row and the log-probs of its response."""
        model.zero_grad()
        found = []
        for begin in range(0, len(self.rows), micro):
            rows = self.rows[begin : begin + micro]
            longest = len(rows[0][0])
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            for i, (tokens, *_) in enumerate(rows):
                ids[i, : len(tokens)] = torch.as_tensor(tokens)
            lengths = torch.tensor([len(tokens) for tokens, *_ in rows])
            mask = torch.arange(longest)[None] < lengths[:, None]
            # All rows of one length need no mask, and HF's sdpa is faster without one.
            states = model.base_model(
                input_ids=ids, attention_mask=None if bool(mask.all()) else mask.long(), use_cache=False
            ).last_hidden_state
            prompts = torch.tensor([prompt for _, prompt, *_ in rows])
            wanted = mask[:, 1:] & (torch.arange(1, longest)[None] >= prompts[:, None])
            logprob = token_logprobs(model, states[:, :-1][wanted], ids[:, 1:][wanted])
            advantage = torch.as_tensor(np.concatenate([adv for _, _, adv in rows]))
            signs = (advantage.clamp(min=0), advantage.clamp(max=0), torch.ones_like(advantage))
            loss, _ = policy_loss(LossSettings(), logprob, None, *signs, self.total)
            loss.backward()
            parts = logprob.detach().split([len(adv) for _, _, adv in rows])
            found += [(tokens, part) for (tokens, *_), part in zip(rows, parts, strict=True)]
        return found


def _logprob_error(
    batches: Sequence[PackedBatch], packed: Sequence[Tensor], flat: Sequence[tuple[list[int], Tensor]]
) -> float:
    """Largest difference over all (leaf, response token) pairs, leaves recognised by their (random) tokens."""
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


def _model(hidden: int, layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        intermediate_size=3 * hidden,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.08,  # large enough for attention to differ between tokens
    )
    return prepare(AutoModelForCausalLM.from_config(config))


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
    """A tree whose level j has `widths[j]` segments, children dealt to the parents in turn."""
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
