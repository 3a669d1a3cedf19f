"""The kernels of a decode step by group: told by names and order, or not at all."""

from __future__ import annotations

import pytest

from fxfuse.bench import groups
from fxfuse.bench.groups import Kernel, grouped

# (name, group), as a GPU reports them: cuBLAS, torch's attentions, Inductor's fused kernels, ours.
Step = list[tuple[str, str]]
GEMV = "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16>"
NVJET = "nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT"
REDUCE = "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>"
EFFICIENT = "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)"
FLASH = "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64>>"
COMBINE = "void pytorch_flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64>>"
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"
NORM = "triton_per_fused__to_copy__unsafe_view_add_mean_mul_pow_rsqrt_4"
SILU = "triton_poi_fused__unsafe_view_mul_silu_5"
ROTATE = "triton_poi_fused__to_copy__unsafe_view_add_cat_cos_mul_neg_slice_transpose_view_2"
STORE = "triton_poi_fused_index_copy_transpose_view_7"
EXPAND = "triton_poi_fused__unsafe_view_clone_expand_unsqueeze_view_8"
SOFTMAX = "triton_per_fused__softmax_add_9"
EMBED = "triton_poi_fused_embedding_0"
# As torch 2.11 names them where it picks cuDNN's attention: fused kernels name what they read, too.
NVJET_WIDE = "nvjet_sm90_tst_8x64_64x16_2x1_v_bz_TNN"
LEAN = "void cudnn::fusion::lean_reduction_kernel<false, false, false>(void*, float*)"
SGEMM = "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_tn_align1>(Params)"
_READ = "_to_copy__unsafe_view_add_arange_bmm_cat"
_MASKED = f"scaled_dot_product_cudnn_attention_{_READ}_clone_cos_expand_le_mean_mul"
Q_ROTATED = f"triton_per_fused__{_MASKED}_neg_pow_rsqrt_scalar_tensor_sin_slice_where_2"
K_STORED = f"triton_per_fused_{_READ}_cos_index_copy_mean_mul_neg_pow_rsqrt_sin_slice_view_3"
V_STORED = "triton_poi_fused__unsafe_view_add_arange_index_copy_transpose_view_4"
REPEATED = f"triton_poi_fused__{_MASKED}_pow_rsqrt_scalar_tensor_transpose_where_5"
# Under max-autotune: sums of products that name the transpose of the weight.
READS = "mean_mm_mul_pow"
SLOTS = "triton_per_fused__to_copy_add_mean_mul_pow_project_norm_rope_store__rsqrt_select_view_8"
COUNTED = "triton_poi_fused_add_arange_copy__7"
TABLE = "void gemmSN_NN_kernel<float, 256, 4, 2, 8, 4, 4, false>"
ARGMAX = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<at::native::ArgMaxOps>>"

FIRST = [(EMBED, "other"), (TABLE, "other")]
LAST = [(NORM, "head"), (GEMV, "head"), (ARGMAX, "other")]
STOCK_BY_TRITON: Step = [
    (f"triton_per_fused__to_copy_add_{READS}_rsqrt_t_view_1", "projection"),
    (Q_ROTATED, "projection"),
    (f"triton_per_fused_{_READ}_index_copy_{READS}_rsqrt_t_transpose_3", "projection"),
    (K_STORED, "projection"),
    (REPEATED, "attention"),
    (CUDNN, "attention"),
    (LEAN, "attention"),
    ("triton_red_fused_mm_t_transpose_view_7", "output"),
    (f"triton_per_fused__to_copy__unsafe_view_add_{READS}_rsqrt_8", "mlp"),
    ("triton_per_fused_mm_t_view_9", "mlp"),
    ("triton_red_fused__unsafe_view_mm_mul_silu_t_view_10", "mlp"),
]
OURS_BY_TRITON: Step = [
    ("project_norm_rope_store", "projection"),
    ("decode_attention", "attention"),
    ("triton_red_fused_mm_t_transpose_view_5", "output"),
    ("triton_per_fused_add_mean_mm_pow_project_norm_rope_store__select_view_9", "mlp"),
    (f"triton_per_fused__to_copy__unsafe_view_add_{READS}_rsqrt_t_view_10", "mlp"),
    ("triton_red_fused_mm_mul_project_norm_rope_store__select_silu_t_view_8", "mlp"),
]
LAST_BY_TRITON: Step = [
    (f"triton_per_fused__to_copy__unsafe_view_add_{READS}_rsqrt_slice_view_13", "head"),
    (f"triton_per_fused__to_copy__unsafe_view_add_{READS}_rsqrt_slice_t_view_14", "head"),
    (ARGMAX, "other"),
]
AFTER = [
    (GEMV, "output"),
    (NORM, "mlp"),
    (GEMV, "mlp"),
    (GEMV, "mlp"),
    (SILU, "mlp"),
    (GEMV, "mlp"),
]
STOCK_PRELUDE: Step = [
    (name, "projection") for name in (NORM, GEMV, NORM, GEMV, NORM, ROTATE, STORE, GEMV, STORE)
]
EXPANDED: Step = [(EXPAND, "attention")] * 2
CUDNN_LAYER: Step = [
    *[(name, "projection") for name in (NORM, NVJET, Q_ROTATED, NVJET_WIDE, K_STORED)],
    *[(NVJET_WIDE, "projection"), (V_STORED, "projection")],
    *[(REPEATED, "attention")] * 2,
    *[(CUDNN, "attention"), (LEAN, "attention")],
]
NORMED = [
    *[(EFFICIENT, "attention"), (GEMV, "output"), (NORM, "mlp"), (NORM, "mlp"), (GEMV, "mlp")],
    *[(GEMV, "mlp"), (SILU, "mlp"), (GEMV, "mlp")],
]


