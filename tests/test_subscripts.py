"""k and v written by a subscript that takes a part of their buffer: kv[0, blocks, offsets] = k.

In: such writes of one buffer. Out: the buffer as eager leaves it, canaries and all, and one store
of both, or the reason why a write stays the model's. Run as a program, the file writes them by the
Triton kernel, in its interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.interpreted import interpreted, launching
from tests.test_flat import ROPE, Rotated, check, draw
from tests.test_joined_rows import SLOTS, H, N, P, T, Write
from tests.toys import D, G, assert_like


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def in_front(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[0, slots // P, slots % P] = k
    kv[1, slots // P, slots % P] = v


def from_the_end(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[-1, slots // P, slots % P] = k
    kv[-2, slots // P, slots % P] = v


def in_the_midst(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, 0, slots % P] = k
    kv[slots // P, 1, slots % P] = v


def behind_heads(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, 0, :, slots % P] = k
    kv[slots // P, 1, :, slots % P] = v


def flat(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[0, slots] = k
    kv[1, slots] = v


def a_layers(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[1, 0, slots] = k
    kv[1, 1, slots] = v


def channels(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, slots % P, :, :D] = k
    kv[slots // P, slots % P, :, -D:] = v


def heads(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots, :G] = k
    kv[slots, G : 2 * G] = v


def with_an_axis_of_one(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[0, None, :, slots] = k.transpose(0, 1)
    kv[1, None, :, slots] = v.transpose(0, 1)


def one_of_two_ways(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[0, slots // P, slots % P] = k
    kv[1].view(-1, G, D)[slots] = v


def by_an_ellipsis(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, ..., 0, slots % P, :, :] = k
    kv[slots // P, ..., 1, slots % P, :, :] = v


FIRST, SECOND, FLAT = (2, N, P, G, D), (N, 2, P, G, D), (2, N * P, G, D)
WRITES: dict[Write, tuple[tuple[int, ...], str]] = {
    in_front: (FIRST, "01hd"),
    from_the_end: (FIRST, "01hd"),
    in_the_midst: (SECOND, "01hd"),
    behind_heads: ((N, 2, G, P, D), "0h1d"),
    flat: (FLAT, "0hd"),
    a_layers: ((3, *FLAT), "0hd"),
    channels: ((N, P, G, 2 * D), "01hd"),
    heads: ((N * P, 2 * G, D), "0hd"),
    with_an_axis_of_one: ((2, G, N * P, D), "bh0d"),
    by_an_ellipsis: (SECOND, "01hd"),
}
COMPILERS = pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)


def stored(write: Write, shape: tuple[int, ...], compiler: str = "eager") -> fxfuse.Report:
    def finish(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> Any:
        write(kv, slots, k, v)
        return q

    rows = [(T, n, D) for n in (H, G, G)]
    kv = torch.full(shape, 3.0)
    return check(Rotated(finish), rows, torch.arange(T), kv, SLOTS, compiler=compiler)


@COMPILERS
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_both_parts_are_stored_by_one_op(write: Write, compiler: str) -> None:
    shape, axes = WRITES[write]
    report = stored(write, shape, compiler)
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and not report.refused
    assert fused.record.store.k.axes == fused.record.store.v.axes == axes


@pytest.mark.null
def test_a_part_in_a_subscript_beside_one_of_a_call_of_its_own() -> None:
    """Pages for the one, slots for the other: indices of one tensor, divided in one of the two."""
    report = stored(one_of_two_ways, FIRST)
    assert [f.stages for f in report.fused] == [(ROPE, "store(k,v)")] and not report.refused


@pytest.mark.null
def test_of_any_number_of_pages() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> Any:
        in_the_midst(kv, slots, k, v)
        return q

    run = torch.compile(Rotated(finish), backend=fxfuse.Backend(compiler="eager", strict=True))
    for count in (N, N + 3):
        want, got = (torch.full((count, *SECOND[1:]), 3.0) for _ in "ab")
        torch._dynamo.mark_dynamic(got, 0)
        rows = [draw(T, n, D, seed=n) for n in (H, G, G)]
        with torch.no_grad():
            eager = Rotated(finish)(*rows, torch.arange(T), want, SLOTS)
            assert_like([run(*rows, torch.arange(T), got, SLOTS), got], [eager, want])
    assert [f.stages for f in fxfuse.last_report().fused] == [(ROPE, "store(k,v)")]


# --- parts that are none, or that nobody can take at the op ------------------------------------


def every_other_head(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots, ::2] = k
    kv[slots, 1::2] = v


def one_part_twice(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[0, slots] = k
    kv[0, slots] = v


def read_in_between(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[0, slots] = k
    kv[1, slots] = v + kv[0, 0, 0, 0]


def written_in_between(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[0, slots] = k
    kv.add_(1)
    kv[1, slots] = v


@pytest.mark.null
@pytest.mark.parametrize("write", [one_part_twice, read_in_between, written_in_between])
def test_other_parts_are_right(write: Write) -> None:
    report = stored(write, FLAT)
    assert [f.stages for f in report.fused] != [(ROPE, "store(k,v)")]


@pytest.mark.null
def test_a_part_that_is_taken_by_steps_is_told() -> None:
    report = stored(every_other_head, (N * P, 2 * G, D))
    assert [f.stages for f in report.fused] == [(ROPE,)]
    assert [(r.stage, r.reason) for r in report.refused] == [
        ("store", "a part of a cache that is taken inside one call, by aten.slice.Tensor")
    ]
    assert "calls of its own" in report.refused[0].do


def by_tensors_of_no_dims(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[torch.tensor(0), slots] = k
    kv[torch.tensor(1), slots] = v


@pytest.mark.null
def test_a_part_that_only_running_tells_is_told() -> None:
    report = stored(by_tensors_of_no_dims, FLAT)
    assert [f.stages for f in report.fused] == [(ROPE,)]
    (refusal,) = report.refused
    assert refusal.stage == "store" and "DataDependent" in refusal.reason
    assert "kv[0, slots]" in refusal.do


# --- by the kernel -----------------------------------------------------------------------------


def main() -> None:
    launches = launching()
    for write, (shape, _) in WRITES.items():
        torch._dynamo.reset()
        assert [f.stages for f in stored(write, shape).fused] == [(ROPE, "store(k,v)")]
    assert launches == ["norm_rope_store_"] * len(WRITES)
    print("done")


@pytest.mark.aot
@pytest.mark.long
def test_the_kernel_stores_to_both_parts() -> None:
    done = interpreted(__file__)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
