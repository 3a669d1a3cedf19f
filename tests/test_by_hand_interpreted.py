"""Calls by hand through the launch that eager code gets on a GPU, in Triton's interpreter.

The interpreter is chosen when triton is imported, so the checks run in a process of their own: this
file, run as a program.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxfuse import ops
from tests.interpreted import interpreted
from tests.test_by_hand import LAYOUTS, SLOTS, D, N, P, T, canaries, draw, packed

pytestmark = pytest.mark.aot

# float32 inside.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def both(call: Any, *caches: Any) -> None:
    """A call in float32 by the kernel and in float64 by the reference, and what it writes."""
    launched, ops.launched = ops.launched, lambda *what: None
    exact = [c.double() for c in caches]
    want = call(torch.float64, *exact)
    ops.launched = launched
    got = call(torch.float32, *caches)
    for a, b in zip((*got, *caches), (*want, *exact), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.double(), b, **CLOSE)


def summed(dtype: torch.dtype) -> Any:
    x = draw(T, 48, dtype=dtype)
    return ops.add_rms_norm(x, None, x.flip(0), draw(96, dtype=dtype)[::2], 1e-5, 1.0)


def main() -> None:
    from fxfuse.lowering import eager, providers

    taken: list[str] = []

    def launched(name: str, x: Any, args: Any, record: Any) -> Any:
        results = eager.launched(name, args, record)
        assert results is not None, name
        taken.append(name)
        return results

    ops.launched = launched
    angle = draw(N, D // 2)
    positions = torch.tensor([3, 0, -1, 10, 3])

    def chain(dtype: torch.dtype, tokens: int = T, batch: bool = False) -> Any:
        q, k, _ = packed(tokens, dtype)
        tables = angle[:tokens].cos().to(dtype), angle[:tokens].sin().to(dtype)
        if batch:
            q, k = (x.expand(3, *x.shape).clone().transpose(1, 2).contiguous() for x in (q, k))
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        weights = {"q_weight": draw(2 * D)[::2].to(dtype), "weight_offset": 1.0}
        return ops.qk_norm_rope(q, k, *tables, **weights, heads_first=batch)

    for tokens in (0, 1, 2, T):
        for batch in (False, True):
            both(lambda dtype, t=tokens, b=batch: chain(dtype, t, b))
    for interleaved in (False, True):

        def looked_up(dtype: torch.dtype, interleaved: bool = interleaved) -> Any:
            q, k, _ = packed(T, dtype)
            tables = angle.cos().to(dtype), angle.sin().to(dtype)
            return ops.rope(q, k, *tables, interleaved=interleaved, positions=positions)

        both(looked_up)
    for name, (layout, k_shape, v_shape, *_) in LAYOUTS.items():
        for given in (False, True) if name != "flat" else (False,):
            at = (SLOTS // P, SLOTS % P) if given else (SLOTS, None)

            def store(dtype: Any, k_cache: Any, v_cache: Any, at: Any = at, how: Any = layout):
                q, k, v = packed(T, dtype)
                tables = angle[:T].cos().to(dtype), angle[:T].sin().to(dtype)
                slots, offsets = at
                return ops.qk_norm_rope_store_(
                    q, k, v, *tables, slots, k_cache, v_cache, layout=how, offsets=offsets,
                    keep_k=offsets is not None,
                )  # fmt: skip

            both(store, *canaries(k_shape, v_shape, dtype=torch.float32))
    both(summed)
    assert set(taken) == {"norm_rope", "norm_rope_store_", "add_rms_norm"}
    assert not providers.failures()
    # What the kernel does not know goes to the reference.
    q, k, _ = packed()
    ops.launched = lambda name, x, args, record: eager.launched(name, args, record)
    assert ops.qk_norm(q, k)[0].dtype == torch.float64
    print("done")


@pytest.mark.long
def test_the_launch_of_eager_code_in_the_interpreter() -> None:
    done = interpreted(__file__)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
