"""Every touch of a private torch API by the graph side of fxfuse, in one place.

Tried on torch 2.11, 2.13 and 2.15 (lazy graph modules on the last two). The lowering side has its
own such module, fxfuse.lowering.inductor.
"""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The fake mode Dynamo traced under: the one its example values belong to."""
    for node in gm.graph.nodes:
        example = node.meta.get("example_value")
        if isinstance(example, FakeTensor):
            return example.fake_mode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph with what Dynamo notes on its nodes, and the new node of each old one."""
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new = nodes[node] = copied.node_copy(node, nodes.__getitem__)
        if hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source
    return copied, nodes


def with_graph(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module like gm over another graph: the same parameters, and all that Dynamo notes on the
    module. As Dynamo's own, it writes its code where that is run, which Inductor does not do.
    """
    with _use_lazy_graph_module(True):
        module = _make_graph_module(gm, graph)
    module.meta = dict(gm.meta)
    for name, attribute in gm.__dict__.items():
        module.__dict__.setdefault(name, attribute)
    return module


def program_with(program: "ExportedProgram", gm: fx.GraphModule) -> "ExportedProgram":
    """The program over another graph of the same inputs and outputs; torch verifies it."""
    from torch.fx.passes.infra.pass_base import PassResult

    return program._transform_do_not_use(lambda _: PassResult(gm, True))


def overload_of(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> OpOverload:
    """The ATen op that a method call is, by its schemas."""
    overload = torch._C._jit_resolve_packet(f"aten::{name}", *args, **kwargs)
    found: OpOverload = getattr(getattr(torch.ops.aten, name), overload)
    return found


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
    gm = node.graph.owning_module
    shape_env = fake_mode_of(gm).shape_env if gm is not None else None
    assert shape_env is not None
    return shape_env.create_symintnode(expression, hint=None)


def are_guarded(gm: fx.GraphModule) -> bool:
    """Whether Dynamo compiles a graph now: guards on its sizes are checked before each run."""
    context = torch._guards.TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    return mode is not None and mode.shape_env is fake_mode_of(gm).shape_env is not None


def guard_equal(node: fx.Node, size: Any, other: Any, least: int) -> bool:
    """Guard that two sizes are equal, where they are in this run and the other one is never below
    least; whether they are now known to be.
    """
    a, b = (x if isinstance(x, int) else symint_of(node, x) for x in (size, other))
    seen = [_seen(x) for x in (a, b)]
    if None in seen or seen[0] != seen[1]:
        return False
    if isinstance(b, torch.SymInt) and b.node.shape_env.bound_sympy(other).lower < least:
        return False
    return bool(a == b)


def _seen(size: int | torch.SymInt) -> int | None:
    """What a size is in this run, None where nobody has seen it."""
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else None


def storage_key(t: torch.Tensor) -> int:
    """Equal for two tensors exactly when they share a storage (while both live)."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return int(t.untyped_storage()._cdata)


def is_mapped(t: torch.Tensor) -> bool:
    """Whether a tensor is one row, or more, of a vmap: its shape leaves out axes that it has."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t))


def is_wrapped(t: Any) -> bool:
    """Whether a tensor is of a class that stands for other tensors: quantised, sharded."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(t))


def source_name(node: fx.Node) -> str:
    """Where Dynamo found an input, as `L['self']._modules['rotary_emb']._buffers['inv_freq']`;
    empty if unknown.
    """
    argument = node.meta.get("grapharg")
    source = getattr(argument, "_source", None) or getattr(argument, "source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)


def keeps_rounding_points() -> bool:
    """Whether Inductor was told to round wherever the eager graph rounds."""
    import torch._inductor.config as inductor_config

    return bool(inductor_config.emulate_precision_casts)


def inductor_passes() -> dict[str, Any]:
    """The passes that are entered into Inductor's config, by the names of its fields."""
    config: Any = importlib.import_module("torch._inductor.config")
    names = [n for n in config._config if "custom" in n and n.endswith(("_pass", "_passes"))]
    return {name: found for name in names if (found := getattr(config, name, None))}


def inductor_cache_folder() -> str:
    """Where Inductor keeps what it compiled; the folder is made."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def empty_caches() -> contextlib.AbstractContextManager[Any]:
    """Inside, Inductor's caches are empty, in a folder that goes away with the end."""
    from torch._inductor.utils import fresh_cache

    caches: contextlib.AbstractContextManager[Any] = fresh_cache()
    return caches


def compile_with_inductor(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    mode: str | None,
    options: dict[str, Any] | None,
    tag: str,
) -> Any:
    """Inductor's compile of a Dynamo graph; `tag` enters the key of every cache entry, of forward
    and backward.

    mode and options are checked by torch's own wrapper, as for backend="inductor".
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    make_wrapper: Any = torch._TorchCompileInductorWrapper
    wrapper = make_wrapper(mode, options, None)

    def inner_compile(*args: Any, **kwargs: Any) -> Any:
        with _tagged(tag):
            return compile_fx_inner(*args, **kwargs)

    with _tagged(tag):
        return compile_fx(
            gm, example_inputs, inner_compile=inner_compile, config_patches=wrapper.config
        )


@contextlib.contextmanager
def _tagged(tag: str) -> Iterator[None]:
    compiler_config: Any = importlib.import_module("torch.compiler.config")

    old = compiler_config.cache_key_tag
    if tag in old:
        yield
        return
    with compiler_config.patch(cache_key_tag=f"{old}+{tag}" if old else tag):
        yield


def default_backend() -> Any:
    """What torch.compile takes where no backend is named."""
    from torch._dynamo.backends import registry

    get = getattr(registry, "get_default_backend", None)
    return "inductor" if get is None else get()


def compile_with(name: str, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
    """torch's own eager or aot_eager backend."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)(gm, example_inputs)


def reset_inductor() -> None:
    """What torch.compiler.reset() asks of an Inductor backend."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    wrapper(None, None, None).reset()
