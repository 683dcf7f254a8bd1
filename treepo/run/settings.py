"""What a configuration says about the training loop. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from treepo.learner.settings import LearnerSettings
from treepo.sampler import SamplerSettings
from treepo.settings import Settings

NOT_FLOAT32 = (
    "training needs float32 weights, because updates are lost in {}: set model.dtype=float32, or train an adapter "
    "(model.lora), which is always float32. sample and eval work with any dtype"
)


class DynamicSampling(Settings):
    """Replace trees whose leaves all have the same reward by trees of further prompts (DAPO, arXiv 2503.14476)."""

    oversample: float = Field(1.0, ge=1, description="Prompts to sample per missing prompt; the paper uses 3.")
    rounds: int = Field(2, ge=0, description="Most additional rounds of sampling per step, while prompts are missing.")


class TrainerSettings(LearnerSettings):
    """The training loop and the update."""

    steps: int = Field(200, ge=1, description="Training steps. Each samples trees and updates the model.")
    prompts_per_step: int = Field(8, ge=1, description="Prompts per step; each gives one tree of the batch.")
    dynamic_sampling: DynamicSampling | None = Field(
        DynamicSampling(), description="null: train on all trees, also on those whose rewards are all the same."
    )
    overlong_tokens: int = Field(
        0, ge=0, description="The reward falls linearly over the last n tokens of the response budget; 0: no penalty."
    )
    overlong_penalty: float = Field(1.0, ge=0, description="Reward that a response of the full budget loses.")
    ahead: bool = Field(
        False,
        description="Sample the next step's trees during this step's update. Faster, but the trees are one step old; "
        "set loss.rollout_cap to correct for that. Needs engine.kind=server or vllm, and a single process.",
    )
    max_error_rate: float = Field(
        0.2, ge=0, le=1, description="The run fails if a larger share of a step's leaves has no reward."
    )
    eval_every: int = Field(
        20, ge=0, description="Steps between held-out evaluations, with one before and one after training; 0: none."
    )
    save_every: int = Field(20, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Number of checkpoints to keep; older ones are deleted.")
    save_trees_every: int = Field(10, ge=0, description="Steps between trees written to the run's folder; 0: none.")
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [], description="Experiment trackers that get all metrics."
    )


def misfit(sampler: SamplerSettings, settings: TrainerSettings, processes: int = 1) -> str | None:
    """What does not fit together in the settings of a training by so many `processes`; None: all fits."""
    if settings.ahead and processes > 1:
        return "trainer.ahead needs a single process: set trainer.ahead=false, or start one process"
    if sampler.sampling.temperature == 0:
        return "sampler.sampling.temperature must be above 0: greedy leaves are all the same"
    if settings.mini_batches > settings.prompts_per_step:
        return "trainer.mini_batches must not exceed trainer.prompts_per_step"
    if settings.overlong_tokens > sampler.response_tokens:
        return "trainer.overlong_tokens must not exceed the response budget (segment_tokens * max_depth)"
    return None
