"""Policy losses on packed tokens: the textbook loss summed over all leaves, although a shared token is there once.

A loss maps the log-probs of some trained tokens to a scalar. It is called for disjoint parts of a batch, and the
results add up. The losses of treepo are frozen settings. Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import Discriminator, Field, Tag

from treepo.forest import Ints
from treepo.learner.packing import PackedBatch, SharedTokens, Totals
from treepo.settings import Settings
from treepo.user_code import Custom, kind_of, one_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """What a loss sees: n trained tokens of a packed row. A token that several leaves share is there once."""

    logprob: Tensor  # [n] of the policy, in nats; the gradient of the loss goes through it
    old_logprob: Tensor | None  # [n] of the policy before the step's first update; None: equal to `logprob`
    rollout_logprob: Tensor  # [n] of the engine that sampled the tokens
    reference_logprob: Tensor | None  # [n] of the initial policy; None unless the loss has `needs_reference`
    adv_pos: Tensor  # [n] sum of the positive advantages of the leaves through the token
    adv_neg: Tensor  # [n] sum of the negative ones
    weight: Tensor  # [n] number of leaves through the token (or less, by `shared_tokens`)
    responses: Responses | None = None  # None unless the loss has `over_responses`

    @classmethod
    def of(
        cls,
        batch: PackedBatch,
        rows: Ints,
        logprob: Tensor,
        old_logprob: Tensor | None = None,  # [T]
        reference_logprob: Tensor | None = None,  # [T]
        *,
        responses: bool = False,
    ) -> Self:
        """The trained `rows` [n] of `batch`, whose log-probs under the policy are `logprob` [n]."""
        import torch

        device = logprob.device
        at = torch.as_tensor(rows, device=device)
        adv_pos, adv_neg, weight, rollout = (
            torch.as_tensor(x[rows], device=device)
            for x in (batch.adv_pos, batch.adv_neg, batch.weight, batch.rollout_logprob)
        )
        old, reference = (x if x is None else x[at] for x in (old_logprob, reference_logprob))
        whole = Responses.of(batch, rows, device) if responses else None
        return cls(logprob, old, rollout, reference, adv_pos, adv_neg, weight, whole)


@dataclass(frozen=True, slots=True)
class Responses:
    """The responses (leaves) that the n tokens of a row make up. m: nodes of the row, L: leaves, D: nodes on a path."""

    node: Tensor  # [n] int64: the node, 0 to m - 1, of each token
    path: Tensor  # [L, D] int64: the nodes on the path to each leaf; m after the path's end
    advantage: Tensor  # [L, D] of each leaf for the tokens of each node on its path; 0 after the path's end
    length: Tensor  # [m + 1] trained tokens of each node (0 for prompts and tools' output); the last entry is 0

    @classmethod
    def of(cls, batch: PackedBatch, rows: Ints, device: Any) -> Self:
        """The responses of `batch`, whose trained tokens are `rows` [n]."""
        import torch

        node = torch.as_tensor(batch.node[rows], device=device)
        # From the paths, because a node without tokens (a failed leaf) is in no row.
        nodes = int(batch.leaves.path.max(initial=-1)) + 1
        path = torch.as_tensor(batch.leaves.path, device=device)
        return cls(
            node,
            torch.where(path >= 0, path, nodes),
            torch.as_tensor(batch.leaves.advantage, device=device),
            torch.bincount(node, minlength=nodes + 1),
        )

    def on_path(self, values: Tensor) -> Tensor:
        """[L, D] the sum of `values` [n] over the tokens of each node on each path."""
        return values.new_zeros(len(self.length)).index_add(0, self.node, values)[self.path]


class Loss(Protocol):
    """A function of some trained tokens. It may say more about itself in three optional attributes.

    - `shared_tokens` ("sum", "mean" or "sqrt"; default "sum"): what a token weighs that several leaves share.
    - `needs_reference` (default False): whether it needs the log-probs of the initial policy.
    - `over_responses` (default False): whether it needs all tokens of a row at once, and `TrainedTokens.responses`.
    """

    def __call__(self, tokens: TrainedTokens, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `tokens`, a scalar, and its metrics: detached scalars by their names.

        Both add up over the parts of a batch. `totals` are those of the whole batch. A loss that divides by them is a
        mean over the batch, however the batch is divided into parts.
        """
        ...


def shared_tokens(loss: Loss) -> SharedTokens:
    """What a token weighs in `loss` that several leaves share."""
    value: SharedTokens = getattr(loss, "shared_tokens", "sum")
    return value


