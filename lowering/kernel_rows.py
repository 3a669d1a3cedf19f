"""The kernel's rows: loaded from q, k or v, normed, rotated by rows of cos and sin, and scaled.

A row is held as four blocks, loaded apart: first and second members of the rotated pairs, and up to
two runs that pass through; a block of length 0 touches no memory. STREAM, ROW and AXES: see
`kernels`.
"""

# Triton compiles these functions; to a type checker their arguments have no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def widened(x):
    """float32. Of bfloat16 the bits become a float32's upper half: of two in one register one takes
    a shift and one a mask, where the compiler's own cast takes three instructions.
    """
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_block(
    ptr, mask, stride_c,
    START: tl.constexpr, STEP: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
    LASTING: tl.constexpr,
):  # fmt: skip
    """float32 [tokens, heads, BLOCK] of channels START + STEP * i for i < LENGTH, zero beyond.
    LASTING: other programs read them too.
    """
    if LENGTH == 0:
        b = tl.zeros([ptr.shape[0], ptr.shape[1], BLOCK], tl.float32)
    else:
        i = tl.arange(0, BLOCK)[None, None, :]
        m = mask if LENGTH == BLOCK else mask & (i < LENGTH)
        b = tl.load(
            ptr + (START + STEP * i).to(tl.int64) * stride_c, mask=m, other=0.0,
            eviction_policy="evict_last" if LASTING else "",
        )  # fmt: skip
    return widened(b)


@triton.jit
def load_pairs(
    ptr, mask, stride_c, FIRST: tl.constexpr, SECOND: tl.constexpr, STEP: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, LASTING: tl.constexpr,
):  # fmt: skip
    """Both members of the pairs at FIRST, SECOND + STEP * i, each [tokens, heads, BLOCK]."""
    if PAIRS > 0 and STEP == 2 and SECOND == FIRST + 1 and ptr.shape[2] == 1:
        # Neighbours come as one contiguous block, so that loads stay 16 bytes wide.
        both = load_block(ptr, mask, stride_c, FIRST, 1, 2 * PAIRS, 2 * BLOCK, LASTING)
        first, second = tl.split(tl.reshape(both, [both.shape[0], both.shape[1], BLOCK, 2]))
    else:
        first = load_block(ptr, mask, stride_c, FIRST, STEP, PAIRS, BLOCK, LASTING)
        if SECOND == FIRST:
            second = first
        else:
            second = load_block(ptr, mask, stride_c, SECOND, STEP, PAIRS, BLOCK, LASTING)
    return first, second


@triton.jit
def rows_at(ptr, position, mask, stride_t, LOOKUP: tl.constexpr):
    """Where a table's rows by position begin, and which of them there are."""
    if LOOKUP > 0:
        o_r = tl.where(position < 0, position + LOOKUP, position)
        ptr += o_r * stride_t
        mask = mask & (o_r >= 0) & (o_r < LOOKUP)
    return ptr, mask


