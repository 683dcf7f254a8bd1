"""What holds for the code as a whole: import order, weight of an import, docstrings, sizes, versions."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import treepo

PACKAGE = Path(treepo.__file__).parent
PROJECT = PACKAGE.parent
LONGEST_FILE, LONGEST_TEST_FILE = 420, 500

# Read from top to bottom it is the algorithm: a module imports only from those above it.
ORDER = [
    "errors",
    "seeds",
    "settings",
    "files",
    "user_code",
    "event_loop",
    "distributed",
    "tree",
    "forest",
    "tasks",
    "tasks.math",
    "tasks.generated",
    "tasks.program",
    "tasks.lock",
    "tasks.dataset",
    "tasks.any",
    "tasks.listed",
    "tasks.scoring",
    "tasks.worker",
    "advantages.estimator",
    "advantages.node_values",
    "advantages.baselines",
    "advantages.treepo",
    "advantages.segment",
    "advantages.spo",
    "advantages.treerl",
    "advantages",
    "models",
    "models.settings",
    "models.attention.plan",
    "models.attention.chains",
    "models.attention.tiling",
    "models.attention.blocks",
    "models.attention.flex",
    "models.attention.varlen",
    "models.attention",
    "models.lora",
    "models.causal_lm",
    "engines",
    "engines.settings",
    "engines.scripted",
    "engines.open_trees",
    "engines.weight_files",
    "engines.weight_check",
    "engines.local",
    "engines.local.token_sampling",
    "engines.local.prefix",
    "engines.local.kv_store",
    "engines.local.shared_pages",
    "engines.local.batch",
    "engines.local.model_runner",
    "engines.local.slots",
    "engines.local.request_queue",
    "engines.local.callers",
    "engines.local.decoding",
    "engines.local.engine",
    "engines.remote",
    "engines.remote.protocols",
    "engines.remote.replica",
    "engines.remote.engine",
    "engines.vllm",
    "engines.vllm.transfer",
    "engines.vllm.engine",
    "policies",
    "policies.branching",
    "policies.response_text",
    "policies.repetition",
    "policies.stopping",
    "policies.fallback",
    "sampler",
    "rollouts",
    "evaluate",
    "warmup",
    "learner",
    "learner.settings",
    "learner.packing",
    "learner.row_pieces",
    "learner.loss",
    "learner.gradient",
    "learner.update",
    "run",
    "run.settings",
    "run.metrics",
    "run.checkpoint",
    "run.folder",
    "run.tracking",
    "run.shaping",
    "run.trainer",
    "run.foreign_names",
    "run.config",
    "run.build",
    "studies.statistics",
    "studies.findings",
    "studies.study",
    "studies.training",
    "studies.headline",
    "studies.sampling",
    "studies.variance",
    "studies.run",
    "studies",
    "report",
    "report.machine",
    "report.bars",
    "report.console",
    "report.curve",
    "report.study",
    "run.doctor",
    "serve",
    "serve.radix",
    "serve.prefixes",
    "serve.schemas",
    "serve.app",
    "serve.run",
    "cli",
    "__main__",
]
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file != PACKAGE / "__init__.py"  # it names what is public, and imports nothing before it is asked to
}


def imports(source: str) -> set[str]:
    """Modules of treepo that a module imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            of = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("treepo.") in MODULES else str(node.module) for name in of]
        found |= {name.removeprefix("treepo.") for name in names if name.startswith("treepo.")}
    return found


def test_the_documented_order_names_every_module_once():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_above_it(name):
    above = set(ORDER[: ORDER.index(name)])
    assert imports(MODULES[name].read_text(encoding="utf-8")) <= above


def test_imports_are_found_wherever_they_stand():
    source = "import treepo.tree\nfrom treepo import tree as m\ndef f():\n    from treepo.errors import ConfigError\n"
    assert imports(source) == {"tree", "errors"}


HEAVY = ("torch", "transformers", "accelerate", "datasets", "safetensors", "sympy", "matplotlib", "scipy", "httpx2")
BASE = f"""
import contextlib, importlib, io, json, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    # As if only the base of treepo were installed.
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run_base(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", BASE + program], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trees_samplers_estimators_and_configurations_need_no_torch():
    assert (
        run_base("""
