"""Several processes, one run: each has the whole model and a share of the work, and all agree on everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's place among `count`; every method but `mine` must be called by all of them together.

    One process needs no communication. Several belong to an `accelerate.Accelerator` that exists.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def started(cls, *, cpu: bool) -> Self:
        """The processes that torchrun or accelerate started, ready to talk to each other; without them, one process."""
        from accelerate import PartialState

        state = PartialState(cpu=cpu)
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and reports."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th of the items, beginning with the `rank`-th."""
        return items[self.rank :: self.count]

    def everyones(self, mine: Sequence[T]) -> list[T]:
        """The inverse of `mine`: all items in their order, once each process has dealt with its share."""
        if self.count == 1:
            return list(mine)
        numbered = [(self.rank + i * self.count, item) for i, item in enumerate(mine)]
        return [item for _, item in sorted(_gathered(numbered), key=lambda pair: pair[0])]

    def any(self, flag: bool) -> bool:
        """Whether it holds in some process."""
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
        """Replace each gradient by the sum over all processes; none counts as zero."""
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
        """Return once all processes are here."""
        self.any(False)


def _gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, process by process."""
    from accelerate.utils import gather_object

    found: list[Any] = gather_object(items)
    return found
