# The public names, once: type checkers read them here, and `__init__.py` loads each when it is first used.
from .advantages import (
    GRPO as GRPO,
)
from .advantages import (
    RLOO as RLOO,
)
from .advantages import (
    SPO as SPO,
)
from .advantages import (
    AttnRL as AttnRL,
)
from .advantages import (
    DrGRPO as DrGRPO,
)
from .advantages import (
    Estimator as Estimator,
)
from .advantages import (
    ReinforcePP as ReinforcePP,
)
from .advantages import (
    TreeGRPO as TreeGRPO,
)
from .advantages import (
    TreePO as TreePO,
)
from .advantages import (
    TreePOSegment as TreePOSegment,
)
from .advantages import (
    TreeRL as TreeRL,
)
from .engines import Engine as Engine
from .engines import Handle as Handle
from .engines import Sampling as Sampling
from .engines import Segment as Segment
from .engines.local.engine import LocalEngine as LocalEngine
from .engines.remote.engine import ServerEngine as ServerEngine
from .engines.scripted import ScriptedEngine as ScriptedEngine
from .engines.settings import LocalSettings as LocalSettings
from .engines.settings import ServerSettings as ServerSettings
from .errors import (
    ConfigError as ConfigError,
)
from .errors import (
    DivergenceError as DivergenceError,
)
from .errors import (
    EngineError as EngineError,
)
from .errors import (
    TaskError as TaskError,
)
from .errors import (
    TreePOError as TreePOError,
)
from .evaluate import EvaluateSettings as EvaluateSettings
from .evaluate import evaluate as evaluate
from .forest import Forest as Forest
from .learner.gradient import LossRow as LossRow
from .learner.gradient import accumulate as accumulate
from .learner.gradient import logprobs as logprobs
from .learner.loss import GSPO as GSPO
from .learner.loss import Loss as Loss
from .learner.loss import PolicyLoss as PolicyLoss
from .learner.loss import policy_loss as policy_loss
from .learner.packing import PackedBatch as PackedBatch
from .learner.packing import Totals as Totals
from .learner.packing import pack as pack
from .learner.settings import LearnerSettings as LearnerSettings
from .learner.update import Learner as Learner
from .policies import Frontier as Frontier
from .rollouts import Actor as Actor
from .run.build import training as training
from .run.config import Config as Config
from .run.config import load as load
from .run.settings import TrainerSettings as TrainerSettings
from .run.trainer import Observer as Observer
from .run.trainer import Trainer as Trainer
from .sampler import Sampler as Sampler
from .sampler import SamplerSettings as SamplerSettings
from .settings import Settings as Settings
from .tasks import Problem as Problem
from .tasks import Task as Task
from .tasks.listed import ListedTask as ListedTask
from .tree import (
    Node as Node,
)
from .tree import (
    ScoredTree as ScoredTree,
)
from .tree import (
    Stop as Stop,
)
from .tree import (
    Tree as Tree,
)
from .tree import (
    read_trees as read_trees,
)
from .tree import (
    write_trees as write_trees,
)

__version__: str
