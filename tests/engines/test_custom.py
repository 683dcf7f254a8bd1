"""An engine of the user's: `kind: module:Class` in the settings, through the sampler to a finished tree."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_runs import small_config
from treepo.distributed import Processes
from treepo.engines import Handle, Sampling, Segment
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import LocalSettings
from treepo.errors import ConfigError
from treepo.models import causal_lm
from treepo.run.build import build_engine, training
from treepo.run.config import Config, changed, dump, load
from treepo.sampler import Sampler
from treepo.tree import Tree

HERE = "tests.engines.test_custom"


class Counting:
    """Counts the segments that a local engine decodes."""

    def __init__(self, model: Any, slots: int = 4) -> None:
        self.inner = LocalEngine(model, LocalSettings(slots=slots))
        self.slots, self.segments, self.versions = slots, 0, list[int]()
        self.granularity, self.context, self.tree_tokens = 1, self.inner.context, self.inner.tree_tokens

    async def start(self) -> None:
        await self.inner.start()

    async def open(
        self,
        tree: Tree,
        sampling: Sampling,
        stop_ids: Collection[int],
        max_tokens: int | None = None,
        *,
        entropies: bool = False,
    ) -> Handle:
        return CountingHandle(self, await self.inner.open(tree, sampling, stop_ids, max_tokens, entropies=entropies))

    async def load_weights(self, version: int) -> None:
        self.versions.append(version)
        await self.inner.load_weights(version)

    async def close(self) -> None:
        await self.inner.close()


class CountingHandle:
    """One tree of it."""

    def __init__(self, engine: Counting, inner: Handle) -> None:
        self.engine, self.inner = engine, inner

    async def generate(self, node: int, max_tokens: int, seed: int) -> Segment:
        self.engine.segments += 1
        return await self.inner.generate(node, max_tokens, seed)

    def close(self) -> None:
        self.inner.close()


class Sizeless(Counting):
    """Does not say how many tokens a tree may have."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        del self.tree_tokens


class Halved(Counting):
    """Has half a token per block."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.granularity: Any = 0.5


class Mute:
    """Knows no tree."""

    def __init__(self, model: Any) -> None: ...

    async def start(self) -> None: ...


class Narrow(Counting):
    """Cannot be asked for entropies."""

    async def open(self, tree: Tree, sampling: Sampling, stop_ids: Collection[int]) -> Handle:  # type: ignore[override]
        raise NotImplementedError


def configured(folder: Path, engine: str, *more: str) -> Config:
    return small_config(folder, f"engine={engine}", "warmup.steps=5", *more)


def built(config: Config) -> Any:
    assert config.model.create is not None and config.task.kind == "program"
    model = causal_lm.create(config.model.create, config.task.tokenizer(), 3)
    return build_engine(config, model, Processes())


def test_a_class_of_the_users_decodes_and_gives_the_trees_of_the_engine_that_it_wraps(tmp_path: Path) -> None:
    own = built(configured(tmp_path, f"{{kind: '{HERE}:Counting', slots: 3}}"))
    local = built(configured(tmp_path, "{slots: 3}"))
    assert isinstance(own, Counting) and own.slots == 3
    shape = small_config(tmp_path).sampler
    trees = [Sampler(engine, shape, str, {0}).sample([("a", [5, 6]), ("b", [7])], 0) for engine in (own, local)]
    assert trees[0] == trees[1]
    assert own.segments == sum(len({node.seed for node in tree.nodes[1:]}) for tree in trees[0]) > 0


def test_a_whole_run_uses_the_users_engine_and_tells_it_of_new_weights(tmp_path: Path) -> None:
    config = configured(tmp_path, f"{{kind: '{HERE}:Counting'}}")
    with training(config) as trainer:
        trainer.run()
        engine = trainer.actor.engine
        assert isinstance(engine, Counting) and engine.segments > 0 and engine.versions[-2:] == [1, 2]


def test_a_class_that_is_no_engine_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    for engine, why in (
        (f"{{kind: '{HERE}:Mute'}}", r"Mute needs a method open\(self, tree, sampling, stop_ids, max_tokens, \*, entr"),
        (f"{{kind: '{HERE}:Narrow'}}", r"Narrow must allow the call open\(self, tree"),
        (f"{{kind: '{HERE}:Counting', slotz: 3}}", r"must allow the call Counting\(model, slotz\): .*slotz"),
        ("{kind: 'no_such_module:Engine'}", "cannot import 'no_such_module'"),
    ):
        with pytest.raises(ConfigError, match=why):
            configured(tmp_path, engine)
    for name, why in (("Sizeless", "tree_tokens is missing"), ("Halved", r"granularity is 0\.5")):
        with pytest.raises(
            ConfigError, match=rf"{name} makes a {name} whose {why}: an engine has granularity, context"
        ):
            built(configured(tmp_path, f"{{kind: '{HERE}:{name}'}}"))


def test_settings_of_a_users_engine_survive_dumps_and_overrides(tmp_path: Path) -> None:
    config = configured(
        tmp_path, f"{{kind: '{HERE}:Counting', slots: 3}}", "trainer.ahead=true", "loss.rollout_cap=2.0"
    )
    (tmp_path / "again.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "again.yaml") == config
    assert changed(config, ["engine.slots=5"]).engine.model_dump() == {"kind": f"{HERE}:Counting", "slots": 5}
    assert changed(config, ["engine={kind: local}", "trainer.ahead=false"]).engine == LocalSettings()
