"""How a fused op becomes code: a table of providers, a Triton kernel, loops for Inductor."""
