"""A library's op that writes rows into paged caches joins the fused op, once its contract is known.

    python examples/09_registering_a_store.py

The op here is an invented one, as serving engines have them: rows at slots below 0 are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tour import DEVICE, compare

import fxfuse

T, H, G, D, PAGES, PAGE = 6, 4, 2, 16, 4, 8


@torch.library.custom_op("mylib::write_pages", mutates_args=("k_pages", "v_pages"))
def write_pages(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    kept = slots >= 0
    page, row = slots[kept] // PAGE, slots[kept] % PAGE
    k_pages[page, row], v_pages[page, row] = k[kept], v[kept]


def layer(qkv: Tensor, cos: Tensor, sin: Tensor, *memory: Tensor) -> Tensor:
    q, k, v = qkv.view(T, -1, D).split((H, G, G), 1)
    q, k = (x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin for x in (q, k))
    write_pages(k, v, *memory)
    return q


def memory() -> list[Tensor]:
    pages = [torch.zeros(PAGES, PAGE, G, D, device=DEVICE) for _ in range(2)]
    return [*pages, torch.tensor([17, 3, -1, 8, 9, 30], device=DEVICE)]


@torch.no_grad()
def main() -> None:
    qkv = torch.randn(T, (H + 2 * G) * D, device=DEVICE)
    angles = torch.rand(T, 1, D // 2, device=DEVICE).repeat(1, 1, 2)
    inputs = (qkv, angles.cos(), angles.sin())
    print(f"unknown: {fxfuse.explain(layer, *inputs, *memory(), compiler='eager')}\n")
    names = {"key": "k", "value": "v", "key_cache": "k_pages", "value_cache": "v_pages"}
    op = torch.ops.mylib.write_pages.default
    with fxfuse.register_store(op, **names, slots="slots", layout="01hd", negative="skip"):
        got, want = memory(), memory()
        q = torch.compile(layer, backend=fxfuse.backend)(*inputs, *got)
    print(f"known: {fxfuse.last_report()}")
    compare("q", q, layer(*inputs, *want))
    compare("pages of k", got[0], want[0])
    compare("pages of v", got[1], want[1])


if __name__ == "__main__":
    main()
