"""Boxes as a drawing: placed layer by layer, without any other program.

In: panels of boxes, each with a heading. Out: SVG as text; hovering shows a box's own words. A box
stands below all that it reads; an edge over several layers keeps a place in each.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from html import escape

from fxfuse.tools.boxes import Box

LAYER, HEIGHT, GAP, MARGIN, LETTER, TOP = 62, 38, 18, 24, 6.6, 64
SWEEPS = 8
# Fill, border and text of each kind of box, and what the legend says of it.
KINDS = {
    "fused": ("#1f7a4d", "#14532d", "#ffffff", "fused op"),
    "replaced": ("#fbd38d", "#b7791f", "#1a202c", "nodes that it replaces"),
    "projection": ("#dbeafe", "#6b8fc9", "#1a202c", "matrix product"),
    "attention": ("#e9d8fd", "#805ad5", "#1a202c", "attention"),
    "plain": ("#ffffff", "#a0aec0", "#1a202c", "left to the compiler"),
    "outside": ("#f1f5f9", "#a0aec0", "#475569", "from outside the layer"),
}


@dataclasses.dataclass(eq=False)
class Place:
    """Where a box stands, or where an edge passes a layer; x is its middle."""

    layer: int
    width: float
    box: Box | None = None
    x: float = 0.0
    above: list["Place"] = dataclasses.field(default_factory=list)
    below: list["Place"] = dataclasses.field(default_factory=list)


def drawing(title: str, panels: Sequence[tuple[str, Sequence[Box]]]) -> str:
    """Panels side by side under a title, with a legend."""
    left, height, parts = float(MARGIN), 0.0, []
    for heading, boxes in panels:
        layers = placed(boxes)
        every = [p for layer in layers for p in layer]
        start = min((p.x - p.width / 2 for p in every), default=0.0)
        width = max((p.x + p.width / 2 for p in every), default=0.0) - start
        parts.append(f'<g transform="translate({left - start:.1f} {TOP + 2 * MARGIN})">')
        parts.append(f'<text class="heading" x="{start:.1f}" y="-14">{escape(heading)}</text>')
        parts += [_edge(a, b) for a in every for b in a.below]
        parts += [_box(p, p.box) for p in every if p.box is not None]
        parts.append("</g>")
        left, height = left + max(width, 320.0) + 3 * MARGIN, max(height, len(layers) * LAYER)
    size = f"{left:.0f} {height + TOP + 3 * MARGIN:.0f}"
    width_px, height_px = size.split()
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{width_px}" '
            f'height="{height_px}" font-family="system-ui, sans-serif" font-size="11">',
            f"<style>{_style()}</style>",
            f'<rect width="{width_px}" height="{height_px}" fill="#ffffff"/>',
            f'<text class="title" x="{MARGIN}" y="28">{escape(title)}</text>',
            *_legend(),
            *parts,
            "</svg>",
        )
    )


def placed(boxes: Sequence[Box]) -> list[list[Place]]:
    """The layers from top to bottom, each from left to right."""
    places: dict[str, Place] = {}
    for box in boxes:
        layer = 1 + max((places[name].layer for name in box.inputs if name in places), default=-1)
        width = LETTER * max(len(box.label), len(box.shape)) + 16
        places[box.name] = Place(layer, width, box)
    _lower_sources(boxes, places)
    every = list(places.values())
    for box in boxes:
        for name in (n for n in box.inputs if n in places):
            every += _join(places[name], places[box.name])
    count = 1 + max((p.layer for p in every), default=-1)
    layers: list[list[Place]] = [[] for _ in range(count)]
    for place in every:
        layers[place.layer].append(place)
    for row in layers:
        _spread(row)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in layers if down else reversed(layers):
            for place in row:
                near = (place.above if down else place.below) or place.above + place.below
                if near:
                    place.x = sum(p.x for p in near) / len(near)
            _spread(row)
    return layers


def _lower_sources(boxes: Sequence[Box], places: dict[str, Place]) -> None:
    """What nothing leads to stands right above its first reader."""
    for source in (b for b in boxes if not b.inputs):
        readers = [places[b.name].layer for b in boxes if source.name in b.inputs]
        places[source.name].layer = max(0, min(readers, default=1) - 1)


def _join(start: Place, end: Place) -> list[Place]:
    """An edge, with a place in every layer between; those places."""
    between = [Place(layer, 8.0) for layer in range(start.layer + 1, end.layer)]
    for a, b in itertools.pairwise([start, *between, end]):
        a.below.append(b)
        b.above.append(a)
    return between


def _spread(layer: list[Place]) -> None:
    """Side by side in the order of where they want to stand, as near to that as they can."""
    layer.sort(key=lambda p: p.x)
    wanted = [p.x for p in layer]
    edge = float("-inf")
    for place in layer:
        place.x = max(place.x, edge + place.width / 2)
        edge = place.x + place.width / 2 + GAP
    moved = sum(p.x - x for p, x in zip(layer, wanted, strict=True)) / max(1, len(layer))
    for place in layer:
        place.x -= moved


def _edge(a: Place, b: Place) -> str:
    """From one layer to the next: bent between them, upright where it passes a layer."""
    start, end = a.layer * LAYER + HEIGHT, b.layer * LAYER
    middle = (start + end) / 2
    through = "" if b.box else f"V{end + HEIGHT}"
    return (
        f'<path d="M{a.x:.1f} {start}C{a.x:.1f} {middle} {b.x:.1f} {middle} '
        f'{b.x:.1f} {end}{through}"/>'
    )


def _box(place: Place, box: Box) -> str:
    y, x = place.layer * LAYER, place.x
    lines = [box.label, box.shape] if box.shape else [box.label]
    first = y + HEIGHT / 2 + (4 if len(lines) == 1 else -3)
    words = "".join(
        f'<text x="{x:.1f}" y="{first + 13 * i:.1f}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    return (
        f'<g class="box {box.kind}"><title>{escape(box.hover)}</title>'
        f'<rect x="{x - place.width / 2:.1f}" y="{y}" width="{place.width:.1f}" '
        f'height="{HEIGHT}" rx="5"/>{words}</g>'
    )


def _legend() -> list[str]:
    parts, x = [], float(MARGIN)
    for kind, (*_, words) in KINDS.items():
        parts.append(
            f'<g class="box {kind}"><rect x="{x:.1f}" y="42" width="14" height="14" rx="3"/></g>'
            f'<text x="{x + 20:.1f}" y="53">{escape(words)}</text>'
        )
        x += 20 + LETTER * len(words) + 20
    return parts


def _style() -> str:
    rules = [
        ".title{font-size:15px;font-weight:600}",
        ".heading{font-size:13px;font-weight:600}",
        "path{fill:none;stroke:#94a3b8;stroke-width:1.2}",
        ".box text{text-anchor:middle}",
        ".box:hover rect{stroke-width:2.5}",
        ".outside rect{stroke-dasharray:4 3}",
    ]
    for kind, (fill, border, text, _) in KINDS.items():
        rules.append(f".{kind} rect{{fill:{fill};stroke:{border}}}.{kind} text{{fill:{text}}}")
    return "".join(rules)
