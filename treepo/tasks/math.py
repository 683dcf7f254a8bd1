r"""Boxed answers: find the last `\boxed{...}` of a text, and compare two answers as mathematics.

`boxed` is pure string work and cheap. `BoxScan` says of a text that grows whether a box is closed. `equivalent` runs
sympy, which may take arbitrarily long on an unlucky expression, and is therefore only called inside a bounded process.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

# A doubled backslash is LaTeX's line break, so a brace after it is not escaped; but models also write `\\boxed{3}`
# where they mean one backslash, and that is accepted.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\\\(?!boxed)|\\[{}]|(?P<open>\{)|(?P<close>\})")
# At the end of a text that goes on: what may become one of these. A backslash, or two, and a beginning of `boxed {`.
_GROWING = re.compile(r"(?P<undecided>\\\\?(?:b(?:o(?:x(?:e(?:d\s*)?)?)?)?)?\Z)|" + _BRACES.pattern)


def boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` of `text` (the one that opens last), or None if no box is closed.

    Nested braces belong to the content, escaped ones (`\{`) do not count. One pass over the text after its first box.
    """
    first = text.find(r"\boxed")
    if first < 0 or "}" not in text[first:]:
        return None
    opened: list[int] = []  # where the content of an open box starts, or 0 for any other open brace
    last: tuple[int, int] | None = None  # content of the best box so far, [start, end)
    for brace in _BRACES.finditer(text, first):
        if brace.lastgroup == "box":
            opened.append(brace.end())
        elif brace.lastgroup == "open":
            opened.append(0)
        elif brace.lastgroup == "close" and opened:
            start = opened.pop()
            if start and (last is None or start > last[0]):
                last = start, brace.start()
    return text[slice(*last)] if last is not None else None


Braces = tuple[bool, "Braces | None"]
"""Open braces, the innermost first: whether it opens a box, and the braces around it."""


@dataclass(frozen=True, slots=True)
class BoxScan:
    r"""`closed`: `boxed` finds something in the text that was read. Work is linear in what is read."""

    closed: bool = False
    begun: bool = False  # a `\boxed` was seen; braces before it do not count
    opened: Braces | None = None
    undecided: str = ""  # the end of the text, which is read again together with what follows

    def after(self, text: str) -> BoxScan:
        """What is known once `text` is read as well."""
        if self.closed or not text:
            return self
        text, start, opened = self.undecided + text, 0, self.opened
        if not self.begun:
            start = text.find(r"\boxed")
            if start < 0:
                return BoxScan(undecided=text[-5:])  # the beginning of a \boxed has at most 5 characters
        for brace in _GROWING.finditer(text, start):
            if brace.lastgroup == "undecided":
                return BoxScan(False, True, opened, brace.group())
            if brace.lastgroup == "box":
                opened = True, opened
            elif brace.lastgroup == "open":
                opened = False, opened
            elif brace.lastgroup == "close" and opened is not None:
                is_box, opened = opened
                if is_box:
                    return BoxScan(closed=True)
        return BoxScan(False, True, opened)


def equivalent(answer: str, given: str) -> bool:
    r"""Whether `given` means the same as `answer` (e.g. `\frac{1}{2}` and `0.5`), by math-verify.

    Equal strings need no parser. Unbounded in time: call it in a process that somebody watches.
    """
    answer, given = answer.strip(), given.strip()
    if answer == given:
        return True
    if not answer or not given:
        return False
    verify = _math_verify()
    return bool(verify.verify(_parsed(answer), _parsed(given), timeout_seconds=None))


def _parsed(answer: str) -> list[Any]:
    # Inside a box, math-verify takes the text as one expression instead of looking for one in prose.
    parsed: list[Any] = _math_verify().parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return parsed


@cache
def _math_verify() -> Any:
    import math_verify

    # It logs a warning for each call without its own (signal-based) time-out; the process around us has one.
    for name in ("math_verify", "math_verify.grader", "math_verify.parser"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return math_verify
