"""The tree of rollouts, and the scored tree: the unit on disk, in the viewer and in the update.

A node stores only the tokens that it adds. Its prefix is the tokens of its path, so that a token shared by many
leaves exists once. Each leaf is a rollout in the field's sense. `ScoredTree` is a finished tree with a reward per leaf.
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
    DEPTH = "depth"  # the path has as many segments as it may
    REPETITION = "repetition"  # the text goes round in circles
    ERROR = "error"  # the engine failed; never trained on


@dataclass(slots=True)
class Node:
    """A segment in a tree. `start` and `depth` follow from the path and are kept because every stage asks for them.

    `seed` names the segment: the two halves of a split node keep it, and no two segments of a tree share it.
    """

    parent: int  # index of the parent, -1 for the root
    tokens: list[int]  # the tokens that this node adds
    logprobs: list[float]  # of `tokens` under the distribution actually sampled, in nats; [] for the root
    seed: int
    version: int  # of the weights that sampled it
    stop: Stop | None  # None: not a leaf (or, while the tree grows, not finished yet)
    start: int  # tokens on the path before this node, prompt included
    depth: int  # segments from the root
    entropies: list[float] | None = None  # of the distributions that `tokens` are from, in nats; None: not known
    sampled: bool = True  # False: the policy did not choose these tokens (a tool's output); they are never trained on
    error: str | None = None  # of an `ERROR` leaf: why its request was given up


class Tree:
    """A prompt (node 0) and all that was sampled from it.

    Invariants: a child's prefix is exactly its path's tokens; a node has children or a `stop`, never both, and in a
    finished tree never neither. Node indices never change, and a leaf keeps its index through every `split`, but a
    parent's index may be larger than its child's.
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

    __hash__ = None  # type: ignore[assignment]  # it grows

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
        """Append a child of `parent` and return its index. Only an `ERROR` leaf may add no token.

        Tokens that the policy did not sample (`sampled=False`) have no log-probs: `logprobs` is empty.
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
        """Divide `node` after its first `at` tokens; returns the new node that holds them, from now on its parent."""
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
        """The node on the path to `leaf` that ends after `kept` response tokens; splits a node where none does."""
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
        """`len(self.response(node))` without walking."""
        return self.nodes[node].start + len(self.nodes[node].tokens) - len(self.prompt)

    def leaves(self) -> list[int]:
        """Indices of the finished nodes, ascending."""
        return [i for i, node in enumerate(self.nodes) if node.stop is not None]

    @property
    def unique_tokens(self) -> int:
        """Response tokens in the tree, a shared one once: what was generated, and what tools have added."""
        return sum(len(node.tokens) for node in self.nodes) - len(self.prompt)

    @property
    def flat_tokens(self) -> int:
        """Response tokens over all leaves, a shared one once per leaf: what i.i.d. sampling would generate."""
        return sum(self.response_length(leaf) for leaf in self.leaves())

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` restores an equal tree, bit for bit."""
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
        """Restore a tree; raises `ValueError` for another schema or a value that is no tree."""
        if value.get("schema") != SCHEMA:
            raise ValueError(f"tree schema {value.get('schema')!r}, this version reads {SCHEMA}")
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
        """Recompute every `start` from the root down and check that parents and children agree."""
        if len(self.children) != len(self.nodes) or not self.nodes or self.nodes[ROOT].parent != -1:
            raise ValueError("node list and child lists do not describe one tree")
        seen, todo = 0, [ROOT]
        while todo:
            index = todo.pop()
            node = self.nodes[index]
            seen += 1
            if seen > len(self.nodes) or (node.stop is not None) == bool(self.children[index]):
                raise ValueError(f"node {index} needs either children or a stop, once")
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
    rewards: list[float | None]  # [L], in the order of `tree.leaves()`; None = not known: such a leaf is not trained on
    reasons: dict[int, str] = field(default_factory=dict)  # leaf -> why its reward is not known

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.tree.leaves()):
            raise ValueError(f"{len(self.rewards)} rewards for {len(self.tree.leaves())} leaves")

    @property
    def has_spread(self) -> bool:
        """Whether its known rewards differ, so that comparing leaves says something."""
        return len(set(self.rewards) - {None}) > 1


def write_trees(path: Path, rollouts: Iterable[ScoredTree]) -> None:
    """One JSON object per line, gzip-compressed if `path` ends in `.gz`. The file appears whole or not at all."""
    with whole_file(path) as part, _open(part, "w", compressed=path.suffix == ".gz") as file:
        file.writelines(map(_line, rollouts))


def append_tree(path: Path, rollout: ScoredTree) -> None:
    """Add a line to a file in the form of `write_trees`.

    It is in the file, whole, when this returns: a process that is killed keeps what it has written. A compressed file
    gets a gzip member per rollout, which makes it about a fifth larger.
    """
    line = _line(rollout).encode()
    with path.open("ab") as file:
        file.write(gzip.compress(line, mtime=0) if path.suffix == ".gz" else line)


def read_trees(path: Path) -> Iterator[ScoredTree]:
    """The rollouts of a file written by one of these two; raises `TaskError` naming file and line of a bad one."""
    with _open(path, "r", compressed=path.suffix == ".gz") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                reasons = {int(leaf): why for leaf, why in row["reasons"].items()}
                yield ScoredTree(row["problem_id"], Tree.from_json(row["tree"]), row["rewards"], reasons)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise TaskError(f"{path}:{number}: not a rollout: {error}") from error


def _line(rollout: ScoredTree) -> str:
    value = {
        "problem_id": rollout.problem_id,
        "rewards": rollout.rewards,
        "reasons": {str(leaf): why for leaf, why in rollout.reasons.items()},
        "tree": rollout.tree.to_json(),
    }
    return json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n"


@contextmanager
def _open(path: Path, mode: Literal["r", "w"], *, compressed: bool) -> Iterator[IO[str]]:
    with ExitStack() as stack:
        if not compressed:
            yield stack.enter_context(path.open(mode, encoding="utf-8"))
            return
        raw = stack.enter_context(path.open(mode + "b"))
        # No time and no name in the header: equal rollouts make equal files.
        packed = stack.enter_context(gzip.GzipFile(filename="", mode=mode + "b", fileobj=raw, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(packed, encoding="utf-8"))
