"""Studies that only sample: what trees share, how much faster that is, and what trees gain at test time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from pydantic import Field

from treepo.errors import ConfigError
from treepo.evaluate import correct, final_answers, maj_at_k, pass_at_k
from treepo.rollouts import Actor
from treepo.run.build import build_actor
from treepo.run.config import Config, changed
from treepo.sampler import Sampler, SamplerSettings
from treepo.studies.findings import Curve, Findings, Plot, Result, ResultTable, Value, means_table
from treepo.studies.statistics import Mean
from treepo.studies.study import Cell, Results, Study, Watch, by_arm, sample_trees


class SamplingStudy(Study):
    """A study that samples from the starting model of each seed."""

    def measure_arm(self, config: Config, cell: Cell, folder: Path, watch: Watch) -> Result | None:
        with build_actor(config) as actor:
            return self.sample(config, actor, watch)

    def sample(self, config: Config, actor: Actor, watch: Watch) -> Result:
        """Measure an arm with the starting model of its seed."""
        raise NotImplementedError


# Overlap ----------------------------------------------------------------------------------------------------------


class OverlapStudy(SamplingStudy):
    """Measures how much of independent responses is equal at the beginning. A tree would sample that part once."""

    title: ClassVar[str] = "Overlap"
    question: ClassVar[str] = (
        "How much of independent responses is equal at the beginning? (arXiv 2508.17445, section 2.1)"
    )

    problems: int = Field(64, ge=1, description="Problems, the first of the test split.")
    responses: int = Field(16, ge=2, description="Independent responses per problem.")
    temperatures: list[float] = Field([1.0, 0.7], min_length=1, description="Sampling temperatures.")

    def quick(self) -> Self:
        return self.model_copy(update={"seeds": 2, "problems": 16})

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        shape = ("sampler.mode=iid", f"sampler.width={self.responses}")
        return {f"temperature {t:g}": (*shape, f"sampler.sampling.temperature={t}") for t in self.temperatures}

    def sample(self, config: Config, actor: Actor, watch: Watch) -> Result:
        chosen = actor.task.problems("test")[: self.problems]
        scored = sample_trees(
            actor,
            config,
            {f"overlap/{p.id}": p for p in chosen},
            lambda done, total: watch.progress(done / total),
        )
        responses = [[s.tree.response(leaf) for leaf in s.tree.leaves()] for s in scored]
        given = final_answers(actor, scored)
        return {
            "common_prefix": float(np.mean([common_prefix(group) for group in responses])),
            "shared": float(np.mean([1 - distinct_tokens(group) / sum(map(len, group)) for group in responses])),
            "response_tokens": float(np.mean([len(tokens) for group in responses for tokens in group])),
            "answers": float(np.mean([len(set(group) - {None}) for group in given])),
            "beginnings": np.mean([distinct_beginnings(group, 100) for group in responses], axis=0).tolist(),
        }

    def findings(self, config: Config, done: Results) -> Findings:
        arms = by_arm(done)
        columns = {
            "tokens that two responses share": "common_prefix",
            "tokens of a response": "response_tokens",
            "part that a tree could share": "shared",
            "distinct answers": "answers",
        }
        title = f"{self.responses} independent responses to each of {self.problems} problems"
        curves = [
            Curve(
                arm,
                np.linspace(0, 1, len(next(iter(runs.values()))["beginnings"])).tolist(),
                [Mean.of(list(at)) for at in zip(*(r["beginnings"] for r in runs.values()), strict=True)],
            )
            for arm, runs in arms.items()
        ]
        return Findings(
            (means_table(title, arms, columns),),
            (Plot("part of the response", "distinct beginnings / responses", tuple(curves)),),
            (
                "The part that a tree could share is 1 - nodes / tokens of the prefix tree of a problem's responses. "
                "One tree would have saved this part of the tokens if it had forked exactly where the responses part.",
            ),
        )


def common_prefix(responses: Sequence[Sequence[int]]) -> float:
    """Mean number of tokens at the beginning that two of `responses` have in common."""
    # In sorted order, the common prefix of two responses is the shortest one among the neighbours between them.
    ordered = sorted(map(tuple, responses))
    steps = [_common(a, b) for a, b in pairwise(ordered)]
    found = [min(steps[i:j]) for i in range(len(ordered)) for j in range(i + 1, len(ordered))]
    return float(np.mean(found))


def distinct_tokens(responses: Sequence[Sequence[int]]) -> int:
    """The number of tokens of `responses`, those of a shared beginning counted once."""
    ordered = sorted(map(tuple, responses))
    return sum(map(len, ordered)) - sum(_common(a, b) for a, b in pairwise(ordered))


def distinct_beginnings(responses: Sequence[Sequence[int]], points: int) -> list[float]:
    """[points + 1] The share of different beginnings after each of `points` equal parts of the longest response."""
    longest = max(map(len, responses))
    lengths = np.linspace(0, longest, points + 1).round().astype(int).tolist()
    return [len({tuple(tokens[:n]) for tokens in responses}) / len(responses) for n in lengths]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# Efficiency -------------------------------------------------------------------------------------------------------


class EfficiencyStudy(SamplingStudy):
    """Measures trajectories per second of trees of many shapes against independent responses of the same length.

    Every response has the full length, because stopping rules and EOS are switched off. So all shapes do equal work,
    and a model with random weights is enough. All shapes are measured in one process, one after the other.
    """

    title: ClassVar[str] = "Efficiency"
    question: ClassVar[str] = (
        "How many more trajectories per second do trees sample, by depth, divergence and width? "
        "(arXiv 2508.17445, section 4.3)"
    )

    seeds: int = Field(3, ge=1, description="Repeats of every measurement.")
    response_tokens: int = Field(512, ge=1, description="Tokens of every response (the paper: 7000).")
    segment_tokens: list[int] = Field(
        [64, 128, 256], min_length=1, description="Segment lengths that divide response_tokens."
    )
    divergences: list[int] = Field([2, 4, 8], min_length=1, description="Children per path at every level.")
    rollouts: list[int] = Field([4, 16, 64], min_length=1, description="Responses per prompt.")
    rows: int = Field(128, ge=1, description="Responses in total. The number of prompts is rows / rollouts.")

    def quick(self) -> Self:
        return self.model_copy(
            update={
                "seeds": 2,
                "response_tokens": 128,
                "segment_tokens": [16, 32],
                "divergences": [2],
                "rollouts": [16],
            }
        )

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        for n in self.segment_tokens:
            if self.response_tokens % n:
                raise ConfigError(f"study.segment_tokens: {n} does not divide {self.response_tokens}")
        return {f"{width} rollouts": (f"sampler.width={width}", "sampler.mode=tree") for width in self.rollouts}

    def sample(self, config: Config, actor: Actor, watch: Watch) -> Result:
        width = config.sampler.width
        prompts = [
            (str(p), actor.task.encode(actor.tokenizer, problem))
            for p, problem in enumerate(actor.task.problems("train")[: max(1, self.rows // width)])
        ]
        shapes = {"i.i.d.": self._shape(config, self.response_tokens, width, iid=True)}
        for n in self.segment_tokens:
            for divergence in self.divergences:
                shapes[f"{self.response_tokens // n} x {n}, N = {divergence}"] = self._shape(config, n, divergence)
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        found: Result = {}
        for done, (name, shape) in enumerate(shapes.items()):
            watch.progress(done / len(shapes), name)
            sampler = Sampler(actor.engine, shape, lambda _: "", ())
            start = clock()
            trees = actor.run(sampler.grow_all(prompts, config.seed))
            seconds = clock() - start
            leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves()]
            if {tree.response_length(leaf) for tree, leaf in leaves} != {self.response_tokens}:
                raise RuntimeError("a response does not have the full length")
            found[name] = {
                "trajectories_per_s": len(leaves) / seconds,
                "tokens_per_s": len(leaves) * self.response_tokens / seconds,
                "unique_tokens_per_s": sum(tree.unique_tokens for tree in trees) / seconds,
                "sharing": sum(tree.flat_tokens for tree in trees) / sum(tree.unique_tokens for tree in trees),
            }
        return found

    def _shape(self, config: Config, segment: int, divergence: int, *, iid: bool = False) -> SamplerSettings:
        overrides = [
            f"sampler.segment_tokens={segment}",
            f"sampler.max_depth={self.response_tokens // segment}",
            f"sampler.branching={{divergence: {divergence}, first_divergence: {divergence}}}",
            "sampler.stopping={repetition_count: 0}",
            "trainer.overlong_tokens=0",
            f"sampler.mode={'iid' if iid else 'tree'}",
        ]
        return changed(config, overrides).sampler

    def findings(self, config: Config, done: Results) -> Findings:
        tables, plots = [], []
        for arm, runs in by_arm(done).items():
            rows: list[list[Value]] = []
            by_divergence: dict[str, list[tuple[float, Mean]]] = {}
            for shape in next(iter(runs.values())):
                ratio = [r[shape]["trajectories_per_s"] / r["i.i.d."]["trajectories_per_s"] for r in runs.values()]
                columns = ("trajectories_per_s", "tokens_per_s", "unique_tokens_per_s", "sharing")
                means = [Mean.of([r[shape][c] for r in runs.values()]) for c in columns]
                rows.append([shape, Mean.of_ratios(ratio), *means])
                if shape != "i.i.d.":
                    depth, _, divergence = shape.partition(", ")
                    by_divergence.setdefault(divergence, []).append(
                        (float(depth.split(" x ")[1]), Mean.of_ratios(ratio))
                    )
            names = ("over i.i.d.", "trajectories/s", "trajectory tokens/s", "generated tokens/s", "sharing")
            tables.append(ResultTable(f"{arm} of {self.response_tokens} tokens", ("depth x segment", *names), rows))
            found = tuple(Curve(name, [x for x, _ in at], [y for _, y in at]) for name, at in by_divergence.items())
            plots.append(Plot(f"segment tokens, {arm}", "trajectories/s over i.i.d.", found, log_x=True))
        return Findings(tuple(tables), tuple(plots))


# Compute ----------------------------------------------------------------------------------------------------------


class ComputeStudy(SamplingStudy):
    """Measures maj@k and pass@k against generated tokens: independent responses, and trees of several divergences."""

    title: ClassVar[str] = "Test-time compute"
    question: ClassVar[str] = (
        "How accurate are k responses of a tree, for the tokens generated? (arXiv 2508.17445, section 4.5)"
    )

    problems: int = Field(128, ge=1, description="Problems, the first of the test split.")
    widths: list[int] = Field([2, 4, 8, 16, 32], min_length=1, description="Responses per problem, k.")
    divergences: list[int] = Field([2, 4, 8], min_length=1, description="Children per path at every level.")

    def quick(self) -> Self:
        return self.model_copy(update={"seeds": 2, "problems": 32, "widths": [2, 8], "divergences": [2]})

    def arms(self, config: Config) -> dict[str, tuple[str, ...]]:
        return {"i.i.d.": ("sampler.mode=iid",)} | {
            f"divergence {n}": ("sampler.mode=tree", f"sampler.branching={{divergence: {n}, first_divergence: {n}}}")
            for n in self.divergences
        }

    def sample(self, config: Config, actor: Actor, watch: Watch) -> Result:
        chosen = actor.task.problems("test")[: self.problems]
        found = []
        for i, k in enumerate(self.widths):
            shape = config.sampler.model_copy(update={"width": k})
            scored = sample_trees(
                actor,
                config.model_copy(update={"sampler": shape}),
                {f"compute/{p.id}": p for p in chosen},
                partial(self._progress, watch, i),
            )
            good = correct(scored, config.evaluate.correct_at)
            found.append(
                {
                    "k": k,
                    "tokens": float(np.mean([s.tree.unique_tokens for s in scored])),
                    "pass": float(pass_at_k(good, k).mean()),
                    "maj": float(maj_at_k(final_answers(actor, scored), good, k, config.seed).mean()),
                }
            )
        return {"points": found}

    def _progress(self, watch: Watch, i: int, done: int, total: int) -> None:
        watch.progress((i + done / total) / len(self.widths), f"k = {self.widths[i]}")

    def findings(self, config: Config, done: Results) -> Findings:
        arms = by_arm(done)
        rows: list[list[Value]] = []
        curves: dict[str, list[Curve]] = {"maj": [], "pass": []}
        for arm, runs in arms.items():
            by_width = list(zip(*(r["points"] for r in runs.values()), strict=True))
            columns = ("tokens", "maj", "pass")
            rows += [[arm, at[0]["k"], *(Mean.of([p[c] for p in at]) for c in columns)] for at in by_width]
            for name, found in curves.items():
                x = [float(np.mean([p["tokens"] for p in at])) for at in by_width]
                found.append(Curve(arm, x, [Mean.of([p[name] for p in at]) for at in by_width]))
        names = ("arm", "k", "tokens per problem", "maj@k", "pass@k")
        return Findings(
            (ResultTable(f"{self.problems} problems", names, rows),),
            tuple(
                Plot("tokens generated per problem", f"{name}@k", tuple(found), log_x=True)
                for name, found in curves.items()
            ),
        )
