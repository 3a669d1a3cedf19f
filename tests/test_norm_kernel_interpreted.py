"""The kernel of add_rms_norm on the CPU, through Triton's interpreter, against float64.

The interpreter is chosen when triton is imported, so the checks run in a process of their own: this
file, run as a program.
"""

from __future__ import annotations

import pytest
import torch

from tests.add_norms import CASES, EPS
from tests.interpreted import interpreted

pytestmark = pytest.mark.aot


def check(name: str) -> None:
    from fxfuse.lowering import norm_launch

    case = CASES[name]
    tensors = case.tensors()
    total, normed = norm_launch.launch_on(case.record, tensors, EPS)
    want_total, want = case.exact(tensors)
    # The interpreter cuts a float32 down where hardware rounds it: one unit in the last place of
    # each sum, and of the result.
    step = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}
    if case.record.keep_sum:
        rounds = step[str(want_total.dtype).removeprefix("torch.")] * case.record.addends
        torch.testing.assert_close(total, want_total, rtol=rounds, atol=rounds)
    rounds = step[case.record.dtype] + 2 * step[str(want_total.dtype).removeprefix("torch.")]
    torch.testing.assert_close(normed.double(), want, rtol=rounds, atol=2 * rounds)


def main() -> None:
    for name in CASES:
        check(name)
        print(name, "ok", flush=True)
    print("done")


def test_every_case_in_the_interpreter():
    done = interpreted(__file__)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
