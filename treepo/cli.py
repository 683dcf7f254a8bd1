"""The command line. Most commands take a configuration and overrides. An error is printed in one line."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from treepo import __version__
from treepo.errors import ConfigError, TreePOError
from treepo.files import writing
from treepo.studies import STUDIES, find

if TYPE_CHECKING:  # `--help` must not wait for the import of torch
    from treepo.run.config import Config
    from treepo.tree import ScoredTree

app = typer.Typer(
    help="Reinforcement learning on language models with trees of rollouts (TreePO, arXiv 2508.17445).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()

# The modules of the extra `train`, which all commands need that use a model.
TRAIN = ("torch", "transformers", "accelerate", "datasets", "safetensors", "math_verify", "matplotlib", "scipy")

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a run's folder.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Settings to change, e.g. sampler.width=8.", show_default=False),
]
ModelFolder = Annotated[
    str | None, typer.Option("--model", metavar="FOLDER", help="Use this model, not the one of the configuration.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the configuration with all settings and exit.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"treepo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    model: ModelFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Train a model. The run's folder (out=...) gets checkpoints, metrics, trees and a learning curve.

    [bold]treepo train configs/program.yaml[/]  the demo: create a small model and train it

    [bold]treepo train configs/dataset.yaml model.path=MODEL task.path=FILE.jsonl out=runs/mine[/]  your model and data

    Ctrl-C finishes the current step, saves a checkpoint and stops. A second Ctrl-C stops at once. In both cases
    [bold]--resume[/] continues the run.
    """
    settings = _load(config, overrides, model, dry_run=dry_run)
    _quiet()
    from treepo.report.console import TrainingProgress, held_out_table, print_saved
    from treepo.report.curve import draw_curve
    from treepo.run.build import training

    progress = TrainingProgress(console, settings.trainer.steps)
    with progress, training(settings, resume=resume, observer=progress) as trainer:
        begun = trainer.state.step
        console.quiet = not trainer.processes.main
        if begun:
            console.print(f"resuming after step {begun} of {settings.trainer.steps}")
        _stop_gently(trainer.stop)
        trainer.run()
    state = trainer.state
    done = state.step == settings.trainer.steps
    if not trainer.processes.main:
        raise typer.Exit(0 if done else 130)
    if progress.first and progress.last:
        before = "before" if begun == 0 else f"step {begun}"
        console.print(held_out_table([(before, progress.first), (f"step {state.step}", progress.last)]))
    console.print(
        f"{state.step} steps, {state.generated_tokens:,} tokens generated, {state.seconds:,.0f} s in steps",
        highlight=False,
    )
    print_saved(console, model=trainer.folder.latest_checkpoint(), learning_curve=draw_curve(trainer.folder))
    if not done:
        console.print(f"stopped early; to continue: treepo train {trainer.folder.path} --resume", soft_wrap=True)
        raise typer.Exit(130)


