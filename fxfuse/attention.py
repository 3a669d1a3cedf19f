"""The op fxfuse::decode_attention: attention with one query row, over heads of k and v that several
query heads read; as a function, and as what it runs.

In comes what a rewritten graph hands over: q, k, v, a mask and the record as text. Out come the
attended rows. `fxfuse.schemas` defines the op.
"""

import torch
from torch import Tensor

from fxfuse import ops, reference
from fxfuse.patterns.record import DecodeAttention


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, record: str
) -> Tensor:
    """out = softmax(q kᵀ · scale + mask) v; query head h reads head h // (H / G) of k and v.

    Shapes: q [B, H, 1, D], k [B, G, S, D], v [B, G, S, Dv]; mask broadcasts to [B, H, 1, S]: True,
        or more than -inf, where a slot is attended; scale 1 / sqrt(D) where None; result
        [B, H, 1, Dv], 0 for a row that attends nothing (as torch's own definition has it, of
        whose kernels on a GPU one gives the mean of v).
    Layout: inputs any strides; the result dense.
    Dtypes: q, k and v of one floating dtype, which is the result's; a mask boolean or floating.
    Rounding: float32 (float64 for float64 inputs) inside, one rounding at the end; where a kernel
        multiplies by tensor cores, the weights of v are rounded to its dtype too.
    Mutates: nothing. Not differentiable.
    Errors: ValueError where shapes and record disagree.
    Source: torch.nn.functional.scaled_dot_product_attention with enable_gqa; softmax in one pass
        arXiv:1805.02867, slots shared out as in Flash-Decoding.
    """
    result: Tensor = torch.ops.fxfuse.decode_attention(q, k, v, mask, scale, record)
    return result


def read_record(text: str) -> DecodeAttention:
    return DecodeAttention.from_text(text)


def _checked(record: DecodeAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    batch = q.shape[0]
    wanted = {
        "q": (q, (batch, record.heads, 1, record.channels)),
        "k": (k, (batch, record.kv_heads, record.slots, record.channels)),
        "v": (v, (batch, record.kv_heads, record.slots, record.v_channels)),
    }
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            raise ValueError(
                f"fxfuse: decode_attention: {name}: got shape {tuple(x.shape)}, wanted {shape}; "
                "give the record of these operands"
            )
    whole = (batch, record.heads, 1, record.slots)
    if mask is not None and not _broadcasts(tuple(mask.shape), whole):
        raise ValueError(
            f"fxfuse: decode_attention: mask: got shape {tuple(mask.shape)}, wanted one that "
            f"broadcasts to {whole}; unsqueeze or expand it first"
        )


def _broadcasts(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(n in (1, wanted) for n, wanted in pairs)


def empty_result(q: Tensor, v: Tensor) -> Tensor:
    """Dense memory for the result; also the op's fake implementation."""
    return q.new_empty((*q.shape[:3], v.shape[3]))


def run_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, text: str
) -> Tensor:
    record = read_record(text)
    _checked(record, q, k, v, mask)
    args = (q, k, v, mask, scale, text)
    launched: Tensor | None = ops.launched("decode_attention", q, args, record)
    if launched is not None:
        return launched
    out = empty_result(q, v)
    return out.copy_(reference.decode_attention(q, k, v, mask, scale, record))


def fake_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, text: str
) -> Tensor:
    _checked(read_record(text), q, k, v, mask)
    return empty_result(q, v)
