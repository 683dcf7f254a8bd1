"""The clipped policy loss on packed tokens: the sum over all leaves of the textbook loss, at one row per tree."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from treepo.settings import Settings


class LossSettings(Settings):
    """How far one update may move the policy."""

    clip_low: float = Field(0.2, ge=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.28, ge=0, description="The ratio is clipped above at 1 + clip_high.")
    dual_clip: float | None = Field(
        10.0, gt=1, description="Largest ratio that counts where the advantage is negative; null for no limit."
    )


def policy_loss(
    settings: LossSettings,
    logprob: Tensor,  # [T] of the policy, in nats
    old_logprob: Tensor | None,  # [T] of the policy that the ratio is taken to
    adv_pos: Tensor,  # [T] >= 0
    adv_neg: Tensor,  # [T] <= 0
    weight: Tensor,  # [T]
    total_tokens: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss of a row, and metrics; both *add up* over the rows of a batch to the batch's own.

    Source: DAPO's token-mean (TreePO, arXiv 2508.17445, eq. 1) and dual clip (arXiv 1912.09729): with ratio r, each
    pair of a leaf and one of its tokens costs -min(rA, clip(r, 1 - low, 1 + high) A), and for A < 0 at most -c A. The
    sum over the leaves through a token is taken in closed form from the sums of their positive and negative
    advantages (`treepo.packing.Folded`). `total_tokens` is the number of (leaf, response token) pairs of the *whole*
    batch, so that the loss is a mean over them however the batch is cut into rows.

    `old_logprob` None means on-policy: r = 1 exactly, with the gradient of the log-prob. Where `weight` is 0 neither
    log-prob matters as long as it is finite.

    Metrics are detached scalars, parts of means over the same pairs: `clip_fraction`, where the loss has no gradient
    because of a clip (a token whose leaves disagree in sign counts by the share of |A| clipped), and `approx_kl`,
    r - 1 - log r, an unbiased estimate of KL(old || policy) when the tokens were sampled from old.
    """
    log_ratio = logprob - (logprob.detach() if old_logprob is None else old_logprob)
    ratio = log_ratio.exp()
    above = ratio.clamp(max=1 + settings.clip_high)
    below = ratio.clamp(min=1 - settings.clip_low)
    if settings.dual_clip is not None:
        below = below.clamp(max=settings.dual_clip)
    loss = -(adv_pos * above + adv_neg * below).sum() / total_tokens
    with torch.no_grad():
        clipped = adv_pos * (above != ratio) - adv_neg * (below != ratio)
        share = clipped / (adv_pos - adv_neg).clamp(min=torch.finfo(adv_pos.dtype).tiny)
        metrics = {
            "clip_fraction": (weight * share).sum() / total_tokens,
            "approx_kl": (weight * (ratio - 1 - log_ratio)).sum() / total_tokens,
        }
    return loss, metrics
