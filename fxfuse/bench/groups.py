"""The kernels of one decode step by what they are for, told by their names and their order.

In come the names in stream order, and how many layers ran; out comes one of GROUPS for each.
Attention kernels part a step into layers. Behind one come, with a norm before each block but the
first:

    output product | products of the MLP | products of q, k and v, prelude, copies of K and V | ...

and behind the last one the output product, the MLP and the head. What does not fit is `other`,
and so is everything but attention in a step that is not made so.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One that ran."""

    name: str
    us: float


@dataclasses.dataclass(frozen=True)
class Total:
    """What the kernels of a group took in one step."""

    us: float
    kernels: int


# projection: the products of q, k and v with the norm before them, and the prelude behind them.
GROUPS = ("projection", "attention", "output", "mlp", "head", "other")

# What a kernel is, by the first pattern found in its name. Inductor names its own kernels
# triton_<sort>_fused_<ATen ops>_<number>: poi is pointwise, per and red reduce, tem is a template.
# The ops are those of what it reads, too: a kernel of the rotation names the product of its table.
# One that makes a product names the transpose of its weight beside it.
KINDS = {
    "attention": re.compile(
        r"(?i)^(?!triton_(?!tem)).*(?:fmha|flash|attention|sdpa|cudnn::fusion::\w*reduction)"
    ),
    "projection": re.compile(r"^project_norm_rope_store"),
    "prelude": re.compile(r"^norm_rope_store"),
    "softmax": re.compile(r"(?i)^triton_.*_softmax_|softmax_?(?:warp_)?forward"),
    # The second kernel of a product whose sum is split.
    "sum": re.compile(r"(?i)splitkreduce"),
    "batched": re.compile(r"^triton_(?!poi)(?!.*_(?:neg|cos|sin)_)(?:.*_)?(?:b|badd)mm_"),
    # Of float32, without tensor cores: the angles of a rotation.
    "angles": re.compile(r"(?i)simt_sgemm"),
    "product": re.compile(
        r"(?i)gemm|gemv|nvjet|cutlass|splitk|cublas"
        r"|^triton_(?:tem|(?!poi)(?=.*_t_))(?:.*_)?(?:add|scaled_)?mm_"
    ),
    "norm": re.compile(r"rms_norm|layer_norm|^(?!triton_poi).*_(?:rsqrt|mean|pow|var_mean)_"),
}
PRODUCTS = ("projection", "product", "batched", "sum")

# What a kernel behind the first product of q, k and v is for, by the first of (group, pattern)
# found in its name: what reduces norms heads, which are expanded by expand + clone, and a pointwise
# kernel that also rotates, or makes angles, is neither.
_EXPANDS = "_(?:expand|clone|repeat_interleave)_"
BEHIND = (
    ("projection", re.compile(r"norm_rope_store|^triton_(?:per|red)_.*_rsqrt_")),
    ("other", re.compile(rf"^(?=.*_neg_)(?=.*{_EXPANDS})|_bmm_expand_")),
    ("attention", re.compile(rf"{_EXPANDS}|_scaled_dot_product_\w*attention")),
    ("projection", re.compile("_(?:rsqrt|neg|cat|cos|sin|mean|pow|index_copy|index_put)_")),
)


def grouped(names: Sequence[str], layers: int) -> list[str]:
    """A group for each kernel of a step; names in stream order."""
    kinds = [_first(KINDS.items(), name) for name in names]
    groups = ["attention" if kind == "attention" else "other" for kind in kinds]
    if "attention" not in kinds:
        kinds = _by_hand(names, kinds)
    spans = _spans(kinds)
    blocks = [_blocks(kinds, span) for span in spans[1:]]
    if len(blocks) != layers or not _alike(blocks):
        return groups
    for before, behind in itertools.pairwise(spans):
        _fill(groups, before.stop, behind.start - 1, "attention")
    for (output, mlp, *rest), span in zip(blocks, spans[1:], strict=True):
        _fill(groups, output[0], output[-1], "output")
        _fill(groups, output[-1] + 1, mlp[-1], "mlp")
        last = span is spans[-1]
        _fill(groups, mlp[-1] + 1, rest[0][-1], "head" if last else "projection")
        if not last:
            _behind(groups, names, kinds, range(rest[0][0], span.stop))
    _first_layer(groups, names, kinds, spans[0], [sum(map(len, b[2:])) for b in blocks[:-1]])
    return groups


