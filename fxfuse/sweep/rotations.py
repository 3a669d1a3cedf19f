"""How many attention layers rotate and store in an eager run, counted without fxfuse.

In: a model that runs eagerly inside `attention_calls`. Out: one `AttentionCall` for each call of an
attention module. A rotation is a call of a function that is named like one; what it returns, and
whether the KV cache is then handed that very tensor as its k, are noted on the call around it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

ROTATION = re.compile(
    r"_?(vision_)?apply_\w*(rotary|rope|rot(_|$))\w*"
    r"|_?apply_(rotary|rope)\w*"
    r"|_?rope_apply\w*|_?rotate_queries_or_keys\w*"
    r"|_?(rotate_half|rotate_pairwise|rotate_every_two)|_rope"
)
# These lay out the tables of a multi-axis embedding.
TABLES = re.compile(r"mrope($|_)")
ATTENTION = re.compile(r"attention|attn|MLA|MultiHead", re.IGNORECASE)
NOT_ATTENTION = re.compile(r"Norm|Rotary|Linear|Processor")
LAYER = re.compile(r"Layer|Block")


@dataclass(eq=False)
class AttentionCall:
    """One call of a module: the results of its rotations, and for each of its cache updates
    whether the k that goes in is one of them.
    """

    module: nn.Module
    rotated: list[Tensor] = field(default_factory=list)
    stores: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Rotary:
    """Counts of one eager run.

    layers    attention modules in which a rotation ran
    calls     calls of these modules (a layer that runs twice counts twice)
    tensors   results of rotations
    storing   calls that also update the cache
    straight  those of them whose k is a rotation's own result
    """

    layers: int
    calls: int
    tensors: int
    storing: int
    straight: int


def rotary_counts(calls: list[AttentionCall]) -> Rotary:
    rotating = [c for c in calls if c.rotated]
    return Rotary(
        layers=len({c.module for c in rotating}),
        calls=len(rotating),
        tensors=sum(len(c.rotated) for c in rotating),
        storing=sum(bool(c.stores) for c in rotating),
        straight=sum(any(c.stores) for c in rotating),
    )


@contextmanager
def attention_calls() -> Iterator[list[AttentionCall]]:
    """Every module call that rotated or stored inside; complete when the context ends."""
    stack: list[AttentionCall] = []
    finished: list[AttentionCall] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(AttentionCall(module))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        while stack:
            call = stack.pop()
            if call.rotated or call.stores:
                finished.append(call)
            if call.module is module:
                return

    with ExitStack() as context:
        context.enter_context(_cache_updates(stack))
        hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        for hook in hooks:
            context.callback(hook.remove)
        context.callback(sys.setprofile, None)
        sys.setprofile(_profile(stack))
        yield finished


def _owner(stack: list[AttentionCall]) -> AttentionCall | None:
    """The call that an event belongs to: of the innermost attention, else layer, else module."""
    for wanted in (_is_attention, LAYER.search):
        for call in reversed(stack):
            if wanted(type(call.module).__name__):
                return call
    return stack[-1] if stack else None


def _is_attention(name: str) -> bool:
    return bool(ATTENTION.search(name)) and not NOT_ATTENTION.search(name)


def is_rotation(function: str) -> bool:
    return bool(ROTATION.fullmatch(function)) and not TABLES.search(function)


def _profile(stack: list[AttentionCall]) -> Any:
    """A profiler that notes what the outermost of nested rotation functions returns."""
    depth = 0

    def profile(frame: FrameType, event: str, result: Any) -> None:
        nonlocal depth
        if event not in ("call", "return") or not is_rotation(frame.f_code.co_name):
            return
        depth += 1 if event == "call" else -1
        owner = _owner(stack)
        if event == "return" and depth == 0 and owner is not None:
            results = result if isinstance(result, (tuple, list)) else [result]
            owner.rotated += [r for r in results if isinstance(r, Tensor)]

    return profile


@contextmanager
def _cache_updates(stack: list[AttentionCall]) -> Iterator[None]:
    from transformers.cache_utils import Cache

    update = Cache.update

    def noted(self: Any, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        owner = _owner(stack)
        if owner is not None:
            owner.stores.append(any(key_states is r for r in owner.rotated))
        return update(self, key_states, *args, **kwargs)

    with mock.patch.object(Cache, "update", noted):
        yield
