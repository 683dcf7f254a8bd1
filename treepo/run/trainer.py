"""The training loop, the only stateful part: problems -> trees -> rewards -> advantages -> packed updates.

    with Trainer(config) as trainer:
        trainer.run()

The same configuration gives the same run; a killed run that is resumed ends bit-identical to one that was not (on one
CPU with the same number of threads).
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from treepo.distributed import Processes
from treepo.errors import ConfigError, EngineError
from treepo.evaluate import Evaluation, evaluate
from treepo.learner.update import Updater
from treepo.models import causal_lm, lora
from treepo.run import checkpoint
from treepo.run.build import build_actor
from treepo.run.checkpoint import State
from treepo.run.config import Config
from treepo.run.folder import Metrics, RunFolder
from treepo.seeds import generator
from treepo.tasks import Problem
from treepo.tree import ScoredTree, Stop


class Observer:
    """Hears what a run does. This one does not look; the command line's shows progress."""

    def warming_up(self, step: int, steps: int, loss: float) -> None: ...

    def sampling(self, step: int, trees_done: int, trees: int) -> None: ...

    def evaluating(self, step: int, trees_done: int, trees: int) -> None: ...

    def planned(self, attention: str) -> None: ...

    def stepped(self, metrics: Metrics) -> None: ...

    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...

    def saved(self, path: Path) -> None: ...


class Collected(NamedTuple):
    """What a step has sampled."""

    sampled: list[ScoredTree]
    used: list[ScoredTree]  # to train on
    position: int  # in the stream of problems, after them