from pathlib import Path
import treepo
from treepo import Forest, Sampler, SamplerSettings, ScoredTree, ScriptedEngine, TreePO, load, read_trees, write_trees
from treepo.engines.scripted import random_reply
import treepo.learner.packing, treepo.learner.loss, treepo.run.trainer, treepo.studies

sampler = Sampler(ScriptedEngine(random_reply(9)), SamplerSettings(width=4, segment_tokens=4), lambda _: "", ())
(tree,) = sampler.sample([("p", [1, 2])], seed=0)
scored = ScoredTree("p", tree, [1.0, 0.0, 1.0, 0.0])
values = TreePO()(Forest.of([scored]))
(row,) = treepo.learner.packing.pack(Forest.of([scored]), values)
config = load(Path("configs/program.yaml"), ["sampler.width=5"])
print(values.shape[0], len(row) > 0, config.sampler.width)
""")
        == "4 True 5\n"
    )


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["--version"], ["train", "configs/program.yaml", "--dry-run"]]
)
def test_help_and_dry_runs_need_no_torch(words):
    out = run_base(f"""
sys.argv = ["treepo", *{words!r}]
from treepo.cli import main
with contextlib.suppress(SystemExit):
    main()
""")
    assert out.strip()


COMMANDS = [["train", "configs/program.yaml"], ["study", "overlap", "configs/program.yaml"], ["serve", "folder"]]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_command_that_needs_torch_says_what_to_install(words):
    program = f"""
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {HEAVY!r} else real(name, package)
sys.argv = ["treepo", *{words!r}]
from treepo.cli import main
try:
    main()
except SystemExit as end:
    print(end.code)
"""
    done = subprocess.run([sys.executable, "-c", BASE + program], capture_output=True, text=True, cwd=PROJECT)
    assert done.stdout == "2\n", done.stderr
    assert re.fullmatch(
        r"error: this command needs torch, transformers, .*: pip install 'treepo\[train\]'\n", done.stderr
    )


def test_importing_the_package_loads_next_to_nothing():
    assert (
        run_base("""
import treepo
print(sorted({"numpy", "pydantic"} & set(sys.modules)))
""")
        == "[]\n"
    )


def test_everything_public_is_there():
    assert {"TreePO", "Trainer", "Sampler", "accumulate", "pack", "policy_loss", "__version__"} <= set(treepo.__all__)
    for name in treepo.__all__:
        assert getattr(treepo, name) is not None
    with pytest.raises(AttributeError, match="Treee"):
        treepo.Treee  # noqa: B018


def test_earlier_names_still_work_and_say_what_they_are_called_now():
    with pytest.warns(DeprecationWarning, match=r"treepo\.Rollout is called treepo\.ScoredTree now"):
        assert treepo.Rollout is treepo.ScoredTree


def test_no_two_classes_have_one_name():
    found = {}
    for name, file in MODULES.items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(name)
    assert {name: where for name, where in found.items() if len(where) > 1} == {}


@pytest.mark.parametrize("name", ORDER)
def test_what_is_public_has_a_docstring(name):
    module = import_module(f"treepo.{name}")
    assert module.__doc__, name
    for label, thing in vars(module).items():
        if label.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            # Not `__doc__`: pydantic and dataclasses hand a parent's docstring, or a signature, down.
            assert documented(MODULES[name], thing.__name__), f"{name}.{thing.__name__}"


def documented(file: Path, name: str) -> bool:
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    (found,) = [n for n in nodes if isinstance(n, definitions) and n.name == name]
    return ast.get_docstring(found) is not None


@pytest.mark.parametrize("name", ORDER)
def test_no_file_grows_too_long(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_no_test_file_grows_too_long():
    lengths = {
        file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in (PROJECT / "tests").rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST_TEST_FILE} == {}


def test_the_version_is_said_once_and_the_changelog_knows_it():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "treepo.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", treepo.__version__)
    assert re.search(
        rf"^## \[?{re.escape(treepo.__version__)}\b", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
