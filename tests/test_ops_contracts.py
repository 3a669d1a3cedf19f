"""What the ops promise beside their numbers: gradients, strides, fakes, and errors that say what is
wrong."""

import dataclasses

import pytest
import torch
from torch import Tensor

import fxfuse.ops
from fxfuse.patterns.record import Norm, Pass, Record
from tests.op_operands import B, D, G, H, S, T, angles, call, draw, stream
from tests.sites import NORM, SITES, by_axes, cached, copied, halves, neighbours, site

pytestmark = pytest.mark.null


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


def test_a_norm_of_v_with_a_weight_is_refused():
    weighted = dataclasses.replace(site(D, store=cached(True)), v=stream(norm=NORM))
    with pytest.raises(ValueError, match="record of v: a norm with a weight"):
        fxfuse.ops.read_record(weighted.to_text())


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


def test_a_text_of_a_graph_that_was_cached_before_projections_is_read() -> None:
    record = SITES["qwen3"]
    text = record.to_text()
    assert Record.from_text(text.replace(',"projected":false', "")) == record
    assert ',"projected":false' in text
