"""docs/refusals.md: what a refusal says, shown on code that is refused.

    python -m tests.refusal_document    # writes it

In: EXAMPLES, functions that other tests compile. Out: the document. A line of the model's source is
counted from the code that is shown.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxfuse
from fxfuse.patterns.site import Refusal
from tests import (
    test_joined_rows,
    test_memory,
    test_refusals,
    test_refused_norms,
    test_subscripts,
)
from tests.spellings import Rope, halves, narrow
from tests.test_flat import Rotated, draw
from tests.toys import Attention, D, G, Layer, T, attend, caches, hidden_states

FILE = Path(__file__).parents[1] / "docs" / "refusals.md"
HEAD = """# Refusals

What looks like norm, rotation and store and is not fused is named: what was found, at which node of
the graph and which line of the model, what was wanted there, and what to do. `fxfuse explain`
prints it, `fxfuse.Backend(strict=True)` makes it an error. A chain that is refused is compiled by
Inductor as it came, so results are right either way; a stage that is left out ("cut", "store") is
the model's own beside the fused op.

Written by `python -m tests.refusal_document` from code that the tests compile.
"""


@dataclass(frozen=True)
class Example:
    """Code that is refused, and the module and inputs that run it."""

    title: str
    code: Callable[..., Any]
    module: Callable[[], torch.nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]] = lambda: (hidden_states(),)


def _turn(title: str, turn: Any, table: Any = halves) -> Example:
    return Example(title, turn, lambda: Attention(Rope(turn, table)))


def _stored(title: str, write: Any) -> Example:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(2, slots, k)
        write(vs, slots, v)
        return attend(q, ks, vs)

    return Example(title, write, lambda: Layer(finish), lambda: (hidden_states(T), *caches()))


def _in_one_buffer(title: str, write: Any, *shape: int) -> Example:
    def finish(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> Tensor:
        write(kv, slots, k, v)
        return q

    def inputs() -> tuple[Tensor, ...]:
        rows = [draw(5, heads, D, seed=heads) for heads in (4, G, G)]
        return *rows, torch.arange(5), torch.zeros(*shape, D), torch.arange(5)

    return Example(title, write, lambda: Rotated(finish), inputs)


EXAMPLES = (
    _turn("A channel that is turned with no other", test_refusals.no_partner),
    _turn("Signs that make no rotation", test_refusals.both_signs_plus),
    _turn("Channels of different scale", test_refusals.a_longer_sine),
    _turn("Partners in no even steps", test_refusals.mirrored),
    _turn("A table that is tiled where it should be repeated", test_refusals.vjepa2, narrow),
    _turn("The partner of another head", test_refusals.the_partner_of_the_first_head),
    _turn("Something that is not linear in q", test_refusals.a_square),
    Example(
        "A statistic that is no RMSNorm's: rotation and store are fused behind it",
        test_refused_norms.of_fourth_powers,
        lambda: Attention(norm=test_refused_norms.of_fourth_powers),
    ),
    Example(
        "Part of a head's channels are normed",
        test_refused_norms.of_half_the_head,
        lambda: Attention(norm=test_refused_norms.of_half_the_head),
    ),
    Example(
        "A cache that grows",
        test_memory.by_cat,
        lambda: Layer(test_memory.by_cat),
        lambda: (hidden_states(T), *caches()),
    ),
    _stored("Slots below 0 that mean something else for v", test_refusals.by_index_put),
    _stored("Values that are changed before they are stored", test_refusals.squashed),
    _in_one_buffer(
        "k and v in one write, of which one is changed", test_joined_rows.v_changed, 2, 24, G
    ),
    _in_one_buffer(
        "Every other head of a buffer, in one subscript",
        test_subscripts.every_other_head,
        24,
        2 * G,
    ),
)


@functools.cache
@torch.no_grad()
def refusals(example: Example) -> list[Refusal]:
    """Each distinct one, with the line counted from the shown code."""
    torch._dynamo.reset()
    report = fxfuse.explain(example.module(), *example.inputs(), compiler="eager")
    seen: dict[str, Refusal] = {}
    for found in report.refused:
        seen.setdefault(found.reason, _placed(found, example.code))
    return list(seen.values())


def _placed(found: Refusal, code: Callable[..., Any]) -> Refusal:
    """A norm that is left out is told at the rotation behind it, which stands elsewhere."""
    path, _, line = found.where.rpartition(":")
    lines, first = inspect.getsourcelines(code)
    row = int(line) - first + 1
    shown = path == inspect.getsourcefile(code) and 1 <= row <= len(lines)
    where = f"model.py:{row}" if shown else "the rotation's line"
    return Refusal(found.stage, found.node, found.reason, where)


def document() -> str:
    """The whole of docs/refusals.md."""
    parts = [HEAD]
    for example in EXAMPLES:
        code = inspect.getsource(example.code).rstrip()
        told = "\n".join(refusal.explained() for refusal in refusals(example))
        parts.append(f"\n## {example.title}\n\n```python\n{code}\n```\n\n```text\n{told}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    FILE.write_text(document())
