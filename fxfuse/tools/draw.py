"""`fxfuse draw`: the attention layer's graph before and after, as a picture."""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxfuse.entry import Fresh
from fxfuse.passes import fuse_graph
from fxfuse.report import Report
from fxfuse.settings import FxfuseError
from fxfuse.tools import models, svg
from fxfuse.tools.boxes import Box, layers_of

FORMS = (".svg", ".html")
STYLE = (
    "body{margin:16px;font-family:system-ui,sans-serif;font-size:12px}pre{overflow-x:auto}"
    "svg{max-width:100%;height:auto}#full:checked~div svg{max-width:none}"
)


def add_arguments(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Enter `draw` into a parser."""
    words = "Draw the graph of an attention layer before and after: fused ops coloured, the model's"
    draw = subcommands.add_parser(
        "draw",
        help="draw an attention layer before and after",
        description=f"{words} file and line where the pointer rests. No other program is needed.",
    )
    draw.add_argument("model", metavar="MODEL", help=models.WANTED)
    draw.add_argument("--out", type=Path, required=True, metavar="FILE", help=" or ".join(FORMS))
    models.add_arguments(draw)
    draw.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write one picture."""
    if args.out.suffix not in FORMS:
        raise FxfuseError(f"--out {args.out}: wanted a name that ends in {' or '.join(FORMS)}")
    given = models.given(args)
    arguments, call = given.call(args.cache, args.tokens)
    seen = Seeing()
    with torch.no_grad():
        model: Any = torch.compile(given.model, backend=seen)
        model(**arguments)
    if seen.report is None:
        raise FxfuseError(f"nothing is fused in {given.name}; fxfuse explain says why")
    drawn = picture(f"{given.name}, {call}", seen.layers)
    page = drawn if args.out.suffix == ".svg" else html(given.name, drawn, seen.report)
    args.out.write_text(page, encoding="utf-8")
    before, after = (sum(box.kind != "outside" for box in boxes) for boxes in seen.layers)
    print(f"{args.out}: a layer of {before} nodes before, {after} after")
    return 0


class Seeing(Fresh):
    """Keeps the boxes of the first layer that is fused; what was traced runs as eager code."""

    layers: tuple[list[Box], list[Box]] = ([], [])
    report: Report | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **asked: Any) -> Any:
        fused, report = fuse_graph(gm, self.settings)
        sites = [site for site in report.fused if site.op.startswith("fxfuse::")]
        if self.report is None and sites:
            sites.sort(key=lambda site: site.kind != "attention")
            self.layers, self.report = layers_of(gm, fused, sites[0]), report
        return fused.forward


def picture(title: str, layers: tuple[Sequence[Box], Sequence[Box]]) -> str:
    """Both graphs of a layer side by side, as SVG."""
    headings = (
        f"{name}: {sum(box.kind != 'outside' for box in boxes)} nodes"
        for name, boxes in zip(("before", "after"), layers, strict=True)
    )
    return svg.drawing(title, list(zip(headings, layers, strict=True)))


def html(title: str, drawn: str, report: Report) -> str:
    """A page that holds the picture, as wide as the window or in full, and the report, and asks for
    nothing from elsewhere.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{escape(title)} by fxfuse</title>
<style>{STYLE}</style>
</head>
<body>
<input type="checkbox" id="full"/><label for="full"> full size</label>
<div>
{drawn}
</div>
<pre>{escape(str(report))}</pre>
</body>
</html>
"""
