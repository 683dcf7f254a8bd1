"""The probe, and the guard that no decoder gets a tree before it has the right weights."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.support.engine_trees import shaken
from tests.support.small_runs import save_model
from treepo.engines import Sampling, Segment
from treepo.engines.open_trees import OpenTrees
from treepo.engines.scripted import ScriptedEngine, ScriptedHandle, random_reply
from treepo.engines.weight_check import Probe, WeightGuard, compared
from treepo.engines.weight_files import WeightSource
from treepo.errors import EngineError
from treepo.models import causal_lm
from treepo.tree import Tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def policy(folder: Path) -> PreTrainedModel:
    return causal_lm.load(str(folder))


def test_a_probe_knows_an_update_that_was_ignored() -> None:
    def answer(logprobs: list[float], expected: list[float]) -> Probe:
        return Probe([1, 2], logprobs, expected, [-9.0, -9.0])

    before = answer([-1.0, -2.0], [-1.0, -2.0])
    assert not answer([-1.0, -2.0], [-1.0, -2.0]).ignored_update(None)
    assert not answer([-1.0, -2.0], [-1.0, -2.0001]).ignored_update(before), "the model hardly moved"
    assert answer([-1.0, -2.0], [-1.0, -2.01]).ignored_update(before)
    assert not answer([-1.0, -2.02], [-1.0, -2.01]).ignored_update(before)
    assert answer([-1.0, -2.02], [-1.5, -2.0]).difference == 0.5


# The guard ------------------------------------------------------------------------------------------------------------


class Decoder(WeightGuard):
    """Answers with the log-probs of a copy of the model, and writes down what it is asked to do."""

    def __init__(self, source: WeightSource, *, ways: int = 1, works: bool = True) -> None:
        super().__init__("the decoder", source, tolerance=1e-3)
        self.own = copy.deepcopy(source.model)
        self.updated, self.ways, self.works = False, ways, works
        self.asked: list[str] = []

    def update(self, version: int) -> None:
        self.source.version, self.holds, self.updated = version, None, True

    async def _load(self) -> None:
        self.asked.append("load")
        await asyncio.sleep(0)
        if self.works:
            self.own.load_state_dict(self.source.model.state_dict())

    def _probe_handle(self, tree: Tree) -> Answering:
        self.asked.append("probe")
        return Answering(self.own, tree)

    def _due(self) -> bool:
        return self.updated

    def _has_another_way(self, why: str) -> bool:
        self.asked.append("another way")
        self.ways -= 1
        self.works = self.ways > 0
        return self.works


@dataclass
class Answering:
    """One tree of it."""

    model: PreTrainedModel
    tree: Tree

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        tokens = list(range(max_tokens))
        await asyncio.sleep(0)
        return Segment(tokens, compared(self.tree, Segment(tokens, [0.0] * max_tokens, 0), self.model).expected, 0)

    def close(self) -> None: ...


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """One event loop: an engine belongs to it."""
    with asyncio.Runner() as runner:
        yield runner


def asked_of(decoder: Decoder, runner: asyncio.Runner) -> list[str]:
    """What making it ready took, if two trees want it at the same time."""

    async def twice() -> None:
        await asyncio.gather(decoder.make_ready(), decoder.make_ready())

    decoder.asked = []
    runner.run(twice())
    assert decoder.ready
    return decoder.asked


def test_a_decoder_is_loaded_only_if_it_has_to_be_and_asked_once_per_version(
    policy: PreTrainedModel, tmp_path: Path, runner: asyncio.Runner
) -> None:
    decoder = Decoder(WeightSource(policy, tmp_path))
    assert asked_of(decoder, runner) == ["probe"], "it has the weights"
    assert asked_of(decoder, runner) == []
    for version in (1, 2):
        shaken(policy)
        decoder.update(version)
        assert asked_of(decoder, runner) == ["load", "probe"]
    decoder.holds = None  # a broken connection
    assert asked_of(decoder, runner) == ["load", "probe"]
    shaken(policy)
    fresh = Decoder(WeightSource(policy, tmp_path))
    shaken(policy)
    assert asked_of(fresh, runner) == ["probe", "load", "probe"], "it had other weights before any update"


def test_a_decoder_that_does_not_take_the_weights_is_an_error_unless_another_way_works(
    policy: PreTrainedModel, tmp_path: Path, runner: asyncio.Runner
) -> None:
    for ways in (1, 2):
        decoder = Decoder(WeightSource(policy, tmp_path), ways=ways)
        assert asked_of(decoder, runner) == ["probe"]
        shaken(policy)
        decoder.update(7)
        decoder.works, decoder.asked = False, []
        if ways == 1:
            with pytest.raises(EngineError, match=r"^the decoder, version 7 of the weights: it answers as before"):
                runner.run(decoder.make_ready())
            assert not decoder.ready and decoder.asked == ["load", "probe", "another way"]
        else:
            assert asked_of(decoder, runner) == ["load", "probe", "another way", "load", "probe"]


def test_a_version_that_comes_while_another_is_checked_is_not_taken_for_checked(
    policy: PreTrainedModel, tmp_path: Path, runner: asyncio.Runner
) -> None:
    decoder = Decoder(WeightSource(policy, tmp_path))

    async def cross() -> None:
        check = asyncio.ensure_future(decoder.make_ready())
        await asyncio.sleep(0)  # it was probed and has not answered yet
        decoder.source.version = 1
        await check

    runner.run(cross())
    assert not decoder.ready


def test_open_trees_keep_their_order_and_bar_new_weights() -> None:
    async def opened() -> list[ScriptedHandle]:
        engine = ScriptedEngine(random_reply(9))
        return [await engine.open(Tree([1]), Sampling(), ()) for _ in range(3)]

    handles, trees = asyncio.run(opened()), OpenTrees[ScriptedHandle]()
    trees.require_none()
    for handle in handles:
        assert trees.add(handle) is handle
    with pytest.raises(RuntimeError, match="3 trees are open: close them before the weights change"):
        trees.require_none()
    assert trees.discard(handles[1]) and not trees.discard(handles[1])
    assert list(trees) == [handles[0], handles[2]] and len(trees) == 2
    for handle in list(trees):
        trees.discard(handle)
    trees.require_none()
