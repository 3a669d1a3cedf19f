"""The op fxfuse::decode_attention: its numbers against float64 and against torch's attention, its
fake, and what it refuses.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxfuse
from fxfuse.attention import decode_attention
from fxfuse.lowering import providers
from fxfuse.patterns.record import DecodeAttention
from tests.decode_sites import INF, SHAPES, arguments, record_of, tensors, truth

pytestmark = pytest.mark.null

# Rounding of the result alone: half a unit in the last place, and what float32 sums add.
BOUNDS = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 2.5e-3, torch.float16: 3e-4}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-9))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_results_against_float64_and_torch(name: str, dtype: torch.dtype, scale: float) -> None:
    given = tensors(SHAPES[name], dtype)
    want = truth(given, scale)
    got = decode_attention(*arguments(given, scale))
    torchs = F.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], given.get("mask"), scale=scale, enable_gqa=True
    )
    assert got.dtype == dtype and got.is_contiguous() and not got.isnan().any()
    assert error(got, want) <= BOUNDS[dtype]
    assert error(torchs, want) <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize("is_boolean", [True, False])
def test_a_row_that_attends_nothing_is_zero_as_torchs(is_boolean: bool) -> None:
    given = tensors(SHAPES["nothing"], torch.float32)
    if not is_boolean:
        given["mask"] = torch.full(given["mask"].shape, -INF)
    torchs = F.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], given["mask"], enable_gqa=True
    )
    assert torch.equal(decode_attention(*arguments(given)), torch.zeros_like(given["q"]))
    assert torch.equal(torchs, torch.zeros_like(given["q"]))


def test_the_least_number_is_attended() -> None:
    """Masks of finfo.min weigh all slots alike where nothing else is attended."""
    given = tensors(SHAPES["no mask"], torch.float32)
    given["mask"] = torch.full((1, 1, 1, SHAPES["no mask"].slots), torch.finfo(torch.float32).min)
    got = decode_attention(*arguments(given))
    mean = given["v"].mean(2, keepdim=True).repeat_interleave(2, 1)
    torch.testing.assert_close(got, mean)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (1, 1, 40), (1, 4, 1, 1), (1, 1, 1, 1)])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    given = tensors(SHAPES["qwen3"], torch.float32)
    given["mask"] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert error(decode_attention(*arguments(given)), truth(given)) <= BOUNDS[torch.float32]


def test_not_a_number_where_it_is_attended_is_not_lost() -> None:
    given = tensors(SHAPES["qwen3"], torch.float32)
    for name in "kv":
        broken = {**given, name: given[name].clone()}
        broken[name][:, 0, 3] = math.nan
        got = decode_attention(*arguments(broken))
        assert got[:, :2].isnan().any() and not got[:, 2:].isnan().any()


@pytest.mark.parametrize("name", SHAPES)
def test_the_contract_of_an_op(name: str) -> None:
    args = arguments(tensors(SHAPES[name], torch.float32))
    torch.library.opcheck(torch.ops.fxfuse.decode_attention.default, args)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"q": (1, 4, 2, 16)}, "q: got shape"),
        ({"k": (1, 4, 40, 16)}, "k: got shape"),
        ({"v": (1, 2, 39, 16)}, "v: got shape"),
        ({"mask": (1, 3, 1, 40)}, "mask: got shape .* broadcasts to"),
        ({"mask": (1, 1, 1, 1, 40)}, "mask: got shape .* broadcasts to"),
    ],
)
def test_operands_that_do_not_fit_the_record_are_refused(changed, wanted) -> None:
    given = tensors(SHAPES["qwen3"], torch.float32)
    record = record_of(given).to_text()
    given |= {n: torch.zeros(shape) for n, shape in changed.items()}
    args = [given[n] for n in ("q", "k", "v", "mask")]
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=wanted):
            torch.ops.fxfuse.decode_attention(*(x.to(device) for x in args), None, record)


def test_the_record_as_text() -> None:
    record = DecodeAttention(16, 8, 128, 64, 1024, "bool", "bfloat16")
    assert DecodeAttention.from_text(record.to_text()) == record


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["qwen3", "by head, added", "no mask", "nothing"])
def test_through_inductor_as_loops(name: str) -> None:
    torch._dynamo.reset()
    providers.register()
    providers.chosen.clear()
    given = tensors(SHAPES[name], torch.float32)
    args = arguments(given)
    compiled = torch.compile(
        lambda *x: torch.ops.fxfuse.decode_attention(*x, *args[4:]), fullgraph=True
    )
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        got = compiled(*args[:4])
    assert [c.provider for c in providers.chosen] == ["loops"]
    assert error(got, truth(given)) <= 1e-6


@pytest.mark.cpu
def test_another_library_may_take_it() -> None:
    """A function of tensors, as the documentation of register_provider has it."""
    torch._dynamo.reset()
    providers.register()
    providers.chosen.clear()

    def run(*, q, k, v, mask, scale, record, **rest):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    given = tensors(SHAPES["qwen3"], torch.float32)
    args = arguments(given)
    with (
        fxfuse.register_provider("torchs", run, ops=["decode_attention"]),
        torch.no_grad(),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        compiled = torch.compile(
            lambda *x: torch.ops.fxfuse.decode_attention(*x, *args[4:]), fullgraph=True
        )
        got = compiled(*args[:4])
    assert [c.provider for c in providers.chosen] == ["torchs"]
    assert error(got, truth(given)) <= 1e-6
