"""Launch tables: how many tokens and heads a program of the kernel takes, and how many warps.

One list of rules per target, measured by `fxfuse tune`; the first that fits decides. A target
without a list takes DEFAULT.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of one program, tokens x heads of them (powers of two), and its warps."""

    tokens: int
    heads: int
    warps: int


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tile for rows (tokens x heads of q, k and v) of contiguous runs of channels up to these.

    run: the widest block of a row that is loaded as one: half the rotated channels where pairs are
    halves, all of them where pairs are neighbours.
    """

    rows: float
    run: float
    tile: Tile


MANY = float("inf")

# Few rows want a warp each, many rows want several 16-byte loads under way in each thread.
DEFAULT = (
    Rule(64, 32, Tile(1, 4, 4)),
    Rule(64, MANY, Tile(1, 1, 1)),
    Rule(2048, 32, Tile(1, 4, 4)),
    Rule(2048, MANY, Tile(1, 8, 8)),
    Rule(MANY, 32, Tile(4, 4, 1)),
    Rule(MANY, 64, Tile(4, 2, 1)),
    Rule(MANY, MANY, Tile(4, 2, 2)),
)

TILES: dict[str, tuple[Rule, ...]] = {}


def tile_for(target: str, rows: int, run: int) -> Tile:
    """The tile for a launch on a target, such as "sm_90"."""
    rules = TILES.get(target, DEFAULT)
    return next(rule.tile for rule in rules if rows <= rule.rows and run <= rule.run)
