"""vLLM in this process: exact log-probs, prefixes reused, weights that arrive. One engine for nearly all tests.

Needs the environment that `make venv-vllm` makes; `make test-vllm` runs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.support.engine_trees import EXACT, follows_updates, worst_of
from tests.support.small_runs import small_config
from treepo.engines import Sampling
from treepo.engines.settings import VLLMSettings
from treepo.engines.vllm.transfer import backend
from treepo.engines.weight_check import SAMPLING, mismatch, probe, probe_tree
from treepo.errors import EngineError
from treepo.models import causal_lm, lora
from treepo.models.lora import LoraSettings
from treepo.run.build import training
from treepo.run.config import changed
from treepo.sampler import Sampler, SamplerSettings
from treepo.tree import ROOT, Stop, Tree

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM: `make test-vllm`"),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]
SHAPE = SamplerSettings(width=8, segment_tokens=32, max_depth=4)
BLOCK = 32


class Serving:
    """A model, tied if not said otherwise, with vLLM behind it, and the event loop that both belong to."""

    def __init__(
        self, folder: Path, adapter: LoraSettings | None = None, *, tied: bool = True, device: str = "cpu", **more: Any
    ) -> None:
        from treepo.engines.vllm.engine import VLLMEngine

        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=300,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,  # of 64: vLLM's attention knows few sizes
            num_key_value_heads=1,
            intermediate_size=256,
            max_position_embeddings=512,
            initializer_range=0.1,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.plain = Qwen2ForCausalLM(config).eval().to(device)
        self.model: PreTrainedModel = causal_lm.prepare(self.plain)
        if adapter is not None:
            self.model.save_pretrained(folder / "base")
            lora.attach(self.model, adapter, str(folder / "base"), seed=0)
        self.runner = asyncio.Runner()
        settings = VLLMSettings(kind="vllm", enforce_eager=True, **more)
        self.engine = VLLMEngine(self.model, settings, folder / "weights")

    async def growing(self, shape: SamplerSettings = SHAPE, seed: int = 0, prompts: int = 3) -> list[Tree]:
        sampler = Sampler(self.engine, shape, str, {7})
        asked = [(str(i), list(range(10 + i, 70 + i))) for i in range(prompts)]
        return await sampler.grow_all(asked, seed)

    def grow(self, shape: SamplerSettings = SHAPE, seed: int = 0, prompts: int = 3) -> list[Tree]:
        return self.runner.run(self.growing(shape, seed, prompts))

    def move(self, by: float = 0.05) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(by * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("weights"))
    yield serving
    serving.runner.run(serving.engine.close())
    serving.runner.close()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}])
def test_trees_are_whole_and_their_log_probs_are_the_models(serving: Serving, sampling: dict[str, float]) -> None:
    trees = serving.grow(SHAPE.model_copy(update={"sampling": Sampling(**sampling)}))
    for tree in trees:
        assert len(tree.leaves()) == SHAPE.width and Tree.from_json(tree.to_json()) == tree
        assert not any(node.stop is Stop.ERROR for node in tree.nodes)
    assert len({tuple(t.response(leaf)) for t in trees for leaf in t.leaves()}) > 20, "every segment has its own seed"
    assert worst_of(serving.model, trees, sampling.get("temperature", 1.0)) < EXACT


def test_forks_later_segments_and_fallbacks_reuse_the_cache(serving: Serving) -> None:
    from treepo.engines.vllm.engine import VLLMStats

    assert serving.engine.granularity == BLOCK
    serving.engine.stats = VLLMStats()
    serving.grow(SHAPE.model_copy(update={"stopping": SHAPE.stopping}), seed=5)
    stats = serving.engine.stats
    # Besides each prompt once (60 tokens) a request computes at most one block anew.
    assert stats.computed_again <= 3 * 60 + stats.requests * BLOCK
    assert stats.cached_tokens > stats.prefix_tokens / 2


def test_more_prompts_than_one_pass_holds(serving: Serving) -> None:
    trees = serving.grow(SHAPE.model_copy(update={"width": 2, "max_depth": 1}), prompts=70)
    assert sum(len(tree.prompt) for tree in trees) > 2 * 2048, "in one pass vLLM takes 2048 tokens on a CPU"
    assert all(len(tree.leaves()) == 2 for tree in trees)
    assert not any(node.stop is Stop.ERROR for tree in trees for node in tree.nodes)


def test_a_stop_id_ends_a_segment_and_is_its_last_token(serving: Serving) -> None:
    async def ends() -> list[list[int]]:
        handle = await serving.engine.open(Tree(list(range(20, 60))), Sampling(), range(100, 200))
        segments = await asyncio.gather(*(handle.generate(ROOT, 64, seed) for seed in range(20)))
        handle.close()
        return [segment.tokens for segment in segments]

    for tokens in serving.runner.run(ends()):
        assert not any(100 <= t < 200 for t in tokens[:-1])
        assert len(tokens) == 64 or 100 <= tokens[-1] < 200


def test_an_abandoned_request_is_given_up_and_others_go_on(serving: Serving) -> None:
    async def abandon() -> int:
        handle = await serving.engine.open(Tree(list(range(20, 60))), Sampling(), [])
        long = asyncio.ensure_future(handle.generate(ROOT, 400, 1))
        await asyncio.sleep(0.2)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        after = await handle.generate(ROOT, 8, 2)
        handle.close()
        return len(after.tokens)

    assert serving.runner.run(abandon()) == 8


def test_new_weights_arrive_and_segments_say_which(serving: Serving) -> None:
    serving.runner.run(follows_updates(serving.engine, serving.model, lambda _: serving.move(), serving.growing))


def found_unsent(serving: Serving) -> str | None:
    """What a probe says of a vLLM that answered rightly, after the model has moved and nobody told it."""

    async def ask() -> str | None:
        tree = probe_tree(serving.model)
        handle = await serving.engine.open(tree, SAMPLING, [])
        before = await probe(handle, tree, serving.model)
        assert mismatch(before, None, 1e-3) is None
        serving.move()
        found = mismatch(await probe(handle, tree, serving.model), before, 1e-3)
        handle.close()
        return found

    return serving.runner.run(ask())


def test_weights_that_did_not_arrive_are_found(serving: Serving) -> None:
    assert "ignored the update" in (found_unsent(serving) or "")
    serving.runner.run(serving.engine.load_weights(4))


def test_weights_do_not_change_under_an_open_tree_and_entropies_are_refused(serving: Serving) -> None:
    async def amiss() -> None:
        handle = await serving.engine.open(Tree([1, 2]), Sampling(), [])
        with pytest.raises(RuntimeError, match="1 trees are open"):
            await serving.engine.load_weights(9)
        handle.close()
        with pytest.raises(EngineError, match="no entropies"):
            await serving.engine.open(Tree([1, 2]), Sampling(), [], entropies=True)

    serving.runner.run(amiss())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The same with an adapter of a rank that vLLM has to round up."""
    serving = Serving(tmp_path_factory.mktemp("adapter"), LoraSettings(rank=12, alpha=24))
    yield serving
    serving.runner.run(serving.engine.close())
    serving.runner.close()


