"""Everything of Inductor's inside that fxfuse touches when it lowers its ops, in this one module.

Tried on torch 2.11 and 2.13; 2.11 to 2.15 by their sources. What differs between them is said where
it is handled. Boxes (Inductor's TensorBox) come in and go out; sizes are ints or sympy expressions.
"""

import inspect
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse.lowering.launch import Launch
from fxfuse.lowering.operand import Operand, Size

# Inductor's TensorBox; torch gives these no stable type.
Box = Any


def register_op(op: Any, lower: Callable[..., Any]) -> None:
    """Lower calls of `op` by `lower`, which takes boxes where the op takes tensors."""
    register_lowering(op, type_promotion_kind=None)(lower)


def is_memory(box: Box) -> bool:
    """Whether the box is a buffer or a strided view of one, so that a kernel can write to it."""
    return bool(ir.is_storage_and_layout(box))


def operand(box: Box) -> Operand:
    """The box as memory with settled strides; copied only where it is no view of memory."""
    realized = ir.ExternKernel.realize_input(box)
    # A buffer may still change its strides after we have read them.
    realized.freeze_layout()
    value = realized if isinstance(realized, ir.TensorBox) else ir.TensorBox(realized)
    return Operand(
        value, sizes(value.get_size()), sizes(value.get_stride()), value.get_dtype().itemsize
    )


def contiguous_operand(box: Box) -> Operand:
    return operand(ir.ExternKernel.require_contiguous(box))


def sizes(exprs: Sequence[Any]) -> tuple[Size, ...]:
    """Numbers as ints, everything else as it is."""
    return tuple(int(e) if getattr(e, "is_number", True) else e for e in exprs)


def hint(size: Size) -> int:
    """A guess of a size for choosing between kernels; it adds no guard."""
    # 2.11 has size_hint, which later versions dropped.
    sizevars: Any = V.graph.sizevars
    if hasattr(sizevars, "optimization_hint"):
        return int(sizevars.optimization_hint(size, fallback=1))
    return int(sizevars.size_hint(size, fallback=1))


def permuted(box: Box, order: Sequence[int]) -> Box:
    return lowerings[torch.ops.aten.permute.default](box, list(order))


def empty(like: Box, shape: Sequence[Size], dtype: torch.dtype) -> Box:
    """Uninitialised dense memory on the box's device."""
    make = lowerings[torch.ops.aten.empty.memory_format]
    return make(list(shape), dtype=dtype, device=like.get_device())


def counters(like: Box) -> Box:
    """COUNTERS integers on the box's device, 0 when a run of the graph starts; one buffer for all
    kernels of a graph, each of which leaves them 0.
    """
    made = _counters.setdefault(V.graph, {})
    device = like.get_device()
    if device not in made:
        full = lowerings[torch.ops.aten.full.default]
        made[device] = written(full([COUNTERS], 0, dtype=torch.int32, device=device))
    return made[device]


COUNTERS = 1024
_counters: weakref.WeakKeyDictionary[Any, dict[Any, Box]] = weakref.WeakKeyDictionary()


def written(box: Box) -> Box:
    """The box with its values in memory from here on, so that no reader computes them again."""
    box.realize()
    return box


def launch(kernel: Any, plan: Launch) -> None:
    """Put a launch of a Triton kernel into the graph, as Inductor does for a user's own kernel."""
    from torch._higher_order_ops.triton_kernel_wrap import (
        kernel_side_table,
        triton_kernel_wrapper_mutation,
    )

    lower = lowerings[triton_kernel_wrapper_mutation]
    # 2.15 added launch_kwargs without a default.
    extra = (
        {"launch_kwargs": None} if "launch_kwargs" in inspect.signature(lower).parameters else {}
    )
    lower(
        kernel_idx=kernel_side_table.add_kernel(kernel),
        constant_args_idx=kernel_side_table.add_constant_args(plan.constants),
        grid=[(*plan.grid, 1)],
        tma_descriptor_metadata={},
        kwargs={name: _wide(x) for name, x in plan.arguments.items()},
        **extra,
    )


def call(op: Any, args: Sequence[Any]) -> Any:
    """Put a call of an op into the graph, which Inductor does not look into. A cache that it writes
    to must be memory.
    """
    handler: Any = fallback_handler
    return handler(op, add_to_fallback_set=False)(*args)


def _wide(x: Any) -> Any:
    """Integers of more than 32 bits as sympy's: 2.11 asks their methods of them."""
    return sympy.Integer(x) if isinstance(x, int) and abs(x) >= 2**31 else x


def traced(function: Callable[..., Any]) -> fx.GraphModule:
    """The node being lowered as ATen calls: `function` traced on its fake arguments."""
    with V.fake_mode:
        return make_fx(function, select_decomp_table(), tracing_mode="real")(*fakes())


def fakes() -> tuple[Any, ...]:
    """The arguments of the node being lowered, tensors as fakes."""
    node = V.graph.current_node
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert not kwargs, "fxfuse ops are called by position"
    return tuple(args)


def lower_graph(
    graph: fx.Graph, args: Sequence[Any], in_memory: frozenset[Any] = frozenset()
) -> Any:
    """Run a traced graph on boxes, each call through Inductor's lowering of it; results of the ops
    `in_memory` are written once for all their readers.
    """
    env: dict[fx.Node, Any] = {}
    remaining = iter(args)
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(remaining)
            continue
        node_args, node_kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "output":
            return node_args[0]
        # Some lowerings (cat) read the result's shape from the node they believe to be lowering.
        with V.graph.set_current_node(node):
            env[node] = _lowering_of(node)(*node_args, **node_kwargs)
        if node.target in in_memory:
            written(env[node])
    raise AssertionError("a traced graph ends in its output")


def _lowering_of(node: fx.Node) -> Callable[..., Any]:
    assert node.op == "call_function", node.format_node()
    # Arithmetic on sizes is Python's own, on sympy expressions.
    if getattr(node.target, "__module__", None) == operator.__name__ or node.target in _SIZES:
        return node.target  # type: ignore[return-value]
    lower: Callable[..., Any] = lowerings[node.target]
    return lower


_SIZES = (torch.sym_max, torch.sym_min)
