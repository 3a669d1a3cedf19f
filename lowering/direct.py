"""One launch of the kernel on tensors, without Inductor: what tuning times and tests check.

In come a record and tensors by the names of the op's arguments, with q_out and k_out to write to.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from fxfuse.lowering import launch
from fxfuse.lowering.operand import Operand
from fxfuse.lowering.tiles import Tile
from fxfuse.patterns.record import Record


def planned(
    record: Record,
    tensors: Mapping[str, Tensor | None],
    eps: tuple[float, float],
    target: str = "",
    tile: Tile | None = None,
) -> launch.Launch:
    """The launch for tensors as they are."""
    operands = {name: Operand.of(x) for name, x in tensors.items() if x is not None}
    tokens = operands["q"].shape[1]
    return launch.plan(record, operands, eps, tokens, target, tile)


def prepared(plan: launch.Launch) -> Callable[[], None]:
    """A function that launches the plan on the current stream."""
    kernel = launch.kernel_of(plan.kernel)
    grid, options = (*plan.grid, 1), {"num_warps": plan.warps, "num_stages": 1}

    def run() -> None:
        kernel[grid](**plan.arguments, **plan.constants, **options)

    return run
