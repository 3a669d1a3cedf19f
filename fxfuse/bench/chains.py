"""The chains that are timed, spelled as models spell them.

Weights and tables of positions are parameters and buffers, as in a model; activations, caches and
positions are arguments. Each chain returns what attention reads and writes its caches in place.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.functional import scaled_dot_product_attention as attention

from fxfuse.bench.shapes import SECTIONS, Shape


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in Llama, Qwen3 and diffusers: cast back, then the weight."""
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + eps)
    return weight * x.to(dtype)


def gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in Gemma3: times (1 + w) in float32, then cast back."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).type_as(x)


def rotate_by_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in Llama: full tables and rotate_half, in the working dtype."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos) + (turned * sin)


def rotate_by_chunk(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in gpt-oss: half tables and chunks, in the working dtype."""
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_neox(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves, half tables, in float32."""
    x1, x2 = torch.chunk(x.float(), 2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


def rotate_gptj(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs, half tables, in float32."""
    x1, x2 = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2).type_as(x)


NORMS = {"rms": rms_norm, "gemma": gemma_norm}
# Rotations whose chains look their tables up.
LOOKED_UP = ("neox", "gptj", "mrope")

ROTATIONS = {
    "half": rotate_by_half,
    "chunk": rotate_by_chunk,
    "neox": rotate_neox,
    "gptj": rotate_gptj,
    "mrope": rotate_neox,
}


class Chain(nn.Module):
    """What all chains share: norm weights where there is a norm, and a table by position."""

    table: Tensor

    def __init__(self, shape: Shape, table: Tensor | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.turn = ROTATIONS[shape.rotation or "half"]
        weight = torch.randn(2, shape.head_dim, dtype=torch.bfloat16)
        self.q_weight = nn.Parameter(weight[0].clone(), requires_grad=False)
        self.k_weight = nn.Parameter(weight[1].clone(), requires_grad=False)
        if table is not None:
            self.register_buffer("table", table)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.shape.norm is None:
            return q, k
        norm, eps = NORMS[self.shape.norm], self.shape.eps
        return norm(q, self.q_weight, eps), norm(k, self.k_weight, eps)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotary = self.shape.rotary
        if rotary == self.shape.head_dim:
            return self.turn(x, cos, sin)
        return torch.cat((self.turn(x[..., :rotary], cos, sin), x[..., rotary:]), dim=-1)

    def looked_up(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [..., T, 1, R / 2] of positions [..., T]."""
        cos, sin = self.table[positions].unsqueeze(-2).chunk(2, dim=-1)
        return cos, sin

    def prelude(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        """QK-norm, rotation by given tables, and the store of k, v [1, G, T, D] by index_copy_."""
        heads = (*q.shape[:-1], -1, self.shape.head_dim)
        q, k = self.normed(q.view(heads), k.view(heads))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.view(heads).transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        k_cache.index_copy_(2, slots, k)
        v_cache.index_copy_(2, slots, v)
        return q


class Prelude(Chain):
    """QK-norm, RoPE and a static cache as transformers writes them: projections [1, T, heads * D],
    cos and sin [1, T, R], caches [1, G, S, D].
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        return self.prelude(q, k, v, cos, sin, slots, k_cache, v_cache)


class Projected(Chain):
    """Projections of x [B, 1, hidden] by weights [heads * D, hidden], and the prelude behind them,
    as a decode step of transformers has them.
    """

    def __init__(self, shape: Shape, table: Tensor | None = None) -> None:
        super().__init__(shape, table)
        drawn = (torch.randn(width, dtype=torch.bfloat16) for width in shape.widths())
        for name, bias in zip("qkv", drawn, strict=True):
            kept = nn.Parameter(bias, requires_grad=False) if shape.bias else None
            self.register_parameter(f"{name}_bias", kept)

    def forward(
        self, x: Tensor, q_proj: Tensor, k_proj: Tensor, v_proj: Tensor, cos: Tensor, sin: Tensor,
        slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        weights = zip((q_proj, k_proj, v_proj), "qkv", strict=True)
        q, k, v = (linear(x, w, getattr(self, f"{name}_bias")) for w, name in weights)
        return self.prelude(q, k, v, cos, sin, slots, k_cache, v_cache)


class NormedProjected(Projected):
    """Residual add and RMSNorm in front of the projections; the sum is returned too."""

    def __init__(self, shape: Shape, table: Tensor | None = None) -> None:
        super().__init__(shape, table)
        weight = torch.randn(shape.hidden, dtype=torch.bfloat16)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return super().forward(rms_norm(total, self.weight, self.shape.eps), *rest), total


class NormRope(Chain):
    """QK-norm and RoPE by position of q and k [tokens, H, D], tables looked up in the chain."""

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.looked_up(positions)
        q, k = self.normed(q, k)
        return self.rotated(q, cos, sin), self.rotated(k, cos, sin)


class PackedPrelude(Chain):
    """A prelude from one packed projection [1, T, (H + 2 G) * D]."""

    def forward(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        q, k, v = torch.split(qkv, self.shape.widths(), dim=-1)
        return self.prelude(q, k, v, cos, sin, slots, k_cache, v_cache)


class PackedNormRope(Chain):
    """QK-norm and RoPE over views of one packed qkv [T, (H + G + G) * D]; v is left alone."""

    def forward(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        heads = (*qkv.shape[:-1], -1, self.shape.head_dim)
        q, k, _ = torch.split(qkv, self.shape.widths(), dim=-1)
        cos, sin = self.looked_up(positions)
        q, k = self.normed(q.view(heads), k.view(heads))
        return self.rotated(q, cos, sin), self.rotated(k, cos, sin)


class RopeStore(Chain):
    """RoPE by position of q, k [T, heads, D] and the store of k, v in flat caches [S, G, D]."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        cos, sin = self.looked_up(positions)
        q, k = self.rotated(q, cos, sin), self.rotated(k, cos, sin)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return q

    def store(self, cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        cache.index_put_((slots,), rows)


class BatchedRopeStore(RopeStore):
    """The same with a batch axis, q, k, v [1, T, heads, D], as transformers' paged cache writes."""

    def store(self, cache: Tensor, slots: Tensor, rows: Tensor) -> None:
        cache.index_copy_(0, slots, rows.squeeze(0))


FP8 = torch.float8_e4m3fn
# Tokens of a page, and elements of 16 bytes.
PAGE, SPLIT = 64, 16


class PagedMRope(Chain):
    """QKV split, QK-norm, mRoPE by positions [3, T] and the write into shuffled 8-bit pages: keys
    [N, G, D / x, page, x], values [N, G, page / x, D, x], divided by a scale.
    """

    def forward(
        self, qkv: Tensor, positions: Tensor, slots: Tensor, k_scale: Tensor, v_scale: Tensor,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        heads = (*qkv.shape[:-1], -1, self.shape.head_dim)
        q, k, v = (x.view(heads) for x in torch.split(qkv, self.shape.widths(), dim=-1))
        cos, sin = (by_thirds(x) for x in self.table[positions].chunk(2, dim=-1))
        q, k = self.normed(q, k)
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        block, place = slots // PAGE, slots % PAGE
        k_cache[block, :, :, place] = quantised(k, k_scale).view(*k.shape[:-1], -1, SPLIT)
        v_cache[block, :, place // SPLIT, :, place % SPLIT] = quantised(v, v_scale)
        return q


def by_thirds(table: Tensor) -> Tensor:
    """[T, 1, R / 2] of [3, T, R / 2]: every third pair of height and of width."""
    mixed = table[0].clone()
    for axis in (1, 2):
        third = slice(axis, 3 * SECTIONS[axis], 3)
        mixed[..., third] = table[axis, ..., third]
    return mixed.unsqueeze(-2)


def quantised(x: Tensor, scale: Tensor) -> Tensor:
    """Rows / scale as bits of FP8, no further than its largest number."""
    largest = torch.finfo(FP8).max
    return (x.float() / scale).clamp(-largest, largest).to(FP8).view(torch.uint8)


def keys_by_slot(cache: Tensor) -> Tensor:
    """Shuffled keys as [slots, G, D]."""
    blocks, g, split, page, x = cache.shape
    return cache.permute(0, 3, 1, 2, 4).reshape(blocks * page, g, split * x)


def values_by_slot(cache: Tensor) -> Tensor:
    """Shuffled values as [slots, G, D]."""
    blocks, g, pages, d, x = cache.shape
    return cache.permute(0, 2, 4, 1, 3).reshape(blocks * pages * x, g, d)


class PackedQkNorm(Chain):
    """QK-norm of rows of heads cut out of one packed qkv [T, (H + 2 G) * D], and attention."""

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = torch.split(qkv, self.shape.widths(), dim=-1)
        rows = (-1, self.shape.head_dim)
        q_out, k_out = self.normed(q.reshape(rows), k.reshape(rows))
        return attended(q_out.view(q.shape), k_out.view(k.shape), v, self.shape)


def attended(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """Attention of all tokens with each other. Shapes: q [T, H * D], k, v [T, G * D]."""
    heads = (len(q), -1, shape.head_dim)
    q, k, v = (x.view(heads).transpose(0, 1)[None] for x in (q, k, v))
    if shape.kv_heads > shape.heads:
        # Each q meets several heads of k.
        q = q.repeat_interleave(shape.kv_heads // shape.heads, 1)
    return attention(q, k, v, enable_gqa=True)


class AddNorm(Chain):
    """Residual add and RMSNorm over the hidden width: [T, hidden] each, sum and norm returned."""

    def __init__(self, shape: Shape, table: Tensor | None = None) -> None:
        super().__init__(shape, table)
        weight = torch.randn(shape.hidden, dtype=torch.bfloat16)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, NORMS[self.shape.norm or "rms"](total, self.weight, self.shape.eps)


class RepeatedHeads(Chain):
    """Attention by a mask over caches, heads of k and v repeated in front of it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        times = q.shape[1] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (k, v))
        return attention(q, k, v, attn_mask=mask)
