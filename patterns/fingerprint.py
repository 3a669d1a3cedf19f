"""A text that is equal for two decoded streams exactly when they are the same statement over other
tensors.
"""

from typing import Any

from fxfuse.patterns.site import Decoded
from fxfuse.patterns.value import Atom, Leaf, Value


def fingerprint(decoded: Decoded) -> str:
    writer = _Writer()
    parts = [writer.value(decoded.value), repr(decoded.rows)]
    parts += [f"{writer.leaf(a.leaf)}{a.steps}" for a in decoded.accesses()]
    return " ".join(parts)


class _Writer:
    """Numbers atoms and leaves in the order they are met."""

    def __init__(self) -> None:
        self.atoms: dict[Atom, str] = {}
        self.leaves: dict[Leaf, str] = {}
        self.slots: dict[Any, int] = {}

    def atom(self, atom: Atom) -> str:
        return self.atoms.setdefault(atom, f"{len(self.atoms)}:{atom.size}")

    def leaf(self, leaf: Leaf) -> str:
        if leaf in self.leaves:
            return self.leaves[leaf]
        slot = self.slots.setdefault(leaf.slot or leaf, len(self.slots))
        name = self.leaves[leaf] = f"L{len(self.leaves)}"
        definition = leaf.definition
        inner = (
            f"={definition.op}{definition.params}({','.join(map(self.value, definition.operands))})"
            if definition
            else ""
        )
        return f"{name}@{slot}{leaf.part}{leaf.kind.value}{leaf.shape}{inner}"

    def value(self, value: Value) -> str:
        dims = [[self.atom(a) for a in dim] for dim in value.dims]
        explicit = [self.atom(a) for a in value.explicit]
        return f"{dims}{explicit}" + "+".join(
            f"{t.coefficients}"
            + "".join(
                self.leaf(f.leaf)
                + "".join(
                    f"{i.offsets}{sorted((self.atom(a), s) for a, s in i.strides)}" for i in f.axes
                )
                for f in t.factors
            )
            for t in value.terms
        )
