"""Prompts and answers from a file (JSONL, JSON, Parquet) or from a data set on the Hugging Face Hub.

All rows are checked when the data is read. The error for a bad row has its file and line, and comes before the training
starts. This module reads JSON without `datasets`, which gives no line numbers and converts types.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from treepo.errors import ConfigError, TaskError, nearest
from treepo.seeds import derive
from treepo.settings import Settings
from treepo.tasks import Problem, Split
from treepo.tasks.math import boxed, equivalent
from treepo.user_code import imported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".json", ".parquet")
Row = tuple[int, str, dict[str, Any]]  # number (in JSONL: the line), place for messages, columns


class DatasetTask(Settings):
    """Prompts with known answers. The reward compares boxed answers, or is a function of the user."""

    kind: Literal["dataset"] = "dataset"
    path: str = Field(
        description="A .jsonl, .json or .parquet file, or the name of a data set on the Hugging Face Hub."
    )
    name: str | None = Field(None, description="Configuration of a Hub data set, e.g. 'main'; default: its only one.")
    split: str = Field("train", description="Split of a Hub data set to train on.")
    test_split: str | None = Field(None, description="Split of the same Hub data set to evaluate on.")
    test_path: str | None = Field(
        None, description="A file or Hub data set to evaluate on. With it, test_split is a split of this data set."
    )
    test_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the prompts held out for evaluation, chosen by a hash of their text. Not used with "
        "test_path or test_split.",
    )
    prompt_column: str = Field("question", description="Column with the text of the prompt.")
    answer_column: str = Field("answer", description="Column with the right answer (a text or a number).")
    columns: tuple[str, ...] = Field(
        (), description="Further columns that your reward function gets as keyword arguments."
    )
    answer_after: str | None = Field(
        None, min_length=1, description="If set, the right answer is the text after the last such mark. GSM8K: '####'."
    )
    limit: int | None = Field(None, ge=1, description="Use at most this many problems of each split.")
    system: str | None = Field(None, description="System prompt. Without a chat template, it is put before the prompt.")
    instruction: str = Field(
        r"Put the final answer in \boxed{}.", description="Text added on a new line after every prompt; '': none."
    )
    chat: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether to apply the tokenizer's chat template; auto: if it has one."
    )
    # The attribute cannot be called `reward`: that is the method.
    reward_function: str = Field(
        "math",
        alias="reward",
        pattern=r"^(math|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
        description="math: 1 if the last boxed answer equals the right one, else 0. Or your function as "
        "my_module:my_function, called as my_function(prompt=..., response=..., answer=...); it returns a number. "
        "`columns` adds arguments.",
    )

    @model_validator(mode="after")
    def _columns_are_free(self) -> Self:
        if taken := {"prompt", "response", "answer"} & set(self.columns):
            raise ValueError(f"columns: {taken.pop()!r} is already an argument of every reward function")
        if self.columns and self.reward_function == "math":
            raise ValueError("columns are arguments of your reward function: set reward to my_module:my_function")
        return self

    @property
    def isolated(self) -> bool:
        return True  # sympy may hang, and a function of the user may do anything

    def problems(self, split: Split) -> Sequence[Problem]:
        train, test = _splits(self)
        if split == "train":
            return train
        if not test:
            raise TaskError("task: no test problems: set test_path, test_split or a positive test_fraction")
        return test

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        text = f"{problem.prompt}\n{self.instruction}" if self.instruction else problem.prompt
        if self.chat == "never" or (self.chat == "auto" and not tokenizer.chat_template):
            return list(tokenizer.encode(f"{self.system}\n\n{text}" if self.system else text))
        if not tokenizer.chat_template:
            raise ConfigError("task.chat: always, but the tokenizer has no chat template: use auto or never")
        from jinja2 import TemplateError

        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": text})
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except TemplateError as error:
            raise ConfigError(
                f"task.chat: the tokenizer's chat template does not accept the prompt: {error}"
            ) from error
        return list(ids)

    def reward(self, problem: Problem, response: str) -> float:
        if self.reward_function == "math":
            given = boxed(response)
            return float(given is not None and equivalent(problem.answer, given))
        function = _function(self.reward_function)
        # The caller checks that the value is a number.
        value: float = function(prompt=problem.prompt, response=response, answer=problem.answer, **problem.columns)
        return value

    def prepare(self) -> None:
        """Load what `reward` needs, so that the first response does not wait for it. Raises `TaskError` on failure."""
        if self.reward_function != "math":
            _function(self.reward_function)
            return
        for given in ("0.5", r"\frac{x+1}{2}", r"\sqrt{2}", "(1, 2)", r"\{1, 2\}"):  # each loads a part of sympy
            equivalent("(x+1)^2", given)

    def final_answer(self, response: str) -> str | None:
        return boxed(response)


@lru_cache(4)
def _splits(task: DatasetTask) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Train and test problems. They are read once per task."""
    train = _read(task, task.path, task.split)
    if task.test_path is not None:
        test = _read(task, task.test_path, task.test_split or "test")
    elif task.test_split is not None:
        test = _read(task, task.path, task.test_split)
    else:
        train, test = _held_out(train, task.test_fraction)
        if not train:
            raise TaskError(
                f"{task.path}: too few different prompts to hold some out for evaluation: set task.test_path, or "
                "task.test_fraction=0 and trainer.eval_every=0"
            )
    return tuple(train[: task.limit]), tuple(test[: task.limit])


