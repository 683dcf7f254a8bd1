"""The paper's experiments as commands: `treepo study NAME CONFIG`.

A study compares arms over several seeds. Some studies train (`training`, `headline`), some only sample (`sampling`),
and one measures gradients (`variance`). The class of a study describes it: `title`, `question` and docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from treepo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from treepo.studies.study import Study

# Name -> module, class and a line of help. A module is imported only on demand: `treepo study --help` loads no torch.
STUDIES = {
    "overlap": ("sampling", "OverlapStudy", "how much of independent responses is equal at the beginning"),
    "efficiency": ("sampling", "EfficiencyStudy", "trajectories per second of trees against i.i.d., by shape"),
    "segment": ("training", "SegmentStudy", "train with several segment lengths at the same response budget"),
    "branching": ("training", "BranchingStudy", "train with several rules for which paths fork, and at which levels"),
    "fallback": ("training", "FallbackStudy", "train with several fallbacks for trees whose paths all ended too early"),
    "advantage": ("training", "AdvantageStudy", "train with several advantage estimators on trees of the same shape"),
    "divergence": ("training", "DivergenceStudy", "train with several numbers of children of the root"),
    "compute": ("sampling", "ComputeStudy", "maj@k and pass@k against generated tokens, trees and i.i.d."),
    "variance": ("variance", "VarianceStudy", "noise of the gradient per token, by shape of the tree and estimator"),
    "headline": ("headline", "HeadlineStudy", "GRPO, GRPO on trees, TreePO at equal leaves, tokens, seconds"),
}


def find(name: str, overrides: Sequence[str] = (), *, quick: bool = False) -> Study:
    """The study called `name` with `key=value` settings. Raises `ConfigError` for an unknown name or setting."""
    from pydantic import ValidationError

    from treepo.run.config import explain, values_of

    if name not in STUDIES:
        raise ConfigError(f"no study is called {name!r}: {', '.join(STUDIES)}{nearest(name, STUDIES)}")
    module, kind, _ = STUDIES[name]
    settings: type[Study] = getattr(import_module(f"treepo.studies.{module}"), kind)
    values = values_of(overrides)
    try:
        found = settings.model_validate(values)
        if quick:  # the user's settings come last, so that they win over those of the quick version
            found = settings.model_validate(settings().quick().model_dump() | values)
    except ValidationError as error:
        raise ConfigError(f"study.{explain(error, values, settings)}") from error
    return found