@app.command()
def sample(
    config: ConfigFile,
    overrides: Overrides = None,
    model: ModelFolder = None,
    problems: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 4,
    split: Annotated[str, typer.Option(help="Split of the problems: train or test.")] = "test",
    draw: Annotated[int, typer.Option(min=0, help="Number of trees to draw in the terminal.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write each finished tree to this .jsonl or .jsonl.gz file.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Also write the drawing to this .svg file.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Sample and score trees for a few problems, and draw them.

    [bold]treepo sample runs/program --draw 2[/]  use the newest checkpoint of a run

    [bold]treepo sample configs/dataset.yaml --model MODEL task.path=FILE.jsonl[/]  use any model
    """
    if split not in ("train", "test"):
        raise ConfigError(f"--split: must be train or test, not {split!r}")
    settings = _load(config, overrides, model, newest=True, dry_run=dry_run)
    _quiet()
    from treepo.report.console import SamplingProgress, drawing, print_saved, tree_table
    from treepo.run.build import build_actor
    from treepo.tree import append_tree

    with build_actor(settings) as actor:
        chosen = actor.task.problems("train" if split == "train" else "test")[:problems]
        keyed = [(f"{split}/{problem.id}", problem) for problem in chosen]
        if out is not None:
            with writing(out, "choose another --out"):
                out.write_bytes(b"")

        def finished(_: int, tree: ScoredTree) -> None:
            if out is not None:
                with writing(out, "choose another --out"):
                    append_tree(out, tree)
            growing.add(tree)

        with SamplingProgress(console, [problem.id for problem in chosen]) as growing:
            sampler = actor.sampler(settings.sampler)
            trees = actor.sample(keyed, sampler, settings.seed, on_tree=finished).trees
        if not console.is_terminal:
            console.print(tree_table(trees))
        drawings = [drawing(tree, actor.decode, max(20, console.width - 40)) for tree in trees[:draw]]
        for drawn in drawings:
            console.print("", drawn, sep="\n")
    if svg is not None:
        picture = Console(record=True, width=console.width, file=io.StringIO())
        picture.print(*drawings, sep="\n\n")
        with writing(svg, "choose another --svg"):
            picture.save_svg(str(svg), title="treepo sample")
    print_saved(console, trees=out, picture=svg)


@app.command("eval")
def evaluate_(
    config: ConfigFile,
    overrides: Overrides = None,
    model: ModelFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Measure greedy and sampled pass@1, pass@k and maj@k on held-out problems, with 95 % intervals.

    [bold]treepo eval runs/program evaluate.problems=256[/]
    """
    settings = _load(config, overrides, model, newest=True, dry_run=dry_run)
    _quiet()
    from treepo.evaluate import evaluate
    from treepo.report.console import held_out_table
    from treepo.run.build import build_actor

    with build_actor(settings) as actor, _bar("evaluating") as report:
        found = evaluate(actor, settings.sampler, settings.evaluate, settings.seed, report)
    if as_json:
        print(json.dumps(found.metrics()))
    else:
        console.print(held_out_table([(Path(settings.model.path or "new model").name, found)]))


@app.command(epilog="\n\n".join(f"[bold]{name}[/]: {what}" for name, (_, _, what) in STUDIES.items()))
def study(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the study; see the list below.", show_default=False)
    ],
    config: ConfigFile,
    overrides: Overrides = None,
    model: ModelFolder = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small version that takes minutes; its results prove nothing.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Run an experiment of the paper: compare several settings, each with several seeds.

    [bold]treepo study headline configs/program.yaml study.jobs=2[/]  GRPO against TreePO

    [bold]treepo study overlap runs/program --quick[/]  use the newest checkpoint of a run

    Set the options of the study itself as study.key=value (study.seeds, study.jobs, ...).

    The folder (out=...) gets a plot, JSON and a page. Ctrl-C stops the study. The same command continues it.
    """
    of_study = [change.removeprefix("study.") for change in overrides or [] if change.startswith("study.")]
    others = [change for change in overrides or [] if not change.startswith("study.")]
    found = find(name, of_study, quick=quick)
    first = [f"out=runs/study-{name}{'-quick' if quick else ''}", *(found.quick_config() if quick else ())]
    settings = _load(config, [*first, *others], model, newest=True, dry_run=dry_run)
    _quiet()
    from treepo.report.console import print_saved
    from treepo.report.study import StudyProgress, terminal_table, write_report
    from treepo.studies.run import Runner, StudyFolder

    folder = StudyFolder(name, found, settings, Path(settings.out))
    with StudyProgress(console) as progress:
        runner = Runner(folder, progress)
        _stop_gently(runner.stop, "stopping: unfinished runs keep their checkpoints")
        done = runner()
    if not done:
        console.print("stopped early; the same command continues", soft_wrap=True)
        raise typer.Exit(130)
    findings = found.findings(settings, folder.done)
    console.print(f"[bold]{found.question}[/]")
    for table in findings.tables:
        console.print(terminal_table(table))
    for note in findings.notes:
        console.print(note)
    print_saved(console, **write_report(folder, findings))


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder with a causal LM and its tokenizer.", show_default=False)
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Segments decoded at the same time; further requests wait.")] = 128,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a prefix and its segment. Default: the model's context.")
    ] = None,
    memory_gib: Annotated[
        float, typer.Option(min=0, help="Most GiB of prefixes kept between requests. The slots need more memory.")
    ] = 4.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="A torch device; auto: CUDA if available, else CPU.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch decides.")] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Environment variable with an API key. Requests without this key are refused."
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP for `engine.kind=server`. Requests and replies are token ids, as in vLLM and SGLang.

    [bold]treepo serve MODEL --port 8000[/]

    [bold]treepo train CONFIG engine.kind=server engine.urls=\\[http://127.0.0.1:8000][/]

    This server is for small models and tests. On GPUs, vLLM and SGLang are faster. Anyone who can connect to the port
    can change the weights, unless you set --api-key-env.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ConfigError("serve: the server's libraries are not installed: pip install 'treepo[serve]'")
    _quiet()
    import torch

    from treepo.engines.settings import LocalSettings
    from treepo.models.settings import ModelSettings
    from treepo.run.config import valid
    from treepo.serve.run import Serving, serve

    if threads is not None:
        torch.set_num_threads(threads)
    settings = Serving(
        valid(ModelSettings, path=model, dtype=dtype, device=device),
        host,
        port,
        LocalSettings(slots=slots, max_tokens=max_tokens),
        memory_gib,
        api_key_env,
    )
    serve(settings, lambda url: print(f"serving {model} on {url}", flush=True))


@app.command()
def doctor() -> None:
    """Check the installation: which libraries and engines work here, what is missing, and how to install it."""
    if find_spec("transformers") is not None:
        _quiet()
    from rich.table import Table

    from treepo.run.doctor import examine

    findings = examine()
    table = Table(title="treepo doctor")
    for name in ("what", "state", "detail"):
        table.add_column(name)
    styles = {"ok": "green", "missing": "yellow", "broken": "bold red"}
    for finding in findings:
        table.add_row(finding.what, f"[{styles[finding.state]}]{finding.state}[/]", escape(finding.detail))
    console.print(table)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point. A `TreePOError` is printed in one line; any other exception is a bug and shows its traceback."""
    try:
        app()
    except TreePOError as error:
        _end(str(error))
    except ModuleNotFoundError as error:
        missing = [name for name in TRAIN if find_spec(name) is None]
        if error.name is None or error.name.partition(".")[0] not in missing:
            raise
        _end(f"this command needs {', '.join(missing)}: pip install 'treepo[train]'")


def _end(message: str) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {_plain(message)}", soft_wrap=True, highlight=False)
    sys.exit(2)


def _plain(text: str) -> str:
    return escape(" ".join(text.split()))


def _load(
    config: Path, overrides: list[str] | None, model: str | None, *, newest: bool = False, dry_run: bool = False
) -> Config:
    """The configuration in a file or in a run's folder, with overrides.

    `newest`: if it is a run's folder and no model is given, use its newest checkpoint. `dry_run`: print the
    configuration and exit.
    """
    from treepo.run.config import dump, load

    changes = list(overrides or [])
    if config.is_dir():
        changes.insert(0, f"out={json.dumps(str(config))}")  # the folder may have been moved
        if newest and model is None and not any(change.startswith("model.path=") for change in changes):
            from treepo.run.checkpoint import latest

            found = latest(config / "checkpoints")
            if found is None and (config / "config.yaml").is_file():
                raise ConfigError(
                    f"{config}: has no checkpoint yet: continue with treepo train {config} --resume, or give a --model"
                )
            model = str(found) if found else None
        config = config / "config.yaml"
    if model is not None:
        changes += [f"model.path={json.dumps(model)}", "model.create=null", "warmup=null"]
    settings = load(config, changes)
    if dry_run:
        print(dump(settings), end="")
        raise typer.Exit
    return settings


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that is removed at the end. Gives the function (done, total) that updates it."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _quiet() -> None:
    """Switch off the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _stop_gently(stop: Callable[[], None], word: str = "stopping after this step") -> None:
    """On the first Ctrl-C or SIGTERM, print `word` and call `stop`. The second one ends the process as usual."""

    def handle(number: int, frame: Any) -> None:  # noqa: ARG001
        console.print(f"{word}; press Ctrl-C again to stop now")
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
