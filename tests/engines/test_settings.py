"""The settings of engines: kinds, and what is refused."""

from __future__ import annotations

import pytest

from tests.support.small_runs import small_config, write_config
from treepo.engines.settings import LocalSettings, ServerSettings
from treepo.errors import ConfigError
from treepo.run.config import load


def test_an_engine_without_a_kind_is_local_and_a_wrong_one_is_explained(tmp_path):
    path = write_config(tmp_path)
    assert load(path, ["engine={slots: 7}"]).engine == LocalSettings(slots=7)
    remote = load(path, ["engine={kind: server, urls: [http://a:1/v1, 'https://b/']}"]).engine
    assert isinstance(remote, ServerSettings) and remote.urls == ["http://a:1", "https://b"]
    for override, message in (
        (
            "engine.kind=servr",
            r"engine: kind 'servr' is none of local, server, vllm, .*; did you mean 'server'\?",
        ),
        ("engine={kind: server}", r"engine\.urls: is required"),
        ("engine={kind: server, urls: [a:1]}", r"engine\.urls: 'a:1' is no address such as http"),
        ("engine={kind: server, urls: [http://a, http://a/]}", "http://a is listed twice"),
        ("engine={kind: server, urls: [http://a], slots: 3}", r"engine\.slots: unknown key"),
        ("engine={slotz: 3}", r"engine\.slotz: unknown key; did you mean 'slots'\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(path, [override])


@pytest.mark.parametrize(
    ("given", "why"),
    [(["engine.kind=local"], "separate weights"), (["engine={kind: server, urls: ['http://x']}"], "rollout_cap")],
)
def test_a_run_ahead_wants_another_engine_and_a_correction(tmp_path, given, why):
    with pytest.raises(ConfigError, match=why):
        small_config(tmp_path, "trainer.ahead=true", *given)
