"""Text that grows along the paths of a tree: equal to decoding everything, for every decoder and every split."""

from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizers import KINDS, PARTS, decoder, tokenizer
from treepo.policies.response_text import ResponseText

Growth = list[tuple[int, list[int], bool]]
"""For each new response: which earlier one it goes on from (counted back), its new tokens, whether it is read now."""


def check(growth: Growth, decode: Callable[[Sequence[int]], str], text: type[ResponseText] = ResponseText) -> None:
    """Grow responses from one another; each has the text of all its tokens, and the empty one has none."""
    grown = [(list[int](), text(decode))]
    for back, new, read in growth:
        tokens, parent = grown[-1 - back % len(grown)]
        grown.append(([*tokens, *new], parent.after(new)))
        if read:
            assert grown[-1][1]() == decode(grown[-1][0])
    for tokens, response in grown[1:]:
        assert response() == decode(tokens)
    assert grown[0][1]() == ""


def random_growth(rng: Random, kind: str) -> Growth:
    """Random tokens and encoded fragments, special tokens included, divided at random places."""
    made = tokenizer(kind)
    steps = []
    for _ in range(rng.randrange(1, 14)):
        tokens: list[int] = []
        for _ in range(rng.randrange(6)):
            if rng.random() < 0.3:
                tokens += rng.choices(range(len(made)), k=rng.randrange(4))
            else:
                fragment = "".join(rng.choices(PARTS, k=rng.randrange(1, 6)))
                tokens += made.encode(fragment, add_special_tokens=False)
        here = rng.randrange(len(tokens) + 1)
        steps += [(rng.choice((0, 0, 0, 1, 3, 7)), part, rng.random() < 0.7) for part in (tokens[:here], tokens[here:])]
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_grows_in_a_tree_is_the_text_of_all_its_tokens(kind: str) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.randoms(use_true_random=False))
    def holds(rng: Random) -> None:
        check(random_growth(rng, kind), decoder(kind))

    holds()


class NoWindow(ResponseText):
    """A mutant: decodes new tokens alone."""

    def _known_window(self) -> tuple[list[int], str]:
        return [], ""


class AnyWindow(ResponseText):
    """A mutant: takes any window, whatever its text."""

    def _known_window(self) -> tuple[list[int], str]:
        tokens = self._last(2)
        return tokens, self._decode(tokens).rstrip("\ufffd") if tokens else ""


class NoTail(ResponseText):
    """A mutant: takes half a character for a text that stays."""

    def _read_tokens(self) -> None:
        super()._read_tokens()
        self._settled, self._tail = (self._settled or "") + self._tail, ""


@pytest.mark.parametrize(
    ("mutant", "kinds"),
    [
        (NoWindow, list(KINDS)),
        (AnyWindow, ["byte_level", "byte_fallback", "tidied"]),
        (NoTail, list(KINDS)),
    ],
)
def test_the_check_rejects_texts_that_are_decoded_carelessly(mutant: type[ResponseText], kinds: list[str]) -> None:
    for kind in kinds:
        with pytest.raises(AssertionError):
            for seed in range(200):
                check(random_growth(Random(seed), kind), decoder(kind), mutant)


@pytest.mark.parametrize("decode", [str, lambda _: "", lambda tokens: "\ufffd" * len(tokens), lambda _: "always this"])
def test_decoders_that_a_window_cannot_follow_decode_everything(decode: Callable[[Sequence[int]], str]) -> None:
    for seed in range(40):
        check([step for step in random_growth(Random(seed), "words") if step[1]], decode)


def test_only_new_tokens_and_a_few_before_them_are_decoded_once_for_all_children() -> None:
    lengths: list[int] = []
    decode = decoder("byte_level")

    def counted(tokens: Sequence[int]) -> str:
        lengths.append(len(tokens))
        return decode(tokens)

    rng, text = Random(0), ResponseText(counted)
    for _ in range(20):
        parent, text = text, text.after([rng.randrange(70, 90) for _ in range(500)])  # letters
        text()
    assert sum(lengths) <= 20 * (500 + 2 * 8)
    lengths.clear()
    for _ in range(10):
        parent.after([70] * 3)()
    assert max(lengths) <= 8 + 3 and len(lengths) == 10


def test_a_text_is_not_decoded_before_it_is_asked_for() -> None:
    def never(tokens: Sequence[int]) -> str:
        raise AssertionError("decoded")

    ResponseText(never).after([1]).after([2])


class Seen:
    """A scan that keeps all it has read, and counts its characters in `read`."""

    read = 0

    def __init__(self, text: str = "") -> None:
        self.text = text

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and other.text == self.text

    def after(self, text: str) -> "Seen":
        Seen.read += len(text)
        return Seen(self.text + text)


def test_a_scan_reads_the_whole_text_and_what_is_shared_only_once() -> None:
    for seed in range(60):
        kind = ("byte_level", "byte_fallback", "tidied")[seed % 3]
        decode, grown = decoder(kind), [ResponseText(decoder(kind))]
        for back, new, read in random_growth(Random(seed), kind):
            grown.append(grown[-1 - back % len(grown)].after(new))
            if read:
                assert grown[-1].scan(Seen()).text == grown[-1]()
        assert all(response.scan(Seen()).text == response() for response in grown)
    Seen.read = 0
    trunk = ResponseText(decode).after([3] * 50)
    branches = [trunk.after([4] * 10) for _ in range(5)]
    assert all(branch.scan(Seen()).text == branch() for branch in branches)
    assert Seen.read == len(trunk()) + sum(len(branch()) - len(trunk()) for branch in branches)


def test_a_path_of_thousands_of_segments_is_no_deep_recursion() -> None:
    text = ResponseText(lambda tokens: "ab" * len(tokens))
    for _ in range(5000):
        text = text.after([1])
    assert text.scan(Seen()).text == text() == "ab" * 5000
