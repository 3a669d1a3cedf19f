"""The kernel's stores: rows of results, and rows cast to a cache's numbers at their slots' place.

CACHE is the flat constexpr tuple of a cache, written by `launch_stores.caches`:
         indices, negative (0 invalid, 1 wrap, 2 skip); then of each of three indices operand
         (0 slots, 1 offsets), divisor, modulus, whether it is checked against its axis; from 14 on
         size of the split channels' inner axis, format (0 the pointer's, 1 e4m3fn, 2 e5m2,
         3 e4m3fnuz, 4 e5m2fnuz), scale (0 none, 1 divide, 2 multiply), factor, limit, and of what
         rounds to no finite number: from where on, its bits, whether they have a sign; from 22 on
         whether there are offsets, whether there is one more slot that is skipped, and which
"""

# Triton compiles these functions; to a type checker their arguments have no types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def store_block(
    ptr, b, mask, stride_c, stride_e, INNER: tl.constexpr,
    START: tl.constexpr, STEP: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write [tokens, heads, BLOCK] to channels START + STEP * i, rounded once to the pointer's
    dtype; uint8 are the bits of it.
    """
    if LENGTH > 0:
        i = tl.arange(0, BLOCK)[None, None, :]
        m = mask if LENGTH == BLOCK else mask & (i < LENGTH)
        c = START + STEP * i
        b = b.to(ptr.dtype.element_ty, bitcast=b.dtype == tl.uint8)
        if INNER > 1:
            o = (c // INNER).to(tl.int64) * stride_c + (c % INNER).to(tl.int64) * stride_e
        else:
            o = c.to(tl.int64) * stride_c
        tl.store(ptr + o, b, mask=m)


@triton.jit
def store_row(ptr, row, mask, stride_c, stride_e, INNER: tl.constexpr, ROW: tl.constexpr):
    """Write the four blocks of rows to their places in y."""
    PAIRS: tl.constexpr = ROW[0]
    FIRST: tl.constexpr = ROW[4]
    SECOND: tl.constexpr = ROW[5]
    STEP: tl.constexpr = ROW[6]
    BLOCK: tl.constexpr = ROW[15]
    first, second, low, high = row
    if PAIRS > 0 and STEP == 2 and SECOND == FIRST + 1:
        both = tl.join(first, second)
        both = tl.reshape(both, [both.shape[0], both.shape[1], 2 * BLOCK])
        store_block(ptr, both, mask, stride_c, stride_e, INNER, FIRST, 1, 2 * PAIRS, 2 * BLOCK)
    else:
        store_block(ptr, first, mask, stride_c, stride_e, INNER, FIRST, STEP, PAIRS, BLOCK)
        store_block(ptr, second, mask, stride_c, stride_e, INNER, SECOND, STEP, PAIRS, BLOCK)
    store_block(ptr, low, mask, stride_c, stride_e, INNER, ROW[10], 1, ROW[11], ROW[16])
    store_block(ptr, high, mask, stride_c, stride_e, INNER, ROW[13], 1, ROW[14], ROW[17])


@triton.jit
def cast_block(b, scale, CACHE: tl.constexpr):
    """float32 as the bits of the cache's format; as it is where that is the pointer's."""
    if CACHE[16] == 1:
        b = b / scale
    if CACHE[16] == 2:
        b = b * scale
    if CACHE[17] != 1.0:
        b = b * CACHE[17]
    if CACHE[18] > 0.0:
        b = tl.clamp(b, 0.0 - CACHE[18], CACHE[18], propagate_nan=tl.PropagateNan.ALL)
    if CACHE[15] == 1:
        f = b.to(tl.float8e4nv)
    elif CACHE[15] == 2:
        f = b.to(tl.float8e5)
    elif CACHE[15] == 3:
        f = b.to(tl.float8e4b8)
    elif CACHE[15] == 4:
        f = b.to(tl.float8e5b16)
    else:
        f = b
    if CACHE[15] > 0:
        bits = f.to(tl.uint8, bitcast=True)
        if CACHE[19] > 0.0:
            # The compiler's casts stop at the largest number; what torch has beyond is written out.
            sign = tl.where(b < 0, 128, 0) if CACHE[21] else tl.zeros(b.shape, tl.int32)
            over = (CACHE[20] | sign).to(tl.uint8)
            bits = tl.where(tl.abs(b) >= CACHE[19], over, bits)
        f = bits
    return f


@triton.jit
def cast_row(row, scale_ptr, stride_b, stride_t, stride_h, i_b, o_t, o_h, mask,
             CACHE: tl.constexpr):  # fmt: skip
    """The four blocks of rows, cast; their scale is [B | 1, T | 1, G | 1]."""
    first, second, low, high = row
    if CACHE[15] > 0:
        scale = tl.zeros([1, 1, 1], tl.float32)
        if CACHE[16] > 0:
            o = i_b * stride_b + o_t * stride_t + o_h * stride_h
            scale = tl.load(scale_ptr + o, mask=mask, other=1.0).to(tl.float32)
        first, second = cast_block(first, scale, CACHE), cast_block(second, scale, CACHE)
        low, high = cast_block(low, scale, CACHE), cast_block(high, scale, CACHE)
    return first, second, low, high


@triton.jit
def index_of(slot, offset, size, WHICH: tl.constexpr, CACHE: tl.constexpr):
    """Index WHICH of a cache, and whether its axis has it."""
    BY: tl.constexpr = CACHE[3 + 4 * WHICH]
    OF: tl.constexpr = CACHE[4 + 4 * WHICH]
    x = offset if CACHE[2 + 4 * WHICH] == 1 else slot
    there = x >= 0
    if CACHE[1] == 1:
        there = x == x
        if BY > 1:
            # Python's division, which rounds down.
            x = tl.where(x < 0, 0 - (0 - x - 1) // BY - 1, x // BY)
        if OF > 0:
            x = x % OF
            x = tl.where(x < 0, x + OF, x)
        x = tl.where(x < 0, x + size, x)
        there = x >= 0
    else:
        if BY > 1:
            x = x // BY
        if OF > 0:
            x = x % OF
    if CACHE[5 + 4 * WHICH]:
        there = there & (x < size)
    return x, there


@triton.jit
def place_of(slot, offset, strides, sizes, CACHE: tl.constexpr):
    """Where a slot's rows begin in a cache, and whether they are written."""
    x, there = index_of(slot, offset, sizes[0], 0, CACHE)
    place = x * strides[2]
    if CACHE[0] > 1:
        y, also = index_of(slot, offset, sizes[1], 1, CACHE)
        place += y * strides[3]
        there = there & also
    if CACHE[0] > 2:
        z, too = index_of(slot, offset, sizes[2], 2, CACHE)
        place += z * strides[4]
        there = there & too
    if CACHE[23]:
        there = there & (slot != CACHE[24])
    return place, there


@triton.jit
def store_at(
    ptr, scale_ptr, row, slot, offset, i_b, o_t, o_h, mask, strides, scale_strides, sizes,
    CACHE: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Write rows to their tokens' slots of a cache, as its numbers."""
    s_b, s_t, s_h = scale_strides
    row = cast_row(row, scale_ptr, s_b, s_t, s_h, i_b, o_t, o_h, mask, CACHE)
    slot, offset = slot.to(tl.int64), offset.to(tl.int64)
    place, there = place_of(slot, offset, strides, sizes, CACHE)
    ptr += i_b * strides[0] + o_h * strides[1] + place
    store_row(ptr, row, mask & there, strides[5], strides[6], CACHE[14], ROW)
