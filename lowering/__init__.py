"""How a fused op becomes code: providers for each target, Triton kernels, loops for Inductor's own code generators."""