def _first(patterns: Iterable[tuple[str, re.Pattern[str]]], name: str) -> str:
    return next((key for key, pattern in patterns if pattern.search(name)), "other")


def _by_hand(names: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Kinds where no attention kernel ran: each softmax, the product on either side of it, and the
    kernels that sum up these products' parts. Unchanged where one of them is not to be seen.
    """
    found = list(kinds)
    products = [i for i, kind in enumerate(kinds) if kind in PRODUCTS]
    for i in [i for i, kind in enumerate(kinds) if kind == "softmax"]:
        first = next((j for j in reversed(products) if j < i), 0)
        last = next((j for j in products if j > i), 0)
        while first > 0 and _in_parts(kinds[first - 1], kinds[first]):
            first -= 1
        while last + 1 < len(kinds) and _in_parts(kinds[last], kinds[last + 1]):
            last += 1
        between = [_first(BEHIND, name) for name in names[first + 1 : i]]
        if not last or kinds[first] not in ("product", "batched") or "projection" in between:
            return list(kinds)
        for j in range(first, last + 1):
            if kinds[j] in (*PRODUCTS, "softmax"):
                found[j] = "attention"
    return found


def _in_parts(kind: str, following: str) -> bool:
    """Two kernels of one product."""
    return following == "sum" or kind == following == "batched"


def _spans(kinds: Sequence[str]) -> list[range]:
    """What lies before, between and behind the attentions of layers."""
    edges: list[int] = [0]
    last: int | None = None
    for i in [i for i, kind in enumerate(kinds) if kind == "attention"]:
        # One attention may be several kernels, with copies between them but no product.
        if last is None or any(kind in PRODUCTS for kind in kinds[last:i]):
            edges += [i, i + 1]
        edges[-1] = i + 1
        last = i
    edges.append(len(kinds))
    return [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _blocks(kinds: Sequence[str], span: range) -> list[list[int]]:
    """The products of a span, a new block behind every norm."""
    blocks: list[list[int]] = []
    fresh = True
    for i in span:
        if kinds[i] in PRODUCTS:
            if fresh or kinds[i] == "projection":
                blocks.append([])
            blocks[-1].append(i)
        fresh = kinds[i] == "norm" or (fresh and kinds[i] not in PRODUCTS)
    return blocks


def _alike(blocks: Sequence[list[list[int]]]) -> bool:
    """Every layer has as many products in each of its parts, and the last has one more block."""
    *inner, last = blocks
    parts = {(len(b[0]), len(b[1])) for b in blocks if len(b) >= 3}
    whole = len(last) == 3 and all(len(b) >= 3 for b in inner)
    return whole and len(parts) == 1 and len({sum(map(len, b[2:])) for b in inner}) <= 1


def _fill(groups: list[str], first: int, last: int, group: str) -> None:
    groups[first : last + 1] = [group] * (last + 1 - first)


def _behind(groups: list[str], names: Sequence[str], kinds: Sequence[str], span: range) -> None:
    """From the first product of q, k and v to the attention."""
    for i in span:
        product = kinds[i] in PRODUCTS
        groups[i] = "projection" if product else _first(BEHIND, names[i])


def _first_layer(
    groups: list[str], names: Sequence[str], kinds: Sequence[str], span: range, others: list[int]
) -> None:
    """Before the first attention: as many products as in other layers, where a norm is before."""
    products = [i for i in span if kinds[i] in PRODUCTS]
    if not others or len(products) < others[0]:
        return
    start = products[-others[0]]
    ahead = max((i for i in range(start) if kinds[i] in ("norm", *PRODUCTS)), default=start)
    if kinds[ahead] == "norm":
        groups[ahead] = "projection"
        _behind(groups, names, kinds, range(start, span.stop))


def totals(kernels: Sequence[Kernel], layers: int) -> dict[str, Total]:
    """What each group takes; together, what all kernels take."""
    found = grouped([kernel.name for kernel in kernels], layers)
    parts = {g: [k.us for k, own in zip(kernels, found, strict=True) if own == g] for g in GROUPS}
    return {group: Total(sum(us), len(us)) for group, us in parts.items()}
