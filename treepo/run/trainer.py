"""The training loop: problems -> trees -> rewards -> advantages -> packed updates.

    actor = Actor.of(model, tokenizer, task)
    with Trainer(actor, advantage=TreePO(), settings=TrainerSettings(steps=50), folder="runs/mine") as trainer:
        trainer.run()

`treepo.run.build.training` makes these objects from a configuration. The same objects and seed give the same run. On a
CPU with the same number of threads, a run that was killed and resumed gives the same weights, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from treepo.advantages import Advantage, TreePO
from treepo.errors import ConfigError, DivergenceError, EngineError
from treepo.evaluate import EvaluateSettings, Evaluation, evaluate
from treepo.learner.loss import Loss, PolicyLoss, needs_reference
from treepo.rollouts import Actor
from treepo.run import checkpoint
from treepo.run.checkpoint import State, initial_policy
from treepo.run.folder import RunFolder
from treepo.run.metrics import Metrics, describe
from treepo.run.settings import NOT_FLOAT32, TrainerSettings, misfit
from treepo.run.shaping import overlong
from treepo.run.tracking import Trackers, require_installed
from treepo.sampler import Sampler, SamplerSettings, TreeSampler
from treepo.seeds import generator
from treepo.settings import Settings
from treepo.tasks import Problem
from treepo.tree import ScoredTree


class Observer:
    """Its methods are called when something happens in a run. Here they do nothing; the command line shows progress."""

    def warming_up(self, step: int, steps: int, loss: float) -> None: ...

    def sampling(self, step: int, trees_done: int, trees: int) -> None: ...

    def evaluating(self, step: int, trees_done: int, trees: int) -> None: ...

    def planned(self, attention: str) -> None: ...

    def stepped(self, metrics: Metrics) -> None: ...

    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...

    def saved(self, path: Path) -> None: ...


class Collected(NamedTuple):
    """The trees that a step has sampled."""

    sampled: list[ScoredTree]
    used: list[ScoredTree]  # the trees to train on
    position: int  # in the stream of problems, after the sampled ones
    sample_s: float
    score_s: float


class Trainer:
    """A training run and its folder. A context manager; it does not close the actor, which can be used afterwards.

    `advantage` and `loss`: any objects with these protocols. `sampler`: settings, or an object that grows trees.
    `folder`: a path, or a `RunFolder` with the settings to write. `resume`: continue from the newest checkpoint in the
    folder and load its weights, unless `holds` is its path (the model has them already). `initial`: folder or Hub name
    of the initial policy, for a loss with a KL term; default: the run saves a copy of the model.
    """

    def __init__(
        self,
        actor: Actor,
        *,
        advantage: Advantage | None = None,
        loss: Loss | None = None,
        sampler: SamplerSettings | TreeSampler | None = None,
        settings: TrainerSettings | None = None,
        evaluation: EvaluateSettings | None = None,
        folder: RunFolder | str | Path = "runs/run",
        seed: int = 0,
        resume: bool = False,
        observer: Observer | None = None,
        holds: Path | None = None,
        initial: str | None = None,
    ) -> None:
        if not isinstance(actor, Actor):
            raise TypeError("Trainer takes an Actor; for a configuration: with treepo.training(config) as trainer: ...")
        self.actor, self.processes = actor, actor.processes
        self.settings = settings or TrainerSettings()
        self.evaluation = evaluation or EvaluateSettings()
        self.shape, self.sampler = _shape_and_sampler(actor, sampler)
        self.seed, self.state, self.stopping = seed, State(), False
        self._require_trainable()
        self.observer = observer if observer and self.processes.main else Observer()
        advantage, loss = advantage or TreePO(), loss or PolicyLoss()
        if not isinstance(folder, RunFolder):
            folder = RunFolder(folder, self._described(advantage, loss), resume=resume)
        self.folder = folder
        self._exit = ExitStack()
        try:
            self._begin(advantage, loss, holds, initial)
        except BaseException:  # clean up, then raise it again
            self._exit.close()
            raise

    def _require_trainable(self) -> None:
        """Raise `ConfigError` for what no training can work with."""
        if why := misfit(self.shape, self.settings, self.processes.count):
            raise ConfigError(why)
        require_installed(self.settings.trackers)
        for name, parameter in self.actor.model.named_parameters():
            if parameter.requires_grad and parameter.dtype.itemsize < 4:
                raise ConfigError(f"model: {name}: {NOT_FLOAT32.format(parameter.dtype)}")

    def _begin(self, advantage: Advantage, loss: Loss, holds: Path | None, initial: str | None) -> None:
        """Check the problems, make the learner, and go on after the newest checkpoint if there is one."""
        # Imported here, so that a configuration can use the settings above without torch.
        from treepo.learner.update import Learner
        from treepo.models import causal_lm

        model, main = self.actor.model, self.processes.main
        self.problems = self._checked_problems()
        found = self.folder.latest_checkpoint()
        self.processes.wait()  # no process may write before all have looked for a checkpoint
        if found and found != holds:
            causal_lm.load_weights(model, found)
        self.processes.copy_from_main(model.parameters())
        reference = None
        if needs_reference(loss):
            kept = self.folder.path / "reference"
            reference = initial_policy(model, kept, initial, resumed=bool(found), keeps=main)
        self.learner = Learner(
            model,
            advantage,
            loss,
            self.settings,
            temperature=self.shape.sampling.temperature,
            seed=self.seed,
            reference=reference,
            processes=self.processes,
        )
        if found:
            self.state = checkpoint.load_state(found)
            checkpoint.load_optimizer(found, model, self.learner.optimizer)
        self.actor.load_weights(self.state.step)
        if main:
            self.folder.claim()
            self.folder.forget_after(self.state.step or None)  # a run at step 0 has nothing to keep
        self._trackers = Trackers(self.settings.trackers, self.folder, cpu=model.device.type == "cpu")
        self._ahead: Future[Collected] | None = None  # the next step's trees, while they are sampled
        self._sampling = self._exit.enter_context(ThreadPoolExecutor(1)) if self.settings.ahead else None
        self._exit.callback(self.actor.loop.interrupt)  # first, because leaving the thread above waits for its work
        self._writer = self._exit.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        self._writing: Future[None] | None = None  # a step's trees, while they are written to the disk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    # The loop --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until `steps`. After `stop()`, finish the current step, save a checkpoint and return."""
        settings = self.settings
        if self.state.step == 0:
            if self.folder.latest_checkpoint() is None:
                self._save()  # so that a new model's warm-up is not repeated after a crash
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
        self._ahead = None  # if the run was stopped: the resumed run samples these trees again
        if self.state.step % settings.save_every:
            self._save()
        self._finish_writing()
        self._trackers.finish()

    def stop(self) -> None:
        """Make `run` return after the current step."""
        self.stopping = True

    def _step(self, step: int) -> Metrics:
        start = time.perf_counter()
        collected = self._ahead.result() if self._ahead else self._collect(step, self.state.position)
        # During this step's update, the engine samples with its present weights.
        self._ahead = None
        if self._sampling and step < self.settings.steps and not self.stopping:
            self._ahead = self._sampling.submit(self._collect, step + 1, collected.position)
        every = self.settings.save_trees_every
        if self.processes.main and every and step % every == 0:
            self._finish_writing()
            self._writing = self._writer.submit(self.folder.write_trees, step, collected.sampled)
        update_start = time.perf_counter()
        planned = self.learner.plan
        settings, budget = self.settings, self.sampler.response_tokens
        try:
            learned = self.learner(
                step,
                [
                    overlong(tree, settings.overlong_tokens, settings.overlong_penalty, budget)
                    for tree in collected.used
                ],
            )
        except DivergenceError as error:
            raise DivergenceError(
                f"step {step}: {error}: start another run with a lower trainer.lr from a checkpoint (--model "
                f"{self.folder.latest_checkpoint()})"
            ) from error
        if self.learner.plan and not planned:
            self.observer.planned(self.learner.plan)
        if self._ahead:
            wait([self._ahead])  # the weights must not change while a batch is sampled
        self.actor.load_weights(step)
        end = time.perf_counter()
        metrics = describe(step, collected.sampled, collected.used) | learned
        metrics |= {
            "seconds/step": end - start,
            "seconds/sample": collected.sample_s,
            "seconds/score": collected.score_s,
            "seconds/update": end - update_start,
        }
        tokens = self.state.generated_tokens + metrics["tokens/generated"]
        self.state = State(step, collected.position, tokens, self.state.seconds + end - start)
        return metrics

    # Sampling --------------------------------------------------------------------------------------------------------

    def _collect(self, step: int, position: int) -> Collected:
        """Sample the trees of a step. Its first problem is at `position` in the stream of problems."""
        settings, dynamic = self.settings, self.settings.dynamic_sampling
        wanted = settings.prompts_per_step
        sampled: list[ScoredTree] = []
        useful: list[ScoredTree] = []
        sample_s = score_s = 0.0
        for _ in range(1 + (dynamic.rounds if dynamic else 0)):
            missing = wanted - len(useful)
            asked = math.ceil(missing * dynamic.oversample) if dynamic else missing
            keyed = [(f"train/{p}/{problem.id}", problem) for p, problem in self._problems_from(position, asked)]
            position += asked
            found = self.actor.sample(
                keyed,
                self.sampler,
                self.seed,
                progress=(step - 1) / settings.steps,
                on_progress=partial(self.observer.sampling, step),
            )
            sampled += found.trees
            sample_s, score_s = sample_s + found.sample_s, score_s + found.score_s
            self._check_errors(step, sampled)
            useful += [tree for tree in found.trees if tree.has_spread] if dynamic else found.trees
            if len(useful) >= wanted:
                break
        if len(useful) > wanted:  # a random choice prefers no problem
            useful = generator(self.seed, "keep", step).sample(useful, wanted)
        return Collected(sampled, useful, position, sample_s, score_s)

    def _checked_problems(self) -> Sequence[Problem]:
        """The training problems. Raises `TaskError` for a long prompt; problems made on demand are not checked."""
        problems = self.actor.task.problems("train")
        tested = self.actor.task.problems("test")[: self.evaluation.problems] if self.settings.eval_every else ()
        if isinstance(problems, list | tuple):
            for problem in (*problems, *tested):
                self.actor.encode(problem, self.sampler.response_tokens)
        return problems

    def _problems_from(self, position: int, count: int) -> Iterator[tuple[int, Problem]]:
        """`count` problems, with their positions, from the stream of problems: one shuffled epoch after the other."""
        n = len(self.problems)
        for p in range(position, position + count):
            yield p, self.problems[_epoch(self.seed, p // n, n)[p % n]]

    def _check_errors(self, step: int, trees: Sequence[ScoredTree]) -> None:
        rewards = [reward for tree in trees for reward in tree.rewards]
        unknown = rewards.count(None)
        if unknown > self.settings.max_error_rate * len(rewards):
            reasons = Counter(why for tree in trees for why in tree.reasons.values())
            why, times = reasons.most_common(1)[0]
            raise EngineError(
                f"step {step}: {unknown} of {len(rewards)} leaves have no reward, above trainer.max_error_rate "
                f"({self.settings.max_error_rate:g}); the most frequent reason ({times} times): {why}"
            )

    # Reporting and keeping -------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        step = self.state.step
        report = partial(self.observer.evaluating, step)
        found = evaluate(self.actor, self.shape, self.evaluation, self.seed, report)
        self._record({"step": step, "tokens/total": self.state.generated_tokens} | found.metrics())
        self.observer.evaluated(step, found)

    def _record(self, metrics: Metrics) -> None:
        if self.processes.main:
            self.folder.record(metrics)
        self._trackers.log(metrics)

    def _save(self) -> None:
        self._finish_writing()  # a run that resumes here does not write these trees again
        if self.processes.main:
            path = checkpoint.save(
                self.folder.checkpoints,
                self.actor.model,
                self.actor.tokenizer,
                self.learner.optimizer,
                self.state,
                self.settings.keep_checkpoints,
            )
            self.observer.saved(path)

    def _finish_writing(self) -> None:
        """Wait until the trees are written. Raises the error of the writing thread."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _described(self, advantage: Advantage, loss: Loss) -> dict[str, Any]:
        """The run's settings for its folder, if the run was not made from a configuration."""
        objects = {
            "task": self.actor.task,
            "engine": self.actor.engine,
            "sampler": self.shape if isinstance(self.sampler, Sampler) else self.sampler,
            "advantage": advantage,
            "loss": loss,
            "trainer": self.settings,
            "evaluate": self.evaluation,
        }
        return {"seed": self.seed} | {
            name: thing.model_dump(mode="json", by_alias=True)
            if isinstance(thing, Settings)
            else {"kind": f"{type(thing).__module__}:{type(thing).__qualname__}"}
            for name, thing in objects.items()
        }


@lru_cache(2)
def _epoch(seed: int, epoch: int, problems: int) -> list[int]:
    """The order of the problems in an epoch. Cached, because shuffling many problems can take longer than a step."""
    return generator(seed, "epoch", epoch).sample(range(problems), problems)


def _shape_and_sampler(
    actor: Actor, sampler: SamplerSettings | TreeSampler | None
) -> tuple[SamplerSettings, TreeSampler]:
    """The shape of the trees, and what grows them. Evaluation uses the shape's budget and stopping rule."""
    if sampler is None or isinstance(sampler, SamplerSettings):
        shape = sampler or SamplerSettings()
        return shape, actor.sampler(shape)
    given = getattr(sampler, "settings", None)
    return given if isinstance(given, SamplerSettings) else SamplerSettings(), sampler
