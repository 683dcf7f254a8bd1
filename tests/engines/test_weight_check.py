"""The probe, and the guard that no decoder gets a tree before it has the right weights."""

from __future__ import annotations

from treepo.engines.weight_check import Probe


def test_a_probe_knows_an_update_that_was_ignored():
    def answer(logprobs, expected):
        return Probe([1, 2], logprobs, expected, [-9.0, -9.0])

    before = answer([-1.0, -2.0], [-1.0, -2.0])
    assert not answer([-1.0, -2.0], [-1.0, -2.0]).ignored_update(None)
    assert not answer([-1.0, -2.0], [-1.0, -2.0001]).ignored_update(before), "the model hardly moved"
    assert answer([-1.0, -2.0], [-1.0, -2.01]).ignored_update(before)
    assert not answer([-1.0, -2.02], [-1.0, -2.01]).ignored_update(before)
    assert answer([-1.0, -2.02], [-1.5, -2.0]).difference == 0.5
