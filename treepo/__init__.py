"""TreePO: reinforcement learning on language models with trees of rollouts (arXiv 2508.17445).

The public names are listed in `__init__.pyi`. Each is loaded when it is first used, so that importing treepo loads
neither torch nor numpy.
"""

from __future__ import annotations

import warnings
from typing import Any

import lazy_loader

__version__ = "0.2.0"

_load, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted([*_names, "__version__"])
_EARLIER = {"Rollout": "ScoredTree", "read_rollouts": "read_trees", "write_rollouts": "write_trees"}


def __getattr__(name: str) -> Any:
    if name in _EARLIER:
        warnings.warn(f"treepo.{name} is called treepo.{_EARLIER[name]} now", DeprecationWarning, stacklevel=2)
        return _load(_EARLIER[name])
    return _load(name)


def __dir__() -> list[str]:
    return list(__all__)
