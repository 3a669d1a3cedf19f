"""`fxfuse draw`: the boxes of a layer, where they are placed, and pages that parse."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse import cli
from fxfuse.tools import draw, svg
from fxfuse.tools.boxes import Box
from tests.spellings import rsqrt
from tests.toys import Attention, Layer, by_index_copy, caches, hidden_states

pytestmark = pytest.mark.null
SVG = "{http://www.w3.org/2000/svg}"
T = 5


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class TwoLayers(torch.nn.Module):
    """What a picture leaves out: a second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention(norm=rsqrt), Attention(norm=rsqrt)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x).sum() + self.layers[1](x + 1).sum()


def seen(module: torch.nn.Module, *inputs: torch.Tensor) -> draw.Seeing:
    backend = draw.Seeing()
    with torch.no_grad():
        torch.compile(module, backend=backend)(*inputs)
    return backend


def kinds(boxes: list[Box]) -> list[str]:
    return [box.kind for box in boxes]


def test_one_layer_of_several_is_drawn() -> None:
    before, after = seen(TwoLayers(), hidden_states()).layers
    for boxes in (before, after):
        assert [b.label for b in boxes if b.kind == "attention"] == ["scaled_dot_product_attention"]
    assert kinds(before).count("replaced") > 20 and "fused" not in kinds(before)
    assert "replaced" not in kinds(after)
    (fused,) = [box for box in after if box.kind == "fused"]
    assert fused.label == "fxfuse::norm_rope"


def test_hovering_shows_the_models_file_and_line() -> None:
    before, after = seen(TwoLayers(), hidden_states()).layers
    for box in before:
        assert box.kind == "outside" or "spellings.py:" in box.hover or "toys.py:" in box.hover
    (fused,) = [box for box in after if box.kind == "fused"]
    assert "rms_norm + rope, by loops" in fused.hover
    assert "in place of" in fused.hover and "spellings.py:" in fused.hover
    negated = next(box for box in before if box.label == "neg")
    assert negated.hover.splitlines()[2] == (
        "return torch.cat((-x[..., half:], x[..., :half]), dim=-1)"
    )


def test_what_a_fused_op_stands_for_is_told_in_the_graphs_order() -> None:
    before, after = seen(TwoLayers(), hidden_states()).layers
    (fused,) = [box for box in after if box.kind == "fused"]
    _, told = fused.hover.split("nodes:\n")
    lines = [box.hover.splitlines()[1] for box in before if box.kind == "replaced"]
    assert [line.strip() for line in told.splitlines()] == list(dict.fromkeys(lines))


def test_without_modules_what_is_replaced_and_its_neighbours_are_drawn() -> None:
    before, after = seen(Layer(by_index_copy), hidden_states(T), *caches()).layers
    assert kinds(after).count("fused") == 1 and "replaced" in kinds(before)
    (fused,) = [box for box in after if box.kind == "fused"]
    # Attention reads the caches as the op left them.
    (attention,) = [box for box in after if box.kind == "attention"]
    assert fused.name in attention.inputs


# --- placing -----------------------------------------------------------------------------------


@st.composite
def graphs(make: st.DrawFn) -> list[Box]:
    """Boxes that read some of those before them."""
    boxes: list[Box] = []
    for i in range(make(st.integers(0, 24))):
        names = [box.name for box in boxes]
        inputs = make(st.lists(st.sampled_from(names), unique=True, max_size=4)) if names else []
        label = make(st.text(max_size=30, alphabet="abc<>&\"' ×"))
        boxes.append(Box(f"n{i}", "plain", label, "2×4 f32", f"<{label}>", tuple(inputs)))
    return boxes


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_boxes_stand_below_what_they_read_and_beside_each_other(boxes: list[Box]) -> None:
    layers = svg.placed(boxes)
    at = {p.box.name: p for layer in layers for p in layer if p.box}
    assert at.keys() == {box.name for box in boxes}
    for box in boxes:
        assert all(at[name].layer < at[box.name].layer for name in box.inputs)
    for layer in layers:
        for a, b in itertools.pairwise(sorted(layer, key=lambda p: p.x)):
            assert b.x - a.x >= (a.width + b.width) / 2 + svg.GAP - 1e-6
    ET.fromstring(svg.drawing("<&>", [("before", boxes), ("after", boxes)]))


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_no_edge_passes_behind_a_box(boxes: list[Box]) -> None:
    """Edges bend between layers, and pass a layer upright in the place they keep there."""
    drawn = ET.fromstring(svg.drawing("", [("before", boxes)]))
    places = {place.x for layer in svg.placed(boxes) for place in layer}
    for path in drawn.iter(f"{SVG}path"):
        bend, _, upright = (path.get("d") or "").partition("V")
        start, *_, end = (tuple(map(float, at.split())) for at in re.split("[MC]", bend)[1:])
        assert start[1] % svg.LAYER == svg.HEIGHT and end[-1] == start[1] + svg.LAYER - svg.HEIGHT
        assert min(abs(end[-2] - x) for x in places) < 0.06
        assert not upright or float(upright) == end[-1] + svg.HEIGHT


# --- pages -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that are open, and all that is asked for from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.titles += tag == "title"
        assert not {"src", "href", "xlink:href"} & {name for name, _ in attrs}, attrs
        assert tag not in ("script", "link", "img", "iframe")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_holds_all_that_it_shows() -> None:
    backend = seen(TwoLayers(), hidden_states())
    drawn = draw.picture("a <toy>", backend.layers)
    assert backend.report is not None
    text = draw.html("a <toy>", drawn, backend.report)
    page = Page(text)
    assert page.open == [] and page.titles == 1 + sum(map(len, backend.layers))
    assert "url(" not in text and "@import" not in text
    assert text.replace("http://www.w3.org/2000/svg", "").count("//") == 0
    assert "1 × rms_norm + rope" in text or "2 × rms_norm + rope" in text


def test_the_command_draws_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "qwen3.svg"
    assert cli.main(["draw", "Qwen3", "--out", str(out), "--device", "cpu"]) == 0
    root = ET.parse(out).getroot()
    hovers = [t.text or "" for g in root.iter(f"{SVG}g") for t in g.findall(f"{SVG}title")]
    assert any("modeling_qwen3.py:" in hover for hover in hovers)
    fused = [g for g in root.iter(f"{SVG}g") if g.get("class") == "box fused"]
    assert [g.findtext(f"{SVG}text") for g in fused if g.find(f"{SVG}title") is not None] == [
        "fxfuse::norm_rope_store_"
    ]
    assert "a layer of 59 nodes before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["Qwen3", "--out", "x.png"], "--out x.png: wanted a name that ends in .svg or .html"),
        (["GPT2", "--out", "x.svg"], "nothing is fused in GPT2Model"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    words: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["draw", *words, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert reason in err and out == "" and not list(tmp_path.iterdir())
