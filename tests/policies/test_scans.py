"""What the stopping rules remember of a text that grows: equal to searching all of it, wherever it was divided."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scripted_trees import EOS
from tests.support.slow_stopping import SlowSampler, judged, repeats
from tests.support.tokenizers import KINDS, PARTS, decoder, tokenizer
from treepo.engines.scripted import ScriptedEngine
from treepo.policies.branching import LevelBudget
from treepo.policies.fallback import GridBoundary, LowestLogProb, SegmentBoundary, WeightedBlock
from treepo.policies.repetition import RepetitionScan, hashes, lowest_around
from treepo.policies.stopping import EarlyStop, StringScan
from treepo.sampler import Sampler, SamplerSettings
from treepo.seeds import generator
from treepo.tasks.math import BoxScan, boxed
from treepo.tree import Stop, Tree

Step = tuple[int, str]
"""Which earlier text a new one goes on from (counted back), and what it adds."""


def check(steps: Sequence[Step], start: Any, slow: Callable[[str], bool], found: str = "found") -> None:
    """Let texts grow from one another; `start` finds in each what `slow` finds in the whole."""
    grown = [("", start)]
    for back, new in steps:
        text, scan = grown[-1 - back % len(grown)]
        grown.append((text + new, scan.after(new)))
        assert getattr(grown[-1][1], found) == slow(text + new), text + new


class Forgetful:
    """A mutant of a scan: forgets some of what it knows after each piece."""

    def __init__(self, scan: Any, **forgotten: Any) -> None:
        self.scan, self.forgotten = scan, forgotten

    def after(self, text: str) -> "Forgetful":
        return Forgetful(replace(self.scan.after(text), **self.forgotten), **self.forgotten)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scan, name)


def steps(characters: st.SearchStrategy[str], longest: int = 9, most: int = 14) -> st.SearchStrategy[list[Step]]:
    new = st.lists(characters, max_size=longest).map("".join)
    return st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 2, 5]), new), max_size=most)


# Boxes ----------------------------------------------------------------------------------------------------------------

BOX_PARTS = [
    "\\boxed{",
    "\\boxed",
    "\\",
    "\\\\",
    "{",
    "}",
    "\\{",
    "\\}",
    "box",
    "boxed",
    "ed",
    "b",
    " ",
    "\n",
    "x",
    "🙂",
]


def box_is_closed(text: str) -> bool:
    return boxed(text) is not None


@settings(max_examples=300)
@given(steps(st.sampled_from(BOX_PARTS)))
def test_a_box_is_closed_when_the_whole_text_has_a_closed_box(grown: list[Step]) -> None:
    check(grown, BoxScan(), box_is_closed, "closed")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "so \\boxed{4}.",
            "\\boxed{\\frac{1}{2}}",
            "\\boxed{a \\boxed{b",
            "\\boxed{a \\boxed{b}",
            "\\boxed{\\}",
            "\\boxed",
        ),
        *("\\boxed{a \\\\}", "x \\\\\\boxed{3}", "\\\\boxed{3}", "\\boxed \n {3}", "} \\boxed{3} {", "\\boxed{}", "{}"),
        *(
            "\\boxed 3}",
            "boxed{3}",
            "\\boxed{\\{1\\}",
            "\\boxed \\boxed{1}",
            "{\\boxed} {}",
            "\\boxed{\\\\boxed}",
            "\\\\}",
        ),
    ],
)
def test_a_box_may_be_divided_anywhere(text: str) -> None:
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            check([(0, text[:first]), (0, text[first:second]), (0, text[second:])], BoxScan(), box_is_closed, "closed")
    check([(0, character) for character in text], BoxScan(), box_is_closed, "closed")


@pytest.mark.parametrize("forgotten", [{"undecided": ""}, {"opened": None}, {"begun": False}])
def test_the_check_rejects_a_box_scan_that_forgets(forgotten: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        for text in ("\\boxed{1}", "\\boxed{{}}"):
            check([(0, c) for c in text], Forgetful(BoxScan(), **forgotten), box_is_closed, "closed")


def test_deeply_nested_boxes_take_linear_time_and_no_recursion() -> None:
    scan = BoxScan()
    for _ in range(300):
        scan = scan.after("\\boxed{ {" * 100)
    assert not scan.closed and scan.after("}}").closed


# Stop strings ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    steps(st.sampled_from("aabc🙂\ufffd"), 5),
    st.lists(st.text("abc🙂\ufffd", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_a_stop_string_is_found_wherever_the_text_is_divided(grown: list[Step], strings: list[str]) -> None:
    check(grown, StringScan(tuple(strings)), lambda text: any(string in text for string in strings))


def test_the_check_rejects_a_string_scan_without_overlap() -> None:
    for scan, refused in ((StringScan(("abc",)), False), (Forgetful(StringScan(("abc",)), overlap=""), True)):
        try:
            check([(0, "xa"), (0, "b"), (0, "cy")], scan, lambda text: "abc" in text)
        except AssertionError:
            assert refused
        else:
            assert not refused


# Repetition -----------------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(
    steps(st.sampled_from(["a", "a", "b", "ab", "abab", "c", "🙂", "因", "\udc80"]), 12),
    st.integers(1, 9),
    st.integers(1, 6),
)
def test_repetition_is_found_as_if_all_substrings_were_counted(grown: list[Step], chars: int, count: int) -> None:
    check(grown, RepetitionScan(chars, count), lambda text: repeats(text, chars, count))


def phrases(rng: Random, times: int, chars: int) -> list[Step]:
    """Random prose in which a phrase of `chars` characters occurs `times` times; divided at random places."""
    letters = "abcdefghij 因🙂"
    phrase = "".join(rng.choices(letters, k=chars))
    text = ""
    for _ in range(times):
        text += "".join(rng.choices(letters, k=rng.randrange(1, 200))) + "#" + phrase + "%"
    places = sorted(rng.sample(range(len(text)), rng.randrange(1, 20)))
    return [(0, text[a:b]) for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("times", [7, 8])
@pytest.mark.parametrize("chars", [29, 30])
def test_a_phrase_that_comes_back_far_apart_is_found_at_its_eighth_time_only(times: int, chars: int) -> None:
    for seed in range(60):
        grown = phrases(Random(seed), times, chars)
        check(grown, RepetitionScan(32, 8), lambda text: repeats(text, 32, 8))
        scan = RepetitionScan(32, 8)
        for _, new in grown:
            scan = scan.after(new)
        assert scan.found == (times == 8 and chars == 30), "two characters around it are always the same"


@pytest.mark.parametrize("forgotten", [{"overlap": "", "counted": None}, {"runs": ()}, {"text": None}])
def test_the_check_rejects_a_repetition_scan_that_forgets(forgotten: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(60):
            mutant = Forgetful(RepetitionScan(32, 8), **forgotten)
            check(phrases(Random(seed), 8, 30), mutant, lambda text: repeats(text, 32, 8))


@given(st.text("ab", max_size=60), st.integers(1, 20))
def test_every_stretch_has_an_anchor_and_equal_stretches_have_it_at_the_same_place(text: str, width: int) -> None:
    values = hashes(np.array([ord(c) for c in text], np.uint32), 1) if text else np.zeros(0, np.uint32)
    if len(values) < width:
        return
    anchors = lowest_around(values, width)
    for i in range(len(values) - width + 1):
        lowest = values[i : i + width] == values[i : i + width].min()
        assert anchors[i : i + width][lowest].all()


def test_ordinary_text_has_one_anchor_for_about_nine_characters_each_kept_once() -> None:
    rng = Random(0)
    scan, length = RepetitionScan(32, 8), 0
    for _ in range(400):
        new = "".join(rng.choices("abcdefghijklmnop ", k=rng.randrange(1, 60)))
        scan, length = scan.after(new), length + len(new)
    assert not scan.found and 0.09 < sum(map(len, scan.runs)) / length < 0.14
    assert len(scan.runs) < 7 and all(len(a) >= 4 * len(b) for a, b in zip(scan.runs, scan.runs[1:], strict=False))


# All of it ------------------------------------------------------------------------------------------------------------


def script(kind: str) -> Callable[[Sequence[int], int, int], list[int]]:
    """Token by token a function of the seed: fragments, random tokens, an EOS here and there, and loops."""
    made = tokenizer(kind)
    boxes = ["\\boxed{1}", "\\boxed{{", "}}", "\\\\boxed {🙂}"]

    def reply(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        rng, tokens = generator(seed), list[int]()
        while len(tokens) < max_tokens:
            draw = rng.random()
            if draw < 0.15:
                tokens += rng.choices(range(len(made)), k=2)
            elif draw < 0.25:
                tokens += made.encode(rng.choice(boxes), add_special_tokens=False)
            elif draw < 0.45:
                tokens += made.encode(rng.choice(["ab", "the sum", "🙂", "因此"]), add_special_tokens=False) * 3
            elif draw < 0.47:
                tokens.append(made.eos_token_id)
            else:
                tokens += made.encode("".join(rng.choices(PARTS, k=2)), add_special_tokens=False)
        return tokens[:max_tokens]

    return reply


rules = st.builds(
    EarlyStop,
    answer=st.sampled_from(["alone", "with_eos", "ignored"]),
    stop_strings=st.sampled_from([(), ("END",), ("因此我", " .n't", "🙂🙂")]),
    repetition_chars=st.sampled_from([4, 7, 32]),
    repetition_count=st.sampled_from([0, 3, 8]),
)
shapes = st.fixed_dictionaries(
    {
        "width": st.integers(2, 10),
        "segment_tokens": st.sampled_from([1, 2, 5, 12, 40]),
        "max_depth": st.integers(2, 7),
        "trim": st.booleans(),
        "stopping": rules,
        "branching": st.builds(
            LevelBudget, divergence=st.integers(1, 3), first_divergence=st.just(2), transfer=st.booleans()
        ),
        "fallback": st.sampled_from(
            [
                SegmentBoundary(candidates="any"),
                GridBoundary(window=3, candidates="any"),
                LowestLogProb(),
                WeightedBlock(window=2),
            ]
        ),
    }
)


def both_ways(kind: str, shape: dict[str, Any], seed: int) -> list[Tree]:
    """The trees of a sampler, which are those of the slow one."""
    given = ScriptedEngine(script(kind)), SamplerSettings(**shape), decoder(kind), {tokenizer(kind).eos_token_id}
    fast, slow = (sampler(*given).sample([("a", [5, 6]), ("b", [7])], seed) for sampler in (Sampler, SlowSampler))
    assert fast == slow
    return fast


@pytest.mark.parametrize("kind", KINDS)
def test_trees_are_those_that_are_grown_by_decoding_and_searching_everything(kind: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(shapes, st.integers(0, 999))
    def holds(shape: dict[str, Any], seed: int) -> None:
        both_ways(kind, shape, seed)

    holds()


def test_among_these_trees_are_all_reasons_to_stop_and_divided_segments() -> None:
    stops, divided = set[Stop | None](), 0
    for seed in range(30):
        rule = EarlyStop(stop_strings=("END",), repetition_chars=4, repetition_count=3 + 5 * (seed % 2))
        fallback = GridBoundary(window=3, candidates="any")
        branching = LevelBudget(divergence=1, first_divergence=2, transfer=False)
        shape = {"width": 8, "segment_tokens": 9, "max_depth": 4, "stopping": rule, "fallback": fallback}
        shape["branching"] = branching
        for tree in both_ways("byte_level", shape, seed):
            stops |= {tree.nodes[leaf].stop for leaf in tree.leaves()}
            divided += len(tree) - len({node.seed for node in tree.nodes})
    assert stops >= set(Stop) - {Stop.ERROR, Stop.DEPTH} and divided > 20


@given(rules, st.lists(st.sampled_from([*PARTS, *BOX_PARTS]), max_size=30).map("".join), st.booleans(), st.booleans())
def test_a_rule_may_also_be_asked_about_a_plain_string(rule: EarlyStop, text: str, eos: bool, depth: bool) -> None:
    bounds = {"eos": eos, "length": False, "depth": depth}
    assert rule(lambda: text, **bounds) == judged(rule, text, **bounds)


def test_the_end_of_sequence_token_of_these_tokenizers_is_special() -> None:
    assert {tokenizer(kind).eos_token_id for kind in KINDS} == {EOS}
