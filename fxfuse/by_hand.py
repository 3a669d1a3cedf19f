"""The kernels for who calls them by hand: functions of plain tensors, as `fxfuse.ops` has them.

In come q, k, v, tables, slots and caches as serving engines hold them; out come the results of one
kernel. Each function is an op that torch decomposes into the fxfuse op of a record, so that eager
code, torch.compile and gradients take it alike; `fxfuse.schemas` defines these ops.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxfuse import by_hand_records as by
from fxfuse.patterns.record import AddNorm, Layout, Norm, Record, Store, Stream

Eps = float | tuple[float, float]
Two = tuple[Tensor, Tensor]
Each = TypeVar("Each", float, str)


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    eps: Eps = 1e-6, weight_offset: float = 0.0,
    interleaved: bool = False, rotary_dim: int | None = None,
    positions: Tensor | None = None, axes: Sequence[int] = (), heads_first: bool = False,
) -> Two:  # fmt: skip
    """RMSNorm and RoPE of q and k: y = rope(x * rsqrt(mean(x²) + eps) * (w + weight_offset)).

    Example:
        q, k, v = qkv.view(T, H + 2 * G, D).split((H, G, G), 1)
        q, k = fxfuse.ops.qk_norm_rope(q, k, cos, sin, q_weight=wq, k_weight=wk)

    rope turns pairs (i, i + R / 2), or (2i, 2i + 1) where interleaved, of the first R = rotary_dim
    channels (all of them where None): y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin.

    Shapes: q [T, H, D] or [B, T, H, D], k likewise with G heads; weights [D] or [H, D]; cos, sin
        [T, W] or [B|1, T|1, W]: W = R, a number for each channel, or R / 2, one for each pair; with
        positions [T] or [B|1, T|1] (negative ones count from the end) they are [N, W]; where
        pairs turn by several axes (mRoPE), pair i by positions[axes[i]] of [axes, T] or
        [axes, B|1, T|1]. eps is one number, or that of q and that of k. Results as q and k.
    Layout: inputs of any strides, so views of a packed projection; results dense, with heads_first
        in memory as [B, H, T, D].
    Dtypes: float32, bfloat16, float16, float64; a result has its input's.
    Rounding: float32 (float64 for float64 inputs) inside, one rounding at the end.
    Mutates: nothing. Differentiable in q, k and weights.
    Errors: ValueError for shapes, devices and choices, TypeError for dtypes, before anything runs.
    Source: RMSNorm arXiv:1910.07467, RoPE arXiv:2104.09864, mRoPE arXiv:2409.12191.
    """
    return _called(
        q, k, cos, sin, positions, q_weight, k_weight, _both(eps), weight_offset, True, interleaved,
        rotary_dim, axes, heads_first,
    )  # fmt: skip


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *,
    interleaved: bool = False, rotary_dim: int | None = None,
    positions: Tensor | None = None, axes: Sequence[int] = (), heads_first: bool = False,
) -> Two:  # fmt: skip
    """RoPE of q and k alone; all else as in `qk_norm_rope`."""
    return _called(
        q, k, cos, sin, positions, None, None, (0.0, 0.0), 0.0, False, interleaved, rotary_dim,
        axes, heads_first,
    )  # fmt: skip


def qk_norm(
    q: Tensor, k: Tensor, *,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    eps: Eps = 1e-6, weight_offset: float = 0.0, heads_first: bool = False,
) -> Two:  # fmt: skip
    """RMSNorm of q and k alone, over their heads; all else as in `qk_norm_rope`."""
    return _called(
        q, k, None, None, None, q_weight, k_weight, _both(eps), weight_offset, True, False, None,
        (), heads_first,
    )  # fmt: skip


def qk_norm_rope_store_(
    q: Tensor, k: Tensor, v: Tensor | None, cos: Tensor, sin: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor | None, *,
    q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    eps: Eps | None = 1e-6, weight_offset: float = 0.0,
    interleaved: bool = False, rotary_dim: int | None = None,
    positions: Tensor | None = None, axes: Sequence[int] = (), heads_first: bool = False,
    layout: str | tuple[str, str] = "0hd", offsets: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    scale: str = "divide", cache_format: str = "", clamp: float = 0.0,
    negative: str = "wrap", keep_k: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `qk_norm_rope` (as `rope` where eps is None), and the rows of k and v written into caches.

    Example:
        q, _ = fxfuse.ops.qk_norm_rope_store_(q, k, v, cos, sin, slots, k_pages, v_pages,
                                              layout="01hd", keep_k=False)

    Shapes: as qk_norm_rope; v [T, G, Dv] or [B, T, G, Dv]; slots and offsets [T], for several batch
        rows [B, T] ([T] where the layout has b); k_scale, v_scale one number, [G], or [T|1, G|1],
        with a batch axis [B|1, T|1, G|1]; v and v_cache may both be None.
    Layout: a letter for each axis of the caches, of k and v where they differ: b batch, h heads,
        d channels, e (of split channels the inner part), digits a slot's indices. With digits 0, 1,
        2 of sizes n0, n1, n2: slot // (n1 * n2), slot // n2 % n1, slot % n2; with offsets 0 is the
        slot and the others come of the offset. A flat cache is "0hd", pages "01hd" or "0h1d", a
        static cache "bh0d", the split keys of paged attention "0hd1e".
    Dtypes: as qk_norm_rope; a cache has its rows' dtype, one of 8 bits, or is uint8, the bits of
        cache_format ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz").
    Rounding: as qk_norm_rope; v is copied; to 8 bits row (/ or *, as `scale` says) its scale, then
        clamped to +-clamp (0: not), is rounded once.
    Mutates: k_cache and v_cache, at the slots alone: below 0 they count from an index' end
        ("wrap"), or leave the row out ("skip"), or are never given ("invalid").
    Returns: q and k; None in place of k unless keep_k.
    Errors: as qk_norm_rope, and ValueError where gradients are needed, before anything is written.
    Source: transformers' StaticCache; slot maps and split layouts of paged attention (vLLM, aiter).
    """
    q_out, k_out = torch.ops.fxfuse.qk_norm_rope_store_by_hand_(
        q, k, cos, sin, positions, q_weight, k_weight, *_both(0.0 if eps is None else eps),
        weight_offset, eps is not None, interleaved, rotary_dim, axes, heads_first,
        v, slots, offsets, k_cache, v_cache, k_scale, v_scale, *_both(layout), scale,
        cache_format, clamp, negative, keep_k,
    )  # fmt: skip
    return q_out, k_out if keep_k else None


