"""model.generate() of transformers, compiled as its user does it: by a CompileConfig, which runs
the prompt as it is and compiles the step of one token.

transformers makes a static cache anew in every call, and CUDA graphs are then recorded anew; a user
who calls often keeps one cache and hands it over. Both are timed.
"""

import dataclasses
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, ones_like

KEPT = "generate_kept"
PHASES = ("generate", KEPT)


@dataclasses.dataclass(frozen=True)
class Call:
    """Greedy generate() over a static cache of `slots`; cache: the one that is kept, or None."""

    model: Any
    prompt: Tensor
    tokens: int
    slots: int
    cache: Any

    def settings(self) -> dict[str, Any]:
        # Random weights end where they like; each call must make every token.
        self.model.generation_config.eos_token_id = None
        asked: dict[str, Any] = {"input_ids": self.prompt}
        asked |= {"attention_mask": ones_like(self.prompt)}
        asked |= {"max_new_tokens": self.tokens, "do_sample": False}
        if self.cache is not None:
            return asked | {"past_key_values": self.cache}
        return asked | {"cache_implementation": "static", "max_cache_len": self.slots}

    @property
    def eager(self) -> Callable[..., Any]:
        return functools.partial(self.model.generate, **self.settings(), disable_compile=True)

    def compiled(self, backend: Any, mode: str | None) -> Callable[..., Any]:
        """generate() whose steps of one token a backend compiles."""
        how = import_module("transformers").CompileConfig(backend=backend, mode=mode)
        # Without this transformers compiles on GPUs alone.
        how._compile_all_devices = True
        return functools.partial(self.model.generate, **self.settings(), compile_config=how)

    def second_logits(self, generate: Callable[..., Any]) -> Tensor:
        """Of the first step of one token, [B, vocabulary]."""
        made = generate(output_logits=True, return_dict_in_generate=True)
        slots = max(layer.max_cache_len for layer in made.past_key_values.layers)
        tokens = len(made.logits)
        if (slots, tokens) != (self.slots, self.tokens):
            raise ValueError(f"{tokens} tokens, {slots} slots; wanted {self.tokens}, {self.slots}")
        logits: Tensor = made.logits[1]
        return logits
