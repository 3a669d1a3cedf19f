"""The Triton kernel on the CPU, through Triton's interpreter, against the float64 reference.

The interpreter is chosen when triton is imported, so the checks run in a process of their own: this
file, run as a program.
"""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from fxfuse.lowering.tiles import Tile
from fxfuse.patterns.record import Pass
from tests.interpreted import interpreted
from tests.sites import (
    BARE,
    NORM,
    SITES,
    Operands,
    cached,
    halves,
    neighbours,
    operands,
    paged,
    site,
    untouched,
)
from tests.test_head_sizes import GROUPS, HEAD_SIZES

pytestmark = pytest.mark.aot


def launched(case: Operands, tile: Tile | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    from fxfuse import ops
    from fxfuse.lowering import direct

    q, k = case.tensors["q"], case.tensors["k"]
    assert q is not None
    results = ops.empty_results(q, k, case.record)
    for result in results:
        result.fill_(float("nan"))
    tensors = {**case.tensors, "q_out": results[0]}
    if results[1].dim() == 4:
        tensors["k_out"] = results[1]
    direct.prepared(direct.planned(case.record, tensors, case.eps, tile=tile))()
    return results


def check(case: Operands, tile: Tile | None = None) -> None:
    wide, wanted = case.exact()
    got = launched(case, tile)
    # float32 inside; the longest sum is over 128 products of unit size.
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    if case.tensors["q"].dtype == torch.bfloat16:
        # The interpreter cuts a float32 down to bfloat16 where hardware rounds it.
        close = {"rtol": 2**-7, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(got[0], wanted[0], **close)
    if got[1].dim() == 4:
        torch.testing.assert_close(got[1], wanted[1], **close)
    if case.stores:
        assert untouched(case)
        for cache in ("k_cache", "v_cache"):
            if case.tensors[cache] is not None:
                # The interpreter loses the carry of a rounding to 8 bits, half of the number: what
                # is seen here is the place. tests/test_kernels_cuda.py has the numbers.
                is_cast = bool(case.record.store.k.cast.dtype)
                rounded = {**close, "rtol": 0.6, "atol": 2**-9} if is_cast else close
                got = case.numbers(cache).double()
                torch.testing.assert_close(got, wide.tensors[cache], **rounded)


def amid_nans(x: torch.Tensor) -> torch.Tensor:
    """The same values at the same strides; NaN before, behind and in the gaps."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    room = torch.full((span + 2048,), torch.nan, dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, x.stride(), 1024).copy_(x)


def without_neighbours(case: Operands) -> Operands:
    """A kernel that reads past an operand, as past a table's last row, finds NaN there."""
    for name, x in case.tensors.items():
        if x is not None and x.is_floating_point() and "cache" not in name:
            case.tensors[name] = amid_nans(x)
    positions = case.tensors.get("positions")
    if positions is not None:
        positions[0, 0], positions[-1, -1] = case.tensors["cos"].shape[1] - 1, -1
    return case


def sizes() -> None:
    """Head sizes that are no power of two, many heads, many tokens."""
    for channels in HEAD_SIZES:
        for rope in (halves, neighbours):
            turn = rope(channels, channels // 4 * 2)
            SITES["sized"] = site(channels, turn, norm=NORM, store=cached(True))
            for heads, kv_heads in GROUPS if channels == 48 else [(2, 3)]:
                sizes = {"batch": 1, "tokens": 2, "heads": heads, "kv_heads": kv_heads}
                check(without_neighbours(operands("sized", **sizes)))
    del SITES["sized"]
    # Half of each of many heads turns.
    SITES["many"] = site(128, halves(128, 64), norm=NORM)
    check(without_neighbours(operands("many", batch=1, tokens=9, heads=40, kv_heads=24)))
    del SITES["many"]
    check(operands("qwen3", batch=1, tokens=1, heads=16, kv_heads=8, dtype=torch.bfloat16))
    check(operands("llama", heads=1, kv_heads=4))
    # Many tokens: several of them in a program, and a last program that is not full.
    check(operands("mrope, in turns", batch=1, tokens=67, heads=40))
    check(operands("qwen3", batch=1, tokens=67, heads=40, slots=80))


def sites() -> None:
    for name in SITES:
        check(without_neighbours(operands(name)))
        print(name, "ok", flush=True)
    # Positions outside the table on one axis: their pairs turn by nothing that is read, the others
    # as ever; the table lies in the middle of NaN.
    case = operands("mrope", tokens=5)
    positions = case.tensors["positions"]
    wanted = launched(case)[0].clone()
    for table in ("cos", "sin"):
        surrounded = torch.full((3, *case.tensors[table].shape[1:]), float("nan"))
        surrounded[1] = case.tensors[table][0]
        case.tensors[table] = surrounded[1:2]
    positions[1, :, 0], positions[1, :, 1] = 50, -51
    got = launched(case)[0]
    assert not got.isnan().any() and torch.equal(got[:, 2:], wanted[:, 2:])
    others = [*range(4), *range(10, 20), *range(26, 128)]
    assert torch.equal(got[:, :2, :, others], wanted[:, :2, :, others])
    # v is normed with k's eps, and its halves change places on their way into split channels.
    one = site(24, norm=NORM, store=paged("0hd1e", "0hd1e"), v_norm=BARE)
    swapped = dataclasses.replace(one.v, passes=(Pass(0, 12, 12), Pass(12, 0, 12)))
    SITES["swapped"] = dataclasses.replace(one, v=swapped)
    for name in ("gemma4", "swapped"):
        case = operands(name)
        case.eps = (0.0, 0.5)
        check(case)
    del SITES["swapped"]
    # A slot outside the cache is never written.
    case = operands("qwen3", tokens=2, slots=4)
    case.tensors["slots"] = torch.tensor([[4, -1]])
    launched(case)
    assert all((case.tensors[c] == 77.0).all() for c in ("k_cache", "v_cache"))


def ahead() -> None:
    """Tables and weights asked for ahead of rows, and 1 / rms multiplied last."""
    tile = Tile(2, 4, 4, ahead=True)
    for name in SITES:
        check(without_neighbours(operands(name, tokens=5)), tile)
        print(name, "ok", flush=True)
    check(operands("qwen3", batch=1, tokens=9, heads=16, dtype=torch.bfloat16), tile)
    # Squares beyond float32: 1 / rms is 0 and so is the row, though x * weight is beyond it too.
    case = operands("qwen3", tokens=2)
    case.tensors["q"].fill_(3e38)
    case.tensors["q_weight"].fill_(1000.0)
    plain = case.copy()
    got, wanted = launched(case, tile)[0], plain.op()(*plain.arguments())[0]
    assert not wanted.any() and torch.equal(got, wanted)


PARTS = {"sites": sites, "sizes": sizes, "ahead": ahead}


@pytest.mark.parametrize("part", ["sites", "ahead", pytest.param("sizes", marks=pytest.mark.long)])
def test_every_site_in_the_interpreter(part):
    done = interpreted(__file__, part)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    PARTS[sys.argv[1]]()
    print("done")