def add_rms_norm(
    x: Tensor, residual: Tensor | None = None, second: Tensor | None = None,
    weight: Tensor | None = None, eps: float = 1e-6, weight_offset: float = 0.0,
) -> Two:  # fmt: skip
    """Sum and RMSNorm: s = x + residual + second, y = s * rsqrt(mean(s²) + eps) * (w + offset).

    Example:
        hidden, normed = fxfuse.ops.add_rms_norm(attention_out, hidden, weight=weight)

    Shapes: addends [..., D], all alike; weight [D]; results as x; the sum of x alone is x itself.
    Layout: inputs of any strides; results dense.
    Dtypes: float32, bfloat16, float16, float64; the sum as torch's addition gives it, y as x.
    Rounding: each sum to its dtype, y from the rounded sum in float32 (float64 for float64 sums),
        rounded once.
    Mutates: nothing. Differentiable in addends and weight.
    Errors: ValueError for shapes and devices, TypeError for dtypes, before anything runs.
    Source: RMSNorm arXiv:1910.07467, with the residual stream of a decoder layer in front.
    """
    if residual is None:
        residual, second = second, None
    keep_sum = residual is not None
    total, y = torch.ops.fxfuse.add_rms_norm_by_hand(
        x, residual, second, weight, eps, weight_offset, keep_sum
    )
    return total if keep_sum else x, y


def _both(given: Each | tuple[Each, Each]) -> tuple[Each, Each]:
    return given if isinstance(given, tuple) else (given, given)


