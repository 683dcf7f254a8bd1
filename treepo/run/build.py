"""Makes the objects that a configuration describes: the actor, its engine, and a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from treepo.run.config import Config, load
from treepo.run.folder import RunFolder
from treepo.run.settings import NOT_FLOAT32, misfit
from treepo.run.tracking import require_installed
from treepo.run.trainer import Observer, Trainer
from treepo.seeds import derive
from treepo.tasks.any import teacher_of
from treepo.warmup import warm_up


@contextmanager
def training(config: Config, *, resume: bool = False, observer: Observer | None = None) -> Iterator[Trainer]:
    """The run that `config` describes: `with training(config) as trainer: trainer.run()`.

    `resume`: continue from the newest checkpoint in the run's folder. Raises `ConfigError` or `TaskError` for settings
    that cannot work.
    """
    # Check the settings before the slow steps.
    if config.model.dtype != "float32" and config.model.lora is None:
        raise ConfigError(f"model.dtype: {NOT_FLOAT32.format(config.model.dtype)}")
    require_installed(config.trainer.trackers)
    config.task.problems("train")
    if config.trainer.eval_every:
        config.task.problems("test")
    processes = Processes.started(cpu=causal_lm.device(config.model).type == "cpu")
    if why := misfit(config.sampler, config.trainer, processes.count):
        raise ConfigError(why)
    observer = observer if observer and processes.main else Observer()
    folder = RunFolder(config.out, _described(config), resume=resume, read=lambda path: _described(load(path)))
    found = folder.latest_checkpoint()
    processes.wait()  # no process may write before all have looked for a checkpoint
    with (
        build_actor(config, found, observer.warming_up, processes, folder.path) as actor,
        Trainer(
            actor,
            advantage=config.advantage,
            loss=config.loss,
            sampler=config.sampler,
            settings=config.trainer,
            evaluation=config.evaluate,
            folder=folder,
            seed=config.seed,
            observer=observer,
            holds=found,
            initial=config.model.path,
        ) as trainer,
    ):
        yield trainer
    processes.finish()


def build_actor(
    config: Config,
    weights: Path | None = None,
    on_warmup: Callable[[int, int, float], None] | None = None,
    processes: Processes | None = None,
    train_in: Path | None = None,
) -> Actor:
    """The actor that `config` describes. The caller must close it.

    `weights`: folder of the model to use instead of the configuration's. `on_warmup(step, steps, loss)` is called after
    every step of the warm-up of a new model. `train_in`: folder of the run, if the actor is for training. Only then a
    new adapter is added; if the model is new too, it is saved in this folder, because an adapter needs its base model.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    processes = processes or Processes()
    tokenizer = _tokenizer(config)
    model = _model(config, tokenizer, weights)
    stop_ids = causal_lm.stop_ids(model, tokenizer)  # before the warm-up, because a tokenizer may have no EOS

    def warm() -> None:
        teacher = teacher_of(config.task)
        if weights is None and config.model.path is None and config.warmup is not None and teacher is not None:
            steps = config.warmup.steps
            progress = (lambda step, loss: on_warmup(step, steps, loss)) if on_warmup else None
            warm_up(model, tokenizer, config.task, teacher, config.warmup, derive(config.seed, "warmup"), progress)

    adapter = config.model.lora
    first = adapter is not None and train_in is not None and not lora.adapted(model)
    if adapter is not None and train_in is not None and first:
        # This comes before the engine starts, because the engine may load the base model of the adapter.
        warm()
        base = _base(config.model.path, model, tokenizer, train_in, processes)
        lora.attach(model, adapter, base, derive(config.seed, "adapter"))
    engine = build_engine(config, model, processes)
    actor = Actor.of(
        model,
        tokenizer,
        config.task,
        engine=engine,
        scoring=config.scoring,
        stop_ids=stop_ids,
        processes=processes,
    )
    try:
        for shape in (config.sampler, *([config.evaluate.shape(config.sampler)] if config.trainer.eval_every else [])):
            require_room(engine, shape)
        if not first:
            warm()
    except BaseException:  # clean up, then raise it again
        actor.close()
        raise
    return actor


def _described(config: Config) -> dict[str, object]:
    return config.model_dump(mode="json", by_alias=True)


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    if config.model.path is not None:
        return causal_lm.load_tokenizer(config.model.path)
    teacher = teacher_of(config.task)
    if teacher is None:
        raise ConfigError(
            f"task {config.task.kind!r} has no tokenizer to create a model with: set model.path to a folder"
        )
    return teacher.tokenizer()


def _model(config: Config, tokenizer: PreTrainedTokenizerBase, weights: Path | None) -> PreTrainedModel:
    settings, device = config.model, causal_lm.device(config.model)
    source = str(weights) if weights else settings.path
    if source is None and settings.create is not None:
        return causal_lm.create(settings.create, tokenizer, derive(config.seed, "weights"), settings.dtype, device)
    return causal_lm.load(str(source), settings.dtype, device, settings.lora)


def _base(
    path: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path, processes: Processes
) -> str:
    """The path or Hub name of an adapter's base model. A model without a path is first saved in the run's folder."""
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
    """The engine that `config` describes, for `model`. Of several processes, the main one sends weights to servers."""
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
