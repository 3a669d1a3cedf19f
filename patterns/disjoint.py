"""Whether two tensors of one storage have no element in common: halves of a cache's buffer.

Elements lie at `offset + sum of stride * i`. Two tensors with none in common are either apart, the
one before the other, or in turns: both repeat by some step, and inside a step the one ends before
the other begins.
"""

from typing import Any

from fxfuse.patterns.value import Size
from fxfuse.slots import Slot


def are_disjoint(a: Slot, b: Slot) -> bool:
    """Whether two tensors of one storage are known to have no element in common."""
    first, second = (x.offset for x in (a, b))
    return _apart(a, b) or any(
        _in_turns(a, b, step, (second - first) % step)
        for step in {*a.stride, *b.stride}
        if isinstance(step, int) and step > 0 and isinstance(second - first, int)
    )


def _apart(a: Slot, b: Slot) -> bool:
    """Whether the one ends before the other begins."""
    return any(_is_positive(y.offset - x.offset - _last(x, x.stride)) for x, y in ((a, b), (b, a)))


def _in_turns(a: Slot, b: Slot, step: int, distance: int) -> bool:
    """Whether, of elements that repeat by a step, those of b begin `distance` behind those of a,
    when these have ended, and end before a's next ones.
    """
    inner = []
    for x in (a, b):
        inside = [s if isinstance(s, int) and s % step else 0 for s in x.stride]
        if any(not isinstance(s, int) for n, s in zip(x.shape, x.stride, strict=True) if n != 1):
            return False
        inner.append(_last(x, inside))
    return _is_positive(distance - inner[0]) and _is_positive(step - distance - inner[1])


def _last(x: Slot, strides: Any) -> Size:
    """How far behind its first element a tensor's last one is along some strides."""
    return sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))


def _is_positive(n: Size) -> bool:
    """Whether a number is known to be above 0."""
    return bool(n > 0) if isinstance(n, int) else bool(n.is_positive)
