"""How a fused op becomes code: a table of providers, a Triton kernel, loops for Inductor."""

# Our own providers stand in the table before anyone can enter another, which is asked before them.
from fxfuse.lowering import targets  # noqa: F401
