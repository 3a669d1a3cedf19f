"""docs/how_it_works.md says what the stages really hand on."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from tests.way_document import FILE, channel, document, filled, way

pytestmark = pytest.mark.null
PINNED = dict(
    line.split("==")
    for line in (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    if "==" in line
)


def test_the_document_is_what_the_stages_say() -> None:
    """Names of nodes and lines of the model are those of pinned versions."""
    for package in ("torch", "transformers"):
        installed = importlib.metadata.version(package).partition("+")[0]
        if installed != PINNED[package]:
            pytest.skip(f"{package} is {installed}, the document is of {PINNED[package]}")
    assert FILE.read_text() == document(), "python -m tests.way_document writes it"


def test_a_channel_is_printed_as_its_formula() -> None:
    """y[i] = x[i] * cos[i] -+ x[i +- half] * sin[i], each x normed."""
    site = way().site
    value = way().reading.values[site.q.slot]
    x, cos, sin = (a.leaf for a in (site.q.x, site.q.cos, site.q.sin) if a)
    half = value.shape[-1] // 2
    for at, sign, partner in ((3, "-", half + 3), (half + 3, "+", 3)):
        first, second = channel(value, at).split(f" {sign} ")
        assert f"{x}[{at}]" in first and f"{cos}[{at}]" in first
        assert f"{x}[{partner}]" in second and f"{sin}[{at}]" in second


def test_a_part_that_the_text_lacks_is_an_error() -> None:
    with pytest.raises(AssertionError, match="more"):
        filled("{{one}}", {"one": "1", "more": "2"})
