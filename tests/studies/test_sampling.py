"""What independent responses share, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.studies.sampling import common_prefix, distinct_beginnings, distinct_tokens

responses = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=7)


@given(responses)
def test_overlap_equals_its_definition(found: list[list[int]]) -> None:
    prefixes = {tuple(r[: n + 1]) for r in found for n in range(len(r))}
    assert distinct_tokens(found) == len(prefixes)
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    common = [sum(a[: n + 1] == b[: n + 1] for n in range(min(len(a), len(b)))) for a, b in pairs]
    assert common_prefix(found) == pytest.approx(np.mean(common))
    ends = distinct_beginnings(found, 4)
    assert ends[0] == 1 / len(found) and ends[-1] == len(set(map(tuple, found))) / len(found)
    assert ends == sorted(ends)
