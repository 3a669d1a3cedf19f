"""Three positions a token (mRoPE): which axis a pair turns by is read off the graph, and the rows
of the table are looked up by the op.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxfuse
from tests.mrope_toys import (
    PARTIAL,
    PICKS,
    TOKENS,
    WHOLE,
    MRope,
    Pick,
    Prelude,
    Sizes,
    axes_of,
    contiguous,
    hidden,
    looked_up,
    positions,
    report_of,
)
from tests.toys import assert_like

pytestmark = pytest.mark.null

# Where the spelling is not what is tested, three stand for all; the rest runs with the long tests.
SOME_PICKS = [
    pick
    if pick in ("contiguous", "interleaved", "in turns")
    else pytest.param(pick, marks=pytest.mark.long)
    for pick in PICKS
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("neox", "sizes"),
    [
        pytest.param(True, WHOLE, id="neox, whole"),
        pytest.param(False, PARTIAL, id="neighbours, partial"),
        pytest.param(True, PARTIAL, id="neox, partial", marks=pytest.mark.long),
        pytest.param(False, WHOLE, id="neighbours, whole", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("pick", PICKS)
def test_the_axis_of_each_pair_is_read(pick: str, neox: bool, sizes: Sizes) -> None:
    toy = Prelude(MRope(PICKS[pick], neox, sizes))
    record = looked_up(report_of(toy, positions(TOKENS, sizes.rows)))
    assert record is not None and record.k is not None
    for stream in (record.q, record.k):
        turn = stream.rotation
        assert turn is not None and turn.axes == axes_of(pick, list(sizes.section))
        # Cosines in the first half of a row, sines in the second.
        half = sizes.rotary // 2
        assert (turn.cos.first, turn.sin.first, turn.cos.step) == (0, half, 1)


@pytest.mark.parametrize("pick", PICKS)
def test_a_change_of_one_axis_changes_the_result(pick: str) -> None:
    """The three rows of the tests' positions are told apart: by one row for all it is another."""
    toy, at = Prelude(MRope(PICKS[pick])), positions(TOKENS, WHOLE.rows)
    want = toy(hidden(toy), at)
    for axis in range(3):
        other = at.clone()
        other[axis] = at[(axis + 1) % 3]
        assert (toy(hidden(toy), other) - want).abs().max() > 1e-3


class FullWidth(MRope):
    """Tables as wide as what is turned, both halves alike, joined before or behind the pick."""

    late = True

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin_cache[positions].chunk(2, dim=-1)
        section = list(self.sizes.section)
        if self.late:
            return self.pick(cos, section).repeat(1, 2), self.pick(sin, section).repeat(1, 2)
        cos, sin = (torch.cat((t, t), dim=-1) for t in (cos, sin))
        return self.pick(cos, 2 * section), self.pick(sin, 2 * section)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.view(cos.shape[0], -1, self.sizes.head_dim)
        a, b = x.chunk(2, -1)
        y = x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)
        return y.reshape(cos.shape[0], -1)


def contiguous_twice(x: Tensor, section: list[int]) -> Tensor:
    return torch.cat([m[i % 3] for i, m in enumerate(x.split(section, dim=-1))], dim=-1)


@pytest.mark.parametrize("late", [True, False])
def test_full_width_tables(late: bool) -> None:
    rope = FullWidth(contiguous_twice)
    rope.late = late
    record = looked_up(report_of(Prelude(rope), positions(TOKENS, WHOLE.rows)))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.axes == axes_of("contiguous", list(WHOLE.section))


class TwoTables(MRope):
    """cos and sin in tables of their own."""

    def __init__(self, pick: Pick) -> None:
        super().__init__(pick)
        cos, sin = self.cos_sin_cache.chunk(2, dim=-1)
        self.register_buffer("cos", cos.clone())
        self.register_buffer("sin", sin.clone())

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        section = list(self.sizes.section)
        cos, sin = (self.pick(table[positions], section) for table in (self.cos, self.sin))
        return cos, sin