def _called(
    q: Any, k: Any, cos: Any, sin: Any, positions: Any, q_weight: Any, k_weight: Any,
    eps: tuple[float, float], *settings: Any,
) -> Two:  # fmt: skip
    results: Two = torch.ops.fxfuse.qk_norm_rope_by_hand(
        q, k, cos, sin, positions, q_weight, k_weight, *eps, *settings
    )
    return results


# --- what the ops decompose into -------------------------------------------------------------


def _q_k(
    q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, normed: bool, weight_offset: float,
    interleaved: bool, rotary_dim: int | None, axes: Sequence[int], heads_first: bool,
    keep_k: bool = True,
) -> tuple[tuple[Any, ...], Stream, Stream | None]:  # fmt: skip
    """q, k, tables and positions with a batch axis, and the streams of q and k."""
    given = {"q": q, "k": k, "cos": cos, "sin": sin, "q_weight": q_weight, "k_weight": k_weight}
    by.check_floats(given)
    by.check_integers({"positions": positions})
    by.check_devices(given | {"positions": positions})
    k = None if k is None else by.rows("k", k, q)
    q = by.rows("q", q, q)
    if k is not None and k.shape[-1] != q.shape[-1]:
        raise by.wrong("k", k.shape, f"q's {q.shape[-1]} channels", "call rope once for each")
    turn, width = None, 0
    if cos is not None and sin is not None:
        if cos.shape != sin.shape:
            raise by.wrong("sin", sin.shape, f"cos's shape {tuple(cos.shape)}", "cut both alike")
        if axes and positions is None:
            raise by.wrong("positions", None, "one for each axis", "pairs turn by axes of these")
        cos, sin = (
            by.table(n, x, q, positions is not None) for n, x in (("cos", cos), ("sin", sin))
        )
        positions = None if positions is None else by.positions_of(positions, q, axes)
        turn = by.rotation(int(q.shape[-1]), rotary_dim, int(cos.shape[-1]), interleaved, axes)
        width = 2 * turn.pairs

    def stream(name: str, x: Tensor, weight: Tensor | None, keep: bool) -> Stream:
        by.weight(name, weight, x)
        return by.stream(
            x, turn, width, weight=weight, normed=normed, weight_offset=weight_offset,
            heads_first=heads_first, keep=keep,
        )  # fmt: skip

    streams = (
        stream("q_weight", q, q_weight, True),
        None if k is None else stream("k_weight", k, k_weight, keep_k),
    )
    return (q, k, cos, sin, positions), *streams


def run_qk_norm_rope_by_hand(
    q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, q_eps: float, k_eps: float,
    weight_offset: float, normed: bool, interleaved: bool, rotary_dim: int | None,
    axes: Sequence[int], heads_first: bool,
) -> Two:  # fmt: skip
    unbatched = q.dim() == 3
    (q, k, cos, sin, positions), q_stream, k_stream = _q_k(
        q, k, cos, sin, positions, q_weight, k_weight, normed, weight_offset, interleaved,
        rotary_dim, axes, heads_first,
    )  # fmt: skip
    results: Two = torch.ops.fxfuse.norm_rope.default(
        q, k, q_weight, k_weight, None, None, None, None, cos, sin, positions, q_eps, k_eps,
        Record(q_stream, k_stream).to_text(),
    )  # fmt: skip
    return _as_given(results, unbatched)


