"""TreePO: reinforcement learning on language models with trees of rollouts (arXiv 2508.17445).

The public names below are loaded when they are first used, so that importing treepo loads neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treepo.advantages import (
        GRPO,
        RLOO,
        SPO,
        AttnRL,
        DrGRPO,
        ReinforcePP,
        TreeGRPO,
        TreePO,
        TreePOSegment,
        TreeRL,
    )
    from treepo.engines import Engine, Handle, Sampling, Segment
    from treepo.engines.local.engine import LocalEngine
    from treepo.engines.remote.engine import ServerEngine
    from treepo.engines.scripted import ScriptedEngine
    from treepo.engines.settings import LocalSettings, ServerSettings
    from treepo.errors import ConfigError, EngineError, TaskError, TreePOError
    from treepo.forest import Forest
    from treepo.policies import Frontier
    from treepo.rollouts import Actor
    from treepo.run.config import Config, load
    from treepo.run.trainer import Observer, Trainer
    from treepo.sampler import Sampler, SamplerSettings
    from treepo.tasks import Problem, Task
    from treepo.tree import Node, ScoredTree, Stop, Tree, read_trees, write_trees

__version__ = "0.1.0"

_HOME = {
    "Actor": "rollouts",
    "AttnRL": "advantages",
    "Config": "run.config",
    "ConfigError": "errors",
    "DrGRPO": "advantages",
    "Engine": "engines",
    "EngineError": "errors",
    "Forest": "forest",
    "Frontier": "policies",
    "GRPO": "advantages",
    "Handle": "engines",
    "LocalEngine": "engines.local.engine",
    "LocalSettings": "engines.settings",
    "Node": "tree",
    "Observer": "run.trainer",
    "Problem": "tasks",
    "RLOO": "advantages",
    "ReinforcePP": "advantages",
    "ScoredTree": "tree",
    "SPO": "advantages",
    "Sampler": "sampler",
    "SamplerSettings": "sampler",
    "Sampling": "engines",
    "ScriptedEngine": "engines.scripted",
    "Segment": "engines",
    "ServerEngine": "engines.remote.engine",
    "ServerSettings": "engines.settings",
    "Stop": "tree",
    "Task": "tasks",
    "TaskError": "errors",
    "Trainer": "run.trainer",
    "Tree": "tree",
    "TreeGRPO": "advantages",
    "TreePO": "advantages",
    "TreePOError": "errors",
    "TreePOSegment": "advantages",
    "TreeRL": "advantages",
    "load": "run.config",
    "read_trees": "tree",
    "write_trees": "tree",
}

__all__ = [
    "GRPO",
    "RLOO",
    "SPO",
    "Actor",
    "AttnRL",
    "Config",
    "ConfigError",
    "DrGRPO",
    "Engine",
    "EngineError",
    "Forest",
    "Frontier",
    "Handle",
    "LocalEngine",
    "LocalSettings",
    "Node",
    "Observer",
    "Problem",
    "ReinforcePP",
    "Sampler",
    "SamplerSettings",
    "Sampling",
    "ScoredTree",
    "ScriptedEngine",
    "Segment",
    "ServerEngine",
    "ServerSettings",
    "Stop",
    "Task",
    "TaskError",
    "Trainer",
    "Tree",
    "TreeGRPO",
    "TreePO",
    "TreePOError",
    "TreePOSegment",
    "TreeRL",
    "__version__",
    "load",
    "read_trees",
    "write_trees",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'treepo' has no attribute {name!r}")
    return getattr(import_module(f"treepo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