def needs_reference(loss: Loss) -> bool:
    """Whether `loss` needs the log-probs of the initial policy."""
    return bool(getattr(loss, "needs_reference", False))


def over_responses(loss: Loss) -> bool:
    """Whether `loss` needs all tokens of a row at once, and their responses."""
    return bool(getattr(loss, "over_responses", False))


class PolicyLoss(Settings):
    """The clipped loss of TreePO and DAPO (`policy_loss`)."""

    kind: Literal["clip"] = "clip"
    clip_low: float = Field(0.2, ge=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.28, ge=0, description="The ratio is clipped above at 1 + clip_high.")
    dual_clip: float | None = Field(
        10.0, gt=1, description="Largest ratio that counts where the advantage is negative; null: no limit."
    )
    shared_tokens: SharedTokens = Field(
        "sum",
        description="Weight of a token that k leaves share: k (sum, the paper), 1 (mean) or the root of k (sqrt).",
    )
    kl: float = Field(0.0, ge=0, description="Weight of the KL divergence to the initial policy; 0: none.")
    rollout_cap: float | None = Field(
        None,
        gt=0,
        description="Corrects for an engine whose log-probs differ from the trainer's: the loss of each token is "
        "multiplied by the trainer's probability over the engine's, and by at most this number; null: off.",
    )
    over_responses: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    def __call__(self, tokens: TrainedTokens, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(
            self,
            tokens.logprob,
            tokens.old_logprob,
            tokens.adv_pos,
            tokens.adv_neg,
            tokens.weight,
            totals.weight,
            rollout_logprob=tokens.rollout_logprob,
            reference_logprob=tokens.reference_logprob,
        )


class GSPO(Settings):
    """The clipped loss with one ratio per response: the geometric mean of its tokens' ratios.

    Source: GSPO, arXiv 2507.18071, eq. 5 to 7. Where segments of a response have different advantages, it is the
    paper's GSPO-token (eq. 13): each token has the response's ratio and an advantage of its own. The loss is a mean
    over responses, each of which is a mean over its sampled tokens. A response without a sampled token counts as 0.
    """

    kind: Literal["gspo"] = "gspo"
    clip_low: float = Field(3e-4, ge=0, lt=1, description="A response's ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(4e-4, ge=0, description="A response's ratio is clipped above at 1 + clip_high.")
    shared_tokens: ClassVar[SharedTokens] = "sum"
    needs_reference: ClassVar[bool] = False
    over_responses: ClassVar[bool] = True

    def __call__(self, tokens: TrainedTokens, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        responses = tokens.responses
        if responses is None:
            raise ValueError("GSPO needs tokens.responses: make the tokens with TrainedTokens.of(..., responses=True)")
        old = tokens.logprob.detach() if tokens.old_logprob is None else tokens.old_logprob
        length = responses.length[responses.path]  # [L, D] trained tokens of each node
        tokens_of = length.sum(1, keepdim=True).clamp(min=1)  # [L, 1]
        log_ratio = responses.on_path(tokens.logprob.detach() - old).sum(1, keepdim=True) / tokens_of  # [L, 1]
        ratio = log_ratio.exp()
        advantage = responses.advantage  # [L, D]
        free = (ratio * advantage <= ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage).to(ratio.dtype)
        gain = advantage * (free * ratio + (1 - free) * ratio.clamp(1 - self.clip_low, 1 + self.clip_high))
        # Its value is zero. Its gradient is that of the sum of the log-probs of the node's tokens.
        moving = responses.on_path(tokens.logprob - tokens.logprob.detach())  # [L, D]
        value = (gain * length + free * ratio * advantage * moving) / tokens_of
        loss = -value.sum() / totals.leaves
        clipped = ((1 - free) * length / tokens_of).sum() / totals.leaves
        divergence = (ratio - 1 - log_ratio).sum() / totals.leaves
        return loss, {"clip/fraction": clipped.detach(), "kl/old": divergence.detach()}


class CustomLoss(Custom):
    """A class of yours with `__call__(tokens, totals)`, as in `Loss`.

    Optional attributes: `shared_tokens` (default "sum"), `needs_reference` and `over_responses` (default False).
    """

    calls: ClassVar[dict[str, Any]] = {"__call__": Loss.__call__}

    @property
    def shared_tokens(self) -> SharedTokens:
        return shared_tokens(self.made)

    @property
    def needs_reference(self) -> bool:
        return needs_reference(self.made)

    @property
    def over_responses(self) -> bool:
        return over_responses(self.made)

    def __call__(self, tokens: TrainedTokens, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        found: Any = self.made(tokens, totals)
        if reason := wrong_result(found):
            raise self._refuse(reason)
        loss, metrics = found
        return loss, metrics


def wrong_result(found: object) -> str:
    """What is wrong with the result of a loss, as an end of a sentence; empty if nothing is."""
    import torch

    match found:
        case (torch.Tensor() as loss, dict() as metrics) if loss.ndim == 0:
            if wrong := [key for key, x in metrics.items() if not isinstance(x, torch.Tensor) or x.ndim]:
                return f"returned the metric {wrong[0]!r} that is not a scalar tensor"
            return ""
    return f"returned {str(found)[:80]}: it must return (a scalar tensor, a dict of scalar tensors)"


AnyLoss = Annotated[
    Annotated[PolicyLoss, Tag("clip")] | Annotated[GSPO, Tag("gspo")] | Annotated[CustomLoss, Tag("custom")],
    Discriminator(kind_of("clip")),
    one_of("clip", "gspo", default="clip"),
]
"""`kind` may be left out: clip."""


def policy_loss(
    settings: PolicyLoss,
    logprob: Tensor,  # [n] of the policy, in nats
    old_logprob: Tensor | None,  # [n] of the policy that the ratio is taken to
    adv_pos: Tensor,  # [n] >= 0
    adv_neg: Tensor,  # [n] <= 0
    weight: Tensor,  # [n]
    total_weight: float,
    *,
    rollout_logprob: Tensor | None = None,  # [n] of the engine that sampled the tokens
    reference_logprob: Tensor | None = None,  # [n] of the initial policy
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss of n packed tokens, and metrics. Both *add up*: the sums over all tokens are those of the batch.

    Source: DAPO's token-mean (TreePO, arXiv 2508.17445, eq. 1) and dual clip (arXiv 1912.09729): with ratio r, each
    pair of a leaf and one of its tokens costs -min(rA, clip(r, 1 - low, 1 + high) A), and for A < 0 at most -c A. The
    sum over the leaves through a token has a closed form in the sums of their positive and negative advantages
    (`Folded`). `total_weight` is the sum of `weight` over the *whole* batch (`Totals.weight`). With `shared_tokens` sum
    it is the number of (leaf, sampled token) pairs. So the loss is a mean over these pairs, however the batch is
    divided into rows.

    `old_logprob` None means on-policy: r = 1 exactly, with the gradient of the log-prob. Where `weight` is 0, the
    log-probs have no effect, but they must be finite.

    With `rollout_cap` C a token's cost is multiplied by min(old / rollout probability, C): truncated importance
    sampling (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025). With `kl` the
    loss gains kl times the mean of exp(d) - 1 - d, where d = reference - policy log-prob (GRPO, arXiv 2402.03300,
    eq. 4).

    Metrics are detached scalars, parts of means over the same pairs:

    - `clip/fraction`: pairs whose loss has no gradient because of a clip. A token whose leaves disagree in sign counts
      by the share of |A| that is clipped.
    - `kl/old`: r - 1 - log r, an unbiased estimate of KL(old || policy) if the tokens were sampled from old.
    - `kl/rollout`: the same estimate of KL(rollout || old).
    - `clip/rollout_capped`: tokens at the cap.
    - `kl/reference`: the term that `kl` multiplies.

    Raises `ValueError` if `settings` need log-probs (`kl`, `rollout_cap`) that are not given.
    """
    import torch

    if settings.kl and reference_logprob is None:
        raise ValueError("a loss with kl > 0 needs reference_logprob")
    if settings.rollout_cap is not None and rollout_logprob is None:
        raise ValueError("a loss with rollout_cap needs rollout_logprob")

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
        parts["kl/rollout"] = mismatch.exp() - 1 - mismatch
        if settings.rollout_cap is not None:
            importance = mismatch.exp()
            cost = cost * importance.clamp(max=settings.rollout_cap)
            parts["clip/rollout_capped"] = (importance > settings.rollout_cap).to(weight.dtype)
    loss = -cost.sum() / total_weight
    if reference_logprob is not None:
        gap = reference_logprob - logprob
        parts["kl/reference"] = gap.exp() - 1 - gap
        loss = loss + settings.kl * (weight * parts["kl/reference"]).sum() / total_weight
    with torch.no_grad():
        clipped = adv_pos * (above != ratio) - adv_neg * (below != ratio)
        parts["clip/fraction"] = clipped / (adv_pos - adv_neg).clamp(min=torch.finfo(adv_pos.dtype).tiny)
        parts["kl/old"] = ratio - 1 - log_ratio
        metrics = {name: (weight * part).sum() / total_weight for name, part in parts.items()}
    return loss, metrics
