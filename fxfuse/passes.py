"""The way of one graph: lens, read, plan (decode and prove), rewrite; with a report, and never an
error of ours.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import fx

from fxfuse.checkpointed import checkpointed, with_bodies
from fxfuse.functional import without_own_writes
from fxfuse.garbage import collected_later
from fxfuse.implied import guarded
from fxfuse.lens import look
from fxfuse.lowering import gate
from fxfuse.lowering.arch import arch_of
from fxfuse.lowering.providers import Choice, Facts, choose, named
from fxfuse.patterns.plan import plan
from fxfuse.patterns.read import read
from fxfuse.patterns.record import GroupedHeads
from fxfuse.patterns.site import AnyRecord, Decoded, Gate, GroupedSite, NormSite, Site
from fxfuse.patterns.value import Kind
from fxfuse.report import Report, fused_group, fused_norm, fused_of
from fxfuse.rewrite import rewrite
from fxfuse.settings import FxfuseError, Settings, is_disabled
from fxfuse.slots import Slot
from fxfuse.torch_private import keeps_rounding_points, source_name

log = logging.getLogger(__name__)
_warned: set[str] = set()
KindOf: TypeAlias = Callable[[fx.Node], Kind]
GRADIENTS = (
    "gradients are needed: norm and RoPE are fused with their gradients, cache writes stay the "
    "model's; for inference compile under torch.no_grad()"
)

# Stages whose refusal leaves a rotation fused, or is about none.
NO_ROTATION = ("store", "cut", "norm", "grouped_heads", "decode_attention", "projection")


def fuse_graph(
    gm: fx.GraphModule, settings: Settings, kinds: KindOf | None = None
) -> tuple[fx.GraphModule, Report]:
    """The graph with its sites fused, and the report. A graph that cannot be read comes back as it
    is. `kinds` says what an input holds where the graph is not Dynamo's.
    """
    report = Report(graphs=1)
    try:
        with _timed(report, "fxfuse"), collected_later():
            fused = _fuse(gm, settings, report, kinds or kind_of)
            if settings.checks_sites():
                fused = _watched(fused)
    except FxfuseError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _warn_once(f"the graph goes to the compiler as it came: {reason}")
        log.debug("fxfuse failed", exc_info=True)
        report.fused.clear()
        report.notes.append(f"not fused, an error of fxfuse: {reason}")
        return gm, report
    log.debug("%s", report)
    refused = [r for r in report.refused if r.stage not in NO_ROTATION]
    if settings.strict and refused:
        raise FxfuseError(
            "fxfuse: strict=True and a rotation was not fused:\n"
            + "\n".join(f"  {r.explained('  ')}" for r in refused)
            + "\nfuse it by changing the model's spelling there, or compile with strict=False"
        )
    return fused, report


def _fuse(
    gm: fx.GraphModule,
    settings: Settings,
    report: Report,
    kinds: KindOf,
    training: bool = False,
) -> fx.GraphModule:
    """The graph with its sites fused, or the graph itself; so for its checkpointed bodies, for
    which `training` says whether the graph around them needs gradients.
    """
    if reason := _reason_to_leave(settings):
        report.notes.append(reason)
        return gm
    training |= torch.is_grad_enabled() and any(_requires_grad(n) for n in gm.graph.nodes)
    given = gm
    with _timed(report, "lens"):
        view = look(gm)
        if "store" not in settings.disable and not training and guarded(gm, view):
            view = look(gm)
        if not training and (functional := without_own_writes(gm, view)) is not None:
            gm, view = functional, look(functional)
    with _timed(report, "read"):
        reading = read(view, placeholder_kinds(gm, kinds))
    with _timed(report, "plan"):
        planned = plan(
            reading,
            store="store" not in settings.disable,
            training=training,
            gate=_gate(settings),
        )
    for bug in planned.disproved:
        log.error("fxfuse: a proof failed, the site is left alone (please report this): %s", bug)
    report.refused += planned.refusals
    report.left += planned.left
    if training and planned.sites and GRADIENTS not in report.notes:
        report.notes.append(GRADIENTS)
    fused = given
    if planned.sites or planned.norms or planned.groups:
        with _timed(report, "rewrite"):
            fused = rewrite(gm, view, planned)
        report.fused += [
            fused_of(x, _provider(x, settings), _gain(x, settings)) for x in planned.sites
        ]
        report.fused += [fused_norm(x, _norm_provider(x, settings)) for x in planned.norms]
        report.fused += [
            fused_group(x, _group_provider(x, settings), _gain(x, settings)) for x in planned.groups
        ]
    bodies = {}
    for name, body, its_kinds in checkpointed(gm, reading):
        new = _fuse(body, settings, report, its_kinds, training)
        if new is not body:
            bodies[name] = new
    return with_bodies(fused, bodies) if bodies else fused


def _watched(gm: fx.GraphModule) -> fx.GraphModule:
    from fxfuse.debug import watched

    return watched(gm)


def _gate(settings: Settings) -> Gate:
    """Why the settings, or the gate's table, leave a site to the compiler."""

    def reason(kind: str, slot: Slot, rows: int | None, record: AnyRecord | None) -> str:
        # With one query, too, repeated heads stay where they are to stay.
        stages = ("grouped_heads", kind) if kind == "decode_attention" else (kind,)
        if not set(stages).isdisjoint(settings.disable):
            return "disabled by settings"
        if kind == "projection" and settings.checks_sites():
            return "debug mode checks q, k and v as they are projected"
        target = slot.device.type
        if why := gate.forbidden(target, kind, rows):
            return why
        if settings.gate != "auto":
            return "" if settings.gate == "always" else "gate='never'"
        decision = gate.decide(target, kind, gate.Facts(rows, record, arch_of(slot.device)))
        return "" if decision.fuse else f"{decision.reason} (target {target})"

    return reason


