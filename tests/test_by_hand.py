"""The functions of fxfuse.ops called by hand: against float64 formulas, and their errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse import ops

pytestmark = pytest.mark.null

B, T, H, G, D, N = 2, 5, 4, 2, 16, 11
CANARY = 77.0


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def packed(tokens: int = T, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v as views of one packed projection, [T, heads, D]."""
    return draw(tokens, H + 2 * G, D, dtype=dtype).split((H, G, G), 1)


def turned(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """The first 2 * pairs channels of x [.., T, heads, D] turned by angle [.., T, pairs]."""
    r = 2 * angle.shape[-1]
    part, rest = x[..., :r].double(), x[..., r:].double()
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).mT
    z = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(angle).double(), angle.double()
    ).unsqueeze(-2)
    out = torch.view_as_real(z)
    out = out.flatten(-2) if interleaved else out.mT.flatten(-2)
    return torch.cat((out, rest), -1)


def normed(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def table_of(angle: Tensor, form: str, interleaved: bool) -> tuple[Tensor, Tensor]:
    if form == "of channels":
        angle = angle.repeat_interleave(2, -1) if interleaved else angle.repeat(1, 2)
    return angle.cos(), angle.sin()


EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", ["of channels", "of pairs"])
@pytest.mark.parametrize("rotary", [None, 8])
@pytest.mark.parametrize("looked_up", [False, True])
def test_qk_norm_rope(interleaved: bool, form: str, rotary: int | None, looked_up: bool) -> None:
    q, k, _ = packed()
    wq, wk = draw(D, seed=1), draw(G, D, seed=2)
    angle = draw(N, (rotary or D) // 2, seed=3)
    positions = torch.tensor([3, 0, -1, 10, 3]) if looked_up else None
    by_token = angle[positions if looked_up else slice(T)]
    cos, sin = table_of(angle if looked_up else by_token, form, interleaved)
    got = ops.qk_norm_rope(
        q, k, cos, sin, q_weight=wq, k_weight=wk, eps=(1e-6, 1e-2), weight_offset=1.0,
        interleaved=interleaved, rotary_dim=rotary, positions=positions,
    )  # fmt: skip
    want_q = turned(normed(q, 1 + wq), by_token, interleaved)
    want_k = turned(normed(k, 1 + wk, 1e-2), by_token, interleaved)
    torch.testing.assert_close(got, (want_q, want_k), **EXACT)


def test_a_batch_axis_and_the_memory_order() -> None:
    q, k = draw(B, T, H, D), draw(B, T, G, D)
    angle = draw(1, T, D // 2)
    got = ops.qk_norm_rope(q, k, angle.cos(), angle.sin(), heads_first=True)
    want = tuple(turned(normed(x), angle, False) for x in (q, k))
    torch.testing.assert_close(got, want, **EXACT)
    assert all(x.transpose(1, 2).is_contiguous() for x in got)


@pytest.mark.parametrize("batch", [None, B])
def test_pairs_turn_by_several_axes(batch: int | None) -> None:
    axes = (0, 1, 2, 0, 1, 2, 0, 0)
    lead = () if batch is None else (batch,)
    q, k = draw(*lead, T, H, D), draw(*lead, T, G, D)
    angle = draw(N, D // 2)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(-N, N, (3, *lead, T), generator=generator)
    got = ops.rope(q, k, angle.cos(), angle.sin(), positions=positions, axes=axes)
    by_pair = torch.stack([angle[positions[a]][..., i] for i, a in enumerate(axes)], -1)
    torch.testing.assert_close(got, tuple(turned(x, by_pair, False) for x in (q, k)), **EXACT)


def test_rope_and_norm_alone() -> None:
    q, k, _ = packed()
    angle, w = draw(T, D // 2), draw(D)
    got = ops.rope(q, k, angle.cos(), angle.sin(), interleaved=True)
    torch.testing.assert_close(got, tuple(turned(x, angle, True) for x in (q, k)), **EXACT)
    got = ops.qk_norm(q, k, q_weight=w)
    torch.testing.assert_close(got, (normed(q, w), normed(k)), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding(dtype: torch.dtype) -> None:
    q, k, _ = packed(dtype=dtype)
    angle = draw(T, D // 2, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()
    got = ops.qk_norm_rope(q, k, cos, sin)
    want = ops.qk_norm_rope(q.double(), k.double(), cos.double(), sin.double())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        # Half an ulp; float32 inside adds almost nothing to it.
        half = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(a.double(), b, rtol=half * 1.01, atol=1e-6)


# --- stores ----------------------------------------------------------------------------------

P, X = 4, 2
PAGES = 3
SLOTS = torch.tensor([7, 2, 9, 0, 4])
# Layouts of k and v, their caches' shapes, and where channel d of head g of slot s is.
LAYOUTS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], Any, Any]] = {
    "flat": ("0hd", (12, G, D), (12, G, D), None, None),
    "pages": ("01hd", (PAGES, P, G, D), (PAGES, P, G, D), None, None),
    "heads first": (
        "0h1d",
        (PAGES, G, P, D),
        (PAGES, G, P, D),
        lambda c: c.transpose(1, 2),
        lambda c: c.transpose(1, 2),
    ),
    "split": (
        ("0hd1e", "0hd1"),
        (PAGES, G, D // X, P, X),
        (PAGES, G, D, P),
        lambda c: c.permute(0, 3, 1, 2, 4).reshape(PAGES, P, G, D),
        lambda c: c.permute(0, 3, 1, 2),
    ),
    "shuffled": (
        ("0hd1e", "0h1d2"),
        (PAGES, G, D // X, P, X),
        (PAGES, G, P // X, D, X),
        lambda c: c.permute(0, 3, 1, 2, 4).reshape(PAGES, P, G, D),
        lambda c: c.permute(0, 2, 4, 1, 3).reshape(PAGES, P, G, D),
    ),
}


def canaries(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.full(shape, CANARY, dtype=dtype) for shape in shapes]


def expected(rows: Tensor, slots: Tensor) -> Tensor:
    """[12, G, D] with the rows at their slots, canaries elsewhere."""
    cache = torch.full((12, G, D), CANARY, dtype=rows.dtype)
    cache[slots] = rows
    return cache


def by_slot(cache: Tensor, seen: Any) -> Tensor:
    return (seen(cache) if seen else cache).reshape(12, G, D)


@pytest.mark.parametrize(
    ("name", "given"),
    [*((name, False) for name in LAYOUTS), *((name, True) for name in LAYOUTS if name != "flat")],
)
def test_rows_are_stored_at_their_slots_alone(name: str, given: bool) -> None:
    layout, k_shape, v_shape, k_seen, v_seen = LAYOUTS[name]
    (q, k, v), caches, angle = packed(), canaries(k_shape, v_shape), draw(T, D // 2)
    slots, offsets = (SLOTS // P, SLOTS % P) if given else (SLOTS, None)
    q_out, k_out = ops.qk_norm_rope_store_(
        q, k, v, angle.cos(), angle.sin(), slots, *caches, layout=layout, offsets=offsets
    )
    want = turned(normed(k), angle, False)
    torch.testing.assert_close(q_out, turned(normed(q), angle, False), **EXACT)
    torch.testing.assert_close(k_out, want, **EXACT)
    torch.testing.assert_close(by_slot(caches[0], k_seen), expected(want, SLOTS), **EXACT)
    assert torch.equal(by_slot(caches[1], v_seen), expected(v, SLOTS))


@pytest.mark.parametrize(
    ("negative", "slots", "kept"),
    [("wrap", [-1, 2, 9, 0, -3], [0, 1, 2, 3, 4]), ("skip", [-1, 2, 9, -1, 4], [1, 2, 4])],
)
def test_slots_below_zero(negative: str, slots: list[int], kept: list[int]) -> None:
    (q, k, v), caches, angle = packed(), canaries((12, G, D), (12, G, D)), draw(T, D // 2)
    at = torch.tensor(slots)
    out, none = ops.qk_norm_rope_store_(
        q, k, v, angle.cos(), angle.sin(), at, *caches, eps=None, negative=negative, keep_k=False
    )
    assert none is None and torch.allclose(out, turned(q, angle, False))
    want = turned(k, angle, False)
    torch.testing.assert_close(caches[0], expected(want[kept], at[kept]), **EXACT)
    assert torch.equal(caches[1], expected(v[kept], at[kept]))


def test_a_static_cache_and_k_alone() -> None:
    q, k, angle = draw(B, T, H, D), draw(B, T, G, D), draw(1, T, D // 2)
    (cache,) = canaries((B, G, 12, D))
    ops.qk_norm_rope_store_(q, k, None, angle.cos(), angle.sin(), SLOTS, cache, None, layout="bh0d")
    want = turned(normed(k), angle, False)
    for b in range(B):
        torch.testing.assert_close(cache[b].transpose(0, 1), expected(want[b], SLOTS), **EXACT)


@pytest.mark.parametrize("as_bits", [False, True])
@pytest.mark.parametrize("scale", ["divide", "multiply"])
def test_a_cache_of_8_bits(scale: str, as_bits: bool) -> None:
    (q, k, v), angle = packed(dtype=torch.float32), draw(T, D // 2, dtype=torch.float32)
    f8 = torch.float8_e4m3fn
    caches = [x.to(f8) for x in canaries((12, G, D), (12, G, D))]
    given = [x.view(torch.uint8) for x in caches] if as_bits else caches
    k_scale, v_scale = torch.tensor(0.5), torch.tensor([[0.01], [2.0], [1.0], [0.3], [0.5]])
    ops.qk_norm_rope_store_(
        q, k, v, angle.cos(), angle.sin(), SLOTS, *given, k_scale=k_scale, v_scale=v_scale,
        scale=scale, cache_format="float8_e4m3fn" if as_bits else "", clamp=448.0,
    )  # fmt: skip
    by_v = v_scale[..., None]
    scaled = v / by_v if scale == "divide" else v * by_v
    rounded = scaled.clamp(-448.0, 448.0).to(f8).view(torch.uint8)
    assert torch.equal(caches[1].view(torch.uint8)[SLOTS], rounded)
    want = turned(normed(k), angle, False) * (2.0 if scale == "divide" else 0.5)
    # Half an ulp of 3 bits, and of the least numbers half their distance.
    torch.testing.assert_close(caches[0][SLOTS].double(), want, rtol=2**-4, atol=2**-10)
    others = [i for i in range(12) if i not in SLOTS.tolist()]
    canary = torch.tensor(CANARY).to(f8).view(torch.uint8)
    assert all((c.view(torch.uint8)[others] == canary).all() for c in caches)


@pytest.mark.parametrize("negative", ["wrap", "skip"])
def test_no_tokens_at_all(negative: str) -> None:
    (q, k, v), caches, angle = packed(0), canaries((12, G, D), (12, G, D)), draw(0, D // 2)
    tables, none = (angle.cos(), angle.sin()), torch.zeros(0, dtype=torch.int64)
    got = ops.qk_norm_rope_store_(q, k, v, *tables, none, *caches, negative=negative)
    assert [x.shape for x in got] == [(0, H, D), (0, G, D)]
    assert all((c == CANARY).all() for c in caches)
    assert ops.qk_norm_rope(q, k, *tables)[0].shape == (0, H, D)


# --- add + norm ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["none", "residual", "second", "both"])
def test_add_rms_norm(given: str) -> None:
    x, w = draw(T, 48), draw(48, seed=1)
    r = draw(T, 48, seed=2) if given in ("residual", "both") else None
    s = draw(T, 48, seed=3) if given in ("second", "both") else None
    total, y = ops.add_rms_norm(x, r, s, w, 1e-5, 1.0)
    want = x + sum(a for a in (r, s) if a is not None)
    torch.testing.assert_close((total, y), (want, normed(want, 1 + w, 1e-5)), **EXACT)
    assert (total is x) == (given == "none")


# --- errors ----------------------------------------------------------------------------------


def stored(**changed: Any) -> Any:
    q, k, v = packed(dtype=torch.float32)
    angle = draw(T, D // 2, dtype=torch.float32)
    k_cache, v_cache = canaries((12, G, D), (12, G, D), dtype=torch.float32)
    given = {"q": q, "k": k, "v": v, "cos": angle.cos(), "sin": angle.sin(), "slots": SLOTS}
    given |= {"k_cache": k_cache, "v_cache": v_cache}
    return ops.qk_norm_rope_store_(**given | changed)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rows": ({"q": torch.ones(T, D)}, ValueError, r"q: got \(5, 16\), wanted \[T, H, D\] or"),
    "tokens": (
        {"k": torch.ones(4, G, D)},
        ValueError,
        r"k: got \(4, 2, 16\), wanted .* q's \(5,\)",
    ),
    "batch": ({"k": torch.ones(1, T, G, D)}, ValueError, r"k: got .* as q; view the projection"),
    "channels": ({"k": torch.ones(T, G, 8)}, ValueError, "k: got .* wanted q's 16 channels"),
    "dtype": ({"q": torch.ones(T, H, D).int()}, TypeError, "q: got torch.int32, wanted one of"),
    "complex": ({"cos": torch.ones(T, 8) * 1j}, TypeError, "cos: got .*; take real and imaginary"),
    "tables": ({"sin": torch.ones(T, D)}, ValueError, r"sin: got \(5, 16\), wanted cos's shape"),
    "rows of tables": (
        {"cos": torch.ones(9, 8), "sin": torch.ones(9, 8)},
        ValueError,
        r"cos: got \(9, 8\), wanted \[T, R\] or .* hand over positions",
    ),
    "columns": ({"rotary_dim": 6}, ValueError, "cos: got 8 columns, wanted 6 or 3 columns"),
    "rotary": ({"rotary_dim": 18}, ValueError, "rotary_dim: got 18, wanted an even number up to"),
    "weight": ({"q_weight": torch.ones(8)}, ValueError, r"q_weight: got \(8,\), wanted \(16,\) or"),
    "no positions": ({"axes": (0,) * 8}, ValueError, "positions: got None, wanted one for each"),
    "positions": (
        {"positions": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        r"positions: got \(4,\), wanted \[T\] or \[B\|1, T\|1\]",
    ),
    "axes": (
        {"positions": torch.zeros(3, T, dtype=torch.int64), "axes": (0, 1, 2)},
        ValueError,
        r"axes: got \(0, 1, 2\), wanted an axis for each of 8 pairs",
    ),
    "few axes": (
        {"positions": torch.zeros(2, T, dtype=torch.int64), "axes": (0, 1, 2, 0, 0, 0, 0, 0)},
        ValueError,
        r"positions: got \(2, 5\), wanted \[3 axes, T\]",
    ),
    "float slots": ({"slots": SLOTS.float()}, TypeError, "slots: got torch.float32, wanted int32"),
    "slots": ({"slots": SLOTS[:4]}, ValueError, r"slots: got \(4,\), wanted \[T\] with T = 5"),
    "device": ({"slots": SLOTS.to("meta")}, ValueError, "slots: got meta, wanted q's device cpu"),
    "no k": ({"k": None}, ValueError, "k: got None, wanted the rows to store"),
    "v alone": ({"v_cache": None}, ValueError, "v_cache: got None, wanted a tensor beside v"),
    "cache": ({"k_cache": torch.ones(12, 1, D)}, ValueError, "k_cache: got .* wanted 2 heads"),
    "cache dims": ({"layout": "01hd"}, ValueError, "k_cache: got .* wanted the axes '01hd'"),
    "letters": ({"layout": "0hx"}, ValueError, "layout of k_cache: got '0hx', wanted a letter"),
    "digits": ({"layout": "1hd"}, ValueError, "layout of k_cache: got '1hd', wanted a letter"),
    "one b": ({"layout": ("b0d", "0hd")}, ValueError, "k_cache: got .* wanted"),
    "offsets": ({"offsets": SLOTS}, ValueError, "offsets: got a tensor, wanted None"),
    "cache dtype": (
        {"k_cache": torch.ones(12, G, D).half()},
        TypeError,
        "k_cache: got torch.float16, wanted the rows' torch.float32, or 8 bits",
    ),
    "format": ({"cache_format": "int4"}, ValueError, "cache_format: got 'int4', wanted one of"),
    "no format": (
        {"k_cache": torch.ones(12, G, D).byte()},
        TypeError,
        "k_cache: got torch.uint8, .* of uint8 say cache_format",
    ),
    "other format": (
        {"cache_format": "float8_e5m2"},
        TypeError,
        "k_cache: got torch.float32, wanted float8_e5m2 or uint8",
    ),
    "scale": ({"k_scale": torch.tensor(1.0)}, ValueError, "k_cache: got a scale, wanted none"),
    "clamp": ({"clamp": 448.0}, ValueError, "k_cache: got clamp=448.0, wanted none"),
    "scale's shape": (
        {
            "k_cache": torch.ones(12, G, D).byte(),
            "v_cache": torch.ones(12, G, D).byte(),
            "cache_format": "float8_e5m2",
            "k_scale": torch.ones(T),
        },
        ValueError,
        r"k_scale: got \(5,\), wanted a number, \[G\] or \[T\|1, G\|1\]",
    ),
    "direction": ({"scale": "times"}, ValueError, "scale: got 'times', wanted one of 'divide'"),
    "negative": ({"negative": "drop"}, ValueError, "negative: got 'drop', wanted one of 'wrap'"),
    "skip": (
        {
            "layout": "bh0d",
            "negative": "skip",
            "k_cache": torch.ones(1, G, 12, D),
            "v_cache": torch.ones(1, G, 12, D),
        },
        ValueError,
        "negative: got 'skip', wanted 'wrap' or 'invalid'",
    ),
    "grad": (
        {"q": torch.ones(T, H, D, requires_grad=True)},
        ValueError,
        "tensors that require grad, wanted none; call it under torch.no_grad",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_to_do_and_nothing_is_written(name: str) -> None:
    changed, kind, message = ERRORS[name]
    caches = canaries((12, G, D), (12, G, D), dtype=torch.float32)
    names = ("k_cache", "v_cache")
    with pytest.raises(kind, match=message) as error:
        stored(**dict(zip(names, caches, strict=True)) | changed)
    assert ";" in str(error.value)
    assert all((c == CANARY).all() for c in caches)


def test_errors_of_add_rms_norm() -> None:
    x = torch.ones(T, D)
    for args, message in (
        ((x, x[0]), r"residual: got \(16,\), wanted x's shape \(5, 16\); expand it"),
        ((x, x, x[:2]), r"second: got \(2, 16\), wanted x's shape"),
        ((x, None, None, torch.ones(8)), r"weight: got \(8,\), wanted \(16,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.add_rms_norm(*args)
    with pytest.raises(TypeError, match=r"x: got torch\.int32"):
        ops.add_rms_norm(x.int())


def test_the_docstring_names_every_argument_of_the_store() -> None:
    text = ops.qk_norm_rope_store_.__doc__ + ops.qk_norm_rope.__doc__
    names = ops.qk_norm_rope_store_.__annotations__
    assert not [n for n in names if n != "return" and not re.search(rf"\b{n}\b", text)]
