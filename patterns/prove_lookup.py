"""Prove: a lookup inside the op and the graph's own, on a small random table, must give the same.

The rows that the graph takes are gathered from the table and rearranged as their Value says; the
op's reference takes them by its record. Numbers come from a Generator of this module.
"""

import dataclasses

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.patterns.evaluate import evaluate
from fxfuse.patterns.prove import Disproved
from fxfuse.patterns.record import Record, Rotation
from fxfuse.patterns.site import Access
from fxfuse.patterns.value import Atom, Opaque, Value

ROWS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Looked:
    """A table as the graph has it, `old` over the `value` of its rows, and as the op will: whole,
    with positions.
    """

    value: Value
    old: Access
    table: Access
    positions: Access


def prove_lookup(cos: Looked, sin: Looked, old: Record, new: Record) -> None:
    """Raises Disproved unless both give each pair the same cos and sin; Opaque where too little is
    known of sizes to try it.
    """
    generator = torch.Generator(device="cpu").manual_seed(0x5EED)
    with torch.device("cpu"), torch.no_grad():
        at = torch.randint(-ROWS, ROWS, _shape(cos), generator=generator, device="cpu")
        width = max(x.table.leaf.shape[1] for x in (cos, sin))
        one = torch.randn(ROWS, width, dtype=torch.float64, generator=generator, device="cpu")
        # Tables of their own differ in their numbers too.
        same = cos.table.leaf.slot is sin.table.leaf.slot
        tables = [one[:, : cos.table.leaf.shape[1]], (one if same else -one)[:, :width]]
        whole = [x.table.apply(t) for x, t in zip((cos, sin), tables, strict=True)]
        *found, told = reference.by_token(whole[0], whole[1], cos.positions.apply(at), new)
        for name, x, table, got in zip(("cos", "sin"), (cos, sin), tables, found, strict=True):
            rows = evaluate(x.value, {x.value.leaves()[0]: table[at]}, _small(x).__getitem__)
            want = x.old.apply(rows)
            _compare(name, want, old.q.rotation, got, told.q.rotation)
            if old.k is not None and told.k is not None:
                _compare(name, want, old.k.rotation, got, told.k.rotation)


def _compare(
    name: str, want: Tensor, old: Rotation | None, got: Tensor | None, new: Rotation | None
) -> None:
    """Raises Disproved unless both members of each pair read the same numbers."""
    if old is not None and new is not None and got is not None:
        wanted = reference.members(want, getattr(old, name), old.pairs)
        found = reference.members(got, getattr(new, name), new.pairs)
        if not all(map(torch.equal, wanted, found)):
            raise Disproved(f"{name} by position differs from what the graph looks up")


def _small(looked: Looked) -> dict[Atom, int]:
    """Small sizes for tokens and batch rows, the others as they are."""
    narrowed = any(name == "narrow" for name, *_ in looked.old.steps)
    sizes = {a: a.size if narrowed else 3 for dim in looked.value.dims[:-1] for a in dim}
    if not all(isinstance(n, int) and n <= 1024 for n in sizes.values()):
        raise Opaque("a part of rows whose number is not known")
    return {a: a.size for a in looked.value.explicit + looked.value.atoms} | sizes


def _shape(looked: Looked) -> list[int]:
    """Of the positions; as many axes as are read where their number is not known."""
    sizes, factors = _small(looked), [t.factors[0] for t in looked.value.terms]
    shape = []
    for j, size in enumerate(factors[0].leaf.shape[:-1]):
        strides = factors[0].axes[j].strides
        read = 1 + max(max(f.axes[j].offsets) for f in factors)
        shape.append(sizes[strides[0][0]] if strides else size if isinstance(size, int) else read)
    return shape
