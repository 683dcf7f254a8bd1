"""The clipped policy loss on packed tokens: the sum over all leaves of the textbook loss, at one row per tree."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from treepo.learner.packing import Shared
from treepo.settings import Settings


class LossSettings(Settings):
    """How far one update may move the policy, and what a shared token weighs in it."""

    clip_low: float = Field(0.2, ge=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.28, ge=0, description="The ratio is clipped above at 1 + clip_high.")
    dual_clip: float | None = Field(
        10.0, gt=1, description="Largest ratio that counts where the advantage is negative; null for no limit."
    )
    shared_tokens: Shared = Field(
        "sum", description="What a token shared by k leaves weighs: k (sum, the paper), 1 (mean) or the root of k."
    )
    kl: float = Field(0.0, ge=0, description="Weight of the KL divergence to the initial policy; 0: no reference.")
    rollout_cap: float | None = Field(
        None,
        gt=0,
        description="Corrects for an engine whose log-probs differ from the trainer's: each token counts by the ratio "
        "of the two probabilities, at most this; null: off.",
    )


def policy_loss(
    settings: LossSettings,
    logprob: Tensor,  # [T] of the policy, in nats
    old_logprob: Tensor | None,  # [T] of the policy that the ratio is taken to
    adv_pos: Tensor,  # [T] >= 0
    adv_neg: Tensor,  # [T] <= 0
    weight: Tensor,  # [T]
    total_weight: float,
    *,
    rollout_logprob: Tensor | None = None,  # [T] of the engine that sampled the tokens
    reference_logprob: Tensor | None = None,  # [T] of the initial policy
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss of a row, and metrics; both *add up* over the rows of a batch to the batch's own.

    Source: DAPO's token-mean (TreePO, arXiv 2508.17445, eq. 1) and dual clip (arXiv 1912.09729): with ratio r, each
    pair of a leaf and one of its tokens costs -min(rA, clip(r, 1 - low, 1 + high) A), and for A < 0 at most -c A. The
    sum over the leaves through a token is taken in closed form from the sums of their positive and negative
    advantages (`Folded`). `total_weight` is the sum of `weight` over the *whole* batch, by default
    the number of its (leaf, response token) pairs. So the loss is a mean over them, however the batch is put into rows.

    `old_logprob` None means on-policy: r = 1 exactly, with the gradient of the log-prob. Where `weight` is 0 no
    log-prob matters as long as it is finite.

    With `rollout_cap` C a token's cost is multiplied by min(old / rollout probability, C): truncated importance
    sampling (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025). With `kl` the
    loss gains kl times the mean of exp(d) - 1 - d, where d = reference - policy log-prob (GRPO, arXiv 2402.03300,
    eq. 4).

    Metrics are detached scalars, parts of means over the same pairs: `clip_fraction`, where the loss has no gradient
    because of a clip (a token whose leaves disagree in sign counts by the share of |A| clipped); `approx_kl`,
    r - 1 - log r, an unbiased estimate of KL(old || policy) when the tokens were sampled from old; `rollout_kl`, the
    same of KL(rollout || old); `rollout_capped`, tokens at the cap; `reference_kl`, the term that `kl` multiplies.
    """
    old = logprob.detach() if old_logprob is None else old_logprob
    log_ratio = logprob - old
    ratio = log_ratio.exp()
    above = ratio.clamp(max=1 + settings.clip_high)
    below = ratio.clamp(min=1 - settings.clip_low)
    if settings.dual_clip is not None:
        below = below.clamp(max=settings.dual_clip)
    cost = adv_pos * above + adv_neg * below
    parts: dict[str, Tensor] = {}
    if rollout_logprob is not None:
        mismatch = old - rollout_logprob
        parts["rollout_kl"] = mismatch.exp() - 1 - mismatch
        if settings.rollout_cap is not None:
            importance = mismatch.exp()
            cost = cost * importance.clamp(max=settings.rollout_cap)
            parts["rollout_capped"] = (importance > settings.rollout_cap).to(weight.dtype)
    loss = -cost.sum() / total_weight
    if reference_logprob is not None:
        gap = reference_logprob - logprob
        parts["reference_kl"] = gap.exp() - 1 - gap
        loss = loss + settings.kl * (weight * parts["reference_kl"]).sum() / total_weight
    with torch.no_grad():
        clipped = adv_pos * (above != ratio) - adv_neg * (below != ratio)
        parts["clip_fraction"] = clipped / (adv_pos - adv_neg).clamp(min=torch.finfo(adv_pos.dtype).tiny)
        parts["approx_kl"] = ratio - 1 - log_ratio
        metrics = {name: (weight * part).sum() / total_weight for name, part in parts.items()}
    return loss, metrics
