"""The tree of rollouts, and the scored tree: the unit on disk, in the viewer and in the update.

A node stores only the tokens that it adds. The tokens of its path are its prefix, so a token that many leaves share is
stored once. Each leaf is one rollout. `ScoredTree` is a finished tree with a reward per leaf.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

from treepo.errors import TaskError
from treepo.files import whole_file

SCHEMA = 1
ROOT = 0


class Stop(StrEnum):
    """Why a leaf ended."""

    ANSWER = "answer"  # the response holds a complete final answer
    STOP_STRING = "stop_string"  # the response holds a text that ends it
    EOS = "eos"  # an end-of-sequence token
    LENGTH = "length"  # the response budget is spent
    DEPTH = "depth"  # the path has the largest allowed number of segments
    REPETITION = "repetition"  # the text repeats itself
    ERROR = "error"  # the engine failed; never trained on


@dataclass(slots=True)
class Node:
    """A segment in a tree. `start` and `depth` follow from the path; they are stored because every stage needs them.

    `seed` identifies the segment: no two segments of a tree have the same seed. Both parts of a split node keep it.
    """

    parent: int  # index of the parent, -1 for the root
    tokens: list[int]  # the tokens that this node adds
    logprobs: list[float]  # of `tokens` under the distribution actually sampled, in nats; [] for the root
    seed: int
    version: int  # version of the weights that sampled it
    stop: Stop | None  # None: not a leaf (or, while the tree grows, not finished yet)
    start: int  # tokens on the path before this node, prompt included
    depth: int  # segments from the root
    entropies: list[float] | None = None  # of the distributions that `tokens` were sampled from, in nats
    sampled: bool = True  # False: the policy did not write these tokens (a tool's output), so they are not trained on
    error: str | None = None  # for an `ERROR` leaf: why its request failed


class Tree:
    """A prompt (node 0) and everything that was sampled from it.

    Invariants: a child's prefix is exactly its path's tokens. No node has both children and a `stop`; in a finished
    tree every node has one of them. Node indices never change, and a leaf keeps its index when a node is split.
    A parent's index may be larger than its child's.
    """

    def __init__(self, prompt: Sequence[int], *, key: str = "", seed: int = 0) -> None:
        if not prompt:
            raise ValueError("a tree needs a prompt of at least one token")
        self.key = key
        self.nodes = [Node(-1, list(prompt), [], seed, 0, None, 0, 0)]
        self.children: list[list[int]] = [[]]

    def __len__(self) -> int:
        return len(self.nodes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and (self.key, self.nodes, self.children) == (
            other.key,
            other.nodes,
            other.children,
        )

    __hash__ = None  # type: ignore[assignment]  # a tree is mutable

    @property
    def prompt(self) -> list[int]:
        """The root's tokens."""
        return self.nodes[ROOT].tokens

    def add(
        self,
        parent: int,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        *,
        seed: int,
        version: int = 0,
        stop: Stop | None = None,
        entropies: Sequence[float] | None = None,
        sampled: bool = True,
        error: str | None = None,
    ) -> int:
        """Append a child of `parent` and return its index.

        `logprobs` is empty for tokens that the policy did not sample (`sampled=False`). Raises `ValueError` if the
        lengths do not fit, if `parent` is a leaf, or if there is no token and `stop` is not `ERROR`.
        """
        above = self.nodes[parent]
        if above.stop is not None:
            raise ValueError(f"node {parent} is a leaf ({above.stop}) and cannot have children")
        if len(logprobs) != (len(tokens) if sampled else 0):
            kind = "tokens" if sampled else "tokens that were not sampled"
            raise ValueError(f"{len(tokens)} {kind} came with {len(logprobs)} log-probs")
        if error is not None and stop is not Stop.ERROR:
            raise ValueError("only an ERROR leaf has an error")
        if entropies is not None and len(tokens) != len(entropies):
            raise ValueError(f"{len(tokens)} tokens came with {len(entropies)} entropies")
        if not tokens and stop is not Stop.ERROR:
            raise ValueError("a segment needs at least one token")
        start = above.start + len(above.tokens)
        known = None if entropies is None else list(entropies)
        self.nodes.append(
            Node(
                parent, list(tokens), list(logprobs), seed, version, stop, start, above.depth + 1, known, sampled, error
            )
        )
        self.children.append([])
        self.children[parent].append(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def finish(self, node: int, stop: Stop) -> None:
        """Make the childless `node` a leaf."""
        if self.children[node] or self.nodes[node].stop is not None or node == ROOT:
            raise ValueError(f"node {node} has children or is finished already")
        self.nodes[node].stop = stop

    def split(self, node: int, at: int) -> int:
        """Divide `node` after its first `at` tokens.

        A new node takes these tokens and becomes the parent of `node`. Returns its index.
        """
        tail = self.nodes[node]
        if node == ROOT or not 0 < at < len(tail.tokens):
            raise ValueError(f"cannot split node {node} of {len(tail.tokens)} tokens at {at}")
        index = len(self.nodes)
        head = replace(tail, tokens=tail.tokens[:at], logprobs=tail.logprobs[:at], stop=None, error=None)
        if tail.entropies is not None:
            head.entropies, tail.entropies = tail.entropies[:at], tail.entropies[at:]
        self.nodes.append(head)
        self.children.append([node])
        siblings = self.children[tail.parent]
        siblings[siblings.index(node)] = index
        tail.parent, tail.start = index, tail.start + at
        tail.tokens, tail.logprobs = tail.tokens[at:], tail.logprobs[at:]
        return index

    def node_after(self, leaf: int, kept: int) -> int:
        """The node on the path to `leaf` that ends after `kept` response tokens. Splits a node if none ends there."""
        end = len(self.prompt) + kept
        if not 0 <= kept <= self.response_length(leaf):
            raise ValueError(f"cannot keep {kept} of {self.response_length(leaf)} response tokens")
        node = leaf
        while self.nodes[node].start >= end:
            node = self.nodes[node].parent
        at = end - self.nodes[node].start
        return node if at == len(self.nodes[node].tokens) else self.split(node, at)

    def path(self, node: int) -> list[int]:
        """Indices from the root to `node`, both included."""
        path = [node]
        while (node := self.nodes[node].parent) >= 0:
            path.append(node)
        return path[::-1]

    def tokens(self, node: int) -> list[int]:
        """Prompt and response up to the end of `node`."""
        return list(chain.from_iterable(self.nodes[n].tokens for n in self.path(node)))

    def response(self, node: int) -> list[int]:
        """The response up to the end of `node`, without the prompt."""
        return list(chain.from_iterable(self.nodes[n].tokens for n in self.path(node)[1:]))

    def response_length(self, node: int) -> int:
        """`len(self.response(node))`, without a walk along the path."""
        return self.nodes[node].start + len(self.nodes[node].tokens) - len(self.prompt)

    def leaves(self) -> list[int]:
        """Indices of the finished nodes, ascending."""
        return [i for i, node in enumerate(self.nodes) if node.stop is not None]

    @property
    def unique_tokens(self) -> int:
        """Response tokens in the tree, sampled or added by tools. A shared token counts once."""
        return sum(len(node.tokens) for node in self.nodes) - len(self.prompt)

    @property
    def flat_tokens(self) -> int:
        """Response tokens of all leaves. A shared token counts once per leaf, as if leaves were sampled separately."""
        return sum(self.response_length(leaf) for leaf in self.leaves())

    def to_json(self) -> dict[str, Any]:
        """A JSON value. `from_json` makes an equal tree of it, bit for bit."""
        return {
            "schema": SCHEMA,
            "key": self.key,
            "nodes": [
                {
                    "parent": n.parent,
                    "tokens": n.tokens,
                    "logprobs": n.logprobs,
                    "seed": n.seed,
                    "version": n.version,
                    "stop": n.stop,
                    "depth": n.depth,
                    **({} if n.entropies is None else {"entropies": n.entropies}),
                    **({} if n.sampled else {"sampled": False}),
                    **({} if n.error is None else {"error": n.error}),
                }
                for n in self.nodes
            ],
            "children": self.children,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tree:
        """The tree in a JSON value. Raises `ValueError` for another schema or a value that is not a tree."""
        if value.get("schema") != SCHEMA:
            raise ValueError(f"the tree has schema {value.get('schema')!r}, but this version reads {SCHEMA}")
        tree = cls.__new__(cls)
        tree.key = value["key"]
        tree.nodes = [
            Node(
                n["parent"],
                n["tokens"],
                n["logprobs"],
                n["seed"],
                n["version"],
                Stop(n["stop"]) if n["stop"] is not None else None,
                0,
                n["depth"],
                n.get("entropies"),
                n.get("sampled", True),
                n.get("error"),
            )
            for n in value["nodes"]
        ]
        tree.children = value["children"]
        tree._restore_starts()
        return tree

    def _restore_starts(self) -> None:
        """Compute every `start`, from the root down, and check that parents and children agree."""
        if len(self.children) != len(self.nodes) or not self.nodes or self.nodes[ROOT].parent != -1:
            raise ValueError("`nodes` and `children` do not describe one tree")
        seen, todo = 0, [ROOT]
        while todo:
            index = todo.pop()
            node = self.nodes[index]
            seen += 1
            if seen > len(self.nodes) or (node.stop is not None) == bool(self.children[index]):
                raise ValueError(f"node {index} must be reached once and have either children or a stop")
            if len(node.logprobs) != (len(node.tokens) if node.sampled else 0) and index != ROOT:
                raise ValueError(f"node {index} has {len(node.tokens)} tokens and {len(node.logprobs)} log-probs")
            if node.entropies is not None and len(node.tokens) != len(node.entropies):
                raise ValueError(f"node {index} has {len(node.tokens)} tokens and {len(node.entropies)} entropies")
            for child in self.children[index]:
                if self.nodes[child].parent != index:
                    raise ValueError(f"node {child} names parent {self.nodes[child].parent}, not {index}")
                self.nodes[child].start = node.start + len(node.tokens)
                todo.append(child)
        if seen != len(self.nodes):
            raise ValueError(f"{len(self.nodes) - seen} nodes cannot be reached from the root")


@dataclass(frozen=True, slots=True)
class ScoredTree:
    """A finished tree, the problem that it answers and the rewards of its leaves."""

    problem_id: str
    tree: Tree
    rewards: list[float | None]  # [L] in the order of `tree.leaves()`; a leaf with None (not known) is not trained on
    reasons: dict[int, str] = field(default_factory=dict)  # leaf -> why its reward is not known

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.tree.leaves()):
            raise ValueError(f"{len(self.rewards)} rewards for {len(self.tree.leaves())} leaves")

    @property
    def has_spread(self) -> bool:
        """Whether the known rewards differ. If not, the leaves give no learning signal."""
        return len(set(self.rewards) - {None}) > 1


def write_trees(path: Path, trees: Iterable[ScoredTree]) -> None:
    """Write one JSON object per line, compressed if `path` ends in `.gz`. After an error, `path` is as before."""
    with whole_file(path) as part, _open(part, "w", compressed=path.suffix == ".gz") as file:
        file.writelines(map(_line, trees))


def append_tree(path: Path, tree: ScoredTree) -> None:
    """Append a line to a file in the format of `write_trees`.

    When this returns, the line is in the file, so a process that is killed later loses no tree. A compressed file gets
    one gzip member per tree, which makes it about a fifth larger.
    """
    line = _line(tree).encode()
    with path.open("ab") as file:
        file.write(gzip.compress(line, mtime=0) if path.suffix == ".gz" else line)


def read_trees(path: Path) -> Iterator[ScoredTree]:
    """The trees in a file of `write_trees` or `append_tree`. Raises `TaskError` with file and line for a bad line."""
    with _open(path, "r", compressed=path.suffix == ".gz") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                reasons = {int(leaf): why for leaf, why in row["reasons"].items()}
                yield ScoredTree(row["problem_id"], Tree.from_json(row["tree"]), row["rewards"], reasons)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise TaskError(f"{path}:{number}: not a scored tree: {error}") from error


def _line(scored: ScoredTree) -> str:
    value = {
        "problem_id": scored.problem_id,
        "rewards": scored.rewards,
        "reasons": {str(leaf): why for leaf, why in scored.reasons.items()},
        "tree": scored.tree.to_json(),
    }
    return json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n"


@contextmanager
def _open(path: Path, mode: Literal["r", "w"], *, compressed: bool) -> Iterator[IO[str]]:
    with ExitStack() as stack:
        if not compressed:
            yield stack.enter_context(path.open(mode, encoding="utf-8"))
            return
        raw = stack.enter_context(path.open(mode + "b"))
        # The header has no time and no name, so that equal trees make equal files.
        packed = stack.enter_context(gzip.GzipFile(filename="", mode=mode + "b", fileobj=raw, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(packed, encoding="utf-8"))
