"""Warm-up of a new model: supervised fine-tuning on a teacher's worked examples.

Reinforcement learning needs a policy that is sometimes right. A model with random weights never is, so the demo first
imitates a teacher that makes mistakes. With the default `WarmupSettings` the mean reward is then about 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from treepo.errors import ConfigError
from treepo.settings import Settings
from treepo.tasks import Task, Teacher

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # the loss skips this target


class WarmupSettings(Settings):
    """Supervised fine-tuning of a new model on the task's teacher, before reinforcement learning."""

    steps: int = Field(1_100, ge=0, description="Optimizer steps; 0: no warm-up.")
    batch: int = Field(16, ge=1, description="Worked examples per step.")
    lr: float = Field(
        5e-3,
        gt=0,
        description="Peak learning rate of AdamW. It rises during the share `rise` of the steps, then falls to 0.",
    )
    rise: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps during which the learning rate rises linearly."
    )
    beta2: float = Field(0.98, gt=0, lt=1, description="Decay of AdamW's second moment; lower it for a short warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    grad_clip: float = Field(1.0, gt=0, description="A gradient with a larger norm is scaled down to this norm.")


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    teacher: Teacher,
    settings: WarmupSettings,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Fine-tune `model` in place on lessons 0 .. steps * batch - 1 of the stream keyed by `seed`.

    The loss is the mean next-token cross-entropy in nats over response and EOS tokens, not over prompt tokens. The
    learning rate rises linearly, then falls to 0 along half a cosine. `progress(step, loss)` is called after every
    step: `step` starts at 1, and `loss` is the loss before the update. On one machine, the same seed gives the same
    weights bit for bit. Raises `ConfigError` for a tokenizer without EOS, or a lesson that exceeds the context.
    """
    import torch

    from treepo.models.causal_lm import context

    if tokenizer.eos_token_id is None:
        raise ConfigError("warm-up: the tokenizer has no EOS token")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, settings))
    for step in range(settings.steps):
        first = step * settings.batch
        rows = [_row(task, teacher, tokenizer, seed, first + i) for i in range(settings.batch)]
        ids, targets = _padded(rows, tokenizer.eos_token_id)
        if ids.shape[1] > context(model):
            raise ConfigError(f"warm-up: a lesson of {ids.shape[1]} tokens exceeds the model's {context(model)}")
        loss = _loss(model, ids.to(model.device), targets.to(model.device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, loss.item())
    optimizer.zero_grad()  # training goes on with this model and must not add to the last gradient


def _pace(step: int, settings: WarmupSettings) -> float:
    """Learning rate of `step`, which starts at 0, as a share of the peak."""
    rising = round(settings.rise * settings.steps)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, settings.steps - rising))) / 2


def _row(
    task: Task, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, seed: int, index: int
) -> tuple[list[int], int]:
    """Token ids of a lesson with EOS, and the number of prompt tokens."""
    problem, response = teacher.lesson(seed, index)
    prompt = task.encode(tokenizer, problem)
    return [*prompt, *tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id], len(prompt)


def _padded(rows: list[tuple[list[int], int]], fill: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], and the next token of each or IGNORED [B, T].

    Padding is on the right, where causal attention hides it from all real tokens.
    """
    import torch

    ids = torch.full((len(rows), max(len(tokens) for tokens, _ in rows)), fill)
    targets = torch.full_like(ids, IGNORED)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        targets[i, prompt - 1 : len(tokens) - 1] = torch.tensor(tokens[prompt:])
    return ids, targets


def _loss(model: PreTrainedModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the targets that are not IGNORED. Logits are computed only for these."""
    import torch
    import torch.nn.functional as F

    from treepo.models.attention import Causal
    from treepo.models.causal_lm import hidden, logits

    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    wanted = targets != IGNORED
    scores = logits(model, hidden(model, ids, positions, Causal())[wanted])  # [W, V]
    return F.cross_entropy(scores.float(), targets[wanted])
