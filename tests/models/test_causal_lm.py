"""Which models of transformers are served exactly, and which are refused with the reason."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.small_runs import save_model
from treepo import LocalEngine, LocalSettings, Sampler, SamplerSettings
from treepo.errors import ConfigError
from treepo.models import causal_lm

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def new(name: str, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | more)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": None}),
        ("Gemma", {"head_dim": 8}),
        ("Phi3", {}),
        ("Olmo2", {}),
        ("Glm4", {}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)
def test_the_engines_log_probs_are_the_untouched_models(name: str, more: dict) -> None:
    plain = new(name, **more)
    served = causal_lm.prepare(copy.deepcopy(plain))
    settings = SamplerSettings(width=6, segment_tokens=4, max_depth=4)
    sampler = Sampler(LocalEngine(served, LocalSettings(slots=5)), settings, str, {1})
    for tree in sampler.sample([("a", [3, 4, 5]), ("b", [7] * 9)], seed=0):
        for leaf in tree.leaves():
            ids = torch.tensor([tree.tokens(leaf)])
            with torch.no_grad():
                logprobs = plain(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            expected = logprobs[0, :-1].gather(1, ids[0, 1:, None])[len(tree.prompt) - 1 :, 0]
            sampled = torch.tensor([value for node in tree.path(leaf) for value in tree.nodes[node].logprobs])
            torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("Mistral", {"sliding_window": 16}, "uses sliding_window=16; only full attention"),
        ("Gemma2", {"head_dim": 8}, "uses sliding_attention; only full attention"),
        ("Mamba", {}, "uses linear_attention; only full attention"),
        ("Granite", {"logits_scaling": 2.0}, "computes other logits under treepo's attention"),
        ("Bloom", {}, "has attention of its own, which a treepo plan does not reach"),
        ("Llama", {"attention_dropout": 0.1}, "attention_dropout must be 0"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "has dynamic rope scaling, whose angles depend on the batch's length",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(name: str, more: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        causal_lm.prepare(new(name, **more))


def test_a_prepared_model_without_a_plan_says_how_to_call_it() -> None:
    prepared = causal_lm.prepare(new("Llama"))
    with pytest.raises(ValueError, match=r"runs under a treepo plan: call it through causal_lm"):
        prepared(input_ids=torch.tensor([[1, 2]]))


def test_a_created_model_is_a_function_of_its_seed() -> None:
    from treepo.tasks.program import ProgramTask

    tokenizer = ProgramTask().tokenizer()
    first, same, other = (causal_lm.create(causal_lm.Shape(), tokenizer, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_loaded_weights_lie_in_memory_as_those_of_a_new_model_do(tmp_path: Path) -> None:
    """At another alignment a matrix product has other last bits, and a resumed run would differ."""
    folder = save_model(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert any(p.data_ptr() % 64 for p in loaded.parameters()), "the test wants a loader that does not align"
    for p in causal_lm.load(str(folder)).parameters():
        assert p.data_ptr() % 64 == 0
