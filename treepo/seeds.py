"""Random numbers keyed by place: the same place always gets the same numbers, whatever was drawn before."""

from __future__ import annotations

from hashlib import blake2b
from random import Random

Place = int | str


def derive(*place: Place) -> int:
    """A 63-bit seed, a pure function of `place`. Example: `derive(run_seed, problem_id, "branching", level)`."""
    digest = blake2b("\x1f".join(map(repr, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*place: Place) -> Random:
    """A new random generator with the seed of `place`."""
    return Random(derive(*place))
