"""When a path ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Discriminator, Field, Tag

from treepo.policies.repetition import RepetitionScan
from treepo.policies.response_text import ResponseText, ScanT
from treepo.settings import Settings
from treepo.tasks.math import BoxScan
from treepo.tree import Stop
from treepo.user_code import Custom, kind_of, one_of


class Stopping(Protocol):
    """Decides after every segment whether the path becomes a leaf."""

    def __call__(self, text: ResponseText, *, eos: bool, length: bool, depth: bool) -> Stop | None:
        """Judge the whole response so far.

        `text()` is the response as a string. `eos`: its last token is an EOS; `length`: the response budget is spent;
        `depth`: it has as many segments as it may. A path at one of these two bounds ends whatever is returned.

        A rule that searches long responses may use `text.scan(...)` instead, which reads only what is new.
        """
        ...


@dataclass(frozen=True, slots=True)
class StringScan:
    """`found`: one of `strings` is in the text that was read."""

    strings: tuple[str, ...]
    found: bool = False
    overlap: str = ""  # the last characters: one fewer than the longest string has

    def after(self, text: str) -> StringScan:
        """What is known once `text` is read as well."""
        if self.found or not text:
            return self
        text = self.overlap + text
        longest = max(map(len, self.strings))
        found = any(string in text for string in self.strings)
        return StringScan(self.strings, found, text[max(0, len(text) - longest + 1) :])


class EarlyStop(Settings):
    """Answer complete, stop string, EOS, length, depth, repetition; the first that holds names the leaf's `Stop`.

    Source: arXiv 2508.17445, section 2.3. Ours: every rule sees the whole response, so that a box or a pattern that
    straddles two segments is seen (the released code looks at the last segment only); stop strings. Known false
    positive of the repetition rule: exact repeats inside ordinary text, such as a rule of 39 dashes.
    """

    kind: Literal["early"] = "early"
    answer: Literal["alone", "with_eos", "ignored"] = Field(
        "alone",
        description="alone: a closed \\boxed{...} ends the path; with_eos: only together with an EOS; ignored: it does "
        "not count, only EOS does.",
    )
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Texts that end the path, looked for in the decoded response (without special tokens)."
    )
    repetition_chars: int = Field(32, ge=1, description="Length of the substring that counts as a repeat.")
    repetition_count: int = Field(8, ge=0, description="So many occurrences end the path; 0 switches the rule off.")

    def __call__(self, text: ResponseText | Callable[[], str], *, eos: bool, length: bool, depth: bool) -> Stop | None:
        if (self.answer == "alone" or (self.answer == "with_eos" and eos)) and _scanned(text, BoxScan()).closed:
            return Stop.ANSWER
        if self.stop_strings and _scanned(text, StringScan(self.stop_strings)).found:
            return Stop.STOP_STRING
        if eos:
            return Stop.EOS
        if length:
            return Stop.LENGTH
        if depth:
            return Stop.DEPTH
        if not self.repetition_count:
            return None
        repetition = RepetitionScan(self.repetition_chars, self.repetition_count)
        return Stop.REPETITION if _scanned(text, repetition).found else None


def _scanned(text: ResponseText | Callable[[], str], start: ScanT) -> ScanT:
    """What `start` knows after the whole text, which may also be a plain function that returns it."""
    return text.scan(start) if isinstance(text, ResponseText) else start.after(text())


class CustomStopping(Custom):
    """A class of yours: with `__call__(text, *, eos, length, depth)` as `Stopping` has it."""

    calls: ClassVar[dict[str, Any]] = {"__call__": Stopping.__call__}

    def __call__(self, text: ResponseText, *, eos: bool, length: bool, depth: bool) -> Stop | None:
        stop: Any = self.made(text, eos=eos, length=length, depth=depth)
        if stop is None or (isinstance(stop, Stop) and stop is not Stop.ERROR):
            return stop
        allowed = ", ".join(f"Stop.{s.name}" for s in Stop if s is not Stop.ERROR)
        raise self._refuse(f"returned {stop!r}: it must return None or one of {allowed} (from treepo import Stop)")


AnyStopping = Annotated[
    Annotated[EarlyStop, Tag("early")] | Annotated[CustomStopping, Tag("custom")],
    Discriminator(kind_of("early")),
    one_of("early", default="early"),
]
