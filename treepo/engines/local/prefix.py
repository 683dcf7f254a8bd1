"""What a request continues: a prefix of tokens, and where the key-values of these tokens lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Span:
    """Positions `begin` to `end` of a prefix, whose key-values lie in the block called `name`."""

    name: Hashable
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens that a segment is to follow.

    The last token of a prefix has no key-value yet: it is the first input of each segment that follows. So `spans`
    covers positions 0 to `length - 1`, the end excluded.
    """

    length: int  # in tokens, at least 1
    last: int  # the last token
    spans: Sequence[Span]  # where the key-values of all tokens but the last lie, in the order of their positions
    tokens: Callable[[], list[int]]  # all its token ids; called only if key-values have to be computed
    priority: int = 0  # of two requests that wait, the one with the higher number goes first