def _held_out(problems: list[Problem], fraction: float) -> tuple[list[Problem], list[Problem]]:
    """Train and held-out problems. The share `fraction`, rounded up, with the smallest hashes of prompts is held out.

    So equal prompts are in the same split. The split does not depend on the order of rows, and changes little when rows
    are added.
    """
    count = -int(-fraction * len(problems) // 1)
    ranks = [derive("held out", problem.prompt) for problem in problems]
    limit = sorted(ranks)[count - 1] if count else -1
    train = [problem for problem, rank in zip(problems, ranks, strict=True) if rank > limit]
    return train, [problem for problem, rank in zip(problems, ranks, strict=True) if rank <= limit]


def _read(task: DatasetTask, source: str, split: str) -> list[Problem]:
    """The problems of a file, or of a split of a Hub data set. A problem's id is `file or split:row`."""
    columns = (task.prompt_column, task.answer_column, *task.columns)
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise TaskError(f"task: no such file: {source}")
        reader = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[path.suffix.lower()]
        rows = reader(path, columns)
        name = path.name
    elif path.is_file():
        raise TaskError(f"task: {source}: unknown format {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    else:
        rows = _hub(source, task.name, split, columns)
        name = split
    problems = []
    for number, where, row in rows:
        prompt = _text(where, row, task.prompt_column)
        answer = _text(where, row, task.answer_column)
        if task.answer_after is not None:
            _, mark, answer = answer.rpartition(task.answer_after)
            if not mark or not answer.strip():
                raise TaskError(f"{where}: nothing follows {task.answer_after!r} (answer_after) in the answer")
        more = {column: _value(where, row, column) for column in task.columns}
        problems.append(Problem(f"{name}:{number}", prompt, answer.strip(), more))
    if not problems:
        raise TaskError(f"{source}: no rows")
    return problems


def _text(where: str, row: dict[str, Any], column: str) -> str:
    """The text in a column of a row."""
    if column not in row:
        raise TaskError(f"{where}: {_no_column(column, row)}")
    value = row[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise TaskError(f"{where}: {column!r} is empty")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TaskError(f"{where}: {column!r} holds a {type(value).__name__}; expected a text or a number")
    return str(value).strip()


def _value(where: str, row: dict[str, Any], column: str) -> Any:
    """The value in a column for the reward function. Workers get it as JSON, so it must be a JSON value."""
    if column not in row:
        raise TaskError(f"{where}: {_no_column(column, row)}")
    value = row[column]
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TaskError(f"{where}: {column!r} cannot be sent to a reward function: {error}") from error
    return value


def _no_column(column: str, found: Sequence[str] | dict[str, Any]) -> str:
    return f"no column {column!r}; found: {', '.join(found) or 'none'}{nearest(column, found)}"


def _jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:  # noqa: ARG001  # each row is checked anyway
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield number, where, _object(where, _parsed(where, line))


def _json(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:  # noqa: ARG001  # each row is checked anyway
    rows = _parsed(str(path), path.read_bytes())
    if not isinstance(rows, list):
        raise TaskError(
            f"{path}: expected a list of objects, found a {type(rows).__name__}; if it is JSONL, name it .jsonl"
        )
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        yield number, where, _object(where, row)


def _parsed(where: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise TaskError(f"{where}: not JSON: {error.msg} at {place}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise TaskError(f"{where}: cannot be read as JSON: nested too deep") from error


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TaskError(f"{where}: expected an object with columns, found a {type(value).__name__}")
    return value


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(str(path), columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"{path}: row {number}", row
    except (ArrowException, OSError) as error:
        raise TaskError(f"{path}: cannot be read as Parquet: {_line(error)}") from error


def _hub(source: str, name: str | None, split: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a data set on the Hub, or of a folder that `datasets` can load."""
    import datasets

    try:
        data = datasets.load_dataset(source, name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise TaskError(f"task: cannot load data set {source!r} (split {split!r}): {_line(error)}") from error
    _check_columns(f"{source} ({split})", columns, data.column_names)
    for number, row in enumerate(data.select_columns(list(dict.fromkeys(columns))), 1):
        yield number, f"{source} ({split}): row {number}", row


def _check_columns(where: str, columns: tuple[str, ...], found: Sequence[str]) -> None:
    for column in columns:
        if column not in found:
            raise TaskError(f"{where}: {_no_column(column, found)}")


def _line(error: Exception) -> str:
    """An error of another library in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@lru_cache(16)
def _function(spec: str) -> Callable[..., Any]:
    """The user's reward function `module:function`."""
    try:
        return imported(spec)
    except ConfigError as error:
        raise TaskError(f"task.reward: {error}") from error