@triton.jit
def in_run(i, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Whether i is one of FIRST, FIRST + STEP, .. (COUNT of them)."""
    at = i - FIRST
    return (at >= 0) & (at < STEP * COUNT) & (at % STEP == 0)


@triton.jit
def load_table(
    ptr, positions, mask, stride_t, stride_c,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STEP: tl.constexpr, ROW: tl.constexpr,
    LOOKUP: tl.constexpr, AXES: tl.constexpr, LASTING: tl.constexpr,
):  # fmt: skip
    """What both members of the pairs turn by: a token's row at ptr [tokens, 1, 1]; by position,
    rows of the table at ptr, of which each pair takes its axis': one for each of AXES' runs.
    """
    RUNS: tl.constexpr = AXES[0]
    at, m_r = rows_at(ptr, positions[0], mask, stride_t, LOOKUP)
    first, second = load_pairs(at, m_r, stride_c, FIRST, SECOND, STEP, ROW[0], ROW[15], LASTING)
    for r in tl.static_range(1, RUNS):
        # Whole rows, of which each pair takes its own: neighbours in memory, unlike single entries.
        at, m_r = rows_at(ptr, positions[r], mask, stride_t, LOOKUP)
        a, b = load_pairs(at, m_r, stride_c, FIRST, SECOND, STEP, ROW[0], ROW[15], LASTING)
        i = tl.arange(0, ROW[15])[None, None, :]
        own = in_run(i, AXES[2 + 4 * r], AXES[3 + 4 * r], AXES[4 + 4 * r])
        first, second = tl.where(own, a, first), tl.where(own, b, second)
    return first, second


@triton.jit
def load_row(ptr, mask, stride_c, SIDE: tl.constexpr, ROW: tl.constexpr, LASTING: tl.constexpr):
    """The four blocks of rows at their places in x (SIDE 0) or in y (SIDE 1)."""
    P: tl.constexpr = 1 + 3 * SIDE
    first, second = load_pairs(
        ptr, mask, stride_c, ROW[P], ROW[P + 1], ROW[P + 2], ROW[0], ROW[15], LASTING
    )  # fmt: skip
    low = load_block(ptr, mask, stride_c, ROW[9 + SIDE], 1, ROW[11], ROW[16], LASTING)
    high = load_block(ptr, mask, stride_c, ROW[12 + SIDE], 1, ROW[14], ROW[17], LASTING)
    return first, second, low, high


@triton.jit
def scaled(row, scale):
    first, second, low, high = row
    return first * scale, second * scale, low * scale, high * scale


@triton.jit
def row_sum(first, second, low, high, ROW: tl.constexpr):
    """The sum of each row, [tokens, heads, 1]."""
    total = tl.sum(first + second, 2) if ROW[0] > 0 else tl.sum(low, 2)
    if ROW[0] > 0 and ROW[11] > 0:
        total += tl.sum(low, 2)
    if ROW[14] > 0:
        total += tl.sum(high, 2)
    return total[:, :, None]


@triton.jit
def less(b, mean, LENGTH: tl.constexpr):
    """A block without its row's mean; zero beyond its length as before."""
    if LENGTH > 0:
        c = b - mean
        if b.shape[2] > LENGTH:
            c = tl.where(tl.arange(0, b.shape[2])[None, None, :] < LENGTH, c, 0.0)
        b = c
    return b


@triton.jit
def factor_of(row, eps, STREAM: tl.constexpr, ROW: tl.constexpr):
    """1 / rms, or what else a norm multiplies rows by, [tokens, heads, 1]."""
    first, second, low, high = row
    squares = row_sum(first * first, second * second, low * low, high * high, ROW)
    # Inductor hands eps over as float64; in its analysis it is a Python float without .to().
    small = tl.cast(eps, tl.float32)
    if STREAM[4] == 2:
        r = 1.0 / tl.maximum(tl.sqrt(squares / STREAM[2]), small)
    else:
        r = tl.rsqrt(squares / STREAM[2] + small)
    return r


@triton.jit
def weighted(row, weight, bias, SHIFT: tl.constexpr, STREAM: tl.constexpr):
    """x * ((weight + offset) * SHIFT) + bias."""
    first, second, low, high = row
    if STREAM[5] > 0:
        w_first, w_second, w_low, w_high = weight
        if STREAM[6] != 0.0:
            OFFSET: tl.constexpr = STREAM[6]
            w_first, w_second = w_first + OFFSET, w_second + OFFSET
            w_low, w_high = w_low + OFFSET, w_high + OFFSET
        if SHIFT != 1.0:
            w_first, w_second, w_low, w_high = scaled((w_first, w_second, w_low, w_high), SHIFT)
        first, second, low, high = first * w_first, second * w_second, low * w_low, high * w_high
    if STREAM[10] > 0:
        b_first, b_second, b_low, b_high = bias
        first, second, low, high = first + b_first, second + b_second, low + b_low, high + b_high
    return first, second, low, high


@triton.jit
def normalise(row, weight, bias, eps, STREAM: tl.constexpr, ROW: tl.constexpr):
    """x * factor(mean(x * x), eps) * (weight + offset) + bias; layer takes the row's mean off."""
    if STREAM[4] == 3:
        first, second, low, high = row
        mean = row_sum(first, second, low, high, ROW) / STREAM[2]
        first, second = less(first, mean, ROW[0]), less(second, mean, ROW[0])
        row = first, second, less(low, mean, ROW[11]), less(high, mean, ROW[14])
    if STREAM[4] > 0:
        row = scaled(row, factor_of(row, eps, STREAM, ROW))
    return weighted(row, weight, bias, 1.0, STREAM)


@triton.jit
def load_weight(
    ptr, o_h, m_h, DIMS: tl.constexpr, STREAM: tl.constexpr, ROW: tl.constexpr,
    TOKENS: tl.constexpr, AHEAD: tl.constexpr, LASTING: tl.constexpr,
):  # fmt: skip
    """The four blocks of a weight [D] or [H, D], in the order of the rows that it meets."""
    if DIMS == 1:
        # In the shape whose layout in registers is that of the tile: moving it would cost more.
        HEADS: tl.constexpr = o_h.shape[1] if TOKENS == 1 or AHEAD else 1
        o_1 = tl.zeros([TOKENS, HEADS, 1], tl.int64)
        row = load_row(ptr + o_1, o_1 == 0, 1, STREAM[3] - 1, ROW, LASTING)
    else:
        row = load_row(ptr + o_h * STREAM[2], m_h, 1, STREAM[3] - 1, ROW, LASTING)
    return row


@triton.jit
def load_weights(
    w_ptr, b_ptr, o_h, m_h, STREAM: tl.constexpr, ROW: tl.constexpr,
    TOKENS: tl.constexpr, AHEAD: tl.constexpr, LASTING: tl.constexpr,
):  # fmt: skip
    """Weight and bias, where the stream has them."""
    weight, bias = 0.0, 0.0
    if STREAM[5] > 0:
        weight = load_weight(w_ptr, o_h, m_h, STREAM[5], STREAM, ROW, TOKENS, AHEAD, LASTING)
    if STREAM[10] > 0:
        bias = load_weight(b_ptr, o_h, m_h, STREAM[10], STREAM, ROW, TOKENS, AHEAD, LASTING)
    return weight, bias


@triton.jit
def load_tables(
    turn, o_h, m_t, ROW: tl.constexpr, LOOKUP: tl.constexpr, AXES: tl.constexpr,
    AHEAD: tl.constexpr, LASTING: tl.constexpr,
):  # fmt: skip
    """cos of both members of the pairs, and sin, where rows are rotated."""
    tables = 0.0, 0.0, 0.0, 0.0
    if ROW[0] > 0:
        cos_ptr, s_cos, sin_ptr, s_sin, positions = turn
        if AHEAD:
            over = tl.zeros([1, o_h.shape[1], 1], tl.int64)
            cos_ptr, sin_ptr, m_t = cos_ptr + over, sin_ptr + over, m_t & (over == 0)
        cos, cos_2 = load_table(
            cos_ptr, positions, m_t, s_cos[1], s_cos[2],
            ROW[18], ROW[19], ROW[20], ROW, LOOKUP, AXES, LASTING,
        )  # fmt: skip
        sin, sin_2 = load_table(
            sin_ptr, positions, m_t, s_sin[1], s_sin[2],
            ROW[21], ROW[22], ROW[23], ROW, LOOKUP, AXES, LASTING,
        )  # fmt: skip
        tables = cos, cos_2, sin, sin_2
    return tables


@triton.jit
def row_of(
    x_ptr, w_ptr, b_ptr, scale_ptr, turn, o_h, m_h, m_t, stride_c, eps,
    STREAM: tl.constexpr, ROW: tl.constexpr, LOOKUP: tl.constexpr, AXES: tl.constexpr,
    AHEAD: tl.constexpr, LASTING: tl.constexpr,
):  # fmt: skip
    """The four blocks of scale * rope(norm(x)), or of scale * norm(rope(x)); turn = pointer and
    strides of cos, of sin, and positions. What depends on positions is asked for last.

    AHEAD: tables and weights are asked for in front of x, or the compiler asks for some when x is
    there; 1 / rms, which is known last, is multiplied last.
    """
    TOKENS: tl.constexpr = m_t.shape[0]
    FIRST: tl.constexpr = AHEAD and LOOKUP == 0
    LAST: tl.constexpr = (
        AHEAD and STREAM[3] == 1 and STREAM[4] == 1 and STREAM[5] > 0 and STREAM[10] == 0
    )
    if FIRST:
        tables = load_tables(turn, o_h, m_t, ROW, LOOKUP, AXES, AHEAD, LASTING)
        weight, bias = load_weights(w_ptr, b_ptr, o_h, m_h, STREAM, ROW, TOKENS, AHEAD, LASTING)
    row = load_row(x_ptr, m_t & m_h, stride_c, 0, ROW, False)
    if not FIRST:
        weight, bias = load_weights(w_ptr, b_ptr, o_h, m_h, STREAM, ROW, TOKENS, AHEAD, LASTING)
        tables = load_tables(turn, o_h, m_t, ROW, LOOKUP, AXES, AHEAD, LASTING)
    if STREAM[7]:
        scale = tl.load(scale_ptr, mask=m_t & m_h, other=0.0).to(tl.float32)
    if LAST:
        # Where a row's squares overflow, 1 / rms is 0 and so is the row, if x * weight does not.
        SHIFT: tl.constexpr = 65536.0
        r = factor_of(row, eps, STREAM, ROW) * SHIFT
        row = weighted(row, weight, bias, 1 / SHIFT, STREAM)
    elif STREAM[3] == 1:
        row = normalise(row, weight, bias, eps, STREAM, ROW)
    if ROW[0] > 0:
        cos, cos_2, sin, sin_2 = tables
        first, second, low, high = row
        turned = first * cos + ROW[7] * second * sin
        row = turned, second * cos_2 + ROW[8] * first * sin_2, low, high
    if LAST:
        row = scaled(row, r)
    if STREAM[3] == 2:
        row = normalise(row, weight, bias, eps, STREAM, ROW)
    if STREAM[7]:
        row = scaled(row, scale)
    if STREAM[8] != 1.0:
        row = scaled(row, STREAM[8])
    return row