def run_qk_norm_rope_store_by_hand_(
    q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, q_eps: float, k_eps: float,
    weight_offset: float, normed: bool, interleaved: bool, rotary_dim: int | None,
    axes: Sequence[int], heads_first: bool, v: Tensor | None, slots: Tensor,
    offsets: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, k_layout: str, v_layout: str, scale: str, cache_format: str,
    clamp: float, negative: str, keep_k: bool,
) -> Two:  # fmt: skip
    _check_store(q, k, v, v_cache, q_weight, k_weight)
    by.check_choice("negative", negative, by.NEGATIVE)
    by.check_choice("scale", scale, by.SCALES)
    by.check_integers({"slots": slots, "offsets": offsets})
    by.check_floats({"v": v, "k_scale": k_scale, "v_scale": v_scale})
    by.check_devices(
        {"q": q, "v": v, "slots": slots, "offsets": offsets, "k_cache": k_cache}
        | {"v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    )
    unbatched, given = q.dim() == 3, q
    (q, k, cos, sin, positions), q_stream, k_stream = _q_k(
        q, k, cos, sin, positions, q_weight, k_weight, normed, weight_offset, interleaved,
        rotary_dim, axes, heads_first, keep_k,
    )  # fmt: skip
    assert k is not None
    v_stream = None
    if v is not None:
        v = by.rows("v", v, given)
        v_stream = by.stream(v, None, 0, keep=False)
    layouts: list[Layout] = []
    scales: list[Tensor | None] = []
    for name, x, cache, row, axes_of in (
        ("k", k_scale, k_cache, k, k_layout),
        ("v", v_scale, v_cache, v, v_layout),
    ):
        if cache is None or row is None:
            layouts, scales = [*layouts, layouts[0]], [*scales, None]
            continue
        cast = by.cast(f"{name}_cache", cache, row, x, scale, cache_format, clamp)
        here = (cache, row, offsets is not None, negative, cast)
        layouts.append(by.layout(f"{name}_cache", axes_of, *here))
        scales.append(by.cache_scale(f"{name}_scale", x, row, not unbatched))
    one_row = "b" in layouts[0].axes
    if one_row != ("b" in layouts[1].axes):
        raise by.wrong("layout", (k_layout, v_layout), "b in both or in neither", "see layout")
    slots = by.indices("slots", slots, q, one_row)
    offsets = None if offsets is None else by.indices("offsets", offsets, q, one_row)
    store = Store(layouts[0], layouts[1], negative)  # type: ignore[arg-type]
    results: Two = torch.ops.fxfuse.norm_rope_store_.default(
        q, k, v, q_weight, k_weight, None, None, None, None, cos, sin, positions, slots, offsets,
        k_cache, v_cache, *scales, q_eps, k_eps,
        Record(q_stream, k_stream, v_stream, store).to_text(),
    )  # fmt: skip
    return _as_given(results, unbatched)


def _check_store(
    q: Tensor, k: Tensor | None, v: Tensor | None, v_cache: Tensor | None, *weights: Tensor | None
) -> None:
    if k is None:
        raise by.wrong("k", None, "the rows to store", "call qk_norm_rope to store nothing")
    if (v is None) != (v_cache is None):
        name, other = ("v", "v_cache") if v is None else ("v_cache", "v")
        raise by.wrong(name, None, f"a tensor beside {other}", "give both or neither")
    needs = any(x is not None and x.requires_grad for x in (q, k, v, *weights))
    if torch.is_grad_enabled() and needs:
        remedy = "call it under torch.no_grad(), or qk_norm_rope and store k and v apart"
        raise by.wrong("q, k, v", "tensors that require grad", "none", remedy)


def _as_given(results: Two, unbatched: bool) -> Two:
    """Results with the axes that q came with; what is not kept is [0]."""
    q, k = results
    return (q.squeeze(0), k.squeeze(0) if k.dim() == 4 else k) if unbatched else (q, k)


def run_add_rms_norm_by_hand(
    x: Tensor, residual: Tensor | None, second: Tensor | None, weight: Tensor | None, eps: float,
    weight_offset: float, keep_sum: bool,
) -> Two:  # fmt: skip
    given = {"x": x, "residual": residual, "second": second, "weight": weight}
    by.check_floats(given)
    by.check_devices(given)
    for name, other in (("residual", residual), ("second", second)):
        if other is not None and other.shape != x.shape:
            raise by.wrong(name, other.shape, f"x's shape {tuple(x.shape)}", "expand it first")
    if weight is not None and tuple(weight.shape) != tuple(x.shape[-1:]):
        raise by.wrong("weight", weight.shape, f"{tuple(x.shape[-1:])}", "a number a channel")
    addends = 1 + sum(a is not None for a in (residual, second))
    norm = Norm("head", "before", weight is not None, weight_offset if weight is not None else 0.0)
    record = AddNorm(int(x.shape[-1]), norm, addends, keep_sum, str(x.dtype).removeprefix("torch."))
    results: Two = torch.ops.fxfuse.add_rms_norm.default(
        x, residual, second, weight, eps, record.to_text()
    )
    return results