def _gain(site: Site | GroupedSite, settings: Settings) -> float | None:
    """How much faster than Inductor's own code the gate expects a site to be."""
    if settings.compiler != "inductor":
        return None
    facts = gate.Facts(site.rows, site.record, arch_of(site.device))
    return gate.decide(site.target, site.kind, facts).gain


def _reason_to_leave(settings: Settings) -> str:
    if is_disabled():
        return "nothing is fused: compiled inside fxfuse.disabled()"
    if "attention" in settings.disable:
        return "disabled by settings"
    if settings.numerics == "graph" or keeps_rounding_points():
        return (
            "nothing is fused: the graph's own rounding points are asked for (numerics='graph' or "
            "Inductor's emulate_precision_casts), and the fused kernels round once"
        )
    return ""


REFERENCE = Choice("reference", ())


def _choice(facts: Facts, settings: Settings) -> Choice:
    """Who computes a site: compiled, or in eager code as `fxfuse.ops.launched` has it."""
    device_type = facts.device.type if facts.device else "cpu"
    if settings.compiler == "inductor":
        return choose(device_type, facts)
    return Choice("triton", ()) if device_type == "cuda" and named("triton", facts) else REFERENCE


def _provider(site: Site, settings: Settings) -> Choice:
    def size(stream: Decoded | None, row: int) -> int | None:
        if stream is None:
            return None
        dim = stream.rows[row]
        found = 1 if dim is None else stream.value.shape[dim]
        return found if isinstance(found, int) else None

    streams = {"q": site.q, "k": site.k, "v": site.v}
    heads = tuple(size(stream, 2) for stream in streams.values())
    if site.k is not None and site.is_single():
        heads = (0, *heads[1:])
    dtypes = {n: s.x.leaf.dtype.to_real() for n, s in streams.items() if s is not None}
    if site.projection is not None:
        weights = zip(("q_proj", "k_proj", "v_proj"), site.projection.weights, strict=False)
        made = (("x", site.projection.x), ("residual", site.projection.residual), *weights)
        dtypes = {n: w.leaf.dtype for n, w in made if w is not None}
    caches = {"k_cache": site.k_store, "v_cache": site.v_store}
    dtypes |= {name: store.cache.dtype for name, store in caches.items() if store is not None}
    device = site.q.slot.device
    return _choice(Facts(site.record, heads, size(site.q, 0), (), dtypes, device), settings)


def _norm_provider(site: NormSite, settings: Settings) -> Choice:
    leaves, slot = [a.leaf for a in site.addends], site.normed.slot
    weight = site.normed.weight
    named = dict(zip(("x", "residual", "second"), leaves, strict=False))
    named |= {"weight": weight.leaf} if weight else {}
    dtypes = {name: leaf.dtype for name, leaf in named.items()}
    shape = tuple(size if isinstance(size, int) else None for size in slot.shape)
    return _choice(Facts(site.record, (), None, shape, dtypes, slot.device), settings)


def _group_provider(site: GroupedSite, settings: Settings) -> Choice:
    """Grouped heads are read by torch's own attention."""
    record, query = site.record, site.query
    if isinstance(record, GroupedHeads):
        return Choice("torch", ())
    dtypes = {"q": query.dtype, "k": site.key.slot.dtype, "v": site.value.slot.dtype}
    batch = query.shape[0] if isinstance(query.shape[0], int) else None
    return _choice(Facts(record, batch=batch, dtypes=dtypes, device=site.device), settings)


def placeholder_kinds(gm: fx.GraphModule, kinds: KindOf) -> dict[fx.Node, Kind]:
    """What each input of the graph holds."""
    return {n: kinds(n) for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")}


def kind_of(node: fx.Node) -> Kind:
    """What an input of Dynamo's graph holds: a parameter, data, or a table: positions, whatever a
    module keeps, and complex numbers, which are taken for turns.
    """
    example = node.meta.get("example_value")
    if isinstance(example, torch.nn.Parameter):
        return Kind.WEIGHT
    if isinstance(example, torch.Tensor) and not example.is_floating_point():
        return Kind.TABLE
    source = source_name(node)
    held = "_buffers" in source or "_modules" in source or source.startswith("L['self'].")
    return Kind.TABLE if held else Kind.DATA


def _requires_grad(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    return node.op == "placeholder" and isinstance(example, torch.Tensor) and example.requires_grad


@contextmanager
def _timed(report: Report, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    spent = 1e3 * (time.perf_counter() - start)
    report.milliseconds[stage] = report.milliseconds.get(stage, 0.0) + spent


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        log.warning("fxfuse: %s", text)
