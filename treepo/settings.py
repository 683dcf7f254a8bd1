"""The parent of every settings class. Settings are frozen, and an unknown key is an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys. A policy is such a model with a `__call__`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
