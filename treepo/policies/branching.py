"""Branching policies: how many children each path of a tree gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Discriminator, Field, Tag, field_validator

from treepo.errors import ConfigError
from treepo.policies import Frontier
from treepo.settings import Settings
from treepo.tree import ROOT, Tree
from treepo.user_code import Custom, kind_of, one_of

Range = tuple[int, int]


class Branching(Protocol):
    """Decides how many children each active node gets."""

    @property
    def needs_entropies(self) -> bool:
        """Whether the nodes must know the entropies of their tokens."""
        ...

    def __call__(self, frontier: Frontier) -> list[int]:
        """Children of each active node: at least 1 each, at most `max(frontier.remaining, active nodes)` together."""
        ...

    def again(self, frontier: Frontier) -> int:
        """Children of a node that a fallback has chosen, 1 to `frontier.remaining`."""
        ...


class LevelBudget(Settings):
    """Each level has a budget of `divergence` children per path. `allocation` divides it among the active paths.

    Every active path gets at least one child, and the tree never gets more leaves than its width. The rest of the
    budget is divided in proportion to softmax(s x / T) by largest remainder, ties at random. x is the mean log-prob (or
    entropy) of the path's last segment, s = -1 for `low_prob` and +1 otherwise. `uniform` uses equal weights. With
    `transfer`, the budget also counts the paths that finished on the level just decoded.

    Source: arXiv 2508.17445, algorithm 1, sections 2.3 and 4.4. Not in the paper: the remainder of an even division
    goes to paths drawn at random (the released code gives all of it to the last path); `entropy`; `spread`, `start` and
    `every`; the half cosine of the temperature schedule.
    """

    kind: Literal["budget"] = "budget"
    divergence: int | Range | Literal["spread"] = Field(
        2,
        description="Children per active path and level (the paper's N or b): a number, or a range [low, high] that "
        "each level draws from. spread: the number of paths grows geometrically and reaches the width at the last "
        "level.",
    )
    first_divergence: int | Range | None = Field(
        (2, 8),
        description="Children of the root: a number, or a range [low, high] that each tree draws from; null: treat "
        "the root like any other path.",
    )
    start: int = Field(
        0, ge=0, description="Paths with fewer segments do not fork. The root forks by first_divergence."
    )
    every: int = Field(1, ge=1, description="Segments between two forks of a path, counted from `start`.")
    transfer: bool = Field(True, description="Give the budget of paths that have just finished to the active ones.")
    allocation: Literal["uniform", "low_prob", "high_prob", "entropy"] = Field(
        "uniform",
        description="Which paths get more children. uniform: all the same; low_prob: paths with low log-probs; "
        "high_prob: with high log-probs; entropy: with high entropy of the next-token distributions.",
    )
    over: Literal["segment", "path", "path_sum"] = Field(
        "segment",
        description="Tokens that an allocation other than uniform looks at. segment: mean over the path's last "
        "segment; path: mean over the whole response; path_sum: sum over the whole response.",
    )
    temperature: float | tuple[float, float] = Field(
        2.0,
        description="Softmax temperature, in nats, of an allocation other than uniform; higher values give more equal "
        "shares. [from, to]: changes over the training along half a cosine. The paper's schedule is [5.0, 1.0].",
    )

    @field_validator("divergence", "first_divergence")
    @classmethod
    def _sensible(cls, value: int | Range | str | None) -> int | Range | str | None:
        if value is None or isinstance(value, str):
            return value
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError("give a number of at least 1, or a range [low, high] with 1 <= low <= high")
        return value

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        if min(value if isinstance(value, tuple) else (value,)) <= 0:
            raise ValueError("give a number above 0, or two of them [from, to]")
        return value

    @property
    def needs_entropies(self) -> bool:
        return self.allocation == "entropy"

    def __call__(self, frontier: Frontier) -> list[int]:
        active, rng = frontier.active, frontier.rng
        if active[0] == ROOT and self.first_divergence is not None:
            return [min(frontier.width, _drawn(self.first_divergence, rng))]
        forking = [i for i, node in enumerate(active) if self._forks(frontier.tree.nodes[node].depth)]
        shares = [1] * len(active)
        if not forking:
            return shares
        rest = min(frontier.remaining - len(active), self._budget(frontier, len(forking)) - len(forking))
        if rest > 0:
            weights = self._weights(frontier, [active[i] for i in forking])
            for i, more in zip(forking, apportion(rest, weights, rng), strict=True):
                shares[i] += more
        return shares

    def again(self, frontier: Frontier) -> int:
        if self.divergence == "spread":
            growth = 1 if self.start >= frontier.levels else self._target(frontier, self.start)
            return min(frontier.remaining, growth)
        return min(frontier.remaining, _drawn(self.divergence, frontier.rng))

    def _forks(self, depth: int) -> bool:
        return depth >= self.start and (depth - self.start) % self.every == 0

    def _budget(self, frontier: Frontier, forking: int) -> int:
        """Children of all `forking` paths together, before the limit by the tree's width."""
        finished, active = len(frontier.finished), len(frontier.active)
        if self.divergence != "spread":
            transferred = frontier.finished_now if self.transfer else 0
            return _drawn(self.divergence, frontier.rng) * (forking + transferred)
        depth = max(frontier.tree.nodes[node].depth for node in frontier.active)
        target = self._target(frontier, depth)
        if self.transfer:
            return target - finished - (active - forking)
        return round(forking * target / (finished + active))

    def _target(self, frontier: Frontier, depth: int) -> int:
        """With `spread`: paths that the tree should have after its fork at `depth`."""
        grown = min(1.0, (depth + self.every - self.start) / (frontier.levels - self.start))
        return round(math.pow(frontier.width, grown))

    def _weights(self, frontier: Frontier, paths: Sequence[int]) -> list[float]:
        """[len(paths)] the share of each path in the budget. Shares are positive and sum to 1."""
        if self.allocation == "uniform" or len(paths) == 1:
            return [1 / len(paths)] * len(paths)
        sign = -1.0 if self.allocation == "low_prob" else 1.0
        return softmax([sign * self._merit(frontier.tree, path) for path in paths], self._heat(frontier.progress))

    def _merit(self, tree: Tree, path: int) -> float:
        """The number by which a path is compared: a mean or sum of log-probs or entropies, in nats."""
        values: list[float] = []
        for node in [path] if self.over == "segment" else tree.path(path)[1:]:
            known = tree.nodes[node].entropies if self.allocation == "entropy" else tree.nodes[node].logprobs
            if known is None:
                raise ConfigError(
                    "sampler.branching.allocation: entropy needs the entropies of tokens, but the engine gives none: "
                    "use another engine, or low_prob"
                )
            values += known
        return math.fsum(values) / (1 if self.over == "path_sum" else len(values))

    def _heat(self, progress: float) -> float:
        if not isinstance(self.temperature, tuple):
            return self.temperature
        start, end = self.temperature
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class CustomBranching(Custom):
    """Your class. It needs `__call__(frontier)` and `again(frontier)` as in `Branching`.

    If it has a true attribute `needs_entropies`, nodes get the entropies of their tokens.
    """

    calls: ClassVar[dict[str, Any]] = {"__call__": Branching.__call__, "again": Branching.again}

    @property
    def needs_entropies(self) -> bool:
        return bool(getattr(self.made, "needs_entropies", False))

    def __call__(self, frontier: Frontier) -> list[int]:
        shares: Any = self.made(frontier)
        paths = len(frontier.active)
        most = max(frontier.remaining, paths)
        if (
            not isinstance(shares, Sequence)
            or len(shares) != paths
            or not all(isinstance(share, int) and share >= 1 for share in shares)
            or sum(shares) > most
        ):
            raise self._refuse(
                f"gave {shares!r} children to {paths} active paths: it must return a list of {paths} whole numbers of "
                f"at least 1, with a sum of at most {most} (max of frontier.remaining and the number of active paths)"
            )
        return list(shares)

    def again(self, frontier: Frontier) -> int:
        children: Any = self.made.again(frontier)
        if not isinstance(children, int) or not 1 <= children <= frontier.remaining:
            raise self._refuse(
                f"gave {children!r} children to the node of a fallback: `again` must return a whole number from 1 to "
                f"{frontier.remaining} (frontier.remaining)"
            )
        return children


AnyBranching = Annotated[
    Annotated[LevelBudget, Tag("budget")] | Annotated[CustomBranching, Tag("custom")],
    Discriminator(kind_of("budget")),
    one_of("budget", default="budget"),
]


def softmax(values: Sequence[float], temperature: float) -> list[float]:
    """Weights in proportion to exp(value / temperature)."""
    highest = max(values)
    weights = [math.exp((value - highest) / temperature) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def apportion(total: int, weights: Sequence[float], rng: Random) -> list[int]:
    """Divide `total` in proportion to `weights`, which sum to 1. Largest remainder, ties at random."""
    quotas = [total * weight for weight in weights]
    parts = [math.floor(quota) for quota in quotas]
    order = rng.sample(range(len(weights)), len(weights))
    order.sort(key=lambda i: parts[i] - quotas[i])
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def _drawn(value: int | Range, rng: Random) -> int:
    return value if isinstance(value, int) else rng.randint(*value)
