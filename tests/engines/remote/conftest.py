"""A model with random weights, and a server that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.support.servers import Served
from tests.support.small_runs import save_model
from treepo.models import causal_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def policy(folder: Path) -> PreTrainedModel:
    return causal_lm.load(str(folder))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with Served(folder) as server:
        yield server
