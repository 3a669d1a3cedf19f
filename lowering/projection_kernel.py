"""The Triton kernel of a projection with the prelude behind it, for a few tokens.

A head of q, k or v belongs to PARTS programs, each with ROWS of its channels: it multiplies those
rows of the weight with the hidden states, adds the bias and writes the sums, float32, to a
workspace. Whoever comes last of a head's programs does with the head what `kernels.tile` does with
a projected one. No sum is split over programs: the order of every addition is fixed by the code.

Where the hidden states of one token are the norm of a sum, each program adds up, and squares, for
itself what it multiplies: that is little beside its weights, and 1 / rms(sum) is a factor of its
sums.

Who is last is told by a counter for each head, 0 when the kernel starts and 0 again when it ends: a
program counts itself when its sums are written. Memory model: the barrier orders the stores of the
program's threads before the one atomic add of its first thread, which releases them to the GPU; the
add that finds PARTS - 1 before it acquires them, and the barrier behind it hands that on to the
program's threads. Whoever was not last ends without another access.

The workspace belongs to one launch, the counters to one run of a compiled graph, which sets them to
0 at its start: runs on other streams have their own, and a run that was broken off leaves none.

WEIGHT  of q, of k and of v: strides of the heads and channels of the weight, whether there is a
        bias, and its strides
FRONT   of the norm in front: whether there is one, whether it has a weight, what is added to that,
        and whether the sum is written
"""

# Triton compiles these functions; to a type checker their arguments have no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from fxfuse.lowering.kernel_rows import widened
from fxfuse.lowering.kernels import static_tile


@triton.jit
def sum_of(x_ptr, residual_ptr, o_k, m_k):
    """A block of x + residual, rounded as torch rounds it."""
    x = tl.load(x_ptr + o_k, mask=m_k, other=0.0)
    residual = tl.load(residual_ptr + o_k, mask=m_k, other=0.0)
    return (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)


