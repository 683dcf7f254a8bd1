"""The update: scored trees -> advantages -> packed rows -> loss -> optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from treepo.advantages import Advantage
from treepo.distributed import Processes
from treepo.errors import DivergenceError
from treepo.forest import Forest
from treepo.learner.gradient import LossRow, accumulate, logprobs
from treepo.learner.loss import Loss, needs_reference, shared_tokens
from treepo.learner.packing import PackedBatch, Totals, fold, pack_rows
from treepo.learner.settings import LearnerSettings
from treepo.models.causal_lm import checkpoint_activations
from treepo.seeds import generator
from treepo.tree import ScoredTree

Metrics = dict[str, float]
Reference = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Returns a context that gives the initial policy: `with reference() as model`."""


class Learner:
    """Trains `model` (in place) on scored trees. It owns the optimizer.

    `temperature` is that of the sampling, because the loss compares probabilities of the distribution that was sampled
    from. `seed` decides which trees form a mini-batch. A loss with `needs_reference` needs a `reference`: without one,
    `ValueError` is raised.

    With several processes, each has the whole model and is called with the same trees. The packed rows are distributed
    by their sizes, and gradients are summed once per optimizer step. In between no process waits for another, so they
    may have different numbers of rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        advantage: Advantage,
        loss: Loss,
        settings: LearnerSettings | None = None,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        reference: Reference | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.advantage, self.loss = model, advantage, loss
        self.settings = settings or LearnerSettings()
        self.temperature, self.seed = temperature, seed
        self.reference = reference
        self.processes = processes or Processes()
        self.plan = ""  # the attention plan of the first packed row; empty before
        if needs_reference(loss) and reference is None:
            raise ValueError("the loss compares the policy with the initial one: give a reference")
        if self.settings.gradient_checkpointing:
            checkpoint_activations(model)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
        )

    def __call__(self, step: int, trees: Sequence[ScoredTree]) -> Metrics:
        """One pass over `trees` in `mini_batches` optimizer steps; returns the metrics, means over these steps.

        `step` counts from 1. The learning rate of the warm-up and the order of the trees depend on it. Without a leaf
        of known reward there is no optimizer step.

        Raises `DivergenceError` if the gradient is not finite. Then it is not applied.
        """
        settings = self.settings
        lr = settings.lr * min(1.0, step / max(1, settings.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        forest = Forest.of(trees)
        if not len(forest.leaf):
            return {"train/lr": lr, "train/updates": 0}
        found: Metrics = {}
        batches = self._mini_batches(step, forest)
        for rows, totals in batches:
            for name, value in self._optimize(rows, totals).items():
                found[name] = found.get(name, 0.0) + value / len(batches)
        return {"train/lr": lr, "train/updates": len(batches)} | found

    def _mini_batches(self, step: int, forest: Forest) -> list[tuple[list[LossRow], Totals]]:
        """This process's rows of each optimizer step, and the totals of every process's rows together."""
        trees = len(forest.trees)
        order = generator(self.seed, "mini-batches", step).sample(range(trees), trees)
        many = min(self.settings.mini_batches, trees)
        folded = fold(forest, self.advantage(forest), shared_tokens(self.loss))
        batches: list[tuple[list[LossRow], Totals]] = []
        for i in range(many):
            which = sorted(order[i::many])
            # Small enough for every process to get a row, if there are enough trees.
            room = min(self.settings.max_tokens, -(-_tokens(forest, which) // self.processes.count))
            packed = pack_rows(forest, folded, which, room)
            batches.append(([self._row(batch, many > 1) for batch in self._share(packed)], Totals.of(packed)))
        return batches

    def _share(self, packed: Sequence[PackedBatch]) -> list[PackedBatch]:
        """This process's rows. Each row, the largest first, goes to the process with the fewest tokens so far."""
        tokens = np.zeros(self.processes.count, np.int64)
        mine = []
        for batch in sorted(packed, key=len, reverse=True):
            to = int(tokens.argmin())
            tokens[to] += len(batch)
            if to == self.processes.rank:
                mine.append(batch)
        return mine

    def _row(self, batch: PackedBatch, off_policy: bool) -> LossRow:
        old = self._logprobs(self.model, batch) if off_policy else None
        if self.reference is None or not needs_reference(self.loss):
            return LossRow(batch, old)
        with self.reference() as reference:
            return LossRow(batch, old, self._logprobs(reference, batch))

    def _optimize(self, rows: Sequence[LossRow], totals: Totals) -> Metrics:
        """One optimizer step. `rows` are those of this process, `totals` those of all processes together."""
        found = accumulate(
            self.model,
            rows,
            self.loss,
            totals=totals,
            max_tokens=self.settings.max_tokens,
            temperature=self.temperature,
            plan=self.settings.attention,
            forward=self._forward,
        )
        self.plan = self.plan or found.plan
        metrics = self.processes.sums(found.metrics)
        self.processes.sum_gradients(self.model.parameters())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip))
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise DivergenceError(f"the gradient is not finite (norm {norm}) and was not applied")
        self.optimizer.step()
        self.optimizer.zero_grad()  # now, so that sampling can use the memory
        return metrics | {"train/grad_norm": norm}

    def _logprobs(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        with torch.no_grad(), self._forward():
            return logprobs(model, batch, temperature=self.temperature, plan=self.settings.attention)

    @property
    def _forward(self) -> Callable[[], AbstractContextManager[object]]:
        if self.settings.precision == "float32":
            return nullcontext
        return partial(torch.autocast, self.model.device.type, torch.bfloat16)


def _tokens(forest: Forest, which: Sequence[int]) -> int:
    """Tokens of the trees `which`, prompts included, each once."""
    return sum(len(node.tokens) for t in which for node in forest.trees[t].tree.nodes)
