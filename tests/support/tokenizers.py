"""Small real tokenizers with every way of decoding that we know, made from nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PARTS = (
    *("the sum", " of ", "n't", " .", " ,", " '", " do", "  ", "\n\n", "é", "因此", "我们", "🙂", "👩‍🚀", "\ufffd"),
    *("\\boxed{", "\\boxed", " {", "}", "{", "\\", "\\{", "\\}", "box", "ed", "END", "E", "ND", "aaaa", "ab", "'s"),
)
TEXT = ["".join(PARTS), *(a + b for a in PARTS for b in PARTS[::3])]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<eos>", "<pad>"]


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of `KINDS`: a few hundred tokens, so that rare characters are divided among several."""
    tidy = {"clean_up_tokenization_spaces": True} if kind == "tidied" else {}
    special = {"unk_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), **special, **tidy)


def decoder(kind: str) -> Callable[[Sequence[int]], str]:
    """As the sampler's `decode`."""
    made = tokenizer(kind)
    return lambda tokens: str(made.decode(list(tokens), skip_special_tokens=True))


def _byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def _byte_fallback() -> Tokenizer:
    """As Llama 2: spaces are written as a bar, unknown characters as their bytes."""
    made = Tokenizer(models.BPE(unk_token=SPECIAL[0], byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = [text for text in TEXT if text.isascii()]
    made.train_from_iterator(
        plain, trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    )
    rewritten = Tokenizer.from_str(made.to_str().replace('"special":true', '"special":false'))
    rewritten.add_special_tokens(SPECIAL)
    rewritten.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return rewritten


def _metaspace() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token=SPECIAL[0], show_progress=False),
    )
    return made


def _words() -> Tokenizer:
    vocabulary = [*SPECIAL, *PARTS, *"abcdefxyz 0123456789"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(vocabulary))}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return made


def _word_pieces() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token=SPECIAL[0]))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return made


def _tidied() -> Tokenizer:
    """Tidied up by transformers, which removes spaces before full stops and the like."""
    made = _words()
    made.add_tokens([" ?", " 've", "n't", " '", " "])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "byte_fallback": _byte_fallback,
    "metaspace": _metaspace,
    "words": _words,
    "word_pieces": _word_pieces,
    "tidied": _tidied,
}
