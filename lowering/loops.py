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
from fxfuse.patterns.record import Record, Stream

REFERENCES: dict[str, Callable[..., Any]] = {
    "norm_rope": reference.norm_rope,
    "norm_rope_store_": reference.norm_rope_store_,
    "project_norm_rope_store_": reference.project_norm_rope_store_,
}


# What a table gives by position is loaded by every head: choosing and gathering it once is cheaper.
LOOKUPS = frozenset({torch.ops.aten.index.Tensor})

# Where cos and sin, and what k is or is made of, stand among the ops' arguments.
_TABLES = {"norm_rope": slice(8, 10), "norm_rope_store_": slice(9, 11)}
_TABLES |= {"project_norm_rope_store_": slice(13, 15)}
_K = {"norm_rope": 1, "norm_rope_store_": 1, "project_norm_rope_store_": 2}


def lower(name: str, args: tuple[Any, ...], record: Record) -> tuple[Any, Any]:
    """Results of fxfuse::<name> on boxes, as loops."""

    def run(*tensors: Any) -> Any:
        return REFERENCES[name](*tensors[:-1], record)

    # Tables in memory, or every layer would compute their sines again.
    for table in (n for n in args[_TABLES[name]] if n is not None):
        inductor.written(table)
    q_row, k_row = inductor.lower_graph(inductor.traced(run).graph, args, LOOKUPS)
    q, k = args[0], args[_K[name]]
    k_kept = k is not None and record.k is not None and record.k.keep
    q_out = _in_order(q_row, record.q)
    if not k_kept or record.k is None:
        return q_out, inductor.empty(q, (0,), q.get_dtype())
    return q_out, _in_order(k_row, record.k)


def _in_order(row: Any, stream: Stream) -> Any:
    # Realised once, or every reader of the result would compute norm and rotation again.
    if not stream.heads_first:
        return inductor.written(row)
    order = (0, 2, 1, 3)
    return inductor.permuted(inductor.written(inductor.permuted(row, order)), order)
