"""`treepo doctor`: what works on this machine, what is missing, and how to install it."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "math-verify", "pydantic", "safetensors")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    state: Literal["ok", "missing", "broken"]
    detail: str


def examine() -> list[Finding]:
    """Check libraries, devices, engines and optional parts. Runs a small model on the local engine."""
    found = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in LIBRARIES:
        try:
            found.append(Finding(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Finding(name, "missing", "pip install 'treepo[train]'"))
    if any(f.state == "missing" for f in found):
        return found
    return [*found, _device(), _disk(), _scripted(), _local(), _server(), _adapters(), _rewards(), *_trackers()]


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Finding("device", "ok", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB")
    return Finding("device", "ok", f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads (no CUDA device found)")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    state: Literal["ok", "broken"] = "ok" if free > 1 else "broken"
    return Finding("disk", state, f"{free:.0f} GiB free here" + ("" if free > 1 else ": checkpoints will not fit"))


def _scripted() -> Finding:
    from treepo.engines.scripted import ScriptedEngine, random_reply
    from treepo.sampler import Sampler, SamplerSettings

    settings = SamplerSettings(width=4, segment_tokens=2, max_depth=3)
    (tree,) = Sampler(ScriptedEngine(random_reply(9)), settings, str, {0}).sample([("doctor", [1])], 0)
    return Finding("engine scripted", "ok", f"grew a tree of {len(tree.leaves())} leaves")


def _local() -> Finding:
    """Sample a tree from a small random model and compare its log-probs with a plain forward pass."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from treepo.engines.local.engine import LocalEngine
    from treepo.engines.settings import LocalSettings
    from treepo.models.attention import Causal
    from treepo.models.causal_lm import hidden, logits, prepare
    from treepo.sampler import Sampler, SamplerSettings

    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = prepare(AutoModelForCausalLM.from_config(config).to(device))  # type: ignore[no-untyped-call]
    settings = SamplerSettings(width=4, segment_tokens=3, max_depth=3)
    sampler = Sampler(LocalEngine(model, LocalSettings(slots=4)), settings, str, {0})
    (tree,) = sampler.sample([("doctor", [1, 2, 3])], 0)
    leaf = tree.leaves()[-1]
    ids = torch.tensor([tree.tokens(leaf)], device=device)
    with torch.no_grad():
        states = hidden(model, ids, torch.arange(ids.shape[1], device=device)[None], Causal())
        plain = logits(model, states).log_softmax(-1)[0, len(tree.prompt) - 1 : -1]
    plain = plain.gather(1, ids[0, len(tree.prompt) :, None])[:, 0].cpu()
    sampled = torch.tensor([lp for node in tree.path(leaf) for lp in tree.nodes[node].logprobs])
    error = (plain - sampled).abs().max().item()
    state: Literal["ok", "broken"] = "ok" if error < 1e-3 else "broken"
    return Finding("engine local", state, f"log-probs equal a plain forward pass to {error:.0e} on {device}")


def _server() -> Finding:
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        return Finding("treepo serve", "missing", "optional: pip install 'treepo[serve]'")
    return Finding("treepo serve", "ok", "installed")


def _adapters() -> Finding:
    if find_spec("peft") is None:
        return Finding("adapters", "missing", "optional: pip install 'treepo[lora]'")
    return Finding("adapters", "ok", f"peft {metadata.version('peft')}")


def _rewards() -> Finding:
    from treepo.errors import TaskError
    from treepo.tasks import Problem
    from treepo.tasks.dataset import DatasetTask
    from treepo.tasks.scoring import Scorer, ScoringSettings

    try:
        with Scorer(DatasetTask(path="unused.jsonl"), ScoringSettings(workers=1)) as scorer:
            (score,) = scorer.score([(Problem("doctor", "1/2?", "0.5"), r"\boxed{\frac{1}{2}}")])
    except TaskError as error:
        return Finding("bounded rewards", "broken", str(error))
    if score.reward != 1.0:
        return Finding("bounded rewards", "broken", score.reason or "math-verify does not see that 1/2 is 0.5")
    return Finding("bounded rewards", "ok", "math-verify judged 1/2 = 0.5 in a worker process")


def _trackers() -> list[Finding]:
    return [
        Finding(f"tracker {name}", "ok", "installed")
        if find_spec(module)
        else Finding(f"tracker {name}", "missing", f"optional: pip install {name}")
        for name, module in TRACKERS.items()
    ]
