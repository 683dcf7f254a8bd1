"""Writes docs/configuration.md from the settings classes: `python -m docs.configuration` (or `make docs`).

A test compares the file with what this module makes of the settings, so the page cannot go stale.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from treepo.run.config import Config
from treepo.studies import STUDIES, find
from treepo.user_code import Custom

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration

Written by `make docs` from the settings classes; do not edit. A configuration is a YAML file. On the command line
every key can be changed as `section.key=value`. Unknown keys are errors, and the error names the nearest right key.
Names of TRL, verl and vLLM are answered with ours. `treepo train CONFIG --dry-run` prints all settings of a run.

**Kinds.** Some sections have several kinds, such as `advantage.kind=grpo`. First comes a table of the kinds, then the
keys that several kinds have, then the keys of each kind alone.

**A class of yours.** `task`, `engine`, `advantage`, `loss`, `sampler.branching`, `sampler.stopping` and
`sampler.fallback` also take `kind: "my_module:MyClass"`. The other keys of the section are then the arguments of your
class. [extending.md](extending.md) has an example of each.
"""
STUDY = """
## Studies

Settings of `treepo study NAME CONFIG`, changed as `study.key=value`. [studies.md](studies.md) says what they are about.
"""
HEAD = "| key | default | meaning |\n|---|---|---|\n"

Fields = Mapping[str, FieldInfo]


class Row(NamedTuple):
    """A line of a table of settings."""

    key: str
    default: str
    meaning: str

    def __str__(self) -> str:
        return f"| `{self.key}` | {self.default} | {self.meaning.replace('|', chr(92) + '|')} |\n"


def page() -> str:
    """The whole page."""
    studies = {name: type(find(name)) for name in STUDIES}
    return INTRODUCTION + "".join(_section("", Config)) + "".join(_kinds(STUDY, "study", studies, None))


def _section(name: str, model: type[BaseModel]) -> Iterator[str]:
    """A heading, a table of the settings of `model`, and the sections below it."""
    kind = f", kind `{_kind(model)}`" if "kind" in model.model_fields else ""
    yield f"\n## {f'`{name}`' if name else 'Top level'}{kind}\n\n{_first_line(model)}\n\n{HEAD}"
    yield from map(str, _rows(model))
    yield from _below(name, model)


def _below(name: str, model: type[BaseModel]) -> Iterator[str]:
    """The sections of the settings classes in the fields of `model`."""
    for key, field in _fields(model).items():
        place = f"{name}.{key}" if name else key
        kinds = _models(field.annotation)
        if len(kinds) == 1:
            yield from _section(place, kinds[0])
        elif kinds:
            default = field.get_default(call_default_factory=True)
            chosen = None if field.is_required() else default.kind
            title = f"\n## `{place}`\n\n{field.description or ''}\n"
            yield from _kinds(title, f"`{place}`, kind", {_kind(kind): kind for kind in kinds}, chosen)
            for kind in kinds:
                yield from _below(place, kind)


def _kinds(title: str, word: str, kinds: Mapping[str, type[BaseModel]], chosen: str | None) -> Iterator[str]:
    """A section: a table of its kinds, one of the keys that several kinds have, and one for each kind's own keys."""
    yield f"{title}\n| {word.rpartition(' ')[2]} | |\n|---|---|\n"
    for name, model in kinds.items():
        yield f"| `{name}`{' (default)' if name == chosen else ''} | {_first_line(model)} |\n"
    kinds_of: dict[Row, list[str]] = defaultdict(list)
    for name, model in kinds.items():
        for row in _rows(model):
            kinds_of[row].append(name)
    shared = {row: names for row, names in kinds_of.items() if len(names) > 1}
    if shared:
        yield "\nKeys that several of them have:\n\n| key | default | meaning | of |\n|---|---|---|---|\n"
        for row, names in shared.items():
            missing = [name for name in kinds if name not in names]
            some = ", ".join(f"`{name}`" for name in names)
            but = f"all but {', '.join(f'`{name}`' for name in missing)}"
            which = "all" if not missing else but if 2 * len(missing) < len(names) else some
            yield f"{str(row).rstrip()} {which} |\n"
    for name in kinds:
        own = [row for row, names in kinds_of.items() if names == [name]]
        if own:
            yield f"\n### {word[0].upper() + word[1:]} `{name}`\n\n{HEAD}"
            yield from map(str, own)


def _rows(model: type[BaseModel]) -> list[Row]:
    rows = []
    for key, field in _fields(model).items():
        kinds = _models(field.annotation)
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        meaning = field.description or (_first_line(kinds[0]) if len(kinds) == 1 else f"One of the kinds of `{key}`.")
        rows.append(Row(key, default, meaning))
    return rows


def _fields(model: type[BaseModel]) -> Fields:
    """The fields of `model` but for its kind, by the names that users write: first its own, then inherited ones."""
    inherited = {name for base in model.__bases__ if issubclass(base, BaseModel) for name in base.model_fields}
    names = sorted((name for name in model.model_fields if name != "kind"), key=lambda name: name in inherited)
    return {model.model_fields[name].alias or name: model.model_fields[name] for name in names}


def _kind(model: type[BaseModel]) -> str:
    kind = model.model_fields["kind"].get_default()
    if kind is PydanticUndefined:
        (kind,) = model.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
    return str(kind)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return f"kind `{value.kind}`" if hasattr(value, "kind") else "see below"
    return f"`{json.dumps(value)}`"


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes in an annotation such as `A | B | None`, without those that stand for classes of users."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if issubclass(annotation, Custom) else [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models(part)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
