"""The Triton kernel of both ops: q, k and v of one token, normed, rotated, returned and stored.

In come pointers, strides and a record's numbers as constexprs; the rows that the record names are
written. A row is held as four blocks, loaded and stored apart: first and second members of the
rotated pairs, and up to two runs that pass through. A block of length 0 touches no memory.
"""

# Triton compiles these functions; to a type checker their arguments have no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def load_block(
    ptr, o_h, m_h, stride_h, stride_c,
    START: tl.constexpr, STEP: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 [heads, BLOCK] of channels START + STEP * i for i < LENGTH, zero beyond them."""
    if LENGTH == 0:
        b = tl.zeros([o_h.shape[0], BLOCK], tl.float32)
    else:
        i = tl.arange(0, BLOCK)
        o_c = (START + STEP * i).to(tl.int64) * stride_c
        mask = m_h[:, None] if LENGTH == BLOCK else m_h[:, None] & (i < LENGTH)[None, :]
        b = tl.load(ptr + o_h[:, None] * stride_h + o_c[None, :], mask=mask, other=0.0)
    return b.to(tl.float32)


@triton.jit
def store_block(
    ptr, b, o_h, m_h, stride_h, stride_c,
    START: tl.constexpr, STEP: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The inverse of load_block, with one rounding to the pointer's dtype."""
    if LENGTH > 0:
        i = tl.arange(0, BLOCK)
        o_c = (START + STEP * i).to(tl.int64) * stride_c
        mask = m_h[:, None] if LENGTH == BLOCK else m_h[:, None] & (i < LENGTH)[None, :]
        b = b.to(ptr.dtype.element_ty)
        tl.store(ptr + o_h[:, None] * stride_h + o_c[None, :], b, mask=mask)


