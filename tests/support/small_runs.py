"""Runs small enough to train in a test: a one-layer model on the four shortest programs, a short warm-up."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from treepo.run.build import training
from treepo.run.config import Config, load
from treepo.run.folder import read_metrics
from treepo.run.trainer import Trainer

PROGRAM = """
seed: 0
threads: 1
task:
  {kind: program, operations: 1, train_problems: 4, test_problems: 4, careful_lessons: 0,
   slip_plus: 0.7, slip_minus: 0.7, slip_times: 0.7}
model:
  create: {hidden: 32, layers: 1, heads: 2, kv_heads: 2, ffn: 64, context: 32}
warmup: {steps: 120, batch: 8, lr: 1.0e-2}
sampler: {width: 8, segment_tokens: 5, max_depth: 4, branching: {first_divergence: 2}}
trainer: {steps: 2, prompts_per_step: 4, lr: 3.0e-3, lr_warmup_steps: 1, eval_every: 0}
evaluate: {problems: 4, samples: 4}
"""
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
FAMILIES: dict[str, Any] = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def write_config(folder: Path, text: str = PROGRAM) -> Path:
    """`text` as a file in `folder`, of a run in `folder/run`."""
    path = folder / "small.yaml"
    path.write_text(f"out: {json.dumps(str(folder / 'run'))}\n{text}", encoding="utf-8")
    return path


def small_config(folder: Path, *overrides: str) -> Config:
    """The settings of a small run in `folder/run`."""
    return load(write_config(folder), overrides)


def character_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token per printable character."""
    ids = {token: i for i, token in enumerate(["<eos>", *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(ids))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, clean_up_tokenization_spaces=False, **special)


def save_model(folder: Path, family: str = "llama", *, eos: bool = True, context: int = 128, **more: Any) -> Path:
    """A model folder as a user may have it: random weights and a tokenizer of characters."""
    tokenizer = character_tokenizer(**({"eos_token": "<eos>"} if eos else {}))
    shape, model = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
    }
    ids = {"bos_token_id": None, "eos_token_id": 0 if eos else None, "pad_token_id": None}
    config = shape(vocab_size=len(tokenizer), max_position_embeddings=context, **ids, **sizes | more)
    model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_questions(path: Path, count: int = 6) -> Path:
    """A JSONL file of sums."""
    rows = ({"question": f"{i}+{i}=?", "answer": 2 * i} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(folder: Path, *overrides: str, resume: bool = False) -> Trainer:
    with training(small_config(folder, *overrides), resume=resume) as trainer:
        trainer.run()
    return trainer


def begin(config: Config, *, resume: bool = False) -> None:
    """Build all that a run needs, which may be refused."""
    with training(config, resume=resume):
        pass


def steps_of(run: Path) -> list[dict]:
    return [m for m in read_metrics(run / "metrics.jsonl") if "eval/problems" not in m]
