"""A key of another tool is answered with ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.small_runs import small_config
from treepo.errors import ConfigError
from treepo.run.config import Config, _classes_at, _keys
from treepo.run.foreign_names import OURS, hint


def test_there_are_many_of_them() -> None:
    assert len(OURS) >= 40


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_is_named_is_a_setting_of_ours(name: str) -> None:
    named = re.findall(r"[a-z_]+(?:\.[a-z_]+)+|^out$", re.sub(r"\(.*?\)", "", OURS[name]))
    assert named, OURS[name]
    for key in named:
        *section, last = key.split(".")
        assert last in _keys(_classes_at(Config, section)), key


def test_no_name_is_a_top_level_key_of_ours() -> None:
    assert not set(OURS) & set(Config.model_fields)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampler.num_generations=8", "sampler.num_generations: unknown key; here it is called sampler.width"),
        ("num_generations=8", "num_generations: unknown key; here it is called sampler.width"),
        ("trainer.learning_rate=1", "trainer.learning_rate: unknown key; here it is called trainer.lr"),
        ("loss.beta=0.1", "loss.beta: unknown key; here it is called loss.kl"),
        ("sampler.temperature=1", "sampler.temperature: unknown key; here it is called sampler.sampling.temperature"),
        ("sampler.lr=1", "sampler.lr: unknown key; did you mean warmup.lr or trainer.lr?"),
        ("sampler.widht=4", "sampler.widht: unknown key; did you mean 'width'?"),
        ("sampler.nothing_like_it=4", "sampler.nothing_like_it: unknown key"),
    ],
)
def test_an_unknown_key_gets_the_best_hint(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config(tmp_path, override)
    assert str(caught.value).endswith(expected)


def test_a_setting_in_its_own_place_needs_no_hint() -> None:
    assert hint("weight_decay", "trainer.weight_decay") == "" and hint("no such name") == ""
