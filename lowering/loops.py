"""The loop provider: the reference of an op, traced to ATen, through Inductor's own lowerings.

In come the boxes of one op call; out come the boxes of its results. Inductor's scheduler then fuses
the loops as it fuses any model's, in C++ on a CPU. Caches are written in place, by the lowering of
index_put_.
"""

from collections.abc import Callable
from typing import Any

import torch

from fxfuse import reference
from fxfuse.lowering import inductor
from fxfuse.lowering.providers import arguments
from fxfuse.patterns.record import Record, Stream

REFERENCES: dict[str, Callable[..., Any]] = {
    "norm_rope": reference.norm_rope,
    "norm_rope_store_": reference.norm_rope_store_,
    "project_norm_rope_store_": reference.project_norm_rope_store_,
}


# What a table gives by position is loaded by every head: choosing and gathering it once is cheaper.
LOOKUPS = frozenset({torch.ops.aten.index.Tensor})


def lower(name: str, args: tuple[Any, ...], record: Record) -> tuple[Any, ...]:
    """Results of fxfuse::<name> on boxes, as loops."""

    def run(*tensors: Any) -> Any:
        return REFERENCES[name](*tensors[:-1], record)

    # Tables in memory, or every layer would compute their sines again.
    call = dict(zip(arguments(name), args, strict=True))
    for table in (call["cos"], call["sin"]):
        if table is not None:
            inductor.written(table)
    q_row, k_row, *sums = inductor.lower_graph(inductor.traced(run).graph, args, LOOKUPS)
    q_out = _in_order(q_row, record.q)
    has_k = call["k_proj" if record.projected else "k"] is not None
    if has_k and record.k is not None and record.k.keep:
        k_out = _in_order(k_row, record.k)
    else:
        k_out = _nothing(args[0])
    return q_out, k_out, *(_nothing(args[0]) if x is None else inductor.written(x) for x in sums)


def _nothing(like: Any) -> Any:
    return inductor.empty(like, (0,), like.get_dtype())


def _in_order(row: Any, stream: Stream) -> Any:
    # Realised once, or every reader of the result would compute norm and rotation again.
    if not stream.heads_first:
        return inductor.written(row)
    order = (0, 2, 1, 3)
    return inductor.permuted(inductor.written(inductor.permuted(row, order)), order)
