"""What every engine checks about its trees: a prompt must fit, and weights change only when no tree is open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from treepo.engines import Handle
from treepo.errors import EngineError
from treepo.tree import Tree

H = TypeVar("H", bound=Handle)


class OpenTrees(Generic[H]):
    """The handles of the trees that an engine has open, the oldest first."""

    def __init__(self) -> None:
        self._handles: dict[H, None] = {}

    def add(self, handle: H) -> H:
        """Count `handle` as open; returns it."""
        self._handles[handle] = None
        return handle

    def discard(self, handle: H) -> bool:
        """Count `handle` as closed; returns whether it was open."""
        if handle not in self._handles:
            return False
        del self._handles[handle]
        return True

    def require_none(self) -> None:
        """Raise `RuntimeError` if a tree is open: its segments would come from two versions of the weights."""
        require_no_tree(len(self))

    def __iter__(self) -> Iterator[H]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def require_no_tree(count: int) -> None:
    """Raise `RuntimeError` if `count` trees, or sessions of another kind, are open and the weights are to change."""
    if count:
        raise RuntimeError(f"{count} trees are open: close them before the weights change")


def require_prompt_fits(tree: Tree, context: int, remedy: str) -> None:
    """Raise `EngineError` if the prompt leaves no token for a response; `remedy`: what the user can do besides."""
    if len(tree.prompt) >= context:
        raise EngineError(
            f"the prompt of tree {tree.key!r} has {len(tree.prompt)} tokens, and prompt and response share {context}: "
            f"drop the problem, or {remedy}"
        )
