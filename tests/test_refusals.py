"""Near misses: what looks like the target is refused with a reason, or fused as what it is.

Every module here gives eager's result when it is compiled, whether it is fused or not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxfuse
from fxfuse.patterns.record import Pair
from tests.spellings import Rope, halves, llama, narrow, rotate_half
from tests.toys import Attention, Sizes, attend, check, compiled_like_eager, hidden_states, stages

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


# --- rotations that are none: x, cos, sin -> y -------------------------------------------------


def both_signs_plus(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([second, first], -1) * sin


def next_channel(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.roll(x, 1, -1) * sin


def one_half_reversed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:].flip(-1), x[..., :half]], -1) * sin


def mirrored(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation of channels i and D - 1 - i: no op serves its pairs."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:].flip(-1), x[..., :half].flip(-1)], -1) * sin


def vjepa2(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tiles a half-width table where adjacent pairs want each entry twice."""
    cos, sin = cos.repeat(1, 1, 1, 2), sin.repeat(1, 1, 1, 2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


def signs_in_the_table(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return x * cos + torch.roll(x, half, -1) * signed


def no_partner(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x * sin


def a_longer_sine(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin * 2


def a_longer_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, 2 * first], -1) * sin


def the_partner_of_the_first_token(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first[..., :1, :].expand(first.shape)], -1) * sin


def the_partner_of_the_first_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first[:, :1].expand(first.shape)], -1) * sin


def a_square(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * x * cos + rotate_half(x) * sin


NO_ROTATION = {
    both_signs_plus: "no rotation: their signs or tables do not fit",
    next_channel: "has no partner",
    one_half_reversed: "has no partner",
    mirrored: "irregular places",
    vjepa2: "cos channels at irregular places",
    signs_in_the_table: "no rotation: their signs or tables do not fit",
    no_partner: "has no partner",
    a_longer_sine: "channels of different scale",
    a_longer_half: "channels of different scale",
    the_partner_of_the_first_token: "terms that read other rows of their source",
    the_partner_of_the_first_head: "terms that read other rows of their source",
    a_square: "the source is multiplied by itself",
}


@pytest.mark.parametrize(
    ("turn", "reason"), NO_ROTATION.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_no_rotation_is_refused(turn: Any, reason: str) -> None:
    table = narrow if turn is vjepa2 else halves
    report = compiled_like_eager(Attention(Rope(turn, table)), hidden_states())
    assert report.fused == []
    assert len(report.refused) == 2, "one for q, one for k"
    for refusal in report.refused:
        assert refusal.stage == "decode" and reason in refusal.reason
        assert "test_refusals.py:" in refusal.where


# --- rotations through a matrix: true ones, but no channel map can be read ----------------------


def turning(width: int) -> Tensor:
    i = torch.arange(width // 2)
    matrix = torch.zeros(width, width)
    matrix[i + width // 2, i], matrix[i, i + width // 2] = -1, 1
    return matrix


def einsum(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.einsum("bhtd,de->bhte", x, turning(x.shape[-1])) * sin


def matmul(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + (x @ turning(x.shape[-1])) * sin


@pytest.mark.parametrize("turn", [einsum, matmul], ids=lambda f: f.__name__)
def test_a_rotation_by_matrices_is_left_alone(turn: Any) -> None:
    report = compiled_like_eager(Attention(Rope(turn, halves)), hidden_states())
    assert report.fused == []


def two_by_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """pe_audio: one table of matrices, with its signs inside."""
    matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return (matrices * x.unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2)


def test_matrices_of_two_by_two_are_one_table() -> None:
    (fused,) = compiled_like_eager(Attention(Rope(two_by_two, narrow)), hidden_states()).fused
    turn = fused.record.q.rotation
    assert (turn.cos, turn.sin, turn.signs) == (Pair(0, 3, 4), Pair(1, 2, 4), (1, 1))


# --- what stands between the rotation and attention --------------------------------------------


def dropout(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return F.dropout(q, 0.5, training=True), F.dropout(k, 0.5, training=True)


def test_dropout_in_training_stays_outside_and_draws_the_same_numbers() -> None:
    toy, x = Attention(between=dropout), hidden_states()
    with torch.no_grad():
        torch.manual_seed(3)
        want = toy(x)
        torch.manual_seed(3)
        got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))(x)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def soft_cap(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return 50 * torch.tanh(q / 50), k


def temperature(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """llama4's NoPE layers, mistral4: q grows with its position."""
    return q * torch.log1p(torch.arange(q.shape[2])).view(1, 1, -1, 1), k


def one_channel(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, torch.cat([k[..., :1] * 2, k[..., 1:]], -1)


def bias(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q + 1.0, k - 0.5


def masked(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(q > 0, q, 0.1 * q), k.masked_fill(k > 1, 0.0)


def in_place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.mul_(1.5), k.add_(q.mean())


@pytest.mark.parametrize("between", [soft_cap, temperature, one_channel, bias, masked, in_place])
def test_what_follows_the_rotation_is_never_lost(between: Any, caplog: Any) -> None:
    toy = Attention(between=between, sizes=Sizes(rotary=10))
    assert compiled_like_eager(toy, hidden_states()).fused
    assert "an error of fxfuse" not in caplog.text


# --- a store of k that v's cannot join ---------------------------------------------------------


def by_index_put(cache: Tensor, slots: Tensor, v: Tensor) -> None:
    cache[:, :, slots] = v


def squashed(cache: Tensor, slots: Tensor, v: Tensor) -> None:
    cache.index_copy_(2, slots, v.tanh() * v)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (by_index_put, "slots below 0 are wrap where those of k are invalid"),
        (squashed, "stored rows that are no view of a tensor"),
    ],
)
def test_a_store_of_v_that_cannot_join_is_told(write: Any, reason: str) -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(2, slots, k)
        write(vs, slots, v)
        return attend(q, ks, vs)

    report = check(finish)
    assert stages(report) == ["store(k)"]
    (refusal,) = report.refused
    assert refusal.stage == "store" and reason in refusal.reason


# --- odd, and still the statement --------------------------------------------------------------


def test_one_table_for_both_parts() -> None:
    """No orthogonal rotation, but exactly the statement, with one table given twice."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return llama(x, cos, cos)

    (fused,) = compiled_like_eager(Attention(Rope(turn)), hidden_states()).fused
    assert fused.record.q.rotation is not None


def test_halves_of_a_table_that_differ_are_both_loaded() -> None:
    def table(angles: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([angles, 2 * angles], -1)
        return both.cos(), both.sin()

    (fused,) = compiled_like_eager(Attention(Rope(llama, table)), hidden_states()).fused
    rotation = fused.record.q.rotation
    assert rotation is not None and (rotation.cos, rotation.sin) == (Pair(0, 8, 1), Pair(0, 8, 1))
