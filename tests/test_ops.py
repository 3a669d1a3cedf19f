"""The ops against formulas written as the models write them, in float64."""

import pytest
import torch
from torch import Tensor

import fxfuse.ops
from fxfuse.patterns.record import Norm, Pair, Pass, Record, Rotation
from tests.op_operands import B, D, G, H, S, T, angles, call, draw, rms, rotate_half, stream
from tests.sites import (
    NORM,
    by_axes,
    cached,
    copied,
    halves,
    neighbours,
    operands,
    unrotated,
    untouched,
)

pytestmark = pytest.mark.null


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


@pytest.mark.parametrize("name", ["pages, skipped", "8 bits, shuffled", "k stored alone"])
def test_of_no_tokens_nothing_is_stored(name):
    case = operands(name, tokens=0)
    outs = case.op()(*case.arguments())
    assert outs[0].shape[1] == 0 and untouched(case)


def test_a_slot_that_is_skipped_is_skipped_in_every_batch_row():
    rows = {"rope": unrotated(D), "dtype": "float64"}
    q_rows, k_rows = stream(**rows), stream(**rows, keep=False)
    record = Record(q_rows, k_rows, None, cached(False, "skip"))
    q, k = draw(B, T, H, D), draw(B, T, G, D)
    cache = torch.full((B, S, G, D), 77.0, dtype=torch.float64)
    slots = torch.tensor([[3, -1, 0, -1, 7]])
    fxfuse.ops.norm_rope_store_(
        q, k, None, *[None] * 9, slots, None, cache, None, None, None, 0.0, 0.0, record.to_text()
    )
    assert torch.equal(cache[:, [3, 0, 7]], k[:, [0, 2, 4]])
    assert (cache[:, [s for s in range(S) if s not in (3, 0, 7)]] == 77.0).all()
