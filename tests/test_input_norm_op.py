"""The norm of a sum as a stage of the projection's op: eager, fake, compiled on a CPU, by a user's
provider; against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import fxfuse
from fxfuse import reference
from fxfuse.lowering import providers
from fxfuse.patterns.record import AddNorm, Norm, Record
from tests.projected_sites import (
    BEHIND_NORMS,
    EPS,
    ROWS_BEHIND_NORMS,
    SHAPES,
    Shape,
    arguments,
    tensors,
    truth,
)
from tests.sites import with_dtype

OP = torch.ops.fxfuse.project_norm_rope_store_
BEHIND = BEHIND_NORMS | ROWS_BEHIND_NORMS
EVERY = SHAPES | ROWS_BEHIND_NORMS
NAMES = providers.arguments("project_norm_rope_store_")


def text_of(shape: Shape, dtype: torch.dtype) -> str:
    record = with_dtype(shape.record, str(dtype).removeprefix("torch."))
    return Record(**{**vars(record), "projected": True}).to_text()


def results(
    shape: Shape, given: dict[str, Tensor], op: Callable[..., Any] = OP
) -> tuple[list[Tensor], list[Tensor]]:
    """What the op returns, and that with the caches, without what is empty."""
    returned = list(op(*arguments(given), *EPS, text_of(shape, given["x"].dtype)))
    kept = [x for x in returned if x.numel()]
    return returned, [*kept, given["k_cache"], given["v_cache"]]


def errors(got: list[Tensor], want: tuple[Tensor, ...]) -> list[float]:
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


@pytest.mark.null
@pytest.mark.parametrize("name", BEHIND)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_in_eager_code_against_float64(name: str, dtype: torch.dtype, bound: float) -> None:
    """bfloat16 rounds the norm, the products and the results: a few times 2**-9."""
    shape = EVERY[name]
    given = tensors(shape, dtype)
    want = truth(shape, given)
    returned, got = results(shape, given)
    assert max(errors(got, want)) < bound
    front = shape.record.front
    assert front is not None
    if front.keep_sum:
        assert torch.equal(returned[2], given["x"] + given["residual"])
    assert (returned[2].numel() > 0) == front.keep_sum


@pytest.mark.null
@pytest.mark.parametrize("name", EVERY)
def test_fakes_are_laid_out_as_results(name: str) -> None:
    given = tensors(EVERY[name], torch.float32)
    real, _ = results(EVERY[name], given)
    fake, _ = results(EVERY[name], {n: x.to("meta") for n, x in given.items()})
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.null
@pytest.mark.parametrize(("name", "given"), [("qwen3", True), ("qwen3, normed", False)])
def test_a_residual_is_there_where_the_record_has_a_front(name: str, given: bool) -> None:
    shape = EVERY[name]
    operands = tensors(shape, torch.float32)
    operands.pop("residual", None)
    if given:
        operands["residual"] = operands["x"]
    with pytest.raises(ValueError, match="residual: got"):
        results(shape, operands)


@pytest.mark.null
def test_records_read_back_as_written_and_older_texts_are_read() -> None:
    record = SHAPES["qwen3, normed"].record
    assert Record.from_text(record.to_text()) == record
    plain = SHAPES["qwen3"].record
    assert '"front":null,' in plain.to_text()
    assert Record.from_text(plain.to_text().replace('"front":null,', "")) == plain


@pytest.mark.null
def test_the_front_of_a_record() -> None:
    front = EVERY["qwen3, 3 rows, 1 + w"].record.front
    assert front == AddNorm(64, Norm("head", "before", True, 1.0), 2, keep_sum=True)


@pytest.mark.cpu
@pytest.mark.parametrize("name", BEHIND)
def test_through_inductor_on_a_cpu(name: str) -> None:
    shape = EVERY[name]
    given = tensors(shape, torch.float32)
    want = truth(shape, given)
    providers.register()
    torch._dynamo.reset()
    with torch.no_grad(), fresh_cache():
        _, got = results(shape, given, torch.compile(lambda *args: OP(*args), fullgraph=True))
    assert max(errors(got, want)) < 1e-6


@pytest.mark.cpu
def test_a_provider_returns_the_sum_as_the_third_result() -> None:
    called: list[Record] = []

    def mine(*, record: Record, **call: Any) -> Any:
        called.append(record)
        return reference.project_norm_rope_store_(*(call[n] for n in NAMES[:-1]), record)

    shape = EVERY["phi, 2 x 3, normed"]
    given = tensors(shape, torch.float32)
    want = truth(shape, given)
    torch._dynamo.reset()
    with (
        fxfuse.register_provider("mine", mine, ops=["project_norm_rope_store_"]),
        torch.no_grad(),
        fresh_cache(),
    ):
        providers.register()
        _, got = results(shape, given, torch.compile(lambda *args: OP(*args), fullgraph=True))
    assert max(errors(got, want)) < 1e-6
    assert [record.front for record in called] == [shape.record.front]
