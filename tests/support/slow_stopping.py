"""The slow way to stop: decode the whole response after every segment, and search all of it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from treepo.policies.response_text import ResponseText
from treepo.policies.stopping import EarlyStop
from treepo.sampler import Sampler
from treepo.tasks.math import boxed
from treepo.tree import Stop, Tree


def repeats(text: str, chars: int, count: int) -> bool:
    """Whether a substring of `chars` characters occurs `count` times."""
    return max(Counter(text[i : i + chars] for i in range(len(text) - chars + 1)).values(), default=0) >= count


def judged(rule: EarlyStop, text: str, *, eos: bool, length: bool, depth: bool) -> Stop | None:
    """What `EarlyStop` says of a whole response."""
    if (rule.answer == "alone" or (rule.answer == "with_eos" and eos)) and boxed(text) is not None:
        return Stop.ANSWER
    if any(string in text for string in rule.stop_strings):
        return Stop.STOP_STRING
    for holds, stop in ((eos, Stop.EOS), (length, Stop.LENGTH), (depth, Stop.DEPTH)):
        if holds:
            return stop
    if rule.repetition_count and repeats(text, rule.repetition_chars, rule.repetition_count):
        return Stop.REPETITION
    return None


class SlowSampler(Sampler):
    """Grows the trees of `Sampler` without remembering anything about texts."""

    def _judge(
        self, tree: Tree, parent: int, before: ResponseText, new: Sequence[int]
    ) -> tuple[ResponseText, Stop | None, int]:
        rule, earlier = self.settings.stopping, tree.response(parent)
        assert isinstance(rule, EarlyStop)

        def stop_after(kept: int, *, eos: bool = False, length: bool = False, depth: bool = False) -> Stop | None:
            return judged(rule, self.decode([*earlier, *new[:kept]]), eos=eos, length=length, depth=depth)

        length = len(earlier) + len(new) >= self.settings.response_tokens
        depth = tree.nodes[parent].depth + 1 >= self.settings.levels
        stop, kept = stop_after(len(new), eos=new[-1] in self.stop_ids, length=length, depth=depth), len(new)
        if self.settings.trim and stop is not None:
            complete = (Stop.ANSWER, Stop.STOP_STRING)
            kept = 1 + bisect_left(range(1, len(new)), True, key=lambda n: stop_after(n) in complete)
            stop = stop if kept == len(new) else stop_after(kept)
        return before, stop, kept
