"""Exported programs: the same passes over the ATen graph of `torch.export`.

In comes an ExportedProgram, out comes one with the sites fused, for AOTInductor or to be saved. The
lens reads Dynamo's graphs, so a copy of the program's graph is given what Dynamo notes on its
nodes; what the rewrite adds is written in ATen again.
"""

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fxfuse.lowering import providers
from fxfuse.passes import fuse_graph
from fxfuse.patterns.value import Kind
from fxfuse.report import publish
from fxfuse.settings import Settings
from fxfuse.torch_private import copy_graph, overload_of, program_with, with_graph

aten = torch.ops.aten

# What a program's own tensors hold; an input of the user's is a table where it holds integers.
KINDS = {
    InputKind.PARAMETER: Kind.WEIGHT,
    InputKind.BUFFER: Kind.TABLE,
    InputKind.CONSTANT_TENSOR: Kind.TABLE,
}


def fuse(program: ExportedProgram, **settings: Any) -> ExportedProgram:
    """An exported program with its attention preludes fused, for AOTInductor.

    Example:
        with torch.no_grad():
            program = torch.export.export(model, (input_ids,))
            program = fxfuse.fuse(program)
        torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")

    The package runs where fxfuse is not installed. Keywords are those of `Settings`; the report is
    `last_report()`. The program may be saved, run and exported further as any other; where it is
    not compiled, its fused ops need `import fxfuse`.

    Mutates: nothing; a program with nothing to fuse comes back as it is.
    Errors: FxfuseError for a wrong setting, or a refusal under strict=True.
    """
    chosen, kinds = Settings(**settings), _kinds(program)
    fused, report = fuse_graph(_as_dynamos(program), chosen, lambda node: kinds[node.name])
    publish(report)
    if not report.fused:
        return program
    # Inductor's lowering of the ops, which whoever compiles the program asks for.
    providers.register()
    return program_with(program, _in_aten(fused))


def _kinds(program: ExportedProgram) -> dict[str, Kind]:
    """What each input of the program's graph holds, by the name of its node."""
    specs = program.graph_signature.input_specs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    found = {
        node.name: KINDS.get(spec.kind) or _given(node)
        for node, spec in zip(inputs, specs, strict=True)
    }
    return found | {n.name: Kind.TABLE for n in program.graph.nodes if n.op == "get_attr"}


def _given(node: fx.Node) -> Kind:
    value = node.meta.get("val")
    is_data = isinstance(value, torch.Tensor) and value.is_floating_point()
    return Kind.DATA if is_data else Kind.TABLE


def _as_dynamos(program: ExportedProgram) -> fx.GraphModule:
    """A copy of the program's graph whose nodes have their example values where Dynamo's have them.

    Checks of metadata that the graph's own metadata shows to hold are left out: they would read
    what a site computes no more.
    """
    graph, nodes = copy_graph(program.graph)
    for node in nodes.values():
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    return with_graph(program.graph_module, graph)


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
