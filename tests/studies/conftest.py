"""A small configuration, and one whose model is already warmed up, so that studies of it need no starting model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.small_runs import small_config
from treepo.run.config import Config
from treepo.studies.study import Watch, starting_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model after a short warm-up."""
    folder = tmp_path_factory.mktemp("model")
    return str(starting_model(small_config(folder, "warmup.steps=20"), folder, Watch())["model"])


@pytest.fixture
def warmed_up(small_model: str, tmp_path: Path) -> Config:
    return small_config(tmp_path, f"model={{path: {json.dumps(small_model)}}}", "warmup=null")
