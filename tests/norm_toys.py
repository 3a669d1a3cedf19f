"""Toys of norms without a rotation: q and k of one attention, and a decoder layer's residual norms.

In: a norm spelling and what stands between. Out: modules from hidden states to a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from tests.spellings import Normed, rsqrt
from tests.toys import Attention, Sizes, assert_like

Between = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class NormedAttention(Attention):
    """q and k normed per head and not rotated; `between` sees them before attention."""

    def __init__(self, norm: Normed = rsqrt, **kwargs: Any) -> None:
        super().__init__(norm=norm, **kwargs)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class Gated(NormedAttention):
    """q shares a projection with a gate, head by head; the gate multiplies attention's result."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(sizes=Sizes(heads=8), **kwargs)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        d, n = self.sizes.head_dim, self.counts[1]
        q_gate, k, v = self.project(x).split([8 * d, n * d, n * d], -1)
        q, gate = q_gate.view(*x.shape[:2], -1, 2 * d).chunk(2, -1)
        k, v = (t.view(*x.shape[:2], -1, d).transpose(1, 2) for t in (k, v))
        q, k = self.prelude(q.transpose(1, 2), k, q, q)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2) * gate.sigmoid()


class Residual(nn.Module):
    """`run(x, layer)` over two linear layers, two norms and `wide`, which is hidden by hidden."""

    def __init__(self, run: Callable[..., Any], norm: Normed = rsqrt, width: int = 32) -> None:
        super().__init__()
        self.run, self.spelling = run, norm
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.weights = nn.ParameterList(
            torch.randn(width, generator=generator) * 0.2 + 1 for _ in range(3)
        )
        self.eval()

    def norm(self, x: Tensor, which: int = 0, eps: float = 1e-5) -> Tensor:
        return self.spelling(x, self.weights[which], eps)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def pre_norm(layer: Residual, x: Tensor) -> Any:
    """The residual stream of a decoder layer, twice, and the last norm."""
    h = x + layer.first(layer.norm(x, 0))
    h = h + layer.second(layer.norm(h, 1))
    return layer.norm(h, 2)


@torch.no_grad()
def compiled(toy: Any, *args: Tensor, tolerance: float = 1e-5, **settings: Any) -> fxfuse.Report:
    """The report of one compile of a toy, whose results are eager's."""
    torch._dynamo.reset()
    settings = {"compiler": "eager", "gate": "always", **settings}
    want = toy(*(a.clone() for a in args))
    got = torch.compile(toy, backend=fxfuse.Backend(**settings))(*args)
    assert_like(got, want, tolerance)
    report = fxfuse.last_report()
    assert report is not None
    return report