@pytest.mark.parametrize("pick", SOME_PICKS)
def test_cos_and_sin_in_tables_of_their_own(pick: str) -> None:
    record = looked_up(report_of(Prelude(TwoTables(PICKS[pick])), positions(TOKENS, WHOLE.rows)))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.sin.first == 0
    assert record.q.rotation.axes == axes_of(pick, list(WHOLE.section))


@pytest.mark.parametrize("pick", SOME_PICKS)
def test_a_table_in_bfloat16(pick: str) -> None:
    toy = Prelude(MRope(PICKS[pick], dtype=torch.bfloat16))
    assert looked_up(report_of(toy, positions(TOKENS, WHOLE.rows))) is not None


class Batched(Prelude):
    """Positions [3, B, T] of hidden states [B T, C], by the same table."""

    def __init__(self, rope: MRope, batch: int) -> None:
        super().__init__(rope)
        self.batch = batch

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        s, lead = self.sizes, (self.batch, -1)
        q, k, v = (t.view(*lead, t.shape[-1]) for t in self.split(x))
        cos, sin = self.rope.tables(positions)
        cos, sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
        q, k, v = (t.unflatten(-1, (-1, s.head_dim)).transpose(1, 2) for t in (q, k, v))

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat((-b, a), -1) * sin

        return torch.nn.functional.scaled_dot_product_attention(
            turned(q), turned(k), v, enable_gqa=True
        )


@pytest.mark.parametrize("pick", SOME_PICKS)
@pytest.mark.parametrize("batch", [1, 2])
def test_positions_by_batch_row(pick: str, batch: int) -> None:
    at = torch.stack([positions(TOKENS, WHOLE.rows, seed) for seed in range(batch)], 1)
    toy = Batched(MRope(PICKS[pick]), batch)
    with torch.no_grad():
        x = hidden(toy, batch * TOKENS)
        want = toy(x, at)
        got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))(x, at)
    assert_like(got, want)
    assert looked_up(fxfuse.last_report()) is not None


@pytest.mark.parametrize("tokens", [1, 2])
def test_of_few_tokens(tokens: int) -> None:
    assert looked_up(report_of(Prelude(MRope(contiguous)), positions(tokens, WHOLE.rows)))


@pytest.mark.parametrize("pick", SOME_PICKS)
@pytest.mark.parametrize("shift", [WHOLE.rows, 0], ids=["from the end", "int32"])
def test_positions_from_the_end_and_of_32_bits(pick: str, shift: int) -> None:
    at = positions(TOKENS, WHOLE.rows) - shift
    at = at if shift else at.int()
    assert looked_up(report_of(Prelude(MRope(PICKS[pick])), at)) is not None


def test_what_two_layers_read_is_looked_up_once() -> None:
    toy = Prelude(MRope(PICKS["interleaved"]), layers=2)
    stages = [s for f in report_of(toy, positions(TOKENS, WHOLE.rows)).fused for s in f.stages]
    assert stages == ["rms_norm", "rope"] * 2


def test_the_report_tells_the_axes() -> None:
    report = report_of(Prelude(MRope(contiguous)), positions(TOKENS, WHOLE.rows))
    assert "[32 channels, half pairs by 3 axes]" in str(report)


def test_one_position_a_token_is_the_special_case() -> None:
    record = looked_up(report_of(Prelude(MRope(contiguous)), positions(TOKENS, WHOLE.rows)[0]))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.axes == ()


def test_one_compile_for_every_number_of_tokens() -> None:
    toy, counter = Prelude(MRope(PICKS["in turns"])), 0

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal counter
        counter += 1
        return fxfuse.Backend(compiler="eager")(gm, inputs)

    compiled = torch.compile(toy, backend=backend, dynamic=True)
    for tokens in (5, 9, 12):
        x, at = hidden(toy, tokens), positions(tokens, WHOLE.rows)
        with torch.no_grad():
            assert_like(compiled(x, at), toy(x, at))
            assert looked_up(fxfuse.last_report()) is not None
    assert counter == 1


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "neighbours"])
@pytest.mark.parametrize(
    "pick", [p if p == "in turns" else pytest.param(p, marks=pytest.mark.long) for p in PICKS]
)
def test_through_inductor(pick: str, neox: bool) -> None:
    toy = Prelude(MRope(PICKS[pick], neox, PARTIAL))
    at = positions(TOKENS, PARTIAL.rows) - PARTIAL.rows
    assert looked_up(report_of(toy, at, "inductor")) is not None


