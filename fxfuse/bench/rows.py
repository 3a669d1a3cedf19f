"""What a run gives: rows of figures, with what follows from them, as a dataclass and as JSON."""

import dataclasses
import datetime
import json
import math
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fxfuse
from fxfuse.bench.opponents import INDUCTORS
from fxfuse.bench.shapes import CARRIED_COPY
from fxfuse.bench.timing import Spread


def told(problem: Exception) -> str:
    """An error in one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


@dataclasses.dataclass
class Figure:
    """One opponent on one row; what is wrong is not timed.

    marginal  µs that the prelude adds between two matrix products
    """

    error: float | None = None
    wrong: str | None = None
    us: Spread | None = None
    marginal: Spread | None = None
    compile_s: float = 0.0


@dataclasses.dataclass
class Fusion:
    """What fxfuse's report says of a chain; whole where one site holds all its stages."""

    whole: bool
    stages: list[str]
    providers: list[str]
    refused: list[str]


@dataclasses.dataclass
class Row:
    """One case and its figures.

    buffers     sets of buffers that a sample goes round
    placements  how often these were drawn anew
    copy_us     a plain kernel that moves as many bytes
    carried_us  µs of SGLang's kernel in another run, as they were; None where there is none
    """

    recipe: str
    shape: str
    layout: str
    tokens: int
    moved_bytes: int
    buffers: int = 0
    placements: int = 1
    eager_error: float = 0.0
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
    fusion: Fusion | None = None
    copy_us: float | None = None
    carried_us: float | None = None

    def us(self, name: str) -> float | None:
        figure = self.figures.get(name)
        return figure.us.median if figure and figure.us else None

    def best(self, names: Iterable[str] = INDUCTORS) -> str | None:
        """The fastest of some opponents."""
        times = {name: us for name in names if (us := self.us(name)) is not None}
        return min(times, key=times.__getitem__) if times else None

    def ratio(self, names: Iterable[str]) -> float | None:
        """How many times the fastest of some opponents takes fxfuse's time."""
        best, own = self.best(names), self.us("fxfuse")
        other = self.us(best) if best else None
        return other / own if other and own else None

    def peers(self) -> list[str]:
        return [name for name in self.figures if name not in (*INDUCTORS, "fxfuse")]

    def derived(self, copy_speed: float) -> dict[str, Any]:
        """Figures that follow from the others."""
        own = self.us("fxfuse")
        carried = None if self.carried_us is None else self.carried_us * CARRIED_COPY / copy_speed
        return {
            "against_default": self.ratio(["inductor"]),
            "against_best": self.ratio(INDUCTORS),
            "against_peers": self.ratio(self.peers()),
            "best": self.best(),
            "of_copy": self.moved_bytes / own / copy_speed if own else None,
            "carried_scaled_us": carried,
            "carried_met": own <= carried if own and carried else None,
        }


@dataclasses.dataclass
class Results:
    """All rows of a run, and where and how they came to be."""

    device: str
    copy_bytes_per_us: float
    smallest_kernel_us: float | None
    rows: list[Row]
    versions: dict[str, str]
    date: str
    command: str

    def means(self) -> dict[str, float]:
        """Geometric means over the rows that have the ratio."""
        found = {}
        for key in ("against_default", "against_best", "against_peers"):
            values = [v for r in self.rows if (v := r.derived(self.copy_bytes_per_us)[key])]
            if values:
                found[key] = math.exp(sum(map(math.log, values)) / len(values))
        return found

    def write(self, path: Path) -> None:
        data = dataclasses.asdict(self)
        for row, line in zip(self.rows, data["rows"], strict=True):
            line["derived"] = row.derived(self.copy_bytes_per_us)
        data["geometric_means"] = self.means()
        path.write_text(json.dumps(data, indent=1) + "\n")


def read_results(path: Path) -> Results:
    """What `Results.write` wrote."""
    data = json.loads(path.read_text())
    del data["geometric_means"]
    return Results(**data | {"rows": [_row(row) for row in data["rows"]]})


def _row(data: dict[str, Any]) -> Row:
    del data["derived"]
    figures = {}
    for name, figure in data["figures"].items():
        spreads = {key: figure[key] and Spread(**figure[key]) for key in ("us", "marginal")}
        figures[name] = Figure(**figure | spreads)
    fusion = data["fusion"] and Fusion(**data["fusion"])
    return Row(**data | {"figures": figures, "fusion": fusion})


def started(device: str, copy_speed: float, smallest_us: float | None = None) -> Results:
    """Results without rows yet."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    versions = {"fxfuse": fxfuse.__version__, "torch": torch.__version__}
    versions |= {"python": platform.python_version()}
    if device == "cuda":
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
    command = " ".join(["fxfuse", *sys.argv[1:]])
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Results(name, copy_speed, smallest_us, [], versions, date, command)


def _cpu_name() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
