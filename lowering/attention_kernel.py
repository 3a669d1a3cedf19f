"""The Triton kernel of attention with one query row: softmax(q kᵀ · scale + mask) v, grouped heads.

The query heads that read one head of k and v are the rows of one product, so that head is read
once. A program first reads the whole mask, one byte or number a slot, and finds the first and the
last slot that is attended; these slots are cut into up to SPLITS chunks, and program i takes chunk
i: an empty part of a cache is never read, and as much is left to each program wherever the full
part ends. With one chunk its program writes the result; with more each writes its maximum, its sum
and its weighted v, float32, to a workspace, and whoever comes last of a head's programs adds them
up in the order of the chunks: the order of every addition is fixed by the code and the mask.

Who is last is told by a counter for each head of k, 0 when the kernel starts and 0 again when it
ends: all programs of a head see the same mask, so all know how many have a chunk, and those without
one leave at once. Memory model: the barrier orders the stores of the program's threads before the
one atomic add of its first thread, which releases them to the GPU; the add that finds all others
before it acquires them, and the barrier behind it hands that on to the program's threads.

SIZES  H, G, S, D, Dv        STRIDES of q b h d, k b g s d, v b g s d, mask b h s
MASK   0 none, 1 boolean (True is attended), 2 added to the scores (-inf is not attended)
"""

# Triton compiles these functions; to a type checker their arguments have no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def added(mask_ptr, o_h, m_h, o_s, m_s, MASK: tl.constexpr, STRIDES: tl.constexpr):
    """What the mask adds to the scores [HEADS or 1, slots]: -inf where a slot is not attended."""
    if MASK == 0:
        return tl.where(m_s, 0.0, float("-inf"))[None, :]
    place = mask_ptr + o_s.to(tl.int64)[None, :] * STRIDES[13]
    inside = m_s[None, :]
    # One row for every head is loaded once.
    if STRIDES[12] != 0:
        place += o_h.to(tl.int64)[:, None] * STRIDES[12]
        inside = inside & m_h[:, None]
    if MASK == 1:
        is_attended = tl.load(place, mask=inside, other=0) != 0
        return tl.where(is_attended, 0.0, float("-inf"))
    return tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def attended(
    mask_ptr, o_h, m_h, SIZES: tl.constexpr, STRIDES: tl.constexpr, MASK: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """The first slot that any of the heads attends, and the one behind the last; S and 0: none."""
    S: tl.constexpr = SIZES[2]
    if MASK == 0:
        return tl.full([], 0, tl.int32), tl.full([], S, tl.int32)
    first = tl.full([SCAN], S, tl.int32)
    end = tl.zeros([SCAN], tl.int32)
    for s in range(0, S, SCAN):
        o_s = s + tl.arange(0, SCAN)
        bias = added(mask_ptr, o_h, m_h, o_s, o_s < S, MASK, STRIDES)
        is_attended = tl.max((bias != float("-inf")).to(tl.int32), 0) != 0
        first = tl.where(is_attended, tl.minimum(first, o_s), first)
        end = tl.where(is_attended, o_s + 1, end)
    return tl.min(first, 0), tl.max(end, 0)


@triton.jit
def chunk(
    q_ptr, k_ptr, v_ptr, mask_ptr, scale, start, end, o_h, m_h,
    SIZES: tl.constexpr, STRIDES: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CORES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Of slots start to end and each head: the largest score m [ROWS], the sum of exp(score - m),
    and v weighted by that [ROWS, Dv]; -inf, 0 and 0 where none is attended.
    """
    o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_d, m_v = (o_d < SIZES[3])[None, :], (o_v < SIZES[4])[None, :]
    q = tl.load(
        q_ptr + o_h.to(tl.int64)[:, None] * STRIDES[1] + o_d[None, :] * STRIDES[2],
        mask=m_h[:, None] & m_d, other=0.0,
    )  # fmt: skip
    most = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for s in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        o_s = s + tl.arange(0, BLOCK_S)
        m_s = o_s < end
        i_s = o_s.to(tl.int64)[:, None]
        k = tl.load(
            k_ptr + i_s * STRIDES[5] + o_d[None, :] * STRIDES[6],
            mask=m_s[:, None] & m_d, other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_ptr + i_s * STRIDES[9] + o_v[None, :] * STRIDES[10],
            mask=m_s[:, None] & m_v, other=0.0,
        )  # fmt: skip
        bias = added(mask_ptr, o_h, m_h, o_s, m_s, MASK, STRIDES)
        if CORES:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            scores = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
        scores = tl.where(bias == float("-inf"), bias, scores * scale + bias)
        now = tl.maximum(most, tl.max(scores, 1))
        # Of -inf alone nothing may be subtracted.
        base = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp(scores - base[:, None])
        fade = tl.exp(most - base)
        weight = weight * fade + tl.sum(p, 1)
        if CORES:
            total = tl.dot(p.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
        else:
            total = total * fade[:, None] + tl.sum(p[:, :, None] * v.to(tl.float32)[None, :, :], 1)
        most = now
    return most, weight, total


@triton.jit
def joined(
    parts_ptr, stats_ptr, count, N: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_DV: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The result [HEADS, Dv] of `count` chunks, AT_ONCE read and added at once, in order."""
    o_h, o_v = tl.arange(0, HEADS), tl.arange(0, BLOCK_DV)
    m_h, m_v = (o_h < N)[None, :], (o_v < DV)[None, None, :]
    top = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, BLOCK_DV], tl.float32)
    for i in range(0, count, AT_ONCE):
        o_i = i + tl.arange(0, AT_ONCE)[:, None]
        m_i = (o_i < count) & m_h
        rows = (o_i * N + o_h[None, :])[:, :, None] * DV + o_v[None, None, :]
        part = tl.load(parts_ptr + rows, mask=m_i[:, :, None] & m_v, other=0.0)
        stats = stats_ptr + o_i * (2 * N) + o_h[None, :]
        most = tl.load(stats, mask=m_i, other=float("-inf"))
        weights = tl.load(stats + N, mask=m_i, other=0.0)
        now = tl.maximum(top, tl.max(most, 0))
        base = tl.where(now == float("-inf"), 0.0, now)
        fade, p = tl.exp(top - base), tl.exp(most - base[None, :])
        weight = weight * fade + tl.sum(weights * p, 0)
        total = total * fade[:, None] + tl.sum(part * p[:, :, None], 0)
        top = now
    return total / tl.where(weight == 0.0, 1.0, weight)[:, None]


