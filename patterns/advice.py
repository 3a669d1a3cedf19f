"""What a refusal was compared with, and what to do about it: a table over the reasons.

In: the reason of a Refusal. Out: its Advice. To add a reason is to write it where it is raised; one
that no entry fits fails a test.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Advice:
    """For reasons that some pattern is found in.

    wanted  what stands there in a chain that is fused
    do      what the owner of the model can change
    """

    patterns: tuple[str, ...]
    wanted: str
    do: str


# The first that fits.
ADVICE = (
    Advice(
        ("an error of fxfuse", "^the reference", "by position differs"),
        "a reading that the proof confirms",
        "please report it; the result is right, since the graph there stays the compiler's",
    ),
    Advice(
        ("^a projection", "^q, k and v are projections"),
        "q, k and v as parts of F.linear of one tensor with plain parameters, read by the chain "
        "alone",
        "nothing: the products stay the compiler's, all behind them is fused; to have them in the "
        "same kernel merge adapters into the weights, or quantise other layers",
    ),
    Advice(
        ("be tried$",),
        "sizes that small ones can stand for, so that the site can be proved on random numbers",
        "compile with dynamic=False, or mark the axis static; please report it if it is",
    ),
    Advice(
        (
            "heads are repeated", "are repeated differently", "is repeated, and",
            "heads that are repeated", "^repeated heads", "after they were repeated",
            "grouped heads", "sdpa_kernel",
        ),
        "k and v of scaled_dot_product_attention repeated alike, each head n times in a row, by "
        "views and copies alone",
        "repeat them right in front of attention (repeat_interleave, expand and reshape), or give "
        "it enable_gqa=True",
    ),
    Advice(
        ("^attention with one query",),
        "q [B, H, 1, D] over k and v of one dtype and of sizes that are numbers, a mask tensor or "
        "none, and a scale that is a number",
        "nothing: torch's attention reads grouped heads there as for more queries; for the kernel "
        "compile with dynamic=False and hand over a mask instead of is_causal",
    ),
    Advice(
        ("grows by cat",),
        "a cache that is written in place: index_copy_, cache[slots] = k, a copy into a slice",
        "use a static cache (generate: cache_implementation='static'); all before the store is "
        "fused either way",
    ),
    Advice(
        ("no cache write that is known",),
        "index_copy_, index_put_ (cache[slots] = k), or an op that is registered",
        "describe an op of another library once, by fxfuse.register_store",
    ),
    Advice(
        ("DataDependent",),
        "indices that are numbers, slices, or tensors of one dim or more",
        "take a part by a number, kv[0, slots]: a tensor of no dims is a number that only running "
        "tells",
    ),
    Advice(
        ("^the call ",),
        "calls of torch that make the same of tensors without numbers",
        "write by index_copy_ or cache[slots] = k, or describe an op of another library once, by "
        "fxfuse.register_store",
    ),
    Advice(
        (
            "registered for", "without a tensor", "scale that is no tensor", "skips a slot",
            r"wanted \[T, G, D\]",
        ),
        "the call that fxfuse.register_store was told of",
        "compare the op's arguments here with its contract, and register it as it is called",
    ),
    Advice(
        ("no gradient for", "requires a gradient", "detached value", "in part without gradients"),
        "gradients of q, k and norm weights, through the whole chain or not at all",
        "compile inference under torch.no_grad(); where it is trained, keep tables without "
        "requires_grad and the whole chain inside or outside of no_grad",
    ),
    Advice(
        ("operands on",),
        "all tensors of a chain on one device",
        "move tables and weights there once, outside of the forward",
    ),
    Advice(
        ("no node of the graph holds", "inside one call", "cache is not at hand"),
        "tensors that are the result of a call in the graph",
        "write the step as calls of its own, where one function does several at once",
    ),
    Advice(
        (
            "computed after the first use", "is written between", "written before its last",
            "begins or ends a region", "before it is stored$", "that nobody reads",
            "graph writes to", "touches the cache", "written between two uses",
            "between their cast and their store", "written before the store",
        ),
        "nothing between the chain's first and last call that writes what it reads or reads what "
        "it writes",
        "move that write, read or region (autocast, no_grad) in front of the chain or behind it",
    ),
    Advice(
        (
            "no cast of rows", "a cache of .* for rows", "clamped to", "cast with another",
            "^a scale",
        ),
        "a plain cast to the cache's dtype, or to 8 bits (x / scale).clamp(least, most).to(dtype) "
        "with a scale by tensor, head or token",
        "write the quantisation in that order, for k and v alike",
    ),
    Advice(
        ("^rows that are normed", "^normed rows of other tokens"),
        "a v that is stored as it is, or normed by its head with k's eps and without a weight",
        "nothing: the norm and the store of v stay the compiler's, all before k's store is fused",
    ),
    Advice(
        ("may not be equal",),
        "as many slots as rows, known before the run: by one number, or by one symbol from 2 on",
        "mark the rows and the slots alike by torch._dynamo.mark_dynamic, or give both one Dim of "
        "torch.export",
    ),
    Advice(
        ("slots", "indices", "^an index_put_"),
        "one tensor of integers that says each token's slot, the same for k and v",
        "write k and v by the same kind of call with the same slots",
    ),
    Advice(
        (
            "stored rows", "stores k and v", "in a cache without", "axes of a cache",
            "cache whose axes", "rows of shape", "where the op takes", "pages of a size",
            r"\] for rows \[",
        ),
        "whole rows of k, as the rotation leaves them, and of v, as a view of the projection, in a "
        "cache with an axis of slots or of pages",
        "store them as they are, with no slice, repeat or arithmetic in between",
    ),
    Advice(
        (
            "has no partner", "their signs or tables", "different scale", "used twice",
            "no channel is rotated", "changes its sign", "no rotation of two", "with itself",
            "pairs that differ", "unrotated channels", "^(source|result) channels",
        ),
        "each channel turned with one other, y[i] = x[i]·cos ± x[p(i)]·sin, and all pairs alike",
        "compare the rotation with rotate_half or with even/odd pairs; if it is meant as it is, "
        "Inductor compiles it",
    ),
    Advice(
        (
            "a bias", "statistic", "a mean", "root", "squares", "rsqrt", "an eps", "clamp",
            "a norm", "factor", "product of a rotated", "rows without their mean",
            "regrouped before its norm",
        ),
        "one norm of a head's channels, x·rsqrt(mean(x²) + eps)·w, before or after the rotation, "
        "or of the whole width in front of the heads",
        "write it as F.rms_norm or in that form; rotation and store are fused without it where "
        "they can be",
    ),
    Advice(
        ("a weight",),
        "a norm's weight as a parameter, one entry by channel, or by head and channel",
        "cut or change the parameter once, outside of the forward",
    ),
    Advice(
        ("tables?( |$)", r"^(?!rows|heads).*irregular places"),
        "cos and sin by token, half as wide as what turns or as wide, with one step from channel "
        "to channel",
        "make the tables in front of the layers, by cat((f, f), -1) or repeat_interleave(2, -1)",
    ),
    Advice(
        (
            "data sources", "multiplied by itself", "in a product", "terms that", "complex",
            "has no rows", "another axis than", "source that is repeated",
        ),
        "one tensor that is turned by cos and sin alone, each row by itself",
        "move what else is added or multiplied behind the rotation or in front of the projection",
    ),
    Advice(
        ("^heads", "^rows", "axis", "row by row", "more than three row axes"),
        "q, k and v as views of a projection: heads at one stride, a head's channels side by side",
        "take them by view, split, chunk or transpose; .contiguous() before the norm where they "
        "are cut otherwise",
    ),
)  # fmt: skip
# How a refusal of a part of a chain begins, whose rest was fused.
BEFORE = "what comes before the rotation: "
UNKNOWN = Advice((), "a chain of norm, rotation and store", "please report this refusal")


def advice_for(reason: str) -> Advice:
    """The first entry of the table that fits a reason."""
    reason = reason.removeprefix(BEFORE)
    fits = (a for a in ADVICE if any(re.search(p, reason) for p in a.patterns))
    return next(fits, UNKNOWN)