@triton.jit
def load_pairs(ptr, o_h, m_h, stride_h, stride_c, PAIR, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Both members of the pairs at PAIR = (first, second, step), two blocks [heads, BLOCK]."""
    if PAIRS > 0 and PAIR[2] == 2 and PAIR[1] == PAIR[0] + 1:
        # Neighbours come as one contiguous block, so that loads stay 16 bytes wide.
        both = load_block(ptr, o_h, m_h, stride_h, stride_c, PAIR[0], 1, 2 * PAIRS, 2 * BLOCK)
        first, second = tl.split(tl.reshape(both, [o_h.shape[0], BLOCK, 2]))
    else:
        first = load_block(ptr, o_h, m_h, stride_h, stride_c, PAIR[0], PAIR[2], PAIRS, BLOCK)
        if PAIR[1] == PAIR[0]:
            second = first
        else:
            second = load_block(ptr, o_h, m_h, stride_h, stride_c, PAIR[1], PAIR[2], PAIRS, BLOCK)
    return first, second


@triton.jit
def load_row(ptr, o_h, m_h, stride_h, stride_c, SIDE, BLOCKS):
    """The four blocks of rows; SIDE = (pair, pairs, start, length, start, length)."""
    first, second = load_pairs(ptr, o_h, m_h, stride_h, stride_c, SIDE[0], SIDE[1], BLOCKS[0])
    low = load_block(ptr, o_h, m_h, stride_h, stride_c, SIDE[2], 1, SIDE[3], BLOCKS[1])
    high = load_block(ptr, o_h, m_h, stride_h, stride_c, SIDE[4], 1, SIDE[5], BLOCKS[2])
    return first, second, low, high


@triton.jit
def store_row(ptr, first, second, low, high, o_h, m_h, stride_h, stride_c, SIDE, BLOCKS):
    """The inverse of load_row."""
    PAIR = SIDE[0]
    if SIDE[1] > 0 and PAIR[2] == 2 and PAIR[1] == PAIR[0] + 1:
        both = tl.reshape(tl.join(first, second), [o_h.shape[0], 2 * BLOCKS[0]])
        store_block(ptr, both, o_h, m_h, stride_h, stride_c, PAIR[0], 1, 2 * SIDE[1], 2 * BLOCKS[0])
    else:
        store_block(ptr, first, o_h, m_h, stride_h, stride_c, PAIR[0], PAIR[2], SIDE[1], BLOCKS[0])
        store_block(ptr, second, o_h, m_h, stride_h, stride_c, PAIR[1], PAIR[2], SIDE[1], BLOCKS[0])
    store_block(ptr, low, o_h, m_h, stride_h, stride_c, SIDE[2], 1, SIDE[3], BLOCKS[1])
    store_block(ptr, high, o_h, m_h, stride_h, stride_c, SIDE[4], 1, SIDE[5], BLOCKS[2])


@triton.jit
def normalise(
    first, second, low, high, w_ptr, o_h, m_h, eps, NORM, D: tl.constexpr, SIDE, BLOCKS
):  # fmt: skip
    """x * rsqrt(mean(x * x) + eps) * (weight + offset); NORM = (statistic, weight, offset)."""
    if NORM[0]:
        total = tl.sum(first * first + second * second, 1)
        total += tl.sum(low * low, 1) + tl.sum(high * high, 1)
        # Inductor hands eps over as float64; in its analysis it is a Python float without .to().
        r = tl.rsqrt(total / D + tl.cast(eps, tl.float32))[:, None]
        first, second, low, high = first * r, second * r, low * r, high * r
    if NORM[1] > 0:
        if NORM[1] == 2:
            w_first, w_second, w_low, w_high = load_row(w_ptr, o_h, m_h, D, 1, SIDE, BLOCKS)
        else:
            o_1 = tl.zeros([1], tl.int64)
            w_first, w_second, w_low, w_high = load_row(w_ptr, o_1, o_1 == 0, 0, 1, SIDE, BLOCKS)
        first, second = first * (w_first + NORM[2]), second * (w_second + NORM[2])
        low, high = low * (w_low + NORM[2]), high * (w_high + NORM[2])
    return first, second, low, high


@triton.jit
def row_of(
    x_ptr, w_ptr, scale_ptr, cos_ptr, sin_ptr, o_h, m_h, stride_h, stride_c, stride_scale,
    stride_cos, stride_sin, eps, D: tl.constexpr, NORM, WHEN: tl.constexpr,
    HAS_SCALE: tl.constexpr, SCALE: tl.constexpr, X, Y, COS, SIN, SIGNS, BLOCKS,
):  # fmt: skip
    """The four blocks of scale * rope(norm(x)), with the norm first (WHEN 1) or last (WHEN 2)."""
    first, second, low, high = load_row(x_ptr, o_h, m_h, stride_h, stride_c, X, BLOCKS)
    o_1 = tl.zeros([1], tl.int64)
    cos, cos_2 = load_pairs(cos_ptr, o_1, o_1 == 0, 0, stride_cos, COS, X[1], BLOCKS[0])
    sin, sin_2 = load_pairs(sin_ptr, o_1, o_1 == 0, 0, stride_sin, SIN, X[1], BLOCKS[0])
    if WHEN == 1:
        first, second, low, high = normalise(
            first, second, low, high, w_ptr, o_h, m_h, eps, NORM, D, X, BLOCKS
        )
    if X[1] > 0:
        turned = first * cos + SIGNS[0] * second * sin
        second = second * cos_2 + SIGNS[1] * first * sin_2
        first = turned
    if WHEN == 2:
        first, second, low, high = normalise(
            first, second, low, high, w_ptr, o_h, m_h, eps, NORM, D, Y, BLOCKS
        )
    if HAS_SCALE:
        b = tl.load(scale_ptr + o_h * stride_scale, mask=m_h, other=0.0).to(tl.float32)[:, None]
        first, second, low, high = first * b, second * b, low * b, high * b
    if SCALE != 1.0:
        first, second, low, high = first * SCALE, second * SCALE, low * SCALE, high * SCALE
    return first, second, low, high


@triton.jit
def norm_rope_store(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
    q_weight_ptr, k_weight_ptr, q_scale_ptr, k_scale_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd,
    stride_qsb, stride_qst, stride_qsh, stride_ksb, stride_kst, stride_ksh,
    stride_cosb, stride_cost, stride_cosd, stride_sinb, stride_sint, stride_sind,
    stride_kcb, stride_kcg, stride_kcs, stride_kcd, stride_vcb, stride_vcg, stride_vcs, stride_vcd,
    stride_slot, q_eps, k_eps, T, S,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, V_BLOCK: tl.constexpr,
    Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr, V_BLOCKS: tl.constexpr, HEADS: tl.constexpr,
    Q_WHEN: tl.constexpr, Q_STATISTIC: tl.constexpr, Q_WEIGHT: tl.constexpr,
    Q_OFFSET: tl.constexpr, Q_HAS_SCALE: tl.constexpr, Q_SCALE: tl.constexpr,
    Q_HEADS_FIRST: tl.constexpr, K_WHEN: tl.constexpr, K_STATISTIC: tl.constexpr,
    K_WEIGHT: tl.constexpr, K_OFFSET: tl.constexpr, K_HAS_SCALE: tl.constexpr,
    K_SCALE: tl.constexpr, K_HEADS_FIRST: tl.constexpr, K_KEEP: tl.constexpr,
    K_STORE: tl.constexpr, WRAP: tl.constexpr,
    PAIRS: tl.constexpr, X_FIRST: tl.constexpr, X_SECOND: tl.constexpr, X_STEP: tl.constexpr,
    Y_FIRST: tl.constexpr, Y_SECOND: tl.constexpr, Y_STEP: tl.constexpr,
    COS_FIRST: tl.constexpr, COS_SECOND: tl.constexpr, COS_STEP: tl.constexpr,
    SIN_FIRST: tl.constexpr, SIN_SECOND: tl.constexpr, SIN_STEP: tl.constexpr,
    SIGN_FIRST: tl.constexpr, SIGN_SECOND: tl.constexpr,
    LOW_X: tl.constexpr, LOW_Y: tl.constexpr, LOW_LENGTH: tl.constexpr,
    HIGH_X: tl.constexpr, HIGH_Y: tl.constexpr, HIGH_LENGTH: tl.constexpr,
    PAIR_BLOCK: tl.constexpr, LOW_BLOCK: tl.constexpr, HIGH_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program does HEADS heads of q, k or v at one token of one batch row.

    Grid: (T * (Q_BLOCKS + K_BLOCKS + V_BLOCKS), B); the blocks of a token are neighbours.
    Reads: q, k, v by their strides; tables, weights and scales once a program; the token's slot.
    Writes: q_out, k_out where K_KEEP, caches where K_STORE and V_BLOCKS; nothing outside a cache.
    Numerics: float32 from load to store, one rounding.
    """
    X: tl.constexpr = ((X_FIRST, X_SECOND, X_STEP), PAIRS, LOW_X, LOW_LENGTH, HIGH_X, HIGH_LENGTH)
    Y: tl.constexpr = ((Y_FIRST, Y_SECOND, Y_STEP), PAIRS, LOW_Y, LOW_LENGTH, HIGH_Y, HIGH_LENGTH)
    COS: tl.constexpr = (COS_FIRST, COS_SECOND, COS_STEP)
    SIN: tl.constexpr = (SIN_FIRST, SIN_SECOND, SIN_STEP)
    SIGNS: tl.constexpr = (SIGN_FIRST, SIGN_SECOND)
    BLOCKS: tl.constexpr = (PAIR_BLOCK, LOW_BLOCK, HIGH_BLOCK)
    # Everything that meets a stride is int64: caches pass 2^31 elements.
    i_b = tl.program_id(1).to(tl.int64)
    i_block = tl.program_id(0) % (Q_BLOCKS + K_BLOCKS + V_BLOCKS)
    i_t = (tl.program_id(0) // (Q_BLOCKS + K_BLOCKS + V_BLOCKS)).to(tl.int64)
    n_t = tl.cast(T, tl.int64)
    cos_ptr += i_b * stride_cosb + i_t * stride_cost
    sin_ptr += i_b * stride_sinb + i_t * stride_sint
    if K_STORE or V_BLOCKS > 0:
        # Loaded here: through a function's result Inductor would take the slots for written.
        i_s = tl.load(slots_ptr + i_t * stride_slot).to(tl.int64)
        if WRAP:
            i_s = tl.where(i_s < 0, i_s + S, i_s)
        # How many heads to store: none where the cache lacks the slot.
        n_g = tl.where((i_s >= 0) & (i_s < S), G, 0)
    if i_block < Q_BLOCKS:
        o_h = (i_block * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        m_h = o_h < H
        first, second, low, high = row_of(
            q_ptr + i_b * stride_qb + i_t * stride_qt, q_weight_ptr,
            q_scale_ptr + i_b * stride_qsb + i_t * stride_qst, cos_ptr, sin_ptr, o_h, m_h,
            stride_qh, stride_qd, stride_qsh, stride_cosd, stride_sind, q_eps, D,
            (Q_STATISTIC, Q_WEIGHT, Q_OFFSET), Q_WHEN, Q_HAS_SCALE, Q_SCALE,
            X, Y, COS, SIN, SIGNS, BLOCKS,
        )  # fmt: skip
        o_row = (i_b * H * n_t + i_t) * D if Q_HEADS_FIRST else (i_b * n_t + i_t) * H * D
        stride_h = n_t * D if Q_HEADS_FIRST else tl.cast(D, tl.int64)
        out_ptr = q_out_ptr + o_row
        store_row(out_ptr, first, second, low, high, o_h, m_h, stride_h, 1, Y, BLOCKS)
    if K_BLOCKS > 0:  # noqa: SIM102
        if (i_block >= Q_BLOCKS) & (i_block < Q_BLOCKS + K_BLOCKS):
            o_g = ((i_block - Q_BLOCKS) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
            m_g = o_g < G
            first, second, low, high = row_of(
                k_ptr + i_b * stride_kb + i_t * stride_kt, k_weight_ptr,
                k_scale_ptr + i_b * stride_ksb + i_t * stride_kst, cos_ptr, sin_ptr, o_g, m_g,
                stride_kh, stride_kd, stride_ksh, stride_cosd, stride_sind, k_eps, D,
                (K_STATISTIC, K_WEIGHT, K_OFFSET), K_WHEN, K_HAS_SCALE, K_SCALE,
                X, Y, COS, SIN, SIGNS, BLOCKS,
            )  # fmt: skip
            if K_KEEP:
                o_row = (i_b * G * n_t + i_t) * D if K_HEADS_FIRST else (i_b * n_t + i_t) * G * D
                stride_g = n_t * D if K_HEADS_FIRST else tl.cast(D, tl.int64)
                out_ptr = k_out_ptr + o_row
                store_row(out_ptr, first, second, low, high, o_g, m_g, stride_g, 1, Y, BLOCKS)
            if K_STORE:
                ptr = k_cache_ptr + i_b * stride_kcb + i_s * stride_kcs
                store_row(
                    ptr, first, second, low, high, o_g, o_g < n_g, stride_kcg, stride_kcd, Y, BLOCKS
                )  # fmt: skip
    if V_BLOCKS > 0:  # noqa: SIM102
        if i_block >= Q_BLOCKS + K_BLOCKS:
            o_g = ((i_block - Q_BLOCKS - K_BLOCKS) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
            m_g = o_g < G
            ptr = v_ptr + i_b * stride_vb + i_t * stride_vt
            b = load_block(ptr, o_g, m_g, stride_vh, stride_vd, 0, 1, DV, V_BLOCK)
            ptr = v_cache_ptr + i_b * stride_vcb + i_s * stride_vcs
            store_block(ptr, b, o_g, o_g < n_g, stride_vcg, stride_vcd, 0, 1, DV, V_BLOCK)
