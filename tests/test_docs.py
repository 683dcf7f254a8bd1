"""The documents tell the truth: commands run, examples run, generated pages are fresh."""

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


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_configuration_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_every_setting_has_a_meaning_on_the_configuration_page() -> None:
    assert "see the kinds of" not in re.sub(r"\| `(task|advantage)` \|.*", "", page())
    assert re.search(r"\| *\|$", page(), flags=re.MULTILINE) is None


def test_every_study_is_on_the_page_of_studies_with_its_settings() -> None:
    for name in STUDIES:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", STUDY_PAGE, flags=re.MULTILINE)
        own = set(type(find(name)).model_fields) - {"seeds", "jobs"}
        assert own == set(re.findall(r"`(\w+)`", row)) - {name}


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    for text, folder in ((README, ROOT), (TRAINING, ROOT / "docs"), (ENGINES, ROOT / "docs")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / target).exists(), target


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
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAPER)
    assert len(named) > 40
    assert [test for test in named if not re.search(rf"^def {test}\(", code, flags=re.MULTILINE)] == []


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
