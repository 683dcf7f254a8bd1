"""The text of a response, shared with the responses that begin alike, and what was found in it.

A path grows segment by segment and forks. A child shares the text of its parent, and only the new tokens are decoded
and searched. So the work for a tree is that of its unique tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, TypeVar, cast

WINDOW = 8
"""Tokens that are decoded again before new ones, at least: decoders look at a neighbour or two."""
SETTLED = 8
"""Characters that these tokens must give, at least: what a tokenizer tidies up (such as " n't") is shorter."""
UNKNOWN = "\ufffd"
"""Stands for bytes that are no character; at the end of a text it may be the beginning of one."""


class Scan(Protocol):
    """What is known about a text after reading it from its beginning. Immutable, since many texts begin alike."""

    def after(self, text: str) -> Self:
        """What is known once `text` is read as well, which directly follows what was read before."""
        ...


ScanT = TypeVar("ScanT", bound=Scan)


class ResponseText:
    """The text of a response: call it to get all of it as a string, always equal to `decode(all its tokens)`.

    `decode` turns token ids into text. It need not be the sum of its parts: the bytes of a character may be divided
    among tokens, and a space at the beginning may be dropped. So new tokens are decoded together with a window of
    earlier ones. Trailing U+FFFD may change with the next token and is kept apart. Where new tokens change the text of
    the window, or no window alone gives the text that it gives within the response, everything is decoded again.
    Assumed: new tokens change nothing before the window without changing the window.
    """

    __slots__ = ("_base", "_decode", "_parent", "_scans", "_settled", "_tail", "_tokens", "_window")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """The empty response."""
        self._decode = decode
        self._parent: ResponseText | None = None
        self._tokens: Sequence[int] = ()
        self._base: ResponseText | None = None  # its settled text comes before ours; None: ours is the beginning
        self._settled: str | None = ""  # what we add to it; None: not decoded yet
        self._tail = ""  # trailing U+FFFD, which is not settled yet
        self._scans: dict[Any, Any] = {}  # by the scan that began: what it knows at the end of our settled text
        self._window: tuple[list[int], str] | None = None

    def after(self, tokens: Sequence[int]) -> Self:
        """The response that goes on with `tokens`, which must not be changed later. Decodes nothing yet."""
        longer = type(self)(self._decode)
        longer._parent, longer._tokens, longer._settled = self, tokens, None
        return longer

    def share(self, tokens: Sequence[int]) -> Self:
        """Keep these tokens in place of ours, which are equal, so that they are in memory only once."""
        self._tokens = tokens
        return self

    def __call__(self) -> str:
        """The whole text."""
        self._read()
        return self._ending(None)

    def scan(self, start: ScanT) -> ScanT:
        """What `start` knows after reading the whole text: `start.after(text)`, but every token is read only once.

        What it knew at the end of the parent is remembered under `start`, which must be hashable.
        """
        self._read()
        unread: list[ResponseText] = []
        node: ResponseText | None = self
        while node is not None and start not in node._scans:
            unread.append(node)
            node = node._base
        known: ScanT = start if node is None else node._scans[start]
        for node in reversed(unread):
            known = known.after(cast(str, node._settled))
            node._scans[start] = known
        return known.after(self._tail) if self._tail else known

    def _read(self) -> None:
        """Decode what is not decoded yet: ancestors first."""
        unread, node = [], self
        while node._settled is None:
            unread.append(node)
            node = cast(ResponseText, node._parent)
        for node in reversed(unread):
            node._read_tokens()

    def _read_tokens(self) -> None:
        parent = cast(ResponseText, self._parent)
        window, before = parent._known_window()
        text = self._decode([*window, *self._tokens])
        if text.startswith(before):
            self._base, added = parent, text[len(before) :]
        else:  # the new tokens have changed the text before them
            everything = self._last(None)
            added = text if len(everything) == len(window) + len(self._tokens) else self._decode(everything)
        self._settled = added.rstrip(UNKNOWN)
        self._tail = added[len(self._settled) :]

    def _known_window(self) -> tuple[list[int], str]:
        """Our last tokens, and their settled text: new tokens after these give the text that they give after all."""
        if self._window is not None:
            return self._window
        size = WINDOW
        while True:
            tokens = self._last(size)
            text = self._decode(tokens) if tokens else ""
            settled = text.rstrip(UNKNOWN)
            if len(tokens) < size:  # these are all
                return tokens, settled
            # Beginning with half a character, or with nothing but spaces, the window may hide what came before.
            begins_well = len(settled) >= SETTLED and settled[0] != UNKNOWN and not settled.isspace()
            if begins_well and self._ending(len(text)) == text:
                break
            size *= 2
        if size <= 8 * WINDOW:  # a few numbers that all children need
            self._window = tokens, settled
        return tokens, settled

    def _last(self, count: int | None) -> list[int]:
        """Our last `count` tokens (None: all)."""
        parts: list[Sequence[int]] = []
        node: ResponseText | None = self
        missing = count
        while node is not None and (missing is None or missing > 0):
            parts.append(node._tokens if missing is None else node._tokens[-missing:])
            missing = None if missing is None else missing - len(parts[-1])
            node = node._parent
        return [token for part in reversed(parts) for token in part]

    def _ending(self, count: int | None) -> str:
        """The last `count` characters of our text (None: all); it must have been read."""
        parts = [self._tail]
        node: ResponseText | None = self
        missing = None if count is None else count - len(self._tail)
        while node is not None and (missing is None or missing > 0):
            parts.append(cast(str, node._settled))
            missing = None if missing is None else missing - len(parts[-1])
            node = node._base
        text = "".join(reversed(parts))
        return text if count is None else text[max(0, len(text) - count) :]
