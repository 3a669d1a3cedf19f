"""Settings of a Backend: one frozen dataclass, compared and hashed by value."""

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator
from typing import Literal

Compiler = Literal["inductor", "aot_eager", "eager"]
Numerics = Literal["inductor", "graph"]
Gate = Literal["auto", "always", "never"]

DISABLEABLE = (
    "attention",
    "store",
    "grouped_heads",
    "decode_attention",
    "projection",
    "input_norm",
)


class FxfuseError(RuntimeError):
    """An error of fxfuse's own: a wrong setting, or a refusal under strict=True."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a Backend works.

    strict     a rotation that is refused is an error that names it
    disable    stages left alone: "attention" (everything), "store" (cache writes stay the model's),
               "grouped_heads" (attention reads repeated heads as the model has them),
               "decode_attention" (attention with one query stays torch's),
               "projection" (the products that make q, k and v stay the compiler's),
               "input_norm" (so does the norm in front of these products)
    numerics   "inductor": float32 from load to store, one rounding; "graph": the graph's own
               rounding points, which the fused kernels do not keep, so that nothing is fused and
               the report says so
    compiler   what compiles the rewritten graph; "eager" and "aot_eager" call the ops as eager
               code does (on a CPU the reference), for fast tests
    gate       "auto": sites are fused where lowering.gate expects a gain; "always": wherever they
               are found; "never": none is, and the report lists what was left
    """

    strict: bool = False
    disable: tuple[str, ...] = ()
    numerics: Numerics = "inductor"
    compiler: Compiler = "inductor"
    gate: Gate = "auto"
    debug: bool = False

    def __post_init__(self) -> None:
        _check("compiler", self.compiler, ("inductor", "aot_eager", "eager"))
        _check("numerics", self.numerics, ("inductor", "graph"))
        _check("gate", self.gate, ("auto", "always", "never"))
        for stage in self.disable:
            _check("disable", stage, DISABLEABLE)

    def checks_sites(self) -> bool:
        """Whether debug mode is on, here or in the environment."""
        return self.debug or os.environ.get("FXFUSE_DEBUG", "0") not in ("", "0")


_disabled = contextvars.ContextVar("_disabled", default=False)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """What this thread compiles inside is handed to the compiler as it came.

    Example:
        fused, plain = (torch.compile(model, backend=fxfuse.backend) for _ in range(2))
        fused(x)
        with fxfuse.disabled():
            plain(x)

    What counts is where a call is compiled, which is the first one of its shapes: what was compiled
    before runs on as it was compiled. So a comparison in one process takes two torch.compile
    objects, and each keeps what it is afterwards. (torch shares compiled code between the objects
    of one model and equal backends; a backend that compiled something inside shares no more.)
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def is_disabled() -> bool:
    """Whether this thread is inside `disabled()`."""
    return _disabled.get()


def _check(name: str, got: str, wanted: tuple[str, ...]) -> None:
    if got not in wanted:
        raise FxfuseError(f"fxfuse.Backend: {name} is {got!r}, wanted one of {', '.join(wanted)}")
