"""One configuration for a whole run: the settings of every module, from YAML and `key=value` overrides, strictly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from treepo.advantages import AnyEstimator, TreePO
from treepo.engines.settings import EngineSettings, LocalSettings
from treepo.errors import ConfigError, nearest
from treepo.evaluate import EvaluateSettings
from treepo.learner.loss import AnyLoss, PolicyLoss
from treepo.models.settings import ModelSettings
from treepo.run.foreign_names import hint
from treepo.run.trainer import TrainerSettings
from treepo.sampler import SamplerSettings
from treepo.settings import Settings
from treepo.tasks.any import AnyTask
from treepo.tasks.scoring import ScoringSettings
from treepo.warmup import WarmupSettings

S = TypeVar("S", bound=Settings)


class Config(Settings):
    """A run."""

    out: str = Field("runs/run", description="Folder of the run.")
    seed: int = Field(0, ge=0, description="Everything random follows from it.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of torch; small models are fastest with 1. Default: torch's choice."
    )
    task: Annotated[AnyTask, Field(description="Where problems come from, and what a response is worth.")]
    model: ModelSettings
    warmup: WarmupSettings | None = Field(None, description="Supervised steps for a new model; needs a teaching task.")
    engine: EngineSettings = Field(LocalSettings(), description="What decodes: this process, or servers.")
    sampler: SamplerSettings = SamplerSettings()
    scoring: ScoringSettings = ScoringSettings()
    advantage: Annotated[AnyEstimator, Field(description="Estimator of advantages.")] = TreePO()
    loss: Annotated[AnyLoss, Field(description="The loss.")] = PolicyLoss()
    trainer: TrainerSettings = TrainerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.sampler.sampling.temperature == 0:
            raise ValueError("sampler.sampling.temperature must be above 0: greedy leaves are all the same")
        if self.trainer.mini_batches > self.trainer.prompts_per_step:
            raise ValueError("trainer.mini_batches must not exceed trainer.prompts_per_step")
        if self.trainer.overlong_tokens > self.sampler.response_tokens:
            raise ValueError("trainer.overlong_tokens must not exceed the response budget (segment_tokens * max_depth)")
        if self.trainer.ahead and self.engine.kind == "local":
            raise ValueError("trainer.ahead needs an engine with weights of its own: engine.kind=server or vllm")
        if self.trainer.ahead and isinstance(self.loss, PolicyLoss) and self.loss.rollout_cap is None:
            raise ValueError("trainer.ahead trains on stale trees: correct for it by loss.rollout_cap, such as 2.0")
        if self.warmup is not None and self.model.create is None:
            raise ValueError(
                "warmup is for a model that is created: set model.create instead of model.path, or drop it"
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with dotted `key=value` overrides (values are YAML) applied to it.

    Raises `ConfigError` in one line: where, what was given, what is allowed, and the nearest right key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level")
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, values)}") from error


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with dotted `key=value` overrides applied; raises `ConfigError` as `load` does.

    A value such as `advantage={kind: grpo}` replaces a whole section.
    """
    values = config.model_dump(mode="json", by_alias=True)
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{' '.join(overrides)}: {explain(error, values)}") from error


def valid(settings: type[S], **values: Any) -> S:
    """`settings` with these values; raises `ConfigError` as `load` does."""
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, values, settings)) from error


def values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """The nested mapping that dotted `key=value` overrides spell out."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    return values


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back."""
    text: str = yaml.safe_dump(
        config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=120
    )
    return text


def explain(error: ValidationError, values: Any, root: type[BaseModel] = Config) -> str:
    """The first problem of a validation error of `root`, in the user's words."""
    first = error.errors()[0]
    # Unions add a tag ("program") or a type ("int") to the location; the user did not write it.
    no_value = first["type"] in ("extra_forbidden", "missing")
    keys: list[str] = []
    at: Any = values
    for part in first["loc"]:
        if isinstance(part, int) or (isinstance(at, dict) and part in at) or (no_value and part == first["loc"][-1]):
            keys.append(str(part))
            at = at.get(part) if isinstance(at, dict) else None
    where = ".".join(keys)
    if first["type"] == "extra_forbidden":
        close = nearest(keys[-1], _allowed(root, first["loc"][:-1]))
        return f"{where}: unknown key{hint(keys[-1], where) or close or _elsewhere(keys[-1])}"
    if first["type"] == "missing":
        return f"{where}: is required"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | BaseModel) else f", not {first['input']!r}"
    return f"{where}: {message}{given}" if where else message


def _elsewhere(key: str) -> str:
    """Where a configuration has `key`, for one that is in the wrong section; "" if nowhere or in many places."""
    found = [
        f"{section}.{key}"
        for section in Config.model_fields
        for c in _classes_at(Config, [section])
        if key in _keys([c]) and key != "kind"
    ]
    places = list(dict.fromkeys(found))
    return f"; did you mean {' or '.join(places)}?" if 0 < len(places) < 4 else ""


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not of the form key=value, e.g. sampler.width=8")
    *parents, last = key.split(".")
    at: Any = values
    for parent in parents:
        if at.get(parent) is None:
            at[parent] = {}
        at = at[parent]
        if not isinstance(at, dict):
            raise ConfigError(f"{override!r}: {parent} has no keys below it")
    try:
        at[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML") from error
    if last == "kind":
        for name in _of_other_kinds(parents, at[last]):
            at.pop(name, None)


def _of_other_kinds(section: Sequence[str], kind: object) -> set[str]:
    """Keys of a section that its other kinds know and this one does not: whoever chooses it has no use for them."""
    classes = [c for c in _classes_at(Config, section) if "kind" in c.model_fields]
    chosen = [c for c in classes if kind in get_args(c.model_fields["kind"].annotation)]
    return set(_keys(classes)) - set(_keys(chosen)) if chosen else set()


def _allowed(root: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Keys that the settings class at `location` in `root` knows."""
    return _keys(_classes_at(root, location))


def _classes_at(root: type[BaseModel], location: Sequence[int | str]) -> list[type[BaseModel]]:
    """Settings classes that may be at `location` in `root`."""
    here: list[type[BaseModel]] = [root]
    for part in location:
        below = [
            found for c in here if part in c.model_fields for found in _classes(c.model_fields[str(part)].annotation)
        ]
        # What is no field is the tag of a discriminated union, such as "program".
        here = below or [
            c for c in here if "kind" in c.model_fields and part in get_args(c.model_fields["kind"].annotation)
        ]
    return here


def _keys(classes: Sequence[type[BaseModel]]) -> list[str]:
    return [field.alias or name for c in classes for name, field in c.model_fields.items()]


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """Settings classes inside an annotation such as `A | B | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _classes(part)]
