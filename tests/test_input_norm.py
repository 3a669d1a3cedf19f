"""The norm of a sum in front of a projection: taken in where its products alone read it and both
terms lie in memory, else left where it is, and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse import passes
from fxfuse.lowering import gate
from fxfuse.patterns.input_norm import InputNorms
from fxfuse.patterns.record import AddNorm, Norm, Record
from fxfuse.settings import Settings
from tests.models.families import FAMILIES
from tests.models.tiny import build, static_cache, token_ids
from tests.sites import cached, site, with_dtype
from tests.spellings import gemma, rsqrt, weightless
from tests.test_projection import PACKINGS, reasons, run
from tests.toys import Layer, assert_like, by_index_copy, caches, hidden_states

pytestmark = pytest.mark.null

FRONT = ("add", "rms_norm", "projection", "rms_norm", "rope", "store(k,v)")
PLAIN = Norm("head", "before", has_weight=True)


class Block(Layer):
    """A layer behind `front(block, x, r)`, which gives what is projected and a sum; what `rest`
    makes of the sum is returned too.
    """

    def __init__(
        self,
        front: Callable[..., tuple[Tensor, Tensor]],
        rest: Callable[[Tensor], Any] = lambda total: total * 2,
        **how: Any,
    ) -> None:
        super().__init__(by_index_copy, **how)
        self.front, self.rest = front, rest
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.rand(32, generator=generator) + 0.5)
        self.mix = nn.Parameter(torch.randn(32, 32, generator=generator) / 6)

    def twice(self, x: Tensor) -> Tensor:
        """Twice as many tokens, by a product."""
        return F.linear(x, torch.cat((self.mix, self.mix))).view(len(x), -1, x.shape[-1])

    def forward(self, x: Tensor, r: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        made, total = self.front(self, x, r)
        return super().forward(made, *memory), self.rest(total)


Front = tuple[Tensor, Tensor]


def normed(norm: Any = rsqrt) -> Callable[..., Front]:
    def front(block: Block, x: Tensor, r: Tensor) -> Front:
        total = x + r
        return norm(total, block.weight, 1e-6), total

    return front


def of_terms(terms: Callable[[Block, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    return lambda block, x, r: normed()(block, *terms(block, x, r))


def residual(tokens: int = 5) -> Tensor:
    return hidden_states(tokens, seed=2)


def explained(block: Block, r: Tensor | None = None, **settings: Any) -> fxfuse.Report:
    r = residual() if r is None else r
    return run(block, hidden_states(), r, *caches(), **settings)


def record_of(report: fxfuse.Report) -> Record:
    (fused,) = (f for f in report.fused if f.kind == "attention")
    assert isinstance(fused.record, Record) and fused.record.projected
    return fused.record


# --- found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [
        (rsqrt, PLAIN),
        (gemma, Norm("head", "before", True, 1.0)),
        (weightless, Norm("head", "before", False)),
    ],
)
def test_the_norm_of_a_sum_is_a_stage(norm: Any, wanted: Norm) -> None:
    report = explained(Block(normed(norm)))
    assert record_of(report).front == AddNorm(32, wanted, 2, keep_sum=True)
    assert len(report.fused) == 1 and report.left == [] and report.refused == []


def test_the_report_names_every_stage() -> None:
    report = explained(Block(normed()))
    assert report.fused[0].stages == FRONT
    assert " + ".join(FRONT) in str(report)


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_of_the_products(packing: str) -> None:
    from tests.toys import Sizes

    sizes = Sizes(heads=2) if packing == "by head" else Sizes()
    report = explained(Block(normed(), packing=packing, sizes=sizes))
    assert report.fused[0].stages == FRONT


@pytest.mark.parametrize(
    ("rest", "kept"),
    [(lambda total: total * 2, True), (lambda total: total, True), (lambda total: [], False)],
    ids=["read later", "returned", "read by nobody else"],
)
def test_the_sum_is_a_result_where_others_want_it(rest: Any, kept: bool) -> None:
    front = record_of(explained(Block(normed(), rest))).front
    assert front is not None and front.keep_sum == kept


def both_products(block: Block, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, block.mix), F.linear(r, block.mix)


def of_a_view(block: Block, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    flat = F.linear(x.flatten(0, 1), block.mix)
    return flat.view(x.shape), r


def of_a_sum_read_elsewhere(block: Block, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    first = x + r
    return first, F.linear(rsqrt(first, block.weight, 1e-6), block.mix)


@pytest.mark.parametrize("terms", [both_products, of_a_view, of_a_sum_read_elsewhere])
def test_terms_that_are_in_memory(terms: Any) -> None:
    assert record_of(explained(Block(of_terms(terms)))).front is not None


def test_rows_of_tokens_alone() -> None:
    def front(block: Block, x: Tensor, r: Tensor) -> Front:
        made, total = normed()(block, x.flatten(0, 1), r.flatten(0, 1))
        return made.view(x.shape), total

    assert record_of(explained(Block(front))).front is not None


class Two(nn.Module):
    """Two blocks, the second of the first one's sum and of its own product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (Block(normed(), lambda total: total) for _ in range(2))

    def forward(self, x: Tensor, r: Tensor, *memory: Tensor) -> Any:
        made, total = self.first(x, r, *memory[:3])
        other = F.linear(made.transpose(1, 2).flatten(2)[..., :32], self.first.mix)
        return self.second(total, other, *memory[3:])


