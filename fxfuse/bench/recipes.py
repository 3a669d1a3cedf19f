"""The recipes: which chain over which shapes, and inputs drawn for it.

A Case is one row to be timed. `draw` makes the arguments of one call, `chain` the module; nothing
here knows who runs it.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fxfuse.bench import chains, shapes
from fxfuse.bench.shapes import Shape
from fxfuse.settings import Gate

TABLE_ROWS = 131072
ROPE_BASE = 1e4


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a recipe at a shape, T tokens and a layout, with the stages that should fuse."""

    recipe: str
    shape: Shape
    tokens: int
    layout: str
    stages: str


@dataclasses.dataclass
class Inputs:
    """The arguments of one call.

    args     in the order of the chain's forward
    caches   those of args that are written, at `slots` along `axis`
    gathered bytes that are read through a lookup, beyond what args hold
    by_slot  what gives each cache as [slots, ...], where its axes are others
    """

    args: tuple[Tensor, ...]
    caches: tuple[Tensor, ...] = ()
    slots: Tensor | None = None
    axis: int = 0
    gathered: int = 0
    by_slot: tuple[Callable[[Tensor], Tensor], ...] = ()

    def moved_bytes(self, outputs: tuple[Tensor, ...]) -> int:
        """Each input read once, each output and each row of a cache written once."""
        caches = {id(c) for c in self.caches}
        moved = [*outputs, *(x for x in self.args if id(x) not in caches)]
        rows = 0 if self.slots is None else self.slots.numel()
        stored = sum(c.nbytes // c.shape[self.axis] * rows for c in self.laid_by_slot())
        return sum(x.numel() * x.element_size() for x in moved) + stored + self.gathered

    def laid_by_slot(self) -> tuple[Tensor, ...]:
        """The caches with their slots along `axis`."""
        if not self.by_slot:
            return self.caches
        return tuple(f(c) for f, c in zip(self.by_slot, self.caches, strict=True))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One recipe; `chains` names its layouts, the first of them the default.

    gate   of the fxfuse that runs it: "always" where by itself it would leave the chain to Inductor
    first  stages in front of the norm
    alone  those in their place for one token
    """

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    chains: dict[str, type[chains.Chain]]
    looks_up: bool
    store: bool
    draw: Callable[[Case, str, torch.Generator], Inputs]
    gate: Gate = "auto"
    first: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


def _normal(device: str, generator: torch.Generator) -> Callable[..., Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    return draw


def _draw_prelude(case: Case, device: str, generator: torch.Generator) -> Inputs:
    shape, t = case.shape, case.tokens
    draw = _normal(device, generator)
    repeats = 2 if shape.rotation == "half" else 1
    angle = torch.randn(1, t, shape.rotary // 2, generator=generator, device=device)
    angle = angle.repeat(1, 1, repeats)
    widths = [sum(shape.widths())] if case.layout == "packed" else shape.widths()
    slot_count = max(1024, t + 64)
    start = (slot_count - t) // 2
    slots = torch.arange(start, start + t, device=device)
    caches = tuple(draw(1, shape.kv_heads, slot_count, shape.head_dim) for _ in range(2))
    args = (*(draw(1, t, width) for width in widths), angle.cos().bfloat16())
    args = (*args, angle.sin().bfloat16(), slots, *caches)
    return Inputs(args, caches, slots, axis=2)


def _draw_projected(case: Case, device: str, generator: torch.Generator) -> Inputs:
    """A row of a batch for each of the case's tokens, at one slot."""
    shape, batch = case.shape, case.tokens
    draw = _normal(device, generator)
    _, _, _, cos, sin, slots, *_ = _draw_prelude(
        dataclasses.replace(case, tokens=1, layout="separate"), device, generator
    ).args
    weights = (draw(width, shape.hidden) * shape.hidden**-0.5 for width in shape.widths())
    caches = tuple(draw(batch, shape.kv_heads, 1024, shape.head_dim) for _ in range(2))
    args = (draw(batch, 1, shape.hidden), *weights, cos, sin, slots, *caches)
    return Inputs(args, caches, slots, axis=2)


def _draw_normed(case: Case, device: str, generator: torch.Generator) -> Inputs:
    inputs = _draw_projected(case, device, generator)
    x, *rest = inputs.args
    residual = _normal(device, generator)(*x.shape)
    return dataclasses.replace(inputs, args=(x, residual, *rest))


def _draw_norm_rope(case: Case, device: str, generator: torch.Generator) -> Inputs:
    shape, t = case.shape, case.tokens
    draw = _normal(device, generator)
    positions = torch.randint(TABLE_ROWS, (t,), generator=generator, device=device)
    size = (t, shape.heads, shape.head_dim)
    return Inputs((draw(*size), draw(*size), positions), gathered=4 * t * shape.rotary)


def _draw_packed(case: Case, device: str, generator: torch.Generator) -> Inputs:
    shape, t = case.shape, case.tokens
    qkv = _normal(device, generator)(t, sum(shape.widths()))
    # v is not read.
    gathered = 4 * t * shape.rotary - 2 * t * shape.widths()[2]
    return Inputs((qkv, torch.arange(t, device=device)), gathered=gathered)


def _draw_rope_store(case: Case, device: str, generator: torch.Generator) -> Inputs:
    shape, t = case.shape, case.tokens
    draw, d = _normal(device, generator), shape.head_dim
    slot_count = max(2048, 2 * t)
    slots = torch.randperm(slot_count, generator=generator, device=device)[:t]
    lead = () if case.layout == "flat" else (1,)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    qkv = [draw(*lead, t, n, d) for n in heads]
    positions = torch.arange(t, device=device).view(*lead, t)
    caches = tuple(draw(slot_count, shape.kv_heads, d) for _ in range(2))
    gathered = 4 * t * shape.rotary
    return Inputs((*qkv, positions, slots, *caches), caches, slots, gathered=gathered)


def _draw_paged(case: Case, device: str, generator: torch.Generator) -> Inputs:
    shape, t = case.shape, case.tokens
    g, d, page, x = shape.kv_heads, shape.head_dim, chains.PAGE, chains.SPLIT
    blocks = max(32, 2 * t // page)
    qkv = _normal(device, generator)(t, sum(shape.widths()))
    positions = torch.randint(TABLE_ROWS, (3, t), generator=generator, device=device)
    slots = torch.randperm(blocks * page, generator=generator, device=device)
    if case.layout == "shuffled":
        # As engines hand them out: pages in any order, a page's slots one after the other.
        pages = torch.randperm(blocks, generator=generator, device=device)
        slots = (pages[:, None] * page + torch.arange(page, device=device)).flatten()
    slots = slots[:t]
    scales = [torch.full((1,), s, device=device) for s in (0.02, 0.01)]
    sizes = ((blocks, g, d // x, page, x), (blocks, g, page // x, d, x))
    caches = tuple(
        torch.randint(100, s, generator=generator, device=device, dtype=torch.uint8) for s in sizes
    )
    by_slot = (chains.keys_by_slot, chains.values_by_slot)
    args = (qkv, positions, slots, *scales, *caches)
    # Pairs of all axes lie in every 32 bytes of a row, so that a row of each axis is read whole.
    gathered = len(positions) * 4 * t * shape.rotary
    return Inputs(args, caches, slots, gathered=gathered, by_slot=by_slot)


def _draw_qk_norm(case: Case, device: str, generator: torch.Generator) -> Inputs:
    return Inputs((_normal(device, generator)(case.tokens, sum(case.shape.widths())),))


def _draw_add_norm(case: Case, device: str, generator: torch.Generator) -> Inputs:
    draw = _normal(device, generator)
    return Inputs(tuple(draw(case.tokens, case.shape.hidden) for _ in range(2)))


def _draw_repeated(case: Case, device: str, generator: torch.Generator) -> Inputs:
    shape, t = case.shape, case.tokens
    batch, slots = (int(part) for part in case.layout.split("x"))
    draw = _normal(device, generator)
    q = draw(batch, shape.heads, t, shape.head_dim)
    k, v = (draw(batch, shape.kv_heads, slots, shape.head_dim) for _ in range(2))
    # Causal, in a cache that is three quarters full.
    last = 3 * slots // 4 - t + torch.arange(t, device=device)
    mask = torch.arange(slots, device=device) <= last[:, None]
    return Inputs((q, k, v, mask[None, None]))


LONG = (1, 16, 256, 4096, 16384)
# Sequences x slots.
CACHE_SIZES = ("1x1024", "1x4096", "1x512", "16x1024", "4x4096")
RECIPES = {
    "prelude": Recipe(
        shapes.PRELUDES,
        LONG,
        {"separate": chains.Prelude, "packed": chains.PackedPrelude},
        looks_up=False,
        store=True,
        draw=_draw_prelude,
    ),
    "projection": Recipe(
        shapes.PROJECTIONS,
        (1, 2, 4, 8, 16),
        {"separate": chains.Projected},
        looks_up=False,
        store=True,
        draw=_draw_projected,
        gate="always",
        first=("projection",),
    ),
    "input_norm": Recipe(
        shapes.PROJECTIONS,
        (1,),
        {"separate": chains.NormedProjected},
        looks_up=False,
        store=True,
        draw=_draw_normed,
        gate="always",
        first=("add", "rms_norm", "projection"),
    ),
    "diffusion": Recipe(
        shapes.DIFFUSION,
        (),
        {"flat": chains.NormRope},
        looks_up=True,
        store=False,
        draw=_draw_norm_rope,
    ),
    "rope_store": Recipe(
        shapes.ROPE_STORE,
        (*LONG, 32768),
        {"batched": chains.BatchedRopeStore, "flat": chains.RopeStore},
        looks_up=True,
        store=True,
        draw=_draw_rope_store,
    ),
    "packed": Recipe(
        shapes.PACKED,
        (1, 64, 256, 1024, 4096, 16384),
        {"packed": chains.PackedNormRope},
        looks_up=True,
        store=False,
        draw=_draw_packed,
    ),
    "mrope": Recipe(
        shapes.MROPES,
        (1, 64, 256, 4096, 32768),
        {"shuffled": chains.PagedMRope, "shuffled_random": chains.PagedMRope},
        looks_up=True,
        store=True,
        draw=_draw_paged,
    ),
    "qk_norm": Recipe(
        shapes.QK_NORMS,
        (1, 16, 256),
        {"packed": chains.PackedQkNorm},
        looks_up=False,
        store=False,
        draw=_draw_qk_norm,
        gate="always",
    ),
    "add_norm": Recipe(
        shapes.ADD_NORMS,
        (1, 256, 4096),
        {"rows": chains.AddNorm},
        looks_up=False,
        store=False,
        draw=_draw_add_norm,
        gate="always",
        first=("add",),
    ),
    "grouped_heads": Recipe(
        shapes.REPEATED,
        (1, 16, 256),
        {size: chains.RepeatedHeads for size in CACHE_SIZES},
        looks_up=False,
        store=False,
        draw=_draw_repeated,
        gate="always",
        first=("grouped_heads",),
        alone=("decode_attention",),
    ),
}
CPU_TOKENS = (1, 64, 1024)


def cases(
    recipe: str, device: str, tokens: list[int] | None, only: str = "", layout: str | None = None
) -> list[Case]:
    """The rows of a recipe; `only` is a part of a shape's name. On a CPU fewer tokens are usual."""
    entry = RECIPES[recipe]
    layout = layout or next(iter(entry.chains))
    found = []
    for shape in entry.shapes:
        if only.lower() not in shape.name.lower():
            continue
        usual = (shape.tokens or entry.tokens) if device == "cuda" else CPU_TOKENS
        for t in tokens or usual:
            found.append(Case(recipe, shape, t, layout, _stages(shape, entry, t)))
    return found


def _stages(shape: Shape, entry: Recipe, tokens: int) -> str:
    """The stages that a report names where the whole chain is fused."""
    norm = {"rms": ["rms_norm"], "gemma": ["rms_norm(1+w)"]}.get(shape.norm or "", [])
    rope = "rope(by position)" if shape.rotation in chains.LOOKED_UP else "rope"
    turn = [rope] if shape.rotation else []
    first = (entry.alone if tokens == 1 else ()) or entry.first
    return " + ".join([*first, *norm, *turn, *(["store(k,v)"] if entry.store else [])])


@functools.lru_cache(maxsize=2)
def rope_table(rotary: int, device: str) -> Tensor:
    """cos and sin by position, [rows, R] in float32: the halves of a row."""
    steps = torch.arange(0, rotary, 2, device=device, dtype=torch.float64)
    frequency = ROPE_BASE ** (-steps / rotary)
    angle = torch.arange(TABLE_ROWS, device=device)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def chain(case: Case, device: str) -> chains.Chain:
    """The module of a case, its weights the same in every run."""
    entry = RECIPES[case.recipe]
    table = rope_table(case.shape.rotary, device) if entry.looks_up else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = entry.chains[case.layout](case.shape, table)
    return module.to(device).eval()


def draw(case: Case, device: str, seed: int) -> Inputs:
    """Arguments of one call, fresh for each seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return RECIPES[case.recipe].draw(case, device, generator)
