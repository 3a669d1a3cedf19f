"""The entry: the backend torch.compile calls, and explain.

What compiles is imported by the first compile, so that having a backend costs next to nothing.
"""

import dataclasses
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxfuse.garbage import collected_later
from fxfuse.settings import Settings, is_disabled

if TYPE_CHECKING:
    from fxfuse.report import Report

_state = threading.local()


class Backend:
    """A torch.compile backend that fuses attention preludes, then compiles as Inductor does.

    Example:
        model = torch.compile(model, backend=fxfuse.Backend(strict=True))

    Keywords are those of `Settings`. Backends compare and hash by their settings, so that a new
    instance with equal settings compiles nothing anew. One that compiled something inside
    `fxfuse.disabled()` is equal to none any more, nor is any inside it: what is fused and what is
    not must not run in each other's place.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.was_disabled = False
        self.__name__ = "fxfuse"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        """Compile one Dynamo graph. mode and options are Inductor's."""
        compiling = what_compiles()

        def compile_graph(fused: fx.GraphModule, tag: str) -> Any:
            return self._compile(fused, list(example_inputs), mode, options, tag)

        self.was_disabled |= is_disabled()
        compiled, report = compiling.compiled(gm, self.settings, compile_graph)
        for collected in getattr(_state, "collecting", ()):
            collected.add(report)
        return compiled

    def _compile(
        self, gm: fx.GraphModule, inputs: list[Any], mode: Any, options: Any, tag: str
    ) -> Any:
        from fxfuse import torch_private
        from fxfuse.lowering import providers

        if self.settings.compiler != "inductor":
            return torch_private.compile_with(self.settings.compiler, gm, inputs)
        providers.register()
        with providers.starting_anew():
            return torch_private.compile_with_inductor(gm, inputs, mode, options, tag)

    def reset(self) -> None:
        """Called by torch.compiler.reset()."""
        from fxfuse import torch_private

        if self.settings.compiler == "inductor":
            torch_private.reset_inductor()

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is type(self)
            and self.settings == other.settings
            and not (self.was_disabled or other.was_disabled or is_disabled())
        )

    def __hash__(self) -> int:
        return hash(self.settings)

    def __repr__(self) -> str:
        changed = {
            f.name: getattr(self.settings, f.name)
            for f in dataclasses.fields(self.settings)
            if getattr(self.settings, f.name) != f.default
        }
        return f"fxfuse.Backend({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


def what_compiles() -> ModuleType:
    """The module that compiles, imported by the first call."""
    with collected_later():
        from fxfuse import compiling
    return compiling


class Fresh(Backend):
    """A backend equal to no other, so that what it compiles is compiled anew."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def explain(
    model: Any, *args: Any, mode: str | None = None, compiler: Any = "inductor", **kwargs: Any
) -> "Report":
    """Compile and run a model afresh and say what was fused, what was not, and why.

    Example:
        print(fxfuse.explain(model, input_ids))
        fxfuse.explain(toy_module, x, compiler="eager").fused[0].record

    `mode` and `compiler` are torch.compile's and Backend's; all else goes to the model, which is
    really run: a cache among the arguments is written to.
    """
    from fxfuse.report import Report

    report = Report()
    collecting = _state.collecting = [*getattr(_state, "collecting", ()), report]
    try:
        compiled: Any = torch.compile(model, backend=Fresh(compiler=compiler), mode=mode)
        compiled(*args, **kwargs)
    finally:
        collecting.remove(report)
    return report


backend = Backend()
