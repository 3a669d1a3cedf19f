"""Units whose file has rotary code, but which turn no q and k, and why.

In: nothing. Out: `NO_ROTATION`, reasons by unit. The sweep runs these too: nothing may be fused.
"""

from __future__ import annotations

TILES = "tiles the cosines where a rotation would repeat them: a linear map, but no rotation"
BEFORE = "rotates the hidden states, before the projection to q and k"
NONE = "normalises q and k, has no rotary positions"

NO_ROTATION: dict[str, str] = {
    "vjepa2": TILES,
    "wav2vec2_bert": BEFORE,
    "wav2vec2_conformer": BEFORE,
    "diffusers/aura_flow": NONE,
    "diffusers/pixart": "has no rotary positions and no norm of q and k",
    "diffusers/sana": NONE,
    "diffusers/sd3": NONE,
}
