"""Whether a substring occurs again and again in a response, found while the response grows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint32]
Pieces = tuple["Pieces | None", str]
"""A text as its beginning and its last piece, so that texts that begin alike share it."""

SHORT, FEW = 1024, 96
"""A text of at most `SHORT` characters that grows by at most `FEW` is searched directly: faster than a dozen arrays."""

_FACTORS = (0x9E3779B1, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0x2C1B3C6D)  # odd, otherwise arbitrary


@dataclass(frozen=True, slots=True)
class RepetitionScan:
    """`found`: some substring of `chars` characters occurs at least `count` times, overlapping ones included. Exact.

    Call a substring of `chars` characters a window, and one of about half as many a gram. Every window has an anchor:
    its gram with the lowest hash. Equal windows have their anchors at the same place in them. So if a window occurs
    `count` times, the gram of its anchor is an anchor at `count` places. The scan counts the grams of all anchors,
    which are about one in nine of all grams. It looks at the windows themselves only around a gram that is frequent
    enough.

    Source: local minima of hashes as anchors are winnowing (Schleimer, Wilkerson and Aiken, 2003). Ours: where several
    grams of a window share the lowest hash, all of them are anchors.
    """

    chars: int
    count: int
    found: bool = False
    text: Pieces | None = None
    overlap: str = ""  # the last characters, one fewer than a window has; or the whole text, while it is short
    counted: NDArray[np.bool_] | None = None  # [grams in `overlap`] whether each is counted; None: `overlap` is all
    runs: tuple[Hashes, ...] = ()  # sorted hashes of the anchors, each run at least four times as long as the next

    def after(self, text: str) -> RepetitionScan:
        """What is known once `text` is read as well."""
        if self.found or not text:
            return self
        region, whole = self.overlap + text, (self.text, text)
        if self.counted is None and self.count > 1 and len(text) <= FEW and len(region) <= SHORT:
            # The windows that are new, and of those the ones that were there before.
            starts = range(max(0, len(self.overlap) - self.chars + 1), len(region) - self.chars + 1)
            again = {region[i : i + self.chars] for i in starts if region.find(region[i : i + self.chars]) < i}
            repeated = bool(again) and _occurs(region, again, self.chars, self.count)
            return replace(self, text=whole, overlap=region, found=repeated)
        overlap = region[len(region) - self.chars + 1 :] if len(region) >= self.chars else region
        if len(region) < self.chars:
            return replace(self, text=whole, overlap=overlap)
        size = 1 << ((self.chars + 1) // 2).bit_length() - 1  # of a gram: a power of two
        grams = hashes(np.frombuffer(region.encode("utf-32-le", "surrogatepass"), np.uint32), size)
        anchors = lowest_around(grams, self.chars - size + 1)
        new = anchors.copy()
        if (counted := self.counted) is not None:
            new[: len(counted)] &= ~counted
            anchors[: len(counted)] |= counted
        runs = _with_run(self.runs, grams[new])
        asked = grams[anchors]  # also old anchors: their windows may be new
        asked.sort()  # sorted keys are looked up faster
        times = sum(run.searchsorted(asked, "right") - run.searchsorted(asked) for run in runs)
        frequent = asked[times >= self.count]
        found = False
        if len(frequent):
            places = np.flatnonzero(anchors & np.isin(grams, frequent))
            found = _occurs(_joined(whole), {region[i : i + size] for i in places.tolist()}, self.chars, self.count)
        kept = max(0, len(overlap) - size + 1)
        return RepetitionScan(self.chars, self.count, found, whole, overlap, anchors[len(grams) - kept :].copy(), runs)


def hashes(codes: NDArray[np.uint32], size: int) -> Hashes:
    """[characters - size + 1] a hash of each substring of `size` characters, a power of two; equal for equal ones."""
    hashed, width = codes, 1
    while width < size:
        left = hashed[:-width] * np.uint32(_FACTORS[width.bit_length() % len(_FACTORS)])
        left += hashed[width:]
        hashed, width = left, 2 * width
    hashed = hashed ^ hashed >> np.uint32(15)
    hashed *= np.uint32(0x85EBCA6B)  # so that high bits, which decide what is lowest, depend on all others
    return hashed


def lowest_around(values: Hashes, width: int) -> NDArray[np.bool_]:
    """[values] whether each is the lowest of some `width` neighbouring values that it is one of."""
    lowest = _sliding(np.minimum, values, width)
    padding = np.zeros(width - 1, np.uint32)
    highest = _sliding(np.maximum, np.concatenate((padding, lowest, padding)), width)
    equal: NDArray[np.bool_] = highest == values
    return equal


def _sliding(best: Any, values: Hashes, width: int) -> Hashes:
    """[values - width + 1] the best of every `width` neighbours."""
    done = 1
    while 2 * done <= width:
        values = best(values[:-done], values[done:])
        done *= 2
    more = width - done
    result: Hashes = best(values[:-more], values[more:]) if more else values
    return result


def _with_run(runs: tuple[Hashes, ...], new: Hashes) -> tuple[Hashes, ...]:
    """`runs` and the unsorted `new`. Runs are merged when they have become too short."""
    if not len(new):
        return runs
    kept = list(runs)
    new.sort()
    while kept and len(kept[-1]) < 4 * len(new):
        new = np.concatenate((kept.pop(), new))
        new.sort(kind="stable")  # merges what is sorted
    return (*kept, new)


def _occurs(text: str, grams: set[str], chars: int, count: int) -> bool:
    """Whether a window of `chars` characters that contains one of `grams` occurs at least `count` times in `text`."""
    for gram in grams:
        starts = set[int]()
        place = text.find(gram)
        while place >= 0:
            starts.update(range(max(0, place + len(gram) - chars), min(place, len(text) - chars) + 1))
            place = text.find(gram, place + 1)
        if max(Counter(text[i : i + chars] for i in starts).values(), default=0) >= count:
            return True
    return False


def _joined(text: Pieces | None) -> str:
    parts = []
    while text is not None:
        text, part = text
        parts.append(part)
    return "".join(reversed(parts))
