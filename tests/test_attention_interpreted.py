"""The kernel of attention with one query row in Triton's interpreter, which runs its programs one
after the other.

The interpreter is chosen when triton is imported, so the checks run in a process of their own: this
file, run as a program.
"""

from __future__ import annotations

import pytest
import torch

from tests.decode_sites import SHAPES, Shape, tensors, truth
from tests.interpreted import interpreted
from tests.test_kernels_interpreted import amid_nans

pytestmark = pytest.mark.aot

# Sums of up to 72 products in float32.
CLOSE = 1e-6


def result(given: dict[str, torch.Tensor], block: object = None) -> torch.Tensor:
    from fxfuse.lowering import attention_launch, direct

    plan, out, counters = attention_launch.on_tensors(given, None, block)
    for name in ("out_ptr", "parts_ptr", "stats_ptr"):
        plan.arguments[name].fill_(float("nan"))
    counters.zero_()
    direct.prepared(plan)()
    assert not counters.any()
    return out


def error(given: dict[str, torch.Tensor], block: object = None) -> float:
    want = truth(given)
    got = result(given, block).double()
    return float((got - want).norm() / want.norm().clamp(min=1e-9))


def surrounded(shape: Shape) -> None:
    """Whatever lies beside the operands is NaN, and so are k and v before the first slot that is
    attended and behind the last: it counts for nothing.
    """
    given = tensors(shape, torch.float32)
    want = truth(given)
    used = given["mask"].flatten(0, 2).any(0).nonzero()
    for name in "kv":
        given[name][:, :, : int(used[0])] = float("nan")
        given[name][:, :, int(used[-1]) + 1 :] = float("nan")
    for name in "qkv":
        given[name] = amid_nans(given[name])
    got = result(given).double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def main() -> None:
    from fxfuse.lowering.attention_launch import Block

    blocks = (None, Block(16, 1, 1, 1), Block(16, 1, 1, 8), Block(16, 1, 1, 2, cores=False))
    for name, shape in SHAPES.items():
        for block in blocks:
            found = error(tensors(shape, torch.float32), block)
            assert found < CLOSE, (name, block, found)
        # The interpreter cuts a float32 down to bfloat16 where hardware rounds it, and its tl.dot
        # multiplies the bits of bfloat16.
        found = error(tensors(shape, torch.bfloat16), Block(16, 1, 1, 2, cores=False))
        assert found < 2**-7, (name, found)
        print(name, "ok", flush=True)
    for name in ("qwen3", "v is narrower"):
        surrounded(SHAPES[name])
    print("done")


def test_every_shape_in_the_interpreter() -> None:
    done = interpreted(__file__)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
