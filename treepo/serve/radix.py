"""The prefixes of one prompt that a server knows: which beginning of a request is known, and where its key-values lie.

This is a radix tree of token ids, with one difference: siblings may begin alike, because each segment has a block of
key-values of its own. Of several beginnings the longest is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from treepo.engines.local.prefix import Prefix, Span


@dataclass(slots=True, eq=False)
class RadixNode:
    """Tokens that follow those of its parent."""

    parent: RadixNode | None  # None: its tokens are the prompt
    tokens: list[int]
    name: int  # of the block with their key-values; the halves of a divided node share it
    start: int  # tokens before it
    depth: int  # requests before it on its path: those of higher depth are decoded first
    children: list[RadixNode] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Tokens of its path."""
        return self.start + len(self.tokens)

    def path(self) -> list[RadixNode]:
        """The nodes from the prompt to this one, both included."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return [node, *reversed(nodes)]

    def all_tokens(self) -> list[int]:
        """The token ids of its path."""
        return [token for node in self.path() for token in node.tokens]

    def add(self, tokens: Sequence[int], name: int) -> RadixNode:
        """A new child with `tokens`, at least one."""
        child = RadixNode(self, list(tokens), name, self.end, self.depth + 1)
        self.children.append(child)
        return child

    def prefix(self) -> Prefix:
        """Its path, as the engine wants it."""
        spans: list[Span] = []
        for node in self.path():
            begin, end = max(node.start - 1, 0), node.end - 1  # a block begins with the last token before its segment
            if spans and spans[-1].name == node.name:
                spans[-1].end = end  # halves of one segment
            elif begin < end:
                spans.append(Span(node.name, begin, end))
        return Prefix(self.end, self.tokens[-1], spans, self.all_tokens, self.depth)

    def longest(self, ids: Sequence[int]) -> RadixNode:
        """The node whose path is the longest known beginning of `ids`; `ids` begin with the prompt, which is this node.

        A node that agrees with `ids` only at first is divided there.
        """
        best, inside = self, 0  # the node, and how many of its tokens agree, if not all do
        length, waiting = self.end, [self]
        while waiting:
            for child in waiting.pop().children:
                same = _common(child.tokens, ids, child.start)
                whole = same == len(child.tokens)
                if same and child.start + same > length:
                    best, inside, length = child, 0 if whole else same, child.start + same
                if whole:
                    waiting.append(child)
        return best._divide(inside) if inside else best

    def _divide(self, at: int) -> RadixNode:
        """A new parent of this node that takes over its first `at` tokens."""
        above = self.parent
        assert above is not None, "a prompt is never divided"  # noqa: S101
        head = RadixNode(above, self.tokens[:at], self.name, self.start, self.depth, [self])
        above.children[above.children.index(self)] = head
        self.parent, self.start, self.tokens = head, self.start + at, self.tokens[at:]
        return head


def _common(tokens: Sequence[int], ids: Sequence[int], begin: int) -> int:
    """How many of `tokens` equal those of `ids` from `begin` on."""
    if begin >= len(ids) or tokens[0] != ids[begin]:
        return 0
    same = 0
    for token, other in zip(tokens, ids[begin : begin + len(tokens)], strict=False):
        if token != other:
            break
        same += 1
    return same