def step(*layer: tuple[str, str], layers: int = 3) -> Step:
    return [*FIRST, *[*layer, *AFTER] * layers, *LAST]


STEPS: dict[str, Step] = {
    "stock": step(*STOCK_PRELUDE, *EXPANDED, (EFFICIENT, "attention")),
    "stock, split products": [
        part
        for kernel in step(*STOCK_PRELUDE, (CUDNN, "attention"))
        for part in ([kernel, (REDUCE, kernel[1])] if kernel[0] == GEMV else [kernel])
    ],
    "fxfuse": step(
        (NORM, "projection"),
        ("project_norm_rope_store", "projection"),
        (FLASH, "attention"),
        ("triton_poi_fused_clone_3", "attention"),
        (COMBINE, "attention"),
    ),
    "fxfuse, norms in the projection": [
        *FIRST,
        (NORM, "projection"),
        *[("project_norm_rope_store", "projection"), (FLASH, "attention"), *AFTER] * 3,
        *LAST,
    ],
    "stock, attention by cuDNN": [
        (NORM, "projection"),
        (NVJET, "projection"),
        ("triton_poi_fused__to_copy_add_arange_bmm_expand_unsqueeze_1", "other"),
        (SGEMM, "other"),
        *CUDNN_LAYER[2:],
        *[*AFTER, *CUDNN_LAYER] * 2,
        *AFTER,
        *LAST[:2],
        *[("triton_poi_fused_add_copy__16", "other")] * 3,
        LAST[2],
    ],
    "fxfuse, slots by the norm's kernel": [
        FIRST[0],
        (NORM, "projection"),
        (SGEMM, "other"),
        (EMBED + "_project_norm_rope_store_rsqrt_4", "other"),
        ("project_norm_rope_store", "projection"),
        ("decode_attention", "attention"),
        *[
            AFTER[0],
            (SLOTS, "mlp"),
            *AFTER[2:],
            (COUNTED, "projection"),
            ("project_norm_rope_store", "projection"),
            ("decode_attention", "attention"),
        ]
        * 2,
        *AFTER,
        *LAST,
    ],
    "fxfuse, own residual norms": step(
        ("add_rms_norm", "projection"),
        ("project_norm_rope_store_0", "projection"),
        (FLASH, "attention"),
    ),
    "fxfuse, products by cuBLAS": step(
        (NORM, "projection"),
        *[(NVJET, "projection")] * 3,
        ("norm_rope_store_static", "projection"),
        (EFFICIENT, "attention"),
    ),
    "products by Triton": [
        *FIRST,
        ("triton_per_fused__to_copy_embedding_mean_pow_0", "projection"),
        *[*STOCK_BY_TRITON, ("triton_per_fused_add_mean_mm_pow_18", "projection")] * 2,
        *STOCK_BY_TRITON,
        *LAST_BY_TRITON,
    ],
    "fxfuse, products by Triton": [
        ("triton_per_fused__to_copy_add_cos_pow_project_norm_rope_store__rsqrt_0", "projection"),
        ("triton_poi_fused_add_arange_copy__3", "other"),
        *[*OURS_BY_TRITON, (COUNTED, "projection")] * 2,
        *OURS_BY_TRITON,
        *LAST_BY_TRITON,
    ],
    "products by templates": [
        ("triton_tem_fused__unsafe_view_mm_9" if kernel == GEMV else kernel, group)
        for kernel, group in step(*STOCK_PRELUDE, (CUDNN, "attention"))
    ],
    "attention by hand": step(
        *STOCK_PRELUDE,
        *EXPANDED,
        ("gemmk1_kernel", "attention"),
        (SOFTMAX, "attention"),
        ("gemmk1_kernel", "attention"),
    ),
    "attention by hand, split products": step(
        (NORM, "projection"),
        ("project_norm_rope_store", "projection"),
        (NVJET, "attention"),
        (REDUCE, "attention"),
        (SOFTMAX, "attention"),
        ("triton_red_fused_bmm_3", "attention"),
        ("triton_per_fused_bmm_4", "attention"),
    ),
    "norms on both sides": [
        *FIRST,
        *STOCK_PRELUDE,
        *[*NORMED, (NORM, "projection"), *STOCK_PRELUDE] * 2,
        *[*NORMED, (NORM, "head"), *LAST],
    ],
}


