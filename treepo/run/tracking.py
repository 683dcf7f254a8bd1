"""Experiment trackers (tensorboard, trackio, wandb), used through accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from treepo.errors import ConfigError
from treepo.run.folder import RunFolder
from treepo.run.metrics import Metrics, flat_numbers


def require_installed(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker that is not installed. Call it before the slow steps of a run."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"trainer.trackers: {name} is not installed: pip install {name}")


class Trackers:
    """The trackers `names`. They get the settings of the run in `folder`, then its metrics line by line."""

    def __init__(self, names: Sequence[str], folder: RunFolder, *, cpu: bool) -> None:
        self._accelerator: Any = None
        if names:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=cpu, log_with=list(names), project_dir=str(folder.path))
            self._accelerator.init_trackers("treepo", flat_numbers(folder.settings))

    def log(self, metrics: Metrics) -> None:
        """Send one line of metrics."""
        if self._accelerator is not None:
            self._accelerator.log(flat_numbers(metrics), step=metrics["step"])

    def finish(self) -> None:
        """Send everything that is left and close the trackers."""
        if self._accelerator is not None:
            self._accelerator.end_training()
