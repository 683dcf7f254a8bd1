"""The tasks that a configuration can name: those of treepo, or a class of the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Discriminator, Tag

from treepo.tasks import Problem, Split, Task, Teacher
from treepo.tasks.dataset import DatasetTask
from treepo.tasks.lock import LockTask
from treepo.tasks.program import ProgramTask
from treepo.user_code import Custom, kind_of, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CustomTask(Custom):
    """Your class. It needs the methods `problems`, `encode` and `reward` of `Task`.

    Optional: `final_answer(response)` (default: no answer, so maj@k is 0), and the attribute `isolated` (default: true,
    so `reward` runs in worker processes with limits).
    """

    calls: ClassVar[dict[str, Any]] = {"problems": Task.problems, "encode": Task.encode, "reward": Task.reward}

    @property
    def isolated(self) -> bool:
        return bool(getattr(self.made, "isolated", True))

    def problems(self, split: Split) -> Sequence[Problem]:
        found: Sequence[Problem] = self.made.problems(split)
        return found

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        return list(self.made.encode(tokenizer, problem))

    def reward(self, problem: Problem, response: str) -> float:
        value: float = self.made.reward(problem, response)  # the caller checks it
        return value

    def final_answer(self, response: str) -> str | None:
        find = getattr(self.made, "final_answer", None)
        found: str | None = find(response) if find is not None else None
        return found


AnyTask = Annotated[
    Annotated[ProgramTask, Tag("program")]
    | Annotated[LockTask, Tag("lock")]
    | Annotated[DatasetTask, Tag("dataset")]
    | Annotated[CustomTask, Tag("custom")],
    Discriminator(kind_of()),
    one_of("program", "lock", "dataset"),
]


def teacher_of(task: Task) -> Teacher | None:
    """`task` as a `Teacher`, or None if it is not one."""
    task = task.made if isinstance(task, CustomTask) else task
    return task if isinstance(task, Teacher) else None
