"""Attention with one query row, read from its call: what fxfuse::decode_attention takes.

In: an attention call whose heads are proved to be grouped. Out: the op's record, or why torch's own
attention keeps the call.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.frontier import Frontier
from fxfuse.patterns.record import DecodeAttention
from fxfuse.slots import Call, Slot

KIND = "decode_attention"


def has_one_query(q: Slot) -> bool:
    return bool(q.shape[2] == 1)


def decoding(
    frontier: Frontier,
    call: Call,
    given: Mapping[str, Any],
    sources: tuple[Slot, Slot],
    times: int,
) -> DecodeAttention:
    """The record of a call with one query row; `given` are its arguments by name, `sources` what
    its k and v hold each head of `times` times. Raises Refused.
    """
    q, k, v, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    assert isinstance(q, Slot) and isinstance(k, Slot) and isinstance(v, Slot)
    if frontier.training:
        raise Refused("no gradient for attention with one query in a kernel of its own")
    if given.get("is_causal"):
        raise Refused("attention with one query that is causal, and so reads slot 0 alone")
    if not isinstance(given.get("scale"), (int, float, type(None))):
        raise Refused("attention with one query whose scale is no number")
    operands = [q, *sources, *([mask] if isinstance(mask, Slot) else [])]
    if any(x not in frontier.uses.holder for x in operands):
        raise Refused("attention with one query that makes its operands inside its call")
    if any(x.dtype != call.outs[0].dtype for x in (q, *sources)):
        raise Refused("attention with one query over operands of several dtypes")
    if not all(isinstance(n, int) for x in (q, k, v) for n in x.shape):
        raise Refused("attention with one query over sizes that are symbolic")
    return DecodeAttention(
        heads=q.shape[1],
        kv_heads=k.shape[1] // times,
        channels=q.shape[3],
        v_channels=v.shape[3],
        slots=k.shape[2],
        mask=_name(mask.dtype) if isinstance(mask, Slot) else "",
        dtype=_name(q.dtype),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
