"""Policies of your own: where trees fork, when paths end, and where a tree goes on if too few leaves came of it.

A configuration names them as

    sampler:
      branching: {kind: "examples.own_policies:AfterToken", token: 7, children: 3}
      stopping: {kind: "examples.own_policies:Sentences", most: 3}
      fallback: {kind: "examples.own_policies:Middle"}

The other keys are the arguments of the class. `Frontier` is what a policy may look at. Random numbers come from its
`rng` only, so that the same seed grows the same trees.
"""

from collections.abc import Callable

from treepo import Frontier, Sampler, SamplerSettings, ScriptedEngine, Stop
from treepo.engines.scripted import random_reply
from treepo.settings import Settings


class AfterToken(Settings):
    """Fork at the prompt and after segments that end with `token`, such as a line break. Else go on."""

    token: int
    children: int = 2

    def __call__(self, frontier: Frontier) -> list[int]:
        spare = frontier.remaining - len(frontier.active)
        shares = []
        for node in frontier.active:
            segment = frontier.tree.nodes[node]
            forks = segment.depth == 0 or segment.tokens[-1] == self.token
            shares.append(1 + min(spare, self.children - 1) if forks else 1)
            spare -= shares[-1] - 1
        return shares

    def again(self, frontier: Frontier) -> int:
        return min(self.children, frontier.remaining)


class Sentences(Settings):
    """A response of `most` sentences is complete."""

    most: int

    def __call__(self, text: Callable[[], str], *, eos: bool, length: bool, depth: bool) -> Stop | None:
        return Stop.ANSWER if text().count(".") >= self.most else None


class Middle(Settings):
    """Go on from the middle of the first paths that ended."""

    def __call__(self, frontier: Frontier, wanted: int) -> list[tuple[int, int]]:
        return [(leaf, frontier.longest(leaf) // 2) for leaf in frontier.finished[:wanted]]


if __name__ == "__main__":
    own = "examples.own_policies"
    settings = SamplerSettings.model_validate(
        {
            "width": 12,
            "segment_tokens": 4,
            "branching": {"kind": f"{own}:AfterToken", "token": 7},
            "stopping": {"kind": f"{own}:Sentences", "most": 3},
            "trim": True,
            "fallback": {"kind": f"{own}:Middle"},
        }
    )

    def decode(tokens: list[int]) -> str:
        return "".join("abcdefg ."[token] for token in tokens)

    (tree,) = Sampler(ScriptedEngine(random_reply(9)), settings, decode, ()).sample([("a prompt", [1, 2, 3])], seed=0)
    for leaf in tree.leaves():
        print(" | ".join(decode(tree.nodes[node].tokens) for node in tree.path(leaf)[1:]), f"({tree.nodes[leaf].stop})")
