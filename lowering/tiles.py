"""Launch tables: how many tokens and heads a program of the kernel takes, and how many warps.

One list of rules per target; the first that fits decides. A target without a list takes DEFAULT.
`fxfuse tune` times tiles on a GPU.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of one program, tokens x heads of them (powers of two), and its warps.

    ahead: tables and weights are asked for ahead of rows, once for each row, and so lie on the
    threads of the row's elements; else once a program, beside rows.
    """

    tokens: int
    heads: int
    warps: int
    ahead: bool = False

    def __str__(self) -> str:
        return f"({self.tokens}, {self.heads}, {self.warps}{', ahead' if self.ahead else ''})"

    def within(self, tokens: int) -> "Tile":
        """The tile with no more tokens than there are."""
        least: int = 1 << (max(1, tokens) - 1).bit_length()
        return dataclasses.replace(self, tokens=min(self.tokens, least))


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tile for rows (tokens x heads of q, k and v) of contiguous runs of channels up to these,
    and of so many channels and heads, at most.

    run: the widest block of a row that is loaded as one: half the rotated channels where pairs are
    halves, all of them where pairs are neighbours.
    heads: of that of q, k and v which has fewest.
    """

    rows: float
    run: float
    tile: Tile
    channels: float = float("inf")
    heads: float = float("inf")


MANY = float("inf")

# Measured on an H200 for q, k, v of 8/1 to 64/8 heads in one batch row; the default of other
# targets too. Of halves of 64 channels and rows of 256 all but the fewest were fastest ahead, with
# 8 or 16 elements a thread. Where k and v have four heads, a tile of eight is half empty: for many
# rows it took up to 7 % more, up to 20 % where they have two or one. What is not ahead has a row's
# elements on a warp's threads as a table's where there are many: tokens * run = 256 * warps.
HOPPER = (
    Rule(2048, 32, Tile(1, 4, 4)),
    Rule(MANY, 32, Tile(8, 2, 1)),
    Rule(48, 64, Tile(1, 4, 4)),
    Rule(64, MANY, Tile(1, 1, 1)),
    Rule(640, 64, Tile(2, 4, 8)),
    Rule(2048, 64, Tile(1, 8, 4, ahead=True)),
    Rule(MANY, 64, Tile(2, 4, 2, ahead=True), heads=4),
    Rule(6144, 64, Tile(1, 8, 4, ahead=True)),
    Rule(12288, 64, Tile(2, 8, 4, ahead=True)),
    Rule(2**16, 64, Tile(1, 8, 2, ahead=True)),
    Rule(MANY, 64, Tile(1, 8, 4, ahead=True)),
    Rule(4096, MANY, Tile(1, 8, 8), channels=128),
    Rule(16384, MANY, Tile(1, 8, 4), channels=128),
    Rule(2**18, MANY, Tile(1, 8, 2), channels=128),
    Rule(MANY, MANY, Tile(4, 4, 2), channels=128),
    Rule(256, MANY, Tile(1, 1, 1)),
    Rule(1024, MANY, Tile(2, 2, 2, ahead=True)),
    Rule(16384, MANY, Tile(2, 4, 4, ahead=True)),
    Rule(MANY, MANY, Tile(1, 8, 2, ahead=True)),
)
DEFAULT = HOPPER

TILES: dict[str, tuple[Rule, ...]] = {"sm_90": HOPPER}


# Where each pair has a table row of its own, or a cache takes a row's channels one by one: several
# heads share what a token's threads gathered. Measured on the H200 for 64/4 heads of 128 channels,
# three axes, shuffled pages of 8 bits, at 64 to 32768 tokens; few rows keep their own rules.
SCATTERED, SCATTERED_MANY = Tile(1, 8, 2), Tile(2, 8, 2)
FEW_ROWS, SCATTERED_ROWS = 640, 2**17

# Rows by float32 tables, measured on the H200 for 64 to 256 channels, pairs of either kind: up to
# WIDE_MANY elements 1,024 of a token, on as many warps as have all of its loads under way at once
# (two tokens where there are fewest rows; 2,048 elements but no more than 16 heads where there are
# few). Beyond, by the widest run up to these, tokens and warps, with 1,024 elements a warp.
WIDE_FEWEST_ROWS, WIDE_FEW_ROWS = 1024, 3072
WIDE_SOME, WIDE_MANY = 2**18, 2**21
WIDE_TILES = ((64, 4, 1), (128, 4, 2), (MANY, 1, 1))

# From how many rows on a table's rows by position are asked to stay in the cache, as rows that are
# no lookup always are: on the H200 2,560 to 12,288 rows took up to 7 % more with it, 40,960 and
# more 0.5 to 2 % less.
LASTING_ROWS = 2**15


@dataclasses.dataclass(frozen=True)
class Rows:
    """What rows of a launch are like.

    channels     D
    run, heads   see Rule
    wide_tables  cos and sin have 4 bytes an element
    scattered    each pair turns by a table row of its own, or a cache's innermost axis is none of
                 channels
    """

    channels: int
    run: int
    heads: int
    wide_tables: bool = False
    scattered: bool = False


def tile_for(target: str, rows: int, kind: Rows) -> Tile:
    """The tile for a launch of so many rows on a target, such as "sm_90"."""
    if kind.scattered and rows > FEW_ROWS:
        return SCATTERED if rows <= SCATTERED_ROWS else SCATTERED_MANY
    if kind.wide_tables and rows > FEW_ROWS:
        return _wide(rows, kind)
    rules = TILES.get(target, DEFAULT)
    return next(
        rule.tile
        for rule in rules
        if rows <= rule.rows
        and kind.run <= rule.run
        and kind.channels <= rule.channels
        and kind.heads <= rule.heads
    )


def _wide(rows: int, kind: Rows) -> Tile:
    channels, run = (1 << (n - 1).bit_length() for n in (kind.channels, kind.run))
    if rows * channels > WIDE_MANY:
        tokens, warps = next((t, w) for most, t, w in WIDE_TILES if run <= most)
        return Tile(tokens, max(1, 1024 * warps // (tokens * channels)), warps)
    heads = max(1, 1024 // channels)
    if rows <= WIDE_FEWEST_ROWS:
        return Tile(2, heads, 8)
    if rows <= WIDE_FEW_ROWS:
        heads = max(1, min(16, 2048 // channels))
        return Tile(1, heads, max(1, heads * channels // 256))
    return Tile(1, heads, 8 if rows * channels <= WIDE_SOME else 4)
