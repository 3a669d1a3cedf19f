"""What a refusal says beside its reason, and the document that shows it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxfuse
from fxfuse.patterns import advice
from fxfuse.patterns.advice import ADVICE, BEFORE, UNKNOWN, advice_for
from tests.refusal_document import EXAMPLES, FILE, Example, document, refusals
from tests.spellings import Rope
from tests.test_refusals import no_partner
from tests.toys import Attention, explain, hidden_states

pytestmark = pytest.mark.null
PATTERNS = Path(advice.__file__).parent
RAISED = ("Refused", "Untried", "Disproved")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def reasons() -> Iterator[str]:
    """Every reason that is written out in the sources, with a number for what is filled in."""
    for path in sorted(PATTERNS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in RAISED:
                parts = getattr(node.args[0], "values", [node.args[0]])
                texts = [getattr(part, "value", None) for part in parts]
                if any(isinstance(text, str) for text in texts):
                    yield "".join(t if isinstance(t, str) else "[2]" for t in texts)


@pytest.mark.parametrize("reason", sorted(set(reasons())))
def test_every_reason_has_its_advice(reason: str) -> None:
    assert advice_for(reason) is not UNKNOWN
    assert advice_for(BEFORE + reason) is advice_for(reason)


def test_every_entry_is_for_some_reason() -> None:
    """But for the reasons that a planner puts together."""
    told = [*reasons(), "a cache that grows by cat is made anew, not written to"]
    told += ["aten.foo_.default is no cache write that is known"]
    told += ["the call cannot be expanded: DataDependentOutputException: aten.item.default"]
    told += ["the call my_op is not read"]
    assert {advice_for(reason) for reason in told} == set(ADVICE)


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("channel 3 has no partner", "rotate_half"),
        ("a norm over 8 channels of 16", "F.rms_norm"),
        ("operands on cpu and cuda:0", "one device"),
        ("cos channels at irregular places", "repeat_interleave"),
        ("heads at irregular places of the projection", "split, chunk"),
        ("a k alone that is turned by tables of each head", "tables"),
        ("a weight that differs by row", "parameter"),
        ("to is written between its use and the fused op", "move that write"),
        ("slots below 0 are wrap where those of k are invalid", "same slots"),
        ("an error of fxfuse: KeyError: 1", "please report"),
    ],
)
def test_the_advice_is_of_the_reasons_own_kind(reason: str, word: str) -> None:
    found = advice_for(reason)
    assert word in f"{found.wanted} {found.do}"


def test_the_report_says_found_wanted_where_and_what_to_do() -> None:
    report = explain(Attention(Rope(no_partner)), hidden_states())
    text = str(report)
    for part in ("has no partner", "test_refusals.py:", "wanted: each channel", "to do: compare"):
        assert part in text
    (first, *_) = json.loads(report.to_json())["refused"]
    assert first["wanted"].startswith("each channel turned with one other") and first["do"]


def test_strict_says_it_too() -> None:
    with torch.no_grad(), pytest.raises(Exception, match="to do: compare the rotation"):
        torch.compile(
            Attention(Rope(no_partner)), backend=fxfuse.Backend(strict=True, compiler="eager")
        )(hidden_states())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.title)
def test_each_example_is_refused_at_a_line_of_its_code(example: Example) -> None:
    found = refusals(example)
    assert found
    for refusal in found:
        assert refusal.stage == "cut" or refusal.where.startswith("model.py:")


def test_the_document_is_what_the_examples_say() -> None:
    assert FILE.read_text() == document(), "python -m tests.refusal_document writes it"