def test_the_sum_of_one_is_a_term_of_the_next() -> None:
    report = run(Two(), hidden_states(), residual(), *caches(), *caches())
    assert [f.stages for f in report.fused] == [FRONT, FRONT]
    assert [f.record.front.keep_sum for f in report.fused] == [True, True]


@pytest.mark.parametrize("name", [pytest.param("qwen3", marks=pytest.mark.long), "llama"])
@torch.no_grad()
def test_each_layer_of_a_model_but_the_first(name: str) -> None:
    """Whose norm is that of the embedding, no sum; float32 tokens are eager's."""
    model = build(FAMILIES[name], num_hidden_layers=3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fxfuse.Backend(gate="always", strict=True))
    caches = [static_cache(model, batch=1) for _ in range(2)]
    ids = token_ids(7, batch=1)
    for cache in caches:
        model(ids, past_key_values=cache, use_cache=True)
    for _ in range(6):
        want, got = (
            run_(ids[:, -1:], past_key_values=cache, use_cache=True).logits
            for run_, cache in zip((model, compiled), caches, strict=True)
        )
        assert_like(got, want)
        assert torch.equal(got.argmax(-1), want.argmax(-1))
        ids = want.argmax(-1)
    report = fxfuse.last_report()
    assert report is not None
    made = [f for f in report.fused if "projection" in f.stages]
    assert [f.stages[0] for f in made] == ["projection", "add", "add"]
    assert [f.provider for f in made] == ["loops"] * 3
    # Of two norms in each layer, and one behind them all.
    assert sum(f.kind == "add_rms_norm" for f in report.fused) == 5


# --- left where it is ----------------------------------------------------------------------------


def without_a_sum(block: Block, x: Tensor, r: Tensor) -> Front:
    return rsqrt(x, block.weight, 1e-6), r


def of_twice_one(block: Block, x: Tensor, r: Tensor) -> Front:
    return normed()(block, x, x)


def of_three(block: Block, x: Tensor, r: Tensor) -> Front:
    return normed()(block, x + r, r)


def read_again(block: Block, x: Tensor, r: Tensor) -> Front:
    made, total = normed()(block, x, r)
    return made, total + F.linear(made, block.mix)


def returned(block: Block, x: Tensor, r: Tensor) -> Front:
    made, _ = normed()(block, x, r)
    return made, made


def sum_read_first(block: Block, x: Tensor, r: Tensor) -> Front:
    made, total = normed()(block, x, r)
    return made, total.sin()


def sum_seen_first(block: Block, x: Tensor, r: Tensor) -> Front:
    made, total = normed()(block, x, r)
    return made, total.flatten(0, 1)


def scaled_behind(block: Block, x: Tensor, r: Tensor) -> Front:
    made, total = normed()(block, x, r)
    return made * 2, total


def of_a_part(block: Block, x: Tensor, r: Tensor) -> Front:
    made, total = normed()(block, block.twice(x), block.twice(r))
    return made[:, :5], total


