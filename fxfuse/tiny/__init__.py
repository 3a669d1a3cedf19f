"""Tiny models of any rotary class of transformers and diffusers, with random weights.

units.py says which there are, sizes.py and overrides.py shrink a config, inputs.py makes arguments,
model.py puts model and caches together, weights.py lets errors show; diffusion*.py are the same for
diffusers, with an entry for each model.
"""
