"""fxfuse: a torch.compile backend that fuses the attention prelude of any traced model.

    model = torch.compile(model, backend=fxfuse.backend)

In a transformer a row of small kernels stands between the QKV projection and attention: reshape,
RMSNorm(q), RMSNorm(k), RoPE, KV-cache store. fxfuse finds these chains in the traced graph however
they are spelled, proves what it found, and puts one kernel in their place. See `explain` for what
was fused in a model and why the rest was not.
"""

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
