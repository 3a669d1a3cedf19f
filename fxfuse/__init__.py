"""fxfuse: a torch.compile backend that fuses the attention prelude of any traced model.

    model = torch.compile(model, backend=fxfuse.backend)

In a transformer a row of small kernels stands between the QKV projection and attention: reshape,
RMSNorm(q), RMSNorm(k), RoPE, KV-cache store. fxfuse finds these chains in the traced graph however
they are spelled, proves what it found, and puts one kernel in their place. See `explain` for what
was fused in a model and why the rest was not.

Importing fxfuse defines torch.ops.fxfuse; everything else is imported at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fxfuse import schemas  # noqa: F401  defines the ops

if TYPE_CHECKING:
    from fxfuse import ops as ops
    from fxfuse.entry import Backend, backend, explain
    from fxfuse.exported import fuse
    from fxfuse.lowering.providers import register_provider
    from fxfuse.patterns.registered import register_store
    from fxfuse.report import Report, counts, last_report
    from fxfuse.settings import FxfuseError, disabled

__all__ = [
    "Backend",
    "FxfuseError",
    "Report",
    "backend",
    "counts",
    "disabled",
    "explain",
    "fuse",
    "last_report",
    "register_provider",
    "register_store",
]
__version__ = "0.1.0"

# The module of each public name.
_HOMES = {
    "Backend": "fxfuse.entry",
    "FxfuseError": "fxfuse.settings",
    "Report": "fxfuse.report",
    "backend": "fxfuse.entry",
    "counts": "fxfuse.report",
    "disabled": "fxfuse.settings",
    "explain": "fxfuse.entry",
    "fuse": "fxfuse.exported",
    "last_report": "fxfuse.report",
    "register_provider": "fxfuse.lowering.providers",
    "register_store": "fxfuse.patterns.registered",
}


if not TYPE_CHECKING:  # so that a name nobody defined stays an error of the type checker

    def __getattr__(name: str) -> Any:
        if name == "ops":
            return importlib.import_module("fxfuse.ops")
        if name not in _HOMES:
            raise AttributeError(f"module 'fxfuse' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
