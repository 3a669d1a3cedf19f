"""Tiny models of any rotary class of transformers, with random weights.

units.py says which there are, sizes.py and overrides.py shrink a config, inputs.py makes arguments,
model.py puts model and caches together.
"""
