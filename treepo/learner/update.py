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
from treepo.learner.loss import Loss
from treepo.learner.packing import PackedBatch, Totals, pack
from treepo.learner.settings import LearnerSettings
from treepo.models.causal_lm import checkpoint_activations
from treepo.seeds import generator
from treepo.tree import ScoredTree

Metrics = dict[str, float]
Reference = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Entered, it gives the initial policy."""


class Learner:
    """Trains `model` (in place) on scored trees. It owns the optimizer.

    `temperature` is that of the sampling: the loss compares probabilities under the distribution that was sampled. A
    loss with `needs_reference` wants a `reference`.

    With several processes each has the whole model and brings the same trees. The packed rows are shared out by their
    sizes, and gradients are summed once per optimizer step. No process waits for another in between, so that their
    numbers of rows need not be equal.
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
        self.plan = ""  # how the first packed row attended, once there was one
        if loss.needs_reference and reference is None:
            raise ValueError("the loss compares the policy with the initial one: pass a reference")
        if self.settings.gradient_checkpointing:
            checkpoint_activations(model)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
        )

    def __call__(self, step: int, trees: Sequence[ScoredTree]) -> Metrics:
        """One pass over `trees` in `mini_batches` optimizer steps. `step` counts from 1 and decides the learning rate.

        Raises `DivergenceError` if the gradient is not finite. It is not applied then.
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
        advantage = self.advantage(forest)
        batches: list[tuple[list[LossRow], Totals]] = []
        for i in range(many):
            which = sorted(order[i::many])
            # A budget that leaves every process something to do.
            room = min(self.settings.max_tokens, -(-_tokens(forest, which) // self.processes.count))
            packed = pack(forest, advantage, shared_tokens=self.loss.shared_tokens, max_tokens=room, trees=which)
            batches.append(([self._row(batch, many > 1) for batch in self._share(packed)], Totals.of(packed)))
        return batches

    def _share(self, packed: Sequence[PackedBatch]) -> list[PackedBatch]:
        """This process's rows: each goes to the process with the fewest tokens so far, the largest first."""
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
        if self.reference is None or not self.loss.needs_reference:
            return LossRow(batch, old)
        with self.reference() as reference:
            return LossRow(batch, old, self._logprobs(reference, batch))

    def _optimize(self, rows: Sequence[LossRow], totals: Totals) -> Metrics:
        """One optimizer step on the `rows` of every process."""
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
        self.optimizer.zero_grad()  # here, so that sampling has the memory
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
