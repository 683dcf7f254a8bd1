"""Writes docs/configuration.md from the settings classes: `python -m docs.configuration` (or `make docs`).

A test compares the file with what this module makes of the settings, so the page cannot go stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from treepo.run.config import Config
from treepo.studies import STUDIES, find

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """# Configuration

Written by `make docs` from the settings classes; do not edit. A configuration is a YAML file; on the command line
every key can be changed as `section.key=value`. Unknown keys are errors. `treepo train CONFIG --dry-run` prints all
settings of a run with their values.
"""
STUDY = """
# Studies

Settings of `treepo study NAME CONFIG`, changed as `study.key=value`; [studies.md](studies.md) says what they are about.
"""


def page() -> str:
    """The whole page."""
    found = "".join(section for name in STUDIES for section in _section(f"study ({name})", type(find(name))))
    return INTRODUCTION + "".join(_section("", Config)) + STUDY + found


def _section(name: str, model: type[BaseModel]) -> Iterator[str]:
    title = f"`{name}`" if name else "Top level"
    kind = model.model_fields["kind"].get_default() if "kind" in model.model_fields else None
    if kind is PydanticUndefined:
        kind = "my_module:MyClass"
    yield f"\n## {title}{f', kind: {kind}' if kind else ''}\n\n{_first_line(model)}\n\n"
    below: list[tuple[str, type[BaseModel]]] = []
    rows = []
    for field_name, field in model.model_fields.items():
        key = field.alias or field_name
        nested = list(_models(field.annotation))
        below += [(f"{name}.{key}" if name else key, inner) for inner in nested]
        if field_name != "kind":
            default = (
                "required" if field.is_required() else _default(field.get_default(call_default_factory=True), nested)
            )
            what = field.description or (
                _first_line(nested[0]) if len(nested) == 1 else f"see the kinds of `{key}` below"
            )
            rows.append(f"| `{key}` | {default} | {what.replace('|', chr(92) + '|')} |\n")
    if rows:
        yield "| key | default | meaning |\n|---|---|---|\n"
        yield from rows
    for path, inner in below:
        yield from _section(path, inner)


def _default(value: Any, nested: list[type[BaseModel]]) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return f"kind {value.kind}" if len(nested) > 1 and hasattr(value, "kind") else "see below"
    return f"`{json.dumps(value)}`"


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models(part)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
