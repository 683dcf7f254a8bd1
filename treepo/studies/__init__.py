"""The paper's experiments as commands: `treepo study NAME CONFIG`.

A study compares arms over several seeds: studies that train (`training`, `headline`), studies that only sample
(`sampling`), and one that measures gradients (`variance`). What one says of itself is its `title`, its `question` and
its docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from treepo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from treepo.studies.study import Study

# Name -> module and class: `treepo study --help` must not wait for torch.
STUDIES = {
    "overlap": ("sampling", "Overlap", "how much of independent responses coincides, so that a tree could share it"),
    "efficiency": ("sampling", "Efficiency", "trajectories per second by depth, divergence and width, against i.i.d."),
    "segment": ("training", "Segment", "training with several segment lengths at one response budget"),
    "branching": ("training", "Branching", "training with several ways to give out forks"),
    "fallback": ("training", "Fallback", "training with several places to go on from when a tree has run dry"),
    "advantage": ("training", "Advantage", "training with several advantages on the same trees"),
    "divergence": ("training", "Divergence", "training with several numbers of first forks"),
    "compute": ("sampling", "Compute", "maj@k and pass@k against generated tokens, trees and i.i.d."),
    "variance": ("variance", "Variance", "noise of the gradient per token, by shape of the tree and estimator"),
    "headline": ("headline", "Headline", "GRPO, GRPO on trees, TreePO: equal leaves, tokens, seconds; rates swept"),
}


def find(name: str, overrides: Sequence[str] = (), *, quick: bool = False) -> Study:
    """The study called `name` with `key=value` settings; raises `ConfigError` for what does not exist."""
    from pydantic import ValidationError

    from treepo.run.config import explain, values_of

    if name not in STUDIES:
        raise ConfigError(f"no study is called {name!r}: {', '.join(STUDIES)}{nearest(name, STUDIES)}")
    module, kind, _ = STUDIES[name]
    settings: type[Study] = getattr(import_module(f"treepo.studies.{module}"), kind)
    values = values_of(overrides)
    try:
        found = settings.model_validate(values)
        if quick:  # what is given wins
            found = settings.model_validate(settings().quick().model_dump() | values)
    except ValidationError as error:
        raise ConfigError(f"study.{explain(error, values, settings)}") from error
    return found
