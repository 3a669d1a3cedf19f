"""An operand of a launch: a tensor, or what Inductor holds for one."""

import dataclasses
from typing import Any

from torch import Tensor

# An int, or Inductor's symbolic expression of one.
Size = Any


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor, or what Inductor holds for one, with its shape, its strides in elements, and how
    many bytes an element has.
    """

    value: Any
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    itemsize: int

    @staticmethod
    def of(x: Tensor) -> "Operand":
        """A tensor as it is."""
        return Operand(x, tuple(x.shape), x.stride(), x.itemsize)

    def steps(self, dims: int) -> tuple[Size, ...]:
        """Strides of the leading dims, 0 where the operand is broadcast."""
        pairs = zip(self.shape[:dims], self.strides[:dims], strict=True)
        return tuple(0 if size == 1 else stride for size, stride in pairs)