def made_for_the_sum(block: Block, x: Tensor, r: Tensor) -> Front:
    return normed()(block, x * 2, r)


def normed_for_the_sum(block: Block, x: Tensor, r: Tensor) -> Front:
    """Gemma's norm behind attention."""
    return normed()(block, rsqrt(F.linear(x, block.mix), block.weight, 1e-6), r)


def term_in_another_order(block: Block, x: Tensor, r: Tensor) -> Front:
    made = F.linear(x.transpose(0, 1).contiguous(), block.mix)
    return normed()(block, made.transpose(0, 1), r)


def term_of_another_dtype(block: Block, x: Tensor, r: Tensor) -> Front:
    return normed()(block, x, F.linear(r.bfloat16(), block.mix.bfloat16()))


def term_written_later(block: Block, x: Tensor, r: Tensor) -> Front:
    made = normed()(block, x, r)
    r.mul_(2)
    return made


def sum_written_later(block: Block, x: Tensor, r: Tensor) -> Front:
    made, total = normed()(block, x, r)
    return made, total.mul_(2)


READ, LATE = "others read the normed rows too", "the sum is used before the projection"
OTHER_ROWS = "its rows, or the sum's, are not those of the projection as they lie in memory"
MADE = "a term of its sum is made for the sum alone, in one kernel with it"


@pytest.mark.parametrize(
    ("front", "why"),
    [
        (without_a_sum, ""),
        (of_twice_one, ""),
        (of_three, ""),
        (read_again, READ),
        (returned, READ),
        (sum_read_first, LATE),
        (sum_seen_first, LATE),
        (scaled_behind, ""),
        (of_a_part, OTHER_ROWS),
        (made_for_the_sum, MADE),
        (normed_for_the_sum, MADE),
        (term_in_another_order, ""),
        (term_of_another_dtype, OTHER_ROWS),
        (term_written_later, ""),
        (sum_written_later, LATE),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_what_stays_in_front(front: Any, why: str) -> None:
    report = explained(Block(front, lambda total: total))
    assert record_of(report).front is None and reasons(report) == []
    assert [x.reason for x in report.left if x.kind == "input_norm"] == ([why] if why else [])


def test_settings_keep_the_norm_the_compilers() -> None:
    report = explained(Block(normed()), disable=("input_norm",))
    assert record_of(report).front is None
    assert [f.kind for f in report.fused] == ["attention", "add_rms_norm"]


def test_an_error_leaves_the_norm_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> bool:
        raise RuntimeError("no")

    monkeypatch.setattr(InputNorms, "_pays", fails)
    assert record_of(explained(Block(normed()))).front is None


@pytest.mark.parametrize("setting", ["auto", "always"])
def test_no_setting_gives_a_gpu_several_rows(setting: Any) -> None:
    ask = passes._gate(Settings(gate=setting))
    record = with_dtype(site(128, norm=PLAIN, store=cached(True)), "bfloat16")

    def reason(device: str, rows: int | None) -> str:
        slot = SimpleNamespace(device=torch.device(device))
        return ask("input_norm", slot, rows, record)  # type: ignore[arg-type]

    assert reason("cuda", 2) == reason("cuda", None) == "its kernel takes 1 row"
    assert "1 row" not in reason("cuda", 1) and "1 row" not in reason("cpu", 2)


def test_the_gate_gives_what_was_measured() -> None:
    def fused(
        rows: int,
        dtype: str = "bfloat16",
        target: str = "cuda",
        arch: str = "sm_90",
        hidden: int = 4096,
        head_dim: int = 128,
    ) -> bool:
        record = with_dtype(site(head_dim, norm=PLAIN, store=cached(True)), dtype)
        record = dataclasses.replace(record, front=AddNorm(hidden, PLAIN, 2))
        return gate.decide(target, "input_norm", gate.Facts(rows, record, arch)).fuse

    assert fused(1) and fused(1, hidden=1024) and fused(1, head_dim=64)
    assert not fused(2) and not fused(1, "float32") and not fused(1, target="cpu")
    assert not fused(1, hidden=5120) and not fused(1, hidden=3840, head_dim=256)
    assert not any(fused(1, arch=arch) for arch in ("sm_80", "sm_100", "gfx942"))