def test_an_adapter_arrives_alone_and_segments_say_which(adapted: Serving, tmp_path: Path) -> None:
    weights = adapted.engine.source.folder

    def move(version: int) -> None:
        left = [path.name for path in weights.iterdir()] if weights.exists() else []
        # At first vLLM has the base, which a new adapter leaves as it is: nothing is sent.
        assert left == [f"version-{version - 1:06d}"] * (version > 1)
        adapted.move()

    adapted.runner.run(follows_updates(adapted.engine, adapted.model, move, adapted.growing))
    (left,) = weights.iterdir()
    assert left.name == "version-000002" and not (left / "model.safetensors").exists()
    assert set(adapted.runner.run(adapted.engine.llm.list_loras())) == {2}


def test_an_adapter_that_did_not_arrive_is_found(adapted: Serving) -> None:
    assert "ignored the update" in (found_unsent(adapted) or "")
    adapted.runner.run(adapted.engine.load_weights(4))


def test_an_adapter_that_vllm_cannot_read_ends_the_update(adapted: Serving) -> None:
    lora.settings_of(adapted.model).use_dora = True
    try:
        with pytest.raises(EngineError, match="cannot load version 5 of the weights"):
            adapted.runner.run(adapted.engine.load_weights(5))
    finally:
        lora.settings_of(adapted.model).use_dora = False
    adapted.runner.run(adapted.engine.load_weights(6))
    assert worst_of(adapted.model, adapted.grow()) < EXACT