@triton.jit
def decode_attention(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, parts_ptr, stats_ptr, counters_ptr, scale,
    SIZES: tl.constexpr, STRIDES: tl.constexpr, MASK: tl.constexpr, SPLITS: tl.constexpr,
    SCAN: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CORES: tl.constexpr, AT_ONCE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (B * G * SPLITS); the programs of a head of k are neighbours.

    Reads: the mask, q, and k and v from the first slot that is attended to the last.
    Writes: out [B, H, Dv]; where there are splits parts [B * G * SPLITS, N, Dv], stats
        [B * G * SPLITS, 2, N] and counters.
    Numerics: float32 from load to store, weights of v rounded to its dtype where tensor cores
        multiply them; one rounding of the result; the same bits in every run.
    """
    H: tl.constexpr = SIZES[0]
    G: tl.constexpr = SIZES[1]
    DV: tl.constexpr = SIZES[4]
    N: tl.constexpr = H // G
    i_row, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    i_b, i_g = (i_row // G).to(tl.int64), (i_row % G).to(tl.int64)
    scale = tl.cast(scale, tl.float32)
    q_ptr += i_b * STRIDES[0] + i_g * N * STRIDES[1]
    k_ptr += i_b * STRIDES[3] + i_g * STRIDES[4]
    v_ptr += i_b * STRIDES[7] + i_g * STRIDES[8]
    mask_ptr += i_b * STRIDES[11] + i_g * N * STRIDES[12]
    o_h = tl.arange(0, ROWS)
    m_h = o_h < N
    first, end = attended(mask_ptr, o_h, m_h, SIZES, STRIDES, MASK, SCAN)
    # Whole blocks, and at least one.
    most_slots = tl.maximum(tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_S), 1) * BLOCK_S
    count = tl.maximum(tl.cdiv(end - first, most_slots), 1)
    if i_split < count:
        start = first + i_split * most_slots
        most, weight, total = chunk(
            q_ptr, k_ptr, v_ptr, mask_ptr, scale, start, tl.minimum(start + most_slots, end),
            o_h, m_h, SIZES, STRIDES, MASK, ROWS, BLOCK_S, BLOCK_D, BLOCK_DV, CORES, STAGES,
        )  # fmt: skip
        o_v = tl.arange(0, BLOCK_DV)
        m_out = m_h[:, None] & (o_v < DV)[None, :]
        place = o_h[:, None] * DV + o_v[None, :]
        out_ptr += i_row.to(tl.int64) * N * DV
        if count == 1:
            total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
            tl.store(out_ptr + place, total, mask=m_out)
        elif SPLITS > 1:
            i_part = i_row.to(tl.int64) * SPLITS
            tl.store(parts_ptr + (i_part + i_split) * N * DV + place, total, mask=m_out)
            stats = stats_ptr + (i_part + i_split) * 2 * N + o_h
            tl.store(stats, most, mask=m_h)
            tl.store(stats + N, weight, mask=m_h)
            tl.debug_barrier()
            before = tl.atomic_add(counters_ptr + i_row, 1, sem="acq_rel", scope="gpu")
            if before == count - 1:
                tl.debug_barrier()
                tl.store(counters_ptr + i_row, 0)
                result = joined(
                    parts_ptr + i_part * N * DV, stats_ptr + i_part * 2 * N, count,
                    N, DV, HEADS, BLOCK_DV, AT_ONCE,
                )  # fmt: skip
                o_n = tl.arange(0, HEADS)
                m_n = (o_n < N)[:, None] & (o_v < DV)[None, :]
                tl.store(out_ptr + o_n[:, None] * DV + o_v[None, :], result, mask=m_n)
