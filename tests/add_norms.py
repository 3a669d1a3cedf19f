"""Calls of fxfuse::add_rms_norm that together take every branch of its kernel."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.patterns.record import AddNorm, Norm

PLAIN = Norm("head", "before", has_weight=True)
GEMMA = Norm("head", "before", has_weight=True, weight_offset=1.0)
BARE = Norm("head", "before", has_weight=False)
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    """Addends of dtypes and a shape; `laid` how they lie in memory: dense, parts of wider rows, or
    tokens first.
    """

    record: AddNorm
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    laid: str = "dense"

    def tensors(self, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(seed)

        def draw(dtype: torch.dtype) -> Tensor:
            *rows, d = self.shape
            if self.laid == "wide":
                wide = torch.randn((*rows, 2 * d + 3), generator=generator).to(device, dtype)
                return wide[..., 1 : 1 + d]
            x = torch.randn(self.shape, generator=generator).to(device, dtype)
            return x.transpose(0, 1).contiguous().transpose(0, 1) if self.laid == "turned" else x

        found = dict(zip(("x", "residual", "second"), map(draw, self.dtypes), strict=False))
        weight = torch.randn(self.shape[-1], generator=generator).to(device, self.dtypes[-1])
        return {**found, "weight": weight if self.record.norm.has_weight else None}

    def exact(self, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """The sum as the graph rounds it, and the norm of that in float64."""
        x, r, s, w = (tensors.get(n) for n in ("x", "residual", "second", "weight"))
        assert x is not None
        for addend in (r, s):
            x = x if addend is None else x + addend
        wide = dataclasses.replace(self.record, dtype="float64")
        return x, reference.add_rms_norm(x.double(), None, None, w, EPS, wide)[1]


EPS = 1e-5


def case(
    norm: Norm, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], laid: str = "dense",
    dtype: str = "bfloat16", keep: bool = True,
) -> Case:  # fmt: skip
    return Case(AddNorm(shape[-1], norm, len(dtypes), keep, dtype), dtypes, shape, laid)


CASES = {
    "llama": case(PLAIN, (BF16, BF16), (2, 3, 320)),
    "one row": case(PLAIN, (BF16, BF16), (4, 1, 1000)),
    "first norm": case(PLAIN, (BF16,), (2, 3, 96), keep=False),
    "last norm": case(PLAIN, (BF16, BF16), (5, 72), keep=False),
    "gemma": case(GEMMA, (FP32, FP32), (2, 3, 40), dtype="float32"),
    "parallel": case(PLAIN, (BF16, BF16, BF16), (2, 3, 200), "wide"),
    "mixed": case(BARE, (BF16, FP32, BF16), (2, 3, 24), dtype="float16"),
    "half": case(PLAIN, (FP16, FP16), (2, 5, 136), "turned", dtype="float16"),
    "many rows": case(PLAIN, (BF16, BF16), (2, 1030, 24), "wide"),
    "wide": case(BARE, (BF16, BF16), (1, 2, 12000)),
}
