"""What a rewrite must leave alone: other readers of a result, in-place writes, random numbers, the
user's own graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxfuse
from fxfuse.passes import fuse_graph
from fxfuse.settings import Settings
from tests.spellings import rsqrt
from tests.toys import (
    SLOTS,
    Finish,
    G,
    Layer,
    T,
    assert_like,
    attend,
    by_index_copy,
    caches,
    check,
    hidden_states,
    stages,
)

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


# --- results with other users ------------------------------------------------------------------


def test_what_the_model_returns_stays_an_output() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, *memory: Tensor) -> Any:
        return by_index_copy(q, k, v, *memory), q, k, (k * k).mean()

    report = check(finish)
    assert stages(report) == ["store(k,v)"] and report.fused[0].record.k.keep


def test_raw_q_and_normed_k_are_read_beside_the_site() -> None:
    class Gate(Layer):
        def forward(self, x: Tensor, *memory: Tensor) -> Any:
            q, k, _ = self.split(x)
            gate = torch.sigmoid(q), rsqrt(k, self.k_weight, self.eps[1])
            return super().forward(x, *memory), gate

    assert stages(check(Gate(by_index_copy))) == ["store(k,v)"]


def test_views_of_q_before_the_store_move_behind_it() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, *memory: Tensor) -> Any:
        grouped = q.unflatten(1, (G, 2)).transpose(2, 3)
        return by_index_copy(q, k, v, *memory), grouped.sum(1)

    assert stages(check(finish)) == ["store(k,v)"]


@pytest.mark.parametrize("part", [slice(None), slice(0, 2)], ids=["whole", "rows"])
def test_a_copy_that_is_kept_is_none_that_is_rotated_again(part: slice) -> None:
    """One op, and a copy of its result where it stands: not a site of its own at the end."""

    def finish(q: Tensor, k: Tensor, v: Tensor) -> Any:
        kept = k[:, :, part].clone()
        return attend(q, k, v), kept, q.clone()

    assert len(check(finish, lambda: []).fused) == 1


@torch.no_grad()
def test_a_copy_that_attention_alone_reads_is_made_by_the_op() -> None:
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        fused, report = fuse_graph(gm, Settings())
        seen.append((len(report.fused), {node.target for node in fused.graph.nodes}))
        return fused

    layer = Layer(lambda q, k, v: attend(q.clone(), k.contiguous(), v))
    assert_like(torch.compile(layer, backend=backend)(hidden_states(T)), layer(hidden_states(T)))
    ((count, targets),) = seen
    assert count == 1 and not {"clone", "contiguous"} & targets


def test_a_result_used_before_the_store_keeps_the_store_behind() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, *memory: Tensor) -> Any:
        score = (q[:, :G] * k).sum(-1)
        return by_index_copy(q, k, v * score[..., None], *memory)

    assert check(finish).fused


@pytest.mark.parametrize(
    "like", [lambda one, k: one.type_as(k), lambda one, k: one.expand_as(k)[..., :1]]
)
def test_a_reader_of_k_s_metadata_alone_may_stand_before_the_store(like: Any) -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, *memory: Tensor) -> Any:
        one = torch.ones(1, dtype=torch.float64)
        return by_index_copy(q, k, v, *memory) + like(one, k).float().mean()

    assert stages(check(finish)) == ["store(k,v)"]


def test_a_number_read_from_the_cache_is_read_where_it_stands() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, *memory: Tensor) -> Any:
        before = memory[0].sum().item()
        return by_index_copy(q, k, v, *memory) * before

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert stages(check(finish)) == ["store(k,v)"]


def test_a_scaled_k_is_stored_as_it_is_read() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, *memory: Tensor) -> Any:
        return by_index_copy(q, 2 * k, 3 * v, *memory)

    report = check(finish)
    assert stages(report) == ["store(k)"] and report.fused[0].record.k.scale == 2.0


def test_a_cache_of_another_dtype() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(2, slots, k.to(ks.dtype))
        vs.index_copy_(2, slots, v.to(vs.dtype))
        return attend(q, ks.float(), vs.float())

    def memory() -> list[Tensor]:
        return [*(t.to(torch.bfloat16) for t in caches()[:2]), SLOTS]

    assert check(finish, memory).fused


# --- in-place writes ---------------------------------------------------------------------------


def into_a_slice_of_a_clone(q: Tensor, k: Tensor, v: Tensor) -> Any:
    q2 = q.clone()
    q2[..., :8] = 0.5
    return attend(q2, k, v)


def into_q_itself(q: Tensor, k: Tensor, v: Tensor) -> Any:
    early = q.sum(-1)
    q[..., 3:9] *= 2
    return attend(q, k, v), early


def into_a_view_of_k(q: Tensor, k: Tensor, v: Tensor) -> Any:
    k.transpose(1, 2)[:, 0].zero_()
    return attend(q, k, v)


def into_an_empty_tensor(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """DeepSeek and MiniCPM3 build k from parts."""
    whole = k.new_empty(*k.shape[:-1], 24)
    whole[..., :16] = k
    whole[..., 16:] = v[..., :8]
    return attend(F.pad(q, (0, 8)), whole, v)


def into_v_and_back(q: Tensor, k: Tensor, v: Tensor) -> Any:
    v.copy_(k)
    return attend(q, k, v)


@pytest.mark.parametrize(
    "finish",
    [
        into_a_slice_of_a_clone,
        into_q_itself,
        into_a_view_of_k,
        into_an_empty_tensor,
        into_v_and_back,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("packing", ["separate", "one view"])
def test_writes_after_the_rotation(finish: Finish, packing: str) -> None:
    assert check(Layer(finish, packing=packing), list).fused


class WritesTheProjection(Layer):
    """`when` a write goes to the packed projection that q, k and v are views of."""

    def __init__(self, when: str) -> None:
        super().__init__(lambda q, k, v: attend(q, k, v))
        self.when = when

    def forward(self, x: Tensor, *memory: Tensor) -> Any:
        y = self.project(x)
        q, k, v = (t.transpose(1, 2) for t in y.view(*x.shape[:2], 8, 16).split((4, 2, 2), 2))
        cos, sin = self.tables(torch.arange(x.shape[1]))
        if self.when == "before":
            y[..., :40].mul_(0.5)
        if self.when == "inside":
            mean = q.pow(2).mean(-1, keepdim=True)
            y.add_(1.0)
            q = q * torch.rsqrt(mean + 1e-6)
        q, k = self.prelude(q, k, cos, sin)
        if self.when == "after":
            y.zero_()
        return attend(q, k, v)


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_writes_to_the_projection(when: str) -> None:
    check(WritesTheProjection(when), list)


class WritesTheTable(Layer):
    """q turns by other angles than k."""

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q = self.rope.turn(q, cos, sin)
        cos.mul_(0.5)
        return q, self.rope.turn(k, cos, sin)


def test_a_table_written_between_q_and_k() -> None:
    check(WritesTheTable(attend), list)


# --- calls that nothing reads ------------------------------------------------------------------


def draws(q: Tensor, k: Tensor, v: Tensor) -> Any:
    torch.rand(3)
    F.dropout(q, 0.5)
    return attend(q, k, v) + torch.rand(())


def test_random_numbers_that_nobody_reads_are_still_drawn() -> None:
    layer, x = Layer(draws), hidden_states(T)
    with torch.no_grad():
        torch.manual_seed(5)
        want, state = layer(x), torch.get_rng_state()
        torch.manual_seed(5)
        got = torch.compile(layer, backend=fxfuse.Backend(compiler="eager"))(x)
    assert_like(got, want)
    assert torch.equal(torch.get_rng_state(), state)


def test_writes_that_nobody_reads_still_happen() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, *memory: Tensor) -> Any:
        memory[0][:, :, 0] = 9.0
        memory[2].add_(1)
        memory[1].index_copy_(2, SLOTS, v)
        return attend(q, k, v)

    assert check(finish).fused


# --- the graph handed in -----------------------------------------------------------------------


def compile_and_compare_the_graph(finish: Finish = by_index_copy) -> fxfuse.Report:
    """What Dynamo handed to the backend is afterwards what it was."""
    backend, seen = fxfuse.Backend(compiler="eager"), []

    def describe(gm: Any) -> Any:
        nodes = [(n.format_node(), list(n.users), sorted(map(str, n.meta))) for n in gm.graph.nodes]
        return gm.code, nodes, sorted(gm.__dict__)

    def comparing(gm: Any, inputs: Any) -> Any:
        before = describe(gm)
        compiled = backend(gm, inputs)
        assert describe(gm) == before
        seen.append(fxfuse.last_report())
        return compiled

    layer, want_memory, got_memory = Layer(finish), caches(), caches()
    with torch.no_grad():
        want = layer(hidden_states(T), *want_memory)
        got = torch.compile(layer, backend=comparing)(hidden_states(T), *got_memory)
    assert_like(got, want)
    assert_like(got_memory, want_memory)
    (report,) = seen
    return report


def test_a_rewrite_leaves_the_users_graph_as_it_was() -> None:
    assert len(compile_and_compare_the_graph().fused) == 1


@pytest.mark.parametrize("step", ["replace", "erase"])
def test_a_rewrite_that_fails_half_way_leaves_the_graph_whole(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfuse import rewrite

    done = getattr(rewrite._Editor, step)

    def fail(editor: Any, *args: Any) -> None:
        done(editor, *args)
        raise RuntimeError("half-way")

    monkeypatch.setattr(rewrite._Editor, step, fail)
    report = compile_and_compare_the_graph()
    assert report.fused == []
    assert report.notes == ["not fused, an error of fxfuse: RuntimeError: half-way"]
