"""The documents tell the truth: commands run, examples run, generated pages are fresh."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from docs.configuration import PAGE, page
from treepo.cli import app
from treepo.run.config import Config, load
from treepo.studies import STUDIES, find

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STUDY_PAGE = (ROOT / "docs" / "studies.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
ENGINES = (ROOT / "docs" / "engines.md").read_text()
PAPER = (ROOT / "docs" / "paper.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()
CHANGES = (ROOT / "CHANGELOG.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_configuration_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_every_setting_has_a_meaning_on_the_configuration_page() -> None:
    assert "One of the kinds of" not in page()
    without_heads = re.sub(r"^\| (kind|study) \| \|$", "", page(), flags=re.MULTILINE)
    assert re.search(r"\| *\|$", without_heads, flags=re.MULTILINE) is None


def test_the_configuration_page_lists_each_kind_once_and_names_classes_of_users_once() -> None:
    for kind in ("treepo", "grpo", "gspo", "server", "lock", "lowest_logprob"):
        assert len(re.findall(rf"^\| `{kind}`( \(default\))? \|", page(), flags=re.MULTILINE)) == 1, kind
    assert page().count("my_module:MyClass") == 1
    assert "A class of yours:" not in page()


def test_every_study_is_on_the_page_of_studies_with_its_settings() -> None:
    for name in STUDIES:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", STUDY_PAGE, flags=re.MULTILINE)
        own = set(type(find(name)).model_fields) - {"seeds", "jobs"}
        assert own == set(re.findall(r"`(\w+)`", row)) - {name}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), target


def exists(module: str) -> bool:
    """Whether `treepo.a.b` is a module or a package, or a name in one."""
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
        return True
    above = path.parent.with_suffix(".py")
    files = [file for file in (above, path.parent / "__init__.py", path.parent / "__init__.pyi") if file.is_file()]
    return any(re.search(rf"\b{path.name}\b", file.read_text()) for file in files)


def test_names_of_the_package_are_recognised() -> None:
    for name in ("treepo.tree", "treepo.engines.local", "treepo.user_code.Custom", "treepo.read_trees"):
        assert exists(name)
    for name in ("treepo.actor", "treepo.engines.server", "treepo.user_code.Own", "treepo.read_forests"):
        assert not exists(name)


# Entries of the log and of the changelog keep the names of their time.
PRESENT = [document for document in DOCUMENTS if document.stem not in ("log", "CHANGELOG")]


@pytest.mark.parametrize("document", PRESENT, ids=lambda path: path.stem)
def test_modules_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text()
    assert [name for name in re.findall(r"`(treepo(?:\.\w+)+)", text) if not exists(name)] == []
    files = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
    places = (ROOT, ROOT / "treepo", ROOT / "docs")
    assert [name for name in files if not any((place / name).is_file() for place in places)] == []


def test_the_readme_and_the_design_name_every_module_of_the_package() -> None:
    package = ROOT / "treepo"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    for text, begin in ((README, "```\ntreepo/"), (DESIGN, "```\n  start ")):
        drawing = text.partition(begin)[2].partition("```")[0]
        assert (modules | packages) - set(re.findall(r"\w+", drawing)) == set()


def moves() -> list[list[str]]:
    """Rows of the changelog's table of modules: the names before and now."""
    table = CHANGES.partition("| module in 0.1 | module in 0.2 |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_the_changelog_says_where_modules_went() -> None:
    assert len(moves()) > 10
    for before, now in moves():
        names = re.findall(r"`(treepo[\w.]+)`", now)
        assert names, now
        assert [name for name in names if not exists(name)] == []
        for name in re.findall(r"`(treepo[\w.]+)`", before):
            assert not (ROOT.joinpath(*name.split(".")).with_suffix(".py")).is_file(), name


def test_the_changelogs_new_imports_work_and_its_old_ones_do_not() -> None:
    (block,) = blocks(CHANGES, "python")
    missing = [
        {
            f"{node.module}.{alias.name}"
            for node in ast.parse(code).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if not exists(f"{node.module}.{alias.name}")
        }
        for code in block.split("# 0.2")
    ]
    assert missing == [{"treepo.model"}, set()]  # the other names of 0.1 still work


GROUPS = "reward|prompts|rollouts|tokens|response_tokens|entropy|staleness|stop|train|loss|clip|kl|seconds|eval"


def test_every_metric_is_on_the_page_of_training() -> None:
    files = ["run/metrics", "run/trainer", "learner/update", "learner/gradient", "learner/loss", "evaluate"]
    code = "".join((ROOT / "treepo" / f"{name}.py").read_text() for name in files)
    code = code.replace("{stop.value}", "<reason>").replace("{self.samples}", "K")
    metrics = {"step", *re.findall(rf'"((?:{GROUPS})/[^"{{]+)"', code)}
    assert len(metrics) > 35
    (section,) = re.findall(r"^## Metrics\n(.*?)^## ", TRAINING, flags=re.DOTALL | re.MULTILINE)
    first = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`([^`]+)`", " ".join(first)))
    assert named - {"eval/.../low", "eval/.../high"} == metrics


def test_the_readmes_python_is_the_example_that_is_run() -> None:
    example = (ROOT / "examples" / "grow_a_tree.py").read_text()
    (code,) = blocks(README, "python")
    assert example.endswith(f'"""\n\n{code}')


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_runs(example: Path) -> None:
    done = subprocess.run([sys.executable, example], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("text", [README, TRAINING, ENGINES], ids=["README", "training", "engines"])
def test_the_commands_of_the_documents_are_accepted(text: str, tmp_path: Path) -> None:
    """Every `treepo ...` line, with MODEL, CONFIG and the like filled in, as a dry run; every `make` target exists."""
    known = {"CONFIG": "configs/program.yaml", "key=value": "seed=1", "...": None}
    checked = 0
    for line in "\n".join(blocks(text, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        if words and Path(words[0]).name == "treepo":
            given = [known.get(word, word) for word in words[1:]]
            if given[0] == "serve":  # has no dry run; its options are read, and that is all
                serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
                assert serve.make_context("serve", given[1:]).params["port"] == 8000
                continue
            command = [str(ROOT / word) if str(word).startswith("configs/") else word for word in given if word]
            result = CliRunner().invoke(app, [*command, *([] if "--dry-run" in command else ["--dry-run"])])
            assert result.exit_code == 0, f"{line}: {result.output}"
            checked += 1
    assert checked >= 1


def rows(text: str) -> list[list[str]]:
    """Cells of the tables, without their heads."""
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return [row for row in found if row[1] != "setting"]


def test_every_test_that_the_page_on_the_paper_names_exists() -> None:
    named = re.findall(r"`(test_\w+)`", PAPER)
    assert len(named) > 40
    assert [test for test in named if not re.search(rf"^def {test}\(", TESTS, flags=re.MULTILINE)] == []


def test_every_test_that_the_page_on_design_names_exists() -> None:
    named = re.findall(r"`(test_\w+)(?:\.\.\.)?`", DESIGN)  # the dots stand for the rest of a long name
    assert len(named) > 5
    assert [test for test in named if not re.search(rf"^def {test}", TESTS, flags=re.MULTILINE)] == []


@pytest.mark.parametrize("row", rows(PAPER), ids=lambda row: row[1].strip("*`"))
def test_every_row_of_the_page_on_the_paper_has_a_setting_that_loads_a_test_and_a_study(
    row: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, setting, tests, study = row
    assert "`test_" in tests or tests == "to be filled"
    assert study == "-" or all(re.fullmatch(r"`treepo study [a-z]+`", name) for name in study.split(", "))
    if tests == "to be filled":
        return
    config = ROOT / "configs" / "dataset.yaml"
    plain, chosen = load(config), load(config, [setting.strip("*`")])
    key, _, value = setting.strip("*`").partition("=")
    if setting.startswith("**"):  # what a configuration has that says nothing
        at, _, last = key.rpartition(".")
        section: object = Config(task=plain.task, model=plain.model)
        for part in at.split(".") if at else ():
            section = getattr(section, part)
        default = section.model_dump(mode="json")[last]  # type: ignore[attr-defined]
        assert default == yaml.safe_load(value)
    else:
        assert chosen != plain
