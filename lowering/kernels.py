"""The Triton kernel of both ops: q, k and v of a few tokens, normed, rotated, returned and stored.

A program holds a tile [tokens, heads, channels] of one of the three, as the blocks of
`kernel_rows`. Whatever a program reads it asks for before its first sum, and a token's slot is used
last: few tokens wait for one memory latency, not for three.

What a record says comes as constexpr tuples, written by `launch.plan`:
SITE    the STREAM of q, of k and of v; the ROW of each; whether k is a result; the CACHE of k and
        of v; rows of the tables where positions are looked up, else 0; AXES; tokens of a program;
        whether what rows meet is asked for ahead of them; whether it is to stay in the cache
STREAM  programs, heads, channels, norm (0 none, 1 before, 2 after the rotation), statistic (0 none,
        1 rms, 2 l2, 3 layer), dims of the weight, offset of the weight, has_scale, scale,
        heads_first, dims of the bias, heads of a program
ROW     pairs; first, second, step of the pairs in x; the same in y; two signs; start in x, start in
        y, length of the low run; the same of the high run; the blocks of pairs, low and high;
        first, second, step of the pairs in cos; the same in sin
CACHE   see `kernel_stores`
AXES    runs of pairs that turn by the position on one axis; of each its axis, first pair, step and
        count; later runs lie over earlier ones, the first is of all pairs. A token with one
        position has one run
"""

# Triton compiles these functions; to a type checker their arguments have no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from fxfuse.lowering.kernel_rows import row_of
from fxfuse.lowering.kernel_stores import store_at, store_row


