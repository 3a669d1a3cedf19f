"""How many graphs were compiled, and how many attention layers were fused in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fxfuse


class GraphCounts:
    """The number of graphs that reach a backend, beside what fxfuse counts."""

    def __init__(self, compiler: str) -> None:
        self.graphs = 0
        self._backend = fxfuse.Backend(compiler=compiler)

    def __call__(self, gm: Any, inputs: Any, **kwargs: Any) -> Any:
        self.graphs += 1
        return self._backend(gm, inputs, **kwargs)

    @contextmanager
    def expect(self, rotary: int, stored: int) -> Iterator[None]:
        """Each graph compiled inside fuses `rotary` attention layers, `stored` with a store."""
        graphs, before = self.graphs, dict(fxfuse.counts())
        yield
        graphs, after = self.graphs - graphs, fxfuse.counts()
        got = {key: after.get(key, 0) - before.get(key, 0) for key in ("attention", "store")}
        want = {"attention": graphs * rotary, "store": graphs * stored}
        assert got == want, f"fused {got}, wanted {want}; {fxfuse.last_report()}"
