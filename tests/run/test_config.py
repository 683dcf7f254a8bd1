"""Configurations: strict, explained in one line, and round-tripping."""

import re
from pathlib import Path

import pytest

from tests.support.small_runs import write_config
from treepo.errors import ConfigError
from treepo.run.config import Config, changed, dump, load

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = load(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.widht=8", r"sampler\.widht: unknown key; did you mean 'width'\?"),
        ("smapler.width=8", r"smapler: unknown key; did you mean 'sampler'\?"),
        ("sampler.branching.divergenc=2", r"sampler\.branching\.divergenc: unknown key; did you mean 'divergence'\?"),
        ("sampler.sampling.topp=1", r"sampler\.sampling\.topp: unknown key; did you mean 'top_p'\?"),
        ("task.operatons=4", r"task\.operatons: unknown key; did you mean 'operations'\?"),
        ("advantage={kind: treepo, size_weigthed: true}", r"advantage\.size_weigthed: unknown key.*'size_weighted'"),
        ("model.create.hiden=8", r"model\.create\.hiden: unknown key; did you mean 'hidden'\?"),
        ("trainer.dynamic_sampling.round=1", r"trainer\.dynamic_sampling\.round: unknown key.*'rounds'"),
        ("trainer.xyzzy=1", r"trainer\.xyzzy: unknown key$"),
        ("sampler.width=wide", r"sampler\.width: Input should be a valid integer.*, not 'wide'"),
        ("sampler.width=0", r"sampler\.width: Input should be greater than or equal to 1, not 0"),
        ("sampler.segment_tokens=-1", r"sampler\.segment_tokens: .*, not -1"),
        ("sampler.mode=forest", r"sampler\.mode: Input should be 'tree' or 'iid', not 'forest'"),
        ("sampler.sampling.top_p=0", r"sampler\.sampling\.top_p: Input should be greater than 0, not 0"),
        ("sampler.branching.first_divergence=[4, 2]", r"sampler\.branching\.first_divergence: .*low <= high"),
        ("sampler.branching.first_divergence=[2, x]", r"sampler\.branching\.first_divergence: Input should be a valid"),
        ("sampler.branching.first_divergence=0", r"first_divergence: give a number of at least 1"),
        ("sampler.branching.divergence=[3, 2]", r"sampler\.branching\.divergence: .*low <= high"),
        ("sampler.branching.temperature=0", r"sampler\.branching\.temperature: give a number above 0, or two"),
        ("sampler.branching.temperature=[5, -1]", r"sampler\.branching\.temperature: give a number above 0, or two"),
        ("sampler.branching.kind=uniform", r"sampler\.branching: kind 'uniform' is none of budget, my_module:MyClass"),
        (
            "sampler.fallback.kind=gird",
            r"sampler\.fallback: kind 'gird' is none of segment, grid,.*mean 'grid'",
        ),
        ("sampler.fallback.kind=grid", r"sampler\.fallback\.window: is required"),
        ("sampler.fallback={kind: block, window: 4, perfer: low}", r"sampler\.fallback\.perfer: unknown key.*'prefer'"),
        ("sampler.fallback.window=4", r"sampler\.fallback\.window: unknown key"),
        ("sampler.fallback={kind: none, candidates: any}", r"sampler\.fallback\.candidates: unknown key"),
        ("sampler.stopping.kind=[early]", r"sampler\.stopping: kind \['early'\] is none of early, my_module:MyClass"),
        ("sampler.stopping=early", r"sampler\.stopping: .*"),
        ("sampler={token_budget: 9, width: 2, min_width: 3}", r"sampler: min_width 3 is above width 2"),
        ("trainer.lr=.nan", r"trainer\.lr: Input should be a finite number"),
        ("task={kind: dataset, path: x, answr_column: y}", r"task\.answr_column: unknown key.*'answer_column'"),
        ("task={kind: dataset}", r"task\.path: is required"),
        ("task.operand_min=9", r": task: operand_min 9 is above operand_max 5"),
        ("task.kind=puzzle", r"task: kind 'puzzle' is none of program, lock, dataset, my_module:MyClass"),
        ("task=null", r"task: "),
        ("sampler.sampling.temperature=0", r"sampler\.sampling\.temperature must be above 0"),
        ("trainer.mini_batches=99", r"trainer\.mini_batches must not exceed trainer\.prompts_per_step"),
        ("trainer.overlong_tokens=999", r"trainer\.overlong_tokens must not exceed the response budget"),
        ("model.path=somewhere", r"give either model\.path"),
        ("model.create.heads=3", r"hidden must be a multiple of heads"),
        ("loss.dual_clip=0.5", r"loss\.dual_clip: Input should be greater than 1"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_where_and_what(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(write_config(tmp_path), [override])
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.width", "is not of the form key=value"),
        ("=8", "is not of the form key=value"),
        ("sampler.width.deep=8", "width has no keys below it"),
        ("sampler.width=[8", "is not valid YAML"),
    ],
)
def test_a_malformed_override_is_explained(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write_config(tmp_path), [override])


def test_a_file_that_is_missing_or_no_mapping_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        load(tmp_path / "absent.yaml")
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"out: \xff\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not UTF-8: invalid start byte at byte 5$"):
        load(path)
    for text, message in (("a: [1", "not valid YAML"), ("- 1", "expected keys and values"), ("", "expected keys")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load(path)


def test_overrides_are_yaml_and_reach_every_depth(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    config = load(
        path, ["trainer.lr=1e-6", "sampler.branching.first_divergence=[2, 4]", "trainer.dynamic_sampling=null"]
    )
    assert config.trainer.lr == 1e-6 and config.trainer.dynamic_sampling is None
    assert config.sampler.branching.first_divergence == (2, 4)
    assert config.sampler.branching.divergence == 2, "its neighbours keep their values"


def test_choosing_another_kind_drops_what_only_other_kinds_know(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    given = ["engine={slots: 4, memory_gib: 1.0}", "advantage={kind: treepo, use_root: false, whiten: false}"]
    there_and_back = load(path, [*given, "engine.kind=vllm", "advantage.kind=grpo"])
    assert there_and_back.engine.kind == "vllm"
    assert there_and_back.advantage.model_dump() == {"kind": "grpo", "whiten": False}, "both know whiten"
    assert load(path, [*given, "engine.kind=local"]).engine.slots == 4, "it was that kind already"
    assert changed(load(path, given), ["engine.kind=vllm"]).engine.kind == "vllm", "a whole dump has every key"
    for wrong in ("engine={slotss: 4}", "engine.slotss=4"):
        with pytest.raises(ConfigError, match=r"engine\.slotss: unknown key"):
            load(path, [wrong, "engine.kind=vllm"])


def test_choosing_a_custom_kind_drops_what_only_our_kinds_know(custom: str, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    engine = ["engine={slots: 4, memory_gib: 1.0}"]

    def keys(section: str, *overrides: str) -> dict[str, object]:
        return getattr(load(path, overrides), section).model_dump(exclude={"kind"})

    assert keys("engine", *engine, f"engine.kind={custom}:Engine") == {}
    assert keys("engine", *engine, f"engine.kind={custom}:Engine", "engine.speed=2") == {"speed": 2}
    assert keys("engine", *engine, f"engine.kind={custom}:SlottedEngine") == {"slots": 4}, "it has that argument"
    whole = changed(load(path, engine), [f"engine.kind={custom}:Engine"])
    assert whole.engine.kind == f"{custom}:Engine", "a whole dump has every key"
    given = ["advantage={kind: treepo, use_root: false, whiten: true}", f"advantage.kind={custom}:Weighted"]
    assert keys("advantage", *given, "advantage.power=2") == {"whiten": True, "power": 2}
    again = [f"engine={{kind: '{custom}:SlottedEngine', slots: 4, block_tokens: 2}}"]
    assert keys("engine", *again, f"engine.kind={custom}:SlottedEngine") == {"slots": 4, "block_tokens": 2}
    assert keys("task", f"task.kind={custom}:Sized", "model.create=null", "model.path=x", "warmup=null") == {}
    for wrong in ("engine={slotss: 4}", "engine.slotss=4"):
        with pytest.raises(ConfigError, match=r"engine: .* must allow the call Engine\(model, slotss\)"):
            load(path, [wrong, f"engine.kind={custom}:Engine"])
    with pytest.raises(ConfigError, match=r"engine: cannot import 'absent_module'"):
        load(path, ["engine.kind=absent_module:Engine"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=lock", r"task: expected keys and values, such as {{kind: program}}, not 'lock'"),
        ("task={{}}", r"task: kind is missing: choose one of program, lock, dataset, my_module:MyClass"),
        ("task={{kind: program, program: 4}}", r"task\.program: unknown key"),
        ("task={{kind: dataset, path: x, dataset: 1}}", r"task\.dataset: unknown key"),
        ("task={{kind: dataset, path: x, columns: [1]}}", r"task\.columns\.0: Input should be a valid string, not 1"),
        ("task={{kind: '{0}:Sized', sise: 4}}", r"task: {0}:Sized\(...\) with .* raised TypeError: .*'sise'"),
        ("engine=local", r"engine: expected keys and values, such as {{kind: local}}, not 'local'"),
        ("engine={{kind: local, local: 0}}", r"engine\.local: unknown key"),
        ("engine={{custom: 0}}", r"engine\.custom: unknown key"),
        ("engine={{kind: server}}", r"engine\.urls: is required"),
        ("engine={{kind: server, urls: [3]}}", r"engine\.urls\.0: Input should be a valid string, not 3"),
        ("engine={{kind: vllm, slots: 3}}", r"engine\.slots: unknown key; it belongs to kind local"),
        (
            "engine={{kind: '{0}:Engine', sped: 3}}",
            r"engine: {0}:Engine must allow the call Engine\(model, sped\): got",
        ),
        ("loss=clip", r"loss: expected keys and values, such as {{kind: clip}}, not 'clip'"),
        ("loss={{kind: clip, clip: 3}}", r"loss\.clip: unknown key; did you mean 'clip_low'\?"),
        ("loss.clip_low=2", r"loss\.clip_low: Input should be less than 1, not 2"),
        ("loss={{kind: gspo, kl: 1}}", r"loss\.kl: unknown key; it belongs to kind clip"),
        ("advantage={{kind: segment, segment: 3}}", r"advantage\.segment: unknown key"),
        ("advantage={{kind: segment, eta: 3}}", r"advantage\.eta: Input should be less than or equal to 1, not 3"),
        ("advantage={{kind: '{0}:Weighted'}}", r"advantage\.power: is required"),
        ("advantage={{kind: '{0}:Weighted', power: 0}}", r"advantage\.power: Input should be greater .*, not 0"),
        ("advantage={{kind: '{0}:Weighted', power: 1, custom: x}}", r"advantage\.custom: Input should .*, not 'x'"),
        ("advantage={{kind: '{0}:Weighted', power: 1, bounds: {{a: x}}}}", r"advantage\.bounds\.a: Input .*, not 'x'"),
        (
            "advantage={{kind: '{0}:Weighted', power: 1, whitten: 1}}",
            r"advantage\.whitten: unknown key of {0}:Weighted; did you mean 'whiten'\?",
        ),
        ("sampler.branching=budget", r"sampler\.branching: expected keys and values, such as {{kind: budget}}, not"),
        ("sampler.branching.budget=3", r"sampler\.branching\.budget: unknown key"),
        ("sampler.branching.custom=3", r"sampler\.branching\.custom: unknown key"),
        ("sampler.branching.divergence=x", r"sampler\.branching\.divergence: Input should be a valid integer"),
        ("sampler.branching={{kind: '{0}:Late', level: 0}}", r"sampler\.branching\.level: Input should .*, not 0"),
        ("sampler.fallback.window=4", r"sampler\.fallback\.window: unknown key; it belongs to kind grid and block"),
    ],
)
def test_a_wrong_value_in_a_section_with_kinds_is_named_as_the_user_wrote_it(
    override: str, message: str, custom: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(path, [override.format(custom)])
    assert re.match(message.format(custom), str(caught.value).removeprefix(f"{path}: ")), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    config = load(write_config(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert isinstance(config, Config)


def test_a_warm_up_is_for_created_models_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warmup is for a model that is created"):
        load(write_config(tmp_path), ["model.create=null", "model.path=somewhere"])


# Custom classes -------------------------------------------------------------------------------------------------------

CUSTOM = """
from pydantic import Field
from treepo.settings import Settings

class Late(Settings):
    level: int = Field(ge=1)
    def __call__(self, frontier):
        return [1] * len(frontier.active)
    def again(self, frontier):
        return 1

class Plain:
    def __init__(self, strength=1):
        self.strength = strength
    def __call__(self, frontier):
        return [1] * len(frontier.active)
    def again(self, frontier):
        return 1

class Half:
    def __call__(self, frontier):
        return []

class Other:
    def __call__(self, tree, active):
        return []
    def again(self, frontier):
        return 1

class Broken:
    def __init__(self):
        raise KeyError("x")

class Weighted(Settings):
    power: float = Field(ge=1)
    custom: int = 0
    whiten: bool = False
    bounds: dict[str, int] = {}
    def __call__(self, forest):
        return forest.path * 0.0

class Sized:
    def __init__(self, size=3):
        self.size = size
    def problems(self, split):
        return []
    def encode(self, tokenizer, problem):
        return []
    def reward(self, problem, response):
        return 0.0

class Engine:
    def __init__(self, model, speed=1):
        pass
    async def start(self): ...
    async def open(self, tree, sampling, stop_ids, max_tokens, *, entropies): ...
    async def load_weights(self, version): ...
    async def close(self): ...

class SlottedEngine(Engine):
    def __init__(self, model, *, slots=1, **more):
        pass

number = 3
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with policies in the current directory."""
    name = f"custom_policies_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("given", ["kind: {0}:Late, level: 2", "kind: {0}:Plain, strength: [1, 2]", "kind: {0}:Plain"])
def test_a_custom_policy_is_found_beside_the_run_and_round_trips(custom: str, given: str, tmp_path: Path) -> None:
    config = load(write_config(tmp_path), [f"sampler.branching={{{given.format(custom)}}}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config != load(write_config(tmp_path))
    assert type(config.sampler.branching.made).__name__ in given
    assert load(again, ["sampler.width=3"]).sampler.branching == config.sampler.branching


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("kind: absent_module:Late", r"cannot import 'absent_module': ModuleNotFoundError: No module named"),
        ("kind: {0}:late", r"'late' in '{0}' does not exist; did you mean 'Late'\?"),
        ("kind: {0}:number", r"'number' in '{0}' is not callable"),
        ("kind: {0}:Late", r"\.level: is required$"),
        ("kind: {0}:Late, level: 0", r"\.level: Input should be greater than or equal to 1, not 0$"),
        ("kind: {0}:Late, level: 1, levle: 2", r"\.levle: unknown key of {0}:Late; did you mean 'level'\?"),
        (
            "kind: {0}:Plain, strenght: 2",
            r"{0}:Plain\(...\) with .* raised TypeError: .*unexpected.*'strenght'",
        ),
        ("kind: {0}:Broken", r"{0}:Broken\(...\) with no settings raised KeyError: 'x'"),
        ("kind: {0}:Half", r"{0}:Half makes a Half, which needs a method again\(self, frontier\)"),
        ("kind: {0}:Other", r"{0}:Other must allow the call __call__\(self, frontier\): missing .*'active'"),
        ("kind: 'not a module:Late'", r"\.kind: String should match pattern"),
    ],
)
def test_a_custom_policy_that_cannot_be_used_is_explained_in_one_line(
    custom: str, given: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"sampler\.branching.*" + message.format(custom)) as caught:
        load(write_config(tmp_path), [f"sampler.branching={{{given.format(custom)}}}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("section", "shape"), [("stopping", r"text, \*, eos, length, depth"), ("fallback", "wanted")])
def test_each_custom_decision_must_allow_the_call_of_its_protocol(
    custom: str, section: str, shape: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"sampler\.{section}: {custom}:Plain must allow the call __call__.*{shape}"):
        load(write_config(tmp_path), [f"sampler.{section}={{kind: {custom}:Plain}}"])


def test_policies_round_trip_with_every_setting(tmp_path: Path) -> None:
    overrides = [
        "sampler.branching={divergence: [1, 3], first_divergence: null, temperature: [5.0, 1.0], allocation: entropy}",
        "sampler.stopping={answer: ignored, stop_strings: [END, '###']}",
        "sampler.fallback={kind: block, window: 6, prefer: high, candidates: any, order: longest_first}",
    ]
    config = load(write_config(tmp_path), overrides)
    assert config.sampler.stopping.stop_strings == ("END", "###")
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config
