"""The ops against formulas written as the models write them, in float64, and their contracts."""

import dataclasses

import pytest
import torch
from torch import Tensor

import fxfuse.ops
from fxfuse.patterns.record import Norm, Pair, Pass, Record, Rotation, Stream
from tests.sites import cached

pytestmark = pytest.mark.null

B, T, H, G, D, S = 2, 5, 4, 2, 16, 11
NORM = Norm("head", "before", has_weight=True)


def halves(d: int, r: int | None = None, start: int = 0) -> tuple[Rotation, tuple[Pass, ...]]:
    """Llama's pairing on channels [start, start + r): i with i + r / 2; tables as wide as r."""
    r = d if r is None else r
    pair = Pair(start, start + r // 2, 1)
    table = Pair(0, r // 2, 1)
    gaps = ((0, start), (start + r, d - start - r))
    passes = tuple(Pass(s, s, n) for s, n in gaps if n)
    return Rotation(r // 2, pair, pair, table, table, (-1, 1)), passes


def neighbours(d: int, r: int | None = None) -> tuple[Rotation, tuple[Pass, ...]]:
    """GPT-J's pairing: 2i with 2i + 1; tables half as wide."""
    r = d if r is None else r
    pair, table = Pair(0, 1, 2), Pair(0, 0, 1)
    passes = (Pass(r, r, d - r),) if r < d else ()
    return Rotation(r // 2, pair, pair, table, table, (-1, 1)), passes


def by_axes(rope: tuple[Rotation, tuple[Pass, ...]], axes: tuple[int, ...]):
    """Pair k turns by a token's position on axes[k]."""
    return dataclasses.replace(rope[0], axes=axes), rope[1]


def stream(d: int = D, rope=None, **fields) -> Stream:
    rotation, passes = halves(d) if rope is None else rope
    return Stream(d, fields.pop("norm", None), rotation, passes, **fields)


def copied(d: int, **fields) -> Stream:
    return Stream(d, None, None, (Pass(0, 0, d),), keep=False, **fields)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def angles(width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angle = draw(1, T, width, seed=7)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def call(
    record: Record, q, k=None, q_w=None, k_w=None, q_b=None, q_s=None, cos=None, sin=None, eps=1e-6
):
    return fxfuse.ops.norm_rope(
        q, k, q_w, k_w, q_b, None, q_s, None, cos, sin, None, eps, 1e-5, record.to_text()
    )


def test_llama_halves_with_qk_norm():
    q, k, w = draw(B, T, H, D), draw(B, T, G, D), draw(D)
    cos, sin = (torch.cat((t, t), -1) for t in angles(D // 2))
    record = Record(stream(norm=NORM, dtype="float64"), stream(norm=NORM, dtype="float64"))
    q_out, k_out = call(record, q, k, w, w + 1, cos=cos, sin=sin)
    for x, out, weight, eps in ((q, q_out, w, 1e-6), (k, k_out, w + 1, 1e-5)):
        normed = rms(x, weight, eps)
        want = normed * cos.unsqueeze(2) + rotate_half(normed) * sin.unsqueeze(2)
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_gptj_neighbours_with_half_width_tables():
    q, (cos, sin) = draw(B, T, H, D), angles(D // 2)
    out, _ = call(Record(stream(rope=neighbours(D), dtype="float64")), q, cos=cos, sin=sin)
    wide = [t.repeat_interleave(2, -1).unsqueeze(2) for t in (cos, sin)]
    every_two = torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2)
    torch.testing.assert_close(out, q * wide[0] + every_two * wide[1])


def test_partial_rotation_in_the_middle():
    q, (cos, sin) = draw(B, T, H, D), angles(8)
    record = Record(stream(rope=halves(D, 8, start=4), dtype="float64"))
    out, _ = call(record, q, cos=cos, sin=sin)
    middle = q[..., 4:12]
    turned = middle * cos.unsqueeze(2) + rotate_half(middle) * sin.unsqueeze(2)
    torch.testing.assert_close(out, torch.cat((q[..., :4], turned, q[..., 12:]), -1))


def test_complex_table_through_view_as_real():
    q, angle = draw(B, T, H, D), draw(1, T, D // 2)
    table = torch.polar(torch.ones_like(angle), angle)
    real = torch.view_as_real(table)
    record = Record(stream(rope=neighbours(D), dtype="float64"))
    out, _ = call(record, q, cos=real[..., 0], sin=real[..., 1])
    product = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * table.unsqueeze(2)
    torch.testing.assert_close(out, torch.view_as_real(product).flatten(-2))


def test_halves_in_and_neighbours_out():
    q, (cos, sin) = draw(B, T, H, D), angles(D // 2)
    half, table = D // 2, Pair(0, 0, 1)
    turn = Rotation(half, Pair(0, half, 1), Pair(0, 1, 2), table, table, (1, -1))
    out, _ = call(Record(stream(rope=(turn, ()), dtype="float64")), q, cos=cos, sin=sin)
    first, second, c, s = q[..., :half], q[..., half:], cos.unsqueeze(2), sin.unsqueeze(2)
    want = torch.stack((first * c + second * s, second * c - first * s), -1).flatten(-2)
    torch.testing.assert_close(out, want)


def test_strided_members_that_are_no_neighbours():
    x, y = Pair(0, 1, 2), Pair(1, 0, 2)
    turn = Rotation(D // 2, x, y, Pair(0, 0, 1), Pair(0, 0, 1), (-1, 1))
    q, (cos, sin) = draw(B, T, H, D), angles(D // 2)
    out, _ = call(Record(stream(rope=(turn, ()), dtype="float64")), q, cos=cos, sin=sin)
    first, second, c, s = q[..., ::2], q[..., 1::2], cos.unsqueeze(2), sin.unsqueeze(2)
    torch.testing.assert_close(out[..., 1::2], first * c - second * s)
    torch.testing.assert_close(out[..., ::2], second * c + first * s)


AXES = {
    "sections": (0, 0, 0, 1, 1, 2, 2, 2),
    "every third": (0, 1, 2, 0, 1, 2, 0, 0),
    "in turns": (0, 1, 2, 1, 2, 1, 2, 1),
    "of four axes": (3, 3, 0, 1, 2, 0, 0, 2),
    "of one": (2, 2, 2, 2, 2, 2, 2, 2),
}


@pytest.mark.parametrize("pairing", [halves, neighbours])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("batch", [1, B])
def test_each_pair_turns_by_the_position_on_its_axis(axes, pairing, batch):
    rows = 9
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(-rows, rows, (4, batch, T), generator=generator)
    positions[..., 0] = rows - 1
    q, angle = draw(B, T, H, D), draw(1, rows, D // 2, seed=7)
    width = 2 if pairing is halves else 1
    cos, sin = angle.cos().repeat(1, 1, width), angle.sin().repeat(1, 1, width)
    record = Record(stream(rope=by_axes(pairing(D), AXES[axes]), dtype="float64"))
    got, _ = fxfuse.ops.norm_rope(
        q, None, None, None, None, None, None, None, cos, sin, positions, 0.0, 0.0,
        record.to_text(),
    )  # fmt: skip
    turned = torch.stack([angle[0, positions[a], i] for i, a in enumerate(AXES[axes])], -1)
    turn = torch.polar(torch.ones_like(turned), turned).unsqueeze(2)
    if pairing is halves:
        want = torch.complex(q[..., : D // 2], q[..., D // 2 :]) * turn
        want = torch.cat((want.real, want.imag), -1)
    else:
        want = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2))) * turn).flatten(
            -2
        )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("axes", "shape", "wanted"),
    [
        ((0,) * 7 + (2,), (1, T), r"\[axes, B\|1, T\|1\] with at least 3 axes"),
        ((0,) * 7 + (2,), (2, 1, T), r"\[axes, B\|1, T\|1\] with at least 3 axes"),
        ((0,) * 7 + (2,), None, r"\[axes, B\|1, T\|1\] with at least 3 axes"),
        ((), (3, 1, T), r"\[B\|1, T\|1\], one position a token"),
    ],
)
def test_positions_of_other_axes_than_the_records_are_refused(axes, shape, wanted):
    record = Record(stream(rope=by_axes(halves(D), axes))).to_text()
    at = None if shape is None else torch.zeros(shape, dtype=torch.int64)
    args = (draw(B, T, H, D), *[None] * 7, draw(1, 9, D), draw(1, 9, D), at, 0.0, 0.0, record)
    with pytest.raises(ValueError, match=f"positions: got .* wanted {wanted}"):
        torch.ops.fxfuse.norm_rope(*args)
    meta = (a.to("meta") if isinstance(a, Tensor) else a for a in args)
    with pytest.raises(ValueError, match=f"positions: got .* wanted {wanted}"):
        torch.ops.fxfuse.norm_rope(*meta)


def test_norm_after_the_rotation_with_offset_and_scales():
    q, w, scale = draw(B, T, H, D), draw(H, D), draw(B, T, 1)
    cos, sin = angles(D)
    norm = Norm("head", "after", has_weight=True, weight_offset=1.0)
    record = Record(stream(norm=norm, has_scale=True, scale=0.25, dtype="float64"))
    out, _ = call(record, q, q_w=w, q_s=scale, cos=cos, sin=sin)
    turned = q * cos.unsqueeze(2) + rotate_half(q) * sin.unsqueeze(2)
    want = rms(turned, 1 + w, 1e-6) * scale.unsqueeze(-1) * 0.25
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_norm_over_the_hidden_width_is_given_as_row_scale():
    q, w, (cos, sin) = draw(B, T, H, D), draw(H, D), angles(D)
    hidden = q.flatten(-2)
    given = torch.rsqrt(hidden.pow(2).mean(-1) + 1e-6).unsqueeze(-1)
    norm = Norm("given", "before", has_weight=True)
    record = Record(stream(norm=norm, has_scale=True, dtype="float64"))
    out, _ = call(record, q, q_w=w, q_s=given, cos=cos, sin=sin)
    normed = rms(hidden, w.flatten(), 1e-6).view_as(q)
    want = normed * cos.unsqueeze(2) + rotate_half(normed) * sin.unsqueeze(2)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_norm_without_rotation():
    q, w = draw(B, T, H, D), draw(D)
    out, _ = call(
        Record(stream(rope=(None, (Pass(0, 0, D),)), norm=NORM, dtype="float64")), q, q_w=w
    )
    torch.testing.assert_close(out, rms(q, w, 1e-6))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("by_head", [False, True])
def test_layer_norm_with_a_bias(when, by_head):
    q, (cos, sin) = 3 + draw(B, T, H, D), angles(D)
    w, b = (draw(H, D, seed=s) if by_head else draw(D, seed=s) for s in (1, 2))
    norm = Norm("head", when, has_weight=True, kind="layer", has_bias=True)
    out, _ = call(
        Record(stream(norm=norm, dtype="float64")), q, q_w=w, q_b=b, cos=cos, sin=sin, eps=0.1
    )

    def normed(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (D,), eps=0.1) * w + b

    def turned(x: Tensor) -> Tensor:
        return x * cos.unsqueeze(2) + rotate_half(x) * sin.unsqueeze(2)

    want = turned(normed(q)) if when == "before" else normed(turned(q))
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_l2_norm_of_long_and_of_short_rows():
    q = draw(B, T, H, D) * torch.tensor([1e-9, 1.0, 0.0, 100.0]).double()[:, None]
    norm, root = Norm("head", "before", has_weight=False, kind="l2"), D**0.5
    record = Record(
        stream(rope=(None, (Pass(0, 0, D),)), norm=norm, scale=1 / root, dtype="float64")
    )
    out, _ = call(record, q, eps=1e-3 / root)
    torch.testing.assert_close(out, torch.nn.functional.normalize(q, dim=-1, eps=1e-3))


def test_one_rounding_to_the_record_dtype():
    q, w = draw(B, T, H, D, dtype=torch.bfloat16), draw(D, dtype=torch.bfloat16)
    cos, sin = angles(D, torch.bfloat16)
    fields = {"norm": NORM, "dtype": "bfloat16"}
    out, _ = call(Record(stream(**fields)), q, q_w=w, cos=cos, sin=sin)
    wide = Record(stream(**fields | {"dtype": "float64"}))
    exact, _ = call(wide, q.double(), q_w=w.double(), cos=cos.double(), sin=sin.double())
    # Half an ulp of bfloat16 is 2^-8 of the value; float32 inside adds almost nothing to it.
    torch.testing.assert_close(out.double(), exact, rtol=2**-8 * 1.001, atol=1e-6)


@pytest.mark.parametrize("cache_heads_first", [True, False])
@pytest.mark.parametrize("slots", [[3, 0, 10, 7, 4], [-1, 0, -5, 7, 4]])
def test_store_writes_the_slots_alone(cache_heads_first, slots):
    record = Record(
        stream(dtype="float64"),
        stream(norm=NORM, dtype="float64", keep=False),
        copied(8, dtype="float64"),
        cached(cache_heads_first, "wrap"),
    )
    q, k, v, w = draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, 8), draw(D)
    cos, sin = angles(D)
    caches = [torch.full((B, G, S, d), 77.0, dtype=torch.float64) for d in (D, 8)]
    if not cache_heads_first:
        caches = [c.transpose(1, 2).contiguous() for c in caches]
    q_out, k_out = fxfuse.ops.norm_rope_store_(
        q, k, v, None, w, None, None, None, None, cos, sin, None, torch.tensor([slots]), None,
        *caches, None, None, 0.0, 1e-5, record.to_text(),
    )  # fmt: skip
    assert k_out.shape == (0,)
    normed = rms(k, w, 1e-5)
    want_k = normed * cos.unsqueeze(2) + rotate_half(normed) * sin.unsqueeze(2)
    for cache, want in zip(caches, (want_k, v), strict=True):
        by_slot = cache.transpose(1, 2) if cache_heads_first else cache
        torch.testing.assert_close(by_slot[:, slots], want)
        untouched = [s for s in range(S) if s not in [t % S for t in slots]]
        assert (by_slot[:, untouched] == 77.0).all()
    torch.testing.assert_close(q_out, q * cos.unsqueeze(2) + rotate_half(q) * sin.unsqueeze(2))


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_result_strides_are_the_contract_and_the_fake_agrees(heads_first, tokens, batch):
    packed = draw(batch, tokens, H + G, D)
    q, k = packed.split((H, G), 2)
    table = draw(1, tokens, D)
    s = stream(heads_first=heads_first, dtype="float64")
    args = (q, k, *[None] * 6, table, table, None, 0.0, 0.0, Record(s, s).to_text())
    outs = torch.ops.fxfuse.norm_rope(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = torch.ops.fxfuse.norm_rope(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        )
    for out, fake, heads in zip(outs, fakes, (H, G), strict=True):
        shape = (batch, heads, tokens, D) if heads_first else (batch, tokens, heads, D)
        want = torch.empty(shape)
        want = want.transpose(1, 2) if heads_first else want
        assert out.stride() == fake.stride() == want.stride()
        assert out.shape == fake.shape == want.shape


GRADED = {
    "llama": (stream(norm=NORM, dtype="float64"), (D,), None),
    "after, offset, per head": (
        stream(norm=Norm("head", "after", True, 1.0), has_scale=True, scale=0.5, dtype="float64"),
        (H, D),
        (B, T, 1),
    ),
    "neighbours, partial": (
        stream(rope=neighbours(D, 8), norm=NORM, dtype="float64", heads_first=True),
        (D,),
        None,
    ),
    "given": (
        stream(norm=Norm("given", "before", True), has_scale=True, dtype="float64"),
        (H, D),
        (1, T, H),
    ),
    "no norm": (stream(dtype="float64"), None, None),
    "by position": (stream(dtype="float64"), None, None),
    "by three positions": (
        stream(rope=by_axes(neighbours(D, 8), (1, 0, 2, 2)), norm=NORM, dtype="float64"),
        (D,),
        None,
    ),
    "layer": (
        stream(
            norm=Norm("head", "before", True, kind="layer", has_bias=True),
            has_scale=True,
            dtype="float64",
        ),
        (D,),
        (B, T, 1),
    ),
    "layer, after, per head": (
        stream(norm=Norm("head", "after", True, 1.0, "layer", True), scale=2.0, dtype="float64"),
        (H, D),
        None,
    ),
    "l2": (stream(norm=Norm("head", "before", True, kind="l2"), dtype="float64"), (D,), None),
}


# Rows of the tables, also from the end; a row of them for each axis.
ONE_ROW = torch.tensor([[3, 0, -1, 4, 4]])
POSITIONS = {
    "by position": ONE_ROW,
    "by three positions": torch.stack([ONE_ROW, ONE_ROW.flip(1), ONE_ROW.roll(2, 1)]),
}


def graded_inputs(name: str) -> tuple[tuple, str]:
    one, weight_shape, scale_shape = GRADED[name]
    q, k = draw(B, T, H, D).requires_grad_(), draw(B, T, H, D, seed=3).requires_grad_()
    w = draw(*weight_shape, seed=1).requires_grad_() if weight_shape else None
    scale = draw(*scale_shape, seed=2).requires_grad_() if scale_shape else None
    has_bias = one.norm is not None and one.norm.has_bias
    b = draw(*weight_shape, seed=4).requires_grad_() if has_bias else None
    cos, sin = angles(D)
    # An eps of 1 clamps the half of all rows.
    tables = (cos, sin, POSITIONS.get(name))
    return (q, k, w, w, b, b, scale, scale, *tables, 1e-6, 1.0), Record(one, one).to_text()


@pytest.mark.parametrize("name", GRADED)
def test_gradients_equal_those_of_the_reference(name):
    args, record = graded_inputs(name)
    leaves = {id(a): a for a in args if isinstance(a, Tensor) and a.requires_grad}.values()
    outs = torch.ops.fxfuse.norm_rope(*args, record)
    wants = fxfuse.reference.norm_rope(*args, Record.from_text(record))
    cotangents = [draw(*out.shape, seed=9) for out in outs]
    got = torch.autograd.grad(outs, leaves, cotangents)
    want = torch.autograd.grad(wants, leaves, cotangents)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    args, record = graded_inputs("after, offset, per head")
    small = [a[:1, :2].detach().requires_grad_() for a in args[:2]]
    weight, scale, cos, sin = args[2], args[6][:1, :2].detach().requires_grad_(), *args[8:10]

    def run(q, k, w, s):
        return torch.ops.fxfuse.norm_rope(
            q, k, w, w, None, None, s, s, cos[:, :2], sin[:, :2], None, 1e-6, 1e-2, record
        )

    assert torch.autograd.gradcheck(run, (*small, weight, scale))


def test_table_gradients_are_refused():
    q, (cos, sin) = draw(B, T, H, D).requires_grad_(), angles(D)
    with pytest.raises(NotImplementedError, match="detach the tables"):
        call(Record(stream(dtype="float64")), q, cos=cos.requires_grad_(), sin=sin)


def test_a_record_that_does_not_tile_its_row_is_refused():
    one = dataclasses.replace(stream(), passes=(Pass(0, 0, 1),))
    with pytest.raises(ValueError, match="cover x channels"):
        call(Record(one), draw(B, T, H, D), cos=draw(1, T, D), sin=draw(1, T, D))


def test_a_row_of_other_width_is_refused():
    with pytest.raises(ValueError, match=r"q: got shape \(2, 5, 4, 8\)"):
        call(Record(stream()), draw(B, T, H, 8), cos=draw(1, T, D), sin=draw(1, T, D))


def test_q_and_k_of_other_numbers_of_tokens_are_refused():
    one = stream()
    with pytest.raises(ValueError, match=r"k: got \[2, 4\] batch rows and tokens, wanted q's"):
        call(
            Record(one, one), draw(B, T, H, D), draw(B, T - 1, G, D), cos=draw(1, T, D),
            sin=draw(1, T, D),
        )  # fmt: skip


@pytest.mark.parametrize("name", GRADED)
def test_opcheck_norm_rope(name):
    args, record = graded_inputs(name)
    torch.library.opcheck(torch.ops.fxfuse.norm_rope.default, (*args, record))


@pytest.mark.parametrize("with_v", [True, False])
def test_opcheck_norm_rope_store(with_v):
    norm = Norm("head", "before", has_weight=True, kind="layer", has_bias=True)
    one = stream(norm=norm, dtype="float32", heads_first=True)
    record = Record(one, one, copied(8) if with_v else None, cached(True))
    q, k, v, w = (
        draw(*s, dtype=torch.float32) for s in ((B, T, H, D), (B, T, G, D), (B, T, G, 8), (D,))
    )
    cos, sin = angles(D, torch.float32)
    caches = [torch.zeros(B, G, S, d) for d in (D, 8)]
    torch.library.opcheck(
        torch.ops.fxfuse.norm_rope_store_.default,
        (
            q, k, v if with_v else None, w, w, w, w, None, None, cos, sin, None,
            torch.arange(T)[None], None, caches[0], caches[1] if with_v else None, None, None,
            1e-6, 1e-6, record.to_text(),
        ),
    )  # fmt: skip


def test_records_read_back_as_written():
    one = stream(norm=Norm("head", "after", True, 1.0), has_scale=True, scale=0.5)
    record = Record(one, one, copied(8), cached(True, "wrap"))
    assert Record.from_text(record.to_text()) == record
