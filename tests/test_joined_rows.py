"""k and v joined into one tensor that one call writes: kv[:, slots] = torch.stack([k, v]).

In: what is joined, and where it is written. Out: the buffer as eager leaves it, canaries and all,
and one store of both, or the reason why the write stays the model's. Run as a program, the file
writes them by the Triton kernel, in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.interpreted import interpreted, launching
from tests.test_flat import ROPE, Rotated, check
from tests.toys import D, G

H, T = 4, 5
# Pages, and tokens a page.
N, P = 6, 4
SLOTS = torch.tensor([17, -3, 8, 0, 22])
Write = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def stack_in_front(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots // P, slots % P] = torch.stack([k, v])


def stack_v_first(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots // P, slots % P] = torch.stack([v, k])


def stack_behind_slots(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, slots % P] = torch.stack([k, v], dim=1)


def stack_behind_heads(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv.index_put_((slots,), torch.stack([k, v], -2))


def stack_by_page(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Pages, k or v, places in a page: what stands apart puts its axes in front."""
    kv[slots // P, :, slots % P] = torch.stack([k, v], 1)


def cat_of_channels(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, slots % P] = torch.cat([k, v], -1)


def cat_of_heads(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, slots % P] = torch.cat((k, v), dim=1)


def cat_by_index_copy(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv.index_copy_(0, slots % (N * P), torch.cat((k, v), 1))


def cat_in_front(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots // P, slots % P] = torch.cat((k[None], v[None]))


def cat_of_unlike_widths(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots] = torch.cat([k, v[..., : D // 2]], -1)


def stack_of_a_part(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[1][:, slots] = torch.stack([k, v])


def stack_in_a_subscript(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[1, :, slots // P, slots % P] = torch.stack([k, v])


def cast(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def stack_of_8_bits(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots] = torch.stack([cast(k).view(torch.uint8), cast(v).view(torch.uint8)])


def stack_behind_a_cast(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv.view(torch.float8_e4m3fn)[:, slots] = torch.stack([k, v]).to(torch.float8_e4m3fn)


def cat_behind_a_scale(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, slots % P] = cast(torch.cat([k, v], -1) * 0.5).view(torch.uint8)


def stack_moved(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots] = torch.stack([k, v], -1).permute(3, 0, 1, 2)


def stack_flattened(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots] = torch.stack([k, v], 1).flatten(1, 2)


def cat_of_channels_as_heads_in_turns(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, slots % P] = torch.cat([k, v], -1).view(len(k), -1, D)


def cat_of_heads_unflattened(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots // P, slots % P] = torch.cat([k, v], 1).view(len(k), 2, -1, D)


def stack_of_8_bits_flattened(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    joined = torch.stack([cast(k), cast(v)], 2).flatten(1, 2)
    kv[slots] = joined.contiguous().view(torch.uint8)


def k_written(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """After it was joined: nobody reads it then."""
    joined = torch.stack([k, v])
    k.mul_(2)
    kv[:, slots] = joined


# Shapes of caches; a negative size is in heads.
FIRST, FLAT, WIDE = (2, N, P, -1, D), (2, N * P, -1, D), (N, P, -1, 2 * D)
WRITES: dict[Write, tuple[int, ...]] = {
    stack_in_front: FIRST,
    stack_v_first: FIRST,
    stack_behind_slots: (N, P, 2, -1, D),
    stack_behind_heads: (N * P, -1, 2, D),
    stack_by_page: (N, 2, P, -1, D),
    cat_of_channels: WIDE,
    cat_of_heads: (N, P, -2, D),
    cat_by_index_copy: (N * P, -2, D),
    cat_in_front: FIRST,
    cat_of_unlike_widths: (N * P, -1, D + D // 2),
    stack_of_a_part: (3, *FLAT),
    stack_in_a_subscript: (3, *FIRST),
    stack_of_8_bits: FLAT,
    stack_behind_a_cast: FLAT,
    cat_behind_a_scale: WIDE,
    stack_moved: FLAT,
    stack_flattened: (N * P, -2, D),
    cat_of_channels_as_heads_in_turns: (N, P, -2, D),
    cat_of_heads_unflattened: (N, P, 2, -1, D),
    stack_of_8_bits_flattened: (N * P, -2, D),
    k_written: FLAT,
}
BITS = (stack_of_8_bits, stack_behind_a_cast, cat_behind_a_scale, stack_of_8_bits_flattened)
COMPILERS = pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)


def stored(
    write: Write, shape: tuple[int, ...], compiler: str = "eager", tokens: int = T, heads: int = G
) -> fxfuse.Report:
    def finish(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> Any:
        seen = write(kv, slots, k, v)
        return q if seen is None else (q, seen)

    rows = [(tokens, n, D) for n in (H, heads, heads)]
    dtype = torch.uint8 if write in BITS else torch.float32
    kv = torch.full([n if n > 0 else -n * heads for n in shape], 3, dtype=dtype)
    given = (torch.arange(tokens), kv, SLOTS[:tokens])
    return check(Rotated(finish), rows, *given, compiler=compiler)


@COMPILERS
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_joined_rows_are_stored_by_one_op(write: Write, compiler: str) -> None:
    report = stored(write, WRITES[write], compiler)
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and not report.refused
    assert not fused.record.k.keep


@pytest.mark.null
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 2), (2, 2), (5, 1)])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_sizes_do_not_tell_axes_apart(write: Write, tokens: int, heads: int) -> None:
    (fused,) = stored(write, WRITES[write], tokens=tokens, heads=heads).fused
    assert fused.stages == (ROPE, "store(k,v)")


@pytest.mark.null
def test_joined_rows_that_are_read_too_are_joined_behind_the_op() -> None:
    def write(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> Tensor:
        joined = torch.stack([k, v])
        kv[:, slots] = joined
        return joined * 2

    (fused,) = stored(write, FLAT).fused
    assert fused.stages == (ROPE, "store(k,v)") and fused.record.k.keep


# --- what is no join of whole rows, as they are stored -----------------------------------------


def v_written(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    joined = torch.stack([k, v])
    v.mul_(2)
    kv[:, slots] = joined


def joined_written(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    joined = torch.stack([k, v])
    joined[0].mul_(2)
    kv[:, slots] = joined


def read_before(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> Tensor:
    joined = torch.stack([k, v])
    seen = kv[0, 0] + joined.sum()
    kv[:, slots] = joined
    return seen


def twice_k(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots] = torch.stack([k, k])


def of_three(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots] = torch.stack([k, v, k + v])


def v_changed(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots] = torch.stack([k, v.tanh() * v])


def joined_changed(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots] = torch.stack([k, v]).tanh()


def k_changed(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[0, slots] = k.tanh()


def of_tokens(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[torch.cat([slots, slots + 1])] = torch.cat([k, v])


def flattened_over_heads(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots] = torch.stack([k, v], 1).flatten(1)


def scaled_apart(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    by = torch.tensor([0.5, 2.0], device=k.device).view(2, 1, 1, 1)
    kv[:, slots] = (torch.stack([k, v]) / by).to(torch.float8_e4m3fn).view(torch.uint8)


def cast_written(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    joined = torch.stack([k, v]).to(torch.float8_e4m3fn).view(torch.uint8)
    joined[1].zero_()
    kv[:, slots] = joined


def a_part_of_the_join(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[:, slots] = torch.stack([k, v])[..., : D // 2]


def of_unlike_rows(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    kv[slots] = torch.cat([k[:, :1], v], 1)


BITS += (scaled_apart, cast_written)
APART = "aten.index_put_.default stores k and v, of which one cannot join"
MISSES: dict[Write, tuple[tuple[int, ...], str]] = {
    v_written: (FLAT, "stored rows that aten.stack.default makes of the rotated ones"),
    joined_written: (FLAT, "stored rows that aten.select_scatter.default makes of the rotated"),
    read_before: (FLAT, "a result that is read before it is stored"),
    twice_k: (FLAT, APART),
    of_three: ((3, N * P, G, D), "stored rows that aten.stack.default makes of the rotated ones"),
    v_changed: (FLAT, APART),
    joined_changed: (FLAT, "stored rows that aten.tanh.default makes of the rotated ones"),
    k_changed: (FLAT, "stored rows that aten.tanh.default makes of the rotated ones"),
    of_tokens: ((N * P + 1, G, D), "stored rows that aten.cat.default makes of the rotated ones"),
    flattened_over_heads: ((N * P, 2 * G * D), "stored rows that aten.stack.default makes of the"),
    scaled_apart: (FLAT, "stored rows that aten.stack.default makes of the rotated ones"),
    cast_written: (FLAT, "between their cast and their store"),
    a_part_of_the_join: ((2, N * P, G, D // 2), "stored rows that aten.stack.default makes of the"),
    of_unlike_rows: ((N * P, G + 1, D), "that are a part of [5, 2, 16]"),
}  # fmt: skip


@pytest.mark.null
@pytest.mark.parametrize("write", MISSES, ids=lambda f: f.__name__)
def test_other_joins_stay_the_models_and_are_told(write: Write) -> None:
    shape, reason = MISSES[write]
    report = stored(write, shape)
    assert all("store" not in stage for f in report.fused for stage in f.stages)
    told = [r for r in report.refused if reason in r.reason]
    assert len(told) == 1 and "please report" not in told[0].do
    assert not any("grows by cat" in r.reason for r in report.refused)


@pytest.mark.null
def test_a_head_whose_rest_is_joined_to_it_is_one_stream() -> None:
    """Rotated channels and others, joined in front of the cache, are rows of k."""

    def write(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        kv[0, slots] = k
        kv[1, slots] = v

    class Partial(Rotated):
        def forward(self, *given: Tensor) -> Any:  # type: ignore[override]
            q, k, v, positions, kv, slots = given
            half, more = k.chunk(2, -1)
            cos, sin = self.table[positions].unsqueeze(-2).chunk(2, -1)
            cos, sin = cos[..., : D // 2], sin[..., : D // 2]
            first, second = half.chunk(2, -1)
            turned = half * cos + torch.cat([-second, first], -1) * sin
            write(kv, slots, torch.cat([turned, more], -1), v)
            return q

    rows = [(T, n, D) for n in (H, G, G)]
    report = check(Partial(write), rows, torch.arange(T), torch.full((2, N * P, G, D), 3.0), SLOTS)
    (fused,) = report.fused
    assert fused.stages[-1] == "store(k,v)" and fused.record.k.channels == D


def halves_joined(v: Tensor) -> Tensor:
    return torch.cat([v[..., : D // 2] * 2, v[..., D // 2 :].tanh()], -1)


def halves_joined_in_front_of_heads(v: Tensor) -> Tensor:
    parts = [v.flatten(1) * 2, v.flatten(1).tanh()]
    return torch.cat(parts, -1).view(len(v), -1, D)[:, :G]


def heads_joined(v: Tensor) -> Tensor:
    return torch.cat([v[:, :1] * 2, v[:, 1:].tanh()], 1).view(v.shape)


@pytest.mark.null
@pytest.mark.parametrize(
    "made", [halves_joined, halves_joined_in_front_of_heads, heads_joined], ids=lambda f: f.__name__
)
def test_a_v_that_is_a_join_itself_is_stored_whole(made: Callable[[Tensor], Tensor]) -> None:
    """As Zaya's, half of whose values are of the token before."""

    def write(kv: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        kv[0, slots], kv[1, slots] = k, made(v)

    (fused,) = stored(write, FLAT).fused
    assert fused.stages == (ROPE, "store(k,v)")


# --- by the kernel -----------------------------------------------------------------------------


def main() -> None:
    launches = launching()
    # Casts to 8 bits are the interpreter's own, and round otherwise.
    exact = [write for write in WRITES if write not in BITS]
    for write in exact:
        torch._dynamo.reset()
        report = stored(write, WRITES[write])
        assert [f.stages for f in report.fused] == [(ROPE, "store(k,v)")]
    assert launches == ["norm_rope_store_"] * len(exact)
    print("done")


@pytest.mark.aot
@pytest.mark.long
def test_the_kernel_stores_to_both_parts() -> None:
    done = interpreted(__file__)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
