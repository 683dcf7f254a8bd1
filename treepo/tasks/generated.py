"""For generated tasks: a tokenizer of characters, problems that are made on demand, and a keyed permutation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, overload

from treepo.seeds import derive
from treepo.tasks import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS, PAD = "<eos>", "<pad>"


def character_tokenizer(characters: str) -> PreTrainedTokenizerBase:
    """One token per character: ids 0 and 1 are PAD and EOS, then `characters` in order. Other text raises an error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True)
class Generated(Sequence[Problem]):
    """`size` problems. Problem `index`, 0 <= index < size, is made by `make(index)` when it is read."""

    size: int
    make: Callable[[int], Problem]

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        place = index + self.size if index < 0 else index
        if not 0 <= place < self.size:
            raise IndexError(f"problem {index} of {self.size}")
        return self.make(place)


def permuted(index: int, size: int, seed: int, name: str) -> int:
    """The image of `index` under a permutation of range(size) that is keyed by `seed` and `name`.

    A Feistel network permutes the numbers of 2 * half bits. It is applied again until the result is below `size`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for place in range(4):
            left, right = right, left ^ (_round(seed, name, place, right) & mask)
        index = left << half | right
        if index < size:
            return index


@lru_cache(1 << 16)
def _round(seed: int, name: str, place: int, right: int) -> int:
    return derive(seed, name, place, right)
