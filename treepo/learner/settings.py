"""What a configuration says about the learner. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from treepo.models.settings import PlanName
from treepo.settings import Settings


class LearnerSettings(Settings):
    """The optimizer (AdamW) and the packed update."""

    mini_batches: int = Field(1, ge=1, description="Optimizer updates per batch; with 1, the ratio is exactly 1.")
    lr: float = Field(1e-6, gt=0, description="Learning rate of AdamW after the warm-up.")
    lr_warmup_steps: int = Field(10, ge=0, description="Steps in which the learning rate rises linearly.")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay of AdamW.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    max_tokens: int = Field(
        16384,
        ge=1,
        description="Most tokens whose activations an update keeps at once; larger trees are computed in pieces.",
    )
    attention: PlanName = Field(
        "auto", description="Attention plan of packed rows; auto: the fastest for device and shape."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of the update's passes; bfloat16: autocast, while the weights stay float32."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, a third more work."
    )
