"""Attention over k and v that were repeated for every query head reads them as they were before.

In: attention with its heads repeated in every spelling, and in ways that no grouping means. Out:
results as eager has them, the heads that attention is given, and the reason where it keeps its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxfuse
from fxfuse.passes import fuse_graph
from fxfuse.patterns import grouped as grouped_heads
from tests.toys import B, D, G, Layer, S, T, assert_like, caches, hidden_states

pytestmark = pytest.mark.null

H = 4
TIMES = H // G
SETTINGS = fxfuse.settings.Settings(compiler="eager", gate="always")
Repeat = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(tokens: int = T, slots: int = S) -> list[Tensor]:
    """q, k, v."""
    return [draw(B, n, t, D, seed=i) for i, (n, t) in enumerate([(H, tokens), *[(G, slots)] * 2])]


def heads_read(gm: fx.GraphModule) -> list[tuple[int, int, int]]:
    """How many heads each attention of a graph is given in q, k and v."""
    found = []
    for node in gm.graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            given = [*node.args, *node.kwargs.values()][:3]
            q, k, v = (x.meta["example_value"].shape[1] for x in given)
            found.append((q, k, v))
    return found


def check(
    run: Any, *given: Tensor, grad: bool = False, settings: Any = SETTINGS, dynamic: Any = None
) -> tuple[fxfuse.Report, list[tuple[int, int, int]]]:
    """Results and memory are eager's; the report, and the heads that attention is given."""
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        fused, report = fuse_graph(gm, settings)
        seen.append((report, heads_read(fused)))
        return fused

    copies = [x.clone() for x in given]
    with torch.set_grad_enabled(grad):
        want = run(*copies)
        got = torch.compile(run, backend=backend, dynamic=dynamic)(*given)
    assert_like(got, want)
    assert_like(given, copies)
    ((report, heads),) = seen
    return report, heads


def grouped(report: fxfuse.Report) -> int:
    return sum(f.kind == "grouped_heads" for f in report.fused)


def reasons(report: fxfuse.Report) -> list[str]:
    return [r.reason for r in report.refused if r.stage == "grouped_heads"]


def by_expand(x: Tensor) -> Tensor:
    b, g, s, d = x.shape
    return x[:, :, None].expand(b, g, TIMES, s, d).reshape(b, g * TIMES, s, d)


def tokens_first(x: Tensor) -> Tensor:
    """Repeated as [B, S, G, D], as falcon and others hold it."""
    b, g, s, d = x.shape
    x = x.transpose(1, 2)[:, :, :, None, :].expand(b, s, g, TIMES, d)
    return x.reshape(b, s, g * TIMES, d).transpose(1, 2)


REPEATS = {
    "expand, reshape": by_expand,
    "repeat_interleave": lambda x: x.repeat_interleave(TIMES, 1),
    "repeat_interleave of a number": lambda x: torch.repeat_interleave(x, TIMES, dim=-3),
    "tokens first": tokens_first,
    "stack, flatten": lambda x: torch.stack([x] * TIMES, 2).flatten(1, 2),
    "repeat, view": lambda x: x.unsqueeze(2).repeat(1, 1, TIMES, 1, 1).view(B, H, -1, D),
    "expand, flatten, contiguous": lambda x: by_expand(x).contiguous(),
    "index": lambda x: x[:, torch.arange(H) // TIMES],
    "index of a list": lambda x: x[:, torch.tensor([0, 0, 1, 1])],
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 0, 1, 1])),
    "broadcast": lambda x: x.unsqueeze(2).broadcast_to(B, G, TIMES, x.shape[2], D).flatten(1, 2),
}