@triton.jit
def zero_or_nan(x_ptr, residual_ptr, HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """What a product comes to where 1 / rms is 0: 0, NaN where a sum is not finite."""
    total = tl.zeros([BLOCK_K], tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        total += sum_of(x_ptr, residual_ptr, o_k, o_k < HIDDEN).to(tl.float32) * 0.0
    return tl.sum(total)


@triton.jit
def factors(
    x_ptr, residual_ptr, x_weight_ptr, x_sum_ptr, squares, o_k, m_k,
    HIDDEN: tl.constexpr, FRONT: tl.constexpr,
):  # fmt: skip
    """A block of x; with a norm in front of (x + residual) * weight, as float32, and the squares of
    the sum grow by the block's. The first program writes the sum.
    """
    if FRONT[0]:
        added = sum_of(x_ptr, residual_ptr, o_k, m_k)
        if FRONT[3]:
            channels = tl.where(tl.program_id(0) == 0, HIDDEN, 0)
            tl.store(x_sum_ptr + o_k, added, mask=o_k < channels)
        x = added.to(tl.float32)
        squares += x * x
        if FRONT[1]:
            weight = tl.load(x_weight_ptr + o_k, mask=m_k, other=0.0)
            x *= weight.to(tl.float32) + FRONT[2]
    else:
        x = tl.load(x_ptr + o_k, mask=m_k, other=0.0)
    return x, squares


@triton.jit
def project_rows(
    x_ptr, residual_ptr, x_weight_ptr, x_sum_ptr, w_ptr, b_ptr, out_ptr, x_eps, i_head, i_part,
    TOTAL: tl.constexpr, D: tl.constexpr, M: tl.constexpr, HIDDEN: tl.constexpr,
    FRONT: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[m, d] = sum over k of x[m, k] * w[d, k], + b[d]: a part of the channels d of a head.

    The weight is read once, 16 bytes a thread, and does not stay in the cache.
    """
    o_d = i_part * ROWS + tl.arange(0, ROWS)
    m_d = o_d < D
    w_ptr += i_head.to(tl.int64) * WEIGHT[0] + o_d[:, None].to(tl.int64) * WEIGHT[1]
    o_k = tl.arange(0, BLOCK_K)
    if BLOCK_M == 1:
        total = tl.zeros([ROWS, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_K], tl.float32)
    else:
        total = tl.zeros([ROWS, BLOCK_M], tl.float32)
        o_m = tl.arange(0, BLOCK_M)[None, :]
    for k in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
        m_k = k + o_k < HIDDEN if HIDDEN % BLOCK_K else tl.full([BLOCK_K], True, tl.int1)
        w = tl.load(
            w_ptr + (k + o_k)[None, :], mask=m_d[:, None] & m_k[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if BLOCK_M == 1:
            x, squares = factors(
                x_ptr, residual_ptr, x_weight_ptr, x_sum_ptr, squares, k + o_k, m_k, HIDDEN, FRONT,
            )  # fmt: skip
            total += widened(w) * widened(x)[None, :]
        else:
            x = tl.load(
                x_ptr + o_m * HIDDEN + (k + o_k)[:, None], mask=(o_m < M) & m_k[:, None], other=0.0
            )
            total = tl.dot(w, x, total, input_precision="ieee")
    if BLOCK_M == 1:
        total = tl.sum(total, 1)
        if FRONT[0]:
            # Inductor hands eps over as float64.
            r = tl.rsqrt(tl.sum(squares) / HIDDEN + tl.cast(x_eps, tl.float32))
            total *= r
            if r == 0.0:
                # The squares are beyond float32, and so may be the sums.
                total = tl.zeros([ROWS], tl.float32)
                total += zero_or_nan(x_ptr, residual_ptr, HIDDEN, BLOCK_K)
    bias = tl.zeros([ROWS], tl.float32)
    if WEIGHT[2]:
        bias = tl.load(b_ptr + i_head * WEIGHT[3] + o_d * WEIGHT[4], mask=m_d, other=0.0)
        bias = bias.to(tl.float32)
    out_ptr += i_head * D
    if BLOCK_M == 1:
        tl.store(out_ptr + o_d, total + bias, mask=m_d)
    else:
        place = out_ptr + o_m * TOTAL + o_d[:, None]
        tl.store(place, total + bias[:, None], mask=(o_m < M) & m_d[:, None])


@triton.jit
def project_norm_rope_store(
    x_ptr, residual_ptr, x_weight_ptr, x_sum_ptr, x_eps,
    q_proj_ptr, k_proj_ptr, v_proj_ptr, q_proj_bias_ptr, k_proj_bias_ptr, v_proj_bias_ptr,
    sums_ptr, counters_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, offsets_ptr,
    positions_ptr, k_cache_scale_ptr, v_cache_scale_ptr,
    q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, q_scale_ptr, k_scale_ptr, cos_ptr, sin_ptr,
    q_eps, k_eps, T, k_size_0, k_size_1, k_size_2, v_size_0, v_size_1, v_size_2,
    STRIDES: tl.constexpr, SITE: tl.constexpr,
    FRONT: tl.constexpr, Q_PROJ: tl.constexpr, K_PROJ: tl.constexpr, V_PROJ: tl.constexpr,
    BATCH: tl.constexpr, BATCH_ROWS: tl.constexpr, HIDDEN: tl.constexpr, M: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (heads of q, k and v * PARTS); the programs of a head are neighbours.

    Reads: every weight once; x, residual and x_weight once a program; what `kernels.tile` reads.
    Writes: sums [M, channels of all heads], counters, x_sum [HIDDEN] where FRONT says so, and what
    `kernels.tile` writes.
    Numerics: float32 from load to store, one rounding; x + residual rounded as torch rounds it. The
    same bits in every run.
    """
    i_block, i_part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    Q: tl.constexpr = SITE[0]
    K: tl.constexpr = SITE[1]
    V: tl.constexpr = SITE[2]
    K_AT: tl.constexpr = Q[1] * Q[2]
    V_AT: tl.constexpr = K_AT + K[1] * K[2]
    TOTAL: tl.constexpr = V_AT + V[1] * V[2]
    if i_block < Q[0]:
        project_rows(
            x_ptr, residual_ptr, x_weight_ptr, x_sum_ptr, q_proj_ptr, q_proj_bias_ptr,
            sums_ptr, x_eps, i_block, i_part,
            TOTAL, Q[2], M, HIDDEN, FRONT, Q_PROJ, ROWS, BLOCK_M, BLOCK_K, STAGES,
        )  # fmt: skip
    elif i_block < Q[0] + K[0]:
        project_rows(
            x_ptr, residual_ptr, x_weight_ptr, x_sum_ptr, k_proj_ptr, k_proj_bias_ptr,
            sums_ptr + K_AT, x_eps, i_block - Q[0], i_part,
            TOTAL, K[2], M, HIDDEN, FRONT, K_PROJ, ROWS, BLOCK_M, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        project_rows(
            x_ptr, residual_ptr, x_weight_ptr, x_sum_ptr, v_proj_ptr, v_proj_bias_ptr,
            sums_ptr + V_AT, x_eps, i_block - Q[0] - K[0], i_part,
            TOTAL, V[2], M, HIDDEN, FRONT, V_PROJ, ROWS, BLOCK_M, BLOCK_K, STAGES,
        )  # fmt: skip
    tl.debug_barrier()
    before = tl.atomic_add(counters_ptr + i_block, 1, sem="acq_rel", scope="gpu")
    if before == PARTS - 1:
        tl.debug_barrier()
        tl.store(counters_ptr + i_block, 0)
        for i_first in range(0, BATCH, BATCH_ROWS):
            # Past the last batch row that one is done again, with the same numbers.
            o_b = tl.minimum(i_first + tl.arange(0, BATCH_ROWS), BATCH - 1).to(tl.int64)
            static_tile(
                (sums_ptr, sums_ptr + K_AT, sums_ptr + V_AT, q_out_ptr, k_out_ptr),
                (
                    k_cache_ptr, v_cache_ptr, slots_ptr, offsets_ptr,
                    k_cache_scale_ptr, v_cache_scale_ptr,
                ),
                (q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, q_scale_ptr, k_scale_ptr),
                (cos_ptr, sin_ptr, positions_ptr), (q_eps, k_eps), T,
                ((k_size_0, k_size_1, k_size_2), (v_size_0, v_size_1, v_size_2)),
                (o_b[:, None, None], tl.cast(0, tl.int64), i_block), STRIDES, SITE,
            )  # fmt: skip
