"""fxfuse::add_rms_norm against its formula in float64, its rounding points and its contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfuse import add_norm
from fxfuse.patterns.record import AddNorm, Norm

pytestmark = pytest.mark.null

NORM = Norm("head", "before", has_weight=True)
GEMMA = Norm("head", "before", has_weight=True, weight_offset=1.0)
BARE = Norm("head", "before", has_weight=False)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def call(record: AddNorm, *addends: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    three = (*addends, None, None)[:3]
    return add_norm.add_rms_norm(*three, weight, 1e-5, record.to_text())


def test_a_record_is_its_text() -> None:
    record = AddNorm(24, GEMMA, addends=2, keep_sum=True, dtype="bfloat16")
    assert AddNorm.from_text(record.to_text()) == record


@pytest.mark.parametrize("norm", [NORM, GEMMA, BARE], ids=["weight", "1 + weight", "bare"])
@pytest.mark.parametrize("addends", [1, 2, 3])
def test_formula(norm: Norm, addends: int) -> None:
    parts = [draw(2, 3, 24, seed=i) for i in range(addends)]
    weight = draw(24, seed=9) if norm.has_weight else None
    record = AddNorm(24, norm, addends, keep_sum=True, dtype="float64")
    total, normed = call(record, *parts, weight=weight)
    want = sum(parts[1:], parts[0])
    scale = 1.0 if weight is None else weight + norm.weight_offset
    torch.testing.assert_close(total, want, rtol=0, atol=0)
    wanted = want * torch.rsqrt(want.pow(2).mean(-1, keepdim=True) + 1e-5) * scale
    torch.testing.assert_close(normed, wanted, rtol=1e-13, atol=1e-13)


def test_the_norm_reads_the_rounded_sum_and_rounds_once() -> None:
    x, r, s = (draw(4, 40, dtype=torch.bfloat16, seed=i) for i in range(3))
    record = AddNorm(40, BARE, 3, keep_sum=True, dtype="bfloat16")
    total, normed = call(record, x, r, s)
    rounded = ((x + r) + s).float()
    assert torch.equal(total, rounded.bfloat16())
    want = rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(normed, want.bfloat16())


def test_a_sum_has_the_dtype_of_torchs_addition() -> None:
    record = AddNorm(8, BARE, 2, keep_sum=True, dtype="bfloat16")
    total, normed = call(record, draw(3, 8, dtype=torch.float32), draw(3, 8, dtype=torch.bfloat16))
    assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)


def test_results_are_dense_and_no_views() -> None:
    x = draw(3, 2, 16).transpose(0, 1)
    total, normed = call(AddNorm(16, BARE, 1, keep_sum=True, dtype="float64"), x)
    assert total.is_contiguous() and normed.is_contiguous() and total.data_ptr() != x.data_ptr()
    assert call(AddNorm(16, BARE, 1, dtype="float64"), x)[0].shape == (0,)


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [([(2, 8), (8,)], "of one shape"), ([(2, 9), (2, 9)], "of one shape"), ([(2, 8)], "1 addends")],
)
def test_wrong_shapes_are_told(shapes: list[tuple[int, ...]], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        call(AddNorm(8, BARE, 2, dtype="float64"), *(draw(*s) for s in shapes))


@pytest.mark.parametrize("addends", [1, 2, 3])
@pytest.mark.parametrize("keep", [True, False])
def test_gradients(addends: int, keep: bool) -> None:
    parts = [draw(2, 3, 6, seed=i).requires_grad_() for i in range(addends)]
    weight = draw(6, seed=9).requires_grad_()
    record = AddNorm(6, GEMMA, addends, keep_sum=keep, dtype="float64")

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return call(record, *inputs[:-1], weight=inputs[-1])[0 if keep else 1 :]

    torch.autograd.gradcheck(run, (*parts, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("addends", [1, 2, 3])
def test_opcheck(dtype: torch.dtype, addends: int) -> None:
    parts = [draw(2, 3, 8, dtype=dtype, seed=i).requires_grad_() for i in range(addends)]
    weight = draw(8, dtype=dtype, seed=9).requires_grad_()
    record = AddNorm(8, NORM, addends, keep_sum=True, dtype=str(dtype).removeprefix("torch."))
    args = (*(*parts, None, None)[:3], weight, 1e-5, record.to_text())
    torch.library.opcheck(torch.ops.fxfuse.add_rms_norm.default, args)