@pytest.mark.parametrize("name", REPEATS)
@pytest.mark.parametrize("tokens", [1, T])
def test_each_spelling_of_repeated_heads(name: str, tokens: int) -> None:
    repeat = REPEATS[name]

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = repeat(k), repeat(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    settings = dataclasses.replace(SETTINGS, disable=("decode_attention",))
    report, heads = check(run, *rows(tokens), draw(B, 1, tokens, S, seed=9), settings=settings)
    assert grouped(report) == 1 and heads == [(H, G, G)]
    (fused,) = report.fused
    assert fused.stages == ("grouped_heads",) and fused.provider == "torch"
    assert fused.record == fxfuse.patterns.record.GroupedHeads(H, G, D, True, "float32")


def test_each_query_head_reads_its_own_group() -> None:
    """Were heads counted the other way round, the result would be another: eager's of tiled k."""
    q, k, v = rows()
    tiled = [x.repeat(1, TIMES, 1, 1) for x in (k, v)]
    want = F.scaled_dot_product_attention(q, *tiled)
    got = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert (got - want).norm() > 0.1 * want.norm()


NEAR_MISSES: dict[str, tuple[Repeat, Repeat, str]] = {
    "tiled": (lambda x: x.repeat(1, TIMES, 1, 1), lambda x: x.repeat(1, TIMES, 1, 1), ""),
    "v is tiled": (by_expand, lambda x: x.repeat(1, TIMES, 1, 1), "the other is not"),
    "other heads": (
        lambda x: x[:, torch.tensor([0, 1, 0, 1])], lambda x: x[:, torch.tensor([0, 1, 0, 1])], ""
    ),
    "other tokens": (
        lambda x: x[:, :, torch.tensor([0, 0, 1, 1])].repeat(1, TIMES, 1, 1),
        lambda x: x[:, :, torch.tensor([0, 0, 1, 1])].repeat(1, TIMES, 1, 1), ""
    ),
    "v has heads of its own": (by_expand, lambda x: torch.cat([x, 2 * x], 1), "the other is not"),
    "cast": (
        lambda x: by_expand(x.bfloat16()).float(), lambda x: by_expand(x.bfloat16()).float(),
        "cast before attention",
    ),
    "flipped": (lambda x: by_expand(x).flip(1), lambda x: by_expand(x).flip(1), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_the_models(name: str) -> None:
    of_k, of_v, reason = NEAR_MISSES[name]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, of_k(k), of_v(v))

    report, heads = check(run, *rows())
    assert grouped(report) == 0 and heads == [(H, H, H)]
    assert [reason in r for r in reasons(report)] == [True] * bool(reason)


def test_what_is_written_after_it_was_repeated() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = by_expand(k)
        k.mul_(2)
        return F.scaled_dot_product_attention(q, wide, by_expand(v))

    report, heads = check(run, *rows())
    assert heads == [(H, H, H)] and reasons(report) == [
        "heads that are written after they were repeated"
    ]


def test_repeated_heads_that_are_written() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = by_expand(k)
        wide[:, 1] += 1
        return F.scaled_dot_product_attention(q, wide, by_expand(v))

    _, heads = check(run, *rows())
    assert heads == [(H, H, H)]


def test_a_repeated_view_of_what_is_written_through_another_name() -> None:
    """[B, 1, S, D] expands to every head without a copy: attention reads it as it is then."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :1], v[:, :1]
        wide = [x.expand(B, H, S, D) for x in (k, v)]
        k.mul_(2)
        return F.scaled_dot_product_attention(q, *wide)

    check(run, *rows())


def test_other_readers_of_the_repeated_heads() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        k, v = by_expand(k), by_expand(v)
        return F.scaled_dot_product_attention(q, k, v), k[:, 1], v

    report, heads = check(run, *rows())
    assert heads == [(H, G, G)] and grouped(report) == 1


def test_dropout_draws_the_models_numbers() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v), dropout_p=0.5)

    results = []
    for function in (
        run,
        torch.compile(run, backend=fxfuse.Backend(compiler="eager", gate="always")),
    ):
        torch.manual_seed(0)
        results.append(function(*rows()))
    assert torch.equal(*results)
    report = fxfuse.last_report()
    assert grouped(report) == 0 and any("dropout" in r for r in reasons(report))


@pytest.mark.parametrize(
    "name", ["expand, reshape", "tokens first", "repeat_interleave", "index_select"]
)
def test_behind_a_store(name: str) -> None:
    """Attention reads the caches themselves."""
    repeat = REPEATS[name]

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(2, slots, k)
        vs.index_copy_(2, slots, v)
        return F.scaled_dot_product_attention(q, repeat(ks), repeat(vs))

    report, heads = check(Layer(finish), hidden_states(T), *caches())
    assert heads == [(H, G, G)]
    assert [f.stages[-1] for f in report.fused] == ["store(k,v)", "grouped_heads"]


def test_behind_a_rotation_alone() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v), is_causal=True)

    report, heads = check(Layer(finish), hidden_states(T))
    assert heads == [(H, G, G)]
    assert [f.kind for f in report.fused] == ["attention", "grouped_heads"]


def test_behind_a_cache_that_grows() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks, vs = torch.cat([ks, k], 2), torch.cat([vs, v], 2)
        return F.scaled_dot_product_attention(q, by_expand(ks), by_expand(vs)), ks, vs

    report, heads = check(Layer(finish), hidden_states(T), *caches())
    assert heads == [(H, G, G)] and grouped(report) == 1


def test_one_cache_that_two_attentions_share() -> None:
    """The second store comes between the first repeat and the first attention."""

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(2, slots, k)
        wide = by_expand(ks)
        ks.index_copy_(2, slots, k + v)
        first = F.scaled_dot_product_attention(q, wide, by_expand(vs))
        return first, F.scaled_dot_product_attention(q, by_expand(ks), by_expand(vs))

    _, heads = check(Layer(finish), hidden_states(T), *caches())
    assert heads == [(H, H, H), (H, G, G)]


def test_gradients_are_the_models() -> None:
    class Attended(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v))

    def gradients(module: Any) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in rows()]
        module(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    want = gradients(Attended())
    backend = fxfuse.Backend(compiler="aot_eager", gate="always")
    assert_like(gradients(torch.compile(Attended(), backend=backend)), want)
    assert grouped(fxfuse.last_report()) == 1


def test_gradients_stop_where_the_model_stops_them() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            k, v = by_expand(k), by_expand(v)
        return F.scaled_dot_product_attention(q, k, v)

    leaves = [x.requires_grad_() for x in rows()]
    torch.compile(run, backend=fxfuse.Backend(compiler="aot_eager", gate="always"))(
        *leaves
    ).sum().backward()
    assert [x.grad is None for x in leaves] == [False, True, True]
    assert reasons(fxfuse.last_report()) == ["heads that are repeated without gradients"]


def test_autocast_keeps_the_models_casts() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v))

    check(run, *rows())


def test_where_kernels_are_chosen_they_get_what_the_model_gives_them() -> None:
    """Not every kernel reads grouped heads: attention might be left without one."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v))

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return run(q, k, v)

    report, heads = check(inside, *rows())
    assert heads == [(H, H, H)] and ["sdpa_kernel" in r for r in reasons(report)] == [True]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        report, heads = check(run, *rows())
    assert heads == [(H, H, H)] and ["is off" in r for r in reasons(report)] == [True]


def test_sizes_that_only_the_run_knows() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v))

    _, heads = check(run, *rows(7, 13), dynamic=True)
    assert heads == [(H, G, G)]


def test_an_error_leaves_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("no steps today")

    monkeypatch.setattr(grouped_heads, "steps_between", broken)

    def finish(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v))

    report, heads = check(Layer(finish), hidden_states(T))
    assert heads == [(H, H, H)] and [f.kind for f in report.fused] == ["attention"]
    assert reasons(report) == ["an error of fxfuse: KeyError: 'no steps today'"]


def test_settings_leave_it() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v))

    for given, reason in (
        ({"disable": ("grouped_heads",)}, "disabled by settings"),
        ({"gate": "never"}, "gate='never'"),
    ):
        settings = fxfuse.settings.Settings(**{"compiler": "eager", "gate": "always", **given})
        torch._dynamo.reset()
        report, heads = check(run, *rows(), settings=settings)
        assert heads == [(H, H, H)] and not report.fused
        assert [(x.kind, x.reason) for x in report.left] == [("grouped_heads", reason)]
        assert "attention over repeated heads" in str(report)