@triton.jit
def heads_of(i_block, HEADS: tl.constexpr, TOTAL: tl.constexpr):
    """The heads of a program's tile, and which of them there are."""
    o_h = (i_block * HEADS + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
    # A mask that the compiler knows to be true costs nothing.
    m_h = o_h < TOTAL if TOTAL % HEADS else tl.full([1, HEADS, 1], True, tl.int1)
    return o_h, m_h


@triton.jit
def block_of_program(SITE: tl.constexpr, SINGLE: tl.constexpr):
    """Batch row, block of tokens and block of heads of a program."""
    PROGRAMS: tl.constexpr = SITE[0][0] + SITE[1][0] + SITE[2][0]
    if SINGLE:
        block = 0, tl.cast(0, tl.int64), tl.program_id(0)
    else:
        i_t = (tl.program_id(0) // PROGRAMS).to(tl.int64)
        block = tl.program_id(1).to(tl.int64), i_t, tl.program_id(0) % PROGRAMS
    return block


@triton.jit
def tile(rows, caches, factors, tables, strides, eps, T, sizes, block, SITE: tl.constexpr):
    """One tile of q, k or v; rows, caches, factors, tables = pointers, taken apart below;
    strides = those of q, k, v, q_scale, k_scale, cos, sin, k_cache, v_cache, slots, offsets,
    positions, k_cache_scale and v_cache_scale; sizes = those of the indexed axes of both caches;
    block = batch row, block of tokens and block of heads.
    """
    Q: tl.constexpr = SITE[0]
    K: tl.constexpr = SITE[1]
    V: tl.constexpr = SITE[2]
    Q_ROW: tl.constexpr = SITE[3]
    K_ROW: tl.constexpr = SITE[4]
    V_ROW: tl.constexpr = SITE[5]
    K_KEEP: tl.constexpr = SITE[6]
    K_CACHE: tl.constexpr = SITE[7]
    V_CACHE: tl.constexpr = SITE[8]
    LOOKUP: tl.constexpr = SITE[9]
    AXES: tl.constexpr = SITE[10]
    TOKENS: tl.constexpr = SITE[11]
    AHEAD: tl.constexpr = SITE[12]
    LASTING: tl.constexpr = SITE[13]
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr = rows
    k_cache_ptr, v_cache_ptr, slots_ptr, offsets_ptr, k_cache_scale_ptr, v_cache_scale_ptr = caches
    q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, q_scale_ptr, k_scale_ptr = factors
    cos_ptr, sin_ptr, positions_ptr = tables
    q_eps, k_eps = eps
    s_q, s_k, s_v, s_qs, s_ks, s_cos, s_sin, s_kc, s_vc, s_slot, s_off, s_p, s_kcs, s_vcs = strides
    i_b, i_t, i_block = block
    # Everything that meets a stride is int64: caches pass 2^31 elements.
    n_t = tl.cast(T, tl.int64)
    o_t = i_t * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    m_t = tl.full([1, 1, 1], True, tl.int1) if TOKENS == 1 else o_t < n_t
    positions = (o_t,)
    if LOOKUP > 0:
        # Asked for here and used behind a row's own loads.
        p_ptr = positions_ptr + i_b * s_p[0] + o_t * s_p[1]
        positions = (tl.load(p_ptr + AXES[1] * s_p[2], mask=m_t, other=0).to(tl.int64),)
        RUNS: tl.constexpr = AXES[0]
        for r in tl.static_range(1, RUNS):
            position = tl.load(p_ptr + AXES[1 + 4 * r] * s_p[2], mask=m_t, other=0).to(tl.int64)
            positions = positions + (position,)  # noqa: RUF005
        cos_ptr += i_b * s_cos[0]
        sin_ptr += i_b * s_sin[0]
    else:
        cos_ptr += i_b * s_cos[0] + o_t * s_cos[1]
        sin_ptr += i_b * s_sin[0] + o_t * s_sin[1]
    turn = cos_ptr, s_cos, sin_ptr, s_sin, positions
    if i_block < Q[0]:
        o_h, m_h = heads_of(i_block, Q[11], Q[1])
        row = row_of(
            q_ptr + i_b * s_q[0] + o_t * s_q[1] + o_h * s_q[2], q_weight_ptr, q_bias_ptr,
            q_scale_ptr + i_b * s_qs[0] + o_t * s_qs[1] + o_h * s_qs[2],
            turn, o_h, m_h, m_t, s_q[3], q_eps, Q, Q_ROW, LOOKUP, AXES, AHEAD, LASTING,
        )  # fmt: skip
        o_row = (i_b * Q[1] + o_h) * n_t + o_t if Q[9] else (i_b * n_t + o_t) * Q[1] + o_h
        store_row(q_out_ptr + o_row * Q[2], row, m_t & m_h, 1, 0, 1, Q_ROW)
    # Slots are loaded where they are used, or q's rows would wait for their addresses; and not
    # through a function, or Inductor would take them for written.
    if K[0] > 0:  # noqa: SIM102
        if (i_block >= Q[0]) & (i_block < Q[0] + K[0]):
            o_h, m_h = heads_of(i_block - Q[0], K[11], K[1])
            if K_CACHE[0] > 0:
                i_s = tl.load(slots_ptr + i_b * s_slot[0] + o_t * s_slot[1], mask=m_t, other=-1)
                i_o = i_s
                if K_CACHE[22]:
                    i_o = tl.load(offsets_ptr + i_b * s_off[0] + o_t * s_off[1], mask=m_t, other=-1)
            row = row_of(
                k_ptr + i_b * s_k[0] + o_t * s_k[1] + o_h * s_k[2], k_weight_ptr, k_bias_ptr,
                k_scale_ptr + i_b * s_ks[0] + o_t * s_ks[1] + o_h * s_ks[2],
                turn, o_h, m_h, m_t, s_k[3], k_eps, K, K_ROW, LOOKUP, AXES, AHEAD, LASTING,
            )  # fmt: skip
            if K_KEEP:
                o_row = (i_b * K[1] + o_h) * n_t + o_t if K[9] else (i_b * n_t + o_t) * K[1] + o_h
                store_row(k_out_ptr + o_row * K[2], row, m_t & m_h, 1, 0, 1, K_ROW)
            if K_CACHE[0] > 0:
                store_at(
                    k_cache_ptr, k_cache_scale_ptr, row, i_s, i_o, i_b, o_t, o_h, m_t & m_h,
                    s_kc, s_kcs, sizes[0], K_CACHE, K_ROW,
                )  # fmt: skip
    if V[0] > 0:  # noqa: SIM102
        if i_block >= Q[0] + K[0]:
            o_h, m_h = heads_of(i_block - Q[0] - K[0], V[11], V[1])
            i_s = tl.load(slots_ptr + i_b * s_slot[0] + o_t * s_slot[1], mask=m_t, other=-1)
            i_o = i_s
            if V_CACHE[22]:
                i_o = tl.load(offsets_ptr + i_b * s_off[0] + o_t * s_off[1], mask=m_t, other=-1)
            row = row_of(
                v_ptr + i_b * s_v[0] + o_t * s_v[1] + o_h * s_v[2], v_ptr, v_ptr, v_ptr,
                turn, o_h, m_h, m_t, s_v[3], k_eps, V, V_ROW, LOOKUP, AXES, AHEAD, LASTING,
            )  # fmt: skip
            store_at(
                v_cache_ptr, v_cache_scale_ptr, row, i_s, i_o, i_b, o_t, o_h, m_t & m_h,
                s_vc, s_vcs, sizes[1], V_CACHE, V_ROW,
            )  # fmt: skip


@triton.jit
def norm_rope_store(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, offsets_ptr,
    positions_ptr, k_cache_scale_ptr, v_cache_scale_ptr,
    q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, q_scale_ptr, k_scale_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd,
    stride_qsb, stride_qst, stride_qsh, stride_ksb, stride_kst, stride_ksh,
    stride_cosb, stride_cost, stride_cosd, stride_sinb, stride_sint, stride_sind,
    stride_kcb, stride_kcg, stride_kc0, stride_kc1, stride_kc2, stride_kcd, stride_kce,
    stride_vcb, stride_vcg, stride_vc0, stride_vc1, stride_vc2, stride_vcd, stride_vce,
    stride_slotb, stride_slott, stride_offb, stride_offt, stride_pb, stride_pt, stride_pa,
    stride_kcsb, stride_kcst, stride_kcsh, stride_vcsb, stride_vcst, stride_vcsh,
    q_eps, k_eps, T, k_size_0, k_size_1, k_size_2, v_size_0, v_size_1, v_size_2,
    SITE: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """A program does a few tokens of some heads of q, k or v of one batch row.

    Grid: (blocks of tokens * programs of q, k, v, B); the programs of a token are neighbours.
    Reads: q, k, v by their strides; tables, weights and scales once a program; the tokens' slots.
    Writes: q_out, k_out where it is a result, caches where k's CACHE has indices and v programs;
    nothing outside a cache.
    Numerics: float32 from load to store, one rounding.
    """
    strides = (
        (stride_qb, stride_qt, stride_qh, stride_qd), (stride_kb, stride_kt, stride_kh, stride_kd),
        (stride_vb, stride_vt, stride_vh, stride_vd), (stride_qsb, stride_qst, stride_qsh),
        (stride_ksb, stride_kst, stride_ksh), (stride_cosb, stride_cost, stride_cosd),
        (stride_sinb, stride_sint, stride_sind),
        (stride_kcb, stride_kcg, stride_kc0, stride_kc1, stride_kc2, stride_kcd, stride_kce),
        (stride_vcb, stride_vcg, stride_vc0, stride_vc1, stride_vc2, stride_vcd, stride_vce),
        (stride_slotb, stride_slott), (stride_offb, stride_offt), (stride_pb, stride_pt, stride_pa),
        (stride_kcsb, stride_kcst, stride_kcsh), (stride_vcsb, stride_vcst, stride_vcsh),
    )  # fmt: skip
    sizes = (k_size_0, k_size_1, k_size_2), (v_size_0, v_size_1, v_size_2)
    rows = q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr
    caches = k_cache_ptr, v_cache_ptr, slots_ptr, offsets_ptr, k_cache_scale_ptr, v_cache_scale_ptr
    factors = q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, q_scale_ptr, k_scale_ptr
    tables = cos_ptr, sin_ptr, positions_ptr
    block = block_of_program(SITE, SINGLE)
    tile(rows, caches, factors, tables, strides, (q_eps, k_eps), T, sizes, block, SITE)


@triton.jit
def static_tile(
    rows, caches, factors, tables, eps, T, sizes, block, STRIDES: tl.constexpr, SITE: tl.constexpr
):
    """tile where every stride is a number."""
    strides = (
        (STRIDES[0], STRIDES[1], STRIDES[2], STRIDES[3]),
        (STRIDES[4], STRIDES[5], STRIDES[6], STRIDES[7]),
        (STRIDES[8], STRIDES[9], STRIDES[10], STRIDES[11]),
        (STRIDES[12], STRIDES[13], STRIDES[14]), (STRIDES[15], STRIDES[16], STRIDES[17]),
        (STRIDES[18], STRIDES[19], STRIDES[20]), (STRIDES[21], STRIDES[22], STRIDES[23]),
        (STRIDES[24], STRIDES[25], STRIDES[26], STRIDES[27], STRIDES[28], STRIDES[29], STRIDES[30]),
        (STRIDES[31], STRIDES[32], STRIDES[33], STRIDES[34], STRIDES[35], STRIDES[36], STRIDES[37]),
        (STRIDES[38], STRIDES[39]), (STRIDES[40], STRIDES[41]),
        (STRIDES[42], STRIDES[43], STRIDES[44]), (STRIDES[45], STRIDES[46], STRIDES[47]),
        (STRIDES[48], STRIDES[49], STRIDES[50]),
    )  # fmt: skip
    tile(rows, caches, factors, tables, strides, eps, T, sizes, block, SITE)


@triton.jit
def norm_rope_store_static(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, offsets_ptr,
    positions_ptr, k_cache_scale_ptr, v_cache_scale_ptr,
    q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, q_scale_ptr, k_scale_ptr, cos_ptr, sin_ptr,
    q_eps, k_eps, T, k_size_0, k_size_1, k_size_2, v_size_0, v_size_1, v_size_2,
    STRIDES: tl.constexpr, SITE: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """norm_rope_store where every stride is a number: fewer arguments and registers (on an H200
    0.07 of 1.4 microseconds for one token, 0.25 of 3.4 for 256).
    """
    rows = q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr
    caches = k_cache_ptr, v_cache_ptr, slots_ptr, offsets_ptr, k_cache_scale_ptr, v_cache_scale_ptr
    factors = q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, q_scale_ptr, k_scale_ptr
    tables = cos_ptr, sin_ptr, positions_ptr
    sizes = (k_size_0, k_size_1, k_size_2), (v_size_0, v_size_1, v_size_2)
    block = block_of_program(SITE, SINGLE)
    eps = q_eps, k_eps
    static_tile(rows, caches, factors, tables, eps, T, sizes, block, STRIDES, SITE)
