"""From settings to things: the actor that a configuration describes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treepo.distributed import Processes
from treepo.engines import Engine
from treepo.engines.local.engine import LocalEngine
from treepo.engines.settings import CustomEngine, LocalSettings, ServerSettings
from treepo.engines.weight_files import share
from treepo.errors import ConfigError
from treepo.files import whole_folder, writing
from treepo.models import causal_lm, lora
from treepo.rollouts import Actor, require_room
from treepo.run.config import Config
from treepo.seeds import derive
from treepo.tasks import Teacher
from treepo.tasks.scoring import Scorer
from treepo.warmup import warm_up


def build_actor(
    config: Config,
    weights: Path | None = None,
    on_warmup: Callable[[int, int, float], None] | None = None,
    processes: Processes | None = None,
    train_in: Path | None = None,
) -> Actor:
    """The actor that `config` describes, with the model in folder `weights` instead of its own if that is given.

    A new model is warmed up; `on_warmup(step, steps, loss)` hears of every step. `train_in`: the folder of the run that
    trains it; only there it gets a new adapter, and a new model is kept there for its adapters. The caller closes the
    actor.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    task, source = config.task, str(weights) if weights else config.model.path
    device = causal_lm.device(config.model)
    if config.model.path is not None:
        tokenizer = causal_lm.load_tokenizer(config.model.path)
    elif isinstance(task, Teacher):
        tokenizer = task.tokenizer()
    else:
        raise ConfigError(f"task {task.kind!r} has no tokenizer to create a model with: set model.path to a folder")
    new = source is None
    if source is not None:
        model = causal_lm.load(source, config.model.dtype, device, config.model.lora)
    elif config.model.create is not None:
        seed = derive(config.seed, "weights")
        model = causal_lm.create(config.model.create, tokenizer, seed, config.model.dtype, device)
    processes = processes or Processes()

    def warm() -> None:
        if new and config.warmup is not None and isinstance(task, Teacher):
            steps = config.warmup.steps
            progress = (lambda step, loss: on_warmup(step, steps, loss)) if on_warmup else None
            warm_up(model, tokenizer, task, config.warmup, derive(config.seed, "warmup"), progress)

    if train_in is not None and config.model.lora is not None and not lora.adapted(model):
        # Before the engine starts, which may do so on what the adapter belongs to.
        causal_lm.stop_ids(model, tokenizer)
        warm()
        new = False
        base = _base(config.model.path, model, tokenizer, train_in, processes)
        lora.attach(model, config.model.lora, base, derive(config.seed, "adapter"))
    with ExitStack() as undo:
        runner = undo.enter_context(asyncio.Runner())
        engine = build_engine(config, model, processes)
        undo.callback(lambda: runner.run(engine.close()))
        causal_lm.stop_ids(model, tokenizer)  # what fails, fails before the warm-up
        runner.run(engine.start())
        for shape in (config.sampler, *([config.evaluate.shape(config.sampler)] if config.trainer.eval_every else [])):
            require_room(engine, shape)
        warm()
        scorer = Scorer(task, config.scoring)
        undo.pop_all()  # the actor's from now on
    return Actor(task, tokenizer, model, engine, scorer, processes=processes, runner=runner)


def _base(
    path: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path, processes: Processes
) -> str:
    """Under which path others find the model that an adapter belongs to; one without a path is kept in the run."""
    if path is not None:
        folder = Path(path).expanduser()
        return str(folder.absolute()) if folder.is_dir() else path
    kept = (run / lora.BASE).absolute()
    if processes.main:
        with writing(kept, "out must be a folder that this process can write to"), whole_folder(kept) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            share(part)
    processes.wait()
    return str(kept)


def build_engine(config: Config, model: PreTrainedModel, processes: Processes) -> Engine:
    """The engine that `config` describes, for `model`. Processes share servers, and the main one sends them weights."""
    settings = config.engine
    if isinstance(settings, LocalSettings):
        return LocalEngine(model, settings)
    if isinstance(settings, CustomEngine):
        return settings.build(model)
    folder = settings.weights_dir or Path(config.out) / "weights"
    if isinstance(settings, ServerSettings):
        from treepo.engines.remote.engine import ServerEngine  # imports the HTTP client, which takes a while

        return ServerEngine(model, settings, folder, sends=processes.main)
    from treepo.engines.vllm.engine import VLLMEngine

    return VLLMEngine(model, settings, Path(folder) / f"process-{processes.rank}")
