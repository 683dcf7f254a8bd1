"""The folder of a run: `config.yaml`, `metrics.jsonl`, `trees/` and `checkpoints/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from treepo import __version__
from treepo.errors import ConfigError
from treepo.files import forget_parts, whole_file, writing
from treepo.run import checkpoint
from treepo.run.metrics import Metrics
from treepo.tree import ScoredTree, write_trees

REMEDY = "correct this and continue with --resume"

# Settings that may change when a run is resumed. They do not change the weights of a step.
MAY_CHANGE = {"trainer": {"steps", "eval_every", "save_every", "keep_checkpoints", "save_trees_every", "trackers"}}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


class RunFolder:
    """The folder of one run. Raises `ConfigError` if it has a run already and `resume` is false.

    `settings`: all settings of the run, by section. `read` reads the settings of an earlier run from its `config.yaml`;
    a resumed run must have the same settings, except those in `MAY_CHANGE`. `claim` writes the settings. Call it after
    all other checks, so that a run that never starts does not occupy the folder.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        read: Callable[[Path], Mapping[str, Any]] = read_yaml,
    ) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.settings = settings
        self._resolved = self.path / "config.yaml"
        if self._resolved.exists():
            if not resume:
                raise ConfigError(
                    f"out: {self.path} holds a run already: continue it with --resume, or choose another (out=...)"
                )
            self._require_same(read(self._resolved))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: cannot write to {self.path}: {error.strerror}") from error

    def claim(self) -> None:
        """Write the settings to `config.yaml`."""
        text = yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True, width=120)
        with writing(self.path, REMEDY):
            self._resolved.write_text(f"# treepo {__version__}\n{text}", encoding="utf-8")

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return checkpoint.latest(self.checkpoints)

    def record(self, metrics: Metrics) -> None:
        """Append `metrics` to `metrics.jsonl`, as one line."""
        with writing(self.metrics, REMEDY), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def write_trees(self, step: int, trees: Sequence[ScoredTree]) -> None:
        """Write the trees of a step to `trees/`."""
        folder = self.path / "trees"
        with writing(folder, REMEDY):
            folder.mkdir(exist_ok=True)
            write_trees(folder / f"step-{step:06d}.jsonl.gz", trees)

    def forget_after(self, step: int | None) -> None:
        """Delete metrics and trees of the steps after `step`, the last checkpoint (None: no checkpoint).

        The resumed run does these steps again.
        """
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [x for x in lines if step is not None and x.endswith("\n") and json.loads(x)["step"] <= step]
            with whole_file(self.metrics) as part:
                part.write_text("".join(kept), encoding="utf-8")
        for file in (self.path / "trees").glob("step-*.jsonl.gz"):
            if step is None or int(file.name[5:11]) > step:
                file.unlink()
        for folder in (self.checkpoints, self.path / "trees"):
            forget_parts(folder)

    def _require_same(self, before: Mapping[str, Any]) -> None:
        for name, old, new in _differences(_binding(before), _binding(self.settings)):
            raise ConfigError(
                f"{name}: the run in {self.path} has {old!r}, not {new!r}: resume it with its settings "
                f"({self._resolved}), or start another run (out=...)"
            )


def read_metrics(path: Path) -> list[Metrics]:
    """The metrics in a `metrics.jsonl`, one entry per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _binding(settings: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in settings.items() if name != "out"}  # the folder may have moved
    for section, names in MAY_CHANGE.items():
        values[section] = {key: value for key, value in (values.get(section) or {}).items() if key not in names}
    return values


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
