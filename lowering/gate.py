"""The gate: whether a site is fused, or left to the compiler because fusing gains nothing there.

In come a target (a device type), a kind of site and its facts; out comes a Decision: that of the
table's first entry that fits. A decision without a gain is expected, not measured.
"""

import dataclasses
from collections.abc import Callable

from fxfuse.lowering.projection_launch import NORMED_ROWS
from fxfuse.patterns.record import AddNorm, DecodeAttention, GroupedHeads, Record


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a decision may go by, beside target and kind.

    rows    tokens of all batch rows together, of attention those of q; None where symbolic
    record  of the site; None for one that is asked about before it is decoded
    arch    of a GPU: sm_90, gfx942; "" for other devices
    """

    rows: int | None = None
    record: Record | AddNorm | GroupedHeads | DecodeAttention | None = None
    arch: str = ""


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether to fuse, why, and the time of the compiler's own kernels over ours, if measured."""

    fuse: bool
    reason: str
    gain: float | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A decision for a kind on a target ("*" is any) up to a number of rows (None is any), where
    `fits` holds of the facts.
    """

    kind: str
    target: str
    decision: Decision
    most_rows: int | None = None
    fits: Callable[[Facts], bool] = lambda facts: True


def _projected_bfloat16(facts: Facts) -> bool:
    """Products in bfloat16: what was measured of the projection."""
    record = facts.record
    bfloat16 = isinstance(record, Record) and record.q.dtype == "bfloat16"
    return bfloat16 and _measured(facts)


def _normed_bfloat16(facts: Facts) -> bool:
    """With the norm of a sum in front: each program norms for itself, which more and wider heads
    make little or no gain of.
    """
    record = facts.record
    if not isinstance(record, Record) or record.front is None or not _projected_bfloat16(facts):
        return False
    return record.front.channels <= NORMED_HIDDEN and record.q.channels <= NORMED_CHANNELS


# Up to how many tokens, and Inductor's time over ours: geometric means of `fxfuse bench prelude` on
# an H200 (benchmarks/results).
ATTENTION_GAINS = ((1, 2.9), (64, 2.0), (1024, 1.8), (None, 1.2))

# `fxfuse bench add_norm` and `qk_norm` on an H200 (of q and k's norms, what they add to attention);
# less than 1 is a loss.
_AS_FAST = "Inductor's own kernel is as fast"


def _measured(facts: Facts) -> bool:
    """Whether the GPU is of those that anything was measured on."""
    return facts.arch == "sm_90"


def _masked_bfloat16(facts: Facts) -> bool:
    """Attention with a mask in bfloat16: what was measured of grouped heads on a GPU."""
    record = facts.record
    if not isinstance(record, GroupedHeads) or not _measured(facts):
        return False
    return record.has_mask and record.dtype == "bfloat16"


def _decoded_bfloat16(facts: Facts) -> bool:
    """One query with a mask in bfloat16: what was measured of attention in a kernel of its own."""
    record = facts.record
    if not isinstance(record, DecodeAttention) or not _measured(facts):
        return False
    return bool(record.mask) and record.dtype == "bfloat16" and record.slots <= DECODED_SLOTS


# Gemma3-12B's 3840 by heads of 256 takes 20.4 us and 20.7 with a norm by itself; 5120 costs 2.7 us
# more with the norm inside than without one, about what a norm by itself does.
NORMED_HIDDEN, NORMED_CHANNELS = 4096, 128
# Longer caches were not faster where all of them is attended.
DECODED_SLOTS = 4096
_ONCE = "k and v are read once, not repeated"
_FILLED = "k and v are read once, and only where they are attended"
_ONE = "one kernel from the hidden states to the cache"

TABLE = (
    *(
        Entry("attention", "cuda", Decision(True, "one kernel where several stood", gain), rows)
        for rows, gain in ATTENTION_GAINS
    ),
    Entry("attention", "*", Decision(True, "one kernel where several stood")),
    Entry("norm", "cuda", Decision(False, _AS_FAST, 1.04), 1),
    Entry("norm", "cuda", Decision(False, _AS_FAST, 0.7)),
    Entry("norm", "*", Decision(False, _AS_FAST)),
    Entry("add_rms_norm", "cuda", Decision(False, _AS_FAST, 0.97)),
    Entry("add_rms_norm", "*", Decision(False, _AS_FAST)),
    # `fxfuse bench projection` (benchmarks/results): on an H200 against the best of Inductor,
    # 1.18 to 2.5 with one row and 1.23 to 2.3 with 4 and 16.
    Entry("projection", "cuda", Decision(True, _ONE, 1.5), 1, _projected_bfloat16),
    Entry("projection", "cuda", Decision(True, _ONE, 1.6), 16, _projected_bfloat16),
    # On an H200 against torch's attention over grouped heads, 512 to 4,096 slots, all of them
    # attended: 1.3 to 2.9 with one row, 1.1 to 1.2 with 16; 3.5 to 6 and 4 to 14 where 40 are (the
    # best of the launch table's candidates). `fxfuse bench grouped_heads` says 2.3 to 3.6 times
    # Inductor's default, 4.6 to 7.8 with 16.
    Entry("decode_attention", "cuda", Decision(True, _FILLED, 1.7), 1, _decoded_bfloat16),
    Entry("decode_attention", "cuda", Decision(True, _FILLED, 1.15), 16, _decoded_bfloat16),
    # `fxfuse bench input_norm` on an H200, against the projection behind Inductor's norm: 1.13 to
    # 1.16 up to a hidden size of 4096.
    Entry("input_norm", "cuda", Decision(True, _ONE, 1.15), 1, _normed_bfloat16),
    # `fxfuse bench grouped_heads` (benchmarks/results): on an H200 512 to 4,096 slots, 1.2 to 3.3
    # with one row and 1.07 to 1.3 with up to 256.
    Entry("grouped_heads", "cuda", Decision(True, _ONCE, 1.8), 1, _masked_bfloat16),
    Entry("grouped_heads", "cuda", Decision(True, _ONCE, 1.16), 256, _masked_bfloat16),
    Entry("grouped_heads", "cpu", Decision(True, _ONCE, 1.2)),
)


# What no setting forces on a kernel: more rows than it takes.
MOST_ROWS = {("cuda", "input_norm"): NORMED_ROWS}


def forbidden(target: str, kind: str, rows: int | None) -> str:
    """Why the target's kernel cannot take a site, whatever was measured; "" where it can."""
    most = MOST_ROWS.get((target, kind))
    if most is None or (rows is not None and rows <= most):
        return ""
    return f"its kernel takes {most} row"


def decide(target: str, kind: str, facts: Facts) -> Decision:
    """The decision of the table's first entry that fits. Without an entry a kind is left.

    Example:
        decide("cuda", "add_rms_norm", Facts(rows=1)).fuse
    """
    for entry in TABLE:
        known = entry.most_rows is None or (
            facts.rows is not None and facts.rows <= entry.most_rows
        )
        if entry.kind == kind and entry.target in (target, "*") and known and entry.fits(facts):
            return entry.decision
    return Decision(False, "nobody has measured it")
