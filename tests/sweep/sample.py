"""The units that CI runs: every spelling of norm, rotation and store, in small models.

In: nothing. Out: `SAMPLE`, names of units, with what each one stands for.
"""

from __future__ import annotations

SAMPLE: dict[str, str] = {
    # rotate_half
    "llama": "halves over the whole head",
    "falcon": "packed q, k, v; one k head",
    "dbrx": "packed and clipped q, k, v; graph breaks in the experts",
    "gpt_neox": "a quarter of the head, in the function",
    "olmo": "float32 arithmetic",
    "phi": "a part of the head, split and joined outside",
    # norms before the rotation
    "qwen3": "RMSNorm over the head",
    "qwen3.sliding": "a full sliding window",
    "gemma3": "1 + w",
    "gemma3n": "pow(-0.5); q and k one after the other, v is normalised too",
    "gemma4": "as gemma3n, heads of two widths",
    "qwen3_next": "1 + w, a quarter of the head, q beside its gate",
    "olmo2": "over the whole width",
    "glm4_moe.qknorm": "over the head, then half of it",
    "cohere.qknorm": "LayerNorm with weights by head",
    "persimmon": "LayerNorm, then half of the head",
    "zaya": "L2, k by a temperature",
    # norms behind it
    "hunyuan_v1_dense": "RMSNorm",
    "nanochat": "without weight; turns the other way",
    # pairs of neighbours
    "glm": "half of the head, halves of the tables repeated",
    "cohere": "float32, repeated tables",
    "ernie4_5": "float32, half tables",
    "gptj": "half tables, [B, T, H, D]",
    "codegen": "as gptj, q, k, v packed by shards",
    "roformer": "sine table split in the graph, stacked pairs",
    "openai_privacy_filter": "stacked difference and sum; a graph break in the experts",
    # difference and sum of halves
    "deepseek_v3": "MLA, pairs made halves",
    "gpt_oss": "half tables, biases",
    # complex products
    "llama4": "RMSNorm without weight behind it",
    # encoders and towers, without a cache
    "modernbert": "packed q, k, v; two tables",
    "esm": "float32, query scaled before",
    "dinov3_vit": "patches rotate, other tokens do not",
    "llama4.vision": "complex products of an image's rows and columns",
    "qwen2_vl.vision": "[T, H, D], graph breaks behind the rotation",
    "pe_audio.audio": "products with 2 x 2 matrices, summed",
    "glmasr": "half of the head",
    "timesfm2_5": "RMSNorm behind the rotation",
    # decoders that attend to an encoder
    "moonshine.decoder": "pairs, a part of the head, padded",
    "t5gemma2.decoder": "one attention to both sides",
    "chameleon.lm": "LayerNorm by head, packed before",
    # what must be left alone
    "vjepa2": "tiled cosines: no rotation",
    "wav2vec2_bert": "rotates before the projection",
}
