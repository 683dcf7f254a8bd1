"""When paths end: the rules and their order, stop strings, what is trimmed, and classes of the user's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scripted_trees import EOS, decode, encode, never_ends, sampler
from treepo.engines.scripted import ScriptedEngine
from treepo.errors import ConfigError
from treepo.policies.branching import LevelBudget
from treepo.policies.fallback import NoFallback
from treepo.policies.response_text import ResponseText
from treepo.policies.stopping import EarlyStop
from treepo.tree import Stop, Tree


def judge(text: str, policy: EarlyStop | None = None, *, eos=False, length=False, depth=False) -> Stop | None:
    return (policy or EarlyStop())(lambda: text, eos=eos, length=length, depth=depth)


def test_stops_are_checked_in_the_papers_order() -> None:
    assert judge("\\boxed{1}", eos=True, length=True, depth=True) is Stop.ANSWER
    assert judge("no box", eos=True, length=True, depth=True) is Stop.EOS
    assert judge("no box", length=True, depth=True) is Stop.LENGTH
    assert judge("a" * 99, depth=True) is Stop.DEPTH
    assert judge("a" * 99) is Stop.REPETITION
    assert judge("going on") is None


def test_a_box_ends_the_path_when_closed_nested_braces_included() -> None:
    assert judge("\\boxed{\\frac{1}{2}") is None
    assert judge("\\boxed{\\frac{1}{2}}") is Stop.ANSWER


def test_answer_with_eos_goes_on_after_a_box_without_eos() -> None:
    rule = EarlyStop(answer="with_eos")
    assert judge("\\boxed{1}", rule) is None
    assert judge("\\boxed{1}", rule, eos=True) is Stop.ANSWER
    assert judge("\\boxed{1", rule, eos=True) is Stop.EOS


def test_a_box_that_straddles_segments_is_seen() -> None:
    text = encode("ab\\boxed{c}") + [2] * 20

    def scripted(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return text[len(prefix) - 1 :][:max_tokens]

    (tree,) = sampler(ScriptedEngine(scripted), width=2, max_depth=8).sample([("q", [2])], 0)
    for leaf in tree.leaves():
        assert tree.nodes[leaf].stop is Stop.ANSWER and tree.response_length(leaf) == 12


def test_repetition_counts_substrings_of_the_whole_response_with_both_numbers_as_settings() -> None:
    unit = "0123456789abcdefghijklmnopqrstuv"
    assert judge(unit * 7 + "x") is None and judge(unit * 8) is Stop.REPETITION
    assert judge("abc" * 3, EarlyStop(repetition_chars=3, repetition_count=3)) is Stop.REPETITION
    assert judge("abc" * 3, EarlyStop(repetition_chars=3, repetition_count=4)) is None
    assert judge(unit * 50, EarlyStop(repetition_count=0)) is None


def test_known_false_positive_a_long_rule_of_dashes_counts_as_repetition() -> None:
    assert judge("| a | b |\n" + "-" * 38) is None
    assert judge("| a | b |\n" + "-" * 39) is Stop.REPETITION


def test_with_the_answer_rule_off_only_eos_ends_an_answer() -> None:
    rule = EarlyStop(answer="ignored")
    assert judge("\\boxed{1}", rule) is None
    assert judge("\\boxed{1}", rule, eos=True) is Stop.EOS
    assert judge("\\boxed{1}", rule, length=True) is Stop.LENGTH


# Stop strings ---------------------------------------------------------------------------------------------------------


def written(text: str, *ending: int, **given: object) -> Tree:
    """The tree of a single response, of which the script is `text` and then `ending`, and then letters."""
    tokens = [*encode(text), *ending, *[3] * 40]

    def script(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return tokens[len(prefix) - 1 :][:max_tokens]

    (tree,) = sampler(ScriptedEngine(script), **{"width": 1, "max_depth": 9} | given).sample([("q", [2])], 0)
    return tree


def response(tree: Tree) -> tuple[str, Stop | None]:
    (leaf,) = tree.leaves()
    return decode(tree.response(leaf)), tree.nodes[leaf].stop


def test_a_stop_string_ends_the_path_also_where_its_tokens_straddle_segments() -> None:
    tree = written("abcdefgh", stopping=EarlyStop(stop_strings=("xyz", "def")))
    assert response(tree) == ("abcdefgh", Stop.STOP_STRING)
    assert [decode(node.tokens) for node in tree.nodes[1:]] == ["abcd", "efgh"]
    assert response(written("abcdefgh", EOS))[1] is Stop.EOS


def test_a_stop_string_counts_before_eos_and_after_an_answer() -> None:
    rule = EarlyStop(stop_strings=("END",))
    assert judge("so END", rule, eos=True, length=True) is Stop.STOP_STRING
    assert judge("\\boxed{1} END", rule) is Stop.ANSWER
    assert judge("so EN", rule) is None


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 character"):
        EarlyStop(stop_strings=("",))


# Trimming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [3, 10, 11, 12, 20])
def test_a_trimmed_leaf_keeps_its_tokens_up_to_the_one_that_completes_the_answer(segment: int) -> None:
    shape = {"segment_tokens": segment}
    assert response(written("ab\\boxed{c}bbb", **shape, trim=True)) == ("ab\\boxed{c}", Stop.ANSWER)
    whole, stop = response(written("ab\\boxed{c}bbb", **shape))
    assert stop is Stop.ANSWER and len(whole) == -(-11 // segment) * segment


def test_a_trimmed_leaf_ends_with_whichever_comes_first_an_answer_or_a_stop_string() -> None:
    rule = EarlyStop(stop_strings=("fed",))
    shape = {"stopping": rule, "segment_tokens": 30, "trim": True}
    assert response(written("aafedaa\\boxed{a}", **shape)) == ("aafed", Stop.STOP_STRING)
    assert response(written("\\boxed{a}aafedaa", **shape)) == ("\\boxed{a}", Stop.ANSWER)
    assert response(written("aafedaa\\boxed{a}", **shape | {"trim": False}))[1] is Stop.ANSWER


def test_an_eos_that_was_cut_off_does_not_count_and_one_that_completes_the_rule_stays() -> None:
    shape = {"segment_tokens": 30, "trim": True}
    tree = written("\\boxed{a}b", EOS, **shape)
    assert response(tree) == ("\\boxed{a}", Stop.ANSWER) and EOS not in tree.response(1)
    tree = written("aafedbb", EOS, **shape, stopping=EarlyStop(stop_strings=("fed",)))
    assert response(tree) == ("aafed", Stop.STOP_STRING) and EOS not in tree.response(1)
    tree = written("\\boxed{a}b", EOS, **shape, stopping=EarlyStop(answer="with_eos"))
    assert response(tree) == ("\\boxed{a}b", Stop.ANSWER) and tree.response(1)[-1] == EOS
    tree = written("abc", EOS, **shape)
    assert response(tree) == ("abc", Stop.EOS) and tree.response(1)[-1] == EOS, "nothing to trim"


def test_what_is_trimmed_is_gone_from_tokens_log_probs_and_entropies_alike() -> None:
    shape = {"segment_tokens": 30, "branching": LevelBudget(allocation="entropy")}
    _, whole = written("ab\\boxed{c}bbb", **shape).nodes
    _, cut = written("ab\\boxed{c}bbb", **shape, trim=True).nodes
    assert len(cut.tokens) == 11 < len(whole.tokens)
    assert cut.tokens == whole.tokens[:11] and cut.logprobs == whole.logprobs[:11]
    assert cut.entropies == whole.entropies[:11]


@given(st.integers(1, 12), st.integers(0, 20))
def test_trimming_shortens_leaves_to_the_shortest_that_the_rule_accepts(segment: int, before: int) -> None:
    text = "a" * before + "\\boxed{b}"
    tree = written(
        text + "fed", segment_tokens=segment, max_depth=40, trim=True, stopping=EarlyStop(repetition_count=0)
    )
    assert response(tree) == (text, Stop.ANSWER)


def test_a_leaf_that_ends_otherwise_is_not_trimmed() -> None:
    assert response(written("abc", segment_tokens=5, max_depth=2, trim=True)) == ("abcbbbbbbb", Stop.LENGTH)


# A class of the user's own --------------------------------------------------------------------------------------------


class Countdown:
    """A response of `letters` letters is long enough; says what it was asked, too."""

    def __init__(self, letters: int, answer: object = Stop.ANSWER) -> None:
        self.letters, self.answer = letters, answer

    def __call__(self, text: Callable[[], str], *, eos: bool, length: bool, depth: bool) -> Stop | None:
        return self.answer if len(text()) >= self.letters else None  # type: ignore[return-value]


@dataclass(frozen=True)
class Letters:
    """How many letters a text has."""

    count: int = 0

    def after(self, text: str) -> "Letters":
        return Letters(self.count + len(text))


class Counting:
    """`Countdown` that reads only what is new."""

    def __init__(self, letters: int) -> None:
        self.letters = letters

    def __call__(self, text: ResponseText, *, eos: bool, length: bool, depth: bool) -> Stop | None:
        return Stop.ANSWER if text.scan(Letters()).count >= self.letters else None


def test_a_rule_of_ones_own_may_scan_what_is_new_instead_of_the_whole_text() -> None:
    for trim in (False, True):
        whole, scanned = (
            written("abcdefgh", stopping={"kind": f"tests.policies.test_stopping:{own}", "letters": 6}, trim=trim)
            for own in ("Countdown", "Counting")
        )
        assert whole == scanned and response(scanned)[1] is Stop.ANSWER


OWN = "tests.policies.test_stopping:Countdown"


def test_a_rule_of_ones_own_ends_paths_and_can_be_trimmed() -> None:
    assert response(written("abcdefgh", stopping={"kind": OWN, "letters": 6})) == ("abcdefgh", Stop.ANSWER)
    assert response(written("abcdefgh", stopping={"kind": OWN, "letters": 6}, trim=True)) == ("abcdef", Stop.ANSWER)


@pytest.mark.parametrize(("max_depth", "ends"), [(3, Stop.LENGTH), (2, Stop.LENGTH)])
def test_a_path_at_its_bounds_ends_whatever_ones_own_rule_says(max_depth: int, ends: Stop) -> None:
    tree = written("abcdefgh", stopping={"kind": OWN, "letters": 999}, max_depth=max_depth)
    assert response(tree)[1] is ends and tree.nodes[tree.leaves()[0]].depth == max_depth


def test_a_path_of_short_segments_ends_at_its_depth_whatever_ones_own_rule_says() -> None:
    def brief(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [3, EOS]

    shape = {"width": 2, "stopping": {"kind": OWN, "letters": 999}, "fallback": NoFallback()}
    (tree,) = sampler(ScriptedEngine(brief), **shape).sample([("q", [2])], 0)
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {Stop.DEPTH}
    assert {tree.nodes[leaf].depth for leaf in tree.leaves()} == {5}


@pytest.mark.parametrize("answer", ["eos", True, Stop.ERROR])
def test_a_wrong_stop_of_ones_own_rule_is_refused(answer: object) -> None:
    with pytest.raises(ConfigError, match=r"must return None or one of Stop\.ANSWER, .*Stop\.REPETITION \(from treepo"):
        sampler(ScriptedEngine(never_ends), stopping={"kind": OWN, "letters": 1, "answer": answer}).sample(
            [("q", [2])], 0
        )


# What every rule does with its paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_ids", [(EOS,), (17, EOS)])
def test_any_eos_id_ends_a_path_also_as_a_segments_first_token(stop_ids) -> None:
    def scripted(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [EOS] if len(prefix) >= 5 else [3] * max_tokens

    (tree,) = sampler(ScriptedEngine(scripted), stop_ids, width=4).sample([("q", [2])], 0)
    for leaf in tree.leaves():
        assert tree.nodes[leaf].stop is Stop.EOS and tree.nodes[leaf].tokens == [EOS]


def test_flawed_paths_are_kept_as_leaves() -> None:
    def loop(prefix: Sequence[int], max_tokens: int, seed: int) -> list[int]:
        return [3] * max_tokens

    (tree,) = sampler(ScriptedEngine(loop), segment_tokens=20, max_depth=9).sample([("q", [2])], 0)
    assert {tree.nodes[leaf].stop for leaf in tree.leaves()} == {Stop.REPETITION} and len(tree.leaves()) == 8
