"""Triton: which rows of cos and sin a token turns by, where it has several positions (mRoPE)."""

# Triton compiles these functions; to a type checker their arguments have no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def in_run(i, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Whether i is one of FIRST, FIRST + STEP, .. (COUNT of them)."""
    at = i - FIRST
    return (at >= 0) & (at < STEP * COUNT) & (at % STEP == 0)


@triton.jit
def rows_by_axis(ptr, stride_a, mask, AXES: tl.constexpr, BLOCK: tl.constexpr):
    """int64 [tokens, 1, BLOCK]: for each pair the token's position on the pair's axis.

    Reads: a token's positions at ptr [tokens, 1, 1], stride_a from axis to axis.
    AXES: how many runs; of each its axis, first pair, step and count. Later runs lie over earlier
    ones, the first is of all pairs.
    """
    RUNS: tl.constexpr = AXES[0]
    i = tl.arange(0, BLOCK)[None, None, :]
    row = tl.zeros([ptr.shape[0], 1, BLOCK], tl.int64)
    for r in tl.static_range(RUNS):
        position = tl.load(ptr + AXES[1 + 4 * r] * stride_a, mask=mask, other=0).to(tl.int64)
        own = in_run(i, AXES[2 + 4 * r], AXES[3 + 4 * r], AXES[4 + 4 * r])
        row = tl.where(own, position, row)
    return row
