"""The update: rollouts -> advantages -> packed rows -> clipped loss -> optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from treepo.distributed import Processes
from treepo.errors import TreePOError
from treepo.forest import Forest, Ints
from treepo.learner.gradient import accumulate, logprobs
from treepo.learner.loss import policy_loss
from treepo.learner.packing import PackedBatch, bins, fold, pack
from treepo.run.checkpoint import latest
from treepo.run.config import Config, TrainerSettings
from treepo.run.folder import Metrics
from treepo.seeds import generator
from treepo.tree import ScoredTree


@dataclass(frozen=True, slots=True)
class Row:
    """A packed row of a mini-batch, and the log-probs [T] that its loss compares the policy with."""

    batch: PackedBatch
    old_logprob: Tensor | None  # of the policy before the first update of the step; None: exactly on-policy
    reference_logprob: Tensor | None  # of the initial policy; None: not asked for


class Updater:
    """Trains `model` on rollouts; `reference`, once entered, is the initial policy if the loss has a KL term.

    Rows are shared out among the processes by their sizes, and gradients summed once per optimizer step: no process
    waits for another in between, so that their numbers of rows need not be equal.
    """

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        reference: Callable[[], AbstractContextManager[PreTrainedModel]] | None,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
    ) -> None:
        self.config, self.model, self.reference = config, model, reference
        self.optimizer, self.processes = optimizer, processes
        self.plan = ""  # of the first packed row, once there was one

    def __call__(self, step: int, rollouts: Sequence[ScoredTree]) -> Metrics:
        """One pass over the rollouts in `mini_batches` optimizer steps; all processes bring the same ones."""
        settings = self.config.trainer
        lr = settings.lr * min(1.0, step / max(1, settings.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        shaped = [overlong(rollout, settings, self.config.sampler.response_tokens) for rollout in rollouts]
        forest = Forest.of(shaped)
        if not len(forest.leaf):
            return {"lr": lr, "updates": 0}
        folded = fold(forest, self.config.advantage(forest), self.config.loss.shared_tokens)
        order = generator(self.config.seed, "mini-batches", step).sample(range(len(shaped)), len(shaped))
        many = min(settings.mini_batches, len(order))
        batches: list[tuple[list[Row], float]] = []
        for i in range(many):
            which = sorted(order[i::many])
            # A budget that leaves every process something to do.
            room = min(settings.max_tokens, -(-_unique_tokens(shaped, which) // self.processes.count))
            packed = [pack(shaped, forest, folded, trees) for trees in bins(shaped, forest, folded, which, room)]
            total = sum(float(batch.weight.sum()) for batch in packed)
            batches.append(([self._row(batch, many > 1) for batch in self._share(packed)], total))
        found: dict[str, float] = {}
        for rows, total in batches:
            for name, value in self._optimize(step, rows, total).items():
                found[name] = found.get(name, 0.0) + value / many
        return {"lr": lr, "updates": many} | found

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

    def _row(self, batch: PackedBatch, off_policy: bool) -> Row:
        old = self._logprobs(self.model, batch) if off_policy else None
        if self.reference is None:
            return Row(batch, old, None)
        with self.reference() as reference:
            return Row(batch, old, self._logprobs(reference, batch))

    def _optimize(self, step: int, rows: Sequence[Row], total: float) -> dict[str, float]:
        """One optimizer step on the mean over all (leaf, token) pairs of every process's `rows`."""
        settings, sums = self.config.trainer, _Sums()
        for row in rows:
            plan = accumulate(
                self.model,
                row.batch,
                partial(self._loss, row, total, sums),
                max_tokens=settings.max_tokens,
                temperature=self.config.sampler.sampling.temperature,
                plan=settings.attention,
                forward=self._forward,
            )
            self.plan = self.plan or str(plan)
        found = self.processes.sums(sums.numbers())
        self.processes.sum_gradients(self.model.parameters())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip))
        if not math.isfinite(norm):
            newest = latest(Path(self.config.out) / "checkpoints")
            raise TreePOError(
                f"step {step}: the gradient is not finite (norm {norm}) and was not applied: start another run with a "
                f"lower trainer.lr, from a checkpoint (--model {newest})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()  # here, so that sampling has the memory
        return found | {"grad_norm": norm}

    def _loss(self, row: Row, total: float, sums: _Sums, rows: Ints, logprob: Tensor, entropy: Tensor) -> Tensor:
        """The loss of some rows of a packed row; their parts of the metrics are added to `sums`."""
        batch, at = row.batch, torch.as_tensor(rows, device=logprob.device)
        adv_pos, adv_neg, weight, rollout = (
            torch.as_tensor(x[rows], device=logprob.device)
            for x in (batch.adv_pos, batch.adv_neg, batch.weight, batch.rollout_logprob)
        )
        old, reference = (x if x is None else x[at] for x in (row.old_logprob, row.reference_logprob))
        loss, metrics = policy_loss(
            self.config.loss,
            logprob,
            old,
            adv_pos,
            adv_neg,
            weight,
            total,
            rollout_logprob=rollout,
            reference_logprob=reference,
        )
        sums.add(metrics | {"loss": loss.detach(), "entropy": (weight * entropy).sum() / total})
        return loss

    def _logprobs(self, model: PreTrainedModel, batch: PackedBatch) -> Tensor:
        settings = self.config
        with torch.no_grad(), self._forward():
            return logprobs(
                model, batch, temperature=settings.sampler.sampling.temperature, plan=settings.trainer.attention
            )

    @property
    def _forward(self) -> Callable[[], AbstractContextManager[object]]:
        if self.config.trainer.precision == "float32":
            return nullcontext
        return partial(torch.autocast, self.model.device.type, torch.bfloat16)


def overlong(rollout: ScoredTree, settings: TrainerSettings, budget: int) -> ScoredTree:
    """The rollout with the overlong penalty in its rewards (DAPO's soft punishment, arXiv 2503.14476, eq. 13).

    `budget` is the most tokens of a response.
    """
    window = settings.overlong_tokens
    if not window:
        return rollout
    excess = [max(0, rollout.tree.response_length(leaf) - (budget - window)) for leaf in rollout.tree.leaves()]
    rewards = [
        None if reward is None else reward - settings.overlong_penalty * over / window
        for reward, over in zip(rollout.rewards, excess, strict=True)
    ]
    return replace(rollout, rewards=rewards)


class _Sums:
    """Scalars that add up; a device is asked for them only once."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._found[name] = self._found[name] + value if name in self._found else value

    def numbers(self) -> dict[str, float]:
        if not self._found:
            return {}
        return dict(zip(self._found, torch.stack(list(self._found.values())).tolist(), strict=True))


def _unique_tokens(rollouts: Sequence[ScoredTree], which: Sequence[int]) -> int:
    return sum(len(node.tokens) for t in which for node in rollouts[t].tree.nodes)
