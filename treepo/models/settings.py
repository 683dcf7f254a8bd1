"""What a configuration says about the policy's model. Loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from treepo.settings import Settings

PlanName = Literal["auto", "blocks", "chains", "flex", "varlen", "reference"]
"""How packed rows attend (`treepo.models.attention.plan_for`)."""


class Shape(Settings):
    """A new Qwen2-shaped model with random weights and the task's own tokenizer."""

    hidden: int = Field(64, gt=0, description="Width of the residual stream.")
    layers: int = Field(2, gt=0, description="Decoder layers.")
    heads: int = Field(4, gt=0, description="Attention heads for queries.")
    kv_heads: int = Field(4, gt=0, description="Attention heads for keys and values; divides `heads`.")
    ffn: int = Field(128, gt=0, description="Width of the feed-forward layers.")
    context: int = Field(256, gt=1, description="Most tokens of prompt and response together.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Shape:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden must be a multiple of heads, and heads a multiple of kv_heads")
        return self


class LoraSettings(Settings):
    """Train a LoRA adapter instead of all weights."""

    rank: int = Field(16, ge=1, description="Width of an adapter's bottleneck.")
    alpha: int = Field(32, ge=1, description="What an adapter adds is multiplied by alpha / rank.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an adapter, by the last part of their names, such as q_proj; all-linear: every "
        "linear layer except the output.",
    )


class ModelSettings(Settings):
    """The policy that is trained."""

    path: str | None = Field(None, description="Folder (or Hub name) of a causal LM and its tokenizer.")
    create: Shape | None = Field(None, description="The shape of a new model, in place of `path`.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of weights and activations."
    )
    device: str = Field("auto", description="A torch device; auto: CUDA if there is one, else the CPU.")
    lora: LoraSettings | None = Field(None, description="Train an adapter beside the frozen model; null: all weights.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if (self.path is None) == (self.create is None):
            raise ValueError("give either model.path (a folder) or model.create (the shape of a new model)")
        return self