@pytest.mark.null
@pytest.mark.parametrize("name", STEPS)
def test_kernels_are_told_by_name_and_order(name: str) -> None:
    kernels = [kernel for kernel, _ in STEPS[name]]
    assert list(zip(kernels, grouped(kernels, 3), strict=True)) == STEPS[name]


WHOLE = [name for name, _ in STEPS["stock"]]


BY_HAND = [n for n, _ in STEPS["attention by hand"] if n != "gemmk1_kernel"]


def only_attention(names: list[str], layers: int = 3) -> bool:
    return set(grouped(names, layers)) <= {"attention", "other"}


@pytest.mark.null
@pytest.mark.parametrize(
    ("why", "names", "layers"),
    [
        ("an attention that has another name", [n.replace(EFFICIENT, "mha") for n in WHOLE], 3),
        ("another number of layers", WHOLE, 4),
        ("norms of another name", [n.replace(NORM, "triton_per_fused_0") for n in WHOLE], 3),
        ("products of another name", [n.replace(GEMV, "matvec") for n in WHOLE], 3),
        ("a layer with one product more", [*WHOLE[:21], GEMV, *WHOLE[21:]], 3),
        ("no head", WHOLE[:-3], 3),
        ("two heads", [*WHOLE, NORM, GEMV], 3),
        ("one norm in the MLP", [n.replace(SILU, NORM) for n in WHOLE], 3),
        ("nothing", [], 1),
        ("a softmax between products of other parts", BY_HAND, 3),
        ("a softmax and no attention", [n.replace(EFFICIENT, SOFTMAX) for n in WHOLE], 3),
    ],
)
def test_what_cannot_be_told_is_other(why: str, names: list[str], layers: int) -> None:
    assert only_attention(names, layers), why


@pytest.mark.null
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("unknown", [[], [("triton_poi_fused_bitwise_and_3", "other")]])
def test_one_kernel_less_or_unknown_makes_no_other_wrong(name: str, unknown: Step) -> None:
    for i, (gone, _) in enumerate(STEPS[name]):
        step = [*STEPS[name][:i], *unknown, *STEPS[name][i + 1 :]]
        found = grouped([kernel for kernel, _ in step], 3)
        for j, ((kernel, wanted), got) in enumerate(zip(step, found, strict=True)):
            # What stands between known kernels is of their part.
            if not unknown or j != i:
                assert got in (wanted, "other"), (i, gone, j, kernel, got)


@pytest.mark.null
def test_a_kernel_that_rotates_and_expands_is_neither() -> None:
    both = "triton_poi_fused_add_cat_clone_expand_mul_neg_3"
    unknown = "triton_poi_fused_bitwise_and_3"
    names = [both if name == EXPAND else name for name in WHOLE]
    assert {g for n, g in zip(names, grouped(names, 3), strict=True) if n == both} == {"other"}
    names = [unknown if name == STORE else name for name in WHOLE]
    assert {g for n, g in zip(names, grouped(names, 3), strict=True) if n == unknown} == {"other"}


@pytest.mark.null
def test_one_layer_has_no_other_to_tell_its_first_products_by() -> None:
    names = [*WHOLE[:13], *WHOLE[-10:]]
    found = grouped(names, 1)
    assert set(found[:13]) == {"other"}
    assert found[13:] == [group for _, group in STEPS["stock"][-10:]]


@pytest.mark.null
@pytest.mark.parametrize("layers", [3, 5])
def test_groups_sum_to_all_kernels(layers: int) -> None:
    kernels = [Kernel(name, 2.0**-i) for i, name in enumerate(WHOLE)]
    found = groups.totals(kernels, layers)
    assert list(found) == list(groups.GROUPS)
    assert sum(total.kernels for total in found.values()) == len(kernels)
    assert sum(t.us for t in found.values()) == pytest.approx(sum(k.us for k in kernels))
