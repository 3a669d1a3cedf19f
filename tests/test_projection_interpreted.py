"""The projection's kernel in Triton's interpreter, which runs its programs one after the other.

The interpreter is chosen when triton is imported, so the checks run in a process of their own: this
file, run as a program.
"""

from __future__ import annotations

import pytest
import torch

from fxfuse import reference
from tests.interpreted import interpreted
from tests.projected_sites import (
    EPS,
    SHAPES,
    Block,
    Shape,
    arguments,
    errors,
    planned,
    tensors,
    truth,
)
from tests.sites import with_dtype
from tests.test_kernels_interpreted import amid_nans

pytestmark = pytest.mark.aot

# Sums of up to 72 products in float32, and a rotation.
CLOSE = 1e-6
# Blocks that do not divide hidden sizes and channels, and others.
BLOCKS = (None, Block(4, 16, 4, 1), Block(16, 32, 4, 1))


def surrounded(shape: Shape) -> None:
    """Whatever lies beside the operands is NaN, and counts for nothing."""
    from fxfuse.lowering import direct

    given = tensors(shape, torch.float32)
    want = truth(shape, given)
    for name in [n for n in given if n in ("x", "residual", "x_weight") or "proj" in n]:
        given[name] = amid_nans(given[name])
    plan, results, _ = planned(shape, given, Block(4, 16, 4, 1))
    direct.prepared(plan)()
    for got, exact in zip((*results, given["k_cache"], given["v_cache"]), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def beyond_squares(shape: Shape) -> None:
    """Where squares of the sum are beyond float32, 1 / rms is 0, and so is what eager projects, but
    for a sum that is not finite.
    """
    from fxfuse.lowering import direct

    record = with_dtype(shape.record, "float32")
    for infinite in (False, True):
        given = tensors(shape, torch.float32)
        given["x"].sign_().mul_(3e38)
        given["residual"].zero_()
        # All of one sign: the terms of a channel's sum do not cancel out.
        for name in "qkv":
            given[f"{name}_proj"] = given[f"{name}_proj"].abs() * given["x"].sign().view(-1)
            given[f"{name}_proj_bias"] = torch.zeros(given[f"{name}_proj"].shape[:2])
        given["x_weight"].fill_(2.0)
        if infinite:
            given["residual"].view(-1)[-1] = torch.inf
        eager = {name: x.clone() for name, x in given.items()}
        want = reference.project_norm_rope_store_(*arguments(eager), *EPS, record)[0]
        assert want.isnan().all() if infinite else not want.any()
        plan, (q, *_), _ = planned(shape, given)
        direct.prepared(plan)()
        for got, exact in ((q, want), *((given[n], eager[n]) for n in ("k_cache", "v_cache"))):
            torch.testing.assert_close(got, exact.view_as(got), rtol=0, atol=0, equal_nan=True)


def main() -> None:
    from fxfuse.lowering import direct

    for name, shape in SHAPES.items():
        for block in BLOCKS:
            if shape.batch * shape.tokens > 1 and block is not None and block.rows < 16:
                continue
            found = errors(shape, torch.float32, lambda plan: direct.prepared(plan)(), block=block)
            assert max(found) < CLOSE, (name, block, found)
        print(name, "ok", flush=True)
    for name in ("qwen3", "gptj, packed", "qwen3, normed", "qwen3, 1 + w"):
        surrounded(SHAPES[name])
    for name in ("qwen3, normed", "qwen3, 1 + w"):
        beyond_squares(SHAPES[name])
    print("done")


def test_every_projected_site_in_the_interpreter() -> None:
    done = interpreted(__file__)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
