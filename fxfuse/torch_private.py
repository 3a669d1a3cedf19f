"""Every touch of a private torch API by the graph side of fxfuse, in one place.

Tried on torch 2.11 and 2.13. The lowering side has its own such module, fxfuse.lowering.inductor.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The fake mode Dynamo traced under: the one its example values belong to."""
    for node in gm.graph.nodes:
        example = node.meta.get("example_value")
        if isinstance(example, FakeTensor):
            return example.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


@contextlib.contextmanager
def without_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Whatever is decided about sizes inside adds no guard to the user's graph."""
    with contextlib.ExitStack() as stack:
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
        yield


def size_of(size: Any) -> Any:
    """A size as an int or a sympy expression, without a guard."""
    if isinstance(size, (torch.SymInt, torch.SymBool)):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return size


def symint_of(node: fx.Node, expression: Any) -> Any:
    """The SymInt of a size expression in the shape environment of a node's example value."""
    shape_env = fake_mode_of(node.graph.owning_module).shape_env
    assert shape_env is not None
    return shape_env.create_symintnode(expression, hint=None)


def storage_key(t: torch.Tensor) -> int:
    """Equal for two tensors exactly when they share a storage (while both live)."""
    return int(t.untyped_storage()._cdata)
