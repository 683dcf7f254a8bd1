"""The configuration of a run: the settings of every module, read from YAML and `key=value` overrides.

Unknown keys and wrong values are errors.
"""

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
from treepo.run.settings import TrainerSettings, misfit
from treepo.sampler import SamplerSettings
from treepo.settings import Settings
from treepo.tasks.any import AnyTask
from treepo.tasks.scoring import ScoringSettings
from treepo.user_code import Custom, RefusedKeyError, arguments_of
from treepo.warmup import WarmupSettings

S = TypeVar("S", bound=Settings)


class Config(Settings):
    """All settings of a run."""

    out: str = Field("runs/run", description="Folder that the run writes its checkpoints, metrics and trees to.")
    seed: int = Field(0, ge=0, description="Seed of all random numbers of the run.")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads that torch uses; default: torch decides. Small models are fastest with 1.",
    )
    task: Annotated[AnyTask, Field(description="Where problems come from, and what a response is worth.")]
    model: ModelSettings
    warmup: WarmupSettings | None = Field(None, description="Supervised steps for a new model, before training.")
    engine: EngineSettings = Field(LocalSettings(), description="The engine that samples.")
    sampler: SamplerSettings = SamplerSettings()
    scoring: ScoringSettings = ScoringSettings()
    advantage: Annotated[AnyEstimator, Field(description="The estimator of advantages.")] = TreePO()
    loss: Annotated[AnyLoss, Field(description="The loss.")] = PolicyLoss()
    trainer: TrainerSettings = TrainerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if why := misfit(self.sampler, self.trainer):
            raise ValueError(why)
        if self.trainer.ahead and self.engine.kind == "local":
            raise ValueError("trainer.ahead needs an engine with separate weights: engine.kind=server or vllm")
        if self.trainer.ahead and isinstance(self.loss, PolicyLoss) and self.loss.rollout_cap is None:
            raise ValueError("trainer.ahead trains on trees that are one step old: set loss.rollout_cap, such as 2.0")
        if self.warmup is not None and self.model.create is None:
            raise ValueError(
                "warmup is for a model that is created: set model.create instead of model.path, or remove warmup"
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, after dotted `key=value` overrides. Their values are YAML.

    Raises `ConfigError`, whose one line has the key, the given value, what is allowed, and the most similar known key.
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
    """`config` after dotted `key=value` overrides. Raises `ConfigError` as `load` does.

    A value such as `advantage={kind: grpo}` replaces the whole section.
    """
    values = config.model_dump(mode="json", by_alias=True)
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{' '.join(overrides)}: {explain(error, values)}") from error


def valid(settings: type[S], **values: Any) -> S:
    """An instance of `settings` with `values`. Raises `ConfigError` as `load` does."""
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, values, settings)) from error


def values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted `key=value` overrides as a nested mapping: `a.b=1` becomes `{"a": {"b": 1}}`."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    return values


def dump(config: Config) -> str:
    """The whole configuration as YAML, defaults included. `load` reads it back."""
    text: str = yaml.safe_dump(
        config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=120
    )
    return text


def explain(error: ValidationError, values: Any, root: type[BaseModel] = Config) -> str:
    """The first problem of a validation error of `root`, in one line. It names the key as the user wrote it."""
    first = error.errors()[0]
    location = first["loc"]
    keys = _written(location, values, root, ends_in_key=first["type"] in ("extra_forbidden", "missing"))
    where = ".".join(keys)
    if first["type"] == "extra_forbidden":
        key = keys[-1]
        other = _other_kinds_with(key, root, location[:-1])
        close = nearest(key, _keys(_classes_at(root, location[:-1])))
        return f"{where}: unknown key{hint(key, where) or other or close or _elsewhere(key)}"
    if first["type"] == "missing":
        return f"{where}: is required"
    # `Custom` raises a ValueError from the error of the user's class, and that error may name a key of the section.
    cause = getattr(first.get("ctx", {}).get("error"), "__cause__", None)
    if isinstance(cause, RefusedKeyError):
        return f"{where}.{cause.key}: {cause.reason}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | BaseModel) else f", not {first['input']!r}"
    return f"{where}: {message}{given}" if where else message


def _written(location: Sequence[int | str], values: Any, root: type[BaseModel], *, ends_in_key: bool) -> list[str]:
    """The parts of an error's location that the user wrote.

    pydantic adds a part for every union: the tag of the kind ("program"), or the type ("int"). `ends_in_key`: the last
    part is a key, also if `values` lacks it.
    """
    keys: list[str] = []
    at = values
    for i, part in enumerate(location):
        if len(_classes_at(root, location[:i])) > 1:  # several kinds are possible here, so this part is the tag
            continue
        if isinstance(part, int) or (isinstance(at, dict) and part in at) or (ends_in_key and i == len(location) - 1):
            keys.append(str(part))
            at = at.get(part) if isinstance(at, dict) else None
    return keys


def _other_kinds_with(key: str, root: type[BaseModel], location: Sequence[int | str]) -> str:
    """Which other kinds of the section at `location`, which ends in a tag, have `key`; "" if none has it."""
    kinds = [c for c in _classes_at(root, location[:-1]) if "kind" in c.model_fields and key in _keys([c])]
    return f"; it belongs to kind {' and '.join(str(c.model_fields['kind'].default) for c in kinds)}" if kinds else ""


def _elsewhere(key: str) -> str:
    """A hint for a key in the wrong section: the sections that have it; "" if no section or too many have it."""
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
    before = at.get(last)
    try:
        at[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML") from error
    if last == "kind":
        for name in _of_other_kinds(parents, at[last], before):
            at.pop(name, None)


def _of_other_kinds(section: Sequence[str], kind: object, before: object) -> set[str]:
    """Keys that a section loses when an override changes its kind: other kinds know them and the new one does not.

    Example: `engine.kind=server` removes `slots`, a key of `local`. So does `engine.kind=my:Engine`, unless that class
    has an argument `slots`. If the kind `before` was such a class too, the keys may be its keys, and all stay.
    """
    classes = [c for c in _classes_at(Config, section) if "kind" in c.model_fields]
    if _names_a_class(kind):
        if _names_a_class(before):
            return set()
        return set(_keys([c for c in classes if not issubclass(c, Custom)])) - {"kind"} - arguments_of(str(kind))
    chosen = [c for c in classes if kind in get_args(c.model_fields["kind"].annotation)]
    return set(_keys(classes)) - set(_keys(chosen)) if chosen else set()


def _names_a_class(kind: object) -> bool:
    return isinstance(kind, str) and ":" in kind


def _classes_at(root: type[BaseModel], location: Sequence[int | str]) -> list[type[BaseModel]]:
    """Settings classes that may be at `location` in `root`; several if it is a section with kinds."""
    here: list[type[BaseModel]] = [root]
    for part in location:
        below = [
            found for c in here if part in c.model_fields for found in _classes(c.model_fields[str(part)].annotation)
        ]
        # A part that is no field is the tag of a kind, such as "program".
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
