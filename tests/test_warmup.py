import pytest
import torch

from treepo.errors import ConfigError
from treepo.models.causal_lm import Shape, create
from treepo.tasks.program import ProgramTask
from treepo.warmup import IGNORED, WarmupSettings, _loss, _pace, _padded, warm_up

TASK = ProgramTask(operations=2, train_problems=1000, test_problems=100, careful_lessons=0)
TOKENIZER = TASK.tokenizer()
SMALL = Shape(hidden=16, layers=1, heads=2, kv_heads=2, ffn=32, context=64)
SHORT = WarmupSettings(steps=20, batch=16, lr=1e-2)


def warmed(seed=1, settings=SHORT, losses=None):
    model = create(SMALL, TOKENIZER, 0)
    warm_up(
        model, TOKENIZER, TASK, TASK, settings, seed, None if losses is None else lambda _, loss: losses.append(loss)
    )
    return model.state_dict()


def test_twenty_steps_lower_the_loss():
    losses = []
    warmed(losses=losses)
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    first, again, other = warmed(), warmed(), warmed(seed=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_no_steps_leave_the_model_as_it_is():
    made, kept = create(SMALL, TOKENIZER, 0).state_dict(), warmed(settings=WarmupSettings(steps=0))
    assert all(torch.equal(made[name], kept[name]) for name in made)


def test_only_the_response_and_its_eos_are_learned():
    ids, targets = _padded([([5, 6, 7, 8, 1], 3), ([5, 6, 1], 1)], 1)
    assert ids.tolist() == [[5, 6, 7, 8, 1], [5, 6, 1, 1, 1]]
    none = IGNORED
    assert targets.tolist() == [[none, none, 8, 1, none], [6, 1, none, none, none]]


def test_padding_changes_no_loss():
    model = create(SMALL, TOKENIZER, 0)
    rows = [([5, 6, 7, 8, 1], 3), ([5, 6, 1], 1)]
    together = _loss(model, *_padded(rows, 1))
    apart = [_loss(model, *_padded([row], 1)) for row in rows]
    torch.testing.assert_close(together, sum(apart) / 2)  # two targets each


def test_the_learning_rate_rises_and_falls():
    pace = [_pace(step, WarmupSettings(steps=10, rise=0.4)) for step in range(10)]
    assert pace[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert pace[5:] == sorted(pace[5:], reverse=True) and 0 < pace[-1] < 0.1
    assert _pace(0, WarmupSettings(steps=1)) == 1.0


def test_a_lesson_too_long_for_the_model_is_refused():
    model = create(SMALL.model_copy(update={"context": 20}), TOKENIZER, 0)
    with pytest.raises(ConfigError, match="a lesson of 39 tokens exceeds the model's 20"):
        warm_up(model, TOKENIZER, TASK, TASK, SHORT, 0)
