"""What holds for the code as a whole: import order, weight of an import, docstrings, sizes, versions."""

import ast
import inspect
import json
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
LONGEST_FILE = 420

# Read from top to bottom it is the algorithm: a module imports only from those above it.
ORDER = [
    "errors",
    "seeds",
    "settings",
    "files",
    "user_code",
    "distributed",
    "tree",
    "forest",
    "tasks",
    "tasks.math",
    "tasks.generated",
    "tasks.program",
    "tasks.lock",
    "tasks.dataset",
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
    "engines.weight_check",
    "engines.weight_files",
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
    "policies.stopping",
    "policies.fallback",
    "sampler",
    "rollouts",
    "evaluate",
    "warmup",
    "learner",
    "learner.packing",
    "learner.row_pieces",
    "learner.gradient",
    "learner.loss",
    "learner.update",
    "run",
    "run.config",
    "run.build",
    "run.checkpoint",
    "run.folder",
    "run.trainer",
    "studies.statistics",
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


def test_the_pure_core_and_the_help_load_no_torch():
    lines = [
        *("treepo", "treepo.tree", "treepo.forest", "treepo.learner.packing", "treepo.advantages", "treepo.sampler"),
        *("treepo.tasks.program", "treepo.tasks.dataset", "treepo.engines.scripted", "treepo.cli"),
    ]
    program = f"""
import contextlib, importlib, io, json, sys
heavy = {{"torch", "transformers", "datasets", "sympy", "matplotlib"}}
loaded = {{}}
for name in {lines!r}:
    importlib.import_module(name)
    loaded[name] = sorted(heavy & set(sys.modules))
sys.argv = ["treepo", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as help, contextlib.suppress(SystemExit):
    treepo = importlib.import_module("treepo.cli").main()
loaded["treepo --help"] = sorted(heavy & set(sys.modules))
print(json.dumps([loaded, help.getvalue()]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded, text = json.loads(done.stdout)
    assert loaded == {name: [] for name in [*lines, "treepo --help"]}
    assert "doctor" in text


def test_everything_public_is_there_and_in_order():
    assert sorted(treepo.__all__, key=str.casefold) == sorted(treepo._HOME.keys() | {"__version__"}, key=str.casefold)
    for name in treepo.__all__:
        assert getattr(treepo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Treee'"):
        treepo.Treee  # noqa: B018


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


def test_the_version_is_said_once_and_the_changelog_knows_it():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "treepo.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", treepo.__version__)
    assert re.search(
        rf"^## \[?{re.escape(treepo.__version__)}\b", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