@pytest.mark.parametrize("examples", [8, pytest.param(50, marks=pytest.mark.long)])
def test_any_sections(examples: int) -> None:
    sections = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(sorted(PICKS)), st.booleans(), sections,
        st.integers(0, 3), st.integers(1, 6), st.integers(0, 2**16),
    )  # fmt: skip
    def each(
        pick: str, neox: bool, section: tuple[int, ...], passed: int, tokens: int, seed: int
    ) -> None:
        torch._dynamo.reset()
        # A single token's rows that are chosen by index tensors are right, but stay the graph's.
        tokens += pick == "in turns, by index" and tokens == 1
        sizes = Sizes(section=section, head_dim=2 * (sum(section) + passed))
        toy = Prelude(MRope(PICKS[pick], neox, sizes))
        record = looked_up(report_of(toy, positions(tokens, sizes.rows, seed)))
        assert record is not None and record.q.rotation is not None
        assert record.q.rotation.axes == axes_of(pick, list(section))

    each()


class CastTable(MRope):
    """The table in the activations' dtype, as one engine has it: cast anew in each forward."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin_cache.to(torch.bfloat16)[positions].chunk(2, dim=-1)
        section = list(self.sizes.section)
        return self.pick(cos, section), self.pick(sin, section)


@pytest.mark.parametrize("rope", [MRope, CastTable])
@pytest.mark.parametrize("pick", SOME_PICKS)
def test_activations_in_bfloat16(pick: str, rope: type[MRope]) -> None:
    """The op reads the float32 table itself, and is no further from float64 than eager is."""
    toy, at = Prelude(rope(PICKS[pick])), positions(TOKENS, WHOLE.rows)
    with torch.no_grad():
        exact = Prelude(MRope(PICKS[pick], dtype=torch.float64)).double()
        exact.load_state_dict({n: w.bfloat16() for n, w in toy.state_dict().items()})
        exact.rope.cos_sin_cache.copy_(toy.rope.cos_sin_cache)
        x = hidden(toy).bfloat16()
        want = exact(x.double(), at)
        toy.qkv, toy.out = toy.qkv.bfloat16(), toy.out.bfloat16()
        eager = toy(x, at)
        got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))(x, at)
    record = looked_up(fxfuse.last_report())
    assert record is not None and record.q.dtype == "bfloat16"
    errors = [(y.double() - want).norm() for y in (got, eager)]
    # What the rest of the layer rounds is in both; a rounding more or less moves it a little.
    assert errors[0] <= 1.2 * errors[1]


def test_sections_that_do_not_fill_a_row_turn_fewer_channels() -> None:
    sizes = Sizes(section=(6, 5, 5))

    class Short(MRope):
        def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            width, x = 2 * cos.shape[-1], x.view(cos.shape[0], -1, self.sizes.head_dim)
            a, b = x[..., :width].chunk(2, -1)
            c, s = cos.unsqueeze(1), sin.unsqueeze(1)
            return torch.cat((a * c - b * s, b * c + a * s, x[..., width:]), -1).flatten(1)

    record = looked_up(report_of(Prelude(Short(short, sizes=sizes)), positions(TOKENS, sizes.rows)))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.axes == axes_of("contiguous", [6, 5, 3])
    assert record.q.rotation.sin.first == 16


def short(x: Tensor, section: list[int]) -> Tensor:
    """Sections that end before the row does."""
    return contiguous(x[..., :-2], [*section[:2], section[2] - 2])
