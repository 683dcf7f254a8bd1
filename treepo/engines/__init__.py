"""Engines: token ids in, token ids and log-probs out.

An engine only caches: everything that it keeps can be computed again from the tree. `open` gives one handle per tree,
so that an engine can keep the tree's key-values and a pool of servers can keep a tree on one replica.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from treepo.settings import Settings
from treepo.tree import Tree


class Sampling(Settings):
    """The distribution that tokens are drawn from."""

    temperature: float = Field(1.0, ge=0, description="Divides the logits; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this much probability.")
    top_k: int = Field(0, ge=0, description="Keep this many most probable tokens; 0 keeps all.")


@dataclass(frozen=True, slots=True)
class Segment:
    """One reply of an engine: at least one token."""

    tokens: list[int]  # a stop id, where one ended the segment, is the last
    logprobs: list[float]  # of `tokens`, in nats, under the distribution actually sampled
    version: int  # of the weights that sampled it
    entropies: list[float] | None = None  # of the whole distribution that each token is from, in nats; None: not asked


class Handle(Protocol):
    """An engine's view of one tree."""

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        """Continue the prefix that ends with `node` by 1 to `max_tokens` tokens, or until a stop id.

        The reply is a function of the prefix, `max_tokens` and `seed` (to the last bits of floating point). Raises
        `EngineError` if the engine cannot reply. Cancelling the call abandons the request.
        """
        ...

    def close(self) -> None:
        """Forget the tree. The caller has awaited or cancelled all its requests."""
        ...


class Engine(Protocol):
    """What the sampler needs from the thing that decodes."""

    granularity: int
    """Tokens per cache block: a prefix is reused up to a multiple of it. 1 reuses every token."""

    context: int
    """Most tokens of prompt and response together."""

    tree_tokens: int
    """Most tokens of a tree, prompt included, each counted once."""

    async def start(self) -> None:
        """Reach what decodes, so that problems are reported before anything takes long; more calls do nothing.

        From now on `context` and `tree_tokens` are known. All calls belong to one event loop from the first to `close`.
        Raises `EngineError`.
        """
        ...

    async def open(
        self,
        tree: Tree,
        sampling: Sampling,
        stop_ids: Collection[int],
        max_tokens: int | None = None,
        *,
        entropies: bool = False,
    ) -> Handle:
        """A handle for `tree`, which the caller goes on growing; waits while the engine has no room for it.

        `max_tokens`: most tokens that the tree will ever hold, prompt included (None: not known), so that an engine of
        limited memory knows which trees it can grow side by side. `entropies`: its segments come with them; that is the
        entropy after temperature, but before top-k and top-p. Raises `EngineError` if the engine cannot do that.
        """
        ...

    async def load_weights(self, version: int) -> None:
        """The policy changed: later segments come from the new weights and carry `version`. No tree may be open.

        Raises `EngineError` if something still decodes with other weights.
        """
        ...

    async def close(self) -> None:
        """Free connections and memory. No tree may be open."""
        ...
