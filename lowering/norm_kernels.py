"""The Triton kernel of fxfuse::add_rms_norm: rows added up, and the sum normed.

In come pointers and strides of up to three addends; the sum and the normed rows are written dense.
"""

# Triton compiles these functions; to a type checker their arguments have no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def rounded(b, DTYPE: tl.constexpr):
    """float32 as it comes back from memory of a dtype: 0 float32, 1 bfloat16, 2 float16."""
    if DTYPE == 1:
        b = b.to(tl.bfloat16).to(tl.float32)
    if DTYPE == 2:
        b = b.to(tl.float16).to(tl.float32)
    return b


@triton.jit
def add_rms_norm(
    x_ptr, residual_ptr, second_ptr, weight_ptr, sum_ptr, out_ptr,
    stride_xb, stride_xt, stride_xd, stride_rb, stride_rt, stride_rd,
    stride_sb, stride_st, stride_sd, eps, T,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADDENDS: tl.constexpr,
    FIRST_DTYPE: tl.constexpr, SUM_DTYPE: tl.constexpr, KEEP_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program does ROWS rows of one batch row, each as one block of its D channels.

    Grid: (ceil(T / ROWS), B).
    Reads: addends by their strides, once; the weight [D], dense, once a program.
    Writes: the sum where KEEP_SUM, and the normed rows, both dense [B, T, D].
    Numerics: float32; sums rounded to their dtypes, the norm reads what the sum was rounded to.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    o_d = tl.arange(0, BLOCK).to(tl.int64)
    m_d = o_d < D
    mask = (o_t < T)[:, None] & m_d[None, :]
    o_x = i_b * stride_xb + o_t[:, None] * stride_xt + o_d[None, :] * stride_xd
    b = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if ADDENDS > 1:
        o_r = i_b * stride_rb + o_t[:, None] * stride_rt + o_d[None, :] * stride_rd
        b += tl.load(residual_ptr + o_r, mask=mask, other=0.0).to(tl.float32)
        b = rounded(b, FIRST_DTYPE)
    if ADDENDS > 2:
        o_s = i_b * stride_sb + o_t[:, None] * stride_st + o_d[None, :] * stride_sd
        b += tl.load(second_ptr + o_s, mask=mask, other=0.0).to(tl.float32)
        b = rounded(b, SUM_DTYPE)
    o_out = (i_b * T + o_t[:, None]) * D + o_d[None, :]
    if KEEP_SUM:
        tl.store(sum_ptr + o_out, b.to(sum_ptr.dtype.element_ty), mask=mask)
    # Inductor hands eps over as float64; in its analysis it is a Python float without .to().
    b *= tl.rsqrt(tl.sum(b * b, 1) / D + tl.cast(eps, tl.float32))[:, None]
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
        b *= (w + OFFSET)[None, :]
    tl.store(out_ptr + o_out, b.to(out_ptr.dtype.element_ty), mask=mask)