class Trainer:
    """A run in its folder (`RunFolder`); `resume` goes on after the newest checkpoint."""

    def __init__(self, config: Config, *, resume: bool = False, observer: Observer | None = None) -> None:
        self.config = config
        self.state = State()
        self.stopping = False
        self._exit = ExitStack()
        # What the user may have got wrong comes before what takes long.
        if config.model.dtype != "float32" and config.model.lora is None:
            raise ConfigError(
                f"model.dtype: training needs float32 weights, because updates are lost in {config.model.dtype}; "
                "sample and eval take any, and so does model.lora, whose adapters are float32"
            )
        self.problems = config.task.problems("train")
        tested = config.task.problems("test")[: config.evaluate.problems] if config.trainer.eval_every else ()
        self.accelerator = self._accelerator()
        self.processes = Processes(self.accelerator.process_index, self.accelerator.num_processes)
        if config.trainer.ahead and self.processes.count > 1:
            raise ConfigError("trainer.ahead is for one process: sampling and updates of several would cross")
        self.observer = observer if observer and self.processes.main else Observer()
        self.folder = RunFolder(config, resume=resume)
        found = self.folder.latest_checkpoint()
        self.processes.wait()  # until everyone has looked, and before anyone writes
        self.actor = build_actor(config, found, self.observer.warming_up, self.processes, self.folder.path)
        self._exit.enter_context(self.actor)
        try:
            if isinstance(self.problems, tuple):  # read from a file, where any may be too long; not generated on demand
                for problem in (*self.problems, *tested):
                    self.actor.encode(problem, config.sampler)
            model, settings = self.actor.model, config.trainer
            if settings.gradient_checkpointing:
                causal_lm.checkpoint_activations(model)
            self.processes.copy_from_main(model.parameters())
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
            self.optimizer = optimizer
            if found:
                self.state = checkpoint.load_state(found)
                checkpoint.load_optimizer(found, model, optimizer)
            self.actor.load_weights(self.state.step)
            if self.processes.main:
                self.folder.claim()
                self.folder.forget_after(self.state.step or None)  # at step 0 all is still to be reported
            self.updater = Updater(config, model, self._reference(resumed=bool(found)), optimizer, self.processes)
            self._ahead: Future[Collected] | None = None  # what the next step will train on, under way
            self._sampling = self._exit.enter_context(ThreadPoolExecutor(1)) if config.trainer.ahead else None
            self._exit.callback(self.actor.interrupt)  # first, so that the pool need not wait for long
        except BaseException:  # not handled, only tidied up after
            self._exit.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    # The loop --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to `trainer.steps`; after `stop()`, end with a checkpoint once the step under way is finished."""
        settings = self.config.trainer
        if self.state.step == 0:
            if self.folder.latest_checkpoint() is None:
                self._save()  # a new model's warm-up need not be repeated after a crash
            if settings.eval_every:
                self._evaluate()
        while self.state.step < settings.steps and not self.processes.any(self.stopping):
            metrics = self._step(self.state.step + 1)
            self._record(metrics)
            self.observer.stepped(metrics)
            if settings.eval_every and self.state.step in (
                settings.steps,
                *range(0, settings.steps, settings.eval_every),
            ):
                self._evaluate()
            if self.state.step % settings.save_every == 0:
                self._save()
        self._ahead = None  # of a run that was stopped: resumed, it samples anew
        if self.state.step % settings.save_every:
            self._save()
        self.accelerator.end_training()

    def stop(self) -> None:
        """Ask `run` to end after the current step."""
        self.stopping = True

    def _step(self, step: int) -> Metrics:
        start = time.perf_counter()
        spent = dict(self.actor.seconds)
        sampled, used, position = self._ahead.result() if self._ahead else self._collect(step, self.state.position)
        # While this step's update is computed, the engine goes on with the weights that it has.
        self._ahead = None
        if self._sampling and step < self.config.trainer.steps and not self.stopping:
            self._ahead = self._sampling.submit(self._collect, step + 1, position)
        metrics = self._describe(step, sampled, used)
        update_start = time.perf_counter()
        planned = self.updater.plan
        metrics |= self.updater(step, used)
        if self.updater.plan and not planned:
            self.observer.planned(self.updater.plan)
        if (
            self.processes.main
            and self.config.trainer.save_trees_every
            and step % self.config.trainer.save_trees_every == 0
        ):
            self.folder.write_trees(step, sampled)
        if self._ahead:
            wait([self._ahead])  # weights change between batches only
        self.actor.load_weights(step)
        end = time.perf_counter()
        metrics["seconds"] = {
            "step": end - start,
            **{part: self.actor.seconds[part] - spent[part] for part in ("sample", "score")},
            "update": end - update_start,
        }
        tokens = self.state.generated_tokens + metrics["tokens_generated"]
        self.state = State(step, position, tokens, self.state.seconds + end - start)
        return metrics

    # Sampling --------------------------------------------------------------------------------------------------------

    def _collect(self, step: int, position: int) -> Collected:
        """The rollouts of a step, whose problems begin at `position` of their stream."""
        settings, dynamic = self.config.trainer, self.config.trainer.dynamic_sampling
        wanted = settings.prompts_per_step
        sampled: list[ScoredTree] = []
        useful: list[ScoredTree] = []
        for _ in range(1 + (dynamic.rounds if dynamic else 0)):
            missing = wanted - len(useful)
            asked = math.ceil(missing * dynamic.oversample) if dynamic else missing
            keyed = [(f"train/{p}/{problem.id}", problem) for p, problem in self._problems_from(position, asked)]
            position += asked
            rollouts = self.actor.rollouts(
                keyed,
                self.config.sampler,
                self.config.seed,
                progress=(step - 1) / settings.steps,
                on_progress=partial(self.observer.sampling, step),
            )
            sampled += rollouts
            self._check_errors(step, sampled)
            useful += [r for r in rollouts if r.has_spread] if dynamic else rollouts
            if len(useful) >= wanted:
                break
        if len(useful) > wanted:  # at random, so that quick problems are not preferred
            useful = generator(self.config.seed, "keep", step).sample(useful, wanted)
        return Collected(sampled, useful, position)

    def _problems_from(self, position: int, count: int) -> Iterator[tuple[int, Problem]]:
        """`count` problems of the endless stream of shuffled epochs, with their positions."""
        n = len(self.problems)
        for p in range(position, position + count):
            yield p, self.problems[_epoch(self.config.seed, p // n, n)[p % n]]

    def _check_errors(self, step: int, rollouts: Sequence[ScoredTree]) -> None:
        rewards = [reward for r in rollouts for reward in r.rewards]
        unknown = rewards.count(None)
        if unknown > self.config.trainer.max_error_rate * len(rewards):
            reasons = Counter(why for r in rollouts for why in r.reasons.values())
            why, times = reasons.most_common(1)[0]
            raise EngineError(
                f"step {step}: {unknown} of {len(rewards)} leaves have no reward, above trainer.max_error_rate "
                f"({self.config.trainer.max_error_rate:g}); the most frequent reason ({times} times): {why}"
            )

    # Reporting and keeping -------------------------------------------------------------------------------------------

    def _describe(self, step: int, sampled: Sequence[ScoredTree], used: Sequence[ScoredTree]) -> Metrics:
        leaves = [(r.tree, leaf) for r in sampled for leaf in r.tree.leaves()]
        rewards = [reward for r in sampled for reward in r.rewards if reward is not None]
        unique = sum(r.tree.unique_tokens for r in sampled)
        flat = sum(r.tree.flat_tokens for r in sampled)
        logprobs = [lp for r in sampled for node in r.tree.nodes for lp in node.logprobs]
        versions = [node.version for r in sampled for node in r.tree.nodes[1:]]
        stops = Counter(str(tree.nodes[leaf].stop) for tree, leaf in leaves)
        return {
            "step": step,
            "reward": float(np.mean(rewards)) if rewards else None,
            "queries_sampled": len(sampled),
            "queries_used": len(used),
            "leaves": len(leaves),
            "unscored": sum(reward is None for r in sampled for reward in r.rewards),
            "tokens_generated": unique,
            "tokens_flat": flat,
            "sharing": flat / max(1, unique),
            "response_tokens": flat / len(leaves),
            "surprisal": -float(np.mean(logprobs)) if logprobs else None,  # an estimate of the entropy, in nats
            "staleness": float(np.mean([step - 1 - v for v in versions])) if versions else None,
            "mixed_versions": float(np.mean([len({n.version for n in r.tree.nodes[1:]}) > 1 for r in sampled])),
            "stops": {stop.value: stops[stop.value] for stop in Stop if stops[stop.value]},
        }

    def _evaluate(self) -> None:
        step, config = self.state.step, self.config
        report = partial(self.observer.evaluating, step)
        found = evaluate(self.actor, config.sampler, config.evaluate, config.seed, report)
        self._record({"step": step, "tokens_total": self.state.generated_tokens, "evaluation": found.to_json()})
        self.observer.evaluated(step, found)

    def _record(self, metrics: Metrics) -> None:
        if self.processes.main:
            self.folder.record(metrics)
        self.accelerator.log(_numbers(metrics), step=metrics["step"])

    def _save(self) -> None:
        if self.processes.main:
            path = checkpoint.save(
                self.folder.checkpoints,
                self.actor.model,
                self.actor.tokenizer,
                self.optimizer,
                self.state,
                self.config.trainer.keep_checkpoints,
            )
            self.observer.saved(path)

    def _reference(self, *, resumed: bool) -> Callable[[], AbstractContextManager[PreTrainedModel]] | None:
        """The initial policy, to be entered, if the loss asks for it; that of a new model is kept in the run's folder.

        Where a new adapter is trained, it is the model without it.
        """
        settings, kept = self.config.model, self.folder.path / "reference"
        if not self.config.loss.kl:
            return None
        continued = settings.path is not None and lora.base_of(settings.path) is not None
        if lora.adapted(self.actor.model) and not continued:
            return partial(lora.without, self.actor.model)
        if resumed or continued:
            model = causal_lm.load(settings.path or str(kept), settings.dtype, self.actor.model.device)
        else:
            model = copy.deepcopy(self.actor.model)
            if settings.path is None and self.processes.main:
                model.save_pretrained(kept)
        frozen = model.requires_grad_(False)
        return lambda: nullcontext(frozen)

    def _accelerator(self) -> Accelerator:
        trackers = list(self.config.trainer.trackers)
        for name in trackers:
            from importlib.util import find_spec

            if find_spec(name) is None:
                raise ConfigError(f"trainer.trackers: {name} is not installed: pip install {name}")
        cpu = causal_lm.device(self.config.model).type == "cpu"
        accelerator = Accelerator(cpu=cpu, log_with=trackers or None, project_dir=self.config.out)
        if trackers:
            accelerator.init_trackers("treepo", _numbers(self.config.model_dump(mode="json")))
        return accelerator


@lru_cache(2)
def _epoch(seed: int, epoch: int, problems: int) -> list[int]:
    """The order of the problems in an epoch; kept, because shuffling many takes longer than some steps."""
    return generator(seed, "epoch", epoch).sample(range(problems), problems)


def _numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float | int | str | bool]:
    """Nested values under dotted names, for trackers."""
    flat: dict[str, float | int | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float | int | str | bool):
            flat[prefix + name] = value
    return flat
