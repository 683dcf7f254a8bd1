"""A run of objects built in Python: own task, reward function, estimator, loss and engine, without a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.support.small_runs import save_model, small_config, steps_of
from treepo import (
    GRPO,
    GSPO,
    Actor,
    ConfigError,
    EvaluateSettings,
    Forest,
    ListedTask,
    LocalEngine,
    LocalSettings,
    PolicyLoss,
    Problem,
    Sampler,
    SamplerSettings,
    Settings,
    Totals,
    Trainer,
    TrainerSettings,
    TreePO,
)
from treepo.learner.loss import TrainedTokens
from treepo.models import causal_lm

SHAPE = SamplerSettings(width=4, segment_tokens=4, max_depth=3)
STEPS = TrainerSettings(
    steps=2, prompts_per_step=3, lr=1e-3, lr_warmup_steps=1, eval_every=0, save_every=1, dynamic_sampling=None
)


def share_of_letters(problem: Problem, response: str) -> float:
    return sum(map(str.isalpha, response)) / max(1, len(response))


TASK = ListedTask([Problem(f"p{i}", f"{i}+{i}=", str(2 * i)) for i in range(5)], share_of_letters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("policy")))


def acting(folder: str, **more: Any) -> Actor:
    return Actor.of(causal_lm.load(folder), causal_lm.load_tokenizer(folder), TASK, **more)


class CenteredRewards:
    """An estimator that is no class of ours: reward - mean of the batch."""

    def __call__(self, forest: Forest) -> np.ndarray:
        return np.where(forest.path >= 0, (forest.rewards - forest.rewards.mean())[:, None], 0.0)


class Reinforce:
    """A loss that is no class of ours: -(advantage) log p."""

    shared_tokens, needs_reference, over_responses = "sum", False, False

    def __call__(self, tokens: TrainedTokens, totals: Totals) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = -((tokens.adv_pos + tokens.adv_neg) * tokens.logprob).sum() / totals.weight
        return loss, {"mine/tokens": torch.tensor(float(len(tokens.logprob)))}


def test_own_objects_train_and_their_settings_are_kept(folder: str, tmp_path: Path) -> None:
    with acting(folder) as actor:
        before = [parameter.clone() for parameter in actor.model.parameters()]
        engine = actor.engine
        assert isinstance(engine, LocalEngine)
        with Trainer(
            actor,
            advantage=CenteredRewards(),
            loss=Reinforce(),
            sampler=SHAPE,
            settings=STEPS,
            folder=tmp_path / "run",
        ) as trainer:
            trainer.run()
        assert trainer.state.step == 2 and engine.stats.decoded_tokens > 0
        assert any((a != b).any() for a, b in zip(before, actor.model.parameters(), strict=True))
        # The actor goes on working after its run.
        assert len(actor.sample([("again", TASK.problems("train")[0])], actor.sampler(SHAPE), seed=3).trees) == 1
    step = steps_of(tmp_path / "run")[-1]
    assert step["mine/tokens"] > 0
    assert 0 < step["reward/mean"] < 1
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["sampler"]["width"] == 4 and kept["trainer"]["lr"] == 1e-3
    assert kept["advantage"] == {"kind": f"{__name__}:CenteredRewards"}
    assert kept["engine"] == {"kind": "treepo.engines.local.engine:LocalEngine"}


def weights(actor: Actor) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in actor.model.named_parameters()}


@pytest.mark.parametrize("loss", [PolicyLoss(kl=0.1), GSPO()])
def test_a_resumed_run_of_objects_ends_as_if_it_had_not_been_interrupted(
    loss: Any, folder: str, tmp_path: Path
) -> None:
    def run(name: str, steps: int, *, resume: bool = False) -> dict[str, torch.Tensor]:
        settings = STEPS.model_copy(update={"steps": steps})
        with (
            acting(folder) as actor,
            Trainer(
                actor,
                advantage=GRPO(),
                loss=loss,
                sampler=SHAPE,
                settings=settings,
                folder=tmp_path / name,
                resume=resume,
            ) as trainer,
        ):
            trainer.run()
            return weights(actor)

    whole = run("whole", 3)
    first = run("parts", 1)
    second = run("parts", 3, resume=True)
    assert all(torch.equal(whole[name], second[name]) for name in whole)
    assert any(not torch.equal(first[name], second[name]) for name in whole)
    assert [m["step"] for m in steps_of(tmp_path / "parts")] == [1, 2, 3]


def test_a_run_of_objects_is_resumed_with_its_own_settings_only(folder: str, tmp_path: Path) -> None:
    with acting(folder) as actor:
        with Trainer(actor, sampler=SHAPE, settings=STEPS, folder=tmp_path / "run") as trainer:
            trainer.run()
        with pytest.raises(ConfigError, match=r"holds a run already"):
            Trainer(actor, sampler=SHAPE, settings=STEPS, folder=tmp_path / "run")
        with pytest.raises(ConfigError, match=r"^advantage\.\w+: the run in .* has .*, not .*: resume it with"):
            Trainer(actor, advantage=GRPO(), sampler=SHAPE, settings=STEPS, folder=tmp_path / "run", resume=True)


class TwiceSampler:
    """A sampler that is no class of ours: it counts, and lets one of ours grow the trees."""

    def __init__(self, inner: Sampler) -> None:
        self.inner, self.settings, self.grown = inner, inner.settings, 0

    @property
    def response_tokens(self) -> int:
        return self.inner.response_tokens

    async def grow(self, prompt: Any, key: str, seed: int, progress: float = 0.0) -> Any:
        self.grown += 1
        return await self.inner.grow(prompt, key, seed, progress)


def test_the_sampler_and_the_engine_are_handed_in(folder: str, tmp_path: Path) -> None:
    model = causal_lm.load(folder)
    engine = LocalEngine(model, LocalSettings(slots=3))
    test = ListedTask(TASK.problems("train"), share_of_letters, test=TASK.problems("train")[:2])
    with Actor.of(model, causal_lm.load_tokenizer(folder), test, engine=engine) as actor:
        sampler = TwiceSampler(actor.sampler(SHAPE))
        settings = STEPS.model_copy(update={"eval_every": 2})
        with Trainer(
            actor,
            advantage=TreePO(),
            sampler=sampler,
            settings=settings,
            evaluation=EvaluateSettings(problems=2, samples=2),
            folder=tmp_path / "run",
        ) as trainer:
            trainer.run()
        assert sampler.grown == 2 * 3  # evaluation has a sampler of its own
        assert actor.engine is engine


def test_weights_in_half_precision_are_refused(folder: str, tmp_path: Path) -> None:
    model = causal_lm.load(folder, "bfloat16")
    with (
        Actor.of(model, causal_lm.load_tokenizer(folder), TASK) as actor,
        pytest.raises(ConfigError, match=r"needs float32 weights, because updates are lost in torch\.bfloat16"),
    ):
        Trainer(actor, sampler=SHAPE, settings=STEPS, folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("sampler", "settings", "why"),
    [
        ({"sampling": {"temperature": 0}}, {}, "temperature must be above 0"),
        ({}, {"mini_batches": 4}, "mini_batches must not exceed"),
        ({}, {"overlong_tokens": 100}, "overlong_tokens must not exceed the response budget"),
    ],
)
def test_objects_that_do_not_fit_together_are_refused(
    sampler: dict[str, Any], settings: dict[str, Any], why: str, folder: str, tmp_path: Path
) -> None:
    shape = SamplerSettings.model_validate(SHAPE.model_dump() | sampler)
    with acting(folder) as actor, pytest.raises(ConfigError, match=why):
        Trainer(actor, sampler=shape, settings=STEPS.model_copy(update=settings), folder=tmp_path / "run")


def test_a_configuration_is_answered_with_the_function_for_it(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"with treepo\.training\(config\) as trainer"):
        Trainer(small_config(tmp_path))  # type: ignore[arg-type]


def test_settings_are_exported_for_classes_of_the_user() -> None:
    class Mine(Settings):
        number: int = 3

    assert Mine().number == 3
