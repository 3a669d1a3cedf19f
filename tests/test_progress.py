"""How far long work is: on a terminal with rich, without it, and in a log."""

from __future__ import annotations

import importlib.util
import io
import sys
from typing import Any

import pytest

from fxfuse.progress import progress

pytestmark = pytest.mark.null


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> str:
    """What is on stderr after two steps of three."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress(3) as begin:
        begin("first [of] all")
        begin("second")
    return stderr.getvalue()


def test_rich_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    text = shown(monkeypatch, Terminal())
    assert "0/3" in text and "first [of] all" in text
    assert "1/3" in text and "second" in text


def test_without_rich_each_step_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec: Any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "rich" else find_spec(n)
    )
    text = shown(monkeypatch, Terminal())
    assert text.splitlines() == ["[1/3, 0 s] first [of] all", "[2/3, 0 s] second"]


def test_a_log_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == ""


def test_an_error_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ZeroDivisionError), progress(1) as begin:
        begin("dividing")
        _ = 1 // 0
