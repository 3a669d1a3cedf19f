"""Exported programs: the same passes over the ATen graph of `torch.export`.

In comes an ExportedProgram, out comes one with the sites fused, for AOTInductor or to be saved. The
lens reads Dynamo's graphs, so a copy of the program's graph is given what Dynamo notes on its
nodes; what the rewrite adds is written in ATen again.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from fxfuse.lowering import providers
from fxfuse.passes import fuse_graph
from fxfuse.patterns.value import Kind
from fxfuse.report import publish
from fxfuse.settings import Settings
from fxfuse.torch_private import copy_graph, overload_of, program_with, with_graph

if TYPE_CHECKING:
    from torch.export import ExportedProgram

aten = torch.ops.aten
REGION = torch.ops.higher_order.wrap_with_set_grad_enabled

# What a program's own tensors hold, by torch.export's name for them; an input of the user's is a
# table where it holds integers.
KINDS = {"PARAMETER": Kind.WEIGHT, "BUFFER": Kind.TABLE, "CONSTANT_TENSOR": Kind.TABLE}


def fuse(program: "ExportedProgram", **settings: Any) -> "ExportedProgram":
    """An exported program with its attention preludes fused, for AOTInductor.

    Example:
        with torch.no_grad():
            program = torch.export.export(model, (input_ids,))
            program = fxfuse.fuse(program)
        torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")

    The package runs where fxfuse is not installed. Under torch.no_grad() the program is taken for
    inference; else norm and RoPE keep their gradients, stores stay the program's, and regions
    without gradients, where transformers makes its tables, are not read. Keywords are those of
    `Settings`; the report is `last_report()`. The program may be saved, run and exported further as
    any other; where it is not compiled, its fused ops need `import fxfuse`.

    Mutates: nothing; a program with nothing to fuse comes back as it is.
    Errors: FxfuseError for a wrong setting, or a refusal under strict=True.
    """
    chosen, kinds = Settings(**settings), _kinds(program)
    given = _as_dynamos(program)
    fused, report = fuse_graph(given, chosen, lambda node: kinds[node.name])
    if given.graph.find_nodes(op="call_function", target=REGION):
        report.notes.append(
            "a region of its own grad mode is not read: call fxfuse.fuse under torch.no_grad()"
        )
    publish(report)
    if not report.fused:
        return program
    # Inductor's lowering of the ops, which whoever compiles the program asks for.
    providers.register()
    return program_with(program, _in_aten(fused))


def _kinds(program: "ExportedProgram") -> dict[str, Kind]:
    """What each input of the program's graph holds, by the name of its node."""
    specs = program.graph_signature.input_specs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    found = {
        node.name: KINDS.get(spec.kind.name) or _given(node)
        for node, spec in zip(inputs, specs, strict=True)
    }
    return found | {n.name: Kind.TABLE for n in program.graph.nodes if n.op == "get_attr"}


def _given(node: fx.Node) -> Kind:
    value = node.meta.get("val")
    is_data = isinstance(value, torch.Tensor) and value.is_floating_point()
    return Kind.DATA if is_data else Kind.TABLE


def _as_dynamos(program: "ExportedProgram") -> fx.GraphModule:
    """A copy of the program's graph whose nodes have their example values where Dynamo's have them.

    Checks of metadata that the graph's own metadata shows to hold are left out: they would read
    what a site computes no more.
    """
    graph, _ = copy_graph(program.graph)
    if not torch.is_grad_enabled():
        _inline_regions_without_gradients(program.graph_module, graph)
    for node in graph.nodes:
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    return with_graph(program.graph_module, graph)


def _inline_regions_without_gradients(gm: fx.GraphModule, graph: fx.Graph) -> None:
    """`with torch.no_grad()` is a graph of its own in a program that was exported with gradients;
    transformers has its tables there.
    """
    for node in graph.find_nodes(op="call_function", target=REGION):
        enabled, held, *operands = cast(tuple[Any, ...], node.args)
        body = getattr(gm, held.target).graph
        if enabled or body.find_nodes(op="get_attr"):
            continue
        given = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            results = cast(tuple[fx.Node, ...], graph.graph_copy(body, given))
        for part in list(node.users):
            part.replace_all_uses_with(results[cast(int, part.args[1])])
            graph.erase_node(part)
        graph.erase_node(node)
        if not held.users:
            graph.erase_node(held)


def _in_aten(gm: fx.GraphModule) -> fx.GraphModule:
    """The rewritten graph, its methods and functions as ATen ops, its metadata as export has it."""
    for node in gm.graph.nodes:
        example = node.meta.pop("example_value", None)
        if "val" not in node.meta and example is not None:
            node.meta["val"] = example
        name = _name(node)
        if name is None:
            continue
        if name == "float":
            name, node.args = "to", (*node.args, torch.float32)
        values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.op, node.target = "call_function", overload_of(name, *values)
    gm.graph.lint()
    gm.recompile()
    return gm


def _name(node: fx.Node) -> str | None:
    """The name of the ATen op that a method, or a function of torch, stands for."""
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "")
    return name if getattr(torch, name, None) is node.target else None
