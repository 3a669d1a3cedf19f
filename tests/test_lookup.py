"""Tables taken by position: by the op where one site alone reads them, else by the graph.

In: toys that look their tables up. Out: eager's result, and whether the lookup is in the op.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from tests.spellings import llama
from tests.toys import B, D, G, T, assert_like, attend

pytestmark = pytest.mark.null

HEADS, N = 4, 11
Take = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Looked(nn.Module):
    """q and k [B, H, T, D] turned by rows that `take` gives of a table [N, 2 D]."""

    def __init__(self, take: Take, layers: int = 1, tokens: int = T) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.take, self.layers, self.tokens = take, layers, tokens
        self.project = nn.Linear(8, (HEADS + 2 * G) * D, bias=False)
        angles = torch.randn(N, D // 2, generator=generator).repeat(1, 2)
        self.register_buffer("table", torch.cat([angles.cos(), angles.sin()], -1))

    def forward(self, x: Tensor, positions: Tensor, table: Tensor | None = None) -> Tensor:
        rows = self.take(self.table if table is None else table, positions)
        cos, sin = rows.chunk(2, -1)
        cos, sin = (t.reshape(-1, 1, self.tokens, D) for t in (cos, sin))
        for _ in range(self.layers):
            y = self.project(x).unflatten(-1, (-1, D)).transpose(1, 2)
            q, k, v = y.split([HEADS, G, G], 1)
            out = attend(llama(q, cos, sin), llama(k, cos, sin), v)
            x = x + out.sum((1, 3)).unsqueeze(-1)
        return out


def stages(
    toy: Looked, positions: Tensor, compiler: str = "eager", given: tuple[Tensor, ...] = ()
) -> list[str]:
    """The stages of a toy's sites; the result must be eager's."""
    x = torch.randn(B, toy.tokens, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = toy(x, positions.clone(), *given)
        backend = fxfuse.Backend(compiler=compiler)
        got = torch.compile(toy, backend=backend)(x, positions.clone(), *given)
    assert_like(got, want)
    return [stage for fused in fxfuse.last_report().fused for stage in fused.stages]


ONE_ROW = torch.tensor([7, 0, N - 1, 3, 3, 1, 0][:T])
ROWS = torch.stack([ONE_ROW, ONE_ROW.flip(0)])[:B]
TAKES: dict[str, tuple[Take, Tensor]] = {
    "index": (lambda table, at: table[at], ONE_ROW),
    "index, a row a batch": (lambda table, at: table[at], ROWS),
    "index, int32": (lambda table, at: table[at], ONE_ROW.int()),
    "index, from the end": (lambda table, at: table[at], ONE_ROW - N),
    "index_select": (lambda table, at: table.index_select(0, at), ONE_ROW),
    "embedding": (lambda table, at: F.embedding(at, table), ROWS),
    "two axes of one": (lambda table, at: table[at[None]][0], ONE_ROW),
}


@pytest.mark.parametrize("name", TAKES)
def test_the_op_looks_up_what_it_alone_reads(name: str) -> None:
    take, positions = TAKES[name]
    assert "rope(by position)" in stages(Looked(take), positions)


@pytest.mark.parametrize("name", TAKES)
def test_a_table_that_is_an_argument_of_the_model_is_one_too(name: str) -> None:
    take, positions = TAKES[name]
    toy = Looked(take)
    assert "rope(by position)" in stages(toy, positions, given=(toy.table.flip(0).clone(),))


COMPUTED: dict[str, Take] = {
    "scaled": lambda table, at: (table * 1.5)[at],
    "joined": lambda table, at: torch.cat((table[:, :D], -table[:, D:]), -1)[at],
    "rows joined": lambda table, at: torch.cat((table[at][:, :D] * 1.5, table[at][:, D:]), -1),
    "fewer rows": lambda table, at: table[1:].unsqueeze(0).expand(2, -1, -1)[0][at % (N - 1)],
    "of frequencies": lambda table, at: torch.cat((table[:, :D].cos(), table[:, D:].sin()), -1)[at],
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_table_computed_from_an_argument_is_one_too(name: str) -> None:
    toy = Looked(COMPUTED[name])
    found = stages(toy, ONE_ROW, given=(toy.table.flip(0).clone(),))
    assert any(stage.startswith("rope") for stage in found), found


def test_of_one_token_too() -> None:
    toy = Looked(lambda table, at: table[at], tokens=1)
    assert "rope(by position)" in stages(toy, ONE_ROW[:1])


def test_it_does_so_through_inductor() -> None:
    assert "rope(by position)" in stages(Looked(TAKES["index"][0]), ONE_ROW - N, "inductor")


def test_what_two_layers_read_is_looked_up_once() -> None:
    assert stages(Looked(TAKES["index"][0], layers=2), ONE_ROW) == ["rope", "rope"]


def written_between(table: Tensor, at: Tensor) -> Tensor:
    rows = table[at]
    at.fill_(0)
    return rows


def rows_written_between(table: Tensor, at: Tensor) -> Tensor:
    rows = table[at]
    torch.sin(rows, out=rows)
    return rows


def table_written_between(table: Tensor, at: Tensor) -> Tensor:
    rows = table[at]
    table.mul_(1)
    return rows


# The stages that are found: what is written behind a lookup is looked up before.
NEAR_MISSES: dict[str, tuple[Take, Tensor, list[str]]] = {
    "positions written behind the lookup": (written_between, ONE_ROW, ["rope"]),
    "table written behind the lookup": (table_written_between, ONE_ROW, ["rope"]),
    "rows written behind the lookup": (rows_written_between, ONE_ROW, ["rope"]),
    "a mask": (lambda table, at: table[at], torch.arange(N) < T, ["rope"]),
    "columns": (
        lambda table, at: table.T.contiguous().index_select(1, at).T, ONE_ROW, ["rope"],
    ),
    "rows of rows": (lambda table, at: table[at][at % T], ONE_ROW, ["rope"]),
    "another dtype": (
        lambda table, at: table.double()[at].float(), ONE_ROW, ["rope(by position)"],
    ),
    "positions by two indices": (
        lambda table, at: table.view(N, 2, D)[at, :].flatten(1), ONE_ROW, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_right(name: str) -> None:
    """The lookup is in the op or in the graph, or nothing is fused; the result is eager's."""
    take, positions, found = NEAR_MISSES[name]
    assert stages(Looked(take), positions) == found
