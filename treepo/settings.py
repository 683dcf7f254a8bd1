"""The parent of every settings class: frozen and strict, so that a typo is an error and a setting never drifts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen pydantic model that refuses unknown keys. A policy is such a model whose call is its behaviour."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