# vLLM's own transfer -------------------------------------------------------------------------------------------------


def arrived(serving: Serving, version: int, versions_left: list[str]) -> bool:
    """Whether a moved model's weights are those that vLLM decodes with, and only `versions_left` are in the folder."""
    serving.move()
    serving.runner.run(serving.engine.load_weights(version))
    folder = serving.engine.source.folder
    left = sorted(path.name for path in folder.iterdir())
    return worst_of(serving.model, serving.grow()) < EXACT and left == versions_left


def test_weights_go_by_vllms_transfer_and_through_the_folder_where_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.support import handed
    from treepo.engines.vllm import engine

    how = handed.Handing(tmp_path, rank=0)
    monkeypatch.setattr(engine, "backend", lambda *_: how)
    serving = Serving(tmp_path, tied=False, args={"worker_extension_cls": "tests.support.handed.Extension"})
    try:
        assert worst_of(serving.model, serving.grow()) < EXACT and how.calls == []
        assert arrived(serving, 1, []) and arrived(serving, 2, []) and how.calls == ["sent", "sent"]
        how.amiss = "lost"
        assert arrived(serving, 3, ["version-000003"]), "the probe found it out"
        assert "ignored the update" in caplog.text and "from now on" in caplog.text
        assert arrived(serving, 4, ["version-000004"]) and how.calls == ["sent", "sent", "lost"]
        serving.engine._transfer = engine.Transfer(serving.engine.llm, serving.model, how)
        how.amiss = "refused"
        assert arrived(serving, 5, ["version-000005"])
        assert "weights.safetensors" in caplog.text, "the warning says what vLLM said"
    finally:
        serving.runner.run(serving.engine.close())
        serving.runner.close()


def test_a_folder_is_used_where_no_gpu_is_shared(serving: Serving) -> None:
    assert backend(serving.model, serving.engine._settings) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_go_from_gpu_memory_to_vllm(tmp_path: Path) -> None:
    serving = Serving(tmp_path, device="cuda", tolerance=0.2)
    try:
        serving.grow()
        for version in (1, 2):
            serving.move()
            serving.runner.run(serving.engine.load_weights(version))
            assert serving.engine._transfer is not None and not list(serving.engine.source.folder.iterdir())
            assert worst_of(serving.model, serving.grow()) < 0.05
        folder = serving.engine._settings.model_copy(update={"transfer": "folder"})
        assert backend(serving.model, folder) is None
    finally:
        serving.runner.run(serving.engine.close())
        serving.runner.close()


@pytest.mark.parametrize("adapter", ["null", "{rank: 8}"])
def test_a_run_trains_on_vllm(tmp_path: Path, adapter: str) -> None:
    config = changed(
        small_config(tmp_path),
        [
            "model.create={hidden: 128, layers: 1, heads: 2, kv_heads: 2, ffn: 64, context: 32}",
            "engine={kind: vllm, enforce_eager: true}",
            "trainer.steps=3",
            f"model.lora={adapter}",
        ],
    )
    with training(config) as trainer:
        trainer.run()
        assert trainer.state.step == 3
        assert trainer.actor.engine.version == 3
