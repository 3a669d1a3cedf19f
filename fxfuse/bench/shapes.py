"""The shapes of each recipe, as numbers of the models they are taken from."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and spelling of one chain.

    norm      "rms", "gemma" (1 + w) or None
    rotation  "half", "chunk" (tables as arguments), "neox", "gptj", "mrope" (looked up by
              position), or ""
    rotary    R: channels of a head that turn, the first ones
    hidden    width of the model, for the products before and after a prelude; 0 where unknown
    bias      whether the projections of q, k and v have one
    tokens    T of the rows that are run unless others are asked for; empty: the recipe's own
    carried   µs of SGLang's kernel by T, from another run on an H200 that copied CARRIED_COPY
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    norm: str | None
    rotation: str
    rotary: int
    eps: float = 1e-6
    hidden: int = 0
    bias: bool = False
    tokens: tuple[int, ...] = ()
    carried: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)

    def widths(self) -> list[int]:
        """Columns of q, k and v in a packed projection."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return [n * self.head_dim for n in heads]


# Bytes per µs, read and written, of the device that the carried figures were taken on.
CARRIED_COPY = 4.27e6

PRELUDES = (
    Shape("Qwen3-8B", 32, 8, 128, "rms", "half", 128, hidden=4096),
    Shape("Qwen3-0.6B", 16, 8, 128, "rms", "half", 128, hidden=1024),
    Shape("Gemma3-12B", 16, 8, 256, "gemma", "half", 256, hidden=3840),
    Shape("gpt-oss", 64, 8, 64, None, "chunk", 64, hidden=2880),
)


PROJECTIONS = (
    *PRELUDES[:3],
    Shape("gpt-oss", 64, 8, 64, None, "chunk", 64, hidden=2880, bias=True),
    Shape("Llama-3.1-8B", 32, 8, 128, None, "half", 128, hidden=4096),
)


def _diffusion(
    name: str, heads: int, tokens: tuple[int, ...], rotary: int = 128, **carried: float
) -> Shape:
    by_tokens = {int(t.removeprefix("t")): us for t, us in carried.items()}
    return Shape(name, heads, heads, 128, "rms", "gptj", rotary, tokens=tokens, carried=by_tokens)


DIFFUSION = (
    _diffusion("flux_1024", 24, (4096,), t4096=30.8),
    _diffusion("qwen_image_1024", 32, (4096,), t4096=39.9),
    _diffusion("qwen_image_partial", 32, (4096,), rotary=64, t4096=39.2),
    _diffusion("zimage_1024", 30, (4096,), t4096=36.3),
    # 2 images of 2048 tokens: to the chain 4096 rows, with positions of their own.
    _diffusion("batch2_medium", 24, (4096,)),
    _diffusion("decode", 32, (1, 64), t1=1.64, t64=2.03),
)

_STORE = {1: 1.58, 16: 1.91, 256: 3.78, 4096: 29.9, 32768: 222.6}
ROPE_STORE = (
    Shape("NeoX 32/8/128", 32, 8, 128, None, "neox", 128, carried=_STORE),
    Shape("GPT-J 32/8/128", 32, 8, 128, None, "gptj", 128, carried=_STORE),
    Shape("gpt-oss 64/8/64", 64, 8, 64, None, "neox", 64, tokens=(1, 4096, 15360)),
)
# Of the vision-language model: every third pair turns by height, every third by width.
MROPES = (Shape("Qwen3-VL-235B 64/4/128", 64, 4, 128, "rms", "mrope", 128),)
SECTIONS = (24, 20, 20)

_PACKED = {1: 2.01, 1024: 10.1, 4096: 33.5, 16384: 127.0}
PACKED = (
    Shape("32/8/8/128", 32, 8, 128, "rms", "gptj", 128, eps=1e-5, carried=_PACKED),
    Shape("32/8/8/64", 32, 8, 64, "rms", "gptj", 64, eps=1e-5),
    Shape("16/4/4/256", 16, 4, 256, "rms", "gptj", 256, eps=1e-5),
)

QK_NORMS = (
    Shape("Qwen3-8B", 32, 8, 128, "rms", "", 0, hidden=4096),
    Shape("Qwen3.5-397B/8", 4, 1, 256, "gemma", "", 0, hidden=4096),
    Shape("more heads of k", 8, 16, 128, "gemma", "", 0),
)
REPEATED = (
    Shape("Qwen3-0.6B 16/8/128", 16, 8, 128, None, "", 0),
    Shape("Qwen3-8B 32/8/128", 32, 8, 128, None, "", 0),
    Shape("Gemma3-12B 16/8/256", 16, 8, 256, None, "", 0),
)
ADD_NORMS = (
    Shape("1024", 16, 8, 128, "rms", "", 0, hidden=1024),
    Shape("4096", 32, 8, 128, "rms", "", 0, hidden=4096),
    Shape("Gemma 3840", 16, 8, 256, "gemma", "", 0, hidden=3840),
)
