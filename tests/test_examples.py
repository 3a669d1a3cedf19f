"""Each example in examples/ as a user runs it: what it says, and the exit status."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
TOKENS = 17


def defines_a_chain(path: Path) -> bool:
    targets = [
        target
        for statement in ast.parse(path.read_text()).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    ]
    return any(isinstance(t, ast.Name) and t.id == "CHAIN" for t in targets)


CHAINS = sorted(path.stem for path in EXAMPLES.glob("*.py") if defines_a_chain(path))
ON_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
RUNS = [
    pytest.param("cpu", "float32", marks=pytest.mark.cpu),
    pytest.param("cpu", "bfloat16", marks=[pytest.mark.cpu, pytest.mark.long]),
    pytest.param("cuda", "float32", marks=ON_GPU),
    pytest.param("cuda", "bfloat16", marks=ON_GPU),
]


def shown(path: Path, *options: str) -> tuple[int, dict[str, str]]:
    """The exit status of a run and its lines by their first word."""
    command = [sys.executable, str(path), *options, "--tokens", str(TOKENS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.stdout, run.stderr
    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()[1:]]
    return run.returncode, {line[0]: line[1] for line in lines}


@pytest.mark.parametrize(("device", "dtype"), RUNS)
@pytest.mark.parametrize("name", CHAINS)
def test_an_example_is_found_fused_and_equal(name: str, device: str, dtype: str) -> None:
    status, lines = shown(EXAMPLES / f"{name}.py", "--device", device, "--dtype", dtype)
    assert list(lines) == ["found", "fused", "equal", "ratio"]
    assert re.match(r"\d+ × \w", lines["found"]), lines["found"]
    assert re.search(r"\w+ [1-9]\d* by \w+", lines["fused"]), lines["fused"]
    assert lines["equal"].endswith("what is not written is bitwise the same")
    assert float(lines["ratio"].split()[0]) > 0
    assert status == 0, lines


# --- the tour ----------------------------------------------------------------------------------

TOUR = sorted(EXAMPLES.glob("[0-9]*.py"))
# What must be fused, where that is more than a rotation.
FUSED = {
    "01_any_hf_model": r"rms_norm\(1\+w\) \+ rope",
    "02_generate": r"rms_norm \+ rope \+ store\(k,v\)",
    "09_registering_a_store": r"rope \+ store\(k,v\)",
}
# The others take half a minute each.
QUICK = ("08_reading_a_report",)


@pytest.mark.cpu
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else [pytest.mark.long]) for p in TOUR],
)
def test_a_step_of_the_tour(path: Path) -> None:
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    if run.stdout.startswith("left out:"):
        pytest.skip(run.stdout.strip())
    stages = FUSED.get(path.stem, "rope")
    assert re.search(rf"fxfuse: [1-9]\d* fused.*\n +[1-9]\d* × .*{stages}", run.stdout), run.stdout
    assert "equal: " in run.stdout


@pytest.mark.null
@pytest.mark.parametrize("path", TOUR, ids=lambda path: path.stem)
def test_a_step_is_short_and_says_what_it_shows(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{path.name}" in (ast.get_docstring(ast.parse(text)) or "")


@pytest.mark.null
def test_an_error_ends_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    tour = importlib.import_module("tour")
    x = torch.randn(100)
    tour.compare("x", x * (1 + 1e-6), x)
    with pytest.raises(SystemExit, match="wrong: x"):
        tour.compare("x", torch.cat((x[:99], -x[99:])), x)


# --- what the four lines must find -------------------------------------------------------------

BROKEN = """
import sys

sys.path.insert(0, {examples!r})
import torch
from showing import Chain, main


def half(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotated(x, cos, sin):
    return x * cos + half(x) * sin


def inputs(device, dtype, tokens):
    g = torch.Generator().manual_seed(0)
    x, cache = (torch.randn(1, n, 4, 16, generator=g) for n in (tokens, tokens + 2))
    angle = torch.rand(1, tokens, 1, 8, generator=g).repeat(1, 1, 1, 2)
    return tuple(t.to(device, dtype) for t in (x, angle.cos(), angle.sin(), cache))


{chain}
raise SystemExit(main(Chain("broken", run, inputs, {written})))
"""
PLAIN = "def run(x, cos, sin, cache):\n    return (x.exp(),)\n"
# Compiled it is another function than eagerly, which is the truth.
CARELESS = """
def run(x, cos, sin, cache):
    cache[:, : x.shape[1]] = rotated(x, cos, sin)
    if torch.compiler.is_compiling():
        {fault}
"""
FAULTS = {
    "nothing fused": (PLAIN, "()", "found", "nothing"),
    "an input that is no cache is written": (
        CARELESS.format(fault="x.mul_(2)"), "(3,)", "equal", "ELSEWHERE TOO WAS WRITTEN"
    ),
    "another row of a cache is written": (
        CARELESS.format(fault="cache[:, -1] += 1e-7"), "(3,)", "equal", "ELSEWHERE TOO WAS WRITTEN"
    ),
}  # fmt: skip


# Each is a program of its own: two of the three cases with the long tests.
LONG = {"nothing fused", "another row of a cache is written"}


@pytest.mark.cpu
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in FAULTS]
)
def test_what_is_wrong_is_told(name: str, tmp_path: Path) -> None:
    chain, written, line, told = FAULTS[name]
    path = tmp_path / "broken.py"
    path.write_text(BROKEN.format(examples=str(EXAMPLES), chain=chain, written=written))
    status, lines = shown(path, "--device", "cpu")
    assert status == 1 and lines[line].endswith(told), lines


@pytest.mark.cpu
@pytest.mark.long
def test_a_larger_error_than_stock_inductors_is_told(tmp_path: Path) -> None:
    """fxfuse given a chain that stock Inductor is not given."""
    chain = (
        "import fxfuse\n"
        "fxfuse.Backend.__call__ = (lambda call: lambda self, gm, *a, **k: (lambda f: lambda *x: "
        "[y * (1 + 1e-6) for y in f(*x)])(call(self, gm, *a, **k)))(fxfuse.Backend.__call__)\n"
        "def run(x, cos, sin, cache):\n    return (rotated(x, cos, sin),)\n"
    )
    path = tmp_path / "broken.py"
    path.write_text(BROKEN.format(examples=str(EXAMPLES), chain=chain, written="()"))
    status, lines = shown(path, "--device", "cpu")
    assert status == 1 and lines["found"].startswith("1 × rope"), lines
