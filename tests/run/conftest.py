"""A warmed-up model that the runs of these tests start from."""

from __future__ import annotations

import json

import pytest

from tests.support.small_runs import small_config
from treepo.run.build import training


@pytest.fixture(scope="session")
def warmed(tmp_path_factory) -> str:
    """The override that starts a run from a model that is right now and then, without another warm-up."""
    folder = tmp_path_factory.mktemp("warmed")
    with training(small_config(folder)) as trainer:
        trainer.stop()
        trainer.run()
    return json.dumps(str(trainer.folder.latest_checkpoint()))


@pytest.fixture
def start(warmed) -> tuple[str, ...]:
    return ("model.create=null", "warmup=null", f"model.path={warmed}")
