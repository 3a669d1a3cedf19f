"""What else happens in a process that compiles: threads, passes of the user's, cache artifacts, a
Python without Triton.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import fxfuse
from tests.blocked import without
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, token_ids
from tests.spellings import rsqrt
from tests.toys import Attention, Layer, T, assert_like, by_index_copy, caches, hidden_states

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu


# --- threads -----------------------------------------------------------------------------------


@pytest.mark.long
def test_two_models_in_two_threads() -> None:
    """Both begin at once; each gets its own sites and its own results."""
    names, start = ("llama", "qwen3"), threading.Barrier(2)
    found: dict[str, Any] = {}
    ids = token_ids(7)

    def work(name: str) -> None:
        try:
            model = build(FAMILIES[name])
            with torch.no_grad():
                want = model(ids, use_cache=False).logits
                start.wait(60)
                found[name] = fxfuse.explain(model, ids, use_cache=False)
                run = torch.compile(model, backend=fxfuse.backend)
                assert_close(run(ids, use_cache=False).logits, want, name)
        except Exception as error:
            found[name] = error

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sites = {name: [f for f in found[name].fused if f.kind == "attention"] for name in names}
    stages = {name: {f.stages for f in sites[name]} for name in names}
    assert stages == {"llama": {("rope",)}, "qwen3": {("rms_norm", "rope")}}
    assert [len(sites[name]) for name in names] == [2, 2]


@torch.no_grad()
def test_a_backend_that_was_copied_or_pickled_compiles_the_same() -> None:
    layer, ids = Layer(by_index_copy), hidden_states(T)
    given = fxfuse.Backend(strict=True)
    want, before = layer(ids, *caches()), fxfuse.counts()["store"]
    for backend in (given, copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert_like(torch.compile(layer, backend=backend)(ids, *caches()), want)
    # Equal backends share what was compiled.
    assert fxfuse.counts()["store"] - before == 1


# --- passes of the user's ----------------------------------------------------------------------

SLOTS = [
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
]


class Negating(CustomGraphPass):
    """A pass that shows in the result: the graph's first output is negated."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.seen += [str(n.target) for n in graph.nodes]
        output = next(n for n in graph.nodes if n.op == "output")
        first, *rest = output.args[0]
        with graph.inserting_before(output):
            negated = graph.call_function(torch.ops.aten.neg.default, (first,))
            negated.meta.update(first.meta)
        output.args = ((negated, *rest),)

    def uuid(self) -> str:
        return "tests.combinations.Negating"


@pytest.mark.parametrize(
    "slot",
    [*(pytest.param(x, marks=pytest.mark.long) for x in SLOTS[:-2]), *SLOTS[-2:]],
)
@pytest.mark.parametrize("how", ["config", pytest.param("options", marks=pytest.mark.long)])
@torch.no_grad()
def test_a_pass_of_the_users_runs_with_fxfuses(slot: str, how: str) -> None:
    toy, x, own = Attention(norm=rsqrt), hidden_states(), Negating()
    options = {slot: own}
    patches = {"fx_graph_cache": False, **(options if how == "config" else {})}
    with torch._inductor.config.patch(patches):
        run = torch.compile(
            toy, backend=fxfuse.backend, options=options if how == "options" else None
        )
        got = run(x)
    report = fxfuse.last_report()
    assert report is not None and len(report.fused) == 1
    # Behind the last passes Inductor has lowered nothing yet: the op is there.
    assert any("fxfuse" in target and "norm_rope" in target for target in own.seen)
    assert_like(got, -toy(x))


# --- caches ------------------------------------------------------------------------------------


@pytest.mark.long
@torch.no_grad()
def test_cache_artifacts_are_saved_and_loaded(tmp_path: Path) -> None:
    """Loaded into an empty cache, they spare the compile, and the report is the same."""
    from torch._dynamo.utils import counters

    layer, x = Layer(by_index_copy), hidden_states(T)
    want = layer(x, *caches())

    def compiled() -> tuple[str, int]:
        torch._dynamo.reset()
        counters.clear()
        assert_like(torch.compile(layer, backend=fxfuse.backend)(x, *caches()), want)
        report = fxfuse.last_report()
        assert report is not None and len(report.fused) == 1
        hits = counters["inductor"]["fxgraph_cache_hit"]
        hits += counters["aot_autograd"]["autograd_cache_hit"]
        return report.to_json(timings=False), hits

    with fresh_cache():
        cold = compiled()
        saved = torch.compiler.save_cache_artifacts()
    assert cold[1] == 0 and saved is not None
    with fresh_cache():
        torch.compiler.load_cache_artifacts(saved[0])
        warm = compiled()
    assert warm[1] > 0 and warm[0] == cold[0]


# --- without Triton ----------------------------------------------------------------------------

WITHOUT_TRITON = """
import json
import torch
import fxfuse
from tests.toys import Layer, T, assert_like, by_index_copy, caches, hidden_states

layer, x = Layer(by_index_copy), hidden_states(T)
with torch.no_grad():
    got, want = caches(), caches()
    assert_like(torch.compile(layer, backend=fxfuse.backend)(x, *got), layer(x, *want))
    assert_like(got, want)
assert "triton" not in sys.modules
print(json.dumps([(f.op, f.provider) for f in fxfuse.last_report().fused]))
"""


@pytest.mark.long
def test_a_python_without_triton_compiles(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", without("triton") + WITHOUT_TRITON],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    fused = json.loads(done.stdout.splitlines()[-1])
    assert fused == [["fxfuse::norm_rope_store_", "loops"]]
