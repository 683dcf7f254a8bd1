"""One run in several processes: each has the whole model and does a part of the work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process and the others of the run. All processes must call each method, except `mine`, together.

    With one process, nothing is sent. With several, `started` must have set up `accelerate`.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def started(cls, *, cpu: bool) -> Self:
        """The processes that torchrun or accelerate started, connected to each other. Without these tools: one."""
        from accelerate import PartialState

        state = PartialState(cpu=cpu)
        return cls(state.process_index, state.num_processes)

    def finish(self) -> None:
        """End the communication between the processes. Without it a process may abort when Python ends."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of `items`: every `count`-th, from index `rank` on."""
        return items[self.rank :: self.count]

    def everyones(self, mine: Sequence[T]) -> list[T]:
        """The inverse of `mine`: from each process's share, all items in their order."""
        if self.count == 1:
            return list(mine)
        numbered = [(self.rank + i * self.count, item) for i, item in enumerate(mine)]
        return [item for _, item in sorted(_gathered(numbered), key=lambda pair: pair[0])]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in at least one process."""
        return flag if self.count == 1 else any(_gathered([flag]))

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """The sum of each value over the processes that have it."""
        if self.count == 1:
            return values
        found: dict[str, float] = {}
        for other in _gathered([values]):
            for name, value in other.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by the sum over all processes. A missing gradient counts as zero."""
        if self.count == 1:
            return
        import torch

        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` with those of the main process."""
        if self.count > 1:
            import torch

            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, src=0)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.any(False)


def _gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, process by process."""
    from accelerate.utils import gather_object

    found: list[Any] = gather_object(items)
    return found
